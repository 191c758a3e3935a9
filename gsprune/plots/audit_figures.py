"""The picture of an audit: how well each criterion's scores rank what single removals do to the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gsprune.plots.drawing import FAINT, INK, Picture, new_figure, plain_label, quiet
from gsprune.plots.sweep_figures import STYLES

__all__ = ["Rank", "plot_audit"]

Rank = tuple[str, str, tuple[float, float, float]]  # criterion, kind of unit, correlation with its interval


def plot_audit(ranks: Sequence[Rank], *, title: str = "Do scores rank what removal does to the loss?") -> Picture:
    """A row for each criterion, a mark with its interval for each kind of unit.

    Args:
        ranks: `correlations` of what `gsprune.audit` found; NaN is left out.
    """
    criteria, kinds = [*dict.fromkeys(name for name, _, _ in ranks)], [*dict.fromkeys(kind for _, kind, _ in ranks)]
    figure = new_figure(8, 1.5 + 0.28 * max(1, len(criteria)) * max(1, len(kinds)))
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11.5, loc="left", color=INK, weight="bold")
    axes.set_xlabel("Spearman correlation of score and abs(change of the loss)", color=INK)
    quiet(axes, grid="x")
    axes.axvline(0, color=FAINT, linewidth=1)
    for k, kind in enumerate(kinds):
        colour, marker = STYLES[k % len(STYLES)]
        mine = [(criteria.index(name), at) for name, of, at in ranks if of == kind and not math.isnan(at[0])]
        y = [row + (k - (len(kinds) - 1) / 2) * 0.8 / len(kinds) for row, _ in mine]
        axes.hlines(y, [at[1] for _, at in mine], [at[2] for _, at in mine], color=colour, linewidth=1.4)
        axes.plot([at[0] for _, at in mine], y, marker, color=colour, markersize=7, label=plain_label(kind, 40))
    axes.set_yticks(range(len(criteria)), [plain_label(name, 40) for name in criteria])
    axes.set_ylim(len(criteria) - 0.4, -0.6)
    axes.set_xlim(-1, 1)
    if kinds:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8.5, frameon=False)
    return Picture(figure)
