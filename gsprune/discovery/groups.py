"""One group of the dependency graph becomes one structure, or the reason why it cannot be pruned.

Legend: u = unit, a position = an index along one dimension of one tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from gsprune.discovery.trace import CONV, TYPE, Trace, Unprunable, op_name
from gsprune.structures.structure import Member, Structure
from gsprune.text.display import first_line
from gsprune.text.names import joined

_MIXING = {
    TYPE.LN: "it passes a LayerNorm, which mixes units",
    TYPE.GN: "it passes a GroupNorm, which mixes units",
    TYPE.IN: "it passes an InstanceNorm, which is not supported",
    TYPE.EMBED: "it is coupled to an embedding",
    TYPE.PARAMETER: "it is combined with a bare parameter (an embedding or a scale)",
    TYPE.MHA: "it passes an nn.MultiheadAttention, whose outer width stays",
    TYPE.LSTM: "it is coupled to an LSTM",
}


@contextmanager
def _mappings_as_built() -> Iterator[None]:
    """Inside the block torch-pruning does not make the index mappings again for every group."""
    index_mapping = tp.dependency.index_mapping
    update = index_mapping.update_index_mapping
    index_mapping.update_index_mapping = lambda graph: None
    try:
        yield
    finally:
        index_mapping.update_index_mapping = update


@dataclass(frozen=True, eq=False)
class Item:
    node: Any
    reads: bool  # the unit is read here (columns); else computed or passed on
    positions: Tensor  # (n,)
    roots: Tensor  # (n,) the unit each position belongs to


@dataclass(frozen=True, eq=False)
class Group:
    trace: Trace
    units: int
    items: tuple[Item, ...]

    def of(self, *types: Any, reads: bool | None = None) -> list[Item]:
        """Items of these node types, in module order."""
        found = [i for i in self.items if i.node.type in types and reads in (None, i.reads)]
        return sorted(found, key=lambda i: self.trace.rank[self.name(i)])

    def name(self, item: Item) -> str:
        return self.trace.names[item.node.module]

    def producers(self) -> list[Item]:
        return self.of(TYPE.CONV, TYPE.DEPTHWISE_CONV, TYPE.LINEAR, reads=False)

    def consumers(self) -> list[Item]:
        return self.of(TYPE.CONV, TYPE.LINEAR, reads=True)

    def norms(self) -> list[Item]:
        return [i for i in self.of(TYPE.BN, TYPE.PRELU) if not _is_scalar_prelu(i.node.module)]


def raw_groups(trace: Trace, skipped: dict[str, str]) -> Iterator[Any]:
    """torch-pruning's groups, each once; a layer whose group cannot be made is skipped with the reason."""
    graph, seen = trace.graph, set()
    with _mappings_as_built():
        for module in [m for m in graph.module2node if isinstance(m, nn.Linear | CONV)]:
            if module in seen:
                continue
            pruner = graph.get_pruner_of_module(module)
            try:
                units = range(pruner.get_out_channels(module))
                raw = graph.get_pruning_group(module, pruner.prune_out_channels, list(units))
                if not units:
                    raise Unprunable("it has no units")
            except Exception as error:
                skipped[trace.names[module]] = (
                    str(error) if isinstance(error, Unprunable) else f"it cannot be followed ({first_line(error)})"
                )
                continue
            seen |= {dep.target.module for dep, _ in raw if graph.is_out_channel_pruning_fn(dep.handler)}
            yield raw


def rename(structure: Structure, taken: set[str]) -> Structure:
    """Two halves of a concatenated residual stream share their first producer: the second takes its own."""
    name = next((n for n in (structure.name, *structure.modules()) if n not in taken), structure.name)
    assert name not in taken, f"two structures called {name}"
    return replace(structure, name=name)


def as_group(trace: Trace, raw: Any) -> Group:
    def item(entry: Any) -> Item:
        node = entry.dep.target
        reads = node.type in (TYPE.CONV, TYPE.LINEAR) and not trace.graph.is_out_channel_pruning_fn(entry.dep.handler)
        # -1 marks a position whose unit torch-pruning lost (repeated key/value heads)
        roots = [-1 if root is None else root for root in entry.root_idxs]
        return Item(node, reads, torch.tensor(entry.idxs), torch.tensor(roots))

    return Group(trace, len(raw[0].idxs), tuple(item(entry) for entry in raw))


def parts(group: Group) -> list[Group]:
    """Separate units that live in different tensors: x + cat(a, b) couples one half of x to a, the other to b.

    Where the halves come from a split, an uneven cut would move its border: such a group stays whole (and fails).
    """
    if any(item.node.type in (TYPE.SPLIT, TYPE.SLICE, TYPE.UNBIND) for item in group.items):
        return [group]
    known = [item.roots[item.roots >= 0] for item in group.items if item.node.module in group.trace.names]
    counts = torch.stack([torch.bincount(roots, minlength=group.units) for roots in known])
    _, classes = torch.unique(counts, dim=1, return_inverse=True)
    return [_part(group, classes == c) for c in dict.fromkeys(classes.tolist())]


def _part(group: Group, members: Tensor) -> Group:
    """The units of one class, renumbered from 0."""
    if bool(members.all()):
        return group
    number = torch.where(members, members.cumsum(0) - 1, -2)
    items = []
    for item in group.items:
        roots = torch.where(item.roots >= 0, number[item.roots], item.roots)
        if bool((roots != -2).any()):
            items.append(replace(item, positions=item.positions[roots != -2], roots=roots[roots != -2]))
    return replace(group, units=int(members.sum()), items=tuple(items))


def check(group: Group, item: Item) -> None:
    """Raise for a node that does not keep units apart, or that cannot be cut."""
    node = item.node
    if node in group.trace.broken:
        raise Unprunable(group.trace.broken[node])
    if hasattr(node.grad_fn, "reason") and node.type != TYPE.MHA:
        raise Unprunable(node.grad_fn.reason)
    if node.type in _MIXING:
        raise Unprunable(_MIXING[node.type])
    if not item.reads and (node.type == TYPE.OUTPUT or node.grad_fn in group.trace.outputs):
        raise Unprunable("it feeds the model's output")
    if node.grad_fn in group.trace.inputs:
        raise Unprunable("it is combined with the model's input")
    if node.module in group.trace.names:
        check_module(group.trace, node.module)


def check_module(trace: Trace, module: nn.Module) -> None:
    name = trace.names[module]
    if trace.calls[module] > 1:
        raise Unprunable(f"{name!r} is called {trace.calls[module]} times in one forward pass")
    for leaf in ("weight", "bias"):
        if getattr(module, leaf, None) is not None and leaf not in {**module._parameters, **module._buffers}:
            raise Unprunable(f"the {leaf} of {name!r} is computed from other tensors ({_how_computed(module)})")
    if any(trace.owners[id(p)] > 1 for p in module.parameters(recurse=False)):
        raise Unprunable(f"{name!r} shares its weight with another module")
    if isinstance(module, CONV):
        _check_conv(name, module)


def _how_computed(module: nn.Module) -> str:
    if any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values()):
        return "torch.nn.utils.prune: call its remove() first"
    return "a parametrisation, as weight_norm or spectral_norm: remove it first"


def _check_conv(name: str, conv: nn.modules.conv._ConvNd) -> None:
    if conv.transposed:
        raise Unprunable(f"{name!r} is a transposed convolution")
    if conv.groups > 1 and not conv.groups == conv.in_channels == conv.out_channels:
        raise Unprunable(f"{name!r} is a grouped convolution")


def plain_structure(group: Group) -> Structure:
    """Channels or neurons: one unit a row of the first producer."""
    producers = group.producers()
    gates = _gates(group)
    if not gates:
        raise Unprunable("its BatchNorm has no weight and bias, whose gradients its score is read from")
    return Structure(
        name=group.name(producers[0]),
        kind="channels" if isinstance(producers[0].node.module, CONV) else "neurons",
        units=group.units,
        producers=members_of(group, producers),
        consumers=members_of(group, group.consumers(), dim=1),
        norms=members_of(group, group.norms()),
        gates=gates,
        attributes={},
    )


def members_of(group: Group, items: Iterable[Item], *, dim: int = 0, units: int | None = None) -> tuple[Member, ...]:
    """Rows (dim 0) of every per-unit tensor of the items' modules, or columns (dim 1) of their weights.

    Args:
        units: fewer than the group has, of consecutive ones each: heads instead of rows.
    """
    members = []
    for item in items:
        tensors = dict(item.node.module.named_parameters(recurse=False))
        tensors |= dict(item.node.module.named_buffers(recurse=False))
        for leaf, tensor in tensors.items():
            if tensor.dim() > dim and (dim == 0 or leaf == "weight"):
                size = tensor.shape[dim]
                index = _index(group, item, size).reshape(units or group.units, -1)
                members.append(Member(joined(group.name(item), leaf), dim, index, size))
    return tuple(members)


def _index(group: Group, item: Item, size: int) -> Tensor:
    """(units, width) positions, each row sorted; raises when units do not get the same number of them."""
    counts = torch.bincount(item.roots[item.roots >= 0], minlength=group.units)
    known = bool((item.roots >= 0).all()) and int(item.positions.max()) < size
    if not known or int(counts.min()) != int(counts.max()):
        raise Unprunable(f"its units are split, sliced or repeated in front of {group.name(item)!r}")
    order = torch.argsort(item.roots * size + item.positions)
    return item.positions[order].reshape(group.units, -1)


def _is_scalar_prelu(module: Any) -> bool:
    return isinstance(module, nn.PReLU) and module.num_parameters == 1


# ---- gates


def _gates(group: Group) -> tuple[Member, ...]:
    """Affine pairs of the BatchNorms that read the producers first, and bare producers' own rows.

    Scaling a unit in front of a BatchNorm changes nothing, so its gate shows in that norm's weight and bias.
    A producer that is (also) read without a norm shows that part of the gate in its own rows.
    """
    norms, bare = set(), []
    for item in group.producers():
        found, is_bare = _first_norms(item.node)
        norms |= found
        bare += [item] if is_bare else []
    items = [item for item in group.of(TYPE.BN) if item.node in norms]
    affine = [m for m in members_of(group, items) if m.tensor.rpartition(".")[2] in ("weight", "bias")]
    return (*affine, *members_of(group, bare))


def _first_norms(producer: Any) -> tuple[set[Any], bool]:
    """The BatchNorm nodes met first on the ways out of a producer, and whether some way meets none.

    Depthwise convolutions are walked through: per-channel scaling in front of them is seen behind them.
    """
    norms, is_bare = set(), False
    stack, seen = list(producer.outputs), set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.type == TYPE.BN:
            norms.add(node)
        elif node.type in (TYPE.CONV, TYPE.LINEAR):
            is_bare = True
        else:
            stack.extend(node.outputs)
    return norms, is_bare


# ---- attention heads


def is_attention(group: Group) -> bool:
    return any("ScaledDotProduct" in op_name(i.node) or "Softmax" in op_name(i.node) for i in group.items)


def enough_units(structure: Structure) -> Structure:
    if structure.units < 2:
        raise Unprunable("it has a single unit")
    return structure
