"""The documented training loop, as the tests of pruners train by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gsprune import Pruner

Batches = Callable[[int], Iterable[tuple[Tensor, Tensor]]]


def train(
    pruner: Pruner, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches, *, first: int = 0, last: int
) -> None:
    """Epochs `first` to `last` (exclusive); inputs and classes of one come from `batches(epoch)`."""
    pruner.on_train_begin()
    for epoch in range(first, last):
        pruner.on_epoch_begin(epoch)
        for step, (x, y) in enumerate(batches(epoch)):
            pruner.on_step_begin(step)
            F.cross_entropy(model(x), y).backward()
            pruner.on_before_optimizer_step()
            optimizer.step()
            pruner.on_step_end()
            optimizer.zero_grad()
        pruner.on_epoch_end()
