"""A network as OpenVINO's files: written, read in a fresh process, and refused in one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from facts import refused
from nets import of_pictures
from torch import nn

from gsprune.export import fuse, to_openvino

READ = """
import sys
import numpy as np, openvino
network = openvino.compile_model(sys.argv[1], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})  # not what is fastest
np.save(sys.argv[3], next(iter(network([np.load(sys.argv[2])]).values())))
"""


@pytest.mark.slow
def test_a_fresh_process_without_torch_computes_the_same(tmp_path: Path) -> None:
    model, x = of_pictures(), torch.randn(5, 3, 8, 8)
    assert to_openvino(model, x[:2], tmp_path / "net.xml") < 1e-4
    assert {path.name for path in tmp_path.iterdir()} == {"net.xml", "net.bin"}
    np.save(tmp_path / "x.npy", x.numpy())
    subprocess.run([sys.executable, "-c", READ, *(tmp_path / n for n in ("net.xml", "x.npy", "y.npy"))], check=True)
    with torch.no_grad():
        assert np.abs(np.load(tmp_path / "y.npy") - model(x).numpy()).max() < 1e-4


def test_wrong_input_is_refused_before_work(tmp_path: Path) -> None:
    with refused("net.onnx", ".xml"):
        to_openvino(of_pictures(), torch.randn(2, 3, 8, 8), tmp_path / "net.onnx")
    with refused("tolerance", "0"):
        to_openvino(of_pictures(), torch.randn(2, 3, 8, 8), tmp_path / "net.xml", tolerance=0)


def test_a_difference_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with refused("Sequential", "1e-30"):
        to_openvino(of_pictures(), torch.randn(2, 3, 8, 8), tmp_path / "net.xml", tolerance=1e-30)
    assert list(tmp_path.iterdir()) == []


def test_batchnorm_is_folded() -> None:
    model, x = of_pictures(), torch.randn(4, 3, 8, 8)
    fused = fuse(model, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    with torch.no_grad():
        assert torch.allclose(fused(x), model(x), atol=1e-5)


def test_a_difference_after_folding_is_refused() -> None:
    with refused("Sequential", "BatchNorm"):
        fuse(of_pictures(), torch.randn(4, 3, 8, 8), tolerance=1e-30)


def test_what_cannot_be_traced_is_not_folded() -> None:
    class Choosing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with refused("Choosing", "torch.fx"):
        fuse(Choosing(), torch.ones(2))
