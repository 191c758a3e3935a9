"""The packed projections of an attention, query, key and value below each other, as the linear layer that they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from gsprune.repair.lockstep import Visit

MIXED = "its query, key and value are not one tensor"


def is_packed(module: nn.Module) -> bool:
    """Whether a module is an attention with one tensor for its three projections."""
    return isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None


def projections(attention: Any) -> nn.Linear:
    """They share the attention's tensors.

    >>> attention = nn.MultiheadAttention(4, 2)
    >>> projections(attention).weight is attention.in_proj_weight
    True
    """
    layer = nn.Linear(1, 1, bias=attention.in_proj_bias is not None, device="meta")
    layer.weight, layer.bias = attention.in_proj_weight, attention.in_proj_bias
    return layer


def of_projections(visit: Visit) -> Visit:
    """The visit of an attention that reads one tensor three times, as one of its projections."""
    dense = projections(visit.dense)
    outputs = [dense(x) for x in visit.dense_inputs]
    return replace(visit, dense=dense, small=projections(visit.small), outputs=outputs)
