"""A network as an ONNX file, checked with onnxruntime against PyTorch's outputs.

The extra `[onnx]` is imported only where a file is written.
"""

from __future__ import annotations

import contextlib
import glob
import math
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gsprune.export.exported_program import (
    all_tensors,
    arguments_in_order,
    at_batch,
    batch_size,
    copy_to_export,
    exported,
    innermost_line,
    quietly,
    run_once,
)
from gsprune.extras import EXTRAS, need
from gsprune.files.disk import aside
from gsprune.structures.attention import no_fast_path
from gsprune.structures.example import Example, map_tensors, plain

TOLERANCE = 1e-4  # of an output's largest value: float32 sums in another order stay a hundred times below
HALF_TOLERANCE = 1e-2
SINGLE_FILE = 2**31 - 2**26  # bytes of weights; a protobuf ends at 2 GiB, and the graph needs room too


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
    twin, path = copy_to_export(model).cpu(), Path(path)
    example = map_tensors(lambda tensor: plain(tensor).cpu(), example_input)
    with _writing(path) as files, quietly(), no_fast_path():
        _save(to_onnx_program(twin, example, opset), files)
        return _check(twin, example, files.graph, tolerance)


# ---- ONNX


def to_onnx_program(model: nn.Module, example_input: Example, opset: int | None = None) -> Any:
    """The network, in eval mode and on the CPU, as torch's `ONNXProgram`."""
    result = run_once(model, example_input)
    program = exported(model, example_input)
    names = _output_names(result, program.graph_signature)
    try:
        converted: Any = torch.onnx.export(
            program, dynamo=True, optimize=True, verbose=False, output_names=names, opset_version=opset
        )
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be written as ONNX: {innermost_line(error)}") from error
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
        names = [f"output_{place}" for place in range(len(all_tensors(result)))]
    values = [name for name in signature.user_outputs if isinstance(name, str)]
    distinct = len(names) == len(set(names)) == len(values) == len(set(values))
    return names if distinct and not {*names, *values} & {str(name) for name in signature.user_inputs} else None


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
    batch = batch_size(example_input)
    session = _session(model, path)
    gaps: list[_Gap] = []
    for size in (batch, 1 if batch > 1 else 3):
        gaps += _gaps(model, session, at_batch(example_input, size), size, tolerance)
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
        raise ValueError(f"onnxruntime cannot read {type(model).__name__} as ONNX: {innermost_line(error)}") from error


def _gaps(model: nn.Module, session: Any, example_input: Example, size: int, tolerance: float | None) -> Iterator[_Gap]:
    fed = all_tensors(arguments_in_order(model, example_input))
    inputs = {node.name: tensor.numpy() for node, tensor in zip(session.get_inputs(), fed, strict=True)}
    wanted = all_tensors(run_once(model, example_input))
    try:
        given = session.run(None, inputs)
    except Exception as error:
        raise ValueError(
            f"onnxruntime cannot run {type(model).__name__} on a batch of {size}: {innermost_line(error)}"
        ) from error
    for node, a, b in zip(session.get_outputs(), wanted, given, strict=True):
        half = a.dtype in (torch.float16, torch.bfloat16)
        allowed = tolerance or (HALF_TOLERANCE if half else TOLERANCE)
        yield _Gap(difference(a.double().numpy(), b.astype(np.float64)), allowed, node.name, size)


def check_outputs(
    runtime: str, model: nn.Module, runs: Iterable[tuple[Sequence[Tensor], Sequence[np.ndarray]]], tolerance: float
) -> float:
    """The largest difference between PyTorch's outputs and a runtime's, over some batches.

    Raises:
        ValueError: they are not as many, or differ by more than the tolerance.
    """
    found = 0.0
    for wanted, given in runs:
        if len(given) != len(wanted):
            raise ValueError(f"{runtime} gives {len(given)} outputs of {type(model).__name__}, PyTorch {len(wanted)}")
        pairs = zip(wanted, given, strict=True)
        found = max([found, *(difference(a.double().numpy(), b.astype(np.float64)) for a, b in pairs)])
    if not found <= tolerance:
        raise ValueError(
            f"{runtime} does not compute what PyTorch does with {type(model).__name__}: the largest difference is "
            f"{found:.3g} of an output's largest value, {tolerance:.3g} is allowed"
        )
    return found


def difference(a: Any, b: Any) -> float:
    """max |a - b| / max |a|; infinite where the shapes or the places of what is not finite differ.

    >>> difference(np.array([1.0, -4.0]), np.array([1.0, -3.0]))
    0.25
    >>> difference(np.array([np.nan, 0.0]), np.array([np.nan, 0.0])), difference(np.zeros(2), np.zeros(3))
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
