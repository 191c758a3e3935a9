"""A disk that fills up: what a job says, what it keeps, how it ends."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from jobs import configure, train
from servers import fill, small_disk

from gsprune.app import job as room
from gsprune.app.output_dir import finished_in_sweep
from gsprune.files.disk import spared, write_json
from gsprune.formats.masks import load_masks, save_masks
from gsprune.settings.identity import config_hash
from gsprune.sweeps.callback import _OpenSweep
from gsprune.sweeps.sweep_dir import Sweep
from gsprune.tracking.tracker import Tracker, read_metrics

FULL = "No space left on device"


def finished(folder: Path, *overrides: str) -> dict[str, Any]:
    return jobs.finished(folder, "trainer.latency_repeats=0", *overrides)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    try:
        with small_disk(tmp_path / "disk", megabytes=0.5) as folder:
            yield folder
    except PermissionError as error:
        pytest.skip(f"no small disk can be mounted here: {error}")


def refusing(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """`aside`, through which whole files are written, finds the disk full for files of these names."""
    from gsprune.files import disk as files

    real = files._flush

    def flush(path: Path) -> None:
        if any(path.name.startswith(f".{name}.") for name in names):
            raise OSError(errno.ENOSPC, FULL, str(path))
        real(path)

    monkeypatch.setattr(files, "_flush", flush)


# --- one file ----------------------------------------------------------------------------------------------


def test_a_file_that_can_be_spared_is_said_once_and_listed_until_it_is_written(
    caplog: pytest.LogCaptureFixture,
) -> None:
    unwritten: list[str] = []
    for _ in range(2):
        with spared("a.png", unwritten):
            raise OSError(errno.ENOSPC, FULL)
    assert unwritten == ["a.png"]
    assert [record.getMessage() for record in caplog.records] == [
        f"a.png could not be written, the run goes on without it: {FULL}"
    ]
    with pytest.raises(ValueError, match="ours"), spared("a.png", unwritten):
        raise ValueError("ours")
    with spared("a.png", unwritten):
        pass
    assert unwritten == []


def test_a_full_disk_keeps_the_last_good_file_and_leaves_no_half(disk: Path) -> None:
    masks = {"w": torch.ones(80_000, dtype=torch.bool)}
    save_masks(disk / "masks.safetensors", masks)
    write_json(disk / "result.json", {"status": "running"})
    filler = fill(disk, leave=4096)
    with pytest.raises(OSError, match=FULL) as error:
        save_masks(disk / "masks.safetensors", {"w": ~masks["w"]})  # in a class of its own from safetensors
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match=FULL):
        write_json(disk / "result.json", {"status": "x" * 10_000})
    assert sorted(path.name for path in disk.iterdir()) == ["filler", "masks.safetensors", "result.json"]
    assert load_masks(disk / "masks.safetensors")["w"].all()
    assert json.loads((disk / "result.json").read_text()) == {"status": "running"}
    filler.unlink()


def test_metrics_that_found_no_room_are_written_when_there_is_some(
    disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(disk)
    tracker.start(config={"a": 1}, tags={})
    tracker.log_metrics({"loss": 0.0}, step=0)
    filler = fill(disk)
    for step in range(1, 200):
        tracker.log_metrics({"loss": step / 10}, step=step)
    written = len(read_metrics(disk / "metrics.jsonl"))
    assert 1 <= written < 200
    assert (disk / "metrics.jsonl").read_bytes().endswith(b"\n")  # no half line
    assert tracker.unwritten == ["metrics.jsonl"]
    filler.unlink()
    tracker.finish("FINISHED")
    assert tracker.unwritten == []
    rows = read_metrics(disk / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(step, step / 10) for step in range(200)]
    (record,) = caplog.records
    assert record.getMessage() == f"metrics.jsonl could not be written, the run goes on without it: {FULL}"


# --- a job -------------------------------------------------------------------------------------------------

SPARE = ("epoch_0002.safetensors", "dense.safetensors", "scores.safetensors", "history.png", "masks.safetensors")


def test_a_job_goes_on_without_what_it_can_spare_and_lists_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refusing(monkeypatch, *SPARE)
    (tmp_path / "figures").mkdir()
    result = finished(tmp_path, "pruner=elementwise")
    lost = [
        *("checkpoint/dense.safetensors", "checkpoint/scores.safetensors", "masks/epoch_0002.safetensors"),
        *("masks.safetensors", "figures/history.png"),
    ]
    assert result["unwritten"] == lost
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert result["status"] == "finished"
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [text.partition(";")[0] for text in said] == [
        f"{name} could not be written, the run goes on without it: {FULL}" for name in lost
    ]
    assert [name for name, text in zip(lost, said, strict=True) if "again" in text] == lost[:3]
    assert not [path for path in tmp_path.rglob("*") if path.name in SPARE or path.suffix == ".tmp"]
    assert (tmp_path / "model.safetensors").is_file()
    assert (tmp_path / "masks" / "epoch_0003.safetensors").is_file()


def test_what_was_not_written_is_not_sent_even_if_an_old_one_lies_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "masks.safetensors").write_bytes(b"of an earlier run")
    refusing(monkeypatch, "masks.safetensors")
    sent = []
    monkeypatch.setattr(Tracker, "log_artifact", lambda self, path, **_: sent.append(Path(path).name))
    finished(tmp_path, "pruner=elementwise")
    assert (tmp_path / "masks.safetensors").read_bytes() == b"of an earlier run"
    assert "masks.safetensors" not in sent
    assert {"model.safetensors", "result.json", "epoch_0003.safetensors"} <= set(sent)


def test_a_plan_that_cannot_be_written_was_printed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    refusing(monkeypatch, "plan.json")
    room.show_plan(configure("pruner=weighted"), output_dir=tmp_path)
    assert "Weighted removes units" in capsys.readouterr().out
    assert [record.getMessage() for record in caplog.records] == [
        f"plan.json could not be written, the run goes on without it: {FULL}"
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_need_not_be_done_again_needs_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = configure("pruner=weighted")
    done = {"status": "finished", "accuracy": 0.5, "config_hash": config_hash(cfg)}
    write_json(tmp_path / "0" / "result.json", done)
    refusing(monkeypatch, "result.json")
    assert finished_in_sweep(cfg, tmp_path / "1", Sweep(tmp_path)) == done
    assert caplog.records[-1].getMessage() == f"result.json could not be written, the run goes on without it: {FULL}"


@pytest.mark.parametrize("name", ["sweep.json", "report.html"])
def test_a_sweep_without_its_record_or_report_is_closed_all_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_json(tmp_path / "0" / "result.json", {"status": "finished", "accuracy": 0.5})
    refusing(monkeypatch, name)
    opened, ended = _OpenSweep(Sweep(tmp_path), report=True), []
    monkeypatch.setattr(Tracker, "finish", lambda self, status: ended.append(status))
    opened._record, opened._tracker = {"command": "x"}, Tracker(tmp_path / ".gsprune")
    assert opened.lock.acquire()
    opened.close("finished")
    assert ended == ["FINISHED"]
    told = "no report of the sweep: " if name == "report.html" else f"{name} could not be written, the run goes on"
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage().startswith(told)
    assert FULL in record.getMessage()
    assert record.exc_info is None
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pruning.json"])
def test_a_job_whose_model_cannot_be_written_has_failed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refusing(monkeypatch, name)
    sentence = (
        f"the model could not be written to {tmp_path}: {FULL}; once there is room, the same command with "
        f"hydra.run.dir={tmp_path} resumes from the newest checkpoint"
    )
    with pytest.raises(ValueError) as error:  # noqa: PT011
        finished(tmp_path)
    assert str(error.value) == sentence
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["error"]) == ("failed", f"ValueError: {sentence}")
    assert result["unwritten"] == ["model.safetensors"]
    assert [message for message in caplog.messages if "about to collapse" not in message] == []


@pytest.mark.slow
def test_a_disk_that_fills_up_under_a_run_ends_as_it_should(disk: Path, tmp_path: Path) -> None:
    """The command itself: the model still fits, then it does not."""
    tiny = (
        *("model.width=4", "dataset.batch_size=256", "trainer.device=cpu", "trainer.dense_epochs=1"),
        *("trainer.prune_epochs=2", "trainer.latency_repeats=0", "trainer.progress=none", "tracking=none"),
    )
    filler = fill(disk, leave=200 * 1024)  # the last picture needs 84 kB
    done = train(tmp_path, *tiny, f"hydra.run.dir={disk}/small")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    result = json.loads((disk / "small" / "result.json").read_text())
    assert result["status"] == "finished"
    assert "figures/history.png" in result["unwritten"]
    assert f"history.png could not be written, the run goes on without it: {FULL}" in done.stdout
    assert (disk / "small" / "model.safetensors").is_file()
    filler.unlink()
    fill(disk, leave=28 * 1024)
    done = train(tmp_path, *tiny, f"hydra.run.dir={disk}/none")
    assert done.returncode == 1
    assert f"the model could not be written to {disk}/none: {FULL}" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not list(disk.rglob("*.tmp"))
