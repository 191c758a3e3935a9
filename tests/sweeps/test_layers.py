"""Which layers of which runs a heatmap shows."""

from __future__ import annotations

from pathlib import Path

from gsprune.sweeps.layers import heatmaps
from gsprune.sweeps.results import JobResult
from gsprune.sweeps.variants import Point


def point(layers: object, *, target: float = 0.5, fronts: tuple[str, ...] = ()) -> Point:
    job = JobResult(Path("0"), {"status": "finished", "accuracy": 0.9, "layers": layers})
    return Point("x", target, (job,), fronts=fronts)


def test_runs_with_half_of_their_layers_in_common_share_a_heatmap() -> None:
    counts = {"a": [1, 4], "b": [2, 4]}
    found, left_out = heatmaps({"one": point(counts), "other": point({"z": [1, 1]}), "same": point({"a": [0, 4]})})
    assert found == [{"one": {"a": 0.25, "b": 0.5}, "same": {"a": 0.0}}, {"other": {"z": 1.0}}]
    assert left_out == 0


def test_counts_of_another_kind_are_no_layers() -> None:
    odd = {"a": [1, 2], "b": [3, 2], "c": [0, 0], "d": [True, 2], "e": [1], "f": "12", "g": [-1, 2], "h": None}
    assert heatmaps({"x": point(odd), "none": point([1]), "empty": point({})}) == ([{"x": {"a": 0.5}}], 0)


def test_of_too_many_runs_those_on_a_front_and_the_best_stay() -> None:
    points = {f"{index}": point({"a": [1, 2]}, fronts=("MACs",) if index > 24 else ()) for index in range(30)}
    (runs,), left_out = heatmaps(points)
    assert list(runs) == [*map(str, range(15)), *map(str, range(25, 30))]
    assert left_out == 10
