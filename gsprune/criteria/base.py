"""The base class of criteria, and sums over units. Pure functions of tensors: no mask, schedule or setting."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from gsprune.ranking.blocks import dot_along
from gsprune.ranking.elimination import Reader
from gsprune.structures.shards import here, is_sharded, part_like, sum_parts_
from gsprune.structures.structure import Member, Structure

Read = Callable[[str], tuple[Tensor, Tensor | None]]  # tensor name -> (weight, its gradient; None for a baseline)


class Criterion:
    """A rule that scores single weights, whole units, or both.

    A *cumulative* criterion returns the signed first-order change of the loss in this step; the pruner adds its
    magnitude to the running score, S <- decay * S + abs(change), so the sum over a unit's entries is inside the abs
    and the sum over steps outside it; a `signed` one's is added as it is. With a `spread_decay` the pruner keeps a
    second running average, of how far the changes lie from the first, U <- spread_decay * U + abs(abs(change) -
    (1 - decay) * S), and ranks by S * U. Any other criterion returns the score itself, when a mask is due.

    To add one: subclass, override `weights` or `units` (or both) and set the flags beside them.

    Args:
        decay: d in (0, 1]; 1 is the plain sum over all steps.

    Raises:
        ValueError: decay outside (0, 1].
    """

    scores_weights: ClassVar[bool] = False
    scores_units: ClassVar[bool] = False
    cumulative: ClassVar[bool] = True  # accumulated over steps; otherwise computed when a mask is due
    signed: ClassVar[bool] = False  # the change is added to the running score with its sign
    degree: ClassVar[int] = 1  # of the change in the gradient: a gradient scaler's scale is divided out as often
    calibrated: ClassVar[bool] = False  # an estimate of the loss change itself, which may be divided by a unit's cost
    reads_inputs: ClassVar[bool] = False  # scores by what layers read: for `gsprune.cut`, not while training
    compiled: bool = False  # abs(weight * gradient) is added to the scores of single weights by a compiled kernel
    normalize: bool | None = False  # divide by a structure's mean in a ranking of several; None: if not calibrated
    spread_decay: float | None = None  # of the second running average; None: there is none

    def __init__(self, *, decay: float = 1.0) -> None:
        if not 0 < decay <= 1:
            raise ValueError(f"decay is {decay}: it must be in (0, 1]")
        self.decay = decay

    @property
    def horizon(self) -> int | None:
        """Steps that make up 99 % of a running score: what lies further back counts for less than 1 %.

        With equal changes, the newest n steps hold the share 1 - d^n of the score, so n = ceil(ln 0.01 / ln d).

        Returns:
            n; None for d = 1, where every step counts for ever; 0 for a criterion that accumulates nothing.

        Example:
            >>> from gsprune.criteria import Elementwise, Magnitude
            >>> [Elementwise(decay=d).horizon for d in (0.1, 0.9, 0.95, 1.0)], Magnitude().horizon
            ([2, 44, 90, None], 0)
        """
        if not self.cumulative:
            return 0
        if self.decay == 1:
            return None
        return math.ceil(math.log(0.01) / math.log(self.decay) - 1e-9)  # d = 0.1 is 2, whatever the last bit says

    def weights(self, weight: Tensor, grad: Tensor | None, *, name: str = "", out: Tensor | None = None) -> Tensor:
        """Signed change (or score) of each weight of the tensor `name`; written to `out`, float32, if there is one."""
        raise ValueError(f"{self} scores whole units, not single weights")

    def units(self, structure: Structure, read: Read) -> Tensor:
        """Signed change (or score) of each unit of a structure, (units,)."""
        raise ValueError(f"{self} scores single weights, not whole units: take Abs or Weighted")

    def of_gates(self, gates_bu: Tensor) -> Tensor | None:
        """Scores (u,) from the gate gradients of single samples (b, u); None: the criterion has no rule for them."""
        return None

    def of_readers(self, readers: Sequence[Reader], gates_bu: Tensor) -> Tensor:
        """Scores (u,) from the matrices that read the units and the gate gradients, of one that reads inputs."""
        raise ValueError(f"{self} does not score units by what reads them")

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"


def unit_sums(members: Sequence[Member], pair: Callable[[str], tuple[Tensor, Tensor]]) -> Tensor:
    """Sum of a * b over the entries that belong to each unit, in all members: (units,).

    Of tensors that are spread over processes each sums its own rows, and (units,) numbers are then added up over all.

    Args:
        members: where the units lie in each tensor.
        pair: tensor name -> a, b of that tensor's shape.
    """
    pieces: list[Tensor] = []
    sums: list[Tensor] = []
    shared: Tensor | None = None
    for m in members:
        a, b = pair(m.tensor)
        if is_sharded(a):
            shared = a
            pieces.append(_gather(m, _along_rows(a, b, m)))
        else:
            sums.append(_gather(m, dot_along(a, b, m.dim)))
    if shared is not None:
        sums.append(sum_parts_(functools.reduce(torch.add, pieces), shared))
    return functools.reduce(torch.add, sums)


def _along_rows(a: Tensor, b: Tensor, member: Member) -> Tensor:
    """What this process's rows of a tensor add to the vector along the member's axis; all of that is long."""
    mine = dot_along(here(a), here(b), member.dim)
    if member.dim:
        return mine
    vector = mine.new_zeros(member.size)
    part_like(vector, a).copy_(mine)
    return vector


def _gather(member: Member, vector: Tensor) -> Tensor:
    """A vector along the member's axis -> its sum over the positions of each unit."""
    units, width = member.index.shape
    if member.in_order:
        return vector if width == 1 else vector.reshape(units, width).sum(1)
    return vector[member.index].sum(1)
