"""A pruner over no rule, one rule and several: disjoint targets, weights on top of units, one cut, one state."""

from __future__ import annotations

import copy
import inspect
import io
import re
import warnings
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import loops
import nets
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gsprune
from gsprune import Pruner, Rule
from gsprune.criteria import Abs, Elementwise, Magnitude, Weighted
from gsprune.formats.scores import load_scores, save_scores
from gsprune.pruner.rule import Settings
from gsprune.ranking.selection import pruned_count
from gsprune.schedules import Linear, OneShot

STEPS = 4
HEADS = Rule(Abs(decay=0.9), kinds=["heads"], target_sparsity=0.5)
NEURONS = Rule(Weighted(decay=0.9), kinds=["neurons"], target_sparsity=0.6)
CHANNELS = Rule(Abs(decay=0.9), target_sparsity=0.5)
WEIGHTS = Rule(Elementwise(decay=0.9), target_sparsity=0.9)
GRADUAL = Linear(end_epoch=2, update_frequency=0.5)


def build(kind: Any) -> nn.Module:
    torch.manual_seed(3)
    return nets.settle(kind()).double()


def batch(epoch: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * epoch + step)
    return torch.randn(6, 3, 8, 8, generator=generator).double(), torch.randint(0, 3, (6,), generator=generator)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.05)


def several(model: nn.Module, *rules: Rule, schedule: Any = GRADUAL, **arguments: Any) -> Pruner:
    example = batch(9, 9)[0]
    return Pruner(model, rules=rules, schedule=schedule, example_input=example, steps_per_epoch=STEPS, **arguments)


def train(pruner: Any, model: nn.Module, optimizer: torch.optim.Optimizer, *, first: int = 0, last: int = 3) -> None:
    loops.train(
        pruner, model, optimizer, lambda epoch: map(batch, [epoch] * STEPS, range(STEPS)), first=first, last=last
    )


def run(kind: Any, *rules: Rule, last: int = 3, **arguments: Any) -> tuple[nn.Module, Pruner]:
    model = build(kind)
    optimizer = sgd(model)
    pruner = several(model, *rules, optimizer=optimizer, **arguments)
    train(pruner, model, optimizer, last=last)
    return model, pruner


def equal(mine: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(mine) == set(other)
    for name, tensor in other.items():
        assert torch.equal(mine[name], tensor), name


# ---- disjoint targets


def test_each_rule_prunes_what_it_would_prune_alone() -> None:
    """Up to the first update nothing that one rule does reaches the other."""
    schedule = OneShot(start_epoch=0.75)
    _, both = run(nets.ViT, HEADS, NEURONS, schedule=schedule, last=1)
    for rule in (HEADS, NEURONS):
        _, alone = run(nets.ViT, rule, schedule=schedule, last=1)
        assert alone.sparsity > 0
        equal({name: both.masks()[name] for name in alone.masks()}, alone.masks())


def test_structures_that_no_rule_chooses_are_said() -> None:
    names = {s.name: s.kind for s in several(build(nets.ViT), HEADS).left_out}
    assert set(names.values()) == {"neurons", "residual"}
    assert [s.kind for s in several(build(nets.ViT), NEURONS).left_out if s.kind != "residual"] == ["heads"] * 2
    assert [s.kind for s in several(build(nets.ViT), HEADS, NEURONS).left_out] == ["residual"]
    without = several(build(nets.ViT), HEADS, replace(NEURONS, exclude=["blocks.0*"])).left_out
    assert [s.name for s in without if s.kind != "residual"] == [name for name in names if name.startswith("blocks.0")]


@pytest.mark.parametrize("shrink", ["at_end", "each_update"])
def test_two_rules_of_one_kind_are_one(shrink: Any) -> None:
    """Channels by Abs in two rules or in one, with structures of both in one tensor."""
    halves = replace(CHANNELS, include=["stem"]), replace(CHANNELS, exclude=["stem"])
    model, pruner = run(nets.ResNet, *halves, shrink=shrink)
    whole, one = run(nets.ResNet, CHANNELS, shrink=shrink)
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


def alive(pruner: Pruner, name: str, shape: torch.Size) -> Tensor:
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
    _, pruner = run(nets.ResNet, CHANNELS, replace(WEIGHTS, target_sparsity=0.1))
    dense = {name: p.shape for name, p in build(nets.ResNet).named_parameters()}
    for target in pruner.targets:
        if target.name.endswith("weight"):
            assert torch.equal(target.keep, alive(pruner, target.name, dense[target.name])), target.name


def test_the_sparsity_of_units_and_other_weights_is_that_of_all_their_tensors() -> None:
    model, pruner = run(nets.ResNet, replace(CHANNELS, include=["conv1"]), replace(WEIGHTS, include=["head"]))
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
    rules = replace(CHANNELS, include=["conv1"]), replace(WEIGHTS, include=["head"])
    model, pruner = run(nets.ResNet, *rules, shrink="each_update")
    assert model.conv1.out_channels == 3
    assert int(model.head.weight.count_nonzero()) == 3
    nn.init.ones_(model.head.weight)  # as the weights of the best epoch, loaded back
    pruner.on_train_end()
    assert pruner.masks()["head.weight"].sum() == int(model.head.weight.count_nonzero()) == 3


# ---- one state, one record, one optimizer


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
        other.load_scores({**pruner.scores(), "x": torch.zeros(1)})
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


# ---- whatever the number of rules

NUMBERS = {0: (), 1: (CHANNELS,), 2: (replace(CHANNELS, include=["conv1"]), WEIGHTS), 3: (
    replace(CHANNELS, include=["conv1"]), replace(CHANNELS, exclude=["conv1"]), WEIGHTS
)}  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS)
def test_everything_there_is_to_see_holds_for_any_number_of_rules(number: int, tmp_path: Path) -> None:
    model, pruner = run(nets.ResNet, *NUMBERS[number])
    names = [target.name for target in pruner.targets]
    assert len(pruner.parts) == number
    assert [*pruner.masks()] == [*pruner.dense_masks()] == [*pruner.scores()] == [*pruner.shares()] == names
    assert set(pruner.report()) == {"sparsity", *(["coverage"] if number else [])} | {
        f"sparsity/{name}" if name.endswith("weight") else f"kept/{name}" for name in names
    }
    assert pruner.criterion_name == {0: "none", 1: "Abs", 2: "Abs+Elementwise", 3: "Abs+Abs+Elementwise"}[number]
    assert (pruner.finished, pruner.horizon) == (True, 44 if number else 0)
    assert (pruner.updates > 0) == (pruner.next_plan() is not None) == (pruner.sparsity > 0) == (number > 0)
    assert (pruner.structured, pruner.plan, pruner.budget) == (number > 0, None, None)
    assert pruner.target_sparsity == {0: 0.0, 1: 0.5}.get(number)
    assert (
        repr(pruner)
        .splitlines()[0]
        .startswith(
            {0: "Pruner without a rule", 1: "Pruner of 14 channels in 2 structures, by Abs"}.get(
                number, f"Pruner of {number} rules, by {pruner.criterion_name}"
            )
        )
    )
    assert pruner._repr_html_().startswith("<b>Pruner ")
    if number:
        save_scores(tmp_path / "s", pruner.scores(), criterion=pruner.criterion_name, steps=1)
        other = several(build(nets.ResNet), *NUMBERS[number])
        other.load_scores(tmp_path / "s")
        equal(other.scores(), pruner.scores())
    else:
        with pytest.warns(UserWarning, match="scores have no effect"):
            pruner.load_scores({})
    kept = pruner.dense_masks()
    assert pruner.finish() is model
    assert (pruner.plan is not None) == (number > 0)
    equal(pruner.dense_masks(), kept)
    assert len(model(batch(5, 5)[0])) == 6


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickled(both)], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_as_the_original_does(number: int, copied: Any) -> None:
    model = build(nets.ResNet)
    optimizer = sgd(model)
    pruner = several(model, *NUMBERS[number], optimizer=optimizer)
    train(pruner, model, optimizer, last=1)
    other, twin, its_optimizer = copied((pruner, model, optimizer))
    train(pruner, model, optimizer, first=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(other, twin, its_optimizer, first=1)
    equal(dict(model.state_dict()), before)  # shares nothing with its copy
    equal(dict(twin.state_dict()), before)
    equal(other.masks(), pruner.masks())
    assert other.updates == pruner.updates


def pickled(both: Any) -> Any:
    file = io.BytesIO()
    torch.save(both, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("attached", [False, True])
def test_a_resumed_run_equals_one_that_never_stopped(number: int, attached: bool) -> None:
    rules = NUMBERS[number]

    def go(pruner: Pruner, model: nn.Module, optimizer: Any, first: int, last: int) -> None:
        if not attached:
            return train(pruner, model, optimizer, first=first, last=last)
        pruner.attach(optimizer)
        for epoch in range(first, last):
            for step in range(STEPS):
                x, y = batch(epoch, step)
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        return pruner.detach()

    whole = build(nets.ResNet)
    its_optimizer = sgd(whole)
    straight = several(whole, *rules)
    go(straight, whole, its_optimizer, 0, 3)
    model = build(nets.ResNet)
    optimizer = sgd(model)
    first = several(model, *rules)
    go(first, model, optimizer, 0, 1)
    saved = copy.deepcopy((first.state_dict(), model.state_dict(), optimizer.state_dict()))
    assert [rule["criterion"] for rule in saved[0]["rules"]] == [part.criterion_name for part in first.parts]
    model = build(nets.ResNet)
    optimizer = sgd(model)
    again = several(model, *rules)
    again.load_state_dict(saved[0])
    model.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[2])
    go(again, model, optimizer, 1, 3)
    equal(dict(model.state_dict()), dict(whole.state_dict()))
    equal(again.masks(), straight.masks())
    equal(again.scores(), straight.scores())
    assert (again.updates, again.epoch) == (straight.updates, straight.epoch)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_final_masks_of_any_number_of_rules_keep_a_model_sparse(number: int) -> None:
    _, pruner = run(nets.ResNet, *NUMBERS[number])
    model = build(nets.ResNet)
    optimizer = sgd(model)
    kept = Pruner.from_masks(model, pruner.dense_masks(), example_input=batch(9, 9)[0], optimizer=optimizer)
    equal(kept.masks(), pruner.dense_masks())
    assert (kept.sparsity, kept.finished) == (pruner.sparsity, True)
    train(kept, model, optimizer, last=1)
    equal(kept.masks(), pruner.dense_masks())
    assert kept.finish() is model
    pruner.finish()
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in pruner.model.named_parameters()}


@pytest.mark.parametrize("number", NUMBERS)
def test_a_step_that_will_be_skipped_reaches_no_rule(number: int) -> None:
    model = build(nets.ResNet)
    optimizer = sgd(model)
    pruner = several(model, *NUMBERS[number], optimizer=optimizer)
    x, y = batch(0, 0)
    F.cross_entropy(model(x), y).backward()
    optimizer.found_inf = torch.ones(1)  # type: ignore[attr-defined]
    pruner.on_before_optimizer_step()
    assert not any(score.any() for score in pruner.scores().values())
    optimizer.found_inf = torch.zeros(1)  # type: ignore[attr-defined]
    pruner.on_before_optimizer_step()
    assert all(score.any() for score in pruner.scores().values())


def test_the_short_form_is_one_rule() -> None:
    signature = inspect.signature(Pruner).parameters
    own = {field.name for field in fields(Rule)} - {"criterion", "schedule", "scores"}
    assert set(Settings.__annotations__) == own <= set(signature)
    for field in fields(Rule):
        if field.name != "criterion":
            assert signature[field.name].default == field.default
    assert len(set(signature) - own - {"criterion"}) <= 12
    model, other = build(nets.ResNet), build(nets.ResNet)
    settings: Settings = {"kinds": ["channels"], "target_sparsity": 0.5}
    short = Pruner(model, criterion := Abs(), example_input=batch(0, 0)[0], **settings)
    rule = Rule(criterion, **settings)
    assert short.rules == Pruner(other, rules=[rule], example_input=batch(0, 0)[0]).rules == [rule]


def test_a_rule_has_its_own_schedule_and_scores() -> None:
    model = build(nets.ResNet)
    own = {"head.weight": torch.rand(4, 8)}
    rules = replace(CHANNELS, schedule=OneShot(start_epoch=1)), replace(WEIGHTS, include=["head"], scores=own)
    pruner = several(model, *rules, schedule=OneShot())
    assert [part.schedules[0].start_epoch for part in pruner.parts] == [1, 0]
    equal({"head.weight": pruner.scores()["head.weight"]}, own)


# ---- names of before


def test_the_former_names_still_work_with_a_warning() -> None:
    x = batch(0, 0)[0]
    halves = [partial(Pruner, criterion=Abs(), target_sparsity=0.5), partial(Pruner, criterion=Elementwise())]
    with pytest.warns(FutureWarning, match=r"rules="):
        pruner = gsprune.Pruners(build(nets.ResNet), halves, schedule=OneShot(target_sparsity=0.9), example_input=x)
    assert [part.target_sparsity for part in pruner.parts] == [0.5, 0.9]
    with pytest.warns(FutureWarning, match=r"rules=\[\]"):
        assert gsprune.NoPruning(nets.mlp(), scope="global").parts == []
    with pytest.warns(FutureWarning, match="budget"):
        pruner = Pruner(build(nets.ResNet), Abs(), target={"params": 0.5}, example_input=x)
    assert pruner.budget is not None
    assert (pruner.budget.kind, pruner.budget.share) == ("params", 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pruner(nets.mlp(), Elementwise(), target_sparsity=0.5, target={"macs": None, "params": None})


# ---- errors


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [CHANNELS, replace(CHANNELS, include=["conv1"])],
            "rules[0] and rules[1] both prune conv1",
        ),
        (
            [WEIGHTS, replace(WEIGHTS, criterion=Magnitude(), include=["head"])],
            "rules[0] and rules[1] both prune head.weight",
        ),
        ([CHANNELS, HEADS], "rules[1]: kinds names 'heads', but the model has channels"),
        (
            [CHANNELS, replace(WEIGHTS, pattern="2x1")],
            "rules[1] prunes stem.weight by a pattern or per channel, and another cuts units out of it: what is left "
            "would not line up; take pattern 1x1, or exclude it",
        ),
        (CHANNELS, "rules has a Rule: it must be a list of gsprune.Rule"),
        ([WEIGHTS, Abs()], "rules has a Abs: it must be a list of gsprune.Rule"),
    ],
)
def test_what_does_not_go_together_is_refused(rules: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Pruner(build(nets.ResNet), rules=rules, example_input=batch(0, 0)[0], steps_per_epoch=STEPS)


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ({"rules": [WEIGHTS], "target_sparsity": 0.5}, "rules and target_sparsity"),
        ({"rules": [], "criterion": Abs()}, "rules and criterion"),
        ({"rules": [WEIGHTS], "shrink": "each_update"}, "each_update"),
        ({"rules": [CHANNELS, WEIGHTS], "shrink": "each_update"}, r"rules\[1\] masks stem.weight"),
        ({}, "criterion nor rules"),
        ({"criterion": Abs(), "budget": {"macs": 0.5}, "target": {"macs": 0.5}}, "budget=.* and target="),
    ],
)
def test_arguments_that_contradict_rules(arguments: dict[str, Any], facts: str) -> None:
    with pytest.raises(ValueError, match=facts) as error:
        Pruner(build(nets.ResNet), example_input=batch(0, 0)[0], **arguments)
    assert "\n" not in str(error.value)


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(TypeError, match="'sparsityy'"):
        Pruner(nets.mlp(), Elementwise(), sparsityy=0.5)  # type: ignore[call-arg]


def test_the_state_of_other_rules_is_refused_and_nothing_is_taken_over() -> None:
    pruner = several(build(nets.ResNet), CHANNELS, WEIGHTS)
    state = pruner.state_dict()
    with pytest.raises(ValueError, match="it has no 'cut'"):
        pruner.load_state_dict(state["rules"][0])
    with pytest.raises(ValueError, match="is of 1 rules, this pruner has 2"):
        pruner.load_state_dict({**state, "rules": state["rules"][:1]})
    swapped = several(build(nets.ResNet), CHANNELS, replace(WEIGHTS, criterion=Magnitude()))
    state["rules"][0]["scores"]["conv1"].fill_(1.0)
    with pytest.raises(ValueError, match=r"rules\[1\]: .* Elementwise, .* Magnitude"):
        swapped.load_state_dict(state)
    assert not swapped.scores()["conv1"].any()
