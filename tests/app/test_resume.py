"""Jobs that are interrupted, killed or find damaged checkpoints end with the bits of one that was left alone."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from jobs import ROOT, TINY, configure
from kills import differences
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import gsprune
from gsprune.app import job as job_module
from gsprune.app import output_dir
from gsprune.app.console import Progress
from gsprune.app.job import run
from gsprune.files import disk
from gsprune.files.locks import Lock
from gsprune.settings.identity import config_hash, dense_key
from gsprune.sweeps.record import Sweep
from gsprune.tracking.tracker import MLflowTracker, Tracker, read_metrics
from gsprune.training.checkpoints import RECORD, TENSORS, Checkpoints
from gsprune.training.guard import BadNumbers
from gsprune.training.signals import Interrupted, Stop
from gsprune.training.trainer import Trainer

WEIGHTED = ("pruner=weighted", "trainer.latency_repeats=0")


def go(folder, *overrides):
    with redirect_stdout(io.StringIO()):
        return run(configure(*WEIGHTED, *overrides), output_dir=folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    go(folder)
    return folder


class AtStep:
    """Does something at the n-th optimizer step of a job; a job has 15 here, 5 in each of 3 epochs."""

    def __init__(self, monkeypatch):
        self.count, self.plan, self.place = 0, {}, None
        fit = Trainer.fit

        def counted(trainer, *args, pruner, on_rest, **settings):
            def rest(at):
                before, self.place = self.place, (pruner, at.epoch, at.step)
                if at.step and self.place != before:  # a rest while it validates is at the same place
                    self.count += 1
                    self.plan.get(self.count, lambda: None)()
                on_rest(at)

            fit(trainer, *args, pruner=pruner, on_rest=rest, **settings)

        monkeypatch.setattr(Trainer, "fit", counted)

    def do(self, number, action):
        self.count, self.plan, self.place = 0, {number: action}, None


@pytest.fixture
def at_step(monkeypatch):
    return AtStep(monkeypatch)


class Crash(Exception):
    """Whatever may end a run."""


def crash():
    raise Crash("gone")


def names(folder):
    return [path.name for path in Checkpoints(folder / "checkpoint").paths()]


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


# --- checkpoints --------------------------------------------------------------------------------------------


def test_a_run_keeps_the_checkpoints_of_its_last_two_epochs(whole):
    assert names(whole) == ["epoch_0002_step_000000", "epoch_0003_step_000000"]
    for name in names(whole):
        assert sorted(os.listdir(whole / "checkpoint" / name)) == [RECORD, TENSORS]


def test_after_bad_numbers_a_job_goes_on_also_with_more_patience(tmp_path, whole, at_step, monkeypatch):
    loss_sum, bad = Trainer.loss_sum, []

    def spoiled(trainer, forward, batch):
        loss, *others = loss_sum(trainer, forward, batch)
        return (loss * float("nan") if bad else loss), *others

    monkeypatch.setattr(Trainer, "loss_sum", spoiled)
    at_step.do(8, lambda: bad.append(True))
    with pytest.raises(BadNumbers, match=r"^2 steps in a row .* first that of 'stem.weight' \(nan\), "):
        go(tmp_path, "trainer.max_bad_steps=1")
    assert result_of(tmp_path)["error"].startswith("BadNumbers: 2 steps in a row")
    assert names(tmp_path)[-1] == "epoch_0001_step_000000"
    at_step.do(0, crash)
    bad.clear()
    go(tmp_path, "trainer.max_bad_steps=2")  # of which no number of the result depends
    assert at_step.count == 10
    assert list(differences(whole, tmp_path)) == ["config.yaml differs"]


@pytest.mark.parametrize(("minutes", "place"), [("null", "epoch_0001_step_000000"), ("0", "epoch_0001_step_000002")])
def test_after_a_crash_a_job_goes_on_where_the_last_checkpoint_is(tmp_path, whole, at_step, caplog, minutes, place):
    at_step.do(8, crash)
    with pytest.raises(Crash):
        go(tmp_path, f"trainer.checkpoint_minutes={minutes}")
    assert names(tmp_path)[-1] == place
    assert result_of(tmp_path)["status"] == "failed"
    at_step.do(0, crash)
    with caplog.at_level(logging.INFO):
        go(tmp_path)
    assert f"resuming from the checkpoint {tmp_path / 'checkpoint' / place}" in caplog.text
    assert at_step.count == (10 if minutes == "null" else 8)
    assert list(differences(whole, tmp_path)) == []


def test_a_crash_in_the_dense_phase_or_right_after_training_is_made_good_too(tmp_path, whole, at_step, monkeypatch):
    at_step.do(3, crash)
    with pytest.raises(Crash):
        go(tmp_path, "trainer.checkpoint_minutes=0")
    at_step.do(0, crash)
    with monkeypatch.context() as patched:
        patched.setattr(job_module, "write_files", lambda *_, **__: crash())
        with pytest.raises(Crash):
            go(tmp_path)
    assert at_step.count == 13
    at_step.do(0, crash)
    go(tmp_path)
    assert at_step.count == 0  # only what comes after training is done again
    assert list(differences(whole, tmp_path)) == []


def test_settings_of_checkpoints_change_no_result():
    plain = configure(*WEIGHTED)
    other = configure(*WEIGHTED, "trainer.resume=never", "trainer.checkpoint_minutes=null")
    assert config_hash(plain) == config_hash(other)
    assert dense_key(plain) == dense_key(other)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.resume=always", "trainer.resume=always is not allowed: it must be one of auto, never"),
        (
            "trainer.checkpoint_minutes=-1.0",
            "trainer.checkpoint_minutes=-1.0 is not allowed: it must be 0 or more, or null",
        ),
    ],
)
def test_a_wrong_setting_is_one_sentence(tmp_path, override, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        go(tmp_path, override)


def test_a_checkpoint_that_cannot_be_written_costs_a_warning(tmp_path, whole, monkeypatch, caplog):
    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "write", full)
    go(tmp_path)
    (told,) = [text for text in caplog.messages if text.startswith("checkpoint could not be written")]
    assert "No space left on device" in told
    assert told.endswith("it will start anew")  # there is no other checkpoint
    assert result_of(tmp_path)["unwritten"] == ["checkpoint"]
    assert list(differences(whole, tmp_path)) == ["result.json differs"]


# --- what is gone on from -----------------------------------------------------------------------------------


@pytest.fixture
def crashed(tmp_path, at_step):
    """A run that has crashed in its third epoch, with the checkpoints of the first two."""
    tmp_path /= "run"
    at_step.do(12, crash)
    with pytest.raises(Crash):
        go(tmp_path)
    assert names(tmp_path) == ["epoch_0001_step_000000", "epoch_0002_step_000000"]
    at_step.do(0, crash)
    return tmp_path


def damage(path):
    path.write_bytes(path.read_bytes()[:-30])


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(crashed, whole, at_step, caplog):
    damage(crashed / "checkpoint" / "epoch_0002_step_000000" / TENSORS)
    go(crashed)
    assert "epoch_0002_step_000000 is damaged and set aside as damaged-epoch_0002_step_000000, the one" in caplog.text
    assert at_step.count == 10
    only = [f"checkpoint/damaged-epoch_0002_step_000000/{name} is in one only" for name in (RECORD, TENSORS)]
    assert list(differences(whole, crashed)) == only


def test_with_both_damaged_the_run_starts_anew_and_says_so(crashed, whole, at_step, caplog):
    for name in names(crashed):
        damage(crashed / "checkpoint" / name / RECORD)
    go(crashed)
    assert "epoch_0001_step_000000, no other is left, and the run starts anew: " in caplog.text
    assert at_step.count == 15
    left = [text for text in differences(whole, crashed) if not text.startswith("checkpoint/damaged-")]
    kept = ("figures/masks/0002.png", "masks/epoch_0002.safetensors")
    assert left == [f"earlier-{name} is in one only" for name in kept]


def replaced(dense):
    save_file({name: tensor + 1 for name, tensor in load_file(dense).items()}, dense)
    return "has changed since the checkpoint was written: its sha256 differs"


def moved(dense):
    os.rename(dense, dense.with_name("kept"))
    return "the dense network of the checkpoint, is not there"


@pytest.mark.parametrize("happens", [replaced, moved])
def test_a_checkpoint_waits_for_its_dense_network(crashed, whole, at_step, happens):
    dense = crashed / "checkpoint" / "dense.safetensors"
    right = dense.read_bytes()
    told = happens(dense)
    with pytest.raises(ValueError, match=rf"epoch_0002_step_000000 cannot be used now, and is kept: {dense},? {told}"):
        go(crashed)
    assert names(crashed) == ["epoch_0001_step_000000", "epoch_0002_step_000000"]
    dense.write_bytes(right)
    dense.with_name("kept").unlink(missing_ok=True)
    go(crashed)
    assert at_step.count == 5
    assert list(differences(whole, crashed)) == []


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError()])
def test_a_run_whose_checkpoint_cannot_be_read_just_now_is_refused_and_goes_on_later(
    crashed, whole, at_step, monkeypatch, error
):
    def unreadable(path):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("gsprune.training.checkpoints.sha256", unreadable)
        with pytest.raises(ValueError, match="epoch_0002_step_000000 cannot be used now, and is kept: "):
            go(crashed)
    assert names(crashed) == ["epoch_0001_step_000000", "epoch_0002_step_000000"]
    go(crashed)
    assert at_step.count == 5
    assert list(differences(whole, crashed)) == []


def test_a_finished_run_whose_result_cannot_be_read_just_now_is_not_done_again(crashed, monkeypatch):
    go(crashed)
    left = {path: path.read_bytes() for path in crashed.rglob("*") if path.is_file()}
    read = Path.read_bytes

    def unreadable(path):
        if path.name == "result.json":
            raise OSError(5, "Input/output error", str(path))
        return read(path)

    for sweep in (None, Sweep(crashed.parent)):
        with monkeypatch.context() as patched:
            patched.setattr(Path, "read_bytes", unreadable)
            patched.setattr(job_module, "current_sweep", lambda sweep=sweep: sweep)
            with pytest.raises(ValueError, match=r"result.json cannot be read \(Input/output error\)$"):
                go(crashed)
        assert {path: path.read_bytes() for path in crashed.rglob("*") if path.is_file()} == left


@pytest.mark.parametrize("lasts", [3, 99])
def test_a_dense_network_that_found_no_room_costs_nothing(tmp_path, whole, at_step, monkeypatch, caplog, lasts):
    """It is written by a later checkpoint; one that is written before carries it."""
    flush, tried = disk._flush, []

    def full(path):
        if path.name.startswith(".dense.safetensors."):
            tried.append(path)
            if len(tried) <= lasts:
                raise OSError(28, "No space left on device")
        flush(path)

    with monkeypatch.context() as patched:
        patched.setattr(disk, "_flush", full)
        at_step.do(12, crash)
        with pytest.raises(Crash):
            go(tmp_path, "trainer.checkpoint_minutes=0")
    dense = tmp_path / "checkpoint" / "dense.safetensors"
    assert dense.exists() == (lasts == 3)
    (told,) = [text for text in caplog.messages if "could not be written" in text]
    assert told.startswith(
        "checkpoint/dense.safetensors could not be written, the run goes on without it: No space left"
    )
    assert "checkpoints hold it" in told
    assert Checkpoints(dense.parent).newest().state["dense_model"] is None or lasts == 99
    at_step.do(0, crash)
    go(tmp_path)
    assert at_step.count == 4
    assert result_of(tmp_path)["unwritten"] == []
    assert list(differences(whole, tmp_path)) == []


def test_a_dense_network_that_somebody_removes_meanwhile_is_written_again(tmp_path, whole, at_step):
    at_step.do(7, (tmp_path / "checkpoint" / "dense.safetensors").unlink)
    go(tmp_path)
    assert list(differences(whole, tmp_path)) == []


def test_a_run_of_another_configuration_is_not_lost_by_mistake(crashed, at_step):
    message = (
        f"{crashed} holds an unfinished run of another configuration (optimizer.lr 0.05 to 0.5, seed 0 to 1): give the "
        f"same one to resume it, trainer.resume=never to write over it, or another hydra.run.dir"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        go(crashed, "seed=1", "optimizer.lr=0.5", "trainer.progress=lines")
    assert names(crashed) == ["epoch_0001_step_000000", "epoch_0002_step_000000"]
    go(crashed, "seed=1", "trainer.resume=never")
    assert at_step.count == 15


def test_other_threads_and_versions_go_on_and_what_differs_is_named(crashed, whole, at_step, monkeypatch, caplog):
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    monkeypatch.setattr("gsprune.settings.identity.__version__", "9.9.9")
    go(crashed)
    told = f"resuming, but not bit for bit: threads {threads} to {threads + 1}, gsprune {gsprune.__version__} to 9.9.9"
    assert told in caplog.messages
    assert at_step.count == 5


def warnings_of_the_run(caplog):
    """But for the forecast, which tells of every network as narrow as that of these tests."""
    warned = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    return [message for message in warned if "about to collapse" not in message]


def test_on_the_same_machine_nothing_is_said(crashed, whole, caplog):
    caplog.clear()
    go(crashed)
    assert warnings_of_the_run(caplog) == []


def test_a_refusal_names_code_that_was_edited_and_no_value_from_the_environment(tmp_path, monkeypatch):
    (tmp_path / "code").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    net = tmp_path / "code" / "net_of_resume.py"
    net.write_text("from gsprune.zoo.models import convnet\n")
    monkeypatch.setenv("SECRET_OF_THIS_TEST", "old-canary")
    cfg = configure(*WEIGHTED, "model._target_=net_of_resume.convnet")
    OmegaConf.update(cfg, "dataset.key", "${oc.env:SECRET_OF_THIS_TEST}", force_add=True)
    before, folder = output_dir.readable_settings(cfg), tmp_path / "run"
    disk.write_json(folder / output_dir.SETTINGS, before)
    net.write_text("from gsprune.zoo.models import convnet  # edited\n")
    monkeypatch.setenv("SECRET_OF_THIS_TEST", "new-canary")
    told = output_dir.other_configuration(folder, cfg, unfinished=True)
    assert re.search(r"[(]code of net_of_resume.convnet \w{12} to \w{12}[)]", told)
    disk.write_json(folder / output_dir.SETTINGS, output_dir.readable_settings(cfg))
    told = output_dir.other_configuration(folder, cfg, unfinished=True)
    assert "(of a value that is taken from elsewhere)" in told
    assert "canary" not in told + (folder / output_dir.SETTINGS).read_text()
    (folder / output_dir.SETTINGS).unlink()
    assert "(which settings differ is not on record)" in output_dir.other_configuration(folder, cfg, unfinished=True)


def test_in_a_sweep_which_numbers_its_jobs_anew_another_job_starts_anew(crashed, at_step, monkeypatch):
    monkeypatch.setattr(job_module, "current_sweep", lambda: Sweep(crashed.parent))
    go(crashed, "seed=1")
    assert at_step.count == 15


def test_a_checkpoint_of_a_job_that_an_extended_sweep_numbers_anew_goes_with_it(crashed, whole, at_step, monkeypatch):
    sweep = crashed.parent
    os.rename(crashed, sweep / "0")
    monkeypatch.setattr(job_module, "current_sweep", lambda: Sweep(sweep))
    go(sweep / "0", "seed=1")
    (aside,) = sweep.glob("0-*")
    assert names(aside) == ["epoch_0001_step_000000", "epoch_0002_step_000000"]
    at_step.do(0, crash)
    go(sweep / "1")
    assert at_step.count == 5
    assert not aside.exists()
    assert list(differences(whole, sweep / "1")) == []


@pytest.mark.parametrize("record", [None, '{"status": "running", "config_hash": null}', '{"status": "fini'])
def test_it_goes_with_it_too_if_the_record_of_whose_it_is_was_lost(crashed, at_step, monkeypatch, record):
    """A try that is killed right at its start leaves a result of nobody's."""
    sweep = crashed.parent
    os.rename(crashed, sweep / "0")
    monkeypatch.setattr(job_module, "current_sweep", lambda: Sweep(sweep))
    (sweep / "0" / "result.json").unlink() if record is None else (sweep / "0" / "result.json").write_text(record)
    go(sweep / "0", "seed=1")
    (aside,) = sweep.glob("0-*")
    assert names(aside) == ["epoch_0001_step_000000", "epoch_0002_step_000000"]
    at_step.do(0, crash)
    go(sweep / "1")
    assert at_step.count == 5


def test_a_checkpoint_in_a_folder_where_another_job_is_going_on_stays_there(crashed, at_step, monkeypatch):
    sweep = Sweep(crashed.parent)
    monkeypatch.setattr(job_module, "current_sweep", lambda: sweep)
    with sweep.lock(f"job {crashed.name}").held(waiting_for="nothing"):
        go(sweep.directory / "1")
    assert at_step.count == 15
    assert names(crashed) == ["epoch_0001_step_000000", "epoch_0002_step_000000"]


def test_a_run_that_was_killed_while_it_told_mlflow_of_its_end_goes_on_there(crashed, whole, at_step):
    go(crashed)
    (crashed / "tracking.json").write_text(json.dumps({"status": "RUNNING", "run_id": None}))
    assert result_of(crashed)["status"] == "finished"
    at_step.do(0, crash)
    go(crashed)
    assert at_step.count == 0
    (crashed / "tracking.json").unlink()
    assert list(differences(whole, crashed)) == []


def test_a_directory_can_be_moved_in_between(crashed, whole, at_step):
    moved = crashed.rename(crashed.with_name("elsewhere"))
    go(moved)
    assert at_step.count == 5
    assert list(differences(whole, moved)) == []


def test_never_starts_anew(crashed, whole, at_step):
    go(crashed, "trainer.resume=never")
    assert at_step.count == 15
    assert list(differences(whole, crashed)) == ["config.yaml differs"]  # which has that setting


def test_a_run_that_has_finished_is_kept_and_not_done_again(crashed, at_step, caplog):
    done = go(crashed)
    at_step.do(0, crash)
    left = {path: path.read_bytes() for path in crashed.rglob("*") if path.is_file()}
    (crashed / f".result.json.{'0' * 32}.tmp").write_text("{")  # of a kill in the last write
    with caplog.at_level(logging.INFO):
        assert go(crashed, "trainer.progress=bar") == json.loads(json.dumps(done))
    assert f"not run again: {crashed} has finished with the same configuration" in caplog.text
    message = (
        f"{crashed} holds a finished run of another configuration (seed 0 to 1): give trainer.resume=never to "
        f"write over it, or another hydra.run.dir"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        go(crashed, "seed=1")
    assert at_step.count == 0
    assert {path: path.read_bytes() for path in crashed.rglob("*") if path.is_file()} == left
    go(crashed, "seed=1", "trainer.resume=never")
    assert at_step.count == 15


def test_a_network_that_holds_inf_is_no_checkpoint(tmp_path, whole, at_step, monkeypatch, caplog):
    models = []
    place = Trainer.place
    monkeypatch.setattr(Trainer, "place", lambda self, model: models.append(place(self, model)) or models[-1])
    at_step.do(7, lambda: models[0].get_buffer("stem_bn.running_var").fill_(math.inf))  # gradients stay finite
    at_step.plan[12] = crash
    with pytest.raises(Crash):
        go(tmp_path)
    assert "no checkpoint was written, those before it stay: stem_bn.running_var holds nan or inf" in caplog.text
    assert names(tmp_path)[-1] == "epoch_0001_step_000000"
    at_step.do(0, crash)
    go(tmp_path)
    assert list(differences(whole, tmp_path)) == []


def test_a_run_killed_right_after_its_result_lacks_nothing(tmp_path, whole, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Tracker, "finish", lambda *_: crash())
        patched.setattr(job_module, "fail", lambda *_: None)
        with pytest.raises(Crash):
            go(tmp_path)
    go(tmp_path)
    assert list(differences(whole, tmp_path)) == []


def test_seconds_are_those_of_all_tries(crashed):
    spent = Checkpoints(crashed / "checkpoint").newest().state["job"]["seconds"]
    go(crashed)
    assert all(result_of(crashed)["timings"][part] > seconds for part, seconds in spent.items() if part != "files")


def test_a_checkpoint_that_is_whole_and_does_not_fit_is_one_sentence(crashed):
    checkpoints = Checkpoints(crashed / "checkpoint")
    state = checkpoints.newest().state
    state["optimizer"]["param_groups"] = []
    checkpoints.write(state, epoch=2, step=0)
    with pytest.raises(
        ValueError, match=r"epoch_0002_step_000000 does not fit this job \(ValueError: loaded state dict"
    ):
        go(crashed)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("job", "rows", [3]),
        ("job", "seconds", {"train": 1.0}),
        ("job", "cost", None),
        ("loop", "step", "1"),
        ("loop", "random", None),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_and_kept(crashed, part, key, value):
    checkpoints = Checkpoints(crashed / "checkpoint")
    state = checkpoints.newest().state
    state[part][key] = value
    checkpoints.write(state, epoch=2, step=0)
    with pytest.raises(
        ValueError, match="epoch_0002_step_000000 cannot be used now, and is kept: it was not written by a run"
    ):
        go(crashed)
    assert len(names(crashed)) == 2


def test_metrics_of_a_killed_try_are_dropped_and_a_torn_line_with_them(crashed, whole):
    record = crashed / "metrics.jsonl"
    lines = record.read_text().splitlines(keepends=True)
    assert len(lines) == 2
    record.write_text("".join(lines) + '{"step": 3, "time": 1.0, "train/loss": 99.0}\n{"step": 3, "tra')
    go(crashed)
    assert list(differences(whole, crashed)) == []
    assert record.read_text().splitlines(keepends=True)[:2] == lines  # with their time and seconds


def test_metrics_that_were_lost_come_back_from_the_checkpoint(crashed, whole):
    (crashed / "metrics.jsonl").unlink()
    go(crashed)
    assert list(differences(whole, crashed)) == []


# --- one run in one directory -------------------------------------------------------------------------------


IN_USE = "is in use by another run: wait for its end, or give another hydra.run.dir"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_run_in_the_directory_of_one_that_goes_on_is_refused_and_changes_nothing(
    tmp_path, at_step, monkeypatch, processes
):
    said, before = [], []

    def second():
        before.append({path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()})
        with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))} {IN_USE}$") as caught:
            go(tmp_path, f"trainer.devices={processes}", "tracking=none")
        said.append(str(caught.value))
        before.append({path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()})

    monkeypatch.setattr(output_dir, "LEAVING", 0.1)
    at_step.do(3, second)
    go(tmp_path)
    assert len(said) == 1
    assert before[0] == before[1]
    at_step.do(0, crash)
    go(tmp_path, "trainer.resume=never")  # it is free again
    assert at_step.count == 15


def test_what_a_killed_process_leaves_behind_for_a_moment_is_waited_for(tmp_path, monkeypatch):
    left = os.open(tmp_path / output_dir.LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(left, fcntl.LOCK_EX)
    timer, acquire = threading.Timer(0.3, os.close, [left]), Lock.acquire

    def tried(lock, **patience):
        timer.start()
        return acquire(lock, **patience)

    monkeypatch.setattr(Lock, "acquire", tried)
    go(tmp_path)
    timer.join()
    assert result_of(tmp_path)["status"] == "finished"


# --- signals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_writes_a_checkpoint_and_ends_with_its_code(
    tmp_path, whole, at_step, caplog, signum, code
):
    before = signal.getsignal(signum)
    at_step.do(7, lambda: signal.raise_signal(signum))
    with pytest.raises(Interrupted) as caught:
        go(tmp_path)
    assert caught.value.code == code
    assert signal.getsignal(signum) is before
    assert names(tmp_path) == ["epoch_0001_step_000000", "epoch_0001_step_000002"]
    result = result_of(tmp_path)
    assert (result["status"], result["error"]) == ("interrupted", f"Interrupted: stopped by {signum.name}")
    again = f"the same command with hydra.run.dir={tmp_path} resumes from the newest checkpoint"
    assert warnings_of_the_run(caplog) == [again]
    at_step.do(0, crash)
    go(tmp_path)
    assert at_step.count == 8
    assert list(differences(whole, tmp_path)) == []


def test_a_second_signal_does_not_wait(tmp_path, monkeypatch):
    seen = []

    def twice(self, totals):
        signal.raise_signal(signal.SIGINT)
        seen.append("after the first")
        signal.raise_signal(signal.SIGINT)
        seen.append("after the second")

    monkeypatch.setattr(Progress, "on_step", twice)
    with pytest.raises(Interrupted):
        go(tmp_path)
    assert seen == ["after the first"]
    assert names(tmp_path) == []


def test_how_to_resume_is_said_as_it_is(tmp_path):
    cfg, sweep = configure("trainer.resume=never"), Sweep(tmp_path)
    command = f"the same command with hydra.run.dir={tmp_path}"
    assert output_dir.resume_hint(cfg, tmp_path, None) == f"{command} starts anew: there is no checkpoint yet"
    Checkpoints(tmp_path / "checkpoint").write({}, epoch=1, step=0)
    told = "without trainer.resume=never resumes from the newest checkpoint"
    assert output_dir.resume_hint(cfg, tmp_path, None) == f"{command} and {told}"
    again = "the same command with sweep.resume=true resumes from the newest checkpoint"
    assert output_dir.resume_hint(configure(), tmp_path, sweep) == again


def test_outside_of_training_a_signal_ends_the_run_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "measure", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted):
        go(tmp_path)
    assert result_of(tmp_path)["status"] == "interrupted"
    assert names(tmp_path)[-1] == "epoch_0003_step_000000"


def test_a_signal_while_it_validates_does_not_wait_for_the_end_of_it(tmp_path, whole, at_step, monkeypatch):
    evaluate = Trainer._evaluate

    def signalled(self, model, forward, loader):
        def seen():
            for batch in loader:
                signal.raise_signal(signal.SIGTERM)
                yield batch

        return evaluate(self, model, forward, seen())

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_evaluate", signalled)
        with pytest.raises(Interrupted):
            go(tmp_path)
    assert names(tmp_path) == ["epoch_0000_step_000005"]
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    at_step.do(0, crash)
    go(tmp_path)
    assert at_step.count == 1 + 10  # first it validates
    assert list(differences(whole, tmp_path)) == []


def test_the_exit_of_a_worker_process_reaches_its_parent_as_it_was():
    again = pickle.loads(pickle.dumps(Interrupted(signal.SIGINT)))
    assert (again.code, str(again)) == (130, "stopped by SIGINT")


def test_signals_are_left_alone_where_they_are_ignored_and_in_other_threads():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop.signum == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    handlers = []

    def elsewhere():
        with Stop():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert handlers == [before]


def test_a_signal_right_after_the_last_step_is_not_lost():
    with pytest.raises(Interrupted), Stop() as stop, stop.deferred():
        signal.raise_signal(signal.SIGTERM)


# --- tracking -----------------------------------------------------------------------------------------------


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
def test_mlflow_gets_each_metric_and_picture_of_a_step_once(tmp_path):
    import numpy as np
    from mlflow import MlflowClient

    uri, picture = f"sqlite:///{tmp_path / 'mlflow.db'}", np.zeros((4, 4, 3), np.uint8)

    def start(**more):
        tracker = MLflowTracker(tmp_path / "run", tracking_uri=uri, run_id=more.pop("run_id", None))
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
    client = MlflowClient(tracking_uri=uri)
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


# --- whole processes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [pytest.param(8, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_random_moments_a_run_ends_with_the_same_bits(kills):
    """Also inside the write of a checkpoint; what is compared, and how, is in kills.py."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"python tests/kills.py --count {kills} --seed {seed}")  # shown when it fails
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "kills.py"), "--count", str(kills), "--seed", str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    tried = json.loads(done.stdout.splitlines()[-1])
    assert (tried["kills"], tried["differences"]) == (kills, [])
    if kills == 20:  # a few may all fall elsewhere
        assert tried["inside_write"] > 0
        assert tried["continued"] > 0


def started(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *arguments, *TINY, *WEIGHTED, "trainer.dense_epochs=60"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


def signalled(process, folder, signum, *, after):
    """Send a signal once the checkpoint of epoch `after` is there; returns code and output."""
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end and not any(name >= after for name in names(folder)):
        time.sleep(0.01)
    process.send_signal(signum)
    output = process.communicate(timeout=120)[0]
    return process.returncode, output


@pytest.mark.long
def test_train_py_ends_with_the_code_of_the_signal_and_goes_on_with_the_same_command(tmp_path):
    here = ("hydra.run.dir=out",)
    code, output = signalled(started(tmp_path, *here), tmp_path / "out", signal.SIGTERM, after="epoch_0003")
    assert code == 143, output
    assert "Traceback" not in output
    assert f"the same command with hydra.run.dir={tmp_path / 'out'} resumes from the newest checkpoint" in output
    code, output = signalled(started(tmp_path, *here), tmp_path / "out", signal.SIGINT, after="epoch_0020")
    assert code == 130, output
    assert "Traceback" not in output
    assert "resuming from the checkpoint" in output
    last = started(tmp_path, *here)
    output = last.communicate(timeout=120)[0]
    assert last.returncode == 0, output
    alone = go(tmp_path / "alone", "trainer.dense_epochs=60")
    result = result_of(tmp_path / "out")
    same = ("config_hash", "loss", "baseline_loss", "accuracy", "sparsity", "updates")
    assert {name: result[name] for name in same} == {name: alone[name] for name in same}


@pytest.mark.long
def test_a_job_of_a_sweep_that_was_killed_midway_goes_on_from_its_checkpoint(tmp_path):
    sweep = ("--multirun", "seed=0,1", "hydra.sweep.dir=sweep")
    code, output = signalled(started(tmp_path, *sweep), tmp_path / "sweep" / "0", signal.SIGKILL, after="epoch_0005")
    assert code == -signal.SIGKILL, output
    again = started(tmp_path, *sweep)
    output = again.communicate(timeout=200)[0]
    assert again.returncode == 0, output
    assert output.count("resuming from the checkpoint") == 1
    alone = go(tmp_path / "alone", "trainer.dense_epochs=60")
    first, second = (result_of(tmp_path / "sweep" / name) for name in "01")
    assert [first["status"], second["status"]] == ["finished", "finished"]
    assert (first["loss"], first["baseline_loss"]) == (alone["loss"], alone["baseline_loss"])
    assert second["loss"] != first["loss"]
