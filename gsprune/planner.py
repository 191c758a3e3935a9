"""What a pruner would do, without training: what there is, what would stay, what it would cost, what is left whole.

`plan` counts, `render` shows. All measuring happens on one deep copy; neither the model nor the pruner is changed.
Imports torch, the rooms pruner, pruners, budgets, targets, patterns, selection, schedules, structures, shrink, metrics;
rich to render.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gsprune.budgets import KINDS, Budget
from gsprune.examples import copy_of
from gsprune.metrics import LAYERS, count_macs_by_module, count_parameters
from gsprune.names import alike, folded, told
from gsprune.patterns import Block, Pattern, Tile
from gsprune.pruner import NoPruning, Pruner
from gsprune.pruners import Pruners
from gsprune.schedules import Schedule
from gsprune.selection import pruned_count
from gsprune.targets import Target, UnitTarget, WeightTarget

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = [
    "Cost",
    "Entry",
    "PruningPlan",
    "PruningPlans",
    "collapsed",
    "foreseen",
    "plan",
    "plan_several",
    "print_plan",
    "render",
]

FEW = {"channels": 4, "neurons": 4, "heads": 2}  # fewer units than this are about to collapse
FEW_SHARE = 20  # as is less than one in so many, of units and of weights
NAMED_HERE = "include, exclude, keep or kinds leaves it out"


@dataclass(frozen=True)
class Cost:
    """Parameters (zeros included) and MACs of the example input; MACs are None where nothing counts them."""

    params: int
    macs: int | None


@dataclass(frozen=True)
class Entry:
    """One structure or one weight tensor.

    name      as in `Pruner.masks()`
    kind      "channels", "neurons", "heads" or "weights"
    layers    modules that compute it
    total     units or weights there are
    least, most   how many stay at the schedule's end; the same number twice where that is certain
    dense, pruned   what `layers` cost now and in the end; `pruned` is None where the scores decide it
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    total: int
    least: int
    most: int
    dense: Cost
    pruned: Cost | None

    @property
    def kept(self) -> int | None:
        """How many stay, if that is certain."""
        return self.least if self.least == self.most else None


@dataclass(frozen=True)
class PruningPlan:
    """What a pruner would leave at its schedule's end; numbers only, nothing refers to the model.

    criterion     its class; None: nothing is pruned
    structured    units are removed, or single weights are zeroed
    scope         "local": counts are exact; "global": one ranking over all entries, of which only bounds are known
    pattern, per_channel, min_kept   the pruner's settings
    entries       structures or tensors, in the model's order
    total         units or weights of all entries
    kept          how many of them stay (exact in both scopes, save where `min_kept` outweighs an N:M pattern: at least;
                  under a budget as many as if every structure gave the same share)
    dense, pruned   cost of the whole model now and in the end; `pruned` is None where the scores decide it
    even          cost if every structure gave the same share of its units, where the scores decide it
    params_left   parameters that are not pruned (not masked, not cut away), in the end; None where the scores decide it
    macs_left     MACs with weights that are not pruned; None where the scores decide it
    skipped       what is left whole -> why
    collapsing    entries about to collapse -> what is left of them
    schedule      (epoch of the pruning phase, sparsity over all entries; under a budget the share of the cost gone)
    notes         whole sentences for the user
    budget        what share of which cost may stay, as {"macs": 0.5}; empty where a share or a count of units is wanted
    coverage      share of the model's matrix weights that is targeted, as `Pruner.coverage`
    """

    criterion: str | None
    structured: bool
    scope: str
    pattern: str
    per_channel: bool
    min_kept: int
    entries: tuple[Entry, ...]
    total: int
    kept: int
    dense: Cost
    pruned: Cost | None
    even: Cost | None
    params_left: int | None
    macs_left: int | None
    skipped: Mapping[str, str] = field(default_factory=dict)
    collapsing: Mapping[str, str] = field(default_factory=dict)
    schedule: tuple[tuple[float, float], ...] = ()
    notes: tuple[str, ...] = ()
    budget: Mapping[str, float] = field(default_factory=dict)
    coverage: float = 0.0

    @property
    def sparsity(self) -> float:
        """Share of units or weights gone in the end."""
        return 1 - self.kept / self.total if self.total else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        data = asdict(self) | {"sparsity": self.sparsity}
        data["entries"] = [asdict(entry) | {"kept": entry.kept, "layers": [*entry.layers]} for entry in self.entries]
        return data | {"schedule": [[*point] for point in self.schedule], "notes": [*self.notes]}


@dataclass(frozen=True)
class PruningPlans:
    """What several pruners of one run would leave.

    parts           the plan of each, as if it were alone
    dense, pruned   cost of the whole model now, and when all units are cut out; `pruned` is None where scores decide it
    """

    parts: tuple[PruningPlan, ...]
    dense: Cost
    pruned: Cost | None

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        pruned = None if self.pruned is None else asdict(self.pruned)
        return {"parts": [part.to_json() for part in self.parts], "dense": asdict(self.dense), "pruned": pruned}


def plan(model: nn.Module, pruner: Pruner | NoPruning, example_input: Any) -> PruningPlan:
    """What `pruner` would leave of `model` at its schedule's end; nothing is trained and nothing changes.

    Under local scope the counts are exact. Under global scope the scores share them out, so there are bounds for each
    entry; the total is exact. A smaller network is measured by shrinking a copy to its first units: all units of a
    structure cost the same.

    About to collapse: fewer than 4 channels or neurons, a single head, fewer than 5 % of the units or weights, or
    less than one weight for each output of a layer, which leaves some outputs with none.

    Raises:
        ValueError: the pruner is of another model, or has shrunk it; its schedule has no end; the network that
            would be left does not run.

    >>> from gsprune.criteria import Magnitude
    >>> from gsprune.schedules import OneShot
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> pruner = Pruner(model, Magnitude(), scope="local", target_sparsity=0.75, schedule=OneShot())
    >>> [(entry.name, entry.total, entry.kept) for entry in plan(model, pruner, torch.ones(1, 8)).entries]
    [('0.weight', 128, 32), ('2.weight', 32, 8)]
    """
    if pruner.model is not model:
        raise ValueError("this pruner belongs to another model: plan with the model that the Pruner was made for")
    if pruner.plan is not None:
        raise ValueError("this pruner has shrunk its model already: plan before training")
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):  # a forward pass may draw random numbers
        twin = copy_of(model)
        if isinstance(pruner, NoPruning):
            return _no_plan(twin, example_input)
        return (
            _plan_units(twin, pruner, example_input)
            if pruner.structured
            else _plan_weights(twin, pruner, example_input)
        )


def plan_several(model: nn.Module, pruner: Pruners, example_input: Any) -> PruningPlans:
    """The same for several pruners: each one's plan, and what all of them leave together.

    Raises:
        ValueError: as of `plan`.
    """
    parts = tuple(plan(model, part, example_input) for part in pruner.parts)
    units = [part for part in parts if part.structured]
    twin = copy_of(model)
    dense = parts[0].dense
    if any(part.pruned is None for part in units):
        return PruningPlans(parts, dense, None)
    _shrink_to(twin, pruner.unit_targets, [entry.least for part in units for entry in part.entries])
    return PruningPlans(parts, dense, _cost(twin, [], example_input)[0])


def print_plan(plan: PruningPlan | PruningPlans) -> None:
    """Print the plan on the screen."""
    from rich.console import Console

    Console(file=sys.stdout, highlight=False, markup=False).print(render(plan))


# ---- units


def _plan_units(twin: nn.Module, pruner: Pruner, example_input: Any) -> PruningPlan:
    targets = [target for target in pruner.targets if isinstance(target, UnitTarget)]
    skipped = _skipped_units(pruner, targets)
    bounds, kept = _bounds(pruner)
    is_exact = pruner.budget is None and all(least == most for least, most in bounds)
    counts = [least for least, _ in bounds] if is_exact else _even(pruner, targets, kept)
    dense, dense_layers = _cost(twin, targets, example_input)
    _shrink_to(twin, targets, counts)
    try:
        smaller, layers = _cost(twin, targets, example_input)
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the network that this plan would leave does not run: {line}") from error
    after = [cost if is_exact else None for cost in layers]
    entries = tuple(
        Entry(target.name, target.structure.kind, target.structure.modules(), target.total, *bound, before, cost)
        for target, bound, before, cost in zip(targets, bounds, dense_layers, after, strict=True)
    )
    return PruningPlan(
        **_settings(pruner, entries, kept),
        skipped=skipped,
        dense=dense,
        pruned=smaller if is_exact else None,
        even=None if is_exact else smaller,
        params_left=smaller.params if is_exact else None,
        macs_left=smaller.macs if is_exact else None,
    )


def _shrink_to(twin: nn.Module, targets: Sequence[UnitTarget], counts: Sequence[int]) -> None:
    """Cut the twin to the first units of every structure."""
    from gsprune.shrink import apply_plan, plan_shrink  # heavy: imports torch-pruning

    keeps = [torch.arange(target.total) < count for target, count in zip(targets, counts, strict=True)]
    apply_plan(twin, plan_shrink([target.structure for target in targets], keeps))


def _even(pruner: Pruner, targets: Sequence[UnitTarget], kept: int) -> list[int]:
    """The same share of every structure."""
    if pruner.budget is not None:
        return [int(keep.sum()) for keep in pruner.budget.even()]
    share = kept / sum(target.total for target in targets)
    return [max(1, target.total - pruned_count(1 - share, target.total)) for target in targets]


def _skipped_units(pruner: Pruner, targets: Sequence[UnitTarget]) -> dict[str, str]:
    """Every layer whose rows are not up for pruning, in the model's order."""
    chosen = {name for target in targets for name in target.structure.modules()}
    layers = [name for name, module in pruner.model.named_modules() if isinstance(module, LAYERS)]
    by_name = {name: NAMED_HERE for structure in pruner.left_out for name in structure.modules() if name not in chosen}
    reasons = {**pruner.skipped, **by_name}
    tied = "it is coupled to a layer that is left whole, or not traced"
    order = {name: place for place, (name, _) in enumerate(pruner.model.named_modules())}
    found = {name: reasons.get(name, tied) for name in layers if name not in chosen} | reasons
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


# ---- single weights


def _plan_weights(twin: nn.Module, pruner: Pruner, example_input: Any) -> PruningPlan:
    targets = [target for target in pruner.targets if isinstance(target, WeightTarget)]
    bounds, kept = _bounds(pruner)
    dense, layers = _cost(twin, targets, example_input)
    entries = tuple(
        Entry(target.name, "weights", (_module(target.name),), target.total, *bound, cost, cost)
        for target, bound, cost in zip(targets, bounds, layers, strict=True)
    )
    return PruningPlan(
        **_settings(pruner, entries, kept),
        skipped=_skipped_weights(pruner),
        dense=dense,
        pruned=dense,
        even=None,
        params_left=dense.params - sum(entry.total for entry in entries) + kept,
        macs_left=_macs_left(dense, entries),
    )


def _macs_left(dense: Cost, entries: Sequence[Entry]) -> int | None:
    """MACs whose weight is not zero; None where a layer's share of them is not known."""
    left = dense.macs
    for entry in entries:
        if left is None or entry.kept is None or entry.dense.macs is None:
            return None
        left -= entry.dense.macs - entry.dense.macs * entry.kept // entry.total
    return left


def _skipped_weights(pruner: Pruner) -> dict[str, str]:
    """Every matrix or kernel that is no target; biases, norms and other vectors are never pruned."""
    names = {target.name for target in pruner.targets}
    matrices = [name for name, tensor in pruner.model.named_parameters(remove_duplicate=False) if tensor.dim() > 1]
    named = "include or exclude leaves it out"
    return {name: pruner.skipped.get(name, named) for name in matrices if name not in names}


# ---- counting


def _bounds(pruner: Pruner) -> tuple[list[tuple[int, int]], int]:
    """(least, most) units or weights that stay of every target in the end, and how many of all.

    These are `selection.select`'s counts, which depend on the scores only in how one ranking shares them out.
    """
    if pruner.budget is not None:
        return pruner.budget.bounds(), sum(int(keep.sum()) for keep in pruner.budget.even())
    shares = [schedule.final for schedule in pruner.schedules]
    if pruner.scope == "local":
        counts = [_local(t, share, pruner.min_kept) for t, share in zip(pruner.targets, shares, strict=True)]
        return [(count, count) for count in counts], sum(counts)
    return _global(pruner.targets, shares[0], pruner.min_kept)


def _local(target: Target, share: float, min_kept: int) -> int:
    rows, n = target.groups().shape
    size = target.total // (rows * n)  # units or weights in a group
    pruned = max(pruned_count(share, n), target.pruned // (rows * size))
    return (n - min(pruned, n - min(min_kept, n))) * rows * size


def _global(targets: Sequence[Target], share: float, min_kept: int) -> tuple[list[tuple[int, int]], int]:
    groups = [target.groups().numel() for target in targets]
    sizes = [target.total // n for target, n in zip(targets, groups, strict=True)]
    gone = [target.pruned // size for target, size in zip(targets, sizes, strict=True)]
    floors = [max(min(min_kept, n), _fixed(t, n)) for t, n in zip(targets, groups, strict=True)]
    total = max(sum(groups) - max(pruned_count(share, sum(groups)), sum(gone)), sum(floors))
    is_loose = any(0 < _fixed(t, n) < min(min_kept, n) for t, n in zip(targets, groups, strict=True))
    tops = [n - old for n, old in zip(groups, gone, strict=True)]
    bounds = []
    for floor, top, size in zip(floors, tops, sizes, strict=True):
        least = max(floor, total - (sum(tops) - top))
        most = top if is_loose else min(top, total - (sum(floors) - floor))
        bounds.append((least * size, most * size))
    return bounds, total * sizes[0]


def _fixed(target: Target, n: int) -> int:
    """Groups that an N:M pattern keeps whatever the scores."""
    pattern = getattr(target, "pattern", None)
    return n // pattern.m * pattern.n if isinstance(pattern, Block) else 0


# ---- measuring


def _cost(twin: nn.Module, targets: Sequence[Target], example_input: Any) -> tuple[Cost, list[Cost]]:
    """Of the whole twin and of each target's layers: parameters, and MACs by one counted forward pass."""
    found = count_macs_by_module(twin, example_input)
    modules = dict(twin.named_modules())
    return Cost(count_parameters(twin), found[""]), [_layer_cost(target, modules, found) for target in targets]


def _layer_cost(target: Target, modules: Mapping[str, nn.Module], macs: Mapping[str, int]) -> Cost:
    if isinstance(target, WeightTarget):
        return Cost(target.total, macs.get(_module(target.name)))
    assert isinstance(target, UnitTarget)
    layers = target.structure.modules()
    params = sum(count_parameters(modules[name]) for name in layers if name in modules)
    counted = [macs[name] for name in layers if name in macs]
    return Cost(params, sum(counted) if len(counted) == len(layers) else None)


# ---- the rest of the plan


def _no_plan(twin: nn.Module, example_input: Any) -> PruningPlan:
    cost, _ = _cost(twin, [], example_input)
    return PruningPlan(
        criterion=None,
        structured=False,
        scope="local",
        pattern="1x1",
        per_channel=False,
        min_kept=0,
        entries=(),
        total=0,
        kept=0,
        dense=cost,
        pruned=cost,
        even=None,
        params_left=cost.params,
        macs_left=cost.macs,
    )


def _settings(pruner: Pruner, entries: Sequence[Entry], kept: int) -> dict[str, Any]:
    first = pruner.targets[0]
    return {
        "criterion": type(pruner.criterion).__name__,
        "structured": pruner.structured,
        "scope": pruner.scope,
        "pattern": _notation(first.pattern) if isinstance(first, WeightTarget) else "1x1",
        "per_channel": isinstance(first, WeightTarget) and first.per_channel,
        "min_kept": pruner.min_kept,
        "entries": tuple(entries),
        "total": sum(entry.total for entry in entries),
        "kept": kept,
        "collapsing": foreseen(pruner),
        "coverage": pruner.coverage,
        "schedule": tuple(_points(pruner)),
        "notes": tuple(_budget_notes(pruner.budget) if pruner.budget else _notes(pruner, entries, kept)),
        "budget": {pruner.budget.kind: pruner.budget.share} if pruner.budget else {},
    }


def _notation(pattern: Pattern) -> str:
    """
    >>> _notation(Tile(4, 1)), _notation(Block(2, 4))
    ('4x1', '2:4')
    """
    if isinstance(pattern, Tile):
        return f"{pattern.rows}x{pattern.cols}"
    return f"{pattern.n}:{pattern.m}" if isinstance(pattern, Block) else type(pattern).__name__


def foreseen(pruner: Pruner | Pruners | NoPruning) -> dict[str, str]:
    """What will be about to collapse at the schedule's end -> what is left of it; nothing is measured.

    >>> from gsprune.criteria import Magnitude
    >>> pruner = Pruner(nn.Linear(100, 4), Magnitude(), target_sparsity=0.99)
    >>> foreseen(pruner)
    {'weight': '4 of 400 weights are left'}
    """
    if isinstance(pruner, Pruners):
        return {name: text for part in pruner.parts for name, text in foreseen(part).items()}
    if isinstance(pruner, NoPruning):
        return {}
    if pruner.budget is not None:  # as if every structure gave the same share: its bounds say next to nothing
        counts = [int(keep.sum()) for keep in pruner.budget.even()]
        return _few(pruner.targets, counts, ["about "] * len(counts))
    bounds, _ = _bounds(pruner)
    exact = ["" if least == most else "at most " for least, most in bounds]
    return _few(pruner.targets, [most for _, most in bounds], exact)


def collapsed(targets: Sequence[Target]) -> dict[str, str]:
    """The same of the masks as they are."""
    return _few(targets, [target.total - target.pruned for target in targets], [""] * len(targets))


def _few(targets: Sequence[Target], counts: Sequence[int], about: Sequence[str]) -> dict[str, str]:
    found = {}
    for target, left, word in zip(targets, counts, about, strict=True):
        kind = target.structure.kind if isinstance(target, UnitTarget) else "weights"
        few = FEW.get(kind) or (target.outputs if isinstance(target, WeightTarget) else 0)  # a weight for each
        if left < target.total and (left < few or left < target.total // FEW_SHARE):
            what = kind if left != 1 or target.total != 1 else kind[:-1]
            text = f"{word}{left:,} of {target.total:,} {what} {'is' if left == 1 else 'are'} left"
            if kind == "weights" and left < few:
                text += f", fewer than its {few:,} outputs"
            found[target.name] = text
    return found


def _points(pruner: Pruner) -> Iterable[tuple[float, float]]:
    """Whole epochs, and the schedule's own start and end, until the last sparsity is reached."""
    schedules, totals = pruner.schedules, [target.total for target in pruner.targets]
    marks = {float(mark) for schedule in schedules for mark in _marks(schedule)}
    epochs = sorted({*map(float, range(math.ceil(max(marks)) + 2)), *marks})
    for epoch in epochs:
        shares = [schedule(epoch) for schedule in schedules]
        mean = sum(share * total for share, total in zip(shares, totals, strict=True)) / sum(totals)
        yield epoch, round(mean, 12)
        if epoch >= max(marks) and all(share >= s.final for share, s in zip(shares, schedules, strict=True)):
            return


def _marks(schedule: Schedule) -> list[float]:
    end = getattr(schedule, "end_epoch", None)
    return [schedule.start_epoch] if end is None else [schedule.start_epoch, end]


def _budget_notes(budget: Budget) -> Iterable[str]:
    yield (
        f"The structures are ranked together, and the ranking is cut where {budget} are left: the scores will say how "
        f"many units of which structure that takes, so there are only bounds for each."
    )


def _notes(pruner: Pruner, entries: Sequence[Entry], kept: int) -> Iterable[str]:
    total, things = sum(entry.total for entry in entries), "structures" if pruner.structured else "tensors"
    asked = sum(pruned_count(s.final, t.total) for s, t in zip(pruner.schedules, pruner.targets, strict=True))
    if total - kept < asked - max(1.0, 0.01 * asked):  # the warning that the pruner would give in the end
        yield (
            f"{1 - kept / total:.1%} instead of {pruner.target_sparsity or 0:.1%} will be reached: "
            f"min_kept={pruner.min_kept} in each of {len(entries)} {things} allows no more.".replace("%", " %")
        )
    if any(entry.kept is None for entry in entries):
        units = "units" if pruner.structured else "weights"
        yield (
            f"The {things} are ranked together: the scores will say where the {kept:,} {units} that stay are, so there "
            f"are only bounds for each. scope=local gives each its own share."
        )
    if not pruner.structured and pruner.coverage < 1:
        yield (f"The tensors hold {_percent(pruner.coverage)} of the model's matrix weights: sparsity is that of them.")
    if not pruner.structured and kept < total:
        yield "Pruned weights are zeros in tensors of the old size: only removing units makes the model smaller."


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


# ---- on the screen

ROWS = 24  # of a table; the middle of a longer one is left out
POINTS = 9  # of the schedule


def render(plan: PruningPlan | PruningPlans) -> RenderableType:
    """The plan for a rich console of 80 columns or more.

    Entries alike but for a number in their name share a row, as "blocks.{0-11}.attn", and a table of more than 24 rows
    leaves out its middle; `PruningPlan.to_json` has everything. "+2" after a structure's name: its units are those of
    two more layers.
    """
    from rich.console import Group
    from rich.text import Text

    parts = plan.parts if isinstance(plan, PruningPlans) else (plan,)
    shown: list[RenderableType] = []
    for number, part in enumerate(parts, 1):
        if len(parts) > 1:
            shown.append(Text(f"Pruner {number} of {len(parts)}", style="bold"))
        shown += [*_sections(part), Text()]
    if isinstance(plan, PruningPlans):
        shown += [Text(_together(plan)), Text()]
    return Group(*shown, Text("Nothing was trained, the model is as it was."))


def _together(plan: PruningPlans) -> str:
    if plan.pruned is None:
        return "All together: the scores decide what is left."
    params, macs = (_change(getattr(plan.dense, what), plan.pruned, what, digits=3) for what in ("params", "macs"))
    fewer = _times(plan.dense.params, plan.pruned.params), _times(plan.dense.macs, plan.pruned.macs)
    return f"All together: {params} parameters ({fewer[0]}), {macs} MACs ({fewer[1]})."


def _sections(plan: PruningPlan) -> list[RenderableType]:
    """The plan of one pruner, an empty line between its parts."""
    from rich.padding import Padding
    from rich.text import Text

    def indented(lines: Iterable[str]) -> list[RenderableType]:
        return [Padding(Text(line), (0, 0, 0, 2), expand=False) for line in lines]

    sections: list[list[RenderableType]] = [[Text(line) for line in _headline(plan)]]
    if plan.entries:
        sections.append([_unit_table(plan) if plan.structured else _weight_table(plan)])
    if len(plan.schedule) > 1:
        sections.append([Text("Schedule, in epochs of the pruning phase"), _schedule_table(plan)])
    if plan.collapsing:
        sections.append([Text("About to collapse"), *indented(told(plan.collapsing))])
    if plan.skipped:
        sections.append([Text("Left whole"), *indented(told(plan.skipped))])
    if plan.notes:
        sections.append([Text(note) for note in plan.notes])
    return [*sections[0], *(part for section in sections[1:] for part in (Text(), *section))]


def _headline(plan: PruningPlan) -> Iterable[str]:
    if plan.criterion is None:
        yield f"Nothing is pruned: {_short(plan.dense.params)} parameters, {_short(plan.dense.macs)} MACs stay."
        return
    things = "structures" if plan.structured else "tensors"
    how = "removes units" if plan.structured else "zeroes weights" + _how(plan)
    for kind, share in plan.budget.items():
        yield f"{plan.criterion} {how} until {_percent(share)} of the {KINDS[kind]} are left."
    stay = f"{plan.kept:,} of {plan.total:,} in {len(plan.entries)} {things} stay ({_percent(1 - plan.sparsity)})"
    yield f"{stay}, if every structure gave the same share." if plan.budget else f"{plan.criterion} {how}: {stay}."
    if plan.structured:
        yield _savings(plan)
        return
    macs = "" if plan.macs_left is None else f", {_short(plan.macs_left)} not by zero"
    yield (
        f"{_short(plan.dense.params)} parameters, {_short(plan.params_left)} not zero in the end; "
        f"{_short(plan.dense.macs)} MACs{macs}."
    )


def _savings(plan: PruningPlan) -> str:
    after = plan.pruned or plan.even
    assert after is not None
    params, macs = (_change(getattr(plan.dense, what), after, what, digits=3) for what in ("params", "macs"))
    fewer, faster = _times(plan.dense.params, after.params), _times(plan.dense.macs, after.macs)
    certain = "." if plan.pruned or plan.budget else ", if every structure gave the same share."
    return f"{params} parameters ({fewer}), {macs} MACs ({faster}){certain}"


def _how(plan: PruningPlan) -> str:
    blocks = "" if plan.pattern == "1x1" else f" by the pattern {plan.pattern}"
    return blocks + (" in every output channel" if plan.per_channel else "")


def _unit_table(plan: PruningPlan) -> Table:
    table = _table("structure (+ layers)", "units that stay", "parameters", "MACs")
    rows = [
        (folded([entry.name for entry in group]) + _coupled(group[0]), _staying(group), *_costs(group))
        for group in _groups(plan.entries)
    ]
    for row in _elided(rows, "structures"):
        table.add_row(*row)
    table.add_section()
    whole = (_change(plan.dense.params, plan.pruned, "params"), _change(plan.dense.macs, plan.pruned, "macs"))
    about = "about " if plan.budget else ""
    table.add_row("whole model", f"{about}{plan.kept:,} of {plan.total:,} units", *whole)
    return table


def _weight_table(plan: PruningPlan) -> Table:
    is_exact = all(entry.kept is not None for entry in plan.entries)
    table = _table("tensor", "weights", *(("kept", "share") if is_exact else ("at least", "at most")), "MACs")
    rows = []
    for group in _groups(plan.entries):
        first, many = group[0], f"{len(group)} x " if len(group) > 1 else ""
        last = _percent(first.most / first.total) if is_exact else f"{many}{_short(first.most)}"
        macs = _sum(entry.dense.macs for entry in group)
        name = folded([entry.name for entry in group])
        rows.append((name, f"{many}{_short(first.total)}", f"{many}{_short(first.least)}", last, _short(macs)))
    for row in _elided(rows, "tensors"):
        table.add_row(*row)
    table.add_section()
    shares = (_short(plan.kept), _percent(plan.kept / plan.total)) if is_exact else ("ranked", "together")
    table.add_row("all of them", _short(plan.total), *shares, _short(_sum(entry.dense.macs for entry in plan.entries)))
    return table


def _schedule_table(plan: PruningPlan) -> Table:
    points, gone = plan.schedule, [f"{KINDS[kind]} gone" for kind in plan.budget]
    last = len(points) - 1
    places = sorted({round(i * last / (POINTS - 1)) for i in range(POINTS)}) if last >= POINTS else range(last + 1)
    table = _table("epoch", *(f"{round(points[i][0], 2):g}" for i in places))
    table.add_row(*(gone or ["sparsity"]), *(_percent(points[i][1]) for i in places))
    return table


def _table(first: str, *others: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _elided(rows: Sequence[tuple[str, ...]], things: str) -> list[tuple[str, ...]]:
    if len(rows) <= ROWS:
        return [*rows]
    head, tail = ROWS * 2 // 3, ROWS - ROWS * 2 // 3
    return [
        *rows[:head],
        (f"... {len(rows) - ROWS} more rows of {things} ...", *("" for _ in rows[0][1:])),
        *rows[-tail:],
    ]


def _coupled(entry: Entry) -> str:
    """How many layers a structure couples to its first; heads have query, key and value by nature."""
    return f" +{len(entry.layers) - 1}" if len(entry.layers) > 1 and entry.kind != "heads" else ""


def _staying(group: Sequence[Entry]) -> str:
    first, many = group[0], f"{len(group)} x " if len(group) > 1 else ""
    stay = f"{first.least:,}" if first.kept is not None else f"{first.least:,} to {first.most:,}"
    return f"{many}{stay} of {first.total:,} {first.kind}"


def _costs(group: Sequence[Entry]) -> tuple[str, str]:
    is_exact = all(entry.pruned is not None for entry in group)
    params, macs = sum(entry.dense.params for entry in group), _sum(entry.dense.macs for entry in group)
    costs = [entry.pruned for entry in group if entry.pruned is not None]
    after = Cost(sum(cost.params for cost in costs), _sum(cost.macs for cost in costs)) if is_exact else None
    return _change(params, after, "params"), _change(macs, after, "macs")


def _change(before: int | None, after: Cost | None, what: str, *, digits: int = 2) -> str:
    if before is None:
        return "not counted"
    now = _short(before, digits=digits)
    return now if after is None else f"{now} -> {_short(getattr(after, what), digits=digits)}"


def _sum(numbers: Iterable[int | None]) -> int | None:
    """None where one is not known."""
    found = [*numbers]
    known = [number for number in found if number is not None]
    return sum(known) if len(known) == len(found) else None


def _groups(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Entries that differ in one number of their name alone, in order of the first."""
    similar: dict[Any, list[Entry]] = {}
    for entry in entries:
        similar.setdefault((entry.kind, len(entry.layers), entry.total, entry.least, entry.most), []).append(entry)
    by_name = {entry.name: entry for entry in entries}
    found = [names for same in similar.values() for names in alike([entry.name for entry in same])]
    order = {entry.name: place for place, entry in enumerate(entries)}
    return [[by_name[name] for name in names] for names in sorted(found, key=lambda names: order[names[0]])]


def _short(number: int | None, *, digits: int = 3) -> str:
    """
    >>> [_short(n) for n in (None, 9999, 23_508_032, 999_950, 4_089_000_000)]
    ['?', '9,999', '23.5M', '1.00M', '4.09G']
    >>> [_short(n, digits=2) for n in (384, 9999, 9408, 23_508_032, 117_964_800)]
    ['384', '10k', '9.4k', '24M', '118M']
    """
    if number is None:
        return "?"
    if number < 10 ** (digits + 1) and (digits > 2 or number < 1000):
        return f"{number:,}"
    power, value = 0, float(f"{number:.{digits - 1}e}")  # rounded first: 999,950 is 1.00M
    while value >= 1000 and power < 4:
        power, value = power + 1, value / 1000
    exact = number / 1000**power
    return f"{exact:.{max(0, digits - len(str(int(value))))}f}{'kMGT'[power - 1]}"


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


def _times(before: int | None, after: int | None) -> str:
    return f"{before / after:.2f}x" if before and after else "?"
