"""Which network a sweep says to take, and what it says where the data do not decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from facts import assert_tells, refused

from gsprune.sweeps.results import JobResult
from gsprune.sweeps.variants import points, swept, variants
from gsprune.sweeps.verdict import Terms, Verdict, verdicts

DENSE = {"params_dense": 1000, "macs_dense": 5000, "baseline_epochs": 6, "epochs": 14}
NOISE = (0.0, 0.002, -0.002)  # of the seeds


def job(pruner: str, target: float, accuracy: float, seed: int = 0, **result: Any) -> JobResult:
    """A job of units: it leaves (1 - target)^2 of the parameters. Of "elementwise" and "random" single weights."""
    units = pruner not in ("elementwise", "random", "none")
    left = (1 - target) ** 2 if units else 1.0
    told = {
        **{"status": "finished", "accuracy": accuracy, "val_accuracy": accuracy, "seed": seed, **DENSE},
        **{"target_sparsity": target, "sparsity": target, "sparsity_of": "channels" if units else "weights"},
        **{"params": 1000 * left, "macs": 5000 * left, "params_nonzero": 1000 * (left if units else 1 - target)},
        **{"baseline_val_accuracy": 0.94, "choices": {"model": "convnet", "dataset": "digits"}},
        "overrides": [f"pruner={pruner}", f"pruner.target_sparsity={target}", f"seed={seed}"],
    }
    return JobResult(Path(f"{pruner}{target}_{seed}_{result.get('name', '')}"), {**told, **result})


def seeds(
    pruner: str, target: float, accuracy: float, noise: tuple[float, ...] = NOISE, **more: Any
) -> list[JobResult]:
    return [job(pruner, target, accuracy + noise[i], i, **more) for i in range(len(noise))]


def with_override(found: JobResult, override: str, **result: Any) -> JobResult:
    told = {**found.result, "overrides": [*found.result["overrides"], override], **result}
    return JobResult(Path(f"{override}{found.folder}"), told)


def decide(jobs: list[JobResult], terms: Terms = Terms(), **more: int) -> list[Verdict]:  # noqa: B008
    axes = swept(jobs)
    return verdicts(points(jobs, variants(jobs, axes)), jobs, axes, terms, **more)


def control(accuracy: float = 0.95) -> list[JobResult]:
    return [job("none", 0.0, accuracy, seed) for seed in range(3)]


def test_it_takes_the_smallest_network_within_the_tolerance_and_tells_the_next_step() -> None:
    speed = {"speedup": 1.6, "speedup_low": 1.5, "speedup_high": 1.7}
    jobs = [
        *control(),
        *seeds("weighted", 0.5, 0.947, **speed),
        *seeds("weighted", 0.7, 0.938),
        *seeds("weighted", 0.9, 0.5),
        *seeds("abs", 0.5, 0.93),
    ]
    (verdict,) = decide(jobs)
    assert verdict.sentence == (
        "Take weighted at 50 % of channels: 4.0x fewer parameters, 0.3 ± 0.2 points below the control (3 seeds), "
        "1.6x faster (1.5 to 1.7); the next step, 70 %, costs 0.9 more"
    )
    assert verdict.doubts == ()
    assert verdict.job is not None
    assert verdict.job.number("seed") == 1  # the best on validation
    (looser,) = decide(jobs, Terms(2.0))
    assert looser.sentence.startswith("Take weighted at 70 % of channels: 11.1x fewer parameters")


def test_the_reader_says_what_should_be_small() -> None:
    jobs = [*control(), *seeds("weighted", 0.5, 0.949), *seeds("elementwise", 0.9, 0.949)]
    by = {name: str(decide(jobs, Terms(1.0, name))[0]).split(":")[0] for name in ("params", "nonzero", "macs")}
    assert by == {
        "params": "Take weighted at 50 % of channels",
        "nonzero": "Take elementwise at 90 % of weights",
        "macs": "Take weighted at 50 % of channels",
    }
    (single,) = decide([*control(), *seeds("elementwise", 0.9, 0.949)])
    assert_tells(single.sentence, "10.0x fewer parameters that are not zero", "old size", "nothing smaller")


def test_a_network_is_compared_with_the_best_control_not_with_one_of_a_worse_setting() -> None:
    """With lr=9 nothing learns: its pruned network loses nothing to its own control, and is not taken."""
    jobs = [
        with_override(found, f"optimizer.lr={lr}", **worse)
        for lr, worse in (("0.1", {}), ("9", {"val_accuracy": 0.1, "accuracy": 0.1}))
        for found in (*control(), *seeds("weighted", 0.9 if lr == "9" else 0.5, 0.949))
    ]
    (verdict,) = decide(jobs)
    assert verdict.sentence.startswith("Take weighted, lr=0.1 at 50 % of channels")


@pytest.mark.parametrize(
    ("jobs", "facts"),
    [
        ([*control(), job("weighted", 0.5, 0.949)], ["One seed", "chance"]),
        ([*control(), *seeds("weighted", 0.5, 0.949, (0.0, 0.001))], ["2 seeds", "chance"]),
        ([*control(), *seeds("weighted", 0.5, 0.945, (0.01, 0.0, -0.01))], ["3 seeds", "-2.0 and 3.0", "1 point"]),
        (seeds("weighted", 0.5, 0.94), ["6 epochs", "14", "pruner=weighted,none"]),
        ([*control(), *seeds("weighted", 0.5, 0.95), *seeds("random", 0.75, 0.95)], ["Random", "1 point"]),
        ([*control(), *seeds("random", 0.5, 0.95)], ["random", "baseline"]),
        ([*control(), *seeds("weighted", 0.5, 0.95, val_samples=180)], ["180 samples", "0.56 points"]),
        ([*control(), *seeds("weighted", 0.5, 0.95, val_accuracy=None)], ["test accuracy", "3 of 6", "val_accuracy"]),
    ],
    ids=["one", "two", "wide", "no_control", "random_too", "random_alone", "few_samples", "no_validation"],
)  # fmt: skip
def test_what_the_data_do_not_decide_makes_the_verdict_provisional(jobs: list[JobResult], facts: list[str]) -> None:
    (verdict,) = decide(jobs)
    assert verdict.sentence.startswith("Provisionally, take ")
    (doubt, *_) = verdict.doubts
    assert_tells(doubt, *facts)


def test_of_a_sweep_that_is_not_done_the_verdict_is_that_of_the_others() -> None:
    (verdict,) = decide([*control(), *seeds("weighted", 0.5, 0.95)], unfinished=4)
    assert verdict.sentence.startswith("Provisionally")
    assert_tells(verdict.doubts[0], "4 jobs", "not finished")


def test_a_dense_network_that_has_trained_as_long_is_a_fair_reference() -> None:
    (verdict,) = decide(seeds("weighted", 0.5, 0.94, baseline_epochs=14))
    assert_tells(verdict.sentence, "Take weighted", "0.0 ± 0.2 points below the dense network")
    assert verdict.doubts == ()


def test_what_is_as_good_is_named_and_is_no_doubt() -> None:
    jobs = [*control(), *seeds("weighted", 0.5, 0.95), *seeds("abs", 0.5, 0.9495), *seeds("magnitude", 0.5, 0.942)]
    (verdict,) = decide(jobs)
    assert verdict.sentence.startswith("Take weighted")
    (remark,) = verdict.doubts
    assert_tells(remark, "abs", "same size")
    assert "magnitude" not in remark


def test_nothing_within_the_tolerance_takes_nothing_and_says_what_would() -> None:
    (verdict,) = decide([*control(), *seeds("weighted", 0.5, 0.9), *seeds("weighted", 0.7, 0.8)])
    assert verdict.taken is None
    assert_tells(verdict.sentence, "Take none", "1 point", "weighted at 50 % of channels", "5.0 ± 0.2 points below")
    assert_tells(verdict.doubts[-1], "--max-drop 5")
    (allowed,) = decide([*control(), *seeds("weighted", 0.5, 0.9)], Terms(5.6))
    assert allowed.sentence.startswith("Take weighted")


def test_each_model_and_data_set_has_a_verdict_of_its_own() -> None:
    jobs = [
        with_override(found, f"model={model}")
        for model, accuracy in (("a", 0.95), ("b", 0.7))
        for found in (*control(accuracy), *seeds("weighted", 0.5, accuracy))
    ]  # fmt: skip
    found = decide(jobs)
    assert [(verdict.about, verdict.taken and verdict.taken.variant) for verdict in found] == [
        ("a", "weighted, a"),
        ("b", "weighted, b"),
    ]
    assert str(found[1]).startswith("b: Take weighted")


@pytest.mark.parametrize(
    ("jobs", "fact"),
    [
        ([], "no job has finished"),
        (control(), "no pruned network"),
        ([job("weighted", 0.5, 0.9, baseline_val_accuracy=None)], "baseline_val_accuracy"),
        ([*control(), job("weighted", 0.5, 0.9, seed=7)], "seed"),
    ],
    ids=["empty", "controls", "no_reference", "other_seed"],
)
def test_without_anything_to_compare_there_is_no_verdict(jobs: list[JobResult], fact: str) -> None:
    (verdict,) = decide(jobs)
    assert_tells(verdict.sentence, "No verdict", fact)
    assert (verdict.taken, verdict.job) == (None, None)


def test_terms_are_checked_and_a_record_that_is_spoiled_gives_the_defaults() -> None:
    for wrong in (-1, 101, float("nan"), True):
        with refused("report.max_drop", wrong):
            Terms(wrong)
    with refused("report.by", "speed", "latency"):
        Terms(1.0, "speed")
    for spoiled in (None, [], {"max_drop": "x", "by": "params"}, {"max_drop": 1.0}, {"max_drop": 1, "by": "size"}):
        assert Terms.read(spoiled) == Terms()
