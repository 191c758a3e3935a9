"""When a job writes its network as a program, and that one which cannot be exported ends no job."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from facts import assert_tells
from torch import Tensor, nn

from gsprune.app.stages.context import PARTS, Writer
from gsprune.app.stages.programs import keep_program
from gsprune.app.stopwatch import Stopwatch


def job(folder: Path, *, first: bool = True, **tracker: Any) -> Any:
    watch = Stopwatch(*PARTS)
    known = {"writer": Writer(watch, active=first), "watch": watch, "folder": folder, "first": first}
    return SimpleNamespace(**known, tracker=SimpleNamespace(**tracker))


class Undecided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_it_is_written_where_the_tracker_logs_programs(tmp_path: Path) -> None:
    path, x = tmp_path / "checkpoint" / "model.pt2", torch.ones(1, 2)
    for asked in (job(tmp_path), job(tmp_path, log_program=False), job(tmp_path, first=False, log_program=True)):
        keep_program(asked, nn.Linear(2, 2), x, path)
        assert not path.exists()
    keep_program(job(tmp_path, log_program=True), net := nn.Linear(2, 2), x, path)
    assert torch.equal(torch.export.load(path).module()(x), net(x))


def test_what_cannot_be_exported_is_a_warning_and_an_older_file_goes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"of an earlier run")
    with caplog.at_level(logging.WARNING):
        keep_program(job(tmp_path, log_program=True), Undecided(), torch.ones(1, 2), path)
    assert not path.exists()
    (record,) = caplog.records
    assert_tells(record.getMessage(), "model.pt2", "mlflow.pytorch.load_model", "Undecided", "values of a tensor")
