"""Upper bounds of a drop: exact coverage by enumeration, the slow version, tightness, and what is refused."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from facts import refused

from gsprune.cutting.bounds import _Paired, drop_bound, least_samples, mean_bound, paired_bound


def chances(n: int, p10: float, p01: float) -> dict[tuple[int, int], float]:
    """(a, b) -> its chance, by the multinomial formula."""
    return {
        (a, b): math.comb(n, a) * math.comb(n - a, b) * p10**a * p01**b * (1 - p10 - p01) ** (n - a - b)
        for a in range(n + 1)
        for b in range(n + 1 - a)
    }


def slow_bound(a: int, b: int, n: int, alpha: float, grid: int) -> float:
    """The largest drop of a grid at which some p01 gives as little of a drop as (a, b) tells a chance above alpha."""
    z = {0.05: 1.6448536269514722}[alpha]

    def order(i: int, j: int) -> float:
        return i - j + z * math.sqrt(i + j + 2)

    worst = 0.0
    for drop, p01 in itertools.product(np.linspace(0, 1, grid + 1), repeat=2):
        if drop + 2 * p01 <= 1 + 1e-12:
            cells = chances(n, drop + p01, p01)
            if sum(p for at, p in cells.items() if order(*at) <= order(a, b) + 1e-9) > alpha:
                worst = max(worst, drop)
    return worst


def clopper_pearson(count: int, n: int) -> tuple[float, float]:
    """The bounds of a chance, each at 97.5 %, by bisecting sums of binomials."""

    def most(k: int, p: float) -> float:
        return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))

    upper, lower = [count / n, 1.0], [0.0, count / n]
    for _ in range(40):
        p = sum(upper) / 2
        upper[most(count, p) < 0.025] = p
        p = sum(lower) / 2
        lower[1 - most(count - 1, p) > 0.025] = p
    return lower[0], upper[1]


@pytest.mark.slow
def test_the_bound_covers_the_true_drop_whatever_the_chances() -> None:
    n, confidence = 12, 0.9
    bounds = {(a, b): paired_bound(a, b, n, confidence) for a in range(n + 1) for b in range(n + 1 - a)}
    least = 1.0
    for p10, p01 in itertools.product(np.linspace(0, 1, 41), repeat=2):
        if p10 + p01 <= 1:
            covered = sum(p for at, p in chances(n, p10, p01).items() if bounds[at] >= p10 - p01 - 1e-12)
            least = min(least, covered)
    assert confidence <= least < confidence + 0.015  # and it is not wider than it has to be


@pytest.mark.parametrize(("a", "b"), [(0, 0), (2, 1), (1, 4), (6, 0)])
def test_the_bound_is_that_of_the_slow_version(a: int, b: int) -> None:
    exact = slow_bound(a, b, 6, 0.05, grid=50)
    assert exact - 1e-9 <= paired_bound(a, b, 6, 0.95) <= exact + 1 / 50 + 0.01


@pytest.mark.parametrize(("j", "n", "p"), [(1, 1, 0.3), (3, 10, 0.2), (10, 10, 0.9), (120, 1000, 0.1), (1, 900, 1e-4)])
def test_the_tail_of_a_binomial_is_exact(j: int, n: int, p: float) -> None:
    exact = 1 - math.fsum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(j))
    found = _Paired(0, 0, n, 0.05)._at_least(np.array([j]), np.array([n]), np.array([p]))
    assert found == pytest.approx([exact], abs=1e-11)


def test_the_chance_of_a_result_is_that_of_all_its_cells() -> None:
    n, tried = 30, _Paired(4, 2, 30, 0.05)
    cells = chances(n, 0.2, 0.1)
    exact = sum(p for (a, b), p in cells.items() if a - b + tried.z * math.sqrt(a + b + 2) <= tried.order + 1e-9)
    assert tried._chance(np.array([0.2]), np.array([0.1])) == pytest.approx([exact], abs=2e-8)


@pytest.mark.parametrize(("a", "b", "n"), [(0, 0, 500), (10, 8, 500), (20, 20, 2000)])
def test_the_bound_is_tighter_than_two_clopper_pearson_bounds_and_near_the_normal_one(a: int, b: int, n: int) -> None:
    parts = clopper_pearson(a, n)[1] - clopper_pearson(b, n)[0]
    normal = (a - b) / n + 1.645 * math.sqrt((a + b) / n**2)
    found = paired_bound(a, b, n)
    assert normal < found < 0.83 * parts
    assert found - normal < 3.1 / n


def test_without_a_change_it_is_the_rule_of_three() -> None:
    assert paired_bound(0, 0, 1000) == pytest.approx(1 - 0.05 ** (1 / 1000), rel=0.02)
    n = least_samples(0.005, 0.95)
    assert 0.005 < paired_bound(0, 0, n) < 0.0051


def test_a_bound_rises_with_what_is_lost_and_falls_with_what_is_gained_and_with_samples() -> None:
    assert paired_bound(5, 5, 400) < paired_bound(6, 5, 400)
    assert paired_bound(5, 6, 400) < paired_bound(5, 5, 400)
    assert paired_bound(10, 10, 800) < paired_bound(5, 5, 400)
    assert paired_bound(5, 5, 400, 0.95) < paired_bound(5, 5, 400, 0.99)
    assert paired_bound(5, 0, 5) == 1.0


def test_the_bound_of_a_mean_covers_it() -> None:
    generator = np.random.default_rng(0)
    population = np.concatenate([generator.uniform(-0.2, 0.4, 900), np.full(100, 1.0)])
    missed = sum(mean_bound(generator.choice(population, 300), 0.9, seed=i) < population.mean() for i in range(200))
    assert 0 < missed <= 20  # it is no constant either


def test_the_bound_of_a_mean_adapts_to_the_variance() -> None:
    generator = np.random.default_rng(0)
    drops = generator.uniform(-0.05, 0.06, 2000)
    hoeffding = drops.mean() + math.sqrt(2 * math.log(20) / 2000)
    assert drops.mean() < mean_bound(drops) < drops.mean() + 0.2 * (hoeffding - drops.mean())


def test_scores_that_are_not_all_0_or_1_are_bounded_by_their_mean() -> None:
    dense, cut = np.linspace(0, 1, 500), np.linspace(0, 0.9, 500)
    assert drop_bound(dense, cut) == mean_bound(dense - cut)
    right = np.array([1, 1, 0, 1, 1, 0] * 50)
    worse = np.array([1, 0, 1, 1, 1, 0] * 50)
    assert drop_bound(right, worse) == paired_bound(50, 50, 300)


def test_what_is_no_value_of_a_sample_is_refused() -> None:
    ones = np.ones(3)
    with refused("[2, 2]"):
        drop_bound(np.ones((2, 2)), np.ones((2, 2)))
    with refused("3 and 2"):
        drop_bound(ones, np.ones(2))
    with refused("1.5", "[0, 1]"):
        drop_bound(ones, np.array([1, 1.5, 0]))
    with refused("nan"):
        drop_bound(ones, np.array([1, np.nan, 0]))
    with refused("confidence", "1.0"):
        drop_bound(ones, ones, 1.0)
    with refused("3", "2 and 2"):
        paired_bound(2, 2, 3)
