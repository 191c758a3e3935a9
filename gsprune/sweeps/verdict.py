"""Which network of a sweep to take: the smallest that loses no more than a reader allows.

The verdict is made on the validation split. A drop is the accuracy of the control (`pruner=none`) less that of the
pruned network with the same seed, so it is what pruning costs, and nothing of what training longer gains. What the
data cannot decide is said beside the verdict (`doubts`), and makes it provisional.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gsprune.sweeps.results import JobResult
from gsprune.sweeps.variants import (
    TEST,
    VALIDATION,
    Point,
    Stat,
    chosen_by,
    is_control,
    seed_of,
    stat,
    unpruned,
)
from gsprune.text.names import natural

__all__ = ["BY", "Reference", "Terms", "Verdict", "drop_text", "on_test_text", "saved_text", "speed_text", "verdicts"]

BY = ("params", "nonzero", "macs", "latency")
_REFERENCES = ("random",)  # must lose: never taken where anything else was tried
_KINDS = ("model", "dataset")
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)  # of 1, 2, ... more
_NOTHING = 5e-5  # a share that is shown as 0.0 points


@dataclass(frozen=True)
class Terms:
    """What the reader of a report wants.

    Attributes:
        max_drop: points of validation accuracy that the network may lose, 0 to 100.
        by: what it should have least of: "params" (in its tensors), "nonzero" (parameters that are not zero), "macs" or
            "latency".

    Raises:
        ValueError: another value.

    >>> Terms(0.5), Terms.read({"max_drop": 2, "by": "macs"})
    (Terms(max_drop=0.5, by='params'), Terms(max_drop=2.0, by='macs'))
    """

    max_drop: float = 1.0
    by: str = "params"

    def __post_init__(self) -> None:
        drop = self.max_drop
        if isinstance(drop, bool) or not isinstance(drop, (int, float)) or not 0 <= drop <= 100:
            raise ValueError(f"report.max_drop={drop} is not allowed: it is points of accuracy, from 0 to 100")
        if self.by not in BY:
            raise ValueError(f"report.by={self.by} is not allowed: it is one of {', '.join(BY)}")

    @classmethod
    def read(cls, found: object) -> Terms:
        """Those on record; the defaults where the record cannot be used."""
        try:
            return cls(float(found["max_drop"]), str(found["by"]))  # type: ignore[index]
        except (KeyError, TypeError, ValueError):
            return cls()


@dataclass(frozen=True)
class Reference:
    """What drops are measured from: the best control of a sweep, or its best dense network where it has none.

    Attributes:
        is_control: whether it has trained as long as the pruned networks.
        accuracies: seed -> accuracy on the split that choices are made by.
    """

    is_control: bool
    accuracies: Mapping[str, float]

    @property
    def name(self) -> str:
        return "control" if self.is_control else "dense network"

    @property
    def mean(self) -> float:
        return math.fsum(self.accuracies.values()) / len(self.accuracies)

    def drop(self, point: Point) -> Stat | None:
        """How much less accurate the point is, as a share: the mean over seeds that both have."""
        pairs = [(self.accuracies.get(seed_of(job)), job.number(point.by)) for job in point.jobs]
        return stat(mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None)


@dataclass(frozen=True)
class Verdict:
    """Which network to take, of those of one model on one data set.

    Attributes:
        about: the model and the data set, where a sweep has several; "" otherwise.
        sentence: the verdict.
        taken: None where no network is within the tolerance, or nothing can be compared.
        drop: of the network that is taken.
        doubts: what the data do not decide, a sentence each; with any the verdict is provisional.
        reference: None without any accuracy to compare with.
    """

    about: str
    sentence: str
    taken: Point | None = None
    drop: Stat | None = None
    doubts: tuple[str, ...] = ()
    reference: Reference | None = None

    @property
    def job(self) -> JobResult | None:
        """The job whose network is taken: of the point's seeds the best on validation."""
        return self.taken.best if self.taken else None

    def __str__(self) -> str:
        """
        >>> str(Verdict("vit_tiny", "Take none"))
        'vit_tiny: Take none'
        """
        return f"{self.about}: {self.sentence}" if self.about else self.sentence


def verdicts(
    points: Sequence[Point],
    jobs: Sequence[JobResult],
    axes: Mapping[str, Sequence[str]],
    terms: Terms,
    *,
    unfinished: int = 0,
    ended: bool = True,
) -> list[Verdict]:
    """A verdict for each model and data set of a sweep, in natural order; accuracies of two are not compared.

    Args:
        points, jobs: of finished jobs with an accuracy.
        unfinished: jobs that have begun and not finished, or failed.
        ended: whether the sweep has begun all of its jobs.
    """
    missing = _of_unfinished(unfinished, ended)
    kinds = [axis for axis in axes if any(axis == kind or axis.startswith(f"{kind}.") for kind in _KINDS)]

    def kind(job: JobResult) -> tuple[str, ...]:
        return tuple(job.overrides.get(axis) or job.choices.get(axis, "") for axis in kinds)

    groups: dict[tuple[str, ...], tuple[list[Point], list[JobResult]]] = defaultdict(lambda: ([], []))
    for job in jobs:
        groups[kind(job)][1].append(job)
    for point in points:
        groups[kind(point.jobs[0])][0].append(point)
    found = []
    for key in sorted(groups, key=lambda key: [natural(part) for part in key]):
        about = ", ".join(filter(None, key)) if len(groups) > 1 else ""
        found.append(_verdict(about, *groups[key], axes, terms, missing))
    return found or [Verdict("", "No verdict: no job has finished with an accuracy in its result.json")]


def _verdict(
    about: str,
    points: Sequence[Point],
    jobs: Sequence[JobResult],
    axes: Mapping[str, Sequence[str]],
    terms: Terms,
    missing: str,
) -> Verdict:
    if not points:
        return Verdict(about, "No verdict: no pruned network has finished")
    reference = _reference(jobs, axes)
    if reference is None:
        why = f"there is no control (pruner=none) and no baseline_{points[0].by} to compare with"
        return Verdict(about, f"No verdict: {why}")
    drops = {point.key: drop for point in points if (drop := reference.drop(point)) is not None}
    known = [point for point in points if point.key in drops]
    tried = [point for point in known if point.pruner not in _REFERENCES] or known
    if not tried:
        why = f"no pruned network has the seed of a {reference.name}, whose accuracy it could be compared with"
        return Verdict(about, f"No verdict: {why}", reference=reference)
    within = [point for point in tried if 100 * drops[point.key].mean <= terms.max_drop + 1e-9]
    if not within:
        return _none(about, tried, drops, terms, reference, missing)
    taken = min(within, key=lambda point: _order(point, terms))
    drop = drops[taken.key]
    saved = ", ".join(filter(None, (saved_text(taken, terms), drop_text(drop, reference.name), speed_text(taken))))
    after = _next_step(taken, [point for point in tried if point.variant == taken.variant], drops, terms)
    doubts = tuple(
        filter(
            None,
            (
                missing,
                _of_split(jobs),
                _of_reference(reference, points),
                _of_seeds(drop, terms),
                _of_samples(taken, terms),
                _of_random(taken, known, drops, terms),
            ),
        )
    )
    sentence = f"{'Provisionally, take' if doubts else 'Take'} {taken.variant}{_asked(taken)}: {saved}; {after}"
    return Verdict(about, sentence, taken, drop, (*doubts, *_as_good(taken, within, terms)), reference)


def _none(
    about: str,
    tried: Sequence[Point],
    drops: Mapping[tuple[str, float | None], Stat],
    terms: Terms,
    reference: Reference,
    missing: str,
) -> Verdict:
    closest = min(tried, key=lambda point: drops[point.key].mean)
    text = drop_text(drops[closest.key], reference.name)
    sentence = (
        f"Take none: no network is within {_points(terms.max_drop)} of the {reference.name}; the closest, "
        f"{closest.variant}{_asked(closest)}, is {text}"
    )
    more = math.ceil(1000 * drops[closest.key].mean - 1e-9) / 10
    advice = f"Prune less, train longer after pruning, or allow more: --max-drop {more:g}"
    doubts = tuple(filter(None, (missing, _of_reference(reference, tried), advice)))
    return Verdict(about, sentence, doubts=doubts, reference=reference)


def _reference(jobs: Sequence[JobResult], axes: Mapping[str, Sequence[str]]) -> Reference | None:
    by = chosen_by(jobs)
    for found, key, is_fair in (
        ([job for job in jobs if is_control(job)], by, True),
        (list(jobs), f"baseline_{by}", False),
    ):
        levels = []
        for group in unpruned(found, axes).values():
            known = {seed_of(job): value for job in group if (value := job.number(key)) is not None}
            levels += [Reference(is_fair, known)] if known else []
        if levels:
            return max(levels, key=lambda level: level.mean)
    return None


# --- the order ---------------------------------------------------------------------------------------------


def _order(point: Point, terms: Terms) -> tuple[object, ...]:
    """Networks from the one to take first: least of what is wanted, then of the rest, then the most accurate."""
    return *_cost(point, terms), -round(point.choice.mean, 4), natural(point.variant)


def _cost(point: Point, terms: Terms) -> tuple[float, ...]:
    first, *rest = [BY.index(terms.by), *(i for i in range(len(BY)) if BY[i] != terms.by)]
    costs = [cost(point) for cost in _COSTS]
    sparsity = -(point.sparsity.mean if point.sparsity else 0.0)  # all there is in another application's results
    return costs[first], *(costs[i] for i in rest[:2]), round(sparsity, 4)


def _params(point: Point) -> float:
    return _rounded(point.ratio("params", "params_dense"))


def _nonzero(point: Point) -> float:
    return _rounded(point.left)


def _macs(point: Point) -> float:
    return _rounded(point.ratio("macs", "macs_dense"))


def _latency(point: Point) -> float:
    if point.faster is not None:
        return _rounded(1 / point.faster[0])
    return 1.0 if point.latency_note.startswith("no change") else math.inf


_COSTS: tuple[Callable[[Point], float], ...] = (_params, _nonzero, _macs, _latency)


def _rounded(share: float | None) -> float:
    """As tables show it; what is unknown comes last."""
    return math.inf if share is None else float(f"{share:.3g}")


def _next_step(
    taken: Point, same: Sequence[Point], drops: Mapping[tuple[str, float | None], Stat], terms: Terms
) -> str:
    """What the next smaller network of the same variant costs more."""
    mine = _cost(taken, terms)
    smaller = [point for point in same if _cost(point, terms) < mine]
    if not smaller:
        return "nothing smaller of it was tried"
    after = max(smaller, key=lambda point: _cost(point, terms))
    more = 100 * (drops[after.key].mean - drops[taken.key].mean)
    share = f"{round(100 * after.target_sparsity, 4):g} %" if after.target_sparsity is not None else "a smaller one"
    return f"the next step, {share}, costs {more:.1f} more"


# --- texts -------------------------------------------------------------------------------------------------


def _asked(point: Point) -> str:
    """
    >>> from pathlib import Path
    >>> job = JobResult(Path(), {"status": "finished", "sparsity_of": "channels"})
    >>> _asked(Point("abs", 0.5, (job,))), _asked(Point("abs", None, (job,)))
    (' at 50 % of channels', '')
    """
    budget = point.jobs[0].numbers("budget")
    if budget:
        return f" with a budget of {', '.join(f'{100 * share:g} % of {kind}' for kind, share in budget.items())}"
    if point.target_sparsity is None:
        return ""
    return f" at {round(100 * point.target_sparsity, 4):g} %{f' of {point.of}' if point.of else ''}"


def saved_text(point: Point, terms: Terms = Terms()) -> str:
    """What the network has less of: "3.9x fewer parameters"."""
    params, macs = point.ratio("params_dense", "params"), point.ratio("macs_dense", "macs")
    texts = []
    if params is not None and params >= 1.005:
        texts.append(f"{_times(params)} fewer parameters")
    elif point.left:
        texts.append(f"{_times(1 / point.left)} fewer parameters that are not zero, in tensors of the old size")
    if macs is not None and macs >= 1.005 and (terms.by == "macs" or not texts):
        texts.append(f"{_times(macs)} fewer MACs")
    return ", ".join(texts)


def drop_text(drop: Stat, name: str) -> str:
    """
    >>> drop_text(Stat(5, 0.003, 0.002), "control"), drop_text(Stat(1, -0.01, None), "control")
    ('0.3 ± 0.2 points below the control (5 seeds)', '1.0 points above the control (1 seed)')
    >>> drop_text(Stat(2, 0.0, None), "dense network")
    'as accurate as the dense network (2 seeds)'
    """
    seeds = f"({drop.count} seed{'s' * (drop.count != 1)})"
    if abs(drop.mean) < _NOTHING and not drop.spread:
        return f"as accurate as the {name} {seeds}"
    spread = "" if drop.spread is None else f" ± {100 * drop.spread:.1f}"
    side = "below" if drop.mean >= 0 else "above"
    return f"{100 * abs(drop.mean):.1f}{spread} points {side} the {name} {seeds}"


def speed_text(point: Point) -> str:
    """How much faster the network is, or why that is not known; "" if no job says anything of it."""
    if point.faster is None:
        note = point.latency_note
        return "no faster (the same shapes)" if note.startswith("no change") else f"speed {note}" if note else ""
    ratio, low, high = point.faster
    if low <= 1 <= high:
        return f"not clearly faster ({low:.1f} to {high:.1f})"
    return f"{_times(ratio)} {'faster' if ratio > 1 else 'as fast, so slower'} ({low:.1f} to {high:.1f})"


def _times(ratio: float) -> str:
    """
    >>> _times(3.94), _times(98.57), _times(101.2)
    ('3.9x', '98.6x', '101x')
    """
    return f"{ratio:.{1 if ratio < 100 else 0}f}x"


def _points(number: float) -> str:
    """
    >>> _points(1.0), _points(0.5)
    ('1 point', '0.5 points')
    """
    return f"{number:g} point{'s' * (number != 1)}"


# --- doubts ------------------------------------------------------------------------------------------------


def _of_unfinished(count: int, ended: bool) -> str:
    if not ended:
        return "This sweep has not ended: the verdict is that of the jobs that have finished so far"
    jobs = "1 job of this sweep has" if count == 1 else f"{count} jobs of this sweep have"
    return f"{jobs} not finished: the verdict is that of the others" if count else ""


def _of_split(jobs: Sequence[JobResult]) -> str:
    without = [job for job in jobs if job.number(VALIDATION) is None]
    if not without:
        return ""
    some = f"{len(without)} of {len(jobs)} finished jobs (such as {without[0].name})"
    return (
        "Choices are made on test accuracy here, so the test accuracy of the chosen network is too good: "
        f"{some} have no {VALIDATION} in their result.json"
    )


def _of_reference(reference: Reference, points: Sequence[Point]) -> str:
    """The dense network is a fair reference where it has trained as long, as in a cut without training."""
    less = "" if reference.is_control else _shorter_training([job for point in points for job in point.jobs])
    if not less:
        return ""
    pruners = list(dict.fromkeys(point.pruner for point in points if point.pruner != "all jobs"))
    return (
        f"The dense network {less}, so a difference to it is not what pruning costs: "
        f"pruner={','.join([*pruners, 'none'])} adds the control that has trained as long"
    )


def _shorter_training(jobs: Sequence[JobResult]) -> str:
    """How much less the dense networks have trained than the pruned ones; "" if they have trained as long."""
    pairs = {(job.number("baseline_epochs"), job.number("epochs")) for job in jobs}
    known = [(dense, whole) for dense, whole in pairs if dense is not None and whole is not None]
    if len(known) < len(pairs):
        return "may have trained less"
    if all(dense >= whole for dense, whole in known):
        return ""
    ((dense, whole), *more) = known
    return "has trained less" if more else f"has trained less ({dense:g} epochs) than the pruned one ({whole:g})"


def _of_seeds(drop: Stat, terms: Terms) -> str:
    """Whether the seeds leave open that the network is within the tolerance."""
    if drop.count < 3 or drop.spread is None:
        only = "One seed does" if drop.count == 1 else f"{drop.count} seeds do"
        return f"{only} not tell a difference from chance: take three or more (seed=0,1,2)"
    half = _T95[min(drop.count - 2, len(_T95) - 1)] * drop.spread / math.sqrt(drop.count)
    low, high = 100 * (drop.mean - half), 100 * (drop.mean + half)
    if high <= terms.max_drop:
        return ""
    return (
        f"{drop.count} seeds leave the mean drop between {low:.1f} and {high:.1f} points (95 % confidence), so it may "
        f"be more than {_points(terms.max_drop)}"
    )


def _of_samples(point: Point, terms: Terms) -> str:
    samples = point.jobs[0].number("val_samples")
    if point.by != VALIDATION or not samples or 100 / samples <= terms.max_drop / 2:
        return ""
    one = f"{100 / samples:.2f} points"
    return f"The validation split has {samples:,.0f} samples, and one of them is {one} of accuracy"


def _of_random(
    taken: Point, points: Sequence[Point], drops: Mapping[tuple[str, float | None], Stat], terms: Terms
) -> str:
    """Random removal must lose. Where it does not, any criterion would have done."""
    if taken.pruner in _REFERENCES:
        return f"Nothing but {taken.pruner} was tried, the baseline that must lose"
    same = [p for p in points if p.pruner in _REFERENCES and _nonzero(p) <= 1.02 * _nonzero(taken) < math.inf]
    if not any(100 * drops[p.key].mean <= terms.max_drop for p in same):
        return ""
    return (
        f"Random removal of as much is within {_points(terms.max_drop)} too, so this sweep does not tell criteria "
        "apart: prune more"
    )


def _as_good(taken: Point, within: Sequence[Point], terms: Terms) -> tuple[str, ...]:
    """Networks of the same size that differ from the one that is taken by no more than its seeds do."""
    size, spread = _cost(taken, terms)[0], taken.choice.spread
    if spread is None or not math.isfinite(size):
        return ()
    same = [p for p in within if p is not taken and _cost(p, terms)[0] <= 1.02 * size]
    equal = [p.variant for p in same if taken.choice.mean - p.choice.mean <= spread]
    if not equal:
        return ()
    verb = "is" if len(equal) == 1 else "are"
    return (f"{', '.join(equal)} at the same size {verb} as good, within what seeds differ by",)


def on_test_text(point: Point) -> str:
    """What the test split says of the point, which had no part in the choice.

    "" where choices are made on the test split itself.
    """
    if point.by == TEST or point.delta is None:
        return ""
    name = "dense network" if point.controls is None else "control"
    delta = point.delta
    return f"On the test split, which had no part in the choice, it is {drop_text(_negative(delta), name)}"


def _negative(found: Stat) -> Stat:
    return Stat(found.count, -found.mean, found.spread)
