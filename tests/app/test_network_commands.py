"""`gsprune plan` and `gsprune cut` on networks and files that a command line names."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from facts import assert_tells, refused
from safetensors.torch import save_file
from torch import nn

import gsprune
from gsprune.app.networks import load_network, read_batches, read_input, read_tensors
from gsprune.cli import main

NETS = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

def with_input():
    return build(), torch.ones(1, 8)

def nothing():
    return 3
"""


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.fixture(autouse=True)
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's own in the working directory."""
    name = f"own_nets_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("NETS", name)


def own(function: str) -> str:
    return f"{os.environ['NETS']}:{function}"


def test_a_plan_of_an_own_network_with_its_input_or_one_that_is_given(capsys):
    assert main(["plan", "--model", own("with_input"), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["input"], first["kept"], first["total"]) == ("1x8", 8, 16)
    assert main(["plan", "--model", own("build"), "--input", "1,8", "--sparsity", "0.75"]) == 0
    assert "4 of 16 in 1 structure stay (25.0 %)" in capsys.readouterr().out


def test_a_cut_is_written_and_read_again(tmp_path, capsys):
    x, y = torch.randn(64, 8), torch.arange(64) % 4
    (tmp_path / "batches").mkdir()
    torch.save((x[:32], y[:32]), tmp_path / "batches" / "0.pt")
    save_file({"inputs": x[32:], "targets": y[32:]}, tmp_path / "batches" / "1.safetensors")
    save_file(build().state_dict(), tmp_path / "trained.safetensors")
    given = ["--model", own("build"), "--weights", "trained.safetensors", "--data", "batches", "--macs", "0.5"]
    assert main(["cut", *given, "--out", "smaller"]) == 0
    assert "Cut of Sequential by OBS" in capsys.readouterr().out
    small = gsprune.load_pruned(tmp_path / "smaller", build())
    assert small[0].out_features == 8
    assert main(["cut", *given[:-2], "--pattern", "2:4", "--out", "sparse"]) == 0
    sparse = gsprune.load_pruned(tmp_path / "sparse", build())
    assert int((sparse[2].weight == 0).sum()) == 32


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["plan", "--model", "torchvision:resnet81"], ("'resnet81'", "resnet18")),
        (["plan", "--model", "resnet18"], ("'resnet18'", "torchvision:NAME", "MODULE:FUNCTION")),
        (["plan", "--model", "no_such_module:build"], ("no_such_module",)),
        (["plan", "--model", "OWN:bild"], ("bild", "did you mean 'build'?")),
        (["plan", "--model", "OWN:nothing"], ("int", "torch.nn.Module")),
        (["plan", "--model", "OWN:build"], ("--input", "1,3,224,224")),
        (["plan", "--model", "OWN:build", "--input", "1,six"], ("'1,six'",)),
        (["plan", "--model", "OWN:build", "--input", "1,8", "--weights", "none.pt"], ("none.pt",)),
        (["plan", "model=resnet18"], ("train.py", "--model")),
        (["plan", "--macs", "0.5"], ("--macs", "--model")),
        (["plan", "--model", "OWN:build", "model=resnet18"], ("model=resnet18", "--model")),
        (["cut", "--model", "OWN:build", "--macs", "0.5"], ("--data",)),
        (["cut", "--model", "OWN:build", "--data", "."], ("--macs", "--sparsity")),
    ],
)
def test_what_the_commands_refuse(arguments, facts, capsys):
    given = [text.replace("OWN", os.environ["NETS"]) for text in arguments]
    assert main(given) == 1
    assert_tells(capsys.readouterr().err.strip(), *facts)


def test_a_file_that_would_run_code_is_not_read(tmp_path):
    torch.save(build(), tmp_path / "whole.pt")
    with refused("whole.pt"):
        read_tensors(tmp_path / "whole.pt")
    (tmp_path / "text.pt").write_text("no tensor")
    with refused("text.pt"):
        read_tensors(tmp_path / "text.pt")


def test_weights_of_another_network_are_named(tmp_path):
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "other.pt")
    with refused("other.pt", "0.weight"):
        load_network(own("build"), str(tmp_path / "other.pt"))


def test_inputs_and_batches(tmp_path):
    assert [x.dtype for x in read_input(["1,4:long", "1,4"])] == [torch.int64, torch.float32]
    torch.save({"input_ids": torch.ones(2, 3)}, tmp_path / "a.pt")
    torch.save(torch.ones(2, 3), tmp_path / "b.pt")
    batches = read_batches(tmp_path)
    assert list(batches[0]) == ["input_ids"]
    assert batches[1].shape == (2, 3)
    torch.save(3, tmp_path / "c.pt")
    with refused("c.pt", "int"):
        read_batches(tmp_path / "c.pt")
    (tmp_path / "empty").mkdir()
    with refused("empty", ".safetensors"):
        read_batches(tmp_path / "empty")


def test_overrides_go_on_to_train_py(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(
        "import json, sys; json.dump(sys.argv[1:], open('given.json', 'w')); sys.exit(3)"
    )
    assert main(["plan", "model=resnet18", "seed=1"]) == 3
    assert json.loads((tmp_path / "given.json").read_text()) == ["plan=true", "model=resnet18", "seed=1"]
    assert main(["cut"]) == 3
    assert json.loads((tmp_path / "given.json").read_text()) == ["mode=cut"]
