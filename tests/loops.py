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


def scored_under_a_scaler(
    pruner: Pruner, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]]
) -> list[int]:
    """The steps that are scored after each batch. The first scale overflows, so that its gradients are inf."""
    pruner.attach(optimizer)
    device = next(model.parameters()).device.type
    scaler = torch.amp.GradScaler(device, init_scale=2.0**127, backoff_factor=2.0**-120)
    counted = []
    for x, y in batches:
        scaler.scale(F.cross_entropy(model(x), y) * 4).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        counted.append(pruner.state_dict()["rules"][0]["scored"])
    return counted
