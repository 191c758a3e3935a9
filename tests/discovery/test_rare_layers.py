"""Layers that few networks have: found, masked as cut, with optimizer state, saved, loaded and trained on."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from conformance import OUTPUT, Network, NetworkTester
from facts import refused
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import gsprune
from gsprune import Pruner
from gsprune.criteria import Abs
from gsprune.discovery.find import find_structures
from gsprune.surgery.shrink import mask_units, shrink

VECTORS = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
PICTURES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
SEQUENCES = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(2))
IDS = torch.tensor([[1, 2, 3, 4], [5, 0, 7, 8], [0, 8, 2, 1]])


class Products(nn.Module):
    """Two hidden layers meet in a Bilinear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.pair, self.head = nn.Linear(4, 6), nn.Linear(4, 5), nn.Bilinear(6, 5, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.head(self.pair(self.a(x).relu(), self.b(x).tanh()).relu())
        return hidden


class Bag(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.words, self.head = nn.EmbeddingBag(9, 6, mode=mode), nn.Linear(6, 2)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.words(ids).tanh())
        return out


class Words(nn.Module):
    """The width of an embedding in front of a recurrent layer that projects."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words, self.rnn = nn.Embedding(9, 8), nn.LSTM(8, 12, batch_first=True, **options)
        width = (options.get("proj_size") or 12) * (1 + options.get("bidirectional", False))
        self.head = nn.Linear(width, 2)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(self.words(ids))[0])
        return out


class Recurrent(nn.Module):
    """Two layers in both directions."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(4, 6, num_layers=2, bidirectional=True), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(x)[0])
        return out


class Broadcast(nn.Module):
    """Bare parameters, a mask of numbers and one of truth values, all along the units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.scale, self.shift = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.rand(1, 6))
        self.register_buffer("gain", torch.tensor([1.0, 0.5, 1.0, 2.0, 1.0, 1.5]))
        self.register_buffer("off", torch.tensor([False, True, False, False, False, True]))

    def forward(self, x: Tensor) -> Tensor:
        hidden = ((self.a(x) * self.scale + self.shift) * self.gain).masked_fill(self.off, 0.0)
        out: Tensor = self.head(hidden.tanh())
        return out


class Multiplied(nn.Module):
    """Depthwise convolutions with several filters a channel, there and back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.deep, self.norm = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 12, 3, groups=6), nn.BatchNorm2d(12)
        self.back, self.head = nn.ConvTranspose2d(12, 24, 2, groups=12), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.back(self.norm(self.deep(self.first(x).relu())).relu()).relu()
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def unscaled() -> nn.Module:
    """Norms without weights: the layers behind them show what a unit is worth."""
    first = (nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6), nn.ReLU())
    second = (nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5, affine=False), nn.ReLU())
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2))


def perceptron(wrap: Any) -> nn.Module:
    return nn.Sequential(wrap(nn.Linear(4, 6)), nn.ReLU(), wrap(nn.Linear(6, 5)), nn.ReLU(), wrap(nn.Linear(5, 2)))


NORMED = [("0", "neurons", 6), ("2", "neurons", 5)]


@pytest.mark.filterwarnings("ignore::FutureWarning")
class TestRareLayers(NetworkTester):
    networks: ClassVar = {
        "bilinear": Network(Products, VECTORS, [("a", "neurons", 6), ("b", "neurons", 5), ("pair", "neurons", 7)]),
        "unscaled": Network(unscaled, PICTURES, [("0", "channels", 6), ("3", "channels", 5)], others=[PICTURES[:1]]),
        "multiplied": Network(Multiplied, PICTURES, [("first", "channels", 6)], again=True),
        "bag": Network(lambda: Bag("mean"), IDS, [("words", "neurons", 6)], again=True),
        "largest of a bag": Network(lambda: Bag("max"), IDS, [("words", "neurons", 6)]),
        "weight_norm": Network(lambda: perceptron(parametrizations.weight_norm), VECTORS, NORMED, again=True),
        "broadcast": Network(Broadcast, VECTORS, [("a", "neurons", 6)], again=True),
        "gru": Network(lambda: Recurrent(nn.GRU), SEQUENCES, [("rnn", "neurons", 6)]),
        "lstm": Network(lambda: Recurrent(nn.LSTM), SEQUENCES, [("rnn", "neurons", 6)]),
        "projected": Network(
            lambda: Words(proj_size=3, num_layers=2, bidirectional=True),
            IDS,
            [("words", "neurons", 8), ("rnn", "neurons", 12), ("rnn#2", "neurons", 3)],
        ),
    }


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_norm_by_hooks_is_cut_in_rows_and_columns() -> None:
    """PyTorch copies no network with hooks of `nn.utils.weight_norm` after a pass: values are compared."""
    torch.manual_seed(0)
    net = perceptron(nn.utils.weight_norm).double()
    structures = find_structures(net, VECTORS).structures
    assert [(s.name, s.kind, s.units) for s in structures] == NORMED
    keeps = [torch.arange(s.units) % 3 > 0 for s in structures]
    masked = perceptron(nn.utils.weight_norm).double()
    masked.load_state_dict(net.state_dict())
    mask_units(masked, structures, keeps)
    x = torch.randn(7, 4, dtype=torch.float64)
    expected = masked(x)
    shrink(net, structures, keeps, example_input=VECTORS)
    assert (net[2].weight_v.shape, net[2].weight_g.shape) == ((3, 4), (3, 1))
    torch.testing.assert_close(net(x), expected)
    net(x).sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert net(x).isfinite().all()


def test_a_parametrised_norm_is_cut_along_what_keeps_it_exact() -> None:
    """Columns of v at zero are as good as gone, rows are not where they share a norm, and g stands for v along it."""
    net = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), parametrizations.weight_norm(nn.Linear(6, 5), dim=1), nn.Linear(5, 2)
    )
    found = find_structures(net, VECTORS)
    assert [s.name for s in found.structures] == ["0"]
    assert [m.tensor for m in found.structures[0].consumers] == ["2.parametrizations.weight.original0"]
    assert "does not silence" in found.skipped["2"]


def test_a_spectral_norm_loses_columns_and_keeps_its_rows() -> None:
    net = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), parametrizations.spectral_norm(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 2)
    )
    found = find_structures(net, VECTORS)
    assert [(s.name, s.units) for s in found.structures] == [("0", 6)]
    assert "mixes units" in found.skipped["2"]
    assert OUTPUT in found.skipped["4"]


def test_a_frozen_batchnorm_is_cut_along() -> None:
    frozen = pytest.importorskip("torchvision.ops").FrozenBatchNorm2d
    net = nn.Sequential(nn.Conv2d(3, 6, 3), frozen(6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    (channels,) = find_structures(net, torch.randn(2, 3, 8, 8)).structures
    leaves = ("weight", "bias", "running_mean", "running_var")
    assert {m.tensor for m in channels.members} >= {f"1.{leaf}" for leaf in leaves}


def test_an_example_may_be_made_by_a_function() -> None:
    made = find_structures(perceptron(lambda layer: layer), lambda: VECTORS)
    assert [(s.name, s.kind, s.units) for s in made.structures] == NORMED
    with refused("example_input", "no arguments"):
        find_structures(perceptron(lambda layer: layer), lambda size: VECTORS)
    cut = gsprune.cut(perceptron(lambda layer: layer), [VECTORS], sparsity=0.5, example_input=lambda: VECTORS)
    assert [layer.out_features for layer in cut.model[::2]] == [3, 2, 2]
    pruner = Pruner(perceptron(lambda layer: layer), Abs(), target_sparsity=0.5, example_input=lambda: VECTORS)
    assert [target.name for target in pruner.targets] == ["0", "2"]
