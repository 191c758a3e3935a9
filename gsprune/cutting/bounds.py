"""How much worse one network can be than another: upper bounds with a confidence, from samples that both were tried on.

Of each sample the drop is the dense network's value minus the cut one's, in [-1, 1]; of answers that are right (1) or
wrong (0) it is 1, 0 or -1. Legend: n samples; a, b of them where dense is right and cut is wrong, and the reverse;
p10, p01 the chances of the two; the true drop is p10 - p01.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

__all__ = ["certifies", "drop_bound", "least_samples", "mean_bound", "paired_bound"]

_TAIL = 1e-8  # what the sums leave out, at most; it is added to them
_FAR = 1e-10  # tails below half of this are 0: far less than _TAIL
_ASIDE = 0.02  # of the chance to be wrong, for p01 outside its interval
_LEAF = 0.04  # of a standard error: cells of the unknown p01 that are not divided further
_TOLERANCE = 0.02  # of a standard error: how far above the exact bound what is returned may be


def drop_bound(dense: np.ndarray, cut: np.ndarray, confidence: float = 0.95) -> float:
    """An upper bound of the mean of dense - cut over the population that the samples were drawn from.

    Of values that are 0 or 1 it is `paired_bound`, of others in [0, 1] `mean_bound` of the differences.

    Args:
        dense, cut: (n,), of the same samples in the same order, in [0, 1], higher is better.
        confidence: the chance, at least, that the bound is not below the true drop.

    Raises:
        ValueError: not one value a sample, none, another number of them, or a value outside [0, 1].

    >>> right = np.array([1, 1, 0, 1] * 100)
    >>> round(drop_bound(right, right), 4)
    0.0075
    """
    counts = _counts(dense, cut)
    return mean_bound(_drops(dense, cut), confidence) if counts is None else paired_bound(*counts, confidence)


def certifies(dense: np.ndarray, cut: np.ndarray, drop: float, confidence: float = 0.95) -> bool:
    """Whether `drop_bound` is at most `drop`, in (0, 1): one test, a tenth of the time of the bound.

    >>> right = np.array([1, 1, 0, 1] * 100)
    >>> certifies(right, right, 0.008), certifies(right, right, 0.007)
    (True, False)
    """
    check_confidence(confidence)
    counts = _counts(dense, cut)
    if counts is None:
        return mean_bound(_drops(dense, cut), confidence) <= drop
    return _Paired(*counts, 1 - confidence).rejects(drop)


def _counts(dense: np.ndarray, cut: np.ndarray) -> tuple[int, int, int] | None:
    """a, b and n; None of values that are not all 0 or 1."""
    check_values(dense, cut)
    if not (np.isin(dense, (0, 1)).all() and np.isin(cut, (0, 1)).all()):
        return None
    drops = _drops(dense, cut)
    return int((drops > 0).sum()), int((drops < 0).sum()), len(drops)


def _drops(dense: np.ndarray, cut: np.ndarray) -> np.ndarray:
    drops: np.ndarray = np.asarray(dense, float) - np.asarray(cut, float)
    return drops


def check_values(*values: np.ndarray) -> None:
    """ValueError where these are not as many values in [0, 1] of the same samples."""
    for given in values:
        if np.ndim(given) != 1 or not len(given):
            raise ValueError(f"values have the shape {[*np.shape(given)]}: it must be one value a sample, at least one")
        found = np.asarray(given, float)
        if not ((found >= 0) & (found <= 1)).all():  # also of a NaN
            wrong = found[~((found >= 0) & (found <= 1))][0]
            raise ValueError(f"a sample has the value {wrong:g}: it must be in [0, 1], higher is better")
    if len({len(given) for given in values}) > 1:
        told = " and ".join(f"{len(given):,}" for given in values)
        raise ValueError(f"there are {told} values: the networks must be tried on the same samples")


def check_confidence(confidence: float) -> None:
    if isinstance(confidence, bool) or not isinstance(confidence, int | float) or not 0.5 <= confidence < 1:
        raise ValueError(f"confidence is {confidence!r}: it must be a number in [0.5, 1), as 0.95")


def least_samples(drop: float, confidence: float) -> int:
    """With fewer samples that drop cannot be certified even if no answer changes: (1 - drop)^n > 1 - confidence.

    >>> least_samples(0.005, 0.95)
    598
    """
    return math.ceil(math.log(1 - confidence) / math.log1p(-drop) - 1e-9)


# ---- right or wrong


def paired_bound(a: int, b: int, n: int, confidence: float = 0.95) -> float:
    """Exact upper bound of p10 - p01 from a and b of n samples, whatever p10 and p01 are.

    It is Buehler's: the largest drop for which some p01 gives more than the chance 1 - confidence to the results that
    tell no more of a drop than this one, in the order of T = a - b + z sqrt(a + b + 2), z the normal quantile. Only p01
    in an interval around b / n are looked at, for which a fiftieth of that chance is set aside. There the supremum is
    enclosed cell by cell: the chance falls with p10 and rises with p01, so that a corner of a cell bounds it. What is
    returned is never below the exact bound, and above it by at most about 6 % of a standard error.

    Source: Buehler, "Confidence intervals for the product of two binomial parameters", 1957; Lloyd and Moldovan, "Exact
    one-sided confidence limits for the difference between two correlated proportions", 2007; Berger and Boos, "P values
    maximized over a confidence set for the nuisance parameter", 1994.

    Raises:
        ValueError: counts that are negative or more than n, a confidence outside [0.5, 1).

    >>> round(paired_bound(0, 0, 500), 4), round(1 - 0.05 ** (1 / 500), 4)  # the rule of three
    (0.006, 0.006)
    >>> round(paired_bound(3, 1, 500), 4)  # the sum of two Clopper-Pearson bounds is 0.0174
    0.0134
    """
    if min(a, b) < 0 or n < 1 or a + b > n:
        raise ValueError(f"of {n} samples {a} and {b} differ: both must be 0 or more, and together at most {n}")
    check_confidence(confidence)
    tried = _Paired(a, b, n, 1 - confidence)
    low = max(-1.0, (tried.order - 0.5) / n)  # where the normal approximation puts it
    step = 1 / n
    while low > -1 and tried.rejects(low):
        low, step = max(-1.0, low - step), 2 * step
    high, step = min(1.0, low + 2.5 / n), 1 / n
    while high < 1 and not tried.rejects(high):
        low, high, step = high, min(1.0, high + step), 2 * step
    while high - low > _TOLERANCE * tried.error:
        middle = (low + high) / 2
        low, high = (low, middle) if tried.rejects(middle) else (middle, high)
    return high


class _Paired:
    """Whether drops can be rejected at the level alpha, for one result (a, b) of n samples."""

    def __init__(self, a: int, b: int, n: int, alpha: float) -> None:
        self.n, self.alpha = n, alpha * (1 - _ASIDE)
        self.z = NormalDist().inv_cdf(1 - alpha)
        self.order = a - b + self.z * math.sqrt(a + b + 2)
        self.error = math.sqrt(a + b + 2) / n  # about one standard error of the drop
        self.log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
        self.least, self.most = _interval(b, n, alpha * _ASIDE)

    def rejects(self, drop: float) -> bool:
        """Whether results that tell no more of a drop have a chance of at most alpha if that is the drop."""
        ends = max(self.least, -drop), min(self.most, (1 - drop) / 2)
        if ends[0] > ends[1]:
            return True
        edges = np.linspace(*ends, 25)
        if (self._chance(drop + edges, edges) > self.alpha).any():
            return False
        lower, upper = edges[:-1], edges[1:]
        while len(lower):
            middle = (lower + upper) / 2
            corner, inside = self._chance(
                np.concatenate([drop + lower, drop + middle]), np.concatenate([upper, middle])
            ).reshape(2, -1)
            is_open = corner > self.alpha
            width = _LEAF * np.sqrt((drop + 2 * middle + 1 / self.n).clip(0) / self.n)
            if (inside > self.alpha).any() or (is_open & (upper - lower < width)).any():
                return False
            lower, middle, upper = lower[is_open], middle[is_open], upper[is_open]
            lower, upper = np.concatenate([lower, middle]), np.concatenate([middle, upper])
        return True

    def _chance(self, p10: np.ndarray, p01: np.ndarray) -> np.ndarray:
        """Of a result that tells no more of a drop than this one, for each pair of chances: sum over i of
        Binomial(i; n, p10) P(J >= j(i)), with J of n - i samples and the chance p01 / (1 - p10)."""
        p10 = p10.clip(0, 1)
        rest = np.where(p10 < 1, p01 / np.maximum(1 - p10, 1e-300), 0.0).clip(0, 1)
        reach = 6 * np.sqrt(self.n * p10 * (1 - p10)) + 12
        first = np.floor(np.maximum(self.n * p10 - reach, 0)).astype(int)
        last = np.ceil(np.minimum(self.n * p10 + reach, self.n)).astype(int)
        count = last - first + 1
        of = np.repeat(np.arange(len(p10)), count)  # the pair that each term belongs to
        i = np.arange(len(of)) + (first - np.cumsum(count) + count)[of]
        term = np.exp(self._log_binomial(i, np.full_like(i, self.n), p10[of]))
        return np.bincount(of, term * self._at_least(self._fewest(i), self.n - i, rest[of]), len(p10)) + _TAIL

    def _fewest(self, i: np.ndarray) -> np.ndarray:
        """The fewest j with i - j + z sqrt(i + j + 2) <= order: a quadratic in s = sqrt(i + j + 2)."""
        inside = self.z**2 + 4 * (2 * i + 2 - self.order)
        s = (self.z + np.sqrt(np.maximum(inside, 0))) / 2
        j = np.ceil(s * s - 2 - i - 1e-9)  # a tie belongs to it
        return np.where(inside < 0, 0, np.maximum(j, 0)).astype(int)

    def _log_binomial(self, k: np.ndarray, n: np.ndarray, p: np.ndarray) -> np.ndarray:
        table = self.log_factorial
        with np.errstate(divide="ignore", invalid="ignore"):
            ones = np.where(k > 0, k * np.log(p), 0.0)
            zeros = np.where(n > k, (n - k) * np.log1p(-p), 0.0)
        found: np.ndarray = table[n] - table[k] - table[n - k] + ones + zeros
        return found

    def _at_least(self, j: np.ndarray, n: np.ndarray, p: np.ndarray) -> np.ndarray:
        """P(J >= j) of a binomial: the regularised incomplete beta function I_p(j, n - j + 1)."""
        chance = np.where(j <= 0, 1.0, 0.0)
        todo = np.flatnonzero((j > 0) & (j <= n) & (p > 0))
        j, n, p = j[todo], n[todo], p[todo]
        upper = p * (n + 3) >= j + 1  # there the fraction of the other tail is the one that converges
        alpha, beta = np.where(upper, n - j + 1, j), np.where(upper, j, n - j + 1)
        x = np.where(upper, 1 - p, p)
        table = self.log_factorial
        with np.errstate(divide="ignore"):
            front = table[n] - table[j - 1] - table[n - j] + j * np.log(p) + (n - j + 1) * np.log1p(-p)
        first = np.exp(front) / alpha  # the tail is this times the fraction, which is at most (n + 3) / 2 here
        tail, near = np.zeros(len(todo)), np.flatnonzero(first * (n + 3) > _FAR)
        tail[near] = first[near] * _continued_fraction(alpha[near], beta[near], x[near])
        chance[todo] = np.where(upper, 1 - tail, tail)
        return chance


def _continued_fraction(a: np.ndarray, b: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Of the incomplete beta function, by Lentz's method (Press et al., "Numerical Recipes", 6.4)."""
    tiny = 1e-300
    found, left = np.empty(len(x)), np.arange(len(x))  # where the fraction has not converged
    c, d = np.ones(len(x)), 1 - (a + b) * x / (a + 1)
    d = 1 / np.where(np.abs(d) < tiny, tiny, d)
    value = d.copy()
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for step in (even, odd):
            d, c = 1 + step * d, 1 + step / c
            d = 1 / np.where(np.abs(d) < tiny, tiny, d)
            c = np.where(np.abs(c) < tiny, tiny, c)
            value *= d * c
        on = np.abs(d * c - 1) >= 1e-11
        if 2 * np.count_nonzero(on) <= len(on):
            found[left[~on]] = value[~on]
            a, b, x, c, d, value, left = a[on], b[on], x[on], c[on], d[on], value[on], left[on]
            if not len(left):
                return found
    raise AssertionError("the continued fraction does not converge")


def _interval(count: int, n: int, alpha: float) -> tuple[float, float]:
    """Chances p under which n samples can give that count: n KL(count / n, p) <= log(2 / alpha) (Chernoff).

    >>> tuple(round(p, 3) for p in _interval(10, 100, 0.05))
    (0.038, 0.2)
    """
    share, room = count / n, math.log(2 / alpha) / n

    def is_outside(p: float) -> bool:
        ones = share * math.log(share / p) if share else 0.0
        return ones + ((1 - share) * math.log((1 - share) / (1 - p)) if share < 1 else 0.0) > room

    def end(outside: float) -> float:
        inside = share
        for _ in range(50):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if is_outside(middle) else (middle, outside)
        return outside

    return end(0.0), end(1.0)


# ---- scores


def mean_bound(drops: np.ndarray, confidence: float = 0.95, *, seed: int = 0) -> float:
    """Upper bound of the mean of values in [-1, 1], whatever their distribution, that adapts to their variance.

    A bettor's capital against "the mean is m or more" is the product over samples of 1 + l_i (m - x_i), where the stake
    l_i = sqrt(2 log(1 / alpha) / (n variance)) depends on the samples before i alone: it reaches 1 / alpha with a
    chance of at most alpha (Ville). The bound is the least m against which it does. Samples come in a random order.

    Source: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", 2024, section 4.

    >>> round(mean_bound(np.zeros(1000)), 4)
    0.0035
    """
    check_confidence(confidence)
    x = (np.asarray(drops, float) + 1) / 2  # in [0, 1]
    n, wanted = len(x), -math.log(1 - confidence)
    x = np.random.default_rng(seed).permutation(x)
    count = np.arange(1, n + 1)
    mean = (0.5 + np.cumsum(x)) / (count + 1)
    variance = (0.25 + np.cumsum((x - mean) ** 2)) / (count + 1)
    stake = np.sqrt(2 * wanted / (n * np.concatenate([[0.25], variance[:-1]])))

    def is_broken(m: float) -> bool:
        limited = np.minimum(stake, 0.9 / max(1 - m, 1e-12))
        return bool(np.cumsum(np.log1p(limited * (m - x))).max() >= wanted)

    low, high = float(x.mean()), 1.0
    if not is_broken(high):
        return 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if is_broken(middle) else (middle, high)
    return 2 * high - 1
