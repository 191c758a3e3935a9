"""A pruner that lives in somebody else's training loop: made when there are optimizers, saved and resumed with it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gsprune.criteria.base import Criterion
from gsprune.cutting.calibration import Calibration
from gsprune.pruner.pruner import Pruner
from gsprune.structures.adapters import lora_layers
from gsprune.structures.example import Example, map_tensors
from gsprune.structures.running import same_randomness, to_device_of

__all__ = ["Hosted"]


class Hosted:
    """The settings of a `Pruner`, and the pruner itself from the moment on that there are optimizers.

    Args:
        criterion, settings: as of `gsprune.Pruner`, without the model, the optimizer and the length of the run.
        owner: the class that a user sees, for errors.

    Attributes:
        pruner: None before training.
        example: what the network is traced with; None: two samples of the data.
    """

    def __init__(self, criterion: Criterion | None, settings: Mapping[str, Any], *, owner: str) -> None:
        for name in ("optimizer", "steps_per_epoch", "epochs", "copies"):
            if name in settings:
                raise ValueError(f"{name} is known from the training loop: leave it out of {owner}")
        self._criterion, self._settings, self._owner = criterion, dict(settings), owner
        self.example: Example | None = self._settings.pop("example_input", None)
        self.pruner: Pruner | None = None
        self._resumed = False

    @property
    def each_update(self) -> bool:
        """Whether units are cut out while the network trains."""
        return self._settings.get("shrink") == "each_update"

    def start(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        loader: Any,
        *,
        steps_per_epoch: int,
        epochs: float,
        copies: Sequence[nn.Module] = (),
    ) -> Pruner:
        """Make the pruner, unless a saved state made it, and attach it to the optimizers.

        Raises:
            ValueError: this has pruned a network before; what `Pruner` refuses.
        """
        if self.pruner is not None and not self._resumed:
            raise ValueError(f"this {self._owner} has pruned a network already: make a new one for each training")
        if self.pruner is None:
            if self.example is None:
                self.example = example_of(loader, model)
            self._make(model, steps_per_epoch, epochs, copies)
        assert self.pruner is not None
        self._resumed = False
        self.pruner.optimizer = list(optimizers)
        self.pruner.attach(*optimizers)
        return self.pruner

    def follow(self, optimizer_steps: int) -> None:
        """Go on from this many optimizer steps, where the loop counts one that the optimizer did not make."""
        pruner = self.pruner
        if pruner is None or not pruner.attached:
            return
        assert pruner.steps_per_epoch is not None
        if pruner.epoch * pruner.steps_per_epoch + pruner.step != optimizer_steps:
            pruner.epoch, step = divmod(optimizer_steps, pruner.steps_per_epoch)
            pruner.on_step_begin(step)

    def check_stepped(self) -> None:
        """Warn where no optimizer step was seen in a whole epoch."""
        if self.pruner is not None and self.pruner.attached and not self.pruner.epoch + self.pruner.step:
            warnings.warn(
                f"{self._owner} saw no optimizer step in the first epoch: does the loop step other optimizers than "
                f"those it was given?",
                stacklevel=3,
            )

    def finish(self) -> None:
        """The final mask; units are cut out."""
        if self.pruner is not None and self.pruner.attached:
            self.pruner.finish()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; {} before training."""
        if self.pruner is None:
            return {}
        run = {"steps_per_epoch": self.pruner.steps_per_epoch, "epochs": self._epochs}
        return {"pruner": self.pruner.state_dict(), "example": self.example, **run}

    def resume(self, model: nn.Module, state: Mapping[str, Any], *, copies: Sequence[nn.Module] = ()) -> None:
        """Make the pruner of a saved state: where units had been cut out, this cuts the (dense) model.

        Raises:
            ValueError: the state is none that `state_dict` gave, or it is of another network or other rules.
        """
        if not {"pruner", "example", "steps_per_epoch", "epochs"} <= set(state):
            raise ValueError(f"the checkpoint holds no state of {self._owner}: it was written by a run without it")
        self.example = state["example"]
        self._make(model, state["steps_per_epoch"], state["epochs"], copies)
        assert self.pruner is not None
        self.pruner.load_state_dict(state["pruner"])
        self._resumed = True

    def _make(self, model: nn.Module, steps_per_epoch: int, epochs: float, copies: Sequence[nn.Module]) -> None:
        self._epochs = epochs
        example = None if self.example is None else to_device_of(model, self.example)
        run: dict[str, Any] = {"steps_per_epoch": steps_per_epoch, "epochs": epochs, "copies": copies}
        self.pruner = _kind(model)(model, self._criterion, example_input=example, **self._settings, **run)


def _kind(model: nn.Module) -> type[Pruner]:
    """The pruner for a network: under LoRA the one that scores frozen weights by the adapters' gradients."""
    if next(lora_layers(model), None) is None:
        return Pruner
    from gsprune.integrations.peft import LoraPruner

    return LoraPruner


def example_of(loader: Any, model: nn.Module) -> Example | None:
    """Two samples of a data loader's data set, collated, on the CPU, to trace a network with; None without a data set.

    They are not taken from the loader: that would move on the random order of the batches.
    """
    dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
    if dataset is None or collate is None or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return None
    with same_randomness(model):
        samples = [dataset[k] for k in range(min(2, len(dataset)))]
        batch = collate(samples)
        return map_tensors(lambda tensor: tensor.cpu(), Calibration([batch]).example_for(model))


def updates_in(batches: Any, accumulation: int) -> int | None:
    """Optimizer steps that so many batches make; None where a loader does not know its length."""
    try:
        return max(math.ceil(len(batches) / accumulation), 1)
    except TypeError:
        return None
