"""The directory of a run: what is there is kept, reused or refused, and two runs are never in one."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import threading
from pathlib import Path

import pytest
from interrupted import WEIGHTED, crash, go, names, result_of
from jobs import configure
from kills import differences
from omegaconf import OmegaConf

from gsprune.app import job as job_module
from gsprune.app import output_dir
from gsprune.files import disk
from gsprune.files.locks import Lock
from gsprune.sweeps.sweep_dir import Sweep
from gsprune.training.checkpoints import Checkpoints


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


def test_a_directory_can_be_moved_in_between(crashed, whole, at_step):
    moved = crashed.rename(crashed.with_name("elsewhere"))
    go(moved)
    assert at_step.count == 5
    assert list(differences(whole, moved)) == []


def test_never_starts_anew(crashed, whole, at_step):
    go(crashed, "trainer.resume=never")
    assert at_step.count == 15
    assert list(differences(whole, crashed)) == ["config.yaml differs"]  # which has that setting


def test_a_finished_run_is_kept_and_skipped(crashed, at_step, caplog):
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


def test_a_finished_run_whose_result_cannot_be_read_just_now_is_skipped(crashed, monkeypatch):
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


def test_how_to_resume_is_said_as_it_is(tmp_path):
    cfg, sweep = configure("trainer.resume=never"), Sweep(tmp_path)
    command = f"the same command with hydra.run.dir={tmp_path}"
    assert output_dir.resume_hint(cfg, tmp_path, None) == f"{command} starts anew: there is no checkpoint yet"
    Checkpoints(tmp_path / "checkpoint").write({}, epoch=1, step=0)
    told = "without trainer.resume=never resumes from the newest checkpoint"
    assert output_dir.resume_hint(cfg, tmp_path, None) == f"{command} and {told}"
    again = "the same command with sweep.resume=true resumes from the newest checkpoint"
    assert output_dir.resume_hint(configure(), tmp_path, sweep) == again


# --- in a sweep ---------------------------------------------------------------------------------------------


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
