"""Attention heads as structures: separate projections, nn.MultiheadAttention, and attention read off its calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gsprune.discovery.groups import Group, Item, check_module, enough_units, members_of
from gsprune.discovery.observe import AttentionCall
from gsprune.discovery.trace import Trace, Unprunable, common_module, op_name
from gsprune.structures.attention import GROUP_NAMES, HEAD_NAMES, WIDTH_NAMES
from gsprune.structures.structure import Member, Structure
from gsprune.surgery.narrow_attention import why_not_narrow
from gsprune.text.names import joined

_VALUE_NAMES = ("v", "value", "v_proj", "value_proj", "to_v", "v_lin", "wv", "w_v")


def heads_of(group: Group) -> Structure:
    """Attention heads: consecutive rows of separate query, key and value projections."""
    producers = group.producers()
    if len(producers) < 3 or not all(isinstance(i.node.module, nn.Linear) for i in producers):
        raise Unprunable("it feeds a softmax that is no attention with separate query, key and value Linear layers")
    name = common_module([group.name(i) for i in producers])
    heads = _head_count(group, name)
    head_dim = group.units // heads
    return Structure(
        name=name or group.name(producers[0]),
        kind="heads",
        units=heads,
        producers=members_of(group, producers, units=heads),
        consumers=members_of(group, group.consumers(), dim=1, units=heads),
        norms=members_of(group, group.norms(), units=heads),
        gates=members_of(group, [_value(group)], units=heads),
        attributes=_attributes(group.trace.model, name, heads=heads, head_dim=head_dim),
    )


def _head_count(group: Group, name: str) -> int:
    module = group.trace.model.get_submodule(name)
    for attribute in HEAD_NAMES:
        heads = getattr(module, attribute, None)
        if type(heads) is int and heads > 0 and group.units % heads == 0:
            return heads
    allowed = ", ".join(HEAD_NAMES)
    raise Unprunable(f"no head count on {name or 'the model'!r} divides its width {group.units} ({allowed})")


def _attributes(model: nn.Module, name: str, *, heads: int, head_dim: int) -> dict[str, int]:
    module = model.get_submodule(name)
    counts = {joined(name, a): 1 for a in HEAD_NAMES if getattr(module, a, None) == heads}
    widths = {joined(name, a): head_dim for a in WIDTH_NAMES if getattr(module, a, None) == heads * head_dim}
    return counts | widths


def packed_heads(trace: Trace, name: str) -> Structure:
    """Heads of an nn.MultiheadAttention: query, key and value rows in one tensor, or in three."""
    module = trace.model.get_submodule(name)
    assert isinstance(module, nn.MultiheadAttention)
    reason = why_not_narrow(module)
    if reason is not None:
        raise Unprunable(reason)
    _check_called(trace, module)
    check_module(trace, module)
    check_module(trace, module.out_proj)
    prefix = f"{name}." if name else ""
    heads, width = module.num_heads, module.num_heads * module.head_dim
    rows = torch.arange(width).reshape(heads, -1)
    packed = torch.cat([rows, rows + width, rows + 2 * width], 1)
    bias = [Member(f"{prefix}in_proj_bias", 0, packed, 3 * width)] if module.in_proj_bias is not None else []
    gates = [replace(m, index=rows + 2 * width, in_order=False) for m in bias]
    if module.in_proj_weight is not None:
        weights = [Member(f"{prefix}in_proj_weight", 0, packed, 3 * width)]
        gates += [replace(weights[0], index=rows + 2 * width, in_order=False)]
    else:
        weights = [Member(f"{prefix}{part}_proj_weight", 0, rows, width) for part in "qkv"]
        gates += weights[2:]
    return enough_units(
        Structure(
            name=name or "in_proj",
            kind="heads",
            units=heads,
            producers=(*weights, *bias),
            consumers=(Member(f"{prefix}out_proj.weight", 1, rows, width),),
            norms=(),
            gates=tuple(gates),
            attributes={f"{prefix}num_heads": 1},
        )
    )


def called_heads(trace: Trace, name: str, attention: AttentionCall) -> Structure:
    """Heads around one call of scaled_dot_product_attention: one unit a key head, with the query heads it serves."""
    if len(set(attention.producers)) != 3:
        raise Unprunable("its attention has no query, key and value from a Linear layer of their own")
    assert attention.consumer is not None
    layers = [_linear(trace.model, n) for n in (*attention.producers, attention.consumer)]
    for layer in layers:
        _check_called(trace, layer)
        check_module(trace, layer)
    query, key, value, reader = layers
    heads = _whole(query.weight.shape[0], attention.head_dims[0])
    groups = _whole(key.weight.shape[0], attention.head_dims[0])
    is_fitting = _whole(value.weight.shape[0], attention.head_dims[1]) == groups and heads % groups == 0
    if not is_fitting or reader.weight.shape[1] != heads * attention.head_dims[1]:
        raise Unprunable("its query, key, value and output layers do not hold whole heads that fit each other")
    if groups == 1 and heads > 1:
        raise Unprunable("it has a single key/value head (multi-query attention), which all query heads need")

    def members(layer_name: str, layer: nn.Linear, dim: int) -> tuple[Member, ...]:
        size = layer.weight.shape[dim]
        index = torch.arange(size).reshape(groups, -1)
        leaves = [leaf for leaf, p in layer._parameters.items() if p is not None and p.dim() > dim]
        return tuple(Member(f"{layer_name}.{leaf}", dim, index, size) for leaf in (leaves if dim == 0 else ["weight"]))

    made = [members(n, layer, 0) for n, layer in zip(attention.producers, layers[:3], strict=True)]
    home = common_module(attention.producers)
    module = trace.model.get_submodule(home)
    attributes = _attributes(trace.model, home, heads=heads, head_dim=attention.head_dims[1])
    attributes = {n: amount * heads // groups for n, amount in attributes.items()}
    attributes |= {joined(home, a): 1 for a in GROUP_NAMES if getattr(module, a, None) == groups}
    return enough_units(
        Structure(
            name=name or attention.producers[0],
            kind="heads",
            units=groups,
            producers=tuple(m for part in made for m in part),
            consumers=members(attention.consumer, reader, 1),
            norms=(),
            gates=made[2],
            attributes=attributes,
        )
    )


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _whole(width: int, head_dim: int) -> int:
    """Heads in a layer; 0 would hide a rest."""
    if width % head_dim:
        raise Unprunable("its query, key, value and output layers do not hold whole heads that fit each other")
    return width // head_dim


def _check_called(trace: Trace, module: nn.Module) -> None:
    if not trace.calls[module]:
        raise Unprunable(f"{trace.names[module]!r} is not called on the example input")


def _value(group: Group) -> Item:
    """The value projection: the one that reaches the output projection without passing the softmax."""
    producers = {item.node: item for item in group.producers()}
    found, seen = [], set()
    stack = [item.node for item in group.consumers()]
    while stack:
        for node in _value_inputs(stack.pop()):
            if node in producers and node not in seen:
                found.append(producers[node])
            elif node not in seen:
                stack.append(node)
            seen.add(node)
    if len(found) != 1:
        found = [i for i in group.producers() if group.name(i).rpartition(".")[2] in _VALUE_NAMES]
    if len(found) != 1:
        raise Unprunable(f"its value projection is not known (allowed names: {', '.join(_VALUE_NAMES)})")
    return found[0]


def _value_inputs(node: Any) -> list[Any]:
    if "ScaledDotProduct" in op_name(node):
        return list(node.inputs[2:3])
    return [] if "Softmax" in op_name(node) else list(node.inputs)
