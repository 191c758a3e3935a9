"""Networks that leave PyTorch: ONNX files checked with onnxruntime, and `torch.export` programs.

Dense, masked (zeros in place) and shrunk networks alike; the batch stays free, every other size is the example's. Of a
decoder of transformers its forward pass leaves, without the cache of keys and values that `generate` passes on.
All work happens on a copy in evaluation mode. The extra `[onnx]` is imported only where a file is written.

>>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
>>> program = to_exported_program(net, torch.ones(1, 4))
>>> program.module()(torch.ones(5, 4)).shape
torch.Size([5, 3])
"""

from __future__ import annotations

import contextlib
import glob
import inspect
import io
import logging
import math
import os
import re
import traceback
import uuid
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gsprune.extras import EXTRAS, need
from gsprune.files.disk import aside
from gsprune.structures.attention import no_fast_path
from gsprune.structures.example import Example, arguments, call, map_tensors, plain, tensors_in
from gsprune.structures.twin import copy_of, refuse_wrapped
from gsprune.text.display import first_line

TOLERANCE = 1e-4  # of an output's largest value: float32 sums in another order stay a hundred times below
HALF_TOLERANCE = 1e-2
SINGLE_FILE = 2**31 - 2**26  # bytes of weights; a protobuf ends at 2 GiB, and the graph needs room too


def to_exported_program(model: nn.Module, example_input: Example) -> torch.export.ExportedProgram:
    """The network as `torch.export` has it, for any batch size, on the model's device.

    Every tensor of `example_input` whose first dimension is as long as that of its first tensor has the batch there.
    The program holds a copy of the weights, and `torch.export.save` writes it; the model is as it was.

    Args:
        example_input: a tensor, a tuple of positional or a dict of keyword arguments, a batch of any size from 1 up.

    Raises:
        ValueError: the model does not run on the example, its forward looks at the values of tensors or at the batch
            size, or torch.export cannot follow it.
    """
    twin = _copy(model)
    device = next((t.device for t in [*twin.parameters(), *twin.buffers()]), None)
    example = map_tensors(lambda tensor: plain(tensor).to(device), example_input)
    with _quietly():
        _run(twin, example)
        return _export(twin, example)


def to_onnx(
    model: nn.Module,
    example_input: Example,
    path: str | os.PathLike[str],
    *,
    tolerance: float | None = None,
    opset: int | None = None,
) -> float:
    """Write `model` to the ONNX file `path`, after checking it with onnxruntime against PyTorch's outputs.

    Both compute, on the CPU, the example and a batch of another size (1, or 3 where the example is a batch of 1). With
    a PyTorch's and b onnxruntime's values of one output, and the maxima taken over all its elements,

        difference = max |a - b| / max |a|

    The inputs of the file are called as the arguments of `forward`, its outputs as the keys of a returned dict, else
    `output` or `output_0`, `output_1`, ...; the free axis is `batch`. Up to 2 GB of weights the file stands alone;
    beyond, the weights lie beside it in `<name>.<8 digits>.data`, which moves with it.

    Args:
        example_input: as in `to_exported_program`; values that are not tensors become constants of the file.
        tolerance: the largest difference allowed; 1e-4 unless told, and 1e-2 where an output has half precision.
        opset: version of ONNX's operators; torch's choice unless told.

    Returns:
        The largest difference found.

    Raises:
        ValueError: as `to_exported_program`; the extra is not installed, an operator or `opset` is out of reach,
            onnxruntime disagrees (naming the largest difference), or `path` cannot be written. Nothing is left behind
            then, and an older file at `path` stays.
    """
    for module in EXTRAS["onnx"]:
        need(module)
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}: it must be above 0")
    twin, path = _copy(model).cpu(), Path(path)
    example = map_tensors(lambda tensor: plain(tensor).cpu(), example_input)
    with _writing(path) as files, _quietly(), no_fast_path():
        _save(_convert(twin, example, opset), files)
        return _check(twin, example, files.graph, tolerance)


# ---- the example: whatever starts with the batch, in batches of any size


def _batch_size(example_input: Example) -> int:
    first = next((leaf for leaf in tensors_in(example_input, floating=False) if leaf.dim()), None)
    if first is None:
        raise ValueError("the example input has no tensor with a batch dimension")
    if len(first) == 0:
        raise ValueError("the example input is an empty batch: it must hold 1 sample or more")
    return len(first)


def _at_batch(example_input: Example, size: int, *, found: list[Tensor] | None = None) -> Example:
    """The example with `size` rows: the first ones, or from the start again, then with floating numbers scaled.

    The tensors that have the batch are added to `found`.
    """
    batch = _batch_size(example_input)

    def resize(value: Tensor) -> Tensor:
        if not value.dim() or len(value) != batch:
            return value
        place = torch.arange(size, device=value.device)
        rows = value[place % batch]
        if value.is_floating_point():  # else all rows of a larger batch would be one
            scale = 1 - (place // batch) / 8
            rows = (rows * scale.view(-1, *[1] * (value.dim() - 1))).to(value.dtype)
        if found is not None:
            found.append(rows)
        return rows

    return map_tensors(resize, example_input)


def _arguments(model: nn.Module, example_input: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments, the latter in the order of `forward`: that of the exported inputs."""
    args, kwargs = arguments(example_input)
    known = [name for name in inspect.signature(model.forward).parameters if name in kwargs]
    return args, {name: kwargs[name] for name in dict.fromkeys([*known, *kwargs])}


# ---- torch.export


def _copy(model: nn.Module) -> nn.Module:
    refuse_wrapped(model)
    try:
        twin = copy_of(model).eval()
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be copied: {_first_line(error)}") from error
    for module in twin.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False
    return twin


def _run(model: nn.Module, example_input: Example) -> Any:
    """What the model returns, without gradients."""
    try:
        with torch.no_grad():
            return call(model, example_input)
    except Exception as error:
        batch = _batch_size(example_input)
        raise ValueError(
            f"{type(model).__name__} does not run on the example input as a batch of {batch}: {_first_line(error)}"
        ) from error


def _export(model: nn.Module, example_input: Example) -> torch.export.ExportedProgram:
    axes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    found: list[Tensor] = []
    size = max(_batch_size(example_input), 2)  # torch.export takes a size of one for a constant
    args, kwargs = _arguments(model, _at_batch(example_input, size, found=found))
    for tensor in found:
        axes[tensor] = {0: torch.export.Dim("batch")}
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=axes, strict=False)
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be exported: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    text = str(error)
    if "data-dependent" in text:
        return f"its forward takes another way depending on the values of a tensor{_place(error)}"
    if "Constraints violated" in text or "specialized" in text:
        return "its forward does not work alike for every batch size"
    return f"{_first_line(error)}{_place(error)}"


def _place(error: Exception) -> str:
    """The innermost line of the user's (or a library's, but not torch's) code."""
    ours = (str(Path(torch.__file__).parent), __file__)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # the exporter wraps the reason in advice of a page
        error = error.__cause__
    return first_line(error).rstrip(".")


# ---- ONNX


def _convert(model: nn.Module, example_input: Example, opset: int | None) -> Any:
    """The network as torch's `ONNXProgram`."""
    result = _run(model, example_input)
    program = _export(model, example_input)
    names = _output_names(result, program.graph_signature)
    try:
        converted: Any = torch.onnx.export(
            program, dynamo=True, optimize=True, verbose=False, output_names=names, opset_version=opset
        )
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be written as ONNX: {_first_line(error)}") from error
    reached = converted.model.opset_imports.get("")
    if opset not in (None, reached):  # the exporter only logs it
        raise ValueError(f"{type(model).__name__} cannot be written with opset {opset}: torch gives opset {reached}")
    _tidy(converted)
    return converted


def _tidy(converted: Any) -> None:
    """The free axis gets its name, and the lines of source code with their paths on this machine go."""
    graphs = [converted.model.graph, *converted.model.functions.values()]
    for node in (node for graph in graphs for node in import_module("onnx_ir").traversal.RecursiveGraphIterator(graph)):
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    free = next((d for value in converted.model.graph.inputs for d in value.shape if not isinstance(d, int)), None)
    if free is not None and hasattr(converted, "rename_axes"):  # an older torch leaves a symbol's name, as s77
        converted.rename_axes({free: "batch"})


def _output_names(result: Any, signature: Any) -> list[str] | None:
    """None, and with it torch's own names, where an output is also an input or is returned twice."""
    if isinstance(result, Mapping) and all(value is None or isinstance(value, Tensor) for value in result.values()):
        names = [str(key) for key, value in result.items() if value is not None]
    elif isinstance(result, Tensor):
        names = ["output"]
    else:
        names = [f"output_{place}" for place in range(len(_tensors(result)))]
    values = [name for name in signature.user_outputs if isinstance(name, str)]
    distinct = len(names) == len(set(names)) == len(values) == len(set(values))
    return names if distinct and not {*names, *values} & {str(name) for name in signature.user_inputs} else None


def _tensors(value: Any) -> list[Tensor]:
    return list(tensors_in(value, floating=False))


class _Files(NamedTuple):
    graph: Path
    weights: Path


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[_Files]:
    """Where to write: a file that becomes `path` at the end, and one for weights that do not fit into it.

    The second has a name of its own, so that an older file keeps its weights until it is replaced.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file in it")
    weights = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.data")
    try:
        with aside(path) as graph:
            graph.touch()  # a folder that cannot be written to shows now, not after the work
            yield _Files(graph, weights)
    except BaseException as error:
        with contextlib.suppress(OSError):  # most of the time there is none
            weights.unlink()
        if isinstance(error, OSError):
            raise ValueError(f"{path} cannot be written: {error.filename}: {error.strerror}") from error
        raise
    for older in path.parent.glob(f"{glob.escape(path.name)}.*.data"):
        if older != weights and re.fullmatch(r"\.[0-9a-f]{8}\.data", older.name.removeprefix(path.name)):
            older.unlink(missing_ok=True)


def _save(program: Any, files: _Files) -> None:
    onnx_ir = import_module("onnx_ir")
    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    if size <= SINGLE_FILE:
        onnx_ir.save(program.model, files.graph)
        return
    onnx_ir.save(program.model, files.graph, external_data=files.weights.name)
    with files.weights.open("rb+") as file:
        os.fsync(file.fileno())


# ---- the check


class _Gap(NamedTuple):
    """How far one output is from PyTorch's, and where."""

    difference: float
    allowed: float
    output: str
    batch: int


def _check(model: nn.Module, example_input: Example, path: Path, tolerance: float | None) -> float:
    """The largest difference between `path` and `model`; ValueError when it is too large."""
    batch = _batch_size(example_input)
    session = _session(model, path)
    gaps: list[_Gap] = []
    for size in (batch, 1 if batch > 1 else 3):
        gaps += _gaps(model, session, _at_batch(example_input, size), size, tolerance)
    worst = max(gaps, key=lambda gap: gap.difference / gap.allowed)
    if not worst.difference <= worst.allowed:
        raise ValueError(
            f"the ONNX file of {type(model).__name__} does not compute what PyTorch does: the largest difference is "
            f"{worst.difference:.3g} of the largest value of {worst.output!r} (batch of {worst.batch}), "
            f"{worst.allowed:.3g} is allowed"
        )
    return max(gap.difference for gap in gaps)


def _session(model: nn.Module, path: Path) -> Any:
    onnxruntime = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValueError(f"onnxruntime cannot read {type(model).__name__} as ONNX: {_first_line(error)}") from error


def _gaps(model: nn.Module, session: Any, example_input: Example, size: int, tolerance: float | None) -> Iterator[_Gap]:
    fed = _tensors(_arguments(model, example_input))
    inputs = {node.name: tensor.numpy() for node, tensor in zip(session.get_inputs(), fed, strict=True)}
    wanted = _tensors(_run(model, example_input))
    try:
        given = session.run(None, inputs)
    except Exception as error:
        raise ValueError(
            f"onnxruntime cannot run {type(model).__name__} on a batch of {size}: {_first_line(error)}"
        ) from error
    for node, a, b in zip(session.get_outputs(), wanted, given, strict=True):
        half = a.dtype in (torch.float16, torch.bfloat16)
        allowed = tolerance or (HALF_TOLERANCE if half else TOLERANCE)
        yield _Gap(_difference(a.double().numpy(), b.astype(np.float64)), allowed, node.name, size)


def _difference(a: Any, b: Any) -> float:
    """max |a - b| / max |a|; infinite where the shapes or the places of what is not finite differ.

    >>> _difference(np.array([1.0, -4.0]), np.array([1.0, -3.0]))
    0.25
    >>> _difference(np.array([np.nan, 0.0]), np.array([np.nan, 0.0])), _difference(np.zeros(2), np.zeros(3))
    (0.0, inf)
    """
    if a.shape != b.shape:
        return math.inf
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
        return math.inf
    largest = np.abs(a[finite]).max(initial=0.0)
    apart = np.abs(a[finite] - b[finite]).max(initial=0.0)
    return float(apart / largest) if largest else (math.inf if apart else 0.0)


# ---- surroundings


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Nothing on the console: the exporters print graphs, warn and log; what matters comes as an error.

    For the whole process, as Python has no other way: what another thread prints or logs meanwhile is lost.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
