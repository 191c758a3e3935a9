"""Saved scores: reading them, and whether they fit what is pruned."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gsprune.pruner.part import Part
from gsprune.pruner.rule import Scores
from gsprune.pruner.targets import Target

__all__ = ["load_scores", "names_of_criteria"]


def names_of_criteria(parts: Sequence[Part]) -> str:
    """The classes of the criteria, for records: "Abs+Weighted"; "none" without a rule."""
    return "+".join(part.criterion_name for part in parts) or "none"


def load_scores(parts: Sequence[Part], scores: Scores, *, stacklevel: int) -> None:
    """Put saved scores in the place of the running ones of all these parts that accumulate any.

    Raises:
        ValueError: the scores are of other targets, or no scores; names the first tensor that does not fit. All parts
            are as they were.
    """
    name, where = names_of_criteria(parts), "the scores"
    counting = [part for part in parts if part.criterion.cumulative]
    if not counting:
        why = f"{name} computes its own when a mask is due" if parts else "nothing is pruned here"
        warnings.warn(f"scores have no effect: {why}", stacklevel=stacklevel)
        return
    source = name
    if isinstance(scores, str | os.PathLike):
        from gsprune.formats import scores as file

        where, (scores, source, _) = f"the scores of {os.fspath(scores)}", file.load_scores(scores)
    if not isinstance(scores, Mapping):
        raise ValueError(f"scores is a {type(scores).__name__}: it must map names to tensors, or be the path of a file")
    for part in counting:
        for target in part.targets:
            for running in target.running:
                if fault := _fault(running, target, scores, signed=part.criterion.signed):
                    raise ValueError(f"{where} do not fit: {fault}")
    names = {running for part in parts for target in part.targets for running in target.running}
    if extra := [other for other in scores if other not in names]:
        raise ValueError(f"{where} do not fit: they have one of {extra[0]!r}, which is not pruned here")
    if source != name:
        warnings.warn(f"{where} are of {source}, but {name} goes on from them here", stacklevel=stacklevel)
    for part in counting:
        part.take_scores(scores)


def _fault(name: str, target: Target, scores: Mapping[str, Tensor], *, signed: bool) -> str | None:
    """Why the scores of that name do not fit the target."""
    if name not in scores:
        near = difflib.get_close_matches(name, map(str, scores), n=1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        return f"they have none of {name!r}, which is pruned here{hint}"
    score: object = scores[name]
    if not isinstance(score, Tensor):
        return f"{name!r} is a {type(score).__name__}, but scores are tensors"
    if score.shape != target.shape:
        return f"{name!r} has shape {list(target.shape)} here but {list(score.shape)} in the scores"
    if score.dtype != torch.float32:
        return f"{name!r} is {score.dtype}, but scores are torch.float32"
    score = target.here(score)
    if not bool(score.isfinite().all()):
        return f"{name!r} holds a value that is not finite"
    if not signed and bool((score < 0).any()):
        return f"{name!r} holds a negative value"
    return None
