"""A plan's numbers against a pruner that really ran, what it says, and that it leaves everything as it was."""

from __future__ import annotations

import copy
import json
import re

import nets
import pytest
import torch
from facts import refused
from torch import nn

from gsprune import Pruner, Rule
from gsprune.cost.counting import count_macs, count_parameters
from gsprune.criteria import Abs, Elementwise, Magnitude, Weighted
from gsprune.forecast import predict
from gsprune.forecast.plan import Cost, PruningPlan, RulePlan
from gsprune.schedules import Cubic, OneShot
from gsprune.zoo.models import convnet, resnet50, vit_tiny

SMALL = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(7))
DIGIT = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(8))


def conv_model(width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return nets.settle(convnet(image_size=8, in_channels=1, num_classes=10, width=width))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def make(model, criterion, example=DIGIT, **settings):
    return Pruner(model, criterion, **{"example_input": example, "schedule": OneShot(), **settings})


def plan(model, pruner, example) -> RulePlan:
    """Of a pruner of one rule."""
    planned = predict.plan(model, pruner, example)
    [rule] = planned.rules
    shape = "x".join(map(str, example.shape))
    told = (planned.dense, planned.pruned, planned.input, planned.to_json())
    assert told == (rule.dense, rule.pruned, shape, {**rule.to_json(), "input": shape})
    return rule


def run(pruner):
    """Prune for good, by random scores."""
    generator = torch.Generator().manual_seed(9)
    if pruner.horizon != 0:
        pruner.load_scores({n: torch.rand(m.shape, generator=generator) for n, m in pruner.masks().items()})
    pruner.on_step_begin(0)
    assert pruner.finished
    return {name: int(mask.sum()) for name, mask in pruner.masks().items()}


def text(planned, width=80):
    """As printed, on one line."""
    if isinstance(planned, RulePlan):
        planned = PruningPlan((planned,), planned.dense, planned.pruned)
    return re.sub(r"\s+", " ", "\n".join(planned.lines(width=width)))


LOCAL = {
    "elementwise": (conv_model, Elementwise, DIGIT, {"scope": "local", "target_sparsity": 0.83}),
    "elementwise by channel": (
        conv_model,
        Elementwise,
        DIGIT,
        {"scope": "local", "target_sparsity": 0.83, "per_channel": True, "min_kept": 3},
    ),
    "min_kept": (conv_model, Elementwise, DIGIT, {"scope": "local", "target_sparsity": 0.99, "min_kept": 40}),
    "magnitude": (conv_model, Magnitude, DIGIT, {"scope": "local", "target_sparsity": 0.5}),
    "tiles": (mlp, Elementwise, torch.ones(1, 8), {"scope": "local", "target_sparsity": 0.7, "pattern": "4x2"}),
    "tiles by channel": (
        mlp,
        Elementwise,
        torch.ones(1, 8),
        {"scope": "local", "target_sparsity": 0.7, "pattern": "2x2", "per_channel": True},
    ),
    "blocks": (mlp, Elementwise, torch.ones(1, 8), {"scope": "local", "pattern": "1:4"}),
    "blocks, global": (mlp, Elementwise, torch.ones(1, 8), {"scope": "global", "pattern": "2:4"}),
    "abs": (conv_model, Abs, DIGIT, {"target_sparsity": 0.37}),
    "weighted": (nets.ViT, Weighted, SMALL, {"target_sparsity": 0.6, "min_kept": 2}),
    "counts": (nets.ViT, Weighted, SMALL, {"keep": {"heads": 1, "neurons": 7}}),
    "counts of heads": (nets.ViT, Abs, SMALL, {"keep": {"heads": 3}}),
}


@pytest.mark.parametrize("name", LOCAL)
def test_local_counts_are_those_of_a_pruner_that_ran(name):
    build, criterion, example, settings = LOCAL[name]
    model = build()
    pruner = make(model, criterion(), example, **settings)
    planned = plan(model, pruner, example)
    kept = run(pruner)
    assert {entry.name: entry.kept for entry in planned.entries} == kept
    assert planned.kept == sum(kept.values())
    assert planned.sparsity == pytest.approx(pruner.sparsity, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in LOCAL if LOCAL[name][1] in (Abs, Weighted)])
def test_a_smaller_models_costs_are_those_of_the_model_that_comes_out(name):
    build, criterion, example, settings = LOCAL[name]
    model = build()
    pruner = make(model, criterion(), example, **settings)
    planned = plan(model, pruner, example)
    assert planned.dense == Cost(count_parameters(model), count_macs(model, example))
    run(pruner)
    pruner.on_train_end()
    assert planned.pruned == Cost(count_parameters(model), count_macs(model, example))
    assert planned.even is None
    assert (planned.params_left, planned.macs_left) == (planned.pruned.params, planned.pruned.macs)
    modules = dict(model.named_modules())
    for entry in planned.entries:
        assert entry.pruned.params == sum(count_parameters(modules[layer]) for layer in entry.layers), entry.name


GLOBAL = {
    "elementwise": (conv_model, Elementwise, DIGIT, {"target_sparsity": 0.9}),
    "min_kept": (conv_model, Elementwise, DIGIT, {"target_sparsity": 0.9, "min_kept": 200}),
    "min_kept allows no more": (mlp, Elementwise, torch.ones(1, 8), {"target_sparsity": 0.9, "min_kept": 60}),
    "nearly nothing": (mlp, Elementwise, torch.ones(1, 8), {"target_sparsity": 0.1}),
    "tiles": (mlp, Elementwise, torch.ones(1, 8), {"target_sparsity": 0.7, "pattern": "4x2"}),
    "blocks and min_kept": (
        mlp,
        Elementwise,
        torch.ones(1, 8),
        {"pattern": "1:4", "min_kept": 40, "scope": "global"},
    ),
    "units": (conv_model, Weighted, DIGIT, {"target_sparsity": 0.5, "scope": "global"}),
    "min_share": (conv_model, Weighted, DIGIT, {"target_sparsity": 0.6, "scope": "global", "min_share": 0.3}),
    "min_share of weights": (mlp, Elementwise, torch.ones(1, 8), {"target_sparsity": 0.6, "min_share": 0.25}),
    "structures that are alike": (nets.ViT, Weighted, SMALL, {"target_sparsity": 0.6, "scope": "isomorphic"}),
}


@pytest.mark.parametrize("name", GLOBAL)
def test_one_ranking_has_an_exact_total_and_bounds(name):
    build, criterion, example, settings = GLOBAL[name]
    model = build()
    pruner = make(model, criterion(), example, **settings)
    planned = plan(model, pruner, example)
    kept = run(pruner)
    for entry in planned.entries:
        assert entry.least <= kept[entry.name] <= entry.most, entry.name
    if name == "blocks and min_kept":  # the scores say how often the two coincide
        assert planned.kept <= sum(kept.values())
    else:
        assert planned.kept == sum(kept.values())


def test_bounds_are_as_tight_as_the_total_allows():
    model = mlp()  # 128 + 256 + 64 weights; a tenth, 45, goes: no tensor can lose more
    planned = plan(model, make(model, Elementwise(), target_sparsity=0.1), torch.ones(1, 8))
    assert planned.kept == 403
    assert [(e.least, e.most) for e in planned.entries] == [(83, 128), (211, 256), (19, 64)]
    model = mlp()
    planned = plan(model, make(model, Elementwise(), target_sparsity=0.9, min_kept=10), torch.ones(1, 8))
    assert planned.kept == 45
    assert [(e.least, e.most) for e in planned.entries] == [(10, 25), (10, 25), (10, 25)]


def test_a_share_of_every_structure_is_in_the_bounds():
    model = conv_model()  # 32 + 64 + 64 channels, of which 64 stay
    settings = {"target_sparsity": 0.6, "scope": "global"}
    planned = plan(model, make(model, Weighted(), DIGIT, **settings), DIGIT)
    assert (planned.min_share, planned.scope) == (0.1, "global")
    assert [(e.least, e.most) for e in planned.entries] == [(4, 32), (7, 53), (7, 53)]
    planned = plan(model, make(model, Weighted(), DIGIT, **settings, min_share=0.3), DIGIT)
    assert [(e.least, e.most) for e in planned.entries] == [(10, 24), (20, 34), (20, 34)]


def test_structures_that_are_alike_share_their_count_and_the_plan_says_so():
    model = nets.ViT()  # 4 heads and 10 neurons in each of two blocks
    planned = plan(model, make(model, Abs(), SMALL, target_sparsity=0.5, scope="isomorphic"), SMALL)
    assert [(e.name, e.least, e.most) for e in planned.entries] == [
        ("blocks.0.attn", 1, 3),
        ("blocks.0.fc1", 1, 9),
        ("blocks.1.attn", 1, 3),
        ("blocks.1.fc1", 1, 9),
    ]
    assert planned.kept == 4 + 10
    assert planned.notes[0].startswith("Structures that are alike are ranked together")


def test_the_extreme_scores_reach_the_bounds():
    model = mlp()
    pruner = make(model, Elementwise(), target_sparsity=0.9, min_kept=10)
    most = plan(model, pruner, torch.ones(1, 8)).entries[0].most
    pruner.load_scores({n: torch.full(m.shape, 1.0 + (n == "0.weight")) for n, m in pruner.masks().items()})
    pruner.on_step_begin(0)
    assert [int(mask.sum()) for mask in pruner.masks().values()] == [most, 10, 10]


def test_single_weights_cost_the_same_and_say_what_is_not_zero():
    model = mlp()
    planned = plan(model, make(model, Elementwise(), scope="local", target_sparsity=0.75), torch.ones(1, 8))
    assert planned.dense == planned.pruned == Cost(484, 448)  # 448 weights and 36 biases
    assert (planned.params_left, planned.macs_left) == (112 + 36, 112)
    assert [entry.dense.macs for entry in planned.entries] == [128, 256, 64]


def test_one_ranking_of_units_has_no_cost_but_that_of_even_shares():
    model = conv_model()
    planned = plan(model, make(model, Weighted(), target_sparsity=0.5, scope="global"), DIGIT)
    model = conv_model()
    local = plan(model, make(model, Weighted(), target_sparsity=0.5), DIGIT)
    assert (planned.pruned, planned.params_left, planned.macs_left) == (None, None, None)
    assert planned.even == local.pruned
    assert all(entry.pruned is None for entry in planned.entries)
    shown = text(planned)
    assert "3.95x), if every structure gave the same share." in shown
    assert (
        "The structures are ranked together: the scores will say where the 80 units that stay are, so there are only "
        "bounds for each. scope=local gives each its own share." in shown
    )


def test_layers_are_counted_once_for_each_call_and_a_transposed_one_by_its_inputs():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 2, stride=2), nn.Flatten(), nn.Linear(288, 2))
    planned = plan(model, make(model, Elementwise(), scope="local", target_sparsity=0.5), SMALL)
    assert [e.dense.macs for e in planned.entries] == [4 * 36 * 27, 36 * 4 * 8, 576]
    assert planned.dense.macs == sum(e.dense.macs for e in planned.entries)


def test_nothing_is_planned_without_a_pruner():
    model = conv_model()
    planned = predict.plan(model, Pruner(model, rules=[]), DIGIT)
    assert planned.rules == ()
    assert planned.dense == planned.pruned == Cost(count_parameters(model), count_macs(model, DIGIT))
    assert text(planned) == (
        "Nothing is pruned: 93.5k parameters, 1.49M MACs for an input of 1x1x8x8 stay. "
        "Nothing was trained, the model is as it was."
    )


@pytest.mark.parametrize("criterion", [Elementwise, Magnitude, Weighted])
def test_model_pruner_and_random_numbers_are_left_as_they_were(criterion):
    model = nn.Sequential(conv_model(), nn.Dropout(0.5)).train()
    model[0].stem.eval()  # each module's own mode
    calls = []
    handle = model[0].head.register_forward_hook(lambda *_: calls.append(1))
    pruner = make(model, criterion(), target_sparsity=0.5)
    parameters, state = [*model.parameters()], copy.deepcopy(model.state_dict())
    before, modes, random = pruner.state_dict(), [m.training for m in model.modules()], torch.get_rng_state()
    hooks = [len(m._forward_hooks) for m in model.modules()]
    plan(model, pruner, DIGIT)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(p.grad is None for p in parameters)
    [before], [after] = before["rules"], pruner.state_dict()["rules"]
    for part in ("scores", "masks"):
        assert all(torch.equal(before[part][name], after[part][name]) for name in before[part])
    assert (after["applied"], after["updates"], pruner.plan) == (before["applied"], 0, None)
    handle.remove()


def test_what_is_left_whole_and_why():
    model = nets.ViT()
    planned = plan(model, make(model, Abs(), SMALL, keep={"heads": 2}), SMALL)
    named = "include, exclude, keep or kinds leaves it out"
    assert planned.skipped == {
        "patch": named,
        **{f"blocks.0.{layer}": why for layer, why in (("attn.proj", named), ("fc1", named), ("fc2", named))},
        **{f"blocks.1.{layer}": why for layer, why in (("attn.proj", named), ("fc1", named), ("fc2", named))},
        "head": "it feeds the model's output",
    }
    layers = {name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    taken = {layer for entry in planned.entries for layer in entry.layers}
    assert taken | set(planned.skipped) == layers
    assert not taken & set(planned.skipped)
    shown = text(planned, width=160)
    assert "include, exclude, keep or kinds leaves it out" in shown
    assert "head: it feeds the model's output" in shown


def test_what_no_single_weight_is_pruned_of():
    model = nets.ViT()
    planned = plan(model, make(model, Elementwise(), SMALL, target_sparsity=0.5, exclude=["head"]), SMALL)
    assert planned.skipped == {
        "pos": "its shape [1, 4, 12] is not that of a matrix",
        "head.weight": "include or exclude leaves it out",
    }


def test_how_much_of_the_model_single_weights_are():
    model = nn.ModuleDict({"words": nn.Embedding(10, 4), "fc": nn.Linear(4, 10)})
    model.forward = lambda x: model["fc"](model["words"](x))
    with pytest.warns(UserWarning, match="50 % of the model's matrix weights"):
        planned = plan(model, make(model, Elementwise(), target_sparsity=0.5), torch.tensor([1]))
    assert planned.coverage == planned.to_json()["coverage"] == 0.5
    assert planned.skipped == {"words.weight": "it is an embedding"}
    assert "The tensors hold 50.0 % of the model's matrix weights: sparsity is that of them." in text(planned)
    model = mlp()
    planned = plan(model, make(model, Elementwise(), target_sparsity=0.5), torch.ones(1, 8))
    assert planned.coverage == 1.0
    assert "matrix weights" not in text(planned)


def test_layers_about_to_collapse():
    model = conv_model()
    planned = plan(model, make(model, Weighted(), keep={"channels": 3}), DIGIT)
    assert planned.collapsing == {
        "stem": "3 of 32 channels are left",
        "down": "3 of 64 channels are left",
        "block.conv1": "3 of 64 channels are left",
    }
    assert "About to collapse stem: 3 of 32 channels are left down, block.conv1: 3 of 64" in text(planned)
    model = nets.ViT()
    planned = plan(model, make(model, Abs(), SMALL, keep={"heads": 1, "neurons": 4}), SMALL)
    assert planned.collapsing == dict.fromkeys(["blocks.0.attn", "blocks.1.attn"], "1 of 4 heads is left")
    model = mlp()
    planned = plan(model, make(model, Elementwise(), scope="local", target_sparsity=0.95), torch.ones(1, 8))
    assert planned.collapsing == {  # 13 and 3 are just a twentieth; 6 and 13 weights cannot reach 16 outputs
        "0.weight": "6 of 128 weights are left, fewer than its 16 outputs",
        "2.weight": "13 of 256 weights are left, fewer than its 16 outputs",
        "4.weight": "3 of 64 weights are left, fewer than its 4 outputs",
    }
    model = nn.Sequential(nn.Linear(1000, 4))
    planned = plan(model, make(model, Elementwise(), scope="local", target_sparsity=0.96), torch.ones(1, 1000))
    assert planned.collapsing == {"0.weight": "160 of 4,000 weights are left"}


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_nothing_collapses_where_enough_is_left(share):
    model = mlp()
    assert plan(model, make(model, Elementwise(), target_sparsity=share), torch.ones(1, 8)).collapsing == {}


def test_the_schedule_by_epoch():
    model = mlp()
    cubic = Cubic(end_epoch=2.5, start_epoch=0.5, update_frequency=0.5)
    planned = plan(model, make(model, Elementwise(), target_sparsity=0.8, schedule=cubic), torch.ones(1, 8))
    assert planned.schedule == ((0, 0), (0.5, 0), (1, 0.4625), (2, 0.7875), (2.5, 0.8))
    assert "epoch 0 0.5 1 2 2.5" in text(planned)
    assert "sparsity 0.0 % 0.0 % 46.2 % 78.8 % 80.0 %" in text(planned)


def test_a_schedule_that_is_the_mean_of_two_counts():
    model = nets.ViT()  # 4 heads and 10 neurons in each of two blocks
    pruner = make(model, Abs(), SMALL, keep={"heads": 2, "neurons": 7}, schedule=OneShot(start_epoch=1))
    assert plan(model, pruner, SMALL).schedule == ((0, 0), (1, round(5 / 14, 12)))


def test_a_long_schedule_shows_nine_epochs_and_the_last():
    model = mlp()
    pruner = make(model, Elementwise(), target_sparsity=0.5, schedule=Cubic(), epochs=90)
    planned = plan(model, pruner, torch.ones(1, 8))
    assert len(planned.schedule) == 61
    assert "epoch 0 8 15 22 30 38 45 52 60 " in text(planned)


def test_what_min_kept_does_not_allow_is_said():
    model = mlp()
    planned = plan(model, make(model, Elementwise(), target_sparsity=0.9, min_kept=60), torch.ones(1, 8))
    assert planned.notes[0] == (
        "59.8 % instead of 90.0 % will be reached: min_kept=60 in each of 3 tensors allows no more."
    )


def test_the_printed_plan_of_units():
    model = conv_model()
    shown = text(plan(model, make(model, Weighted(), target_sparsity=0.5), DIGIT))
    assert shown.startswith(
        "Weighted removes units: 80 of 160 in 3 structures stay (50.0 %). "
        "93.5k -> 23.7k parameters (3.94x), 1.49M -> 378k MACs (3.95x). "
    )
    assert "down +1 32 of 64 channels 55k -> 14k 885k -> 221k" in shown
    assert "whole model 80 of 160 units 94k -> 24k 1.5M -> 378k" in shown
    assert shown.endswith("Left whole head: it feeds the model's output Nothing was trained, the model is as it was.")


def test_the_printed_plan_of_weights():
    model = mlp()
    shown = text(plan(model, make(model, Elementwise(), pattern="2:4", per_channel=True, scope="local"), DIGIT[0, 0]))
    assert shown.startswith(
        "Elementwise zeroes weights by the pattern 2:4 in every output channel: 224 of 448 in 3 tensors stay (50.0 %). "
        "484 parameters, 260 not zero in the end; 3,584 MACs, 1,792 not by zero. "
    )
    assert "0.weight 128 64 50.0 % 1,024" in shown
    assert "all of them 448 224 50.0 % 3,584" in shown
    assert "Pruned weights are zeros in tensors of the old size: only removing units makes the model smaller. " in shown
    assert "ranked together" not in shown
    model = mlp()
    shown = text(plan(model, make(model, Elementwise(), target_sparsity=0.9), torch.ones(1, 8)))
    assert "0.weight 128 1 43 128" in shown
    assert "all of them 448 ranked together 448" in shown


def test_layers_alike_share_a_row():
    torch.manual_seed(0)
    model = vit_tiny(image_size=8, in_channels=1, num_classes=10)
    shown = text(plan(model, make(model, Abs(), target_sparsity=0.5), DIGIT))
    assert "blocks.{0-3}.attn 4 x 2 of 4 heads 112k -> 56k" in shown
    assert "blocks.{0-3}.mlp.fc1 4 x 192 of 384 neurons" in shown


@pytest.mark.slow
def test_a_deep_network_is_read_at_a_glance():
    model, x = resnet50(image_size=32, in_channels=3, num_classes=10), torch.ones(1, 3, 32, 32)
    planned = plan(model, make(model, Weighted(), x, target_sparsity=0.5), x)
    for width in (80, 160):
        lines = PruningPlan((planned,), planned.dense, planned.pruned).lines(width=width)
        assert len(lines) < 32
        assert max(len(line.rstrip()) for line in lines) <= 80
        assert any(line.startswith("layer3.{0-5}.conv1 ") for line in lines)


def test_the_middle_of_a_long_table_is_left_out():
    model = nn.Sequential(*(nn.Linear(10 + i, 11 + i) for i in range(30)))
    planned = plan(model, make(model, Elementwise(), target_sparsity=0.5), torch.ones(1, 10))
    shown = text(planned)
    assert "15.weight 650" in shown
    assert "... 6 more rows of tensors ..." in shown
    assert "16.weight" not in shown
    assert "22.weight" in shown
    assert len(planned.to_json()["entries"]) == 30


def test_a_plan_prints_as_its_table_with_the_size_of_the_input():
    model = mlp()
    planned = predict.plan(model, make(model, Elementwise(), target_sparsity=0.5), torch.ones(1, 8))
    lines = repr(planned).splitlines()
    assert lines[0] == "Elementwise zeroes weights: 224 of 448 in 3 tensors stay (50.0 %)."
    assert lines[1].endswith("448 MACs for an input of 1x8.")
    assert lines == planned.lines(width=80)


def test_a_plan_is_a_table_in_a_notebook():
    model = mlp()
    page = predict.plan(model, make(model, Abs(), target_sparsity=0.5), torch.ones(1, 8))._repr_html_()
    assert page.startswith("<p>Abs removes units: ")
    assert "<tr><td>{0,2}</td><td>2 x 8 of 16 neurons</td>" in page
    assert "<p>4: it feeds the model&#x27;s output</p>" in page


@pytest.mark.parametrize("width", [30, 50, 80])
def test_a_plan_fits_a_narrow_terminal(width):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    named = nn.ModuleDict({"a_part_with_a_long_name": model})
    named.forward = model.forward
    x = torch.ones(1, 8)
    lines = predict.plan(named, make(named, Abs(), x, target_sparsity=0.5), x).lines(width=width)
    assert max(map(len, lines)) <= max(width, 62)  # the numbers are never cut
    assert any("a_part_with_" in line for line in lines)


def test_json_has_everything_and_only_plain_values():
    model = conv_model()
    data = plan(model, make(model, Weighted(), target_sparsity=0.5), DIGIT).to_json()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["entries"][0] == {
        "name": "stem",
        "kind": "channels",
        "layers": ["stem"],
        "total": 32,
        "least": 16,
        "most": 16,
        "kept": 16,
        "dense": {"params": 288, "macs": 18432},
        "pruned": {"params": 144, "macs": 9216},
    }
    assert data["sparsity"] == 0.5
    assert data["pruned"]["params"] == 23738
    assert data["schedule"] == [[0.0, 0.5]]
    assert data["skipped"] == {"head": "it feeds the model's output"}


def test_a_pruner_of_another_model_is_refused():
    pruner = make(mlp(), Elementwise(), target_sparsity=0.5)
    with refused("pruner", "another model"):
        plan(mlp(), pruner, torch.ones(1, 8))


def test_a_pruner_that_has_shrunk_its_model_is_refused():
    model = conv_model()
    pruner = make(model, Weighted(), target_sparsity=0.5)
    run(pruner)
    pruner.on_train_end()
    with refused("pruner", "already", "before training"):
        plan(model, pruner, DIGIT)


def test_a_schedule_without_an_end_is_refused_as_in_training():
    model = mlp()
    with refused("end_epoch", "epochs"):
        plan(model, make(model, Elementwise(), target_sparsity=0.5, schedule=Cubic()), torch.ones(1, 8))


# ---- several rules


def test_the_plan_of_several_rules_is_what_they_leave_together() -> None:
    model = nets.settle(vit_tiny(image_size=8, in_channels=1, num_classes=10))
    rules = [
        Rule(Abs(), kinds=["heads"], target_sparsity=0.5),
        Rule(Magnitude(), structured=True, kinds=["neurons"], target_sparsity=0.25),
        Rule(Elementwise(), target_sparsity=0.9),
    ]
    pruner = Pruner(model, rules=rules, schedule=OneShot(), example_input=DIGIT)
    planned = predict.plan(model, pruner, DIGIT)
    assert [rule.criterion for rule in planned.rules] == ["Abs", "Magnitude", "Elementwise"]
    assert planned.dense == Cost(count_parameters(model), count_macs(model, DIGIT))
    generator = torch.Generator().manual_seed(9)
    pruner.load_scores({n: torch.rand(m.shape, generator=generator) for n, m in pruner.masks().items()})
    pruner.on_step_begin(0)
    pruner.on_train_end()
    assert planned.pruned == Cost(count_parameters(model), count_macs(model, DIGIT))
    shown = text(planned)
    assert "Rule 1 of 3 Abs removes units" in shown
    assert "Rule 3 of 3 Elementwise zeroes weights" in shown
    assert "All together: " in shown
    assert shown.count("Nothing was trained, the model is as it was.") == 1
    assert json.loads(json.dumps(planned.to_json()))["pruned"]["params"] == count_parameters(model)


def test_scores_that_decide_leave_the_sum_open() -> None:
    model = conv_model()
    rules = [Rule(Abs(), scope="global", target_sparsity=0.5), Rule(Elementwise(), target_sparsity=0.9)]
    planned = predict.plan(model, Pruner(model, rules=rules, schedule=OneShot(), example_input=DIGIT), DIGIT)
    assert planned.pruned is None
    assert planned.to_json()["pruned"] is None
    assert "All together: the scores decide what is left." in text(planned)
