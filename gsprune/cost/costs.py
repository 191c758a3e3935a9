"""The cost that stays of a dense network when units are removed: parameters, MACs, milliseconds.

A cost is the share of the dense network's own, in (0, 1]. Parameters and MACs are counted. Milliseconds come from a
table of the layers, measured at several widths on the model's device. The dense model is read once and not changed,
nor is the state of random number generators; only milliseconds are measured again later, on a copy.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from gsprune import latency
from gsprune.collectives import broadcast
from gsprune.cost.counting import count_macs, count_macs_by_module, named_layers
from gsprune.cost.latency_tables import BLOCK, MULTIPLE, WIDE, Measured, Table, block_of, known_tables
from gsprune.cost.lengths import Left, Lengths
from gsprune.export.runtimes import CONVOLUTIONS, EAGER, Measure
from gsprune.structures.running import device_of, same_randomness
from gsprune.structures.structure import Structure
from gsprune.structures.twin import copy_of
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.cut_plan import plan_cut
from gsprune.surgery.no_branch import inside
from gsprune.text.names import joined

DOUBT = 2.0  # times the savings of the table: what a clock says beyond that is a busy machine's noise
Keeps = Sequence[Tensor]  # bool (units,) of each structure


def make_cost(
    kind: str, model: nn.Module, structures: Sequence[Structure], example_input: Any, measure: Measure = EAGER
) -> Cost:
    """The cost "macs", "params" or "latency" of `model`, the last as `measure` says."""
    with same_randomness(model):
        if kind == "params":
            return _Parameters(model, structures)
        if kind == "macs":
            return _Macs(model, structures, example_input)
        return _Latency(model, structures, example_input, measure)


class Cost(ABC):
    """The share of a dense network's cost that stays with some units, 1 - factor * (1 - what the parts add up to).

    The factor is 1 until a comparison with the truth says otherwise.
    """

    clocked = False  # whether a clock says what is true
    multiple = 1  # of units that the device likes in a wide structure

    def __init__(self, structures: Sequence[Structure]) -> None:
        self._structures, self._factor = structures, 1.0
        self._left = Lengths(structures)
        self._model: nn.Module | None = None  # the user's, while the budget is being made

    @property
    def factor(self) -> float:
        """Times the savings of the parts."""
        return self._factor

    def __call__(self, keeps: Keeps) -> float:
        return 1 - self._factor * (1 - self._parts(keeps))

    @abstractmethod
    def _parts(self, keeps: Keeps) -> float:
        """The sum of all parts as a share of the dense network's."""

    def _of_heads(self, costs: Mapping[str, float], keeps: Keeps, removed: Collection[str]) -> float:
        """What goes with the heads that go, of what attentions cost by themselves; all where the attention goes."""
        return sum(
            costs.get(structure.name, 0.0)
            * (1 - (0 if inside(structure.name, removed) else int(keep.sum()) / structure.units))
            for structure, keep in zip(self._structures, keeps, strict=True)
            if structure.kind == "heads"
        )

    def truth(self, keeps: Keeps) -> float:
        """The share that the network really has which is left when these units are cut out of a copy."""
        return self(keeps)

    def correct(self, keeps: Keeps, truth: float) -> bool:
        """Make the sum over the parts agree with the truth for these units, if they say anything about it."""
        saved = 1 - self._parts(keeps)
        if saved <= 0 or truth >= 1:
            return False
        self._factor = (1 - truth) / saved
        return True

    def forget(self) -> None:
        """Let go of the user's model."""
        self._model = None

    def state_dict(self) -> dict[str, Any]:
        """What was found out, as plain dicts, lists and numbers."""
        return {"factor": self._factor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what was found out elsewhere."""
        self._factor = state["factor"]


class _Parameters(Cost):
    """Exact: the plan of the cut says how much of each tensor stays."""

    def __init__(self, model: nn.Module, structures: Sequence[Structure]) -> None:
        super().__init__(structures)
        self._sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        self._first = first_names(model)

    def _parts(self, keeps: Keeps) -> float:
        left = self._left(keeps)
        names = dict.fromkeys(self._first.get(name, name) for name in left.lengths)
        if left.removed:
            names |= dict.fromkeys(name for name in self._sizes if inside(name, left.removed))
        gone = sum(self._sizes.get(name, 0) * (1 - _share(left, name, self._first)) for name in names)
        return 1 - gone / sum(self._sizes.values())


class _Macs(Cost):
    """A layer's MACs go with the elements of its weight, an attention's own with its heads, those of a module with
    tensors of its own (experts, recurrent layers) with the elements of these; the rest stays."""

    def __init__(self, model: nn.Module, structures: Sequence[Structure], example_input: Any) -> None:
        super().__init__(structures)
        self._model, self._example_input = model, example_input
        found = count_macs_by_module(model, example_input)
        self._total = found[""]
        self._layers = {name: found[name] for name in named_layers(model) if name in found}
        self._heads = {
            s.name: found[s.name] - sum(n for name, n in self._layers.items() if name.startswith(f"{s.name}."))
            for s in structures
            if s.kind == "heads" and s.name in found
        }
        branches = [path for s in structures for path in s.removed if path in found and path not in self._heads]
        self._between = {path: found[path] - sum(_macs_in(path, self._layers, self._heads)) for path in branches}
        self._own = _macs_of_tensors(model, found, {*self._layers, *self._heads})
        self._first = first_names(model)
        if not self._total:
            raise ValueError("budget.macs needs a model with MACs to count, and this one has none: set budget.params")

    def _parts(self, keeps: Keeps) -> float:
        left, first = self._left(keeps), self._first
        gone = sum(macs * (1 - _share(left, joined(name, "weight"), first)) for name, macs in self._layers.items())
        gone += self._of_heads(self._heads, keeps, left.removed)
        gone += sum(macs * (1 - _share(left, name, first)) for name, macs in self._own.items())
        gone += sum(self._between.get(path, 0) for path in left.removed)
        return 1 - gone / self._total

    def truth(self, keeps: Keeps) -> float:
        assert self._model is not None
        smaller = _shrunk(self._model, self._structures, keeps)
        with same_randomness(smaller):
            return count_macs(smaller, self._example_input) / self._total


class _Latency(Cost):
    """A layer's milliseconds stand in a table, an attention's own go with its heads, those of norms and activations
    with the branch that they are part of; what is between them else stays."""

    clocked = True

    def __init__(self, model: nn.Module, structures: Sequence[Structure], example_input: Any, measure: Measure) -> None:
        super().__init__(structures)
        measure.check()
        self._twin, self._measure, self._inputs = _copy(model), measure, measure.inputs(example_input)
        self._dense: nn.Module | None = None  # ready to run, once it was asked for
        with measure.running():
            self._found = known_tables(self._twin, structures, self._inputs, measure)
            is_wide = any(structure.units >= WIDE * BLOCK for structure in structures)
            convolves = any(isinstance(self._twin.get_submodule(name), CONVOLUTIONS) for name in self._found.tables)
            is_on_cpu = measure.is_foreign or device_of(self._twin).type == "cpu"
            self.multiple = block_of(measure) if is_wide and convolves and is_on_cpu else MULTIPLE

    def _parts(self, keeps: Keeps) -> float:
        left, found = self._left(keeps), self._found
        gone = sum(
            table.ms[-1][-1]
            if inside(name, left.removed)
            else table.saved(*_lengths(left, joined(name, "weight"), table))
            for name, table in found.tables.items()
        )
        gone += self._of_heads(found.heads, keeps, left.removed)
        gone += sum(found.between.get(path, 0.0) for path in left.removed)
        return 1 - gone / found.ms

    def truth(self, keeps: Keeps) -> float:
        if all(bool(keep.all()) for keep in keeps):
            return 1.0
        small = _shrunk(self._twin, self._structures, keeps)
        with same_randomness(self._twin), self._measure.running():
            self._dense = self._dense or self._measure.prepared(self._twin, self._inputs)
            both = {"dense": self._dense, "cut": self._measure.prepared(small, self._inputs)}
            found = broadcast(latency.latency_ms(both, (), repeats=30, max_seconds=2.0))
        return found["cut"] / found["dense"]

    def correct(self, keeps: Keeps, truth: float) -> bool:
        is_known = super().correct(keeps, truth)
        self._factor = min(max(self._factor, 1 / DOUBT), DOUBT)
        return is_known

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **asdict(self._found), "multiple": self.multiple}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if (multiple := state.get("multiple", MULTIPLE)) not in (MULTIPLE, BLOCK):
            raise ValueError(
                f"the saved multiple of a latency budget is {multiple!r}: it must be {MULTIPLE} or {BLOCK}"
            )
        tables = {name: Table(**table) for name, table in state["tables"].items()}
        between = dict(state.get("between", {}))  # older states have none
        self._found, self.multiple = Measured(state["ms"], tables, dict(state["heads"]), between), multiple


# ---- on the way


def _copy(model: nn.Module) -> nn.Module:
    twin = copy_of(model).eval()
    for parameter in twin.parameters():
        parameter.grad = None
    return twin


def _shrunk(model: nn.Module, structures: Sequence[Structure], keeps: Keeps) -> nn.Module:
    twin = _copy(model)
    apply_cut(twin, plan_cut(structures, keeps))
    return twin


def _share(left: Left, tensor: str, first: Mapping[str, str]) -> float:
    """The share of a tensor's elements that stays, under whatever name of a shared one it does."""
    if left.removed and inside(tensor, left.removed):
        return 0.0
    names = [tensor]
    if first and tensor in first:
        names = [name for name, other in first.items() if other == first[tensor]]
    shares = {d: kept / size for name in names for d, (kept, size) in left.lengths.get(name, {}).items()}
    return math.prod(shares.values())


def _macs_in(path: str, *of: Mapping[str, float]) -> list[float]:
    """What is known of inside a module."""
    return [macs for found in of for name, macs in found.items() if inside(name, [path])]


def first_names(model: nn.Module) -> dict[str, str]:
    """Each name of a tensor that has several -> the first of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: every[0] for every in names.values() if len(every) > 1 for name in every}


def _macs_of_tensors(model: nn.Module, found: Mapping[str, int], known: Collection[str]) -> dict[str, float]:
    """MACs of modules that hold matrices and are none of the known layers, shared out by the matrices' sizes."""
    shared: dict[str, float] = {}
    for name, module in model.named_modules():
        sizes = {joined(name, n): p.numel() for n, p in module.named_parameters(recurse=False) if p.dim() > 1}
        if name in known or name not in found or not sizes:
            continue
        own = found[name] - _macs_of_children(name, module, found)
        shared |= {tensor: max(0, own) * size / sum(sizes.values()) for tensor, size in sizes.items()}
    return shared


def _macs_of_children(name: str, module: nn.Module, found: Mapping[str, int]) -> int:
    """MACs of the modules inside one that are called; those of a list, which never is, by the modules in it."""
    children = [(joined(name, child), inner) for child, inner in module.named_children()]
    return sum(found[path] if path in found else _macs_of_children(path, inner, found) for path, inner in children)


def _lengths(left: Left, tensor: str, table: Table) -> tuple[int, int]:
    """Rows and columns of a layer's weight that stay."""
    cuts = left.lengths.get(tensor, {})
    rows, columns = (cuts[d][0] if d in cuts else points[-1] for d, points in enumerate((table.rows, table.columns)))
    return rows, columns
