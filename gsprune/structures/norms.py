"""Norms over a residual stream, of any library: LayerNorm and RMSNorm are told apart by what they compute."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

_NAME = re.compile("(layer|rms)_?norm|^LN|^RMS", re.IGNORECASE)
_EPS = ("eps", "variance_epsilon", "epsilon", "norm_eps", "layer_norm_eps", "layer_norm_epsilon")
_USUAL = (1e-5, 1e-6, 1e-12, 1e-8, 1e-3)  # where no attribute says it


@dataclass(frozen=True)
class StreamNorm:
    """What a norm over a stream's positions computes: y = (x - m) / sqrt(v + eps) * gain + bias, per row of x.

    kind    "layer", with m the mean and v the variance; "rms", with m = 0 and v the mean square
    axis    of the positions: -1, or 1 (pictures)
    width   how many positions
    eps     the number
    of      the attribute that holds it; None: it is written in the forward pass
    offset  what is added to the weight to make the gain: 1 in Gemma
    """

    kind: Literal["layer", "rms"]
    axis: int
    width: int
    eps: float
    of: str | None
    offset: float = 0.0


def may_be_stream_norm(module: nn.Module) -> bool:
    """Whether a module calls itself a LayerNorm or RMSNorm, and has no modules inside."""
    known = isinstance(module, nn.LayerNorm | nn.RMSNorm) or bool(_NAME.search(type(module).__name__))
    return known and not any(True for _ in module.children())


def stream_norm(module: nn.Module) -> StreamNorm | None:
    """What a norm computes over which axis; None where it is neither a LayerNorm nor an RMSNorm over one axis.

    A copy is run on random numbers in float64, and compared with both.

    >>> stream_norm(nn.LayerNorm(4))
    StreamNorm(kind='layer', axis=-1, width=4, eps=1e-05, of='eps', offset=0.0)
    >>> stream_norm(nn.RMSNorm(4, eps=1e-6)).kind, stream_norm(nn.Linear(4, 4))
    ('rms', None)
    """
    width = _width(module) if may_be_stream_norm(module) else None
    if width is None:
        return None
    if hasattr(module, "full_width"):  # `gsprune.surgery.narrow_norm` made it, and it counts what is gone as zeros
        kind: Literal["layer", "rms"] = "layer" if isinstance(module, nn.LayerNorm) else "rms"
        eps: Any = _smallest_step(module) if module.eps is None else module.eps
        return StreamNorm(kind, module.axis, width, eps, "eps", module.offset)  # type: ignore[arg-type]
    if type(module).forward is nn.LayerNorm.forward:
        return StreamNorm("layer", -1, width, module.eps, "eps")  # type: ignore[arg-type]
    return _told_apart(module, width)


@torch.no_grad()
def _told_apart(module: nn.Module, width: int) -> StreamNorm | None:
    if any(buffer.is_meta for buffer in module.buffers()):
        return None
    twin: Any = copy.deepcopy(module).to_empty(device="cpu") if _is_meta(module) else copy.deepcopy(module).cpu()
    twin = twin.to(dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in twin.parameters():
        parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5)
    name, every = _eps_of(module)
    for axis, shape in ((-1, (2, 5, width)), (1, (2, width, 3, 5))):
        if width == 5 and axis == 1:
            shape = (2, width, 3, 7)
        x = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5
        try:
            given = [(scale * x, twin(scale * x)) for scale in (1.0, 1e-3)]  # a small input shows the eps
        except Exception:
            continue
        for eps in every:
            for kind in ("layer", "rms"):
                for offset in (0.0, 1.0):
                    if all(_fits(y, _computed(twin, x, kind, axis, eps, offset)) for x, y in given):
                        eps = eps if name is None or getattr(module, name) is not None else _smallest_step(module)
                        return StreamNorm(kind, axis, width, eps, name, offset)
    return None


def _is_meta(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


def _width(module: nn.Module) -> int | None:
    shape = getattr(module, "normalized_shape", None)
    if isinstance(shape, tuple | list) and len(shape) != 1:
        return None
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return len(weight) if weight.dim() == 1 else None
    return int(shape[0]) if shape else None


def _eps_of(module: nn.Module) -> tuple[str | None, tuple[float, ...]]:
    for name in _EPS:
        value = getattr(module, name, None)
        if isinstance(value, float):
            return name, (value,)
        if value is None and hasattr(module, name) and isinstance(module, nn.RMSNorm):
            return name, (torch.finfo(torch.float64).eps,)  # None is the smallest step of the input's type
    return None, _USUAL


def _smallest_step(module: nn.Module) -> float:
    weight = getattr(module, "weight", None)
    return torch.finfo(weight.dtype if isinstance(weight, Tensor) else torch.get_default_dtype()).eps


def _computed(module: Any, x: Tensor, kind: str, axis: int, eps: float, offset: float) -> Tensor:
    m = x.mean(axis, keepdim=True) if kind == "layer" else 0.0
    y = (x - m) * torch.rsqrt((x - m).square().mean(axis, keepdim=True) + eps)
    shape = [1] * x.dim()
    shape[axis] = -1
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if isinstance(weight, Tensor):
        y = y * (weight + offset).view(shape)
    return y + bias.view(shape) if isinstance(bias, Tensor) else y


def _fits(given: Any, expected: Tensor) -> bool:
    """Some norms compute in float32 whatever the input."""
    if not isinstance(given, Tensor) or given.shape != expected.shape:
        return False
    return torch.allclose(given.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
