"""A network as ExecuTorch's program: written, read in a fresh process, and refused in one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from facts import refused
from nets import of_pictures
from torch import nn

import gsprune
from gsprune.export import to_executorch

pytest.importorskip("executorch")

READ = """
import sys, torch
from executorch.runtime import Runtime
sys.modules["gsprune"] = None
x, wanted = torch.load(sys.argv[2])
given = Runtime.get().load_program(sys.argv[1]).load_method("forward").execute([x])[0]
print(float((given - wanted).abs().max() / wanted.abs().max()))
"""


@pytest.mark.slow
def test_a_fresh_process_without_gsprune_computes_the_same(tmp_path: Path) -> None:
    cut = gsprune.cut(of_pictures(), [torch.randn(32, 3, 8, 8)], sparsity=0.5, progress=False).model
    x = torch.randn(2, 3, 8, 8)
    assert to_executorch(cut, torch.randn(2, 3, 8, 8), tmp_path / "net.pte") < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["net.pte"]
    with torch.no_grad():
        torch.save((x, cut(x)), tmp_path / "expected.pt")
    command = [sys.executable, "-c", READ, str(tmp_path / "net.pte"), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert float(done.stdout) < 1e-4


def test_wrong_input_is_refused_before_work(tmp_path: Path) -> None:
    with refused("net.onnx", ".pte"):
        to_executorch(of_pictures(), torch.randn(2, 3, 8, 8), tmp_path / "net.onnx")
    with refused("tolerance", "0"):
        to_executorch(of_pictures(), torch.randn(2, 3, 8, 8), tmp_path / "net.pte", tolerance=0)
    with refused("Sequential", "batch of 2"):
        to_executorch(of_pictures(), torch.randn(2, 1, 8, 8), tmp_path / "net.pte")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_difference_is_refused_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "net.pte"
    path.write_bytes(b"old")
    with refused("Sequential", "1e-30"):
        to_executorch(of_pictures(), torch.randn(2, 3, 8, 8), path, tolerance=1e-30)
    assert path.read_bytes() == b"old"
    (tmp_path / "a file").touch()
    with refused("net.pte", "cannot be written"):
        to_executorch(of_pictures(), torch.randn(2, 3, 8, 8), tmp_path / "a file" / "net.pte")


@pytest.mark.slow
def test_what_depends_on_values_is_refused(tmp_path: Path) -> None:
    class Choosing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with refused("Choosing", "ExecuTorch"):
        to_executorch(Choosing(), torch.ones(2), tmp_path / "net.pte")
