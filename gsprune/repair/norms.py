"""Normalisation layers as one scale and one shift a channel: statistics re-estimated, or scale and shift fitted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gsprune.repair.gram import LACKS_NOTHING, Moments, error, noise, rows_of, solve
from gsprune.repair.lockstep import Visit
from gsprune.repair.report import LayerRepair
from gsprune.structures.norms import StreamNorm, stream_norm

BATCH = nn.modules.batchnorm._BatchNorm
How = Literal["statistics", "affine"]
DAMPING = 1e-6


Known = StreamNorm | None  # None: a BatchNorm, a GroupNorm, or a LayerNorm over several dimensions


def norms_in(model: nn.Module) -> dict[str, Known]:
    """The BatchNorms, LayerNorms, GroupNorms and RMSNorms of a network, of any library.

    >>> norms_in(nn.Sequential(nn.BatchNorm2d(2), nn.RMSNorm(2), nn.Linear(2, 2))).keys()
    dict_keys(['0', '1'])
    """
    found: dict[str, Known] = {}
    for name, module in model.named_modules():
        if isinstance(module, BATCH | nn.GroupNorm):
            found[name] = None
        elif isinstance(module, nn.LayerNorm) or (known := stream_norm(module)) is not None:
            found[name] = stream_norm(module) if isinstance(module, nn.LayerNorm) else known
    return found


def why_no_norm(module: nn.Module, how: How) -> str | None:
    """Why a normalisation layer cannot be repaired, or None."""
    if how == "statistics" and (not isinstance(module, BATCH) or module.running_mean is None):
        return "it has no running statistics"
    if isinstance(module, BATCH) and module.running_mean is None:
        return "it normalises by the batch"
    if how == "affine" and module._parameters.get("weight") is None:
        return "it has no scale"
    return None


@dataclass(eq=False)
class _Affine:
    """The tensors of a norm that scale and shift its channels; float64, (channels,) each."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    eps: float

    @classmethod
    def of(cls, norm: Any, device: torch.device) -> _Affine:
        """Of a BatchNorm what it has; of another norm the scale and shift that follow its output."""
        if not isinstance(norm, BATCH):
            size = norm.weight.numel()
            one, zero = torch.ones(size, device=device).double(), torch.zeros(size, device=device).double()
            return cls(one, zero, zero, one, 0.0)
        tensors = {name: getattr(norm, name) for name in ("weight", "bias", "running_mean", "running_var")}
        mean = tensors["running_mean"].to(device).double()
        plain = {"weight": torch.ones_like(mean), "bias": torch.zeros_like(mean)}
        found = {n: plain[n] if t is None else t.detach().to(device).double() for n, t in tensors.items()}
        return cls(found["weight"], found["bias"], mean, found["running_var"], norm.eps)

    @property
    def slope(self) -> Tensor:
        return self.weight / (self.var + self.eps).sqrt()

    @property
    def shift(self) -> Tensor:
        return self.bias - self.mean * self.slope

    def rounded(self, dtype: torch.dtype) -> _Affine:
        weight, bias, mean, var = (t.to(dtype).double() for t in (self.weight, self.bias, self.mean, self.var))
        return _Affine(weight, bias, mean, var, self.eps)


def slope_of(norm: Any) -> Tensor:
    """What a BatchNorm multiplies each channel by."""
    return _Affine.of(norm, norm.running_mean.device).slope


@torch.no_grad()
def refit_norm(visit: Visit, kept: Tensor | None, how: How, known: Known = None) -> LayerRepair:
    """Take the statistics of what a BatchNorm reads now, or the scale and shift that fit the dense norm's output.

    Each channel is changed only where its error falls on the held-back part; without a dense network statistics are
    taken in all.
    """
    norm: Any = visit.small
    fit, judge, variance = _moments(norm, visit, kept, known)
    if not (fit.is_finite and judge.is_finite):
        return LayerRepair(visit.name, reason="what it reads or should give is not finite")
    now = _Affine.of(norm, fit.xx.device)
    has_bias = getattr(norm, "bias", None) is not None
    new = _statistics(now, fit) if how == "statistics" else _fitted(now, fit, has_bias=has_bias)
    dtype = (norm.running_mean if how == "statistics" else norm.weight).dtype
    new = new.rounded(dtype)
    if not visit.outputs:
        _write(norm, new, how, torch.ones_like(new.mean, dtype=torch.bool), known)
        return LayerRepair(visit.name)
    change, shift = new.slope - now.slope, new.shift - now.shift
    before = error(judge, torch.zeros_like(fit.yx), torch.zeros_like(fit.yy))[:, 0]
    after = error(judge, change[:, None, None], shift[:, None])[:, 0]
    better = after < before
    was, left = (float(e.sum()) / (variance or 1.0) for e in (before, torch.where(better, after, before)))
    if was <= noise(dtype):
        return LayerRepair(visit.name, was, was, reason=LACKS_NOTHING)
    if not left < was:
        return LayerRepair(visit.name, was, was, reason="nothing lowers its error on the held-back samples")
    _write(norm, new, how, better, known)
    return LayerRepair(visit.name, was, left)


def _statistics(now: _Affine, fit: Moments) -> _Affine:
    """As PyTorch keeps them: the mean, and the variance of n - 1."""
    return replace(now, mean=fit.mean_x[:, 0], var=fit.xx[:, 0, 0] / max(1, fit.n - 1))


def _fitted(now: _Affine, fit: Moments, *, has_bias: bool) -> _Affine:
    """The scale and shift that add what the output lacks, the y of the moments."""
    change, shift = solve(fit, None, DAMPING, has_bias=has_bias)
    slope, shift = now.slope + change[:, 0, 0], now.shift + shift[:, 0]
    return replace(now, weight=slope * (now.var + now.eps).sqrt(), bias=shift + now.mean * slope)


def _write(norm: Any, new: _Affine, how: How, chosen: Tensor, known: Known) -> None:
    weight, bias, own = new.weight, new.bias, getattr(norm, "bias", None)
    if not isinstance(norm, BATCH):  # the fit is of the norm's own output
        offset = 0.0 if known is None else known.offset
        old = norm.weight.detach().flatten().to(weight)
        bias = weight * own.detach().flatten().to(weight) + bias if own is not None else bias
        weight = weight * (old + offset) - offset
    pairs = (
        ((norm.running_mean, new.mean), (norm.running_var, new.var))
        if how == "statistics"
        else ((norm.weight, weight), (own, bias))
    )
    for tensor, value in pairs:
        if tensor is not None:
            old = tensor.detach().flatten()
            tensor.copy_(torch.where(chosen.to(old.device), value.to(old.dtype).to(old.device), old).view_as(tensor))


def _moments(norm: Any, visit: Visit, kept: Tensor | None, known: Known) -> tuple[Moments, Moments, float]:
    """Of each channel, x what a BatchNorm reads or another norm gives, y what the output lacks; one column each."""
    channels = norm.num_features if isinstance(norm, BATCH) else norm.weight.numel()
    device = next(t.device for t in (norm.weight, getattr(norm, "running_mean", None)) if t is not None)
    device = torch.device("cpu") if device.type == "mps" else device
    fit, judge = (Moments.none(channels, 1, 1, device) for _ in range(2))
    whole = Moments.none(channels, 0, 1, device)
    now = _Affine.of(norm, device)
    chosen = rows_of(visit, [x.numel() // channels for x in visit.inputs])
    for i, (x, rows) in enumerate(zip(visit.inputs, chosen, strict=True)):
        read = (
            _rows(norm, x if isinstance(norm, BATCH) else type(norm).forward(norm, x), rows, known).to(device).double()
        )
        lacking = torch.zeros_like(read)
        if visit.outputs:
            given = _rows(norm, visit.outputs[i], rows, known, kept).to(device).double()
            whole.add(read[:, :, None][:, :, :0], given[:, :, None])
            lacking = given - (read * now.slope + now.shift)
        (judge if visit.held_back[i] else fit).add(read[:, :, None], lacking[:, :, None])
    return fit, judge, float(whole.yy.sum()) / max(1, whole.n)


def _rows(norm: Any, x: Tensor, chosen: Tensor | None, known: Known, kept: Tensor | None = None) -> Tensor:
    """(rows, channels) of what a norm reads or gives."""
    if isinstance(norm, nn.LayerNorm) and known is None:
        flat = x.reshape(-1, norm.weight.numel())
    else:
        flat = x.movedim(1 if known is None else known.axis, -1)
        flat = flat.reshape(-1, flat.shape[-1])
    flat = flat if chosen is None else flat[chosen.to(flat.device)]
    return flat if kept is None else flat[:, kept.to(flat.device)]
