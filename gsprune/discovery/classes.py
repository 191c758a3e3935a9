"""Atoms that are cut together are a class; classes that lie in the same tensors are the units of one structure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gsprune.discovery.labels import WITH_CONSTANT, Log

_NEVER = 1 << 60


def tied(count: int, ones: Tensor, others: Tensor) -> Tensor:
    """The smallest atom that each is tied to, over any number of ties.

    >>> tied(5, torch.tensor([1, 4]), torch.tensor([2, 2])).tolist()
    [0, 1, 1, 3, 1]
    """
    roots = torch.arange(count)
    while True:
        one, other = roots[ones], roots[others]
        open_ = one != other
        if not bool(open_.any()):
            return roots
        ones, others = ones[open_], others[open_]
        low, high = torch.minimum(one, other)[open_], torch.maximum(one, other)[open_]
        roots.scatter_reduce_(0, high, low, "amin")
        while not torch.equal(up := roots[roots], roots):
            roots = up


@dataclass(frozen=True, eq=False)
class Family:
    """Classes that lie in the same axes: atoms (units, width) of each axis, in the order of its positions.

    roots    of every class, its smallest atom
    reason   why they stay, if they do
    """

    roots: Tensor
    atoms: Mapping[int, Tensor]
    reason: str | None


class Classes:
    """What the log of a forward pass comes to."""

    def __init__(self, log: Log) -> None:
        self.log, self.axes = log, log.atoms.axes
        ones, others = _pairs(log.ties)
        alone = (ones == 0) | (others == 0)
        self._stay = torch.maximum(ones, others)[alone]
        ones, others = ones[~alone], others[~alone]
        self.roots = tied(log.atoms.count, ones, others)
        more = [pair for parts in self._equal_parts() for pair in [(parts, parts[:1].expand_as(parts))]]
        if more:
            a, b = _pairs(more)
            known = (a > 0) & (b > 0)
            self.roots = tied(log.atoms.count, torch.cat([ones, a[known]]), torch.cat([others, b[known]]))

    def _equal_parts(self) -> Iterator[Tensor]:
        """Parts of a dimension that must stay equally long, (parts, places): but where a unit is a whole block, and
        the other blocks stay."""
        yield from self.log.halves
        stays = self.having(atoms for atoms, _ in self.log.pins)
        stays[self.roots[self._stay]] = True
        for blocks in self.log.blocks:
            if min(blocks.shape) < 2:
                continue
            roots = self.roots[blocks]
            is_whole = (roots[:, :1] == roots[:, 1:]).all(1)
            if not bool(is_whole.any()) or not bool(stays[roots[~is_whole]].all()):
                yield blocks

    @cached_property
    def reasons(self) -> Tensor:
        """Of every root the number of the first pin, or _NEVER."""
        first = torch.full((self.log.atoms.count,), _NEVER)
        for number, (atoms, _) in enumerate(self.log.pins):
            roots = self.roots[atoms[atoms > 0]].unique()  # type: ignore[no-untyped-call]
            first[roots] = first[roots].clamp(max=number)
        beside = self.roots[self._stay].unique()  # type: ignore[no-untyped-call]
        first[beside] = first[beside].clamp(max=len(self.log.pins))
        return first

    def why(self, root: int) -> str | None:
        number = int(self.reasons[root])
        if number == _NEVER:
            return None
        return self.log.pins[number][1] if number < len(self.log.pins) else WITH_CONSTANT

    def having(self, atoms: Iterable[Tensor]) -> Tensor:
        """Of every atom whether it is the root of one of these, bool (count,)."""
        found = torch.zeros(self.log.atoms.count, dtype=torch.bool)
        for some in atoms:
            found[self.roots[some[some > 0]]] = True
        return found

    def families(self, wanted: Iterable[int]) -> list[Family]:
        """Of the classes that have an atom on one of the wanted axes."""
        count = self.log.atoms.count
        sizes = torch.tensor([0, *(axis.size for axis in self.axes)])
        axis_of = torch.repeat_interleave(torch.arange(-1, len(self.axes)), torch.cat([torch.tensor([1]), sizes[1:]]))
        order = torch.argsort(self.roots, stable=True)
        roots = self.roots[order]
        starts = torch.cat([torch.tensor([True]), roots[1:] != roots[:-1]]).nonzero().flatten()
        lengths = torch.diff(torch.cat([starts, torch.tensor([count])]))
        is_wanted = torch.zeros(count, dtype=torch.bool)
        for number in wanted:
            axis = self.axes[number]
            is_wanted[self.roots[axis.first : axis.first + axis.size]] = True
        chosen = is_wanted[roots[starts]]
        starts, lengths, mine = starts[chosen], lengths[chosen], roots[starts][chosen]
        signatures = self._signatures(order, axis_of, starts, lengths)
        keys = torch.stack([*signatures, torch.where(self.reasons[mine] == _NEVER, -1, self.reasons[mine])], 1)
        _, numbers = torch.unique(keys, dim=0, return_inverse=True)
        found = []
        by = torch.argsort(numbers, stable=True)
        for group in torch.split(by, torch.bincount(numbers).tolist()) if len(by) else []:
            rows = order[starts[group][:, None] + torch.arange(int(lengths[group[0]]))]
            columns = axis_of[rows[0]]
            atoms = {int(a): rows[:, columns == a] for a in columns.unique() if self.axes[int(a)].tensor}  # type: ignore[no-untyped-call]
            found.append(Family(mine[group], atoms, self.why(int(mine[group[0]]))))
        return found

    def _signatures(self, order: Tensor, axis_of: Tensor, starts: Tensor, lengths: Tensor) -> list[Tensor]:
        """Two numbers for each class that are equal where its atoms lie in the same axes, as many in each."""
        generator = torch.Generator().manual_seed(0)
        made = [lengths]
        for _ in range(2):
            weights = torch.randint(1 << 60, (len(self.axes) + 1,), generator=generator)
            sums = torch.cat([torch.zeros(1, dtype=torch.int64), weights[axis_of[order]].cumsum(0)])
            made.append(sums[starts + lengths] - sums[starts])
        return made


def _pairs(ties: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if not ties:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    ones = torch.cat([a.reshape(-1) for a, _ in ties])
    others = torch.cat([b.reshape(-1) for _, b in ties])
    return ones, others
