"""What every operation does to labels: one rule for each kind, in tables by ATen's names.

A rule takes a `Call` and returns the value of its result, or those of its results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gsprune.discovery.labels import (
    NORMED,
    NOWHERE,
    UNPAIRED,
    WITH_CONSTANT,
    WITH_INPUT,
    Log,
    Value,
    aligned,
    derived,
    dims_of,
    joined,
    joined_layers,
    meet,
    put,
    read,
    reshaped,
    squeezed,
    without,
)

Result = Value | Sequence[Value | None]


@dataclass
class Call:
    """One call of an operation: its arguments by name, its tensors' values."""

    log: Log
    func: Any
    arguments: dict[str, Any]
    result: Any
    value: Callable[[Any], Value]
    step: int = -1

    @property
    def name(self) -> str:
        return short_name(self.func)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first result."""
        first = self.result[0] if isinstance(self.result, tuple | list) else self.result
        return tuple(first.shape)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def first(self) -> Value:
        return self.value(next(iter(self.arguments.values())))

    def values(self) -> list[Value]:
        """Of every tensor among the arguments."""
        return [self.value(t) for t in tensors_of(self.arguments.values())]


def tensors_of(arguments: Iterable[Any]) -> Iterable[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple | list):
            yield from tensors_of(argument)


def short_name(func: Any) -> str:
    """`add` of aten::add_.Tensor."""
    name = str(func._schema.name).removeprefix("aten::")
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def axis(dim: int, dims: int) -> int:
    return dim % dims if dims else 0


def axes(dims: Any, count: int) -> list[int]:
    """Dimensions as an operation takes them: one, several, None or [] for all."""
    if dims is None or (isinstance(dims, tuple | list) and not dims):
        return list(range(count))
    return [axis(d, count) for d in (dims if isinstance(dims, tuple | list) else [dims])]


# ---- entry by entry


def pointwise(call: Call) -> Value:
    values = call.values()
    if not any(value.is_input for value in values):
        call.log.computed += [layer.reshape(-1) for value in values for layer in value.layers]
    if call.name in SCALING:
        for value in values:
            if not value.is_input:
                for layer in value.layers:
                    call.log.mark(call.log.scales, layer)
    return derived(values, call.shape, joined(call.log, values, call.shape))


SCALING = {"mul", "div", "_prelu_kernel", "addcmul", "pow", "__and__"}


def same(call: Call) -> Value:
    """The first argument's labels."""
    return replace(call.first(), shape=call.shape)


def overwritten(call: Call) -> Value:
    """A tensor that takes another's entries; one that was made for that is as long."""
    value, before = call.value(call["src"]), call.first()
    mine = put(value, [aligned(layer, len(call.shape)) for layer in value.layers], call.shape)
    return put(mine, joined(call.log, [mine, before], call.shape), call.shape) if before.is_blank else mine


def per_place(call: Call) -> list[Value | None]:
    """Several results, the first of which is the first argument, entry by entry."""
    return [same(call), *[None] * (len(call.result) - 1)]


def blank(call: Call) -> Value:
    """What meets it along one dimension, at several places of the forward pass, has one length there."""
    dims = len(call.shape)
    made = call.result.is_floating_point()
    layers = [call.log.atoms.fresh(n, d, dims) for d, n in enumerate(call.shape) if made and 1 < n <= COPIES]
    return Value(call.shape, tuple(layers), is_blank=True)


def blank_like(call: Call) -> Value:
    value = call.first()
    return replace(value, is_blank=True) if call.shape == value.shape else blank(call)


def glu(call: Call) -> Value:
    value, dim = call.first(), axis(call["dim"], len(call.first().shape))
    half = value.shape[dim] // 2
    layers = []
    for layer in value.layers:
        if layer.shape[dim] > 1:
            call.log.tie(layer.narrow(dim, 0, half), layer.narrow(dim, half, half))
            layer = layer.narrow(dim, 0, half)
        layers.append(layer)
    return put(value, layers, call.shape)


# ---- shapes


def reshape(call: Call) -> Value:
    value = call.first()
    return put(value, reshaped(call.log, value, call.shape), call.shape)


def view(call: Call) -> Result:
    """An operation that moves entries: it is done to the labels."""
    value, (_, *rest) = call.first(), call.arguments.values()
    many = isinstance(call.result, tuple | list)
    shapes = [tuple(r.shape) for r in call.result] if many else [call.shape]
    layers: list[list[Tensor]] = [[] for _ in shapes]
    for layer in value.layers:
        moved = call.func(layer.expand(value.shape), *rest)
        for found, part in zip(layers, moved if many else [moved], strict=True):
            found.append(squeezed_view(part))
    made = [put(value, found, shape) for found, shape in zip(layers, shapes, strict=True)]
    return made if many else made[0]


def squeezed_view(layer: Tensor) -> Tensor:
    for dim in range(layer.dim()):
        if layer.stride(dim) == 0 and layer.shape[dim] > 1:
            layer = layer.narrow(dim, 0, 1)
    return layer


def as_strided(call: Call) -> Any:
    """Overlapping windows of a tensor, wherever in memory its entries lie."""
    value, tensor = call.first(), call["self"]
    length = tensor.untyped_storage().nbytes() // tensor.element_size()
    home = torch.arange(length).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    start = tensor.storage_offset() if call["storage_offset"] is None else call["storage_offset"]
    made = []
    for layer in value.layers:
        line = torch.zeros(length, dtype=torch.int64)
        line[home] = layer.expand(value.shape)
        made.append(squeezed(line.as_strided(call["size"], call["stride"], start), range(len(call.shape))))
    return put(value, made, call.shape)


def split(call: Call) -> Result:
    """Equal parts must stay equally long: what stands at the same place in each is noted."""
    value = call.first()
    dim = axis(call.arguments.get("dim", 0), len(value.shape))
    lengths = {r.shape[dim] for r in call.result}
    for layer in value.on(dim):
        if len(lengths) == 1 and len(call.result) > 1 and dims_of(layer) == {dim}:
            call.log.halves.append(layer.reshape(len(call.result), -1))
    return view(call)


def expand(call: Call) -> Value:
    """Along what is repeated, the copies are told apart, so that they may go with what they meet."""
    value, dims = call.first(), len(call.shape)
    before = (1,) * (dims - len(value.shape)) + value.shape
    layers = [aligned(layer, dims) for layer in value.layers]
    for dim, (old, new) in enumerate(zip(before, call.shape, strict=True)):
        if old == 1 and 1 < new <= COPIES:
            layers.append(call.log.atoms.fresh(new, dim, dims))
    return put(value, layers, call.shape)


COPIES = 4096  # more of them are no heads


def on_layers(call: Call) -> Value:
    """An operation that keeps the number of dimensions and leaves alone what has size 1."""
    value, (_, *rest) = call.first(), call.arguments.values()
    return put(value, [call.func(layer, *rest) for layer in value.layers], call.shape)


def repeat(call: Call) -> Value:
    """What has size 1 is repeated as `expand` does it."""
    value, times = call.first(), list(call["repeats"])
    layers = [aligned(layer, len(times)) for layer in value.layers]
    made = [
        layer.repeat([n if size > 1 else 1 for n, size in zip(times, layer.shape, strict=True)]) for layer in layers
    ]
    before = (1,) * (len(times) - len(value.shape)) + value.shape
    made += [
        call.log.atoms.fresh(n, dim, len(times))
        for dim, (n, size) in enumerate(zip(times, before, strict=True))
        if size == 1 and 1 < n <= COPIES
    ]
    return put(value, made, call.shape)


def repeat_interleave(call: Call) -> Value:
    value, dim = call.first(), call.arguments.get("dim")
    if dim is None or not isinstance(call["repeats"], int):
        return unknown(call)  # type: ignore[no-any-return]
    dim = axis(dim, len(value.shape))
    made = [x.repeat_interleave(call["repeats"], dim) if x.shape[dim] > 1 else x for x in value.layers]
    return put(value, made, call.shape)


def pad(call: Call) -> Value:
    """Constants around; along a labelled dimension they are entries without a label."""
    value, amounts, layers = call.first(), list(call["pad"]), []
    for layer in value.layers:
        mine = list(amounts)
        for place in range(len(mine) // 2):
            if layer.shape[layer.dim() - 1 - place] == 1:
                mine[2 * place : 2 * place + 2] = [0, 0]
        layers.append(torch.constant_pad_nd(layer, mine, 0))
    return put(value, layers, call.shape)


def pixel_shuffle(call: Call) -> Value:
    """(c * r * r, h, w) -> (c, h * r, w * r)."""
    value, r = call.first(), call["upscale_factor"]
    *batch, channels, height, width = value.shape
    count, places = len(batch), (channels // r**2, r, r, height, width)
    apart = put(value, reshaped(call.log, value, (*batch, *places)), (*batch, *places))
    order = [*range(count), *(count + i for i in (0, 3, 1, 4, 2))]
    turned = put(apart, [layer.permute(order) for layer in apart.layers], [(*batch, *places)[i] for i in order])
    return put(turned, reshaped(call.log, turned, call.shape), call.shape)


def pixel_unshuffle(call: Call) -> Value:
    value, r = call.first(), call["downscale_factor"]
    *batch, channels, height, width = value.shape
    count, places = len(batch), (channels, height // r, r, width // r, r)
    apart = put(value, reshaped(call.log, value, (*batch, *places)), (*batch, *places))
    order = [*range(count), *(count + i for i in (0, 2, 4, 1, 3))]
    turned = put(apart, [layer.permute(order) for layer in apart.layers], [(*batch, *places)[i] for i in order])
    return put(turned, reshaped(call.log, turned, call.shape), call.shape)


def channel_shuffle(call: Call) -> Value:
    value, groups = call.first(), call["groups"]
    batch, channels, *places = value.shape
    apart_shape = (batch, groups, channels // groups, *places)
    apart = put(value, reshaped(call.log, value, apart_shape), apart_shape)
    turned_shape = (batch, channels // groups, groups, *places)
    turned = put(apart, [layer.transpose(1, 2) for layer in apart.layers], turned_shape)
    return put(turned, reshaped(call.log, turned, call.shape), call.shape)


def cat(call: Call) -> Value:
    """Side by side along one dimension, entry by entry along the others."""
    values = [call.value(t) for t in call["tensors"] if t.numel() or t.dim() > 1]
    dim = axis(call.arguments.get("dim", 0), len(call.shape))
    return _side_by_side(call, values, dim)


def stack(call: Call) -> Value:
    dim = axis(call.arguments.get("dim", 0), len(call.shape))
    values = []
    for value in map(call.value, call["tensors"]):
        shape = (*value.shape[:dim], 1, *value.shape[dim:])
        values.append(put(value, [layer.unsqueeze(dim) for layer in value.layers], shape))
    return _side_by_side(call, values, dim)


def _side_by_side(call: Call, values: list[Value], dim: int) -> Value:
    widest = max((dims_of(layer) - {dim} for v in values for layer in v.on(dim)), key=len, default=set())
    row, others = [], []
    for value in values:
        part, rest = _part_of_row(call, value, dim, widest)
        row.append(part)
        others.append(replace(value, shape=_with(value.shape, dim, 1), layers=tuple(rest)))
    found = joined(call.log, others, _with(call.shape, dim, 1))
    whole = torch.cat(row, dim)
    return derived(values, call.shape, joined_layers(call.log, [whole, *found] if bool(whole.any()) else found))


def _part_of_row(call: Call, value: Value, dim: int, widest: set[int]) -> tuple[Tensor, list[Tensor]]:
    """What is known of one part along a dimension (and along `widest` as well, as of the others), and the rest."""
    shape = [call.shape[d] if d in widest else 1 for d in range(len(call.shape))]
    shape[dim] = value.shape[dim]
    part, rest = torch.zeros(shape, dtype=torch.int64), []
    for layer in value.layers:
        if layer.shape[dim] > 1 and value.is_blank:
            continue  # constants between units
        if dims_of(layer) - {dim} == widest and dims_of(layer):
            part = layer.expand(shape)
        elif layer.shape[dim] > 1:
            call.log.pin(layer, WITH_CONSTANT)
        else:
            rest.append(layer)
    return part, rest


def _with(shape: Sequence[int], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])


# ---- picking entries


def index(call: Call) -> Value:
    """x[i, :, j] with tensors of positions; by constants it is done to the labels."""
    value, places = call.first(), list(call["indices"])
    dims = [d for d, i in enumerate(places) if i is not None]
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in places):
        return _masked_index(call, value, places)
    is_data = any(call.value(i).is_input for i in places if i is not None)
    layers = []
    for layer in value.layers:
        if any(layer.shape[d] > 1 for d in dims) and not is_data:
            sizes = [value.shape[d] if d in dims else n for d, n in enumerate(layer.shape)]
            layers.append(squeezed(torch.ops.aten.index(layer.expand(sizes), places), range(len(call.shape))))
            continue
        rest: Tensor | None = layer
        for d in dims:
            if rest is not None and rest.shape[d] > 1:
                rest = call.log.collapse(rest, d, PICKED)
        if rest is not None:
            ones = [None if i is None else torch.zeros([1] * i.dim(), dtype=torch.int64) for i in places]
            layers.append(torch.ops.aten.index(rest, ones))
    return put(replace(value, is_input=value.is_input or is_data), layers, call.shape)


PICKED = "its units are picked by values of the forward pass"


def _masked_index(call: Call, value: Value, places: list[Any]) -> Value:
    """x[mask]: the masked dimensions, which come first, become one."""
    first = places[0]
    if first is None or any(i is not None for i in places[1:]):
        return unknown(call)  # type: ignore[no-any-return]
    count = first.dim()
    layers = [x.reshape(1, *x.shape[count:]) for x in without(call.log, value, range(count), PICKED)]
    return put(replace(value, is_input=True), layers, call.shape)


def index_select(call: Call) -> Value:
    value, places = call.first(), call["index"]
    dim = axis(call["dim"], len(value.shape))
    if call.value(places).is_input:
        return put(replace(value, is_input=True), without(call.log, value, [dim], PICKED), call.shape)
    layers = [x.index_select(dim, places.cpu()) if x.shape[dim] > 1 else x for x in value.layers]
    return put(value, layers, call.shape)


def gather(call: Call) -> Value:
    """Entries are picked along one dimension, for each place of the others: there are as many positions as entries."""
    value, places = call.first(), call.value(call.arguments.get("index", call.arguments.get("indices")))
    dim = axis(call["dim"], len(value.shape))
    values = []
    for mine in (value, places):
        layers = without(call.log, mine, [dim], PICKED)
        sizes = [1 if d == dim else min(n, m) for d, (n, m) in enumerate(zip(mine.shape, call.shape, strict=True))]
        values.append(put(mine, [_shortened(layer, sizes) for layer in layers], sizes))
    found = joined(call.log, values, _with(call.shape, dim, 1))
    return put(derived(call.values(), call.shape), found, call.shape)


def _shortened(layer: Tensor, sizes: Sequence[int]) -> Tensor:
    for dim, size in enumerate(sizes):
        layer = layer.narrow(dim, 0, min(size, layer.shape[dim]))
    return layer


def embedding(call: Call) -> Value:
    table, places = call.value(call["weight"]), call.value(call["indices"])
    layers = [layer.reshape([1] * (len(call.shape) - 1) + [-1]) for layer in table.on(1) if dims_of(layer) == {1}]
    makers = {axis for layer in layers for axis in call.log.mark(call.log.sources, layer)}
    return Value(call.shape, tuple(layers), is_input=places.is_input, makers=frozenset(makers))


def embedding_bag(call: Call) -> list[Value | None]:
    return [embedding(call), *[None] * (len(call.result) - 1)]


def put_in(call: Call) -> Value:
    """Entries of one tensor are put into another along some dimension; along the others they stand side by side."""
    value, source = call.first(), call.value(call.arguments.get("src", call.arguments.get("source")))
    dim = axis(call["dim"], len(value.shape))
    values = [put(v, without(call.log, v, [dim], PICKED), _with(v.shape, dim, 1)) for v in (value, source)]
    shape = _with(call.shape, dim, 1)
    return derived([value, source], call.shape, joined(call.log, values, shape))


def index_put(call: Call) -> Value:
    """x[i, j] = y, where the tensors of positions stand for the first dimensions."""
    value, source, places = call.first(), call.value(call["values"]), list(call["indices"])
    count = sum(i.dim() if i.dtype == torch.bool else 1 for i in places if i is not None)
    if any(i is None for i in places):
        return unknown(call)  # type: ignore[no-any-return]
    layers = without(call.log, value, range(count), PICKED)
    tail = list(value.shape[count:])
    mine = replace(value, shape=tuple(tail), layers=tuple(x.reshape(x.shape[count:]) for x in layers))
    lead = max(0, len(source.shape) - len(tail))
    theirs = without(call.log, source, range(lead), PICKED)
    others = replace(source, shape=source.shape[lead:], layers=tuple(x.reshape(x.shape[lead:]) for x in theirs))
    found = joined(call.log, [mine, others], tail)
    return derived([value, source], call.shape, [aligned(x, len(call.shape)) for x in found])


# ---- reductions


def reduce(call: Call) -> Value:
    value = call.first()
    count = len(value.shape)
    dims = axes(call.arguments.get("dim"), count)
    if call.name in SUMS or (call.name in AVERAGES and call.log.is_told):
        value = put(value, _summed(call, value, dims), value.shape)
    layers = without(call.log, value, dims, f"it passes {call.name}, which mixes units")
    if len(call.shape) < count:
        layers = [x.reshape([n for d, n in enumerate(x.shape) if d not in dims]) for x in layers]
    return put(value, layers, call.shape)


SUMS = {"sum", "nansum", "linalg_vector_norm", "norm"}  # units at zero add nothing
AVERAGES = {"mean", "var", "std", "var_mean", "std_mean"}  # nor do they here, while they are counted


def _summed(call: Call, value: Value, dims: Sequence[int]) -> list[Tensor]:
    """The layers but for those of whole units that are summed over."""
    found = []
    for layer in value.layers:
        if len(dims_of(layer)) == 1 and dims_of(layer) <= set(dims):
            call.log.summed.append(layer.reshape(-1))
        else:
            found.append(layer)
    return found


def reduce_to_many(call: Call) -> Result:
    """max and min come in three kinds: of all entries, along a dimension, of two tensors."""
    if isinstance(call.result, Tensor):
        return pointwise(call) if len(call.values()) > 1 else reduce(call)
    value = reduce(call)
    return [value if tuple(r.shape) == value.shape else None for r in call.result]


def along(call: Call) -> Result:
    """Entries along one dimension depend on one another (a cumulative sum, an order)."""
    value = call.first()
    dim = axis(call.arguments.get("dim", -1), len(value.shape))
    layers = without(call.log, value, [dim], f"it passes {call.name}, which mixes units")
    if isinstance(call.result, tuple | list):
        return [put(value, layers, r.shape) for r in call.result]
    return put(value, layers, call.shape)


def softmax(call: Call) -> Value:
    value = call.first()
    dim = axis(call["dim"], len(value.shape))
    reason = "it feeds a softmax that is no attention: its units are weighed against one another"
    return replace(put(value, without(call.log, value, [dim], reason), call.shape), is_weights=True)


def spatial(count: int) -> Callable[[Call], Result]:
    """Pooling, padding and resizing of the last dimensions, channel by channel."""

    def rule(call: Call) -> Result:
        value = call.first()
        dims = [*range(len(value.shape) - count, len(value.shape))]
        size, stride = (list(call.arguments.get(name) or ()) for name in ("kernel_size", "stride"))
        if len(size) == count:  # a window of one entry mixes nothing
            alone = [n == 1 for n in size] if stride in ([], size) else [False] * count
            dims = [d for d, is_alone in zip(dims, alone, strict=True) if not is_alone]
        made = put(value, without(call.log, value, dims, f"it passes {call.name} along its units"), call.shape)
        return [made, *[None] * (len(call.result) - 1)] if isinstance(call.result, tuple | list) else made

    return rule


def regions(call: Call) -> Value:
    """Parts of pictures, as boxes say, channel by channel."""
    layers = without(call.log, call.first(), [0, 2, 3], PICKED)
    return put(derived(call.values(), call.shape), layers, call.shape)


def sampled(call: Call) -> Value:
    """grid_sample: (n, c, ...) is read at places (n, ..., coordinates): each of the n by its own places.

    Deformable attentions merge samples and heads into n: what is tied there are heads.
    """
    x, grid = call.value(call["input"]), call.value(call["grid"])
    places = range(2, len(call.shape))
    mine = put(x, without(call.log, x, places, PICKED), (*x.shape[:2], *[1] * len(places)))
    apart = without(call.log, grid, [len(grid.shape) - 1], WITH_INPUT)
    theirs = put(grid, [layer.movedim(-1, 1) for layer in apart], (grid.shape[0], 1, *grid.shape[1:-1]))
    if mine.on(0) and theirs.on(0):
        call.log.attention += [layer.reshape(-1) for layer in (*mine.on(0), *theirs.on(0))]
        call.log.values += [(layer.reshape(-1), x.shape[1]) for layer in mine.on(0)]
    return derived([x, grid], call.shape, joined(call.log, [mine, theirs], call.shape))


def unknown(call: Call) -> Any:
    """An operation without a rule: the units that meet it stay."""
    values = call.values()
    for layer in (layer for v in values for layer in v.layers):
        call.log.pin(layer, f"it passes aten.{call.name}, which is not followed")
    made = derived(values, ())
    if isinstance(call.result, tuple | list):
        return [replace(made, shape=tuple(r.shape)) if isinstance(r, Tensor) else None for r in call.result]
    return replace(made, shape=call.shape) if isinstance(call.result, Tensor) else None


# ---- sums of products


def linear(call: Call) -> Value:
    x, weight = call.value(call["input"]), call.value(call["weight"])
    columns = put(weight, [layer.t() for layer in weight.layers], weight.shape[::-1])
    out = _product(call.log, _lifted(x, 0), columns)
    made = _dropped(out, 0) if len(x.shape) == 1 else out
    return _plus(call, made, call.arguments.get("bias"))


def _lifted(value: Value, dim: int) -> Value:
    """A vector as a matrix."""
    if len(value.shape) > 1:
        return value
    shape = (1, *value.shape) if dim == 0 else (*value.shape, 1)
    return put(value, [layer.reshape(1, -1) if dim == 0 else layer.reshape(-1, 1) for layer in value.layers], shape)


def _dropped(value: Value, dim: int) -> Value:
    dim = axis(dim, len(value.shape))
    shape = (*value.shape[:dim], *value.shape[dim + 1 :])
    return put(value, [layer.squeeze(dim) for layer in value.layers], shape)


def _plus(call: Call, value: Value, bias: Any) -> Value:
    if bias is None:
        return value
    return _biased(call.log, value, call.value(bias))


def _biased(log: Log, value: Value, bias: Value) -> Value:
    bias = put(bias, [aligned(layer, len(value.shape)) for layer in bias.layers], bias.shape)
    for mine in value.layers:
        log.biases += [(mine.reshape(-1), layer.reshape(-1)) for layer in bias.layers if layer.shape == mine.shape]
    return put(value, joined(log, [value, bias], value.shape), value.shape)


def bilinear(call: Call) -> Value:
    """Two inputs, read by the weight's second and third dimension; its first makes the output."""
    weight, log = call.value(call["weight"]), call.log
    parts = []
    for name, column in (("input1", 1), ("input2", 2)):
        x = call.value(call[name])
        parts.append(_read_along_last(log, x, [layer.reshape(-1) for layer in weight.on(column)]))
    lead = [1] * (len(call.shape) - 1)
    rows = [layer.reshape([*lead, -1]) for layer in weight.on(0)]
    makers = {axis for layer in rows for axis in log.mark(log.rows, layer)}
    made = derived(parts, call.shape, [*joined(log, parts, (*call.shape[:-1], 1)), *rows])
    made = replace(made, is_weights=False, is_blank=False, makers=frozenset(makers))
    return _plus(call, made, call["bias"])


def _read_along_last(log: Log, x: Value, columns: list[Tensor]) -> Value:
    """What is left to say of an input whose last dimension a weight has read."""
    k = len(x.shape) - 1
    rest = list(x.off(k))
    for column in columns:
        log.mark(log.columns, column)
        if not x.on(k) and not x.is_blank:
            log.pin(column, WITH_INPUT if x.is_input else WITH_CONSTANT)
    for layer in x.on(k):
        shape = [1] * k + [-1]
        left = read(log, layer, columns[0].reshape(shape), k) if columns else log.collapse(layer, k, WITH_CONSTANT)
        rest += [] if left is None else [left]
    log.bare |= x.makers - {NORMED}
    return replace(x, shape=_with(x.shape, k, 1), layers=tuple(rest))


def matmul(call: Call) -> Value:
    one, other = (call.value(t) for t in tensors_of(call.arguments.values()))
    made = _product(call.log, _lifted(one, 0), _lifted(other, 1))
    if len(one.shape) == 1:
        made = _dropped(made, -2)
    return _dropped(made, -1) if len(other.shape) == 1 else made


def added_matmul(call: Call) -> Value:
    """addmm, baddbmm: a bias comes first."""
    bias, one, other = (t for t in tensors_of(call.arguments.values()))
    made = _product(call.log, call.value(one), call.value(other))
    return _plus(call, made, bias)


def _product(log: Log, one: Value, other: Value) -> Value:
    """[..., m, k] @ [..., k, n], broadcast over what comes before."""
    dims = max(len(one.shape), len(other.shape)) + 1
    k = dims - 2
    left = put(one, [layer.unsqueeze(-1) for layer in one.layers], (*one.shape, 1))
    right = put(other, [layer.unsqueeze(-3) for layer in other.layers], (*other.shape[:-2], 1, *other.shape[-2:]))
    left, right = (
        replace(v, layers=tuple(aligned(x, dims) for x in v.layers), shape=(1,) * (dims - len(v.shape)) + v.shape)
        for v in (left, right)
    )
    if not _is_activation(other) and (other.layers or one.is_input):
        rest, makers = _read_by(log, left, right, k)
    elif not _is_activation(one) and one.layers:
        rest, makers = _read_by(log, right, left, k)
    else:
        rest, makers = _weighed(log, left, right, k), one.makers | other.makers
    shape = tuple(max(a, b) for a, b in zip(rest[0].shape, rest[1].shape, strict=True))
    found = joined(log, rest, shape)
    made = derived(rest, (*shape[:k], *shape[k + 1 :]), [layer.squeeze(k) for layer in found])
    return replace(made, is_weights=False, is_blank=False, makers=makers)


def _is_activation(value: Value) -> bool:
    """Also where no input reaches it: positions or queries that are learned, once a layer has read them."""
    return value.is_input or (bool(value.makers) and len(value.shape) > 2)


def _read_by(log: Log, x: Value, weight: Value, k: int) -> tuple[list[Value], frozenset[int]]:
    """What is left to say of both when a weight's columns have read `x` along dimension `k`."""
    rest = list(x.off(k))
    columns = weight.on(k)
    for layer in columns:
        log.mark(log.columns, layer)
    if not x.on(k) and not x.is_blank:
        for layer in columns:
            log.pin(layer, WITH_INPUT if x.is_input else WITH_CONSTANT)
    for layer in x.on(k):
        if columns and dims_of(columns[0]) == {k}:
            left = read(log, layer, columns[0], k)
        else:
            left = log.collapse(layer, k, WITH_CONSTANT)
        rest += [] if left is None else [left]
    makers = {axis for layer in weight.off(k) for axis in log.mark(log.rows, layer)}
    log.bare |= x.makers - {NORMED}
    values = [
        replace(v, shape=_with(v.shape, k, 1), layers=tuple(layers))
        for v, layers in ((x, rest), (weight, weight.off(k)))
    ]
    return values, frozenset(makers)


def _weighed(log: Log, one: Value, other: Value, k: int) -> list[Value]:
    """What is left to say of two activations that are multiplied and summed along dimension `k`."""
    mine, theirs = one.on(k), other.on(k)
    for a in mine:
        for b in theirs:
            if dims_of(a) == dims_of(b):
                log.tie(a, b)
    for value, own in ((one, k - 1), (other, k + 1)):
        log.attention += [layer.reshape(-1) for layer in value.off(k) if layer.shape[own] == 1]
    values = []
    for value, layers, partner in ((one, mine, theirs), (other, theirs, mine)):
        rest = list(value.off(k))
        for layer in layers:
            log.attention.append(layer.reshape(-1)) if partner else None
            left = log.collapse(layer, k, SINGLE if partner else WITH_INPUT)
            rest += [] if left is None else [left]
        values.append(replace(value, shape=_with(value.shape, k, 1), layers=tuple(rest)))
    for weights, value, dim in ((one, other, k + 1), (other, one, k - 1)):
        if weights.is_weights and not value.is_weights:
            log.values += [(layer.reshape(-1), value.shape[dim]) for layer in value.on(dim) or value.off(k)]
    return values


SINGLE = "it has a single unit: all of it is summed in one product of activations (an attention with one head)"


def attention(call: Call) -> Value:
    """scaled_dot_product_attention."""
    query, key, value = (call.value(call[name]) for name in ("query", "key", "value"))
    if call.arguments.get("enable_gqa"):
        key, value = (_groups_repeated(v, query.shape[-3]) for v in (key, value))
    turned = put(key, [layer.transpose(-1, -2) for layer in key.layers], (*key.shape[:-2], *key.shape[:-3:-1]))
    scores = _product(call.log, query, turned)
    mask = call.arguments.get("attn_mask")
    if mask is not None:
        values = [scores, call.value(mask)]
        scores = put(scores, joined(call.log, values, scores.shape), scores.shape)
    weights = put(scores, without(call.log, scores, [len(scores.shape) - 1], SINGLE), scores.shape)
    return _product(call.log, replace(weights, is_weights=True), value)


def _groups_repeated(value: Value, heads: int) -> Value:
    times = heads // value.shape[-3]
    layers = [x.repeat_interleave(times, -3) if x.shape[-3] > 1 else x for x in value.layers]
    return put(value, layers, (*value.shape[:-3], heads, *value.shape[-2:]))


def convolution(call: Call) -> Value:
    x, weight, groups = call.value(call["input"]), call.value(call["weight"]), call["groups"]
    is_transposed, log = call["transposed"], call.log
    column, row = (0, 1) if is_transposed else (1, 0)
    kernel = [n > 1 or s > 1 for n, s in zip(weight.shape[2:], call["stride"], strict=True)]
    x = put(x, without(log, x, [2 + i for i, wide in enumerate(kernel) if wide], MIXED), x.shape)
    rows = [layer.reshape(-1) for layer in weight.on(row) if dims_of(layer) == {row}]
    columns = [layer.reshape(-1) for layer in weight.on(column) if dims_of(layer) == {column}]
    makers = {axis for layer in rows for axis in log.mark(log.rows, layer)}
    if groups > 1 and (weight.shape[column] if not is_transposed else weight.shape[0] // groups) == 1:
        return _plus_channels(call, _depthwise(call, x, weight, makers))
    for layer in columns:
        log.mark(log.columns, layer)
    log.bare |= x.makers - {NORMED}
    found = _channels_read(log, x, columns, groups, is_transposed)
    out = rows[0] if rows else None
    if out is not None and groups > 1:
        out = _of_every_group(log, out, groups, is_transposed)
    if out is not None:
        found.append(out.reshape(1, -1, *[1] * (len(x.shape) - 2)))
    made = Value(call.shape, tuple(found), is_input=True, makers=frozenset(makers))
    return _plus_channels(call, made)


MIXED = "it passes a convolution along its units"


def _channels_read(log: Log, x: Value, columns: list[Tensor], groups: int, is_transposed: bool) -> list[Tensor]:
    """What is left to say of a convolution's input."""
    rest = list(x.off(1))
    if columns and not x.on(1) and not x.is_blank:
        log.pin(columns[0], WITH_INPUT if x.is_input else WITH_CONSTANT)
    for layer in x.on(1):
        if not columns:
            left = log.collapse(layer, 1, WITH_CONSTANT)
        else:
            column = columns[0] if is_transposed else columns[0].repeat(groups)
            if is_transposed and groups > 1:
                parts = column.reshape(groups, -1)
                log.tie(parts, parts[:1])
            left = read(log, layer, column.reshape(1, -1, *[1] * (layer.dim() - 2)), 1)
        rest += [] if left is None else [left]
    return rest


def _of_every_group(log: Log, rows: Tensor, groups: int, is_transposed: bool) -> Tensor:
    """The k-th row of every group goes with the k-th of the first."""
    if is_transposed:
        return rows.repeat(groups)
    parts = rows.reshape(groups, -1)
    log.tie(parts, parts[:1])
    return rows


def _depthwise(call: Call, x: Value, weight: Value, makers: set[int]) -> Value:
    """Every channel is read by itself, by one row or several."""
    log, groups = call.log, call["groups"]
    layer = weight.on(0)[0].reshape(-1) if weight.on(0) else None
    if call["transposed"]:
        makers |= set(log.mark(log.rows, layer)) if layer is not None else set()
    times = call.shape[1] // groups
    out = layer if layer is None or layer.numel() == call.shape[1] else layer.repeat_interleave(times)
    found = list(x.off(1))
    for mine in x.on(1):
        wide = mine.repeat_interleave(times, 1) if times > 1 else mine
        if out is None:
            rest = log.collapse(mine, 1, WITH_CONSTANT)
            found += [] if rest is None else [rest]
            continue
        left = meet(log, wide, out.reshape(1, -1, *[1] * (wide.dim() - 2)))  # heads may be among the samples
        found += [] if left is None else [left]
    if out is not None and not x.on(1):
        log.pin(out, WITH_INPUT if x.is_input else WITH_CONSTANT)
    return replace(derived([x], call.shape, found), is_weights=False, makers=x.makers | frozenset(makers))


def _plus_channels(call: Call, value: Value) -> Value:
    """A convolution's bias, one number a channel."""
    bias = call.arguments.get("bias")
    if bias is None:
        return value
    mine = call.value(bias)
    shape = (1, *mine.shape, *[1] * (len(value.shape) - 2))
    wide = put(mine, [layer.reshape(shape) for layer in mine.layers], shape)
    return _biased(call.log, value, wide)


# ---- norms


def _per_channel(call: Call, value: Value, names: Sequence[str], dims: Sequence[int]) -> list[Tensor]:
    """A value's layers, tied to a norm's own tensors, which lie along its dimensions `dims`."""
    values = [value]
    for name in names:
        tensor = call.arguments.get(name)
        if tensor is not None:
            mine = call.value(tensor)
            shape = [1] * len(value.shape)
            for d, size in zip(dims, mine.shape, strict=True):
                shape[d] = size
            for layer in mine.layers:
                call.log.mark(call.log.scales, layer)
            values.append(put(mine, [layer.reshape(_shape_of(layer, shape, dims)) for layer in mine.layers], shape))
    return joined(call.log, values, value.shape)


def _shape_of(layer: Tensor, shape: Sequence[int], dims: Sequence[int]) -> list[int]:
    made = [1] * len(shape)
    for d, size in zip(dims, layer.shape, strict=True):
        made[d] = size
    return made


def batch_norm(call: Call) -> list[Value | None]:
    value = call.first()
    pair = _own_pair(call)
    for maker in value.makers - {NORMED}:
        call.log.norms.setdefault(maker, set()).update(pair)
    is_trained = bool(call.arguments.get("training")) or "no_stats" in str(call.func)
    columns: list[Tensor] = []  # of a weight that is standardised
    if is_trained:
        places = range(2, len(value.shape))
        rest = _summed(call, value, places) if call.log.is_told else list(value.layers)
        columns = [layer for layer in value.layers if not any(layer is other for other in rest)]
        value = put(value, without(call.log, put(value, rest, value.shape), places, MIXED), value.shape)
    layers = [*_per_channel(call, value, ("weight", "bias", "running_mean", "running_var"), [1]), *columns]
    made = replace(put(value, layers, call.shape), makers=frozenset({NORMED}) if value.is_input else NOWHERE)
    return [made, *[None] * (len(call.result) - 1)]


def _own_pair(call: Call) -> set[int]:
    """Axes of a BatchNorm's weight and bias if these say how the loss changes with a unit, else `UNPAIRED`.

    They are parameters of one module by these names then; a bias may be missing.
    """
    axes, homes = set[int](), set[str]()
    for leaf in ("weight", "bias"):
        tensor = call.arguments.get(leaf)
        if tensor is None and axes:
            continue
        if not isinstance(tensor, nn.Parameter):
            return {UNPAIRED}
        mine = {n for layer in call.value(tensor).layers for n in call.log.atoms.axes_of(layer)}
        places = [call.log.atoms.axes[n].tensor.rpartition(".") for n in mine]
        homes |= {home for home, *_ in places}
        if {last for *_, last in places} != {leaf} or len(homes) > 1:
            return {UNPAIRED}
        axes |= mine
    return axes


def layer_norm(call: Call) -> Result:
    """A function, which the module that calls it may be told that it is narrower now."""
    value = call.first()
    dims = range(len(value.shape) - len(call["normalized_shape"]), len(value.shape))
    kind = "RMSNorm" if "rms" in call.name else "LayerNorm"
    if call.log.is_told and len(dims) == 1:
        made = stream_norm(call, dims[0], kind)
        return [made, *[None] * (len(call.result) - 1)] if isinstance(call.result, tuple | list) else made
    kept = put(value, without(call.log, value, dims, INSIDE_NORM.format(kind)), value.shape)
    made = put(value, _per_channel(call, kept, ("weight", "bias"), dims), value.shape)
    return [made, *[None] * (len(call.result) - 1)] if isinstance(call.result, tuple | list) else made


def stream_norm(call: Call, dim: int, kind: str, value: Value | None = None) -> Value:
    """Along the stream's own dimension units are mixed, but only by their mean and their mean square."""
    value, found = value or call.first(), []
    for layer in value.layers:
        left: Tensor | None = layer
        if dims_of(layer) == {dim}:
            call.log.normed.append((layer.reshape(-1), kind, call.log.inside))
        elif layer.shape[dim] > 1:
            left = call.log.collapse(layer, dim, INSIDE_NORM.format(kind))
        found += [] if left is None else [left]
    return put(value, _per_channel(call, put(value, found, value.shape), ("weight", "bias"), [dim]), value.shape)


INSIDE_NORM = "it passes a {}, which mixes units"


def group_norm(call: Call) -> list[Value | None]:
    """A unit is a whole group; where all is one group, a channel, as of a LayerNorm."""
    value, groups = call.first(), call["group"]
    if groups == 1 and call.log.is_told:
        rest = without(call.log, value, range(2, len(value.shape)), INSIDE_NORM.format("GroupNorm"))
        made = stream_norm(call, 1, "GroupNorm of one group", put(value, rest, value.shape))
        return [put(value, made.layers, call.shape), *[None] * (len(call.result) - 1)]
    shape = (value.shape[0], groups, value.shape[1] // groups, *value.shape[2:])
    apart = put(value, reshaped(call.log, value, shape), shape)
    dims = [2, *range(3, len(shape))]
    for layer in without(call.log, apart, dims, INSIDE_NORM.format("GroupNorm")):
        call.log.normed.append((layer.reshape(-1), "GroupNorm", call.log.inside))
    layers = _per_channel(call, value, ("weight", "bias"), [1])
    return [put(value, layers, call.shape), *[None] * (len(call.result) - 1)]


def weight_norm(call: Call) -> list[Value | None]:
    """v * g / |v|, with one norm for each position of one dimension.

    Along that dimension g is what is masked (v at zero would divide by zero). Along the other of a weight's two
    dimensions positions share a norm: columns of v at zero are as good as gone there. Rows are not: the proof sees it.
    """
    v, g = call.value(call["v"]), call.value(call["g"])
    mine = put(v, [layer for layer in v.layers if min(dims_of(layer)) < 2], v.shape)
    return [derived([g, v], call.shape, joined(call.log, [g, mine], call.shape)), None]


def product(call: Call) -> Value:
    """A sum over all products of two vectors (the spectral norm of a weight, of which rows share one)."""
    values = call.values()
    for value in values:
        without(call.log, value, range(len(value.shape)), f"it passes {call.name}, which mixes units")
    return derived(values, call.shape)


# ---- what scales along


def bent(call: Call) -> list[Tensor]:
    """The layers of arguments that the result does not scale along with: of a unit twice as large it is not twice as
    large. Of a layer that reads all units, and of the first BatchNorm behind one, there are none."""
    values, rule = call.values(), RULES.get(call.name)
    if call.name in HOMOGENEOUS:
        return []
    if call.name == "add" and len(values) > 1 and all(value.is_input and value.layers for value in values):
        return []
    if rule is batch_norm and NORMED not in values[0].makers:
        return []
    is_dense = rule in (linear, convolution) and call.arguments.get("groups", 1) == 1
    if is_dense and not call.value(call["weight"]).is_input:
        return []
    return [layer.reshape(-1) for value in values for layer in value.layers]


_HOMOGENEOUS = (
    "relu leaky_relu dropout feature_dropout native_dropout mean avg_pool1d max_pool1d max_pool1d_with_indices "
    "adaptive_avg_pool1d adaptive_max_pool1d avg_pool2d max_pool2d max_pool2d_with_indices adaptive_avg_pool2d "
    "_adaptive_avg_pool2d adaptive_max_pool2d avg_pool3d max_pool3d max_pool3d_with_indices adaptive_avg_pool3d "
    "_adaptive_avg_pool3d adaptive_max_pool3d upsample_nearest2d upsample_bilinear2d cat view reshape _unsafe_view "
    "flatten unflatten _reshape_alias permute transpose t unsqueeze squeeze slice select narrow unbind split "
    "split_with_sizes clone contiguous alias _to_copy"
)
HOMOGENEOUS = frozenset(_HOMOGENEOUS.split())


# ---- tables

Rule = Callable[[Call], Any]


def _table(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_table(
        pointwise,
        "add sub rsub mul div pow neg where masked_fill hardswish hardtanh hardsigmoid _prelu_kernel elu "
        "celu selu gelu silu mish leaky_relu relu relu6 softplus threshold clamp clip rrelu_with_noise lerp "
        "addcmul addcdiv maximum minimum eq ne lt le gt ge bitwise_and bitwise_or bitwise_not logical_and "
        "logical_or logical_not complex polar logit tanh sigmoid exp log sqrt rsqrt sin cos erf abs square "
        "reciprocal floor_divide remainder fmod isnan nan_to_num fill zero normal uniform bernoulli "
        "exponential _conj conj_physical conj log_sigmoid_forward",
    ),
    **_table(
        same,
        "_to_copy clone contiguous alias detach lift_fresh lift dropout feature_dropout alpha_dropout _conj"
        " positive requires_grad resolve_conj resolve_neg type_as to",
    ),
    **_table(overwritten, "copy"),
    **_table(per_place, "native_dropout"),
    **_table(blank, "zeros ones empty full new_zeros new_ones new_empty new_full"),
    **_table(blank_like, "zeros_like ones_like empty_like full_like rand_like randn_like"),
    **_table(reshape, "view reshape _unsafe_view flatten unflatten _reshape_alias view_as reshape_as"),
    **_table(
        view,
        "permute transpose t numpy_T unsqueeze squeeze slice select unbind narrow diagonal unfold movedim swapaxes",
    ),
    **_table(as_strided, "as_strided"),
    **_table(split, "split split_with_sizes unsafe_split unsafe_split_with_sizes"),
    **_table(expand, "expand expand_as broadcast_to"),
    **_table(on_layers, "roll flip tril triu"),
    **_table(repeat, "repeat"),
    **_table(repeat_interleave, "repeat_interleave"),
    **_table(pad, "constant_pad_nd"),
    **_table(pixel_shuffle, "pixel_shuffle"),
    **_table(pixel_unshuffle, "pixel_unshuffle"),
    **_table(channel_shuffle, "channel_shuffle native_channel_shuffle"),
    **_table(cat, "cat"),
    **_table(stack, "stack"),
    **_table(index, "index _unsafe_index"),
    **_table(index_select, "index_select"),
    **_table(gather, "gather take_along_dim"),
    **_table(embedding, "embedding"),
    **_table(embedding_bag, "embedding_bag _embedding_bag _embedding_bag_forward_only"),
    **_table(put_in, "scatter scatter_add index_add index_copy scatter_reduce"),
    **_table(index_put, "index_put _unsafe_index_put"),
    **_table(
        reduce,
        "sum mean amax amin prod any all logsumexp argmax argmin var std nansum linalg_vector_norm norm count_nonzero",
    ),
    **_table(reduce_to_many, "max min median mode var_mean std_mean aminmax"),
    **_table(along, "cumsum cumprod sort argsort topk logcumsumexp cummax"),
    **_table(softmax, "softmax _softmax log_softmax _log_softmax _safe_softmax special_softmax"),
    **_table(
        spatial(1),
        "avg_pool1d max_pool1d max_pool1d_with_indices adaptive_avg_pool1d adaptive_max_pool1d "
        "upsample_nearest1d upsample_linear1d reflection_pad1d replication_pad1d",
    ),
    **_table(
        spatial(2),
        "avg_pool2d max_pool2d max_pool2d_with_indices adaptive_avg_pool2d _adaptive_avg_pool2d "
        "adaptive_max_pool2d fractional_max_pool2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d "
        "_upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_nearest_exact2d reflection_pad2d "
        "replication_pad2d",
    ),
    **_table(
        spatial(3),
        "avg_pool3d max_pool3d max_pool3d_with_indices adaptive_avg_pool3d _adaptive_avg_pool3d "
        "adaptive_max_pool3d upsample_nearest3d upsample_trilinear3d reflection_pad3d replication_pad3d",
    ),
    **_table(sampled, "grid_sampler_2d cudnn_grid_sampler grid_sampler_3d"),
    **_table(regions, "torchvision::roi_align torchvision::roi_pool"),
    **_table(glu, "glu"),
    **_table(linear, "linear"),
    **_table(bilinear, "bilinear"),
    **_table(product, "vdot"),
    **_table(matmul, "matmul mm bmm mv dot"),
    **_table(added_matmul, "addmm baddbmm"),
    **_table(attention, "scaled_dot_product_attention"),
    **_table(convolution, "convolution convolution_overrideable _convolution"),
    **_table(
        batch_norm,
        "native_batch_norm _native_batch_norm_legit_no_training _native_batch_norm_legit "
        "cudnn_batch_norm miopen_batch_norm _batch_norm_no_update _batch_norm_with_update",
    ),
    **_table(layer_norm, "native_layer_norm rms_norm"),
    **_table(group_norm, "native_group_norm"),
    **_table(weight_norm, "_weight_norm_interface"),
}


def rule_of(func: Any) -> Rule | None:
    """The rule of an operation; None where it has none."""
    found = RULES.get(short_name(func))
    if found is None and torch.Tag.pointwise in func.tags:
        return pointwise
    return found
