"""Wanda and SparseGPT: scores, and SparseGPT's sweep against the surgeon who inverts anew for every column."""

from __future__ import annotations

import pytest
import reference
import torch
from conformance import InputsTester
from facts import refused
from torch import Tensor

from gsprune.criteria import SparseGPT, Wanda
from gsprune.ranking.patterns import Block, Tile

DOUBLE = torch.float64


def layer(rows: int = 6, columns: int = 16, groups: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights (g, r, k) and correlated inputs (g, n, k)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, rows, columns, dtype=DOUBLE, generator=generator)
    mixed = torch.randn(groups, 5, columns, dtype=DOUBLE, generator=generator)
    inputs = torch.randn(groups, 60, 5, dtype=DOUBLE, generator=generator) @ mixed
    return weight, inputs + 0.3 * torch.randn(inputs.shape, dtype=DOUBLE, generator=generator)


def gram(inputs: Tensor) -> Tensor:
    return inputs.mT @ inputs / inputs.shape[1]


def error(weight: Tensor, new: Tensor, inputs: Tensor) -> float:
    return float(((weight - new) @ inputs.mT).square().sum())


class TestWanda(InputsTester):
    make = Wanda

    def score(self, weight: Tensor, inputs: Tensor) -> Tensor:
        return reference.wanda(weight, inputs)


class TestSparseGPT(InputsTester):
    make = SparseGPT

    def score(self, weight: Tensor, inputs: Tensor) -> Tensor:
        h = inputs.T @ inputs / len(inputs)
        h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=DOUBLE)
        columns = range(weight.shape[1])
        return torch.stack([weight[:, j] ** 2 / torch.linalg.inv(h[j:, j:])[0, 0] for j in columns], dim=1)


@pytest.mark.parametrize("block", [1, 4, 5, 16, 128])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_the_sweep_equals_the_slow_version(block: int, sparsity: float) -> None:
    weight, inputs = layer()
    new, keep = SparseGPT(block=block).prune(weight, gram(inputs), sparsity=sparsity)
    slow, kept = reference.surgeon(weight[0], inputs[0], damping=0.01, block=block, sparsity=sparsity)
    assert torch.equal(keep[0], kept)
    torch.testing.assert_close(new[0], slow, rtol=1e-7, atol=1e-9)
    assert int((~keep).sum()) == int(sparsity * 96 + 0.5)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_blocks_of_n_of_m_equal_the_slow_version(n: int, m: int) -> None:
    weight, inputs = layer()
    new, keep = SparseGPT(block=10).prune(weight, gram(inputs), sparsity=1 - n / m, pattern=Block(n, m))
    slow, kept = reference.surgeon(weight[0], inputs[0], damping=0.01, block=m, sparsity=0.5, n_of_m=(n, m))
    assert torch.equal(keep[0], kept)
    torch.testing.assert_close(new[0], slow, rtol=1e-7, atol=1e-9)
    assert bool((keep.reshape(-1, m).sum(1) == n).all())


def test_groups_are_layers_of_their_own() -> None:
    weight, inputs = layer(groups=3)
    new, keep = SparseGPT().prune(weight, gram(inputs), sparsity=0.5, pattern=Block(2, 4))
    for g in range(3):
        alone = SparseGPT().prune(weight[g : g + 1], gram(inputs)[g : g + 1], sparsity=0.5, pattern=Block(2, 4))
        assert torch.equal(keep[g], alone[1][0])
        torch.testing.assert_close(new[g], alone[0][0])


def test_by_row_every_row_reaches_the_sparsity() -> None:
    weight, inputs = layer(columns=15)
    _, keep = SparseGPT(block=4).prune(weight, gram(inputs), sparsity=0.4, by_row=True)
    assert (~keep).sum(-1).tolist() == [[6] * 6]


def test_what_is_left_makes_up_for_what_goes() -> None:
    weight, inputs = layer(rows=20)
    new, keep = SparseGPT().prune(weight, gram(inputs), sparsity=0.5)
    assert not new[~keep].any()
    assert error(weight, new, inputs) < 0.7 * error(weight, weight * keep, inputs)


def test_weights_before_the_first_that_goes_stay() -> None:
    weight, inputs = layer()
    weight[..., :8] *= 1e3
    new, keep = SparseGPT().prune(weight, gram(inputs), sparsity=0.25)
    assert bool(keep[..., :8].all())
    assert torch.equal(new[..., :8], weight[..., :8])


def test_constant_inputs_leave_a_finite_answer() -> None:
    weight, _ = layer()
    new, keep = SparseGPT().prune(weight, torch.ones(1, 16, 16, dtype=DOUBLE), sparsity=0.5)
    assert new.isfinite().all()
    assert int(keep.sum()) == 48
    lost, left = (float((w.sum(-1) - weight.sum(-1)).abs().sum()) for w in (weight * keep, new))
    assert left < 0.2 * lost  # all but what went last, which nothing could make up for


def test_wanda_literal() -> None:
    weight, inputs = torch.tensor([[[1.0, -2.0]]]), torch.tensor([[[3.0, 1.0], [3.0, 1.0]]])
    assert Wanda().from_inputs(weight, gram(inputs)).tolist() == [[[3.0, 2.0]]]


def test_wrong_settings_are_refused() -> None:
    with refused("damping", -1):
        SparseGPT(damping=-1)
    with refused("block", 0):
        SparseGPT(block=0)
    weight, inputs = layer()
    with refused("SparseGPT", "4x1", "Wanda"):
        SparseGPT().prune(weight, gram(inputs), sparsity=0.5, pattern=Tile(4, 1))
