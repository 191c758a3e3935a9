"""Runs that were left alone, that crash at a step, that have crashed."""

from __future__ import annotations

import pytest
from interrupted import AtStep, Crash, crash, go, names


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    go(folder)
    return folder


@pytest.fixture
def at_step(monkeypatch):
    return AtStep(monkeypatch)


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
