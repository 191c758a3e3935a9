"""Budgets: a ranking cut where a share of MACs, parameters or milliseconds is left, against every cut really made."""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nets
import pytest
import reference
import torch
import torch.nn.functional as F
from facts import refused, warned
from jobs import configure
from torch import Tensor, nn

from gsprune import Pruner, latency
from gsprune.app import configuration, job
from gsprune.app.configuration import run_name
from gsprune.cost import budgets, costs, latency_tables
from gsprune.cost.budgets import Budget, read_budget
from gsprune.cost.counting import count_macs, count_parameters
from gsprune.criteria import Abs, Elementwise, Fisher, Magnitude, Weighted
from gsprune.discovery.branches import find_branches, with_branches
from gsprune.discovery.find import find_structures
from gsprune.export.runtimes import Call, Measure
from gsprune.forecast import predict
from gsprune.pruner.pruner import no_pruning
from gsprune.schedules import Cubic, OneShot
from gsprune.structures.structure import Structure
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.cut_plan import plan_cut

TOKENS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """Two residual blocks behind a stem, wide enough for multiples of 8."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, inner, 3, padding=1, bias=False),
                nn.BatchNorm2d(inner),
                nn.ReLU(),
                nn.Conv2d(inner, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
            )
            for inner in (width, width // 2)
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.mean((2, 3)))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 12, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def bert(name: str = "BertForSequenceClassification", **sizes: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers", minversion="5")
        config = getattr(transformers, name.partition("For")[0] + "Config")
        return getattr(transformers, name)(
            config(
                vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=12, **sizes
            )
        )

    return build


IDS = {"input_ids": torch.tensor([[3, 4, 5, 6, 7]])}
MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "mlp": (nets.mlp, torch.ones(3, 6)),
    "residual": (nets.ResNet, nets.images(2)),
    "depthwise": (nets.Mobile, nets.images(2)),
    "concatenation": (nets.Dense, nets.images(2)),
    "two structures in one tensor": (nets.CatAdd, nets.images(2)),
    "flatten": (nets.flat, nets.images(2)),
    "heads": (nets.ViT, nets.images(2)),
    "nn.MultiheadAttention": (encoder, TOKENS),
    "BERT": (bert(max_position_embeddings=8), IDS),
    "grouped heads": (bert("LlamaForCausalLM", num_key_value_heads=2), IDS),
}


def made(name: str) -> tuple[nn.Module, Any, tuple[Structure, ...]]:
    build, example = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    return model, example, find_structures(model, example).structures


def counted(kind: str, example: Any) -> Callable[[nn.Module], int]:
    return count_parameters if kind == "params" else lambda model: count_macs(model, example)


def cut_copy(model: nn.Module, structures: tuple[Structure, ...], keeps: list[Tensor]) -> nn.Module:
    twin = copy.deepcopy(model)
    apply_cut(twin, plan_cut(structures, keeps))
    return twin


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_counted_is_what_a_smaller_copy_has(name: str, kind: str) -> None:
    model, example, structures = made(name)
    cost, count = costs.make_cost(kind, model, structures, example), counted(kind, example)
    generator = torch.Generator().manual_seed(4)
    for _ in range(6):
        keeps = [torch.rand(s.units, generator=generator) < 0.6 for s in structures]
        for keep in keeps:
            keep[torch.randint(len(keep), (), generator=generator)] = True
        assert cost(keeps) == pytest.approx(count(cut_copy(model, structures, keeps)) / count(model), abs=1e-12)
        assert cost.truth(keeps) == pytest.approx(cost(keeps), abs=1e-12)


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("name", ["mlp", "residual", "two structures in one tensor", "nn.MultiheadAttention", "BERT"])
def test_the_cut_is_the_nearest_of_all_cuts_really_made(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, example, structures = made(name)
    generator = torch.Generator().manual_seed(5)
    scores = [torch.rand(s.units, generator=generator) for s in structures]
    for wanted in (0.93, 0.81):
        budget = Budget(kind, wanted, model, structures, example)
        refined = budget.cut(scores, wanted)
        monkeypatch.setattr(budgets, "CLEAR", 1.0)  # near enough, whatever it is
        slow = reference.budget_cut(model, structures, [s.tolist() for s in scores], wanted, counted(kind, example))
        assert [keep.tolist() for keep in budget.cut(scores, wanted)] == slow
        monkeypatch.undo()
        cost = costs.make_cost(kind, model, structures, example)
        distance = [abs(cost(keeps) - wanted) for keeps in (refined, list(map(torch.tensor, slow)))]
        assert distance[0] <= distance[1] + 1e-12
        for score, keep in zip(scores, refined, strict=True):  # the best of each structure, all the same
            assert keep.all() or score[keep].min() > score[~keep].max()


def test_of_equally_near_cuts_the_larger_network_is_taken_and_what_is_gone_stays_gone() -> None:
    net, x = nn.Sequential(nn.Linear(1, 4, bias=False), nn.ReLU(), nn.Linear(4, 1, bias=False)), torch.ones(1, 1)
    structures = find_structures(net, x).structures
    scores, pruned = torch.tensor([4.0, 1.0, 2.0, 3.0]), torch.tensor([-torch.inf, -torch.inf, 2.0, 3.0])

    def cut(share: float, scores: Tensor, wanted: float | None = None) -> list[bool]:
        (keep,) = Budget("params", share, net, structures, x).cut([scores], wanted or share)
        return keep.tolist()

    assert cut(0.625, scores) == [True, False, True, True]
    assert cut(0.6, scores) == [True, False, False, True]
    assert cut(0.5, scores, wanted=0.6) == [True, False, True, True]  # on the way, never ahead of the schedule
    assert cut(0.9, pruned) == [False, False, True, True]
    assert cut(0.25, pruned) == [False, False, False, True]


def test_a_unit_too_large_for_the_rest_gives_way_to_smaller_ones() -> None:
    """The next unit of the ranking is 13 of 73 parameters; one of the other structure has 6."""
    net = nn.Sequential(
        nn.Linear(5, 5, bias=False), nn.ReLU(), nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 1, bias=False)
    )
    x = torch.ones(1, 5)
    structures = find_structures(net, x).structures  # a unit of the first is 5 + 8, of the second 5 + 1
    assert [s.units for s in structures] == [5, 8]
    scores = [torch.tensor([9.0, 9.0, 1.0, 9.0, 9.0]), torch.arange(2.0, 10.0)]

    def cut(left: int) -> list[list[bool]]:
        return [keep.tolist() for keep in Budget("params", left / 73, net, structures, x).cut(scores, left / 73)]

    assert cut(73 - 13) == [[True, True, False, True, True], [True] * 8]
    assert cut(73 - 6) == [[True] * 5, [False] + [True] * 7]


def pyramid(*widths: int) -> tuple[nn.Module, Tensor, tuple[Structure, ...]]:
    layers = [nn.Linear(i, o, bias=False) for i, o in itertools.pairwise(widths)]
    net = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])
    x = torch.ones(1, widths[0])
    return net, x, find_structures(net, x).structures


def test_a_share_of_every_structure_stays_under_a_budget() -> None:
    net, x, structures = pyramid(10, 20, 20, 4)
    scores = [torch.linspace(1, 2, 20), torch.linspace(10, 20, 20)]

    def kept(**floor: Any) -> list[int]:
        return [int(keep.sum()) for keep in Budget("params", 0.2, net, structures, x, **floor).cut(scores, 0.2)]

    assert [kept(), kept(min_share=0.2), kept(min_share=0.3)] == [[2, 19], [4, 12], [6, 8]]
    assert Budget("params", 0.2, net, structures, x, min_share=0.2).bounds()[0][0] == 4


def test_a_unit_is_ranked_by_its_score_for_its_price() -> None:
    """A unit of the first structure costs 30 + 8, of the second 8 + 2: at the same score the first go first."""
    net, x, structures = pyramid(30, 8, 8, 2)
    scores = [torch.linspace(1, 2, 8), torch.linspace(1, 2, 8)]
    parameters = 30 * 8 + 8 * 8 + 8 * 2
    share = (30 * 4 + 4 * 8 + 8 * 2) / parameters
    budget = Budget("params", share, net, structures, x)
    assert budget.prices() == pytest.approx([(30 + 8) / parameters, (8 + 2) / parameters])
    by_score, by_cost = (budget.cut(scores, share, by_cost=by_cost) for by_cost in (False, True))
    assert [int(keep.sum()) for keep in by_score] == [5, 3]
    assert [int(keep.sum()) for keep in by_cost] == [4, 8]
    ratio = 38 / 10  # a score so much higher outweighs the price
    assert [int(k.sum()) for k in budget.cut([ratio * scores[0], scores[1]], share, by_cost=True)] == [5, 3]


@pytest.mark.parametrize(("score", "stays"), [(5.0, 0), (20.0, 1)])
def test_a_branch_is_priced_by_what_it_costs_once_its_own_units_have_gone(score: float, stays: int) -> None:
    """7 of 8 neurons of the first block are worth nothing: without it an eighth of its MACs is saved, not all.

    20 for the whole branch are 41 by its full price, less than any neuron of the second block (132 and more).
    """
    net, x = (
        nn.Sequential(nn.Linear(4, 16), nets.Feedforward(16, 64), nets.Feedforward(16, 64), nn.Linear(16, 4)),
        torch.randn(2, 4),
    )
    neurons = [s for s in find_structures(net, x).structures if s.kind == "neurons"]
    budget = Budget("macs", 0.3, net, [*neurons, *find_branches(net, x).structures], x)
    first, second = torch.cat([torch.zeros(56), torch.full((8,), 10.0)]), torch.arange(64) / 64 + 1
    keeps = budget.cut([first, second, torch.tensor([score]), torch.tensor([1e9])], 0.3, by_cost=True)
    assert [int(keep.sum()) for keep in keeps[2:]] == [stays, 1]


@pytest.mark.parametrize(("score", "stay"), [(30.0, 1), (200.0, 3)])
def test_branches_go_instead_of_nearly_all_of_the_units_where_that_loses_less(score: float, stay: int) -> None:
    """Once most of its neurons have gone a branch saves little; with them it saves a third, for 30 of scores of 68."""
    net, x = (
        nn.Sequential(
            nn.Linear(4, 16),
            nets.Feedforward(16, 64),
            nets.Feedforward(16, 64),
            nets.Feedforward(16, 64),
            nn.Linear(16, 4),
        ),
        torch.randn(2, 4),
    )
    neurons = [s for s in find_structures(net, x).structures if s.kind == "neurons"]
    budget = Budget("macs", 0.15, net, [*neurons, *find_branches(net, x).structures], x)
    scores = [torch.arange(64) / 1e3 + 1, torch.arange(64) / 1e3 + 1.1, torch.arange(64) / 1e3 + 1.2]
    keeps = budget.cut([*scores, *torch.full((3, 1), score)], 0.15, by_cost=True)
    assert sum(int(keep.sum()) for keep in keeps[3:]) == stay
    assert budget.missed(keeps) is None


def test_what_saves_nothing_goes_last() -> None:
    net, x, structures = pyramid(30, 8, 8, 2)

    class Free(costs.Cost):
        def _parts(self, keeps: Any) -> float:
            return 0.2 + 0.8 * int(keeps[0].sum()) / 8

    budget = Budget("params", 0.5, net, structures, x)
    budget._cost = Free(structures)
    assert budget.prices()[0] == pytest.approx(0.1)
    assert budget.prices()[1] == pytest.approx(0.1 / 2000)


@pytest.mark.parametrize("scope", ["local", "isomorphic"])
def test_a_budget_is_met_under_every_scope(scope: Any) -> None:
    """Under local scope all lose the same share, whatever the scores."""
    torch.manual_seed(0)
    model, x = Net(32), nets.images(1)
    dense = copy.deepcopy(model)
    pruner = Pruner(
        model, Weighted(), budget={"macs": 0.5}, scope=scope, schedule=Cubic(end_epoch=2), steps_per_epoch=4,
        example_input=x,
    )  # fmt: skip
    train(model, pruner)
    assert count_macs(model, x) / count_macs(dense, x) == pytest.approx(0.5, rel=0.02)
    shares = [float(mask.float().mean()) for mask in pruner.masks().values()]
    if scope == "local":
        assert max(shares) - min(shares) < 0.1
    else:
        assert [len(ranking) for ranking in pruner.parts[0].together] == [1, 2]  # the stream, the two blocks' insides


def test_fishers_scores_are_divided_by_the_price_and_others_are_not() -> None:
    kept = {}
    for criterion in (Abs(), Fisher(), Fisher(normalize=True)):
        net, x, _ = pyramid(30, 8, 8, 2)
        pruner = Pruner(net, criterion, budget={"params": 168 / 320}, schedule=OneShot(), example_input=x)
        pruner.load_scores({name: torch.linspace(1, 2, 8) for name in pruner.masks()})
        pruner.on_step_begin(0)
        kept[str(criterion)] = [int(mask.sum()) for mask in pruner.masks().values()]
    assert [*kept.values()] == [[5, 3], [4, 8], [5, 3]]


def test_a_count_that_is_off_is_corrected_with_a_smaller_copy() -> None:
    """A matrix product outside any layer: nothing in the dense network says that it shrinks."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv1d(3, 40, 1), nn.Conv1d(40, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.first(x))
            return self.last(y @ y.new_ones(16, 16))

    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(2, 3, 16)
    structures = find_structures(model, x).structures
    uncorrected = costs.make_cost("macs", model, structures, x)
    assert uncorrected([torch.arange(40) < 20]) > 0.8
    budget = Budget("macs", 0.5, model, structures, x)
    keeps = budget.cut([torch.rand(40)], 0.5)
    true = count_macs(cut_copy(model, structures, keeps), x) / count_macs(model, x)
    assert true == pytest.approx(0.5, rel=0.02)
    assert budget.missed(keeps) is None  # as counted with the correction


def train(model: nn.Module, pruner: Pruner, *, epochs: int = 3, steps: int = 4) -> None:
    optimizer, data = torch.optim.SGD(model.parameters(), lr=0.01), torch.Generator().manual_seed(7)
    pruner.optimizer = optimizer
    pruner.on_train_begin()
    for epoch in range(epochs):
        pruner.on_epoch_begin(epoch)
        for step in range(steps):
            pruner.on_step_begin(step)
            model(torch.randn(4, 3, 8, 8, generator=data)).square().mean().backward()
            pruner.on_before_optimizer_step()
            optimizer.step()
            pruner.on_step_end()
            optimizer.zero_grad()
        pruner.on_epoch_end()
    pruner.on_train_end()


@pytest.mark.parametrize("shrink", ["at_end", "each_update"])
@pytest.mark.parametrize(("kind", "share"), [("macs", 0.5), ("params", 0.3)])
def test_a_run_ends_within_two_per_cent_of_its_budget(kind: str, share: float, shrink: Any) -> None:
    torch.manual_seed(0)
    model = Net(32)
    dense, count = copy.deepcopy(model), counted(kind, nets.images(1))
    settings: dict[str, Any] = {"schedule": Cubic(end_epoch=2), "steps_per_epoch": 4, "example_input": nets.images(1)}
    pruner = Pruner(model, Weighted(), budget={kind: share}, shrink=shrink, **settings)
    assert (pruner.parts[0].rule.ranking, pruner.target_sparsity) == ("global", None)
    train(model, pruner)
    assert pruner.updates > 3
    assert count(model) / count(dense) == pytest.approx(share, rel=0.02)


def test_each_update_removes_the_schedules_share_of_the_cost() -> None:
    torch.manual_seed(0)
    model, x = Net(32), nets.images(1)
    dense = copy.deepcopy(model)
    schedule = Cubic(end_epoch=2, update_frequency=0.5)
    pruner = Pruner(
        model, Magnitude(), structured=True, budget={"macs": 0.4}, schedule=schedule, steps_per_epoch=2, example_input=x
    )
    reached = []
    for epoch, step in itertools.product(range(3), range(2)):
        pruner.on_epoch_begin(epoch)
        pruner.on_step_begin(step)
        structures = tuple(target.structure for target in pruner.unit_targets)
        smaller = cut_copy(dense, structures, list(pruner.masks().values()))
        reached.append(count_macs(smaller, x) / count_macs(dense, x))
    wanted = [1 - 0.6 * (1 - (1 - min(t, 4) / 4) ** 3) for t in range(6)]
    assert all(now >= least for now, least in zip(reached[:4], wanted, strict=False))  # never ahead of the schedule
    assert reached == pytest.approx(wanted, rel=0.05)
    assert reached[4:] == pytest.approx(wanted[4:], rel=0.02)


def test_units_too_coarse_for_the_budget_are_warned_about() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 8)), torch.ones(1, 8)
    pruner = Pruner(model, Magnitude(), structured=True, budget={"macs": 0.5}, schedule=OneShot(), example_input=x)
    pruner.on_step_begin(0)
    with warned("66.7 %", "MACs", "50 %", "min_kept=1"):
        pruner.on_train_end()
    assert model[0].out_features == 2


@pytest.mark.parametrize("kind", ["macs", "params", "latency"])
def test_model_mode_gradients_and_random_numbers_are_left_as_they_were(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Net(16), nets.images(1)
    model(x).sum().backward()
    before, grads = (
        copy.deepcopy(model.state_dict()),
        [p.grad.clone() for p in model.parameters() if p.grad is not None],
    )
    structures = find_structures(model, x).structures
    state = torch.get_rng_state()
    Budget(kind, 0.97, model, structures, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters(), strict=True) if p.grad is not None)


# ---- latency, with a clock that tells what the test wants


@pytest.fixture(autouse=True)
def _own_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another test's clock has said of the runtime's blocks is not known."""
    monkeypatch.setattr(latency_tables, "_BLOCKS", {})


def clock(
    noise: Callable[[], float] = lambda: 1.0, *, between: int = 0, always: int = 1000
) -> Callable[..., dict[str, float]]:
    """A `latency_ms` where MACs take time, and every channel of a norm, which no layer's table knows of."""

    def latency_ms(models: Mapping[str, nn.Module], example: Any, **_: Any) -> dict[str, float]:
        def ms(model: nn.Module) -> float:
            norms = [m.weight.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)]
            return (always + count_macs(model, example) + between * sum(norms)) * noise()

        return {name: ms(model) for name, model in models.items()}

    return latency_ms


def exact_ms(model: nn.Module, x: Any, between: int) -> float:
    return clock(between=between)({"": model}, x)[""]


@pytest.mark.parametrize("between", [0, 3000])
@pytest.mark.parametrize("share", [0.75, 0.5])
def test_a_latency_budget_is_met_in_multiples_of_eight(
    share: float, between: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "latency_ms", clock(between=between))
    torch.manual_seed(0)
    model, x = Net(128), nets.images(1)
    dense = copy.deepcopy(model)
    pruner = Pruner(
        model, Weighted(), budget={"latency": share}, schedule=Cubic(end_epoch=2), steps_per_epoch=2, example_input=x
    )
    train(model, pruner, steps=2)
    kept = [int(mask.sum()) for mask in pruner.masks().values()]
    assert [count % 8 for count in kept] == [0, 0, 0]
    assert exact_ms(model, x, between) / exact_ms(dense, x, between) == pytest.approx(share, rel=0.02)


@pytest.mark.parametrize(("ms", "block"), [((4.0, 3.0, 2.2), 8), ((4.0, 4.1, 2.5), 16), ((4.0, 4.0, 4.0), 8)])
def test_the_blocks_of_a_runtime_are_measured_there(
    ms: tuple[float, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = dict(zip((64, 56, 48), ms, strict=True))
    seen: list[str] = []

    def latency_ms(models: Mapping[str, nn.Module], *_: Any, **__: Any) -> dict[str, float]:
        seen.extend(models)
        return {name: times[int(name.rpartition(" ")[2])] for name in models}

    monkeypatch.setattr(latency, "latency_ms", latency_ms)
    assert [latency_tables.block_of(Measure(threads=1)) for _ in range(2)] == [block, block]
    assert len(seen) == 3  # once
    assert latency_tables.block_of(Measure("compile")) == 8
    monkeypatch.setattr(latency_tables, "world_size", lambda: 2)  # another process may not know it yet
    assert latency_tables.block_of(Measure(threads=1)) == block
    assert len(seen) == 6


def test_wide_structures_keep_multiples_of_the_runtimes_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "latency_ms", clock())
    monkeypatch.setattr(costs, "block_of", lambda measure: 16)
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 56, 3), nn.ReLU(), nn.Conv2d(56, 4, 3))
    x = nets.images(1)
    structures = find_structures(net, x).structures
    scores = [torch.arange(float(s.units)) for s in structures]
    budget = Budget("latency", 0.5, net, structures, x)
    wide, narrow = (int(keep.sum()) for keep in budget.cut(scores, 0.5))
    assert (wide % 16, narrow % 8) == (0, 0)
    assert 0 < wide < 64
    monkeypatch.setattr(costs, "block_of", lambda measure: 8)
    other = Budget("latency", 0.5, net, structures, x)
    other.load_state_dict(budget.state_dict())
    assert [int(keep.sum()) for keep in other.cut(scores, 0.5)] == [wide, narrow]
    state = budget.state_dict()
    with refused("multiple", "3"):
        other.load_state_dict({**state, "cost": {**state["cost"], "multiple": 3}})


def test_heads_are_not_rounded_but_counted_with_their_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "latency_ms", clock(always=0))
    model, example, structures = made("BERT")
    cost = costs.make_cost("latency", model, structures, example)
    whole = [torch.ones(s.units, dtype=torch.bool) for s in structures]
    assert cost(whole) == 1
    heads = [torch.arange(s.units) < (1 if s.kind == "heads" else s.units) for s in structures]
    exact = count_macs(cut_copy(model, structures, heads), example) / count_macs(model, example)
    assert cost(heads) == pytest.approx(exact, abs=1e-9)
    budget = Budget("latency", 0.85, model, structures, example)
    keeps = budget.cut(
        [torch.rand(s.units, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(structures)], 0.85
    )
    counts = {s.kind: int(keep.sum()) for s, keep in zip(structures, keeps, strict=True)}
    assert counts["neurons"] in (8, 12, 16)


def test_a_branch_saves_what_lies_between_its_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ms = clock(always=0, between=300)
    monkeypatch.setattr(latency, "latency_ms", ms)
    model, x = nets.ViT(), nets.images(1)
    structures = with_branches(find_structures(model, x), model, x).structures
    cost = costs.make_cost("latency", model, structures, x)
    whole = [torch.ones(s.units, dtype=torch.bool) for s in structures]
    branches = [i for i, s in enumerate(structures) if s.kind == "branches"]
    assert len(branches) >= 2
    for gone in (branches[:1], branches[1:2], branches[:2], branches):
        keeps = [keep & (i not in gone) for i, keep in enumerate(whole)]
        exact = ms({"dense": model, "cut": cut_copy(model, structures, keeps)}, x)
        assert cost(keeps) == pytest.approx(exact["cut"] / exact["dense"], abs=1e-9)


def test_an_attention_is_timed_without_a_cache_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: dict[str, list[int]] = {}  # tokens in the caches of a stage, after each of its calls

    def latency_ms(stages: Mapping[str, nn.Module], example: Any, **_: Any) -> dict[str, float]:
        for (name, stage), _ in itertools.product(stages.items(), range(3)):
            with torch.inference_mode():
                stage()
            caches = [value for value in stage.kwargs.values() if hasattr(value, "get_seq_length")]
            lengths.setdefault(name, []).append(sum(cache.get_seq_length() for cache in caches))
        return dict.fromkeys(stages, 1.0)

    monkeypatch.setattr(latency, "latency_ms", latency_ms)
    model = bert("LlamaForCausalLM", num_key_value_heads=2)().eval()
    assert model.config.use_cache
    costs.make_cost("latency", model, find_structures(model, IDS).structures, IDS)
    assert any(name.startswith("call") for name in lengths)
    assert all(len({*found}) == 1 for found in lengths.values())


def test_widths_are_rounded_to_what_is_left_and_to_min_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "latency_ms", clock())
    net = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 30))
    x = torch.ones(8, 30)
    (structure,) = find_structures(net, x).structures
    budget = Budget("latency", 0.9, net, [structure], x, min_kept=9)
    assert list(budget._widths(0, 20)) == [16, 20]
    assert list(Budget("latency", 0.9, net, [structure], x)._widths(0, 20)) == [8, 16, 20]
    assert list(Budget("latency", 0.9, net, [structure], x)._widths(0, 16)) == [8, 16]
    scores = torch.arange(20.0)
    (keep,) = budget.cut([scores], 0.9)
    assert keep.tolist() == (scores >= 4).tolist()


def test_a_network_is_measured_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counting(models: Mapping[str, nn.Module], example: Any, **_: Any) -> dict[str, float]:
        asked.extend(len(models) for name in models if not name)
        return clock()(models, example)

    monkeypatch.setattr(latency, "latency_ms", counting)
    model, x = Net(32), nets.images(1)
    structures = find_structures(model, x).structures
    costs.make_cost("latency", model, structures, x)
    costs.make_cost("latency", copy.deepcopy(model), structures, x)
    assert len(asked) == 1
    costs.make_cost("latency", model, structures, nets.images(2))
    costs.make_cost("latency", model, structures, x, Measure(threads=1))
    assert len(asked) == 3


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_counted_budgets_are_rounded_on_request(kind: str) -> None:
    model, x = Net(64), nets.images(1)
    structures = find_structures(model, x).structures
    scores = [torch.rand(s.units, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(structures)]
    budget = Budget(kind, 0.5, model, structures, x, round_to=16)
    counts = [int(keep.sum()) for keep in budget.cut(scores, 0.5)]
    assert all(count % 16 == 0 for count in counts), counts
    how: dict[str, Any] = {"structured": True, "schedule": OneShot(), "example_input": x}
    pruner = Pruner(model, Magnitude(), budget={kind: 0.5, "round_to": 16}, **how)
    pruner.on_epoch_begin(0)
    pruner.on_step_begin(0)
    assert {int(mask.sum()) % 16 for mask in pruner.masks().values()} == {0}


def test_structures_that_are_alike_keep_the_same_count_on_request() -> None:
    """The n-th lowest scores of two layers are summed: 1 + 8, 2 + 9, ...; the third layer is of another size."""
    sizes = [(4, 6), (6, 4), (4, 6), (6, 4), (4, 2), (2, 3)]
    layers = [nn.Linear(*size, bias=False) for size in sizes]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
    x = torch.ones(1, 4)
    structures = [s for s in find_structures(model, x).structures if s.units in (6, 2)]
    assert [s.units for s in structures] == [6, 6, 2]
    scores = [torch.tensor(row) for row in ([1.0, 2, 3, 9, 9, 9], [9.0, 9, 9, 9, 8, 8], [50.0, 99])]
    share = 94 / 110  # MACs: two units of 8 are gone, of 110
    free = Budget("macs", share, model, structures, x).cut(scores, share)
    assert [keep.int().tolist() for keep in free] == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1]]
    alike = Budget("macs", share, model, structures, x, uniform=True).cut(scores, share)
    assert [keep.int().tolist() for keep in alike] == [[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1, 1]]
    for share in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        budget = Budget("macs", share, model, structures, x, uniform=True)
        first, second, _ = (int(keep.sum()) for keep in budget.cut(scores, share))
        assert first == second


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_milliseconds_are_those_of_the_runtime(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a clock that shows a hundredth of each network's outputs, and of the layers' inputs and outputs."""
    seen: list[str] = []

    def latency_ms(models: Mapping[str, nn.Module], example: Any, **_: Any) -> dict[str, float]:
        seen.extend(type(model).__name__ for model in models.values())
        assert example == ()
        found = {}
        for name, model in models.items():
            model()  # runs without arguments
            found[name] = float(name.rsplit(" ", 1)[1]) if " " in name else {"": 40.0, "dense": 40.0, "cut": 20.0}[name]
        return found

    monkeypatch.setattr(latency, "latency_ms", latency_ms)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    x, measure = torch.ones(2, 8), Measure(runtime, batch=5)
    budget = Budget("latency", 0.5, net, find_structures(net, x).structures, x, measure=measure)
    assert set(seen) == {"_OnnxRuntime" if runtime == "onnxruntime" else "_OpenVino"}
    assert str(budget).startswith("50 % of the milliseconds in ")
    assert budget._cost._inputs.shape == (5, 8)  # type: ignore[attr-defined]
    assert budget.cut([torch.arange(32.0)], 0.5)[0].sum() % 8 == 0


def test_a_clock_that_contradicts_the_table_is_believed_by_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine on which the smaller network seems to save nothing: no budget is refused for that."""
    calm = clock(always=0)

    def latency_ms(models: Mapping[str, nn.Module], example: Any, **settings: Any) -> dict[str, float]:
        if set(models) == {"dense", "cut"} and count_macs(models["cut"], example) > 300_000:
            return {"dense": 1.0, "cut": 0.99}
        return calm(models, example, **settings)

    monkeypatch.setattr(latency, "latency_ms", latency_ms)
    model, x = Net(32), nets.images(1)
    structures = find_structures(model, x).structures
    cost = costs.make_cost("latency", model, structures, x)
    half = [torch.arange(s.units) < s.units // 2 for s in structures]
    saved = 1 - cost(half)
    assert cost.correct(half, 0.99)
    assert 1 - cost(half) == pytest.approx(saved / 2)
    assert Budget("latency", 0.3, model, structures, x).share == 0.3


def noisy() -> Callable[..., dict[str, float]]:
    generator = torch.Generator().manual_seed(11)
    return clock(lambda: 1 + 0.05 * float(torch.rand((), generator=generator)))


def test_a_resumed_run_goes_on_with_the_first_ones_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "latency_ms", noisy())
    x = nets.images(1)

    def pruner() -> Pruner:
        torch.manual_seed(0)
        settings: dict[str, Any] = {"schedule": Cubic(end_epoch=4, update_frequency=1), "example_input": x}
        return Pruner(Net(64), Magnitude(), structured=True, budget={"latency": 0.8}, **settings)

    def step(pruner: Pruner, epoch: int) -> dict[str, Tensor]:
        pruner.on_epoch_begin(epoch)
        pruner.on_step_begin(0)
        return pruner.masks()

    first = pruner()
    step(first, 1)
    state = copy.deepcopy(first.state_dict())
    latency_tables._KNOWN.clear()  # as in another process
    second = pruner()
    assert second.state_dict()["rules"][0]["budget"] != state["rules"][0]["budget"]
    second.load_state_dict(state)
    assert second.state_dict()["rules"][0]["budget"] == state["rules"][0]["budget"]
    monkeypatch.setattr(latency, "latency_ms", clock())  # both look at the same clock from here on
    for epoch in (2, 3, 4):
        ours, theirs = step(first, epoch), step(second, epoch)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert first.state_dict()["rules"][0]["budget"] == second.state_dict()["rules"][0]["budget"]
    rule = {key: value for key, value in state["rules"][0].items() if key != "budget"}
    with refused("state", "'budget'"):
        pruner().load_state_dict({**state, "rules": [rule]})


def test_a_counted_budget_adds_nothing_to_the_state() -> None:
    settings: dict[str, Any] = {"schedule": OneShot(), "example_input": nets.images(1)}
    pruner = Pruner(Net(16), Magnitude(), structured=True, budget={"macs": 0.5}, **settings)
    assert "budget" not in pruner.state_dict()["rules"][0]


def test_the_real_clock_cuts_in_multiples_of_eight() -> None:
    torch.manual_seed(0)
    model, x = Net(64), torch.randn(1, 3, 32, 32)
    structures = find_structures(model, x).structures
    budget = Budget("latency", 0.7, model, structures, x)
    generator = torch.Generator().manual_seed(5)
    keeps = budget.cut([torch.rand(s.units, generator=generator) for s in structures], 0.7)
    counts = [int(keep.sum()) for keep in keeps]
    assert all(count % 8 == 0 for count in counts)
    assert 24 <= sum(counts) < sum(s.units for s in structures)
    table = budget.state_dict()["cost"]["tables"]["blocks.0.0"]
    assert (table["rows"], table["columns"]) == ([8, 16, 32, 64], [8, 16, 32, 64])
    assert 0 < table["ms"][0][0] <= table["ms"][-1][-1]


# ---- the plan


def scored(structures: list[Structure], seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(s.units, generator=generator) ** (seed % 5) + seed % 3 * i for i, s in enumerate(structures))


def test_a_plan_says_the_budget_its_even_share_and_bounds_that_hold() -> None:
    torch.manual_seed(0)
    model, x = Net(32), nets.images(1)
    settings: dict[str, Any] = {"schedule": OneShot(), "example_input": x}
    pruner = Pruner(model, Magnitude(), structured=True, budget={"macs": 0.5}, **settings)
    [planned] = predict.plan(model, pruner, x).rules
    assert planned.budget == planned.to_json()["budget"] == {"macs": 0.5}
    assert (planned.pruned, planned.params_left, planned.macs_left) == (None, None, None)
    assert planned.even is not None
    assert planned.even.macs == pytest.approx(0.5 * count_macs(model, x), rel=0.02)
    assert planned.schedule == ((0.0, 0.5),)
    assert pruner.budget is not None
    structures = [target.structure for target in pruner.unit_targets]
    for seed in range(12):
        keeps = pruner.budget.cut(list(scored(structures, seed)), 0.5)
        for entry, keep in zip(planned.entries, keeps, strict=True):
            assert entry.least <= int(keep.sum()) <= entry.most
    assert any(entry.least > 1 for entry in planned.entries)
    assert planned.notes == (
        "The structures are ranked together, and the ranking is cut where 50 % of the MACs are left: the scores will "
        "say how many units of which structure that takes, so there are only bounds for each.",
    )


# ---- the reference application


def test_a_job_with_a_budget_says_it_and_meets_it(tmp_path: Path) -> None:
    cfg = configure("pruner=weighted", "pruner.budget.macs=0.5", "model.width=16", "trainer.latency_repeats=0")
    result = job.run(cfg, output_dir=tmp_path)
    assert (result["budget"], result["target_sparsity"], result["shrunk"]) == ({"macs": 0.5}, None, True)
    assert result["macs"] / result["macs_dense"] == pytest.approx(0.5, rel=0.02)


def test_a_jobs_name_says_the_budget_instead_of_the_sparsity(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = {"pruner": "weighted", "model": "convnet", "dataset": "digits"}
    hydra = SimpleNamespace(runtime=SimpleNamespace(choices=choices))
    monkeypatch.setattr(configuration, "HydraConfig", SimpleNamespace(initialized=lambda: True, get=lambda: hydra))
    named = [run_name(configure("pruner=weighted", *more)) for more in ((), ("pruner.budget.latency=0.6",))]
    assert named == ["weighted 0.5, seed 0, convnet, digits", "weighted latency 0.6, seed 0, convnet, digits"]


def test_the_control_has_no_sparsity_in_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    hydra = SimpleNamespace(
        runtime=SimpleNamespace(choices={"pruner": "none", "model": "convnet", "dataset": "digits"})
    )
    monkeypatch.setattr(configuration, "HydraConfig", SimpleNamespace(initialized=lambda: True, get=lambda: hydra))
    assert run_name(configure("pruner=none", "pruner.target_sparsity=0.5")) == "none, seed 0, convnet, digits"


def test_milliseconds_are_those_of_the_batch_that_the_result_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def latency_ms(models: Mapping[str, nn.Module], example: Any, **settings: Any) -> dict[str, float]:
        networks = [m for name, m in models.items() if not name.startswith("block ")]
        seen.extend(len(m.args[0]) for m in networks if isinstance(m, Call))
        return clock()(models, example, **settings)

    monkeypatch.setattr(latency, "latency_ms", latency_ms)
    overrides = ("pruner.budget.latency=0.8", "trainer.latency_batch=3", "model.width=16")
    job.show_plan(configure("pruner=weighted", *overrides), output_dir=tmp_path)
    assert set(seen) == {3}


# ---- mistakes

CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "two kinds": (
        {"budget": {"macs": 0.5, "params": 0.3}},
        "budget sets macs and params: one network is cut by one budget, so set only one of them",
    ),
    "no share": (
        {"budget": {"macs": 1.0}},
        "budget.macs is 1.0: it is the share of the dense network's MACs that may stay, above 0 and below 1",
    ),
    "below": (
        {"budget": {"latency": 0}},
        "budget.latency is 0: it is the share of the dense network's milliseconds that may stay, above 0 and below 1",
    ),
    "text": (
        {"budget": {"params": "half"}},
        "budget.params is 'half': it is the share of the dense network's parameters that may stay, above 0 and below 1",
    ),
    "unknown": (
        {"budget": {"mcas": 0.5}},
        "budget names 'mcas', which is no cost: did you mean macs? There are macs, params, latency, and the settings "
        "runtime, batch, threads, round_to, uniform",
    ),
    "a runtime of MACs": (
        {"budget": {"macs": 0.5, "runtime": "onnxruntime"}},
        "budget.runtime says how a latency is measured: budget.macs has none, leave it out",
    ),
    "an unknown runtime": (
        {"budget": {"latency": 0.5, "runtime": "onnx"}},
        "budget.runtime is 'onnx': there are eager, compile, onnxruntime, openvino",
    ),
    "half a sample": (
        {"budget": {"latency": 0.5, "batch": 0.5}},
        "budget.batch is 0.5: it must be a whole number, 1 or more",
    ),
    "no truth": ({"budget": {"macs": 0.5, "uniform": 1}}, "budget.uniform is 1: it must be true or false"),
    "only settings": (
        {"budget": {"macs": None, "round_to": 8}},
        "budget sets round_to, but no cost: set one of macs, params, latency, too",
    ),
    "a number": ({"budget": 0.5}, "budget is 0.5: it must map macs, params or latency to a share, as in {macs: 0.5}"),
    "single weights": (
        {"budget": {"macs": 0.5}, "criterion": Elementwise()},
        "budget={macs: 0.5} needs units, but Elementwise zeroes single weights here: set target_sparsity instead",
    ),
    "keep": (
        {"budget": {"macs": 0.5}, "keep": {"channels": 4, "heads": None}},
        "budget={macs: 0.5} and keep={'channels': 4} both say how much stays: set only one of them",
    ),
    "too little": (
        {"budget": {"params": 0.1}, "min_kept": 12},
        "budget asks for 10 % of the parameters, but 63.7 % stay with everything gone that can be removed "
        "(min_kept=12 in each of 3 structures): ask for a larger share",
    ),
    "too high a floor": (
        {"budget": {"params": 0.1}, "min_share": 0.75},
        "budget asks for 10 % of the parameters, but 57.9 % stay with everything gone that can be removed "
        "(min_kept=1 and min_share=0.75 in each of 3 structures): ask for a larger share or a smaller min_share",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_mistake_is_one_sentence(case: str) -> None:
    settings, sentence = CONTRADICTIONS[case]
    settings = {"criterion": Weighted(), "schedule": OneShot(), "example_input": nets.images(1), **settings}
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        Pruner(Net(16), **settings)


def test_no_budget_is_none_and_the_control_takes_any() -> None:
    assert read_budget(None) is None
    assert read_budget({"macs": None, "params": None, "latency": None}) is None
    settings: dict[str, Any] = {"target_sparsity": 0.5, "schedule": OneShot(), "example_input": nets.images(1)}
    pruner = Pruner(Net(16), Weighted(), budget={"macs": None}, **settings)
    assert (pruner.budget, pruner.parts[0].rule.ranking, pruner.target_sparsity) == (None, "local", 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert no_pruning(Net(16), budget={"macs": 0.5}).budget is None
