"""Refits with the support fixed, against a dense least-squares solution of every row."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from facts import refused
from torch import Tensor, nn

from gsprune.repair.gram import Moments, error, matrix_of, read_rows
from gsprune.repair.support import as_matrix, as_weight, find_sites, masked_least_squares, refit_support

DOUBLE = torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def data(rows: int, seed: int = 0) -> Tensor:
    """Twelve features that depend on three others and a little noise."""
    return random(rows, 3, seed=seed) @ random(3, 12, seed=99) + 0.3 * random(rows, 12, seed=seed + 1)


def half(shape: torch.Size, seed: int = 5) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def gpt2_linear() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(5, 7)


LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (90, 7)),
    "linear without bias": (lambda: nn.Linear(7, 5, bias=False), (90, 7)),
    "gpt2": (gpt2_linear, (90, 7)),
    "conv": (lambda: nn.Conv2d(2, 5, 3, padding=1, stride=2), (9, 2, 7, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, dilation=2, bias=False), (9, 3, 16)),
    "grouped": (lambda: nn.Conv2d(4, 6, 2, groups=2), (9, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3, padding=1), (9, 3, 6, 6)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_row_is_the_least_squares_solution_on_what_it_keeps(kind: str) -> None:
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = make().double()
    keep = as_matrix(layer, half(layer.weight.shape))
    rows = read_rows(layer, random(*shape))
    given = random(len(rows), *keep.shape[:2], seed=1)
    fit = Moments.none(*(keep.shape[i] for i in (0, 2, 1)))
    old = matrix_of(layer).clone()
    bias = None if layer.bias is None else layer.bias.detach().clone().view(keep.shape[:2])
    now = torch.einsum("mgk,gok->mgo", rows, old) + (0 if bias is None else bias)
    fit.add(rows, given - now)
    refit_support("layer", layer, fit, fit, keep, None, [1e-12])
    for g in range(keep.shape[0]):
        for o in range(keep.shape[1]):
            columns = rows[:, g][:, keep[g, o]]
            if layer.bias is not None:
                columns = torch.cat([columns, torch.ones(len(rows), 1, dtype=DOUBLE)], 1)
            solved = np.linalg.lstsq(columns.numpy(), given[:, g, o].numpy(), rcond=None)[0]
            got = matrix_of(layer)[g, o][keep[g, o]]
            got = got if layer.bias is None else torch.cat([got, layer.bias.detach().view(keep.shape[:2])[g, o, None]])
            np.testing.assert_allclose(got.numpy(), solved, rtol=1e-5, atol=1e-6)
    assert not matrix_of(layer)[~keep].any()


@pytest.mark.parametrize("kind", LAYERS)
def test_weights_and_matrices_are_each_others_inverse(kind: str) -> None:
    layer = LAYERS[kind][0]()
    weight = random(*layer.weight.shape)
    assert torch.equal(as_weight(layer, as_matrix(layer, weight)), weight)
    layer.weight.data = weight
    assert torch.equal(as_matrix(layer, weight), matrix_of(layer))


def test_the_ridge_is_that_of_the_equation() -> None:
    layer, keep = nn.Linear(6, 1, bias=False).double(), torch.tensor([[[True, True, False, True, True, False]]])
    x, y = random(40, 6), random(40, 1, seed=1)
    old = layer.weight.detach().clone()
    fit = Moments.none(1, 6, 1)
    fit.add(x[:, None], (y - x @ old.T)[:, None])
    refit_support("layer", layer, fit, fit, keep, None, [0.3])
    kept = x[:, keep[0, 0]]
    ridge = 0.3 * float((x * x).sum(0).mean()) * torch.eye(4, dtype=DOUBLE)
    solved = torch.linalg.solve(kept.T @ kept + ridge, kept.T @ y + ridge @ old[:, keep[0, 0]].T)
    torch.testing.assert_close(layer.weight[0, keep[0, 0]], solved[:, 0], rtol=1e-6, atol=1e-8)


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().float().square().mean())


def network(dtype: torch.dtype = DOUBLE) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 6)).to(dtype)
    small = copy.deepcopy(dense)
    masks = {name: half(small.get_parameter(name).shape) for name in ("0.weight", "2.weight")}
    for name, mask in masks.items():
        small.get_parameter(name).data.mul_(mask)
    return dense, small, masks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_repaired_network_is_nearer_to_the_dense_one_on_fresh_data(dtype: torch.dtype) -> None:
    dense, small, masks = network(dtype)
    fresh = data(300, seed=9).to(dtype)
    before = far(small(fresh), dense(fresh))
    report = masked_least_squares(small, dense, [data(300).to(dtype)], masks)
    after = far(small(fresh), dense(fresh))
    assert after < 0.6 * before
    assert [layer.name for layer in report.repaired] == ["0.weight", "2.weight"]
    assert all(layer.after < layer.before for layer in report.repaired)
    assert all(not small.get_parameter(name)[~mask].any() for name, mask in masks.items())
    assert small[0].weight.dtype is dtype


def test_a_refit_that_helps_no_held_back_sample_is_dropped() -> None:
    """Held-back rows that say the opposite of the others."""
    layer = nn.Linear(4, 2, bias=False).double()
    keep = torch.tensor([[[True, True, False, True], [True, False, True, True]]])
    x, y = random(30, 1, 4), random(30, 1, 2, seed=1)
    fit, judge = (Moments.none(1, 4, 2) for _ in range(2))
    fit.add(x, y)
    old = layer.weight.detach().clone()
    masked = old * keep[0]
    lost = torch.einsum("mgk,gok->mgo", x, (masked - old)[None])
    judge.add(x, 2 * lost - y)
    found = refit_support("layer", layer, fit, judge, keep, None, [1e-6])
    assert torch.equal(layer.weight, masked)
    assert found.reason is not None
    zero = torch.zeros(1, 2, dtype=DOUBLE)
    assert found.before == found.after == pytest.approx(float(error(judge, (masked - old)[None], zero).sum()))


def test_a_single_sample_repairs_nothing() -> None:
    dense, small, masks = network()
    before = copy.deepcopy(small.state_dict())
    report = masked_least_squares(small, dense, [random(1, 12)], masks)
    assert not report.repaired
    assert all("one sample" in reason for reason in report.left.values())
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


def test_constant_inputs_and_inputs_of_zero_stay_finite() -> None:
    for value in (0.0, 1.0):
        dense, small, masks = network()
        masked_least_squares(small, dense, [torch.full((20, 12), value, dtype=DOUBLE)], masks)
        assert all(p.isfinite().all() for p in small.parameters())
        fresh = torch.full((3, 12), value, dtype=DOUBLE)
        torch.testing.assert_close(small(fresh), dense(fresh), rtol=1e-2, atol=1e-2)


def test_inputs_that_are_not_finite_change_nothing() -> None:
    dense, small, masks = network()
    before = copy.deepcopy(small.state_dict())
    report = masked_least_squares(small, dense, [torch.full((20, 12), math.nan, dtype=DOUBLE)], masks)
    assert all("not finite" in reason for reason in report.left.values())
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


def test_what_cannot_be_seen_is_left_with_its_reason() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "rnn": nn.GRU(3, 3), "up": nn.ConvTranspose1d(3, 3, 2)})
    model["b"] = nn.Linear(3, 3)
    model["b"].weight = model["a"].weight
    _, left = find_sites(model, ["a.weight", "rnn.weight_hh_l0", "up.weight"])
    assert left["a.weight"] == "it is shared by several modules"
    assert "GRU" in left["rnn.weight_hh_l0"]
    assert "up.weight" not in left


def test_a_layer_that_runs_twice_is_left_and_the_others_are_repaired() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.again(self.again(self.first(x)).relu()))

    torch.manual_seed(0)
    dense = Twice().double()
    small = copy.deepcopy(dense)
    masks = {name: half(p.shape) for name, p in small.named_parameters() if p.dim() > 1}
    for name, mask in masks.items():
        small.get_parameter(name).data.mul_(mask)
    again = small.again.weight.detach().clone()
    report = masked_least_squares(small, dense, [random(200, 6)], masks)
    assert "last.weight" in {layer.name for layer in report.repaired}
    assert "more than once" in report.left["again.weight"]
    assert torch.equal(small.again.weight, again)


def test_wrong_input_is_refused() -> None:
    dense, small, masks = network()
    with refused("damping", -1):
        masked_least_squares(small, dense, [random(9, 12)], masks, damping=[-1])
    with refused("nothing", "Sequential"):
        masked_least_squares(small, dense, [random(9, 12)], {"nothing": masks["0.weight"]})
    with refused("2.weight", [6, 24], [2, 2]):
        masked_least_squares(small, dense, [random(9, 12)], {"2.weight": torch.ones(2, 2, dtype=torch.bool)})
    with refused("batches"):
        masked_least_squares(small, dense, [], masks)
