"""Locks between processes, and what happens where there are none."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock

from gsprune.files.locks import Lock, file_name


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    first, second = Lock(tmp_path / "deep" / "a"), Lock(tmp_path / "deep" / "a")
    assert not first.is_held()
    with first.held(waiting_for="-"):
        assert second.is_held()
        assert not second.acquire(seconds=0.05)
    assert not second.is_held()


@pytest.mark.parametrize("fault", [NotImplementedError("no flock here"), OSError(28, "No space left on device")])
def test_without_locks_everybody_is_let_in_and_told(
    fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: FileLock) -> None:
        raise fault

    monkeypatch.setattr(FileLock, "_acquire", broken)
    lock = Lock(tmp_path / "a")
    with lock.held(waiting_for="-"):
        entered = True
    assert entered
    assert not lock.is_held()
    assert caplog.messages[0] == f"{tmp_path / 'a'} cannot be locked ({fault}): nothing keeps other processes out"


def test_an_error_inside_goes_on_and_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as error, Lock(tmp_path / "a").held(waiting_for="-"):
        raise RuntimeError("inside")
    assert error.value.__context__ is None
    assert not Lock(tmp_path / "a").is_held()


def test_names_are_short_and_no_two_alike() -> None:
    names = ["job a/0", "job a_0", "x" * 300, "x" * 301, "\udcff"]
    found = [file_name(name) for name in names]
    assert len(set(found)) == len(names)
    assert all(len(name.encode()) < 255 and "/" not in name for name in found)
