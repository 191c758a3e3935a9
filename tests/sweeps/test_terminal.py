"""What a sweep says on the terminal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gsprune.sweeps.results import JobResult
from gsprune.sweeps.terminal import Jobs, job_of, summary
from gsprune.sweeps.variants import Point, Stat, Unpruned


def job(name: str, **numbers: Any) -> JobResult:
    return JobResult(Path(name), {"status": "finished", **numbers})


def point(variant: str, sparsity: float | None, *jobs: JobResult) -> Point:
    return Point(variant, sparsity, jobs)


def test_time_left_is_that_of_the_jobs_that_ran_here():
    now = [0.0]
    jobs = Jobs(4, now=lambda: now[0])
    assert jobs.start(0) == "job 1 of 4"
    jobs.end()
    now[0] = 90.0
    jobs.start(1)
    jobs.end()
    now[0] = 120.0
    assert jobs.start(2).startswith("job 3 of 4, 2:00 min left, until about ")  # two that took a minute each
    assert (job_of(2, None), job_of(2, 8)) == ("job 3", "job 3 of 8")


def test_the_last_lines_are_the_verdict_and_a_row_for_each_network():
    half = {"params": 25, "params_dense": 100, "macs": 50, "macs_dense": 100, "sparsity": 0.5}
    seeds = [job(str(i), accuracy=0.9, val_accuracy=value, **half) for i, value in enumerate((0.8, 0.9, 1.0))]
    points = [
        point("weighted", 0.5, *seeds),
        point("abs", 0.5, job("3", accuracy=0.9, val_accuracy=0.75, **half)),
        point("abs", 0.25, job("4", accuracy=0.9, val_accuracy=0.95, **half)),
    ]
    lines = summary(["Take weighted."], points, [], width=100)
    assert lines[0] == "Take weighted."
    head, _, *rows = (line.split("  ") for line in lines[2:])
    assert [cell.strip() for cell in head if cell.strip()] == [
        *("network", "jobs", "validation", "sparsity", "parameters", "MACs"),
    ]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert [row[0] for row in cells] == ["abs", "abs", "weighted"]
    assert cells[0] == ["abs", "1", "95.00 %", "50.0 %", "4.00x fewer", "2.00x fewer"]
    assert cells[2][1:3] == ["3", "90.00 +- 10.00 %"]


def rows(lines: list[str]) -> list[list[str]]:
    return [[cell for cell in re.split(r"\s{2,}", line.strip()) if cell] for line in lines]


def test_what_differences_are_to_stands_above_the_networks():
    half = {"params": 25, "params_dense": 100, "macs": 50, "macs_dense": 100, "sparsity": 0.5}
    dense = Unpruned("dense network", "", Stat(2, 0.97, None), Stat(2, 0.96, None), 6, ())
    control = Unpruned("control", "", Stat(2, 0.99, None), Stat(2, 0.98, None), 14, ())
    found = [Point("abs", 0.5, (job("0", accuracy=0.95, val_accuracy=0.95, baseline_accuracy=0.97, **half),))]
    with_control = rows(summary([], found, [dense, control], width=100))
    assert with_control[2] == ["control", "2", "98.00 %", "all", "all"]
    assert set(*with_control[3]) == {"-"}
    assert with_control[4] == ["abs", "1", "95.00 %", "-2.00", "50.0 %", "4.00x fewer", "2.00x fewer"]
    assert rows(summary([], found, [dense], width=100))[2] == ["dense network", "2", "96.00 %", "all", "all"]


def test_zeros_in_tensors_of_the_old_size_are_counted():
    same = {"params": 100, "params_dense": 100, "params_nonzero": 10, "macs": 50, "macs_dense": 50, "sparsity": 0.9}
    found = [point("elementwise", 0.9, job("0", accuracy=0.95, val_accuracy=0.95, **same))]
    assert rows(summary([], found, [], width=100))[2] == [
        "elementwise",
        "1",
        "95.00 %",
        "90.0 %",
        "10.0 % not zero",
        "all",
    ]


def test_a_large_sweep_shows_thirty_networks_and_counts_the_others():
    points = [point(f"v{i}", None, job(str(i), accuracy=0.9, val_accuracy=0.9)) for i in range(32)]
    lines = summary([], points, [], width=80)
    assert sum(line.startswith("v") for line in lines) == 30
    assert lines[-1] == "and 2 other networks: the report has all"
    assert summary(["none"], [], [], width=80) == ["none"]


def test_names_from_results_cannot_move_the_cursor():
    lines = summary([], [point("a\x1b[2J\nb", None, job("0", accuracy=0.9, val_accuracy=0.9))], [], width=80)
    assert all(line.isprintable() for line in lines)
