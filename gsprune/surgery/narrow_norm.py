"""LayerNorm and RMSNorm over a stream some of whose positions were cut out.

A mask holds these positions at zero, and the norms of the masked network count them: so do those of the cut one, over
the virtual full width d. With x the d' entries that are left,

    m = sum(x) / d,    v = (sum((x - m)^2) + (d - d') m^2) / d,

and y = (x - m) / sqrt(v + eps) * gain + bias as always. A LayerNorm becomes a `NarrowLayerNorm`, in place. An RMSNorm
stays the module that it is: over d' entries with gain * sqrt(d / d') and eps * d / d' it computes the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gsprune.structures.norms import StreamNorm


class _Narrow(nn.Module):
    """What the two narrow norms share."""

    full_width: int
    axis: int
    offset: float
    eps: float | None
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    centred: bool

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and type as `x`; half precision is computed in float32, as PyTorch's own norms do."""
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        gone = self.full_width - x.shape[self.axis]
        squares_of_gone: Tensor | float = 0.0
        if self.centred:
            mean = y.sum(self.axis, keepdim=True) / self.full_width
            y, squares_of_gone = y - mean, gone * mean.square()
        variance = (y.square().sum(self.axis, keepdim=True) + squares_of_gone) / self.full_width
        y = y * torch.rsqrt(variance + (torch.finfo(x.dtype).eps if self.eps is None else self.eps))
        if self.weight is not None:
            y = y * self._along(self.weight + self.offset if self.offset else self.weight, x)
        if self.bias is not None:
            y = y + self._along(self.bias, x)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        width = len(self.weight) if self.weight is not None else self.normalized_shape[0]  # type: ignore[index]
        return f"{width} of {self.full_width}, eps={self.eps}"

    def _along(self, vector: Tensor, x: Tensor) -> Tensor:
        return vector if self.axis == -1 else vector.view(-1, *[1] * (x.dim() - 1 - self.axis))


class NarrowLayerNorm(_Narrow, nn.LayerNorm):  # type: ignore[misc]
    """A LayerNorm over `full_width` entries of which those that are not there are zero. Made by `narrow_norm` only."""

    centred = True


class NarrowRMSNorm(_Narrow, nn.RMSNorm):  # type: ignore[misc]
    """So of an RMSNorm that has no weight, or keeps its eps where it cannot be set. Made by `narrow_norm` only."""

    centred = False


def narrow_norm(module: Any, dense: StreamNorm, width: int) -> None:
    """Give a norm, whose weight and bias are short already, `width` of the positions that it had as `dense`.

    >>> norm, x = nn.LayerNorm(4), torch.tensor([[1.0, 0.0, 3.0, 0.0]])
    >>> before = norm(x)[:, [0, 2]]
    >>> norm.weight, norm.bias = nn.Parameter(norm.weight[[0, 2]].detach()), nn.Parameter(norm.bias[[0, 2]].detach())
    >>> narrow_norm(norm, StreamNorm("layer", -1, 4, 1e-5, "eps"), 2)
    >>> type(norm).__name__, torch.allclose(norm(x[:, [0, 2]]), before, atol=1e-6)
    ('NarrowLayerNorm', True)
    """
    if hasattr(module, "normalized_shape"):
        module.normalized_shape = (width,)
    if isinstance(module, _Narrow):
        return
    if dense.kind == "rms" and dense.of is not None and isinstance(getattr(module, "weight", None), Tensor):
        _rescale_(module, dense, width)
        return
    for name in ("weight", "bias"):
        if not hasattr(module, name):
            module.register_parameter(name, None)
    module.normalized_shape = (width,)
    module.elementwise_affine = module.weight is not None
    module.full_width, module.axis, module.offset = dense.width, dense.axis, dense.offset
    if dense.of != "eps":
        module.eps = dense.eps
    module.__class__ = NarrowLayerNorm if dense.kind == "layer" else NarrowRMSNorm


@torch.no_grad()
def _rescale_(module: Any, dense: StreamNorm, width: int) -> None:
    """An RMSNorm over fewer entries, which are as large as before, that computes what it did over all."""
    assert dense.of is not None
    growth = math.sqrt(dense.width / width)
    module.weight.add_(dense.offset).mul_(growth).sub_(dense.offset)
    if module.weight.grad is not None:
        module.weight.grad.div_(growth)
    full_width, eps = getattr(module, "dense_norm", (dense.width, dense.eps))  # of the first cut: no rounding adds up
    module.dense_norm = (full_width, eps)
    setattr(module, dense.of, eps * full_width / width)
