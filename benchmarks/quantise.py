"""Prune, then quantise: accuracy, size and speed of dense, cut and sparse networks in float32 and int8.

    python benchmarks/quantise.py          # two minutes; prints a Markdown table

A perceptron (64-512-512-10) and a conv net are trained on scikit-learn's digits. "cut": half of the MACs, by
`gsprune.cut`; "cut by 16": the same in multiples of 16 units; "sparse": 80 % of the single weights zero. Scales of
activations come from 256 training samples. Every quantiser leaves weights 7 bits (`reduce_range`), as processors
without VNNI overflow with 8.

- OpenVINO reads the int8 file that ONNX Runtime writes; ExecuTorch's comes from its quantiser for XNNPACK, 8 bits.
- torchao quantises linear layers: of the conv net the last one.
- "zeros": of the weights that are zero before, those that are zero after, too.
- "zipped": the file, deflated, which is where a sparse network saves.
- Milliseconds are the fastest of 200 passes of 64 samples, all in turns, on one thread; eager in PyTorch.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gsprune

BATCH, PASSES, CALIBRATION = 64, 200, 256
FORMS = ("dense", "cut", "cut by 16", "sparse")


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test samples: pictures of 1 x 8 x 8, and labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    x = torch.tensor(found.images[order] / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(found.target[order])
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def conv_net() -> nn.Module:
    from gsprune.zoo.models import convnet

    return convnet(image_size=8, in_channels=1, num_classes=10, width=32)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"perceptron": perceptron, "conv net": conv_net}


def trained(make: Callable[[], nn.Module], x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(0)
    net = make().train()
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    for _ in range(15):
        for part in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
    return net.eval()


def pruned(net: nn.Module, form: str, data: list[tuple[Tensor, Tensor]]) -> nn.Module:
    if form == "cut":
        return gsprune.cut(net, data, F.cross_entropy, macs=0.5, progress=False).model.eval()
    if form == "cut by 16":
        budget = {"macs": 0.5, "round_to": 16}
        return gsprune.cut(net, data, F.cross_entropy, budget=budget, progress=False).model.eval()
    if form == "sparse":
        return gsprune.cut(net, data, F.cross_entropy, sparsity=0.8, pattern="1x1", progress=False).model.eval()
    return net


# ---- the ways to run them


class Way(NamedTuple):
    run: Callable[[Tensor], Tensor]
    weights: dict[str, Tensor]  # as it multiplies with them, by name
    paths: list[Path]


def eager(net: nn.Module, x: Tensor, folder: Path) -> Way:
    path = folder / "eager.pt"
    torch.save(net.state_dict(), path)
    weights = {
        name: (p.dequantize() if hasattr(p, "dequantize") else p).detach()
        for name, p in net.named_parameters()
        if p.dim() > 1
    }
    return Way(net, weights, [path])


def torchao_dynamic(net: nn.Module, x: Tensor, folder: Path) -> Way:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    net = copy.deepcopy(net)
    quantize_(net, Int8DynamicActivationInt8WeightConfig(reduce_range=True))
    return eager(net, x, folder)


def torchao_static(net: nn.Module, x: Tensor, folder: Path) -> Way:
    from torchao.quantization import Int8StaticActivationInt8WeightConfig, PerRow, PerTensor, quantize_

    net = copy.deepcopy(net)
    for name, largest in largest_inputs(net, x).items():
        scale = (largest / 63).reshape(1, 1)
        config = Int8StaticActivationInt8WeightConfig(
            act_quant_scale=scale, granularity=[PerTensor(), PerRow()], reduce_range=True
        )
        quantize_(net, config, lambda module, found, name=name: found == name)
    return eager(net, x, folder)


def largest_inputs(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The largest magnitude that each linear layer reads."""
    found: dict[str, Tensor] = {}

    def noting(name: str) -> Callable[..., None]:
        def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            found[name] = given[0].abs().max()

        return note

    layers = {name: module for name, module in net.named_modules() if type(module) is nn.Linear}
    hooks = [module.register_forward_pre_hook(noting(name)) for name, module in layers.items()]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return found


def onnx_float(net: nn.Module, x: Tensor, folder: Path) -> Way:
    path = folder / "float.onnx"
    gsprune.export.to_onnx(net, x[:2], path)
    return in_onnxruntime(path)


def onnx_static(net: nn.Module, x: Tensor, folder: Path) -> Way:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    (path,) = onnx_float(net, x, folder).paths
    quantize_static(
        path,
        folder / "int8.onnx",
        Calibration(path, x),  # type: ignore[arg-type]
        quant_format=QuantFormat.QDQ,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=True,
    )
    return in_onnxruntime(folder / "int8.onnx")


class Calibration:
    """What onnxruntime reads scales from."""

    def __init__(self, path: Path, x: Tensor) -> None:
        import onnx

        self._name = onnx.load(path).graph.input[0].name
        self._batches: Iterator[Tensor] = iter(x.split(BATCH))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch.numpy()}


def in_onnxruntime(path: Path) -> Way:
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    (given,) = session.get_inputs()

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {given.name: x.numpy()})[0])

    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    weights = {
        name.removesuffix("_quantized"): torch.from_numpy(value.astype(np.float32))
        for name, value in tensors.items()
        if value.ndim > 1 and value.dtype in (np.float32, np.int8)
    }
    return Way(run, weights, [path])


def openvino_float(net: nn.Module, x: Tensor, folder: Path) -> Way:
    return in_openvino(onnx_float(net, x, folder))


def openvino_static(net: nn.Module, x: Tensor, folder: Path) -> Way:
    return in_openvino(onnx_static(net, x, folder))


def in_openvino(made: Way) -> Way:
    """The file of a way of ONNX Runtime, as OpenVINO's two files."""
    import openvino

    from gsprune.export.openvino_file import openvino_core

    (path,) = made.paths
    network, written = openvino_core().read_model(path), path.with_suffix(".xml")
    openvino.save_model(network, written, compress_to_fp16=False)
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino_core().compile_model(written, "CPU", settings)

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(compiled(x.numpy())[0])

    return Way(run, made.weights, [written, written.with_suffix(".bin")])


def executorch_float(net: nn.Module, x: Tensor, folder: Path) -> Way:
    gsprune.export.to_executorch(net, x[:BATCH], folder / "float.pte")
    return in_executorch(folder / "float.pte", eager(net, x, folder).weights)


def executorch_static(net: nn.Module, x: Tensor, folder: Path) -> Way:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    settings = xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True)
    quantizer = xnnpack_quantizer.XNNPACKQuantizer().set_global(settings)
    observed = prepare_pt2e(torch.export.export(net, (x[:BATCH],)).module(), quantizer)
    for part in x.split(BATCH):
        observed(part)
    made = convert_pt2e(observed)
    program = to_edge_transform_and_lower(
        torch.export.export(made, (x[:BATCH],)), partitioner=[XnnpackPartitioner()]
    ).to_executorch()
    (folder / "int8.pte").write_bytes(program.buffer)
    names = [name for name, parameter in net.named_parameters() if parameter.dim() > 1]
    tensors = [value for value in made.state_dict().values() if value.dtype == torch.int8 and value.dim() > 1]
    return in_executorch(folder / "int8.pte", dict(zip(names, tensors, strict=True)))


def in_executorch(path: Path, weights: dict[str, Tensor]) -> Way:
    """A program for batches of `BATCH`, on one thread."""
    import executorch.kernels.quantized  # noqa: F401 - what XNNPACK leaves of int8 needs these operators
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(1)
    data = path.read_bytes()  # the program reads it for as long as it runs
    method = Runtime.get().load_program(data).load_method("forward")

    def run(x: Tensor, data: bytes = data) -> Tensor:
        parts = [F.pad(part, (0, 0, 0, 0, 0, 0, 0, BATCH - len(part))) for part in x.split(BATCH)]
        return torch.cat([torch.as_tensor(method.execute([part])[0]).clone() for part in parts])[: len(x)]

    return Way(run, weights, [path])


WAYS: dict[str, Callable[[nn.Module, Tensor, Path], Way]] = {
    "PyTorch, float32": eager,
    "torchao, int8 dynamic": torchao_dynamic,
    "torchao, int8 static": torchao_static,
    "ONNX Runtime, float32": onnx_float,
    "ONNX Runtime, int8 static": onnx_static,
    "OpenVINO, float32": openvino_float,
    "OpenVINO, int8 static": openvino_static,
    "ExecuTorch, float32": executorch_float,
    "ExecuTorch, int8 static": executorch_static,
}


# ---- the table


class Row(NamedTuple):
    network: str
    form: str
    way: str
    accuracy: float
    zeros: tuple[int, int]  # before, and those of them that stay
    bytes: int
    zipped: int
    run: Callable[[Tensor], Tensor]


def measured(name: str, form: str, net: nn.Module, x: Tensor, test: tuple[Tensor, Tensor]) -> list[Row]:
    rows = []
    for way, prepare in WAYS.items():
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            through_onnx = way.startswith(("ONNX", "OpenVINO"))
            before = (onnx_float if through_onnx else eager)(net, x, Path(folder)).weights
            made = prepare(net, x, Path(folder))
            right = float((made.run(test[0]).argmax(1) == test[1]).float().mean())
            assert made.weights.keys() == before.keys(), (way, made.weights.keys(), before.keys())
            zeros = sum(int((value == 0).sum()) for value in before.values())
            stay = sum(int(((value == 0) & (made.weights[key] == 0)).sum()) for key, value in before.items())
            data = b"".join(path.read_bytes() for path in made.paths)
        rows.append(Row(name, form, way, right, (zeros, stay), len(data), len(zlib.compress(data)), made.run))
    return rows


def milliseconds(rows: list[Row], x: Tensor) -> list[float]:
    """The fastest pass of each, all in turns: work beside it only adds."""
    seconds: list[list[float]] = [[] for _ in rows]
    with torch.no_grad():
        for turn in range(PASSES + 5):
            for row, found in zip(rows, seconds, strict=True):
                begin = time.perf_counter()
                row.run(x)
                if turn >= 5:
                    found.append(time.perf_counter() - begin)
    return [1000 * min(found) for found in seconds]


def table(rows: list[Row], ms: list[float]) -> str:
    lines = ["| network | | accuracy, % | zeros that stay | kB | zipped | ms |", "|---|---|---:|---:|---:|---:|---:|"]
    for row, time_ms in zip(rows, ms, strict=True):
        zeros = f"{row.zeros[1]:,} of {row.zeros[0]:,}" if row.form == "sparse" else "-"
        lines.append(
            f"| {row.network}, {row.form} | {row.way} | {100 * row.accuracy:.1f} | {zeros} "
            f"| {row.bytes / 1000:.0f} | {row.zipped / 1000:.0f} | {time_ms:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: Any = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NETWORKS)}")
    names = parser.parse_args(arguments).names or [*NETWORKS]
    torch.set_num_threads(1)
    (x, y), test = digits()
    data = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    rows: list[Row] = []
    for name in names:
        dense = trained(NETWORKS[name], x, y)
        for form in FORMS:
            rows += measured(name, form, pruned(dense, form, data), x[:CALIBRATION], test)
    print(table(rows, milliseconds(rows, x[:BATCH])))
    return int(any(row.zeros[0] != row.zeros[1] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
