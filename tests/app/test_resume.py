"""Jobs that are interrupted, killed or find damaged checkpoints end with the bits of one that was left alone."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from interrupted import WEIGHTED, Crash, crash, go, names, result_of
from jobs import ROOT, TINY, configure
from kills import differences
from safetensors.torch import load_file, save_file

import gsprune
from gsprune.app import job as job_module
from gsprune.app.console import Progress
from gsprune.files import disk
from gsprune.settings.identity import config_hash, dense_key
from gsprune.tracking.tracker import Tracker, read_metrics
from gsprune.training.checkpoints import RECORD, TENSORS, Checkpoints
from gsprune.training.guard import BadNumbers
from gsprune.training.signals import Interrupted
from gsprune.training.trainer import Trainer

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


@pytest.mark.slow
@pytest.mark.parametrize("at", [7, 12])
def test_a_job_with_a_teacher_is_killed_and_resumes_with_the_same_bits(tmp_path, at_step, at):
    """The teacher is the dense network of the run, read from its file; with units that leave the model meanwhile."""
    settings = ("trainer.distill=0.5", "trainer.checkpoint_minutes=0", "pruner.shrink=each_update")
    go(tmp_path / "whole", *settings)
    assert "train/distill_loss" in read_metrics(tmp_path / "whole" / "metrics.jsonl")[-2]
    at_step.do(at, crash)
    with pytest.raises(Crash):
        go(tmp_path / "killed", *settings)
    at_step.do(0, crash)
    go(tmp_path / "killed", *settings)
    assert at_step.count == 15 - at + 1
    assert list(differences(tmp_path / "whole", tmp_path / "killed")) == []


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


def test_a_run_that_was_killed_while_it_told_mlflow_of_its_end_goes_on_there(crashed, whole, at_step):
    go(crashed)
    (crashed / "tracking.json").write_text(json.dumps({"status": "RUNNING", "run_id": None}))
    assert result_of(crashed)["status"] == "finished"
    at_step.do(0, crash)
    go(crashed)
    assert at_step.count == 0
    (crashed / "tracking.json").unlink()
    assert list(differences(whole, crashed)) == []


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
    again = f"interrupted: the same command with hydra.run.dir={tmp_path} resumes from the newest checkpoint"
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


# --- whole processes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [pytest.param(4, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.long)])
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
