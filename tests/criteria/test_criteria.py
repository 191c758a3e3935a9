"""Criteria: each against its slow version, literals, and the two identities that make gates cheap."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import nets
import pytest
import reference
import torch
from conformance import CriterionTester
from facts import refused
from torch import Tensor, nn

from gsprune import Pruner
from gsprune.criteria import PLATON, Abs, Criterion, Elementwise, Fisher, Magnitude, Movement, Random, Weighted
from gsprune.discovery.find import find_structures
from gsprune.ranking.blocks import BLOCK, dot_along
from gsprune.schedules import OneShot
from gsprune.structures.structure import Structure

DOUBLE = torch.float64


def loss_on(images: Tensor) -> Callable[[nn.Module], Tensor]:
    weights = torch.linspace(-1, 1, 4, dtype=DOUBLE)

    def loss(model: nn.Module) -> Tensor:
        output = model(images)
        return (output * weights[: output.shape[1]]).sum() ** 2

    return loss


def conv_net(eps: float = 1e-5) -> nn.Sequential:
    """conv-BN-ReLU twice, in float64, with affine pairs that are not 1 and 0."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6, eps=eps), nn.ReLU(),
        nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5, eps=eps), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4),
    )  # fmt: skip
    return nets.settle(net).double().train()


def scored(model: nn.Module, criterion: Criterion, structure: Structure) -> Tensor:
    parameters = dict(model.named_parameters())
    return criterion.units(structure, lambda name: (parameters[name].detach(), parameters[name].grad))


def images(seed: int = 3) -> Tensor:
    return torch.randn(8, 3, 8, 8, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def with_gradients(model: nn.Module) -> tuple[Structure, ...]:
    found = find_structures(model, images()[:2].to(next(model.parameters()).dtype)).structures
    loss_on(images())(model).backward()
    return found


def damage() -> type[Criterion]:
    """The criterion of the docs."""
    text = (Path(__file__).parents[2] / "docs" / "train_and_prune.md").read_text(encoding="utf8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class Damage" in block]
    module = ModuleType("my_criteria")
    sys.modules["my_criteria"] = module  # pickle looks there
    exec(code, vars(module))
    return module.Damage


Damage = damage()


class TestElementwise(CriterionTester):
    make = Elementwise

    def weight(self, model: nn.Module, name: str, x: Tensor) -> Tensor:
        return reference.weight_gates(model, name, x).abs()


class TestDamage(CriterionTester):
    make = Damage

    def weight(self, model: nn.Module, name: str, x: Tensor) -> Tensor:
        return reference.weight_gates(model, name, x).square()


class TestMovement(CriterionTester):
    make = Movement

    def weight(self, model: nn.Module, name: str, x: Tensor) -> Tensor:
        return -reference.weight_gates(model, name, x)


class TestPLATON(CriterionTester):
    make = PLATON
    decays = (0.9, 0.3)

    def weight(self, model: nn.Module, name: str, x: Tensor) -> Tensor:
        return reference.weight_gates(model, name, x).abs()

    def unit(self, model: nn.Module, structure: Structure, x: Tensor) -> Tensor:
        return reference.unit_gates(model, structure.consumers, x).abs()


class TestAbs(CriterionTester):
    make = Abs

    def unit(self, model: nn.Module, structure: Structure, x: Tensor) -> Tensor:
        return reference.unit_gates(model, structure.consumers, x).abs()


class TestWeighted(CriterionTester):
    make = Weighted

    def unit(self, model: nn.Module, structure: Structure, x: Tensor) -> Tensor:
        return reference.unit_gates(model, structure.gates, x).abs()


class TestFisher(CriterionTester):
    make = Fisher

    def unit(self, model: nn.Module, structure: Structure, x: Tensor) -> Tensor:
        return reference.unit_gates(model, structure.consumers, x).square()


class TestMagnitude(CriterionTester):
    make = Magnitude

    def weight(self, model: nn.Module, name: str, x: Tensor) -> Tensor:
        return model.get_parameter(name).detach().abs()

    def unit(self, model: nn.Module, structure: Structure, x: Tensor) -> Tensor:
        return reference.row_norms(model, structure.producers)


class TestRandom(CriterionTester):
    make = Random
    by_rows = False

    def weight(self, model: nn.Module, name: str, x: Tensor) -> Tensor:
        return reference.drawn(f"0/{name}", model.get_parameter(name).shape)

    def unit(self, model: nn.Module, structure: Structure, x: Tensor) -> Tensor:
        return reference.drawn(f"0/{structure.name}", (structure.units,))


def test_weighted_equals_abs_under_batchnorm_and_relu() -> None:
    """ReLU passes a positive scale through, so the gate before it and the gate behind it are one."""
    net = conv_net()
    for structure in with_gradients(net):
        torch.testing.assert_close(
            scored(net, Weighted(), structure), scored(net, Abs(), structure), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("normed", ["0", "3"])
def test_naive_row_sums_vanish_with_eps(normed: str) -> None:
    """Rows before a BatchNorm do not matter to the loss: what their sum leaves shrinks in proportion to eps."""
    left = {}
    for eps in (1e-3, 1e-4, 1e-5):
        net = conv_net(eps)
        loss_on(images())(net).backward()
        weight = net.get_parameter(f"{normed}.weight")
        left[eps] = dot_along(weight.detach(), weight.grad, 0).abs().sum()  # type: ignore[operator]
    assert float(left[1e-4] / left[1e-3]) == pytest.approx(0.1, rel=0.05)
    assert float(left[1e-5] / left[1e-4]) == pytest.approx(0.1, rel=0.05)


def test_elementwise_literal() -> None:
    w, g = torch.tensor([[1.0, -2.0], [0.5, 0.0]]), torch.tensor([[-3.0, 1.0], [4.0, 7.0]])
    assert Elementwise().weights(w, g).abs().tolist() == [[3.0, 2.0], [2.0, 0.0]]


def test_movement_keeps_what_is_led_away_from_zero_and_not_what_is_large() -> None:
    net = nn.Linear(4, 1, bias=False)
    pruner = Pruner(net, Movement(decay=0.5), target_sparsity=0.5, schedule=OneShot())
    for weight, grad in (
        ([5.0, 1.0, -1.0, -9.0], [1.0, -4.0, 2.0, -1.0]),
        ([5.0, 1.0, -1.0, -9.0], [1.0, 1.0, 2.0, 0.0]),
    ):
        net.weight.data, net.weight.grad = torch.tensor([weight]), torch.tensor([grad])
        pruner.on_before_optimizer_step()
    assert pruner.scores()["weight"].tolist() == [[-7.5, 1.0, 3.0, -4.5]]
    pruner.on_step_begin(0)
    assert pruner.masks()["weight"].tolist() == [[False, True, True, False]]
    assert pruner.scores()["weight"].tolist() == [[0.0, 1.0, 3.0, 0.0]]


@pytest.mark.parametrize("units", [False, True])
def test_platon_ranks_by_sensitivity_times_uncertainty(units: bool) -> None:
    """Against averages with their factors 1 - d, of weights and of units; three are of equal sensitivity."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1, bias=False))
    options = {"example_input": torch.zeros(1, 3), "structured": units, "include": ["0" if units else "2.weight"]}
    criterion = PLATON(decay=0.7, spread_decay=0.8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # how little of the model is targeted
        pruner = Pruner(net, criterion, target_sparsity=0.5, schedule=OneShot(), **options)
    steps = torch.rand(6, 8)
    steps[:, 1:3] = torch.tensor([0.3, 0.6])
    net[2].weight.data.fill_(1.0)
    for step in steps:
        net[2].weight.grad = step[None].clone()
        pruner.on_before_optimizer_step()
    expected = reference.platon(steps.tolist(), 0.7, 0.8)
    best = sorted(range(8), key=lambda i: -expected[i])[:4]
    pruner.on_step_begin(0)
    (mask,) = pruner.masks().values()
    assert mask.flatten().nonzero().flatten().tolist() == sorted(best)


@pytest.mark.parametrize(("name", "value"), [("decay", 1.0), ("spread_decay", 1.0), ("spread_decay", 0.0)])
def test_an_average_needs_a_decay_below_1(name: str, value: float) -> None:
    with refused(f"{name} is {value}", "below 1"):
        PLATON(**{name: value})


def test_magnitude_of_units_is_the_norm_of_their_rows() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    net[0].weight.data = torch.tensor([[3.0, 0.0], [0.0, 0.0], [1.0, 2.0]])
    net[0].bias.data = torch.tensor([4.0, 1.0, 2.0])
    (structure,) = find_structures(net, torch.zeros(1, 2)).structures
    assert scored(net, Magnitude(), structure).tolist() == [5.0, 1.0, 3.0]


def test_random_is_the_same_again_and_differs_by_name_and_seed() -> None:
    weight = torch.zeros(3, 4)
    first = Random(seed=1).weights(weight, None, name="a")
    assert torch.equal(first, Random(seed=1).weights(weight, None, name="a"))
    assert not torch.equal(first, Random(seed=1).weights(weight, None, name="b"))
    assert not torch.equal(first, Random(seed=2).weights(weight, None, name="a"))
    assert 0 <= float(first.min()) <= float(first.max()) < 1


@pytest.mark.parametrize("decay", [0.1, 0.5, 0.9, 0.95, 0.999])
def test_the_horizon_is_the_fewest_steps_that_make_up_99_percent_of_a_score(decay: float) -> None:
    whole = 1 / (1 - decay)
    last = Elementwise(decay=decay).horizon
    assert last is not None
    share = [sum(decay**i for i in range(n)) / whole for n in (last - 1, last)]
    assert share[0] < 0.99 <= share[1] + 1e-12


def test_horizons_at_the_edges() -> None:
    assert (Abs(decay=1.0).horizon, Magnitude().horizon, Random().horizon) == (None, 0, 0)
    assert (Elementwise(decay=1e-9).horizon, Weighted().horizon) == (1, 90)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (4, 3, 2, 2), (5, BLOCK // 4), (3, 2, BLOCK // 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dot_along_equals_the_plain_sums(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    if len(shape) == 4:
        a = a.contiguous(memory_format=layout)
    for dim in range(min(2, len(shape))):
        others = [axis for axis in range(len(shape)) if axis != dim]
        plain = (a.double() * b.double()).sum(others) if others else a.double() * b.double()
        torch.testing.assert_close(dot_along(a, b, dim).double(), plain, rtol=1e-4, atol=1e-3)
