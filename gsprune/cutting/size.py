"""What a network costs and what it loses, before and after a cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from gsprune.cost.counting import count_macs, count_parameters
from gsprune.cutting.calibration import Calibration
from gsprune.structures.running import to_device_of


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


def size_of(network: nn.Module, data: Calibration, mean_loss: Callable[[nn.Module], float]) -> Size:
    """Of a network; MACs of one sample of the calibration data, the loss as `mean_loss` finds it where there is one."""
    try:
        macs = count_macs(network, to_device_of(network, data.example_for(network, 1)))
    except Exception:
        macs = None
    loss = mean_loss(network) if data.labelled and data.has_loss else None
    return Size(count_parameters(network), macs or None, loss)
