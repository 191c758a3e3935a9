"""gsprune: gradient-sensitivity pruning for PyTorch.

This file only names the public things and imports nothing heavy: `import gsprune` has to stay cheap, because Hydra
imports the package to list its configuration groups (`--help`, shell completion). Each name is imported on first use.

>>> import gsprune
>>> gsprune.__version__
'0.1.0'
>>> "Pruner" in dir(gsprune)
True

So are the packages: `gsprune.export` needs no import of its own.

>>> gsprune.criteria.__name__
'gsprune.criteria'
"""

from __future__ import annotations

import sys
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from gsprune.moved import MOVED, Finder

if TYPE_CHECKING:
    from gsprune.collectives import check_masks
    from gsprune.cutting.audit import audit
    from gsprune.cutting.cut import cut
    from gsprune.cutting.experts import cut_experts
    from gsprune.cutting.family import cut_family
    from gsprune.cutting.how_much import right_or_wrong
    from gsprune.cutting.planned import plan
    from gsprune.cutting.sensitivity import sensitivity
    from gsprune.discovery.find import find_structures
    from gsprune.formats.masks import load_masks, save_masks
    from gsprune.formats.network import load_pruned, save_pruned
    from gsprune.integrations.inc import load_inc_config
    from gsprune.pruner.pruner import Pruner
    from gsprune.pruner.rule import Rule
    from gsprune.surgery.reshard import cut_sharded
    from gsprune.surgery.rows import cut_rows
    from gsprune.sweeps.callback import start_run
    from gsprune.sweeps.frame import results

__version__ = "0.1.0"

_HOMES = {
    "NoPruning": "gsprune.pruner.former_names",
    "Pruners": "gsprune.pruner.former_names",
    "Pruner": "gsprune.pruner.pruner",
    "Rule": "gsprune.pruner.rule",
    "audit": "gsprune.cutting.audit",
    "check_masks": "gsprune.collectives",
    "cut": "gsprune.cutting.cut",
    "cut_experts": "gsprune.cutting.experts",
    "cut_family": "gsprune.cutting.family",
    "cut_rows": "gsprune.surgery.rows",
    "cut_sharded": "gsprune.surgery.reshard",
    "find_structures": "gsprune.discovery.find",
    "load_inc_config": "gsprune.integrations.inc",
    "load_masks": "gsprune.formats.masks",
    "load_pruned": "gsprune.formats.network",
    "plan": "gsprune.cutting.planned",
    "results": "gsprune.sweeps.frame",
    "right_or_wrong": "gsprune.cutting.how_much",
    "save_masks": "gsprune.formats.masks",
    "save_pruned": "gsprune.formats.network",
    "sensitivity": "gsprune.cutting.sensitivity",
    "start_run": "gsprune.sweeps.callback",
}

__all__ = [
    "Pruner",
    "Rule",
    "__version__",
    "audit",
    "check_masks",
    "cut",
    "cut_experts",
    "cut_family",
    "cut_rows",
    "cut_sharded",
    "find_structures",
    "load_inc_config",
    "load_masks",
    "load_pruned",
    "plan",
    "results",
    "right_or_wrong",
    "save_masks",
    "save_pruned",
    "sensitivity",
    "start_run",
]

sys.meta_path.append(Finder())


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name in _modules() or name in MOVED:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_modules()})


def _modules() -> set[str]:
    """The modules and packages in this one's folder."""
    return {module.name for module in iter_modules(__path__)}
