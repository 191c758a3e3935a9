"""Labels: which position of which parameter every entry of a value belongs to, and what may not be cut apart.

An *atom* is a position along one dimension of one parameter or buffer; atoms are numbered from 1, 0 stands for none. A
value carries *layers*: int64 tensors of its number of dimensions, with size 1 where they say nothing and full size
where they do, whose entries are atoms. A value that is computed from others ties their atoms: `Log` keeps the ties.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

NOWHERE: frozenset[int] = frozenset()
NORMED = -1  # no number of an axis: among the makers of a value
UNPAIRED = -1  # the same, among affine pairs


@dataclass(frozen=True, eq=False)
class Value:
    """What is known of a tensor.

    is_input   it depends on the model's input
    is_blank   it is filled with one number, in the shape that its partner has
    is_weights it is an attention's weights: it passed a softmax
    makers     weights (numbers of their axes) whose rows are here before any BatchNorm; `NORMED` for those behind one
    step       number of the operation that made it
    """

    shape: tuple[int, ...]
    layers: tuple[Tensor, ...] = ()
    is_input: bool = False
    is_blank: bool = False
    is_weights: bool = False
    makers: frozenset[int] = NOWHERE
    step: int = -1

    def on(self, dim: int) -> list[Tensor]:
        """The layers that say something along a dimension."""
        return [layer for layer in self.layers if layer.shape[dim] > 1]

    def off(self, dim: int) -> list[Tensor]:
        return [layer for layer in self.layers if layer.shape[dim] == 1]


def derived(values: Iterable[Value], shape: Sequence[int], layers: Iterable[Tensor] = ()) -> Value:
    """A value that is computed from others; it is no attention's weights unless one of them is."""
    values = list(values)
    return Value(
        tuple(shape),
        tuple(layers),
        is_input=any(v.is_input for v in values),
        is_blank=bool(values) and all(v.is_blank for v in values),
        is_weights=any(v.is_weights for v in values),
        makers=NOWHERE.union(*(v.makers for v in values)),
    )


@dataclass(frozen=True)
class Axis:
    """One dimension of one parameter or buffer ("": of none); its atoms are `first`, `first` + 1, ..."""

    tensor: str
    dim: int
    size: int
    first: int


class Atoms:
    """The numbering of atoms."""

    def __init__(self) -> None:
        self.axes: list[Axis] = []
        self.count = 1
        self._starts: list[int] = []

    def value_of(self, name: str, tensor: Tensor, dims: Iterable[int]) -> Value:
        """A parameter or buffer with one layer for each of these dimensions that is longer than 1."""
        layers = []
        for dim in dims:
            size = tensor.shape[dim]
            if size > 1:
                self.axes.append(Axis(name, dim, size, self.count))
                self._starts.append(self.count)
                shape = [1] * tensor.dim()
                shape[dim] = size
                layers.append(torch.arange(self.count, self.count + size).view(shape))
                self.count += size
        return Value(tuple(tensor.shape), tuple(layers))

    def fresh(self, size: int, dim: int, dims: int) -> Tensor:
        """A layer of atoms of no tensor: what is repeated so often could be repeated less often."""
        self.axes.append(Axis("", 0, size, self.count))
        self._starts.append(self.count)
        shape = [1] * dims
        shape[dim] = size
        layer = torch.arange(self.count, self.count + size).view(shape)
        self.count += size
        return layer

    def is_fresh(self, layer: Tensor) -> bool:
        first = int(layer.reshape(-1)[0])
        return first > 0 and not self.axes[bisect_right(self._starts, first) - 1].tensor

    def axes_of(self, atoms: Tensor) -> list[int]:
        """Numbers of the axes that these atoms lie on."""
        atoms = atoms[atoms > 0]
        if not len(atoms):
            return []
        low, high = (bisect_right(self._starts, int(end)) - 1 for end in torch.aminmax(atoms))
        if low == high:
            return [low]
        numbers = torch.bucketize(atoms, torch.tensor(self._starts), right=True) - 1
        return [int(number) for number in numbers.unique()]  # type: ignore[no-untyped-call]


@dataclass
class Log:
    """What the forward pass says of the atoms.

    ties      pairs of tensors of atoms: what stands at the same place is cut together
    pins      atoms that stay, and why
    attention atoms of what is summed between two activations
    values    atoms of the values that attentions weigh, and the width of a head
    summed    atoms that are summed or averaged over, which must be zero there
    halves    atoms (parts, places): equal parts of one dimension, which must stay equally long
    blocks    the same of a dimension that is seen as (blocks, places); meant only where no unit is a whole block
    normed    atoms of a stream that passes a norm, the kind of norm, its module
    biases    rows of a weight, and what is added to each
    inside    name of the norm that runs
    is_told   whether a module makes this call that can be told what it averages over
    rows, columns, scales, sources   numbers of axes by what reads or makes them
    norms     of a weight: the affine pairs of the BatchNorms that it meets first, `UNPAIRED` for one without; `bare`:
              weights that are read without a BatchNorm
    computed  atoms of parameters that weights are computed from, entry by entry
    bent      atoms that pass what does not scale along with them, as ReLU and poolings do
    beside    of the whole pass: layer of the network -> what is known of its outputs along other dimensions than that
              of its own channels, of each call: (dimension, layer)
    sizes     of the whole pass: sizes that a module's forward pass names (`narrow_forward.size_name`), the atoms along
              them, of each call
    unread    of the whole pass: vectors of modules that it does not read
    """

    atoms: Atoms
    ties: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    pins: list[tuple[Tensor, str]] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    values: list[tuple[Tensor, int]] = field(default_factory=list)
    summed: list[Tensor] = field(default_factory=list)
    halves: list[Tensor] = field(default_factory=list)
    blocks: list[Tensor] = field(default_factory=list)
    normed: list[tuple[Tensor, str, str]] = field(default_factory=list)
    biases: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    inside: str = ""
    is_told: bool = False
    rows: set[int] = field(default_factory=set)
    columns: set[int] = field(default_factory=set)
    scales: set[int] = field(default_factory=set)
    sources: set[int] = field(default_factory=set)
    norms: dict[int, set[int]] = field(default_factory=dict)
    bare: set[int] = field(default_factory=set)
    computed: list[Tensor] = field(default_factory=list)
    bent: list[Tensor] = field(default_factory=list)
    sizes: dict[str, list[Tensor]] = field(default_factory=dict)
    beside: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)

    def tie(self, one: Tensor, other: Tensor) -> None:
        """What stands at the same place (after broadcasting) is cut together; an atom beside none stays."""
        if one is other:
            return
        one, other = torch.broadcast_tensors(one, other)  # type: ignore[no-untyped-call]
        one, other = one.reshape(-1), other.reshape(-1)
        differ = one != other
        if bool(differ.any()):
            self.ties.append((one[differ], other[differ]))

    def pin(self, atoms: Tensor, reason: str) -> None:
        self.pins.append((atoms.reshape(-1), reason))

    def collapse(self, layer: Tensor, dim: int, reason: str) -> Tensor | None:
        """What lies along `dim` is cut together or not at all: the layer without that dimension.

        None where nothing is left of it: then its atoms stay.
        """
        first = layer.narrow(dim, 0, 1)
        self.tie(layer, first)
        if first.numel() == 1:
            self.pin(layer, reason)
            return None
        return first

    def take(self, other: Log) -> None:
        """Take over what another says of the same atoms."""
        lists = ("ties", "pins", "attention", "values", "summed", "halves", "blocks", "normed", "biases")
        for name in (*lists, "computed", "bent"):
            getattr(self, name).extend(getattr(other, name))
        for name in ("rows", "columns", "scales", "sources", "bare"):
            getattr(self, name).update(getattr(other, name))
        for maker, norms in other.norms.items():
            self.norms.setdefault(maker, set()).update(norms)

    def mark(self, axes: set[int], atoms: Tensor) -> list[int]:
        found = self.atoms.axes_of(atoms)
        axes.update(found)
        return found


def dims_of(layer: Tensor) -> set[int]:
    return {dim for dim, size in enumerate(layer.shape) if size > 1}


def aligned(layer: Tensor, dims: int) -> Tensor:
    """With as many dimensions, the new ones in front, as broadcasting does."""
    return layer.reshape([1] * (dims - layer.dim()) + list(layer.shape))


def _step(layer: Tensor, dim: int) -> int:
    """How far apart atoms are that are neighbours along a dimension, at least (some may be repeated, or of others)."""
    if layer.shape[dim] < 2:
        return 0
    line = layer.movedim(dim, 0).reshape(layer.shape[dim], -1)[:, 0]
    steps = line.diff().abs()[(line[1:] > 0) & (line[:-1] > 0)]
    steps = steps[steps > 0]
    return int(steps.min()) if len(steps) else 0


def is_outer(layer: Tensor, dim: int) -> bool:
    """Whether a dimension goes over whole blocks of what the layer's other dimensions go over."""
    others = [_step(layer, d) for d in dims_of(layer) if d != dim]
    return all(_step(layer, dim) > step for step in others)


# ---- entry by entry


def meet(log: Log, one: Tensor, other: Tensor) -> Tensor | None:
    """Two layers of the same entries, which share a dimension: what is left to say of them.

    One that says less than the other is about whole blocks of it (a scale a head), or about places inside every block
    (a scale a place, the same for all heads). Those places then stay.
    """
    if dims_of(one) == dims_of(other):
        log.tie(one, other)
        return other if log.atoms.is_fresh(one) else one
    small, big = sorted((one, other), key=lambda layer: len(dims_of(layer)))
    if log.atoms.is_fresh(small):
        return big
    if not dims_of(small) < dims_of(big):
        return _crossed(log, small, big)
    if all(is_outer(big, dim) for dim in dims_of(small)):
        log.tie(small, big)
        return big
    log.pin(small, INSIDE)
    left: Tensor | None = big
    for dim in dims_of(small):
        left = left if left is None else log.collapse(left, dim, INSIDE)
    return left


def _crossed(log: Log, one: Tensor, other: Tensor) -> Tensor | None:
    """Both say something along a dimension that the other leaves open (channels of queries against those of keys):
    what is whole blocks of both goes together, as whole blocks."""
    shared = dims_of(one) & dims_of(other)
    if not all(is_outer(layer, dim) for layer in (one, other) for dim in shared):
        log.pin(one, CROSSED)
        log.pin(other, CROSSED)
        return None
    one, other = (
        functools.reduce(lambda x, d: log.collapse(x, d, CROSSED), sorted(dims_of(layer) - shared), layer)  # type: ignore[arg-type, return-value]
        for layer in (one, other)
    )
    log.tie(one, other)
    return one


CROSSED = "its units meet others along another dimension"
INSIDE = "it lies inside of units that are removed as a whole"
WITH_INPUT = "it is combined with the model's input, or with what is computed from it"
WITH_CONSTANT = "it is combined with a constant of the forward pass"


def joined(log: Log, values: Sequence[Value], shape: Sequence[int]) -> list[Tensor]:
    """The layers of a value that is computed entry by entry from others, which are broadcast to its shape."""
    dims = len(shape)
    sizes = [(1,) * (dims - len(v.shape)) + tuple(v.shape) for v in values]
    layers = [[aligned(layer, dims) for layer in v.layers] for v in values]
    found: list[Tensor] = []
    for number, mine in enumerate(layers):
        for layer in mine:
            left: Tensor | None = layer
            for dim in sorted(dims_of(layer)):
                stranger = _stranger(values, sizes, layers, number, dim)
                if stranger is not None and left is not None:
                    left = log.collapse(left, dim, WITH_INPUT if stranger.is_input else WITH_CONSTANT)
            if left is not None:
                _add(log, found, left)
    return found


def joined_layers(log: Log, layers: Iterable[Tensor]) -> list[Tensor]:
    """Of layers of the same entries those that are left when no two share a dimension."""
    found: list[Tensor] = []
    for layer in layers:
        _add(log, found, layer)
    return found


def _stranger(
    values: Sequence[Value], sizes: Sequence[tuple[int, ...]], layers: Sequence[list[Tensor]], mine: int, dim: int
) -> Value | None:
    """Another of the values that is as long along a dimension, and of which nothing is known there."""
    for number, value in enumerate(values):
        is_known = any(layer.shape[dim] > 1 for layer in layers[number])
        if number != mine and sizes[number][dim] > 1 and not value.is_blank and not is_known:
            return value
    return None


def _add(log: Log, found: list[Tensor], layer: Tensor) -> None:
    """One more layer to those that share no dimension."""
    for number, other in enumerate(found):
        if dims_of(other) & dims_of(layer):
            del found[number]
            left = meet(log, other, layer)
            if left is not None:
                _add(log, found, left)
            return
    found.append(layer)


# ---- shapes


def without(log: Log, value: Value, dims: Iterable[int], reason: str) -> list[Tensor]:
    """The layers where entries along some dimensions are mixed."""
    found = []
    for layer in value.layers:
        left: Tensor | None = layer
        for dim in dims:
            if left is not None and left.shape[dim] > 1:
                left = log.collapse(left, dim, reason)
        if left is not None:
            found.append(left)
    return found


def squeezed(layer: Tensor, dims: Iterable[int]) -> Tensor:
    """With size 1 along those of the dimensions where it says the same all along."""
    for dim in dims:
        if layer.shape[dim] > 1:
            first = layer.narrow(dim, 0, 1)
            if layer.stride(dim) == 0 or bool((layer == first).all()):
                layer = first
    return layer


def reshaped(log: Log, value: Value, shape: Sequence[int]) -> list[Tensor]:
    """The layers in another shape of as many entries."""
    if not all(shape) or not all(value.shape):
        return []
    found: list[tuple[int, Tensor]] = []
    blocks = _blocks(value.shape, shape)
    for layer in value.layers:
        old, new, split = list(layer.shape), [1] * len(shape), []
        for mine, theirs in blocks:
            if any(layer.shape[d] > 1 for d in mine):
                for d in mine:
                    old[d] = value.shape[d]
                for d in theirs:
                    new[d] = shape[d]
                split += theirs if len(theirs) > 1 else []
                _note_blocks(
                    log, layer, [d for d in mine if value.shape[d] > 1], [d for d in theirs if shape[d] > 1], shape
                )
        made = squeezed(layer.expand(old).reshape(new), split)
        found.append((min(dims_of(layer), default=0), made))
    return _one_each(log, [layer for _, layer in sorted(found, key=lambda pair: pair[0])])


def _note_blocks(log: Log, layer: Tensor, mine: Sequence[int], theirs: Sequence[int], shape: Sequence[int]) -> None:
    """A dimension that is seen as several, (3, heads, width): blocks of blocks of places."""
    if len(mine) == 1 and dims_of(layer) == set(mine):
        sizes = [shape[d] for d in theirs]
        log.blocks += [layer.reshape(math.prod(sizes[:n]), -1) for n in range(1, len(sizes))]


def _one_each(log: Log, layers: Iterable[Tensor]) -> list[Tensor]:
    """Of several layers along one dimension, which a reshape puts there, the first: blocks, not the places inside."""
    found: list[Tensor] = []
    for layer in layers:
        if any(dims_of(layer) & dims_of(other) for other in found):
            log.pin(layer, INSIDE)
        elif dims_of(layer):
            found.append(layer)
    return found


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Which dimensions of two shapes of as many entries hold the same: ([0], [0, 1]) for (6, 2) and (2, 3, 2)."""
    blocks, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        if i == len(old) or j == len(new):
            blocks.append((list(range(i, len(old))), list(range(j, len(new)))))
            break
        mine, theirs, left, right = [i], [j], old[i], new[j]
        while left != right:
            if left < right:
                mine.append(mine[-1] + 1)
                left *= old[mine[-1]]
            else:
                theirs.append(theirs[-1] + 1)
                right *= new[theirs[-1]]
        blocks.append((mine, theirs))
        i, j = mine[-1] + 1, theirs[-1] + 1
    return blocks


def put(value: Value, layers: Iterable[Tensor], shape: Sequence[int]) -> Value:
    """The same in another shape, with these layers."""
    return replace(value, shape=tuple(shape), layers=tuple(layer for layer in layers if dims_of(layer)))


# ---- sums of products


def read(log: Log, layer: Tensor, columns: Tensor, dim: int) -> Tensor | None:
    """A layer of what a weight's columns read along a dimension; what is left of it when they are summed over."""
    if is_outer(layer, dim):
        log.tie(layer, columns)
        return None
    log.pin(columns, INSIDE)
    return log.collapse(layer, dim, INSIDE)
