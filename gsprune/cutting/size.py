"""What a network costs and what it loses, before and after a cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Size:
    """What a network costs and what it loses.

    params   parameters; after single weights were pruned, those that are not
    macs     multiply-accumulates of one sample; None where they cannot be counted
    loss     mean loss on the calibration samples; None without a loss
    value    what `evaluate` gave; None without
    """

    params: int
    macs: int | None
    loss: float | None
    value: Any = None
