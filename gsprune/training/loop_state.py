"""The state of the training loop between two optimizer steps, as data from which a later process can resume.

Beside model, optimizer, learning-rate schedule and pruner, the next step depends on the random generators, on the order
of the epoch's batches, and on the epoch's running totals.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from gsprune.training.loading import Start, generators

__all__ = ["LoopState", "random_state", "set_random_state"]

Item = TypeVar("Item")


class Stateful(Protocol):
    """An object with a state as plain data: a gradient scaler, the guard, the running totals."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


class LoopState:
    """Progress of a `fit`; a `fit` in another process resumes from its `state_dict`.

    Attributes:
        epoch, step: finished epochs, and finished optimizer steps of the next epoch.
    """

    def __init__(
        self,
        device: torch.device,
        parts: Mapping[str, Stateful],
        saved: Mapping[str, Any] | None = None,
        *,
        on_redraw: Callable[[], None] = lambda: None,
    ) -> None:
        self.epoch: int = saved["epoch"] if saved else 0
        self.step: int = saved["step"] if saved else 0
        self._device, self._parts, self._saved, self._on_redraw = device, parts, saved, on_redraw
        self._totals: Stateful | None = None
        self._loader: Any = None
        self._order: dict[str, Tensor] = {}
        self._random: dict[str, Any] | None = None
        self._since = time.perf_counter()
        for name, state in (saved["parts"] if saved else {}).items():
            if state and name in parts:  # a scaler that is off has no state
                parts[name].load_state_dict(state)

    def steps(
        self, loader: Any, groups: Callable[[Start | None], Iterator[Item]], totals: Stateful
    ) -> Iterator[tuple[int, Item]]:
        """The epoch's groups of batches from `step` on, numbered; saved `totals` are loaded.

        Order and augmentation, also in worker processes, are those of an uninterrupted epoch.

        Args:
            groups: all groups, or those from a `Start` on.
        """
        saved, self._saved = self._saved or {}, None
        self._since = time.perf_counter() - saved.get("seconds", 0.0)
        self._loader, self._totals = loader, totals
        if saved:
            set_random_state(saved["order"] if self.step else saved["random"], self._device, loader)
        self._order = _order(loader)
        if not (saved and self.step):
            return enumerate(groups(None))
        totals.load_state_dict(saved["totals"])
        start = Start(self.step, lambda: set_random_state(saved["random"], self._device, loader), self._on_redraw)
        return enumerate(groups(start), self.step)

    def resting(self, loader: Iterable[Item], on_rest: Callable[[LoopState], None]) -> Iterator[Item]:
        """The batches of a validation loader, with `on_rest` after each; the state stays that of before the first."""
        self._random = random_state(self._device, self._loader)
        for batch in loader:
            yield batch
            on_rest(self)
        self._random = None

    def end_epoch(self) -> None:
        self.epoch, self.step, self._totals = self.epoch + 1, 0, None

    @property
    def seconds(self) -> float:
        """Seconds since the epoch began, including those of the processes before an interruption."""
        return time.perf_counter() - self._since

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors. This is a sync point."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds if self.step else 0.0,
            "totals": self._totals.state_dict() if self._totals and self.step else None,
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
            "order": self._order,
            "random": self._random or random_state(self._device, self._loader),
        }


def random_state(device: torch.device, loader: Any = None) -> dict[str, Any]:
    """States of the generators of Python, numpy and torch (CPU, device and loader), as tensors and plain values.

    >>> before = random_state(torch.device("cpu"))
    >>> drawn = random.random(), float(np.random.rand()), float(torch.rand(()))
    >>> set_random_state(before, torch.device("cpu"))
    >>> drawn == (random.random(), float(np.random.rand()), float(torch.rand(())))
    True
    """
    version, numbers, gauss = random.getstate()
    name, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": [version, torch.tensor(numbers), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), place, has_gauss, cached],
        **_order(loader),
    }
    if device.type in ("cuda", "mps"):
        state[device.type] = _of_device(device)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device, loader: Any = None) -> None:
    """Restore the result of `random_state`; generators that are not in it are unchanged."""
    if "python" in state:
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers.tolist()), gauss))
    if "numpy" in state:
        name, keys, place, has_gauss, cached = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), place, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    for name, generator in generators(loader).items():
        if name in state:
            generator.set_state(state[name])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


def _order(loader: Any) -> dict[str, Tensor]:
    """States of the generators that a loader's order comes from: its own and torch's."""
    own = {name: generator.get_state() for name, generator in generators(loader).items()}
    return {"torch": torch.get_rng_state(), **own}


def _of_device(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.mps.get_rng_state()
