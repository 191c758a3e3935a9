"""What a pruner is and where it stands, in a few lines: its `repr`, and HTML for notebooks. Standard library alone."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Protocol

__all__ = ["amount", "as_html", "describe"]


class Described(Protocol):
    """What is asked of a pruner."""

    epoch: int
    step: int
    updates: int
    skipped: Mapping[str, str]

    @property
    def finished(self) -> bool: ...
    @property
    def attached(self) -> bool: ...
    @property
    def optimizers(self) -> Sequence[object]: ...


def amount(pruned: int, total: int, what: str) -> str:
    """
    >>> amount(66, 96, "units")
    '66 of 96 units (68.8 %)'
    """
    return f"{pruned:,} of {total:,}{f' {what}' if what else ''} ({pruned / total:.1%})".replace("%", " %")


def describe(pruner: Described, title: str, amounts: Sequence[str], wanted: str | None) -> str:
    """Lines: what of what by what; how much is pruned; where the run stands; what is left out."""
    names = " and ".join(dict.fromkeys(type(optimizer).__name__ for optimizer in pruner.optimizers))
    at = f"at epoch {pruner.epoch}" + (f", step {pruner.step}" if pruner.step else "")
    updates = f"{pruner.updates} mask update{'' if pruner.updates == 1 else 's'}"
    where = f"{at}, {updates}" + (f", attached to {names}" if pruner.attached else "")
    state = "the mask is final" if pruner.finished else "the mask is not final"
    goal = f", as wanted: {wanted}" if wanted and pruner.finished else f", wanted: {wanted}" if wanted else ""
    first, *others = amounts
    lines = [title, f"pruned: {first}{goal}; {state}", *others, where]
    if pruner.skipped:
        name = next(iter(pruner.skipped))
        lines.append(f"left out: {len(pruner.skipped)}, such as {name!r} (see .skipped)")
    return "\n  ".join(lines)


def as_html(text: str) -> str:
    """The same for a notebook: names are text, whatever they hold."""
    title, *lines = text.splitlines()
    items = "".join(f"<li>{html.escape(line.strip())}</li>" for line in lines)
    return f"<b>{html.escape(title)}</b><ul>{items}</ul>"
