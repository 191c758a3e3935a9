"""What the jobs of a sweep say together: variants, means over seeds, Pareto fronts.

A *variant* is the configuration without seed and wanted sparsity; a *point* is a variant at one wanted sparsity, that
is its jobs over all seeds. A *control* is a job with `pruner=none`: what points are compared with. Choices are
made by the validation split.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

from gsprune.files.disk import sha256
from gsprune.settings.identity import NOT_HASHED
from gsprune.sweeps.results import JobResult
from gsprune.text.names import natural

__all__ = [
    "Dense",
    "Point",
    "Stat",
    "chosen_by",
    "clear_front",
    "control_levels",
    "controls",
    "dense_levels",
    "equal_merged",
    "is_control",
    "once_each",
    "pareto_front",
    "points",
    "stat",
    "swept",
    "unpruned",
    "variants",
]

SEED, TARGET = "seed", "pruner.target_sparsity"
VALIDATION, TEST = "val_accuracy", "accuracy"
# What no control has to share: what it is there to differ in, and what changes no number of a result.
_TIMED = tuple(f"trainer.latency_{name}" for name in ("repeats", "batch", "seconds"))
_NOT_SHARED = ("pruner", "seed", "experiment", *NOT_HASHED, *_TIMED)
_RESULT = ("accuracy", "val_accuracy", "loss", "sparsity", "params", "params_nonzero", "macs")
_MAX_NAMES = 4  # of variants with the same result


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation; fewer than three values have no spread that says anything."""

    count: int
    mean: float
    spread: float | None


def stat(values: Iterable[float | None]) -> Stat | None:
    """The statistics of what is not None; None when nothing is left.

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
    """One variant at one wanted sparsity (None: no job says which, or a budget was wanted).

    Attributes:
        by: the number of a result that choices are made by (`chosen_by`).
        controls: of each job, by name, the control with its seed and settings; None where the sweep has no controls.
        same: other variants whose jobs here have the same masks and the same result.
    """

    variant: str
    target: float | None
    jobs: tuple[JobResult, ...]
    by: str = VALIDATION
    controls: Mapping[str, JobResult] | None = None
    same: tuple[str, ...] = ()

    @cached_property
    def accuracy(self) -> Stat:
        """On the test split."""
        found = stat(job.number(TEST) for job in self.jobs)
        assert found is not None  # only jobs with an accuracy get here
        return found

    @cached_property
    def choice(self) -> Stat:
        """What this point is chosen by, or not: accuracy on the validation split."""
        return stat(job.number(self.by) for job in self.jobs) or self.accuracy

    @cached_property
    def delta(self) -> Stat | None:
        """Test accuracy less that of the job's control; of its own dense network where the sweep has no controls."""
        if self.controls is None:
            return stat(_difference(job, TEST, job, "baseline_accuracy") for job in self.jobs)
        pairs = [(job, self.controls[job.name]) for job in self.jobs if job.name in self.controls]
        return stat(_difference(job, TEST, control, TEST) for job, control in pairs)

    @property
    def of(self) -> str:
        """What the sparsity is a share of: "weights", "channels", ...; "" where no job tells."""
        return _counted(self.jobs[0])

    @property
    def left(self) -> float | None:
        """Share of the dense network's parameters that is left and not zero: the same for all kinds of pruning."""
        left = self.share_left("params_nonzero", "params_dense")
        if left is None and self.shrunk:
            left = self.share_left("params", "params_dense")
        return left

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
        return max(self.jobs, key=lambda job: job.number(self.by) or 0.0)  # of equals the first

    def mean(self, name: str) -> float | None:
        found = stat(job.number(name) for job in self.jobs)
        return found.mean if found else None

    @cached_property
    def faster(self) -> tuple[float, float, float] | None:
        """How many times faster than dense, the mean over the jobs, between the ends of all their intervals."""
        told = [tuple(job.number(name) for name in ("speedup", "speedup_low", "speedup_high")) for job in self.jobs]
        known = [(r, low, high) for r, low, high in told if r and low and high and 0 < low <= high and r > 0]
        if not known:
            return None
        ratios, lows, highs = zip(*known, strict=True)
        return math.fsum(ratios) / len(ratios), min(lows), max(highs)

    @property
    def latency_note(self) -> str:
        """Why it has no `faster`, in a few words; "" where no job tells."""
        notes = (job.text("latency_note") for job in self.jobs)
        return next((note.partition(":")[0] for note in notes if note), "")

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
    """The accuracy of networks that are not pruned: one value each for jobs that start from different ones."""

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
    """The usable jobs but for controls, by wanted sparsity (rising, unknown last) and what it is of, the best first.

    The best is that with the highest mean of what choices are made by.
    """
    groups: dict[tuple[str, float | None], list[JobResult]] = {}
    for job in jobs:
        if not is_control(job):
            groups.setdefault((names[job.name], _target(job)), []).append(job)
    by, pairs = chosen_by(jobs), controls(jobs)
    found = [Point(variant, target, tuple(group), by, pairs) for (variant, target), group in groups.items()]
    return sorted(found, key=_place)


def _place(point: Point) -> tuple[object, ...]:
    return point.target is None, point.target or 0, point.of, -point.choice.mean, natural(point.variant)


def chosen_by(jobs: Sequence[JobResult]) -> str:
    """ "val_accuracy", or "accuracy" where a job has no other: unlike numbers are not compared."""
    return VALIDATION if all(job.number(VALIDATION) is not None for job in jobs) else TEST


# --- controls ----------------------------------------------------------------------------------------------


def is_control(job: JobResult) -> bool:
    """Whether nothing was pruned on purpose: `pruner=none`, which trains as long as the others."""
    return _pruner(job) == "none"


def controls(jobs: Sequence[JobResult]) -> dict[str, JobResult] | None:
    """Job name -> the control with the same seed, data set, model and other settings; None without any control."""
    known: dict[Hashable, JobResult] = {}
    for job in jobs:
        if is_control(job):
            known.setdefault(_settings(job), job)
    found = {job.name: known[_settings(job)] for job in jobs if not is_control(job) and _settings(job) in known}
    return found if known else None


def unpruned(jobs: Sequence[JobResult], axes: Iterable[str]) -> dict[str, list[JobResult]]:
    """Name of the settings outside the pruner -> one job for each network that was not pruned there."""
    outside = _outside(axes)
    groups: dict[str, dict[Hashable, JobResult]] = {}
    for job in jobs:
        name = ", ".join(part for part in (job.overrides.get(axis, "") for axis in outside) if part)
        groups.setdefault(name, {}).setdefault(_settings(job), job)
    return {name: list(group.values()) for name, group in groups.items()}


def _settings(job: JobResult) -> Hashable:
    """Seed and settings outside the pruner: jobs that share them differ in how they prune, and in nothing else."""
    seed, chosen = job.number(SEED), job.choices
    told = str(int(seed)) if seed is not None else job.overrides.get(SEED, "")
    found = {**{key: value for key, value in job.overrides.items() if key not in chosen}, **chosen}
    return told, frozenset((key, value) for key, value in found.items() if _is_shared(key))


def _is_shared(key: str) -> bool:
    return not any(key == name or key.startswith((f"{name}.", f"{name}/")) for name in _NOT_SHARED)


def _outside(axes: Iterable[str]) -> list[str]:
    return [axis for axis in axes if _is_shared(axis)]


# --- equal results -----------------------------------------------------------------------------------------


def equal_merged(found: Sequence[Point]) -> list[Point]:
    """The points, of variants that are the same everywhere one: "abs = weighted".

    The same are jobs with equal seed and settings, equal numbers and equal masks. Variants that are the same at some
    sparsities only stay apart, and their points name each other in `same`.
    """
    signs = _signs(found, lambda job: tuple(job.number(name) for name in _RESULT))
    counts = Counter((point.target, signs[_key(point)]) for point in found)
    tied = [point for point in found if counts[point.target, signs[_key(point)]] > 1]  # masks are read of these alone
    signs |= _signs(tied, _masks)
    whole: dict[Hashable, list[str]] = {}
    for variant in dict.fromkeys(point.variant for point in found):
        own = frozenset((point.target, signs[_key(point)]) for point in found if point.variant == variant)
        whole.setdefault(own, []).append(variant)
    names = {group[0]: _joined(sorted(group, key=natural)) for group in whole.values()}
    kept = [replace(point, variant=names[point.variant]) for point in found if point.variant in names]
    first = {names[group[0]]: group[0] for group in whole.values()}
    signed = [(point, (point.target, signs[first[point.variant], point.target])) for point in kept]
    return [replace(p, same=tuple(q.variant for q, s in signed if s == sign and q is not p)) for p, sign in signed]


def _key(point: Point) -> tuple[str, float | None]:
    return point.variant, point.target


def _signs(
    found: Sequence[Point], sign: Callable[[JobResult], Hashable]
) -> dict[tuple[str, float | None], frozenset[Hashable]]:
    return {_key(point): frozenset((_settings(job), sign(job)) for job in point.jobs) for point in found}


def _masks(job: JobResult) -> Hashable:
    """Equal for equal masks and numbers; of a job whose masks cannot be read its own name, which no other job has."""
    path, masks = job.folder / "masks.safetensors", job.name
    with suppress(OSError):
        masks = sha256(path) if path.is_file() else masks  # a pipe would never end
    return masks, *(job.number(name) for name in _RESULT)


def _joined(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return " = ".join(names[:_MAX_NAMES]) + more


def clear_front(found: Sequence[tuple[float, float, float]]) -> list[bool]:
    """The front of (low, high, merit), where intervals that overlap are no difference.

    Off it is what another beats in merit without being clearly lower, and what is as good but clearly lower.

    >>> clear_front([(1.0, 1.2, 0.99), (1.1, 1.3, 0.98), (1.4, 1.5, 0.97), (1.6, 1.7, 0.97)])
    [True, False, False, True]
    """

    def beats(one: tuple[float, float, float], other: tuple[float, float, float]) -> bool:
        return one[1] >= other[0] if one[2] > other[2] else one[2] == other[2] and one[0] > other[1]

    return [not any(beats(one, other) for one in found) for other in found]


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
    """Mean accuracy of the dense networks, on the split that choices are made by.

    Apart for each setting outside the pruner, if these are few and differ.
    """
    return _levels("dense network", jobs, axes, f"baseline_{chosen_by(jobs)}", most)


def control_levels(jobs: Sequence[JobResult], axes: Iterable[str], *, most: int = 3) -> list[Dense]:
    """The same of the controls."""
    found = [job for job in jobs if is_control(job)]
    return _levels("control, pruner=none", found, axes, chosen_by(jobs), most)


def _levels(what: str, jobs: Sequence[JobResult], axes: Iterable[str], by: str, most: int) -> list[Dense]:
    levels: dict[float, list[str]] = {}
    for name, group in unpruned(jobs, axes).items():
        found = stat(job.number(by) for job in group)
        if found is not None:
            levels.setdefault(round(found.mean, 4), []).append(name)
    if len(levels) <= 1:
        return [Dense(what, level) for level in levels]
    if len(levels) <= most:
        return [Dense(f"{what}, {' or '.join(names)}", level) for level, names in sorted(levels.items())]
    return [Dense(f"lowest {what}", min(levels)), Dense(f"highest {what}", max(levels))]


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


def _counted(job: JobResult) -> str:
    """As written; older results tell by what became of the network, or by a pruner that knows one thing only."""
    told = job.text("sparsity_of")
    if told is not None:
        return told
    if job.result.get("shrunk") is True:
        return "units"
    return "weights" if _pruner(job) == "elementwise" else ""


def _difference(job: JobResult, name: str, other: JobResult, less: str) -> float | None:
    first, second = job.number(name), other.number(less)
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
