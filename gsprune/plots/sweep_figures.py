"""Draws accuracy against cost as a PNG, for a run that has several networks; a sweep's is front_figure.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gsprune.plots.drawing import FAINT, INK, new_figure, plain_label, png, quiet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Line", "Mark", "Panel", "draw_panels", "ticks"]

# Okabe and Ito's colours (2008) without yellow, dark enough on white; each has a marker too, for grey print.
STYLES = (
    ("#0072b2", "o"),
    ("#d55e00", "s"),
    ("#009e73", "^"),
    ("#cc79a7", "D"),
    ("#56b4e9", "v"),
    ("#e69f00", "P"),
    ("#7b4ea3", "X"),
    ("#444444", "<"),
)
OTHERS = "#b6bcc6"
DENSE: Mapping[str, Any] = {"color": FAINT, "linestyle": (0, (5, 3)), "linewidth": 1.3}
CONTROL: Mapping[str, Any] = {"color": INK, "linestyle": "-", "linewidth": 1.1}
_MAX_JOINED = 12  # points of a variant that a line joins; more are a cloud


@dataclass(frozen=True)
class Mark:
    """A point of a line, all in per cent: the spread is a standard deviation, None for fewer than three runs."""

    x: float
    y: float
    spread: float | None
    front: bool
    interval: tuple[float, float] | None = None  # of x, if it is a measured time


@dataclass(frozen=True)
class Line:
    """A variant. `style` is an index into STYLES, the same in every panel; None draws it grey, without a name.

    A line joins its marks, unless they are many or `joined` is False: a cloud of variants.
    """

    label: str
    style: int | None
    marks: Sequence[Mark]
    joined: bool = True


@dataclass(frozen=True)
class Panel:
    """Accuracy against what is left of one thing, on a logarithmic axis that falls: up and right is better."""

    title: str
    across: str
    lines: Sequence[Line]
    dense: Mapping[str, float]  # the dashed lines: label -> accuracy in per cent
    empty: str = "nothing recorded"
    up: str = "accuracy (%)"
    control: Mapping[str, float] = field(default_factory=dict)  # the same, drawn through


def draw_panels(panels: Sequence[Panel]) -> bytes:
    """A PNG: the first panel above, the others below it, one key for all at the foot."""
    named = _named(panels)
    columns = _key_columns(named)
    key_rows = math.ceil((len(named) + 3) / columns)
    upper, lower = 4.8, 3.9 if len(panels) > 1 else 0.0
    figure = new_figure(11, upper + lower + 0.27 * key_rows)
    for panel, axes in zip(panels, _axes(figure, len(panels), upper, lower), strict=True):
        _draw_panel(axes, panel, styles=len(named))
    _draw_key(figure, panels, named, columns)
    return png(figure)


def _axes(figure: Figure, count: int, upper: float, lower: float) -> list[Axes]:
    if count == 1:
        return [figure.add_subplot()]
    grid = figure.add_gridspec(2, count - 1, height_ratios=(upper, lower))
    below = [figure.add_subplot(grid[1, column]) for column in range(count - 1)]
    return [figure.add_subplot(grid[0, :]), *below]


def _named(panels: Sequence[Panel]) -> dict[int, str]:
    found = {line.style: line.label for panel in panels for line in panel.lines if line.style is not None}
    return dict(sorted(found.items()))


def _key_columns(named: Mapping[int, str]) -> int:
    longest = max((min(len(label), 60) for label in named.values()), default=0)
    return 5 if longest <= 14 else 4 if longest <= 20 else 3 if longest <= 30 else 2


def _draw_panel(axes: Axes, panel: Panel, *, styles: int) -> None:
    axes.set_title(panel.title, fontsize=11.5, loc="left", color=INK, weight="bold")
    axes.set_xlabel(panel.across, color=INK)
    axes.set_ylabel(panel.up, color=INK)
    quiet(axes, grid="both")
    grey = [mark for line in panel.lines if line.style is None for mark in line.marks]
    for line in [Line("", None, grey), *(line for line in panel.lines if line.style is not None)]:
        _draw_line(axes, line, shift=_shift(line, styles))
    for levels, style in ((panel.dense, DENSE), (panel.control, CONTROL)):
        for level in levels.values():
            axes.axhline(level, zorder=1.5, **style)
    marks = [mark for line in panel.lines for mark in line.marks]
    if marks:
        _draw_front(axes, [mark for mark in marks if mark.front])
        _limits(axes, panel, marks)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.5, panel.empty, transform=axes.transAxes, ha="center", color=FAINT)


def _shift(line: Line, styles: int) -> float:
    """Points to the right, so that equal results of two variants are side by side and both visible."""
    style = line.style
    return 0.0 if style is None or not line.joined else min(5.0, 20 / styles) * (style - (styles - 1) / 2)


def _draw_line(axes: Axes, line: Line, *, shift: float) -> None:
    marks = sorted(line.marks, key=lambda mark: (mark.x, -mark.y))
    colour, marker = (OTHERS, ".") if line.style is None else STYLES[line.style]
    place: dict[str, Any] = {"transform": _moved(axes, shift), "color": colour}
    joined = line.joined and line.style is not None and len(marks) <= _MAX_JOINED
    if joined:
        axes.plot([mark.x for mark in marks], [mark.y for mark in marks], linewidth=1.4, alpha=0.75, zorder=2, **place)
        _draw_errors(axes, marks, place)
    edge = {"markeredgecolor": "white", "markeredgewidth": 0.8} if joined else {"alpha": 0.8}
    _dots(axes, marks, marker=marker, markersize=7.5 if joined else 5, zorder=3, **edge, **place)
    ring = {"markerfacecolor": "none", "markeredgecolor": INK, "markeredgewidth": 1.4}
    _dots(axes, [mark for mark in marks if mark.front], marker="o", markersize=13, zorder=4, **ring, **place)


def _dots(axes: Axes, marks: Sequence[Mark], **style: Any) -> None:
    axes.plot([mark.x for mark in marks], [mark.y for mark in marks], linestyle="none", **style)


def _draw_errors(axes: Axes, marks: Sequence[Mark], place: Mapping[str, Any]) -> None:
    spread = [mark for mark in marks if mark.spread]
    x, y, error = ([getattr(mark, name) for mark in spread] for name in ("x", "y", "spread"))
    axes.errorbar(x, y, yerr=error, linestyle="none", elinewidth=1.2, capsize=3.5, zorder=2.5, **place)
    for mark in marks:
        if mark.interval is not None:  # not an error bar: in a file of another program x may lie outside
            axes.hlines(mark.y, *mark.interval, linewidth=1.2, zorder=2.5, **place)


def _moved(axes: Axes, points: float) -> Any:
    from matplotlib.transforms import ScaledTranslation

    figure: Any = axes.figure
    return axes.transData + ScaledTranslation(points / 72, 0, figure.dpi_scale_trans)


def _draw_front(axes: Axes, front: Sequence[Mark]) -> None:
    """Steps through the points of the front, from the largest network on."""
    corners = sorted({(-mark.x, mark.y) for mark in front})
    if len(corners) > 1:
        x, y = zip(*((-x, y) for x, y in corners), strict=True)
        axes.step(x, y, where="pre", color=INK, linewidth=1, linestyle=":", zorder=1.8)


def _limits(axes: Axes, panel: Panel, marks: Sequence[Mark]) -> None:
    x = [mark.x for mark in marks]
    y = [mark.y + sign * (mark.spread or 0) for mark in marks for sign in (-1, 1)]
    y += [*panel.dense.values(), *panel.control.values()]
    most, least = max(x), min(x)
    room = max(most / least, 2.0) ** 0.08
    middle = math.sqrt(most * least)
    most, least = max(most, 1.4 * middle) * room, min(least, middle / 1.4) / room
    axes.set_xscale("log")
    axes.set_xlim(most, least)
    values = ticks(least, most)
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.set_ylim(*_range(y, least=1, pad=0.12))


def ticks(least: float, most: float) -> list[float]:
    """At most eight round values for a logarithmic axis in per cent.

    >>> ticks(0.9, 60), ticks(0.001, 100)
    ([1.0, 2.0, 5.0, 10.0, 20.0, 50.0], [0.001, 0.01, 0.1, 1.0, 10.0, 100.0])
    """
    found: list[float] = []
    for steps in ((1, 2, 3, 5, 7), (1, 2, 5), (1,)):
        found = [
            tick for power in range(-8, 4) for step in steps if least <= (tick := float(f"{step}e{power}")) <= most
        ]
        if len(found) <= 8:
            break
    return found


def _range(values: Sequence[float], *, least: float, pad: float) -> tuple[float, float]:
    """The limits of an axis around its points: at least `least` wide, and hardly beyond 100 %.

    >>> _range([50.0, 100.0], least=10, pad=0.08)
    (46.0, 102.0)
    >>> _range([98.0], least=1, pad=0.0)
    (97.5, 98.5)
    """
    low, high = min(values), max(values)
    if high - low < least:
        low, high = (low + high - least) / 2, (low + high + least) / 2
    room = pad * (high - low)
    return low - room, min(high + room, 100 + room / 2)


def _draw_key(figure: Figure, panels: Sequence[Panel], named: Mapping[int, str], columns: int) -> None:
    from matplotlib.lines import Line2D

    def entry(label: str, **style: Any) -> None:
        handles.append(Line2D([], [], **style))
        labels.append(label)

    handles: list[Line2D] = []
    labels: list[str] = []
    for style, label in named.items():
        colour, marker = STYLES[style]
        entry(plain_label(label, 60), color=colour, marker=marker, markersize=7.5, linewidth=1.4)
    lines = [line for panel in panels for line in panel.lines]
    others = len({line.label for line in lines if line.style is None})
    if others:
        noun = "variant" if others == 1 else "variants"
        entry(f"{others} more {noun}", color=OTHERS, marker=".", markersize=9, linestyle="none")
    if any(mark.front for line in lines for mark in line.marks):
        ring: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": INK, "markeredgewidth": 1.4}
        entry("Pareto front", color=INK, linestyle=":", linewidth=1, marker="o", markersize=11, **ring)
    for label in dict.fromkeys(label for panel in panels for label in panel.dense):
        entry(plain_label(label, 60), **DENSE)
    for label in dict.fromkeys(label for panel in panels for label in panel.control):
        entry(plain_label(label, 60), **CONTROL)
    if handles:
        options: dict[str, Any] = {"fontsize": 9, "frameon": False, "handlelength": 2.6, "labelcolor": INK}
        key = figure.legend(handles, [""] * len(labels), loc="outside lower center", ncols=columns, **options)
        for text, label in zip(key.get_texts(), labels, strict=True):
            text.set_text(label)  # so that a name may begin with "_"
