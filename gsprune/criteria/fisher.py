"""The criterion of units from second moments: the squared gradient of the gate."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gsprune.criteria.gate_gradients import GateGradient
from gsprune.structures.structure import Member, Structure


class Fisher(GateGradient):
    """Squared gradient of a gate on unit u's output: s_u = (sum over consumers of w[:, u] * g[:, u])^2, or the same by
    affine pairs, as of `Abs`.

    The mean of s_u over samples is the diagonal of the gates' empirical Fisher information. In a trained network the
    mean gradient is near zero, and half of that diagonal is about the change of the loss when u is removed. So the
    scores of channels, neurons and heads are comparable, and may be divided by the cost of a unit. Gradients of small
    batches estimate it better than those of large ones.

    Args:
        decay: d in (0, 1] of S <- d * S + s; 1 is the plain sum, for a network that is trained already.
        normalize: divide each structure's scores by their mean before several structures are ranked together, which
            None does not: these scores can be compared as they are.

    Source: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018; Kwon et al., "A fast
    post-training pruning framework for transformers", 2022, for heads and neurons.

    Example:
        Two units, read by the columns of one 2 x 2 weight:

        >>> import torch
        >>> from gsprune.structures.structure import Member, Structure
        >>> reader = Member("out.weight", dim=1, index=torch.tensor([[0], [1]]), size=2)
        >>> unit = Structure("hidden", "neurons", 2, (), consumers=(reader,), norms=(), gates=(), attributes={})
        >>> w, g = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, -1.0], [1.0, 1.0]])
        >>> Fisher().units(unit, lambda name: (w, g)).tolist()
        [16.0, 4.0]
    """

    degree = 2
    calibrated = True

    def members(self, structure: Structure) -> Sequence[Member]:
        return structure.output_gates

    def of_sums(self, sums: Tensor) -> Tensor:
        return sums.square()

    def of_gates(self, gates_bu: Tensor) -> Tensor:
        return gates_bu.square().mean(0)
