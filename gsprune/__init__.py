"""gsprune: gradient-sensitivity pruning for PyTorch.

This file only names the public things and imports nothing heavy: `import gsprune` has to stay cheap, because Hydra
imports the package to list its configuration groups (`--help`, shell completion). Each name is imported on first use.

>>> import gsprune
>>> gsprune.__version__
'0.1.0'
>>> "Pruner" in dir(gsprune)
True

So are the modules: `gsprune.export` needs no import of its own.

>>> gsprune.selection.__name__
'gsprune.selection'
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gsprune.checkpoint import load_pruned, save_pruned
    from gsprune.pruner import NoPruning, Pruner
    from gsprune.pruners import Pruners
    from gsprune.structures import find_structures

__version__ = "0.1.0"

__all__ = ["NoPruning", "Pruner", "Pruners", "__version__", "find_structures", "load_pruned", "save_pruned"]

# The function `shrink` is not here: `gsprune.shrink` is the module of that name, and an attribute cannot be both.
_HOMES = {
    "NoPruning": "gsprune.pruner",
    "Pruner": "gsprune.pruner",
    "Pruners": "gsprune.pruners",
    "find_structures": "gsprune.structures",
    "load_pruned": "gsprune.checkpoint",
    "save_pruned": "gsprune.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name in _modules():
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
