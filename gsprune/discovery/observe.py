"""What one forward pass shows without the dependency graph: which modules are called, and the attentions.

An attention that the graph cannot follow (nn.MultiheadAttention, rotary positions, grouped queries) is read off the
calls of `scaled_dot_product_attention` and the linear layers around them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gsprune.structures.attention import attention_kernel, set_attention_kernel
from gsprune.structures.example import Example, call, map_tensors
from gsprune.structures.running import called_modules, counted, hooked
from gsprune.text.display import first_line


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of scaled_dot_product_attention and the linear layers around it."""

    producers: tuple[str, ...]  # names of the query, key and value layers, as far as each is a single one
    consumer: str | None
    head_dims: tuple[int, int]  # of query and key, of value
    is_plain: bool  # the dependency graph can follow it: the heads go straight from the layers into the call


@dataclass(frozen=True, eq=False)
class Observation:
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


def observe(model: nn.Module, args: Example) -> Observation:
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
        linears = (module for module in model.modules() if isinstance(module, nn.Linear))
        stack.enter_context(hooked(module.register_forward_hook(note) for module in linears))
        try:
            with _Watch() as watch:
                call(model, map_tensors(grown, args))
        except Exception as error:
            raise untraced(model, error) from error
    return Observation(model, names, calls, tuple(_attentions(watch, made, read)))


def grown(value: Tensor) -> Tensor:
    """A copy with a history of its own, so that inputs can be told from constants."""
    if not value.is_floating_point():
        return value
    return value.clone().requires_grad_().clone()


def untraced(model: nn.Module, error: Exception) -> ValueError:
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


def check_static(observed: Observation, args: Example) -> None:
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
