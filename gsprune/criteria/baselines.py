"""Baselines without gradients, which the gradient criteria have to beat."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from gsprune.criteria.base import Criterion, Read, unit_sums
from gsprune.structures.structure import Structure


class Magnitude(Criterion):
    """Prune small weights first: s = abs(w); for a unit s_u = sqrt(sum over producers of w[u, :]^2 + b[u]^2).

    Source: Han et al., "Learning both weights and connections", 2015; Li et al., "Pruning filters", 2017 for units.

    Example:
        >>> Magnitude().weights(torch.tensor([2.0, -1.0, 0.5, -3.0]), None).tolist()
        [2.0, 1.0, 0.5, 3.0]
    """

    scores_weights = True
    scores_units = True
    cumulative = False

    def __init__(self) -> None:
        super().__init__()

    def weights(self, weight: Tensor, grad: Tensor | None, *, name: str = "", out: Tensor | None = None) -> Tensor:
        return torch.abs(weight.float(), out=out)

    def units(self, structure: Structure, read: Read) -> Tensor:
        return unit_sums(structure.producers, lambda name: (read(name)[0],) * 2).sqrt()


class Random(Criterion):
    """Prune in random order: s ~ U(0, 1), drawn from `seed` and the tensor's or structure's name.

    Args:
        seed: of the random numbers; the same seed gives the same masks.

    Example:
        >>> bool((Random(seed=1).weights(torch.zeros(4), None) == Random(seed=1).weights(torch.ones(4), None)).all())
        True
    """

    scores_weights = True
    scores_units = True
    cumulative = False

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def weights(self, weight: Tensor, grad: Tensor | None, *, name: str = "", out: Tensor | None = None) -> Tensor:
        drawn = self._draw(name, weight.shape).to(weight.device)
        return drawn if out is None else out.copy_(drawn)

    def units(self, structure: Structure, read: Read) -> Tensor:
        weight, _ = read(structure.consumers[0].tensor)
        return self._draw(structure.name, (structure.units,)).to(weight.device)

    def _draw(self, name: str, shape: Sequence[int]) -> Tensor:
        # the name is part of the seed: two tensors of one shape differ, and a resumed run draws what it drew before
        seed = zlib.crc32(f"{self.seed}/{name}".encode())
        return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed))
