"""The largest cut within a bound: the walk, its guarantee, what is refused and with which numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from facts import refused
from torch import nn

from gsprune.cutting.bounds import certifies, drop_bound
from gsprune.cutting.how_much import HowMuch, largest_cut, repeated, right_or_wrong, values_of


class Answers(nn.Module):
    """Stands for a network: what `evaluate` says of it."""

    def __init__(self, values: object) -> None:
        super().__init__()
        self.values = values


def answers(n: int, wrong: int, gained: int = 0) -> np.ndarray:
    """Of n samples, the dense network being wrong on the last tenth."""
    values = np.ones(n)
    values[n - n // 10 :] = 0
    values[:wrong] = 0
    values[n - gained :] = 1
    return values


def search(
    dense: object, cuts: dict[float, object], tried: list[float] | None = None, **how: float
) -> tuple[float, HowMuch]:
    def cut_to(share: float) -> tuple[float, nn.Module]:
        if tried is not None:
            tried.append(share)
        if cuts[share] is None:
            raise ValueError("no more can go")
        return share, Answers(cuts[share])

    how = {"max_drop": 2, **how}
    return largest_cut(values_of(dense), cut_to, lambda model: model.values, shares=[*cuts], **how)


def test_the_answer_is_the_last_cut_before_the_first_that_is_not_certified() -> None:
    tried: list[float] = []
    cuts = {0.9: answers(1000, 0), 0.8: answers(1000, 5, 2), 0.7: answers(1000, 30), 0.6: answers(1000, 0)}
    share, found = search(answers(1000, 0), cuts, tried)
    assert (share, tried) == (0.8, [0.9, 0.8, 0.7])  # what comes after a failure is not looked at, however good
    assert [(t.lost, t.gained) for t in found.trials] == [(0, 0), (5, 2), (30, 0)]
    assert found.chosen.bound == pytest.approx(100 * drop_bound(answers(1000, 0), answers(1000, 5, 2)), abs=1e-9)
    assert found.certified
    assert found.trials[0].bound < found.trials[1].bound < 2 < found.trials[2].bound
    assert f"at most {np.ceil(100 * found.chosen.bound) / 100:.2f} points" in str(found)
    assert "95 % confidence (1,000 samples: 5 lost, 2 gained)" in str(found)
    assert "chosen" in repr(found)
    assert "<td>chosen</td>" in found._repr_html_()


def test_a_cut_that_cannot_be_made_ends_the_walk() -> None:
    share, found = search(answers(1000, 0), {0.9: answers(1000, 0), 0.5: None})
    assert (share, len(found.trials)) == (0.9, 1)
    assert found.ended == "50.0 % of the MACs cannot be reached: no more can go"
    assert found.ended in repr(found)
    with refused("no more can go"):
        search(answers(1000, 0), {0.9: None})


def test_more_confidence_means_a_smaller_cut() -> None:
    cuts = {0.9: answers(1000, 0), 0.8: answers(1000, 12)}
    assert search(answers(1000, 0), cuts, confidence=0.9)[0] == 0.8
    assert search(answers(1000, 0), cuts, confidence=0.99)[0] == 0.9


@pytest.mark.parametrize("values", [torch.ones(500), torch.ones(500, dtype=torch.bool), [1.0] * 500])
def test_too_few_samples_are_refused_before_anything_is_cut(values: object) -> None:
    tried: list[float] = []
    with refused("500 samples", "0.5 points", "95 %", "0.61 points can", "598"):
        search(values, {0.9: values}, tried, max_drop=0.5)
    assert tried == []


def test_the_refusal_says_what_can_be_certified_and_with_how_many_samples() -> None:
    dense, worse = answers(2000, 0), answers(2000, 12, 6)
    bound = 100 * drop_bound(dense, worse)
    with refused(
        "2,000 samples", "0.5 points", "95 %", "93.0 %", f"{np.ceil(100 * bound) / 100:g} points can"
    ) as caught:
        search(dense, {0.93: worse}, max_drop=0.5)
    wanted = int(str(caught.value).rpartition("about ")[2].split()[0].replace(",", ""))
    scale = round(wanted / 2000 + 0.5)
    assert scale == 4
    assert certifies(np.tile(dense, scale), np.tile(worse, scale), 0.005)
    assert not certifies(np.tile(dense, scale - 1), np.tile(worse, scale - 1), 0.005)


def test_a_cut_that_loses_too_much_is_not_promised_with_more_samples() -> None:
    with refused("loses 3.00 points") as caught:
        search(answers(2000, 0), {0.93: answers(2000, 60)}, max_drop=0.5)
    assert "about" not in str(caught.value)


def test_scores_between_0_and_1_are_certified_by_their_mean() -> None:
    scores = np.linspace(0.5, 1, 4000)
    share, found = search(scores, {0.9: scores - 0.001, 0.8: scores - 0.025}, max_drop=2)
    assert share == 0.9
    assert found.trials[0].bound == pytest.approx(100 * drop_bound(scores, scores - 0.001))


def test_a_number_certifies_nothing_and_is_bisected() -> None:
    tried: list[float] = []
    shares = [round(1 - 0.05 * k, 2) for k in range(1, 17)]
    cuts: dict[float, object] = {share: 0.9 - 0.002 * k for k, share in enumerate(shares)}
    share, found = search(0.9, cuts, tried, max_drop=1)
    assert share == shares[5]
    assert len(tried) <= 5
    assert not found.certified
    assert "no guarantee" in str(found)
    with refused("95.0 %", "3.00 points", "max_drop=1"):
        search(0.9, {0.95: 0.87}, max_drop=1)


@pytest.mark.parametrize(
    ("dense", "cut", "facts"),
    [
        (98.2, 98.0, ("98.2", "[0, 1]")),
        ("high", 0.5, ("str",)),
        (np.ones((2, 300)), 0.5, ("[2, 300]",)),
        (np.ones(900), np.ones(899), ("900 and 899",)),
        (np.ones(900), 0.9, ("900 values", "one number")),
        (0.9, np.ones(900), ("one number", "900 values")),
        (-np.ones(900), np.ones(900), ("-1", "[0, 1]")),
    ],
)
def test_what_evaluate_must_not_give(dense: object, cut: object, facts: tuple[str, ...]) -> None:
    with refused(*facts):
        search(dense, {0.9: cut})


@pytest.mark.parametrize("how", [{"max_drop": 0}, {"max_drop": 100}, {"max_drop": True}, {"confidence": 1}])
def test_bounds_and_confidences_that_mean_nothing(how: dict[str, float]) -> None:
    ((name, value),) = how.items()
    with refused(name, value):
        search(np.ones(900), {0.9: np.ones(900)}, **how)


@pytest.mark.slow
def test_the_guarantee_holds_over_100_fresh_samples() -> None:
    generator = np.random.default_rng(0)
    size = 20_000
    dense = (generator.random(size) < 0.95).astype(float)
    cuts = []
    for lost, gained in ((0.001, 0.001), (0.004, 0.002), (0.02, 0.008), (0.024, 0.01), (0.05, 0.01), (0.2, 0.01)):
        draw = generator.random(size)
        cuts.append(np.where(draw < lost, 0.0, np.where(draw < lost + gained, 1.0, dense)))
    true = [100 * (dense.mean() - cut.mean()) for cut in cuts]
    max_drop = true[3] - 0.01  # the fourth cut is just too large: the hardest case
    found = repeated(dense, np.stack(cuts), samples=1000, max_drop=max_drop, repetitions=100)
    assert found.best == 2
    assert found.wrong <= 5
    assert len(found.chosen) == 100
    assert np.mean(np.array(found.chosen) >= 1) > 0.5  # and it does not refuse all the time


def test_right_or_wrong_is_one_value_a_sample_and_leaves_out_what_has_no_label() -> None:
    logits = torch.eye(3)
    assert right_or_wrong([(logits, torch.tensor([0, 1, 0]))] * 2)(nn.Identity()).tolist() == [1, 1, 0, 1, 1, 0]
    tokens = torch.stack([logits, logits])  # (2, 3 tokens, 3 classes)
    labels = torch.tensor([[0, 0, -100], [0, 1, 2]])
    assert right_or_wrong([(tokens, labels)])(nn.Identity()).tolist() == [0.5, 1.0]
    with refused("[3]", "[2]"):
        right_or_wrong([(logits, torch.tensor([0, 1]))])(nn.Identity())
    with refused("no batch"):
        right_or_wrong([])(nn.Identity())


def test_samples_in_another_order_are_refused_as_they_cannot_be_compared() -> None:
    batches = [(torch.eye(3), torch.tensor([0, 1, 1]))]
    evaluate = right_or_wrong(batches)
    assert evaluate(nn.Identity()).tolist() == evaluate(nn.Identity()).tolist() == [1, 1, 0]
    batches[0] = (torch.eye(3)[[2, 0, 1]], torch.tensor([1, 0, 1]))
    with refused("order", "shuffle=False"):
        evaluate(nn.Identity())
