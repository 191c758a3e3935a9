"""What Hydra refuses of a command, as one sentence that says what was meant.

For a key that it does not know, Hydra advises `+key=value`, which adds a setting that nothing reads. Here the nearest
setting, group or choice is named instead.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gsprune.settings.instantiation import main_arguments
from gsprune.text.display import one_line
from gsprune.text.names import nearest
from gsprune.text.redact import redacted_message

__all__ = ["explained", "first_values", "run_command", "sentence"]

FULL_ERROR = "HYDRA_FULL_ERROR"
HINT = f"Set the environment variable {FULL_ERROR}=1 for a complete stack trace."
_UNKNOWN = (
    r"Could not override '([^'@]+)",
    r"Error merging override \++([^=\s]+)=.*Key '[^']*' (?:is )?not in",
    r"Could not delete from config. '([^']+)'",
)
MOST = 3  # settings that one misspelt name may have meant


def run_command(main: Callable[[], Any], conf: Path) -> int:
    """Run a command of `hydra.main`; its exit code. What Hydra or the job refuses is a sentence on stderr.

    Args:
        conf: the directory of its configuration, from which the names come that a misspelt one may have meant.
    """
    sys.argv[1:] = _in_one_piece(sys.argv[1:])
    if os.environ.get(FULL_ERROR) == "1":
        main()
        return 0
    os.environ[FULL_ERROR] = "1"  # Hydra then raises what it would print
    try:
        main()
        return 0
    except Exception as error:
        if (told := _told(error, conf)) is None:
            traceback.print_exception(type(error), error, _of_the_job(error.__traceback__))
        print(f"{told or ''}\n{HINT}" if told is None else f"{told}\n\n{HINT}", file=sys.stderr)
        return 1
    finally:
        del os.environ[FULL_ERROR]


def _in_one_piece(words: Sequence[str]) -> list[str]:
    """The words of a command with `--multirun` in front: Hydra's parser refuses overrides on both sides of it.

    >>> _in_one_piece(["pruner=abs", "-m", "seed=0,1"])
    ['-m', 'pruner=abs', 'seed=0,1']
    """
    flags = [word for word in words if word in ("--multirun", "-m")]
    return [*flags, *(word for word in words if word not in flags)]


def _told(error: BaseException, conf: Path) -> str | None:
    """None for what is no mistake of the user's."""
    if not isinstance(error, HydraException):
        return _no_directory(error)
    if (found := _in_conf(error, conf)) is not None:
        return found
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    return redacted_message("\n".join(str(part) for part in (error, cause) if part is not None))


def _in_conf(error: HydraException, conf: Path) -> str | None:
    given = sys.argv[1:]
    if any(text.startswith(("--config", "-cn", "-cp", "-cd")) for text in given):  # another configuration
        return None
    version = {name: value for name, value in main_arguments(conf).items() if name == "version_base"}
    with suppress(Exception), initialize_config_dir(str(conf.absolute()), **version):  # else Hydra's own words remain
        loader = GlobalHydra.instance().config_loader()
        return explained(error, [text for text in given if not text.startswith("-")], loader)
    return None


def _no_directory(error: BaseException) -> str | None:
    """Where a directory or file cannot be made before the job itself runs; None for any other error."""
    names = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = any(name.startswith("gsprune.") and name != __name__ for name in names)
    cause: BaseException | None = None if ours else error
    while cause is not None:
        if isinstance(cause, OSError) and cause.filename is not None:
            why = (cause.strerror or "the disk refuses").lower()
            told = f"{cause.filename} cannot be made: {why}; give another hydra.run.dir (hydra.sweep.dir of a sweep)"
            return one_line(redacted_message(told))
        cause = cause.__cause__ or cause.__context__
    return None


def _of_the_job(trace: TracebackType | None) -> TracebackType | None:
    """A traceback without the frames that lead to the job."""
    at = trace
    while at is not None:
        if at.tb_frame.f_code.co_name in ("run_job", "_run_job") and at.tb_next is not None:
            trace = at.tb_next
        at = at.tb_next
    return trace


def sentence(error: BaseException) -> str:
    """The message of an error and of its cause, where Hydra keeps details, on one line.

    >>> sentence(ValueError("seed=x is not\\nallowed"))
    'seed=x is not allowed'
    """
    texts = [" ".join(redacted_message(str(found)).split()) for found in (error, error.__cause__) if found is not None]
    listed = list(dict.fromkeys(re.sub(r" full_key: \S+| object_type=\S+", "", text) for text in texts if text))
    return ": ".join(listed) or type(error).__name__


def explained(error: HydraException, overrides: Sequence[str], loader: ConfigLoader) -> str | None:
    """What a setting, group or choice that Hydra does not know may have meant; None for any other error.

    Args:
        overrides: of the command that it refused.
        loader: composes its configuration.
    """
    if isinstance(error, MissingConfigException):
        return _choice(error)
    text = redacted_message(" ".join(f"{error} {error.__cause__ or ''}".split()))
    if found := re.match(r"Ambiguous value for argument '(.+?)=(.+?)'", text):
        return (
            f"{found[1]}={found[2]} are values to sweep over: add --multirun, or give one list, {found[1]}=[{found[2]}]"
        )
    if found := re.match(r"Error merging override (\S+) (Value .*?)(?: full_key|$)", text):
        return f"{found[1]} is not allowed: {found[2]}"
    key = next((found[1] for pattern in _UNKNOWN if (found := re.search(pattern, text))), None)
    if key is None or key.startswith("hydra"):
        return None
    tree = _composed(overrides, key, loader)
    groups = _groups(loader)
    near = _meant(key, [*_paths(tree), *groups])
    told = f"{key} is not a setting"
    if near:
        return f"{told}: did you mean {' or '.join(near)}?"
    above, inner = _deepest(tree, key)
    known = [str(name) for name in inner if not str(name).startswith("_")]
    listed = f"{', '.join(known[:20])}{', ...' if len(known) > 20 else ''}"
    free = "" if OmegaConf.get_type(inner) is not dict else f"; a setting of your own takes +{key}=..."
    return f"{told}: {above or 'the configuration'} has {listed}{free}"


def _choice(error: MissingConfigException) -> str | None:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    options = [str(option) for option in error.options or ()]
    if not group or not options:
        return None
    near = nearest(name, options)
    meant = f"did you mean {group}={near}? " if near else ""
    return f"{group}={name} is not a choice: {meant}There are {', '.join(options)}"


def _composed(overrides: Sequence[str], refused: str, loader: ConfigLoader) -> DictConfig:
    """The configuration without the override that was refused, and without others that would be."""
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
    given = [text for text in first_values(parsed) if _key(text) != refused]
    while True:
        try:
            found = loader.load_configuration("config", given, RunMode.RUN, validate_sweep_overrides=False)
            break
        except HydraException:
            given = given[:-1]  # without any it composes
    with suppress(KeyError):
        OmegaConf.set_struct(found, False)
        del found["hydra"]
    return found


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def first_values(overrides: Sequence[Override]) -> list[str]:
    """Overrides of one job of a sweep: the first value of each that is swept."""
    values = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            values[key] = override.get_value_element_as_str()
        elif override.is_discrete_sweep():
            values[key] = next(iter(override.sweep_string_iterator()))
        elif isinstance(found := override.value(), IntervalSweep):
            values[key] = str(found.start)
    return [f"{key}={value}" for key, value in values.items()]


def _groups(loader: ConfigLoader, parent: str = "") -> Iterator[str]:
    for name in loader.list_groups(parent):
        path = f"{parent}/{name}".lstrip("/")
        if path != "hydra":
            yield path
            yield from _groups(loader, path)


def _paths(node: Any, above: str = "") -> Iterator[str]:
    """Every setting of a configuration, by its whole name; items of lists by their number."""
    inner: Iterable[tuple[Any, Any]] = ()
    if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing() and not node._is_interpolation():
        inner = ((key, node._get_node(key)) for key in node)
    elif isinstance(node, ListConfig) and not node._is_none() and not node._is_missing():
        inner = ((str(number), node._get_node(number)) for number in range(len(node)))
    for key, value in inner:
        path = f"{above}.{key}".lstrip(".")
        if not str(key).startswith("_"):
            yield path
            yield from _paths(value, path)


def _deepest(tree: DictConfig, key: str) -> tuple[str, DictConfig]:
    """The innermost node that the name leads to, and the part of the name that leads there."""
    names: list[str] = []
    node: DictConfig = tree
    for name in key.split("."):
        inner = node._get_node(name) if name in node else None
        if not isinstance(inner, DictConfig):
            break
        names.append(name)
        node = inner
    return ".".join(names), node


def _meant(key: str, known: Sequence[str]) -> list[str]:
    """The settings that a misspelt name may have meant, likeliest first.

    >>> known = ["seed", "pruner", "pruner.target_sparsity", "pruner.schedule", "optimizer.lr", "trainer.prune_lr"]
    >>> [_meant(key, known) for key in ("pruner.target_sparsty", "prunner", "lr", "prunner.schedule", "pruner.abc")]
    [['pruner.target_sparsity'], ['pruner'], ['optimizer.lr'], ['pruner.schedule'], []]
    """
    above, _, last = key.rpartition(".")
    beside = [name for name in known if name.rpartition(".")[0] == above]
    if near := nearest(last, [name.rpartition(".")[2] for name in beside]):
        return [f"{above}.{near}".lstrip(".")]
    alike = [name for name in known if nearest(last, [name.rpartition(".")[2]]) and not key.startswith(f"{name}.")]
    if near := nearest(key, alike, cutoff=0.75):
        return [near]
    return sorted((name for name in known if name.endswith(f".{last}")), key=len)[:MOST]
