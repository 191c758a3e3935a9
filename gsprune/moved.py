"""Names as they were: of modules before the package had folders (`gsprune.sync` is `gsprune.tracking.sync` now), and
of a setting.

They work for one release, with a `FutureWarning` that says the new name.

>>> import warnings
>>> with warnings.catch_warnings(record=True) as caught:
...     warnings.simplefilter("always")
...     from gsprune.locks import Lock
>>> Lock.__module__, str(caught[0].message)
('gsprune.files.locks', 'gsprune.locks has moved: use gsprune.files.locks')
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from pkgutil import iter_modules
from types import CodeType, ModuleType
from typing import Any

MOVED = {
    "addresses": "settings.addresses",
    "attaching": "pruner.attaching",
    "attention": "surgery.narrow_attention structures.attention",
    "blocks": "ranking.blocks",
    "budgets": "cost.budgets",
    "checkpoint": "formats.network formats.scores formats.masks formats.tensors",
    "compat": "integrations.inc",
    "composed": "app.configuration",
    "console": "app.console",
    "copies": "surgery.copies",
    "costs": "cost.costs cost.latency_tables",
    "datasets": "zoo.datasets",
    "dense_cache": "sweeps.dense_cache",
    "describe": "pruner.describe",
    "distributed": "training.data_parallel collectives",
    "drawing": "plots.drawing",
    "earlier": "app.output_dir",
    "examples": "structures.example structures.twin structures.running",
    "figures": "plots.run_figures",
    "guard": "training.guard",
    "hf": "zoo.hf",
    "hydra_files": "settings.hydra_files",
    "identity": "settings.identity",
    "instantiation": "settings.instantiation",
    "job": "app.job",
    "launcher": "training.launcher",
    "loading": "training.loading",
    "locks": "files.locks",
    "matrices": "structures.matrices",
    "memory": "app.memory",
    "metrics": "cost.counting structures.running app.stopwatch app.stages.measuring",
    "models": "zoo.models",
    "names": "text.names",
    "optimizers": "surgery.optimizers",
    "patterns": "ranking.patterns",
    "planner": "forecast.predict forecast.plan forecast.rule_plan",
    "position": "training.loop_state",
    "proof": "surgery.proof surgery.readings",
    "pruners": "pruner.former_names",
    "redact": "text.redact settings.recorded",
    "report": "sweeps.report text.redact",
    "results": "sweeps.results text.names files.layout",
    "run_state": "training.checkpoints",
    "schemas": "conf.schemas",
    "selection": "ranking.selection",
    "several": "app.processes",
    "sharded": "pruner.sharded",
    "shown": "text.display",
    "shrink": "surgery.shrink surgery.apply surgery.cut_plan",
    "signals": "training.signals",
    "sources": "settings.sources",
    "sweep": "sweeps.callback sweeps.sweep_dir files.layout text.redact",
    "sweep_check": "sweeps.check",
    "sweep_figures": "plots.sweep_figures",
    "sync": "tracking.sync",
    "targets": "pruner.find_targets pruner.units pruner.weights pruner.targets",
    "texts": "zoo.texts",
    "trainer": "training.trainer training.optimization",
    "variants": "sweeps.variants",
    "views": "tracking.views",
}
# Names in them that are others now; two, where two modules had the name.
RENAMED = {
    "Cleaned": "RedactedStream",
    "Gate": "GateGradient",
    "Plan": "CutPlan",
    "apply_plan": "apply_cut",
    "clean_files": "redact_files",
    "clean_name": "allowed_name",
    "clean_texts": "redacted_texts",
    "cleaned": "redacted_data",
    "guard_logs": "redact_logs",
    "plain": "json_data",
    "plan_shrink": "plan_cut",
    "read_plan": "read_cut_plan",
    "told": "redacted_message lines_by_reason",
    "without_passwords": "redacted",
}
# Names of modules that are packages now.
PACKAGES = {
    "criteria": "criteria.gate_gradients",
    "files": "files.disk",
    "pruner": "pruner.pruner pruner.part pruner.rule pruner.former_names",
    "structures": "discovery.find structures.structure structures.example structures.twin structures.running",
    "tracking": "tracking.tracker tracking.mlflow_client tracking.mlflow_names tracking.outbox settings.addresses",
}
COMMANDS = {"compat": "convert", "report": "report", "sync": "sync"}  # that were `python -m gsprune.<name>`


def check_overrides(overrides: Sequence[str]) -> None:
    """Check for the former key of the rules in the groups `heads_and_neurons` and `units_and_weights`.

    Hydra says only that the key is unknown. In a group of the user's own, `pruners` is still the list of the rules.

    Raises:
        ValueError: it is there; the message has the new key.

    >>> check_overrides(["pruner=units_and_weights", "pruner.pruners.0.target_sparsity=0.4"])
    Traceback (most recent call last):
    ValueError: pruner.pruners.0.target_sparsity is called pruner.rules.0.target_sparsity now
    """
    ours = any(re.match(r"pruner=.*\b(heads_and_neurons|units_and_weights)\b", text) for text in overrides)
    former = (found[1] for text in overrides if (found := re.match(r"[+~]*(pruner\.pruners\b[^=]*)", text)))
    if ours and (key := next(former, None)):
        raise ValueError(f"{key} is called {key.replace('pruners', 'rules', 1)} now")


class Finder:
    """Finds the old names; `sys.meta_path` asks it last."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        package, _, old = name.rpartition(".")
        return ModuleSpec(name, self) if package == "gsprune" and old in MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Old(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        homes = MOVED[module.__name__.rpartition(".")[2]].split()
        new = ", ".join(f"gsprune.{home}" for home in homes)
        warnings.warn(f"{module.__name__} has moved: use {new}", FutureWarning, stacklevel=_outside())

    def get_code(self, name: str) -> CodeType:
        """For `python -m`, which runs a module without importing it."""
        command = COMMANDS.get(name.rpartition(".")[2], "--help")
        text = f"import sys, gsprune.cli; sys.exit(gsprune.cli.main([{command!r}, *sys.argv[1:]]))"
        return compile(text, name, "exec")


class _Old(ModuleType):
    """Reads every name where it is now."""

    def __getattr__(self, name: str) -> Any:
        return _find(self.__name__, MOVED[self.__name__.rpartition(".")[2]], name)

    def __call__(self, *args: Any, **settings: Any) -> Any:
        """Of a name that is a function today, which importing the old module hides in the package."""
        package, _, name = self.__name__.rpartition(".")
        top: Any = sys.modules[package]  # not imported: the library's modules import this one
        if name not in top._HOMES:
            raise TypeError(f"{self.__name__} is a module, not a function")
        return top.__getattr__(name)(*args, **settings)


def handed_on(package: str) -> Callable[[str], Any]:
    """A package's `__getattr__`, which finds what a module of that name held."""

    def find(name: str) -> Any:
        own = {module.name for module in iter_modules(sys.modules[package].__path__)}
        if name.startswith("__") or name in own:  # a module that is not imported yet: the import goes on to it
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = _find(package, PACKAGES[package.rpartition(".")[2]], name)
        warnings.warn(
            f"{package}.{name} has moved: use it from {getattr(found, '__module__', package)}",
            FutureWarning,
            stacklevel=2,
        )
        return found

    return find


def _find(old: str, homes: str, name: str) -> Any:
    for home in homes.split():
        module = import_module(f"gsprune.{home}")
        for candidate in (name, *RENAMED.get(name, "").split()):
            if hasattr(module, candidate):
                return getattr(module, candidate)
    raise AttributeError(f"module {old!r} has no attribute {name!r}")


def _outside() -> int:
    """How many frames above the caller's caller the import stands, past the machinery of imports."""
    level, frame = 2, sys._getframe(2)
    while frame.f_back is not None and "importlib" in frame.f_code.co_filename:
        level, frame = level + 1, frame.f_back
    return level
