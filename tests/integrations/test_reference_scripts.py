"""The scripts in the shape of timm's and torchvision's `train.py`: masks, averages, and a resume to the last bit."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    pytest.param("timm_train", "--output", "last.pth.tar", "blocks.0.mlp", 192, id="timm"),
    pytest.param("torchvision_train", "--output-dir", "checkpoint.pth", "layer1.0", 64, id="torchvision"),
]
LAYERS = {"blocks.0.mlp": ("fc1", "fc2"), "layer1.0": ("conv1", "conv2")}  # whose units, and who reads them
SHORT = ["--epochs", "3"]


def script(name: str) -> Callable[[list[str]], Any]:
    if name == "timm_train":
        pytest.importorskip("timm")
    main: Callable[[list[str]], Any] = runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"]
    return main


def unread(network: nn.Module, block: str) -> Tensor:
    """The units that nothing reads any more."""
    weight = network.get_parameter(f"{block}.{LAYERS[block][1]}.weight")
    return weight.transpose(0, 1).flatten(1).eq(0).all(dim=1)


def width(network: nn.Module, block: str) -> int:
    return len(network.get_parameter(f"{block}.{LAYERS[block][0]}.weight"))


def state(networks: tuple[nn.Module, nn.Module]) -> dict[str, Tensor]:
    return {f"{k} {name}": tensor for k, net in enumerate(networks) for name, tensor in net.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "output", "file", "block", "units"), SCRIPTS)
def test_the_network_and_its_average_are_masked_and_then_cut(
    name: str, output: str, file: str, block: str, units: int, tmp_path: Path
) -> None:
    main = script(name)
    amp = ["--amp"] if name == "timm_train" else []  # oneDNN's bfloat16 gradients of 1 x 1 pictures are nan
    model, average, pruner = main([*SHORT, *amp, "--stop-after", "2", output, str(tmp_path)])
    pruned = unread(model, block)
    assert 0 < int(pruned.sum()) < units
    assert torch.equal(unread(average, block), pruned)
    assert pruner.attached
    assert pruner.epoch == 2  # no step was counted twice, and none was left out
    saved = torch.load(tmp_path / file, weights_only=True)
    model.load_state_dict(saved.get("state_dict", saved.get("model")))
    assert torch.equal(unread(model, block), pruned)

    pruner.finish()
    assert pruner.sparsity == 0.5
    for network in (model, average):
        assert 0 < width(network, block) < units
        assert not unread(network, block).any()
    assert [p.shape for p in model.parameters()] == [p.shape for p in average.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("shrink", ["at_end", "each_update"])
@pytest.mark.parametrize(("name", "output", "file", "block", "units"), SCRIPTS)
def test_a_killed_run_goes_on_to_the_bit(
    name: str, output: str, file: str, block: str, units: int, shrink: str, tmp_path: Path
) -> None:
    main = script(name)
    settings = [*SHORT, "--shrink", shrink]
    *whole, _ = main(settings)
    *killed, _ = main([*settings, "--stop-after", "2", output, str(tmp_path)])
    assert (width(killed[0], block) < units) == (shrink == "each_update")
    *resumed, _ = main([*settings, "--resume", str(tmp_path / file)])
    wanted, found = state((whole[0], whole[1])), state((resumed[0], resumed[1]))
    assert list(found) == list(wanted)
    for tensor_name, tensor in wanted.items():
        assert torch.equal(found[tensor_name], tensor), tensor_name
    assert width(resumed[1], block) < units
