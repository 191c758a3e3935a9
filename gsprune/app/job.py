"""One job: train a dense network, prune it, shrink it, measure both, write down everything.

`run` is what `train.py` calls with the composed configuration. This is the edge of the package: it may import
every other room, and hydra and omegaconf to build things from the configuration. No other room imports it.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import logging
import os
import platform
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch import __version__ as torch_version
from torch.optim import Optimizer

from gsprune import collectives
from gsprune.app import forecast_tables, launcher
from gsprune.app.composed import (
    NUMBERS,
    TIMED,
    build,
    check_objective,
    check_plan,
    complete,
    from_command,
    hydra_choices,
    hydra_tags,
    is_timed,
    objective_names,
    run_name,
)
from gsprune.app.console import Progress, epoch_line, make_progress, print_summary, to_log_file
from gsprune.app.earlier import (
    SETTINGS,
    alone,
    finished_before,
    finished_here,
    how_to_go_on,
    of_another,
    on_record,
    tidy,
)
from gsprune.app.memory import is_out_of_memory, smaller_steps
from gsprune.app.several import as_torchrun_has_it, run_in_several, run_under_torchrun
from gsprune.cost import counting, latency
from gsprune.files.disk import put_aside, read_object, reason, refusing, sha256, spared, write_atomic, write_json
from gsprune.files.layout import TRACKING as RECORD
from gsprune.forecast import plan as plan_
from gsprune.forecast import predict
from gsprune.formats.masks import save_masks
from gsprune.formats.network import WEIGHTS, load_state, save_pruned
from gsprune.formats.scores import save_scores
from gsprune.formats.tensors import state_tensors
from gsprune.plots import drawing, run_figures
from gsprune.pruner.pruner import NoPruning
from gsprune.pruner.pruners import Pruners
from gsprune.settings.hydra_files import clean_files, refuse_passwords
from gsprune.settings.identity import (
    SCORES,
    config_hash,
    dense_key,
    differences,
    package_versions,
    scores_key,
    scores_path,
)
from gsprune.settings.recorded import hide, recorded
from gsprune.structures.example import call, inputs_and_labels, logits_of, map_tensors
from gsprune.structures.twin import copy_of
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.cut_plan import CutPlan
from gsprune.sweeps.dense_cache import BASELINE, DenseCache, DenseRecord
from gsprune.sweeps.record import Sweep, current_sweep, last_line
from gsprune.text.display import logger
from gsprune.text.names import told
from gsprune.text.redact import guard_logs
from gsprune.tracking.store import download_artifact
from gsprune.tracking.tracker import SilentTracker, Tracker, read_metrics
from gsprune.training.checkpoints import Checkpoints, Saved, read_state
from gsprune.training.guard import not_finite, unbounded
from gsprune.training.optimization import Schedule, make_optimizer
from gsprune.training.position import Position
from gsprune.training.signals import Interrupted, Stop
from gsprune.training.trainer import Trainer, seed_everything

log = logger(__name__)
# Seconds of a job, by what they went to.
PARTS = ("start", "train", "measure", "files", "tracking")
DENSE = Path("checkpoint", "dense.safetensors")
# What a checkpoint of a job holds; `job` is what the job itself has noted up to then.
SAVED: Mapping[str, Any] = {
    **dict.fromkeys(("config_hash", "phase"), str),
    "made_on": (str, dict),
    **dict.fromkeys(("model", "optimizer", "lr_schedule", "pruner", "position", "job"), dict),
    "dense": (str, NoneType),  # sha256 of DENSE; None: it could not be written, and is `dense_model`
    "others": list,
}
NOTES: Mapping[str, Any] = {
    **dict.fromkeys(("rows", "overrides"), list),
    **dict.fromkeys(("costed", "recorded"), int),
    **dict.fromkeys(("baseline", "seconds"), dict),
    "cost": tuple,
    "dense_note": (dict, NoneType),
    "dense_val": (float, int, NoneType),
}
POSITION: Mapping[str, Any] = {
    **dict.fromkeys(("epoch", "step"), int),
    **dict.fromkeys(("parts", "order", "random"), dict),
    "seconds": float,
    "totals": (dict, NoneType),
}
# How a rehearsal sees the network: what the device does faster changes nothing that is refused.
REHEARSED: Mapping[str, Any] = {
    **dict.fromkeys(("compile", "fused", "deterministic"), False),
    **{"device": "cpu", "precision": "fp32", "progress": "none"},
}
PHASES = 3  # that draw random numbers, each from a seed of its own


def run(cfg: DictConfig, *, output_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Run the job that `cfg` describes; return what it also writes to `result.json`.

    A job that has finished before in its folder, or in any of its sweep, is not done again: its result is returned.
    A job that was interrupted or killed goes on from the newest checkpoint in its folder. On any exception
    `result.json` says `failed` (`interrupted` after SIGTERM or Ctrl-C) with the error's last line, tracking is told,
    and the exception goes on.

    Raises:
        ValueError: a mistake in the configuration, in one sentence.
        Interrupted: SIGTERM or SIGINT has come; the step was finished and a checkpoint written.
    """
    folder, sweep, cfg = Path(output_dir).absolute(), current_sweep(), from_command(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    if HydraConfig.initialized():
        clean_files(HydraConfig.instance().cfg)  # type: ignore[arg-type]
    cfg = as_torchrun_has_it(cfg, sweep) if launcher.under_torchrun() else cfg
    if sweep is None:
        found = finished_here(cfg, folder)
        return _start(cfg, folder, None) if found is None else found
    with sweep.lock(f"job {sweep.name_of(folder)}").held(waiting_for="that runs this job"):
        found = finished_before(cfg, folder, sweep)
        return _start(cfg, folder, sweep) if found is None else found


def show_plan(cfg: DictConfig, *, output_dir: str | os.PathLike[str]) -> plan_.PruningPlan | plan_.PruningPlans:
    """Print what the pruner of this job would do, and write it to `plan.json`; nothing is trained or tracked.

    Raises:
        ValueError: a mistake in the configuration, in one sentence.
    """
    folder = Path(output_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    job = _Job(cfg, folder, None)
    with job.enough_memory():
        planned = job.plan()
    forecast_tables.print_plan(planned)
    with job.spared("plan.json"):
        write_json(folder / "plan.json", planned.to_json())
    return planned


def rehearse(cfg: DictConfig, *, here: bool) -> None:
    """Refuse what the job itself would refuse before its training. Nothing is trained, tracked or written.

    Args:
        here: the job will run on this machine, so its device, its data and its network are looked at too (on the CPU).

    Raises:
        ValueError: a mistake in the configuration, in one sentence.
    """
    _Rehearsal(from_command(cfg), Path.cwd(), None).check(here=here)


def _start(cfg: DictConfig, folder: Path, sweep: Sweep | None) -> dict[str, Any]:
    if launcher.under_torchrun():
        return run_under_torchrun(_run, cfg, folder)
    if cfg.trainer.devices == cfg.trainer.nodes == 1:
        return _run(cfg, folder, sweep)
    return run_in_several(_run, cfg, folder, sweep)


def _run(cfg: DictConfig, folder: Path, sweep: Sweep | None) -> dict[str, Any]:
    job = (_Follower if collectives.rank() else _Job)(cfg, folder, sweep)
    with job.stop, contextlib.nullcontext() if collectives.rank() else alone(folder):
        try:
            with job.enough_memory():
                job.prepare()
                job.dense_phase()
                job.prune_phase()
                job.measure()
                job.write_files()
                return collectives.broadcast(job.finish())
        except BaseException as error:
            launcher.undisturbed()
            job.fail(error)
            raise


@refusing()
def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a safetensors file that holds every tensor of the model, in shape and by name. No pickle is read.

    Raises:
        ValueError: no such file, another kind of file, or the first tensor that does not fit.
    """
    if not Path(path).is_file():
        raise ValueError(f"model.weights={path} does not exist")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"model.weights={path} is not a safetensors file ({error})") from None
    load_tensors(model, found, f"model.weights={path}")


def load_tensors(model: nn.Module, found: Mapping[str, Tensor], what: str) -> None:
    """Load every tensor of the model, after checking that `what` has all of them in shape and by name."""
    state = model.state_dict()
    needed, ties = state_tensors(model)  # of tied tensors one name is enough
    for name in [*needed, *found]:
        if name not in found or name not in state:
            where = "the model" if name not in state else "the file"
            raise ValueError(f"{what} does not fit the model: {where} has no tensor {name!r}")
        if not isinstance(found[name], Tensor) or found[name].shape != state[name].shape:
            shapes = f"{list(getattr(found[name], 'shape', []))} in the file but {list(state[name].shape)} in the model"
            raise ValueError(f"{what} does not fit the model: {name!r} has shape {shapes}")
    load_state(model, {**{alias: found[name] for alias, name in ties.items()}, **found}, {})


class _Job:
    """The steps of a job in their order, and what they hand on to each other."""

    trainer: Trainer
    model: nn.Module
    tracker: Tracker
    progress: Progress
    data: Any
    pruner: Any
    dense: nn.Module
    last: Mapping[str, float] = {}
    cache: DenseCache | None = None
    picture: Any = None  # of the masks
    cost: tuple[int, int] = (0, 0)  # parameters and MACs of the network as pruned so far
    costed = recorded = 0  # mask updates that `cost` and the mask files have seen
    saved: Saved | None = None  # what this job goes on from
    dense_file: str | None = None  # sha256 of DENSE
    dense_val: float | None = None
    classes: int
    unbounded: frozenset[str]  # buffers that hold inf on purpose

    def __init__(self, cfg: DictConfig, output_dir: Path, sweep: Sweep | None) -> None:
        hide(cfg)
        guard_logs()
        self.cfg, self.output_dir, self.sweep = copy.deepcopy(cfg), output_dir, sweep
        self.watch = counting.Stopwatch(*PARTS)
        self.stop = Stop(patient=collectives.world_size() > 1)
        self.checkpoints = Checkpoints(output_dir / "checkpoint")
        self.rows: list[Mapping[str, float]] = []  # the metrics of each epoch
        self.unwritten: list[str] = []  # files that a fault of the disk has kept from being written
        self.again: dict[str, Callable[[], None]] = {}  # how to write those that the next checkpoint tries again
        self.result: dict[str, Any] = {"status": "running", **dict.fromkeys(NUMBERS), "unwritten": []}
        unknown = ("mlflow_run_id", "config_hash", "device", "sparsity_of", "layers", "latency_note", "dense")
        self.result |= dict.fromkeys(unknown)
        self.result["shrunk"] = False
        seed = cfg.get("seed") if type(cfg.get("seed")) is int else None  # what else it may be is refused in a moment
        self.result |= {"name": run_name(cfg), "seed": seed, **hydra_choices()}

    # --- the steps ---

    def prepare(self) -> None:
        """Settings, data, model, display, tracking; a mistake in the configuration ends here, before any work."""
        before = read_object(self.output_dir / "result.json")
        if read_object(self.output_dir / RECORD).get("status") == "RUNNING":
            before["status"] = "running"  # killed while it told MLflow of its end
        with self.spared("result.json"):
            write_json(self.output_dir / "result.json", self.result)  # a job that gets killed leaves this
        self._set_up()
        if self.trainer.resume == "auto" and before.get("status") != "finished":
            self._find_saved()
        collectives.broadcast(self.saved and self.saved.path)
        self._rehearse()
        with self.spared("result.json"):
            write_json(self.output_dir / "result.json", self.result)
        tidy(self.output_dir)
        if self.saved is None:
            self._make_room()
        what = on_record(self.cfg)
        self._write(SETTINGS.as_posix(), lambda: write_json(self.output_dir / SETTINGS, what))
        with self.watch.part("tracking"):
            self._open_tracker(before)

    def _make_room(self) -> None:
        """What an earlier run has left is written over if that was asked for, else set aside."""
        anew = self.trainer.resume == "never"
        if anew:
            self.checkpoints.remove_all()
        for old in (self.output_dir / "masks", self.output_dir / "figures"):
            if anew:
                shutil.rmtree(old, ignore_errors=True)
            elif old.is_dir() and any(old.iterdir()):
                put_aside(old, "earlier")

    def plan(self) -> plan_.PruningPlan | plan_.PruningPlans:
        """What the second phase's pruner would do; nothing is trained."""
        self._set_up()
        optimizer, _ = self._build_optimizer(self.trainer.prune_epochs, self.trainer.prune_lr)
        pruner = self._build_pruner(optimizer)
        make = predict.plan_several if isinstance(pruner, Pruners) else predict.plan
        return make(self.model, pruner, self.example)

    def _set_up(self) -> None:
        self._check_seed()
        self.trainer = build(self.cfg.trainer)
        check_objective(self.cfg.objective, self.trainer)
        self._fetch_scores()
        self.progress = make_progress(self.trainer.progress, epochs=self.epochs)
        self.result["device"] = str(self.trainer.torch_device)
        self._seed(phase=0)
        with collectives.one_after_the_first():
            self.data = build(self.cfg.dataset)
        self._note_classes()
        inputs, labels = inputs_and_labels(next(iter(self.data.val)))
        self.example = self.trainer.to_device(_first(inputs, 1))
        self.latency_example = self.trainer.to_device(_first(inputs, self.trainer.latency_batch))
        self._seed(phase=0)  # the model starts the same whatever the data drew
        self.model = self.trainer.place(self._build_model())
        self._check_outputs(labels)
        self.unbounded = unbounded(self.model)

    def _check_seed(self) -> None:
        for key in ("seed", "objective"):
            if key not in self.cfg:  # as ~seed leaves it
                raise ValueError(f"{key} must be given: {key}=...")
        refuse_passwords(self.cfg)
        self.result["config_hash"] = config_hash(self.cfg)
        if type(self.cfg.seed) is not int:
            raise ValueError(f"seed={self.cfg.seed} is not allowed: it must be a whole number")
        if not -(2**63) <= self.cfg.seed < 2**63 - PHASES:  # what torch takes, for each phase
            raise ValueError(f"seed={self.cfg.seed} is not allowed: it must be from -2**63 to 2**63 - {PHASES + 1}")

    def dense_phase(self) -> None:
        """Ordinary training, and the dense network's accuracy on both splits; a copy of it is kept to compare.

        Jobs of a sweep that want the same network train it once.
        """
        if self._goes_on("prune"):
            return self._restore_dense()
        began, cache = time.perf_counter(), self._dense_cache()
        with cache.held() if cache else contextlib.nullcontext():
            record = self._from_cache(cache) if cache else None
            found = record is not None
            if record is None:
                record = self._train_dense()
                if cache:
                    self._store_dense(cache, record)
        if found:
            self._replay(record)
        if cache:
            own = record.config_hash == self.result["config_hash"]  # it may have been killed right after training
            source = "cache" if found and not own else "trained"
            self._note_dense(record, key=cache.key, source=source, seconds=time.perf_counter() - began)
        self.result |= {f"baseline_{name}": value for name, value in record.baseline.items()}
        self.dense, self.dense_val, self.cache = copy_of(self.model).cpu(), record.baseline["val_accuracy"], cache
        self._save_dense()

    def prune_phase(self) -> None:
        """Training with the pruner's hooks; at its end the final mask is set and a structured model is smaller."""
        trainer = self.trainer
        optimizer, lr_schedule = self._build_optimizer(trainer.prune_epochs, trainer.prune_lr)
        self.pruner = self._build_pruner(optimizer)
        if not self._goes_on("prune"):
            self._start_scores(optimizer)
        self._seed(phase=1)  # so that a dense network from a file goes on exactly like one trained here
        self._fit("prune", optimizer, lr_schedule, epochs=trainer.prune_epochs, offset=trainer.dense_epochs)
        self._record_masks(self.epochs)

    def measure(self) -> None:
        """Both networks on the validation and the test split, and what they cost; latencies are taken in turns."""
        with self.watch.part("measure"):
            self._measure()

    def write_files(self) -> None:
        """Model, masks and figures; `result.json` and `metrics.jsonl` are written elsewhere.

        Raises:
            ValueError: the model cannot be written; a run can do without any other file.
        """
        with self.watch.part("files"):
            folder = self.output_dir / "figures"
            try:
                self._save_model_somehow()
            except OSError as error:
                self.unwritten.append(WEIGHTS)
                more = how_to_go_on(self.cfg, self.output_dir, self.sweep)
                raise ValueError(
                    f"the model could not be written to {self.output_dir}: {reason(error)}; once there is room, {more}"
                ) from error
            with self.spared("figures/sparsity_by_layer.png"):
                shares, overall = self.pruner.shares(), self.pruner.share
                run_figures.save_layer_sparsity(folder / "sparsity_by_layer.png", shares, overall)
            rows = read_metrics(self.output_dir / "metrics.jsonl")
            if self.picture is not None:  # of the last masks
                with self.spared("figures/masks.png"):
                    drawing.save_picture(folder / "masks.png", self.picture)
            with self.spared("figures/history.png"):
                run_figures.save_history(folder / "history.png", rows, baseline=self.dense_val, of=self._sparsity_of)

    def finish(self) -> dict[str, Any]:
        self._count_seconds()
        with self.watch.part("tracking"):
            self._log_numbers()
        self._write_result("finished")  # from here on it is not done again, so all else is on the disk
        with self.watch.part("tracking"):
            self._send_files()
        self._write_result("finished")  # again, with the seconds that tracking took
        self.progress.close()
        uri, unsent = (getattr(self.tracker, name, None) for name in ("tracking_uri", "unsent"))
        print_summary(self.result, self.output_dir, tracking_uri=uri, unsent=bool(unsent))
        return self.result

    def fail(self, error: BaseException) -> None:
        """Leave the record closed; what goes wrong here must not hide the error itself."""
        self.result["error"] = last_line(error)
        try:
            if hasattr(self, "progress"):
                self.progress.close()
            interrupted = isinstance(error, (KeyboardInterrupt, Interrupted))
            self._write_result("interrupted" if interrupted else "failed")
            if not isinstance(error, ValueError):
                log.warning("%s", how_to_go_on(self.cfg, self.output_dir, self.sweep))
            if self.result["baseline_accuracy"] is not None:  # what was trained is not thrown away
                with self.spared(WEIGHTS):
                    self._save_model()
            if hasattr(self, "tracker"):
                self.tracker.finish("KILLED" if interrupted else "FAILED")
        except Exception:
            log.exception("the failure could not be recorded in %s", self.output_dir)

    # --- what may go wrong with the machine ---

    def spared(self, name: str, meaning: str = "") -> contextlib.AbstractContextManager[None]:
        """Write a file that the run can do without: if the disk is full, say so, list it in the result, go on."""
        return spared(name, self.unwritten, meaning)

    def _write(self, name: str, write: Callable[[], None], meaning: str = "") -> None:
        """Write such a file; if that fails, the next checkpoint tries it again."""
        self.again[name] = write
        with self.watch.part("files"), self.spared(name, meaning or "it is tried again at the next checkpoint"):
            write()
            del self.again[name]

    def _write_again(self) -> None:
        for name, write in list(self.again.items()):
            self._write(name, write)
            if name not in self.again and name not in (DENSE.as_posix(), SETTINGS.as_posix()):  # which are not sent
                with self.watch.part("tracking"):
                    self._log_file(name, folder=os.path.dirname(name))

    @contextlib.contextmanager
    def enough_memory(self) -> Iterator[None]:
        """Where memory, the device's or the machine's, is too small, one sentence says what to try."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            device = self.result["device"] or self.cfg.trainer.device
            raise ValueError(f"{device} ran out of memory{smaller_steps(self.cfg)}") from error

    # --- their parts ---

    def _measure(self) -> None:
        test = self.trainer.evaluate(self.model, self.data.test)
        val = self.trainer.evaluate(self.model, self.data.val)  # of the final network: the last epoch's may be older
        budget = getattr(self.pruner, "budget", None)
        self.result |= {
            "accuracy": test["accuracy"],
            "loss": test["loss"],
            "val_accuracy": val["accuracy"],
            "sparsity": self.pruner.sparsity,
            "sparsity_of": self._sparsity_of,
            "layers": {name: [share.pruned, share.total] for name, share in self.pruner.shares().items()},
            "target_sparsity": self.pruner.target_sparsity,
            "budget": budget and {budget.kind: budget.share},
            "updates": self.pruner.updates,
            "epochs": self.epochs,
            "baseline_epochs": self.trainer.dense_epochs,
            "skipped_steps": int(sum(row.get("train/skipped_steps", 0) for row in self.rows)),
            "shrunk": self.pruner.plan is not None,
            "skipped": dict(self.pruner.skipped),
            "coverage": self.pruner.coverage,
            "collapsed": predict.collapsed(getattr(self.pruner, "targets", ())),
            "at_chance": self._at_chance(val["accuracy"]),
            "params_nonzero": sum(int(p.count_nonzero()) for p in self.model.parameters()),
        }
        for suffix, model in (("", self.model), ("_dense", self.dense)):
            self.result[f"params{suffix}"] = counting.count_parameters(model)
            self.result[f"macs{suffix}"] = counting.count_macs(model, self.example)
            self.result[f"file_bytes{suffix}"] = counting.file_bytes(model)
        if self.trainer.latency_repeats:
            self._measure_latency()

    def _measure_latency(self) -> None:
        """In turns with the dense network; in a sweep once for all networks of an architecture."""
        settings: dict[str, Any] = {"repeats": self.trainer.latency_repeats}
        settings["max_seconds"] = self.trainer.latency_seconds
        pair = self.dense.to(self.trainer.torch_device), self.model
        if self.sweep is None:
            found = latency.compare(*pair, self.latency_example, **settings)
        else:
            with self.sweep.lock(f"latency {platform.node()}").held(waiting_for="that measures latency"):
                folder = self.sweep.directory / ".gsprune" / "latency"
                found = latency.shared(folder, *pair, self.latency_example, **settings)
        self.result |= {"latency_ms": found.ms, "latency_dense_ms": found.dense_ms, "latency_note": found.note}
        self.result |= {"speedup": found.speedup, "speedup_low": found.low, "speedup_high": found.high}

    def _at_chance(self, accuracy: float) -> dict[str, Any] | None:
        """Said where the final network does not beat guessing on the validation split; None where it does."""
        samples = len(getattr(self.data.val, "dataset", ()))
        lost, never = (
            counting.is_guessing(value, samples=samples, classes=self.classes)
            for value in (accuracy, self.result["baseline_val_accuracy"])
        )
        return {"accuracy": accuracy, "classes": self.classes, "dense": never} if lost else None

    @property
    def epochs(self) -> int:
        return self.trainer.dense_epochs + self.trainer.prune_epochs

    @property
    def steps_per_epoch(self) -> int:
        return self.trainer.steps_per_epoch(self.data.train)

    def _save_dense(self) -> None:
        """What `model.weights` takes."""
        path, self.dense_file = self.output_dir / DENSE, None

        def write() -> None:
            write_atomic(path, save(state_tensors(self.dense)[0]))
            self.dense_file = sha256(path)

        meaning = "checkpoints hold it meanwhile, so that the run can go on from them, and each tries to write it again"
        self._write(DENSE.as_posix(), write, meaning)

    def _save_model(self) -> None:
        """The model first: the one file that a run must leave."""
        plan = self.pruner.plan or CutPlan(kept={}, sizes={}, attributes={})
        save_pruned(self.output_dir, self.model, plan, extra={"config_hash": self.result["config_hash"]})
        with self.spared("masks.safetensors"):
            save_masks(self.output_dir / "masks.safetensors", self.pruner.masks())

    def _save_model_somehow(self) -> None:
        """On a full disk the older checkpoint makes room; the newest stays, to go on from."""
        try:
            self._save_model()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self.checkpoints.keep(1)
            self._save_model()

    def _seed(self, *, phase: int) -> None:
        """Seed everything for a phase, the order of the training data included."""
        seed_everything(self.cfg.seed + phase, deterministic=self.trainer.deterministic)
        generator = getattr(self.data.train, "generator", None) if hasattr(self, "data") else None
        if generator is not None:
            generator.manual_seed(self.cfg.seed + phase)

    def _build_model(self) -> nn.Module:
        node = OmegaConf.create(OmegaConf.to_container(self.cfg.model, resolve=True))
        assert isinstance(node, DictConfig)
        weights = node.pop("weights", None)
        model: nn.Module = build(node)
        if weights is not None:
            load_weights(model, str(weights))  # `model.weights=1` is a name too
        return model

    def _check_outputs(self, labels: Tensor) -> None:
        """Raise a ValueError if the network does not run on the data, or has fewer outputs than there are classes."""
        try:
            with torch.no_grad():
                outputs = logits_of(call(copy_of(self.model).eval(), self.example)).shape[1]
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(f"the model does not run on the data: {last_line(error)}") from error
        self.classes = max(self.cfg.dataset.get("num_classes") or 0, int(labels.max()) + 1)
        if outputs < self.classes:
            raise ValueError(
                f"the model has {outputs} outputs, and the data has {self.classes} classes: "
                f"set model.num_classes={self.classes}"
            )

    def _note_classes(self) -> None:
        """How many classes there are where only the data can tell, for the model, and their names, for the record."""
        if self.cfg.dataset.get("num_classes", 0) is None:
            self.cfg.dataset.num_classes = self.data.splits.num_classes
        labels = getattr(getattr(self.data, "splits", None), "labels", ())
        self.result |= {"labels": list(labels)} if labels else {}

    def _open_tracker(self, before: Mapping[str, Any]) -> None:
        """Begin the record, or go on with that of `before`, if that is an unfinished job of this configuration."""
        name = self.cfg.tracking.get("run_name") or run_name(self.cfg)
        more = {"parent_run_id": self.sweep.parent_run_id} if self.sweep else {}
        rows: dict[str, Any] = {}
        same = before.get("status") != "finished" and before.get("config_hash") == self.result["config_hash"]
        if self.trainer.resume == "auto" and (same or self.saved):
            rows, run_id = {"rows": self.rows}, read_object(self.output_dir / "tracking.json").get("run_id")
            more |= {"run_id": run_id} if isinstance(run_id, str) else {}
        self.tracker = build(self.cfg.tracking, output_dir=str(self.output_dir), run_name=name, **more)
        tags = {"config_hash": self.result["config_hash"], **hydra_tags()}
        self.tracker.start(config=recorded(self.cfg), tags=tags, **rows)
        # The name of the option is what a person compares by; in the configuration it is spread over many values.
        self.tracker.log_params({key: value for key, value in self.result["choices"].items() if key in self.cfg})
        self.result["mlflow_run_id"] = self.tracker.run_id

    def _rehearse(self) -> None:
        """Build the second phase once and drop it: a mistake in it must not wait for the first one to end."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come when it is built for good
            optimizer, _ = self._build_optimizer(self.trainer.prune_epochs, self.trainer.prune_lr)
            pruner = self._build_pruner(optimizer)
        timed = [name for name in objective_names(self.cfg.objective) if name in TIMED]
        if timed and not pruner.structured:
            raise ValueError(
                f"objective={timed[0]} has no value without units: single weights change no shape and save no time, "
                f"so take pruner=abs or weighted, or another objective"
            )
        if self.trainer.prune_epochs == 0 and pruner.horizon != 0:
            raise ValueError(
                "trainer.prune_epochs=0 leaves no gradient to score by: it must be 1 or more, "
                "or pruner=none or magnitude"
            )
        self.result["collapsing"] = predict.foreseen(pruner)
        for line in told(self.result["collapsing"]):
            log.warning("about to collapse when the schedule ends, so that accuracy may be that of guessing: %s", line)

    def _build_optimizer(self, epochs: int, lr: float | None) -> tuple[Optimizer, Schedule]:
        factory, steps = build(self.cfg.optimizer), epochs * self.steps_per_epoch
        optimizer = complete("optimizer", make_optimizer, factory, self.model, lr=lr, fused=self.trainer.fused)
        return optimizer, complete("lr_schedule", build(self.cfg.lr_schedule), optimizer, total_steps=steps)

    def _build_pruner(self, optimizer: Optimizer) -> Any:
        return complete(
            "pruner",
            build(self.cfg.pruner),
            self.model,
            optimizer=optimizer,
            example_input=self.latency_example if is_timed(self.cfg.pruner) else self.example,
            steps_per_epoch=self.steps_per_epoch,
            epochs=self.trainer.prune_epochs,
        )

    def _log_numbers(self) -> None:
        known = {**dict.fromkeys(NUMBERS), **self.last}  # a number that the last epoch has logged is not repeated
        final = {name: self.result[name] for name in NUMBERS if self.result[name] != known[name]}
        self.tracker.log_metrics(final, step=self.result["epochs"])
        if self.result["latency_note"] is not None:
            self.tracker.log_tags({"latency_note": self.result["latency_note"]})
        if self.result["sparsity_of"]:
            self.tracker.log_params({"sparsity_of": self.result["sparsity_of"]})

    def _send_files(self) -> None:
        for name in ("result.json", "masks.safetensors", WEIGHTS, "pruning.json"):
            self._log_file(name)
        for path in sorted((self.output_dir / "figures").glob("*.png")):
            self._log_file(f"figures/{path.name}", folder="figures")
        self.tracker.finish("FINISHED")

    def _log_file(self, name: str, *, folder: str | None = None) -> None:
        """Give a file to the tracker, unless what is there is of an earlier write."""
        if name not in self.unwritten:
            self.tracker.log_artifact(self.output_dir / name, folder=folder)

    def _dense_cache(self) -> DenseCache | None:
        """Where this job's dense network is kept for others; None outside a sweep, or if nothing is to be trained."""
        if self.sweep is None or not self.trainer.dense_cache or self.trainer.dense_epochs == 0:
            return None
        key = dense_key(self.cfg, torch=torch_version, device=self.trainer.torch_device.type)
        return DenseCache(self.sweep, key)

    def _from_cache(self, cache: DenseCache) -> DenseRecord | None:
        """The record of a network that another job has trained, with its weights in the model; None: none usable."""
        record = cache.find()
        if record is None:
            return None
        try:
            load_weights(self.model, cache.weights)
        except ValueError as error:
            cache.is_readable = False  # though it is whole
            log.warning("the dense network is trained again: %s", error)
            return None
        log.info("the dense network is that of job %s, trained there in %.1f s", record.job, record.train_seconds)
        return record

    def _train_dense(self) -> DenseRecord:
        began, trainer = time.perf_counter(), self.trainer
        self._seed(phase=0)  # whatever the second phase's rehearsal has drawn
        self.pruner = NoPruning(self.model)
        self._fit("dense", *self._build_optimizer(trainer.dense_epochs, None), epochs=trainer.dense_epochs)
        with self.watch.part("measure"):
            baseline = trainer.evaluate(self.model, self.data.test)
            baseline["val_accuracy"] = trainer.evaluate(self.model, self.data.val)["accuracy"]
        job = self.sweep.name_of(self.output_dir) if self.sweep else ""
        mine, seconds = self.result["config_hash"], time.perf_counter() - began
        return DenseRecord(baseline, self.rows, self.tracker.run_id, job, mine, seconds)

    def _store_dense(self, cache: DenseCache, record: DenseRecord) -> None:
        with self.spared(os.path.relpath(cache.folder, self.output_dir)):
            cache.store(state_tensors(self.model)[0], record)

    def _replay(self, record: DenseRecord) -> None:
        """The epochs of a dense network from the cache, as if they had been trained here."""
        logged, self.rows = len(self.rows), list(record.epochs)
        self.last = self.rows[-1]
        for trained, row in enumerate(self.rows[logged:], logged + 1):
            with self.watch.part("tracking"):
                self.tracker.log_metrics(row, step=trained)
        self.cost = int(self.last["params"]), int(self.last["macs"])

    def _note_dense(self, record: DenseRecord, *, key: str, source: str, seconds: float) -> None:
        assert self.sweep is not None
        job = record.job if source == "trained" else self.sweep.folder_of(record.job, record.config_hash)
        origin = {"key": key, "source": source, "run_id": record.run_id, "job": job}
        self.result["dense"] = {**origin, "train_seconds": record.train_seconds, "seconds": seconds}
        noted = {f"dense.{name}": value for name, value in origin.items() if value is not None}
        with self.watch.part("tracking"):
            self.tracker.log_params(noted)
            self.tracker.log_tags(noted)

    def _fetch_scores(self) -> None:
        """Make `pruner.scores` the path of a file, whatever it names."""
        given = self.cfg.pruner.get("scores")
        if given is None:
            return
        path = scores_path(given)
        if not path.exists() and re.fullmatch("[0-9a-f]{32}", given):
            path = download_artifact(
                self.cfg.tracking.get("tracking_uri"), given, SCORES, self.output_dir / "checkpoint"
            )
        if not path.is_file():
            raise ValueError(
                f"pruner.scores={given} is neither a file of scores, nor the output directory of a run that has "
                f"{SCORES}, nor the id of an MLflow run"
            )
        self.cfg.pruner.scores = collectives.broadcast(str(path))

    def _start_scores(self, optimizer: Optimizer) -> None:
        """What the pruner begins with: given scores, or those of the dense network, which a sweep takes once."""
        given = self.cfg.pruner.get("scores")
        wanted = self.trainer.dense_scores and self.trainer.prune_epochs > 0
        if self.pruner.horizon == 0 or not (given or wanted):
            return
        if not given:
            self._score_dense(optimizer)
        self._write_scores()
        with self.watch.part("tracking"):
            self._log_file(SCORES, folder="checkpoint")

    def _score_dense(self, optimizer: Optimizer) -> None:
        cache, key = self.cache, scores_key(self.cfg)
        with cache.held(key) if cache else contextlib.nullcontext():
            if cache and cache.has_scores(key):
                try:
                    return self.pruner.load_scores(cache.scores(key))  # type: ignore[no-any-return]
                except ValueError as error:
                    log.warning("the dense network is scored again: %s", error)
            self._seed(phase=2)
            with self.watch.part("train"):
                self.trainer.score(
                    self.model, self.data.train, optimizer=optimizer, pruner=self.pruner, steps=self._score_steps
                )
            if cache:
                with self.spared(os.path.relpath(cache.scores(key), self.output_dir)):
                    self._save_scores(cache, key)

    @property
    def _score_steps(self) -> int:
        """As many as a running score remembers, one epoch at most."""
        return min(self.steps_per_epoch, self.pruner.horizon or self.steps_per_epoch)

    def _save_scores(self, cache: DenseCache, key: str) -> None:
        about = self.pruner.criterion_name, self._score_steps
        save_scores(cache.scores(key), self.pruner.scores(), criterion=about[0], steps=about[1])
        cache.seal_scores(key)

    def _write_scores(self) -> None:
        """Those of now, also when the disk takes them only later."""
        path, found, criterion = self.output_dir / SCORES, self.pruner.scores(), self.pruner.criterion_name
        self._write(SCORES, lambda: save_scores(path, found, criterion=criterion, steps=self._score_steps))

    def _fit(self, name: str, optimizer: Optimizer, lr_schedule: Schedule, *, epochs: int, offset: int = 0) -> None:
        start = self._restore(optimizer, lr_schedule) if self._goes_on(name) else None
        done = start["epoch"] * self.steps_per_epoch + start["step"] if start else 0
        shown = {"epochs": epochs, "steps_per_epoch": self.steps_per_epoch, "done": done}
        self.progress.phase(name, **shown, of=self._sparsity_of)
        self.written_at = time.monotonic()
        with self.watch.part("train"), self.stop.deferred():
            self.trainer.fit(
                self.model,
                self.data.train,
                self.data.val,
                optimizer=optimizer,
                lr_schedule=lr_schedule,
                pruner=self.pruner,
                epochs=epochs,
                on_epoch=lambda epoch, values: self._record(epoch + offset + 1, values),
                on_step=self.progress.on_step,
                on_rest=lambda at: self._rest(name, at, offset, optimizer, lr_schedule),
                on_redraw=self._end_if_asked,
                start=start,
            )

    def _record(self, trained: int, values: dict[str, float]) -> None:
        """Metrics after so many epochs, counted over both phases, and the masks if they changed."""
        values |= self.pruner.report()
        if trained == 1 or self.costed != self.pruner.updates:
            with self.watch.part("measure"):
                twin, self.costed = smaller(self.model, self.pruner), self.pruner.updates
                self.cost = counting.count_parameters(twin), counting.count_macs(twin, self.example)
        self.last = {**values, "params": self.cost[0], "macs": self.cost[1]}
        self.rows.append(self.last)
        with self.watch.part("tracking"):
            self.tracker.log_metrics(self.last, step=trained)
        self._record_masks(trained)
        self.progress.on_epoch(trained, self.last)
        to_log_file(logging.INFO, epoch_line(trained, self.epochs, self.last, of=self._sparsity_of))

    @property
    def _sparsity_of(self) -> str | None:
        of: str = self.pruner.share.of
        return of or None

    def _record_masks(self, trained: int) -> None:
        """The masks, if they changed since the last time."""
        if self.recorded == self.pruner.updates:
            return
        self.recorded, masks = self.pruner.updates, self.pruner.masks()
        name = f"masks/epoch_{trained:04d}.safetensors"
        with self.watch.part("files"):
            self.picture = self._draw_masks()
        self._write(name, lambda: save_masks(self.output_dir / name, masks))
        with self.watch.part("tracking"):
            self._log_file(name, folder="masks")
            self.tracker.log_image(self.picture, key="masks", step=trained)

    def _draw_masks(self) -> np.ndarray:
        return run_figures.mask_image(self.pruner.dense_masks(), share=self.pruner.share)

    # --- checkpoints ---

    def _rest(self, phase: str, at: Position, offset: int, optimizer: Optimizer, lr_schedule: Any) -> None:
        """Between two steps: write a checkpoint if it is time, and end here if a signal wants that.

        Of several processes all do what one of them wants.
        """
        minutes = self.trainer.checkpoint_minutes
        is_due = minutes is not None and time.monotonic() - self.written_at >= 60 * minutes
        signum, due = divmod(collectives.agreed(2 * self.stop.signum + is_due), 2)
        if at.step and not due and not signum:
            return
        with self.watch.part("files"):
            self._write_checkpoint(phase, at, offset, optimizer, lr_schedule)
        self.written_at = time.monotonic()
        if signum:
            raise Interrupted(signum)

    def _end_if_asked(self) -> None:
        """Where nothing has changed since the last checkpoint."""
        if signum := collectives.agreed(self.stop.signum):
            raise Interrupted(signum)

    def _write_checkpoint(self, phase: str, at: Position, offset: int, optimizer: Optimizer, lr_schedule: Any) -> None:
        position, *others = collectives.gathered(at.state_dict())
        if phase == "prune" and not (self.output_dir / DENSE).is_file():  # whoever has removed it
            self._save_dense()
        self._write_again()
        state = {
            "config_hash": self.result["config_hash"],
            "made_on": self.surroundings,
            "phase": phase,
            "dense": self.dense_file,
            "dense_model": None if phase == "dense" or self.dense_file else state_tensors(self.dense)[0],
            "model": state_tensors(self.model)[0],
            "optimizer": optimizer.state_dict(),
            "lr_schedule": lr_schedule.state_dict(),
            "pruner": self.pruner.state_dict(),
            "position": position,
            "others": others,  # positions of the processes beside this one
            "job": self._notes(),
        }
        if lost := list(not_finite(self.model, but_for=self.unbounded)):
            log.warning("no checkpoint was written, those before it stay: %s holds nan or inf", lost[0])
            return
        try:
            with self.spared("checkpoint", self._without_checkpoint()):
                self.checkpoints.write(state, epoch=offset + at.epoch, step=at.step)
        except ValueError as error:
            log.warning("no checkpoint was written, the run goes on: %s", error)

    def _without_checkpoint(self) -> str:
        with contextlib.suppress(OSError):
            before = self.checkpoints.paths()
            then = f"go on from {before[-1].name}" if before else "start anew"
            return f"the next one is tried in its turn, and if the run ends before that it will {then}"
        return "the next one is tried in its turn"

    def _notes(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "cost": self.cost,
            "costed": self.costed,
            "recorded": self.recorded,
            "baseline": {f"baseline_{name}": self.result[f"baseline_{name}"] for name in BASELINE},
            "dense_note": self.result["dense"],
            "dense_val": self.dense_val,
            "seconds": self.watch.read(),
            "overrides": self.result["overrides"],
        }

    def _find_saved(self) -> None:
        """Choose what to go on from, and take over what the job had noted by then.

        Raises:
            ValueError: there is a checkpoint of another configuration, which must not be lost by mistake.
        """
        saved = self.checkpoints.newest(self._check_saved)
        if saved is None:
            return
        notes = saved.state["job"]
        if saved.state["config_hash"] != self.result["config_hash"]:
            raise ValueError(of_another(self.output_dir, self.cfg, unfinished=True))
        log.info("going on from the checkpoint %s", saved.path)
        self._take_over(saved)
        self.cost, self.costed, self.recorded = tuple(notes["cost"]), notes["costed"], notes["recorded"]
        self.dense_file, self.dense_val = saved.state["dense"], notes["dense_val"]
        self.watch.add(notes["seconds"])
        made_on = saved.state["made_on"]
        before = made_on if isinstance(made_on, dict) else {"made on": made_on}  # as it was written at first
        if changed := differences(before, self.surroundings):
            log.warning("it goes on, but not bit for bit: %s", changed)

    def _take_over(self, saved: Saved) -> None:
        rows = saved.state["job"]["rows"]
        self.saved, self.rows, self.last = saved, list(rows), rows[-1] if rows else {}

    def _check_saved(self, state: Mapping[str, Any]) -> None:
        """Raise a ValueError if a checkpoint, which is whole, is not one of a job or lacks its dense network."""
        whole = _has(state, SAVED) and _has(state["job"], NOTES)
        whole = whole and all(_has(position, POSITION) for position in (state["position"], *state["others"]))
        numbers = [state["job"]["seconds"], *state["job"]["rows"]] if whole else []
        if not whole or set(numbers[0]) != set(PARTS) or not all(_are_numbers(values) for values in numbers):
            raise ValueError("it is not that of a job")
        if not isinstance(state.get("dense_model"), (dict, NoneType)):
            raise ValueError("it is not that of a job")
        if state["phase"] == "dense" or state.get("dense_model"):
            return
        dense = self.output_dir / DENSE
        if not dense.is_file():
            raise ValueError(f"{dense}, the dense network that it belongs to, is not there")
        if sha256(dense) != state["dense"]:
            raise ValueError(f"{dense} is not the dense network that it belongs to: its sha256 is another")

    @functools.cached_property
    def surroundings(self) -> dict[str, str | int]:
        """What the last bits of a result depend on, besides the configuration."""
        device = self.trainer.torch_device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        cpu = torch.backends.cpu.get_cpu_capability()
        return {"device": name, "cpu": cpu, "threads": torch.get_num_threads(), **package_versions(self.cfg)}

    def _goes_on(self, phase: str) -> bool:
        return self.saved is not None and self.saved.state["phase"] == phase

    def _restore_dense(self) -> None:
        assert self.saved is not None
        notes, weights = self.saved.state["job"], self.saved.state.get("dense_model")
        if weights is None:
            load_weights(self.model, self.output_dir / DENSE)
        else:
            load_tensors(self.model, weights, f"the dense network in {self.saved.path}")
        self.dense, self.pruner = copy_of(self.model).cpu(), NoPruning(self.model)
        if weights is not None:
            self._save_dense()
        self.result |= {**notes["baseline"], "dense": notes["dense_note"]}

    def _restore(self, optimizer: Optimizer, lr_schedule: Any) -> Mapping[str, Any]:
        """Put a checkpoint's state into what was built anew; returns the position in the phase.

        Raises:
            ValueError: it does not fit.
        """
        assert self.saved is not None
        path, state = self.saved
        try:
            position: Mapping[str, Any] = [state["position"], *state["others"]][collectives.rank()]
            self.pruner.load_state_dict(state["pruner"])  # a pruner that has cut the model cuts it, and the optimizer
            ties = state_tensors(self.model)[1]
            load_state(self.model, state["model"], ties)
            optimizer.load_state_dict(state["optimizer"])
            lr_schedule.load_state_dict(state["lr_schedule"])
            _like_parameters(optimizer)
            if self.recorded and self.recorded == self.pruner.updates:
                self.picture = self._draw_masks()
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"the checkpoint {path} does not fit this job ({last_line(error)}): trainer.resume=never starts anew"
            ) from error
        self.saved = None  # its tensors are no longer needed
        return position

    def _count_seconds(self) -> None:
        self.result["timings"] = self.watch.read()
        self.result["seconds"] = sum(self.result["timings"].values())

    def _write_result(self, status: str) -> None:
        self.result["status"] = status
        self._count_seconds()
        lost = [*self.unwritten, *(self.tracker.unwritten if hasattr(self, "tracker") else [])]
        self.result["unwritten"] = list(dict.fromkeys(lost))
        with self.spared("result.json"):
            write_json(self.output_dir / "result.json", self.result)


class _Follower(_Job):
    """A process that trains along with the first one. It writes, tracks and shows nothing."""

    def prepare(self) -> None:
        self._set_up()
        path: Path | None = collectives.broadcast(None)
        if path is not None:
            if not path.is_dir():
                raise ValueError(f"{path} is not on every machine: a run goes on in a directory that all of them share")
            self._take_over(Saved(path, read_state(path)))
            self.output_dir = path.parents[1]  # the first one's, with the dense network
        self.progress, self.tracker = Progress(self.epochs), SilentTracker(self.output_dir)
        self._rehearse()

    def measure(self) -> None:
        for split in (self.data.test, self.data.val):  # its part of them; the rest is the first one's
            self.trainer.evaluate(self.model, split)

    def write_files(self) -> None:
        pass

    def finish(self) -> dict[str, Any]:
        return {}

    def fail(self, error: BaseException) -> None:
        pass

    def _fetch_scores(self) -> None:
        if self.cfg.pruner.get("scores") is not None:
            self.cfg.pruner.scores = collectives.broadcast("")

    def _record(self, trained: int, values: dict[str, float]) -> None:
        self.last = values

    def _record_masks(self, trained: int) -> None:
        pass

    def _write(self, name: str, write: Callable[[], None], meaning: str = "") -> None:
        pass

    def _write_checkpoint(self, phase: str, at: Position, offset: int, optimizer: Optimizer, lr_schedule: Any) -> None:
        collectives.gathered(at.state_dict())

    def _store_dense(self, cache: DenseCache, record: DenseRecord) -> None:
        pass

    def _save_scores(self, cache: DenseCache, key: str) -> None:
        pass


class _Rehearsal(_Job):
    """A job up to its training, in the process that starts a sweep."""

    def check(self, *, here: bool) -> None:
        check_plan(self.cfg)
        self._check_seed()
        if not here:
            OmegaConf.update(self.cfg, "trainer.device", "cpu")
        check_objective(self.cfg.objective, build(self.cfg.trainer))
        for group in ("pruner", "optimizer", "lr_schedule"):
            build(self.cfg[group])
        if here and not is_timed(self.cfg.pruner):  # which takes seconds of measuring
            for key, value in REHEARSED.items():
                OmegaConf.update(self.cfg, f"trainer.{key}", value)
            self._set_up()
            self._rehearse()

    def _fetch_scores(self) -> None:
        """Another run's scores may have to be fetched: only the job does."""
        given = self.cfg.pruner.get("scores")
        if given is not None and not scores_path(given).is_file():
            self.cfg.pruner.scores = None


def smaller(model: nn.Module, pruner: Any) -> nn.Module:
    """The network a structured pruner would leave if training ended now, as a copy; any other: the model itself."""
    plan = pruner.next_plan()
    if plan is None:
        return model
    twin = copy_of(model)
    apply_cut(twin, plan)
    return twin


def _has(found: Any, kinds: Mapping[str, Any]) -> bool:
    """Whether it is a dict that has all these keys, with values of these types."""
    return isinstance(found, dict) and all(name in found and isinstance(found[name], kinds[name]) for name in kinds)


def _are_numbers(found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(value, (int, float)) for value in found.values())


def _like_parameters(optimizer: Optimizer) -> None:
    """Give a loaded state the memory format of the parameters, as a state that grew with them has."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _first(inputs: Any, count: int) -> Any:
    """The first samples of a batch, however its tensors are wrapped."""
    return map_tensors(lambda tensor: tensor[:count] if tensor.dim() else tensor, inputs)
