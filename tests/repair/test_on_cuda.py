"""Repair and scoring on a CUDA device that is only pretended: tensors lie there, and nothing waits for it on the way.

Fake tensors know their device and refuse every read of a value.
"""

from __future__ import annotations

from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
from facts import needs_cuda_build
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from gsprune.cutting.calibration import Calibration
from gsprune.cutting.scoring import _Reader, sharing_copy
from gsprune.discovery.find import find_structures
from gsprune.repair.gram import Moments, summed
from gsprune.repair.lockstep import Visit
from gsprune.repair.support import _conjugate

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (8, 6)),
    "conv": (lambda: nn.Conv2d(6, 4, 3, padding=1), (8, 6, 5, 5)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (8, 6, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2), (8, 6, 5, 5)),
}


@needs_cuda_build
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("columns", [None, torch.tensor([0, 2])], ids=["all", "block"])
def test_moments_are_summed_on_the_device(name: str, columns: Tensor | None) -> None:
    make, shape = LAYERS[name]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        with torch.device("cuda"):
            dense, small, x = make(), make(), torch.empty(shape)
        y = dense(x)
        visit = Visit("b", dense, small, [x, x], [x, x], [y, y], [False, True], [None, None], [(y, y), (y, y)])
        slope = torch.ones(4, device="cuda")
        found = summed(visit, kept=torch.arange(4), residual=True, slope=slope, most=7, columns=columns)
        assert {t.device.type for m in found for t in (m.xx, m.yx, m.yy, m.mean_x)} == {"cuda"}
        with pytest.raises(DataDependentOutputException):
            float(found[2].yy.sum())


@needs_cuda_build
def test_conjugate_gradients_wait_for_nothing() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), torch.device("cuda"):
        moments = Moments.none(1, 6, 4, torch.device("cuda"))
        keep, start = torch.ones(1, 4, 6, dtype=torch.bool), torch.zeros(1, 4, 6)
        for weight in _conjugate(moments, keep, start, 0.1, has_bias=True, double=False):
            assert weight.device.type == "cuda"


def test_gate_gradients_of_a_batch_cross_once_for_all_structures(monkeypatch: pytest.MonkeyPatch) -> None:
    structures = find_structures(nets.ResNet(), nets.images(2)).structures
    data = Calibration([(nets.images(4), torch.tensor([0, 1, 2, 0]))], F.cross_entropy)
    assert len(structures) > 1
    reader = _Reader(sharing_copy(nets.ResNet().eval(), requires_grad=False), structures)
    reader.read(data, data.batches[0])
    crossed, plain = [], Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: crossed.append(tensor.shape) or plain(tensor))
    found = reader.read(data, data.batches[0])
    assert {s.name: (4, s.units) for s in structures} == {name: tuple(g.shape) for name, g in found.items()}
    assert crossed == [(4, sum(s.units for s in structures))]
