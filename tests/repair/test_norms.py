"""Normalisation layers: statistics taken anew, scale and shift fitted, and only where that helps."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from facts import refused
from torch import Tensor, nn

from gsprune.repair import batchnorm, least_squares
from gsprune.repair.gram import LACKS_NOTHING


@pytest.fixture(autouse=True)
def seeded() -> object:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def images(count: int = 20) -> Tensor:
    return torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def net(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm, nn.ReLU(), nn.Conv2d(4, 2, 1)).double().eval()


def test_statistics_are_those_of_all_samples_behind_repaired_norms() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)).double()
    x = images()
    report = batchnorm(model, [x[:7], (x[7:], torch.zeros(13))])
    assert [layer.name for layer in report.repaired] == ["1", "3"]
    model.eval()
    for i in (1, 3):
        read = model[:i](x)
        torch.testing.assert_close(model[i].running_mean, read.mean((0, 2, 3)), rtol=0, atol=1e-12)
        torch.testing.assert_close(model[i].running_var, read.transpose(0, 1).flatten(1).var(1), rtol=0, atol=1e-12)


def test_with_a_dense_network_only_channels_that_come_nearer() -> None:
    dense, x = net(nn.BatchNorm2d(4)), images()
    dense(x)
    batchnorm(dense, [x])
    small = copy.deepcopy(dense)
    with torch.no_grad():
        small[0].weight[0] *= 3  # its statistics are wrong now; those of the others are right
    before = copy.deepcopy(small[1])
    report = batchnorm(small, [x], dense=dense)
    assert [layer.name for layer in report.repaired] == ["1"]
    assert report.layers[0].after < 0.01 * report.layers[0].before
    assert small[1].running_var[0] == pytest.approx(9 * float(before.running_var[0]), rel=0.1)
    assert torch.equal(small[1].running_var[1:], before.running_var[1:])


def test_a_batchnorm_that_is_right_stays() -> None:
    dense, x = net(nn.BatchNorm2d(4)), images()
    small = copy.deepcopy(dense)
    report = batchnorm(small, [10 * x], dense=dense)
    assert report.left == {"1": LACKS_NOTHING}
    assert torch.equal(small[1].running_var, dense[1].running_var)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.BatchNorm2d(4, affine=False)], ids=["batch", "group", "plain"]
)
def test_scale_and_shift_are_fitted(norm: nn.Module) -> None:
    dense, x = net(norm), images(40)
    small = copy.deepcopy(dense)
    with torch.no_grad():
        if isinstance(norm, nn.GroupNorm):
            dense[1].weight.mul_(torch.tensor([2.0, 0.5, -1.0, 1.0]))
            dense[1].bias.add_(0.3)
        else:
            small[0].weight.mul_(torch.tensor([2.0, 0.5, -1.0, 1.0]).view(4, 1, 1, 1))
    report = least_squares(small, dense, [x], layers=["1"])
    if norm.weight is None:
        assert set(report.left) == {"1"}
        return
    assert report.layers[0].after < 1e-6 * report.layers[0].before
    torch.testing.assert_close(small(x), dense(x), rtol=0, atol=1e-3)


def test_layer_norm_per_feature() -> None:
    dense, x = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2)).double(), images(2).reshape(-1, 6)
    small = copy.deepcopy(dense)
    with torch.no_grad():
        dense[0].weight.copy_(torch.arange(1.0, 7.0))
        dense[0].bias.fill_(-2)
    least_squares(small, dense, [x], layers=["0"])
    torch.testing.assert_close(small[0].weight, dense[0].weight, rtol=1e-4, atol=0)
    torch.testing.assert_close(small[0].bias, dense[0].bias, rtol=1e-4, atol=0)


def test_what_is_refused_and_left() -> None:
    with refused("no batches"):
        batchnorm(net(nn.BatchNorm2d(4)), [])
    report = batchnorm(net(nn.BatchNorm2d(4, track_running_stats=False)), [images()])
    assert set(report.left) == {"1"}
    model, x = net(nn.BatchNorm2d(4)), images()
    x[0, 0, 0, 0] = math.nan
    report = batchnorm(model, [x])
    assert set(report.left) == {"1"}
    assert torch.equal(model[1].running_mean, torch.zeros(4, dtype=torch.float64))
