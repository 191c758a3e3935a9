"""The picture of a sensitivity scan: a line for each structure, against the share of its units that went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gsprune.plots.drawing import FAINT, INK, Picture, new_figure, plain_label, quiet
from gsprune.plots.sweep_figures import OTHERS, STYLES

__all__ = ["plot_sensitivity"]


def plot_sensitivity(
    lines: Mapping[str, Sequence[tuple[float, float]]], *, dense: float, metric: str, falls: bool = True
) -> Picture:
    """What is left of a metric against the share of units removed of one structure, after repair.

    The structures that suffer most are named, as many as there are styles; the others are grey.

    Args:
        lines: structure -> (share removed in (0, 1), metric) for each cut.
        dense: the metric of the dense network.
        metric: its name.
        falls: whether it falls where a structure suffers, as accuracy does and a loss does not.
    """
    sign = -1 if falls else 1
    worst = sorted(lines, key=lambda name: -max((sign * (y - dense) for _, y in lines[name]), default=0.0))
    named = worst[: len(STYLES)]
    figure = new_figure(9, 5)
    axes = figure.add_subplot()
    axes.set_title("What each structure can lose", fontsize=11.5, loc="left", color=INK, weight="bold")
    axes.set_xlabel("units removed of one structure (%)", color=INK)
    axes.set_ylabel(plain_label(f"{metric} after repair", 60), color=INK)
    quiet(axes, grid="both")
    axes.axhline(dense, color=FAINT, linestyle=(0, (5, 3)), linewidth=1.3, label="dense network")
    for name in reversed(worst):
        x, y = ([100 * share for share, _ in sorted(lines[name])], [value for _, value in sorted(lines[name])])
        colour, marker = STYLES[named.index(name)] if name in named else (OTHERS, ".")
        label = plain_label(name, 40) if name in named else "_nolegend_"
        axes.plot([0, *x], [dense, *y], marker=marker, color=colour, linewidth=1.4, markersize=6, label=label)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8.5, frameon=False)
    return Picture(figure)
