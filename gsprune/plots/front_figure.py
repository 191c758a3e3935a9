"""Draws accuracy against what is left of a network, as SVG whose colours follow the theme of the page around it.

`draw` gives the markup for a page that holds `THEME` in its style sheet; `document` a file that stands alone.
"""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gsprune.plots.sweep_figures import STYLES, ticks
from gsprune.text.display import label

__all__ = ["NARROW", "THEME", "WIDE", "Dot", "Front", "Series", "document", "draw"]

_DARK = ("#5fb0ea", "#f08a4b", "#3cc79a", "#e39cc6", "#8fd3f7", "#f2b84b", "#b391dc", "#b9c0cb")
_LIGHT_VARIABLES = " ".join(f"--s{i}: {colour};" for i, (colour, _) in enumerate(STYLES))
_DARK_VARIABLES = " ".join(f"--s{i}: {colour};" for i, colour in enumerate(_DARK))
_LIGHT = f"--ink: #1f2430; --faint: #5b6472; --line: #dfe3e9; --paper: #ffffff; --fine: #16703c; {_LIGHT_VARIABLES}"
_NIGHT = f"--ink: #e7e9ee; --faint: #a3abb8; --line: #39404d; --paper: #15181e; --fine: #7fd3a0; {_DARK_VARIABLES}"
THEME = (
    f":root {{ {_LIGHT} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {_NIGHT} }} }}\n"
    f"@media print {{ :root {{ {_LIGHT} }} }}\n"
    + "\n".join(f".s{i} {{ color: var(--s{i}); }}" for i in range(len(STYLES)))
    + "\n.sx { color: var(--faint); }\n"
    "svg.front { display: block; width: 100%; height: auto; fill: var(--ink);\n"
    "  font: 13px system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif; }\n"
    "svg.front .over { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }\n"
    "svg.front .faint { fill: var(--faint); } svg.front .grid { stroke: var(--line); }\n"
    "svg.front a { text-decoration: none; }"
)
_SHAPES = {  # by matplotlib's names of markers, around 0 with a radius of about 1
    "o": "M1,0A1,1 0 1 1 -1,0A1,1 0 1 1 1,0Z",
    "s": "M-.9,-.9H.9V.9H-.9Z",
    "^": "M0,-1.1L1.05,.8H-1.05Z",
    "D": "M0,-1.2L1.2,0L0,1.2L-1.2,0Z",
    "v": "M0,1.1L1.05,-.8H-1.05Z",
    "P": "M-.4,-1.1H.4V-.4H1.1V.4H.4V1.1H-.4V.4H-1.1V-.4H-.4Z",
    "X": "M-1,-.5L-.5,-1L0,-.5L.5,-1L1,-.5L.5,0L1,.5L.5,1L0,.5L-.5,1L-1,.5L-.5,0Z",
    "<": "M-1.1,0L.8,-1.05V1.05Z",
}
_MAX_JOINED = 12  # dots of a series that a line joins; more are a cloud
_BAND = 52.0  # height of the part below the break


@dataclass(frozen=True)
class Dot:
    """A variant at one sparsity, all numbers in per cent.

    Attributes:
        across, up: where its bars begin and end; None without.
        smaller: whether tensors are smaller, and not only full of zeros: filled, else hollow.
        taken: whether the verdict takes it.
        front: whether no other is as accurate and as small.
        note: what a pointer over it shows.
        link: what a click on it opens; "" for nothing.
    """

    x: float
    y: float
    across: tuple[float, float] | None = None
    up: tuple[float, float] | None = None
    smaller: bool = True
    taken: bool = False
    front: bool = False
    note: str = ""
    link: str = ""


@dataclass(frozen=True)
class Series:
    """The dots of a variant. `style` is an index into STYLES; None draws them grey, and names them together.

    A reference (what must lose, or what must be beaten) is joined by a dashed line.
    """

    label: str
    style: int | None
    dots: Sequence[Dot]
    reference: bool = False
    joined: bool = True


@dataclass(frozen=True)
class Front:
    """Accuracy against what is left of one thing: up and right is better.

    Attributes:
        across, more: the title of the axis, and what its 100 % are.
        control, dense: accuracies in per cent of networks that are not pruned; None without.
        max_drop: points that may be lost to the control.
    """

    title: str
    across: str
    more: str
    up: str
    series: Sequence[Series]
    control: float | None = None
    dense: float | None = None
    max_drop: float = 0.0
    empty: str = "no pruned network yet"


@dataclass(frozen=True)
class Size:
    """Of the picture, in the units of its view box; text is 13 of them high."""

    width: float
    height: float
    left: float
    right: float = 14.0


WIDE, NARROW = Size(920, 400, 62), Size(372, 360, 58, 8)


def document(front: Front) -> bytes:
    """The picture as a file of its own, which follows the theme of its reader too."""
    svg = draw(front, WIDE).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    inside = f"<style>{html.escape(THEME, quote=False)}</style>"
    paper = '<rect width="100%" height="100%" fill="var(--paper)"/>'
    return svg.replace(">", f">{inside}{paper}", 1).encode("utf-8", "replace")


def draw(front: Front, size: Size = WIDE) -> str:
    """The markup of the picture, with its key below; all texts are escaped."""
    entries = [(sign, _plain(text, _fitting(size))) for sign, text in _entries(front)]
    places, key_height = _flow(entries, size)
    bottom = size.height + 20 * (size is NARROW)
    height = bottom + key_height
    plot = _Plot.of(front, size)
    parts = plot.parts() if plot else [_text(size.width / 2, size.height / 2, front.empty, "faint", anchor="middle")]
    parts += [_key_entry(entry, x, bottom + y) for entry, (x, y) in zip(entries, places, strict=True)]
    told = html.escape(_plain(front.title, 200))
    view = f'viewBox="0 0 {_n(size.width)} {_n(height)}"'
    return f'<svg class="front" role="img" aria-label="{told}" {view}>{"".join(parts)}</svg>'


# --- scales ------------------------------------------------------------------------------------------------


def visible(front: Front) -> tuple[float, float, bool]:
    """The range of the axis of accuracies, and whether it is broken: dots below it have collapsed.

    It reaches five times as far below the control as the tolerance, or twice as far as the best quarter of the dots,
    and to the network that is taken; what lies below that would press all others together.

    >>> dots = [Dot(50, 99.0), Dot(30, 98.5), Dot(20, 97.0), Dot(10, 12.0)]
    >>> visible(Front("", "", "", "", [Series("abs", 0, dots)], control=99.0, max_drop=1.0))
    (96.76, 99.24, True)
    """
    dots = [dot for series in front.series for dot in series.dots]
    levels = [level for level in (front.control, front.dense) if level is not None]
    top = front.control if front.control is not None else max((*levels, *(dot.y for dot in dots)))
    drops = sorted(max(0.0, top - dot.y) for dot in dots)
    quarter = statistics.quantiles(drops, n=4)[0] if len(drops) > 1 else drops[0]
    floor = min(top - max(5 * front.max_drop, 2 * quarter, 1.0), *(dot.y for dot in dots if dot.taken), 100.0)
    shown = [dot for dot in dots if dot.y >= floor]
    ends = [end for dot in shown for end in (dot.y, *(dot.up or ()))]
    values = [*(max(end, floor) for end in ends), *(level for level in levels if level >= floor)] or [top]
    if front.max_drop and front.control is not None:
        values.append(max(floor, front.control - front.max_drop))
    low, high = min(values), max(values)
    if high - low < 1:
        low, high = (low + high - 1) / 2, (low + high + 1) / 2
    room = 0.12 * (high - low)
    return round(low - room, 3), round(min(high + room, 100 + room / 2), 3), len(shown) < len(dots)


def steps(low: float, high: float) -> list[float]:
    """At most seven round values of a linear axis.

    >>> steps(96.88, 99.12), steps(3, 97)
    ([97.0, 97.5, 98.0, 98.5, 99.0], [20.0, 40.0, 60.0, 80.0])
    """
    power = 10.0 ** math.floor(math.log10((high - low) / 7))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= 7)
    first = math.ceil(low / step - 1e-9)
    return [round(step * (first + i), 6) for i in range(int((high / step) - first + 1e-9) + 1)]


@dataclass(frozen=True)
class _Plot:
    """The area of the axes, in the units of the view box."""

    front: Front
    size: Size
    most: float
    least: float
    low: float
    high: float
    broken: bool

    @classmethod
    def of(cls, front: Front, size: Size) -> _Plot | None:
        xs = [x for series in front.series for dot in series.dots for x in (dot.x, *(dot.across or ())) if x > 0]
        if not xs:
            return None
        most, least = max(xs), min(xs)
        room, middle = max(most / least, 2.0) ** 0.08, math.sqrt(most * least)
        return cls(front, size, max(most, 1.4 * middle) * room, min(least, middle / 1.4) / room, *visible(front))

    @property
    def top(self) -> float:
        return 14.0

    @property
    def bottom(self) -> float:
        """Of the axes; the band below the break included."""
        return self.size.height - 66.0

    @property
    def floor(self) -> float:
        """Of the part that is to scale."""
        return self.bottom - (_BAND if self.broken else 0.0)

    def x(self, value: float) -> float:
        share = math.log(self.most / value) / math.log(self.most / self.least)
        return self.size.left + share * (self.size.width - self.size.right - self.size.left)

    def y(self, value: float) -> float:
        """Of what has collapsed: in the middle of the band."""
        if value < self.low:
            return self.bottom - _BAND / 2 + 1
        return self.floor - (value - self.low) / (self.high - self.low) * (self.floor - self.top)

    def parts(self) -> list[str]:
        return [*self._axes(), *self._levels(), *self._front(), *self._lines(), *self._dots()]

    def _axes(self) -> Iterable[str]:
        left, right = self.size.left, self.size.width - self.size.right
        for value in steps(self.low, self.high):
            at = self.y(value)
            yield _line(left, at, right, at, 'class="grid"')
            yield _text(left - 7, at + 4.5, f"{value:g}", "faint", anchor="end")
        for value in ticks(self.least, self.most):
            at = self.x(value)
            yield _line(at, self.top, at, self.bottom, 'class="grid"')
            yield _text(at, self.bottom + 18, f"{value:g}", "faint", anchor="middle")
        yield _line(left, self.bottom, right, self.bottom, 'stroke="var(--faint)"')
        yield _line(left, self.top, left, self.bottom, 'stroke="var(--faint)"')
        if self.broken:
            yield _line(left, self.floor, right, self.floor, 'stroke="var(--faint)" stroke-dasharray="2 4"')
            yield _text(left + 6, self.floor + 13, f"below {self.low:.1f} %, not to scale", "faint", size=11.5)
            zigzag = f"M{_n(left - 5)},{_n(self.floor + 3)}l10,-6m0,4l-10,6"
            yield f'<path d="{zigzag}" stroke="var(--faint)" fill="none"/>'
        middle = (left + right) / 2
        titles = [f"{self.front.across} {self.front.more}"]
        if self.size is NARROW:
            titles = [self.front.across, self.front.more]
        for row, title in enumerate(titles):
            yield _text(middle, self.bottom + 38 + 16 * row, title, "", anchor="middle")
        at = (self.top + self.bottom) / 2
        turned = f'transform="rotate(-90 13 {_n(at)})" text-anchor="middle"'
        yield f'<text x="13" y="{_n(at)}" {turned}>{html.escape(_plain(self.front.up, 60))}</text>'

    def _levels(self) -> Iterable[str]:
        left, right = self.size.left, self.size.width - self.size.right
        control, drop = self.front.control, self.front.max_drop
        if control is not None and drop and control > self.low:
            above, below = self.y(control), self.y(max(control - drop, self.low))
            place = f'x="{_n(left)}" y="{_n(above)}" width="{_n(right - left)}" height="{_n(below - above)}"'
            yield f'<rect class="band" {place} fill="var(--fine)" fill-opacity=".12"/>'
        for level, style in ((self.front.dense, _DENSE), (control, _CONTROL)):
            if level is not None and self.low <= level:
                yield _line(left, self.y(level), right, self.y(level), style)

    def _front(self) -> Iterable[str]:
        """Steps through the dots of the front, from the largest network on."""
        front = [dot for series in self.front.series for dot in series.dots if dot.front and dot.y >= self.low]
        corners = sorted({(self.x(dot.x), self.y(dot.y)) for dot in front})
        if len(corners) > 1:
            (x, y), *rest = corners
            path = f"M{_n(x)},{_n(y)}" + "".join(f"V{_n(below)}H{_n(across)}" for across, below in rest)
            yield f'<path class="steps" d="{path}" {_STEPS}/>'

    def _shift(self, series: Series) -> float:
        """To the side, so that equal results of two variants are both visible."""
        named = sum(1 for other in self.front.series if other.style is not None)
        own = series.style
        return 0.0 if own is None or not series.joined else min(5.0, 20 / max(named, 1)) * (own - (named - 1) / 2)

    def _lines(self) -> Iterable[str]:
        for series in self.front.series:
            dots = sorted((dot for dot in series.dots if dot.y >= self.low), key=lambda dot: (-dot.x, -dot.y))
            fallen = sorted((dot for dot in series.dots if dot.y < self.low), key=lambda dot: -dot.x)
            if series.style is None or not series.joined or not 1 < len(dots) + len(fallen[:1]) <= _MAX_JOINED:
                continue
            shift = self._shift(series)
            points = [(self.x(dot.x) + shift, self.y(dot.y)) for dot in dots]
            after = [dot for dot in fallen if dots and dot.x <= dots[-1].x]
            if after:  # towards what has collapsed, as far as the axis is to scale
                points.append((self.x(after[0].x) + shift, self.floor))
            path = "M" + "L".join(f"{_n(x)},{_n(y)}" for x, y in points)
            dash = ' stroke-dasharray="5 4"' if series.reference else ""
            style = f'stroke="currentColor" fill="none" stroke-width="1.6"{dash}'
            yield f'<path class="s{series.style}" d="{path}" {style}/>'

    def _dots(self) -> Iterable[str]:
        said: list[float] = []
        for series in sorted(self.front.series, key=lambda series: series.style is not None):
            shift = self._shift(series)
            for dot in series.dots:
                yield self._dot(series, dot, shift)
                if dot.y < self.low and all(abs(self.x(dot.x) + shift - at) > 34 for at in said):
                    said.append(self.x(dot.x) + shift)
                    yield _text(said[-1], self.y(dot.y) + 20, f"{dot.y:.1f}", "faint", anchor="middle", size=11.5)

    def _dot(self, series: Series, dot: Dot, shift: float) -> str:
        x, y = self.x(dot.x) + shift, self.y(dot.y)
        style = f"s{series.style}" if series.style is not None else "sx"
        parts = [f'<g class="{style}">', f"<title>{html.escape(_plain(dot.note, 300))}</title>" if dot.note else ""]
        if dot.up and dot.y >= self.low:
            low, high = (min(max(end, self.low), self.high) for end in dot.up)
            ends = (self.y(low), self.y(high))
            caps = "".join(f"M{_n(x - 4)},{_n(end)}h8" for end in ends)
            parts.append(f'<path d="M{_n(x)},{_n(ends[0])}V{_n(ends[1])}{caps}" {_BAR}/>')
        if dot.across:
            first, last = (self.x(end) + shift for end in dot.across)
            caps = "".join(f"M{_n(end)},{_n(y - 4)}v8" for end in (first, last))
            parts.append(f'<path d="M{_n(first)},{_n(y)}H{_n(last)}{caps}" {_BAR}/>')
        if dot.taken:
            parts.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="12" fill="none" stroke="var(--ink)" stroke-width="2"/>')
            above = y - 18 if y - 18 > self.top + 8 else y + 28
            parts.append(_text(x, above, "take", "over", anchor="middle", weight="700"))
        parts += [_shape(series.style, x, y, 6.0 if series.style is not None else 3.0, dot.smaller), "</g>"]
        inside = "".join(parts)
        return f'<a href="{html.escape(dot.link)}">{inside}</a>' if dot.link else inside


# --- the key -----------------------------------------------------------------------------------------------

_BAR = 'stroke="currentColor" stroke-width="1.3" fill="none" class="bar"'
_DENSE = 'stroke="var(--faint)" stroke-width="1.4" stroke-dasharray="6 4"'
_CONTROL = 'stroke="var(--ink)" stroke-width="1.4"'
_STEPS = 'stroke="var(--ink)" stroke-width="1" stroke-dasharray="1 3" fill="none"'
Entry = tuple[str, str]  # the sign around 0, and its text


def _entries(front: Front) -> Iterable[Entry]:
    """Signs and texts of the key."""
    for series in front.series:
        if series.style is None:
            continue
        dash = ' stroke-dasharray="4 3"' if series.reference else ""
        line = f'<path d="M-13,0H13" stroke="currentColor" stroke-width="1.6"{dash}/>'
        smaller = any(dot.smaller for dot in series.dots)
        yield f'<g class="s{series.style}">{line}{_shape(series.style, 0, 0, 5.5, smaller)}</g>', series.label
    others = sum(series.style is None for series in front.series)
    if others:
        yield f'<g class="sx">{_shape(None, 0, 0, 3, True)}</g>', f"{others} more variant{'s' * (others != 1)}"
    dots = [dot for series in front.series for dot in series.dots]
    if any(not dot.smaller for dot in dots):
        yield f'<g class="sx">{_shape(0, 0, 0, 5.5, False)}</g>', "hollow: zeros in tensors of the old size"
    if sum(dot.front for dot in dots) > 1:
        yield f'<path d="M-13,0H13" {_STEPS}/>', "Pareto front"
    if front.control is not None:
        yield f'<path d="M-13,0H13" {_CONTROL}/>', f"control: {front.control:.2f} %"
        if front.max_drop:
            band = '<rect x="-13" y="-6" width="26" height="12" fill="var(--fine)" fill-opacity=".2"/>'
            yield band, f"within {front.max_drop:g} point{'s' * (front.max_drop != 1)} of it"
    if front.dense is not None:
        yield f'<path d="M-13,0H13" {_DENSE}/>', f"dense network: {front.dense:.2f} %"


def _flow(entries: Sequence[Entry], size: Size) -> tuple[list[tuple[float, float]], float]:
    """Where the entries of the key stand, in rows as wide as the picture, and how high they are together."""
    places, x, y = list[tuple[float, float]](), 18.0, 8.0
    for _, text in entries:
        width = 24 + 6.8 * len(text) + 30
        if places and x + width > size.width:
            x, y = 18.0, y + 22
        places.append((x, y))
        x += width
    return places, y + 16 if places else 0.0


def _fitting(size: Size) -> int:
    """Letters of a text that is as wide as the picture."""
    return int((size.width - 50) / 7.0)


def _key_entry(entry: Entry, x: float, y: float) -> str:
    sign, text = entry
    return f'<g transform="translate({_n(x)} {_n(y)})">{sign}{_text(20, 4.5, text, "")}</g>'


# --- markup ------------------------------------------------------------------------------------------------


def _shape(style: int | None, x: float, y: float, radius: float, filled: bool) -> str:
    path = _SHAPES[STYLES[style][1]] if style is not None else _SHAPES["o"]
    fill = "currentColor" if filled else "var(--paper)"
    place = f'transform="translate({_n(x)} {_n(y)}) scale({radius:g})"'
    return f'<path d="{path}" {place} fill="{fill}" stroke="currentColor" stroke-width="{1.8 / radius:.2f}"/>'


def _line(x: float, y: float, across: float, below: float, style: str) -> str:
    return f'<path d="M{_n(x)},{_n(y)}L{_n(across)},{_n(below)}" {style} fill="none"/>'


def _text(
    x: float, y: float, text: str, kind: str, *, anchor: str = "start", size: float = 0.0, weight: str = ""
) -> str:
    more = f' class="{kind}"' if kind else ' fill="var(--ink)"'
    more += f' text-anchor="{anchor}"' if anchor != "start" else ""
    more += f' font-size="{size:g}"' if size else ""
    more += f' font-weight="{weight}"' if weight else ""
    return f'<text x="{_n(x)}" y="{_n(y)}"{more}>{html.escape(_plain(text, 120))}</text>'


def _plain(text: str, length: int) -> str:
    return label(text, length).encode("utf-8", "replace").decode()


def _n(number: float) -> str:
    """
    >>> _n(3.14159), _n(2.0)
    ('3.1', '2')
    """
    return f"{number:.1f}".removesuffix(".0")
