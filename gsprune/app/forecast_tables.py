"""The plan of a pruner, printed as text and tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from gsprune.cost.budgets import KINDS
from gsprune.forecast.plan import Cost, Entry, PruningPlan, RulePlan
from gsprune.text.display import percent
from gsprune.text.names import alike, folded, lines_by_reason

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["print_plan", "render"]

ROWS = 24  # of a table; the middle of a longer one is left out
POINTS = 9  # of the schedule


def print_plan(plan: PruningPlan) -> None:
    """Print the plan on the screen."""
    from rich.console import Console

    Console(file=sys.stdout, highlight=False, markup=False).print(render(plan))


def render(plan: PruningPlan) -> RenderableType:
    """The plan for a rich console of 80 columns or more.

    Entries alike but for a number in their name share a row, as "blocks.{0-11}.attn", and a table of more than 24 rows
    leaves out its middle; `PruningPlan.to_json` has everything. "+2" after a structure's name: its units are those of
    two more layers.
    """
    from rich.console import Group
    from rich.text import Text

    shown: list[RenderableType] = []
    for number, rule in enumerate(plan.rules, 1):
        if len(plan.rules) > 1:
            shown.append(Text(f"Rule {number} of {len(plan.rules)}", style="bold"))
        shown += [*_sections(rule), Text()]
    if len(plan.rules) != 1:
        shown += [Text(_together(plan)), Text()]
    return Group(*shown, Text("Nothing was trained, the model is as it was."))


def _together(plan: PruningPlan) -> str:
    if not plan.rules:
        return f"Nothing is pruned: {_short(plan.dense.params)} parameters, {_short(plan.dense.macs)} MACs stay."
    if plan.pruned is None:
        return "All together: the scores decide what is left."
    params, macs = (_change(getattr(plan.dense, what), plan.pruned, what, digits=3) for what in ("params", "macs"))
    fewer = _times(plan.dense.params, plan.pruned.params), _times(plan.dense.macs, plan.pruned.macs)
    return f"All together: {params} parameters ({fewer[0]}), {macs} MACs ({fewer[1]})."


def _sections(plan: RulePlan) -> list[RenderableType]:
    """The plan of one rule, an empty line between its parts."""
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
        sections.append([Text("About to collapse"), *indented(lines_by_reason(plan.collapsing))])
    if plan.skipped:
        sections.append([Text("Left whole"), *indented(lines_by_reason(plan.skipped))])
    if plan.notes:
        sections.append([Text(note) for note in plan.notes])
    return [*sections[0], *(part for section in sections[1:] for part in (Text(), *section))]


def _headline(plan: RulePlan) -> Iterable[str]:
    things = "structures" if plan.structured else "tensors"
    how = "removes units" if plan.structured else "zeroes weights" + _how(plan)
    for kind, share in plan.budget.items():
        yield f"{plan.criterion} {how} until {percent(share)} of the {KINDS[kind]} are left."
    stay = f"{plan.kept:,} of {plan.total:,} in {len(plan.entries)} {things} stay ({percent(1 - plan.sparsity)})"
    yield f"{stay}, if every structure gave the same share." if plan.budget else f"{plan.criterion} {how}: {stay}."
    if plan.structured:
        yield _savings(plan)
        return
    macs = "" if plan.macs_left is None else f", {_short(plan.macs_left)} not by zero"
    yield (
        f"{_short(plan.dense.params)} parameters, {_short(plan.params_left)} not zero in the end; "
        f"{_short(plan.dense.macs)} MACs{macs}."
    )


def _savings(plan: RulePlan) -> str:
    after = plan.pruned or plan.even
    assert after is not None
    params, macs = (_change(getattr(plan.dense, what), after, what, digits=3) for what in ("params", "macs"))
    fewer, faster = _times(plan.dense.params, after.params), _times(plan.dense.macs, after.macs)
    certain = "." if plan.pruned or plan.budget else ", if every structure gave the same share."
    return f"{params} parameters ({fewer}), {macs} MACs ({faster}){certain}"


def _how(plan: RulePlan) -> str:
    blocks = "" if plan.pattern == "1x1" else f" by the pattern {plan.pattern}"
    return blocks + (" in every output channel" if plan.per_channel else "")


def _unit_table(plan: RulePlan) -> Table:
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


def _weight_table(plan: RulePlan) -> Table:
    is_exact = all(entry.kept is not None for entry in plan.entries)
    table = _table("tensor", "weights", *(("kept", "share") if is_exact else ("at least", "at most")), "MACs")
    rows = []
    for group in _groups(plan.entries):
        first, many = group[0], f"{len(group)} x " if len(group) > 1 else ""
        last = percent(first.most / first.total) if is_exact else f"{many}{_short(first.most)}"
        macs = _sum(entry.dense.macs for entry in group)
        name = folded([entry.name for entry in group])
        rows.append((name, f"{many}{_short(first.total)}", f"{many}{_short(first.least)}", last, _short(macs)))
    for row in _elided(rows, "tensors"):
        table.add_row(*row)
    table.add_section()
    shares = (_short(plan.kept), percent(plan.kept / plan.total)) if is_exact else ("ranked", "together")
    table.add_row("all of them", _short(plan.total), *shares, _short(_sum(entry.dense.macs for entry in plan.entries)))
    return table


def _schedule_table(plan: RulePlan) -> Table:
    points, gone = plan.schedule, [f"{KINDS[kind]} gone" for kind in plan.budget]
    last = len(points) - 1
    places = sorted({round(i * last / (POINTS - 1)) for i in range(POINTS)}) if last >= POINTS else range(last + 1)
    table = _table("epoch", *(f"{round(points[i][0], 2):g}" for i in places))
    table.add_row(*(gone or ["sparsity"]), *(percent(points[i][1]) for i in places))
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


def _times(before: int | None, after: int | None) -> str:
    return f"{before / after:.2f}x" if before and after else "?"
