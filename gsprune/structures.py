"""Find what can be removed: conv channels, hidden neurons, attention heads, and every tensor they live in.

Coupled tensors come from torch-pruning's dependency graph (one traced forward pass on a float64 copy). Each
of its groups becomes a `Structure`, or a line that says why it cannot be pruned. Scores, masks and cutting
are not here.
Attentions that the graph cannot follow (nn.MultiheadAttention, rotary positions, grouped queries) are read off
the calls of one forward pass instead, and are one opaque step to the graph.
May import: torch, torch_pruning, gsprune.attention, gsprune.names. Used by criteria, pruner and shrink.

Legend: u = unit, a position = an index along one dimension of one tensor.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.overrides import TorchFunctionMode

from gsprune.attention import GROUP_NAMES, HEAD_NAMES, WIDTH_NAMES, why_not_narrow
from gsprune.examples import (
    Example,
    call,
    copy_of,
    map_tensors,
    outputs,
    plain,
    same_randomness,
    tensors_in,
    to_precision,
)
from gsprune.matrices import check_shapes
from gsprune.names import check_patterns, choose
from gsprune.proof import Masked, inputs_like, rounds_on, sift, unproven, wake_scales_

Kind = Literal["channels", "neurons", "heads"]

_TYPE = tp.ops.OPTYPE
_CONV = nn.modules.conv._ConvNd
_VALUE_NAMES = ("v", "value", "v_proj", "value_proj", "to_v", "v_lin", "wv", "w_v")
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_CONV1D = "a Conv1D of transformers (as in GPT-2), whose units are not found: use nn.Linear"
_MIXING = {
    _TYPE.LN: "it passes a LayerNorm, which mixes units",
    _TYPE.GN: "it passes a GroupNorm, which mixes units",
    _TYPE.IN: "it passes an InstanceNorm, which is not supported",
    _TYPE.EMBED: "it is coupled to an embedding",
    _TYPE.PARAMETER: "it is combined with a bare parameter (an embedding or a scale)",
    _TYPE.MHA: "it passes an nn.MultiheadAttention, whose outer width stays",
    _TYPE.LSTM: "it is coupled to an LSTM",
}


@dataclass(frozen=True, eq=False)
class Member:
    """One dimension of one tensor that a structure cuts.

    `index` is int64 (units, width) on the CPU: row u lists unit u's positions along `dim` (0 rows, 1 columns)
    of `tensor`, a name in `model.state_dict()`; `size` is the dense length of that dimension. `in_order`: whether the
    positions are 0, 1, 2, ... `size` - 1, one unit after the other.
    """

    tensor: str
    dim: int
    index: Tensor
    size: int
    in_order: bool | None = None

    def __repr__(self) -> str:
        units, width = self.index.shape
        return f"Member({self.tensor!r}, dim {self.dim}: {units} units x {width} of {self.size} positions)"

    def __post_init__(self) -> None:
        if self.in_order is None:  # read off once, on the CPU: a copy on another device takes it over
            flat = self.index.flatten()
            ordered = len(flat) == self.size and torch.equal(flat, torch.arange(self.size))
            object.__setattr__(self, "in_order", ordered)


@dataclass(frozen=True, eq=False)
class Structure:
    """Units that live in the same tensors; removing unit u removes its positions from every member.

    name        module name of the first producer in module order; for heads that of the attention module
    units       how many there are; of grouped-query attention a unit is a key/value head with its query heads
    producers   weights and biases whose rows compute the unit (depthwise convolutions and gates included)
    consumers   weights whose columns read it: with these at zero the unit contributes exactly nothing
    norms       per-channel tensors on the way that are cut along: BatchNorm's four, PReLU's slopes
    gates       the tensors whose sum of w * g over unit u is the gradient of a gate on its pre-activation
    attributes  module attribute -> amount per unit; its new value is amount * kept units
    """

    name: str
    kind: Kind
    units: int
    producers: tuple[Member, ...]
    consumers: tuple[Member, ...]
    norms: tuple[Member, ...]
    gates: tuple[Member, ...]
    attributes: Mapping[str, int]

    def __repr__(self) -> str:
        parts = [f"{len(self.producers)} producing", f"{len(self.norms)} norm", f"{len(self.consumers)} reading"]
        return f"Structure({self.name!r}: {self.units} {self.kind}; {', '.join(parts)} tensors)"

    def modules(self) -> tuple[str, ...]:
        """Names of the modules that produce the units."""
        return tuple(dict.fromkeys(member.tensor.rpartition(".")[0] for member in self.producers))


@dataclass(frozen=True)
class Found:
    """What `find_structures` offers, in module order, what `include` and `exclude` left out of it, and why the rest is
    left alone (name -> reason)."""

    structures: tuple[Structure, ...]
    left_out: tuple[Structure, ...]
    skipped: Mapping[str, str]

    def __repr__(self) -> str:
        kinds = Counter[str]()
        for structure in self.structures:
            kinds[structure.kind] += structure.units
        units = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        first = f"Found {len(self.structures)} structures ({units})" if kinds else "Found no structures"
        lines = [f"{first}, left out {len(self.left_out)}, skipped {len(self.skipped)}"]
        lines += _few([f"  {s.name}: {s.units} {s.kind}" for s in self.structures])
        return "\n".join([*lines, *_few([f"  - {name}: {why}" for name, why in self.skipped.items()])])

    def _repr_html_(self) -> str:
        rows = [(s.name, str(s.units), str(s.kind)) for s in self.structures]
        rows += [(s.name, str(s.units), f"{s.kind}, left out") for s in self.left_out]
        return html_table(("name", "units", "what"), [*rows, *((name, "", why) for name, why in self.skipped.items())])


def _few(lines: list[str], count: int = 8) -> list[str]:
    return lines if len(lines) <= count + 1 else [*lines[:count], f"  ... {len(lines) - count} more"]


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """For notebooks; every text is escaped.

    >>> html_table(["a"], [["<b>"]])
    '<table><tr><th>a</th></tr><tr><td>&lt;b&gt;</td></tr></table>'
    """
    lines = [("th", head), *(("td", row) for row in rows)]
    cells = ("".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in line) for tag, line in lines)
    return f"<table>{''.join(f'<tr>{cell}</tr>' for cell in cells)}</table>"


def find_structures(
    model: nn.Module, example_input: Example, *, include: Iterable[str] = ("*",), exclude: Iterable[str] = ()
) -> Found:
    """Find the channels, neurons and heads of `model` that can be removed exactly.

    A structure is offered only if zeroing its consumers' columns makes the unit contribute nothing; this is
    tested on the example input. `include` and `exclude` are `*` patterns for a structure's name or for the
    name of any module that produces it. `model` is not touched: all work happens on a float64 copy in
    evaluation mode (about a dozen forward passes, more where structures break; copies take 8 to 24 bytes a parameter).

    Raises ValueError when the model cannot be traced, calls other modules for other inputs, is quantised or on
    another device than the example, or when a pattern matches nothing.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> found = find_structures(net, torch.zeros(1, 4))
    >>> [(s.name, s.kind, s.units) for s in found.structures], dict(found.skipped)
    ([('0', 'neurons', 3)], {'2': "it feeds the model's output"})
    """
    check_patterns(include, exclude)
    twin, args = _copy(model, example_input, torch.float32)  # half the time where values do not matter
    with same_randomness(twin), torch.enable_grad():
        observed = _observe(twin, args)
        if wake(twin, args, observed.calls):
            observed = _observe(twin, args)
        _check_static(observed, args)
        twin, args = to_precision(twin, torch.float64), map_tensors(lambda t: plain(t, torch.float64), args)
        trace = _trace(observed, args)
        structures, skipped = _convert(trace)
        traced = len(structures)
        structures, unfit = _prove(twin, args, structures)
    skipped |= unfit
    offered = {s.name: s for s in structures}
    if traced and not offered and tuple(include) == ("*",):
        return Found((), (), skipped)
    names = {name: (name, *s.modules()) for name, s in offered.items()}
    chosen = choose(names, tuple(include), tuple(exclude), skipped=skipped)
    left_out = tuple(structure for name, structure in offered.items() if name not in chosen)
    return Found(tuple(offered[name] for name in chosen), left_out, skipped)


def float64_copy(model: nn.Module, example_input: Example) -> tuple[nn.Module, Example]:
    """An evaluation-mode float64 copy of model and input (on the CPU for MPS, which has no float64).

    Attention kernels without float64 give way to the fused one that has it.
    """
    return _copy(model, example_input, torch.float64)


def _copy(model: nn.Module, example_input: Example, dtype: torch.dtype) -> tuple[nn.Module, Example]:
    refuse_wrapped(model)
    _refuse_unknown(model)
    _check_device(model, example_input)
    mps = any(p.device.type == "mps" for p in model.parameters())
    twin = to_precision(copy_of(model).to(device="cpu" if mps else None), dtype).eval()
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    if "flash" in _attention_kernel(twin) or "flex" in _attention_kernel(twin):
        _set_attention_kernel(twin, "sdpa")

    def convert(value: Tensor) -> Tensor:
        return plain(value.cpu() if mps else value, dtype)  # on the CPU first: MPS has no float64

    return twin, map_tensors(convert, example_input)


def _attention_kernel(model: nn.Module) -> str:
    """The name of transformers' attention function; "" for other models."""
    return str(getattr(getattr(model, "config", None), "_attn_implementation", None) or "")


def _set_attention_kernel(model: nn.Module, name: str) -> None:
    model.set_attn_implementation(name)  # type: ignore[operator]


def wake(twin: nn.Module, args: Example, calls: Mapping[nn.Module, int]) -> bool:
    """Switch to training what has children, if that runs parts with parameters that are not in `calls`; whether it did.

    Auxiliary heads are such parts. Modules without children (BatchNorm, Dropout) stay in evaluation.
    """
    whole = [m for m in twin.modules() if isinstance(m, nn.MultiheadAttention)]  # it does not call what it holds
    inside = {m for attention in whole for m in attention.modules()}
    owners = [m for m in twin.modules() if any(p is not None for p in m._parameters.values())]
    asleep = [m for m in owners if m not in calls and m not in inside]
    if not asleep:
        return False
    for module in twin.modules():
        module.training = any(True for _ in module.children()) and module not in inside
    awake = _called(twin, args)
    if awake is not None and any(m in awake for m in asleep):
        return True
    twin.eval()
    return False


def _called(twin: nn.Module, args: Example) -> Counter[nn.Module] | None:
    """How often each module is called; None where the model does not run."""
    calls: Counter[nn.Module] = Counter()
    with counted(twin, calls):
        try:
            outputs(twin, args)
        except Exception:
            return None
    return calls


@contextmanager
def counted(model: nn.Module, calls: Counter[nn.Module]) -> Iterator[None]:
    """Inside the block, `calls` counts how often each module is called."""
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_hook(lambda m, *_: calls.update([m])).remove)
        yield


def _refuse_unknown(model: nn.Module) -> None:
    """ValueError for layers whose weights cannot be read as rows and columns."""
    check_shapes(model)
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        packed = isinstance(module, nn.Linear | _CONV) and weight is not None and weight.dtype in _INTEGERS
        homes = [type(module).__module__, type(weight.data).__module__ if weight is not None else ""]
        if packed or any(part in home for home in homes for part in (".quantized", "bitsandbytes", "torchao")):
            raise ValueError(f"{name!r} is a quantised {type(module).__name__}: prune first, quantise afterwards")


def _check_device(model: nn.Module, example_input: Example) -> None:
    """Models spread over several devices move their inputs themselves."""
    homes = {p.device for p in model.parameters()}
    if any(home.type == "meta" for home in homes):
        raise ValueError("the model is on the meta device, which holds no values: build it on another one")
    for tensor in tensors_in(example_input, floating=False) if len(homes) == 1 else ():
        if tensor.dim() and tensor.device not in homes:
            home = next(iter(homes))
            raise ValueError(f"the model is on {home} and the example input on {tensor.device}: move one of them")


def refuse_wrapped(model: nn.Module) -> None:
    """ValueError for wrappers that keep parameters of their own or a compiled copy."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("the model is a program of torch.jit, pass the model that it was made from")
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        inner = "_orig_mod" if hasattr(model, "_orig_mod") else "module"
        raise ValueError(f"{type(model).__name__} is a wrapper, pass the model inside it (.{inner})")


# ---- tracing


@dataclass(frozen=True, eq=False)
class _Attention:
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
    attentions: tuple[_Attention, ...]


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


def _observe(model: nn.Module, args: Example) -> _Observed:
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
        if _attention_kernel(model) == "eager":
            stack.callback(_set_attention_kernel, model, "eager")
            with suppress(ValueError, ImportError):  # a model without it
                _set_attention_kernel(model, "sdpa")
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
    return ValueError(f"{type(model).__name__} cannot be traced on the example input: {_first_line(error)}")


def _attentions(watch: _Watch, made: Mapping[Any, str], read: Sequence[tuple[str, Any]]) -> Iterator[_Attention]:
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
        yield _Attention(producers, next(iter(readers.get(out, [None])), None), head_dims, is_plain)


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


def _check_static(observed: _Observed, args: Example) -> None:
    """Raise for a model that calls other modules on another input than on the example: those ways are not seen."""

    def other(value: Tensor) -> Tensor:
        if not value.dim():
            return value
        return -1.5 * value if value.is_floating_point() else value.flip(-1)

    calls = _called(observed.model, map_tensors(other, args))
    if calls is None:
        return
    for module in observed.names:
        if bool(calls[module]) != bool(observed.calls[module]):
            model, name = type(observed.model).__name__, observed.names[module]
            raise ValueError(
                f"{model} cannot be traced: {name!r} is called for some inputs only (dynamic control flow)"
            )


@dataclass(frozen=True, eq=False)
class _Trace:
    model: nn.Module
    graph: Any
    names: Mapping[nn.Module, str]
    rank: Mapping[str, int]  # module name -> place in module order
    calls: Counter[nn.Module]
    inputs: frozenset[Any]  # grad_fns of the model's inputs
    outputs: frozenset[Any]  # grad_fns of the model's outputs
    owners: Counter[int]  # id(parameter) -> how many modules hold it
    attentions: Mapping[str, _Attention | None]  # module name of every opaque attention; None: nn.MultiheadAttention
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


def _trace(observed: _Observed, args: Example) -> _Trace:
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

    attentions: dict[str, _Attention | None] = {
        name: None for module, name in names.items() if isinstance(module, nn.MultiheadAttention)
    }
    attentions |= {_home_of(a): a for a in observed.attentions if not a.is_plain and a.consumer and a.producers}
    graph = tp.DependencyGraph()
    with ExitStack() as stack:
        for module, name in names.items():
            if name in attentions:
                stack.enter_context(_opaque(module, f"it passes the attention {name!r}, whose outer width stays"))
            elif _is_conv1d(module):
                stack.enter_context(_opaque(module, f"it passes {name!r}, {_CONV1D}"))
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
    return _Trace(model, graph, names, rank, observed.calls, *marks, owners, attentions, broken)


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
                broken[node] = f"{_op(node) or 'an operation'} cannot be followed ({_first_line(error)})"

        return update

    with ExitStack() as stack:
        for name in names:
            function = getattr(index_mapping, name)
            stack.callback(setattr, index_mapping, name, function)
            setattr(index_mapping, name, guarded(function))
        yield


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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _home_of(attention: _Attention) -> str:
    return _common_module([*attention.producers, attention.consumer or ""])


# ---- one dependency group -> one structure, or the reason why not


class _Unprunable(Exception):
    """Why a group is not offered."""


@dataclass(frozen=True)
class _Refusing:
    """In the place of an index mapping: a group that comes here is refused at once, large ones take seconds."""

    reason: str

    def __call__(self, positions: Any) -> Any:
        raise _Unprunable(self.reason)


@dataclass(frozen=True, eq=False)
class _Item:
    node: Any
    reads: bool  # the unit is read here (columns); else computed or passed on
    positions: Tensor  # (n,)
    roots: Tensor  # (n,) the unit each position belongs to


@dataclass(frozen=True, eq=False)
class _Group:
    trace: _Trace
    units: int
    items: tuple[_Item, ...]

    def of(self, *types: Any, reads: bool | None = None) -> list[_Item]:
        """Items of these node types, in module order."""
        found = [i for i in self.items if i.node.type in types and reads in (None, i.reads)]
        return sorted(found, key=lambda i: self.trace.rank[self.name(i)])

    def name(self, item: _Item) -> str:
        return self.trace.names[item.node.module]

    def producers(self) -> list[_Item]:
        return self.of(_TYPE.CONV, _TYPE.DEPTHWISE_CONV, _TYPE.LINEAR, reads=False)

    def consumers(self) -> list[_Item]:
        return self.of(_TYPE.CONV, _TYPE.LINEAR, reads=True)

    def norms(self) -> list[_Item]:
        return [i for i in self.of(_TYPE.BN, _TYPE.PRELU) if not _is_scalar_prelu(i.node.module)]


def _convert(trace: _Trace) -> tuple[list[Structure], dict[str, str]]:
    structures: list[Structure] = []
    skipped: dict[str, str] = {}
    groups = [part for raw in _raw_groups(trace, skipped) for part in _parts(_group(trace, raw))]
    for name, attention in trace.attentions.items():
        try:
            structures.append(
                _packed_heads(trace, name) if attention is None else _called_heads(trace, name, attention)
            )
        except _Unprunable as reason:
            skipped[name] = str(reason)
    for group in sorted(groups, key=lambda g: trace.rank[g.name(g.producers()[0])]):
        try:
            structures.append(_rename(_structure(group), {s.name for s in structures}))
        except _Unprunable as reason:
            skipped[group.name(group.producers()[0])] = str(reason)
    for module, name in trace.names.items():
        if _is_conv1d(module):
            skipped[name] = f"it is {_CONV1D}"
        elif any(p.is_complex() for p in module.parameters(recurse=False)):
            skipped[name or type(module).__name__] = "it has complex weights, which are not supported"
        elif isinstance(module, nn.RNNBase):
            kind = type(module).__name__
            skipped[name or kind] = f"it is a recurrent layer ({kind}), whose units are not supported"
    structures.sort(key=lambda s: trace.rank[s.modules()[0]])
    return structures, skipped


def _raw_groups(trace: _Trace, skipped: dict[str, str]) -> Iterator[Any]:
    """torch-pruning's groups, each once; a layer whose group cannot be made is skipped with the reason."""
    graph, seen = trace.graph, set()
    with _mappings_as_built():
        for module in [m for m in graph.module2node if isinstance(m, nn.Linear | _CONV)]:
            if module in seen:
                continue
            pruner = graph.get_pruner_of_module(module)
            try:
                units = range(pruner.get_out_channels(module))
                raw = graph.get_pruning_group(module, pruner.prune_out_channels, list(units))
                if not units:
                    raise _Unprunable("it has no units")
            except Exception as error:
                skipped[trace.names[module]] = (
                    str(error) if isinstance(error, _Unprunable) else f"it cannot be followed ({_first_line(error)})"
                )
                continue
            seen |= {dep.target.module for dep, _ in raw if graph.is_out_channel_pruning_fn(dep.handler)}
            yield raw


def _rename(structure: Structure, taken: set[str]) -> Structure:
    """Two halves of a concatenated residual stream share their first producer: the second takes its own."""
    name = next((n for n in (structure.name, *structure.modules()) if n not in taken), structure.name)
    assert name not in taken, f"two structures called {name}"
    return replace(structure, name=name)


def _group(trace: _Trace, raw: Any) -> _Group:
    def item(entry: Any) -> _Item:
        node = entry.dep.target
        reads = node.type in (_TYPE.CONV, _TYPE.LINEAR) and not trace.graph.is_out_channel_pruning_fn(entry.dep.handler)
        # -1 marks a position whose unit torch-pruning lost (repeated key/value heads)
        roots = [-1 if root is None else root for root in entry.root_idxs]
        return _Item(node, reads, torch.tensor(entry.idxs), torch.tensor(roots))

    return _Group(trace, len(raw[0].idxs), tuple(item(entry) for entry in raw))


def _parts(group: _Group) -> list[_Group]:
    """Separate units that live in different tensors: x + cat(a, b) couples one half of x to a, the other to b.

    Where the halves come from a split, an uneven cut would move its border: such a group stays whole (and fails).
    """
    if any(item.node.type in (_TYPE.SPLIT, _TYPE.SLICE, _TYPE.UNBIND) for item in group.items):
        return [group]
    known = [item.roots[item.roots >= 0] for item in group.items if item.node.module in group.trace.names]
    counts = torch.stack([torch.bincount(roots, minlength=group.units) for roots in known])
    _, classes = torch.unique(counts, dim=1, return_inverse=True)
    return [_part(group, classes == c) for c in dict.fromkeys(classes.tolist())]


def _part(group: _Group, members: Tensor) -> _Group:
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


def _structure(group: _Group) -> Structure:
    for item in group.items:
        _check(group, item)
    if not group.consumers():
        raise _Unprunable("it feeds the model's output")
    return _enough_units(_heads(group) if _is_attention(group) else _plain(group))


def _check(group: _Group, item: _Item) -> None:
    """Raise for a node that does not keep units apart, or that cannot be cut."""
    node = item.node
    if node in group.trace.broken:
        raise _Unprunable(group.trace.broken[node])
    if hasattr(node.grad_fn, "reason") and node.type != _TYPE.MHA:
        raise _Unprunable(node.grad_fn.reason)
    if node.type in _MIXING:
        raise _Unprunable(_MIXING[node.type])
    if not item.reads and (node.type == _TYPE.OUTPUT or node.grad_fn in group.trace.outputs):
        raise _Unprunable("it feeds the model's output")
    if node.grad_fn in group.trace.inputs:
        raise _Unprunable("it is combined with the model's input")
    if node.module in group.trace.names:
        _check_module(group.trace, node.module)


def _check_module(trace: _Trace, module: nn.Module) -> None:
    name = trace.names[module]
    if trace.calls[module] > 1:
        raise _Unprunable(f"{name!r} is called {trace.calls[module]} times in one forward pass")
    for leaf in ("weight", "bias"):
        if getattr(module, leaf, None) is not None and leaf not in {**module._parameters, **module._buffers}:
            raise _Unprunable(f"the {leaf} of {name!r} is computed from other tensors ({_how_computed(module)})")
    if any(trace.owners[id(p)] > 1 for p in module.parameters(recurse=False)):
        raise _Unprunable(f"{name!r} shares its weight with another module")
    if isinstance(module, _CONV):
        _check_conv(name, module)


def _how_computed(module: nn.Module) -> str:
    if any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values()):
        return "torch.nn.utils.prune: call its remove() first"
    return "a parametrisation, as weight_norm or spectral_norm: remove it first"


def _is_conv1d(module: nn.Module) -> bool:
    """Of transformers (GPT-2): a linear layer whose weight is transposed."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def _check_conv(name: str, conv: nn.modules.conv._ConvNd) -> None:
    if conv.transposed:
        raise _Unprunable(f"{name!r} is a transposed convolution")
    if conv.groups > 1 and not conv.groups == conv.in_channels == conv.out_channels:
        raise _Unprunable(f"{name!r} is a grouped convolution")


def _plain(group: _Group) -> Structure:
    """Channels or neurons: one unit a row of the first producer."""
    producers = group.producers()
    gates = _gates(group)
    if not gates:
        raise _Unprunable("its BatchNorm has no weight and bias to see its gate in")
    return Structure(
        name=group.name(producers[0]),
        kind="channels" if isinstance(producers[0].node.module, _CONV) else "neurons",
        units=group.units,
        producers=_members(group, producers),
        consumers=_members(group, group.consumers(), dim=1),
        norms=_members(group, group.norms()),
        gates=gates,
        attributes={},
    )


def _members(group: _Group, items: Iterable[_Item], *, dim: int = 0) -> tuple[Member, ...]:
    """Rows (dim 0) of every per-unit tensor of the items' modules, or columns (dim 1) of their weights."""
    members = []
    for item in items:
        tensors = dict(item.node.module.named_parameters(recurse=False))
        tensors |= dict(item.node.module.named_buffers(recurse=False))
        for leaf, tensor in tensors.items():
            if tensor.dim() > dim and (dim == 0 or leaf == "weight"):
                name = f"{group.name(item)}.{leaf}" if group.name(item) else leaf
                members.append(Member(name, dim, _index(group, item, tensor.shape[dim]), tensor.shape[dim]))
    return tuple(members)


def _index(group: _Group, item: _Item, size: int) -> Tensor:
    """(units, width) positions, each row sorted; raises when units do not get the same number of them."""
    counts = torch.bincount(item.roots[item.roots >= 0], minlength=group.units)
    known = bool((item.roots >= 0).all()) and int(item.positions.max()) < size
    if not known or int(counts.min()) != int(counts.max()):
        raise _Unprunable(f"its units are split, sliced or repeated in front of {group.name(item)!r}")
    order = torch.argsort(item.roots * size + item.positions)
    return item.positions[order].reshape(group.units, -1)


def _is_scalar_prelu(module: Any) -> bool:
    return isinstance(module, nn.PReLU) and module.num_parameters == 1


# ---- gates


def _gates(group: _Group) -> tuple[Member, ...]:
    """Affine pairs of the BatchNorms that read the producers first, and bare producers' own rows.

    Scaling a unit in front of a BatchNorm changes nothing, so its gate shows in that norm's weight and bias.
    A producer that is (also) read without a norm shows that part of the gate in its own rows.
    """
    norms, bare = set(), []
    for item in group.producers():
        found, is_bare = _first_norms(item.node)
        norms |= found
        bare += [item] if is_bare else []
    items = [item for item in group.of(_TYPE.BN) if item.node in norms]
    affine = [m for m in _members(group, items) if m.tensor.rpartition(".")[2] in ("weight", "bias")]
    return (*affine, *_members(group, bare))


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
        if node.type == _TYPE.BN:
            norms.add(node)
        elif node.type in (_TYPE.CONV, _TYPE.LINEAR):
            is_bare = True
        else:
            stack.extend(node.outputs)
    return norms, is_bare


# ---- attention heads


def _is_attention(group: _Group) -> bool:
    return any("ScaledDotProduct" in _op(i.node) or "Softmax" in _op(i.node) for i in group.items)


def _op(node: Any) -> str:
    """The autograd name of an operation; "" for a module."""
    is_operation = node.type in (_TYPE.ELEMENTWISE, _TYPE.RESHAPE) and hasattr(node.grad_fn, "name")
    return str(node.grad_fn.name()) if is_operation else ""


def _heads(group: _Group) -> Structure:
    """Attention heads: consecutive rows of separate query, key and value projections."""
    producers = group.producers()
    if len(producers) < 3 or not all(isinstance(i.node.module, nn.Linear) for i in producers):
        raise _Unprunable("its softmax does not belong to an attention with separate q, k, v Linear layers")
    name = _common_module([group.name(i) for i in producers])
    heads = _head_count(group, name)
    head_dim = group.units // heads
    structure = Structure(
        name=name or group.name(producers[0]),
        kind="heads",
        units=heads,
        producers=_members(group, producers),
        consumers=_members(group, group.consumers(), dim=1),
        norms=_members(group, group.norms()),
        gates=_members(group, [_value(group)]),
        attributes=_attributes(group.trace.model, name, heads=heads, head_dim=head_dim),
    )
    return _merge_units(structure)


def _common_module(names: Sequence[str]) -> str:
    parts = [name.split(".")[:-1] for name in names]
    common = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return ".".join(common)


def _head_count(group: _Group, name: str) -> int:
    module = group.trace.model.get_submodule(name)
    for attribute in HEAD_NAMES:
        heads = getattr(module, attribute, None)
        if type(heads) is int and heads > 0 and group.units % heads == 0:
            return heads
    allowed = ", ".join(HEAD_NAMES)
    raise _Unprunable(f"no head count on {name or 'the model'!r} divides its width {group.units} ({allowed})")


def _attributes(model: nn.Module, name: str, *, heads: int, head_dim: int) -> dict[str, int]:
    module, prefix = model.get_submodule(name), f"{name}." if name else ""
    counts = {prefix + a: 1 for a in HEAD_NAMES if getattr(module, a, None) == heads}
    widths = {prefix + a: head_dim for a in WIDTH_NAMES if getattr(module, a, None) == heads * head_dim}
    return counts | widths


def _packed_heads(trace: _Trace, name: str) -> Structure:
    """Heads of an nn.MultiheadAttention: query, key and value rows in one tensor, or in three."""
    module = trace.model.get_submodule(name)
    assert isinstance(module, nn.MultiheadAttention)
    reason = why_not_narrow(module)
    if reason is not None:
        raise _Unprunable(reason)
    _check_called(trace, module)
    _check_module(trace, module)
    _check_module(trace, module.out_proj)
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
    return _enough_units(
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


def _called_heads(trace: _Trace, name: str, attention: _Attention) -> Structure:
    """Heads around one call of scaled_dot_product_attention: one unit a key head, with the query heads it serves."""
    if len(set(attention.producers)) != 3:
        raise _Unprunable("its attention has no query, key and value from a Linear layer of their own")
    assert attention.consumer is not None
    layers = [_linear(trace.model, n) for n in (*attention.producers, attention.consumer)]
    for layer in layers:
        _check_called(trace, layer)
        _check_module(trace, layer)
    query, key, value, reader = layers
    heads = _whole(query.weight.shape[0], attention.head_dims[0])
    groups = _whole(key.weight.shape[0], attention.head_dims[0])
    is_fitting = _whole(value.weight.shape[0], attention.head_dims[1]) == groups and heads % groups == 0
    if not is_fitting or reader.weight.shape[1] != heads * attention.head_dims[1]:
        raise _Unprunable("its query, key, value and output layers do not hold whole heads that fit each other")
    if groups == 1 and heads > 1:
        raise _Unprunable("it has a single key/value head (multi-query attention), which all query heads need")

    def members(layer_name: str, layer: nn.Linear, dim: int) -> tuple[Member, ...]:
        size = layer.weight.shape[dim]
        index = torch.arange(size).reshape(groups, -1)
        leaves = [leaf for leaf, p in layer._parameters.items() if p is not None and p.dim() > dim]
        return tuple(Member(f"{layer_name}.{leaf}", dim, index, size) for leaf in (leaves if dim == 0 else ["weight"]))

    made = [members(n, layer, 0) for n, layer in zip(attention.producers, layers[:3], strict=True)]
    home = _common_module(attention.producers)
    module, prefix = trace.model.get_submodule(home), f"{home}." if home else ""
    attributes = _attributes(trace.model, home, heads=heads, head_dim=attention.head_dims[1])
    attributes = {n: amount * heads // groups for n, amount in attributes.items()}
    attributes |= {prefix + a: 1 for a in GROUP_NAMES if getattr(module, a, None) == groups}
    return _enough_units(
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
        raise _Unprunable("its query, key, value and output layers do not hold whole heads that fit each other")
    return width // head_dim


def _enough_units(structure: Structure) -> Structure:
    if structure.units < 2:
        raise _Unprunable("it has a single unit")
    return structure


def _check_called(trace: _Trace, module: nn.Module) -> None:
    if not trace.calls[module]:
        raise _Unprunable(f"{trace.names[module]!r} is not called on the example input")


def _value(group: _Group) -> _Item:
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
        raise _Unprunable(f"its value projection is not known (allowed names: {', '.join(_VALUE_NAMES)})")
    return found[0]


def _value_inputs(node: Any) -> list[Any]:
    if "ScaledDotProduct" in _op(node):
        return list(node.inputs[2:3])
    return [] if "Softmax" in _op(node) else list(node.inputs)


def _merge_units(structure: Structure) -> Structure:
    """From one unit a row to one unit a head: (heads * head_dim, width) -> (heads, head_dim * width)."""

    def merge(members: tuple[Member, ...]) -> tuple[Member, ...]:
        return tuple(replace(m, index=m.index.reshape(structure.units, -1)) for m in members)

    return replace(
        structure,
        producers=merge(structure.producers),
        consumers=merge(structure.consumers),
        norms=merge(structure.norms),
        gates=merge(structure.gates),
    )


# ---- the proof: zero columns -> the unit contributes nothing


def _prove(twin: nn.Module, args: Example, structures: list[Structure]) -> tuple[list[Structure], dict[str, str]]:
    """The structures that can be cut exactly, and why the others cannot. Works on the twin and its copies alone."""
    from gsprune.shrink import sift_cuts  # the room above, which cuts: a structure is offered only if that is exact

    if not structures:
        return [], {}
    wake_scales_(twin, args)
    masked = Masked(twin, rounds_on(inputs_like(twin, args)))
    silent, leaking = sift(structures, masked.leak)
    hidden = {s.name: _HIDDEN for s in unproven(silent, masked.shown(silent))}
    kept, broken = sift_cuts(masked, [s for s in silent if s.name not in hidden])
    return kept, {**leaking, **hidden, **broken}


_HIDDEN = (
    "the example shows nothing of it: what its readers compute stays the same whatever it holds, so nothing can be "
    "proven; give an example_input that reaches it"
)
