"""Criteria: each against its slow version, literals, and the two identities that make gates cheap."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import nets
import pytest
import reference
import torch
from conformance import CriterionTester
from torch import Tensor, nn

from gsprune.criteria import Abs, Criterion, Elementwise, Fisher, Magnitude, Random, Weighted
from gsprune.discovery.find import find_structures
from gsprune.ranking.blocks import BLOCK, dot_along
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


def movement() -> type[Criterion]:
    """The criterion of the README."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class Movement" in block]
    module = ModuleType("my_criteria")
    sys.modules["my_criteria"] = module  # pickle looks there
    exec(code, vars(module))
    return module.Movement


Movement = movement()


class TestElementwise(CriterionTester):
    make = Elementwise

    def weight(self, model: nn.Module, name: str, x: Tensor) -> Tensor:
        return reference.weight_gates(model, name, x).abs()


class TestMovement(CriterionTester):
    make = Movement

    def weight(self, model: nn.Module, name: str, x: Tensor) -> Tensor:
        return (-reference.weight_gates(model, name, x)).clamp(min=0)


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
