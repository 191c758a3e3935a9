"""Backward elimination against refitting from scratch at every step."""

from __future__ import annotations

import pytest
import reference
import torch
from facts import refused

from gsprune.ranking.elimination import Reader, eliminate


def reader(units: int, width: int, outputs: int, *, others: int = 0, seed: int = 0) -> Reader:
    generator = torch.Generator().manual_seed(seed)
    k = units * width + others
    x = torch.randn(3 * k, k, generator=generator) + 0.5
    columns = torch.randperm(k, generator=generator)[: units * width].reshape(units, width)
    return Reader(torch.randn(outputs, k, generator=generator), x.T @ x / len(x), columns)


@pytest.mark.parametrize(("units", "width", "others"), [(12, 1, 0), (12, 1, 4), (6, 4, 3), (70, 1, 2)])
def test_prices_are_those_of_refitting_from_scratch(units: int, width: int, others: int) -> None:
    one = reader(units, width, 5, others=others)
    two = Reader(torch.randn(2, 3 * units), reader(3 * units, 1, 1, seed=1).gram, torch.arange(units)[:, None])
    for readers in ([one], [one, two]) if units < 70 else ([one],):
        wanted = reference.eliminate(readers, 1e-2)
        torch.testing.assert_close(eliminate(readers), wanted, rtol=1e-6, atol=1e-9 * float(wanted.max()))


def test_more_outputs_than_columns() -> None:
    one = reader(8, 2, 90)
    torch.testing.assert_close(eliminate([one]), reference.eliminate([one], 1e-2), rtol=1e-6, atol=1e-8)


def test_a_cut_at_any_count_is_the_one_of_the_elimination() -> None:
    one = reader(40, 1, 6)
    price = eliminate([one])
    assert price.argsort().tolist() == reference.eliminate([one], 1e-2).argsort().tolist()


def test_what_others_make_up_for_is_cheap() -> None:
    gram = torch.eye(5) + torch.zeros(5, 5)
    gram[3, 4] = gram[4, 3] = 0.999
    price = eliminate([Reader(torch.ones(3, 5), gram, torch.arange(5)[:, None])], damping=1e-6)
    assert price[3] + 0.01 < price[0] or price[4] + 0.01 < price[0]
    assert int(price.argmin()) in (3, 4)


@pytest.mark.parametrize("gram", [torch.zeros(4, 4), torch.ones(4, 4)], ids=["nothing read", "singular"])
def test_grams_that_have_no_inverse(gram: torch.Tensor) -> None:
    price = eliminate([Reader(torch.ones(2, 4), gram, torch.arange(4)[:, None])])
    assert price.isfinite().all()
    assert (price >= 0).all()
    with refused("not finite"):
        eliminate([Reader(torch.ones(2, 4), gram * float("nan"), torch.arange(4)[:, None])])
