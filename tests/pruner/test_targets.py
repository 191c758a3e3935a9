"""Targets: flat scores and masks in blocks, and a step on a CUDA device that is only pretended."""

from __future__ import annotations

import nets
import pytest
import torch
from facts import needs_cuda_build
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from gsprune.criteria import PLATON, Abs, Criterion, Elementwise, Weighted
from gsprune.discovery.find import find_structures
from gsprune.pruner.targets import Target, Targets, Verdict, cut_in_blocks, sum_of
from gsprune.pruner.units import UnitTarget, UnitTargets
from gsprune.pruner.weights import WeightTarget, WeightTargets
from gsprune.ranking.patterns import Tile


@needs_cuda_build
@pytest.mark.parametrize("criterion", [Elementwise(), PLATON(), Abs(), Weighted()], ids=lambda c: type(c).__name__)
def test_a_step_on_cuda_mixes_no_devices_and_waits_for_nothing(criterion: Criterion) -> None:
    """Fake tensors know their device and refuse every read of a value."""
    structures = find_structures(nets.ResNet(), nets.images(2)).structures
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        with torch.device("cuda"):
            model = nets.ResNet()
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        targets: Targets = WeightTargets([WeightTarget("conv1.weight", model.conv1.weight, Tile())])
        if criterion.scores_units:
            targets = UnitTargets([UnitTarget(structure, model) for structure in structures])
            for target in targets.targets:
                assert isinstance(target, UnitTarget)
                target._rows = {m: target._row(m, m.index[:1].flatten()) for m in target.placed.consumers}
        targets.targets[0].pruned = 1
        if criterion.spread_decay is not None:
            targets.keep_spread()
        verdict = Verdict(targets.probe(criterion), criterion)
        targets.accumulate_(criterion, verdict)
        targets.settle_()
        targets.apply_()
        assert {t.device.type for t in (targets.score, targets.keep, verdict.bits, verdict.decay)} == {"cuda"}
        with pytest.raises(DataDependentOutputException):
            targets.score[0].item()


@pytest.mark.parametrize("sizes", [[1], [3, 4, 1], [10, 1, 1, 25], [7] * 9])
@pytest.mark.parametrize("block", [1, 4, 7, 100])
def test_blocks_cover_every_entry_once_and_in_order(sizes: list[int], block: int) -> None:
    seen, before = [], 0
    for start, stop, pieces in cut_in_blocks(sizes, block):
        assert start == before
        assert 0 < stop - start <= block
        at = 0
        for i, lo, hi, where in pieces:
            assert where == at
            seen += [(i, k) for k in range(lo, hi)]
            at += hi - lo
        assert at == stop - start
        before = stop
    assert seen == [(i, k) for i, size in enumerate(sizes) for k in range(size)]


def test_scores_and_masks_are_views_of_the_flat_ones() -> None:
    first, second = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last), nn.Linear(4, 2)
    targets = WeightTargets([WeightTarget("a", first.weight, Tile()), WeightTarget("b", second.weight, Tile())])
    assert [t.score.stride() for t in targets.targets] == [first.weight.stride(), second.weight.stride()]
    targets.score.copy_(torch.arange(62.0))
    assert targets.targets[1].score.tolist() == [[54.0, 55.0, 56.0, 57.0], [58.0, 59.0, 60.0, 61.0]]
    targets.targets[1].set_keep(torch.tensor([[True] * 7 + [False]]))
    targets.settle_()
    assert targets.keep[-2:].tolist() == [True, False]
    assert targets.score[-2:].tolist() == [60.0, -torch.inf]


def test_what_lies_on_two_devices_is_refused() -> None:
    weights = [nn.Linear(2, 2).weight, nn.Linear(2, 2, device="meta").weight]
    with pytest.raises(ValueError, match="what is to be pruned lies on cpu and on meta: it has to be on one device"):
        WeightTargets([WeightTarget("w", weight, Tile()) for weight in weights])


def test_what_a_sparsity_counts_is_named() -> None:
    model = nets.ResNet()
    units: list[Target] = [UnitTarget(s, model) for s in find_structures(model, nets.images(2)).structures]
    single = WeightTarget("conv1.weight", model.conv1.weight, Tile())
    of = [sum_of(target.share for target in targets).of for targets in ([], units, [single], [*units, single])]
    assert of == ["", "channels", "weights", "weights"]
