"""When scoring may stop: three doublings in a row that change less than 1 % of the kept set."""

from __future__ import annotations

import pytest
import torch
from facts import refused
from torch import Tensor

from gsprune.cutting.settled import Settled


def rule(**how: float) -> Settled:
    return Settled(lambda kept: {"a": kept[:100], "b": kept[100:]}, **how)  # type: ignore[arg-type]


def kept(changed: int) -> Tensor:
    """100 of 200 are kept; of these so many are others than those of kept(0)."""
    mask = torch.zeros(200, dtype=torch.bool)
    mask[changed : 100 + changed] = True
    return mask


def stops_at(changes: dict[int, int], settled: Settled) -> int | None:
    """The batch after which the rule stops, where the kept set after n batches is kept(changes[n])."""
    for batches in range(1, max(changes) + 1):
        if settled(batches, lambda batches=batches: kept(changes[batches])):
            return batches
    return None


@pytest.mark.parametrize(
    ("changes", "stop"),
    [
        ({1: 0, 2: 0, 4: 0, 8: 0}, 8),
        ({1: 0, 2: 1, 4: 2, 8: 3}, 8),  # 1 % each time is within the bound
        ({1: 0, 2: 2, 4: 2, 8: 2, 16: 2}, 16),  # 2 % once: the row begins after it
        ({1: 0, 2: 0, 4: 0, 8: 5, 16: 5, 32: 5, 64: 5}, 64),
        ({1: 0, 2: 2, 4: 4, 8: 6, 16: 8}, None),
    ],
)
def test_it_stops_after_three_doublings_without_a_change(changes: dict[int, int], stop: int | None) -> None:
    settled = rule()
    assert stops_at(changes, settled) == stop
    assert settled.after == stop
    assert settled.overlaps[2] == 1 - (changes[2] - changes[1]) / 100


def test_scores_are_asked_for_at_powers_of_two_alone_and_no_more_once_it_is_settled() -> None:
    asked: list[int] = []
    settled = rule()
    for batches in range(1, 40):
        settled(batches, lambda batches=batches: asked.append(batches) or kept(0))
    assert asked == [1, 2, 4, 8]
    assert settled.after == 8


def test_a_doubling_that_was_not_seen_does_not_count() -> None:
    settled = rule(doublings=1)
    assert not settled(1, lambda: kept(0))
    assert not settled(4, lambda: kept(0))
    assert settled(8, lambda: kept(0))


def test_its_numbers_are_checked() -> None:
    with refused("overlap", 0):
        rule(overlap=0)
    with refused("doublings", 0):
        rule(doublings=0)
