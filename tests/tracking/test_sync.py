"""What a run could not send arrives later, once: against a store in memory that fails anywhere, and a real server."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mlflow_memory import Memory
from servers import Proxy, Server, fill, small_disk

from gsprune.files.locks import Lock
from gsprune.tracking import mlflow_client
from gsprune.tracking import sync as room
from gsprune.tracking import tracker as tracker_
from gsprune.tracking.outbox import Outbox
from gsprune.tracking.sync import find_records, main, sync
from gsprune.tracking.tracker import MLflowTracker

DOWN = "http://127.0.0.1:9"  # nobody listens there
CONFIG = {"pruner": {"target_sparsity": 0.9, "include": ["*"]}, "seed": 1, "note": "x" * 9000}
PICTURE = np.zeros((300, 400, 3), np.uint8)
STEPS = (1, 2, 3)


def a_run(tracker: MLflowTracker, *, status: str = "FINISHED") -> None:
    """Everything a job asks of a tracker, and what it leaves beside."""
    folder = tracker.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text('{"status": "finished", "mlflow_run_id": null}')
    tracker.start(config=CONFIG, tags={"hydra.overrides": "pruner=abs"})
    tracker.log_params({"pruner": "abs"})
    for step in STEPS:
        tracker.log_metrics({"val/accuracy": step / 10, "kept/layers[0]": 7, "loss": float("nan")}, step=step)
    tracker.log_image(PICTURE, key="masks", step=2)
    (folder / "masks").mkdir(exist_ok=True)
    (folder / "masks" / "epoch_0002.safetensors").write_bytes(b"masks")
    tracker.log_artifact(folder / "masks" / "epoch_0002.safetensors", folder="masks")
    tracker.log_artifact(folder / "result.json")
    tracker.log_tags({"late": "yes"})
    if status != "killed":
        tracker.finish(status)  # type: ignore[arg-type]
    else:
        tracker._lock.release()  # as the system does


SENT = "1 run, 5 parameters, 1 tags, 9 metrics, 1 pictures, 3 files, its end (FINISHED)"


# --- a store in memory (mlflow_memory.py) ------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _nobody_s_own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MLFLOW_TRACKING_URI", *room.CREDENTIALS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    made = Memory()
    monkeypatch.setattr("mlflow.MlflowClient", made.client)
    for module in (room, tracker_):
        monkeypatch.setattr(module, "import_client", lambda timeout_s: None)
    return made


def test_a_sweep_leaves_a_view_of_its_jobs_and_an_older_experiment_gets_the_views_it_lacks(
    memory: Memory, tmp_path: Path
) -> None:
    other = {"mlflow.sharedViewState.gsprune-best": "changed by its user"}
    memory.experiments["gsprune"] = SimpleNamespace(experiment_id="7", lifecycle_stage="active", tags=other)
    tracker = MLflowTracker(tmp_path / "out", tracking_uri=DOWN)
    tracker.start(config=CONFIG, tags={"sweep.directory": "/sweeps/a"})
    tracker.log_metrics({"val_accuracy": 0.9916666746139526, "params": 93546}, step=0)
    tracker.finish("FINISHED")
    (run_id,) = memory.runs
    route = f"/#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey=sweep-{run_id[:12]}"
    assert tracker.page.address == f"{DOWN}{route}"
    view = json.loads(other[f"mlflow.sharedViewState.sweep-{run_id[:12]}"])
    assert view["searchFilter"] == f"tags.mlflow.parentRunId = '{run_id}'"
    assert other["mlflow.sharedViewState.gsprune-best"] == "changed by its user"
    assert "mlflow.sharedViewState.gsprune-sweeps" in other
    sent = {metric.key: metric.value for metric in memory.runs[run_id].metrics}
    assert sent == {"val_accuracy": 0.991667, "params": 93546}
    assert json.loads((tmp_path / "out" / "metrics.jsonl").read_text())["val_accuracy"] == 0.9916666746139526
    assert json.loads((tmp_path / "out" / "tracking.json").read_text())["experiment_id"] == "7"


def counted(sent: room.Sent) -> dict[str, int]:
    return {what: count for what, count in sent.counts.items() if count}


@pytest.fixture
def unsent(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the record of a run that never reached its server, without MLflow."""

    def make(folder: Path, *, status: str = "FINISHED", **options: Any) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(tracker_, "import_client", refuse)
            a_run(MLflowTracker(folder, tracking_uri=DOWN, **options), status=status)
        return folder

    return make


def refuse(timeout_s: float) -> None:
    raise ConnectionError("refused")


def recorded(folder: Path) -> list[dict[str, Any]]:
    """The events of the outbox, without what was acknowledged."""
    lines = [json.loads(line) for line in (folder / "outbox.jsonl").read_text().splitlines()]
    return [line for line in lines if "kind" in line]


def it_is_all_there(run: Any) -> None:
    assert run.params == {
        "pruner.target_sparsity": "0.9", "pruner.include": '["*"]', "seed": "1", "note": "x" * 6000, "pruner": "abs",
    }  # fmt: skip
    assert {"hydra.overrides": "pruner=abs", "late": "yes"}.items() <= run.tags.items()
    values = {(metric.key, metric.step): metric.value for metric in run.metrics}
    assert len(run.metrics) == len(values) == 9  # each (name, step) once
    assert [values["val/accuracy", step] for step in STEPS] == [0.1, 0.2, 0.3]
    assert [values["where/kept/layers_0_", step] for step in STEPS] == [7, 7, 7]
    assert all(np.isnan(values["loss", step]) for step in STEPS)
    plain = [name for name in run.files if not name.startswith("images/")]
    assert plain == ["config.yaml", "masks/epoch_0002.safetensors", "result.json"]
    pictures = [name for name in run.files if name.startswith("images/")]
    assert sorted(name.rpartition(".")[2] for name in pictures) == ["png", "webp"]
    assert run.info.status == "FINISHED"


def test_all_of_a_run_is_sent_once_with_its_own_times(
    memory: Memory, unsent: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = unsent(tmp_path / "out", run_name="first")
    assert main([str(folder)]) == 0
    (run_id,) = memory.runs
    run, events = memory.runs[run_id], recorded(folder)
    it_is_all_there(run)
    assert run.name == "first"
    assert (run.info.start_time, run.info.end_time) == (events[0]["time_ms"], events[-1]["time_ms"])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = {row["step"]: row["time"] * 1000 for row in rows}
    assert all(abs(metric.timestamp - times[metric.step]) <= 1 for metric in run.metrics)
    assert capsys.readouterr().out == f"{folder}: sent {SENT} to {DOWN}, run {run_id}\n"
    note = json.loads((folder / "tracking.json").read_text())
    assert (note["run_id"], note["status"], note["stopped"]) == (run_id, "FINISHED", None)
    assert json.loads((folder / "result.json").read_text())["mlflow_run_id"] == run_id
    calls = len(memory.calls)
    assert main([str(folder)]) == 0
    assert len(memory.calls) == calls  # the server is not even asked
    assert main([str(folder), "--tracking-uri", "http://127.0.0.1:8"]) == 0  # which is not asked
    assert capsys.readouterr().out == f"Nothing to send: {DOWN} has the run in {folder}\n" * 2


@pytest.mark.parametrize("arrives", [True, False])
def test_cut_off_anywhere_and_made_again_it_is_still_once(
    memory: Memory, unsent: Any, tmp_path: Path, arrives: bool
) -> None:
    sync(unsent(tmp_path / "whole"))
    calls, memory.arrives = len(memory.calls), arrives
    assert calls > 12
    for dies_at in range(calls):
        memory.runs, memory.experiments, memory.calls, memory.dies_at = {}, {}, [], dies_at
        folder = unsent(tmp_path / str(dies_at))
        before = recorded(folder)
        with pytest.raises(ValueError, match=r"^MLflow at http://127.0.0.1:9 does not answer or refuses"):
            sync(folder)
        assert recorded(folder) == before
        memory.dies_at = None
        sync(folder)
        assert len(memory.runs) == 1
        it_is_all_there(next(iter(memory.runs.values())))
        assert not sync(folder)


@pytest.mark.parametrize("arrives", [True, False])
def test_models_of_a_run_cut_off_anywhere_are_there_once_and_whole(
    memory: Memory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arrives: bool
) -> None:
    def recorded_run(folder: Path) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(tracker_, "import_client", refuse)
            tracker = MLflowTracker(folder, tracking_uri=DOWN)
            tracker.start(config={}, tags={})
            for share in (75, 50):
                place = folder / "curve" / f"macs-{share}"
                place.mkdir(parents=True)
                for name in ("model.safetensors", "pruning.json"):
                    (place / name).write_bytes(b"x")
                settings = {"params": {"budget.macs": f"0.{share}"}, "values": {"model_accuracy": share / 100}}
                dataset = {"name": "digits", "digest": "1a2b"}
                tracker.log_model(place.name, sorted(place.iterdir()), step=share, dataset=dataset, **settings)
            tracker.finish("FINISHED")
        return folder

    sent = sync(recorded_run(tmp_path / "whole"))
    assert counted(sent)["models"] == 2
    calls, memory.arrives = len(memory.calls), arrives
    for dies_at in range(calls):
        memory.runs, memory.experiments, memory.models, memory.calls, memory.dies_at = {}, {}, {}, [], dies_at
        folder = recorded_run(tmp_path / f"{dies_at}")
        with pytest.raises(ValueError, match="does not answer or refuses"):
            sync(folder)
        memory.dies_at = None
        sync(folder)
        ((run_id, run),) = memory.runs.items()
        models = {model.name: model for model in memory.models.values()}
        assert [*models] == ["macs-75", "macs-50"]
        assert len(memory.models) == 2
        assert run.outputs == [model.model_id for model in models.values()]
        assert run.datasets == {("digits", "1a2b")}
        for name, share in (("macs-75", 0.75), ("macs-50", 0.5)):
            model = models[name]
            assert (model.status, model.source_run_id, model.files) == ("READY", run_id, FILES_OF_A_MODEL)
            assert float(model.params["budget.macs"]) == share
            values = {metric.value for metric in run.metrics if metric.model_id == model.model_id}
            assert values == {share}
        assert not sync(folder)


FILES_OF_A_MODEL = ["model.safetensors", "pruning.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../x"},
        {"files": ["../result.json"]},
        {"files": []},
        {"files": "model"},
        {"step": -1},
        {"time_ms": None},
    ],
)
def test_a_model_that_a_stranger_recorded_is_left_out(memory: Memory, tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "weights").write_bytes(b"x")
    event = {"name": "a", "files": ["weights"], "params": {}, "values": {"x": 1.0}, "step": 0, "time_ms": 1}
    for fields, left_out in ((event, 0), ({**event, **change}, 1)):
        (tmp_path / "outbox.jsonl").write_text(json.dumps({"kind": "model", **fields}) + "\n")
        outbox = Outbox(tmp_path)
        outbox.load()
        assert (len(outbox.left_out), bool(outbox.pending[0])) == (left_out, not left_out)


def test_what_the_server_has_already_is_not_sent_again(memory: Memory, unsent: Any, tmp_path: Path) -> None:
    """What was acknowledged is not on record, and MLflow lacks the metrics of a step in the middle."""
    folder = unsent(tmp_path / "out")
    sync(folder)
    (run,) = memory.runs.values()
    run.metrics = [metric for metric in run.metrics if metric.step != 2]
    lines = "".join(json.dumps(event) + "\n" for event in recorded(folder))
    (folder / "outbox.jsonl").write_text(lines)
    sent = sync(folder)
    assert counted(sent) == {"metrics": 3, "files": 3}  # files are written over
    assert sent.ended is None
    it_is_all_there(run)


def test_a_run_that_goes_on_sends_what_its_earlier_process_could_not(
    memory: Memory, unsent: Any, tmp_path: Path
) -> None:
    folder = unsent(tmp_path / "out", status="KILLED")  # a server that is down, and then back
    began, mark = recorded(folder)[0]["time_ms"], json.loads((folder / "tracking.json").read_text())["record"]
    again = MLflowTracker(folder, tracking_uri=DOWN)
    again.start(
        config=CONFIG,
        tags={},
        rows=[{"val/accuracy": step / 10, "kept/layers[0]": 7, "loss": "nan"} for step in (1, 2)],
    )
    again.log_metrics({"val/accuracy": 0.3, "kept/layers[0]": 7, "loss": float("nan")}, step=3)
    again.finish("FINISHED")
    assert (again.stopped, again.unsent) == (None, False)
    (run,) = memory.runs.values()
    it_is_all_there(run)
    assert (run.info.start_time, run.tags["gsprune.record"]) == (began, mark)
    assert not sync(folder)


def test_a_run_that_goes_on_leaves_to_sync_what_would_cost_it_too_long(
    memory: Memory, unsent: Any, tmp_path: Path
) -> None:
    folder = unsent(tmp_path / "out", status="KILLED")
    again = MLflowTracker(folder, tracking_uri=DOWN, timeout_s=1e-9)
    again._deadlines = lambda kind, job, megabytes=0.0: job()  # type: ignore[assignment]
    again._deadlines.close = lambda: None  # type: ignore[method-assign]
    again.start(config=CONFIG, tags={}, rows=[])
    for step in STEPS:
        again.log_metrics({"val/accuracy": step / 10, "kept/layers[0]": 7, "loss": float("nan")}, step=step)
    again.finish("FINISHED")
    (run,) = memory.runs.values()
    assert "late" not in run.tags
    assert again.unsent
    assert counted(sync(folder)) == {"parameters": 1, "tags": 1, "files": 3}
    assert run.tags["late"] == "yes"


def test_a_run_that_was_deleted_comes_again_as_a_whole(memory: Memory, unsent: Any, tmp_path: Path) -> None:
    folder = unsent(tmp_path / "out", status="KILLED")
    deleted = str(sync(folder).run_id)
    memory.runs[deleted].info.lifecycle_stage = "deleted"
    rows = [{"val/accuracy": step / 10, "kept/layers[0]": 7, "loss": "nan"} for step in STEPS]
    again = MLflowTracker(folder, tracking_uri=DOWN, run_id=deleted)
    again.start(config=CONFIG, tags={}, rows=rows)
    again.finish("FINISHED")
    assert again.run_id not in (None, deleted)
    it_is_all_there(memory.runs[str(again.run_id)])


def test_the_files_of_a_folder_keep_their_places(memory: Memory, tmp_path: Path) -> None:
    tracker = MLflowTracker(tmp_path / "out", tracking_uri=DOWN)
    tracker.start(config={}, tags={})
    for name in ("a.txt", "b/c.txt"):
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_text(name)
    tracker.log_artifact(tmp_path / "files", folder="notes")
    tracker.log_artifact(tmp_path / "out" / "notes")
    (run,) = memory.runs.values()
    assert tracker.stopped is None
    assert run.files == ["config.yaml", "files/a.txt", "files/b/c.txt", "notes/a.txt", "notes/b/c.txt"]


def test_a_killed_run_is_ended_when_its_last_metrics_came(memory: Memory, unsent: Any, tmp_path: Path) -> None:
    folder = unsent(tmp_path / "out", status="killed")
    assert sync(folder).ended == "KILLED"
    (run,) = memory.runs.values()
    assert run.info.end_time == max(metric.timestamp for metric in run.metrics)
    assert json.loads((folder / "tracking.json").read_text())["status"] == "KILLED"


class Killed(BaseException):
    """What stands on the disk after it is what SIGKILL leaves."""


@pytest.mark.parametrize("arrives", [False, True])
def test_a_run_killed_in_any_call_is_sent_once(memory: Memory, tmp_path: Path, arrives: bool) -> None:
    memory.arrives, memory.fault = arrives, Killed

    def killed_at(number: int) -> Path:
        tracker = MLflowTracker(tmp_path / str(number), tracking_uri=DOWN)
        tracker._deadlines = lambda kind, job, megabytes=0.0: job()  # type: ignore[assignment]
        tracker._deadlines.close = lambda: None  # type: ignore[method-assign]
        memory.runs.clear(), memory.experiments.clear(), memory.calls.clear()
        memory.dies_at = number
        with contextlib.suppress(Killed):
            a_run(tracker)
        tracker._lock.release()
        return tracker.output_dir

    killed_at(999)
    calls = len(memory.calls)
    assert calls >= 15
    for number in range(calls):
        folder = killed_at(number)
        memory.dies_at = None
        logged = recorded(folder)
        sent = sync(folder)
        (run,) = memory.runs.values()
        status = "FINISHED" if any(event["kind"] == "finish" for event in logged) else "KILLED"
        assert run.info.status == status
        assert sent.ended in (status, None if status == "FINISHED" else status)
        files = {event["path"] for event in logged if event["kind"] == "artifact"}
        assert {name for name in run.files if "images" not in name} == files
        assert len([name for name in run.files if "images" in name]) == 2 * any(e["kind"] == "image" for e in logged)
        steps = [event["step"] for event in logged if event["kind"] == "metrics"]
        assert sorted((metric.key, metric.step) for metric in run.metrics) == sorted(
            (key, step) for step in steps for key in ("val/accuracy", "where/kept/layers_0_", "loss")
        )
        assert len(run.params) == 4 + any(event["kind"] == "params" for event in logged)
        assert run.tags.get("late") == ("yes" if any(event["kind"] == "tags" for event in logged) else None)
        assert not sync(folder)


# --- the record of an earlier version ----------------------------------------------------------------------


def as_written_before(folder: Path, *, sending: bool) -> None:
    """Turn a record into one with unsent.jsonl and sending.jsonl, as versions without an outbox left it."""
    events = recorded(folder)
    last = [events.pop()] if sending else []
    for name, lines in (("unsent.jsonl", events), ("sending.jsonl", last)):
        (folder / name).write_text("".join(json.dumps(event) + "\n" for event in lines))
    (folder / "outbox.jsonl").unlink()


@pytest.mark.parametrize("sending", [False, True])
def test_a_record_of_an_earlier_version_is_sent(memory: Memory, unsent: Any, tmp_path: Path, sending: bool) -> None:
    folder = unsent(tmp_path / "out")
    as_written_before(folder, sending=sending)
    assert str(sync(folder)) == SENT
    it_is_all_there(next(iter(memory.runs.values())))
    assert not sync(folder)
    assert not any((folder / name).exists() for name in ("unsent.jsonl", "sending.jsonl"))


def test_a_finished_record_of_an_earlier_version_is_not_asked_about(
    memory: Memory, unsent: Any, tmp_path: Path
) -> None:
    folder = unsent(tmp_path / "out")
    sync(folder)
    (folder / "outbox.jsonl").unlink()
    calls = len(memory.calls)
    assert not sync(folder)
    assert len(memory.calls) == calls
    with pytest.raises(ValueError, match="the local record has no start"):
        sync(folder, experiment="new")
    assert len(memory.runs) == 1


def test_a_run_of_an_earlier_version_that_goes_on_is_sent(memory: Memory, unsent: Any, tmp_path: Path) -> None:
    folder = unsent(tmp_path / "out", status="KILLED")
    as_written_before(folder, sending=True)
    again = MLflowTracker(folder, tracking_uri=DOWN)
    again.start(config=CONFIG, tags={}, rows=[{"val/accuracy": 0.1}, {"val/accuracy": 0.2}])
    again.finish("FINISHED")
    (run,) = memory.runs.values()
    assert [(metric.key, metric.step) for metric in run.metrics] == [("val/accuracy", 1), ("val/accuracy", 2)]
    assert run.info.status == "FINISHED"
    assert run.tags["late"] == "yes"
    assert (again.unsent, bool(sync(folder))) == (False, False)


def test_a_run_that_goes_on_is_left_alone(memory: Memory, unsent: Any, tmp_path: Path, capsys: Any) -> None:
    folder = unsent(tmp_path / "out")
    lock = Lock(folder / "tracking.lock")
    assert lock.acquire()
    assert main([str(folder)]) == 1
    assert capsys.readouterr().err == (
        f"Error: the run in {folder} still goes on, or is being uploaded by another process\n"
    )
    assert memory.calls == []
    lock.release()
    assert main([str(folder)]) == 0


def test_jobs_of_a_sweep_come_to_lie_under_its_parent_wherever_they_were_moved(
    memory: Memory, unsent: Any, tmp_path: Path
) -> None:
    sweep = tmp_path / "before"
    unsent(sweep / ".gsprune", run_name="sweep of seed")
    for name in ("0", "1", "10"):
        unsent(sweep / name, run_name=name)
    (sweep / "sweep.json").write_text('{"parent_run_id": null, "axes": {}}')
    os.rename(sweep / "1", sweep / "1-0a1b2c3d")
    os.rename(sweep, tmp_path / "after")
    assert main([str(tmp_path / "after" / "0")]) == 0  # one job alone: the parent is not there yet
    assert "mlflow.parentRunId" not in memory.runs[f"{0:032x}"].tags
    assert main([str(tmp_path)]) == 0
    runs = {run.name: (run_id, run.tags.get("mlflow.parentRunId")) for run_id, run in memory.runs.items()}
    parent = runs["sweep of seed"][0]
    assert {name: above for name, (_, above) in runs.items()} == {
        "sweep of seed": None, "0": parent, "1": parent, "10": parent,
    }  # fmt: skip
    assert json.loads((tmp_path / "after" / "sweep.json").read_text())["parent_run_id"] == parent
    calls = len(memory.calls)
    assert main([str(tmp_path)]) == 0
    assert len(memory.calls) == calls


def test_a_dead_server_is_asked_once_for_many_runs_and_nothing_changes(
    memory: Memory, unsent: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abc":
        unsent(tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    memory.dies_at = 0
    assert main([str(tmp_path)]) == 1
    said = "MLflow at http://127.0.0.1:9 does not answer or refuses, and what it lacks stays on record"
    assert capsys.readouterr().err.splitlines() == [f"Error: {said} (no answer)", f"Error: {said}"]
    assert memory.calls == ["get_experiment_by_name"]
    assert {path: path.read_bytes() for path in before} == before


def test_mistakes_are_one_sentence(memory: Memory, unsent: Any, tmp_path: Path, capsys: Any) -> None:
    def said(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 1
        return str(capsys.readouterr().err)

    nowhere = tmp_path / "nowhere"
    assert said(nowhere) == (
        f"Error: {nowhere} is not a directory: give that of a run, of a sweep, or a folder of those\n"
    )
    (tmp_path / "empty").mkdir()
    assert said(tmp_path / "empty") == (
        f"Error: {tmp_path / 'empty'} holds no run that was tracked with MLflow: "
        "there is no tracking.json in it or below\n"
    )
    folder = unsent(tmp_path / "out")
    database = tmp_path / "gone" / "mlflow.db"
    assert said(folder, "--tracking-uri", f"sqlite:///{database}") == (
        f"Error: {database} does not exist, and the record stays as it was\n"
    )
    assert not database.parent.exists()
    note = json.loads((folder / "tracking.json").read_text())
    for uri, sentence in {
        "http://***@host:5000": "http://***@host:5000 has a password, which is not saved: "
        "give the whole address with --tracking-uri",
        "plugin://x": f"{folder}/tracking.json names no tracking server: give one with --tracking-uri",
    }.items():
        (folder / "tracking.json").write_text(json.dumps({**note, "tracking_uri": uri}))
        assert said(folder) == f"Error: {sentence}\n"
    (folder / "tracking.json").write_text("{")
    assert said(folder) == (
        f"Error: {folder}/tracking.json is not the record of a run: it is damaged, or of another program\n"
    )
    assert memory.calls == []


def test_the_environment_may_hold_the_password(
    memory: Memory, unsent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = unsent(tmp_path / "out")
    note = json.loads((folder / "tracking.json").read_text())
    (folder / "tracking.json").write_text(json.dumps({**note, "tracking_uri": "http://***@host:5000"}))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:secret@host:5000")
    assert sync(folder).uri == "http://***@host:5000"
    assert set(memory.uris) == {"http://ann:secret@host:5000"}


def test_a_password_goes_to_no_server_that_only_a_record_names(
    memory: Memory, unsent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = unsent(tmp_path / "out")
    refused = (
        f"^{DOWN} is named by {folder}/tracking.json alone, and MLflow would send it the password that the environment "
        "has: give it with --tracking-uri if it is yours$"
    )
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.setenv(name, "x")
        with pytest.raises(ValueError, match=refused):
            sync(folder)
        monkeypatch.delenv(name)
    (tmp_path / "home" / ".mlflow").mkdir(parents=True)
    (tmp_path / "home" / ".mlflow" / "credentials").touch()
    with pytest.raises(ValueError, match=refused):
        sync(folder)
    assert memory.calls == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DOWN)
    assert sync(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert sync(unsent(tmp_path / "other"), tracking_uri=DOWN)


def test_a_run_of_another_store_is_not_made_up(memory: Memory, unsent: Any, tmp_path: Path) -> None:
    folder = unsent(tmp_path / "out")
    sync(folder)
    (run_id,) = memory.runs
    memory.runs.clear()
    with (folder / "outbox.jsonl").open("a") as file:
        file.write('{"kind": "tags", "tags": {"a": "b"}}\n')
    with pytest.raises(
        ValueError, match=rf"^the run {run_id} of .* is not at {DOWN}, and the local record has no start"
    ):
        sync(folder)
    assert memory.runs == {}


HOSTILE: list[Any] = [
    "not an object",
    {"kind": 3},
    {"kind": "close_everything"},
    {"kind": "metrics", "values": {"m": 10**400, "n": [1], "": 1, "t": "x"}, "step": 1, "time_ms": 1},
    {"kind": "metrics", "values": {"m": 1}, "step": "1", "time_ms": 1},
    {"kind": "metrics", "values": {"m": 1}, "step": 2**70, "time_ms": 1},
    {"kind": "metrics", "values": {"m": 1}, "step": 1, "time_ms": "NaN"},
    {"kind": "metrics", "values": 7, "step": 1, "time_ms": 1},
    {"kind": "params", "params": {"a": 1, "b": None}},
    {"kind": "tags", "tags": ["a"]},
    {"kind": "artifact", "path": "/etc/hostname", "folder": None},
    {"kind": "artifact", "path": "../secret.txt", "folder": None},
    {"kind": "artifact", "path": "link.txt", "folder": None},
    {"kind": "artifact", "path": "linked", "folder": None},
    {"kind": "artifact", "path": "pipe", "folder": None},
    {"kind": "artifact", "path": "circle", "folder": None},
    {"kind": "artifact", "path": "a\0b", "folder": None},
    {"kind": "artifact", "path": "x" * 5000, "folder": None},
    {"kind": "artifact", "path": 7, "folder": None},
    {"kind": "artifact", "path": "config.yaml", "folder": "../up"},
    {"kind": "artifact", "path": "config.yaml", "folder": "/root"},
    {"kind": "artifact", "path": "config.yaml", "folder": 7},
    {"kind": "artifact", "path": "here", "folder": "here"},
    {"kind": "image", "path": "config.yaml", "key": "masks", "step": 1, "time_ms": 1},
    {"kind": "image", "path": "../secret.png", "key": "masks", "step": 1, "time_ms": 1},
    {"kind": "image", "path": "figures/masks/0002.png", "key": "a/../b\n", "step": 1, "time_ms": 1},
    {"kind": "image", "path": "figures/masks/0002.png", "key": "masks", "step": -1, "time_ms": 1},
    {"kind": "finish", "status": "EXPLODED", "time_ms": 1},
    {"kind": "finish", "status": "FAILED", "time_ms": "soon"},
]


@pytest.mark.parametrize("name", ["outbox.jsonl", "unsent.jsonl"])
def test_records_are_data_from_strangers(memory: Memory, unsent: Any, tmp_path: Path, name: str) -> None:
    folder = unsent(tmp_path / "out", status="killed")
    if name == "unsent.jsonl":
        as_written_before(folder, sending=False)
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "here").mkdir()
    (folder / "here" / "good.txt").write_text("mine")
    os.mkfifo(folder / "pipe")
    with (folder / name).open("ab") as file:
        file.write(b"\xff\xfe\n[1]\n" + b"[" * 100_000 + b"\n")
        file.write("".join(json.dumps(event) + "\n" for event in HOSTILE).encode())
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "time": 1e999, "m": 1}\n{"step": null}\n')
        file.write('{"step": 4, "time": 1, "val/accuracy": "high", "": 1}\n')
    sent = sync(folder)
    (run,) = memory.runs.values()
    assert {name for name in run.files if not name.startswith("images/")} == {
        "config.yaml", "masks/epoch_0002.safetensors", "result.json",
    }  # fmt: skip
    assert len(run.metrics) == 9
    assert len([name for name in run.files if name.startswith("images/")]) == 2
    assert run.info.status == "FAILED"
    assert set(run.params) == {"pruner.target_sparsity", "pruner.include", "seed", "note", "pruner"}
    assert f"4 lines of {name} that cannot be read" in sent.left_out
    assert len(sent.left_out) == 1 + 13 + 4  # lines, artifacts, pictures
    assert not sync(folder)


def test_files_that_are_links_out_of_the_directory_are_not_read(memory: Memory, unsent: Any, tmp_path: Path) -> None:
    folder, other = unsent(tmp_path / "out"), unsent(tmp_path / "other")
    for name in ("outbox.jsonl", "metrics.jsonl"):
        (folder / name).unlink()
        (folder / name).symlink_to(other / name)
    with pytest.raises(ValueError, match="the local record has no start"):
        sync(folder)


def test_a_result_that_is_a_link_is_neither_filled_in_nor_sent(memory: Memory, unsent: Any, tmp_path: Path) -> None:
    """Filled in, what it leads to would be a file of the directory, and go to the server that the record names."""
    folder, secret = unsent(tmp_path / "out"), '{"mlflow_run_id": null, "token": "secret"}'
    (tmp_path / "secret.json").write_text(secret)
    (folder / "result.json").unlink()
    (folder / "result.json").symlink_to(tmp_path / "secret.json")
    assert sync(folder).left_out == ["result.json: it is not a file in the run's directory"]
    (run,) = memory.runs.values()
    assert "result.json" not in run.files
    assert (folder / "result.json").is_symlink()
    assert (tmp_path / "secret.json").read_text() == secret


def test_records_are_found_at_any_depth_but_not_behind_links(unsent: Any, tmp_path: Path) -> None:
    for name in ("b/10", "b/9", "b/.gsprune", "mlartifacts/1", ".hidden/1", "a"):
        unsent(tmp_path / name)
    (tmp_path / "c").symlink_to(tmp_path / "a")
    found = [folder.relative_to(tmp_path).as_posix() for folder in find_records(tmp_path)]
    assert found == ["a", "b/.gsprune", "b/9", "b/10"]


# --- a real server -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    made.start()
    yield made
    made.kill()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    made = Proxy(server.port)
    yield made
    made.close()


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def the_server_has_it_once(uri: str, experiment: str) -> None:
    client = client_of(uri)
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    run_id = run.info.run_id
    assert run.info.status == "FINISHED"
    assert run.info.end_time >= run.info.start_time > 1e12
    assert run.data.params == {
        "pruner.target_sparsity": "0.9", "pruner.include": '["*"]', "seed": "1", "note": "x" * 6000, "pruner": "abs",
    }  # fmt: skip
    assert {"hydra.overrides": "pruner=abs", "late": "yes"}.items() <= run.data.tags.items()
    for name in ("val/accuracy", "where/kept/layers_0_", "loss"):
        assert [metric.step for metric in client.get_metric_history(run_id, name)] == list(STEPS)
    assert [metric.value for metric in client.get_metric_history(run_id, "val/accuracy")] == [0.1, 0.2, 0.3]
    assert [found.path for found in client.list_artifacts(run_id, "masks")] == ["masks/epoch_0002.safetensors"]
    top = {found.path for found in client.list_artifacts(run_id)}
    assert top == {"config.yaml", "images", "masks", "result.json"}
    pictures = sorted(found.path.rpartition(".")[2] for found in client.list_artifacts(run_id, "images"))
    assert pictures == ["png", "webp"]


FAULTS: dict[str, tuple[Any, int]] = {  # the proxy's mode, and how many requests are answered before it
    "it refuses from the start": ("refuse", 0),
    "it hangs up in the middle": ("refuse", 7),
    "it says 500 from the start": (500, 0),
    "it says 500 in the middle of the start": (500, 3),
    "it says 507 in the middle": (507, 8),
    "5 seconds an answer": (5.0, 0),
    "5 seconds an answer from the middle on": (5.0, 3),
    "0.9 seconds an answer": (0.9, 6),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_server_costs_seconds_and_gets_everything_once_when_it_is_well(
    fault: str, server: Server, proxy: Proxy, tmp_path: Path
) -> None:
    proxy.mode, proxy.healthy_for = FAULTS[fault]
    tracker = MLflowTracker(tmp_path / "out", tracking_uri=proxy.uri, experiment=fault)
    mlflow_client.import_client(5)
    begin = time.monotonic()
    a_run(tracker)
    assert time.monotonic() - begin < 10
    assert tracker.stopped is not None
    proxy.mode = None
    assert sync(tmp_path / "out")
    the_server_has_it_once(server.uri, fault)
    assert not sync(tmp_path / "out")


@pytest.mark.slow
def test_an_upload_that_is_cut_off_again_and_again_ends_with_everything_once(
    server: Server, proxy: Proxy, tmp_path: Path
) -> None:
    proxy.mode = "refuse"
    a_run(MLflowTracker(tmp_path / "out", tracking_uri=proxy.uri, experiment="cut off"))
    for requests in range(1, 40):
        proxy.healthy_for = requests
        try:
            sync(tmp_path / "out")
        except ValueError as error:
            assert "does not answer or refuses" in str(error)  # noqa: PT017
        else:
            break
    assert 8 < requests < 30
    the_server_has_it_once(server.uri, "cut off")


@pytest.mark.long
def test_a_server_that_is_killed_comes_back_and_fills_its_disk(tmp_path: Path) -> None:
    """SIGKILL between two epochs; then, with the same database, no room for what comes."""
    try:
        with small_disk(tmp_path / "disk", megabytes=8) as disk:
            server = Server(disk)
            server.start()
            tracker = MLflowTracker(tmp_path / "killed", tracking_uri=server.uri, experiment="killed")
            log_metrics = tracker.log_metrics

            def killing(values: dict[str, float], *, step: int) -> None:
                if step == 2:
                    server.kill()
                log_metrics(values, step=step)

            tracker.log_metrics = killing  # type: ignore[method-assign,assignment]
            a_run(tracker)
            assert tracker.stopped is not None
            server.start()
            assert main([str(tmp_path / "killed")]) == 0
            the_server_has_it_once(server.uri, "killed")
            filler = fill(disk)
            a_run(tracker := MLflowTracker(tmp_path / "full", tracking_uri=server.uri, experiment="full"))
            assert tracker.stopped is not None
            assert main([str(tmp_path / "full")]) == 1
            filler.unlink()
            assert main([str(tmp_path / "full")]) == 0
            the_server_has_it_once(server.uri, "full")
            server.kill()
    except PermissionError as error:
        pytest.skip(f"no small disk can be mounted here: {error}")


@pytest.mark.slow
def test_a_local_database_that_was_not_there_is_filled_later(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file where the folder should be: nothing can be mounted here yet")
    uri = f"sqlite:///{tmp_path}/store/mlflow.db"
    tracker = MLflowTracker(tmp_path / "out", tracking_uri=uri, experiment="local")
    a_run(tracker)
    assert tracker.stopped is not None
    assert main([str(tmp_path / "out")]) == 1
    (tmp_path / "store").unlink()
    (tmp_path / "store").mkdir()
    assert main([str(tmp_path / "out")]) == 0
    the_server_has_it_once(uri, "local")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.2 is no address of this machine")
def test_the_page_listens_on_this_machine_only(server: Server) -> None:
    """MLflow's own default, which the command that a run prints repeats; `mlflow ui` is `mlflow server`."""
    socket.create_connection(("127.0.0.1", server.port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):  # what listens everywhere answers here too
        socket.create_connection(("127.0.0.2", server.port), timeout=5)
    from click.testing import CliRunner
    from mlflow.cli import cli

    assert "(default: 127.0.0.1)" in " ".join(CliRunner().invoke(cli, ["ui", "--help"]).output.split())


@pytest.mark.slow
def test_a_run_whose_experiment_was_deleted_is_sent_to_another(tmp_path: Path, capsys: Any) -> None:
    """A sweep's parent and two jobs: one that has been sent in part, and one that was never begun there."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/m.db"
    client, sweep = MlflowClient(tracking_uri=uri), tmp_path / "sweep"
    parent = MLflowTracker(sweep / ".gsprune", tracking_uri=uri, experiment="old")
    parent.start(config={"command": "x"}, tags={})
    (sweep / "sweep.json").write_text(json.dumps({"parent_run_id": parent.run_id}))
    part = MLflowTracker(sweep / "0", tracking_uri=uri, experiment="old", parent_run_id=parent.run_id)
    part.output_dir.mkdir()
    (part.output_dir / "early.txt").write_text("sent before")
    start = part.start

    def then_deleted(**more: Any) -> None:
        start(**more)
        part.log_artifact(part.output_dir / "early.txt")
        client.delete_experiment(client.get_experiment_by_name("old").experiment_id)

    part.start = then_deleted  # type: ignore[method-assign]
    a_run(part)
    never = MLflowTracker(sweep / "1", tracking_uri=uri, experiment="old", parent_run_id=parent.run_id)
    a_run(never)
    parent.finish("FINISHED")
    assert main([str(sweep)]) == 1
    assert "mlflow experiments restore -x" in capsys.readouterr().err
    assert main([str(sweep), "--experiment", "new"]) == 0
    assert main([str(sweep), "--experiment", "new"]) == 0
    assert "Nothing to send" in capsys.readouterr().out
    assert main([str(sweep)]) == 0  # the record knows where it is by now
    new = client.get_experiment_by_name("new").experiment_id
    runs = {run.info.run_id: run for run in client.search_runs([new])}
    assert len(runs) == 3
    top = json.loads((sweep / "sweep.json").read_text())["parent_run_id"]
    for name in ("0", "1"):
        run = runs.pop(json.loads((sweep / name / "result.json").read_text())["mlflow_run_id"])
        assert run.data.tags["mlflow.parentRunId"] == top
        assert run.data.tags["hydra.overrides"] == "pruner=abs"
        assert run.data.tags["late"] == "yes"
        assert run.data.params["pruner.target_sparsity"] == "0.9"
        assert run.info.status == "FINISHED"
        assert len(client.get_metric_history(run.info.run_id, "val/accuracy")) == 3
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert {"config.yaml", "result.json", "masks", "images"} <= files
        assert ("early.txt" in files) == (name == "0")
    assert list(runs) == [top]
    assert "moved_from" not in json.loads((sweep / "0" / "tracking.json").read_text())
