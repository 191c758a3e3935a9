"""Criteria: literals, the two identities that make gates cheap, and the running score."""

from __future__ import annotations

import math
from collections.abc import Callable

import nets
import pytest
import reference
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gsprune.criteria import Abs, Criterion, Elementwise, Magnitude, Random, Weighted
from gsprune.discovery.find import find_structures
from gsprune.pruner.targets import Verdict
from gsprune.pruner.weights import WeightTarget, WeightTargets
from gsprune.ranking.blocks import BLOCK, dot_along
from gsprune.ranking.patterns import Tile
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


def test_abs_is_the_gradient_of_a_gate_on_the_output() -> None:
    net = conv_net()
    first, second = with_gradients(net)
    loss = loss_on(images())
    for structure, reader, units in ((first, net[3], 6), (second, net[6], 5)):
        gate = reference.gate_gradient(net, reader, units, loss, before=True)
        torch.testing.assert_close(scored(net, Abs(), structure), gate, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.ReLU])
def test_weighted_is_the_gradient_of_a_gate_on_the_pre_activation(activation: type[nn.Module]) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 7), activation(), nn.Linear(7, 4)).double()
    (structure,) = with_gradients(net)
    loss = loss_on(images())
    before = reference.gate_gradient(net, net[1], 7, loss)
    behind = reference.gate_gradient(net, net[2], 7, loss)
    torch.testing.assert_close(scored(net, Weighted(), structure), before, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scored(net, Abs(), structure), behind, rtol=1e-9, atol=1e-12)


def test_abs_of_heads_is_the_gate_of_the_head_and_weighted_its_value_rows() -> None:
    """The rows of the value projection give the same number as the columns of the output projection."""
    torch.manual_seed(2)
    model = nets.ViT().double()
    heads = [s for s in with_gradients(model) if s.kind == "heads"]
    assert [s.units for s in heads] == [4, 4]
    for structure in heads:
        torch.testing.assert_close(
            scored(model, Weighted(), structure), scored(model, Abs(), structure), rtol=1e-9, atol=1e-14
        )
    head_gate = torch.ones(4, dtype=DOUBLE, requires_grad=True)
    attention = model.blocks[0].attn
    handle = attention.proj.register_forward_pre_hook(lambda _, args: (args[0] * head_gate.repeat_interleave(3),))
    (gate,) = torch.autograd.grad(loss_on(images())(model), head_gate)
    handle.remove()
    torch.testing.assert_close(scored(model, Abs(), heads[0]), gate, rtol=1e-9, atol=1e-14)


def one_target(layer: nn.Linear) -> WeightTargets:
    return WeightTargets([WeightTarget("w", layer.weight, Tile(1, 1))])


def test_elementwise_literal() -> None:
    w, g = torch.tensor([[1.0, -2.0], [0.5, 0.0]]), torch.tensor([[-3.0, 1.0], [4.0, 7.0]])
    assert Elementwise().weights(w, g).abs().tolist() == [[3.0, 2.0], [2.0, 0.0]]


@pytest.mark.parametrize("decay", [1.0, 0.9, 0.3])
def test_running_score_equals_the_slow_version(decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(30, 20, bias=False)
    targets, criterion, seen = one_target(layer), Elementwise(decay=decay), []
    for _ in range(5):
        layer.weight.grad = torch.randn(20, 30, generator=generator)
        seen.append((layer.weight * layer.weight.grad).detach())
        targets.accumulate_(criterion, Verdict(targets.probe(criterion), decay))
    torch.testing.assert_close(targets.score.reshape(20, 30), reference.accumulate(seen, decay).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scores_are_float32_whatever_the_weights(dtype: torch.dtype) -> None:
    """1 + 1e-3 steps below bfloat16's resolution must not be lost."""
    layer = nn.Linear(4, 2, bias=False).to(dtype)
    nn.init.ones_(layer.weight)
    targets, criterion = one_target(layer), Elementwise(decay=1.0)
    for size in [1.0, *[1e-3] * 10]:
        layer.weight.grad = torch.full_like(layer.weight, size)
        targets.accumulate_(criterion, Verdict(torch.tensor(True), 1.0))
    assert targets.score.dtype == torch.float32
    assert float(targets.score[0]) == pytest.approx(1 + 10 * float(torch.tensor(1e-3, dtype=dtype)), rel=1e-6)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_batch_that_does_not_count_changes_nothing(bad: float) -> None:
    score, change = torch.tensor([1.0, 2.0]), torch.tensor([bad, 5.0])
    Verdict(torch.tensor(False), 0.5).add_(score, change)
    assert score.tolist() == [1.0, 2.0]


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


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.1, math.nan])
def test_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole sentence is compared
        Elementwise(decay=decay)
    assert str(error.value) == f"decay is {decay}: it must be in (0, 1]"


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


def test_residual_stream_abs_is_the_gate_on_the_sum() -> None:
    """Two producers, one stream: the columns of every reader count, and only they."""
    torch.manual_seed(3)
    model = nets.settle(nets.ResNet()).double().train()
    structures = {s.name: s for s in with_gradients(model)}
    stream = structures["stem"]
    assert {member.tensor for member in stream.consumers} == {"conv1.weight", "head.weight"}
    columns = sum(
        dot_along(model.get_parameter(m.tensor).detach(), model.get_parameter(m.tensor).grad, 1)
        for m in stream.consumers
    )
    torch.testing.assert_close(scored(model, Abs(), stream), columns)
    assert not torch.allclose(F.normalize(scored(model, Weighted(), stream), dim=0), torch.zeros(8, dtype=DOUBLE))
