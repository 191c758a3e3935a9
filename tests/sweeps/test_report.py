"""The report: what stands in its three files, that it loads nothing and runs nothing, and how the command ends."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from facts import assert_tells

from gsprune.formats.masks import save_masks
from gsprune.sweeps.report import build_report, main
from gsprune.sweeps.verdict import Terms

DENSE = {"params_dense": 1000, "macs_dense": 5000, "file_bytes_dense": 4000}


def job(folder: Path, *overrides: str, **result: object) -> Path:
    folder.mkdir(parents=True)
    told = {"status": "finished", "accuracy": 0.9, "baseline_accuracy": 0.95, "epochs": 14, "baseline_epochs": 6}
    told |= {"baseline_val_accuracy": 0.95}
    full = {**told, "val_accuracy": result.get("accuracy", 0.9), "overrides": list(overrides), **result}
    (folder / "result.json").write_text(json.dumps(full))
    return folder


def timed(left: float) -> dict[str, float | str | None]:
    """What a job has measured of a network that takes this share of the dense one's time."""
    names = ("latency_ms", "latency_dense_ms", "speedup", "speedup_low", "speedup_high")
    if left == 1:
        return {**dict.fromkeys(names), "latency_note": "no change: the same shapes"}
    return dict(zip(names, (2 * left, 2.0, 1 / left, 0.98 / left, 1.02 / left), strict=True))


def sweep(root: Path) -> Path:
    """Two pruners at two sparsities with two seeds: accuracies 90 to 97 %, on validation one point less."""
    accuracy = iter((0.95, 0.97, 0.91, 0.93, 0.94, 0.94, 0.90, 0.92))
    index = 0
    for pruner in ("elementwise", "abs"):
        for target in (0.5, 0.8):
            for seed in (0, 1):
                left = 1 - target if pruner == "abs" else 1
                test = next(accuracy)
                numbers = {"target_sparsity": target, "sparsity": target, "accuracy": test, "val_accuracy": test - 0.01}
                size = {"params": round(1000 * left), "macs": round(5000 * left), **DENSE, **timed(left)}
                more = {"shrunk": pruner == "abs", "params_nonzero": round(1000 * (1 - target)), "file_bytes": 4000}
                more["sparsity_of"] = "channels" if pruner == "abs" else "weights"
                words = (f"pruner={pruner}", f"pruner.target_sparsity={target}", f"seed={seed}")
                folder = job(root / str(index), *words, config_hash=f"hash{index}", **numbers, **size, **more)
                masks = {"a.weight": torch.arange(10) >= 10 * target, "b.weight": torch.ones(4, dtype=torch.bool)}
                save_masks(folder / "masks.safetensors", masks)
                index += 1
    return root


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep with its report, for tests that only read."""
    root = sweep(tmp_path_factory.mktemp("sweep"))
    report = build_report(root)
    assert report.paths == [root / name for name in ("report.html", "summary.csv", "pareto.svg")]
    assert (report.usable, report.left_out) == (8, {})
    return root


def cells(page: str) -> list[list[str]]:
    """The rows of all tables, as text; the multiplication sign as an x."""
    rows = re.findall(r"<tr.*?</tr>", page.replace("\u00d7", "x"), re.S)
    plain = [[re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", row)] for row in rows]
    return [[unescape(cell).strip() for cell in row] for row in plain]


def read_page(root: Path) -> str:
    return (root / "report.html").read_text(encoding="utf-8")


def read_table(root: Path) -> list[dict[str, str]]:
    with (root / "summary.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))


def tables(page: str) -> dict[str, list[list[str]]]:
    """The rows below each heading inside a table, by that heading; what stands before one goes to ""."""
    found: dict[str, list[list[str]]] = {"": []}
    heading = ""
    for row in cells(page):
        heading = (
            row[0] if len(row) == 1 else "" if row[0] in ("", "variant", "leaves", "job", "part of a job") else heading
        )
        found.setdefault(heading, []).extend([row] if len(row) > 1 else [])
    return found


def test_the_table_has_the_values_of_the_sweep(built: Path) -> None:
    page = tables(read_page(built))
    found = {title: [[*row[:6], *row[-2:]] for row in rows] for title, rows in page.items() if title.endswith("pruned")}
    assert list(found) == [
        "Nothing pruned",
        "50 % of channels pruned",
        "50 % of weights pruned",
        "80 % of channels pruned",
        "80 % of weights pruned",
    ]
    assert found["50 % of channels pruned"] == [
        ["abs", "2", "93.00 %", "94.00 %", "-1.00", "50.0 %", "MACs, latency", "4, 5"]
    ]
    assert found["50 % of weights pruned"] == [
        ["elementwise", "2", "95.00 %", "96.00 %", "+1.00", "50.0 %", "parameters, MACs", "0, 1"]
    ]
    assert page["80 % of channels pruned"][0][5:11] == [
        "80.0 %",
        "20.0 %",
        "5.00x",
        "5.00x",
        "5.00x (4.90 to 5.10)",
        "4 kB",
    ]
    assert page["80 % of weights pruned"][0][9] == "no change"


def test_a_speed_is_told_with_its_interval_or_not_at_all(tmp_path: Path) -> None:
    wide = "not measurable here: the ratio lies between 0.80x and 1.90x, wider than 10 % of it"
    told: dict[str, dict[str, Any]] = {
        "fast": {**timed(0.5), "val_accuracy": 0.88},
        "faster_by_chance": {**timed(0.495), "val_accuracy": 0.87},
        "clearly_faster": {**timed(0.25), "val_accuracy": 0.80},
        "noisy": {"latency_note": wide, "val_accuracy": 0.70},
        "no_interval": {"latency_ms": 1.0, "latency_dense_ms": 5.0, "val_accuracy": 0.70},
        "turned_round": {**timed(0.2), "speedup_low": 9.0, "val_accuracy": 0.70},
    }
    for index, (name, result) in enumerate(told.items()):
        job(tmp_path / str(index), f"pruner={name}", shrunk=True, params_nonzero=500, params_dense=1000, **result)
    build_report(tmp_path)
    rows = {row[0]: row for table in tables(read_page(tmp_path)).values() for row in table if len(row) > 10}
    assert {name: rows[name][9] for name in told} == {
        "fast": "2.00x (1.96 to 2.04)",
        "faster_by_chance": "2.02x (1.98 to 2.06)",
        "clearly_faster": "4.00x (3.92 to 4.08)",
        "noisy": "not measurable here",
        "no_interval": "",
        "turned_round": "",
    }
    assert {name for name in told if "latency" in rows[name][-2]} == {"fast", "clearly_faster"}
    assert [row["latency_note"] for row in read_table(tmp_path)] == ["", "", "", wide, "", ""]
    assert read_table(tmp_path)[0]["speedup_low"] == "1.96"


def test_which_one_to_take_is_told_on_an_axis_that_is_the_same_for_all_kinds(built: Path) -> None:
    page = tables(read_page(built))
    assert page["By parameters left (not zero)"] == [
        ["at most 50.0 %", "elementwise", "95.00 %", "96.00 %", "+1.00", "2", "50 % of weights"],
        ["at most 20.0 %", "elementwise", "91.00 %", "92.00 %", "-3.00", "2", "80 % of weights"],
    ]
    assert page["By MACs left"] == [
        ["at most 100.0 %", "elementwise", "95.00 %", "96.00 %", "+1.00", "2", "50 % of weights"],
        ["at most 50.0 %", "abs", "93.00 %", "94.00 %", "-1.00", "2", "50 % of channels"],
        ["at most 20.0 %", "abs", "90.00 %", "91.00 %", "-4.00", "2", "80 % of channels"],
    ]


def test_validation_chooses_and_the_test_split_stands_beside_it(tmp_path: Path) -> None:
    """One that only shines on the test split is neither first nor on a front."""
    same = {"target_sparsity": 0.5, "sparsity": 0.5, "params_nonzero": 500, "params_dense": 1000}
    job(tmp_path / "0", "pruner=lucky", val_accuracy=0.80, accuracy=0.99, **same)
    job(tmp_path / "1", "pruner=good", val_accuracy=0.90, accuracy=0.89, **same)
    report = build_report(tmp_path)
    page = tables(read_page(tmp_path))
    assert [row[1:4] for row in page["By parameters left (not zero)"]] == [["good", "90.00 %", "89.00 %"]]
    rows = page["50 % pruned, of what is not recorded"]
    assert [(row[0], row[2], row[3], row[-2]) for row in rows] == [
        ("good", "90.00 %", "89.00 %", "parameters"),
        ("lucky", "80.00 %", "99.00 %", ""),
    ]
    assert not any("test accuracy" in note for note in report.notes)


def test_results_without_validation_are_ordered_by_test_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job(tmp_path / "0", "pruner=a", val_accuracy=0.99, accuracy=0.80, target_sparsity=0.5)
    job(tmp_path / "1", "pruner=b", val_accuracy=None, accuracy=0.90, target_sparsity=0.5)
    (verdict,) = build_report(tmp_path, Terms(10)).verdicts
    (doubt, *_) = verdict.doubts
    assert_tells(doubt, "test accuracy", "1 of 2 finished jobs (such as 1)", "val_accuracy")
    assert main([str(tmp_path), "--max-drop=10"]) == 0
    assert f"  {doubt}." in capsys.readouterr().out.splitlines()
    page = read_page(tmp_path)
    rows = tables(page)["50 % pruned, of what is not recorded"]
    assert [row[:4] for row in rows] == [["b", "1", "90.00 %", "-5.00"], ["a", "1", "80.00 %", "-15.00"]]


def colours(page: str) -> dict[str, str]:
    """A difference as the page shows it -> the class of its cell."""
    return {
        text: name
        for name, text in re.findall(r'<td class="number (better|worse|)" [^>]*>([+-][\d.]+[^<]*)</td>', page)
    }


def test_with_the_control_in_the_sweep_differences_and_their_colour_are_to_it(tmp_path: Path) -> None:
    """The dense network has 95 %, the control 99 % and 97 %: 98 % is better than the one and worse than the other."""
    for seed, control in ((0, 0.99), (1, 0.97)):
        job(tmp_path / f"c{seed}", "pruner=none", f"seed={seed}", accuracy=control, target_sparsity=0.0, sparsity=0.0)
        job(tmp_path / f"a{seed}", "pruner=abs", f"seed={seed}", accuracy=0.975, target_sparsity=0.5, shrunk=True)
        job(tmp_path / f"b{seed}", "pruner=best", f"seed={seed}", accuracy=0.985, target_sparsity=0.5, shrunk=True)
    report = build_report(tmp_path)
    page = read_page(tmp_path)
    assert colours(page) == {"-0.50": "worse", "+0.50": "better"}
    assert "points to<br>control" in page
    assert "points to<br>dense" not in page
    assert report.notes == []
    assert tables(page)["Nothing pruned"] == [
        ["dense network 6 epochs", "2", "95.00 %", "95.00 %", "", ""],
        ["control, pruner=none 14 epochs", "2", "98.00 %", "98.00 %", "", "c0, c1"],
    ]


def test_a_difference_within_what_seeds_differ_by_has_no_colour(tmp_path: Path) -> None:
    for seed, more in enumerate((-0.02, 0.0, 0.01)):
        job(tmp_path / f"c{seed}", "pruner=none", f"seed={seed}", accuracy=0.9, target_sparsity=0.0)
        job(tmp_path / f"a{seed}", "pruner=abs", f"seed={seed}", accuracy=0.9 + more, target_sparsity=0.5)
        job(tmp_path / f"b{seed}", "pruner=bad", f"seed={seed}", accuracy=0.7 + more, target_sparsity=0.5)
    build_report(tmp_path)
    assert colours(read_page(tmp_path)) == {"-0.33 ± 1.53": "", "-20.33 ± 1.53": "worse"}


@pytest.mark.parametrize(
    ("epochs", "told"),
    [
        ({"epochs": 14, "baseline_epochs": 6}, "has trained less (6 epochs) than the pruned one (14)"),
        ({"epochs": None, "baseline_epochs": None}, "may have trained less"),
        ({"epochs": 6, "baseline_epochs": 6}, None),
    ],
)
def test_without_a_control_one_line_says_so_and_names_the_override(
    epochs: dict[str, object], told: str | None, tmp_path: Path
) -> None:
    for index, pruner in enumerate(("abs", "weighted")):
        job(tmp_path / str(index), f"pruner={pruner}", target_sparsity=0.5, **epochs)
    (verdict,) = build_report(tmp_path, Terms(10)).verdicts
    found = [doubt for doubt in verdict.doubts if "dense network" in doubt]
    if told is None:
        assert found == []
        return
    (doubt,) = found
    assert_tells(doubt, told, "pruner=abs,weighted,none")
    assert set(colours(read_page(tmp_path)).values()) == {""}  # it is not what pruning costs


def test_rows_without_a_control_of_their_own_show_no_difference_and_are_counted(tmp_path: Path) -> None:
    job(tmp_path / "0", "pruner=none", "model=a", target_sparsity=0.0)
    for model in ("a", "b"):
        job(tmp_path / model, "pruner=abs", f"model={model}", target_sparsity=0.5)
    (note,) = build_report(tmp_path).notes
    assert note.startswith("1 of 2 rows have no control (pruner=none) of the same seed and settings")
    rows = tables(read_page(tmp_path))["50 % pruned, of what is not recorded"]
    assert [row[4] for row in rows] == ["+0.00", ""]


@pytest.mark.parametrize(
    ("accuracies", "told"),
    [
        ((0.9,), "90.00 %"),
        ((0.9, 0.9), "90.00 %"),
        ((0.88, 0.92), "90.00 %"),
        ((0.9, 0.9, 0.9), "90.00 % (all equal)"),
        ((0.89, 0.9, 0.91), "90.00 ± 1.00 %"),
    ],
)
def test_a_spread_takes_three_seeds_and_their_number_is_beside_it(
    accuracies: tuple[float, ...], told: str, tmp_path: Path
) -> None:
    for seed, accuracy in enumerate(accuracies):
        job(tmp_path / str(seed), "pruner=abs", f"seed={seed}", accuracy=accuracy, target_sparsity=0.5)
    build_report(tmp_path)
    (row,) = tables(read_page(tmp_path))["50 % pruned, of what is not recorded"]
    assert row[:4] == ["abs", str(len(accuracies)), told, told]
    assert "± 0.00" not in read_page(tmp_path)


def test_variants_with_the_same_masks_stand_in_one_row(tmp_path: Path) -> None:
    masks = {"a.weight": torch.arange(10) >= 5}
    for index, pruner in enumerate(("abs", "weighted", "random")):
        folder = job(tmp_path / str(index), f"pruner={pruner}", target_sparsity=0.5, sparsity_of="channels")
        save_masks(folder / "masks.safetensors", {"a.weight": ~masks["a.weight"]} if pruner == "random" else masks)
    build_report(tmp_path)
    rows = tables(read_page(tmp_path))["50 % of channels pruned"]
    assert [row[0] for row in rows] == ["abs = weighted", "random"]  # of equal accuracy, but other masks


def test_summary_has_a_row_a_job_and_numbers_stay_numbers(tmp_path: Path) -> None:
    root = sweep(tmp_path)
    job(root / "8", "pruner=abs", "seed=-1", "+note==1+1", accuracy=None, status="failed", error="@SUM(A1)", loss=-0.25)
    build_report(root)
    rows = read_table(root)
    assert [row["folder"] for row in rows] == list("012345678")
    assert rows[3] | {"error": ""} == {
        "folder": "3", "status": "finished", "variant": "elementwise", "verdict": "",
        "pruner": "elementwise", "pruner.target_sparsity": "0.8", "seed": "1", "note": "",
        "accuracy": "0.93", "baseline_accuracy": "0.95", "epochs": "14", "baseline_epochs": "6", "val_accuracy": "0.92",
        "baseline_val_accuracy": "0.95",
        "target_sparsity": "0.8", "sparsity": "0.8",
        "params": "1000", "macs": "5000", "params_dense": "1000", "macs_dense": "5000",
        "latency_ms": "", "latency_dense_ms": "", "speedup": "", "speedup_low": "", "speedup_high": "",
        "latency_note": "no change: the same shapes",
        "file_bytes_dense": "4000", "params_nonzero": "200", "file_bytes": "4000",
        "loss": "", "config_hash": "hash3", "mlflow_run_id": "", "error": "",
    }  # fmt: skip
    assert {name: rows[8][name] for name in ("seed", "note", "error", "loss", "accuracy")} == {
        "seed": "-1", "note": "'=1+1", "error": "'@SUM(A1)", "loss": "-0.25", "accuracy": "",
    }  # fmt: skip
    assert (root / "summary.csv").read_bytes().count(b"\r\n") == 10


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    root = sweep(tmp_path)
    evil = "<script>alert(1)</script><img src=https://x.example/a.png onerror=alert(2)>\"'{{ 7*7 }}"
    job(root / "8", f"pruner={evil}", "seed=0", status="failed", accuracy=None, error=evil)
    job(root / "9", f"pruner={evil}", "seed=0", target_sparsity=0.5)
    (root / "<b>bold").mkdir()
    (root / "sweep.json").write_text(json.dumps({"command": evil, "status": evil, "axes": {evil: [evil, 1]}}))
    build_report(root)
    page = read_page(root)
    parser = Parser()
    parser.feed(page)
    assert not {tag for tag, _ in parser.tags} & {"script", "link", "iframe", "object", "embed", "base", "b>bold"}
    for tag, attributes in parser.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "action"):
            target = attributes.get(name) or ""
            assert target.startswith(("./", "#p", "#table", "#failed", "#skipped")) or not target, (tag, target)
    assert "url(" not in page
    assert "@import" not in page
    assert "7*7" in page


def test_failed_and_unfinished_jobs_are_listed_with_what_they_say(tmp_path: Path) -> None:
    job(tmp_path / "0", "pruner=abs", "seed=0", target_sparsity=0.5)
    job(tmp_path / "1", "pruner=abs", "seed=1", status="failed", accuracy=None, error="ValueError: too wide")
    job(tmp_path / "2", "pruner=abs", "seed=2", status="failed", accuracy=None, error=["odd"])
    job(tmp_path / "3", "pruner=abs", "seed=3", status="running", accuracy=None)
    job(tmp_path / "4", "pruner=abs", "seed=4", accuracy="NaN")
    report = build_report(tmp_path)
    page = read_page(tmp_path)
    assert cells(page)[-6:] == [
        ["job", "overrides", "error, last line"],
        ["1", "pruner=abs seed=1", "ValueError: too wide"],
        ["2", "pruner=abs seed=2", "no error was written"],
        ["4", "pruner=abs seed=4", "it has finished, but its accuracy is not a finite number"],
        ["job", "overrides"],
        ["3", "pruner=abs seed=3"],
    ]
    assert report.usable == 1
    assert re.findall(r"<b>(\d+)</b>", page) == ["1", "3", "1", "0"]


def test_the_command_says_what_it_skipped_and_ends_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job(tmp_path / "0", target_sparsity=0.5, epochs=6)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "result.json").write_text('{"status"')
    (tmp_path / "notes").mkdir()
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[: lines.index(f"Wrote {tmp_path / 'report.html'}")] == [
        "Take none: no network is within 1 point of the dense network; the closest, as configured at 50 %, is 5.0 "
        "points below the dense network (1 seed).",
        "  Prune less, train longer after pruning, or allow more: --max-drop 5.",
    ]
    assert lines[2:] == [
        *(f"Wrote {tmp_path / name}" for name in ("report.html", "summary.csv", "pareto.svg")),
        "Skipped 1: its result.json is not valid JSON: half written, or of another program",
        "Skipped notes: it is not a job: it has no result.json and no .hydra",
    ]
    assert "it is not a job" in read_page(tmp_path)


def test_without_a_finished_job_the_command_ends_badly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job(tmp_path / "0", status="failed", accuracy=None, error="RuntimeError: no")
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"Error: no job in {tmp_path} has finished with an accuracy\n"
    assert "RuntimeError: no" in read_page(tmp_path)  # the page is there all the same


def test_a_directory_without_jobs_is_one_sentence_and_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    assert main([str(tmp_path)]) == 1
    reason = "photos: it is not a job: it has no result.json and no .hydra"
    assert capsys.readouterr().err == f"Error: {tmp_path} holds no job with a result.json that can be read; {reason}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "nowhere is not a directory" in capsys.readouterr().err


def test_another_apps_smallest_result_is_enough(tmp_path: Path) -> None:
    for index in range(2):
        (tmp_path / str(index)).mkdir()
        (tmp_path / str(index) / "result.json").write_text('{"status": "finished", "accuracy": 0.75}')
    assert build_report(tmp_path).usable == 2
    assert ["as configured", "2", "75.00 %", *[""] * 8, "0, 1"] in cells(read_page(tmp_path))


def test_values_of_odd_types_never_stop_it(tmp_path: Path) -> None:
    odd: list[Any] = [[1], {"a": 1}, "text", None, True, -5, 10**400, 1e308, "NaN"]
    fields = ("sparsity", "target_sparsity", "baseline_accuracy", "params", "macs", "timings", "dense", "shrunk")
    for index, value in enumerate(odd):
        more = {"overrides": value, "choices": value, "error": value, "config_hash": value, "params_dense": value}
        (tmp_path / str(index)).mkdir()
        result = {"status": "finished", "accuracy": 0.5, **dict.fromkeys(fields, value), **more}
        (tmp_path / str(index) / "result.json").write_text(json.dumps(result))
        (tmp_path / str(index) / "masks.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    for record in ("[]", "{", '{"axes": [], "command": 3, "started": "soon"}', '{"axes": {"a": 1, "b": [[], {}]}}'):
        (tmp_path / "sweep.json").write_text(record)
        assert build_report(tmp_path).usable == len(odd)


def test_names_that_break_drawing_or_encoding_do_not(tmp_path: Path) -> None:
    job(tmp_path / "0", "pruner=$x^$", target_sparsity=0.5, sparsity=0.5)
    job(tmp_path / "1", "pruner=_\ud800\u6f22\x00\n", target_sparsity=0.5, sparsity=0.5, error="\ud800")
    job(tmp_path / "2", "pruner=" + "long" * 500, target_sparsity=0.5, sparsity=0.5)
    assert build_report(tmp_path).usable == 3


def test_head_tells_command_times_and_axes(tmp_path: Path) -> None:
    record = {
        "command": "python train.py --multirun seed=0,1",
        "status": "running",
        "axes": {"seed": ["0", "1"], "model": ["vit"]},
        "started": "2026-11-23T02:00:00+00:00",
        "ended": None,
    }
    job(tmp_path / "0", "seed=0", "model=vit", target_sparsity=0.5)
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    build_report(tmp_path)
    page = read_page(tmp_path)
    facts = re.findall(r"<dt>(.*?)</dt><dd.*?>(.*?)</dd>", page[page.index("<h2>This sweep") :])
    assert facts == [
        ("directory", str(tmp_path)),
        ("command", "python train.py --multirun seed=0,1"),
        ("status", "interrupted"),  # no process has the sweep's lock
        ("started", "2026-11-23 02:00:00 UTC"),
        ("set in every job", "seed=0 model=vit"),
        ("swept: seed", "0, 1"),
    ]


def test_where_the_time_goes_and_what_the_cache_saved(tmp_path: Path) -> None:
    for index, source in enumerate(("trained", "cache", "cache")):
        timings = {"train": 6.0 + index, "start": 1.0, "files": 1.0, "odd": "x"}
        dense = {"source": source, "train_seconds": 30, "seconds": 30 if source == "trained" else 1}
        job(tmp_path / str(index), f"seed={index}", target_sparsity=0.5, timings=timings, dense=dense)
    build_report(tmp_path)
    page = read_page(tmp_path)
    rows = cells(page)
    assert rows[rows.index(["part of a job", "seconds, mean", "share"]) + 1 :] == [
        ["start: data, model, rehearsal", "1.00", "11 %"],
        ["training, dense and pruned", "7.00", "78 %"],
        ["files and figures", "1.00", "11 %"],
    ]
    assert "A job takes 9.00 s on average, 2.00 s of it beyond training (3 finished jobs)." in page
    assert "1 dense network trained, 2 jobs started from the cache, which saved 58.0 s." in page


def test_layers_are_shown_apart_for_families_of_different_layers(tmp_path: Path) -> None:
    root = sweep(tmp_path)
    other = job(root / "8", "pruner=weighted", "seed=0", target_sparsity=0.5)
    save_masks(other / "masks.safetensors", {f"layer{i}": torch.ones(3, dtype=torch.bool) for i in range(90)})
    build_report(root)
    page = read_page(root)
    assert page.count('class="map"') == 2
    assert "30 layers in the middle are not shown" in page


def test_many_sparsities_go_by_tens(tmp_path: Path) -> None:
    for index in range(15):
        job(tmp_path / str(index), f"lr={index}", target_sparsity=0.3 + index / 50, sparsity=0.3 + index / 50)
    build_report(tmp_path)
    headings = [row[0] for row in cells(read_page(tmp_path)) if len(row) == 1]
    assert headings == [
        "Nothing pruned",
        *(f"{low} to {low + 10} % pruned, of what is not recorded" for low in (30, 40, 50)),
    ]


def test_equal_jobs_are_counted_once_and_said(tmp_path: Path) -> None:
    for index in range(3):
        job(tmp_path / str(index), "seed=0", config_hash="same", target_sparsity=0.5)
    report = build_report(tmp_path)
    assert report.usable == 1
    assert report.left_out == dict.fromkeys("12", "an equal job (the same config_hash) has finished in 0")


def test_it_is_rebuilt_over_itself_with_the_same_picture(built: Path) -> None:
    first = (built / "pareto.svg").read_bytes()
    build_report(built)
    assert (built / "pareto.svg").read_bytes() == first
    assert sorted(path.name for path in built.iterdir() if path.is_file()) == [
        "pareto.svg", "report.html", "summary.csv",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_command_runs_as_a_module_without_masks_and_torch(tmp_path: Path) -> None:
    job(tmp_path / "0", target_sparsity=0.5, sparsity=0.5)
    code = "import sys; from gsprune.sweeps.report import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    command = [sys.executable, "-m", "gsprune", "report", str(tmp_path)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stderr == ""


AUDITED = {
    "abs": [{"criterion": "Abs", "kind": "channels", "units": 48, "size": [0.6, 0.4, 0.7], "signed": None}],
    "fisher": [{"criterion": "Fisher", "kind": "channels", "units": 48, "size": [0.8, 0.7, 0.9], "signed": [0, -1, 1]}],
}


def test_audits_are_a_table_with_a_row_for_each_criterion(tmp_path: Path) -> None:
    for number, (pruner, seed) in enumerate((("abs", 0), ("abs", 1), ("fisher", 0))):
        rows = [dict(row) for row in AUDITED[pruner]]
        if seed:
            rows[0] |= {"size": [0.5, 0.3, 0.65], "units": 24}
        job(tmp_path / str(number), f"pruner={pruner}", f"seed={seed}", audit={"rows": rows}, config_hash=str(number))
    build_report(tmp_path)
    page = read_page(tmp_path)
    table = [row for row in cells(page) if row[0] in ("Abs", "Fisher", "criterion")]
    assert table == [
        ["criterion", "units", "jobs", "removedin each", "Spearman withabs(change)", "withchange"],
        ["Fisher", "channels", "1", "48", "0.80 (0.70 to 0.90)", "0.00 (-1.00 to 1.00)"],
        ["Abs", "channels", "2", "36", "0.55 (0.30 to 0.70)", ""],
    ]


def test_audits_of_different_networks_stand_apart(tmp_path: Path) -> None:
    for number, model in enumerate(("vit_tiny", "convnet")):
        job(tmp_path / str(number), f"model={model}", audit={"rows": AUDITED["abs"]}, config_hash=str(number))
    build_report(tmp_path)
    rows = [row for row in cells(read_page(tmp_path)) if row[0] == "Abs"]
    assert [row[2] for row in rows] == ["model=convnet", "model=vit_tiny"]


def test_an_audit_of_odd_types_is_left_out_and_without_one_there_is_no_section(tmp_path: Path) -> None:
    odd = [
        3,
        {"criterion": 1},
        {"criterion": "A", "kind": "k", "units": "9"},
        {"criterion": "B", "kind": "k", "units": 9},
    ]
    odd[3]["size"] = ["x", 0, 7]
    job(tmp_path / "0", "seed=0", audit={"rows": odd}, config_hash="0")
    job(tmp_path / "1", "seed=1", audit=[], config_hash="1")
    build_report(tmp_path)
    assert [row for row in cells(read_page(tmp_path)) if row[0] == "B"] == [["B", "k", "1", "9", "", ""]]
    other = tmp_path / "other"
    job(other / "0", "seed=0")
    build_report(other)
    assert "removal does" not in read_page(other)
