"""Find what can be removed: conv channels, hidden neurons, attention heads, and every tensor they live in.

Coupled tensors come from torch-pruning's dependency graph (`trace`). Each of its groups becomes a `Structure`, or a
line that says why it cannot be pruned (`groups`, `heads`). Attentions that the graph cannot follow are read off the
calls of one forward pass (`observe`). What is found is then proven on a float64 copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from gsprune.discovery.groups import (
    Group,
    as_group,
    check,
    enough_units,
    is_attention,
    parts,
    plain_structure,
    raw_groups,
    rename,
)
from gsprune.discovery.heads import called_heads, heads_of, packed_heads
from gsprune.discovery.observe import check_static, observe
from gsprune.discovery.trace import CONV1D, Trace, Unprunable, trace_graph
from gsprune.structures.example import Example, map_tensors, plain
from gsprune.structures.matrices import heaviest_first, is_conv1d
from gsprune.structures.running import same_randomness, wake
from gsprune.structures.structure import Found, Structure
from gsprune.structures.twin import to_precision, twin_of
from gsprune.surgery.proof import Masked, sift, unproven, wake_scales_
from gsprune.surgery.shrink import sift_cuts
from gsprune.text.names import check_patterns, choose


def find_structures(
    model: nn.Module, example_input: Example, *, include: Iterable[str] = ("*",), exclude: Iterable[str] = ()
) -> Found:
    """Find the channels, neurons and heads of `model` that can be removed exactly.

    A structure is offered only if zeroing its consumers' columns makes the unit contribute nothing; this is
    tested on the example input. `include` and `exclude` are `*` patterns for a structure's name or for the
    name of any module that produces it. `model` is not touched: all work happens on a float64 copy in
    evaluation mode (about ten forward passes, more where structures break; copies take 8 to 24 bytes a parameter).

    Returns:
        What can be removed, what the patterns leave out of it, and why the rest cannot be removed.

    Raises:
        ValueError: the model cannot be traced, calls other modules for other inputs, is quantised or on another device
            than the example, or a pattern matches nothing.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> found = find_structures(net, torch.zeros(1, 4))
    >>> [(s.name, s.kind, s.units) for s in found.structures], dict(found.skipped)
    ([('0', 'neurons', 3)], {'2': "it feeds the model's output"})
    """
    check_patterns(include, exclude)
    twin, args = twin_of(model, example_input, torch.float32)  # half the time where values do not matter
    with same_randomness(twin), torch.enable_grad():
        traced, skipped = _convert(_trace(twin, args))
        twin, args = to_precision(twin, torch.float64), map_tensors(lambda t: plain(t, torch.float64), args)
        proven, unfit = _prove(twin, args, traced)
    skipped |= unfit
    skipped = skipped if proven else heaviest_first(model, skipped)  # the first reason is told
    if traced and not proven and tuple(include) == ("*",):
        return Found((), (), skipped)
    return only(Found(tuple(proven), (), skipped), tuple(include), tuple(exclude))


def only(found: Found, include: Sequence[str], exclude: Sequence[str]) -> Found:
    """The same with what the name patterns leave out moved to `left_out`; patterns as of `find_structures`."""
    check_patterns(include, exclude)
    offered = {s.name: s for s in found.structures}
    names = {name: (name, *s.modules()) for name, s in offered.items()}
    chosen = choose(names, tuple(include), tuple(exclude), skipped=found.skipped)
    left_out = tuple(structure for name, structure in offered.items() if name not in chosen)
    return Found(tuple(offered[name] for name in chosen), (*found.left_out, *left_out), found.skipped)


def _trace(twin: nn.Module, args: Example) -> Trace:
    observed = observe(twin, args)
    if wake(twin, args, observed.calls):
        observed = observe(twin, args)
    check_static(observed, args)
    return trace_graph(observed, args)


def _convert(trace: Trace) -> tuple[list[Structure], dict[str, str]]:
    structures: list[Structure] = []
    skipped: dict[str, str] = {}
    groups = [part for raw in raw_groups(trace, skipped) for part in parts(as_group(trace, raw))]
    for name, attention in trace.attentions.items():
        try:
            structures.append(packed_heads(trace, name) if attention is None else called_heads(trace, name, attention))
        except Unprunable as reason:
            skipped[name] = str(reason)
    for group in sorted(groups, key=lambda g: trace.rank[g.name(g.producers()[0])]):
        try:
            structures.append(rename(_structure(group), {s.name for s in structures}))
        except Unprunable as reason:
            skipped[group.name(group.producers()[0])] = str(reason)
    for module, name in trace.names.items():
        if is_conv1d(module):
            skipped[name] = f"it is {CONV1D}"
        elif any(p.is_complex() for p in module.parameters(recurse=False)):
            skipped[name or type(module).__name__] = "it has complex weights, which are not supported"
        elif isinstance(module, nn.RNNBase):
            kind = type(module).__name__
            skipped[name or kind] = f"it is a recurrent layer ({kind}), whose units are not supported"
    structures.sort(key=lambda s: trace.rank[s.modules()[0]])
    return structures, skipped


def _structure(group: Group) -> Structure:
    for item in group.items:
        check(group, item)
    if not group.consumers():
        raise Unprunable("it feeds the model's output")
    return enough_units(heads_of(group) if is_attention(group) else plain_structure(group))


# ---- the proof: zero columns -> the unit contributes nothing


def _prove(twin: nn.Module, args: Example, structures: list[Structure]) -> tuple[list[Structure], dict[str, str]]:
    """The structures that can be cut exactly, and why the others cannot. Works on the twin and its copies alone."""
    if not structures:
        return [], {}
    masked = Masked(twin, args, structures, wake_scales_(twin, args))
    silent, leaking = sift(structures, masked.leak)
    hidden = {s.name: _HIDDEN for s in unproven(silent, masked.shown(silent))}
    kept, broken = sift_cuts(masked, [s for s in silent if s.name not in hidden])
    return kept, {**leaking, **hidden, **broken}


_HIDDEN = (
    "the example input does not reach it: the layers that read it compute the same whatever it holds, so nothing can "
    "be proven; give an example_input that reaches it"
)
