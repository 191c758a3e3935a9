"""Fronts and panels of points with known costs."""

from __future__ import annotations

from pathlib import Path

import pytest

from gsprune.plots.front_figure import Front
from gsprune.sweeps.measures import MEASURES, pictures, with_fronts
from gsprune.sweeps.results import JobResult
from gsprune.sweeps.variants import Point
from gsprune.sweeps.verdict import Terms, verdicts


def point(name: str, accuracy: float, *, left: float = 1.0, macs: float = 1.0, **result: object) -> Point:
    costs = {"params_nonzero": 1e6 * left, "params_dense": 1e6, "macs": 1e6 * macs, "macs_dense": 1e6}
    full = {"status": "finished", "accuracy": accuracy, "val_accuracy": accuracy, **costs, **result}
    return Point(name, 0.5, (JobResult(Path(name), full),))


def test_a_point_is_on_the_front_of_each_cost_by_itself() -> None:
    found = with_fronts(
        [point("small", 0.90, left=0.2), point("fast", 0.91, left=0.3, macs=0.5), point("bad", 0.89, left=0.4)]
    )
    assert {p.variant: p.fronts for p in found} == {"small": ("parameters",), "fast": ("parameters", "MACs"), "bad": ()}


def test_costs_are_compared_with_three_digits_and_accuracies_with_four() -> None:
    found = with_fronts([point("a", 0.90001, left=0.20004), point("b", 0.90004, left=0.20001)])
    assert [p.fronts for p in found] == [("parameters", "MACs")] * 2


def test_latencies_with_overlapping_intervals_are_equal() -> None:
    def timed(name: str, accuracy: float, ratio: float) -> Point:
        return point(name, accuracy, speedup=ratio, speedup_low=ratio - 0.1, speedup_high=ratio + 0.1)

    found = with_fronts([timed("best", 0.92, 2.0), timed("by_chance", 0.91, 2.15), timed("fast", 0.90, 3.0)])
    assert [p.variant for p in found if "latency" in p.fronts] == ["best", "fast"]
    left = MEASURES[2].left(found[0])
    assert left == (pytest.approx(100 / 2.1), 50, pytest.approx(100 / 1.9))


def test_a_share_that_no_axis_can_show_is_none() -> None:
    assert [MEASURES[0].left(point("x", 0.9, left=left)) for left in (0, 11)] == [None, None]


def drawn(found: list[Point], **terms: float) -> dict[str, Front]:
    jobs = [job for point in found for job in point.jobs]
    return pictures(found, jobs, verdicts(found, jobs, {}, Terms(**terms)), Terms(**terms), {("a", 0.5): "#p0"})


def test_there_is_a_picture_for_each_cost_that_something_saves() -> None:
    found = with_fronts([point("a", 0.90, left=0.2, baseline_val_accuracy=0.95)])
    (front,) = drawn(found).values()
    assert (front.up, front.across) == ("validation accuracy (%)", "parameters left that are not zero")
    assert front.more == "(% of the dense network's 1,000,000)"
    assert (front.control, front.dense) == (None, pytest.approx(95.0))
    (series,) = front.series
    (dot,) = series.dots
    assert (dot.x, dot.y, dot.front, dot.taken, dot.link) == (pytest.approx(20), 90.0, True, False, "#p0")
    assert list(drawn(with_fronts([point("a", 0.90, left=0.2, macs=0.2)]))) == ["parameters", "MACs"]
    (taken,) = drawn(found, max_drop=6.0)["parameters"].series[0].dots
    assert taken.taken


def test_what_seeds_differ_by_is_the_bar_across_and_no_interval_on_the_front() -> None:
    first, second = (point("a", 0.9, left=left).jobs[0] for left in (0.2, 0.4))
    found = with_fronts([Point("a", 0.5, (first, second)), point("b", 0.89, left=0.31)])
    assert MEASURES[0].left(found[0]) == (pytest.approx(20), pytest.approx(30), pytest.approx(40))
    assert [p.fronts for p in found] == [("parameters", "MACs"), ()]  # 31 % is not less than 30 %
    (dot,) = drawn(found)["parameters"].series[0].dots
    assert dot.across == (pytest.approx(20), pytest.approx(40))


def test_baselines_are_references_and_zeros_are_hollow() -> None:
    found = with_fronts([point("random", 0.9, left=0.5, overrides=["pruner=random"]), point("a", 0.9, shrunk=True)])
    told = {s.label: (s.reference, s.dots[0].smaller) for s in drawn(found)["parameters"].series}
    assert told == {"random": (True, False), "a": (False, True)}
