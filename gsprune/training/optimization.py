"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gsprune.training.checks import check, check_share


class LRSchedule(Protocol):
    """The method of a learning-rate schedule that the loop calls, as every `torch.optim.lr_scheduler` has it."""

    def step(self) -> None: ...


def warmup_cosine(optimizer: Optimizer, *, total_steps: int, warmup: float = 0.1, final_ratio: float = 0.0) -> LambdaLR:
    """Linear warm-up over the first `warmup` share of the steps, then half a cosine down to `final_ratio`.

    With W = round(warmup * total_steps), the factor on the optimizer's learning rate at step t (from 0) is

        (t + 1) / (W + 1)                                          for t < W
        f + (1 - f) * (1 + cos(pi * (t - W) / (T - W))) / 2        for W <= t < T, f = final_ratio
        f                                                          from T on

    so the peak is reached once, at step W. Cosine: Loshchilov and Hutter 2017 (SGDR), without restarts.

    >>> import torch
    >>> optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)
    >>> schedule = warmup_cosine(optimizer, total_steps=6, warmup=1 / 3)
    >>> [round(schedule.lr_lambdas[0](t), 3) for t in range(7)]
    [0.333, 0.667, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    check_share("lr_schedule.warmup", warmup)
    check_share("lr_schedule.final_ratio", final_ratio)
    warm = round(warmup * total_steps)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        progress = min((step - warm) / max(total_steps - warm, 1), 1.0)
        return final_ratio + (1 - final_ratio) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, factor)


def constant(optimizer: Optimizer, *, total_steps: int, warmup: float = 0.0) -> LambdaLR:
    """Linear warm-up over the first `warmup` share of the steps, then the optimizer's own learning rate."""
    return warmup_cosine(optimizer, total_steps=total_steps, warmup=warmup, final_ratio=1.0)


def make_optimizer(
    factory: Callable[..., Optimizer], model: nn.Module, *, lr: float | None = None, fused: bool = True
) -> Optimizer:
    """Call `factory` (an optimizer class or a partial of one) on the model's trainable parameters.

    With `fused`, the fused form is used if the class has one and neither `fused` nor `foreach` is set. If the
    parameters do not allow it (device, dtype), the ordinary form is used.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("the model has no trainable parameter, so there is nothing to optimize")
    extra: dict[str, Any] = {} if lr is None else {"lr": lr}
    _check_types(factory)
    if fused and _unset(factory, "fused") and _unset(factory, "foreach"):
        with contextlib.suppress(RuntimeError):
            return factory(parameters, fused=True, **extra)
    return factory(parameters, **extra)


def _check_types(factory: Callable[..., Optimizer]) -> None:
    """Refuse a string for a number or a bool, and a tuple of another length: some optimizers fail late, or never."""
    given = getattr(factory, "keywords", {})
    for name, parameter in inspect.signature(getattr(factory, "func", factory)).parameters.items():
        default, value = parameter.default, given.get(name)
        if isinstance(default, tuple) and value is not None:
            several = isinstance(value, (list, tuple)) and len(value) == len(default)
            check(several, f"optimizer.{name}", value, f"{len(default)} numbers")
        elif isinstance(default, (bool, int, float)):
            what = "true or false" if isinstance(default, bool) else "a number"
            check(not isinstance(value, str), f"optimizer.{name}", value, what)
        if isinstance(value, float):
            check(math.isfinite(value), f"optimizer.{name}", value, "finite")


def _unset(factory: Callable[..., Any], name: str) -> bool:
    """Whether `factory` has a parameter of that name that is not set."""
    try:
        parameter = inspect.signature(factory).parameters.get(name)
    except ValueError:  # a partial with an unknown argument: calling it gives the better message
        return False
    return parameter is not None and parameter.default is None
