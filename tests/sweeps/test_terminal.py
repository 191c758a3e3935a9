"""What a sweep says on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gsprune.sweeps.results import JobResult
from gsprune.sweeps.terminal import Jobs, job_of, summary
from gsprune.sweeps.variants import Point


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
    lines = summary(["Take weighted."], points, width=100)
    assert lines[0] == "Take weighted."
    head, _, *rows = (line.split("  ") for line in lines[2:])
    assert [cell.strip() for cell in head if cell.strip()] == [
        *("network", "jobs", "validation", "sparsity", "parameters", "MACs"),
    ]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert [row[0] for row in cells] == ["abs", "abs", "weighted"]
    assert cells[0] == ["abs", "1", "95.00 %", "50.0 %", "4.00x fewer", "2.00x fewer"]
    assert cells[2][1:3] == ["3", "90.00 +- 10.00 %"]


def test_a_large_sweep_shows_thirty_networks_and_counts_the_others():
    points = [point(f"v{i}", None, job(str(i), accuracy=0.9, val_accuracy=0.9)) for i in range(32)]
    lines = summary([], points, width=80)
    assert sum(line.startswith("v") for line in lines) == 30
    assert lines[-1] == "and 2 other networks: the report has all"
    assert summary(["none"], [], width=80) == ["none"]


def test_names_from_results_cannot_move_the_cursor():
    lines = summary([], [point("a\x1b[2J\nb", None, job("0", accuracy=0.9, val_accuracy=0.9))], width=80)
    assert all(line.isprintable() for line in lines)
