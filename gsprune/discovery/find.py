"""Find what can be removed: conv channels, hidden neurons, attention heads, and every tensor they live in.

Labels on the tensors of one forward pass say which positions of which tensors belong together (`follow`, by the rules
of `ops`). What is tied becomes units (`classes`), units in the same tensors a `Structure`, or a line that says why they
stay (`units`). What is found is then proven on a float64 copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from gsprune.discovery.follow import follow
from gsprune.discovery.units import convert
from gsprune.structures.example import Example, map_tensors
from gsprune.structures.matrices import heaviest_first
from gsprune.structures.running import called_modules, same_randomness, wake
from gsprune.structures.structure import Found, Structure
from gsprune.structures.twin import twin_of
from gsprune.surgery.proof import Masked, unproven, wake_precisely_
from gsprune.surgery.shrink import sift_cuts
from gsprune.text.names import check_patterns, choose


def find_structures(
    model: nn.Module, example_input: Example, *, include: Iterable[str] = ("*",), exclude: Iterable[str] = ()
) -> Found:
    """Find the channels, neurons, heads and residual streams of `model` that can be removed exactly.

    A structure is offered only if zeroing its consumers' columns makes the unit contribute nothing; this is
    tested on the example input, which a function without arguments may make. `include` and `exclude` are `*` patterns
    for a structure's name or for the name of any module that produces it. `model` is not touched: all work happens on a
    float64 copy in evaluation mode (about seven forward passes, more where structures break; copies take 8 to 24 bytes
    a parameter). A network that does not run in float64 is proven in float32, with a warning (`Found.proof`). One on
    the meta device, where a network that is too large to load can be, is not proven, with a warning too.

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
    # float32: half the time where values do not matter
    twin, args = twin_of(model, example_input, torch.float32, needs_values=False)
    with same_randomness(twin), torch.enable_grad():
        traced, skipped = _trace(twin, args)
        is_meta = any(p.is_meta for p in twin.parameters())
        proven, unfit, proof = (traced, {}, _NOT_PROVEN) if is_meta else _prove(twin, args, traced)
    if proof:
        warnings.warn(f"{type(model).__name__}: {proof}", stacklevel=2)
    skipped |= unfit
    skipped = skipped if proven else heaviest_first(model, skipped)  # the first reason is told
    if traced and not proven and tuple(include) == ("*",):
        return Found((), (), skipped, proof)
    return only(Found(tuple(proven), (), skipped, proof), tuple(include), tuple(exclude))


def only(found: Found, include: Sequence[str], exclude: Sequence[str]) -> Found:
    """The same with what the name patterns leave out moved to `left_out`; patterns as of `find_structures`."""
    check_patterns(include, exclude)
    offered = {s.name: s for s in found.structures}
    names = {name: (name, *s.modules()) for name, s in offered.items()}
    chosen = choose(names, tuple(include), tuple(exclude), skipped=found.skipped)
    left_out = tuple(structure for name, structure in offered.items() if name not in chosen)
    return replace(found, structures=tuple(offered[name] for name in chosen), left_out=(*found.left_out, *left_out))


def _trace(twin: nn.Module, args: Example) -> tuple[list[Structure], dict[str, str]]:
    log, calls = follow(twin, args)
    if wake(twin, args, calls):
        log, calls = follow(twin, args)
    _check_static(twin, args, calls)
    return convert(twin, log)


def _check_static(model: nn.Module, args: Example, calls: Mapping[nn.Module, int]) -> None:
    """Raise for a model that calls other modules on another input than on the example: those ways are not seen."""

    def other(value: Tensor) -> Tensor:
        if not value.dim():
            return value
        return -1.5 * value if value.is_floating_point() else value.flip(-1)

    again = called_modules(model, map_tensors(other, args))
    if again is None:
        return
    for name, module in model.named_modules():
        if bool(again[module]) != bool(calls[module]):
            kind = type(model).__name__
            raise ValueError(f"{kind} cannot be traced: {name!r} is called for some inputs only (dynamic control flow)")


# ---- the proof: zero columns -> the unit contributes nothing


def _prove(twin: nn.Module, args: Example, structures: list[Structure]) -> tuple[list[Structure], dict[str, str], str]:
    """The structures that can be cut exactly, why the others cannot, and what the proof shows where that is less.

    Works on the twin and its copies alone.
    """
    if not structures:
        return [], {}, ""
    args, whole, proof = wake_precisely_(twin, args, structures)
    masked = Masked(twin, args, structures, whole)
    kept, broken = sift_cuts(masked, structures)
    hidden = {s.name: _HIDDEN for s in unproven(kept, masked.shown(kept))}
    return [s for s in kept if s.name not in hidden], broken | hidden, proof


_NOT_PROVEN = "what is found is not proven: the network is on the meta device, which holds no values"
_HIDDEN = (
    "the example input does not reach it: the layers that read it compute the same whatever it holds, so nothing can "
    "be proven; give an example_input that reaches it"
)
