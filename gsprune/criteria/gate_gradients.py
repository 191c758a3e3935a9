"""The criteria of whole units: the gradient of a gate that was never built.

Multiplying a unit's output by xi is the same as multiplying its column in every consumer by xi, so the gate's gradient
at xi = 1 is the column sum of w * g: no forward hook, no head mask, nothing kept from the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gsprune.criteria.base import Criterion, Read, unit_sums
from gsprune.structures.structure import Member, Structure


class GateGradient(Criterion):
    """Base of `Abs`, `Weighted` and `Fisher`: the sum of w * g over the tensors on one side of the unit.

    A subclass says by `members` which side that is.
    """

    scores_units = True

    def __init__(self, *, decay: float = 0.95, normalize: bool | None = None) -> None:
        super().__init__(decay=decay)
        self.normalize = normalize

    def members(self, structure: Structure) -> Sequence[Member]:
        """The tensors that are summed over, and where each unit lies in them."""
        raise ValueError(f"{self} does not say what it adds up: take Abs or Weighted")

    def of_sums(self, sums: Tensor) -> Tensor:
        """Signed change of each unit from its sum, (units,)."""
        return sums

    def units(self, structure: Structure, read: Read) -> Tensor:
        return self.of_sums(unit_sums(self.members(structure), lambda name: weight_and_gradient(read(name))))


class Abs(GateGradient):
    """Gradient of a gate on unit u's output: s_u = abs(sum over consumers of w[:, u] * g[:, u]).

    Where only ReLU, pooling and sums lie between a BatchNorm and the consumers, that norm's affine pair gives the same
    number, gamma_u * g_gamma_u + beta_u * g_beta_u, and is read instead: it has a thousandth of the entries.

    Args:
        decay: d in (0, 1] of S <- d * S + s; 1 is a plain sum.
        normalize: divide each structure's scores by their mean before several structures are ranked together, which
            None does too.

    Source: Michel et al., "Are sixteen heads really better than one?", 2019, equation 2, for heads (there through a
    head mask); Molchanov et al., "Pruning convolutional neural networks", 2017, for channels.

    Example:
        Two units, read by the columns of one 2 x 2 weight:

        >>> import torch
        >>> from gsprune.structures.structure import Member, Structure
        >>> reader = Member("out.weight", dim=1, index=torch.tensor([[0], [1]]), size=2)
        >>> unit = Structure("hidden", "neurons", 2, (), consumers=(reader,), norms=(), gates=(), attributes={})
        >>> w, g = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, -1.0], [1.0, 1.0]])
        >>> Abs().units(unit, lambda name: (w, g)).tolist()
        [4.0, 2.0]
    """

    def members(self, structure: Structure) -> Sequence[Member]:
        return structure.output_gates

    def of_gates(self, gates_bu: Tensor) -> Tensor:
        return gates_bu.abs().mean(0)


class Weighted(GateGradient):
    """Gradient of a gate on unit u's pre-activation: s_u = abs(sum over producers of w[u, :] * g[u, :] + b[u] * gb[u]).

    Rows followed by a normalisation layer are represented by that layer's affine pair, gamma * g_gamma + beta * g_beta:
    scaling such a row does not change the loss, so its own sum is nothing but rounding and BatchNorm's eps. Under ReLU
    this equals `Abs`; without, it sees the activation's slope, which `Abs` does not.

    Args:
        decay: d in (0, 1] of S <- d * S + s; 1 is a plain sum.
        normalize: divide each structure's scores by their mean before several structures are ranked together, which
            None does too.

    Source: Intel Neural Compressor's `weighted_gradient`; Molchanov et al., "Importance estimation", 2019, section 3.1.

    Example:
        Two units, made by the rows of one 2 x 2 weight and a bias:

        >>> import torch
        >>> from gsprune.structures.structure import Member, Structure
        >>> rows = tuple(Member(name, 0, torch.tensor([[0], [1]]), size=2) for name in ("weight", "bias"))
        >>> unit = Structure("hidden", "neurons", 2, rows, consumers=(), norms=(), gates=rows, attributes={})
        >>> w, g = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, -1.0], [1.0, 1.0]])
        >>> b, gb = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 5.0])
        >>> Weighted().units(unit, {"weight": (w, g), "bias": (b, gb)}.__getitem__).tolist()
        [1.0, 7.0]
    """

    def members(self, structure: Structure) -> Sequence[Member]:
        return structure.gates


def weight_and_gradient(pair: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    """What a criterion that needs gradients reads of a tensor."""
    weight, grad = pair
    assert grad is not None
    return weight, grad
