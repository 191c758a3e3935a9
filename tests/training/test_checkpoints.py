"""Checkpoints of a run on the disk: what goes in comes out, and what is damaged is named and passed over."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import random

import numpy as np
import pytest
import torch
from facts import refused
from safetensors.torch import save_file

from gsprune.files.disk import remove_leftovers
from gsprune.training import checkpoints as run_state
from gsprune.training.checkpoints import RECORD, TENSORS, Checkpoints, read_state, write_state

TINY = 1e-300
STATE = {
    "model": {"a.weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(7)},
    "optimizer": {
        "state": {0: {"step": torch.tensor(3.0), "momentum_buffer": None}, 1: {"exp_avg": torch.ones(2).bfloat16()}},
        "param_groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "params": [0, 1], "fused": True}],
    },
    "milestones": {30: 1, 60: 2},
    "numbers": [math.inf, -math.inf, TINY, 2**70, -0.0, np.float64(0.1), np.int64(3)],
    "masks": {"stem": torch.tensor([True, False])},
    "random": torch.arange(5, dtype=torch.uint8),
    "nothing": {},
    "$": "a key that the format uses itself",
}


def same(first, second):
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and len(first) == len(second) and all(map(same, first, second))
    return repr(first) == repr(second)


def test_what_goes_in_comes_out(tmp_path):
    write_state(tmp_path / "a", STATE)
    found = read_state(tmp_path / "a")
    expected = {**STATE, "numbers": [math.inf, -math.inf, TINY, 2**70, -0.0, 0.1, 3]}
    assert same(found, expected)
    assert sorted(os.listdir(tmp_path / "a")) == [RECORD, TENSORS]
    assert math.isnan(read_state(written(tmp_path / "b", {"loss": math.nan}))["loss"])


def written(path, state):
    write_state(path, state)
    return path


def test_views_and_other_memory_formats_are_written_by_their_values(tmp_path):
    base = torch.arange(24.0)
    state = {"view": base[::2], "row": base.reshape(4, 6)[1], "t": base.reshape(4, 6).T, "same": base, "again": base}
    state["image"] = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    found = read_state(written(tmp_path / "a", state))
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_what_is_no_data_is_refused_and_leaves_nothing(tmp_path):
    with refused("schedule/factor", "function"):
        write_state(tmp_path / "a", {"schedule": {"factor": written}})
    assert list(tmp_path.iterdir()) == []


def test_the_state_of_an_optimizer_and_its_schedule_goes_on_the_same(tmp_path):
    def build():
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        optimizer = torch.optim.NAdam(layer.parameters(), lr=0.1)
        first = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=2)
        second = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [first, second], milestones=[2])
        return layer, optimizer, schedule

    def step(layer, optimizer, schedule):
        layer(torch.ones(3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    whole, again = build(), build()
    for _ in range(3):
        step(*whole)
    parts = [part.state_dict() for part in whole]
    for part, state in zip(again, read_state(written(tmp_path / "a", {"parts": parts}))["parts"], strict=True):
        part.load_state_dict(state)
    for _ in range(4):
        step(*whole)
        step(*again)
        assert torch.equal(whole[0].weight, again[0].weight)
        assert whole[1].param_groups[0]["lr"] == again[1].param_groups[0]["lr"]


# --- two are kept, and the newest that is whole is taken ----------------------------------------------------


def checkpoints_of(folder):
    checkpoints = Checkpoints(folder / "checkpoint")
    for epoch, step in [(0, 3), (0, 12), (1, 0), (10, 0)]:
        checkpoints.write({"at": [epoch, step], "weight": torch.full((4,), float(epoch))}, epoch=epoch, step=step)
    return checkpoints


def test_the_last_two_are_kept_by_place_and_not_by_name_or_time(tmp_path):
    checkpoints = checkpoints_of(tmp_path)
    assert [path.name for path in checkpoints.paths()] == ["epoch_0001_step_000000", "epoch_0010_step_000000"]
    assert checkpoints.newest().state["at"] == [10, 0]
    checkpoints.write({"at": "again"}, epoch=10, step=0)
    assert [path.name for path in checkpoints.paths()] == ["epoch_0001_step_000000", "epoch_0010_step_000000"]
    assert checkpoints.newest().state == {"at": "again"}
    checkpoints.remove_all()
    assert list(checkpoints.folder.iterdir()) == []


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(bytes(content))


def replace(path):
    if path.name == TENSORS:
        save_file({"weight": torch.zeros(4)}, path, metadata={"format": run_state.FORMAT, "version": "1"})
    else:
        path.write_text(
            json.dumps({"format": run_state.FORMAT, "version": 1, "state": {}, "tensors": "", "sha256": ""})
        )


DAMAGES = {
    "truncated": truncate,
    "a bit is another": flip,
    "empty": lambda path: path.write_bytes(b""),
    "another": replace,
}


@pytest.mark.parametrize("name", [TENSORS, RECORD])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_set_aside_and_the_one_before_taken(tmp_path, caplog, name, damage):
    checkpoints = checkpoints_of(tmp_path)
    newest = checkpoints.paths()[-1]
    DAMAGES[damage](newest / name)
    left = {path.name: path.read_bytes() for path in newest.iterdir()}
    with caplog.at_level(logging.WARNING):
        assert checkpoints.newest().state["at"] == [1, 0]
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "the checkpoint epoch_0010_step_000000 is damaged and set aside as damaged-epoch_0010_step_000000, "
        "the one before it is tried: "
    )
    assert str(newest / name) in record.getMessage()
    aside = checkpoints.folder / "damaged-epoch_0010_step_000000"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == left
    assert [path.name for path in checkpoints.paths()] == ["epoch_0001_step_000000"]


def not_answering(monkeypatch, error):
    def sha256(path):
        raise error

    monkeypatch.setattr(run_state, "sha256", sha256)


def of_another_version(folder):
    record = json.loads((folder / RECORD).read_text())
    del record["sha256"]
    (folder / RECORD).write_text(sealed({**record, "version": 2}))


MOMENTS = {
    "eio": (lambda patch, _: not_answering(patch, OSError(errno.EIO, "Input/output error", "x")), "Input/output error"),
    "estale": (lambda patch, _: not_answering(patch, OSError(errno.ESTALE, "Stale file handle")), "Stale file handle"),
    "memory": (lambda patch, _: not_answering(patch, MemoryError()), "more memory than there is"),
    "version": (lambda _, folder: of_another_version(folder), "has format version 2, this gsprune reads 1"),
    "moved": (lambda _, folder: os.rename(folder / TENSORS, folder.parent / "kept"), f"{TENSORS} is not there"),
    "moved record": (lambda _, folder: os.rename(folder / RECORD, folder.parent / "kept"), f"{RECORD} does not exist"),
    "a folder": (lambda _, folder: (os.remove(folder / RECORD), os.mkdir(folder / RECORD)), "is not a file"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_cannot_be_read_just_now_is_refused_by_name_and_nothing_changes(tmp_path, monkeypatch, moment):
    checkpoints = checkpoints_of(tmp_path)
    newest = checkpoints.paths()[-1]
    happens, told = MOMENTS[moment]
    happens(monkeypatch, newest)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with refused(newest, told, "never"):
        checkpoints.newest()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in checkpoints.paths()] == ["epoch_0001_step_000000", "epoch_0010_step_000000"]


def test_a_folder_of_checkpoints_that_does_not_answer_is_not_an_empty_one(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "not mounted")
    with refused("link", "No such file or directory"):
        Checkpoints(tmp_path / "link").newest()
    checkpoints = checkpoints_of(tmp_path)

    def listdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", listdir)
    with refused("checkpoint", "Permission denied"):
        checkpoints.newest()


def test_without_a_usable_one_there_is_none_and_a_warning(tmp_path, caplog):
    assert Checkpoints(tmp_path / "none").newest() is None
    checkpoints = checkpoints_of(tmp_path)
    for path in checkpoints.paths():
        flip(path / TENSORS)
    assert checkpoints.newest() is None
    assert ", no other is left, and the run starts anew: " in caplog.records[-1].getMessage()
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    aside = sorted(path.name for path in checkpoints.folder.iterdir())
    assert aside == ["damaged-epoch_0001_step_000000", "damaged-epoch_0010_step_000000"]


@pytest.mark.parametrize("error", [ValueError("not this one"), OSError(errno.EIO, "not this one"), MemoryError()])
def test_what_the_caller_refuses_is_kept_too(tmp_path, error):
    def check(state):
        raise error

    checkpoints = checkpoints_of(tmp_path)
    with pytest.raises(
        ValueError, match=r"epoch_0010_step_000000 cannot be used now, and is kept: .*(not this one|memory)"
    ):
        checkpoints.newest(check)
    assert len(checkpoints.paths()) == 2


def test_a_write_that_fails_leaves_those_that_are_there(tmp_path, monkeypatch):
    checkpoints = checkpoints_of(tmp_path)
    before = sorted(checkpoints.folder.iterdir())

    def full(*_, **__):
        raise run_state.safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("gsprune.formats.tensors.save_file", full)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: "):
        checkpoints.write({"at": 0}, epoch=11, step=0)
    assert sorted(checkpoints.folder.iterdir()) == before
    assert checkpoints.newest().state["at"] == [10, 0]


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path):
    mark = "0123456789abcdef" * 2
    (tmp_path / "checkpoint" / f".epoch_0001_step_000000.{mark}.tmp").mkdir(parents=True)
    (tmp_path / f".result.json.{mark}.tmp").write_text("{")
    for kept in (".hidden.tmp", "result.json", ".result.json.tmp"):
        (tmp_path / kept).write_text("")
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "checkpoint")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        ".hidden.tmp",
        ".result.json.tmp",
        "checkpoint",
        "result.json",
    ]


# --- files from strangers -----------------------------------------------------------------------------------


def sealed(record):
    """A record with the right sha256, whatever it says."""
    return json.dumps({**record, "sha256": run_state._digest(record)})


@pytest.mark.parametrize(
    "state",
    [
        [],
        {"a": {"$": "tensor", "name": "missing"}},
        {"a": {"$": "tensor", "name": ["x"]}},
        {"a": {"$": "module", "name": "os"}},
        {"a": {"$": "dict", "items": [[{"$": "dict", "items": []}, 1]]}},
        {"a": {"$": "dict", "items": 3}},
        {"a": {"$": "float", "value": "much"}},
        {"a": {"$": "tuple"}},
        {"a": {"$": {}}},
    ],
)
def test_a_record_with_a_right_sum_and_wrong_content_is_one_sentence(tmp_path, state):
    write_state(tmp_path / "a", {"weight": torch.zeros(2)})
    record = json.loads((tmp_path / "a" / RECORD).read_text())
    del record["sha256"]
    (tmp_path / "a" / RECORD).write_text(sealed({**record, "state": state}))
    with refused(tmp_path / "a" / RECORD):
        read_state(tmp_path / "a")


def test_a_deep_record_a_large_one_and_another_version_are_refused(tmp_path, monkeypatch):
    write_state(tmp_path / "a", {"weight": torch.zeros(2)})
    path = tmp_path / "a" / RECORD
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "version": 9}))
    with refused("version 9", "1"):
        read_state(tmp_path / "a")
    path.write_text("[" * 100_000)
    with refused("JSON"):
        read_state(tmp_path / "a")
    monkeypatch.setattr(run_state, "MAX_RECORD", 10)
    with refused("state.json", "10 bytes"):
        read_state(tmp_path / "a")


def test_mutated_files_are_a_clean_load_or_one_sentence(tmp_path):
    chosen = random.Random(0)
    write_state(tmp_path / "a", STATE)
    whole = {name: (tmp_path / "a" / name).read_bytes() for name in (TENSORS, RECORD)}
    for _ in range(300):
        name = chosen.choice(list(whole))
        content = bytearray(whole[name])
        for _ in range(chosen.randint(1, 4)):
            content[chosen.randrange(len(content))] = chosen.randrange(256)
        (tmp_path / "a" / name).write_bytes(content[: chosen.choice([len(content), chosen.randrange(len(content))])])
        if bytes(content) != whole[name]:
            with refused():
                read_state(tmp_path / "a")
        (tmp_path / "a" / name).write_bytes(whole[name])
    assert same(read_state(tmp_path / "a")["model"], STATE["model"])
