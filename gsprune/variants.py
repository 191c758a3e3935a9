"""What the jobs of a sweep say together: variants, means over seeds, Pareto fronts.

A *variant* is the configuration without seed and wanted sparsity; a *point* is a variant at one wanted sparsity, that
is its jobs over all seeds. Imports results.py and the standard library.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from gsprune.results import JobResult, natural

__all__ = ["Dense", "Point", "Stat", "dense_levels", "once_each", "pareto_front", "points", "stat", "swept", "variants"]

SEED, TARGET = "seed", "pruner.target_sparsity"


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation; a single value has no spread."""

    count: int
    mean: float
    spread: float | None


def stat(values: Iterable[float | None]) -> Stat | None:
    """The statistics of what is not None; None when nothing is left.

    >>> stat([1.0, None, 3.0])
    Stat(count=2, mean=2.0, spread=1.4142135623730951)
    >>> stat([5.0])
    Stat(count=1, mean=5.0, spread=None)
    """
    found = [value for value in values if value is not None]
    if not found:
        return None
    spread = statistics.stdev(found) if len(found) > 1 else None
    return Stat(len(found), math.fsum(found) / len(found), spread)


@dataclass(frozen=True)
class Point:
    """One variant at one wanted sparsity (None: no job says which, or a budget was wanted)."""

    variant: str
    target: float | None
    jobs: tuple[JobResult, ...]

    @cached_property
    def accuracy(self) -> Stat:
        found = stat(job.number("accuracy") for job in self.jobs)
        assert found is not None  # only jobs with an accuracy get here
        return found

    @cached_property
    def delta(self) -> Stat | None:
        """Accuracy less that of the same job's dense network."""
        return stat(_difference(job, "accuracy", "baseline_accuracy") for job in self.jobs)

    @cached_property
    def sparsity(self) -> Stat | None:
        return stat(_share(job) for job in self.jobs)

    @property
    def pruner(self) -> str:
        return _pruner(self.jobs[0]) or "all jobs"

    @property
    def shrunk(self) -> bool:
        """The pruned network is really smaller, not full of zeros."""
        return any(job.result.get("shrunk") is True for job in self.jobs)

    @property
    def best(self) -> JobResult:
        return max(self.jobs, key=lambda job: job.number("accuracy") or 0.0)  # of equals the first

    def mean(self, name: str) -> float | None:
        found = stat(job.number(name) for job in self.jobs)
        return found.mean if found else None

    def times_less(self, name: str, dense: str) -> float | None:
        """dense / pruned, the mean over the jobs: 4.0 is four times smaller."""
        found = stat(_ratio(job, dense, name) for job in self.jobs)
        return found.mean if found else None

    def share_left(self, name: str, dense: str) -> float | None:
        """pruned / dense, the mean over the jobs."""
        found = stat(_ratio(job, name, dense) for job in self.jobs)
        return found.mean if found else None


@dataclass(frozen=True)
class Dense:
    """The dense networks' accuracy: one value each for jobs that start from different ones."""

    label: str
    accuracy: float


def once_each(jobs: Sequence[JobResult]) -> tuple[list[JobResult], dict[str, str]]:
    """The jobs without repetitions of a finished one, and why the others are left out.

    Equal configurations give equal results: counted twice they would make the spread too small.
    """
    first: dict[str, str] = {}
    for job in jobs:
        if job.status == "finished" and job.config_hash is not None:
            first.setdefault(job.config_hash, job.name)
    kept, left_out = [], {}
    for job in jobs:
        equal = first.get(job.config_hash or "", job.name)
        if equal == job.name:
            kept.append(job)
        else:
            left_out[job.name] = f"an equal job (the same config_hash) has finished in {equal}"
    return kept, left_out


def swept(jobs: Sequence[JobResult]) -> dict[str, list[str]]:
    """The overrides that differ between jobs, key -> values in natural order; one that a job lacks is "".

    A job that does not tell its overrides is left out of the comparison.
    """
    jobs = [job for job in jobs if job.overrides]
    keys = dict.fromkeys(key for job in jobs for key in job.overrides)
    values = {key: {job.overrides.get(key, "") for job in jobs} for key in keys}
    return {key: sorted(found, key=natural) for key, found in values.items() if len(found) > 1}


def variants(jobs: Sequence[JobResult], axes: Iterable[str]) -> dict[str, str]:
    """Folder -> name of its variant: the pruner, then what else was swept, as short as it stays clear.

    Group choices stand by themselves ("vit_tiny"), values with the last part of their key ("lr=0.1"), the whole key
    when two end alike.
    """
    names = [axis for axis in axes if axis not in (SEED, TARGET, "pruner")]
    endings = Counter(name.rpartition(".")[2] for name in names)

    def text(job: JobResult, key: str) -> str:
        value = job.overrides.get(key)
        if not value:
            return ""
        if "." not in key and value.lower() not in ("true", "false", "null") and not _is_number(value):
            return value
        ending = key.rpartition(".")[2]
        return f"{ending if endings[ending] == 1 else key}={value}"

    pruned = [_pruner(job) for job in jobs]
    show_pruner = len(set(pruned)) > 1 or not names
    found = {}
    for job, pruner in zip(jobs, pruned, strict=True):
        parts = [pruner if show_pruner else "", *(text(job, name) for name in names)]
        found[job.name] = ", ".join(part for part in parts if part) or "as configured"
    return found


def points(jobs: Sequence[JobResult], names: Mapping[str, str]) -> list[Point]:
    """The usable jobs by wanted sparsity (rising, unknown last), in that the best mean accuracy first."""
    groups: dict[tuple[str, float | None], list[JobResult]] = {}
    for job in jobs:
        groups.setdefault((names[job.name], _target(job)), []).append(job)
    found = [Point(variant, target, tuple(group)) for (variant, target), group in groups.items()]
    return sorted(found, key=lambda p: (p.target is None, p.target or 0, -p.accuracy.mean, natural(p.variant)))


def pareto_front(pairs: Sequence[tuple[float, float]]) -> list[bool]:
    """True where no other pair is at least as high in both and higher in one. Equal pairs share their place.

    >>> pareto_front([(0.5, 0.99), (0.8, 0.97), (0.8, 0.95), (0.6, 0.90), (0.8, 0.97)])
    [True, True, False, False, True]
    """
    on_front = [False] * len(pairs)
    best = -math.inf  # the highest second value so far, going from the highest first value down
    order = sorted(range(len(pairs)), key=lambda i: (-pairs[i][0], -pairs[i][1]))
    last: tuple[float, float] | None = None
    for i in order:
        if pairs[i][1] > best:
            best, last = pairs[i][1], pairs[i]
        on_front[i] = pairs[i] == last
    return on_front


def dense_levels(jobs: Sequence[JobResult], axes: Iterable[str], *, most: int = 3) -> list[Dense]:
    """Mean accuracy of the dense networks; apart for each setting outside the pruner, if these are few and differ."""
    outside = [axis for axis in axes if axis != SEED and axis.partition(".")[0] != "pruner"]
    groups: dict[tuple[str, ...], list[JobResult]] = {}
    for job in jobs:
        groups.setdefault(tuple(job.overrides.get(axis, "") for axis in outside), []).append(job)
    levels: dict[float, list[str]] = {}
    for key, group in groups.items():
        found = stat(job.number("baseline_accuracy") for job in group)
        if found is not None:
            levels.setdefault(round(found.mean, 4), []).append(", ".join(part for part in key if part))
    if len(levels) <= 1:
        return [Dense("dense network", level) for level in levels]
    if len(levels) <= most:
        return [Dense(f"dense network, {' or '.join(names)}", level) for level, names in sorted(levels.items())]
    return [Dense("lowest dense network", min(levels)), Dense("highest dense network", max(levels))]


def _pruner(job: JobResult) -> str:
    return job.overrides.get("pruner") or job.choices.get("pruner") or ""


def _target(job: JobResult) -> float | None:
    """What sparsity was wanted: as written, else as overridden, else what was reached in whole per cent.

    Under a budget none was: the same one leaves another sparsity with every seed.
    """
    if job.result.get("budget"):
        return None
    target = job.number("target_sparsity")
    if target is None and _is_number(job.overrides.get(TARGET, "")):
        target = float(job.overrides[TARGET])
    if target is None:
        reached = _share(job)
        return None if reached is None else round(reached, 2)
    return round(target, 6) if 0 <= target <= 1 else None


def _share(job: JobResult) -> float | None:
    share = job.number("sparsity")
    return share if share is not None and 0 <= share <= 1 else None


def _difference(job: JobResult, name: str, less: str) -> float | None:
    first, second = job.number(name), job.number(less)
    return None if first is None or second is None else first - second


def _ratio(job: JobResult, above: str, below: str) -> float | None:
    first, second = job.number(above), job.number(below)
    if first is None or second is None or first < 0 or second <= 0:
        return None
    ratio = first / second
    return ratio if math.isfinite(ratio) else None


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
