"""What the audits of a sweep's jobs say (`audit=true`): how well each criterion's scores rank what removal does."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gsprune.sweeps.results import JobResult
from gsprune.sweeps.variants import SEED

__all__ = ["AuditRow", "audits"]

_SECOND_PHASE = re.compile(r"(pruner|cut|mode|audit)\b|trainer\.(prune|distill)")  # no part of the dense network
_MAX_ROWS = 60
Interval = tuple[float, float, float]


@dataclass(frozen=True)
class AuditRow:
    """One criterion on one kind of unit of one dense network.

    network   the overrides that it depends on, but for the seed; "" where the sweep has one
    units     that were removed in a job, the mean
    size      mean of the jobs' correlations with abs(change), with the lowest and the highest end of their intervals;
              None where it is not defined in any
    signed    the same with the change itself
    """

    network: str
    criterion: str
    kind: str
    jobs: int
    units: float
    size: Interval | None
    signed: Interval | None


def audits(jobs: Sequence[JobResult], axes: Iterable[str]) -> tuple[list[AuditRow], int]:
    """A row for each network, criterion and kind, and how many rows are left out.

    Jobs of one network differ in their seeds, or only in how much they prune: they stand in one row.
    """
    named = [axis for axis in axes if axis != SEED and not _SECOND_PHASE.match(axis)]
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for job in jobs:
        network = ", ".join(f"{axis}={job.overrides[axis]}" for axis in named if job.overrides.get(axis))
        for row in _rows(job):
            found[network, row["criterion"], row["kind"]].append(row)
    rows = [
        AuditRow(*key, len(some), sum(r["units"] for r in some) / len(some), _mean(some, "size"), _mean(some, "signed"))
        for key, some in found.items()
    ]
    rows.sort(key=lambda row: (row.network, row.kind, -(row.size or (-2.0,))[0]))
    return rows[:_MAX_ROWS], max(0, len(rows) - _MAX_ROWS)


def _rows(job: JobResult) -> Iterator[dict[str, Any]]:
    audit = job.result.get("audit")
    rows = audit.get("rows") if isinstance(audit, dict) else None
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict) and all(isinstance(row.get(name), str) for name in ("criterion", "kind")):
            units = row.get("units")
            if type(units) is int and 0 < units < 10**9:
                yield row


def _mean(rows: Sequence[dict[str, Any]], name: str) -> Interval | None:
    """
    >>> _mean([{"size": [0.5, 0.3, 0.7]}, {"size": [0.7, 0.6, 0.8]}, {"size": None}], "size")
    (0.6, 0.3, 0.8)
    """
    known = [row[name] for row in rows if _is_interval(row.get(name))]
    if not known:
        return None
    return sum(at[0] for at in known) / len(known), min(at[1] for at in known), max(at[2] for at in known)


def _is_interval(value: object) -> bool:
    """Whether it is [correlation, low, high]."""
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in value)
        and all(-1 <= x <= 1 for x in value)
    )
