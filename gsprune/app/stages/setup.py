"""The first stage: trainer, data and network of a job, and a check that its pruner can be built on them."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from gsprune import collectives
from gsprune.app.configuration import TIMED, build, check_fit, check_objective, complete, is_timed, objective_names
from gsprune.app.console import Progress, make_progress
from gsprune.app.cut_settings import check_mode, curve_rules, is_cut, is_random, rules_of, settings_of, single_weights
from gsprune.app.memory import is_out_of_memory
from gsprune.app.stages.context import Context
from gsprune.criteria import Elementwise, Fisher
from gsprune.cutting.how_much import check_enough
from gsprune.cutting.weights import check_weights
from gsprune.files.disk import refusing
from gsprune.forecast import predict
from gsprune.formats.network import load_state
from gsprune.formats.tensors import state_tensors
from gsprune.pruner.pruner import Pruner
from gsprune.ranking.patterns import parse_pattern
from gsprune.repair.calibrated import Repair
from gsprune.settings.hydra_files import refuse_passwords
from gsprune.settings.identity import SCORES, config_hash, scores_path
from gsprune.structures.example import call, inputs_and_labels, logits_of, map_tensors
from gsprune.structures.twin import copy_of
from gsprune.sweeps.sweep_dir import current_sweep
from gsprune.text.display import logger
from gsprune.text.names import lines_by_reason
from gsprune.text.redact import last_line
from gsprune.tracking.mlflow_client import download_artifact
from gsprune.training.guard import unbounded
from gsprune.training.optimization import LRSchedule, make_optimizer
from gsprune.training.trainer import Trainer, seed_everything

log = logger(__name__)
STREAMS = 3  # of random numbers, each with a seed of its own: dense phase (and data), pruning phase, scoring


@dataclass(frozen=True)
class Setup:
    """What a job trains.

    Attributes:
        data: `train`, `val` and `test` are its loaders.
        model: on the trainer's device; the stages train and prune it in place.
        example, latency_example: inputs of one sample, and of `trainer.latency_batch` samples.
        classes: of the data.
        unbounded: buffers of the network that hold inf on purpose.
    """

    cfg: DictConfig
    trainer: Trainer
    data: Any
    model: nn.Module
    example: Any
    latency_example: Any
    classes: int
    unbounded: frozenset[str]

    @property
    def epochs(self) -> int:
        """Of both phases."""
        return self.trainer.dense_epochs + self.trainer.prune_epochs

    @property
    def steps_per_epoch(self) -> int:
        return self.trainer.steps_per_epoch(self.data.train)

    def seed(self, stream: int) -> None:
        """Seed everything, the order of the training data included."""
        _seed(self.cfg, self.trainer, stream, self.data)

    def build_optimizer(self, *, epochs: int, lr: float | None = None) -> tuple[Optimizer, LRSchedule]:
        factory, steps = build(self.cfg.optimizer), epochs * self.steps_per_epoch
        optimizer = complete(self.cfg.optimizer, make_optimizer, factory, self.model, lr=lr, fused=self.trainer.fused)
        schedule = self.cfg.lr_schedule
        return optimizer, complete(schedule, build(schedule), optimizer, total_steps=steps)

    def build_pruning(self) -> tuple[Optimizer, LRSchedule, Any]:
        """Optimizer, learning-rate schedule and pruner of the pruning phase."""
        epochs = self.trainer.prune_epochs
        optimizer, lr_schedule = self.build_optimizer(epochs=epochs, lr=self.trainer.prune_lr)
        settings = {"example_input": self.traced, "steps_per_epoch": self.steps_per_epoch, "epochs": epochs}
        if (by := settings_of(self.cfg).repair) is not None:
            self.seed(2)  # as for scoring; the phase that trains is seeded after it
            settings["repair"] = Repair(self.data.train, by=by, samples=settings_of(self.cfg).calibration)
        with warnings.catch_warnings():
            if current_sweep() is not None:  # its control gets what the others are swept over, as it should
                warnings.filterwarnings("ignore", ".* no effect: nothing is pruned here")
            pruner = complete(self.cfg.pruner, build(self.cfg.pruner), self.model, optimizer=optimizer, **settings)
        return optimizer, lr_schedule, pruner

    def build_cutting(self) -> Pruner:
        """A pruner of what `mode=cut` will cut, which only says what that is."""
        weights = single_weights(self.cfg)
        if weights is None:
            curve_rules(self.cfg)
        if (settings := settings_of(self.cfg)).max_drop is not None:
            samples = np.ones(len(self.data.val.dataset))
            check_enough(samples, settings.max_drop, settings.confidence)
        if weights is not None:
            tried = 0.5 if weights.sparsity is None and settings.max_drop is not None else weights.sparsity
            check_weights(self.model, weights.criterion, tried, parse_pattern(weights.pattern), weights.scope)
            reads = {"criterion": Elementwise()} if weights.criterion.reads_inputs else {}
            return complete(self.cfg.pruner, build(self.cfg.pruner), self.model, **reads)  # type: ignore[no-any-return]
        rules = [  # a pruner takes no criterion that reads inputs; the cut does
            replace(rule, criterion=Fisher()) if rule.criterion.reads_inputs else rule
            for rule in rules_of(self.cfg.pruner)
        ]
        return Pruner(self.model, rules=rules, example_input=self.traced)

    @property
    def traced(self) -> Any:
        """The input that a network is traced and timed with."""
        return self.latency_example if is_timed(self.cfg.pruner) else self.example


def set_up(job: Context) -> Setup:
    """Build trainer, data and network.

    Raises:
        ValueError: a mistake in the configuration, in one sentence.
    """
    check_seed(job)
    check_mode(job.cfg)
    cfg, trainer = job.cfg, build(job.cfg.trainer)
    check_objective(cfg.objective, trainer)
    _fetch_scores(job)
    epochs = trainer.dense_epochs + trainer.prune_epochs
    job.progress = make_progress(trainer.progress, epochs=epochs) if job.first else Progress(epochs)
    job.result["device"] = str(trainer.torch_device)
    _seed(cfg, trainer, 0)
    with collectives.one_after_the_first():
        data = build(cfg.dataset)
    _record_classes(job, data)
    inputs, labels = inputs_and_labels(next(iter(data.val)))
    example, timed = (trainer.to_device(_first(inputs, count)) for count in (1, trainer.latency_batch))
    _seed(cfg, trainer, 0, data)  # the initial weights do not depend on what the data drew
    model = trainer.place(_build_model(cfg))
    classes = _check_outputs(model, example, labels, cfg.dataset.get("num_classes"))
    return Setup(cfg, trainer, data, model, example, timed, classes, unbounded(model))


def check_seed(job: Context) -> None:
    """Refuse a configuration without a seed and an objective, one that holds passwords, and parts that do not fit."""
    for key in ("seed", "objective"):
        if key not in job.cfg:  # as ~seed leaves it
            raise ValueError(f"{key} must be given: {key}=...")
    refuse_passwords(job.cfg)
    check_fit(job.cfg)
    job.result["config_hash"] = config_hash(job.cfg)
    seed = job.cfg.seed
    if type(seed) is not int:
        raise ValueError(f"seed={seed} is not allowed: it must be a whole number")
    if not -(2**63) <= seed < 2**63 - STREAMS:  # what torch takes, for each stream
        raise ValueError(f"seed={seed} is not allowed: it must be from -2**63 to 2**63 - {STREAMS + 1}")


def check_pruning(job: Context, setup: Setup) -> Any:
    """Build the pruning phase once, so that a mistake in it is found before the dense phase trains; its pruner."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come when it is built for good
        pruner = setup.build_cutting() if is_cut(job.cfg) else setup.build_pruning()[-1]
    timed = [name for name in objective_names(job.cfg.objective) if name in TIMED]
    if timed and not pruner.structured:
        raise ValueError(
            f"objective={timed[0]} has no value without units: single weights change no shape and save no time, "
            f"so take pruner=abs or weighted, or another objective"
        )
    if setup.trainer.prune_epochs == 0 and pruner.horizon != 0 and not is_cut(job.cfg):
        raise ValueError(
            "trainer.prune_epochs=0 leaves no gradient to score by: it must be 1 or more, or pruner=none or magnitude"
        )
    check_teacher(job.cfg, setup.trainer)
    job.result["collapsing"] = predict.foreseen(pruner)
    for line in lines_by_reason(job.result["collapsing"]):
        log.warning("about to collapse when the schedule ends, so that accuracy may be that of guessing: %s", line)
    return pruner


def check_teacher(cfg: DictConfig, trainer: Trainer) -> None:
    """Refuse distillation that has no effect, or no trained dense network to learn from."""
    if not trainer.distill:
        return
    given = f"trainer.distill={trainer.distill}"
    if trainer.prune_epochs == 0:
        raise ValueError(f"{given} has no effect with trainer.prune_epochs=0: it is a part of that phase's loss")
    if trainer.dense_epochs == 0 and is_random(cfg):
        raise ValueError(
            f"{given} needs a trained dense network to learn from, and with trainer.dense_epochs=0 it is random: give "
            f"model.weights"
        )


def _seed(cfg: DictConfig, trainer: Trainer, stream: int, data: Any = None) -> None:
    seed_everything(cfg.seed + stream, deterministic=trainer.deterministic)
    generator = getattr(getattr(data, "train", None), "generator", None)
    if generator is not None:
        generator.manual_seed(cfg.seed + stream)


def _build_model(cfg: DictConfig) -> nn.Module:
    plain = OmegaConf.create({"model": OmegaConf.to_container(cfg.model, resolve=True)})
    weights = plain.model.pop("weights", None)
    model: nn.Module = build(plain.model)
    if weights is not None:
        load_weights(model, str(weights))  # `model.weights=1` is a name too
    return model


def _check_outputs(model: nn.Module, example: Any, labels: Tensor, declared: int | None) -> int:
    """The number of classes.

    Raises:
        ValueError: the network does not run on the data, or has fewer outputs than there are classes.
    """
    try:
        with torch.no_grad():
            outputs = logits_of(call(copy_of(model).eval(), example)).shape[1]
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"the model does not run on the data: {last_line(error)}") from error
    classes = max(declared or 0, int(labels.max()) + 1)
    if outputs < classes:
        raise ValueError(
            f"the model has {outputs} outputs, and the data has {classes} classes: set model.num_classes={classes}"
        )
    return classes


def _record_classes(job: Context, data: Any) -> None:
    """The number of classes where only the data can tell, for the model; their names, for the result."""
    if job.cfg.dataset.get("num_classes", 0) is None:
        job.cfg.dataset.num_classes = data.splits.num_classes
    labels = getattr(getattr(data, "splits", None), "labels", ())
    job.result |= {"labels": list(labels)} if labels else {}


def _fetch_scores(job: Context) -> None:
    """Make `pruner.scores` the path of a file, whatever it names."""
    given = job.cfg.pruner.get("scores")
    if given is not None:
        job.cfg.pruner.scores = collectives.broadcast(_scores_file(job, given) if job.first else "")


def _scores_file(job: Context, given: str) -> str:
    path = scores_path(given)
    if not path.exists() and re.fullmatch("[0-9a-f]{32}", given):
        path = download_artifact(job.cfg.tracking.get("tracking_uri"), given, SCORES, job.folder / "checkpoint")
    if not path.is_file():
        raise ValueError(
            f"pruner.scores={given} is neither a file of scores, nor the output directory of a run that has "
            f"{SCORES}, nor the id of an MLflow run"
        )
    return str(path)


def _first(inputs: Any, count: int) -> Any:
    """The first samples of a batch, however its tensors are wrapped."""
    return map_tensors(lambda tensor: tensor[:count] if tensor.dim() else tensor, inputs)


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
