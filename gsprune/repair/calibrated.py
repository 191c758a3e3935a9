"""A repair with its samples: what is asked for once and done at every cut."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor, nn

from gsprune.repair.batchnorm import batchnorm
from gsprune.repair.calibrating import inputs_of, samples_in
from gsprune.repair.least_squares import least_squares
from gsprune.repair.observing import observe
from gsprune.repair.report import RepairReport
from gsprune.structures.example import Example, map_tensors
from gsprune.surgery.cut_plan import CutPlan
from gsprune.text.display import first_line

By = Literal["least_squares", "batchnorm"]


class Repair:
    """Repairs a network on samples that are read once and kept on the CPU.

    Attributes:
        inputs: the batches, without labels.

    Args:
        batches: as of `gsprune.repair.least_squares`; read until there are `samples`.
        by: "least_squares", or "batchnorm" (judged by the dense network).
        samples: how many are kept, at least; all of the last batch are.
        settings: of that function, such as `damping` or `held_back`.

    Raises:
        ValueError: no batches, another way of repair, a number of samples below 1.

    >>> import torch
    >>> Repair([torch.zeros(4, 2)] * 9, samples=10)
    Repair by least_squares, on 12 samples
    """

    def __init__(
        self, batches: Iterable[Any], *, by: By = "least_squares", samples: int = 512, **settings: Any
    ) -> None:
        if by not in ("least_squares", "batchnorm"):
            raise ValueError(f'by is {by!r}: it must be "least_squares" or "batchnorm"')
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ValueError(f"samples is {samples!r}: it must be a whole number from 1")
        self.by, self._settings = by, settings
        self.inputs: list[Example] = []
        self.samples = 0
        for batch in batches:
            inputs = inputs_of(batch)
            self.inputs.append(map_tensors(_on_cpu, inputs))
            self.samples += samples_in(inputs)
            if self.samples >= samples:
                break
        if not self.inputs:
            raise ValueError("there are no batches: a repair needs some samples, labels are not needed")

    def check(self, model: nn.Module) -> None:
        """ValueError where the model does not run on the samples."""
        try:
            observe(model, self.inputs[0])
        except Exception as error:
            raise ValueError(f"the model does not run on the samples of the repair: {first_line(error)}") from error

    def __call__(self, small: nn.Module, dense: nn.Module, plan: CutPlan | None) -> RepairReport:
        """Repair the small network, in place, as `least_squares` or `batchnorm`."""
        if self.by == "batchnorm":
            return batchnorm(small, self.inputs, dense=dense, plan=plan, **self._settings)
        return least_squares(small, dense, self.inputs, plan, **self._settings)

    def __repr__(self) -> str:
        return f"Repair by {self.by}, on {self.samples} sample{'s' if self.samples != 1 else ''}"


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()
