"""What the composed configuration says: the objects it describes, what a sweep optimises, the name of the job."""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gsprune.extras import MissingExtraError
from gsprune.settings.addresses import command_directory
from gsprune.settings.git import git_tags
from gsprune.settings.hydra_files import recorded_overrides
from gsprune.settings.instantiation import make
from gsprune.sweeps.sweep_dir import without_sweep_settings
from gsprune.text.display import one_line
from gsprune.text.names import nearest

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
    """Make the object that a node describes; a mistake in its arguments is a ValueError that names the setting."""
    try:
        return make(node, **arguments)
    except Exception as error:
        cause: BaseException | None = error
        while isinstance(cause, InstantiationException):
            cause = cause.__cause__
        raise _named(node, cause or error) from (None if isinstance(cause, ValueError) else error)


def complete(node: DictConfig, partial: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call a partial that `build` has made of the node; a wrong argument is a ValueError that names the setting."""
    try:
        return partial(*arguments, **named)
    except (TypeError, ValueError) as error:
        raise _named(node, error) from (None if isinstance(error, ValueError) else error)


def _named(node: DictConfig, error: BaseException) -> ValueError:
    """The error with the whole name of the setting that it is about, as far as its text tells."""
    group = str(node._get_full_key(None) or node.get("_target_"))
    # torch raises RuntimeError for a value that it refuses, Hydra its own error for a name that it does not find
    text = one_line(str(error).split(", set env var")[0], 4000)
    if isinstance(error, MissingExtraError) or re.match(rf"{re.escape(group)}[.=\[]", text):
        return error if isinstance(error, ValueError) else ValueError(text)
    if found := re.match(r"rules\[(\d+)\]: (?=\w+ is )", text):
        return ValueError(f"{group}.rules.{found[1]}.{text[found.end() :]}")
    if isinstance(error, TypeError) and (unknown := re.search(r"unexpected keyword argument '(\w+)'", text)):
        near = nearest(unknown[1], {name.rpartition(".")[2] for name, _ in _leaves(node)} - {unknown[1]})
        return ValueError(f"{group}.{unknown[1]} is not a setting{f': did you mean {group}.{near}?' if near else ''}")
    first, rest = re.match(r"(\w*)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    leaves = _leaves(node)
    if len(mine := [name for name, _ in leaves if name.rpartition(".")[2] == first]) > 1:
        mine = [name for name, value in leaves if name in mine and _is_in(value, rest)] or mine
    if len(mine) == 1 and isinstance(error, ValueError):
        return type(error)(f"{group}.{mine[0]}{rest}") if type(error) is ValueError else error
    if isinstance(error, ValueError) and _is_ours(error):
        return error
    told = [(name, value) for name, value in leaves if _is_in(value, text) or _is_text_for_number(node, name, value)]
    if len(told) == 1:
        ((name, value),) = told
        return ValueError(f"{group}.{name}={_shown(value)} is not allowed: {text}")
    return ValueError(f"{group} cannot be made: {text}")


def _leaves(node: DictConfig) -> list[tuple[str, Any]]:
    """The settings of a group, by their names below it; a list is one setting."""

    def below(value: Any, above: str) -> Iterator[tuple[str, Any]]:
        nested = isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict) for v in value))
        if nested:
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                yield from below(inner, f"{above}.{key}".lstrip("."))
        elif not above.rpartition(".")[2].startswith("_"):
            yield above, value

    try:
        plain = OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException:
        plain = OmegaConf.to_container(node, resolve=False)
    return list(below(plain, ""))


def _is_in(value: Any, text: str) -> bool:
    """Whether an error names this value, of which there are many: true, false, 0 and 1 do not count."""
    if isinstance(value, list):
        return any(_is_in(item, text) for item in value)
    if value is None or isinstance(value, bool) or value in (0, 1, ""):
        return False
    forms = {str(value), repr(value), *([f"{value:g}", str(float(value))] if isinstance(value, int | float) else [])}
    return any(re.search(rf"(?<![\w.]){re.escape(form)}(?![\w]|\.\d)", text) for form in forms)


def _is_text_for_number(node: DictConfig, name: str, value: Any) -> bool:
    """Whether a parameter of the target takes a number, and a text is given."""
    if not isinstance(value, str) or "." in name:
        return False
    with contextlib.suppress(Exception):  # a target without a signature, or one that cannot be found
        parameter = inspect.signature(get_object(node._target_)).parameters[name]
        return bool(re.fullmatch(r"(int|float|bool)( \| (int|float|bool|None))*", str(parameter.annotation)))
    return False


def _shown(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _is_ours(error: BaseException) -> bool:
    """Whether this package has raised it, whose sentences are whole."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    return bool(frames) and str(frames[-1].f_globals.get("__name__")).startswith("gsprune.")


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
            near = nearest(str(name), NUMBERS)
            hint = f"did you mean {near}? " if near else ""
            raise ValueError(f"objective={name} is not in the result: {hint}There are {', '.join(NUMBERS)}")
        if name in TIMED:
            from gsprune.latency import LEAST  # imports torch

            if (repeats := trainer.latency_repeats) < LEAST:
                raise ValueError(
                    f"objective={name} is not measured with trainer.latency_repeats={repeats}: it takes {LEAST}"
                )


def check_fit(cfg: DictConfig) -> None:
    """Refuse data and network that need settings which the other does not have, as texts and a network for images do.

    Raises:
        ValueError: with the choices that fit, where Hydra composes the job in this process.
    """
    lacking = _lacking(cfg)
    if not lacking:
        return
    chosen = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    model, data = (f"{group}={chosen[group]}" if group in chosen else group for group in ("model", "dataset"))
    fit = {group: _fitting(group, dict(chosen)) for group in ("model", "dataset")}
    others = "; ".join(f"{group} may be {' or '.join(names)}" for group, names in fit.items() if names)
    raise ValueError(f"{model} does not fit {data}: there is no {', '.join(lacking)}{f'; {others}' if others else ''}")


def _lacking(cfg: DictConfig) -> list[str]:
    """Settings of data or network that the other refers to and that do not exist."""
    found: list[str] = []
    for group, other in (("model", "dataset"), ("dataset", "model")):
        texts = str(OmegaConf.to_container(cfg[group], resolve=False)) if OmegaConf.is_config(cfg.get(group)) else ""
        for name in re.findall(rf"\$\{{{other}\.(\w+)\}}", texts):
            if OmegaConf.is_config(cfg.get(other)) and name not in cfg[other]._content:
                found.append(f"{other}.{name}")
    return list(dict.fromkeys(found))


def _fitting(group: str, chosen: Mapping[str, str]) -> list[str]:
    """The choices of one group that fit the choice of the other."""
    other = {"model": "dataset", "dataset": "model"}[group]
    if other not in chosen or not GlobalHydra.instance().is_initialized():
        return []
    loader, fit = GlobalHydra.instance().config_loader(), []
    for name in loader.get_group_options(group):
        with contextlib.suppress(HydraException):
            groups = [f"{group}={name}", f"{other}={chosen[other]}"]
            made = loader.load_configuration("config", groups, RunMode.RUN, validate_sweep_overrides=False)
            fit += [] if _lacking(made) else [name]
    return fit


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
    """`hydra_choices` as tags of an MLflow run, and the commit of the code; empty outside Hydra."""
    if not HydraConfig.initialized():
        return {}
    chosen = hydra_choices()
    groups = {f"group.{name}": choice for name, choice in chosen["choices"].items()}
    return {"hydra.overrides": " ".join(chosen["overrides"]), **groups, **git_tags(command_directory())}


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


COSTS = ("macs", "params", "latency")  # a budget's; what else it sets says how they are measured


def budget_of(pruner: DictConfig) -> dict[str, float]:
    """The budget in a pruner's configuration: {"macs": 0.5}, or empty."""
    given = [*(pruner.get("budget") or {}).items(), *(pruner.get("target") or {}).items()]
    return {str(kind): share for kind, share in given if share is not None and kind in COSTS}


def is_timed(pruner: DictConfig) -> bool:
    """Whether a pruner, or one of its rules, has a budget of milliseconds (for `trainer.latency_batch` samples)."""
    rules = pruner.get("rules") or pruner.get("pruners") or ()
    return any("latency" in budget_of(rule) for rule in (pruner, *rules))
