"""What Hydra writes of a configuration: no password gets there, and other secrets are taken out.

Hydra writes every override and value into `.hydra/` of a job and `multirun.yaml` of a sweep before any code of this
package runs in the job.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gsprune.files.disk import write_atomic
from gsprune.settings.addresses import check_address
from gsprune.settings.recorded import address_with_password, hide, variables
from gsprune.text.display import logger
from gsprune.text.redact import is_secret, redact_logs, redacted_data

__all__ = [
    "as_given",
    "protect",
    "recorded_overrides",
    "redact_files",
    "refuse_passwords",
    "sweep_overrides",
    "sweeper_params",
]

log = logger(__name__)
_FILES = ("config.yaml", "hydra.yaml", "overrides.yaml")
_IN_MEMORY = ("BasicLauncher", "JoblibLauncher")  # launchers that put no override into a file of theirs


def refuse_passwords(cfg: DictConfig) -> None:
    """
    Raises:
        ValueError: an address in the configuration holds a password, which Hydra would write.
    """
    if (found := address_with_password(cfg)) is None:
        return
    key, address = found
    if key.endswith("tracking_uri"):
        way = (
            "give MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) in the environment, "
            "or a database's whole address in MLFLOW_TRACKING_URI"
        )
    else:
        way = f"put the address into an environment variable NAME and give {key}='${{oc.env:NAME}}'"
    raise ValueError(f"{key}={address} is not allowed with a password or name in the address: {way}")


def protect(config: DictConfig) -> None:
    """Keep the secrets of a configuration (with the node `hydra`) out of every later text of this process.

    Called before Hydra writes anything of a run or a sweep.

    Raises:
        ValueError: a secret would be on record in spite of that.
    """
    hide(config)
    redact_logs()
    if "gsprune." in str(OmegaConf.select(config, "tracking._target_")):  # another application records what it wants
        refuse_passwords(config)
        _check_tracking(config.tracking)
    refuse_passwords(OmegaConf.create({"hydra": {"callbacks": config.hydra.callbacks}}))
    hydra = config.hydra
    _refuse_named_in_path(hydra)
    secret = secret_keys(hydra.overrides.task)
    if hydra.mode != RunMode.MULTIRUN:
        if secret:
            _refuse_in_path("hydra.run.dir", _resolved(hydra.run, "dir"), secret)
        return
    _refuse_swept(sweep_overrides(config))
    if not secret:
        return
    launcher = str(hydra.launcher.get("_target_"))
    if not launcher.endswith(_IN_MEMORY):
        raise ValueError(
            f"{secret[0]} is a secret, which {launcher.rpartition('.')[2]} would write into its files: put it into an "
            f"environment variable NAME and give {secret[0]}='${{oc.env:NAME}}'"
        )
    _refuse_in_path("hydra.sweep.dir", _resolved(hydra.sweep, "dir"), secret)
    _refuse_in_path("hydra.sweep.subdir", _resolved(hydra.job, "override_dirname"), secret, where=hydra.sweep)


def _check_tracking(tracking: DictConfig) -> None:
    uri = _resolved(tracking, "tracking_uri") if tracking.get("tracking_uri") else os.environ.get("MLFLOW_TRACKING_URI")
    if uri and str(tracking._target_).endswith("MLflowTracker"):
        check_address(uri)


def recorded_overrides(overrides: Iterable[Any]) -> list[str]:
    """The overrides with their secrets redacted.

    >>> recorded_overrides(["seed=1", "+hub.token=abc", "+hub.user=${oc.env:USER}"])
    ['seed=1', '+hub.token=***', '+hub.user=${oc.env:USER}']
    """
    found: list[str] = redacted_data(as_given(overrides))
    return found


def as_given(overrides: Iterable[Any]) -> list[str]:
    """The overrides as texts; iterating over a list of a configuration would resolve `${...}` in them."""
    written: Any = OmegaConf.to_container(overrides, resolve=False) if OmegaConf.is_config(overrides) else overrides
    return [str(override) for override in written]


def sweeper_params(config: DictConfig, *, resolve: bool = False) -> dict[str, Any]:
    """`hydra.sweeper.params`: the swept values of the configuration."""
    found: Any = OmegaConf.to_container(config.hydra.sweeper.get("params") or OmegaConf.create({}), resolve=resolve)
    return {str(key): value for key, value in found.items()}


def sweep_overrides(config: DictConfig, *, resolve: bool = False) -> list[str]:
    """What Hydra's sweeper reads: `hydra.sweeper.params`, then the overrides of the command."""
    params = sweeper_params(config, resolve=resolve)
    return [*(f"{key}={value}" for key, value in params.items()), *as_given(config.hydra.overrides.task)]


def secret_keys(overrides: Iterable[Any]) -> list[str]:
    """The keys of the overrides that hold a secret itself."""
    texts = as_given(overrides)
    return [text.partition("=")[0] for text, shown in zip(texts, redacted_data(texts), strict=True) if shown != text]


def _refuse_swept(overrides: list[str]) -> None:
    for override in OverridesParser.create().parse_overrides(overrides):
        text = str(override.input_line)
        if override.is_sweep_override() and (key := secret_keys([text])):
            raise ValueError(
                f"{key[0]} is a secret, and swept values are on record: put each into an environment variable and "
                f"give {key[0]}='${{oc.env:ONE}}','${{oc.env:OTHER}}'"
            )


def _resolved(node: Any, key: str) -> str:
    with suppress(OmegaConfBaseException):  # a job's number is not known before it
        return str(node[key])
    return ""


def _refuse_in_path(key: str, path: str, secret: list[str], *, where: Any = None) -> None:
    if where is not None and "override_dirname" not in str(OmegaConf.to_container(where, resolve=False)):
        return
    if redacted_data(path) != path:
        raise ValueError(
            f"{key} would hold the value of {secret[0]}, which is a secret: put it into an environment variable NAME "
            f"and give {secret[0]}='${{oc.env:NAME}}'"
        )


def _refuse_named_in_path(hydra: DictConfig) -> None:
    """A directory named after a secret of the environment shows it to everybody who lists the directory above."""
    for node, key in (("run", "dir"), ("sweep", "dir"), ("sweep", "subdir")):
        text = str((OmegaConf.to_container(hydra[node], resolve=False) or {}).get(key))  # type: ignore[union-attr]
        if name := next(filter(is_secret, variables(text)), None):
            raise ValueError(f"hydra.{node}.{key}={text} would hold the value of {name}, which is a secret")


def redact_files(config: DictConfig) -> None:
    """Take secrets out of the files that Hydra has written for a job and its sweep."""
    hide(config)
    redact_logs()
    written = OmegaConf.to_container(config, resolve=False)
    if redacted_data(written) == written:
        return
    hydra = config.hydra
    paths = [Path(str(hydra.sweep.dir)) / "multirun.yaml"] if hydra.mode == RunMode.MULTIRUN else []
    if hydra.output_subdir is not None and not OmegaConf.is_missing(hydra.runtime, "output_dir"):
        paths += [Path(str(hydra.runtime.output_dir), str(hydra.output_subdir), name) for name in _FILES]
    for path in paths:
        _redact(path)


def _redact(path: Path) -> None:
    if not path.is_file():
        return
    try:
        before = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        if (after := redacted_data(before)) != before:
            write_atomic(path, OmegaConf.to_yaml(OmegaConf.create(after)).encode())
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        log.warning("%s holds a secret that could not be removed: %s", path, error)
