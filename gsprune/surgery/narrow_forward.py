"""Modules whose forward pass insists on widths that a cut changes: `x.view(n, 64)`, `C // num_heads`, sizes of a split.

Such a module runs the same forward pass with the numbers of the dense network: shapes that it asks for are the dense
ones, its attributes stay. Where it names sizes (`view`, `expand`, `repeat`, `unflatten`, `split`; `zeros` of new
tensors; `x[:, :64]` and `x[:, 64:]`; `chunk`, whose parts may be unequal; groups of depthwise convolutions that are
functions), the sizes that are left are put in. What it averages over (`mean`, `var`, `std`, `layer_norm` and other
norms as functions) goes on having the dense number of entries, those that are gone as zeros
(`gsprune.surgery.averages`). `narrow_forward` does that in place. Calls are counted in the order in which the module
itself makes them, each kind by itself (a cache may take the place of new tensors, and must not shift the rest); those
of the modules that it calls are theirs.

Names in a cut plan: "blocks.0.attn.size:2:1" is what dimension 1 (of a split: part 1) has to be in call number 2,
"blocks.0.attn.fill:0:1" the same of a new tensor, "blocks.0.attn.slice:0:1" of what a slice takes of dimension 1 (of a
chunk: part 1),
"blocks.0.attn.shape:0:2" what dimension 2 of the first tensor is said to be whose shape is asked for, and
"blocks.0.attn.mean:0:2" how many entries the first average has along dimension 2.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gsprune.surgery.averages import averaged_dims, is_followed, length, note_gone, virtual_average
from gsprune.text.names import joined

Numbers = Mapping[int, Mapping[int, int]]  # call -> dimension -> number
What = Literal["size", "shape", "dense", "left", "mean", "fill", "filled", "slice", "sliced"]
_NAME = re.compile(rf"({'|'.join(get_args(What))}):(\d+):(\d+)")
_PARTNERS = {"size": "dense", "shape": "left", "fill": "filled", "slice": "sliced"}


def size_name(module: str, what: What, call: int, dim: int) -> str:
    """The name, in a cut plan, of a number that a module is told.

    >>> size_name("blocks.0.attn", "size", 2, 1), size_name("", "shape", 0, 3)
    ('blocks.0.attn.size:2:1', 'shape:0:3')
    """
    return joined(module, f"{what}:{call}:{dim}")


def is_size(name: str) -> bool:
    """Whether an attribute in a plan is one of these numbers."""
    return _NAME.fullmatch(name.rpartition(".")[2]) is not None


def is_shape(name: str) -> bool:
    """Whether it is a dense one, which no later cut changes."""
    return is_size(name) and name.rpartition(".")[2].startswith(("shape", "dense", "mean", "filled", "sliced"))


def is_mean(name: str) -> bool:
    """Whether it is the number of entries of an average."""
    return is_size(name) and name.rpartition(".")[2].startswith("mean")


def partner(name: str) -> str:
    """Of a size what the dense network asks for there, of a shape what is left: by both, other batches are told.

    >>> partner("blocks.0.attn.size:2:1"), partner("shape:0:2")
    ('blocks.0.attn.dense:2:1', 'left:0:2')
    """
    path, _, leaf = name.rpartition(".")
    what, colon, rest = leaf.partition(":")
    return joined(path, _PARTNERS.get(what, what) + colon + rest)


def module_of(name: str) -> str:
    """The module whose forward pass it is of."""
    return name.rpartition(".")[0]


def by_module(attributes: Mapping[str, int]) -> dict[str, dict[What, dict[int, dict[int, int]]]]:
    """The numbers among a plan's attributes, by the module that is told them.

    >>> numbers = by_module({"a.size:2:1": 8, "a.size:2:3": 4, "a.num_heads": 2})
    >>> {what: found for what, found in numbers["a"].items() if found}
    {'size': {2: {1: 8, 3: 4}}}
    """
    found: dict[str, dict[What, dict[int, dict[int, int]]]] = {}
    for name, value in attributes.items():
        if is_size(name):
            what, call, dim = name.rpartition(".")[2].split(":")
            mine = found.setdefault(module_of(name), {what: {} for what in get_args(What)})
            mine[what].setdefault(int(call), {})[int(dim)] = value  # type: ignore[index]
    return found


# ---- calls that ask for sizes, and that name them


def _is_tracing() -> bool:
    return bool(torch._C._get_tracing_state())


def scaled(number: int, by: int, of: int) -> int:
    """A number in proportion, where that is whole; else as it is.

    >>> scaled(2, 8, 4), scaled(2, 3, 4)
    (4, 2)
    """
    return number * by // of if of and number * by % of == 0 else number


def asks_for_shape(func: Callable[..., Any]) -> bool:
    return func is Tensor.size or func == _SHAPE


_SHAPE = Tensor.shape.__get__  # type: ignore[attr-defined]


def _told(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    said: Mapping[int, int],
    left: Mapping[int, int],
) -> Any:
    """A tensor's shape, or one size of it, with what is said of it instead: in proportion, as a batch may be in it."""
    shape = list(_SHAPE(args[0]))
    for d in said:  # torch.jit's sizes are tensors as it traces
        shape[d] = said[d] if _is_tracing() else scaled(said[d], shape[d], left.get(d, shape[d]))
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return torch.Size(shape) if dim is None else shape[dim]


def takes_sizes(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call names sizes as numbers. A view as another type does not."""
    if func in _SPLITS or func in _CHUNKS:
        return len(args) > 1
    if func in _SLICES:
        return bool(_slices(args))
    return (func in _RESHAPES or func in _FILLS or func in _STRIDED) and bool(_shape(func, args, kwargs)[1])


def kind_of(func: Callable[..., Any]) -> Literal["size", "fill", "slice"]:
    """Of a call that takes sizes: as what it is counted."""
    return "fill" if func in _FILLS else "slice" if func in _SLICES or func in _CHUNKS else "size"


def _shape(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, list[Any]]:
    """How many arguments stand before the sizes, and the sizes; [] where they are given in another way."""
    if func in _STRIDED:
        args, kwargs = _strided(args, kwargs), {}
    before = 2 if func in _UNFLATTEN else 0 if func in _FUNCTIONS else 1
    rest = args[before : before + 1] if func in _LEADING else args[before:]
    if len(rest) == 1 and isinstance(rest[0], tuple | list):
        rest = tuple(rest[0])
    if (kwargs and func not in _FILLS) or not all(_is_number(n) for n in rest):
        return before, []
    return before, list(rest)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):  # so torch.jit.trace hands out sizes
        return value.dim() == 0 and not value.is_floating_point()
    return not isinstance(value, bool) and isinstance(value, int | torch.SymInt)


_UNFLATTEN: set[Any] = {Tensor.unflatten, torch.unflatten}
_RESHAPES: set[Any] = {Tensor.view, Tensor.reshape, torch.reshape, Tensor.expand, Tensor.repeat, *_UNFLATTEN}
_FULL: set[Any] = {torch.full, Tensor.new_full}  # a number comes after the sizes
_STRIDED: set[Any] = {Tensor.as_strided, torch.as_strided}
_LEADING = _FULL | _STRIDED  # other arguments come after the sizes
_FUNCTIONS: set[Any] = {torch.zeros, torch.ones, torch.empty, torch.full}
_FILLS: set[Any] = {*_FUNCTIONS, *_FULL, Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty}
_SPLITS: set[Any] = {Tensor.split, torch.split, Tensor.split_with_sizes, torch.split_with_sizes}


_CHUNKS: set[Any] = {Tensor.chunk, torch.chunk}
_SLICES: set[Any] = {Tensor.__getitem__, Tensor.__setitem__}


def _slices(args: Sequence[Any]) -> list[tuple[int, int, int]]:
    """Of x[...] the slices [:n] and [n:]: the place in the index, the dimension of x and that of the result.

    >>> _slices((torch.zeros(2, 8, 4), (..., None, slice(3), slice(1, 2)))), _slices((torch.zeros(8), slice(3, None)))
    ([(2, 1, 2)], [(0, 0, 0)])
    """
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if not all(i is None or i is ... or isinstance(i, slice) or type(i) is int for i in index):
        return []  # tensors of positions
    rest = args[0].dim() - sum(i is not None and i is not ... for i in index)
    found, dim, there = [], 0, 0
    for place, item in enumerate(index):
        if item is ...:
            dim, there = dim + rest, there + rest
        elif item is None:
            there += 1
        elif type(item) is int:
            dim += 1
        else:
            if item.step in (None, 1) and _bound_of(item) is not None:
                found.append((place, dim, there))
            dim, there = dim + 1, there + 1
    return found


def _bound_of(part: slice) -> int | None:
    """The one number of [:n] or [n:]; None of other slices.

    >>> _bound_of(slice(0, 3)), _bound_of(slice(3, None)), _bound_of(slice(1, 3)), _bound_of(slice(None, -1))
    (3, 3, None, None)
    """
    first, last = part.start or 0, part.stop
    number = last if first == 0 else first if last is None else None
    return number if type(number) is int and number > 0 else None


def _resliced(args: Sequence[Any], wanted: Mapping[int, int], dense: Mapping[int, int]) -> tuple[Sequence[Any], bool]:
    """The arguments of x[...] with slices that take as much as is wanted, and whether that changes anything."""
    index = list(args[1]) if isinstance(args[1], tuple) else [args[1]]
    before = list(index)
    for place, dim, _ in _slices(args):
        if dim in wanted:
            old = index[place]
            if old.stop is None:
                index[place] = slice(max(_SHAPE(args[0])[dim] - wanted[dim], 0), None)
            else:
                index[place] = slice(old.start, scaled(wanted[dim], old.stop, dense.get(dim, old.stop)))
    return (args[0], tuple(index), *args[2:]), index != before


def _rechunked(args: Sequence[Any], kwargs: Mapping[str, Any], wanted: Mapping[int, int]) -> tuple[Sequence[Any], bool]:
    """What `torch.split` takes to give the wanted parts instead of those of a chunk, and whether they are others."""
    dim = int(args[2] if len(args) > 2 else kwargs.get("dim", 0))
    size = _SHAPE(args[0])[dim]
    each = -(-size // int(args[1])) or 1
    asked = [min(each, size - start) for start in range(0, size, each)]
    sizes = [wanted.get(i, n) for i, n in enumerate(asked)] if len(wanted) <= len(asked) else [*wanted.values()]
    times, rest = divmod(size, sum(sizes) or 1)
    sizes = asked if rest else [n * times for n in sizes]
    return (args[0], sizes, dim), sizes != asked


def sized_parts(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> list[tuple[int, Tensor, int]]:
    """Of a call that takes sizes: (number of the size, the result that has it, in which dimension).

    Of `repeat`, where one entry is repeated.
    """
    if func in _SLICES:
        part = args[0][args[1]] if result is None else result
        return [(dim, part, there) for _, dim, there in _slices(args)]
    if func in _SPLITS or func in _CHUNKS:
        dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
        parts = [(i, part, int(dim) % part.dim()) for i, part in enumerate(result)]
        return parts[:1] if _is_number(args[1]) and func in _SPLITS else parts
    new = result.dim() - args[0].dim() if func is Tensor.repeat else 0  # what is repeated in whole has no size
    whole = {d for d in range(new, result.dim()) if args[0].shape[d - new] != 1} if func is Tensor.repeat else set()
    return [(d, result, d) for d in range(result.dim()) if d not in whole]


def _resized(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    wanted: Mapping[int, int],
    dense: Mapping[int, int],
) -> tuple[Sequence[Any], bool]:
    """The arguments with the wanted sizes, and whether that changes anything. What is -1 follows from the others.

    Of a size that has the batch in it (batch * heads) another batch asks for a multiple, or a part, of the dense one.
    """

    def size(number: int, asked: Any) -> Any:
        if _is_tracing():  # sizes are tensors there
            return wanted.get(number, asked)
        return asked if number not in wanted or asked == -1 else scaled(wanted[number], asked, dense.get(number, asked))

    if func in _SPLITS:
        asked = args[1]
        new: Any = size(0, asked) if _is_number(asked) else [size(i, n) for i, n in enumerate(asked)]
        return (args[0], new, *args[2:]), new != (asked if _is_number(asked) else list(asked))
    args = _strided(args, kwargs) if func in _STRIDED else args
    before, sizes = _shape(func, args, kwargs)
    first = int(args[1]) % args[0].dim() if func in _UNFLATTEN else 0
    made = [size(first + d, asked) for d, asked in enumerate(sizes)]
    changed = _is_tracing() or any(old not in (-1, new) for old, new in zip(sizes, made, strict=True))
    after = args[before + 1 :] if func in _LEADING else ()
    return ((*args[:before], *made) if func not in _NESTED else (*args[:before], made, *after)), changed


_NESTED: set[Any] = {torch.reshape, *_UNFLATTEN, *_LEADING}  # the sizes are one argument


def _strided(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
    """The arguments of `as_strided`, which are often given by name, by their places."""
    names = ("input", "size", "stride", "storage_offset")
    return (*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs))


_CONVOLUTIONS: set[Any] = {F.conv1d, F.conv2d, F.conv3d}
_CONVOLVED = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def depthwise_weight(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The weight of a depthwise convolution that a module calls as a function: it names as many groups as channels."""
    if func not in _CONVOLUTIONS or isinstance(running_module(), nn.modules.conv._ConvNd):
        return None
    given = dict(zip(_CONVOLVED, args, strict=False)) | dict(kwargs)
    weight, groups = given["weight"], given.get("groups", 1)
    return weight if type(groups) is int and groups > 1 and weight.shape[1] == 1 else None


def _regrouped(args: Sequence[Any], kwargs: Mapping[str, Any], weight: Tensor) -> tuple[dict[str, Any], bool]:
    """Its arguments with as many groups as there are channels, and whether that changes anything."""
    given = dict(zip(_CONVOLVED, args, strict=False)) | dict(kwargs)
    groups = length(given["input"], 1 - weight.dim())
    return given | {"groups": groups}, groups != given["groups"]


# ---- who runs

_changed = threading.local()


def running_module() -> nn.Module | None:
    """The module whose forward pass (or whose hook) asks: the innermost that is being called."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code in _FORWARDS:
            return frame.f_locals["self"]  # type: ignore[no-any-return]
        frame = frame.f_back  # type: ignore[assignment]
    return None


class _Sizing(TorchFunctionMode):
    """Puts numbers into the calls that one module makes itself."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module, self.count = module, {"size": 0, "fill": 0, "slice": 0, "shape": 0, "mean": 0}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CONVOLUTIONS:
            return self._convolve(func, args, kwargs)
        if is_followed(func, args):
            result = func(*args, **kwargs)
            note_gone(func, args, kwargs, result)
            return result
        is_asking, dims = asks_for_shape(func), averaged_dims(func, args, kwargs)
        if not (is_asking or dims or takes_sizes(func, args, kwargs)) or not self._is_asked():
            return func(*args, **kwargs)
        if dims:
            counts = self._next(self.module.dense_means, "mean")
            return virtual_average(func, args, kwargs, counts) if counts else func(*args, **kwargs)
        if is_asking:
            left = self.module.shapes_left.get(self.count["shape"], {})
            said = self._next(self.module.dense_shapes, "shape")
            return _told(func, args, kwargs, said, left) if said else func(*args, **kwargs)
        what, own = kind_of(func), self.module
        left, before = {
            "fill": (own.fills_left, own.dense_fills),
            "slice": (own.slices_left, own.dense_slices),
            "size": (own.sizes_left, own.dense_sizes),
        }[what]
        dense = before.get(self.count[what], {})
        wanted = self._next(left, what)
        if not wanted:
            return func(*args, **kwargs)
        if func in _CHUNKS:
            args, changed = _rechunked(args, kwargs, wanted)
            func, kwargs = torch.split, {}
        elif func in _SLICES:
            args, changed = _resliced(args, wanted, dense)
        else:
            args, changed = _resized(func, args, kwargs, wanted, dense)
            kwargs = {} if func in _STRIDED else kwargs
        if changed:
            self._note_change()
        return func(*args, **kwargs)

    def _convolve(self, func: Any, args: Any, kwargs: Any) -> Any:
        weight = depthwise_weight(func, args, kwargs)
        if weight is None or not self._is_asked():
            return func(*args, **kwargs)
        self._next(self.module.sizes_left, "size")
        given, changed = _regrouped(args, kwargs, weight)
        if changed:
            self._note_change()
        return func(**given)

    def _note_change(self) -> None:
        modules: set[nn.Module] = getattr(_changed, "modules", set())
        modules.add(self.module)

    def _is_asked(self) -> bool:
        return running_module() is self.module

    def _next(self, numbers: Numbers, what: What) -> Mapping[int, int]:
        found = numbers.get(self.count[what], {})
        self.count[what] += 1
        return found


@contextmanager
def noting_changes() -> Iterator[set[nn.Module]]:
    """Inside the block the set takes the modules whose forward pass is given another size than it asks for."""
    _changed.modules = set()
    try:
        yield _changed.modules
    finally:
        del _changed.modules


# ---- the class


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """As the module's own class. A compiler runs it as it is: it would not see the numbers."""
    if any(isinstance(value, torch.fx.Proxy) for value in (*args, *kwargs.values())):
        kind = type(self).__name__
        raise ValueError(f"{kind} was cut and is told its sizes as it runs, so that torch.fx cannot trace it")
    with _Sizing(self):
        if self.own_forward is not None:
            return self.own_forward(*args, **kwargs)
        return super(NarrowForward, self).forward(*args, **kwargs)


_FORWARDS = (nn.Module._call_impl.__code__, _forward.__code__)


class NarrowForward:
    """A module that is told shapes and sizes; made by `narrow_forward` only."""

    dense_shapes: Numbers
    dense_sizes: Numbers
    dense_means: Numbers
    dense_fills: Numbers
    shapes_left: Numbers
    sizes_left: Numbers
    fills_left: Numbers
    dense_slices: Numbers
    slices_left: Numbers
    own_forward: Callable[..., Any] | None  # one that the module has beside that of its class

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (type(self).__mro__[2],), self.__dict__


@cache
def _narrow_class(cls: Any) -> Any:
    """With a forward pass that no compiler reads: `torch.compiler.disable` imports for two seconds."""
    forward = torch.compiler.disable(_forward)  # type: ignore[no-untyped-call]
    return type(cls.__name__, (NarrowForward, cls), {"__module__": cls.__module__, "forward": forward})


def _empty(cls: type[nn.Module]) -> nn.Module:
    narrow = _narrow_class(cast(Any, cls))
    made: nn.Module = narrow.__new__(narrow)
    return made


def narrow_forward(module: Any, numbers: Mapping[What, Numbers]) -> None:
    """Tell a module its sizes, in place: same object, same names. Shapes that it was told before stay.

    >>> class Flat(nn.Module):
    ...     def forward(self, x):
    ...         return x.view(-1, x.shape[1] * x.shape[2])
    >>> flat = Flat()
    >>> narrow_forward(flat, {"size": {0: {1: 4}}, "shape": {0: {1: 3}}})
    >>> type(flat).__name__, flat(torch.zeros(2, 2, 2)).shape
    ('Flat', torch.Size([2, 4]))
    """
    if not isinstance(module, NarrowForward):
        module.__class__ = _narrow_class(cast(Any, type(module)))
        module.dense_shapes, module.dense_sizes, module.dense_means, module.dense_fills = {}, {}, {}, {}
        module.dense_slices, module.own_forward = {}, vars(module).pop("forward", None)
    module.sizes_left = {call: dict(dims) for call, dims in numbers["size"].items()}
    module.shapes_left = {call: dict(dims) for call, dims in numbers.get("left", {}).items()}
    module.dense_shapes = _kept(module.dense_shapes, numbers.get("shape", {}))
    module.dense_sizes = _kept(module.dense_sizes, numbers.get("dense", {}))
    module.dense_means = _kept(module.dense_means, numbers.get("mean", {}))
    module.slices_left = {call: dict(dims) for call, dims in numbers.get("slice", {}).items()}
    module.dense_slices = _kept(module.dense_slices, numbers.get("sliced", {}))
    module.fills_left = {call: dict(dims) for call, dims in numbers.get("fill", {}).items()}
    module.dense_fills = _kept(module.dense_fills, numbers.get("filled", {}))


def forget_means(model: nn.Module) -> None:
    """Let all modules average over the entries that are there, for once: whose values do not matter, copied before."""
    for module in model.modules():
        if isinstance(module, NarrowForward):
            module.dense_means = {}


def _kept(before: Numbers, new: Numbers) -> Numbers:
    """What was said first stays."""
    return {**before, **{call: {**dims, **before.get(call, {})} for call, dims in new.items()}}
