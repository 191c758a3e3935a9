"""The sweep's callback and its directory: parent run, failures, kills, resuming. Whole sweeps run as processes."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from gsprune.sweeps import callback as callback_
from gsprune.sweeps import sweep_dir
from gsprune.sweeps.callback import SweepCallback
from gsprune.sweeps.sweep_dir import Sweep
from gsprune.tracking.tracker import Tracker

ROOT = Path(__file__).parents[2]
# Another Hydra application: it knows nothing of the sweep but the name of the callback.
APP = """
import json
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig

from gsprune.sweeps.sweep_dir import parent_run_id


@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    if cfg.x == 3:
        raise RuntimeError("three is too much")
    result = {"status": "finished", "accuracy": cfg.x / 10, "sparsity": 0.5, "parent": parent_run_id()}
    Path(HydraConfig.get().runtime.output_dir, "result.json").write_text(json.dumps(result))


main()
"""


def process(arguments: list[str], folder: Path, **kwargs: Any) -> subprocess.Popen[str]:
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, *arguments], cwd=folder, env=env, text=True, **pipes, **kwargs)


def finish(started: subprocess.Popen[str]) -> tuple[int, str]:
    output = started.communicate(timeout=300)[0]
    return started.returncode, output


def runs_of(folder: Path) -> list[dict[str, Any]]:
    """The runs in the folder's database, oldest first, with their parent."""
    query = (
        "select r.run_uuid, r.name, r.status, t.value from runs r left join tags t on t.run_uuid = r.run_uuid "
        "and t.key = 'mlflow.parentRunId' order by r.start_time"
    )
    with sqlite3.connect(folder / "mlflow.db") as database:
        rows = database.execute(query).fetchall()
    return [dict(zip(("id", "name", "status", "parent"), row, strict=True)) for row in rows]


def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=True)


# --- whole sweeps ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_failed_job_leaves_a_closed_parent_and_a_report_in_any_application(tmp_path: Path) -> None:
    """Hydra does not call on_multirun_end when a job has failed."""
    (tmp_path / "app.py").write_text(APP)
    code, output = finish(
        process(["app.py", "--multirun", "+x=1,3,2", "hydra/callbacks=gsprune", "hydra.sweep.dir=s"], tmp_path)
    )
    assert code == 1
    assert "RuntimeError: three is too much" in output
    assert output.splitlines()[-1] == "1 of 3 failed: 1: RuntimeError: three is too much"
    assert not list(tmp_path.glob("[0-9]*"))
    record = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert (record["status"], record["axes"]) == ("failed", {"x": ["1", "3", "2"]})
    assert record["command"] == "python app.py --multirun +x=1,3,2 hydra/callbacks=gsprune hydra.sweep.dir=s"
    (parent,) = runs_of(tmp_path)
    assert (parent["name"], parent["status"]) == ("sweep of x", "FAILED")
    for name in ("0", "2"):
        result = json.loads((tmp_path / "s" / name / "result.json").read_text())
        assert result["parent"] == record["parent_run_id"] == parent["id"]
    failed = json.loads((tmp_path / "s" / "1" / "result.json").read_text())
    told = {"status": "failed", "error": "RuntimeError: three is too much", "overrides": ["+x=3"]}
    assert failed == {**told, "recorded_by": "gsprune.sweeps.callback"}
    for name in ("report.html", "summary.csv", "pareto.svg"):
        assert (tmp_path / "s" / name).stat().st_size > 0
    artifacts = {path.name for path in (tmp_path / "mlartifacts").rglob("*") if path.is_file()}
    assert {"report.html", "summary.csv", "pareto.svg"} <= artifacts


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    """SIGKILL in the second of four jobs; the same command again with sweep.resume=true."""
    command = [
        str(ROOT / "train.py"),
        "--multirun",
        *("pruner=none,weighted", "seed=0,1", "trainer.dense_epochs=1", "trainer.prune_epochs=1", "model.width=4"),
        *("trainer.latency_repeats=0", "trainer.progress=none", "dataset.batch_size=256"),
    ]
    first = process(command, tmp_path, start_new_session=True)
    deadline = time.monotonic() + 200
    while not any('"run_id": "' in path.read_text() for path in tmp_path.glob("multirun/*/*/1/tracking.json")):
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    (folder,) = tmp_path.glob("multirun/*/*")
    assert json.loads((folder / "sweep.json").read_text())["status"] == "running"
    finished = (folder / "0" / "result.json").read_bytes()
    assert [run["status"] for run in runs_of(tmp_path)] == ["RUNNING", "FINISHED", "RUNNING"]

    code, output = finish(process([*command, "sweep.resume=true"], tmp_path))
    assert code == 0, output
    assert list(tmp_path.glob("multirun/*/*")) == [folder]
    assert "1 of its jobs have finished" in output
    assert (folder / "0" / "result.json").read_bytes() == finished
    results = [json.loads((folder / name / "result.json").read_text()) for name in "0123"]
    assert [result["status"] for result in results] == ["finished"] * 4
    parent, *jobs = runs_of(tmp_path)
    assert (parent["parent"], parent["status"]) == (None, "FINISHED")
    assert {job["parent"] for job in jobs} == {parent["id"]}
    assert [job["status"] for job in jobs] == ["FINISHED"] * 4  # the killed one went on in its own run
    assert {result["mlflow_run_id"] for result in results} == {job["id"] for job in jobs}
    assert json.loads((folder / "sweep.json").read_text())["status"] == "finished"
    assert len((folder / "summary.csv").read_text().splitlines()) == 5


def test_a_directory_takes_one_sweep_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    with Sweep(tmp_path / "s").lock("sweep").held(waiting_for="-"):
        code, output = finish(
            process(["app.py", "--multirun", "+x=1", "hydra/callbacks=gsprune", "hydra.sweep.dir=s"], tmp_path)
        )
    assert code == 1
    sentence = f"another process sweeps in {tmp_path}/s: wait for it, or choose another hydra.sweep.dir\n"
    assert output.endswith(sentence)
    assert not (tmp_path / "s" / "0").exists()


OWN_TRACKING = """
import hydra, json, logging, mlflow, os, gsprune.sweeps.callback
from hydra.core.hydra_config import HydraConfig


@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    begin = mlflow.start_run if cfg.own else gsprune.sweeps.callback.start_run
    with begin(tags={"x": str(cfg.x)}):
        mlflow.log_metric("accuracy", 0.5)
    with open(HydraConfig.get().runtime.output_dir + "/result.json", "w") as file:
        json.dump({"status": "finished", "accuracy": 0.5}, file)


main()
"""


@pytest.mark.slow
def test_jobs_that_track_by_themselves_are_in_the_experiment_of_their_parent(tmp_path: Path) -> None:
    """Also those that know nothing of a sweep, and those that Hydra starts in another directory."""
    (tmp_path / "app.py").write_text(OWN_TRACKING)
    sweep = ("--multirun", "+x=0", "+own=false,true", "hydra/callbacks=gsprune", "hydra.job.chdir=true")
    code, output = finish(process(["app.py", *sweep], tmp_path))
    assert code == 0, output
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("mlflow.db")] == [Path("mlflow.db")]
    query = "select e.name, r.run_uuid, t.value from runs r join experiments e using (experiment_id) "
    query += "left join tags t on t.run_uuid = r.run_uuid and t.key = 'mlflow.parentRunId' order by r.start_time"
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        (name, parent, _), *jobs = database.execute(query).fetchall()
    assert name == "app"
    assert [(found, above) for found, _, above in jobs] == [("app", parent), ("app", None)]


@pytest.mark.parametrize("name", ["plain", "a b#c, é=50%", "My%20Runs", "best?", "x?y=1 [2]", "it's"])
def test_a_sweep_goes_to_a_directory_of_any_name(name: str, tmp_path: Path) -> None:
    config = composed("seed=1")
    callback_._settle(config, tmp_path / name)
    assert config.hydra.sweep.dir == str(tmp_path / name)
    again = composed(*config.hydra.overrides.hydra, *config.hydra.overrides.task)
    assert again.hydra.sweep.dir == str(tmp_path / name)


@pytest.mark.parametrize("setting", ["resume", "check", "report"])
@pytest.mark.parametrize("value", ["maybe", "no", 1, None])
def test_a_switch_is_true_or_false(setting: str, value: object, capsys: pytest.CaptureFixture[str]) -> None:
    callback = SweepCallback(**{setting: value})  # type: ignore[arg-type]
    for call in (callback.on_multirun_start, callback.on_run_start):
        with pytest.raises(SystemExit):
            call(composed())
        assert f"{setting}={value} is not allowed: it must be true or false\n" in capsys.readouterr().err


# --- its parts ---------------------------------------------------------------------------------------------


def test_the_callback_is_on_by_default_and_travels_to_workers() -> None:
    config = composed("sweep.resume=true")
    assert config.hydra.callbacks.gsprune._target_ == "gsprune.sweeps.callback.SweepCallback"
    assert config.hydra.callbacks.gsprune.resume is True
    callback = SweepCallback(resume=True)
    callback._open = object()  # type: ignore[assignment]
    there = pickle.loads(pickle.dumps(callback))
    assert (there.resume, there._open) == (True, None)


def test_axes_are_those_of_the_command_and_of_the_sweeper() -> None:
    config = composed()
    config.hydra.sweeper.params = {"seed": "range(0,3)", "pruner": "abs,weighted"}
    config.hydra.overrides.task = ["+model.width=4,8", "pruner=abs,none", "trainer.prune_epochs=3", "sweep.resume=true"]
    assert callback_._axes(config) == {"seed": ["0", "1", "2"], "pruner": ["abs", "none"], "model.width": ["4", "8"]}
    config.hydra.overrides.task = ["seed=1"]
    assert callback_._axes(config) == {"pruner": ["abs", "weighted"]}


@pytest.mark.parametrize(
    ("jobs", "called", "status"),
    [
        (["finished", "finished"], "finished", "finished"),
        (["finished", "failed"], "failed", "failed"),
        (["finished", "interrupted"], "failed", "interrupted"),  # Ctrl-C
        (["finished", "running"], "failed", "interrupted"),
    ],
)
def test_the_end_of_a_sweep_is_told_by_its_jobs(
    jobs: list[str], called: str, status: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, job in enumerate(jobs):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "result.json").write_text(json.dumps({"status": job}))
    opened = callback_._OpenSweep(Sweep(tmp_path), report=False, jobs=3)
    assert opened.lock.acquire()
    assert Sweep(tmp_path).is_open()
    opened.close(called)
    assert json.loads((tmp_path / "sweep.json").read_text())["status"] == status
    told = capsys.readouterr().err
    assert told == ("1 of 3 failed: 1: \n" if "failed" in jobs else "")
    assert not Sweep(tmp_path).is_open()


def test_the_parent_run_carries_the_values_of_the_network_that_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By which sweeps can be sorted; and the last lines begin with the verdict."""
    for number, (pruner, seed, accuracy) in enumerate(
        (p, s, a) for p, a in (("none", 0.9), ("abs", 0.89)) for s in "01"
    ):
        told = {"status": "finished", "accuracy": accuracy - 0.1, "val_accuracy": accuracy, "params_dense": 100}
        told |= {"params": 100 if pruner == "none" else 20, "overrides": [f"pruner={pruner}", f"seed={seed}"]}
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "result.json").write_text(json.dumps(told))
    told = {}

    class Parent(Tracker):
        def log_metrics(self, values: Mapping[str, float], *, step: int) -> None:
            told.update(values)

        def log_tags(self, tags: Mapping[str, str]) -> None:
            told.update(tags)

    opened = callback_._OpenSweep(Sweep(tmp_path), report=True, terms={"max_drop": 2.0, "by": "params"}, jobs=4)
    assert opened.lock.acquire()
    opened._record, opened._tracker = {"command": "python train.py", "report": opened.terms}, Parent(tmp_path / "t")
    opened.close("finished")
    assert {key: told[key] for key in ("val_accuracy", "accuracy", "params", "jobs/finished")} == {
        "val_accuracy": 0.89, "accuracy": pytest.approx(0.79), "params": 20, "jobs/finished": 4,
    }  # fmt: skip
    verdict = "Provisionally, take abs: 5.0x fewer parameters, 1.0 points below the control (2 seeds); nothing smaller"
    assert told["sweep.verdict"].startswith(verdict)
    assert told["mlflow.note.content"].startswith(f"`{verdict}")
    first = next(line for line in capsys.readouterr().out.splitlines() if line)
    assert first.startswith(verdict)


def test_terms_of_the_report_are_checked_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for setting, value in (("max_drop", -1), ("max_drop", "much"), ("by", "size")):
        callback = SweepCallback(**{setting: value})  # type: ignore[arg-type]
        with pytest.raises(SystemExit):
            callback.on_multirun_start(composed())
        assert f"report.{setting}={value} is not allowed" in capsys.readouterr().err


def test_what_the_callback_recorded_of_a_failure_goes_when_the_job_is_tried_again(tmp_path: Path) -> None:
    config = composed("hydra.mode=MULTIRUN")
    OmegaConf.set_readonly(config, False)
    config.hydra.runtime.output_dir = str(tmp_path)
    config.hydra.overrides.task, config.hydra.job.num = ["seed=1"], 0
    failed = JobReturn(status=JobStatus.FAILED, _return_value=RuntimeError("the disk\nis full"))
    SweepCallback().on_job_end(config, failed)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["error"]) == ("failed", "RuntimeError: is full")
    SweepCallback().on_job_start(config)
    assert not (tmp_path / "result.json").exists()
    (tmp_path / "result.json").write_text('{"status": "finished"}')
    SweepCallback().on_job_start(config)
    SweepCallback().on_job_end(config, failed)
    assert (tmp_path / "result.json").read_text() == '{"status": "finished"}'  # the application's own


def test_the_same_command_is_known_again_and_others_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = composed("seed=1", "pruner=abs")
    mine = sweep_dir.command_identity(config)
    assert sweep_dir.command_identity(composed("pruner=abs", "sweep.resume=true", "seed=1")) == mine
    others = [
        sweep_dir.command_identity(composed(*overrides)) for overrides in ((), ("seed=1",), ("seed=2", "pruner=abs"))
    ]
    assert mine not in others
    assert sweep_dir.find_begun(config, mine) is None
    for day, started, identity in (
        ("a/1", "2026-01-01", mine),
        ("a/2", "2026-01-03", mine),
        ("b/1", "2026-02-01", "-"),
    ):
        (tmp_path / "multirun" / day).mkdir(parents=True)
        (tmp_path / "multirun" / day / "sweep.json").write_text(json.dumps({"identity": identity, "started": started}))
    (tmp_path / "multirun" / "c" / "1").mkdir(parents=True)
    (tmp_path / "multirun" / "c" / "1" / "sweep.json").write_text("{")
    assert sweep_dir.find_begun(config, mine) == Path("multirun/a/2")


def test_resuming_points_every_job_to_the_directory(tmp_path: Path) -> None:
    config = composed("seed=1")
    callback_._settle(config, tmp_path / "it's here")
    assert config.hydra.sweep.dir == str(tmp_path / "it's here")
    again = composed(*config.hydra.overrides.hydra, *config.hydra.overrides.task)  # what Hydra does for every job
    assert again.hydra.sweep.dir == str(tmp_path / "it's here")


@pytest.mark.parametrize("subdir", ["3", "seed=0/3", "."])
def test_a_job_finds_its_sweep_from_its_own_folder(
    subdir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed("hydra.mode=MULTIRUN", f"hydra.sweep.subdir='{subdir}'")
    OmegaConf.set_readonly(config, False)
    config.hydra.runtime.output_dir = str((tmp_path / subdir).absolute())
    monkeypatch.setattr(callback_.HydraConfig, "initialized", staticmethod(lambda: True))
    monkeypatch.setattr(callback_.HydraConfig, "get", staticmethod(lambda: config.hydra))
    sweep = sweep_dir.current_sweep()
    assert sweep == Sweep(tmp_path)
    assert sweep_dir.parent_run_id() is None
    (tmp_path / "sweep.json").write_text('{"parent_run_id": "abc"}')
    assert sweep_dir.parent_run_id() == "abc"
    config.hydra.mode = "RUN"
    assert sweep_dir.current_sweep() is None
