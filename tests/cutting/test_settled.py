"""When scoring may stop: three doublings in a row that change less than 1 % of the kept set."""

from __future__ import annotations

from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
from facts import refused
from torch import Tensor

import gsprune
from gsprune.criteria import OBS, Abs, Criterion, Fisher, Magnitude, Weighted
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


def test_scores_that_say_nothing_begin_the_row_anew() -> None:
    settled = Settled(lambda scores: scores, doublings=1)  # type: ignore[arg-type]
    masks = {"a": kept(0)}
    assert not settled(1, lambda: masks)
    assert not settled(2, lambda: None)
    assert not settled(4, lambda: masks)
    assert settled(8, lambda: masks)


# ---- in gsprune.cut


def batches(count: int, *, alike: bool) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = [(torch.randn(6, 6, generator=generator), torch.arange(6) % 3) for _ in range(count)]
    return found[:1] * count if alike else found


def cut(data: list[tuple[Tensor, Tensor]], criterion: Criterion, **how: Any) -> gsprune.cutting.cut.Cut:
    torch.manual_seed(0)
    return gsprune.cut(nets.mlp(), data, F.cross_entropy, criterion=criterion, progress=False, **how)


@pytest.mark.parametrize("criterion", [Fisher(), Abs(), Weighted()], ids=lambda c: type(c).__name__)
def test_scoring_stops_after_8_batches_that_say_the_same(criterion: Criterion) -> None:
    found = cut(batches(20, alike=True), criterion, macs=0.5)
    assert (found.scored, found.samples) == (48, 120)
    assert "by 48 of 120 samples: what is kept was settled after 8 batches" in repr(found)
    short = cut(batches(8, alike=True), criterion, macs=0.5)
    assert (short.scored, short.samples) == (48, 48)
    assert (found.settled, short.settled) == (8, None)
    assert "settled" not in repr(short)
    assert all(torch.equal(keep, short.keeps[name]) for name, keep in found.keeps.items())


def test_scoring_goes_on_where_batches_disagree_and_where_no_batch_scores() -> None:
    found = cut(batches(10, alike=False), Fisher(), sparsity=0.5)
    assert found.scored == found.samples == 60
    assert cut(batches(10, alike=True), Magnitude(), sparsity=0.5).scored == 60


def test_obs_settles_although_the_signs_of_samples_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 6, generator=generator), torch.arange(200) % 3
    found = cut([(x, y)] * 20, OBS(), macs=0.5, calibration=4000)
    assert found.samples == 4000
    assert found.scored < 4000
    assert found.settled is not None


def test_a_family_is_settled_where_its_mildest_and_its_largest_cut_are() -> None:
    data, seen = batches(20, alike=True), []
    torch.manual_seed(0)
    family = gsprune.cut_family(nets.mlp(), data, F.cross_entropy, macs=[0.8, 0.3], criterion=Fisher(), progress=False)
    seen = [found.scored for found in family]
    assert seen == [48, 48]


def test_its_numbers_are_checked() -> None:
    with refused("overlap", 0):
        rule(overlap=0)
    with refused("doublings", 0):
        rule(doublings=0)
