"""What a sweep says on the terminal: which job runs and how long the others take, and at its end what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from gsprune.sweeps.variants import VALIDATION, Point, Stat, Unpruned
from gsprune.text.display import label, percent
from gsprune.text.names import natural
from gsprune.text.table import noun, table, until

__all__ = ["Jobs", "summary"]

MOST = 30  # rows of the table


class Jobs:
    """Counts the jobs that one process runs one after the other.

    >>> now = [0.0]
    >>> jobs = Jobs(3, now=lambda: now[0])
    >>> jobs.start(0), jobs.end()
    ('job 1 of 3', None)
    >>> now[0] = 60.0; jobs.start(1).partition(", until")[0]
    'job 2 of 3, 2:00 min left'
    """

    def __init__(self, jobs: int, *, now: Callable[[], float] = time.monotonic) -> None:
        self._jobs, self._now = jobs, now
        self._since, self._ended = now(), 0

    def start(self, number: int) -> str:
        """A line for the job of that number, from 0. Jobs that had finished before take next to no time, and none
        count: what is left takes as long, job by job, as what this process has run."""
        spent, left = self._now() - self._since, self._jobs - number
        told = f", {until(spent / self._ended * left)}" if self._ended and spent > 1 else ""
        return f"{job_of(number, self._jobs)}{told}"

    def end(self) -> None:
        """A job has ended."""
        self._ended += 1


def job_of(number: int, jobs: int | None) -> str:
    """
    >>> job_of(0, 4), job_of(6, None)
    ('job 1 of 4', 'job 7')
    """
    return f"job {number + 1}" + (f" of {jobs}" if jobs else "")


def summary(verdicts: Sequence[str], points: Sequence[Point], unpruned: Sequence[Unpruned], *, width: int) -> list[str]:
    """The last lines of a sweep: the verdict, then a table.

    Its first rows are what the differences are to, the controls, or the dense networks in a sweep without any. Below
    them is a row for each variant at each sparsity.

    Args:
        points: of `gsprune.sweeps.variants.points`; the first 30 by name and sparsity are shown.
        unpruned: of `gsprune.sweeps.variants.unpruned_rows`.
    """
    lines = [*verdicts]
    if not points:
        return lines
    by = "validation" if points[0].by == VALIDATION else "test"
    head = ("network", "jobs", by, "test difference", "sparsity", "parameters", "MACs", "faster")
    ordered = sorted(points, key=lambda point: (natural(point.variant), point.target_sparsity or 0))
    references = [row for row in unpruned if row.is_control] or [*unpruned]
    above = [*map(_reference, references[:MOST]), ()] if references else []
    rows = [_row(point) for point in ordered[:MOST]]
    used = [i for i, _ in enumerate(head) if i < 3 or any(row[i] for row in rows)]
    shown = [[row[i] for i in used if row] for row in (*above, *rows)]
    lines += [*([""] if lines else []), *table([head[i] for i in used], shown, width=width)]
    if len(points) > MOST:
        lines.append(f"and {noun(len(points) - MOST, 'other network')}: the report has all")
    return lines


def _reference(row: Unpruned) -> tuple[str, ...]:
    accuracy = "" if row.choice is None else _accuracy(row.choice)
    return label(row.variant, 60), str(row.accuracy.count), accuracy, "", "", "all", "all", ""


def _row(point: Point) -> tuple[str, ...]:
    share = "" if point.sparsity is None else percent(point.sparsity.mean)
    faster = "" if point.faster is None else f"{point.faster[0]:.2f}x"
    return (
        label(point.variant, 60),
        str(len(point.jobs)),
        _accuracy(point.choice),
        "" if point.delta is None else f"{100 * point.delta.mean:+.2f}",
        share,
        _parameters(point),
        _times(point.ratio("macs_dense", "macs")),
        faster,
    )


def _parameters(point: Point) -> str:
    """How many fewer there are, or, in tensors of the old size, how many are not zero."""
    told, left = _times(point.ratio("params_dense", "params")), point.left
    return f"{percent(left)} not zero" if told == "all" and left is not None and left < 0.995 else told


def _accuracy(found: Stat) -> str:
    """
    >>> _accuracy(Stat(3, 0.5, 0.01)), _accuracy(Stat(1, 0.5, None))
    ('50.00 +- 1.00 %', '50.00 %')
    """
    spread = f" +- {100 * found.spread:.2f}" if found.spread is not None else ""
    return f"{100 * found.mean:.2f}{spread} %"


def _times(ratio: float | None) -> str:
    """
    >>> _times(4.0), _times(1.0), _times(None)
    ('4.00x fewer', 'all', '')
    """
    if ratio is None:
        return ""
    return f"{ratio:.2f}x fewer" if ratio > 1.005 else "all"
