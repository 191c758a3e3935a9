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

    Most sides of tensors belong to one structure, each of whose units has as many positions there: what stays is a
    product. Where structures share a side (a concatenation) the positions themselves are looked at.

    >>> from gsprune.discovery.find import find_structures
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> count = Lengths(find_structures(net, torch.ones(1, 4)).structures)
    >>> count([torch.tensor([True, False, True])]).lengths
    {'0.weight': {0: (2, 3)}, '0.bias': {0: (2, 3)}, '2.weight': {1: (2, 3)}}
    """

    def __init__(self, structures: Sequence[Structure]) -> None:
        self._structures = structures
        self._own: list[dict[Side, tuple[int, int]]] = [{} for _ in structures]  # positions of a unit, of the side
        self._shared: dict[Side, list[tuple[int, Member]]] = {}
        members: dict[Side, list[tuple[int, Member]]] = {}
        for i, structure in enumerate(structures):
            for member in structure.members:
                members.setdefault((member.tensor, member.dim), []).append((i, member))
        for side, found in members.items():
            places = torch.cat([member.index.flatten() for _, member in found])
            if len({i for i, _ in found}) == 1 and len(places.unique()) == len(places):
                self._own[found[0][0]][side] = (sum(m.index.shape[1] for _, m in found), found[0][1].size)
            else:
                self._shared[side] = found

    def __call__(self, keeps: Sequence[Tensor]) -> Left:
        """Of bool (units,) of each structure, True = kept."""
        lengths: dict[str, dict[int, tuple[int, int]]] = {}
        removed: dict[str, int] = {}
        gone = [len(keep) - int(keep.sum()) for keep in keeps]
        for structure, sides, count in zip(self._structures, self._own, gone, strict=True):
            if not count:
                continue
            removed |= structure.removed
            for (tensor, dim), (width, size) in sides.items():
                lengths.setdefault(tensor, {})[dim] = (size - width * count, size)
        for (tensor, dim), found in self._shared.items():
            if any(gone[i] for i, _ in found):
                mask = torch.ones(found[0][1].size, dtype=torch.bool)
                for i, member in found:
                    mask[member.index[~keeps[i].cpu()].flatten()] = False
                lengths.setdefault(tensor, {})[dim] = (int(mask.sum()), len(mask))
        if removed:
            lengths = {name: sides for name, sides in lengths.items() if not inside(name, removed)}
        return Left(lengths, removed)
