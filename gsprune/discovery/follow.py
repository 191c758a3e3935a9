"""One forward pass with labels on every tensor: what each operation says of the atoms of parameters and buffers."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from gsprune.discovery.labels import WITH_CONSTANT, Atoms, Log, Value, derived, dims_of, joined, squeezed
from gsprune.discovery.ops import Call, bent, expand, overwritten, repeat, rule_of, tensors_of, unknown
from gsprune.discovery.ops import stream_norm as normalised
from gsprune.structures.attention import no_fast_path
from gsprune.structures.example import Example, answers_in, call, map_tensors, tensors_in
from gsprune.structures.norms import stream_norm
from gsprune.structures.running import counted, hooked
from gsprune.structures.twin import copy_of, every_tensor
from gsprune.surgery.averages import averaged_dims
from gsprune.surgery.narrow_forward import (
    What,
    asks_for_shape,
    depthwise_weight,
    forget_means,
    kind_of,
    running_module,
    size_name,
    sized_parts,
    takes_sizes,
)
from gsprune.surgery.readings import is_reader, own_dim
from gsprune.text.display import first_line

_KEY = "_gsprune_value"
_OF = "_gsprune_of"
_VIEWS = {"slice", "select", "narrow", "transpose", "permute", "unsqueeze", "squeeze", "view", "t", "diagonal"}
OUTPUT = "it feeds the model's output"


class _Follower(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives every result its value. Operations without a rule are taken apart where ATen can."""

    def __init__(self, log: Log) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.log = log
        self.steps: list[tuple[Log, set[int]]] = []  # what each operation says, and those that made its arguments
        self.fills: set[int] = set()  # copies into tensors that were made for them, as caches: no answer needs them
        self.is_asleep = 0  # inside of a module that is a rule of its own

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = rule_of(func)
        if rule is None and not self.is_asleep:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if not self.is_asleep:
            self._label(rule, func, _bound(func, args, kwargs), result)
        return result

    def behind(self, steps: Iterable[int]) -> set[int]:
        """The operations that something depends on: what others say (of weights that nobody looks at) means nothing."""
        found: set[int] = set()
        open_ = {step for step in steps if step >= 0}
        while open_:
            step = open_.pop()
            found.add(step)
            open_ |= {s for s in self.steps[step][1] if s >= 0} - found
        return found

    def fall_asleep(self) -> None:
        self.is_asleep += 1

    def wake_up(self, name: str, kind: str, axis: int, norm: nn.Module, inputs: Any, output: Any) -> None:
        """After a norm over a stream; what is done to labels meanwhile is not followed."""
        (x, *_) = tensors_of(inputs)
        self.log.inside = name
        this = self._call(None, {"input": x, **norm._parameters}, output)
        this.log.bent += [layer.reshape(-1) for layer in value_of(x).layers]
        value = normalised(this, axis % x.dim(), kind)
        setattr(output, _KEY, replace(value, step=len(self.steps) - 1))
        self.is_asleep -= 1

    def _label(self, rule: Callable[[Call], Any] | None, func: Any, arguments: dict[str, Any], result: Any) -> None:
        makes = rule is not None and (rule.__name__.startswith("blank") or rule in (expand, repeat))
        if not makes and not any(hasattr(t, _KEY) for t in tensors_of(arguments.values())):
            return
        this = self._call(func, arguments, result)
        this.log.bent += bent(this)
        if rule is overwritten and this.first().is_blank:
            self.fills.add(this.step)
        try:
            values = (rule or unknown)(this)
        except Exception as error:  # it costs the units that are met here
            values = unknown(this)
            self._explain(this, error)
        _keep(this, values, *self.steps[-1][1:])

    def _call(self, func: Any, arguments: dict[str, Any], result: Any) -> Call:
        log = Log(self.log.atoms, inside=self.log.inside, is_told=self.log.is_told)
        self.steps.append((log, {value_of(t).step for t in tensors_of(arguments.values())}))
        return Call(log, func, arguments, result, value_of, len(self.steps) - 1)

    def _explain(self, this: Call, error: Exception) -> None:
        for value in this.values():
            for layer in value.layers:
                this.log.pin(layer, f"it passes aten.{this.name}, which cannot be followed ({first_line(error)})")


class _Sizes(TorchFunctionMode):
    """Notes the atoms along every size that a module's own forward pass asks for, names or averages over."""

    def __init__(self, follower: _Follower) -> None:
        super().__init__()
        self.follower, self.log = follower, follower.log
        self.names: dict[nn.Module, str] = {}
        self.calls: dict[nn.Module, Counter[str]] = {}  # what each module has called since it was called

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        dims = averaged_dims(func, args, kwargs) if not self.follower.is_asleep else []
        self.log.is_told = bool(dims) and running_module() in self.calls
        if dims:
            self.log.inside = ""  # a norm that is a function has no module
        result = func(*args, **kwargs)
        if dims:
            self._note("mean", [(d, args[0], d) for d in dims])
            self.log.is_told = False
        elif asks_for_shape(func):
            self._note("shape", [(d, args[0], d) for d in range(args[0].dim())])
        elif takes_sizes(func, args, kwargs):
            self._note(kind_of(func), sized_parts(func, args, kwargs, result))
        elif (weight := depthwise_weight(func, args, kwargs)) is not None:
            self._note("size", [(0, weight, 0)])
        return result

    def _note(self, what: What, parts: Iterable[tuple[int, Tensor, int]]) -> None:
        module = running_module()
        if module not in self.calls:
            return
        calls = self.calls[module]
        for number, part, dim in parts:
            for layer in value_of(part).on(dim):
                line = layer.movedim(dim, 0).reshape(layer.shape[dim], -1)[:, 0]
                self.log.sizes.setdefault(size_name(self.names[module], what, calls[what], number), []).append(line)
        calls[what] += 1

    def hooks(self, model: nn.Module) -> Iterator[RemovableHandle]:
        for name, module in model.named_modules():
            self.names[module] = name
            yield module.register_forward_pre_hook(lambda m, _: self.calls.update({m: Counter()}))


def _bound(func: Any, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by their names in ATen's schema, defaults included."""
    named = {}
    for place, argument in enumerate(func._schema.arguments):
        if place < len(args):
            named[argument.name] = args[place]
        elif argument.name in kwargs:
            named[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            named[argument.name] = argument.default_value
    return named


def value_of(tensor: Any) -> Value:
    """What is known of a tensor; nothing of one that was made outside of the forward pass."""
    found = getattr(tensor, _KEY, None)
    return found if found is not None else Value(tuple(tensor.shape))


def _keep(this: Call, values: Any, before: set[int]) -> None:
    results = this.result if isinstance(this.result, tuple | list) else [this.result]
    values = values if isinstance(values, tuple | list) else [values]
    for result, value in zip(results, values, strict=False):
        if not isinstance(result, Tensor):
            continue
        if value is None:
            value = derived(this.values(), tuple(result.shape))
        setattr(result, _KEY, replace(value, step=this.step))
        if this.func._schema.is_mutable:
            _write_through(this, result, value, before)
        elif this.name in _VIEWS and len(results) == 1:
            setattr(result, _OF, (this.arguments, this.func))


def _write_through(this: Call, part: Tensor, value: Value, steps: set[int]) -> None:
    """What is written into a part of a tensor is known of the whole as well; a part without entries says nothing."""
    if not part.numel():
        return
    while (of := getattr(part, _OF, None)) is not None:
        arguments, func = of
        whole, *rest = arguments.values()
        before = value_of(whole)
        steps.add(before.step)
        layers = []
        for layer in _side_by_side(this.log, value, before):
            made = _known(before).clone()
            place, layer = func(made, *rest), layer.expand(value.shape)
            if not before.is_blank:  # one place in memory, which both have
                both = (place > 0) & (layer > 0)
                this.log.tie(place[both], layer[both])
            place.copy_(layer)
            layers.append(squeezed(_filled(made) if before.is_blank else made, range(made.dim())))
        if before.is_blank:
            layers = joined(this.log, [replace(value, shape=before.shape, layers=tuple(layers)), before], before.shape)
        if not value.layers and not before.is_blank:
            layers = list(before.layers)
        is_input, makers = before.is_input or value.is_input, before.makers | value.makers
        known = tuple(x for x in layers if dims_of(x))
        value = replace(before, layers=known, is_blank=False, is_input=is_input, makers=makers, step=this.step)
        setattr(whole, _KEY, value)
        part = whole


def _side_by_side(log: Log, value: Value, whole: Value) -> Iterable[Tensor]:
    """Of the layers of a part those that go on with what is known of the whole beside it; the rest stays."""
    beside = {d for d, (n, size) in enumerate(zip(value.shape, whole.shape, strict=False)) if n != size}
    if len(value.layers) < 2 or len(value.shape) != len(whole.shape) or not beside:
        return value.layers
    known = value.layers if whole.is_blank or not whole.layers else whole.layers
    widest = max((dims_of(layer) - beside for layer in known), key=len)
    fitting = [layer for layer in value.layers if dims_of(layer) - beside == widest]
    for layer in value.layers:
        if not any(layer is other for other in fitting):
            log.pin(layer, WITH_CONSTANT)
    return fitting


def _filled(layer: Tensor) -> Tensor:
    """Of a part that is written into a tensor of one number: what goes along a dimension goes along the rest of it."""
    for dim in range(layer.dim()):
        first = layer.amax(dim, keepdim=True)
        if bool(((layer == first) | (layer == 0)).all()):
            layer = first
    return layer


def _known(value: Value) -> Tensor:
    for layer in value.layers if not value.is_blank else ():
        return layer.expand(value.shape)
    return torch.zeros(value.shape, dtype=torch.int64)


# ---- the model


def follow(model: nn.Module, args: Example) -> tuple[Log, Counter[nn.Module]]:
    """What one forward pass says of the units of a network, and how often it calls each of its modules.

    Works on a copy that shares the tensors.

    Raises:
        ValueError: the forward pass fails.
    """
    log = Log(Atoms())
    twin = copy_of(model, sharing=True)
    forget_means(twin)
    calls: Counter[nn.Module] = Counter()
    with ExitStack() as stack:
        stack.enter_context(_labelled(twin, log))
        _tie_recurrent(log, twin)
        follower = _Follower(log)
        sizes = _Sizes(follower)
        stack.enter_context(hooked(sizes.hooks(twin)))
        stack.enter_context(hooked(_leaves(twin, follower)))
        stack.enter_context(hooked(_readers(twin, log)))
        stack.enter_context(counted(twin, calls))
        reads = stack.enter_context(_Reads(twin))
        for context in (torch.inference_mode(), no_fast_path(), _decomposed(twin), _Ordered(), follower, sizes):
            stack.enter_context(context)
        try:
            outputs = call(twin, map_tensors(_input, args))
        except Exception as error:
            problem = f"cannot be traced on the example input: {first_line(error)}"
            raise ValueError(f"{type(model).__name__} {problem}") from error
        given = [value_of(tensor) for tensor in answers_in(outputs, floating=False)]
    behind = follower.behind(value.step for value in given) | follower.fills
    for step, (said, _) in enumerate(follower.steps):
        if step in behind or not said.pins:  # what no answer needs has to run as well
            log.take(said)
    for layer in (layer for value in given for layer in value.layers):
        log.pin(layer, OUTPUT)
    log.unread = [*reads.left.values()]
    mine, theirs = [*dict(model.named_modules())], [*dict(twin.named_modules())]
    if mine != theirs:
        changed = next(a or b for a, b in zip_longest(mine, theirs) if a != b)
        raise ValueError(
            f"{type(model).__name__} puts other modules in the place of its own as it runs (near {changed!r}): call it "
            "once on an input like the example's first"
        )
    pairs = zip(model.modules(), twin.modules(), strict=True)
    return log, Counter({mine: calls[theirs] for mine, theirs in pairs if calls[theirs]})


class _Reads(TorchFunctionMode):
    """Which vectors that a module holds itself no function is given: a token that only training puts in some places."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        own = {
            id(p)
            for module in model.modules()
            if not type(module).__module__.startswith("torch.nn.modules")
            for p in module._parameters.values()
        }
        vectors = [(n, p) for n, p in model.named_parameters() if p.numel() == max(p.shape, default=0) > 1]
        self.left = {id(p): name for name, p in vectors if id(p) in own}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors_in((args, kwargs or {})) if self.left else ():
            self.left.pop(id(tensor), None)
        return func(*args, **(kwargs or {}))


def _input(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    setattr(copy, _KEY, Value(tuple(copy.shape), is_input=True))
    return copy


@contextmanager
def _decomposed(model: nn.Module) -> Iterator[None]:
    """Inside the block recurrent layers, if the network has any, run step by step."""
    if not any(isinstance(module, nn.RNNBase | nn.RNNCellBase) for module in model.modules()):
        yield
        return
    before = torch.backends.mkldnn.set_flags(_enabled=False)  # type: ignore[no-untyped-call]
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mkldnn.set_flags(*before)  # type: ignore[no-untyped-call]


class _Ordered(TorchFunctionMode):
    """Einsums whose letters are in the order in which they are written: torch sums over them in alphabetical order,
    and the places inside of heads must not come before the heads."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.einsum and isinstance(args[0], str):
            letters = "".join(dict.fromkeys(filter(str.isalpha, args[0])))
            args = (args[0].translate(str.maketrans(letters, LETTERS[: len(letters)])), *args[1:])
        return func(*args, **(kwargs or {}))


LETTERS = string.ascii_uppercase + string.ascii_lowercase


@contextmanager
def _labelled(model: nn.Module, log: Log) -> Iterator[None]:
    """Inside the block every parameter and floating buffer has its value, and so has a mask of one dimension."""
    kernels = {
        id(module._parameters.get("weight"))
        for module in model.modules()
        if isinstance(module, nn.modules.conv._ConvNd)
    }
    marked = []
    try:
        for name, tensor in every_tensor(model).items():
            is_mask = tensor.dtype == torch.bool and tensor.numel() == max(tensor.shape, default=1)
            if tensor.is_floating_point() or tensor.is_complex() or is_mask:
                dims = range(min(2, tensor.dim()) if id(tensor) in kernels else tensor.dim())
                value = log.atoms.value_of(name, tensor, dims)
                setattr(tensor, _KEY, value)
                marked.append(tensor)
                for layer in value.layers if tensor.is_complex() else ():
                    log.pin(layer, "it has complex weights, which are not supported")
        yield
    finally:
        for tensor in marked:
            delattr(tensor, _KEY)


def _tie_recurrent(log: Log, model: nn.Module) -> None:
    """The layers and directions of a recurrent module have one width, and one of what they project to."""
    for module in model.modules():
        for prefix in ("weight_hh", "weight_hr") if isinstance(module, nn.RNNBase) else ():
            read = [value_of(p).on(1) for name, p in module._parameters.items() if name.startswith(prefix)]
            for layers in read[1:]:
                for one, other in zip(read[0], layers, strict=True):
                    log.tie(one, other)


def _readers(model: nn.Module, log: Log) -> Iterator[Any]:
    """What the outputs of layers are labelled with beside their own channels is noted."""

    def note(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            own, value = own_dim(module) % max(output.dim(), 1), value_of(output)
            found = [(dim, layer) for layer in value.off(own) for dim in dims_of(layer) if len(dims_of(layer)) == 1]
            log.beside.setdefault(name, []).extend(found)

    for name, module in model.named_modules():
        if is_reader(module):
            yield module.register_forward_hook(partial(note, name))


def _leaves(model: nn.Module, follower: _Follower) -> Iterator[Any]:
    """Norms over streams are one step, of whatever operations they are made; of others the name is noted."""
    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm):
            yield module.register_forward_pre_hook(lambda *_, name=name: setattr(follower.log, "inside", name))
        norm = stream_norm(module)
        if norm is not None:
            kind = "LayerNorm" if norm.kind == "layer" else "RMSNorm"
            yield module.register_forward_pre_hook(lambda *_: follower.fall_asleep())
            yield module.register_forward_hook(
                lambda m, i, o, name=name, kind=kind, axis=norm.axis: follower.wake_up(name, kind, axis, m, i, o)
            )
