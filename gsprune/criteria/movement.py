"""The criterion of where training moves weights."""

from __future__ import annotations

import torch
from torch import Tensor

from gsprune.criteria.base import Criterion


class Movement(Criterion):
    """Removes first the weights that training moves towards zero: S = -sum over steps of w * g, with its sign.

    A weight whose gradient steps move it away from zero scores above 0, one that moves to zero below, whatever its
    size. Meant for fine-tuning a network that was trained for something else; tiles (pattern "32x32") are block
    movement.

    Args:
        decay: d in (0, 1] of S <- d * S - w * g; 1 is the plain sum.

    Source: Sanh et al., "Movement pruning", 2020, equation 4; Lagunas et al., "Block pruning", 2021, for tiles.

    Example:
        >>> w, g = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([-1.0, 1.0, 4.0])
        >>> Movement().weights(w, g).tolist()
        [2.0, 1.0, -2.0]
    """

    scores_weights = True
    signed = True

    def __init__(self, *, decay: float = 1.0) -> None:
        super().__init__(decay=decay)

    def weights(self, weight: Tensor, grad: Tensor | None, *, name: str = "", out: Tensor | None = None) -> Tensor:
        assert grad is not None
        return torch.mul(weight.float(), -grad.float(), out=out)
