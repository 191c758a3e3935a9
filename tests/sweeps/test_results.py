"""Reading a sweep directory back: what is a job, what is named with a reason, what is left out in silence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from facts import refused

from gsprune.sweeps.results import JobResult, Results, read_overrides, read_results
from gsprune.text.names import natural


def job(folder: Path, text: str | None = None, **result: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    result = {"status": "finished", "accuracy": 0.9, **result}
    (folder / "result.json").write_text(json.dumps(result) if text is None else text)
    return folder


def names(results: Results) -> list[str]:
    return [job.name for job in results.jobs]


def test_jobs_are_found_at_any_depth_and_counted_like_a_person_does(tmp_path: Path) -> None:
    for name in ("10", "2", "0", "1", "weighted/0.5/3-1a2b", "weighted/0.5/12-ff"):
        job(tmp_path / name)
    job(tmp_path / "0" / "inner")  # a job is not searched for others
    results = read_results(tmp_path)
    assert names(results) == ["0", "1", "2", "10", "weighted/0.5/3-1a2b", "weighted/0.5/12-ff"]
    assert results.skipped == {}


def test_what_can_not_be_used_is_named_with_a_reason(tmp_path: Path) -> None:
    job(tmp_path / "0")
    job(tmp_path / "1", text='{"status": "fin')
    (tmp_path / "2" / ".hydra").mkdir(parents=True)
    (tmp_path / "photos" / "holiday" / "beach").mkdir(parents=True)
    job(tmp_path / "4", text="[1, 2]")
    job(tmp_path / "5", status="done")
    job(tmp_path / "6", accuracy="abc")
    job(tmp_path / "7", accuracy=97.5)
    job(tmp_path / "8", accuracy=[0.5])
    (tmp_path / "9" / "result.json").mkdir(parents=True)
    job(tmp_path / "10", text='{"status": ["finished"]}')
    job(tmp_path / "11", text="\xff\xfe")
    job(tmp_path / "12", text="[" * 100_000)
    statuses = "running or finished or failed or interrupted or skipped"
    broken = "its result.json is not valid JSON: half written, or of another program"
    results = read_results(tmp_path)
    assert names(results) == ["0"]
    assert results.skipped == {
        "1": broken,
        "2": "it has no result.json: the job has only begun, or was killed at once",
        "4": "its result.json holds a list, not an object",
        "5": f"its result.json has the status 'done', not {statuses}",
        "6": "its result.json has the accuracy 'abc', not a number from 0 to 1",
        "7": "its result.json has the accuracy 97.5, not a number from 0 to 1",
        "8": "its result.json has the accuracy [0.5], not a number from 0 to 1",
        "9": "its result.json is not a file of at most 16,000,000 bytes",
        "10": f"its result.json has the status ['finished'], not {statuses}",
        "11": broken,
        "12": broken,
        "photos": "it is not a job: it has no result.json and no .hydra",
    }
    assert list(results.skipped)[:3] == ["1", "2", "4"]


def test_a_foreign_folder_among_jobs_is_named_by_itself(tmp_path: Path) -> None:
    job(tmp_path / "a" / "0")
    (tmp_path / "a" / "notes" / "deep").mkdir(parents=True)
    assert read_results(tmp_path).skipped == {"a/notes": "it is not a job: it has no result.json and no .hydra"}


def test_what_is_nobodys_business_is_left_out_in_silence(tmp_path: Path) -> None:
    for name in (".gsprune/0", "dense_cache/abc", "mlartifacts/run/artifacts", "mlruns/1"):
        job(tmp_path / name)
    for name in ("report.html", "summary.csv", "pareto.svg", "sweep.json", "multirun.yaml"):
        (tmp_path / name).write_text("")
    job(tmp_path / "3", status="skipped", same_as="0")
    (tmp_path / "link").symlink_to(tmp_path / ".gsprune", target_is_directory=True)
    assert (names(read_results(tmp_path)), read_results(tmp_path).skipped) == ([], {})


def test_a_pipe_in_place_of_the_result_does_not_block(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    os.mkfifo(tmp_path / "0" / "result.json")
    assert read_results(tmp_path).skipped == {"0": "its result.json is not a file of at most 16,000,000 bytes"}


def test_the_directory_of_one_job_is_that_job(tmp_path: Path) -> None:
    folder = job(tmp_path / "12-00-00")
    assert names(read_results(folder)) == ["12-00-00"]


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with refused("nowhere", "directory"):
        read_results(tmp_path / "nowhere")


def test_numbers_are_finite_or_none() -> None:
    values = {"a": 1, "b": 0.5, "c": "NaN", "d": "0.5", "e": True, "f": None, "g": [1], "h": float("inf"), "i": 10**400}
    found = JobResult(Path("0"), {"status": "finished", **values, "timings": {"train": 2, "x": "y", "n": "NaN"}})
    assert {name: found.number(name) for name in values} == {**dict.fromkeys(values), "a": 1.0, "b": 0.5}
    assert isinstance(found.number("a"), float)
    assert found.number("timings", "train") == 2.0
    assert found.number("timings", "train", "deeper") is None
    assert found.numbers("timings") == {"train": 2.0}
    assert found.numbers("a") == {}
    assert (found.text("d"), found.text("a"), found.config_hash) == ("0.5", None, None)


def test_a_diverged_job_is_a_job_without_accuracy(tmp_path: Path) -> None:
    job(tmp_path / "0", accuracy="NaN")
    job(tmp_path / "1", accuracy=None)
    assert [found.number("accuracy") for found in read_results(tmp_path).jobs] == [None, None]


def test_overrides_come_from_the_result_or_from_hydra(tmp_path: Path) -> None:
    job(tmp_path / "0", overrides=["pruner=abs", 3, "+a.b=x=y"])
    (job(tmp_path / "1") / ".hydra").mkdir()
    (tmp_path / "1" / ".hydra" / "overrides.yaml").write_text("- pruner=abs\n- 'seed=1'\n- 7\n")
    (job(tmp_path / "2") / ".hydra").mkdir()
    (tmp_path / "2" / ".hydra" / "overrides.yaml").write_text("- [\n")
    job(tmp_path / "3", overrides="seed=1", choices={"pruner": "abs", "model": 3})
    found = [found.overrides for found in read_results(tmp_path).jobs]
    assert found == [{"pruner": "abs", "a.b": "x=y"}, {"pruner": "abs", "seed": "1"}, {}, {}]
    assert read_results(tmp_path).jobs[3].choices == {"pruner": "abs"}
    assert read_overrides(["seed=1", "seed=2", "nothing"]) == {"seed": "2"}


MERGED = [f"- &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 30)}]}}" for i in range(1, 12)]  # 30 ** 11 in all


@pytest.mark.parametrize(
    "text",
    [
        *("[" * 150_000, "{" * 150_000, "- " * 75_000, "? " * 75_000, "- " + "[a, " * 30_000),
        "\n".join(["- &a0 {x: 1}", *MERGED]),
        *("", "seed=1", "seed: 1", "- seed=1\n- [", "- seed=1\n- {a: b}", "- *a", "--- [seed=1\n"),
    ],
    ids=lambda text: text[:12],
)
def test_overrides_are_a_list_of_texts_or_none(text: str, tmp_path: Path) -> None:
    (job(tmp_path / "0") / ".hydra").mkdir()
    (tmp_path / "0" / ".hydra" / "overrides.yaml").write_text(text)
    begin = time.monotonic()
    assert [found.overrides for found in read_results(tmp_path).jobs] == [{}]
    assert time.monotonic() - begin < 2


def test_statuses_are_told_apart(tmp_path: Path) -> None:
    for index, status in enumerate(("running", "failed", "finished")):
        job(tmp_path / str(index), status=status, accuracy=None)
    results = read_results(tmp_path)
    assert [found.name for found in results.with_status("failed")] == ["1"]
    assert [found.status for found in results.jobs] == ["running", "failed", "finished"]


def test_natural_order() -> None:
    assert sorted(["b", "10", "9", "a10", "a9", "a", "9-x"], key=natural) == ["9", "9-x", "10", "a", "a9", "a10", "b"]


@pytest.mark.slow
def test_reading_imports_nothing_heavy() -> None:
    heavy = ("torch", "mlflow", "numpy", "yaml")
    code = f"import sys, gsprune.sweeps.results; print([n for n in {heavy} if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
