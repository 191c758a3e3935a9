"""Where affine pairs of norms give the gradient of a gate on a unit's output, so that consumers need not be read."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import loss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._python_dispatch import TorchDispatchMode

from gsprune import Pruner
from gsprune.criteria import PLATON, Abs, Criterion, Fisher, GateGradient, Weighted
from gsprune.criteria.base import Read, unit_sums
from gsprune.discovery.find import find_structures
from gsprune.structures.structure import Structure

Between = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Convolution, BatchNorm, whatever a test puts there, convolution."""

    def __init__(self, between: Between, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 6, 3), norm(6), nn.Conv2d(6, 4, 3)
        self.other, self.other_norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.plain = nn.BatchNorm2d(6, affine=False)
        self.again, self.depthwise = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.squeeze, self.excite = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)
        self.probe, self.shift = nn.Conv2d(6, 4, 3), nn.Parameter(torch.randn(6, 1, 1))
        self.slopes = nn.PReLU(6)
        self.between = between
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d) and m.affine:
                nn.init.normal_(m.weight, 1, 0.5)
                nn.init.normal_(m.bias, 0, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        return self.second(self.between(self, y if self.between not in WHOLE else x)).flatten(1)


def squeezed(net: Net, y: Tensor) -> Tensor:
    return y * net.excite(net.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()


def residual(net: Net, x: Tensor) -> Tensor:
    return (net.norm(net.first(x)).relu() + net.other_norm(net.other(x))).relu()


def half_bare(net: Net, x: Tensor) -> Tensor:
    return (net.norm(net.first(x)) + net.other(x)).relu()


def half_bare_normed(net: Net, x: Tensor) -> Tensor:
    return net.again(net.norm(net.first(x)) + net.other(x)).relu()


def shared(net: Net, x: Tensor) -> Tensor:
    return net.norm(net.first(x)).relu() + net.norm(net.first(x.flip(2))).relu()


def probed(net: Net, y: Tensor) -> Tensor:
    return y.relu() + F.pad(net.probe(y.detach()), (1, 1, 1, 1)).mean()


def in_place(net: Net, y: Tensor) -> Tensor:
    y = y.relu()
    y[:, :3] *= y[:, 3:]
    return y


def of_itself(net: Net, y: Tensor) -> Tensor:
    rows = y.mean(0).flatten(1)
    return y + F.linear(rows, rows).mean(1).reshape(1, -1, 1, 1)


def with_and_without(net: Net, x: Tensor) -> Tensor:
    y = net.first(x)
    return net.norm(y).relu() + net.plain(y).relu()


WHOLE = (residual, half_bare, half_bare_normed, shared, with_and_without)
SCALES: dict[str, Between] = {
    "nothing": lambda net, y: y,
    "relu": lambda net, y: y.relu_(),
    "leaky relu": lambda net, y: F.leaky_relu(y, 0.2),
    "poolings": lambda net, y: F.avg_pool2d(F.max_pool2d(y.relu(), 2, 1), 2, 1),
    "resized": lambda net, y: F.interpolate(y, scale_factor=2, mode="bilinear"),
    "dropout": lambda net, y: F.dropout(y, 0.5, training=False),
    "side by side": lambda net, y: torch.cat(y.relu().chunk(2, 1), 1),
    "two ways": lambda net, y: y.relu() + F.max_pool2d(y, 3, 1, 1),
    "residual": residual,
    "called twice": shared,
}
BENT: dict[str, Between] = {
    "relu6": lambda net, y: F.relu6(y),
    "clamp": lambda net, y: y.clamp(0, 100),
    "silu": lambda net, y: F.silu(y),
    "gelu": lambda net, y: F.gelu(y),
    "hardswish": lambda net, y: F.hardswish(y),
    "tanh": lambda net, y: y.tanh(),
    "square": lambda net, y: y * y,
    "softmax over places": lambda net, y: y.flatten(2).softmax(2).view_as(y),
    "one more": lambda net, y: y.relu() + 1,
    "a constant more": lambda net, y: y.relu() + torch.ones(()),
    "a shift": lambda net, y: (y + net.shift).relu(),
    "in place": in_place,
    "threshold": lambda net, y: torch.where(y > 0.1, y, 0.0),
    "attention": squeezed,
    "depthwise": lambda net, y: net.depthwise(y).relu(),
    "two norms": lambda net, y: net.again(y).relu(),
    "half bare": half_bare,
    "half bare, normed": half_bare_normed,
    "two norms side by side, one without a pair": with_and_without,
    "probed": probed,
    "slopes": lambda net, y: net.slopes(y) * 2.5,
    "instance norm": lambda net, y: F.instance_norm(y).relu(),
    "standardised": lambda net, y: (y - y.mean((2, 3), keepdim=True)) / (y.std((2, 3), keepdim=True) + 1),
    "an activation as weight": of_itself,
}
X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def of_first(net: Net) -> Structure | None:
    found = find_structures(net, X).structures
    return next((s for s in found if any(m.tensor == "first.weight" for m in s.producers)), None)


def sums(net: Net, structure: Structure) -> tuple[Tensor, Tensor]:
    """What the gates and what the consumers say, in float64."""
    net.double().zero_grad()
    loss(net(X.double())).backward()
    tensors = dict(net.named_parameters())

    def pair(name: str) -> tuple[Tensor, Tensor]:
        grad = tensors[name].grad
        assert grad is not None
        return tensors[name].detach(), grad

    return unit_sums(structure.gates, pair), unit_sums(structure.consumers, pair)


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("training", [True, False])
def test_affine_pairs_give_what_consumers_do(name: str, training: bool) -> None:
    net = Net(SCALES[name]).train(training)
    structure = of_first(net)
    assert structure is not None
    assert structure.scales
    assert structure.output_gates is structure.gates
    gates, consumers = sums(net, structure)
    torch.testing.assert_close(gates, consumers, rtol=1e-9, atol=1e-9 * float(consumers.abs().max()))
    assert float(consumers.abs().max()) > 0


@pytest.mark.parametrize("name", BENT)
def test_consumers_are_read_behind_anything_else(name: str) -> None:
    structure = of_first(Net(BENT[name]))
    assert structure is not None
    assert not structure.scales
    assert structure.output_gates is structure.consumers


@pytest.mark.parametrize("norm", [nn.Identity, lambda n: nn.GroupNorm(1, n), lambda n: nn.BatchNorm2d(n, affine=False)])
def test_without_an_affine_pair_of_a_batchnorm_consumers_are_read(norm: Callable[[int], nn.Module]) -> None:
    structure = of_first(Net(lambda net, y: y.relu(), norm))
    assert structure is not None
    assert not structure.scales


class Shifted(nn.BatchNorm2d):
    """Its weight is a distance from 1."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, 1 + self.weight, self.bias, self.training)


class Halved(nn.BatchNorm2d):
    """One of the pair is no parameter."""

    def __init__(self, channels: int, left: str) -> None:
        super().__init__(channels)
        value = torch.randn(channels)
        delattr(self, left)
        self.register_buffer(left, value)


class Foreign(nn.BatchNorm2d):
    """Its bias is another module's."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.other = nn.Module()
        self.other.bias, self.bias = nn.Parameter(torch.randn(channels)), None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.other.bias, self.training)


class Exp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


def parametrized(channels: int) -> nn.Module:
    return register_parametrization(nn.BatchNorm2d(channels), "weight", Exp())


PAIRS = {
    "shifted": Shifted,
    "bias is a buffer": lambda n: Halved(n, "bias"),
    "weight is a buffer": lambda n: Halved(n, "weight"),
    "bias of another": Foreign,
    "parametrised": parametrized,
}


@pytest.mark.parametrize("norm", PAIRS.values(), ids=[*PAIRS])
def test_pairs_that_do_not_say_all_are_not_read(norm: Callable[[int], nn.Module]) -> None:
    net = Net(lambda net, y: y.relu())
    net.norm = norm(6)
    structure = of_first(net)
    assert structure is not None
    assert not structure.scales
    assert structure.gates is structure.consumers


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


class Raised(nn.Conv2d):
    """Its weight is a distance from a number."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, 0.1 + self.weight, self.bias)


class Constant(nn.Conv2d):
    """Its bias is no parameter."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        value = torch.randn(len(self.weight))
        del self.bias
        self.register_buffer("bias", value)


def exponential(*sizes: int) -> nn.Module:
    return register_parametrization(nn.Conv2d(*sizes), "weight", Exp())


def normed(*sizes: int) -> nn.Module:
    return weight_norm(nn.Conv2d(*sizes))


@pytest.mark.parametrize("layer", [Standardised, Raised, Constant, exponential])
def test_rows_that_are_computed_from_others_say_nothing(layer: Callable[..., nn.Module]) -> None:
    net = Net(lambda net, y: y.relu(), lambda n: nn.Identity())
    net.first = layer(3, 6, 3)
    structure = next(s for s in find_structures(net, X).structures if s.name.startswith("first"))
    assert structure.gates is structure.consumers


@pytest.mark.parametrize("layer", [nn.Conv2d, normed])
def test_rows_of_layers_without_a_norm_say_what_consumers_do(layer: Callable[..., nn.Module]) -> None:
    net = Net(lambda net, y: y.relu(), lambda n: nn.Identity())
    net.first = layer(3, 6, 3)
    structure = next(s for s in find_structures(net, X).structures if s.name.startswith("first"))
    assert {m.tensor.partition(".")[0] for m in structure.gates} == {"first"}
    gates, consumers = sums(net, structure)
    torch.testing.assert_close(gates, consumers, rtol=1e-9, atol=1e-9 * float(consumers.abs().max()))


def test_a_norm_without_a_bias_is_read() -> None:
    net = Net(lambda net, y: y.relu())
    net.norm.bias = None
    structure = of_first(net)
    assert structure is not None
    assert [m.tensor for m in structure.output_gates] == ["norm.weight"]
    gates, consumers = sums(net, structure)
    torch.testing.assert_close(gates, consumers, rtol=1e-9, atol=1e-9 * float(consumers.abs().max()))


def test_some_networks_differ_where_consumers_are_read() -> None:
    """What the rule keeps apart is not the same number."""
    for name in ("silu", "one more", "depthwise", "attention"):
        net = Net(BENT[name])
        structure = of_first(net)
        assert structure is not None
        gates, consumers = sums(net, structure)
        assert float((gates - consumers).abs().max()) > 1e-3 * float(consumers.abs().max()), name


@pytest.mark.parametrize("criterion", [Abs(), Fisher(), PLATON()])
def test_scores_are_those_of_consumers(criterion: Abs | Fisher | PLATON) -> None:
    net = Net(SCALES["poolings"])
    frozen = Net(SCALES["poolings"])
    frozen.load_state_dict(net.state_dict())
    frozen.norm.requires_grad_(False)
    scores = []
    for model in (net, frozen):
        pruner = Pruner(model, criterion, structured=True, target_sparsity=0.5, example_input=X, include=["first"])
        loss(model(X)).backward()
        pruner.on_before_optimizer_step()
        scores.append(pruner.scores()["first"])
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-6 * float(scores[1].max()))
    assert float(scores[0].max()) > 0


def test_frozen_pairs_are_not_read() -> None:
    net = Net(SCALES["relu"])
    read = {}
    for name in ("trained", "frozen"):
        pruner = Pruner(net, Abs(), target_sparsity=0.5, example_input=X, include=["first"])
        [target] = pruner.targets
        read[name] = {*target.scored(Abs())}
        net.norm.requires_grad_(False)
    assert read == {"trained": {"norm.weight", "norm.bias"}, "frozen": {"second.weight"}}


# ---- all in a few operations


class Deep(nn.Sequential):
    """Blocks of convolution, BatchNorm and ReLU."""

    def __init__(self, depth: int) -> None:
        blocks = [(nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for i in range(depth)]
        super().__init__(*(layer for block in blocks for layer in block), nn.Flatten(), nn.Linear(4 * 81, 2))


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that compute something."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in ("detach", "view", "split_with_sizes", "as_strided")
        return func(*args, **(kwargs or {}))


def pruner_after_steps(model: nn.Module, criterion: Criterion) -> tuple[Pruner, int]:
    """After two steps, and the operations that the scores of the second took: the first one looks around."""
    pruner = Pruner(model, criterion, target_sparsity=0.5, example_input=X, epochs=9, steps_per_epoch=9)
    loss(model(X)).backward()
    pruner.on_before_optimizer_step()
    pruner.on_step_begin(1)
    with Counting() as counting:
        pruner.on_before_optimizer_step()
    return pruner, counting.count


@pytest.mark.parametrize("criterion", [Abs(), Weighted(), Fisher()])
def test_as_many_operations_read_any_number_of_norms(criterion: Criterion) -> None:
    counts = [pruner_after_steps(Deep(depth), criterion)[1] for depth in (3, 6)]
    assert counts[0] == counts[1]


class Twice(Abs):
    """A criterion that does more than to add up."""

    def units(self, structure: Structure, read: Read) -> Tensor:
        return 2 * super().units(structure, read)


def test_a_criterion_of_its_own_is_asked() -> None:
    torch.manual_seed(0)
    nets = Deep(4), Deep(4)
    nets[1].load_state_dict(nets[0].state_dict())
    (once, few), (twice, many) = (pruner_after_steps(net, c) for net, c in zip(nets, (Abs(), Twice()), strict=True))
    assert few < many
    for name, score in once.scores().items():
        torch.testing.assert_close(twice.scores()[name], 2 * score, rtol=1e-5, atol=1e-6)


def test_a_criterion_that_names_no_tensors_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"GateGradient.*Abs or Weighted"):
        Pruner(Deep(3), GateGradient(), target_sparsity=0.5, example_input=X)


def test_a_norm_without_a_gradient_costs_its_own_units_alone() -> None:
    torch.manual_seed(0)
    net = Deep(4)
    pruner = Pruner(net, Abs(), target_sparsity=0.5, example_input=X)
    loss(net(X)).backward()
    net[1].weight.grad = net[1].bias.grad = None  # type: ignore[union-attr]
    pruner.on_before_optimizer_step()
    first, *others = pruner.scores().values()
    assert float(first.abs().max()) == 0
    assert all(float(score.abs().max()) > 0 for score in others)
    whole, _ = pruner_after_steps(net, Weighted())
    assert all(float(score.abs().max()) > 0 for score in whole.scores().values())
