"""Variants, means over seeds and Pareto fronts, against values worked out by hand and a slow obvious version."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest

from gsprune.results import JobResult
from gsprune.variants import Dense, Stat, dense_levels, once_each, pareto_front, points, stat, swept, variants


def job(name: str, *overrides: str, **result: object) -> JobResult:
    return JobResult(
        Path("sweep") / name, {"status": "finished", "overrides": list(overrides), **result}, Path("sweep")
    )


def names(jobs: Sequence[JobResult]) -> list[str]:
    return list(variants(jobs, swept(jobs)).values())


def slow_front(pairs: Sequence[tuple[float, float]]) -> list[bool]:
    """No other pair is at least as high in both and higher in one."""

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] >= b[0] and a[1] >= b[1] and a != b

    return [not any(beats(other, pair) for other in pairs) for pair in pairs]


@pytest.mark.parametrize("seed", range(30))
def test_the_front_equals_the_obvious_one(seed: int) -> None:
    draw = random.Random(seed)
    pairs = [(draw.randint(0, 6) / 10, draw.randint(0, 6) / 10) for _ in range(draw.randint(0, 25))]
    assert pareto_front(pairs) == slow_front(pairs)


def test_statistics_leave_out_what_is_missing() -> None:
    assert stat([0.9, None, 0.96, 0.93]) == Stat(3, pytest.approx(0.93), pytest.approx(0.03))
    assert stat([None]) is None
    assert stat([0.5]) == Stat(1, 0.5, None)


def test_a_variant_is_everything_swept_but_seed_and_sparsity() -> None:
    jobs = [
        job(str(index), f"pruner={pruner}", f"seed={index % 2}", f"pruner.target_sparsity={target}", "epochs=3")
        for index, (pruner, target) in enumerate([("abs", 0.5), ("abs", 0.8), ("weighted", 0.5), ("weighted", 0.8)])
    ]
    assert swept(jobs) == {
        "pruner": ["abs", "weighted"],
        "seed": ["0", "1"],
        "pruner.target_sparsity": ["0.5", "0.8"],
    }
    assert names(jobs) == ["abs", "abs", "weighted", "weighted"]


def test_other_axes_are_named_as_short_as_they_stay_clear() -> None:
    first = job("0", "pruner=abs", "model=convnet", "optimizer.lr=0.1", "pruner.scope=local", "flag=true", "+width=8")
    other = job("1", "pruner=abs", "model=vit", "optimizer.lr=0.2", "pruner.scope=global", "flag=false", "+width=16")
    assert names([first, other]) == [
        "convnet, lr=0.1, scope=local, flag=true, width=8",
        "vit, lr=0.2, scope=global, flag=false, width=16",
    ]
    clash = [job(str(lr), f"optimizer.lr={lr}", f"head.lr={10 * lr}") for lr in (1, 2)]
    assert names(clash) == ["optimizer.lr=1, head.lr=10", "optimizer.lr=2, head.lr=20"]


def test_a_variant_has_a_name_even_when_nothing_tells_one() -> None:
    assert names([job("0", "pruner=abs")]) == ["abs"]
    assert names([job("0", choices={"pruner": "weighted"}), job("1", "seed=1", choices={"pruner": "weighted"})]) == [
        "weighted",
        "weighted",
    ]
    assert names([job("0")]) == ["as configured"]


def test_points_are_means_over_seeds_with_deltas_by_job() -> None:
    jobs = [
        job("0", "pruner=abs", "seed=0", accuracy=0.90, baseline_accuracy=0.95, target_sparsity=0.5, sparsity=0.5),
        job("1", "pruner=abs", "seed=1", accuracy=0.96, baseline_accuracy=0.97, target_sparsity=0.5, sparsity=0.52),
        job("2", "pruner=none", "seed=0", accuracy=0.94, params=10, params_dense=40, target_sparsity=0.5),
        job("3", "pruner=none", "seed=1", accuracy=0.94, params=0, params_dense=40, target_sparsity=0.9),
        job("4", "pruner=none", "seed=1", accuracy=0.94),
    ]
    found = points(jobs, variants(jobs, swept(jobs)))
    assert [(p.target, p.variant, [j.name for j in p.jobs]) for p in found] == [
        (0.5, "none", ["2"]),
        (0.5, "abs", ["0", "1"]),
        (0.9, "none", ["3"]),
        (None, "none", ["4"]),
    ]
    ours = found[1]
    assert ours.accuracy == Stat(2, pytest.approx(0.93), pytest.approx(statistics.stdev([0.90, 0.96])))
    assert ours.delta == Stat(2, pytest.approx(-0.03), pytest.approx(statistics.stdev([-0.05, -0.01])))
    assert ours.sparsity == Stat(2, pytest.approx(0.51), pytest.approx(statistics.stdev([0.5, 0.52])))
    assert (ours.best.name, ours.shrunk, ours.pruner) == ("1", False, "abs")
    assert found[0].times_less("params", "params_dense") == 4.0
    assert found[0].share_left("params", "params_dense") == 0.25
    assert (found[0].delta, found[0].sparsity) == (None, None)
    assert found[2].times_less("params", "params_dense") is None  # no division by nothing


def test_jobs_of_one_budget_stand_together_whatever_sparsity_it_led_to() -> None:
    axis, results = "pruner.target.macs", [("0", "0.5", 0.31), ("1", "0.5", 0.44), ("0", "0.3", 0.6)]
    jobs = [
        job(str(i), f"seed={seed}", f"{axis}={share}", accuracy=0.9, sparsity=reached, budget={"macs": float(share)})
        for i, (seed, share, reached) in enumerate(results)
    ]
    found = points(jobs, variants(jobs, swept(jobs)))
    assert sorted((p.variant, p.target, len(p.jobs)) for p in found) == [("macs=0.3", None, 1), ("macs=0.5", None, 2)]


def test_the_wanted_sparsity_is_read_off_the_overrides_or_what_was_reached() -> None:
    jobs = [
        job("0", "pruner.target_sparsity=0.7", accuracy=0.9),
        job("1", accuracy=0.9, sparsity=0.4996),
        job("2", accuracy=0.9, target_sparsity=7),
        job("3", accuracy=0.9, target_sparsity=0.7999999999999999),
    ]
    assert [p.target for p in points(jobs, dict.fromkeys("0123", "x"))] == [0.5, 0.7, 0.8, None]


def test_an_equal_job_is_counted_once() -> None:
    jobs = [
        job("0", config_hash="a"),
        JobResult(Path("sweep/1"), {"status": "failed", "config_hash": "b"}, Path("sweep")),
        job("2", config_hash="a"),
        job("3", config_hash="b"),
        job("4"),
        job("5"),
    ]
    kept, left_out = once_each(jobs)
    assert [found.name for found in kept] == ["0", "3", "4", "5"]
    assert left_out == {
        "1": "an equal job (the same config_hash) has finished in 3",
        "2": "an equal job (the same config_hash) has finished in 0",
    }


def test_dense_networks_stand_apart_when_they_are_few_and_differ() -> None:
    jobs = [
        job(str(i), f"model={m}", f"pruner={p}", f"seed={s}", baseline_accuracy=b + s / 100)
        for i, (m, b, p, s) in enumerate(
            (m, b, p, s) for m, b in (("big", 0.9), ("small", 0.8)) for p in "ab" for s in (0, 1)
        )
    ]
    assert dense_levels(jobs, swept(jobs)) == [
        Dense("dense network, small", 0.805),
        Dense("dense network, big", 0.905),
    ]
    assert dense_levels(jobs[:4], swept(jobs[:4])) == [Dense("dense network", 0.905)]
    assert dense_levels(jobs, swept(jobs), most=1) == [
        Dense("lowest dense network", 0.805),
        Dense("highest dense network", 0.905),
    ]
    assert dense_levels([job("0")], {}) == []
