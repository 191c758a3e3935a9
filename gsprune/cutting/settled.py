"""When scoring may stop: more samples no longer change which units are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Settled"]


class Settled:
    """Tells from running scores whether the kept set is settled.

    After 1, 2, 4, 8, ... batches the kept set is chosen and compared with that of half as many batches. It is settled
    when the overlap, |both kept| / |kept|, was at least 99 % three times in a row: over three doublings.

    Args:
        keep: running scores -> masks, as bool tensors by name; asked at powers of two alone. None: these scores say
            nothing yet, and the row begins anew.
        overlap: least share of the kept set that stays, in (0, 1].
        doublings: how many times in a row.

    Attributes:
        after: batches after which it was settled; None: it is not.
        overlaps: batches -> the overlap with the kept set of half as many.

    Example:
        >>> settled = Settled(lambda scores: {"fc": scores > scores.median()})
        >>> scores = torch.tensor([4.0, 3.0, 2.0, 1.0])
        >>> [batches for batches in range(1, 20) if settled(batches, lambda: scores)]
        [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
        >>> settled.after, settled.overlaps
        (8, {2: 1.0, 4: 1.0, 8: 1.0})
    """

    def __init__(
        self, keep: Callable[[Any], Mapping[str, Tensor] | None], *, overlap: float = 0.99, doublings: int = 3
    ) -> None:
        if not 0 < overlap <= 1:
            raise ValueError(f"overlap is {overlap!r}: it must be in (0, 1]")
        if doublings < 1:
            raise ValueError(f"doublings is {doublings!r}: it must be 1 or more")
        self._keep, self._least, self._doublings = keep, overlap, doublings
        self._before: tuple[int, Tensor] | None = None
        self._row = 0
        self.after: int | None = None
        self.overlaps: dict[int, float] = {}

    def __call__(self, batches: int, scores: Callable[[], Any]) -> bool:
        """Whether it is settled after so many batches; the scores are asked for at powers of two."""
        if self.after is not None:
            return True
        if batches < 1 or batches & (batches - 1):
            return False
        masks = self._keep(scores())
        if masks is None:
            self._before, self._row = None, 0
            return False
        kept = torch.cat([masks[name].flatten().cpu() for name in sorted(masks)])
        if self._before is not None and self._before[0] * 2 == batches:
            count = int(kept.sum())
            share = int((kept & self._before[1]).sum()) / count if count else 1.0
            self.overlaps[batches] = share
            self._row = self._row + 1 if share >= self._least else 0
        else:
            self._row = 0
        self._before = batches, kept
        if self._row >= self._doublings:
            self.after = batches
        return self.after is not None
