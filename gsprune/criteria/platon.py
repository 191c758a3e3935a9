"""The criterion that is optimistic about what it is not sure of."""

from __future__ import annotations

from torch import Tensor

from gsprune.criteria.base import Read, unit_sums
from gsprune.criteria.elementwise import Elementwise
from gsprune.criteria.gate_gradients import weight_and_gradient
from gsprune.structures.structure import Structure


class PLATON(Elementwise):
    """Sensitivity times uncertainty: S * U, so that a weight whose sensitivity varies much from step to step stays.

    The sensitivity is the exponential average of I = abs(w * g), of a unit that of abs(sum over consumers of
    w[:, u] * g[:, u]); the uncertainty is that of abs(I - S). (The pruner keeps both without the factors 1 - d, which
    change no ranking.) It costs a second running average, as large as the weights.

    Args:
        decay: d in (0, 1) of the sensitivity.
        spread_decay: in (0, 1), of the uncertainty.

    Raises:
        ValueError: a decay outside its range.

    Source: Zhang et al., "PLATON: pruning large transformer models with upper confidence bound of weight importance",
    2022, equations 7 to 10.

    Example:
        >>> import torch
        >>> PLATON().weights(torch.tensor([2.0, -1.0, 0.5]), torch.tensor([0.5, 3.0, 1.0])).tolist()
        [1.0, -3.0, 0.5]
    """

    scores_units = True

    def __init__(self, *, decay: float = 0.85, spread_decay: float = 0.95) -> None:
        super().__init__(decay=decay)
        self.spread_decay = spread_decay
        for name, value in (("decay", decay), ("spread_decay", spread_decay)):
            if not 0 < value < 1:
                raise ValueError(f"{name} is {value}: it must be above 0 and below 1, as that of an average over steps")

    def units(self, structure: Structure, read: Read) -> Tensor:
        return unit_sums(structure.output_gates, lambda name: weight_and_gradient(read(name)))
