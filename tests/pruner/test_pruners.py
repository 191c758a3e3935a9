"""Several pruners in one run: disjoint targets, single weights on top of units, one cut for all, one state."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gsprune import NoPruning, Pruner, Pruners
from gsprune.criteria import Abs, Elementwise, Magnitude, Weighted
from gsprune.formats.scores import load_scores, save_scores
from gsprune.ranking.selection import pruned_count
from gsprune.schedules import Linear, OneShot

STEPS = 4
HEADS = partial(Pruner, criterion=Abs(decay=0.9), kinds=["heads"], target_sparsity=0.5)
NEURONS = partial(Pruner, criterion=Weighted(decay=0.9), kinds=["neurons"], target_sparsity=0.6)
CHANNELS = partial(Pruner, criterion=Abs(decay=0.9), target_sparsity=0.5)
WEIGHTS = partial(Pruner, criterion=Elementwise(decay=0.9), target_sparsity=0.9)
GRADUAL = Linear(end_epoch=2, update_frequency=0.5)


def build(kind: Any) -> nn.Module:
    torch.manual_seed(3)
    return nets.settle(kind()).double()


def batch(epoch: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * epoch + step)
    return torch.randn(6, 3, 8, 8, generator=generator).double(), torch.randint(0, 3, (6,), generator=generator)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.05)


def several(model: nn.Module, *parts: Any, schedule: Any = GRADUAL, **arguments: Any) -> Pruners:
    return Pruners(model, parts, schedule=schedule, example_input=batch(9, 9)[0], steps_per_epoch=STEPS, **arguments)


def train(pruner: Any, model: nn.Module, optimizer: torch.optim.Optimizer, *, first: int = 0, last: int = 3) -> None:
    pruner.on_train_begin()
    for epoch in range(first, last):
        pruner.on_epoch_begin(epoch)
        for step in range(STEPS):
            pruner.on_step_begin(step)
            x, y = batch(epoch, step)
            F.cross_entropy(model(x), y).backward()
            pruner.on_before_optimizer_step()
            optimizer.step()
            pruner.on_step_end()
            optimizer.zero_grad()
        pruner.on_epoch_end()


def run(kind: Any, *parts: Any, last: int = 3, **arguments: Any) -> tuple[nn.Module, Pruners]:
    model = build(kind)
    optimizer = sgd(model)
    pruner = several(model, *parts, optimizer=optimizer, **arguments)
    train(pruner, model, optimizer, last=last)
    return model, pruner


def equal(mine: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(mine) == set(other)
    for name, tensor in other.items():
        assert torch.equal(mine[name], tensor), name


# ---- disjoint targets


def test_each_part_prunes_what_it_would_prune_alone() -> None:
    """Up to the first update nothing that one part does reaches the other."""
    schedule = OneShot(start_epoch=0.75)
    _, both = run(nets.ViT, HEADS, NEURONS, schedule=schedule, last=1)
    for part in (HEADS, NEURONS):
        model = build(nets.ViT)
        optimizer = sgd(model)
        alone = part(model, schedule=schedule, example_input=batch(9, 9)[0], steps_per_epoch=STEPS, optimizer=optimizer)
        train(alone, model, optimizer, last=1)
        assert alone.sparsity > 0
        equal({name: both.masks()[name] for name in alone.masks()}, alone.masks())


@pytest.mark.parametrize("shrink", ["at_end", "each_update"])
def test_two_parts_of_one_kind_are_one_pruner(shrink: str) -> None:
    """Heads by Abs and neurons by Abs are all units by Abs, with structures of both parts in one tensor or not."""
    halves = [partial(CHANNELS, include=["stem"], shrink=shrink), partial(CHANNELS, exclude=["stem"], shrink=shrink)]
    model, pruner = run(nets.ResNet, *halves)
    whole = build(nets.ResNet)
    optimizer = sgd(whole)
    one = CHANNELS(
        whole, schedule=GRADUAL, example_input=batch(9, 9)[0], steps_per_epoch=STEPS, optimizer=optimizer, shrink=shrink
    )
    train(one, whole, optimizer)
    one.on_train_end()
    pruner.on_train_end()
    assert pruner.plan is not None
    assert one.plan is not None
    assert pruner.plan.to_json() == one.plan.to_json()
    equal(dict(model.state_dict()), dict(whole.state_dict()))
    assert (pruner.sparsity, pruner.target_sparsity, pruner.updates) == (one.sparsity, 0.5, one.updates)
    assert pruner.report() == one.report()


def test_heads_and_neurons_are_cut_in_one_go() -> None:
    model, pruner = run(nets.ViT, HEADS, NEURONS)
    masked = copy.deepcopy(model)
    pruner.on_train_end()
    assert [block.attn.num_heads for block in model.blocks] == [2, 2]
    assert [block.fc1.out_features for block in model.blocks] == [4, 4]
    x = batch(5, 5)[0]
    torch.testing.assert_close(model(x), masked(x), rtol=1e-9, atol=1e-9)
    assert pruner.sparsity == pytest.approx((4 + 12) / (8 + 20))
    assert pruner.criterion_name == "Abs+Weighted"


# ---- single weights on top of units


def alive(pruner: Pruners, name: str, shape: torch.Size) -> Tensor:
    """The slow obvious version: a mask of the dense tensor without the rows and columns of removed units."""
    mask = torch.ones(shape, dtype=torch.bool)
    for target in pruner.unit_targets:
        for member in (*target.structure.producers, *target.structure.consumers):
            for unit in (~target.keep).nonzero().flatten().tolist() if member.tensor == name else ():
                for position in member.index[unit].tolist():
                    mask.select(member.dim, position).fill_(False)
    return mask


def test_removed_units_count_among_the_single_weights() -> None:
    dense = {name: p.shape for name, p in build(nets.ResNet).named_parameters()}
    model, pruner = run(nets.ResNet, CHANNELS, WEIGHTS)
    weights = [target for target in pruner.targets if target.name.endswith("weight")]
    for target in weights:
        assert not (target.keep & ~alive(pruner, target.name, dense[target.name])).any(), target.name
    total = sum(target.total for target in weights)
    assert total == sum(dense[target.name].numel() for target in weights)
    assert sum(target.pruned for target in weights) == pruned_count(0.9, total)
    assert pruner.sparsity == pytest.approx(pruned_count(0.9, total) / total)  # every tensor is a target of both
    state = dict(model.named_parameters())
    for target in weights:
        assert not state[target.name][~target.keep].any(), target.name


def test_the_masks_of_single_weights_fit_the_smaller_model() -> None:
    model, pruner = run(nets.ResNet, CHANNELS, WEIGHTS)
    masked = copy.deepcopy(model)
    before = pruner.sparsity
    pruner.on_train_end()
    assert model.conv1.weight.shape == (3, 4, 3, 3)
    for name, mask in pruner.masks().items():
        if name.endswith("weight"):
            parameter = model.get_parameter(name)
            assert mask.shape == parameter.shape
            assert not parameter[~mask].any()
            assert parameter[mask].all()
    x = batch(5, 5)[0]
    torch.testing.assert_close(model(x), masked(x), rtol=1e-9, atol=1e-9)
    assert counts(pruner.dense_masks()) == {name: (s.pruned, s.total) for name, s in pruner.shares().items()}
    assert pruner.share.of == "weights"
    assert pruner.sparsity == before == pytest.approx(0.9, abs=1e-3)
    assert pruner.target_sparsity is None


def counts(masks: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    return {name: (mask.numel() - int(mask.sum()), mask.numel()) for name, mask in masks.items()}


def test_units_that_take_more_than_was_asked_for_leave_nothing_to_prune() -> None:
    """Half the channels of a middle layer and of what it reads and writes: far more than a tenth of the weights."""
    _, pruner = run(nets.ResNet, CHANNELS, partial(WEIGHTS, target_sparsity=0.1))
    dense = {name: p.shape for name, p in build(nets.ResNet).named_parameters()}
    for target in pruner.targets:
        if target.name.endswith("weight"):
            assert torch.equal(target.keep, alive(pruner, target.name, dense[target.name])), target.name


def test_the_sparsity_of_units_and_other_weights_is_that_of_all_their_tensors() -> None:
    model, pruner = run(nets.ResNet, partial(CHANNELS, include=["conv1"]), partial(WEIGHTS, include=["head"]))
    # conv1: 3 of 6 rows gone; conv2 reads them: 3 of 6 columns; the head has 32 weights
    gone = 3 * 8 * 9 + 8 * 3 * 9 + pruned_count(0.9, 32)
    targeted = 6 * 8 * 9 + 8 * 6 * 9 + 32
    assert pruner.sparsity == pytest.approx(gone / targeted)
    assert pruner.coverage == pytest.approx(
        targeted / sum(p.numel() for p in nets.ResNet().parameters() if p.dim() > 1)
    )
    pruner.on_train_end()
    assert model.head.weight.shape == (4, 8)
    assert pruner.report() == {
        "sparsity": pytest.approx(pruner.sparsity),
        "coverage": pruner.coverage,
        "kept/conv1": 3.0,
        "sparsity/head.weight": pytest.approx(29 / 32),
    }


def test_single_weights_elsewhere_stay_masked_while_units_are_cut() -> None:
    model, pruner = run(
        nets.ResNet, partial(CHANNELS, include=["conv1"], shrink="each_update"), partial(WEIGHTS, include=["head"])
    )
    assert model.conv1.out_channels == 3
    assert int(model.head.weight.count_nonzero()) == 3
    pruner.on_train_end()
    assert pruner.masks()["head.weight"].sum() == 3


# ---- one state, one record, one optimizer


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped() -> None:
    whole, pruner = run(nets.ResNet, CHANNELS, WEIGHTS)
    model = build(nets.ResNet)
    optimizer = sgd(model)
    first = several(model, CHANNELS, WEIGHTS, optimizer=optimizer)
    train(first, model, optimizer, last=1)
    saved = copy.deepcopy((first.state_dict(), model.state_dict(), optimizer.state_dict()))
    model = build(nets.ResNet)
    optimizer = sgd(model)
    again = several(model, CHANNELS, WEIGHTS, optimizer=optimizer)
    again.load_state_dict(saved[0])
    model.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[2])
    train(again, model, optimizer, first=1)
    equal(dict(model.state_dict()), dict(whole.state_dict()))
    equal(again.masks(), pruner.masks())
    equal(again.scores(), pruner.scores())
    assert again.updates == pruner.updates


def test_scores_travel_in_one_file(tmp_path: Path) -> None:
    model = build(nets.ViT)
    pruner = several(model, HEADS, NEURONS)
    x, y = batch(0, 0)
    F.cross_entropy(model(x), y).backward()
    pruner.on_before_optimizer_step()
    save_scores(tmp_path / "s.safetensors", pruner.scores(), criterion=pruner.criterion_name, steps=1)
    assert load_scores(tmp_path / "s.safetensors").criterion == "Abs+Weighted"
    other = several(build(nets.ViT), HEADS, NEURONS, schedule=OneShot(), scores=tmp_path / "s.safetensors")
    equal(other.scores(), pruner.scores())
    other.on_step_begin(0)  # without a batch
    assert other.finished
    with pytest.raises(ValueError, match=re.escape("they have one of 'x', which is not pruned here")):
        other.load_scores({"x": torch.zeros(1)})
    with pytest.raises(ValueError, match=re.escape("they have none of 'blocks.0.attn', which is pruned")):
        other.load_scores({})


def test_attached_pruners_are_called_by_the_optimizer() -> None:
    by_hand, hooked = run(nets.ResNet, CHANNELS, WEIGHTS)
    model = build(nets.ResNet)
    optimizer = sgd(model)
    pruner = several(model, CHANNELS, WEIGHTS)
    pruner.attach(optimizer)
    for epoch in range(3):
        for step in range(STEPS):
            x, y = batch(epoch, step)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    equal(pruner.masks(), hooked.masks())
    equal(dict(model.state_dict()), dict(by_hand.state_dict()))
    assert pruner.finish() is model


def test_an_early_end_sets_the_final_masks() -> None:
    model, pruner = run(nets.ResNet, CHANNELS, WEIGHTS, last=1)
    assert not pruner.finished
    with pytest.warns(UserWarning, match="training ended at epoch 1, before the schedule did"):
        pruner.on_train_end()
    assert pruner.finished
    assert pruner.sparsity == pytest.approx(0.9, abs=1e-3)
    assert model.conv1.out_channels == 3


# ---- errors


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "pruners is empty: it must list what makes one pruner or more"),
        (
            [CHANNELS, partial(CHANNELS, include=["conv1"])],
            "pruners[0] and pruners[1] both prune conv1: give them kinds, include or exclude that do not meet",
        ),
        (
            [WEIGHTS, partial(WEIGHTS, criterion=Magnitude(), include=["head"])],
            "pruners[0] and pruners[1] both prune head.weight: give them kinds, include or exclude that do not meet",
        ),
        ([CHANNELS, HEADS], "pruners[1]: kinds names 'heads', but the model has channels"),
        (
            [partial(CHANNELS, include=["conv1"]), partial(CHANNELS, exclude=["conv1"], shrink="each_update")],
            "shrink is at_end and each_update: all pruners of units have to shrink at the same time",
        ),
        (
            [CHANNELS, partial(WEIGHTS, pattern="2x1")],
            "pruners[1] prunes stem.weight by a pattern or per channel, and another cuts units out of it: what is left "
            "would not line up; take pattern 1x1, or exclude it",
        ),
        (
            [partial(CHANNELS, shrink="each_update"), WEIGHTS],
            "pruners[1] masks stem.weight, which shrink=each_update of another keeps cutting: set shrink=at_end, or "
            "exclude it",
        ),
        ([lambda model, **_: NoPruning(model)], "pruners[0] makes a NoPruning: it must make a Pruner"),
        (WEIGHTS, "pruners is a partial: it must list what makes one pruner or more"),
        ([WEIGHTS(nets.mlp())], "pruners[0] is a Pruner: give what makes it, functools.partial(Pruner, ...)"),
        (
            [lambda _, **options: WEIGHTS(nets.mlp(), **options)],
            "pruners[0] prunes another model: it must prune the one it is given",
        ),
        (
            [partial(CHANNELS, copies=[build(nets.ResNet).float()])],
            "pruners[0] has copies of its own: give them to Pruners, which cuts for all",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(parts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Pruners(build(nets.ResNet), parts, example_input=batch(0, 0)[0], steps_per_epoch=STEPS)


def test_the_state_of_other_pruners_is_refused() -> None:
    pruner = several(build(nets.ResNet), CHANNELS, WEIGHTS)
    state = pruner.state_dict()
    with pytest.raises(ValueError, match="this is not the state of several pruners: it has no 'parts'"):
        pruner.load_state_dict(state["parts"][0])
    with pytest.raises(ValueError, match="the saved state is of 1 pruners, here are 2"):
        pruner.load_state_dict({**state, "parts": state["parts"][:1]})
