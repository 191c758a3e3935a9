"""A network as OpenVINO's two files, checked with OpenVINO against PyTorch's outputs.

The extras `[onnx]` and `[openvino]` are imported only where files are written.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from gsprune.export.exported_program import (
    all_tensors,
    arguments_in_order,
    at_batch,
    batch_size,
    copy_to_export,
    innermost_line,
    quietly,
    run_once,
)
from gsprune.export.onnx_file import TOLERANCE, check_outputs, to_onnx
from gsprune.extras import need
from gsprune.structures.attention import no_fast_path
from gsprune.structures.example import Example, map_tensors, plain


def to_openvino(
    model: nn.Module, example_input: Example, path: str | os.PathLike[str], *, tolerance: float = TOLERANCE
) -> float:
    """Write `model` to `path` (an .xml file) and the weights to the .bin file beside it, for OpenVINO's runtimes.

    The network goes through ONNX (`to_onnx`). Both compute, on the CPU and in float32, the example and a batch of
    another size; the difference is that of `to_onnx`.

    Args:
        example_input: as of `to_onnx`.
        path: ends with ".xml".
        tolerance: the largest difference allowed, above 0.

    Returns:
        The largest difference found.

    Raises:
        ValueError: as of `to_onnx`; the extra is not installed, `path` does not end with ".xml", OpenVINO cannot read
            the network or computes something else. Files at `path` stay as they were then.
    """
    openvino: Any = need("openvino")
    core, path = openvino_core(), Path(path)
    if path.suffix != ".xml":
        raise ValueError(f"{path} does not end with .xml, as OpenVINO's networks do")
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}: it must be above 0")
    with tempfile.TemporaryDirectory(prefix="openvino-", ignore_cleanup_errors=True) as folder:
        graph = Path(folder) / "network.onnx"
        to_onnx(model, example_input, graph)
        try:
            network = core.read_model(graph)
            compiled = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        except Exception as error:
            raise ValueError(f"OpenVINO cannot read {type(model).__name__}: {innermost_line(error)}") from error
        found = check_outputs("OpenVINO", model, _runs(model, example_input, compiled), tolerance)
        written = Path(folder) / "network.xml"
        openvino.save_model(network, written, compress_to_fp16=False)
        _move(written, path)
    return found


@functools.cache
def openvino_core() -> Any:
    """OpenVINO, for as long as the process lasts: once its plugins are unloaded, a signal ends the process."""
    return need("openvino").Core()


def _runs(
    model: nn.Module, example_input: Example, compiled: Any
) -> Iterator[tuple[Sequence[Tensor], Sequence[np.ndarray]]]:
    """Outputs of PyTorch and of OpenVINO, of the example and of another number of samples."""
    twin = copy_to_export(model).cpu()
    example = map_tensors(lambda tensor: plain(tensor).cpu(), example_input)
    batch = batch_size(example)
    for size in (batch, 1 if batch > 1 else 3):
        rows = at_batch(example, size)
        with no_fast_path(), quietly():
            wanted = all_tensors(run_once(twin, rows))
        fed = [tensor.numpy() for tensor in all_tensors(arguments_in_order(twin, rows))]
        yield wanted, [np.asarray(value) for value in compiled(fed).values()]


def _move(written: Path, path: Path) -> None:
    """The weights first: a graph never stands beside weights of another network for long."""
    try:
        for suffix in (".bin", ".xml"):
            aside = path.with_suffix(f"{suffix}.new")
            aside.write_bytes(written.with_suffix(suffix).read_bytes())
            os.replace(aside, path.with_suffix(suffix))
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.filename}: {error.strerror}") from error
