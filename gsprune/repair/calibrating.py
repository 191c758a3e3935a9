"""The samples that a repair looks at: what the networks are called with, and which part is held back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from gsprune.structures.example import Example, inputs_and_labels, map_tensors, tensors_in

FEW = 5  # batches of which none is held back whole


def inputs_of(batch: Any) -> Example:
    """What a network is called with: of a pair the first, of a mapping or named tuple all but its labels.

    >>> inputs_of((1, 2)), inputs_of({"x": 1, "labels": 2}), inputs_of({"x": 1})
    (1, {'x': 1}, {'x': 1})
    """
    try:
        return inputs_and_labels(batch)[0]
    except ValueError:
        return batch


def held_back_split(batches: Iterable[Any], share: float) -> tuple[list[Example], list[bool]]:
    """The inputs of all batches, and which are held back: some of the batches, or some samples of each where there are
    few. Nothing is held back of a single sample.

    Raises:
        ValueError: no batches, or a share outside (0, 1).

    >>> import torch
    >>> held_back_split([torch.arange(5.0)], 0.2)
    ([tensor([0., 1., 3., 4.]), tensor([2.])], [False, True])
    """
    if not 0 < share < 1:
        raise ValueError(f"held_back is {share}: it must be between 0 and 1")
    inputs = [inputs_of(batch) for batch in batches]
    if not inputs:
        raise ValueError("there are no batches: a repair needs some samples, labels are not needed")
    if len(inputs) >= FEW:
        chosen = _spread(len(inputs), share)
        return inputs, [number in chosen for number in range(len(inputs))]
    parts, held_back = [], []
    for batch in inputs:
        size = samples_in(batch)
        chosen = _spread(size, share) if size > 1 else set()
        for is_held_back in (False, True) if chosen else (False,):
            indices = [i for i in range(size) if (i in chosen) == is_held_back]
            parts.append(_taken(batch, indices) if chosen else batch)
            held_back.append(is_held_back)
    if len(inputs) > 1 and not any(held_back):
        held_back[-1] = True
    return parts, held_back


def _spread(count: int, share: float) -> set[int]:
    """So many of `count`, evenly spaced; one at least, and not all."""
    wanted = min(count - 1, max(1, round(share * count)))
    return {int((i + 0.5) * count / wanted) for i in range(wanted)}


def samples_in(batch: Example) -> int:
    """The length of the first dimension that all tensors share; 1 where there is none."""
    lengths = {len(tensor) for tensor in tensors_in(batch, floating=False) if tensor.dim()}
    return lengths.pop() if len(lengths) == 1 else 1


def _taken(batch: Example, indices: Sequence[int]) -> Example:
    return map_tensors(
        lambda tensor: tensor[list(indices)] if isinstance(tensor, Tensor) and tensor.dim() else tensor, batch
    )
