"""The screen output of a run: progress while it trains, the summary at its end."""

from __future__ import annotations

import itertools
import json
import logging
import re

import pytest
import torch
from jobs import finished

from gsprune.app.console import (
    Bar,
    Lines,
    Pace,
    Progress,
    chance_line,
    make_progress,
    print_summary,
    summary_table,
    unfair_line,
)
from gsprune.training.trainer import Totals

EPOCH = {"train/loss": 0.5, "train/accuracy": 0.75, "val/accuracy": 1.0, "sparsity": 0.25, "epoch_seconds": 1.25}


def test_without_a_terminal_every_epoch_is_one_plain_line(capsys):
    display = make_progress("auto", epochs=14)
    assert type(display) is Lines
    display.phase("dense", epochs=6, steps_per_epoch=3)
    display.on_epoch(1, EPOCH)
    display.phase("prune", epochs=8, steps_per_epoch=3, of="channels")
    display.on_epoch(7, EPOCH)
    text = "loss 0.5000  accuracy  75.00 %  val 100.00 %  sparsity 25.0 %"
    assert capsys.readouterr().out.splitlines() == [
        f"dense    epoch   1/14  {text}  1.2 s",
        f"prune    epoch   7/14  {text} of channels  1.2 s",
    ]


def test_every_epoch_says_how_long_the_job_still_takes(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    display = Lines(4)
    display._pace._now = lambda: now[0]
    totals = Totals(torch.device("cpu"))
    display.phase("prune", epochs=2, steps_per_epoch=5, before=2)  # the dense network was on disk
    for epoch in (3, 4):
        for _ in range(5):
            now[0] += 6.0
            display.on_step(totals)
        display.on_epoch(epoch, EPOCH)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("48 s left, until about ")  # after ten seconds, before an epoch has ended
    assert [line.rpartition("1.2 s")[2] for line in lines[1:]] == ["  30 s left", ""]


def test_the_log_file_has_the_line_of_the_screen_though_time_goes_on(monkeypatch, capsys, tmp_path):
    now = itertools.count(0.0, 6.0)  # every look at the clock comes six seconds later
    display = Lines(4)
    display._pace._now = lambda: next(now)
    handler = logging.FileHandler(tmp_path / "log")
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    display.phase("prune", epochs=4, steps_per_epoch=5)
    display.on_step(Totals(torch.device("cpu")))
    display.on_epoch(1, EPOCH)
    handler.close()
    line = capsys.readouterr().out
    assert " left" in line
    assert (tmp_path / "log").read_text() == line


def test_a_resumed_phase_counts_what_is_left_of_it():
    now = [0.0]
    pace = Pace(3, now=lambda: now[0])
    pace.start(10, done=14, before=1)
    assert (pace.left(), pace.current) == (None, 3)
    now[0] = 3.0
    for _ in range(3):
        pace.step()
    assert pace.left() == 3.0  # three steps of the ten
    pace.epoch(3)
    assert pace.left() == 0.0


@pytest.mark.parametrize(("columns", "shown"), [("40", False), ("80", True)])
def test_a_narrow_terminal_has_a_short_line(columns, shown, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("NO_COLOR", "1")
    display = make_progress("bar", epochs=1)
    display.phase("prune", epochs=1, steps_per_epoch=1)
    display.on_step(_Read())
    display.on_epoch(1, EPOCH)
    display.close()
    out = re.sub(r"\x1b\[[0-9?]*[A-Zhl]", "", capsys.readouterr().out)  # moves of the cursor
    assert "\x1b" not in out  # and no colour
    line = [line for line in out.splitlines() if line.strip()][-1]
    assert len(line.rstrip()) <= int(columns)
    assert ("loss 0.5000" in line) is shown


class _Read:
    def read(self):
        return {"loss": 0.5, "accuracy": 0.75}


def test_on_a_terminal_there_is_a_bar_that_looks_at_the_loss_rarely(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    display = make_progress("auto", epochs=1)
    assert type(display) is Bar
    reads = []
    totals = Totals(torch.device("cpu"))
    monkeypatch.setattr(totals, "read", lambda: (reads.append(1), {"loss": 0.5, "accuracy": 0.75})[1])
    display.phase("prune", epochs=1, steps_per_epoch=50)
    for _ in range(50):
        display.on_step(totals)
    display.on_epoch(1, EPOCH)
    display.close()
    assert len(reads) == 1  # half a second has not passed
    out = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", capsys.readouterr().out)
    text = [line for line in out.splitlines() if line][-1]
    assert text.startswith("prune 1/1 ━━━━━━━━ 100% loss 0.5000  accuracy  75.00 %  sparsity 25.0 %")
    assert len(text) <= 80


def test_silence_on_request(capsys):
    display = make_progress("none", epochs=1)
    assert type(display) is Progress
    display.phase("dense", epochs=1, steps_per_epoch=1)
    display.on_epoch(1, EPOCH)
    display.close()
    assert capsys.readouterr().out == ""


def test_the_summary_compares_dense_and_pruned():
    result = {
        "accuracy": 0.98,
        "baseline_accuracy": 0.99,
        "val_accuracy": 0.97,
        "baseline_val_accuracy": 0.96,
        "epochs": 14,
        "baseline_epochs": 6,
        "choices": {"pruner": "abs"},
        "sparsity": 0.5,
        "sparsity_of": "heads and neurons",
        "coverage": 0.75,
        "params": 50,
        "params_dense": 1000,
        "params_nonzero": 40,
        "macs": 300,
        "macs_dense": 600,
        "latency_ms": None,
        "latency_dense_ms": None,
        "latency_note": None,
        "file_bytes": 4000,
        "file_bytes_dense": 8000,
    }
    rows = [re.split(r" {2,}", line.strip()) for line in summary_table(result)]
    assert rows[0] == ["dense", "pruned", "dense / pruned"]
    assert rows[2:] == [
        ["epochs trained", "6", "14"],
        ["validation accuracy", "96.00 %", "97.00 %", "+1.00 points"],
        ["test accuracy", "99.00 %", "98.00 %", "-1.00 points"],
        ["sparsity of heads and neurons", "0.0 %", "50.0 %"],
        ["weights it may prune", "75.0 %"],
        ["parameters", "1,000", "50", "20.00x"],
        ["not zero", "1,000", "40", "25.00x"],
        ["MACs", "600", "300", "2.00x"],
        ["file size", "8 kB", "4 kB", "2.00x"],
    ]


@pytest.mark.parametrize(
    ("pruner", "dense", "epochs", "told"),
    [("abs", 6, 14, "6 epochs and the pruned one for 14"), ("none", 6, 14, None), ("abs", 6, 6, None)],
)
def test_the_summary_says_where_the_dense_network_has_trained_less(pruner, dense, epochs, told):
    line = unfair_line({"baseline_epochs": dense, "epochs": epochs, "choices": {"pruner": pruner}})
    if told is None:
        assert line is None
    else:
        assert told in line
        assert "pruner=none" in line


def test_a_control_is_called_so_and_its_sparsity_is_of_nothing(tmp_path):
    result = finished(tmp_path, "pruner=none")
    assert (result["sparsity"], result["sparsity_of"]) == (0.0, None)
    head, *rows = summary_table({**result, "choices": {"pruner": "none"}})
    assert head.split("  ")[-1] == "dense / control"
    assert not any("sparsity" in row for row in rows)


@pytest.mark.slow
def test_the_end_names_the_outputs_and_the_one_command(tmp_path, capsys):
    uri = f"sqlite:///{tmp_path}/my runs/mlflow.db"
    finished(tmp_path / "plain", "pruner=elementwise")
    result = json.loads((tmp_path / "plain" / "result.json").read_text())
    print_summary(result, tmp_path, tracking_uri=uri)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"MLflow:  mlflow ui --backend-store-uri '{uri}' --host 127.0.0.1"
    assert lines[-2] == f"Outputs: {tmp_path}"
    assert lines[-3].startswith("Masked weights are zeros in tensors of the old size")
    print_summary(result, tmp_path / "my run", tracking_uri="http://host:5000", unsent=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        f"Unsent:  gsprune sync '{tmp_path}/my run'",
        "MLflow:  http://host:5000",
    ]
    print_summary(result, tmp_path, tracking_uri=None)
    assert "mlflow" not in capsys.readouterr().out


def test_no_better_than_guessing_as_the_dense_network():
    found = {"accuracy": 0.5, "classes": 2, "dense": True}
    assert chance_line({"at_chance": found}).endswith("among 2 classes, and so was that of the dense network.")
    assert chance_line({"at_chance": None}) is None is chance_line({})
