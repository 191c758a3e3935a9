"""Programs that others serve: what they take and return, on the CPU, and no sample of anybody's data in the file."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from facts import refused
from torch import Tensor, nn

from gsprune.export.program_file import write_program


class Words(nn.Module):
    """Returns a class of its own, as transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        found = self.embed(ids) * mask[..., None]
        return SimpleNamespace(logits=self.head(self.drop(found.sum(1))), hidden=found)


def noted(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("signature.json"))
        return dict(json.loads(archive.read(name)))


def test_a_tensor_in_and_a_tensor_out(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).train()
    write_program(tmp_path / "model.pt2", net, torch.rand(1, 3, 8, 8))
    assert net.training
    told = noted(tmp_path / "model.pt2")
    assert told == {
        "torch": torch.__version__,
        "inputs": [{"dtype": "float32", "shape": [-1, 3, 8, 8]}],
        "outputs": [{"dtype": "float32", "shape": [-1, 2]}],
    }
    program = torch.export.load(tmp_path / "model.pt2")
    x = torch.rand(5, 3, 8, 8)
    assert torch.equal(program.module()(x), net.eval()(x))
    assert program.example_inputs is not None
    ((kept,), _) = program.example_inputs
    assert not kept.any()  # the sample was somebody's picture


def test_of_keywords_and_an_output_of_a_class_the_logits(tmp_path: Path) -> None:
    net = Words()
    given = {"ids": torch.tensor([[1, 2, 3]]), "mask": torch.ones(1, 3)}
    write_program(tmp_path / "model.pt2", net, given)
    told = noted(tmp_path / "model.pt2")
    assert told["inputs"] == [
        {"name": "ids", "dtype": "int64", "shape": [-1, 3]},
        {"name": "mask", "dtype": "float32", "shape": [-1, 3]},
    ]
    assert told["outputs"] == [{"dtype": "float32", "shape": [-1, 3]}]
    more = {"ids": torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 0]]), "mask": torch.rand(3, 3)}
    found = torch.export.load(tmp_path / "model.pt2").module()(**more)
    assert torch.equal(found, net.eval()(**more).logits)


class Undecided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_cannot_be_exported_is_one_sentence_and_no_file(tmp_path: Path) -> None:
    with refused("Undecided", "values of a tensor"):
        write_program(tmp_path / "model.pt2", Undecided(), torch.ones(1, 2))
    assert list(tmp_path.iterdir()) == []
