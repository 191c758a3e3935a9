"""What the jobs of a sweep say together: variants, means over seeds, Pareto fronts.

A *variant* is the configuration without seed and target sparsity; a *point* is a variant at one target sparsity: its
jobs with all seeds. A *control* is a job with `pruner=none`, the reference of every difference. Choices are made on the
validation split.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

from gsprune.files.disk import sha256
from gsprune.settings.identity import NOT_HASHED
from gsprune.sweeps.results import JobResult
from gsprune.text.names import natural

__all__ = [
    "Point",
    "Stat",
    "Unpruned",
    "chosen_by",
    "controls",
    "equal_merged",
    "is_control",
    "job_ratio",
    "once_each",
    "pareto_front",
    "points",
    "seed_of",
    "stat",
    "swept",
    "unpruned",
    "unpruned_rows",
    "variants",
]

SEED, TARGET = "seed", "pruner.target_sparsity"
VALIDATION, TEST = "val_accuracy", "accuracy"
# What a control does not share with its jobs: what makes it a control, and what changes no number of a result.
_TIMED = tuple(f"trainer.latency_{name}" for name in ("repeats", "batch", "seconds"))
_NOT_SHARED = ("pruner", "seed", "experiment", *NOT_HASHED, *_TIMED)
_RESULT = ("accuracy", "val_accuracy", "loss", "sparsity", "params", "params_nonzero", "macs")
_MAX_NAMES = 4  # of variants with the same result


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation; the spread of fewer than three values means nothing and is None."""

    count: int
    mean: float
    spread: float | None


def stat(values: Iterable[float | None]) -> Stat | None:
    """The statistics of the values that are not None; None without any.

    >>> stat([1.0, None, 2.0, 3.0])
    Stat(count=3, mean=2.0, spread=1.0)
    >>> stat([5.0, 5.0])
    Stat(count=2, mean=5.0, spread=None)
    """
    found = [value for value in values if value is not None]
    if not found:
        return None
    spread = statistics.stdev(found) if len(found) > 2 else None
    return Stat(len(found), math.fsum(found) / len(found), spread)


@dataclass(frozen=True)
class Point:
    """One variant at one target sparsity (None: unknown, or the jobs had a budget).

    Attributes:
        by: the number of a result that choices are made by (`chosen_by`).
        controls: job name -> the control with the same seed and settings; None in a sweep without controls.
        same: other variants whose jobs here have the same masks and the same result.
        fronts: names of the measures on whose Pareto front the point is.
    """

    variant: str
    target_sparsity: float | None
    jobs: tuple[JobResult, ...]
    by: str = VALIDATION
    controls: Mapping[str, JobResult] | None = None
    same: tuple[str, ...] = ()
    fronts: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, float | None]:
        return self.variant, self.target_sparsity

    @cached_property
    def accuracy(self) -> Stat:
        """On the test split."""
        found = stat(job.number(TEST) for job in self.jobs)
        assert found is not None  # a point has only jobs with an accuracy
        return found

    @cached_property
    def choice(self) -> Stat:
        """The accuracy that choices are made by, on the validation split."""
        return stat(job.number(self.by) for job in self.jobs) or self.accuracy

    @cached_property
    def delta(self) -> Stat | None:
        """Test accuracy minus that of the job's control, or of its dense network in a sweep without controls."""
        if self.controls is None:
            return stat(_difference(job, TEST, job, "baseline_accuracy") for job in self.jobs)
        pairs = [(job, self.controls[job.name]) for job in self.jobs if job.name in self.controls]
        return stat(_difference(job, TEST, control, TEST) for job, control in pairs)

    @property
    def of(self) -> str:
        """What the sparsity counts: "weights", "channels", ...; "" if unknown.

        Older results do not say it: then a smaller network tells, or a pruner that knows one kind only.
        """
        job = self.jobs[0]
        guess = "units" if job.result.get("shrunk") is True else "weights" if _pruner(job) == "elementwise" else ""
        return job.text("sparsity_of") or guess

    @property
    def left(self) -> float | None:
        """Share of the dense network's parameters that are left and not zero: comparable for all kinds of pruning."""
        left = self.ratio("params_nonzero", "params_dense")
        return self.ratio("params", "params_dense") if left is None and self.shrunk else left

    @cached_property
    def sparsity(self) -> Stat | None:
        return stat(_share(job) for job in self.jobs)

    @property
    def pruner(self) -> str:
        return _pruner(self.jobs[0]) or "all jobs"

    @property
    def shrunk(self) -> bool:
        """Whether the pruned network is smaller, not full of zeros."""
        return any(job.result.get("shrunk") is True for job in self.jobs)

    @property
    def best(self) -> JobResult:
        return max(self.jobs, key=lambda job: job.number(self.by) or 0.0)  # the first of equals

    def mean(self, name: str) -> float | None:
        found = stat(job.number(name) for job in self.jobs)
        return found.mean if found else None

    def ratio(self, above: str, below: str) -> float | None:
        """above / below, the mean over the jobs: `ratio("params_dense", "params")` is 4.0 if four times smaller."""
        found = stat(job_ratio(job, above, below) for job in self.jobs)
        return found.mean if found else None

    @cached_property
    def faster(self) -> tuple[float, float, float] | None:
        """Dense latency / pruned latency: the mean over the jobs, the lowest and the highest end of their intervals."""
        rows = [tuple(job.number(name) for name in ("speedup", "speedup_low", "speedup_high")) for job in self.jobs]
        known = [(r, low, high) for r, low, high in rows if r and low and high and 0 < low <= high and r > 0]
        if not known:
            return None
        ratios, lows, highs = zip(*known, strict=True)
        return math.fsum(ratios) / len(ratios), min(lows), max(highs)

    @property
    def latency_note(self) -> str:
        """Why `faster` is None, in a few words; "" if no job says it."""
        notes = (job.text("latency_note") for job in self.jobs)
        return next((note.partition(":")[0] for note in notes if note), "")


def once_each(jobs: Sequence[JobResult]) -> tuple[list[JobResult], dict[str, str]]:
    """The jobs without repetitions of a finished one, and why the others are left out.

    Equal configurations give equal results: counted twice they would make the spread too small.
    """
    first: dict[str, str] = {}
    for job in jobs:
        if job.status == "finished" and job.config_hash is not None:
            first.setdefault(job.config_hash, job.name)
    equal = {job.name: first.get(job.config_hash or "", job.name) for job in jobs}
    left_out = {
        name: f"an equal job (the same config_hash) has finished in {other}"
        for name, other in equal.items()
        if other != name
    }
    return [job for job in jobs if job.name not in left_out], left_out


def swept(jobs: Sequence[JobResult]) -> dict[str, list[str]]:
    """The overrides that differ between jobs, key -> values in natural order; "" for a job without that override.

    Jobs without any known override are not compared.
    """
    jobs = [job for job in jobs if job.overrides]
    keys = dict.fromkeys(key for job in jobs for key in job.overrides)
    values = {key: {job.overrides.get(key, "") for job in jobs} for key in keys}
    return {key: sorted(found, key=natural) for key, found in values.items() if len(found) > 1}


def variants(jobs: Sequence[JobResult], axes: Iterable[str]) -> dict[str, str]:
    """Folder -> name of its variant: the pruner, then the other axes, as short as it stays clear.

    A group choice is its option ("vit_tiny"), a value has the last part of its key ("lr=0.1"), or the whole key
    if two keys end alike.
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

    show_pruner = len({_pruner(job) for job in jobs}) > 1 or not names
    found = {}
    for job in jobs:
        parts = [_pruner(job) if show_pruner else "", *(text(job, name) for name in names)]
        found[job.name] = ", ".join(filter(None, parts)) or "as configured"
    return found


def points(jobs: Sequence[JobResult], names: Mapping[str, str]) -> list[Point]:
    """The jobs but for controls, by target sparsity (rising, unknown last) and what it counts, the best first."""
    groups: dict[tuple[str, float | None], list[JobResult]] = defaultdict(list)
    for job in jobs:
        if not is_control(job):
            groups[names[job.name], _target_sparsity(job)].append(job)
    by, pairs = chosen_by(jobs), controls(jobs)
    found = [Point(variant, target, tuple(group), by, pairs) for (variant, target), group in groups.items()]
    return sorted(found, key=_place)


def _place(point: Point) -> tuple[object, ...]:
    target = point.target_sparsity
    return target is None, target or 0, point.of, -point.choice.mean, natural(point.variant)


def chosen_by(jobs: Sequence[JobResult]) -> str:
    """ "val_accuracy", or "accuracy" if a job has no other: unlike numbers are not compared."""
    return VALIDATION if all(job.number(VALIDATION) is not None for job in jobs) else TEST


# --- controls ----------------------------------------------------------------------------------------------


def is_control(job: JobResult) -> bool:
    """Whether it is a job with `pruner=none`, which trains as long as the others."""
    return _pruner(job) == "none"


def controls(jobs: Sequence[JobResult]) -> dict[str, JobResult] | None:
    """Job name -> the control with the same seed, data set, model and other settings; None without any control."""
    known: dict[Hashable, JobResult] = {}
    for job in filter(is_control, jobs):
        known.setdefault(_settings(job), job)
    found = {job.name: known[_settings(job)] for job in jobs if not is_control(job) and _settings(job) in known}
    return found if known else None


def unpruned(jobs: Sequence[JobResult], axes: Iterable[str]) -> dict[str, list[JobResult]]:
    """Name of the settings outside the pruner -> one job for each different network that is not pruned."""
    outside = [axis for axis in axes if _is_shared(axis)]
    groups: dict[str, dict[Hashable, JobResult]] = defaultdict(dict)
    for job in jobs:
        name = ", ".join(filter(None, (job.overrides.get(axis) for axis in outside)))
        groups[name].setdefault(_settings(job), job)
    return {name: list(group.values()) for name, group in groups.items()}


@dataclass(frozen=True)
class Unpruned:
    """Networks of one setting that are not pruned, as one row of a table.

    Attributes:
        title: "control" (`pruner=none`) or "dense network" (what the pruned ones began as).
        settings: those outside the pruner that differ in the sweep, such as "vit_tiny"; "" where none does.
        accuracy, choice: on the test split, and on the split that choices are made by.
        jobs: one for each seed.
    """

    title: str
    settings: str
    accuracy: Stat
    choice: Stat | None
    epochs: float | None  # None where they differ
    jobs: tuple[JobResult, ...]

    @property
    def is_control(self) -> bool:
        return self.title == "control"

    @property
    def variant(self) -> str:
        """
        >>> Unpruned("control", "vit_tiny", Stat(1, 0.9, None), None, 14, ()).variant
        'control, vit_tiny'
        """
        return ", ".join(filter(None, (self.title, self.settings)))


def unpruned_rows(jobs: Sequence[JobResult], axes: Iterable[str]) -> list[Unpruned]:
    """The dense networks, then the controls, with an accuracy; one row for each setting outside the pruner."""
    rows, axes, by = [], list(axes), chosen_by(jobs)
    fair = [job for job in jobs if is_control(job)]
    for title, some, prefix in (("dense network", jobs, "baseline_"), ("control", fair, "")):
        for settings, group in unpruned(some, axes).items():
            accuracy, choice = (stat(job.number(prefix + key) for job in group) for key in (TEST, by))
            epochs = {job.number(f"{prefix}epochs") for job in group}
            if accuracy is not None:
                same = epochs.pop() if len(epochs) == 1 else None
                rows.append(Unpruned(title, settings, accuracy, choice, same, tuple(group)))
    return rows


def _settings(job: JobResult) -> Hashable:
    """Seed and settings outside the pruner: jobs that share them differ in how they prune, and in nothing else."""
    chosen = job.choices
    found = {**{key: value for key, value in job.overrides.items() if key not in chosen}, **chosen}
    return seed_of(job), frozenset((key, value) for key, value in found.items() if _is_shared(key))


def seed_of(job: JobResult) -> str:
    """The job's seed; "" if it has none.

    >>> from pathlib import Path
    >>> seed_of(JobResult(Path("0"), {"status": "finished", "seed": 3}))
    '3'
    """
    seed = job.number(SEED)
    return str(int(seed)) if seed is not None else job.overrides.get(SEED, "")


def _is_shared(key: str) -> bool:
    return not any(key == name or key.startswith((f"{name}.", f"{name}/")) for name in _NOT_SHARED)


# --- equal results -----------------------------------------------------------------------------------------


def equal_merged(found: Sequence[Point]) -> list[Point]:
    """The points, with variants that are equal at every target sparsity as one: "abs = weighted".

    Equal means: jobs with the same seeds and settings, the same numbers and the same masks. Variants that are equal at
    some target sparsities only stay apart, and their points name each other in `same`.
    """
    signs = _signs(found, lambda job: tuple(job.number(name) for name in _RESULT))
    counts = Counter((point.target_sparsity, signs[point.key]) for point in found)
    tied = [point for point in found if counts[point.target_sparsity, signs[point.key]] > 1]
    signs |= _signs(tied, _masks)  # reading masks is slow, so only those of points with equal numbers are read
    equal: dict[Hashable, list[str]] = defaultdict(list)
    for variant in dict.fromkeys(point.variant for point in found):
        equal[frozenset((p.target_sparsity, signs[p.key]) for p in found if p.variant == variant)].append(variant)
    names = {group[0]: _joined(sorted(group, key=natural)) for group in equal.values()}
    kept = [(point, (point.target_sparsity, signs[point.key])) for point in found if point.variant in names]
    return [
        replace(p, variant=names[p.variant], same=tuple(names[q.variant] for q, s in kept if s == sign and q is not p))
        for p, sign in kept
    ]


def _signs(
    found: Sequence[Point], sign: Callable[[JobResult], Hashable]
) -> dict[tuple[str, float | None], frozenset[Hashable]]:
    return {point.key: frozenset((_settings(job), sign(job)) for job in point.jobs) for point in found}


def _masks(job: JobResult) -> Hashable:
    """Equal for equal masks and numbers; the job's own name, which no other job has, if its masks cannot be read."""
    path, masks = job.folder / "masks.safetensors", job.name
    with suppress(OSError):
        masks = sha256(path) if path.is_file() else masks  # reading a pipe would never end
    return masks, *(job.number(name) for name in _RESULT)


def _joined(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return " = ".join(names[:_MAX_NAMES]) + more


def pareto_front(found: Sequence[tuple[float, float, float]]) -> list[bool]:
    """Which of (low, high, merit) are on the front: more is better in both, overlapping intervals are no difference.

    Off the front is what is not clearly higher than another of more merit, and what is clearly lower than another of
    equal merit. With low equal to high this is the plain Pareto front.

    >>> pareto_front([(1.0, 1.2, 0.99), (1.1, 1.3, 0.98), (1.4, 1.5, 0.97), (1.6, 1.7, 0.97)])
    [True, False, False, True]
    >>> pareto_front([(0.5, 0.5, 0.99), (0.8, 0.8, 0.97), (0.8, 0.8, 0.95)])
    [True, True, False]
    """
    lows: dict[float, float] = defaultdict(lambda: -math.inf)  # merit -> the highest `low` at it
    highs: dict[float, float] = defaultdict(lambda: -math.inf)
    for low, high, merit in found:
        lows[merit], highs[merit] = max(lows[merit], low), max(highs[merit], high)
    highest, above = -math.inf, dict[float, float]()  # merit -> the highest `high` at more merit
    for merit in sorted(highs, reverse=True):
        above[merit] = highest
        highest = max(highest, highs[merit])
    return [above[merit] < low and lows[merit] <= high for low, high, merit in found]


# --- numbers of one job ------------------------------------------------------------------------------------


def _pruner(job: JobResult) -> str:
    return job.overrides.get("pruner") or job.choices.get("pruner") or ""


def _target_sparsity(job: JobResult) -> float | None:
    """As written, else as overridden, else the reached one in whole per cent.

    None under a budget: the same one leaves another sparsity with every seed.
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


def _difference(job: JobResult, name: str, other: JobResult, other_name: str) -> float | None:
    first, second = job.number(name), other.number(other_name)
    return None if first is None or second is None else first - second


def job_ratio(job: JobResult, above: str, below: str) -> float | None:
    """One number of a result over another; None where either is unknown or below 0."""
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
