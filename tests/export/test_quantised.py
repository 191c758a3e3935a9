"""int8 after pruning, by others: zeros stay zero, cut networks quantise as any, and `save_pruned` refuses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from facts import refused
from torch import Tensor, nn
from torch.nn import functional as F

import gsprune
from gsprune import Pruner, save_pruned
from gsprune.criteria import Elementwise, Magnitude
from gsprune.schedules import OneShot

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 32),
        nn.ReLU(), nn.Linear(32, 4),
    )  # fmt: skip


def pruned(kind: str) -> tuple[nn.Sequential, Pruner]:
    net = network()
    units = {"structured": True, "example_input": X[:2]} if kind == "cut" else {}
    pruner = Pruner(net, Magnitude(), target_sparsity=0.5, schedule=OneShot(), **units)
    pruner.on_step_begin(0)
    pruner.on_train_end()
    return net.eval(), pruner


KINDS = pytest.mark.parametrize("kind", ["cut", "sparse"])


@KINDS
def test_torchao_keeps_zeros_and_is_no_file_of_plain_tensors(kind: str, tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    for config in (torchao.Int8WeightOnlyConfig(), torchao.Int8DynamicActivationInt8WeightConfig()):
        net, pruner = pruned(kind)
        zero = {name: p == 0 for name, p in net.named_parameters() if p.dim() == 2}
        with torch.no_grad():
            wanted = net(X)
            torchao.quantize_(net, config)
            assert (net(X) - wanted).abs().max() < 0.05 * wanted.abs().max()
        layers = {name: p for name, p in net.named_parameters() if hasattr(p, "dequantize") and p.dim() == 2}
        assert [*layers] == [*zero]
        assert all(bool((layers[name].dequantize()[where] == 0).all()) for name, where in zero.items())
        assert sum(int(where.sum()) for where in zero.values()) > (0 if kind == "cut" else 8000) - 1
        with refused("Int8Tensor", "before it is quantised"):
            save_pruned(tmp_path, net, pruner.plan)
        assert list(tmp_path.iterdir()) == []


def test_weights_are_pruned_in_training_that_knows_of_int8_and_units_before_it() -> None:
    """torchao's scales of activations are of all units, those that will go too: masked and cut would differ."""
    torchao, qat = pytest.importorskip("torchao.quantization"), pytest.importorskip("torchao.quantization.qat")
    x, y = torch.randn(32, 6, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 2
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
    fake = {
        "activation_config": qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
        "weight_config": qat.IntxFakeQuantizeConfig(torch.int8, "per_channel"),
    }
    torchao.quantize_(net, qat.QATConfig(**fake, step="prepare"))
    with refused("FakeQuantizedLinear", "prune first"):
        Pruner(net, Magnitude(), structured=True, example_input=x, target_sparsity=0.5, schedule=OneShot())
    pruner = Pruner(net, Elementwise(), target_sparsity=0.75, steps_per_epoch=1, epochs=6)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    pruner.attach(optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    pruner.finish()
    zero = {name: p == 0 for name, p in net.named_parameters() if p.dim() == 2}
    assert sum(int(where.sum()) for where in zero.values()) == 96
    torchao.quantize_(net, qat.QATConfig(step="convert"))
    torchao.quantize_(net, torchao.Int8DynamicActivationInt8WeightConfig())
    found = {name: p for name, p in net.named_parameters() if p.dim() == 2}
    assert all(hasattr(p, "dequantize") for p in found.values())
    assert all(bool((found[name].dequantize()[where] == 0).all()) for name, where in zero.items())


def in_int8(net: nn.Module, folder: Path) -> Path:
    """onnxruntime's file, weights of 7 bits: processors without VNNI overflow with 8."""
    pytest.importorskip("onnxruntime")
    quantization = pytest.importorskip("onnxruntime.quantization")
    gsprune.export.to_onnx(net, X[:2], folder / "net.onnx")
    quantization.quantize_static(
        folder / "net.onnx",
        folder / "int8.onnx",
        Batches(X.split(16)),
        quant_format=quantization.QuantFormat.QDQ,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        reduce_range=True,
    )
    return folder / "int8.onnx"


def assert_close(given: np.ndarray, net: nn.Module) -> None:
    with torch.no_grad():
        wanted = net(X).numpy()
    assert np.abs(given - wanted).max() < 0.05 * np.abs(wanted).max()


@KINDS
def test_onnxruntime_keeps_zeros(kind: str, tmp_path: Path) -> None:
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    net, _ = pruned(kind)
    path = in_int8(net, tmp_path)
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    before = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "net.onnx").graph.initializer}
    whole = {name.removesuffix("_quantized"): value for name, value in tensors.items() if value.dtype == np.int8}
    weights = {name: value for name, value in before.items() if value.ndim > 1}
    found = 0
    for name, value in weights.items():
        assert not tensors[f"{name}_zero_point"].any()  # symmetric: an int8 of 0 is 0
        zeros = value == 0
        assert not whole[name][zeros].any()
        found += int(zeros.sum())
    assert len(weights) == 4
    assert (found > 8000) == (kind == "sparse")
    session = ort.InferenceSession(path)
    assert_close(session.run(None, {session.get_inputs()[0].name: X.numpy()})[0], net)


@KINDS
def test_openvino_reads_the_int8_file_and_keeps_it_small(kind: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    from gsprune.export.openvino_file import openvino_core

    net, _ = pruned(kind)
    network = openvino_core().read_model(in_int8(net, tmp_path))
    openvino.save_model(network, tmp_path / "int8.xml", compress_to_fp16=False)
    precision = {"INFERENCE_PRECISION_HINT": "f32"}  # by itself it takes bfloat16 where there is AMX, and then refuses
    compiled = openvino_core().compile_model(tmp_path / "int8.xml", "CPU", precision)
    assert_close(compiled(X.numpy())[0], net)
    weights = sum(p.numel() for p in net.parameters() if p.dim() > 1)
    assert weights < (tmp_path / "int8.bin").stat().st_size < 1.5 * weights  # a byte each, and what scales take


class Batches:
    """What onnxruntime calibrates with."""

    def __init__(self, batches: Any) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"input": batch.numpy()}


def test_tensors_that_are_quantised_are_never_taken_for_one(tmp_path: Path) -> None:
    """A quantised tensor has no memory of its own, so that two of a shape look tied."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    for layer in net:
        layer.weight = nn.Parameter(Eighths(layer.weight.detach()), requires_grad=False)  # type: ignore[assignment]
    with refused("0.weight", "Eighths", "before it is quantised"):
        save_pruned(tmp_path, net, None)


class Eighths(Tensor):
    """The smallest wrapper of another tensor that torch takes."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Eighths:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Eighths:
        return Eighths(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Eighths(func(args[0].inner))
        raise NotImplementedError(f"{func}")
