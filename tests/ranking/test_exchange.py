"""The choice of units that go together, against the slow version and against all sets."""

from __future__ import annotations

import itertools
import math

import pytest
import reference
import torch
from facts import refused
from torch import Tensor

from gsprune.ranking.exchange import exchange


def drawn(samples: int, units: int, seed: int) -> Tensor:
    """Gate gradients of units of unequal weight, some of which are like others, or the opposite of them."""
    generator = torch.Generator().manual_seed(seed)
    gates = torch.randn(samples, units, generator=generator, dtype=torch.float64)
    gates[:, 1::3] += 0.7 * gates[:, 0::3][:, : gates[:, 1::3].shape[1]]
    gates[:, 2::3] -= 0.7 * gates[:, 0::3][:, : gates[:, 2::3].shape[1]]
    return gates * torch.rand(units, generator=generator, dtype=torch.float64)


def change(gates: Tensor, keep: Tensor) -> float:
    return float(gates[:, ~keep].sum(1).square().sum())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("samples", "units"), [(1, 7), (20, 12), (3, 40)])
def test_equals_the_slow_version(samples: int, units: int, seed: int) -> None:
    gates = drawn(samples, units, seed)
    for removed in range(units + 1):
        assert exchange(gates, removed).tolist() == reference.exchange(gates.tolist(), removed)


@pytest.mark.parametrize("seed", range(10))
def test_the_change_is_at_most_that_of_the_smallest_units_and_near_the_best(seed: int) -> None:
    gates, removed = drawn(30, 10, seed), 4
    order = gates.square().sum(0).argsort()
    smallest = torch.ones(10, dtype=torch.bool).index_fill_(0, order[:removed], False)
    sets = [
        torch.ones(10, dtype=torch.bool).index_fill_(0, torch.tensor(gone), False)
        for gone in itertools.combinations(range(10), removed)
    ]
    found = change(gates, exchange(gates, removed))
    assert found <= change(gates, smallest) * (1 + 1e-9)
    assert found <= sorted(change(gates, keep) for keep in sets)[21]  # among the best tenth of all 210


def test_opposites_go_together() -> None:
    gates = torch.tensor([[1.0, 0.0, -1.2], [0.0, 1.0, 0.0]])  # the last matters most, and makes up for the first
    assert exchange(gates, 2).tolist() == [False, True, False]


def test_of_equals_the_first_go() -> None:
    assert exchange(torch.ones(2, 5), 2).tolist() == [False, False, True, True, True]
    assert exchange(torch.zeros(3, 4), 3).tolist() == [False, False, False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_added_up_in_float32(dtype: torch.dtype) -> None:
    gates = (100 * drawn(50, 30, 0)).to(dtype)  # squares overflow float16
    assert exchange(gates, 15).equal(exchange(gates.float(), 15))


def test_the_scores_are_left_as_they_are() -> None:
    gates = drawn(5, 8, 0).float().requires_grad_()
    before = gates.detach().clone()
    assert int(exchange(gates, 3).sum()) == 5
    assert gates.equal(before)


@pytest.mark.parametrize(
    ("gates", "removed", "facts"),
    [
        (torch.ones(3), 1, ("[3]", "(samples, units)")),
        (torch.ones(3, 2, dtype=torch.int64), 1, ("int64", "float")),
        (torch.ones(3, 2), 3, ("3", "0 to the 2 units")),
        (torch.ones(3, 2), -1, ("-1", "0 to the 2 units")),
        (torch.ones(3, 2), True, ("True", "whole number")),
        (torch.tensor([[1.0, math.nan]]), 1, ("not finite",)),
    ],
)
def test_what_is_refused(gates: Tensor, removed: int, facts: tuple[str, ...]) -> None:
    with refused(*facts):
        exchange(gates, removed)
