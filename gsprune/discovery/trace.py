"""One forward pass, seen twice: the calls of attention kernels, and torch-pruning's dependency graph.

An attention that the graph cannot follow (nn.MultiheadAttention, rotary positions, grouped queries) is one opaque step
to it and is read off its calls instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gsprune.structures.example import (
    Example,
    call,
    map_tensors,
    tensors_in,
)
from gsprune.structures.twin import attention_kernel, called_modules, counted, set_attention_kernel

TYPE = tp.ops.OPTYPE
CONV = nn.modules.conv._ConvNd
CONV1D = "a Conv1D of transformers (as in GPT-2), whose units are not found: use nn.Linear"


# ---- tracing


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of scaled_dot_product_attention and the linear layers around it."""

    producers: tuple[str, ...]  # names of the query, key and value layers, as far as each is a single one
    consumer: str | None
    head_dims: tuple[int, int]  # of query and key, of value
    is_plain: bool  # the dependency graph can follow it: the heads go straight from the layers into the call


@dataclass(frozen=True, eq=False)
class _Observed:
    """What one forward pass shows without the dependency graph."""

    model: nn.Module
    names: Mapping[nn.Module, str]
    calls: Counter[nn.Module]
    attentions: tuple[AttentionCall, ...]


class _Watch(TorchFunctionMode):
    """Keeps the ends of every attention call: (query, key, value) nodes, output node, head widths, head counts."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[list[Any], Any, tuple[int, int], tuple[int, int]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs or {})
            q, k, v = (named[name] for name in ("query", "key", "value"))
            ends = [t.grad_fn for t in (q, k, v)]
            self.seen.append((ends, out.grad_fn, (q.shape[-1], v.shape[-1]), (q.shape[-3], k.shape[-3])))
        return out


def observe(model: nn.Module, args: Example) -> _Observed:
    """One forward pass with gradients, every attention through scaled_dot_product_attention where the model can."""
    names = {module: name for name, module in model.named_modules()}
    calls: Counter[nn.Module] = Counter()
    made: dict[Any, str] = {}  # the node of a linear layer's output -> its name
    read: list[tuple[str, Any]] = []  # a linear layer and the node of its input

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            made[output.grad_fn] = names[module]
            read.append((names[module], getattr(inputs[0], "grad_fn", None) if inputs else None))

    with ExitStack() as stack:
        if attention_kernel(model) == "eager":
            stack.callback(set_attention_kernel, model, "eager")
            with suppress(ValueError, ImportError):  # a model without it
                set_attention_kernel(model, "sdpa")
        stack.enter_context(counted(model, calls))
        for module in model.modules():
            if isinstance(module, nn.Linear):
                stack.callback(module.register_forward_hook(note).remove)
        try:
            with _Watch() as watch:
                call(model, map_tensors(_grown, args))
        except Exception as error:
            raise _untraced(model, error) from error
    return _Observed(model, names, calls, tuple(_attentions(watch, made, read)))


def _grown(value: Tensor) -> Tensor:
    """A copy with a history of its own, so that inputs can be told from constants."""
    if not value.is_floating_point():
        return value
    return value.clone().requires_grad_().clone()


def _untraced(model: nn.Module, error: Exception) -> ValueError:
    return ValueError(f"{type(model).__name__} cannot be traced on the example input: {first_line(error)}")


def _attentions(watch: _Watch, made: Mapping[Any, str], read: Sequence[tuple[str, Any]]) -> Iterator[AttentionCall]:
    ends = {out for _, out, _, _ in watch.seen}
    readers: dict[Any, list[str]] = {}
    for name, node in read:
        found, _ = _walk_back(node, {*made, *ends})
        if found and found <= ends and len(found) == 1:
            readers.setdefault(next(iter(found)), []).append(name)
    for inputs, out, head_dims, (heads, groups) in watch.seen:
        walks = [_walk_back(node, set(made)) for node in inputs]
        producers = tuple(made[next(iter(found))] for found, _ in walks if len(found) == 1)
        is_plain = heads == groups and not any(_is_cut(op) for _, ops in walks for op in ops)
        yield AttentionCall(producers, next(iter(readers.get(out, [None])), None), head_dims, is_plain)


def _is_cut(op: str) -> bool:
    """Whether an operation takes tensors apart or puts them together, as rotary positions and repeated keys do."""
    return any(part in op for part in ("Cat", "Stack", "Slice", "Split", "Complex", "Repeat", "Expand"))


def _walk_back(start: Any, stops: set[Any]) -> tuple[set[Any], set[str]]:
    """The nodes of `stops` met first on the ways back from a node, and the names of the operations between."""
    found: set[Any] = set()
    ops: set[str] = set()
    stack, seen = [start], {None}
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in stops:
            found.add(node)
        else:
            ops.add(node.name())
            stack.extend(parent for parent, _ in node.next_functions)
    return found, ops


def check_static(observed: _Observed, args: Example) -> None:
    """Raise for a model that calls other modules on another input than on the example: those ways are not seen."""

    def other(value: Tensor) -> Tensor:
        if not value.dim():
            return value
        return -1.5 * value if value.is_floating_point() else value.flip(-1)

    calls = called_modules(observed.model, map_tensors(other, args))
    if calls is None:
        return
    for module in observed.names:
        if bool(calls[module]) != bool(observed.calls[module]):
            model, name = type(observed.model).__name__, observed.names[module]
            raise ValueError(
                f"{model} cannot be traced: {name!r} is called for some inputs only (dynamic control flow)"
            )


@dataclass(frozen=True, eq=False)
class Trace:
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


def trace_graph(observed: _Observed, args: Example) -> Trace:
    model, names = observed.model, observed.names
    inputs: list[Any] = []
    outputs: list[Any] = []
    modes = [(module, module.training) for module in model.modules()]

    def mark(value: Tensor) -> Tensor:
        marked = _grown(value)  # its second clone is a node the graph can show
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
    attentions |= {_home_of(a): a for a in observed.attentions if not a.is_plain and a.consumer and a.producers}
    graph = tp.DependencyGraph()
    with ExitStack() as stack:
        for module, name in names.items():
            if name in attentions:
                stack.enter_context(_opaque(module, f"it passes the attention {name!r}, whose outer width stays"))
            elif is_conv1d(module):
                stack.enter_context(_opaque(module, f"it passes {name!r}, {CONV1D}"))
            elif type(module).__name__.endswith("RMSNorm"):
                stack.enter_context(_opaque(module, "it passes an RMSNorm, which mixes units"))
        broken: dict[Any, str] = {}
        try:
            with _each_mapping_alone(broken):
                graph.build_dependency(model, args, forward_fn=forward, verbose=False)
        except Exception as error:
            raise _untraced(model, error) from error
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


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _home_of(attention: AttentionCall) -> str:
    return common_module([*attention.producers, attention.consumer or ""])


# ---- one dependency group -> one structure, or the reason why not


class Unprunable(Exception):
    """Why a group is not offered."""


@dataclass(frozen=True)
class _Refusing:
    """In the place of an index mapping: a group that comes here is refused at once, large ones take seconds."""

    reason: str

    def __call__(self, positions: Any) -> Any:
        raise Unprunable(self.reason)


def is_conv1d(module: nn.Module) -> bool:
    """Of transformers (GPT-2): a linear layer whose weight is transposed."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


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
