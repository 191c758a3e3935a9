"""`gsprune.cut(max_drop=...)`: the answer is that of a walk by hand, what certifies is not what repairs, refusals."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from facts import refused
from torch import Tensor, nn

import gsprune
from gsprune.cutting.bounds import certifies, drop_bound
from gsprune.cutting.how_much import SHARES, right_or_wrong


def samples(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points around a ring in six dimensions, in three sectors, some of them on the wrong side."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator)
    angle = torch.atan2(x[:, 0], x[:, 1]) + 0.1 * torch.randn(size, generator=generator)
    return x, (3 * (angle + torch.pi) / (2 * torch.pi)).long().clamp(0, 2)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 3))
    model[4].p = 0.1
    x, y = samples(1000, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def run(model: nn.Module, **how: Any) -> gsprune.cutting.cut.Cut:
    how = {"evaluate": right_or_wrong([samples(2000, seed=3)]), "progress": False, **how}
    return gsprune.cut(model, [samples(200, seed=2)], F.cross_entropy, **how)


@pytest.mark.slow
def test_the_answer_is_that_of_cuts_made_one_by_one(trained: nn.Module) -> None:
    before = copy.deepcopy(trained.state_dict())
    found = run(trained, max_drop=2)
    evaluate = right_or_wrong([samples(2000, seed=3)])
    base = np.asarray(evaluate(trained))
    tried = [trial.share for trial in found.how_much.trials]
    assert tried == [*SHARES[: len(tried)]]
    family = gsprune.cut_family(
        trained, [samples(200, seed=2)], F.cross_entropy, macs=tried, repair="least_squares", progress=False
    )
    within = [certifies(base, np.asarray(evaluate(cut.model)), 0.02) for cut in family]
    assert within == [True] * (len(tried) - 1) + [False]
    one = family[len(tried) - 2]
    assert found.how_much.chosen.share == tried[-2]
    assert all(torch.equal(keep, one.keeps[name]) for name, keep in found.keeps.items())
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), one.model.parameters(), strict=True))
    assert found.small.macs < 0.9 * found.dense.macs
    true = samples(50_000, seed=4)
    drop = right_or_wrong([true])(trained).mean() - right_or_wrong([true])(found.model).mean()
    assert 100 * drop <= 2
    assert f"points lost at 95 % confidence (2,000 samples: {found.how_much.chosen.lost} lost" in repr(found)
    assert trained.training
    assert all(torch.equal(value, before[key]) for key, value in trained.state_dict().items())


def test_budgets_that_leave_the_same_network_are_evaluated_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))  # four units: at most four networks
    x, y = samples(300, seed=1)
    calls: list[int] = []

    def evaluate(network: nn.Module) -> Tensor:
        calls.append(network[0].out_features)
        return torch.ones(300)

    found = gsprune.cut(model, [(x, y)], F.cross_entropy, max_drop=5, evaluate=evaluate, progress=False)
    assert calls == [4, *sorted(set(calls[1:]), reverse=True)]
    assert len(found.how_much.trials) > len(calls)
    assert found.model[0].out_features == calls[-1] == 1


def test_a_share_with_values_of_samples_tells_its_bound(trained: nn.Module) -> None:
    found = run(trained, macs=0.6, confidence=0.9)
    evaluate = right_or_wrong([samples(2000, seed=3)])
    bound = 100 * drop_bound(np.asarray(evaluate(trained)), np.asarray(evaluate(found.model)), 0.9)
    assert found.how_much.chosen.bound == pytest.approx(bound)
    assert found.how_much.max_drop is None
    assert found.how_much.chosen.share == found.small.macs / found.dense.macs
    assert "90 % confidence" in repr(found)
    assert run(trained, macs=0.6, evaluate=lambda m: 17.0).how_much is None


def test_a_number_is_bisected_and_promises_nothing(trained: nn.Module) -> None:
    evaluate = right_or_wrong([samples(500, seed=3)])
    found = run(trained, max_drop=3, evaluate=lambda network: float(evaluate(network).mean()))
    assert not found.how_much.certified
    assert found.dense.value - found.small.value <= 0.03
    assert "no guarantee" in repr(found)


def test_a_family_finds_its_largest_cut_without_new_evaluations(trained: nn.Module) -> None:
    calls: list[nn.Module] = []

    def evaluate(network: nn.Module) -> Tensor:
        assert not network.training
        calls.append(network)
        return right_or_wrong([samples(2000, seed=3)])(network)

    family = gsprune.cut_family(
        trained, [samples(200, seed=2)], F.cross_entropy, macs=[0.9, 0.7, 0.15], evaluate=evaluate, progress=False
    )
    count = len(calls)
    found = family.within(max_drop=3)
    assert (count, len(calls)) == (4, 4)
    bounds = [cut.how_much.chosen.bound for cut in family]
    assert found.model is [cut for cut, bound in zip(family, bounds, strict=True) if bound <= 3][-1].model
    assert found.how_much.max_drop == 3
    assert [row.get("drop_at_most") for row in family.rows()] == [None, *bounds]
    with refused("0.2 points", "2,000 samples"):
        family.within(max_drop=0.2)
    with refused("max_drop", "evaluate"):
        gsprune.cut_family(trained, [samples(200, 2)], F.cross_entropy, macs=[0.9], progress=False).within(3)


def test_a_family_by_sparsity_names_units(trained: nn.Module) -> None:
    family = gsprune.cut_family(
        trained, [samples(200, seed=2)], F.cross_entropy, sparsity=[0.1, 0.3],
        evaluate=right_or_wrong([samples(2000, seed=3)]), progress=False,
    )  # fmt: skip
    found = family.within(max_drop=20)
    assert [trial.share for trial in found.how_much.trials] == [0.9, 0.7]
    assert repr(found.how_much).splitlines()[1].split()[0] == "units"


def test_what_cannot_be_certified_is_refused_before_anything_is_read(trained: nn.Module) -> None:
    def unread() -> Any:
        raise AssertionError
        yield

    with refused("300 samples", "0.5 points", "598"):
        gsprune.cut(trained, unread(), F.cross_entropy, max_drop=0.5, evaluate=right_or_wrong([samples(300, 3)]))
    with refused("98.2", "[0, 1]"):
        gsprune.cut(trained, unread(), F.cross_entropy, max_drop=0.5, evaluate=lambda network: 98.2)
    with refused("max_drop=0.5", "evaluate"):
        gsprune.cut(trained, unread(), F.cross_entropy, max_drop=0.5)
    with refused("macs and max_drop"):
        gsprune.cut(trained, unread(), F.cross_entropy, max_drop=0.5, macs=0.5)
    with refused("rules and max_drop"):
        rule = gsprune.Rule(gsprune.criteria.Fisher(), target_sparsity=0.5)
        gsprune.cut(trained, unread(), F.cross_entropy, max_drop=0.5, rules=[rule])
    with refused("list", "Module"):
        gsprune.cut([], unread(), F.cross_entropy, macs=0.5, evaluate=lambda network: 0.5)
    with refused("max_drop", -1):
        gsprune.cut(trained, unread(), F.cross_entropy, max_drop=-1)
    with refused("confidence", 95):
        gsprune.cut(trained, unread(), F.cross_entropy, macs=0.5, confidence=95)


def test_a_cut_that_loses_too_much_is_refused_with_what_can_be_certified(trained: nn.Module) -> None:
    values = right_or_wrong([samples(2000, seed=3)])(trained)

    def evaluate(network: nn.Module) -> Tensor:
        return values if network is trained else values * (torch.arange(2000) >= 30)

    with refused("2,000 samples", "1 points", "94.0 % of the MACs", "can be certified"):
        run(trained, max_drop=1, evaluate=evaluate)
