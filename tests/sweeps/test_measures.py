"""Fronts and panels of points with known costs."""

from __future__ import annotations

from pathlib import Path

import pytest

from gsprune.sweeps.measures import MEASURES, panels, with_fronts
from gsprune.sweeps.results import JobResult
from gsprune.sweeps.variants import Point


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


def test_there_is_a_panel_for_each_cost_that_something_saves() -> None:
    jobs = [JobResult(Path("0"), {"status": "finished", "accuracy": 0.9, "baseline_accuracy": 0.95})]
    found = with_fronts([point("a", 0.90, left=0.2)])
    (panel,) = panels(found, jobs, {})
    assert panel.up == "test accuracy (%)"
    assert panel.dense == {"dense network: 95.00 %": 95.0}
    assert [(line.label, [(mark.x, mark.y, mark.front) for mark in line.marks]) for line in panel.lines] == [
        ("a", [(pytest.approx(20), 90.0, True)])
    ]
    assert len(panels(with_fronts([point("a", 0.90, left=0.2, macs=0.2)]), jobs, {})) == 2
