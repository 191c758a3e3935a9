"""The cutting stage of `mode=cut`: the trained network is scored, cut and repaired at once, without training.

It is skipped where the cut network is on disk, in `checkpoint/cut` of the output directory.
"""

from __future__ import annotations

import csv
import io
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from gsprune import collectives
from gsprune.app.cut_settings import (
    SingleWeights,
    budget_kind,
    curve_rules,
    curve_shares,
    rules_of,
    settings_of,
    single_weights,
    with_budget,
)
from gsprune.app.stages.checkpoint import Dense, Phase
from gsprune.app.stages.context import load_or_compute
from gsprune.app.stages.lifecycle import save_model, track_model
from gsprune.app.stages.programs import keep_program
from gsprune.app.stages.pruning import check_trained, teacher_of
from gsprune.app.stages.training import Training
from gsprune.cutting.cut import Cut, Cutter, evaluated
from gsprune.cutting.how_much import HowMuch, largest_cut, right_or_wrong, value_of, values_of
from gsprune.cutting.size import Size
from gsprune.cutting.weights import WeightPruner
from gsprune.files.disk import read_object, write_atomic, write_json
from gsprune.files.layout import PROGRAM
from gsprune.formats.masks import load_masks, save_masks
from gsprune.formats.network import load_pruned, load_state, read_cut_plan, save_pruned
from gsprune.formats.tensors import state_tensors
from gsprune.plots.cut_figures import save_curve
from gsprune.pruner.pruner import Pruner
from gsprune.pruner.rule import Rule
from gsprune.repair.report import RepairReport
from gsprune.structures.example import logits_of
from gsprune.structures.twin import copy_of
from gsprune.surgery.cut_plan import CutPlan
from gsprune.text.display import logger

log = logger(__name__)
FOLDER = "checkpoint/cut"
CURVE = "curve"  # folder, table and picture of the other cuts
MASKS, RECORD = "masks.safetensors", "cut.json"


class CutPruner:
    """The pruner of a network that was cut, in a phase of recovery: its masks are final, its state is on disk."""

    def __init__(self, pruner: Pruner) -> None:
        self._pruner = pruner

    def __getattr__(self, name: str) -> Any:
        if name == "_pruner":
            raise AttributeError(name)
        return getattr(self._pruner, name)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing: the network was cut when it was read."""


def cut_network(training: Training, dense: Dense) -> Phase:
    """Cut the dense network; returns the phase of its recovery, which may have no epochs.

    Raises:
        ValueError: the dense network was not trained here and is no better than guessing; as `gsprune.cut`.
    """
    job, setup, history = training.job, training.setup, training.history
    check_trained(setup, dense, why="which mode=cut cuts")
    cut_off, found = _made_by_the_first(_CuttingStage(training, dense), first=job.first)
    if found and job.first:
        log.info("the network was cut before: %s", job.folder / FOLDER)
    pruner = _cut_to(setup.model, cut_off, setup.example)
    job.save_model = lambda: save_model(job, setup.model, pruner)
    job.result |= {"mode": "cut", "cut": cut_off.record}
    job.numbers |= _numbers(cut_off.record)
    if cut_off.record["curve"] and job.first:
        _keep_curve(training, cut_off.record["curve"])
    history.record_masks(setup.trainer.dense_epochs, pruner)
    epochs, offset = setup.trainer.prune_epochs, setup.trainer.dense_epochs
    optimizer, lr_schedule = setup.build_optimizer(epochs=epochs, lr=setup.trainer.prune_lr)
    return Phase("prune", epochs, offset, optimizer, lr_schedule, CutPruner(pruner), teacher_of(setup, dense))


class CutNetwork(NamedTuple):
    """What the stage leaves: the network's tensors as `state_tensors` gives them, its plan (None: none is smaller),
    masks, and what the result tells of it."""

    tensors: tuple[dict[str, Tensor], dict[str, str]]
    plan: CutPlan | None
    masks: Mapping[str, Tensor]
    record: dict[str, Any]


class _CuttingStage:
    def __init__(self, training: Training, dense: Dense) -> None:
        self._job, self._setup, self._dense = training.job, training.setup, dense
        self._settings, self._folder = settings_of(self._job.cfg), self._job.folder / FOLDER

    def load(self) -> CutNetwork | None:
        """The cut network of this job, if it is on disk and was cut from this dense network."""
        if self._setup.trainer.resume == "never":
            return None
        record = read_object(self._folder / RECORD)
        if record.get("of") != self._of() or None in record["of"].values():
            return None
        try:
            small = load_pruned(self._folder, copy_of(self._setup.model))
            plan, masks = read_cut_plan(self._folder), load_masks(self._folder / MASKS)
            return CutNetwork(state_tensors(small), plan, masks, record["cut"])
        except ValueError as error:
            log.warning("the network is cut again: %s", error)
            return None

    def cut(self) -> CutNetwork:
        """Score, choose, cut, repair; the cut network is measured on the validation split, other cuts on both."""
        job, setup, settings = self._job, self._setup, self._settings
        setup.seed(2)  # as for scoring
        if (wanted := single_weights(job.cfg)) is not None:
            return self._weights(wanted)
        rules, curve = rules_of(job.cfg.pruner), curve_rules(job.cfg)
        settle = [[rule, *curve.values()] for rule in rules]  # all that is cut at a known budget
        try:
            with job.watch.part("train"):
                cutter = Cutter(
                    setup.model,
                    setup.data.train,
                    cross_entropy,
                    rules,
                    samples=settings.calibration,
                    settle=settle if settings.max_drop is None else (),
                    example_input=setup.traced,
                    report=job.progress.part,
                )
                found = self._cut(cutter, rules)
            record = {**_told(found), "how_much": found.how_much and _how_much(found.how_much)}
            record["curve"] = [self._point(cutter, *point) for point in curve.items()]
        finally:
            job.progress.part("", 1.0)
        record["val_accuracy"] = self._measured(found.model, setup.data.val)["accuracy"]
        return self._kept(found.model, found.plan, found.keeps, record)

    def _weights(self, wanted: SingleWeights) -> CutNetwork:
        """Single weights pruned, and the others refitted; the same at the other points of the curve."""
        job, setup, settings = self._job, self._setup, self._settings
        began = time.perf_counter()
        given = vars(wanted) | {"repair": settings.repair is not None}
        sparsity = given.pop("sparsity")
        pruner = WeightPruner(
            setup.model,
            setup.data.train,
            cross_entropy,
            right_or_wrong(setup.data.val),
            confidence=settings.confidence,
            calibration=settings.calibration,
            report=job.progress.part,
            **given,
        )
        try:
            with job.watch.part("train"):
                found = pruner.prune(sparsity) if settings.max_drop is None else pruner.within(settings.max_drop)
            seconds = time.perf_counter() - began
            curve = [self._pruned_point(pruner, share) for share in curve_shares(settings)]
        finally:
            job.progress.part("", 1.0)
        assert found.dense is not None
        assert found.small is not None
        samples = min(settings.calibration, len(setup.data.train.dataset))
        record = {
            **{"criterion": type(wanted.criterion).__name__, "calibration": samples, "scored": samples},
            **{"seconds": seconds, "loss_dense": found.dense.loss, "loss": found.small.loss},
            **repaired_layers(found.report.repair),
            **{"how_much": found.how_much and _how_much(found.how_much), "curve": curve},
            "val_accuracy": self._measured(found.model, setup.data.val)["accuracy"],
        }
        return self._kept(found.model, None, found.masks, record)

    def _pruned_point(self, pruner: WeightPruner, share: float) -> dict[str, Any]:
        """The same network with that share of its weights, to the curve."""
        with self._job.watch.part("train"):
            made = pruner.prune(1 - share)
        assert made.dense is not None
        assert made.small is not None
        left = 1 - made.report.sparsity
        return self._kept_point(made.model, None, ("weights", share, left), made.small)

    def _cut(self, cutter: Cutter, rules: Sequence[Rule]) -> Cut:
        """The cut that the rules ask for, or the largest that `cut.max_drop` allows; with a bound of its drop."""
        settings, model = self._settings, self._setup.model
        evaluate = right_or_wrong(self._setup.data.val)
        base = value_of(evaluate, model)
        if settings.max_drop is None:
            found = cutter.cut(rules, repair=settings.repair)
            return evaluated(found, base, value_of(evaluate, found.model), settings.confidence)

        def cut_to(share: float) -> tuple[Cut, nn.Module]:
            made = cutter.cut([with_budget(rules[0], share)], repair=settings.repair)
            return made, made.model

        found, how_much = largest_cut(
            values_of(base),
            cut_to,
            evaluate,
            max_drop=settings.max_drop,
            confidence=settings.confidence,
            note=self._job.progress.part,
        )
        return replace(found, how_much=how_much)

    def _point(self, cutter: Cutter, share: float, rule: Rule) -> dict[str, Any]:
        """Another cut of the same network: its files, and a row of the curve."""
        kind = str(budget_kind(rule))
        with self._job.watch.part("train"):
            made = cutter.cut([rule], repair=self._settings.repair)
        cost = getattr(made.small, kind, None), getattr(made.dense, kind, None)
        left = cost[0] / cost[1] if cost[0] and cost[1] else share
        return self._kept_point(made.model, made.plan, (kind, share, left), made.small)

    def _kept_point(
        self, model: nn.Module, plan: CutPlan | None, of: tuple[str, float, float], size: Size
    ) -> dict[str, Any]:
        """Write a network of the curve and measure it; `of` is the kind of its budget, that, and what is left."""
        job, setup, (kind, share, left) = self._job, self._setup, of
        name = f"{kind}-{100 * share:g}".replace(".", "_")
        folder, extra = job.folder / CURVE / name, {"config_hash": job.result["config_hash"]}
        with job.watch.part("files"):
            job.writer.write(f"{CURVE}/{name}", lambda: save_pruned(folder, model, plan, extra=extra))
        keep_program(job, model, setup.example, folder / PROGRAM)
        test, val = (self._measured(model, split) for split in (setup.data.test, setup.data.val))
        numbers = {"accuracy": test["accuracy"], "loss": test["loss"], "val_accuracy": val["accuracy"]}
        cost = {"params": size.params, "macs": size.macs}
        return {"name": name, "of": kind, "budget": share, "left": left, **cost, **numbers}

    def _measured(self, model: nn.Module, split: Any) -> dict[str, float]:
        with self._job.watch.part("measure"):
            return self._setup.trainer.evaluate(model, split)

    def _kept(
        self, model: nn.Module, plan: CutPlan | None, masks: Mapping[str, Tensor], record: dict[str, Any]
    ) -> CutNetwork:
        self._model = model
        return CutNetwork(state_tensors(model), plan, masks, record)

    def store(self, made: CutNetwork) -> None:
        """Write the network first, and last what says that it is whole."""

        def write() -> None:
            save_pruned(self._folder, self._model, made.plan)
            save_masks(self._folder / MASKS, made.masks)
            write_json(self._folder / RECORD, {"of": self._of(), "cut": made.record})

        self._job.writer.write(FOLDER, write, "an interrupted job cuts the network again")

    def _of(self) -> dict[str, str | None]:
        return {"config_hash": self._job.result["config_hash"], "dense": self._dense.sha256}


def cross_entropy(outputs: Any, labels: Tensor) -> Tensor:
    """Of what a network returns, the mean over a batch."""
    return F.cross_entropy(logits_of(outputs).float(), labels)


def _cut_to(model: nn.Module, made: CutNetwork, example: Any) -> Pruner:
    """Make `model` the cut network; returns a pruner that has cut it and knows its masks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is left whole: the cut has told it
        pruner = Pruner.from_masks(model, made.masks, example_input=example)
        pruner.finish()
    load_state(model, *made.tensors)
    return pruner


def _made_by_the_first(stage: _CuttingStage, *, first: bool) -> tuple[CutNetwork, bool]:
    """What the first process cuts or reads, and whether it was on disk, in all of them.

    The first one reads all samples itself, so that the result is that of one process; the others wait.
    """
    made: tuple[CutNetwork, bool] | None = None
    if first:
        with collectives.alone():
            made = load_or_compute(stage.load, stage.cut, stage.store)
    made = collectives.broadcast(made)
    assert made is not None
    return made


def _keep_curve(training: Training, rows: Sequence[Mapping[str, Any]]) -> None:
    """The table and the picture of all cuts, and each as a logged model."""
    job, kind = training.job, rows[0]["of"]
    dense = {name: job.result[f"baseline_{name}"] for name in ("accuracy", "val_accuracy")}
    with job.watch.part("files"):
        job.writer.write(f"{CURVE}.csv", lambda: _write_csv(job.folder / f"{CURVE}.csv", rows))
        job.writer.write(
            f"figures/{CURVE}.png",
            lambda: save_curve(job.folder / "figures" / f"{CURVE}.png", rows, kind=kind, dense=dense),
        )
    with job.watch.part("tracking"):
        job.track_file(f"{CURVE}.csv")
        for row in rows:
            settings = {f"budget.{kind}": f"{row['budget']:g}", "criterion": job.result["cut"]["criterion"]}
            files, step = sorted((job.folder / CURVE / row["name"]).glob("*")), round(100 * row["budget"])
            track_model(job, row["name"], files, params=settings, numbers=row, step=step)


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*rows[0]])
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """What MLflow gets of a cut, besides the numbers of the result: of before any recovery."""
    names = ("val_accuracy", "loss", "loss_dense")
    return {f"cut/{name}": float(record[name]) for name in names if record[name] is not None}


def _how_much(found: HowMuch) -> dict[str, Any]:
    """What result.json holds of the search for the largest cut."""
    chosen = found.chosen
    told = {"max_drop": found.max_drop, "confidence": found.confidence, "samples": found.samples}
    return {**told, "share": chosen.share, "bound": chosen.bound, "lost": chosen.lost, "gained": chosen.gained}


def _told(found: Cut) -> dict[str, Any]:
    """What result.json holds of a cut."""
    return {
        "criterion": found.criterion,
        "calibration": found.samples,
        "scored": found.scored,
        "seconds": found.seconds,
        "loss_dense": found.dense.loss,
        "loss": found.small.loss,
        **repaired_layers(found.repaired),
    }


def repaired_layers(report: RepairReport | None) -> dict[str, Any]:
    """Of each repaired layer its output's error before and after, and why others were left."""
    layers = () if report is None else report.repaired
    return {
        "repaired": {layer.name: [layer.before, layer.after] for layer in layers if math.isfinite(layer.before)},
        "not_repaired": {} if report is None else report.left,
    }
