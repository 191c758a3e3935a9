"""What a pruner is and where it stands, in a few lines: its `repr`, and HTML for notebooks."""

from __future__ import annotations

import html
from typing import Any

from gsprune.pruner.targets import Share, sum_of

__all__ = ["as_html", "describe"]


def describe(pruner: Any) -> str:
    """Lines about a `Pruner`: what of what by what; how much is pruned; where the run stands; what is left out."""
    parts = pruner.parts
    if not parts:
        return "Pruner without a rule: nothing is pruned"
    names = " and ".join(dict.fromkeys(type(optimizer).__name__ for optimizer in pruner.optimizers))
    at = f"at epoch {pruner.epoch}" + (f", step {pruner.step}" if pruner.step else "")
    updates = f"{pruner.updates} mask update{'' if pruner.updates == 1 else 's'}"
    where = f"{at}, {updates}" + (f", attached to {names}" if pruner.attached else "")
    state = "the mask is final" if pruner.finished else "the mask is not final"
    one = len(parts) == 1
    wanted = parts[0].wanted if one else f"{pruner.target_sparsity:.1%}" if pruner.target_sparsity is not None else ""
    goal = f", {'as wanted' if pruner.finished else 'wanted'}: {wanted}".replace("%", " %") if wanted else ""
    sides = [[part.share for part in parts if part.units is units] for units in (True, False)]
    first, *others = [_amount(sum_of(side), named=not one) for side in sides if side]
    title = f"Pruner of {parts[0] if one else f'{len(parts)} rules, by {pruner.criterion_name}'}"
    lines = [title, f"pruned: {first}{goal}; {state}", *others, where]
    if pruner.skipped:
        name = next(iter(pruner.skipped))
        lines.append(f"left out: {len(pruner.skipped)}, such as {name!r} (see .skipped)")
    return "\n  ".join(lines)


def _amount(share: Share, *, named: bool) -> str:
    """
    >>> _amount(Share(66, 96, "heads"), named=True)
    '66 of 96 heads (68.8 %)'
    """
    return f"{share.pruned:,} of {share.total:,}{f' {share.of}' if named else ''} ({float(share):.1%})".replace(
        "%", " %"
    )


def as_html(text: str) -> str:
    """The same for a notebook: names are text, whatever they hold."""
    title, *lines = text.splitlines()
    items = "".join(f"<li>{html.escape(line.strip())}</li>" for line in lines)
    return f"<b>{html.escape(title)}</b><ul>{items}</ul>"
