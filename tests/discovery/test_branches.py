"""Whole residual branches: found, masked equals left out, caches of attentions, kinds of units side by side."""

from __future__ import annotations

from typing import Any, ClassVar

import by_hand
import nets
import pytest
import torch
from conformance import Network, NetworkTester
from facts import refused
from torch import Tensor, nn

import gsprune
from gsprune import Pruner, Rule
from gsprune.criteria import Abs, Fisher, Magnitude
from gsprune.discovery.branches import find_branches
from gsprune.forecast.predict import plan
from gsprune.schedules import OneShot
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.cut_plan import plan_cut
from gsprune.surgery.no_branch import NoBranch

IDS = torch.tensor([[1, 2, 3, 4], [5, 10, 7, 8], [0, 9, 2, 1]])
LINES = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(3))


def of(make: Any, x: Tensor, *names: str) -> Network:
    return Network(make, x, [(name, "branches", 1) for name in names], None, kinds=["branches"])


LAYERS = [name for i in (0, 1) for name in (f"branch 1.layers.{i}.self_attn", f"1.layers.{i}.linear2")]


class TestBranches(NetworkTester):
    """Attentions, MLPs and the inner path of a block of convolutions."""

    networks: ClassVar = {
        "vit": of(
            nets.ViT, nets.images(), *(n for i in (0, 1) for n in (f"branch blocks.{i}.attn", f"blocks.{i}.fc2"))
        ),
        "resnet": of(nets.ResNet, nets.images(), "bn2"),
        "encoder": of(lambda: by_hand.encoder(norm_first=True), LINES, *LAYERS),
        "norms behind": of(lambda: by_hand.encoder(norm_first=False), LINES, *LAYERS),
    }


def test_what_is_a_branch() -> None:
    names = [s.name for s in find_branches(nets.ViT(), nets.images()).structures]
    assert names == ["blocks.0.attn", "blocks.0.fc2", "blocks.1.attn", "blocks.1.fc2"]
    assert not find_branches(nets.mlp(), torch.randn(4, 6)).structures


class Gelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(x + 0.04 * x**3))


def test_an_activation_that_adds_a_tensor_to_itself_is_no_branch() -> None:
    net = nn.Sequential(nn.Linear(4, 4), Gelu(), nn.Linear(4, 2))
    assert not find_branches(net, torch.randn(3, 4)).structures


class Positions(nn.Module):
    """A layer's output and learnt positions of the same shape, for a batch of one: without the layer there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.pos, self.head = nn.Linear(4, 6), nn.Parameter(torch.randn(1, 5, 6)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x) + self.pos)  # type: ignore[no-any-return]


def test_positions_are_no_stream() -> None:
    assert not find_branches(Positions(), torch.randn(1, 5, 4)).structures


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=11, **sizes)).eval()


def test_a_language_model_generates_without_its_first_attention() -> None:
    """The cache counts the tokens that the first layer has seen."""
    model = llama()
    structures = find_branches(model, IDS).structures
    assert [s.name for s in structures] == [
        f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn", "mlp")
    ]
    keeps = [torch.tensor([i not in (0, 3)]) for i in range(6)]
    apply_cut(model, plan_cut(structures, keeps))
    assert isinstance(model.model.layers[0].self_attn, NoBranch)
    ways = [model.generate(IDS[:1], max_new_tokens=5, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*ways)
    both = [model(IDS[:1], use_cache=True, past_key_values=None).logits, model(IDS[:1], use_cache=False).logits]
    torch.testing.assert_close(*both)


def test_width_and_depth_in_one_ranking_by_score_and_price() -> None:
    """Heads, neurons and branches share a budget; what a branch took from the others is not asked for any more."""
    torch.manual_seed(0)
    model, x = nets.ViT(), nets.images()
    kinds = ["heads", "neurons", "branches"]
    pruner = Pruner(
        model, Fisher(), kinds=kinds, budget={"macs": 0.4}, example_input=x, schedule=OneShot(), shrink="each_update",
        optimizer=(optimizer := torch.optim.AdamW(model.parameters())), steps_per_epoch=2,
    )  # fmt: skip
    pruner.on_train_begin()
    for step in range(3):
        pruner.on_step_begin(step)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        pruner.on_before_optimizer_step()
        optimizer.step()
        pruner.on_step_end()
    pruner.on_train_end()
    assert model(x).isfinite().all()
    assert pruner.shares()["blocks.0.fc2"].total == 1


def test_local_scope_ranks_branches_together() -> None:
    torch.manual_seed(0)
    model, x = nets.ViT(), nets.images()
    pruner = Pruner(model, Abs(), kinds=["branches"], target_sparsity=0.5, example_input=x, schedule=OneShot())
    model(x).square().mean().backward()
    pruner.on_before_optimizer_step()
    pruner.on_step_begin(0)
    assert sum(share.pruned for share in pruner.shares().values()) == 2
    before = model.eval()(x)
    pruner.on_train_end()
    assert sum(isinstance(m, NoBranch) for m in model.modules()) == len(pruner.plan.removed) >= 4
    torch.testing.assert_close(model(x), before)


def test_masks_of_branches_and_of_neurons_are_applied_and_cut() -> None:
    torch.manual_seed(0)
    model, x = nets.ViT().eval(), nets.images()
    neurons = torch.arange(10) < 4
    masks = {"blocks.0.fc1": neurons, "blocks.1.fc2": torch.tensor([False])}
    pruner = Pruner.from_masks(model, masks, example_input=x)
    before = model(x)
    pruner.finish()
    assert isinstance(model.blocks[1].fc2, NoBranch)
    assert model.blocks[0].fc1.out_features == 4
    torch.testing.assert_close(model(x), before)


def test_a_block_all_of_whose_parameters_are_a_branch_s_still_passes_its_stream_on() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(self.norm(x))))  # type: ignore[no-any-return]

    net = nn.Sequential(nn.Linear(3, 4), Block(), Block(), nn.Linear(4, 2))
    assert [dict(s.removed) for s in find_branches(net, torch.randn(2, 3)).structures] == [
        {f"{i}.norm": 0, f"{i}.up": 0, f"{i}.down": 0} for i in (1, 2)
    ]


def test_a_wrong_kind_is_named_with_the_nearest() -> None:
    with refused("'branch'", "did you mean 'branches'?"):
        Rule(Abs(), kinds=["branch"])


def test_a_trained_network_loses_width_and_depth() -> None:
    """`gsprune.cut` ranks branches beside neurons, and repairs what is left."""
    torch.manual_seed(0)
    net, x = nets.ViT().eval(), nets.images(8)
    data = [(x, torch.randint(3, (8,)))]
    kinds = ["heads", "neurons", "branches"]
    found = gsprune.cut(net, data, nn.functional.cross_entropy, macs=0.3, kinds=kinds, progress=False)
    assert any(isinstance(m, NoBranch) for m in found.model.modules())
    assert found.small.macs == pytest.approx(0.3 * found.dense.macs, rel=0.2)
    assert found.model(x).isfinite().all()


def test_single_weights_of_a_branch_that_goes_count_as_pruned() -> None:
    torch.manual_seed(0)
    model, x = nets.ViT(), nets.images()
    rules = [
        Rule(Magnitude(), structured=True, kinds=["branches"], target_sparsity=0.5),
        Rule(Magnitude(), target_sparsity=0.8, exclude=["patch*", "head*"]),
    ]
    pruner = Pruner(model, rules=rules, schedule=OneShot(), example_input=x)
    pruner.on_train_begin()
    pruner.on_step_begin(0)
    before = model.eval()(x)
    pruner.on_train_end()
    assert sum(isinstance(m, NoBranch) for m in model.modules()) >= 4
    assert pruner.sparsity == pytest.approx(0.8, abs=0.01)
    torch.testing.assert_close(model(x), before)


def test_a_forecast_has_bounds_for_branches_and_the_sum() -> None:
    model, x = nets.ViT(), nets.images()
    pruner = Pruner(model, Abs(), kinds=["branches"], target_sparsity=0.5, schedule=OneShot(), example_input=x)
    (rule,) = plan(model, pruner, x).rules
    assert [(entry.least, entry.most) for entry in rule.entries] == [(0, 1)] * 4
    assert rule.kept == 2
    assert "1 branch" in str(plan(model, pruner, x))
