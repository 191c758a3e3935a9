"""One set of second moments for all cuts: against `numpy.linalg.lstsq`, and what is left alone."""

from __future__ import annotations

import copy

import nets
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gsprune.discovery.find import find_structures
from gsprune.repair.shared import SharedMoments
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.cut_plan import plan_cut


def consumers(model: nn.Module, x: Tensor) -> tuple[list, list[str]]:
    found = find_structures(model, x[:2]).structures
    return list(found), list(dict.fromkeys(m.tensor.rpartition(".")[0] for s in found for m in s.consumers))


def halved(model: nn.Module, structures: list) -> tuple[nn.Module, object]:
    plan = plan_cut(structures, [torch.arange(s.units) % 2 == 0 for s in structures])
    small = copy.deepcopy(model)
    apply_cut(small, plan)
    return small, plan


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_reader_is_the_least_squares_solution(bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3, bias=bias)).double()
    x = torch.randn(200, 5, dtype=torch.float64)
    structures, names = consumers(model, x)
    small, plan = halved(model, structures)
    shared = SharedMoments(model, [x], names, held_back=0.01)
    report = shared.refit(small, plan, damping=[1e-12])
    assert [layer.name for layer in report.repaired] == ["2"]
    read = torch.tanh(model[0](x))[:, ::2].detach().numpy()
    wanted = model(x).detach().numpy()
    held = [50, 150]  # two of two hundred are held back, evenly spaced
    rows = np.delete(np.arange(200), held)
    full = np.concatenate([read, np.ones((200, 1))], 1) if bias else read
    solution = np.linalg.lstsq(full[rows], wanted[rows], rcond=None)[0]
    found = small[2].weight.detach().numpy().T
    np.testing.assert_allclose(found, solution[:4], rtol=0, atol=1e-6)
    if bias:
        np.testing.assert_allclose(small[2].bias.detach().numpy(), solution[4], rtol=0, atol=1e-6)


@pytest.mark.parametrize("build", [nets.ResNet, nets.Mobile, nets.flat, nets.Dense])
def test_every_cut_comes_nearer_to_the_dense_network_s_layers(build) -> None:
    torch.manual_seed(0)
    model = nets.settle(build()).eval()
    x = torch.randn(40, 3, 8, 8)
    structures, names = consumers(model, x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shared = SharedMoments(model, [x[:20], x[20:]], names)
    small, plan = halved(model, structures)
    report = shared.refit(small, plan)
    assert report.repaired
    assert all(layer.after < layer.before for layer in report.repaired)
    again, _ = halved(model, structures)
    shared.refit(again, plan)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


class Scaled(nn.Linear):
    """Its forward pass is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_what_is_left_alone_says_why() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), Scaled(8, 3))
    plain = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(30, 5)
    structures, names = consumers(plain, x)
    small, plan = halved(model, structures)
    assert "forward pass of its own" in SharedMoments(model, [x], names).refit(small, plan).left["2"]
    small, plan = halved(plain, structures)
    assert "one sample" in SharedMoments(plain, [x[:1]], names).refit(small, plan).left["2"]
