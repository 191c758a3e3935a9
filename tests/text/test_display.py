"""What strangers' text becomes before a terminal, a table, a page or MLflow shows it."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import sys
import unicodedata
from pathlib import Path

import pytest

from gsprune.sweeps.results import JobResult
from gsprune.sweeps.sweep_dir import set_aside
from gsprune.text import display
from gsprune.text.display import cell, code, label, one_line, tag

# C0, C1, what turns the direction of writing or is not seen, ends of lines, and half a pair.
STEERING = [
    "\x1b[2J",
    "\x1b]0;x\x07",
    "\x9b31m",
    "\r",
    "\n",
    "\t",
    "\v",
    "\x85",
    "\u2028",
    "\u2029",
    "\u202e",
    "\u2066",
]
STEERING += ["\u2066", "\u200b", "\ufeff", "\x00", "\x7f", "\ud800", "\U000e0041"]
FORMULAS = ["=1+1", "+1+1", "-1+cmd", "@x", "\uff1d1+1", "\uff0b1", "\uff0d1+1", "\uff20x", "|cmd", "%0A=1"]
BEFORE = ["", " ", "\t", "\r\n", "\u00a0", "\u200b", "\u3000", "'", '"']
EVIL = "<script>" + "".join(STEERING) + "[red]x[/red] [link=http://x]y[/link] $x^$ `a` |"


@pytest.mark.parametrize("text", STEERING)
def test_nothing_steers_a_terminal_or_a_page(text: str) -> None:
    for safe in (one_line, lambda told: label(told, 60), cell, code, lambda told: tag(told).replace("\n", "")):
        told = str(safe(f"a{text}b"))
        assert told.isprintable()
        assert "a" in told
        assert "b" in told


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("before", BEFORE)
def test_no_cell_is_calculated(formula: str, before: str) -> None:
    told = str(cell(before + formula))
    assert told[0] == "'"
    (row,) = csv.reader(io.StringIO(f'"{told.replace(chr(34), chr(34) * 2)}"\r\n'))
    assert unicodedata.normalize("NFKC", row[0])[0] == "'"


@pytest.mark.parametrize("value", ["-0.5", "+1e-3", "-inf", "abs, lr=0.1", "", 3, None, 0.25])
def test_numbers_and_plain_texts_stay(value: object) -> None:
    assert cell(value) == value


def test_a_command_cannot_leave_its_code() -> None:
    told = code("a`b``c\n<img src=x>")
    assert re.fullmatch(r"``` a`b``c\\n<img src=x> ```", told)


def test_messages_are_filled_with_safe_texts(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.INFO):
        display.logger("gsprune.x").warning("%s in %s: %s (%d)", "job \x1b[2J", Path("a\nb"), ValueError("\u202e"), 3)
    (record,) = caplog.records
    assert record.getMessage() == r"job \x1b[2J in a\nb: \u202e (3)"
    assert (record.name, record.filename) == ("gsprune.x", "test_display.py")


def test_every_logger_of_the_package_is_such_a_one() -> None:
    """And nothing prints by itself but the progress and the summary of a run's own numbers."""
    for path in Path(display.__file__).parents[1].rglob("*.py"):
        if path.name not in ("display.py", "console.py"):
            assert "logging.getLogger(__name__)" not in path.read_text(encoding="utf8"), path


@pytest.mark.parametrize("mark", ["a/../../b", "..", "", "\x1b[2J", "x" * 300, "../" * 5 + "tmp"])
def test_a_mark_out_of_a_file_names_no_other_folder(mark: str, tmp_path: Path) -> None:
    folder = tmp_path / "sweep" / "1"
    folder.mkdir(parents=True)
    result = {"status": "finished", "config_hash": mark}
    (folder / "result.json").write_text(json.dumps(result))
    beside = set_aside(folder, JobResult(folder, result, tmp_path / "sweep"))
    assert beside.parent == tmp_path / "sweep"
    assert re.fullmatch("1-[0-9a-f]{8}", beside.name)
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]


def test_a_sweep_of_evil_texts_shows_none_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gsprune.sweeps import report
    from gsprune.sweeps.callback import failures

    told = {"accuracy": 0.5, "baseline_accuracy": 0.6, "name": EVIL, "choices": {"pruner": EVIL}, "config_hash": EVIL}
    for number, status in enumerate(["finished", "failed", "running"]):
        (tmp_path / str(number)).mkdir()
        overrides = [f"pruner={EVIL}{number}", *(f"k{i}={text}{number}" for i, text in enumerate(FORMULAS))]
        result = {**told, "status": status, "error": EVIL, "overrides": overrides, "mlflow_run_id": "=1+1"}
        (tmp_path / str(number) / "result.json").write_text(json.dumps(result))
    (tmp_path / "sweep.json").write_text(json.dumps({"command": EVIL, "status": EVIL, "axes": {EVIL: [EVIL, "b"]}}))
    report.main([str(tmp_path)])
    print(failures({EVIL: EVIL}, 3), file=sys.stderr)
    output = capsys.readouterr()
    page = (tmp_path / "report.html").read_text()
    table = (tmp_path / "summary.csv").read_text()
    for text in (output.out, output.err, page, table):
        assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert "<script" not in page
    for row in csv.reader(io.StringIO(table)):
        assert not [found for found in row if unicodedata.normalize("NFKC", found)[:1] in ("=", "+", "@", "|", "%")]
