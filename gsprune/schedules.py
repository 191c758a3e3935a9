"""Schedules: training progress in epochs -> the sparsity wanted now. Standard library only.

A schedule is a frozen dataclass and a function: `schedule(progress)` with `progress` in epochs (a float: 1.5 is half
way through the second epoch). Between two updates, `update_frequency` epochs apart, the value stands still.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TypeVar

AnySchedule = TypeVar("AnySchedule", bound="Schedule")

_EPS = 1e-9  # progress is a sum of fractions: 0.3 / 0.1 must count as three whole updates


@dataclass(frozen=True)
class Schedule(ABC):
    """Base of all schedules: 0 before `start_epoch`, `target_sparsity` in the end.

    Args:
        target_sparsity: final share of pruned groups, in [0, 1). None: the Pruner's.
        start_epoch: epoch of the first update, >= 0.
    """

    target_sparsity: float | None = None
    start_epoch: float = 0.0

    def __post_init__(self) -> None:
        if self.target_sparsity is not None:
            _check_sparsity("target_sparsity", self.target_sparsity)
        if not self.start_epoch >= 0:
            raise ValueError(f"start_epoch is {self.start_epoch}: it must be 0 or more")

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """The sparsity wanted at `progress` epochs, in [0, 1)."""

    def resolved(self: AnySchedule, epochs: float) -> AnySchedule:
        """The same schedule with open values filled in for a run of `epochs` epochs."""
        return self

    def retargeted(self: AnySchedule, target_sparsity: float) -> AnySchedule:
        """The same schedule on the way to another final sparsity."""
        return replace(self, target_sparsity=target_sparsity)

    @property
    def final(self) -> float:
        """`target_sparsity`, or an error where it is still open."""
        if self.target_sparsity is None:
            raise ValueError("target_sparsity is not set: give it to the Pruner, or to the schedule")
        return self.target_sparsity


@dataclass(frozen=True)
class OneShot(Schedule):
    """Everything at once: 0 before `start_epoch`, `target_sparsity` from there on.

    With `start_epoch=0` the mask comes from the first batch alone, which is SNIP (Lee et al., 2019).

    Example:
        >>> OneShot(target_sparsity=0.5, start_epoch=1)(0.9), OneShot(target_sparsity=0.5, start_epoch=1)(1)
        (0.0, 0.5)
    """

    def __call__(self, progress: float) -> float:
        return self.final if progress >= self.start_epoch else 0.0


@dataclass(frozen=True)
class Ramp(Schedule):
    """Base of the gradual schedules, from `initial_sparsity` at `start_epoch` to `target_sparsity` at `end_epoch`.

    With t = (progress - start_epoch) / (end_epoch - start_epoch), progress rounded down to a whole number of updates:

    - before `start_epoch`: 0
    - at `start_epoch` (t = 0): `initial_sparsity`
    - between: the subclass's curve
    - at and after `end_epoch` (t = 1): `target_sparsity`; the mask is final and the rest of training recovers accuracy.

    Args:
        target_sparsity: final share of pruned groups, in [0, 1). None: the Pruner's.
        start_epoch: epoch of the first update, >= 0.
        initial_sparsity: value at `start_epoch`, in [0, target_sparsity].
        end_epoch: epoch of the last update, >= `start_epoch`. None: two thirds of the run, filled in by `resolved`.
        update_frequency: epochs between two updates, > 0; may be a fraction.

    Raises:
        ValueError: a value out of its range, or a call before `end_epoch` is known.
    """

    initial_sparsity: float = 0.0
    end_epoch: float | None = None
    update_frequency: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sparsity("initial_sparsity", self.initial_sparsity)
        if self.target_sparsity is not None and self.initial_sparsity > self.target_sparsity:
            raise ValueError(
                f"initial_sparsity {self.initial_sparsity} is above target_sparsity {self.target_sparsity}: "
                "what is pruned stays pruned"
            )
        if not self.update_frequency > 0:
            raise ValueError(
                f"update_frequency is {self.update_frequency}: it must be above 0 (epochs between updates)"
            )
        if self.end_epoch is not None and not self.end_epoch >= self.start_epoch:
            raise ValueError(f"end_epoch {self.end_epoch} is before start_epoch {self.start_epoch}")

    def __call__(self, progress: float) -> float:
        end = self._end()
        if progress < self.start_epoch:
            return 0.0
        if progress >= end:
            return self.final
        updates = math.floor((progress - self.start_epoch) / self.update_frequency + _EPS)
        return self.curve(updates * self.update_frequency, end - self.start_epoch)

    @abstractmethod
    def curve(self, done: float, span: float) -> float:
        """The sparsity after `done` of `span` epochs: `initial_sparsity` at 0, `target_sparsity` at `span`."""

    def resolved(self: AnyRamp, epochs: float) -> AnyRamp:
        return self if self.end_epoch is not None else replace(self, end_epoch=max(self.start_epoch, epochs * 2 / 3))

    def _end(self) -> float:
        if self.end_epoch is None:
            raise ValueError("end_epoch is not set: give it, or give the Pruner `epochs`, of which it takes two thirds")
        return self.end_epoch


AnyRamp = TypeVar("AnyRamp", bound=Ramp)


@dataclass(frozen=True)
class Cubic(Ramp):
    """Fast at first, when there is most to remove: s(t) = target + (initial - target) * (1 - t)^3.

    Source: Zhu and Gupta, "To prune, or not to prune", 2017, equation 1. The default.

    Example:
        >>> [round(Cubic(target_sparsity=0.8, end_epoch=4)(e), 4) for e in (0, 1, 2, 3, 4, 5)]
        [0.0, 0.4625, 0.7, 0.7875, 0.8, 0.8]
    """

    def curve(self, done: float, span: float) -> float:
        return self.final + (self.initial_sparsity - self.final) * (1 - done / span) ** 3


@dataclass(frozen=True)
class Cosine(Ramp):
    """Slow at both ends: s(t) = target + (initial - target) * (1 + cos(pi t)) / 2.

    Example:
        >>> [round(Cosine(target_sparsity=0.8, end_epoch=4)(e), 4) for e in (0, 1, 2, 3, 4)]
        [0.0, 0.1172, 0.4, 0.6828, 0.8]
    """

    def curve(self, done: float, span: float) -> float:
        wave = (1 + math.cos(math.pi * done / span)) / 2
        return self.final + (self.initial_sparsity - self.final) * wave


@dataclass(frozen=True)
class Exponential(Ramp):
    """Every update removes the same share of what is left: 1 - s(t) = (1 - initial)^(1-t) * (1 - target)^t.

    The iterative pruning of Frankle and Carbin, "The lottery ticket hypothesis", 2019, section 2.

    Example:
        >>> [round(Exponential(target_sparsity=0.9375, end_epoch=4)(e), 4) for e in (0, 1, 2, 3, 4)]
        [0.0, 0.5, 0.75, 0.875, 0.9375]
    """

    def curve(self, done: float, span: float) -> float:
        t = done / span
        density: float = (1 - self.initial_sparsity) ** (1 - t) * (1 - self.final) ** t
        return 1 - density


@dataclass(frozen=True)
class Linear(Ramp):
    """Equal steps, counted as Intel Neural Compressor did: both end epochs are steps, the first is taken at once.

    s(e) = initial + (target - initial) * floor((e - start + 1) / f) * f / (end - start + 1) for start <= e <= end and
    update_frequency f; `target_sparsity` after `end_epoch`, and also at it unless f does not divide end - start + 1;
    0 before `start_epoch`; `target_sparsity` from there on where start and end are the same.

    Example:
        >>> [round(Linear(target_sparsity=0.5, end_epoch=4)(e), 4) for e in (0, 1, 2, 3, 4, 5)]
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.5]
    """

    def __call__(self, progress: float) -> float:
        end = self._end()
        if progress < self.start_epoch:
            return 0.0
        if progress > end or end == self.start_epoch:
            return self.final
        updates = math.floor((progress - self.start_epoch + 1) / self.update_frequency + _EPS)
        return self.curve(updates * self.update_frequency, end - self.start_epoch + 1)

    def curve(self, done: float, span: float) -> float:
        return self.initial_sparsity + (self.final - self.initial_sparsity) * done / span


def _check_sparsity(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}: it must be in [0, 1)")
