"""Forecasts: what a pruner would leave of a model, and what that would cost, without training.

`plan` counts, the `repr` of what it gives shows. All measuring happens on deep copies: neither the model nor the
pruner is changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gsprune.cost.budgets import Budget, floor_text
from gsprune.cost.counting import count_macs_by_module, count_parameters, named_layers
from gsprune.forecast.plan import Cost, Entry, PruningPlan, RulePlan
from gsprune.pruner.part import Part
from gsprune.pruner.pruner import Pruner
from gsprune.pruner.targets import Target
from gsprune.pruner.units import UnitTarget
from gsprune.pruner.weights import WeightTarget
from gsprune.ranking.patterns import Block, Pattern, Tile
from gsprune.ranking.selection import pruned_count
from gsprune.schedules import Schedule
from gsprune.structures.example import shape_text
from gsprune.structures.twin import copy_of
from gsprune.text.display import percent

__all__ = ["collapsed", "foreseen", "plan"]

FEW = {"channels": 4, "neurons": 4, "heads": 2, "residual": 4}  # fewer units than this are about to collapse
FEW_SHARE = 20  # as is less than one in so many, of units and of weights

NAMED_HERE = "include, exclude, keep or kinds leaves it out"


def plan(model: nn.Module, pruner: Pruner, example_input: Any) -> PruningPlan:
    """What `pruner` would leave of `model` at the end of its schedules; model and pruner stay as they are.

    Counts are exact under local scope. Under global scope the scores distribute them: the total is exact, and each
    entry has bounds. The cost is that of a copy cut to its first units: all units of a structure cost the same.

    An entry is about to collapse with fewer than 4 channels or neurons, a single head, fewer than 5 % of its units or
    weights, or fewer weights than outputs.

    Raises:
        ValueError: the pruner is of another model, or has shrunk it; a schedule has no end; the network that
            would be left does not run.

    >>> from gsprune.criteria import Magnitude
    >>> from gsprune.schedules import OneShot
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> pruner = Pruner(model, Magnitude(), scope="local", target_sparsity=0.75, schedule=OneShot())
    >>> [rule] = plan(model, pruner, torch.ones(1, 8)).rules
    >>> [(entry.name, entry.total, entry.kept) for entry in rule.entries]
    [('0.weight', 128, 32), ('2.weight', 32, 8)]
    """
    if pruner.model is not model:
        raise ValueError("this pruner belongs to another model: plan with the model that the Pruner was made for")
    if pruner.plan is not None:
        raise ValueError("this pruner has shrunk its model already: plan before training")
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):  # a forward pass may draw random numbers
        rules = tuple(
            (_plan_units if part.units else _plan_weights)(copy_of(model), part, example_input) for part in pruner.parts
        )
        units = [rule for rule in rules if rule.structured]
        shapes = shape_text(example_input)
        if len(rules) == 1:
            return PruningPlan(rules, rules[0].dense, rules[0].pruned, shapes)
        twin = copy_of(model)
        dense, _ = _cost(twin, [], example_input)
        if not units or any(rule.pruned is None for rule in units):
            return PruningPlan(rules, dense, None if units else dense, shapes)
        _shrink_to(twin, pruner.unit_targets, [entry.least for rule in units for entry in rule.entries])
        return PruningPlan(rules, dense, _cost(twin, [], example_input)[0], shapes)


# ---- units


def _plan_units(twin: nn.Module, part: Part, example_input: Any) -> RulePlan:
    targets = part.unit_targets
    skipped = _skipped_units(twin, part, targets)
    bounds, kept = _bounds(part)
    is_exact = part.budget is None and all(least == most for least, most in bounds)
    counts = [least for least, _ in bounds] if is_exact else _even(part, targets, kept)
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
    return RulePlan(
        **_settings(part, entries, kept),
        skipped=skipped,
        dense=dense,
        pruned=smaller if is_exact else None,
        even=None if is_exact else smaller,
        params_left=smaller.params if is_exact else None,
        macs_left=smaller.macs if is_exact else None,
    )


def _shrink_to(twin: nn.Module, targets: Sequence[UnitTarget], counts: Sequence[int]) -> None:
    """Cut the twin to the first units of every structure."""
    from gsprune.surgery.apply import apply_cut
    from gsprune.surgery.cut_plan import plan_cut

    keeps = [torch.arange(target.total) < count for target, count in zip(targets, counts, strict=True)]
    apply_cut(twin, plan_cut([target.structure for target in targets], keeps))


def _even(part: Part, targets: Sequence[UnitTarget], kept: int) -> list[int]:
    """The same share of every structure."""
    if part.budget is not None:
        return [int(keep.sum()) for keep in part.budget.even()]
    share = kept / sum(target.total for target in targets)
    return [max(target.of != "branches", target.total - pruned_count(1 - share, target.total)) for target in targets]


def _skipped_units(model: nn.Module, part: Part, targets: Sequence[UnitTarget]) -> dict[str, str]:
    """Every layer whose rows are not up for pruning, in the model's order."""
    chosen = {name for target in targets for name in target.structure.modules()}
    left_out = {name for structure in part.left_out for name in structure.modules() if name}  # "" is the network itself
    by_name = dict.fromkeys(left_out - chosen, NAMED_HERE)
    reasons = {**part.skipped, **by_name}
    tied = "it is coupled to a layer that is left whole, or not traced"
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    found = {name: reasons.get(name, tied) for name in named_layers(model) if name not in chosen} | reasons
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


# ---- single weights


def _plan_weights(twin: nn.Module, part: Part, example_input: Any) -> RulePlan:
    targets = part.weight_targets
    bounds, kept = _bounds(part)
    dense, layers = _cost(twin, targets, example_input)
    entries = tuple(
        Entry(target.name, "weights", (_module(target.name),), target.total, *bound, cost, cost)
        for target, bound, cost in zip(targets, bounds, layers, strict=True)
    )
    return RulePlan(
        **_settings(part, entries, kept),
        skipped=_skipped_weights(twin, part),
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


def _skipped_weights(model: nn.Module, part: Part) -> dict[str, str]:
    """Every matrix or kernel that is no target; biases, norms and other vectors are never pruned."""
    names = {target.name for target in part.targets}
    matrices = [name for name, tensor in model.named_parameters(remove_duplicate=False) if tensor.dim() > 1]
    named = "include or exclude leaves it out"
    return {name: part.skipped.get(name, named) for name in matrices if name not in names}


# ---- counting


def _bounds(part: Part) -> tuple[list[tuple[int, int]], int]:
    """(least, most) units or weights that stay of every target in the end, and how many of all.

    These are `selection.select`'s counts, which depend on the scores only in how one ranking shares them out.
    """
    if part.budget is not None:
        return part.budget.bounds(), sum(int(keep.sum()) for keep in part.budget.even())
    shares = [schedule.final for schedule in part.schedules]
    if part.rule.ranking == "local" and len(part.together) == len(part.targets):
        counts = [_local(t, share, part.rule.min_kept) for t, share in zip(part.targets, shares, strict=True)]
        return [(count, count) for count in counts], sum(counts)
    found, kept = [(0, 0)] * len(part.targets), 0
    for ranking in part.together:
        bounds, count = _one_ranking([part.targets[i] for i in ranking], shares[ranking[0]], part.least)
        kept += count
        for i, bound in zip(ranking, bounds, strict=True):
            found[i] = bound
    return found, kept


def _local(target: Target, share: float, min_kept: int) -> int:
    rows, n = target.groups().shape
    size = target.total // (rows * n)  # units or weights in a group
    pruned = max(pruned_count(share, n), target.pruned // (rows * size))
    return (n - min(pruned, n - min(min_kept, n))) * rows * size


def _one_ranking(
    targets: Sequence[Target], share: float, least_of: Callable[[int, str], int]
) -> tuple[list[tuple[int, int]], int]:
    groups = [target.groups().numel() for target in targets]
    sizes = [target.total // n for target, n in zip(targets, groups, strict=True)]
    gone = [target.pruned // size for target, size in zip(targets, sizes, strict=True)]
    floors = [max(least_of(n, t.of), _fixed(t, n)) for t, n in zip(targets, groups, strict=True)]
    total = max(sum(groups) - max(pruned_count(share, sum(groups)), sum(gone)), sum(floors))
    is_loose = any(0 < _fixed(t, n) < least_of(n, t.of) for t, n in zip(targets, groups, strict=True))
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


def _settings(part: Part, entries: Sequence[Entry], kept: int) -> dict[str, Any]:
    first = part.targets[0]
    return {
        "criterion": part.criterion_name,
        "structured": part.units,
        "scope": part.rule.ranking,
        "pattern": _notation(first.pattern) if isinstance(first, WeightTarget) else "1x1",
        "per_channel": isinstance(first, WeightTarget) and first.per_channel,
        "min_kept": part.rule.min_kept,
        "min_share": part.min_share,
        "entries": tuple(entries),
        "total": sum(entry.total for entry in entries),
        "kept": kept,
        "collapsing": _foreseen(part),
        "coverage": part.coverage,
        "schedule": tuple(_points(part)),
        "notes": tuple(_budget_notes(part.budget, part.rule.ranking) if part.budget else _notes(part, entries, kept)),
        "budget": {part.budget.kind: part.budget.share} if part.budget else {},
    }


def _notation(pattern: Pattern) -> str:
    """
    >>> _notation(Tile(4, 1)), _notation(Block(2, 4))
    ('4x1', '2:4')
    """
    if isinstance(pattern, Tile):
        return f"{pattern.rows}x{pattern.cols}"
    return f"{pattern.n}:{pattern.m}" if isinstance(pattern, Block) else type(pattern).__name__


def foreseen(pruner: Pruner) -> dict[str, str]:
    """Entries that will be about to collapse at the end of the schedules -> what is left of them; measures nothing.

    >>> from gsprune.criteria import Magnitude
    >>> pruner = Pruner(nn.Linear(100, 4), Magnitude(), target_sparsity=0.99)
    >>> foreseen(pruner)
    {'weight': '4 of 400 weights are left'}
    """
    return {name: text for part in pruner.parts for name, text in _foreseen(part).items()}


def _foreseen(part: Part) -> dict[str, str]:
    if part.budget is not None:  # as if every structure gave the same share: its bounds say next to nothing
        counts = [int(keep.sum()) for keep in part.budget.even()]
        return _few(part.targets, counts, ["about "] * len(counts))
    bounds, _ = _bounds(part)
    exact = ["" if least == most else "at most " for least, most in bounds]
    return _few(part.targets, [most for _, most in bounds], exact)


def collapsed(targets: Sequence[Target]) -> dict[str, str]:
    """The same for the current masks."""
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


def _points(part: Part) -> Iterable[tuple[float, float]]:
    """Whole epochs, and the schedule's own start and end, until the last sparsity is reached."""
    schedules, totals = part.schedules, [target.total for target in part.targets]
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


_TOGETHER = {"global": "The structures", "isomorphic": "Structures that are alike"}  # scope -> what is ranked together


def _budget_notes(budget: Budget, scope: str) -> Iterable[str]:
    if scope == "local":
        yield f"Every structure loses about the same share of its units, until {budget} are left."
        return
    yield (
        f"{_TOGETHER[scope]} are ranked together, and the ranking is cut where {budget} are left: the scores will say "
        f"how many units of which structure that takes, so there are only bounds for each."
    )


def _notes(part: Part, entries: Sequence[Entry], kept: int) -> Iterable[str]:
    total, things = sum(entry.total for entry in entries), "structures" if part.units else "tensors"
    asked = part.asked
    if total - kept < asked - max(1.0, 0.01 * asked):  # the warning that the pruner would give in the end
        yield (
            f"{1 - kept / total:.1%} instead of {part.target_sparsity or 0:.1%} will be reached: "
            f"{floor_text(part.rule.min_kept, part.min_share)} in each of {len(entries)} {things} allows no more."
        ).replace("%", " %")
    if any(entry.kept is None for entry in entries):
        local = part.rule.ranking == "local"  # where branches alone are ranked together
        together = "Branches" if local else _TOGETHER[part.rule.ranking]
        units, ranked = ("units", together) if part.units else ("weights", "The tensors")
        own = "" if local else " scope=local gives each its own share."
        yield (
            f"{ranked} are ranked together: the scores will say where the {kept:,} {units} that stay are, so there are "
            f"only bounds for each.{own}"
        )
    if not part.units and part.coverage < 1:
        yield (f"The tensors hold {percent(part.coverage)} of the model's matrix weights: sparsity is that of them.")
    if not part.units and kept < total:
        yield "Pruned weights are zeros in tensors of the old size: only removing units makes the model smaller."


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]
