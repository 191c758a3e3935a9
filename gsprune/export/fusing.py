"""BatchNorm folded into the convolutions before it: the form in which a network is deployed and timed."""

from __future__ import annotations

import copy

import torch
from torch import nn

from gsprune.structures.example import Example, call, tensors_in
from gsprune.structures.running import evaluating, same_randomness

__all__ = ["fuse"]

TOLERANCE = 1e-4  # of an output's largest value


def fuse(model: nn.Module, example_input: Example, *, tolerance: float = TOLERANCE) -> nn.Module:
    """A copy of the network for inference, with each BatchNorm folded into the convolution or linear layer before it.

        W' = W * gamma / sqrt(var + eps),    b' = (b - mean) * gamma / sqrt(var + eps) + beta

    (`torch.fx.experimental.optimization.fuse`, checked.) Dense and pruned networks are to be compared in the same form:
    a BatchNorm costs the smaller one relatively more.

    Args:
        example_input: a batch; both networks compute it in evaluation mode.
        tolerance: the largest difference of an output, relative to its largest value.

    Returns:
        The copy, in eval mode; `model` stays as it is.

    Raises:
        ValueError: `torch.fx` cannot trace the network (control flow that depends on values), or the copy computes
            something else.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    >>> [type(module).__name__ for module in fuse(net, torch.ones(1, 3, 8, 8)).children()]
    ['Conv2d', 'ReLU']
    """
    from torch.fx.experimental.optimization import fuse as fuse_by_fx  # half a second that other exports need not wait

    name = type(model).__name__
    try:
        fused = fuse_by_fx(copy.deepcopy(model).eval())
    except Exception as error:
        raise ValueError(f"{name} cannot be traced by torch.fx, so no BatchNorm is folded: {error}") from error
    with torch.no_grad(), evaluating([model, fused]), same_randomness(model):
        wanted, found = (list(tensors_in(call(network, example_input))) for network in (model, fused))
    worst = max(
        (float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in zip(wanted, found, strict=True))
    )
    if not worst <= tolerance:
        raise ValueError(f"{name} computes something else once BatchNorm is folded: {worst:.3g} of the largest value")
    return fused
