"""The one place that makes objects out of a configuration: that of this run, and of nothing else.

`make` gets a node of the composed configuration. Values that come from elsewhere (results, records, checkpoints) are
arguments: they reach the object as they are, and neither a `_target_` nor a `${...}` in them is looked at.
From Hydra 1.4 on a list says which targets may be called.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

__all__ = ["main_arguments", "make"]

ALLOWED = ("gsprune.*", "torch.*", "torchvision.*")
_NAMES = ("_execution_whitelist_", "_target_whitelist_")  # of instantiate's argument, in Hydra 1.4 and before its end
_TARGET = r"(?:_target_|class)[ \t]*[:=][ \t]*[\"']?([A-Za-z_][\w.]*)"


def make(node: DictConfig, **arguments: Any) -> Any:
    """Hydra's `instantiate` on a node of the composed configuration; `arguments` are passed on untouched."""
    made = instantiate(node, _convert_="all", **_allowed(node), **({"_partial_": True} if arguments else {}))
    return made(**arguments) if arguments else made


def main_arguments(conf: Path) -> dict[str, Any]:
    """What `hydra.main` takes beside the place of the configuration.

    From Hydra 1.4 on that is the list of targets, since Hydra makes callbacks and sets up logging before there is a
    configuration: this package's, and those that the files in `conf` and the command line name. Before it is
    `version_base`, which Hydra 1.4 warns of.
    """
    name = next((name.strip("_") for name in _NAMES if name.strip("_") in inspect.signature(hydra.main).parameters), "")
    if not name:
        return {"version_base": "1.3"}
    texts = [path.read_text(encoding="utf8", errors="replace") for path in conf.rglob("*.yaml")]
    own = {found for text in [*texts, *sys.argv[1:]] for found in re.findall(_TARGET, text)}
    return {name: [*ALLOWED, *sorted(own)]}


def _allowed(node: DictConfig) -> dict[str, list[str]]:
    """The list of targets for `instantiate`, where it takes one: what the configuration names, and ours."""
    name = next((name for name in _NAMES if name in inspect.signature(instantiate).parameters), None)
    if name is None:
        return {}
    own = {target for part in (node._get_root(), node) for target in _targets(_plain(part))}
    return {name: [*ALLOWED, *sorted(own | {_identity(target) for target in own})]}


def _plain(config: Any) -> Any:
    try:
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException:  # a value elsewhere that cannot be resolved is not for us to tell
        return OmegaConf.to_container(config, resolve=False)


def _targets(node: Any) -> Iterator[str]:
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _targets(value)
    if isinstance(node, dict) and isinstance(node.get("_target_"), str) and re.fullmatch(r"[\w.]+", node["_target_"]):
        yield node["_target_"]


def _identity(target: str) -> str:
    """Where the object really is defined: `package.Net` may come from `package.net`."""
    try:
        found = get_object(target)
        return f"{found.__module__}.{found.__qualname__}"
    except Exception:  # instantiate says so in its own words
        return target
