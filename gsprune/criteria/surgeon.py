"""The criterion of units that counts on repair: what a removal costs when the readers are refitted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gsprune.criteria.base import Criterion
from gsprune.ranking.elimination import Reader, eliminate


class OBS(Criterion):
    """Optimal brain surgeon over whole units: what the outputs change by once a unit is gone and its readers refitted.

    Units are eliminated one after the other, the cheapest first, and the readers refitted each time; d_u is how much
    the error of their outputs then grows (`gsprune.ranking.elimination.eliminate`). One currency for all structures:

        s_u = d_u * sum of mean_b g_bu^2 / sum of |W[:, u]|^2 E[x_u^2]

    with W and x the readers' weights and inputs, and g_bu the gradient, by a gate on unit u, of a random sum of all
    outputs of sample b (`Calibration.of_outputs`; of the loss, where a network has no outputs of samples): the fraction
    turns an error of the readers' outputs into one of the network's. For `gsprune.cut`, whose repair does the refit. A
    unit of a residual stream, which norms read first, has s_u = mean_b g_bu^2; a whole branch has what the outputs z
    change by without it, mean_b |z_b - z'_b|^2, once the next branches are refitted (`branch_changes`).

    Args:
        damping: added to the diagonal of E[x x^T], as a share of its mean.

    Raises:
        ValueError: damping is not above 0.

    Source: Hassibi and Stork, "Optimal brain surgeon", 1993; Kurtic et al., "ZipLM", 2023, for whole units.

    Example:
        The first two of three neurons are alike, so that one of them is free:

        >>> gram = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> reader = Reader(torch.ones(1, 3), gram, columns=torch.arange(3).reshape(3, 1))
        >>> scores = OBS(damping=1e-6).of_readers([reader], gates_bu=torch.ones(2, 3))
        >>> [round(score, 2) for score in scores.tolist()]
        [0.0, 4.0, 1.0]
    """

    scores_units = True
    cumulative = False
    calibrated = True
    reads_inputs = True

    def __init__(self, *, damping: float = 0.01) -> None:
        super().__init__()
        if not damping > 0:
            raise ValueError(f"damping is {damping}: it must be above 0")
        self.damping = damping

    def of_readers(self, readers: Sequence[Reader], gates_bu: Tensor) -> Tensor:
        price = eliminate(readers, damping=self.damping)
        alone = sum(
            float((r.weight.double().square().sum(0) * r.gram.double().diagonal())[r.columns].sum()) for r in readers
        )
        felt = float(gates_bu.double().square().mean(0).sum())
        return (price * (felt / alone) if alone > 0 else torch.zeros_like(price)).float()
