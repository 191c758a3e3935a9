"""Compressed files: the same tensors, in the size of what is not zero and one bit an entry."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from facts import refused
from safetensors.torch import load_file, save_file
from torch import nn

import gsprune
from gsprune.formats.compressed import compress, expand

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def sparse(share: float, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A network of which this share of the weights is zero."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 4, 100)).to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter *= torch.rand(parameter.shape) >= share
    return net


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95, 1.0])
def test_the_same_tensors_come_back(share: float, dtype: torch.dtype, tmp_path: Path) -> None:
    net = sparse(share, dtype)
    gsprune.save_pruned(tmp_path, net, None, compressed=True)
    again = gsprune.load_pruned(tmp_path, sparse(0.0, dtype))
    for name, tensor in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_file_is_as_large_as_what_it_tells(tmp_path: Path) -> None:
    for share, times in ((0.95, 8), (0.5, 1.8)):
        net = sparse(share)
        gsprune.save_pruned(tmp_path / "plain", net, None)
        gsprune.save_pruned(tmp_path / "compressed", net, None, compressed=True)
        plain, small = ((tmp_path / kind / "model.safetensors").stat().st_size for kind in ("plain", "compressed"))
        told = sum(4 * int(p.count_nonzero()) + math.ceil(p.numel() / 8) * (p.dim() > 1) for p in net.parameters())
        assert small <= 1.15 * told
        assert plain >= times * small


def test_what_would_not_be_smaller_is_left(tmp_path: Path) -> None:
    stored, shapes = compress({"dense": torch.ones(8, 8), "bias": torch.zeros(9), "ids": torch.zeros(8, 8).long()})
    assert set(stored) == {"dense", "bias", "ids"}
    assert shapes == {}
    with refused("w.bits"):
        compress({"w": torch.zeros(8, 8), "w.bits": torch.ones(1)})


def test_plain_files_are_as_they_were(tmp_path: Path) -> None:
    gsprune.save_pruned(tmp_path, sparse(0.95), None)
    assert "compressed" not in json.loads((tmp_path / "pruning.json").read_text())


def test_values_that_do_not_fit_the_bits_are_refused() -> None:
    with refused("[2, 2]", "1 values", "2 bits"):
        expand(torch.ones(1), torch.tensor([0b11000000], dtype=torch.uint8), [2, 2])


def test_an_edited_file_is_refused(tmp_path: Path) -> None:
    gsprune.save_pruned(tmp_path, sparse(0.95), None, compressed=True)
    record = json.loads((tmp_path / "pruning.json").read_text())
    record["compressed"]["0.weight"] = [1, 3, 3, 3]
    (tmp_path / "pruning.json").write_text(json.dumps(record))
    with refused("was edited"):
        gsprune.load_pruned(tmp_path, sparse(0.0))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")
    with refused("model.safetensors"):
        gsprune.load_pruned(tmp_path, sparse(0.0))
