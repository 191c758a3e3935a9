"""The local record is always complete; MLflow gets the same when it can, and costs seconds when it cannot."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shlex
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import yaml
from PIL import Image

from gsprune.settings.addresses import check_address, database_file, resolve_tracking_uri
from gsprune.tracking import drain, mlflow_client, outbox
from gsprune.tracking import tracker as tracker_
from gsprune.tracking.mlflow_names import Names, flatten
from gsprune.tracking.outbox import Outbox
from gsprune.tracking.tracker import MLflowTracker, Tracker, read_metrics

CONFIG = {"pruner": {"target_sparsity": 0.9, "keep": None, "include": ["*"]}, "seed": 1, "note": "x" * 9000}
DIGITS = {"name": "digits", "digest": "1a2b"}
PICTURE = np.zeros((6, 8, 3), np.uint8)


def unsent(folder: Path) -> list[dict[str, Any]]:
    """The events that MLflow has not acknowledged."""
    outbox = Outbox(folder)
    outbox.load()
    return list(outbox.pending.values())


def a_run(tracker: Tracker, *, epochs: int = 3) -> None:
    """Everything a job asks of a tracker."""
    tracker.start(config=CONFIG, tags={"hydra.overrides": "pruner=abs"})
    for epoch in range(epochs):
        tracker.log_metrics({"val/accuracy": 0.5 + epoch / 10, "sparsity/layers[0].weight": 0.1}, step=epoch)
    tracker.log_image(PICTURE, key="masks", step=2)
    file = tracker.output_dir / "masks" / "epoch_0002.safetensors"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"masks")
    tracker.log_artifact(file, folder="masks")
    tracker.log_tags({"late": "yes"})
    tracker.finish("FINISHED")


def the_local_record_is_complete(folder: Path, *, epochs: int = 3) -> None:
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(epochs))
    assert [row["val/accuracy"] for row in rows] == [0.5 + epoch / 10 for epoch in range(epochs)]
    assert (folder / "figures" / "masks" / "0002.png").is_file()
    assert (folder / "masks" / "epoch_0002.safetensors").read_bytes() == b"masks"
    assert yaml.safe_load((folder / "config.yaml").read_text()) == CONFIG


# --- the local record --------------------------------------------------------------------------------------


def test_importing_this_room_imports_neither_mlflow_nor_torch() -> None:
    code = "import sys, gsprune.tracking.tracker; print([m for m in ('mlflow', 'torch') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_a_run_without_mlflow_leaves_its_record(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "out", experiment="ignored")
    a_run(tracker)
    the_local_record_is_complete(tmp_path / "out")
    assert tracker.run_id is None
    assert sorted(os.listdir(tmp_path / "out")) == ["config.yaml", "figures", "masks", "metrics.jsonl"]


def test_every_line_is_valid_json_and_reads_back(tmp_path: Path) -> None:
    import torch  # not above: a process that tests start takes seconds to end with it

    values = {"nan": math.nan, "up": math.inf, "down": -math.inf, "whole": 25_557_032, "tensor": torch.tensor(0.5)}
    Tracker(tmp_path).log_metrics({**values, "numpy": np.float32(0.25)}, step=4)
    (text,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row == {
        "step": 4, "time": row["time"], "nan": "NaN", "up": "Infinity", "down": "-Infinity",
        "whole": 25557032, "tensor": 0.5, "numpy": 0.25,
    }  # fmt: skip
    assert abs(row["time"] - time.time()) < 60
    back = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert math.isnan(back["nan"])
    assert (back["up"], back["down"], back["whole"]) == (math.inf, -math.inf, 25557032)


def test_a_torn_line_spoils_only_itself(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.log_metrics({"a": 1}, step=0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "a"')  # killed while writing
    tracker.log_metrics({"a": 3}, step=2)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 2]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_files_from_elsewhere_are_copied_and_own_ones_are_not(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "out")
    (tmp_path / "elsewhere.txt").write_text("hello")
    tracker.log_artifact(tmp_path / "elsewhere.txt", folder="notes")
    assert (tmp_path / "out" / "notes" / "elsewhere.txt").read_text() == "hello"
    tracker.log_artifact(tmp_path / "out" / "notes" / "elsewhere.txt", folder="again")
    tracker.log_artifact(tmp_path / "out" / "notes")
    assert os.listdir(tmp_path / "out") == ["notes"]


def test_pictures_keep_every_pixel(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (5, 7, 3), np.uint8)
    Tracker(tmp_path).log_image(picture, key="masks/conv[0]", step=12)
    saved = np.array(Image.open(tmp_path / "figures" / "masks_conv_0_" / "0012.png"))
    assert np.array_equal(saved, picture)


def test_a_disk_that_is_full_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outbox, "_append", full)
    tracker = Tracker(tmp_path)
    tracker.log_metrics({"a": 1}, step=0)
    tracker.log_metrics({"a": 1}, step=1)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left on device" in caplog.text


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "FAILED")],
)
def test_the_end_of_a_with_block_is_the_status(tmp_path: Path, error: type[BaseException] | None, status: str) -> None:
    seen: list[str] = []

    class Spy(Tracker):
        def finish(self, status: str) -> None:
            seen.append(status)

    def run() -> None:
        with Spy(tmp_path):
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()
    assert seen == [status]


# --- names and texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("sparsity/a.b", "where/sparsity/a.b"),
        ("kept/l[0]@x,y=*", "where/kept/l_0__x_y__"),
        ("a:b", "a_b"),
        ("/a//b/../c/", "a/c"),
        ("../../etc", "etc"),
        ("", "_"),
        ("..", "_"),
        ("é ü", "é ü"),
        ("n" * 300, "n" * 240),
    ],
)
def test_names_are_what_mlflow_takes(name: str, clean: str) -> None:
    assert Names()[name] == clean


def test_names_that_become_alike_stay_apart() -> None:
    names = Names()
    assert [names[name] for name in ("a[0]", "a(0)", "a_0_", "a[0]")] == ["a_0_", "a_0__2", "a_0__3", "a_0_"]


def test_config_is_flattened_and_passwords_are_left_out() -> None:
    config = {"a": {"b": [1, 2], "c": {}, "d": True}, "e": [{"f": 1e-3}], "g": "", "uri": "http://ann:pw@host/x"}
    assert flatten(config) == {
        "a.b": "[1, 2]", "a.c": "{}", "a.d": "true", "e.0.f": "0.001", "g": "", "uri": "http://***@host/x",
    }  # fmt: skip


def test_the_default_store_is_a_database_at_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_tracking_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"
    assert resolve_tracking_uri("sqlite:///runs/a.db") == f"sqlite:///{tmp_path}/runs/a.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert resolve_tracking_uri(None) == "http://host:5000"


@pytest.mark.parametrize(
    ("uri", "root", "location"),
    [
        ("sqlite:////d/m.db", None, "file:///d/mlartifacts/e_x"),
        ("sqlite:////d/m.db", "/art", "file:///art/e_x"),
        ("sqlite:////d/m.db", "s3://bucket/", "s3://bucket/e_x"),
        ("http://h", None, None),
        ("http://h", "mlartifacts", None),
        ("http://h", "/mnt/shared", "file:///mnt/shared/e_x"),
    ],
)
def test_artifact_locations_are_absolute(uri: str, root: str | None, location: str | None) -> None:
    assert mlflow_client._artifact_location(uri, "e/x", root) == location


WRONG = {
    "htp://foo": "http://foo",
    "http:/host:5000": "http://host:5000",
    "http//host": "http://host",
    "https://": "https://host:5000",
    "http://host:port": "http://host:5000",
    "sqlite://m.db": "sqlite:///m.db",
    "sqlight:///m.db": "sqlite:///m.db",
    "postgres://db/x": "postgresql://db/x",
    "mlruns": "sqlite:///mlruns/mlflow.db",
    "file:///data/mlruns": "sqlite:///data/mlruns/mlflow.db",
    "htp://ann:pw@foo": "http://***@foo",
}


@pytest.mark.parametrize("uri", WRONG)
def test_an_address_that_is_none_is_refused_with_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(f"did you mean {WRONG[uri]}?")):
        MLflowTracker(tmp_path, tracking_uri=uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ValueError, match=re.escape(f"did you mean {WRONG[uri]}?")):
        MLflowTracker(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "uri",
    [
        "http://h",
        "HTTPS://h:1/x",
        "sqlite:////d/m.db",
        "sqlite:///:memory:",
        "postgresql+psycopg2://u@h/x",
        "postgresql:///x",
        "databricks",
        "databricks://profile",
        "uc:profile",
    ],
)
def test_an_address_of_mlflow_is_taken(uri: str) -> None:
    check_address(uri)


def tracking_threads() -> int:
    return sum(thread.name == mlflow_client.THREAD for thread in threading.enumerate())


def test_the_thread_of_a_tracker_ends_with_it(faulty: Any, tmp_path: Path) -> None:
    before = tracking_threads()
    forever, stuck = threading.Event(), faulty(dies_at=1, fault=lambda: forever.wait())
    for dies_at in (99, 2):  # none, and one whose store refuses
        a_run(faulty(dies_at=dies_at, fault=refuse))
    stuck.start(config={}, tags={})
    assert tracking_threads() == before + 1  # it waits for a call that does not return
    stuck.finish("FAILED")
    forever.set()
    until = time.monotonic() + 5
    while tracking_threads() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert tracking_threads() == before


# --- MLflow ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for the module: creating it takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store with space')}/mlflow.db"


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


@pytest.mark.slow
def test_a_run_is_in_mlflow_as_it_is_on_the_disk(tmp_path: Path, database: str) -> None:
    tracker = MLflowTracker(
        tmp_path, tracking_uri=database, experiment="real", run_name="first", parent_run_id="p" * 32
    )
    a_run(tracker)
    the_local_record_is_complete(tmp_path)
    assert tracker.stopped is None
    client = client_of(database)
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    assert run.data.params == {
        "pruner.target_sparsity": "0.9", "pruner.keep": "null", "pruner.include": '["*"]',
        "seed": "1", "note": "x" * 6000,
    }  # fmt: skip
    wanted = {"hydra.overrides": "pruner=abs", "late": "yes", "mlflow.parentRunId": "p" * 32}
    assert wanted.items() <= run.data.tags.items()
    history = client.get_metric_history(tracker.run_id, "val/accuracy")
    assert [(m.step, m.value) for m in history] == [(0, 0.5), (1, 0.6), (2, 0.7)]
    assert run.data.metrics["where/sparsity/layers_0_.weight"] == 0.1
    root = Path(database_file(database).parent) / "mlartifacts" / "real" / tracker.run_id / "artifacts"
    assert (root / "masks" / "epoch_0002.safetensors").read_bytes() == b"masks"
    assert yaml.safe_load((root / "config.yaml").read_text()) == CONFIG
    assert len(list((root / "images").glob("masks+step+2+*.png"))) == 1
    note = json.loads((tmp_path / "tracking.json").read_text())
    assert (note["run_id"], note["status"], note["stopped"]) == (tracker.run_id, "FINISHED", None)
    assert not tracker.unsent
    assert unsent(tmp_path) == []


@pytest.mark.slow
def test_networks_of_a_run_are_logged_models_with_files_settings_and_numbers(tmp_path: Path, database: str) -> None:
    tracker = MLflowTracker(tmp_path / "run", tracking_uri=database, experiment="models")
    tracker.start(config={}, tags={})
    for share in (0.75, 0.5):
        folder = tmp_path / "run" / "curve" / f"macs-{100 * share:g}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(f"{share}".encode())
        settings = {"params": {"budget.macs": f"{share}"}, "values": {"model_accuracy": share, "model_loss": 1.0}}
        files = [folder / "model.safetensors", folder / "missing"]
        tracker.log_model(folder.name, files, step=round(100 * share), dataset=DIGITS, **settings)
    tracker.finish("FINISHED")
    assert tracker.stopped is None
    client = client_of(database)
    run = client.get_run(tracker.run_id)
    found = {m.name: m for m in client.search_logged_models([run.info.experiment_id])}
    assert {name: str(model.status) for name, model in found.items()} == {"macs-75": "READY", "macs-50": "READY"}
    for name, share in (("macs-75", 0.75), ("macs-50", 0.5)):
        model = client.get_logged_model(found[name].model_id)
        assert (model.source_run_id, model.params) == (tracker.run_id, {"budget.macs": f"{share}"})
        assert {metric.key: metric.value for metric in model.metrics} == {"model_accuracy": share, "model_loss": 1.0}
        assert {(metric.dataset_name, metric.dataset_digest) for metric in model.metrics} == {("digits", "1a2b")}
        place = Path(unquote(model.artifact_location.removeprefix("file://")))
        assert (place / "model.safetensors").read_bytes() == f"{share}".encode()
    history = client.get_metric_history(tracker.run_id, "model_accuracy")
    assert sorted((m.step, m.value) for m in history) == [(50, 0.5), (75, 0.75)]
    assert [(used.dataset.name, used.dataset.digest) for used in run.inputs.dataset_inputs] == [("digits", "1a2b")]
    ranked = client.search_logged_models(
        [run.info.experiment_id], order_by=[{"field_name": "metrics.model_accuracy", "ascending": False}]
    )
    assert [model.name for model in ranked] == ["macs-75", "macs-50"]


@pytest.mark.slow
def test_mlflow_takes_odd_values_many_values_and_a_failure(tmp_path: Path, database: str) -> None:
    tracker = MLflowTracker(tmp_path, tracking_uri=database, experiment="odd")
    tracker.start(config={f"k{i}": i for i in range(250)} | {"empty": ""}, tags={f"t{i}": "v" for i in range(130)})
    tracker.log_metrics({"nan": math.nan, "inf": math.inf, **{f"m{i}": i for i in range(1500)}}, step=0)
    tracker.finish("FAILED")
    tracker.finish("FINISHED")  # the first counts
    assert tracker.stopped is None
    run = client_of(database).get_run(tracker.run_id)
    assert run.info.status == "FAILED"
    assert len(run.data.params) == 251
    assert len(run.data.metrics) == 1502
    assert math.isnan(run.data.metrics["nan"])
    assert sum(name.startswith("t") for name in run.data.tags) == 130


@pytest.mark.slow
def test_a_parent_goes_on_later_and_ends_children_that_were_killed(tmp_path: Path, database: str) -> None:
    options = {"tracking_uri": database, "experiment": "sweep"}
    parent = MLflowTracker(tmp_path / "parent", **options)
    parent.start(config={"axes": "seed"}, tags={})
    nested = {name: MLflowTracker(tmp_path / name, parent_run_id=parent.run_id, **options) for name in "abc"}
    for tracker in nested.values():
        tracker.start(config={}, tags={})
    nested["a"].log_params({"dense.key": "k"})
    nested["a"].finish("FINISHED")
    again = MLflowTracker(tmp_path / "again", run_id=parent.run_id, **options)
    again.start(config={"axes": "pruner"}, tags={"mlflow.note.content": "later"})
    assert again.run_id == parent.run_id
    again.close_children(except_for=[str(nested["c"].run_id)])
    client = client_of(database)
    found = {name: client.get_run(tracker.run_id) for name, tracker in nested.items()}
    assert {name: run.info.status for name, run in found.items()} == {"a": "FINISHED", "b": "KILLED", "c": "RUNNING"}
    assert found["a"].data.params == {"dense.key": "k"}
    opened = client.get_run(parent.run_id)
    assert (opened.info.status, opened.data.params) == ("RUNNING", {"axes": "seed"})  # parameters cannot change
    assert opened.data.tags["mlflow.note.content"] == "later"
    again.finish("FINISHED")
    assert client.get_run(parent.run_id).info.status == "FINISHED"
    client.delete_run(parent.run_id)
    other = MLflowTracker(tmp_path / "other", run_id=parent.run_id, **options)
    other.start(config={}, tags={})
    assert other.run_id not in (None, parent.run_id)
    assert other.stopped is None


@pytest.mark.slow
def test_a_file_of_another_run_is_fetched_or_said_to_be_missing(tmp_path: Path, database: str) -> None:
    tracker = MLflowTracker(tmp_path / "run", tracking_uri=database)
    tracker.start(config={}, tags={})
    (tmp_path / "run" / "s.bin").write_bytes(b"scores")
    tracker.log_artifact(tmp_path / "run" / "s.bin", folder="checkpoint")
    run_id = str(tracker.run_id)
    path = mlflow_client.download_artifact(database, run_id, "checkpoint/s.bin", tmp_path / "here")
    assert (path, path.read_bytes()) == (tmp_path / "here" / "s.bin", b"scores")
    with pytest.raises(ValueError, match=f"^the run {run_id} at .* has no t.bin to start from "):
        mlflow_client.download_artifact(database, run_id, "t.bin", tmp_path / "here")
    with pytest.raises(ValueError, match=f"^the run {'0' * 32} at .* has no s.bin to start from "):
        mlflow_client.download_artifact(database, "0" * 32, "s.bin", tmp_path / "here")


@pytest.mark.slow
def test_mlflow_s_own_globals_stay_as_they_were(tmp_path: Path, database: str) -> None:
    import mlflow

    before = mlflow.get_tracking_uri()
    tracker = MLflowTracker(tmp_path, tracking_uri=database)
    tracker.start(config={}, tags={})
    assert mlflow.active_run() is None
    assert mlflow.get_tracking_uri() == before
    tracker.finish("KILLED")


FOUR_AT_ONCE = """
import os, sys
import mlflow.store.tracking.sqlalchemy_store
from gsprune.tracking.tracker import MLflowTracker

for number in range(4):
    if os.fork() == 0:
        tracker = MLflowTracker(f"out{number}")
        tracker.start(config={"a": 1}, tags={})
        tracker.log_metrics({"m": 1}, step=0)
        tracker.finish("FINISHED")
        assert tracker.stopped is None
        break
else:
    sys.exit(sum(os.wait()[1] != 0 for _ in range(4)))
"""


@pytest.mark.slow
def test_four_processes_may_create_the_database_at_once_and_say_nothing(tmp_path: Path) -> None:
    """Forks of a process that has made the imports, so that they do it at the same moment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    command = [sys.executable, "-c", FOUR_AT_ONCE]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    client = client_of(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("gsprune")
    assert experiment.artifact_location == (tmp_path / "mlartifacts" / "gsprune").as_uri()
    runs = client.search_runs([experiment.experiment_id])
    assert [run.data.metrics for run in runs] == [{"m": 1.0}] * 4


# --- faults ------------------------------------------------------------------------------------------------


class FakeRun:
    """Stands in for `RemoteRun`: answers until `dies_at`, then does what `fault` does."""

    run_id: str | None = None
    experiment_id = "1"
    created = False

    def __init__(self, dies_at: int, fault: Any) -> None:
        self.dies_at, self.fault, self.calls = dies_at, fault, []

    def __getattr__(self, kind: str) -> Any:
        def call(**event: Any) -> None:
            self.calls.append(kind)
            if len(self.calls) > self.dies_at:
                self.fault()
            self.run_id = "r1"

        return call


def refuse() -> None:
    raise ConnectionError("http://ann:secret@host:5000 refused\nconnection")


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(tracker_, "import_client", lambda timeout_s: None)
    monkeypatch.setattr(drain, "_silent", {})

    def make(*, dies_at: int, fault: Any, timeout_s: float = 0.3) -> MLflowTracker:
        tracker = MLflowTracker(tmp_path, tracking_uri="http://ann:secret@host:5000", timeout_s=timeout_s)
        tracker._run = FakeRun(dies_at, fault)
        return tracker

    return make


KINDS = ["start", "artifact", "metrics", "metrics", "metrics", "image", "artifact", "tags", "finish"]


@pytest.mark.parametrize("dies_at", range(9))
def test_a_server_that_dies_is_left_alone_and_nothing_is_lost(
    faulty: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, dies_at: int
) -> None:
    tracker = faulty(dies_at=dies_at, fault=refuse)
    a_run(tracker)
    the_local_record_is_complete(tmp_path)
    again = [] if KINDS[dies_at] in ("start", "image") else [KINDS[dies_at]]  # it failed at once
    assert tracker._run.calls == KINDS[: dies_at + 1] + again  # the one that failed was the last
    assert [event["kind"] for event in unsent(tmp_path)] == KINDS[dies_at:]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert "tracking to MLflow at http://***@host:5000 stopped (ConnectionError: " in message
    assert str(tmp_path) in message
    assert "\n" not in message
    everything = "".join(path.read_text() for path in tmp_path.glob("*.json*")) + message
    assert "secret" not in everything
    note = json.loads((tmp_path / "tracking.json").read_text())
    assert note["stopped"].startswith("ConnectionError")
    assert note["run_id"] == (None if dies_at == 0 else "r1")


def test_what_is_unsent_holds_all_that_a_later_upload_needs(faulty: Any, tmp_path: Path) -> None:
    a_run(faulty(dies_at=0, fault=refuse), epochs=1)
    start, config, metrics, image, masks, tags, finish = unsent(tmp_path)
    assert start["params"]["pruner.target_sparsity"] == "0.9"
    mark = json.loads((tmp_path / "tracking.json").read_text())["record"]
    assert {"hydra.overrides": "pruner=abs", "gsprune.record": mark}.items() <= start["tags"].items()
    assert metrics["values"] == {"val/accuracy": 0.5, "where/sparsity/layers_0_.weight": 0.1}
    assert metrics["step"] == 0
    assert abs(metrics["time_ms"] - time.time() * 1000) < 60_000
    paths = [event["path"] for event in (config, image, masks)]  # as seen from the directory, which may be moved
    assert paths == ["config.yaml", "figures/masks/0002.png", "masks/epoch_0002.safetensors"]
    assert masks["folder"] == "masks"
    assert tags["tags"] == {"late": "yes"}
    assert finish["status"] == "FINISHED"


def test_a_call_that_never_returns_costs_its_time_limit_once(faulty: Any, tmp_path: Path) -> None:
    forever = threading.Event()
    tracker = faulty(dies_at=3, fault=forever.wait)
    begin = time.monotonic()
    a_run(tracker)
    assert time.monotonic() - begin < 2
    assert tracker.stopped == "TimeoutError: no answer within 0.3 s"
    the_local_record_is_complete(tmp_path)
    forever.set()


def test_slow_answers_use_up_the_patience(faulty: Any, tmp_path: Path) -> None:
    tracker = faulty(dies_at=1, fault=lambda: time.sleep(0.45), timeout_s=0.6)  # 0.25 more than is normal
    begin = time.monotonic()
    a_run(tracker)
    assert time.monotonic() - begin < 0.45 + 0.45 + 0.3 + 0.5  # the third such call has 0.1 + 0.2 s left
    assert tracker._run.calls == KINDS[:4]
    assert tracker.stopped == "TimeoutError: its slow answers have cost tracking.timeout_s=0.6 in all"
    assert tracker.unsent
    assert [event["kind"] for event in unsent(tmp_path)] == KINDS[3:]
    the_local_record_is_complete(tmp_path)


def test_large_files_do_not_excuse_slow_answers(faulty: Any, tmp_path: Path) -> None:
    """Of 100 MB each may cost seconds; a server that takes as long for 2 MB is a slow one."""
    tracker = faulty(dies_at=2, fault=lambda: time.sleep(0.8), timeout_s=0.3)
    tracker.start(config={}, tags={})
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(2_000_000)
    tracker.log_artifact(tmp_path / "model.safetensors")
    assert tracker.stopped == "TimeoutError: no answer within 0.5 s"
    assert [event["path"] for event in unsent(tmp_path)] == ["model.safetensors"]


def test_the_next_runs_of_a_process_wait_less_for_a_server_that_was_silent(
    faulty: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drain, "_BRIEF", 0.1)
    forever, waited = threading.Event(), []
    answers = iter([forever.wait, forever.wait, lambda: None])
    for _ in range(2):
        tracker = faulty(dies_at=0, fault=next(answers))
        tracker.start(config={}, tags={})
        waited.append(tracker.stopped)
    assert waited == ["TimeoutError: no answer within 0.3 s", "TimeoutError: no answer within 0.1 s"]
    tracker = faulty(dies_at=0, fault=next(answers))
    tracker.start(config={}, tags={})
    assert (tracker.stopped, tracker.run_id) == (None, "r1")
    tracker = faulty(dies_at=0, fault=forever.wait)
    tracker.start(config={}, tags={})
    assert tracker.stopped == "TimeoutError: no answer within 0.3 s"  # it has spoken since
    forever.set()


def test_without_mlflow_installed_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    a_run(MLflowTracker(tmp_path, tracking_uri="http://127.0.0.1:1"))
    the_local_record_is_complete(tmp_path)
    assert "gsprune[app]" in caplog.text


def test_the_users_own_mlflow_settings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"MLFLOW_HTTP_REQUEST_TIMEOUT": "77", "MLFLOW_LOGGING_LEVEL": "DEBUG"})
    monkeypatch.setitem(sys.modules, "mlflow", type(sys)("mlflow"))
    mlflow_client.import_client(5.0)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def timed_run(folder: Path, uri: str) -> float:
    """Seconds that a run's tracking takes in a fresh process without the import of mlflow; its exit included."""
    code = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_tracker as t;"
        "tracker = t.MLflowTracker(sys.argv[2], tracking_uri=sys.argv[3]); tracker._connect();"
        "begin = time.time(); t.a_run(tracker); assert tracker.stopped, 'it should have stopped'; print(begin)"
    )
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent), str(folder), uri]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    done = subprocess.run(arguments, text=True, env=environment, capture_output=True, check=True)
    seconds = time.time() - float(done.stdout)
    (warning,) = done.stderr.splitlines()  # one line, and nothing from mlflow or its HTTP library
    assert warning.startswith(f"tracking to MLflow at {uri} stopped (")
    return seconds


@pytest.mark.slow
def test_a_server_that_never_answers_costs_seconds(tmp_path: Path, silent_server: str) -> None:
    seconds = timed_run(tmp_path, silent_server)
    assert 4 < seconds < 10
    the_local_record_is_complete(tmp_path)


@pytest.mark.slow
def test_a_server_that_is_not_there_costs_less(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert timed_run(tmp_path, f"http://127.0.0.1:{port}") < 5
    the_local_record_is_complete(tmp_path)


@pytest.mark.slow
def test_a_run_whose_process_was_killed_is_closed_by_another_which_makes_its_last_call(
    tmp_path: Path, database: str
) -> None:
    killed = MLflowTracker(tmp_path / "run", tracking_uri=database)
    killed.start(config={"a": 1}, tags={})
    killed._lock.release()  # as the system does
    with (tmp_path / "run" / "outbox.jsonl").open("a") as file:
        file.write('{"kind": "tags", "tags": {"b": "2"}}\n')
    MLflowTracker(tmp_path / "run", tracking_uri=database, run_id="0" * 32).close_killed()  # of another run: nothing
    client = client_of(database)
    assert client.get_run(killed.run_id).info.status == "RUNNING"
    MLflowTracker(tmp_path / "run", tracking_uri=database, run_id=killed.run_id).close_killed()
    assert client.get_run(killed.run_id).info.status == "FAILED"
    assert json.loads((tmp_path / "run" / "tracking.json").read_text())["status"] == "FAILED"
    assert client.get_run(killed.run_id).data.tags["b"] == "2"
    assert unsent(tmp_path / "run") == []


def test_a_locked_database_says_how_long_was_waited(tmp_path: Path) -> None:
    """Not the deadline, which another fault of the call has not reached."""

    def opened() -> None:
        raise TimeoutError("another program has locked the database for more than 8 s")

    file = tmp_path / "mlflow.db"
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        calls = drain.Deadlines(f"sqlite:///{file}", 10.0)
        with pytest.raises(TimeoutError, match=r"for more than 8 s$"):
            calls("start", opened)
        calls.limit = 0.1
        with pytest.raises(TimeoutError, match=r"another program has locked the database for more than 0\.1 s$"):
            calls("metrics", lambda: time.sleep(0.5))
        calls.close()


@pytest.mark.slow
def test_a_locked_database_costs_its_limit_and_one_line(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    first = MLflowTracker(tmp_path / "a", tracking_uri=database)
    first.start(config={}, tags={})  # which makes the database
    capfd.readouterr()
    monkeypatch.setattr(mlflow_client, "LOCKED", 2.5)
    with contextlib.closing(sqlite3.connect(str(database_file(database)), isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        begin, second = time.monotonic(), MLflowTracker(tmp_path / "b", tracking_uri=database, timeout_s=0.3)
        a_run(second)
        first._deadlines.limit = 2.5
        first.log_metrics({"loss": 1.0}, step=1)
        assert time.monotonic() - begin < 2 * 2.5 + 2
        other.execute("ROLLBACK")
    for tracker in (first, second):
        assert tracker.stopped is not None
        assert "another program has locked the database" in tracker.stopped
    assert [record.name for record in caplog.records] == ["gsprune.tracking.tracker"] * 2
    assert capfd.readouterr().err == ""
    the_local_record_is_complete(tmp_path / "b")


@pytest.mark.slow
def test_a_deleted_experiment_is_said_with_the_way_back(tmp_path: Path, database: str) -> None:
    client = client_of(database)
    running = MLflowTracker(tmp_path / "a", tracking_uri=database, experiment="gone")
    running.start(config={}, tags={})
    found = client.get_experiment_by_name("gone")
    client.delete_experiment(found.experiment_id)
    running.log_metrics({"loss": 1.0}, step=1)  # while it goes on
    late = MLflowTracker(tmp_path / "b", tracking_uri=database, experiment="gone")
    late.start(config={}, tags={})  # and one that begins after it
    restore = f"MLFLOW_TRACKING_URI={shlex.quote(running.tracking_uri)} mlflow experiments restore -x"
    for tracker in (running, late):
        assert tracker.stopped == (
            f"the experiment gone was deleted in MLflow: `{restore} {found.experiment_id}` brings it back, "
            "and tracking.experiment=<name> takes another"
        )
        tracker.finish("FINISHED")
    client.restore_experiment(found.experiment_id)
    again = MLflowTracker(tmp_path / "c", tracking_uri=database, experiment="gone")
    again.start(config={}, tags={})
    client.delete_run(again.run_id)
    again.log_metrics({"loss": 1.0}, step=1)
    assert f"mlflow runs restore --run-id {again.run_id}` brings it back" in str(again.stopped)


# --- a run that goes on -------------------------------------------------------------------------------------


def test_unsent_calls_of_a_killed_try_come_only_once(tmp_path):
    tracker = Tracker(tmp_path)
    tracker.start(config={}, tags={})
    for step in (1, 2, 3):
        tracker.log_metrics({"loss": step / 10}, step=step)
    events = [{"kind": "metrics", "step": step, "values": {}} for step in (1, 2, 3)]
    events = [{"kind": "start"}, *events, {"kind": "image", "step": 3}, {"kind": "artifact", "path": "a"}]
    events += [{"kind": "metrics", "step": 2, "values": {"accuracy": 1.0}}]  # as the numbers of the end come
    events += [{"kind": "finish", "status": "KILLED"}]
    lines = [*events, {"sent": [0, 2, 4, 5]}]
    (tmp_path / "outbox.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind"')
    Tracker(tmp_path).start(config={}, tags={}, rows=[{"loss": 0.1}, {"loss": 0.2}])
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0.1, 0.2]
    kept = [json.loads(line) for line in (tmp_path / "outbox.jsonl").read_text().splitlines()]
    assert kept == [events[0], events[1], events[2], events[5], {"sent": [0, 2, 3]}]


@pytest.mark.slow
def test_mlflow_gets_each_metric_and_picture_of_a_step_once(tmp_path, database):
    picture = np.zeros((4, 4, 3), np.uint8)

    def start(**more):
        tracker = MLflowTracker(tmp_path / "run", tracking_uri=database, run_id=more.pop("run_id", None))
        tracker.start(config={"a": 1}, tags={}, **more)
        return tracker

    def log(tracker, steps):
        for step in steps:
            tracker.log_metrics({"loss": step / 10, **({"late": 1.0} if step > 2 else {})}, step=step)
            tracker.log_image(picture, key="masks", step=step)

    killed = start()
    killed.log_params({"dense.source": "trained"})
    log(killed, (1, 2, 3))
    again = start(run_id=killed.run_id, rows=[{"loss": 0.1}, {"loss": 0.2}])
    again.log_params({"dense.source": "cache", "new": "1"})  # a parameter cannot change: that would be refused
    log(again, (3, 4))
    again.finish("FINISHED")
    assert (again.run_id, again.stopped) == (killed.run_id, None)
    client = client_of(database)
    assert [(m.step, m.value) for m in client.get_metric_history(again.run_id, "loss")] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (4, 0.4),
    ]
    assert [m.step for m in client.get_metric_history(again.run_id, "late")] == [3, 4]
    images = [Path(file.path).name for file in client.list_artifacts(again.run_id, "images")]
    assert sorted(re.split("[+%]", name)[2] for name in images if name.endswith(".png")) == ["1", "2", "3", "4"]
    assert client.get_run(again.run_id).data.params == {"a": "1", "dense.source": "trained", "new": "1"}
