"""What a sweep's networks are compared by: the share of the dense network that is left, its fronts and its picture."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from gsprune.plots.sweep_figures import STYLES, Line, Mark, Panel
from gsprune.sweeps.results import JobResult
from gsprune.sweeps.variants import VALIDATION, Point, chosen_by, control_levels, dense_levels, pareto_front
from gsprune.text.names import natural

__all__ = ["MEASURES", "Measure", "panels", "with_fronts"]

Interval = tuple[float, float, float]  # low, middle, high


@dataclass(frozen=True)
class Measure:
    """One cost of a network, as a share of the dense one's: it means the same for single weights and for units.

    Attributes:
        name: the name of its front.
        title, axis: of its panel in the picture.
        table: the heading of its table on the page; "" without one.
    """

    name: str
    title: str
    axis: str
    table: str
    share: Callable[[Point], Interval | None]

    def left(self, point: Point) -> Interval | None:
        """In per cent; None if unknown, or out of the range that a network can have and a logarithmic axis can show."""
        found = self.share(point)
        if found is None or not 1e-8 <= found[1] <= 10:
            return None
        low, middle, high = found
        return 100 * low, 100 * middle, 100 * high

    def place(self, point: Point) -> tuple[float, float, float] | None:
        """What `pareto_front` compares, as the table shows it: 20.0004 % left is no more than 20 %."""
        if (left := self.left(point)) is None:
            return None
        low, middle, high = left
        if low == high:
            low = high = float(f"{middle:.3g}")
        return -high, -low, round(point.choice.mean, 4)


def _exact(share: float | None) -> Interval | None:
    return None if share is None else (share, share, share)


def _latency(point: Point) -> Interval | None:
    if point.faster is None:
        return None
    ratio, low, high = point.faster
    return 1 / high, 1 / ratio, 1 / low


MEASURES = (
    Measure(
        "parameters",
        "Accuracy against parameters left",
        "parameters left, not zero (% of the dense network's)",
        "parameters left (not zero)",
        lambda point: _exact(point.left),
    ),
    Measure(
        "MACs",
        "Accuracy against multiplications left",
        "MACs left (% of the dense network's)",
        "MACs left",
        lambda point: _exact(point.ratio("macs", "macs_dense")),
    ),
    Measure("latency", "Accuracy against time left", "latency left (% of the dense network's)", "", _latency),
)


def with_fronts(points: Sequence[Point]) -> list[Point]:
    """The points, each with the names of the measures on whose Pareto front it is."""
    fronts: dict[tuple[str, float | None], list[str]] = defaultdict(list)
    for measure in MEASURES:
        placed = [(point.key, place) for point in points if (place := measure.place(point)) is not None]
        for (key, _), on_front in zip(placed, pareto_front([place for _, place in placed]), strict=True):
            if on_front:
                fronts[key].append(measure.name)
    return [replace(point, fronts=tuple(fronts[point.key])) for point in points]


# --- the picture -------------------------------------------------------------------------------------------


def panels(points: Sequence[Point], jobs: Sequence[JobResult], axes: Mapping[str, Sequence[str]]) -> list[Panel]:
    """A panel for each measure by which some network is smaller; the first one in any case."""
    dense, control = (
        {f"{label}: {100 * accuracy:.2f} %": 100 * accuracy for label, accuracy in levels(jobs, axes).items()}
        for levels in (dense_levels, control_levels)
    )
    split = "validation" if chosen_by(jobs) == VALIDATION else "test"
    empty = "no finished job says how many parameters are left" if points else "no pruned network yet"
    styles, found = _styles(points), list[Panel]()
    for measure in MEASURES:
        lines = _lines(points, measure, styles)
        if not found or any(mark.x < 99.95 for line in lines for mark in line.marks):
            found.append(Panel(measure.title, measure.axis, lines, dense, empty, f"{split} accuracy (%)", control))
    return found


def _is_search(points: Sequence[Point]) -> bool:
    """Whether there are too many variants for lines, most of them with one point: the results of a search."""
    met = Counter(point.variant for point in points)
    return len(met) > len(STYLES) and 2 * sum(count == 1 for count in met.values()) > len(met)


def _by_line(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points of each variant; in a search those of each pruner."""
    search, found = _is_search(points), defaultdict[str, list[Point]](list)
    for point in points:
        found[point.pruner if search else point.variant].append(point)
    return found


def _styles(points: Sequence[Point]) -> dict[str, int]:
    """A style for each line; of too many, for those with most points on the first front, then the most accurate."""
    own = _by_line(points)

    def merit(name: str) -> tuple[int, float]:
        on_front = sum(MEASURES[0].name in point.fronts for point in own[name])
        return -on_front, -sum(point.choice.mean for point in own[name]) / len(own[name])

    chosen = sorted(own, key=merit)[: len(STYLES)]
    return {name: index for index, name in enumerate(sorted(chosen, key=natural))}


def _lines(points: Sequence[Point], measure: Measure, styles: Mapping[str, int]) -> list[Line]:
    joined = not _is_search(points)
    marked = {
        name: [_mark(point, left, measure) for point in own if (left := measure.left(point)) is not None]
        for name, own in _by_line(points).items()
    }
    return [Line(name, styles.get(name), marks, joined=joined) for name, marks in marked.items() if marks]


def _mark(point: Point, left: Interval, measure: Measure) -> Mark:
    low, middle, high = left
    spread = None if point.choice.spread is None else 100 * point.choice.spread
    on_front = measure.name in point.fronts
    return Mark(middle, 100 * point.choice.mean, spread, on_front, (low, high) if low < high else None)
