"""Passes over large tensors in steps that fit the cache, and the one buffer they share."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 1 << 20  # entries worked on at once on the CPU: what one pass wrote is in the cache for the next


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
    over_rows, wide = dim != 0, torch.promote_types(a.dtype, torch.float32)
    in_one = a.dtype == b.dtype == wide and _lie_alike(a, b)
    pairs = [(a, b)] if in_one else ((x.to(wide), y.to(wide) if y.is_cpu else y) for x, y in blocks(a, b))
    steps = [_sums(x, y, over_rows=over_rows) for x, y in pairs]
    sums = functools.reduce(torch.add, steps) if over_rows else torch.cat(steps)
    if sums.numel() == a.shape[dim]:
        return sums.reshape(-1)
    return sums.movedim(dim - 1, 0).reshape(a.shape[dim], -1).sum(1)


def _sums(a: Tensor, b: Tensor, *, over_rows: bool) -> Tensor:
    """Sum of a * b (m, ...) over the first axis, (...), or over all others, (m,)."""
    if _lie_alike(a, b):
        return _in_one_pass(a, b, over_rows=over_rows)
    return (a * b).sum(0) if over_rows else (a * b).flatten(1).sum(1)


def _in_one_pass(a: Tensor, b: Tensor, *, over_rows: bool) -> Tensor:
    """The same without writing products to memory.

    The gradient of a LayerNorm's weight is the first of these sums, and that of a GroupNorm's weight the second one, if
    means are 0 and deviations 1. torch has no other kernel for them.
    """
    m, n = len(a), a.numel() // len(a)
    a_mn, b_mn = a.as_strided((m, n), (n, 1)), b.as_strided((m, n), (n, 1))
    if over_rows:
        mean, rstd = a.new_zeros((m, 1)), a.new_ones((m, 1))
        sums: Tensor = _LAYER_NORM(b_mn, a_mn, [n], mean, rstd, a_mn[0], None, _WEIGHT)[1]
        return sums.as_strided(a.shape[1:], a.stride()[1:])
    mean, rstd = a.new_zeros((1, m)), a.new_ones((1, m))
    sums = _GROUP_NORM(b_mn, a_mn, mean, rstd, None, 1, m, n, m, _WEIGHT)[1]
    return sums


_LAYER_NORM = torch.ops.aten.native_layer_norm_backward.default
_GROUP_NORM = torch.ops.aten.native_group_norm_backward.default
_WEIGHT = [False, True, False]  # of the gradients of input, weight and bias


def _lie_alike(a: Tensor, b: Tensor) -> bool:
    """Whether both lie in a CPU's memory row after row without a gap, in one order."""
    if not a.is_cpu or a.stride() != b.stride() or a.numel() == 0:
        return False
    return a.is_contiguous() or (a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last))
