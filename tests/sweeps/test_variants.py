"""Variants, means over seeds and Pareto fronts, against values worked out by hand and a slow obvious version."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from gsprune.sweeps.results import JobResult
from gsprune.sweeps.variants import (
    Point,
    Stat,
    chosen_by,
    controls,
    equal_merged,
    once_each,
    pareto_front,
    points,
    stat,
    swept,
    unpruned,
    variants,
)


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
    assert pareto_front([(x, x, y) for x, y in pairs]) == slow_front(pairs)


def test_statistics_leave_out_what_is_missing() -> None:
    assert stat([0.9, None, 0.96, 0.93]) == Stat(3, pytest.approx(0.93), pytest.approx(0.03))
    assert stat([None]) is None
    assert stat([0.5]) == Stat(1, 0.5, None)
    assert stat([0.5, 0.5]) == Stat(2, 0.5, None)  # two that agree say nothing of how far a third would be


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
        job("2", "pruner=random", "seed=0", accuracy=0.94, params=10, params_dense=40, target_sparsity=0.5),
        job("3", "pruner=random", "seed=1", accuracy=0.94, params=0, params_dense=40, target_sparsity=0.9),
        job("4", "pruner=random", "seed=1", accuracy=0.94),
    ]
    found = points(jobs, variants(jobs, swept(jobs)))
    assert [(p.target_sparsity, p.variant, [j.name for j in p.jobs]) for p in found] == [
        (0.5, "random", ["2"]),
        (0.5, "abs", ["0", "1"]),
        (0.9, "random", ["3"]),
        (None, "random", ["4"]),
    ]
    ours = found[1]
    assert ours.accuracy == Stat(2, pytest.approx(0.93), None)
    assert ours.delta == Stat(2, pytest.approx(-0.03), None)
    assert ours.sparsity == Stat(2, pytest.approx(0.51), None)
    assert (ours.best.name, ours.shrunk, ours.pruner) == ("1", False, "abs")
    assert found[0].ratio("params_dense", "params") == 4.0
    assert found[0].ratio("params", "params_dense") == 0.25
    assert (found[0].delta, found[0].sparsity) == (None, None)
    assert found[2].ratio("params_dense", "params") is None  # no division by nothing


def test_jobs_of_one_budget_stand_together_whatever_sparsity_it_led_to() -> None:
    axis, results = "pruner.budget.macs", [("0", "0.5", 0.31), ("1", "0.5", 0.44), ("0", "0.3", 0.6)]
    jobs = [
        job(str(i), f"seed={seed}", f"{axis}={share}", accuracy=0.9, sparsity=reached, budget={"macs": float(share)})
        for i, (seed, share, reached) in enumerate(results)
    ]
    found = points(jobs, variants(jobs, swept(jobs)))
    assert sorted((p.variant, p.target_sparsity, len(p.jobs)) for p in found) == [
        ("macs=0.3", None, 1),
        ("macs=0.5", None, 2),
    ]


def test_the_wanted_sparsity_is_read_off_the_overrides_or_what_was_reached() -> None:
    jobs = [
        job("0", "pruner.target_sparsity=0.7", accuracy=0.9),
        job("1", accuracy=0.9, sparsity=0.4996),
        job("2", accuracy=0.9, target_sparsity=7),
        job("3", accuracy=0.9, target_sparsity=0.7999999999999999),
    ]
    assert [p.target_sparsity for p in points(jobs, dict.fromkeys("0123", "x"))] == [0.5, 0.7, 0.8, None]


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


def test_dense_networks_of_different_settings_stand_apart() -> None:
    jobs = [
        job(str(i), f"model={m}", f"pruner={p}", f"seed={s}", baseline_accuracy=b + s / 100)
        for i, (m, b, p, s) in enumerate(
            (m, b, p, s) for m, b in (("big", 0.9), ("small", 0.8)) for p in "ab" for s in (0, 1)
        )
    ]
    found = {name: [j.name for j in group] for name, group in unpruned(jobs, swept(jobs)).items()}
    assert found == {"big": ["0", "1"], "small": ["4", "5"]}  # one job for each network
    assert list(unpruned(jobs[:4], swept(jobs[:4]))) == [""]


# --- what is chosen, and by what ---------------------------------------------------------------------------


def test_the_best_and_the_order_are_those_of_validation() -> None:
    jobs = [
        job("0", "pruner=abs", "seed=0", val_accuracy=0.90, accuracy=0.99, target_sparsity=0.5),
        job("1", "pruner=abs", "seed=1", val_accuracy=0.92, accuracy=0.97, target_sparsity=0.5),
        job("2", "pruner=random", "seed=0", val_accuracy=0.95, accuracy=0.80, target_sparsity=0.5),
    ]
    first, second = points(jobs, variants(jobs, swept(jobs)))
    assert (first.variant, first.accuracy.mean, first.choice.mean) == ("random", 0.80, 0.95)
    assert (second.best.name, second.choice.mean, second.accuracy.mean) == (
        "1",
        pytest.approx(0.91),
        pytest.approx(0.98),
    )


def test_unlike_splits_are_not_compared() -> None:
    new = job("0", val_accuracy=0.9, accuracy=0.8, baseline_val_accuracy=0.95, baseline_accuracy=0.85)
    old = job("1", accuracy=0.7)
    assert (chosen_by([new]), chosen_by([new, old])) == ("val_accuracy", "accuracy")
    assert [p.choice.mean for p in points([new, old], {"0": "a", "1": "b"})] == [0.8, 0.7]


# --- the fair control --------------------------------------------------------------------------------------


def with_controls() -> list[JobResult]:
    """Seeds 0 and 1 of two models; the control of "vit", seed 1, is missing; one more differs in a setting."""
    accuracy = {("cnn", 0): 0.90, ("cnn", 1): 0.80, ("vit", 0): 0.70}
    made = [
        job(f"c{index}", "pruner=none", f"seed={seed}", f"model={model}", "pruner.target_sparsity=0.9", accuracy=value)
        for index, ((model, seed), value) in enumerate(accuracy.items())
    ]
    made.append(job("c3", "pruner=none", "seed=1", "model=vit", "trainer.prune_epochs=1", accuracy=0.1))
    for model in ("cnn", "vit"):
        for seed in (0, 1):
            words = ("pruner=abs", f"seed={seed}", f"model={model}", "pruner/schedule=linear", "tracking=none")
            more = {"target_sparsity": 0.5, "baseline_accuracy": 0.5}
            made.append(job(f"{model}{seed}", *words, accuracy=0.75 + seed / 100, **more))
    return made


def test_a_control_has_the_seed_and_every_setting_but_the_pruners() -> None:
    found = controls(with_controls())
    assert found is not None
    assert {name: control.name for name, control in found.items()} == {"cnn0": "c0", "cnn1": "c1", "vit0": "c2"}
    assert controls([job("0", "pruner=abs")]) is None


def test_differences_are_to_the_control_pair_by_pair_and_to_the_dense_network_only_without_any() -> None:
    jobs = with_controls()
    cnn, vit = sorted(points(jobs, variants(jobs, swept(jobs))), key=lambda point: point.variant)
    assert (cnn.variant, vit.variant) == ("abs, cnn, linear, none", "abs, vit, linear, none")
    assert cnn.delta == Stat(2, pytest.approx(((0.75 - 0.90) + (0.76 - 0.80)) / 2), None)
    assert vit.delta == Stat(1, pytest.approx(0.05), None)
    alone = [found for found in jobs if found.name.startswith("cnn")]
    (lone,) = points(alone, dict.fromkeys(("cnn0", "cnn1"), "abs"))
    assert lone.delta == Stat(2, pytest.approx(0.255), None)


def test_the_seed_and_the_choices_that_a_result_tells_are_read_before_overrides() -> None:
    """One command names the model, the other takes the default: the groups' choices say that it is the same."""
    one = job("0", "pruner=none", accuracy=0.9, seed=3, choices={"model": "cnn", "pruner": "none"})
    other = job("1", "pruner=abs", "seed=3", "model=cnn", accuracy=0.8, choices={"model": "cnn", "pruner": "abs"})
    found = controls([one, other])
    assert found is not None
    assert found["1"] is one


def test_a_control_that_was_run_for_each_sparsity_counts_once_a_seed() -> None:
    jobs = [
        job(
            f"{seed}{target}",
            "pruner=none",
            f"seed={seed}",
            f"pruner.target_sparsity={target}",
            accuracy=0.9 + seed / 50,
        )
        for seed in (0, 1)
        for target in (0.5, 0.9)
    ]
    assert [found.name for found in unpruned(jobs, swept(jobs))[""]] == ["00.5", "10.5"]


# --- unlike and equal things -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "of"),
    [
        ({"sparsity_of": "heads and neurons", "shrunk": True}, "heads and neurons"),
        ({"shrunk": True}, "units"),
        ({"overrides": ["pruner=elementwise"], "shrunk": False}, "weights"),
        ({"shrunk": False}, ""),
        ({"sparsity_of": ["weights"]}, ""),
    ],
)
def test_what_a_sparsity_is_of(result: dict[str, object], of: str) -> None:
    found = JobResult(Path("0"), {"status": "finished", "accuracy": 0.5, **result})
    assert Point("x", 0.5, (found,)).of == of


def test_parameters_left_are_those_that_are_not_zero() -> None:
    masked = job("0", params=100, params_nonzero=40, params_dense=100)
    cut = job("1", params=30, params_nonzero=25, params_dense=100, shrunk=True)
    older = job("2", params=30, params_dense=100, shrunk=True)
    unknown = job("3", params=100, params_dense=100, shrunk=False)
    assert [Point("x", 0.5, (found,)).left for found in (masked, cut, older, unknown)] == [0.4, 0.25, 0.3, None]


def saved(root: Path, name: str, *overrides: str, masks: bytes | None, **result: object) -> JobResult:
    (root / name).mkdir()
    if masks is not None:
        (root / name / "masks.safetensors").write_bytes(masks)
    full = {"status": "finished", "overrides": list(overrides), "target_sparsity": 0.5, **result}
    return JobResult(root / name, full, root)


def merged(jobs: Sequence[JobResult]) -> list[tuple[str, float | None, tuple[str, ...]]]:
    return [(p.variant, p.target_sparsity, p.same) for p in equal_merged(points(jobs, variants(jobs, swept(jobs))))]


@pytest.mark.parametrize(
    ("second", "masks", "expected"),
    [
        (0.92, b"2", [("abs = weighted", 0.5, ())]),
        (0.93, b"2", [("weighted", 0.5, ()), ("abs", 0.5, ())]),  # other numbers
        (0.92, b"3", [("abs", 0.5, ()), ("weighted", 0.5, ())]),  # equal accuracy, other masks
        (0.92, None, [("abs", 0.5, ()), ("weighted", 0.5, ())]),  # masks that nobody can compare
    ],
)
def test_variants_with_the_same_masks_and_numbers_at_every_seed_are_one(
    second: float, masks: bytes | None, expected: list[object], tmp_path: Path
) -> None:
    jobs = [
        saved(tmp_path, "0", "pruner=abs", "seed=0", masks=b"1", accuracy=0.9),
        saved(tmp_path, "1", "pruner=abs", "seed=1", masks=b"2", accuracy=0.92),
        saved(tmp_path, "2", "pruner=weighted", "seed=0", masks=b"1", accuracy=0.9),
        saved(tmp_path, "3", "pruner=weighted", "seed=1", masks=masks, accuracy=second),
    ]
    assert merged(jobs) == expected


def test_masks_that_are_a_pipe_keep_nobody_waiting(tmp_path: Path) -> None:
    jobs = [saved(tmp_path, str(i), f"pruner={p}", masks=None, accuracy=0.9) for i, p in enumerate(("abs", "weighted"))]
    for found in jobs:
        os.mkfifo(found.folder / "masks.safetensors")
    assert [variant for variant, _, _ in merged(jobs)] == ["abs", "weighted"]


def test_variants_that_are_the_same_at_one_sparsity_only_say_so_there(tmp_path: Path) -> None:
    jobs = [
        saved(tmp_path, "0", "pruner=abs", masks=b"1", accuracy=0.9),
        saved(tmp_path, "1", "pruner=weighted", masks=b"1", accuracy=0.9),
        saved(tmp_path, "2", "pruner=abs", masks=b"1", accuracy=0.8, target_sparsity=0.9),
        saved(tmp_path, "3", "pruner=weighted", masks=b"2", accuracy=0.8, target_sparsity=0.9),
    ]
    assert merged(jobs) == [
        ("abs", 0.5, ("weighted",)),
        ("weighted", 0.5, ("abs",)),
        ("abs", 0.9, ()),
        ("weighted", 0.9, ()),
    ]
