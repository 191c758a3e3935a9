"""How one weight tensor is cut into selection groups: single weights, N x M tiles, or N:M blocks.

Legend: o = output channels, k = in * kh * kw (a convolution's weight is seen as out x in*kh*kw, a linear one as it is),
r x n = groups, one row of groups for every (tile of) output channel(s).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gsprune.ranking.selection import select


class Pattern(ABC):
    """A way to cut a weight tensor into selection groups, which are kept or pruned as a whole."""

    final_sparsity: float | None = None  # what the pattern itself fixes, if it does

    @abstractmethod
    def check(self, name: str, shape: Sequence[int]) -> None:
        """Raise a ValueError that names the tensor if the pattern does not fit its shape."""

    @abstractmethod
    def to_groups(self, weights: Tensor) -> Tensor:
        """Sum a weight-shaped tensor (o, ...) over each group: (r, n)."""

    @abstractmethod
    def to_weights(self, groups: Tensor, shape: Sequence[int]) -> Tensor:
        """Spread group values (r, n) over the weights of each group: a tensor of `shape`."""

    def protected(self, group_scores: Tensor) -> Tensor | None:
        """Groups the pattern itself keeps, whatever the sparsity: (r, n) bool, or None."""
        return None


@dataclass(frozen=True)
class Tile(Pattern):
    """Blocks of `rows` output channels by `cols` of the in*kh*kw inputs; 1x1 is single weights.

    Example:
        >>> weight = torch.arange(8.0).reshape(2, 4)
        >>> Tile(2, 2).to_groups(weight).tolist()
        [[10.0, 18.0]]
        >>> Tile(2, 2).to_weights(torch.tensor([[True, False]]), (2, 4)).int().tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0]]
    """

    rows: int = 1
    cols: int = 1

    def check(self, name: str, shape: Sequence[int]) -> None:
        o, k = shape[0], torch.Size(shape[1:]).numel()
        if o % self.rows or k % self.cols:
            raise ValueError(
                f"pattern {self.rows}x{self.cols} does not divide {name}, seen as {o} x {k}: "
                f"take another pattern, or exclude it"
            )

    def to_groups(self, weights: Tensor) -> Tensor:
        if self.rows == self.cols == 1:
            return weights.flatten(1)
        tiles = weights.reshape(len(weights) // self.rows, self.rows, -1, self.cols)
        return tiles.sum((1, 3))

    def to_weights(self, groups: Tensor, shape: Sequence[int]) -> Tensor:
        if self.rows > 1:
            groups = groups.repeat_interleave(self.rows, dim=0)
        if self.cols > 1:
            groups = groups.repeat_interleave(self.cols, dim=1)
        return groups.reshape(tuple(shape))


@dataclass(frozen=True)
class Block(Pattern):
    """N:M sparsity: of every `m` weights along the input axis `n` are kept in the end, as sparse tensor cores want it.

    A convolution's blocks run along its input channels, (o, kh, kw, in / m, m). On the way to the final sparsity
    1 - n/m, only weights that are not among their block's best n may go.

    Example:
        >>> Block(2, 4).protected(torch.tensor([[1.0, 4.0, 3.0, 2.0]])).int().tolist()
        [[0, 1, 1, 0]]
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ValueError(f"pattern {self.n}:{self.m} keeps {self.n} of {self.m}: the first must be the smaller")
        object.__setattr__(self, "final_sparsity", 1 - self.n / self.m)

    def check(self, name: str, shape: Sequence[int]) -> None:
        if shape[1] % self.m:
            raise ValueError(
                f"pattern {self.n}:{self.m} does not divide the {shape[1]} inputs of {name}: "
                f"take another pattern, or exclude it"
            )

    def to_groups(self, weights: Tensor) -> Tensor:
        return weights.movedim(1, -1).reshape(len(weights), -1)

    def to_weights(self, groups: Tensor, shape: Sequence[int]) -> Tensor:
        o, i, *kernel = shape
        return groups.reshape(o, *kernel, i).movedim(-1, 1)

    def protected(self, group_scores: Tensor) -> Tensor:
        keep = select([group_scores.reshape(-1, self.m)], self.m - self.n)[0]
        return keep.reshape(group_scores.shape)


def parse_pattern(pattern: str | Pattern) -> Pattern:
    """A pattern from its usual notation: "1x1" (single weights), "4x1", "2x2", "1x16", "NxM", or "2:4", "N:M".

    Raises:
        ValueError: anything else.

    Example:
        >>> parse_pattern("4x1"), parse_pattern("2:4")
        (Tile(rows=4, cols=1), Block(n=2, m=4))
    """
    if isinstance(pattern, Pattern):
        return pattern
    found = re.fullmatch(r"([1-9]\d*)([x:])([1-9]\d*)", str(pattern))
    if found is None:
        raise ValueError(
            f'pattern is {pattern!r}: it must be a tile such as "1x1" or "4x1", or a block such as "2:4" '
            f"(in quotes in YAML)"
        )
    first, kind, second = int(found[1]), found[2], int(found[3])
    return Tile(first, second) if kind == "x" else Block(first, second)
