"""A forecast as text: sentences and tables."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gsprune.cost.budgets import KINDS
from gsprune.forecast.rule_plan import Cost, Entry, RulePlan
from gsprune.structures.structure import called
from gsprune.text.display import percent
from gsprune.text.names import alike, folded, lines_by_reason
from gsprune.text.table import count, noun, table

__all__ = ["headline", "lines", "summary"]

ROWS = 24  # of a table; the middle of a longer one is left out
POINTS = 9  # of the schedule
Row = Sequence[str]
Block = tuple[list[str], Row, list[Row], list[str]]  # sentences, a table's head and rows, indented lines


def lines(rules: Sequence[RulePlan], dense: Cost, pruned: Cost | None, example: str, *, width: int) -> list[str]:
    """What `summary` says, as lines of text."""
    found: list[str] = []
    for sentences, head, rows, notes in summary(rules, dense, pruned, example):
        found += ["", *(part for text in sentences for part in _wrapped(text, width))]
        found += table(head, rows, width=width) if head else []
        found += [part for text in notes for part in _wrapped(text, width, indent="  ")]
    return found[1:]


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    settings: dict[str, Any] = {"initial_indent": indent, "subsequent_indent": indent, "break_on_hyphens": False}
    return textwrap.wrap(text, max(width, 20), break_long_words=False, **settings)


def summary(rules: Sequence[RulePlan], dense: Cost, pruned: Cost | None, example: str) -> Iterator[Block]:
    """Sentences and tables in their order."""
    for number, rule in enumerate(rules, 1):
        if len(rules) > 1:
            yield [f"Rule {number} of {len(rules)}"], (), [], []
        yield [*headline(rule, example)], (), [], []
        if rule.entries:
            yield [], *(_unit_table(rule) if rule.structured else _weight_table(rule)), []
        if len(rule.schedule) > 1:
            yield ["Schedule, in epochs of the pruning phase"], *_schedule_table(rule), []
        if rule.collapsing:
            yield ["About to collapse"], (), [], lines_by_reason(rule.collapsing)
        if rule.skipped:
            yield ["Left whole"], (), [], lines_by_reason(rule.skipped)
        if rule.notes:
            yield [*rule.notes], (), [], []
    if len(rules) != 1:
        yield [_together(rules, dense, pruned, example)], (), [], []
    yield ["Nothing was trained, the model is as it was."], (), [], []


def _together(rules: Sequence[RulePlan], dense: Cost, pruned: Cost | None, example: str) -> str:
    if not rules:
        return f"Nothing is pruned: {count(dense.params)} parameters, {count(dense.macs)} MACs{_of(example)} stay."
    if pruned is None:
        return "All together: the scores decide what is left."
    params, macs = (_change(getattr(dense, what), pruned, what, digits=3) for what in ("params", "macs"))
    fewer = _times(dense.params, pruned.params), _times(dense.macs, pruned.macs)
    return f"All together: {params} parameters ({fewer[0]}), {macs} MACs{_of(example)} ({fewer[1]})."


def _of(example: str) -> str:
    return f" for an input of {example}" if example else ""


def headline(plan: RulePlan, example: str = "") -> Iterable[str]:
    """What would go, and what that saves, in two or three sentences."""
    things = "structure" if plan.structured else "tensor"
    how = "removes units" if plan.structured else "zeroes weights" + _how(plan)
    for kind, share in plan.budget.items():
        yield f"{plan.criterion} {how} until {percent(share)} of the {KINDS[kind]} are left."
    stay = f"{plan.kept:,} of {plan.total:,} in {noun(len(plan.entries), things)} stay ({percent(1 - plan.sparsity)})"
    yield f"{stay}, if every structure gave the same share." if plan.budget else f"{plan.criterion} {how}: {stay}."
    if plan.structured:
        yield _savings(plan, example)
        return
    macs = "" if plan.macs_left is None else f", {count(plan.macs_left)} not by zero"
    yield (
        f"{count(plan.dense.params)} parameters, {count(plan.params_left)} not zero in the end; "
        f"{count(plan.dense.macs)} MACs{_of(example)}{macs}."
    )


def _savings(plan: RulePlan, example: str) -> str:
    after = plan.pruned or plan.even
    assert after is not None
    params, macs = (_change(getattr(plan.dense, what), after, what, digits=3) for what in ("params", "macs"))
    fewer, faster = _times(plan.dense.params, after.params), _times(plan.dense.macs, after.macs)
    certain = "." if plan.pruned or plan.budget else ", if every structure gave the same share."
    return f"{params} parameters ({fewer}), {macs} MACs{_of(example)} ({faster}){certain}"


def _how(plan: RulePlan) -> str:
    blocks = "" if plan.pattern == "1x1" else f" by the pattern {plan.pattern}"
    return blocks + (" in every output channel" if plan.per_channel else "")


Table = tuple[Row, list[Row]]


def _unit_table(plan: RulePlan) -> Table:
    rows: list[Row] = [
        (folded([entry.name for entry in group]) + _coupled(group[0]), _staying(group), *_costs(group))
        for group in _groups(plan.entries)
    ]
    whole = (_change(plan.dense.params, plan.pruned, "params"), _change(plan.dense.macs, plan.pruned, "macs"))
    about = "about " if plan.budget else ""
    last = ("whole model", f"{about}{plan.kept:,} of {plan.total:,} units", *whole)
    head = ("structure (+ layers)", "units that stay", "parameters", "MACs")
    return head, [*_elided(rows, "structures"), (), last]


def _weight_table(plan: RulePlan) -> Table:
    is_exact = all(entry.kept is not None for entry in plan.entries)
    head = ("tensor", "weights", *(("kept", "share") if is_exact else ("at least", "at most")), "MACs")
    rows: list[Row] = []
    for group in _groups(plan.entries):
        first, many = group[0], f"{len(group)} x " if len(group) > 1 else ""
        last = percent(first.most / first.total) if is_exact else f"{many}{count(first.most)}"
        macs = _sum(entry.dense.macs for entry in group)
        name = folded([entry.name for entry in group])
        rows.append((name, f"{many}{count(first.total)}", f"{many}{count(first.least)}", last, count(macs)))
    shares = (count(plan.kept), percent(plan.kept / plan.total)) if is_exact else ("ranked", "together")
    macs = _sum(entry.dense.macs for entry in plan.entries)
    return head, [*_elided(rows, "tensors"), (), ("all of them", count(plan.total), *shares, count(macs))]


def _schedule_table(plan: RulePlan) -> Table:
    points, gone = plan.schedule, [f"{KINDS[kind]} gone" for kind in plan.budget]
    last = len(points) - 1
    places = sorted({round(i * last / (POINTS - 1)) for i in range(POINTS)}) if last >= POINTS else range(last + 1)
    head = ("epoch", *(f"{round(points[i][0], 2):g}" for i in places))
    return head, [(*(gone or ["sparsity"]), *(percent(points[i][1]) for i in places))]


def _elided(rows: Sequence[Row], things: str) -> list[Row]:
    if len(rows) <= ROWS:
        return [*rows]
    head, tail = ROWS * 2 // 3, ROWS - ROWS * 2 // 3
    left_out = (f"... {len(rows) - ROWS} more rows of {things} ...", *("" for _ in rows[0][1:]))
    return [*rows[:head], left_out, *rows[-tail:]]


def _coupled(entry: Entry) -> str:
    """How many layers a structure couples to its first; heads have query, key and value by nature."""
    return f" +{len(entry.layers) - 1}" if len(entry.layers) > 1 and entry.kind != "heads" else ""


def _staying(group: Sequence[Entry]) -> str:
    first, many = group[0], f"{len(group)} x " if len(group) > 1 else ""
    stay = f"{first.least:,}" if first.kept is not None else f"{first.least:,} to {first.most:,}"
    return f"{many}{stay} of {first.total:,} {called(first.kind, first.total)}"


def _costs(group: Sequence[Entry]) -> tuple[str, str]:
    is_exact = all(entry.pruned is not None for entry in group)
    params, macs = sum(entry.dense.params for entry in group), _sum(entry.dense.macs for entry in group)
    costs = [entry.pruned for entry in group if entry.pruned is not None]
    after = Cost(sum(cost.params for cost in costs), _sum(cost.macs for cost in costs)) if is_exact else None
    return _change(params, after, "params"), _change(macs, after, "macs")


def _change(before: int | None, after: Cost | None, what: str, *, digits: int = 2) -> str:
    if before is None:
        return "not counted"
    now = count(before, digits=digits)
    return now if after is None else f"{now} -> {count(getattr(after, what), digits=digits)}"


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


def _times(before: int | None, after: int | None) -> str:
    return f"{before / after:.2f}x" if before and after else "?"
