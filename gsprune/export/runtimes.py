"""The runtimes that a network ships in: PyTorch as it is, `torch.compile`, onnxruntime, OpenVINO; for their times.

`Measure.prepared` gives a network, and `Measure.prepared_layer` one layer of it, ready to run there with its input: a
module that is called without arguments, which `gsprune.latency.latency_ms` times. onnxruntime and OpenVINO compute on
the CPU, whatever device the network is on. A linear or convolutional layer is written as its ONNX operator at once,
since torch's exporter takes a second for each.

>>> layer = EAGER.prepared(nn.Linear(2, 3), torch.ones(1, 2))
>>> layer().shape
torch.Size([1, 3])
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gsprune.export.exported_program import arguments_in_order, at_batch, copy_to_export, innermost_line, quietly
from gsprune.export.onnx_file import to_onnx_program
from gsprune.export.openvino_file import openvino_core
from gsprune.extras import EXTRAS, need
from gsprune.structures.attention import no_fast_path
from gsprune.structures.example import Example, arguments, map_tensors, plain, tensors_in
from gsprune.structures.matrices import is_conv1d

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
OPSET, IR_VERSION = 17, 8  # old enough for every onnxruntime that the extra allows
RuntimeName = Literal["eager", "compile", "onnxruntime", "openvino"]
RUNTIMES = get_args(RuntimeName)
NAMES = {"compile": "torch.compile", "onnxruntime": "onnxruntime", "openvino": "OpenVINO"}


@dataclass(frozen=True)
class Measure:
    """Where a forward pass is timed.

    Attributes:
        runtime: "eager", "compile", "onnxruntime" or "openvino".
        batch: samples of a pass; None: those of the example input.
        threads: of the pass on a CPU; None: `torch.get_num_threads()`.

    >>> print(f"5 ms{Measure('onnxruntime', batch=8)}"), print(f"5 ms{Measure()}")
    5 ms in onnxruntime, batch 8
    5 ms
    (None, None)
    """

    runtime: str = "eager"
    batch: int | None = None
    threads: int | None = None

    def __str__(self) -> str:
        where = [f"in {NAMES[self.runtime]}"] if self.runtime in NAMES else []
        where += [f"batch {self.batch}"] if self.batch else []
        where += [f"{self.threads} thread{'s' if self.threads > 1 else ''}"] if self.threads else []
        return f" {', '.join(where)}" if where else ""

    @property
    def is_foreign(self) -> bool:
        """Whether another library than torch runs the network."""
        return self.runtime in ("onnxruntime", "openvino")

    def check(self) -> None:
        """ValueError where the runtime is not here."""
        if self.is_foreign:
            for module in (*EXTRAS["onnx"], *(["openvino"] if self.runtime == "openvino" else [])):
                need(module)
        if self.runtime == "compile" and not torch.cuda.is_available() and not _compiler():
            raise ValueError("budget.runtime is 'compile', which needs a C++ compiler on this machine: there is none")

    def inputs(self, example_input: Example) -> Example:
        """The example with `batch` samples."""
        return example_input if self.batch is None else at_batch(example_input, self.batch)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The number of threads, for as long as it lasts."""
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(self.threads or before)
            yield
        finally:
            torch.set_num_threads(before)

    def prepared(self, model: nn.Module, inputs: Example) -> nn.Module:
        """The network with its input, ready to run; the model is as it was.

        Raises:
            ValueError: it cannot be exported, or the runtime cannot read or run it.
        """
        args, kwargs = arguments(inputs)
        if self.runtime == "compile":
            return _Compiled(model, args, kwargs)
        if not self.is_foreign:
            return Call(model, args, kwargs)
        twin = copy_to_export(model).cpu()
        example = map_tensors(lambda tensor: plain(tensor).cpu(), inputs)
        with quietly(), no_fast_path():
            program = to_onnx_program(twin, example)
        fed = [*tensors_in(arguments_in_order(twin, example), floating=False)]
        return self.session(import_module("onnx_ir").to_proto(program.model), fed, type(model).__name__)

    def prepared_layer(self, layer: nn.Module, x: Tensor) -> nn.Module:
        """A linear or convolutional layer with its input, ready to run; of torch.compile as it is."""
        if not self.is_foreign:
            return Call(layer, (x,), {})
        layer, x = as_convolution(layer, x) or (layer, x)
        x = x.detach().float().cpu().contiguous()
        graph = operator(layer, x)
        return self.prepared(layer, x) if graph is None else self.session(graph, [x], type(layer).__name__)

    def session(self, graph: Any, inputs: list[Tensor], name: str) -> nn.Module:
        """A graph of ONNX with its input, ready to run in a foreign runtime."""
        kind = _OnnxRuntime if self.runtime == "onnxruntime" else _OpenVino
        try:
            found = kind(graph, [tensor.numpy() for tensor in inputs], self.threads or torch.get_num_threads())
            found()
        except Exception as error:
            raise ValueError(f"{NAMES[self.runtime]} cannot run {name}: {innermost_line(error)}") from error
        return found


EAGER = Measure()


class Call(nn.Module):
    """A module together with its input, so that modules with different inputs can take turns."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.module, self.args, self.kwargs = module, args, kwargs

    def forward(self) -> Any:
        return self.module(*self.args, **self.kwargs)


class _Compiled(Call):
    """Compiled for these shapes alone, at the first call. Each network counts as a new one: torch stops at 8."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().__init__(module, args, kwargs)
        self._run: Callable[..., Any] = torch.compile(module, dynamic=False)
        self._is_new = True

    def forward(self) -> Any:
        if not self._is_new:
            return self._run(*self.args, **self.kwargs)
        config: Any = import_module("torch._dynamo.config")
        names = [
            n for n in ("recompile_limit", "accumulated_recompile_limit", "cache_size_limit") if hasattr(config, n)
        ]
        try:
            with config.patch(dict.fromkeys(names, 1_000_000)), quietly():
                found = self._run(*self.args, **self.kwargs)
        except Exception as error:
            raise ValueError(
                f"torch.compile cannot run {type(self.module).__name__}: {innermost_line(error)}"
            ) from error
        self._is_new = False
        return found


class _OnnxRuntime(nn.Module):
    def __init__(self, graph: Any, inputs: list[Any], threads: int) -> None:
        super().__init__()
        onnxruntime = import_module("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 4, threads
        options.add_session_config_entry("session.force_spinning_stop", "1")  # others take turns with it
        content = graph.SerializeToString()
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self._fed = {node.name: value for node, value in zip(self._session.get_inputs(), inputs, strict=True)}

    def forward(self) -> Any:
        return self._session.run(None, self._fed)


class _OpenVino(nn.Module):
    def __init__(self, graph: Any, inputs: list[Any], threads: int) -> None:
        super().__init__()
        core = openvino_core()
        network = core.read_model(graph.SerializeToString(), b"")
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        self._request = core.compile_model(network, "CPU", settings).create_infer_request()
        self._fed = dict(enumerate(inputs))

    def forward(self) -> Any:
        return self._request.infer(self._fed)


def _compiler() -> str | None:
    return next((found for name in ("g++", "clang++", "cl") if (found := shutil.which(name))), None)


# ---- a layer as one ONNX operator


def operator(layer: nn.Module, x: Tensor) -> Any:
    """A graph of one layer for inputs like `x`, as ONNX's ModelProto; None of a layer that has no operator, or computes
    something of its own besides.

    nn.Linear is Gemm (of two dimensions) or MatMul and Add, as torch's exporter writes it; transformers' Conv1D is
    MatMul and Add; convolutions are Conv and ConvTranspose.
    """
    settings = _conv_settings(layer)
    if not (_is_stock(layer) or is_conv1d(layer)):
        return None
    onnx: Any = import_module("onnx")
    named: dict[str, Tensor] = {n: p.detach().float().cpu() for n, p in layer.named_parameters(recurse=False)}
    if "weight" not in named or set(named) - {"weight", "bias"}:
        return None
    node = onnx.helper.make_node
    inputs = ["x", *named]
    if settings is not None:
        kind = "ConvTranspose" if getattr(layer, "transposed", False) else "Conv"
        nodes = [node(kind, inputs, ["y"], **settings)]
    elif isinstance(layer, nn.Linear) and x.dim() == 2:
        nodes = [node("Gemm", inputs, ["y"], transB=1)]
    else:
        if isinstance(layer, nn.Linear):
            named["weight"] = named["weight"].T
        last = "xw" if "bias" in named else "y"
        nodes = [node("MatMul", ["x", "weight"], [last])]
        nodes += [node("Add", ["xw", "bias"], ["y"])] if "bias" in named else []
    values = [onnx.numpy_helper.from_array(p.contiguous().numpy(), n) for n, p in named.items()]
    floats = onnx.TensorProto.FLOAT
    given = onnx.helper.make_tensor_value_info("x", floats, list(x.shape))
    taken = onnx.helper.make_tensor_value_info("y", floats, None)
    graph = onnx.helper.make_graph(nodes, "layer", [given], [taken], values)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def as_convolution(layer: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor] | None:
    """The one convolution that a layer comes down to, with its input, where it pads or scales its weight by itself.

    None of a plain layer, of what is no convolution, and where there is not exactly one.

    >>> mirrored = nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")
    >>> plain_layer, padded = as_convolution(mirrored, torch.ones(1, 2, 4, 4))
    >>> plain_layer.padding, padded.shape[2:]
    ((0, 0), torch.Size([6, 6]))
    """
    if _is_stock(layer) or not isinstance(layer, nn.modules.conv._ConvNd):
        return None
    calls = _Convolutions()
    with torch.no_grad(), calls:
        layer(x)
    if len(calls.seen) != 1:
        return None
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = calls.seen[0]
    rows, columns = weight.shape[:2]
    channels = (rows, columns * groups) if transposed else (columns * groups, rows)
    shape: dict[str, Any] = {"kernel_size": tuple(weight.shape[2:]), "stride": tuple(stride), "padding": tuple(padding)}
    shape |= {"dilation": tuple(dilation), "groups": groups, "bias": bias is not None, "device": "meta"}
    shape |= {"output_padding": tuple(output_padding)} if transposed else {}
    kind = next(c for c in CONVOLUTIONS if c.__name__ == f"Conv{'Transpose' * transposed}{weight.dim() - 2}d")
    found = kind(*channels, **shape)
    found.weight = nn.Parameter(weight.detach())
    found.bias = None if bias is None else nn.Parameter(bias.detach())
    return found.eval(), x


class _Convolutions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the arguments of each convolution."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.seen.append(args)
        return func(*args, **(kwargs or {}))


def _is_stock(layer: Any) -> bool:
    """Whether a layer computes what its class of torch does, with a weight of its own and zeros around it."""
    kind = next((c for c in (nn.Linear, *CONVOLUTIONS) if isinstance(layer, c)), None)
    methods = ("forward", "_conv_forward")
    is_own = any(getattr(type(layer), name, None) is not getattr(kind, name, None) for name in methods)
    plain_weight = kind is not None and "weight" in layer._parameters
    return plain_weight and not is_own and getattr(layer, "padding_mode", "zeros") == "zeros"


def _conv_settings(layer: Any) -> dict[str, Any] | None:
    """The attributes of ONNX's operator; None of what is no convolution."""
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return None
    if isinstance(layer.padding, str):
        ends = layer._reversed_padding_repeated_twice  # of the last dimension first
        pads = [*ends[::2][::-1], *ends[1::2][::-1]]
    else:
        pads = [*layer.padding, *layer.padding]
    settings = {"strides": [*layer.stride], "dilations": [*layer.dilation], "pads": pads, "group": layer.groups}
    return settings | ({"output_padding": [*layer.output_padding]} if layer.transposed else {})
