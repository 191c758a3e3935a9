"""Scores on disk, with what they were made by."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

import safetensors
import torch
from torch import Tensor

from gsprune.files.disk import refusing
from gsprune.formats.masks import is_shape
from gsprune.formats.tensors import VERSION, read_header, save_tensors

SCORE_FORMAT = "gsprune-scores"


class SavedScores(NamedTuple):
    """What `load_scores` reads: the tensors, the class name of the criterion they are of, and its steps."""

    scores: dict[str, Tensor]
    criterion: str
    steps: int


def save_scores(path: str | os.PathLike[str], scores: Mapping[str, Tensor], *, criterion: str, steps: int) -> None:
    """Write the scores of `Pruner.scores()`: finite float32 tensors.

    Args:
        criterion: the class name of the criterion, as "Weighted"; of several "Abs+Weighted".
        steps: optimizer steps they were accumulated over.

    Raises:
        ValueError: a score of another type, or a value that no score can have.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = folder.name + "/scores.safetensors"
    >>> save_scores(path, {"w": torch.tensor([0.5, 0.0])}, criterion="Elementwise", steps=44)
    >>> load_scores(path)
    SavedScores(scores={'w': tensor([0.5000, 0.0000])}, criterion='Elementwise', steps=44)
    """
    metadata = {"format": SCORE_FORMAT, "version": str(VERSION), "criterion": criterion, "steps": str(steps)}
    _score_origin("the scores to be saved", metadata)
    for name, score in scores.items():
        if score.dtype != torch.float32:
            raise ValueError(f"score {name!r} is {score.dtype}, but scores are torch.float32")
        if not bool(score.isfinite().all()):
            raise ValueError(f"score {name!r} holds a value that is not finite")
    tensors = {
        name: score.detach().cpu().clone(memory_format=torch.contiguous_format) for name, score in scores.items()
    }
    save_tensors(path, tensors, metadata)


@refusing()
def load_scores(path: str | os.PathLike[str]) -> SavedScores:
    """Read what `save_scores` wrote; ValueError when the file is anything else.

    The values are as the file has them: `Pruner.load_scores` refuses those that no score can have.
    """
    header = read_header(path, SCORE_FORMAT)
    criterion, steps = _score_origin(str(header.path), header.metadata)
    for name, shape in header.shapes.items():
        if header.dtypes[name] != "F32":
            raise ValueError(f"{header.path}: score {name!r} is {header.dtypes[name]}, but scores are F32")
        if not is_shape(shape):
            raise ValueError(f"{header.path}: score {name!r} has the impossible shape {str(shape)[:80]}")
    with safetensors.safe_open(header.path, framework="pt") as file:
        scores = {name: file.get_tensor(name) for name in header.shapes}
    return SavedScores(scores, criterion, steps)


def _score_origin(where: str, metadata: Mapping[str, str]) -> tuple[str, int]:
    criterion, steps = metadata.get("criterion", ""), metadata.get("steps", "")
    if len(criterion) > 1000 or not all(name.isidentifier() for name in criterion.split("+")):
        raise ValueError(
            f"{where}: the criterion is {criterion[:80]!r}: it must be the name of a class, or some with +"
        )
    if not (steps.isascii() and steps.isdecimal() and len(steps) < 16):
        raise ValueError(f"{where}: the number of steps is {steps[:80]!r}: it must be 0 or more")
    return criterion, int(steps)
