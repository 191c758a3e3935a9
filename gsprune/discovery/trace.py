"""torch-pruning's dependency graph of a network: one traced forward pass.

An attention that the graph cannot follow (nn.MultiheadAttention, rotary positions, grouped queries) is one opaque step
to it, and so is a layer that mixes units or whose weight is laid out in another way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from gsprune.discovery.observe import AttentionCall, Observation, grown, untraced
from gsprune.structures.example import Example, call, map_tensors, tensors_in
from gsprune.structures.matrices import is_conv1d
from gsprune.text.display import first_line

TYPE = tp.ops.OPTYPE
CONV = nn.modules.conv._ConvNd
CONV1D = "a Conv1D of transformers (as in GPT-2), whose units are not found: use nn.Linear"


@dataclass(frozen=True, eq=False)
class Trace:
    """A network's dependency graph, and what its nodes do not tell."""

    model: nn.Module
    graph: Any
    names: Mapping[nn.Module, str]
    rank: Mapping[str, int]  # module name -> place in module order
    calls: Counter[nn.Module]
    inputs: frozenset[Any]  # grad_fns of the model's inputs
    outputs: frozenset[Any]  # grad_fns of the model's outputs
    owners: Counter[int]  # id(parameter) -> how many modules hold it
    attentions: Mapping[str, AttentionCall | None]  # module name of every opaque attention; None: nn.MultiheadAttention
    broken: Mapping[Any, str]  # nodes of the graph that it could not follow -> why


class _Opaque(torch.autograd.Function):
    """One node in the place of all that a module does."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *inputs: Tensor) -> Tensor:
        return value.clone()


def _why_opaque(name: str, module: nn.Module, attentions: Collection[str]) -> str | None:
    """Why a group ends at this module, which the graph cannot follow."""
    if name in attentions:
        return f"it passes the attention {name!r}, whose outer width stays"
    if is_conv1d(module):
        return f"it passes {name!r}, {CONV1D}"
    return "it passes an RMSNorm, which mixes units" if type(module).__name__.endswith("RMSNorm") else None


@contextmanager
def _opaque(module: nn.Module, reason: str) -> Iterator[None]:
    """Inside the block the module's output depends on its inputs by a single node, which knows why it ends groups."""
    forward: Callable[..., Any] = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # inside another opaque module
            return forward(*args, **kwargs)
        with torch.no_grad():
            result = forward(*args, **kwargs)
        inputs = [t for t in tensors_in((args, kwargs)) if t.requires_grad]
        first, *rest = result if isinstance(result, tuple) else (result,)
        value = _Opaque.apply(first, *inputs)
        if value.grad_fn is not None:
            value.grad_fn.reason = reason
        return (value, *rest) if isinstance(result, tuple) else value

    module.forward = run
    try:
        yield
    finally:
        del module.forward


def trace_graph(observed: Observation, args: Example) -> Trace:
    """The dependency graph of the network that was observed, by one more forward pass.

    Raises:
        ValueError: torch-pruning cannot trace it.
    """
    model, names = observed.model, observed.names
    inputs: list[Any] = []
    outputs: list[Any] = []
    modes = [(module, module.training) for module in model.modules()]

    def mark(value: Tensor) -> Tensor:
        marked = grown(value)  # its second clone is a node the graph can show
        if marked is not value:
            inputs.append(marked.grad_fn)
        return marked

    def forward(model: nn.Module, args: Example) -> list[Tensor]:
        for module, mode in modes:  # torch-pruning switches to evaluation
            module.training = mode
        found = [t for t in tensors_in(call(model, map_tensors(mark, args))) if t.grad_fn is not None]
        outputs.extend(t.grad_fn for t in found)
        return found

    attentions: dict[str, AttentionCall | None] = {
        name: None for module, name in names.items() if isinstance(module, nn.MultiheadAttention)
    }
    for found in observed.attentions:
        if not found.is_plain and found.consumer and found.producers:
            attentions[common_module([*found.producers, found.consumer])] = found
    graph = tp.DependencyGraph()
    with ExitStack() as stack:
        for module, name in names.items():
            if (reason := _why_opaque(name, module, attentions)) is not None:
                stack.enter_context(_opaque(module, reason))
        broken: dict[Any, str] = {}
        try:
            with _each_mapping_alone(broken):
                graph.build_dependency(model, args, forward_fn=forward, verbose=False)
        except Exception as error:
            raise untraced(model, error) from error
    for node, reason in broken.items():
        for dependency in [d for other in (*node.inputs, *node.outputs) for d in other.dependencies]:
            if dependency.target is node:
                dependency.index_mapping = [_Refusing(reason)]
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    rank = {name: place for place, name in enumerate(names.values())}
    marks = frozenset(inputs), frozenset(outputs)
    return Trace(model, graph, names, rank, observed.calls, *marks, owners, attentions, broken)


@contextmanager
def _each_mapping_alone(broken: dict[Any, str]) -> Iterator[None]:
    """Inside the block a reshape, split or concatenation that the dependency graph fails on costs the groups that pass
    it, not the network: `broken` has its node and the error."""
    index_mapping = tp.dependency.index_mapping
    names = [f"update_{kind}_index_mapping" for kind in ("concat", "split", "reshape", "unbind", "expand", "slice")]

    def guarded(function: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def update(graph: Any, node: Any) -> None:
            try:
                function(graph, node)
            except Exception as error:
                broken[node] = f"{op_name(node) or 'an operation'} cannot be followed ({first_line(error)})"

        return update

    with ExitStack() as stack:
        for name in names:
            function = getattr(index_mapping, name)
            stack.callback(setattr, index_mapping, name, function)
            setattr(index_mapping, name, guarded(function))
        yield


# ---- one dependency group -> one structure, or the reason why not


class Unprunable(Exception):
    """Why a group is not offered."""


@dataclass(frozen=True)
class _Refusing:
    """In the place of an index mapping: a group that comes here is refused at once, large ones take seconds."""

    reason: str

    def __call__(self, positions: Any) -> Any:
        raise Unprunable(self.reason)


def op_name(node: Any) -> str:
    """The autograd name of an operation; "" for a module."""
    is_operation = node.type in (TYPE.ELEMENTWISE, TYPE.RESHAPE) and hasattr(node.grad_fn, "name")
    return str(node.grad_fn.name()) if is_operation else ""


def common_module(names: Sequence[str]) -> str:
    parts = [name.split(".")[:-1] for name in names]
    common = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return ".".join(common)
