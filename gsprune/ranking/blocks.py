"""Passes over large tensors in steps that fit the cache, and the one buffer they share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 1 << 20  # entries worked on at once on the CPU: what one pass wrote is in the cache for the next
SUMS = 1 << 17  # entries that products are added up in: they stay in the cache nearest to a core


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape in steps along their first axis, small enough for the cache; whole on an accelerator.

    Example:
        >>> [len(step) for (step,) in blocks(torch.zeros(5, BLOCK // 2))]
        [2, 2, 1]
    """
    first = tensors[0]
    rows = len(first) if first.device.type != "cpu" else max(1, BLOCK * len(first) // max(1, first.numel()))
    return zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


class Scratch:
    """One float32 buffer that every pass over the weights uses again: fresh memory costs more than the arithmetic."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def take(self, n: int, device: torch.device) -> Tensor:
        """`n` uninitialised entries, valid until the next call."""
        if self._buffer is None or self._buffer.numel() < n or self._buffer.device != device:
            self._buffer = torch.empty(n, device=device)
        return self._buffer[:n]


def dot_along(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Sum of a * b over every axis but `dim`, in float32 at least: a vector of that axis' length.

    Example:
        >>> a = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> dot_along(a, a, 0).tolist(), dot_along(a, a, 1).tolist()
        ([5.0, 25.0], [10.0, 20.0])
    """
    if a.dim() == 1:  # a BatchNorm's pair: a hundred of them in a step, so no call too many
        return a * b if a.dtype.itemsize >= 4 else a.float() * b
    wide = torch.promote_types(a.dtype, torch.float32)
    if dim == 0:
        return torch.cat([(x.to(wide) * y).flatten(1).sum(1) for x, y in blocks(a, b)])
    # over the first axis first: that sum runs over whole rows, and what is left is small
    rest = _added_up(a, b, wide) if a.is_cpu else (a.to(wide) * b).sum(0)
    return (rest if dim == 1 else rest.movedim(dim - 1, 0)).reshape(a.shape[dim], -1).sum(1)


def _added_up(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """Sum of a * b over the first axis, some rows onto others: one pass that writes no product to memory."""
    rows = max(1, min(len(a), SUMS * len(a) // max(1, a.numel())))
    sums = torch.zeros_like(a[:rows], dtype=wide)
    for x, y in zip(a.split(rows), b.split(rows), strict=True):  # type: ignore[no-untyped-call]
        sums[: len(x)].addcmul_(x.to(wide), y.to(wide))
    return sums.sum(0)
