"""A sweep as a data frame: overrides and numbers as columns, filters, paired differences."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from facts import refused

import gsprune


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for name, pruner, seed, accuracy in [("0", "weighted", 0, 0.9), ("1", "weighted", 1, 0.8), ("2", "none", 1, 0.95)]:
        (tmp_path / name).mkdir()
        overrides = [f"pruner={pruner}", f"seed={seed}", *(["pruner.target_sparsity=0.5"] if pruner != "none" else [])]
        job = {"status": "finished", "accuracy": accuracy, "timings": {"train": 2.5}, "overrides": overrides}
        (tmp_path / name / "result.json").write_text(json.dumps(job))
    return tmp_path


def test_overrides_and_numbers_are_columns(sweep: Path) -> None:
    frame = gsprune.results(sweep)
    assert list(frame["pruner"]) == ["weighted", "weighted", "none"]
    assert list(frame["seed"]) == [0, 1, 1]
    assert list(frame["timings.train"]) == [2.5] * 3
    assert list(frame["pruner.target_sparsity"])[:2] == [0.5, 0.5]
    assert frame["folder"][1] == str(sweep / "1")


def test_differences_are_to_the_control_of_the_same_seed(sweep: Path) -> None:
    first, second, control = gsprune.results(sweep)["delta"]
    assert math.isnan(first)  # no control has seed 0
    assert second == pytest.approx(-0.15)
    assert math.isnan(control)


def test_jobs_are_filtered_by_override(sweep: Path) -> None:
    assert list(gsprune.results(sweep, pruner="weighted", seed=[1, 2])["job"]) == ["1"]
    assert list(gsprune.results(sweep, {"pruner.target_sparsity": 0.5})["job"]) == ["0", "1"]
    assert len(gsprune.results(sweep, seed=7)) == 0
    with refused("prunner", "pruner, seed"):
        gsprune.results(sweep, prunner="weighted")


def test_a_folder_without_jobs_has_no_rows(tmp_path: Path) -> None:
    assert len(gsprune.results(tmp_path)) == 0
    with refused(str(tmp_path / "none")):
        gsprune.results(tmp_path / "none")
