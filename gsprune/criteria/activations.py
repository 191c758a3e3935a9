"""Criteria that read what a layer reads: single weights, after training, from the second moments of inputs.

Legend: g = groups of a convolution (1 of a linear layer), r = output rows of a group, k = inputs of a row (a
convolution's unfolded: in * kh * kw). A gram is the mean of x x^T over all inputs x of the layer, (g, k, k).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsprune.criteria.base import Criterion
from gsprune.ranking.patterns import Block, Pattern, Tile
from gsprune.ranking.selection import pruned_count, select


class Activations(Criterion):
    """Base of `Wanda` and `SparseGPT`: scores from a layer's weight and the second moments of its inputs.

    `gsprune.cut` collects these; a training step does not, so that a `Rule` refuses such a criterion.
    """

    scores_weights = True
    cumulative = False
    reads_inputs = True

    def __init__(self) -> None:
        super().__init__()

    def weights(self, weight: Tensor, grad: Tensor | None, *, name: str = "", out: Tensor | None = None) -> Tensor:
        raise ValueError(f"{type(self).__name__} scores by what a layer reads, not by gradients: ask from_inputs")

    def from_inputs(self, weight_grk: Tensor, gram_gkk: Tensor) -> Tensor:
        """Score of each weight, 0 or more, at least float32: (g, r, k)."""
        raise NotImplementedError


class Wanda(Activations):
    """Weight times the norm of its input: s_ij = abs(w_ij) * sqrt(mean of x_j^2).

    The source ranks each output row by itself (`scope="row"`), where the mean stands for the norm as well.

    Source: Sun et al., "A simple and effective pruning approach for large language models", 2024.

    Example:
        >>> w, gram = torch.tensor([[[2.0, -1.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 16.0]]])
        >>> Wanda().from_inputs(w, gram).tolist()
        [[[2.0, 4.0]]]
    """

    def from_inputs(self, weight_grk: Tensor, gram_gkk: Tensor) -> Tensor:
        norm_gk = gram_gkk.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        return weight_grk.to(norm_gk.dtype).abs() * norm_gk.unsqueeze(-2)


class SparseGPT(Activations):
    """Optimal brain surgeon, column by column: s_ij = w_ij^2 / [(H_F)^-1]_jj, and what is left makes up for it.

    H is the gram with `damping` times the mean of its diagonal added, F = {j, j + 1, ...} the columns that are still
    free. The mask is chosen in blocks of columns (an N:M pattern's where each of its blocks begins) by weights that
    carry the updates of all columns before; a weight that goes moves those of its row in F by
    -w_ij [(H_F)^-1]_j: / [(H_F)^-1]_jj.

    Args:
        damping: share of the mean of the diagonal, above 0.
        block: columns that are chosen together.

    Source: Frantar and Alistarh, "SparseGPT: massive language models can be accurately pruned in one-shot", 2023.

    Example:
        The second input equals the first, so that one weight can do the work of both:

        >>> w, gram = torch.tensor([[[1.0, 2.0]]]), torch.ones(1, 2, 2)
        >>> new, keep = SparseGPT(damping=1e-9).prune(w, gram, sparsity=0.5)
        >>> keep.tolist(), [round(x, 4) for x in new.flatten().tolist()]
        ([[[False, True]]], [0.0, 3.0])
    """

    def __init__(self, *, damping: float = 0.01, block: int = 128) -> None:
        super().__init__()
        if not damping > 0:
            raise ValueError(f"damping is {damping}: it must be above 0")
        if isinstance(block, bool) or not isinstance(block, int) or block < 1:
            raise ValueError(f"block is {block!r}: it must be a whole number of columns, 1 or more")
        self.damping, self.block = damping, block

    def from_inputs(self, weight_grk: Tensor, gram_gkk: Tensor) -> Tensor:
        """The scores before any update."""
        factor_gkk, dead_gk = self._factor(gram_gkk)
        diagonal_gk = factor_gkk.diagonal(dim1=-2, dim2=-1)
        return (weight_grk.double() / diagonal_gk.unsqueeze(-2)).square().masked_fill(dead_gk.unsqueeze(-2), 0)

    def prune(
        self,
        weight_grk: Tensor,
        gram_gkk: Tensor,
        *,
        sparsity: float,
        pattern: Pattern | None = None,
        by_row: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Choose and update in one sweep over the columns, which are in the pattern's order.

        Args:
            sparsity: share that goes, in [0, 1): exactly floor(sparsity * n + 0.5) of n, spread evenly over the blocks.
                A block pattern has its own.
            pattern: single weights (None), or N:M along the columns.
            by_row: every row reaches the sparsity, and not only the tensor.

        Returns:
            New weights, float64, 0 where pruned; mask, True = kept: both (g, r, k).

        Raises:
            ValueError: a tile of several weights.
        """
        pattern = pattern or Tile(1, 1)
        self.check_pattern(pattern)
        factor_gkk, dead_gk = self._factor(gram_gkk)
        weight = weight_grk.double().clone()
        keep = torch.ones_like(weight, dtype=torch.bool)
        g, r, k = weight.shape
        m = pattern.m if isinstance(pattern, Block) else 1
        width = max(self.block // m, 1) * m
        gone = 0
        for start in range(0, k, width):
            stop = min(start + width, k)
            u = factor_gkk[:, start:stop, start:stop]
            dead = dead_gk[:, start:stop]
            part, kept = weight[..., start:stop], keep[..., start:stop]
            if not isinstance(pattern, Block):
                entries = stop if by_row else g * r * stop
                due = pruned_count(sparsity, entries) - gone
                gone += due
                scores = _saliency(part, u, dead)
                ranked = scores.reshape(g * r if by_row else 1, -1)
                kept.copy_(select([ranked], due)[0].view_as(kept))
            errors = torch.empty_like(part)
            for j in range(stop - start):
                if isinstance(pattern, Block) and j % m == 0:
                    at = slice(j, j + m)
                    scores = _saliency(part[..., at], u[:, at, at], dead[:, at])
                    chosen = select([scores.reshape(-1, m)], m - pattern.n)[0]
                    kept[..., at] = chosen.view(g, r, m)
                lost = part[..., j].masked_fill(kept[..., j], 0)
                errors[..., j] = lost / u[:, j, j].unsqueeze(-1)
                part[..., j:] -= errors[..., j].unsqueeze(-1) * u[:, j, j:].unsqueeze(-2)
                part[..., j].masked_fill_(~kept[..., j], 0)  # exactly 0, whatever the rounding
            weight[..., stop:] -= errors @ factor_gkk[:, start:stop, stop:]
        return weight, keep

    def check_pattern(self, pattern: Pattern) -> None:
        """ValueError for a tile of several weights."""
        if isinstance(pattern, Tile) and pattern != Tile(1, 1):
            tile = f"{pattern.rows}x{pattern.cols}"
            raise ValueError(f"SparseGPT prunes single weights and N:M blocks, and pattern is {tile}: take Wanda")

    def _factor(self, gram_gkk: Tensor) -> tuple[Tensor, Tensor]:
        """U with U^T U = H^-1, upper, so that U_jj^2 = [(H_F)^-1]_jj; the inputs that are always 0."""
        gram = gram_gkk.double()
        diagonal_gk = gram.diagonal(dim1=-2, dim2=-1)
        dead_gk = diagonal_gk <= 0
        mean_g1 = diagonal_gk.mean(-1, keepdim=True)
        ridge_gk = self.damping * torch.where(mean_g1 > 0, mean_g1, torch.ones_like(mean_g1)) + dead_gk.double()
        lower = torch.linalg.cholesky(gram + torch.diag_embed(ridge_gk))
        return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True), dead_gk


def _saliency(weight_grb: Tensor, factor_gbb: Tensor, dead_gb: Tensor) -> Tensor:
    """w^2 / U_jj^2; 0 where the input is always 0."""
    diagonal_gb = factor_gbb.diagonal(dim1=-2, dim2=-1)
    return (weight_grb / diagonal_gb.unsqueeze(-2)).square().masked_fill(dead_gb.unsqueeze(-2), 0)
