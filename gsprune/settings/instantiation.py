"""The one place that makes objects from a configuration: from the composed configuration of this run, and no other.

Values from elsewhere (results, records, checkpoints) are arguments of `make`: they reach the object unchanged, and a
`_target_` or `${...}` in them has no effect. From Hydra 1.4 on a list says which targets may be called.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gsprune.settings.sources import targets

__all__ = ["main_arguments", "make"]

ALLOWED = ("gsprune.*", "torch.*", "torchvision.*")
_NAMES = ("_execution_whitelist_", "_target_whitelist_")  # of instantiate's argument, in Hydra 1.4 and before its end
_TARGET = r"(?:_target_|class)[ \t]*[:=][ \t]*[\"']?([A-Za-z_][\w.]*)"


def make(node: DictConfig, **arguments: Any) -> Any:
    """Hydra's `instantiate` on a node of the composed configuration; `arguments` reach the object unchanged."""
    made = instantiate(node, _convert_="all", **_allowed(node), **({"_partial_": True} if arguments else {}))
    return made(**arguments) if arguments else made


def main_arguments(conf: Path) -> dict[str, Any]:
    """Arguments of `hydra.main` beside the place of the configuration.

    From Hydra 1.4 on the allowed targets, as Hydra makes callbacks and sets up logging before it composes: those of
    this package, of the files in `conf` and of the command line. Before it `version_base`, of which Hydra 1.4 warns.
    """
    name = next((name.strip("_") for name in _NAMES if name.strip("_") in inspect.signature(hydra.main).parameters), "")
    if not name:
        return {"version_base": "1.3"}
    texts = [path.read_text(encoding="utf8", errors="replace") for path in conf.rglob("*.yaml")]
    own = {found for text in [*texts, *sys.argv[1:]] for found in re.findall(_TARGET, text)}
    return {name: [*ALLOWED, *sorted(own)]}


def _allowed(node: DictConfig) -> dict[str, list[str]]:
    """The allowed targets for `instantiate`, if it takes them: this package's, and those in the configuration."""
    name = next((name for name in _NAMES if name in inspect.signature(instantiate).parameters), None)
    if name is None:
        return {}
    own = {target for part in (node._get_root(), node) for target in targets(_plain(part))}
    return {name: [*ALLOWED, *sorted(own | {_identity(target) for target in own})]}


def _plain(config: Any) -> Any:
    try:
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException:  # a value elsewhere that cannot be resolved does not matter here
        return OmegaConf.to_container(config, resolve=False)


def _identity(target: str) -> str:
    """The name where the object is defined: `package.Net` may come from `package.net`."""
    try:
        found = get_object(target)
        return f"{found.__module__}.{found.__qualname__}"
    except Exception:  # instantiate reports it
        return target
