"""How much may go: the largest cut whose accuracy drop stays within a bound, with a confidence.

Cuts are tried from the mildest on, on the same samples, until one is not certified. That is fixed-sequence testing: a
cut is tried at the full confidence because all before it were certified, so that the number of tries costs none. The
chance that the drop of the answer is above the bound is at most 1 - confidence, whatever the drops of the cuts are; a
bisection would have to take for granted that they rise, and to share the confidence among its tries.

The samples that certify are those that `evaluate` reads. They must not be among the batches that scored and repaired: a
network is better on those than on others.

Source: Maurer, Hothorn and Lehmacher, "Multiple comparisons in drug clinical trials", 1995, and Angelopoulos et al.,
"Learn then test", 2021, for the sequence; `bounds` for what is tested.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from gsprune.cutting.bounds import certifies, check_confidence, check_values, drop_bound, least_samples
from gsprune.structures.example import call, inputs_and_labels, logits_of, map_tensors
from gsprune.structures.running import device_of, evaluating
from gsprune.text.display import html_table, percent, text_table

__all__ = ["SHARES", "Evaluate", "HowMuch", "Trial", "compared", "largest_cut", "repeated", "right_or_wrong"]

Evaluate = Callable[[nn.Module], Any]
Network = TypeVar("Network")
SHARES = tuple(round(0.94**k, 3) for k in range(1, 39))  # of the dense cost that stay: 6 % fewer each time


@dataclass(frozen=True)
class Trial:
    """A cut that was tried.

    share   of the dense network's cost that stays
    value   mean of what `evaluate` gave, in [0, 1]
    lost, gained   samples whose value fell, and rose; None of a plain number
    bound   what its drop is not above, in points, with the confidence; None of a plain number
    """

    share: float
    value: float
    lost: int | None = None
    gained: int | None = None
    bound: float | None = None


@dataclass(frozen=True)
class HowMuch:
    """What a cut costs of what `evaluate` measures, how sure that is, and the search that led to it.

    max_drop     points that may be lost, of 100; None: nothing was searched for
    confidence   that no more is lost than the bound of `chosen` says
    samples      that say so; None: `evaluate` gave a plain number, and nothing is certain
    dense        the dense network's value, in [0, 1]
    trials       in the order they were made
    chosen       the trial that is the answer
    of           what the shares are of: "MACs", "parameters", "milliseconds" or "units"
    ended        why the search went no further, where no more could go
    """

    max_drop: float | None
    confidence: float
    samples: int | None
    dense: float
    trials: tuple[Trial, ...]
    chosen: Trial
    of: str = "MACs"
    ended: str | None = None

    @property
    def certified(self) -> bool:
        """Whether there is a bound that holds with the confidence."""
        return self.samples is not None

    def __str__(self) -> str:
        change = f"{100 * self.dense:.2f} -> {100 * self.chosen.value:.2f}"
        if self.samples is None:
            return f"{change}; no guarantee: evaluate gave one number, and not one a sample"
        assert self.chosen.bound is not None
        return (
            f"{change}; at most {_up(self.chosen.bound)} points lost at {_confidence(self.confidence)} "
            f"({self.samples:,} samples: {self.chosen.lost} lost, {self.chosen.gained} gained)"
        )

    def __repr__(self) -> str:
        lines = text_table(self._table(), right=True)
        return "\n".join([str(self), *lines, *([self.ended] if self.ended else [])])

    def _repr_html_(self) -> str:
        head, *rows = self._table()
        return html_table(head, rows)

    def _table(self) -> list[list[str]]:
        rows = [[self.of, "value", "lost", "gained", "drop at most", ""]]
        for trial in sorted(self.trials, key=lambda trial: -trial.share):
            counts = ["-" if n is None else f"{n:,}" for n in (trial.lost, trial.gained)]
            bound = "-" if trial.bound is None else _up(trial.bound)
            rows.append(
                [percent(trial.share), f"{100 * trial.value:.2f}", *counts, bound, "chosen" * (trial is self.chosen)]
            )
        return rows


def value_of(evaluate: Evaluate, model: nn.Module) -> Any:
    """What `evaluate` gives of a network in evaluation mode."""
    with evaluating([model]):
        return evaluate(model)


def compared(base: np.ndarray, values: np.ndarray, share: float, confidence: float, *, of: str = "MACs") -> HowMuch:
    """A cut that was not searched for: what it costs on these samples, and at most.

    >>> right = np.array([1, 1, 0, 1] * 100)
    >>> print(compared(right, right, 0.5, 0.95))
    75.00 -> 75.00; at most 0.76 points lost at 95 % confidence (400 samples: 0 lost, 0 gained)
    """
    trial = _trial(share, base, values, 100 * drop_bound(base, values, confidence))
    return HowMuch(None, confidence, len(base), float(np.mean(base)), (trial,), trial, of)


def _trial(share: float, base: np.ndarray, values: np.ndarray, bound: float) -> Trial:
    lost, gained = int((values < base).sum()), int((values > base).sum())
    return Trial(share, float(np.mean(values)), lost, gained, bound)


def largest_cut(
    base: np.ndarray,
    cut_to: Callable[[float], tuple[Network, nn.Module]],
    evaluate: Evaluate,
    *,
    max_drop: float,
    confidence: float = 0.95,
    shares: Sequence[float] = SHARES,
    of: str = "MACs",
    note: Callable[[str, float], None] | None = None,
) -> tuple[Network, HowMuch]:
    """The largest cut that loses at most `max_drop` points of what `evaluate` gives, with that confidence.

    Args:
        base: what `evaluate` gives of the dense network, as `values_of` reads it.
        cut_to: share of the cost that stays -> whatever describes the cut, and the network; it may raise a ValueError
            where no more can go, which ends the search.
        evaluate: network -> one value a sample in [0, 1], always of the same samples in the same order, as
            `right_or_wrong` gives; or one number in [0, 1], which certifies nothing: then shares are bisected, taking
            for granted that a larger cut loses more. Higher is better.
        max_drop: points of 100, in (0, 100).
        shares: what is tried, falling.
        of: what they are shares of.
        note: told what is being done, and the share of the tries that were made.

    Raises:
        ValueError: no cut can be certified: the error says what could be, and with how many samples. What `evaluate`
            gave is not as above.
    """
    check_enough(base, max_drop, confidence)
    search = _Search(cut_to, evaluate, max_drop, confidence, shares, of, note or (lambda what, share: None))
    return search.walk(base) if base.ndim else search.bisect(float(base))


def check_max_drop(max_drop: object) -> None:
    if isinstance(max_drop, bool) or not isinstance(max_drop, int | float) or not 0 < max_drop < 100:
        raise ValueError(f"max_drop is {max_drop!r}: it must be a number of points of 100, above 0, as 0.5")


class _Search(Generic[Network]):
    def __init__(
        self,
        cut_to: Callable[[float], tuple[Network, nn.Module]],
        evaluate: Evaluate,
        max_drop: float,
        confidence: float,
        shares: Sequence[float],
        of: str,
        note: Callable[[str, float], None],
    ) -> None:
        self.cut_to, self.evaluate, self.shares, self.of, self.note = cut_to, evaluate, shares, of, note
        self.max_drop, self.confidence = max_drop, confidence
        self.trials: list[Trial] = []
        self.ended: str | None = None

    def walk(self, base: np.ndarray) -> tuple[Network, HowMuch]:
        best: tuple[Network, Trial] | None = None
        for number, share in enumerate(self.shares):
            tried = self._try(number, share, none_yet=best is None)
            if tried is None:
                break
            found, values = tried
            if not values.ndim:
                raise ValueError(f"evaluate gave {len(base):,} values of the dense network and one number of a cut")
            bound = 100 * drop_bound(base, values, self.confidence)
            is_within = certifies(base, values, self.max_drop / 100, self.confidence)
            bound = min(bound, self.max_drop) if is_within else bound  # the test is finer than the bound
            self.trials.append(_trial(share, base, values, bound))
            if not is_within:
                if best is None:
                    smallest = f"the smallest cut (to {percent(share)} of the {self.of})"
                    raise ValueError(_refusal(base, values, bound, smallest, self.max_drop, self.confidence))
                break
            best = found, self.trials[-1]
        assert best is not None
        return self._found(best, float(base.mean()), len(base))

    def bisect(self, base: float) -> tuple[Network, HowMuch]:
        best: tuple[Network, Trial] | None = None
        low, high = 0, len(self.shares)  # the first `low` are within the bound
        while low < high:
            middle = 0 if not self.trials else (low + high) // 2  # the mildest first: without it there is no answer
            tried = self._try(middle, self.shares[middle], none_yet=best is None)
            if tried is None:
                high = middle
                continue
            found, values = tried
            if values.ndim:
                raise ValueError(f"evaluate gave one number of the dense network and {len(values):,} values of a cut")
            trial = Trial(self.shares[middle], float(values))
            self.trials.append(trial)
            drop = 100 * (base - trial.value)
            if drop <= self.max_drop + 1e-9:
                low, best = middle + 1, (found, trial)
            elif best is None:
                raise ValueError(
                    f"the smallest cut, to {percent(trial.share)} of the {self.of}, loses {drop:.2f} points, more than "
                    f"max_drop={self.max_drop:g}"
                )
            else:
                high = middle
        assert best is not None
        return self._found(best, base, None)

    def _try(self, number: int, share: float, *, none_yet: bool) -> tuple[Network, np.ndarray] | None:
        """A cut and its values; None where no more can go."""
        self.note(f"trying {percent(share)} of the {self.of}", number / len(self.shares))
        try:
            found, network = self.cut_to(share)
        except ValueError as error:
            if none_yet:
                raise
            self.ended = f"{percent(share)} of the {self.of} cannot be reached: {error}"
            return None
        return found, values_of(self.evaluate(network))

    def _found(self, best: tuple[Network, Trial], dense: float, samples: int | None) -> tuple[Network, HowMuch]:
        found, chosen = best
        trials = tuple(self.trials)
        return found, HowMuch(self.max_drop, self.confidence, samples, dense, trials, chosen, self.of, self.ended)


def check_enough(base: np.ndarray, max_drop: float, confidence: float) -> None:
    """ValueError where samples cannot certify the bound even of a network that answers like the dense one."""
    check_max_drop(max_drop)
    check_confidence(confidence)
    if not base.ndim:
        return
    n, drop = len(base), max_drop / 100
    binary = bool(np.isin(base, (0, 1)).all())
    least = least_samples(drop, confidence) if binary else math.ceil(-2 * math.log(1 - confidence) / drop)
    if n < least and (bound := drop_bound(base, base, confidence)) > drop:
        raise ValueError(
            f"with {n:,} samples a drop of {max_drop:g} points cannot be certified at {_confidence(confidence)}, "
            f"whatever the cut: {_points(bound)} points can, or {max_drop:g} with at least {least:,} samples"
        )


def _refusal(
    base: np.ndarray, values: np.ndarray, bound: float, smallest: str, max_drop: float, confidence: float
) -> str:
    drops = base - values
    text = (
        f"with {len(base):,} samples a drop of {max_drop:g} points cannot be certified at {_confidence(confidence)} "
        f"even of {smallest}"
    )
    loss = 100 * float(drops.mean())
    if loss >= max_drop:
        return f"{text}: it loses {loss:.2f} points on them, and {_points(bound / 100)} can be certified"
    wanted = _wanted(drops, bound / 100, max_drop / 100, confidence)
    return f"{text}: {_points(bound / 100)} points can, or {max_drop:g} with about {wanted:,} samples"


def _wanted(drops: np.ndarray, bound: float, drop: float, confidence: float) -> int:
    """About how many samples like these, whose bound that is, would certify that drop; two digits.

    It is where mean + z deviation / sqrt(n) + rest / n comes down to it, with the rest that the bound of these tells.

    >>> _wanted(np.array([1.0] * 3 + [-1.0] * 2 + [0.0] * 995), 0.0055, 0.005, 0.95)
    1300
    """
    binary = bool(np.isin(drops, (-1, 0, 1)).all())
    n, mean, deviation = len(drops), float(drops.mean()), float(np.sqrt((drops**2).mean()))
    z = NormalDist().inv_cdf(confidence) if binary else math.sqrt(-2 * math.log(1 - confidence))
    rest, room = max(n * (bound - mean) - z * deviation * math.sqrt(n), 0.0), drop - mean
    root = (z * deviation + math.sqrt((z * deviation) ** 2 + 4 * rest * room)) / (2 * room)
    size = int(10 ** max(math.floor(math.log10(root * root)) - 1, 0))
    return math.ceil(root * root / size) * size


def _points(share: float) -> str:
    """
    >>> _points(0.018001)
    '1.81'
    """
    return f"{float(_up(100 * share)):g}"


def _up(points: float) -> str:
    """Two digits, rounded up, as a bound is.

    >>> _up(1.7901), _up(0.5)
    ('1.80', '0.50')
    """
    return f"{math.ceil(100 * points - 1e-7) / 100:.2f}"


def _confidence(confidence: float) -> str:
    return f"{100 * confidence:g} % confidence"


def is_of_samples(given: Any) -> bool:
    """Whether `evaluate` gave a value for each sample, and not one number.

    >>> is_of_samples([1.0, 0.0]), is_of_samples(torch.tensor(0.5)), is_of_samples(0.5)
    (True, False, False)
    """
    return np.ndim(given.detach().cpu() if isinstance(given, Tensor) else given) > 0


def number_of(given: Any) -> float | None:
    """What `evaluate` gave as one number: the mean of values of samples; None for what is no number.

    >>> number_of([1.0, 0.5]), number_of(23), number_of(None)
    (0.75, 23.0, None)
    """
    try:
        values = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given, dtype=float)
    except (TypeError, ValueError):
        return None
    return float(values.mean()) if values.size and np.isfinite(values).all() else None


def values_of(given: Any) -> np.ndarray:
    """What `evaluate` gave: (n,) or one number, float64."""
    found = given.detach().cpu() if isinstance(given, Tensor) else given
    try:
        values = np.asarray(found, dtype=float)
    except (TypeError, ValueError):
        raise ValueError(
            f"evaluate gave a {type(given).__name__}: it must be one value a sample, or one number, in [0, 1]"
        ) from None
    if values.ndim:
        check_values(values)
    elif not 0 <= values <= 1:
        raise ValueError(f"evaluate gave {float(values):g}: it must be in [0, 1], higher is better (98.2 % is 0.982)")
    return values


# ---- values to evaluate by


def right_or_wrong(batches: Iterable[Any]) -> Evaluate:
    """An `evaluate` that says of each sample whether the class with the highest score is its label: 1 or 0.

    Of a sample with several labels, as of tokens, it is the share that is right; labels below 0 do not count.

    Args:
        batches: (inputs, labels) or mappings with labels, the same in the same order each time they are iterated over;
            none of them may be among those that score and repair.

    Raises:
        ValueError: when a network is evaluated: there is no batch, the network's outputs do not fit the labels, or the
            labels are not those of the first time (of a loader that shuffles): samples could not be compared.

    >>> evaluate = right_or_wrong([(torch.eye(3), torch.tensor([0, 1, 1]))])
    >>> evaluate(nn.Identity()).tolist()
    [1.0, 1.0, 0.0]
    """

    first: list[Tensor] = []

    def evaluate(model: nn.Module) -> Tensor:
        found, seen, device = [], [torch.empty(0)], device_of(model)
        with torch.no_grad(), evaluating([model]):
            for batch in batches:
                inputs, labels = map_tensors(lambda tensor: tensor.to(device), inputs_and_labels(batch))
                answers = logits_of(call(model, inputs)).argmax(-1)
                if answers.shape != labels.shape:
                    raise ValueError(
                        f"the network's classes have the shape {[*answers.shape]} and the labels {[*labels.shape]}: "
                        f"it must be the same"
                    )
                seen.append(labels.flatten().cpu())
                right, counts = (x.flatten(1) if x.dim() > 1 else x[:, None] for x in (answers == labels, labels >= 0))
                found.append(((right & counts).sum(1) / counts.sum(1).clamp(min=1)).cpu())
        if not found:
            raise ValueError("there is no batch to evaluate on")
        first[:] = first or [torch.cat(seen)]
        if not torch.equal(first[0], torch.cat(seen)):
            raise ValueError(
                "the labels to evaluate on are not those of the first time, or come in another order: give the same "
                "samples each time (a DataLoader with shuffle=False)"
            )
        return torch.cat(found)

    return evaluate


# ---- whether the guarantee holds


class Repeated(NamedTuple):
    """How often the true drop was above the bound, the choices (-1: refused) and the best one."""

    wrong: int
    chosen: list[int]
    best: int


def repeated(
    dense: np.ndarray,
    cuts: np.ndarray,
    *,
    samples: int,
    max_drop: float,
    confidence: float = 0.95,
    repetitions: int = 100,
    seed: int = 0,
) -> Repeated:
    """The search, repeated with fresh samples from a population whose values are all known.

    Args:
        dense: (N,) values of the population.
        cuts: (K, N), the mildest cut first.
        samples: drawn in each repetition, with replacement.

    Returns:
        `wrong` should be at most (1 - confidence) of the repetitions, within chance; `best` is the last cut before the
        first one whose true drop is above the bound, -1 if that is the first.

    >>> population = np.array([1.0] * 90 + [0.0] * 10)
    >>> worse = np.array([1.0] * 60 + [0.0] * 40)
    >>> repeated(population, np.stack([population, worse]), samples=400, max_drop=5, repetitions=20)[0::2]
    (0, 0)
    """
    check_max_drop(max_drop)
    check_confidence(confidence)
    check_values(dense, *cuts)
    generator = np.random.default_rng(seed)
    true = 100 * (dense.mean() - cuts.mean(1))
    above = np.flatnonzero(true > max_drop + 1e-9)
    chosen = []
    for _ in range(repetitions):
        drawn = generator.integers(len(dense), size=samples)
        last = -1
        for number, values in enumerate(cuts):
            if not certifies(dense[drawn], values[drawn], max_drop / 100, confidence):
                break
            last = number
        chosen.append(last)
    wrong = sum(last in above for last in chosen)
    return Repeated(wrong, chosen, int(above[0]) - 1 if len(above) else len(cuts) - 1)
