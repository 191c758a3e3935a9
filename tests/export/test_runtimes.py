"""Networks and layers in other runtimes: they compute what PyTorch does, and leave the threads as they were."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from facts import refused
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.pytorch_utils import Conv1D

from gsprune.export import runtimes
from gsprune.export.runtimes import EAGER, Measure, as_convolution, operator

FOREIGN = ["onnxruntime", "openvino"]


class Same(nn.Conv2d):
    """Pads by itself, as TensorFlow's networks do, and divides its weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.norm()
        return F.conv2d(F.pad(x, (0, 1, 1, 2)), weight, self.bias, self.stride, groups=self.groups)


class Twice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class Shifted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 4), (3, 6)),
    "linear of sequences, no bias": (nn.Linear(6, 4, bias=False), (2, 5, 6)),
    "linear of sequences": (nn.Linear(6, 4), (2, 5, 6)),
    "Conv1D": (Conv1D(4, 6), (2, 5, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1, stride=2), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, (3, 5), padding=(1, 2), dilation=(2, 1), groups=2), (2, 4, 9, 8)),
    "same": (nn.Conv2d(4, 6, (2, 4), padding="same", bias=False), (2, 4, 9, 8)),
    "conv3d": (nn.Conv3d(2, 3, 2), (1, 2, 4, 5, 6)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 4, 5, 6)),
    "mirrored borders": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 9, 8)),
    "own padding": (Same(4, 6, 3, stride=2, groups=2), (2, 4, 9, 8)),
    "weight norm": (weight_norm(nn.Conv1d(4, 6, 3, padding=1)), (2, 4, 9)),
    "weight norm, transposed": (weight_norm(nn.ConvTranspose1d(4, 6, 3, output_padding=1, stride=2)), (2, 4, 9)),
    "weight norm, linear": (weight_norm(nn.Linear(6, 4)), (3, 6)),
    "called twice": (Twice(4, 4, 3), (2, 4, 9, 8)),
    "own sum": (Shifted(6, 4), (3, 6)),
}
EXPORTED = ("weight norm, linear", "called twice", "own sum")  # which torch's exporter writes


def value(found: Any) -> Tensor:
    return torch.as_tensor(found[0] if isinstance(found, list) else next(iter(found.values())))


@pytest.mark.parametrize("runtime", FOREIGN)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_what_pytorch_does(name: str, runtime: str) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert (operator(*(as_convolution(layer, x) or (layer, x))) is None) == (name in EXPORTED)
    with torch.no_grad():
        wanted = layer.eval()(x)
    assert torch.allclose(value(Measure(runtime).prepared_layer(layer, x)()), wanted, atol=1e-5)


@pytest.mark.parametrize("runtime", FOREIGN)
def test_a_network_computes_what_pytorch_does(runtime: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    measure = Measure(runtime, batch=3, threads=1)
    x = measure.inputs(torch.randn(1, 3, 8, 8))
    assert x.shape == (3, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(value(measure.prepared(net, x)()), net(x), atol=1e-5)


SIGNAL_AFTERWARDS = """
import signal, torch
from gsprune import find_structures, latency
from gsprune.cost.budgets import Budget
from gsprune.export.runtimes import Measure
from gsprune.training.signals import Interrupted, Stop

def milliseconds(models, *_, **__):
    for model in models.values():
        model()
    known = {"": 40.0, "dense": 40.0, "cut": 20.0}
    return {name: known[name] if name in known else float(name.rpartition(" ")[2]) for name in models}

latency.latency_ms = milliseconds

def measured():
    net, x = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)), torch.ones(2, 8)
    structures = find_structures(net, x).structures
    Budget("latency", 0.5, net, structures, x, measure=Measure("openvino", batch=5)).cut([torch.arange(32.0)], 0.5)

measured()
try:
    with Stop() as stop, stop.deferred():
        signal.raise_signal(signal.SIGTERM)
except Interrupted as stopped:
    print(stopped)
"""


@pytest.mark.slow
def test_a_signal_after_openvino_ends_no_process() -> None:
    """Its unloaded plugins did."""
    command = [sys.executable, "-c", SIGNAL_AFTERWARDS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "stopped by SIGTERM"), done.stderr


@pytest.mark.long  # the compiler takes half a minute
def test_a_network_is_compiled_for_its_own_shapes() -> None:
    for width in range(8, 8 * 12, 8):  # torch.compile alone stops after 8
        net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2)).eval()
        x = torch.randn(2, 4)
        with torch.inference_mode():
            assert torch.allclose(Measure("compile").prepared(net, x)(), net(x), atol=1e-5)


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with Measure(threads=before + 1).running():
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_what_is_not_here_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "_compiler", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refused("budget.runtime", "compile", "C++"):
        Measure("compile").check()
    EAGER.check()


class ByValue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


def test_a_network_that_cannot_be_exported_is_refused() -> None:
    with refused("ByValue", "values of a tensor"):
        Measure("onnxruntime").prepared(ByValue(), torch.ones(2, 3))
