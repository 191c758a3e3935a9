"""What a sweep's networks are compared by: the share of the dense network that is left, its fronts and its picture."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gsprune.plots.front_figure import Dot, Front, Series
from gsprune.plots.sweep_figures import STYLES
from gsprune.sweeps.results import JobResult
from gsprune.sweeps.variants import VALIDATION, Point, chosen_by, job_ratio, pareto_front, stat
from gsprune.sweeps.verdict import Terms, Verdict
from gsprune.text.names import natural

__all__ = ["MEASURES", "Measure", "pictures", "with_fronts"]

Interval = tuple[float, float, float]  # low, middle, high
_BASELINES = ("magnitude", "random")  # pruners that others are compared with


@dataclass(frozen=True)
class Measure:
    """One cost of a network, as a share of the dense one's: it means the same for single weights and for units.

    Attributes:
        name: the name of its front.
        switch: of its button above the picture.
        axis: of the picture.
        table: the heading of its table on the page; "" without one.
        timed: whether its interval is that of a measurement; else it is what the jobs of a point differ by.
        whole, form: the number of a result that is 100 %, and how it is written.
    """

    name: str
    switch: str
    axis: str
    table: str
    share: Callable[[Point], Interval | None]
    whole: str
    form: str
    timed: bool = False

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
        if not self.timed or low == high:
            low = high = float(f"{middle:.3g}")
        return -high, -low, round(point.choice.mean, 4)


def _counted(name: str, whole: str) -> Callable[[Point], Interval | None]:
    """The share that the jobs of a point have left: the least, the mean, the most."""

    def share(point: Point) -> Interval | None:
        found = [ratio for job in point.jobs if (ratio := job_ratio(job, name, whole)) is not None]
        return (min(found), math.fsum(found) / len(found), max(found)) if found else None

    return share


def _parameters(point: Point) -> Interval | None:
    found = _counted("params_nonzero", "params_dense")(point)
    return _counted("params", "params_dense")(point) if found is None and point.shrunk else found


def _latency(point: Point) -> Interval | None:
    if point.faster is None:
        return None
    ratio, low, high = point.faster
    return 1 / high, 1 / ratio, 1 / low


MEASURES = (
    Measure(
        "parameters",
        "parameters",
        "parameters left that are not zero",
        "parameters left (not zero)",
        _parameters,
        "params_dense",
        "{:,.0f}",
    ),
    Measure("MACs", "MACs", "MACs left", "MACs left", _counted("macs", "macs_dense"), "macs_dense", "{:,.0f}"),
    Measure("latency", "time (ms)", "time left", "", _latency, "latency_dense_ms", "{:.3g} ms", timed=True),
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


def pictures(
    points: Sequence[Point],
    jobs: Sequence[JobResult],
    verdicts: Sequence[Verdict],
    terms: Terms,
    links: Mapping[Any, str],
) -> dict[str, Front]:
    """Switch -> picture, for each measure by which some network is smaller; the first one in any case.

    Args:
        links: key of a point -> what a click on it opens.
    """
    by = chosen_by(jobs)
    split = "validation" if by == VALIDATION else "test"
    taken = {verdict.taken.key for verdict in verdicts if verdict.taken is not None}
    references = [verdict.reference for verdict in verdicts if verdict.reference is not None]
    one = references[0] if len(verdicts) == 1 and references else None  # levels of several models mean nothing
    dense = stat(job.number(f"baseline_{by}") for job in jobs) if one else None
    styles, found = _styles(points), dict[str, Front]()
    for measure in MEASURES:
        series = _series(points, measure, styles, taken, links)
        if found and not any(dot.x < 99.95 for one_of in series for dot in one_of.dots):
            continue
        found[measure.switch] = Front(
            title=f"{split} accuracy against {measure.axis}",
            across=measure.axis,
            more=f"(% of the dense network's{_whole(measure, jobs)})",
            up=f"{split} accuracy (%)",
            series=series,
            control=100 * one.mean if one and one.is_control else None,
            dense=100 * dense.mean if dense else None,
            max_drop=terms.max_drop,
            empty="no finished job says how many parameters are left" if points else "no pruned network yet",
        )
    return found


def _whole(measure: Measure, jobs: Sequence[JobResult]) -> str:
    """The dense network's own number, where all have about the same."""
    known = [value for job in jobs if (value := job.number(measure.whole))]
    if not known or max(known) > (2.0 if measure.timed else 1.0) * min(known):
        return ""
    return " " + measure.form.format(statistics.median(known))


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


def _series(
    points: Sequence[Point],
    measure: Measure,
    styles: Mapping[str, int],
    taken: Collection[Hashable],
    links: Mapping[Any, str],
) -> list[Series]:
    joined, found = not _is_search(points), list[Series]()
    for name, own in _by_line(points).items():
        dots = [
            _dot(point, left, measure, point.key in taken, links.get(point.key, ""))
            for point in own
            if (left := measure.left(point)) is not None
        ]
        if dots:
            found.append(Series(name, styles.get(name), dots, own[0].pruner in _BASELINES, joined))
    return sorted(found, key=lambda series: (series.style is None, series.style or 0))


def _dot(point: Point, left: Interval, measure: Measure, taken: bool, link: str) -> Dot:
    low, middle, high = left
    accuracy, spread = 100 * point.choice.mean, point.choice.spread
    up = (accuracy - 100 * spread, accuracy + 100 * spread) if spread else None
    note = f"{point.variant}: {accuracy:.2f} %, {middle:.3g} % of {measure.switch} left, {point.choice.count} seeds"
    across = (low, high) if high > 1.001 * low else None
    on_front = measure.name in point.fronts
    return Dot(middle, accuracy, across, up, point.shrunk, taken, on_front, note, link)
