"""Milliseconds of a network's layers at several widths, measured on the model's device or in another runtime."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gsprune import latency
from gsprune.collectives import broadcast, world_size
from gsprune.cost.counting import named_layers
from gsprune.export.runtimes import EAGER, Call, Measure
from gsprune.files.disk import sha256_of_json
from gsprune.structures.example import call
from gsprune.structures.matrices import is_conv1d
from gsprune.structures.running import hooked
from gsprune.structures.structure import Structure
from gsprune.structures.twin import copy_of
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.cut_plan import CutPlan
from gsprune.text.names import joined

MULTIPLE = 8  # of channels and neurons: a convolution of 100 or 101 channels takes the time of one of 104
BLOCK = 16  # channels that CPUs of wide registers compute at once: what is no multiple takes the time of the next one
WIDE = 4  # blocks that a structure has to have for its counts to be whole ones
PROBED = 64  # channels of the layer that tells
WIDTHS = (1 / 8, 1 / 4, 1 / 2)  # of a layer's rows and columns that are measured beside the full ones


@dataclass(frozen=True)
class Table:
    """Milliseconds of one layer by the rows and columns of its weight (dimensions 0 and 1), both rising.

    Between two points the value is interpolated along both, and below the first the same line goes on, not below 0.

    >>> table = Table(rows=[8, 16], columns=[4, 8], ms=[[1.0, 2.0], [2.0, 4.0]])
    >>> table(12, 6), table(16, 8), table(4, 8), table.saved(16, 4)
    (2.25, 4.0, 1.0, 2.0)
    """

    rows: list[int]
    columns: list[int]
    ms: list[list[float]]

    def __call__(self, rows: int, columns: int) -> float:
        (r, down), (c, right) = _place(self.rows, rows), _place(self.columns, columns)
        low, high = (self.ms[min(r + n, len(self.rows) - 1)] for n in (0, 1))
        upper, lower = (line[c] * (1 - right) + line[min(c + 1, len(line) - 1)] * right for line in (low, high))
        return max(0.0, upper * (1 - down) + lower * down)

    def saved(self, rows: int, columns: int) -> float:
        """What the dense layer takes longer."""
        return self.ms[-1][-1] - self(rows, columns)


def _place(points: Sequence[int], value: int) -> tuple[int, float]:
    """The point to start from, and how far it is on the way to the next, below 0 in front of the first.

    >>> _place([8, 16, 32], 20), _place([8, 16, 32], 32), _place([8, 16], 4), _place([6], 3)
    ((1, 0.25), (1, 1.0), (0, -0.5), (0, 0.0))
    """
    if len(points) == 1:
        return 0, 0.0
    at = min(max(bisect_left(points, value) - 1, 0), len(points) - 2)
    return at, (value - points[at]) / (points[at + 1] - points[at])


@dataclass(frozen=True)
class Measured:
    """Milliseconds of a network and of its parts.

    ms        of the whole
    tables    of each layer that can be cut, summed over its calls
    heads     of each attention, without the layers inside it
    between   of each module that goes with a branch, without the layers and attentions inside it
    """

    ms: float
    tables: dict[str, Table]
    heads: dict[str, float]
    between: dict[str, float]

    def scaled(self, scale: float, ms: float) -> Measured:
        """All parts times `scale`, of a whole that takes `ms`."""
        tables = {
            n: Table(t.rows, t.columns, [[scale * v for v in line] for line in t.ms]) for n, t in self.tables.items()
        }
        heads, between = ({name: scale * value for name, value in part.items()} for part in (self.heads, self.between))
        return Measured(ms, tables, heads, between)


_KNOWN: dict[str, Measured] = {}  # of this process, the last ones
KNOWN = 16
_BLOCKS: dict[str, int] = {}  # of this process


def known_tables(model: nn.Module, structures: Sequence[Structure], example_input: Any, measure: Measure) -> Measured:
    """`measure_tables`, measured once in a process for networks of one architecture, input and runtime."""
    if world_size() > 1:  # which all have to measure, or none
        return measure_tables(model, structures, example_input, measure)
    alike = [[s.name, s.kind, s.units] for s in structures]
    key = sha256_of_json([latency.measurement_key(model, model, example_input), alike, str(measure)])
    found = _KNOWN.pop(key, None) or measure_tables(model, structures, example_input, measure)
    _KNOWN[key] = found
    while len(_KNOWN) > KNOWN:
        del _KNOWN[next(iter(_KNOWN))]
    return found


def block_of(measure: Measure) -> int:
    """Of how many channels a runtime computes a convolution at once, measured there: `MULTIPLE` or `BLOCK`.

    A 3 x 3 convolution of 64 channels takes as long with 56 and less with 48 where blocks are of 16. Where the clock
    says neither clearly, it is `MULTIPLE`; on a GPU and under `torch.compile`, which decide by themselves, too.
    """
    if measure.runtime == "compile":
        return MULTIPLE
    key = f"block {measure.runtime} {measure.threads or torch.get_num_threads()}"
    if key not in _BLOCKS or world_size() > 1:  # processes have to measure all, or none
        widths = (PROBED, PROBED - BLOCK // 2, PROBED - BLOCK)
        layers = {n: nn.Conv2d(n, n, 3, padding=1, device="cpu", dtype=torch.float32) for n in widths}
        stages = {f"{key} {n}": measure.prepared_layer(m, torch.ones(1, n, 28, 28)) for n, m in layers.items()}
        ms = broadcast(latency.latency_ms(stages, (), repeats=30, warmup=3, max_seconds=2.0))
        whole, half_less, less = (ms[f"{key} {n}"] for n in widths)
        _BLOCKS[key] = BLOCK if half_less > 0.9 * whole and less < 0.8 * whole else MULTIPLE
    return _BLOCKS[key]


def measure_tables(
    model: nn.Module, structures: Sequence[Structure], example_input: Any, measure: Measure = EAGER
) -> Measured:
    """Milliseconds of the whole model, of its layers at several widths, and of attentions and branches beside these.

    Everything takes turns in one measurement, so that a busy machine slows all of it alike; layers with the same
    settings and input are measured once. In another runtime than PyTorch's own, attentions and branches take the share
    of the whole that they take in PyTorch; under `torch.compile` layers do, too: alone they are not compiled.
    """
    if measure.runtime == "compile":
        eager, compiled = measure_tables(model, structures, example_input), measure.prepared(model, example_input)
        whole = broadcast(latency.latency_ms({"": compiled}, (), repeats=20, warmup=3, max_seconds=6.0))[""]
        return eager.scaled(whole / eager.ms, whole)
    cut = {(member.tensor, member.dim) for s in structures for member in (*s.producers, *s.consumers)}
    layers = {
        name: layer
        for name, layer in named_layers(model).items()
        if {(joined(name, "weight"), d) for d in (0, 1)} & cut
    }
    attentions = [s.name for s in structures if s.kind == "heads"]
    branches = [path for s in structures for path in s.removed if path not in attentions and path not in layers]
    around = {name: model.get_submodule(name) for name in (*attentions, *branches) if not measure.is_foreign}
    calls = _calls(model, layers | around, example_input)
    grids = {
        name: [
            _points(length, is_cut=(joined(name, "weight"), dim) in cut, multiple=_multiple(layer, dim))
            for dim, length in enumerate(layer.weight.shape[:2])
        ]
        for name, layer in layers.items()
    }
    stages: dict[str, nn.Module] = {"": measure.prepared(model, example_input)}
    keys: dict[str, list[str]] = {name: [] for name in layers}  # of each call of a layer
    for name, (rows, columns) in grids.items():
        for args, kwargs in calls[name]:
            x = args[0] if args else next(iter(kwargs.values()))
            key = f"{layers[name]} {rows} {columns} {x.dtype} {tuple(x.shape)} {x.stride()}"
            if f"{key} {rows[0]} {columns[0]}" not in stages:
                stages |= {
                    f"{key} {r} {c}": measure.prepared_layer(*_narrowed(layers[name], x, r, c))
                    for r in rows
                    for c in columns
                }
            keys[name].append(key)
    stages |= {f"call {i} of {n}": Call(m, *call) for n, m in around.items() for i, call in enumerate(calls[n])}
    ms = broadcast(
        latency.latency_ms(stages, (), repeats=20, warmup=3, max_seconds=6.0)
    )  # all processes believe one clock
    tables = {
        name: _table(rows, columns, [[[ms[f"{key} {r} {c}"] for c in columns] for r in rows] for key in keys[name]])
        for name, (rows, columns) in grids.items()
        if keys[name]
    }
    if measure.is_foreign:
        heads, between = _as_in_eager(model, structures, example_input, ms[""])
    else:
        all_of = {name: sum(ms[f"call {i} of {name}"] for i in range(len(calls[name]))) for name in around}
        heads = {name: max(0.0, all_of[name] - _sum(tables, inside=name)) for name in attentions}
        others = {name: _sum(tables, inside=name) + _own(heads, inside=name) for name in branches}
        between = {name: max(0.0, all_of[name] - others[name]) for name in branches}
    # The parts, made smaller where they add up to more than the whole: alone each finds a colder cache.
    parts = _sum(tables) + sum(heads.values()) + sum(between.values())
    return Measured(ms[""], tables, heads, between).scaled(min(1.0, ms[""] / (parts or ms[""])), ms[""])


def _as_in_eager(
    model: nn.Module, structures: Sequence[Structure], example_input: Any, ms: float
) -> tuple[dict[str, float], dict[str, float]]:
    """What attentions and branches take of `ms` if that is shared out as in PyTorch."""
    heads_of = [s for s in structures if s.kind == "heads"]
    needed = structures if any(s.removed for s in structures) else heads_of
    if not needed:
        return {}, {}
    eager = measure_tables(model, needed, example_input)
    found = eager.scaled(ms / eager.ms, ms)
    return found.heads, found.between


def _sum(tables: Mapping[str, Table], *, inside: str = "") -> float:
    return _own({name: table.ms[-1][-1] for name, table in tables.items()}, inside=inside)


def _own(ms: Mapping[str, float], *, inside: str = "") -> float:
    return sum(value for name, value in ms.items() if not inside or name.startswith(f"{inside}."))


def _table(rows: list[int], columns: list[int], ms_crc: list[list[list[float]]]) -> Table:
    """The sum over a layer's calls; what is narrower takes no longer, so that a measurement's noise misleads no search.

    >>> _table([8, 16], [4], [[[1.5], [1.0]], [[1.0], [3.0]]]).ms
    [[2.5], [4.0]]
    """
    summed = torch.tensor(ms_crc, dtype=torch.float64).sum(0)
    return Table(rows, columns, summed.cummax(0).values.cummax(1).values.tolist())


def _multiple(layer: Any, dim: int) -> int:
    """What the length of a dimension of a layer's weight has to be a multiple of: each group keeps as many.

    A depthwise layer loses groups: as many rows as it has filters a channel.
    """
    groups = getattr(layer, "groups", 1)
    is_depthwise = groups > 1 and groups == layer.in_channels
    return 1 if dim else layer.out_channels // groups if is_depthwise else groups


def _points(length: int, *, is_cut: bool, multiple: int = 1) -> list[int]:
    """The widths to measure of a dimension.

    >>> _points(64, is_cut=True), _points(20, is_cut=True), _points(20, is_cut=False), _points(6, is_cut=True)
    ([8, 16, 32, 64], [8, 20], [20], [6])
    """
    multiples = {MULTIPLE * max(1, round(length * share / MULTIPLE)) for share in WIDTHS} if is_cut else set()
    return sorted({width for width in multiples if width < length and width % multiple == 0} | {length})


def _calls(
    model: nn.Module, modules: Mapping[str, nn.Module], example_input: Any
) -> dict[str, list[tuple[tuple[Any, ...], Mapping[str, Any]]]]:
    """What each module is called with in one forward pass, but for caches of keys and values: these grow with each call
    of an attention, which would take longer and longer."""
    calls: dict[str, list[tuple[tuple[Any, ...], Mapping[str, Any]]]] = {name: [] for name in modules}

    def without_cache(value: Any) -> Any:
        return None if hasattr(value, "get_seq_length") else value

    def note(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        kept = {key: without_cache(value) for key, value in kwargs.items()}
        calls[name].append((tuple(map(without_cache, args)), kept))

    hooks = (
        module.register_forward_pre_hook(lambda _, args, kwargs, name=name: note(name, args, kwargs), with_kwargs=True)
        for name, module in modules.items()
    )
    with hooked(hooks), torch.inference_mode():
        call(model, example_input)
    return calls


def _narrowed(layer: nn.Module, x: Tensor, rows: int, columns: int) -> tuple[nn.Module, Tensor]:
    """A copy of a layer with the first rows and columns of its weight, and an input of its new width."""
    home: Any = nn.Module()
    home.layer = copy_of(layer)
    outputs = rows
    if is_conv1d(layer) or getattr(layer, "transposed", False):  # the inputs are the rows of its weight
        outputs = columns * getattr(layer, "groups", 1)
    kept = {"layer.weight": {0: rows, 1: columns}, "layer.bias": {0: outputs}}
    if home.layer.bias is None:
        del kept["layer.bias"]
    sizes = {name: {dim: home.get_parameter(name).shape[dim] for dim in cuts} for name, cuts in kept.items()}
    cuts = {name: {dim: torch.arange(n) for dim, n in lengths.items()} for name, lengths in kept.items()}
    apply_cut(home, CutPlan(cuts, sizes, {}))
    if isinstance(layer, nn.Linear):
        narrow = x.narrow(-1, 0, home.layer.in_features)
    elif is_conv1d(layer):
        narrow = x.narrow(-1, 0, home.layer.nx)
    else:
        narrow = x.narrow(-1 - len(home.layer.kernel_size), 0, home.layer.in_channels)
    return home.layer, torch.ones_like(narrow)  # in the input's own memory format
