"""How long tensors are once units are gone: what a cut plan would say, counted without making one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gsprune.structures.structure import Member, Structure
from gsprune.surgery.no_branch import inside

Side = tuple[str, int]  # a tensor and one of its dimensions


@dataclass(frozen=True)
class Left:
    """What some units leave.

    lengths   tensor -> dimension -> (positions that stay, positions of the dense network); where some go, alone
    removed   paths of the modules that go as a whole
    """

    lengths: Mapping[str, Mapping[int, tuple[int, int]]]
    removed: Mapping[str, int]


class Lengths:
    """Counts what structures leave of the tensors that their units are in.

    On most sides of tensors no two units share a position, and all units of a structure have as many: what goes is
    added up. Elsewhere the positions themselves are looked at.

    >>> from gsprune.discovery.find import find_structures
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> count = Lengths(find_structures(net, torch.ones(1, 4)).structures)
    >>> count([torch.tensor([True, False, True])]).lengths
    {'0.weight': {0: (2, 3)}, '0.bias': {0: (2, 3)}, '2.weight': {1: (2, 3)}}
    """

    def __init__(self, structures: Sequence[Structure]) -> None:
        self._structures = structures
        self._apart: list[dict[Side, tuple[int, int]]] = [{} for _ in structures]  # positions of a unit, of the side
        self._mixed: dict[Side, list[tuple[int, Member]]] = {}
        members: dict[Side, list[tuple[int, Member]]] = {}
        for i, structure in enumerate(structures):
            for member in structure.members:
                members.setdefault((member.tensor, member.dim), []).append((i, member))
        for side, found in members.items():
            places = torch.cat([member.index.flatten() for _, member in found])
            if len(places) and int(torch.bincount(places).max()) > 1:
                self._mixed[side] = found
                continue
            for i, member in found:
                before, size = self._apart[i].get(side, (0, member.size))
                self._apart[i][side] = (before + member.index.shape[1], size)

    def __call__(self, keeps: Sequence[Tensor]) -> Left:
        """Of bool (units,) of each structure, True = kept."""
        lengths: dict[str, dict[int, tuple[int, int]]] = {}
        removed: dict[str, int] = {}
        gone = [len(keep) - int(keep.sum()) for keep in keeps]
        for structure, sides, count in zip(self._structures, self._apart, gone, strict=True):
            if not count:
                continue
            removed |= structure.removed
            for (tensor, dim), (width, size) in sides.items():
                cuts = lengths.setdefault(tensor, {})
                cuts[dim] = (cuts.get(dim, (size, size))[0] - width * count, size)
        for (tensor, dim), found in self._mixed.items():
            if any(gone[i] for i, _ in found):
                mask = torch.ones(found[0][1].size, dtype=torch.bool)
                for i, member in found:
                    mask[member.index[~keeps[i].cpu()].flatten()] = False
                lengths.setdefault(tensor, {})[dim] = (int(mask.sum()), len(mask))
        if removed:
            lengths = {name: sides for name, sides in lengths.items() if not inside(name, removed)}
        return Left(lengths, removed)
