"""`Pruners` and `NoPruning`, as they were called before a pruner had rules; for one release."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from gsprune.pruner.pruner import Pruner, no_pruning
from gsprune.pruner.rule import Rule

__all__ = ["NoPruning", "Pruners"]


def Pruners(model: nn.Module, pruners: Sequence[functools.partial[Pruner]], **arguments: Any) -> Pruner:
    """A pruner of several rules, each given as `functools.partial(Pruner, criterion=..., ...)`."""
    new = "gsprune.Pruner(model, rules=[gsprune.Rule(...), ...])"
    warnings.warn(f"gsprune.Pruners is gone: use {new}", FutureWarning, stacklevel=2)
    if not isinstance(pruners, Sequence) or not all(isinstance(part, functools.partial) for part in pruners):
        raise ValueError(f"pruners is {pruners!r}: give {new}")
    settings = [dict(part.keywords) for part in pruners]
    times = [own.pop("shrink", "at_end") for own in settings]
    for own in settings:
        former, named = own.pop("target", None), own.get("budget") or {}
        if former and not any(named.values()):
            own["budget"] = former
    rules = [Rule(**own) for own in settings]
    units = {when for rule, when in zip(rules, times, strict=True) if rule.units}
    if len(units) > 1:
        raise ValueError("shrink is at_end and each_update: it is one setting of all rules, give Pruner(shrink=...)")
    return Pruner(model, rules=rules, shrink=next(iter(units), "at_end"), **arguments)


def NoPruning(model: nn.Module, **settings: Any) -> Pruner:
    """A pruner without a rule."""
    warnings.warn("gsprune.NoPruning is gone: use gsprune.Pruner(model, rules=[])", FutureWarning, stacklevel=2)
    return no_pruning(model, **settings)
