"""What the composed configuration says: the objects it describes, what a sweep optimises, the name of the job."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from gsprune.settings.addresses import command_directory
from gsprune.settings.hydra_files import recorded_overrides
from gsprune.settings.instantiation import make
from gsprune.sweeps.sweep_dir import without_sweep_settings
from gsprune.text.display import one_line

if TYPE_CHECKING:
    from gsprune.training.trainer import Trainer

# The numbers of result.json; a sweep may optimise any of them.
NUMBERS = (
    *("accuracy", "baseline_accuracy", "val_accuracy", "baseline_val_accuracy", "loss", "baseline_loss"),
    *("sparsity", "target_sparsity", "params", "params_dense", "params_nonzero", "macs", "macs_dense"),
    *("latency_ms", "latency_dense_ms", "speedup", "speedup_low", "speedup_high", "file_bytes", "file_bytes_dense"),
    *("seconds", "updates", "epochs", "baseline_epochs"),
)
# Settings that may name a file or folder.
PATHS = (
    *(f"dataset.{key}" for key in ("root", "path", "train", "val", "test", "tokenizer")),
    *("model.name", "model.weights", "pruner.scores"),
)
TIMED = tuple(name for name in NUMBERS if name.startswith(("latency", "speedup")))


def build(node: Any, **arguments: Any) -> Any:
    """Make the object that a node describes; a mistake in its arguments is a ValueError of one sentence."""
    try:
        return make(node, **arguments)
    except Exception as error:
        cause: BaseException | None = error
        while isinstance(cause, InstantiationException):
            cause = cause.__cause__
        if isinstance(cause, ValueError):
            raise cause from None
        # torch raises RuntimeError for a value that it refuses, Hydra its own error for a name that it does not find
        told = one_line(str(cause or error).split(", set env var")[0])
        raise ValueError(f"{node.get('_target_')} cannot be made: {told}") from error


def complete(group: str, partial: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call a partial that `build` returned; an argument of a wrong name or type is a mistake in its group."""
    try:
        return partial(*arguments, **named)
    except TypeError as error:
        raise ValueError(f"{group} cannot be made: {error}") from error


def objective(result: Mapping[str, Any], wanted: str | Sequence[str]) -> float | tuple[float, ...]:
    """The number (or numbers) of the result that a sweep optimises.

    Raises:
        ValueError: a latency could not be measured.

    >>> objective({"accuracy": 0.9, "sparsity": 0.5}, ["accuracy", "sparsity"])
    (0.9, 0.5)
    """
    names = objective_names(wanted)
    for name in names:
        if result[name] is None:
            raise ValueError(f"objective={name} has no value ({result.get('latency_note') or 'it was not measured'})")
    values = tuple(float(result[name]) for name in names)
    return values[0] if isinstance(wanted, str) else values


def objective_names(wanted: str | Sequence[str]) -> list[str]:
    """
    >>> objective_names("accuracy"), objective_names(["accuracy", "macs"])
    (['accuracy'], ['accuracy', 'macs'])
    """
    several = isinstance(wanted, Sequence) and not isinstance(wanted, str)
    return [str(name) for name in wanted] if several else [str(wanted)]


def check_objective(wanted: str | Sequence[str], trainer: Trainer | DictConfig) -> None:
    """Refuse a wrong name before training starts; `trainer` is a `Trainer` or its configuration."""
    for name in objective_names(wanted):
        if name not in NUMBERS:
            near = get_close_matches(str(name), NUMBERS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"objective={name} is not in the result: {hint}There are {', '.join(NUMBERS)}")
        if name in TIMED:
            from gsprune.cost.latency import LEAST  # imports torch

            if (repeats := trainer.latency_repeats) < LEAST:
                raise ValueError(
                    f"objective={name} is not measured with trainer.latency_repeats={repeats}: it takes {LEAST}"
                )


def check_plan(cfg: DictConfig) -> bool:
    """Whether `plan=true` is set: the job prints a plan and trains nothing."""
    return check_switch(cfg, "plan")


def check_switch(cfg: DictConfig, name: str) -> bool:
    """The value of a key that is true or false; false where a configuration does not have it."""
    value = cfg.get(name, False)
    if value not in (True, False):
        raise ValueError(f"{name}={value} is not allowed: it must be true or false")
    return bool(value)


def from_command(cfg: DictConfig) -> DictConfig:
    """The configuration with its paths relative to where the command was given, if Hydra has changed the directory.

    A name that may be something else than a path (on a hub, of an MLflow run) is a path if there is such a file.
    """
    start = command_directory()
    if start == Path.cwd():
        return cfg
    cfg = copy.deepcopy(cfg)
    for key in PATHS:
        given = OmegaConf.select(cfg, key, throw_on_missing=False)
        if isinstance(given, str) and given and (key == "dataset.root" or (start / given).exists()):
            OmegaConf.update(cfg, key, str(start / Path(given).expanduser()))
    return cfg


def hydra_choices() -> dict[str, Any]:
    """The job's `overrides`, secrets redacted, and the option chosen in each group (`choices`); empty outside Hydra."""
    if not HydraConfig.initialized():
        return {"overrides": [], "choices": {}}
    hydra = HydraConfig.get()
    ours = {name: str(choice) for name, choice in hydra.runtime.choices.items() if not name.startswith("hydra/")}
    return {"overrides": recorded_overrides(without_sweep_settings(hydra.overrides.task)), "choices": ours}


def hydra_tags() -> dict[str, str]:
    """`hydra_choices` as tags of an MLflow run."""
    chosen = hydra_choices()
    if not chosen["choices"]:
        return {}
    groups = {f"group.{name}": choice for name, choice in chosen["choices"].items()}
    return {"hydra.overrides": " ".join(chosen["overrides"]), **groups}


def run_name(cfg: DictConfig) -> str | None:
    """The name of the job in a list of runs: "weighted 0.5, seed 0, convnet, digits"; None outside Hydra."""
    if not HydraConfig.initialized():
        return None
    chosen = HydraConfig.get().runtime.choices
    share, budget = wanted_sparsity(cfg.pruner), budget_of(cfg.pruner)
    wanted = [f"{kind} {left:g}" for kind, left in budget.items()] or ([f"{share:g}"] if share else [])
    cut = ["cut"] if cfg.get("mode") == "cut" else []
    pruner = " ".join([*cut, chosen["pruner"], *(wanted if chosen["pruner"] != "none" else ())])
    return f"{pruner}, seed {cfg.seed}, {chosen['model']}, {chosen['dataset']}"  # a table cuts the end off


def wanted_sparsity(pruner: DictConfig) -> float | None:
    """The target sparsity of a pruner's configuration, or of its schedule where that is left open."""
    own = pruner.get("target_sparsity")
    return own if own is not None else (pruner.get("schedule") or {}).get("target_sparsity")


def budget_of(pruner: DictConfig) -> dict[str, float]:
    """The budget in a pruner's configuration: {"macs": 0.5}, or empty."""
    given = [*(pruner.get("budget") or {}).items(), *(pruner.get("target") or {}).items()]
    return {str(kind): share for kind, share in given if share is not None}


def is_timed(pruner: DictConfig) -> bool:
    """Whether a pruner, or one of its rules, has a budget of milliseconds (for `trainer.latency_batch` samples)."""
    rules = pruner.get("rules") or pruner.get("pruners") or ()
    return any("latency" in budget_of(rule) for rule in (pruner, *rules))
