"""The criterion of single weights."""

from __future__ import annotations

import torch
from torch import Tensor

from gsprune.criteria.base import Criterion


class Elementwise(Criterion):
    """First-order loss change of zeroing each weight: s = abs(w * g).

    Args:
        decay: d in (0, 1] of S <- d * S + s. 0.9 keeps about the last ten steps, 1.0 is a plain sum.
        compiled: scores by a kernel of `torch.compile`, in one pass over memory. It takes some seconds to make, saves
            up to 15 % of the time of all hooks, on some machines nothing, and scores may differ in the last bit.

    Raises:
        ValueError: decay outside (0, 1]; by the pruner, if `compiled` and there is no compiler.

    Source: Mozer and Smolensky, "Skeletonization", 1989; accumulated over steps as in Intel Neural Compressor.

    Example:
        >>> w, g = torch.tensor([2.0, -1.0, 0.5, 0.0]), torch.tensor([0.5, 3.0, -1.0, 9.0])
        >>> Elementwise().weights(w, g).abs().tolist()
        [1.0, 3.0, 0.5, 0.0]
    """

    scores_weights = True

    def __init__(self, *, decay: float = 0.9, compiled: bool = False) -> None:
        super().__init__(decay=decay)
        self.compiled = compiled

    def weights(self, weight: Tensor, grad: Tensor | None, *, name: str = "", out: Tensor | None = None) -> Tensor:
        assert grad is not None
        return torch.mul(weight.float(), grad, out=out)

    def __repr__(self) -> str:
        return f"Elementwise(decay={self.decay!r}{', compiled=True' if self.compiled else ''})"
