"""Costs against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from gsprune import latency
from gsprune.cost.counting import count_macs, count_parameters, file_bytes


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    ("model", "shape", "macs"),
    [
        (nn.Linear(4, 3), (2, 4), 2 * 4 * 3),
        (nn.Linear(4, 3), (2, 5, 4), 2 * 5 * 4 * 3),
        (nn.Conv2d(3, 8, 3), (1, 3, 8, 8), 8 * 6 * 6 * 3 * 9),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (1, 4, 8, 8), 6 * 4 * 4 * 2 * 9),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), (1, 4, 5, 5), 4 * 5 * 5 * 9),
        (nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2)), (1, 1, 4, 4), 2 * 16),
        # projections to q, k, v and back, two MLP layers, and both products of attention over 2 heads of 8
        (
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
            (1, 5, 16),
            5 * (16 * 48 + 16 * 16 + 2 * 16 * 32) + 2 * 2 * 5 * 5 * 8,
        ),
    ],
)
def test_macs_are_those_counted_by_hand(model: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert count_macs(model, torch.ones(shape)) == macs


def test_macs_of_attention_with_other_lengths_and_as_keywords() -> None:
    q, kv = torch.ones(1, 2, 3, 8), torch.ones(1, 2, 5, 8)
    assert count_macs(Attention(), (q, kv, kv)) == 2 * 2 * 3 * 5 * 8  # two products, two heads
    assert count_macs(Attention(), {"q": q, "k": kv, "v": kv}) == 480


def test_macs_see_a_zero_weight_but_not_a_missing_one() -> None:
    layer = nn.Linear(10, 10)
    nn.init.zeros_(layer.weight)
    assert count_macs(layer, torch.ones(1, 10)) == 100
    assert count_macs(nn.Linear(10, 4), torch.ones(1, 10)) == 40


def test_measuring_leaves_modes_buffers_gradients_and_switches_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    model[1].eval()  # a frozen norm in a training model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = torch.backends.mha.get_fastpath_enabled()
    count_macs(model, torch.ones(2, 4))
    latency.latency_ms({"a": model}, torch.ones(2, 4), repeats=2)
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model[0].weight.grad is None
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled() is fast


def test_modes_come_back_when_the_model_raises() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(RuntimeError):
        count_macs(model, torch.ones(2, 5))
    assert model.training


def test_parameters_count_ties_once() -> None:
    layer = nn.Linear(3, 2)
    assert count_parameters(nn.Sequential(layer, nn.ReLU(), layer)) == 8


def test_file_bytes_is_the_size_of_the_file() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    assert file_bytes(model) == len(save(model.state_dict()))
    tied = nn.ModuleList([model[0], model[0]])
    assert file_bytes(tied) < file_bytes(model[0]) + 100  # stored once
