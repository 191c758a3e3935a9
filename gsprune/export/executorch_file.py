"""A network as an ExecuTorch program, checked with ExecuTorch's runtime against PyTorch's outputs.

The extra `[executorch]` is imported only where a file is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gsprune.export.exported_program import (
    all_tensors,
    arguments_in_order,
    copy_to_export,
    innermost_line,
    quietly,
    run_once,
)
from gsprune.export.onnx_file import TOLERANCE, check_outputs
from gsprune.extras import need
from gsprune.files.disk import write_atomic
from gsprune.structures.attention import no_fast_path
from gsprune.structures.example import Example, map_tensors, plain


def to_executorch(
    model: nn.Module, example_input: Example, path: str | os.PathLike[str], *, tolerance: float = TOLERANCE
) -> float:
    """Write `model` to `path` (a .pte file) for ExecuTorch's runtimes on phones and small devices.

    XNNPACK's kernels compute the layers that they know, ExecuTorch's own the others. Every size is that of the example,
    the batch too: give one sample for a network that gets one. The runtime computes, on the CPU and in float32, the
    example and 7/8 of its floating numbers; the difference is that of `to_onnx`.

    Args:
        example_input: a tensor, a tuple of positional or a dict of keyword arguments, of the sizes that the network
            will get.
        path: ends with ".pte".
        tolerance: the largest difference allowed, above 0.

    Returns:
        The largest difference found.

    Raises:
        ValueError: the extra is not installed, `path` does not end with ".pte", the model does not run on the example,
            torch.export or ExecuTorch cannot follow it, ExecuTorch computes something else, or the file cannot be
            written. A file at `path` stays as it was then.
    """
    need("executorch")
    path = Path(path)
    if path.suffix != ".pte":
        raise ValueError(f"{path} does not end with .pte, as ExecuTorch's programs do")
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}: it must be above 0")
    twin = copy_to_export(model).cpu()
    example = map_tensors(lambda tensor: plain(tensor).cpu(), example_input)
    with quietly(), no_fast_path():
        run_once(twin, example)
        try:
            program = _lowered(twin, example)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot be written for ExecuTorch: {innermost_line(error)}"
            ) from error
        found = check_outputs("ExecuTorch", twin, _runs(twin, example, program), tolerance)
    try:
        write_atomic(path, program)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error
    return found


def _lowered(model: nn.Module, example: Example) -> bytes:
    exir: Any = need("executorch.exir")
    xnnpack: Any = need("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    args, kwargs = arguments_in_order(model, example)
    program = torch.export.export(model, args, kwargs, strict=False)
    lowered = exir.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
    return bytes(lowered.to_executorch().buffer)


def _runs(
    model: nn.Module, example: Example, program: bytes
) -> Iterator[tuple[Sequence[Tensor], Sequence[np.ndarray]]]:
    """Outputs of PyTorch and of ExecuTorch, of the example and of 7/8 of its floating numbers."""
    try:
        method = need("executorch.runtime").Runtime.get().load_program(program).load_method("forward")
    except Exception as error:
        raise ValueError(f"ExecuTorch cannot load {type(model).__name__}: {innermost_line(error)}") from error
    smaller = map_tensors(lambda tensor: tensor * 0.875 if tensor.is_floating_point() else tensor, example)
    for rows in (example, smaller):
        given = method.execute(all_tensors(arguments_in_order(model, rows)))
        yield all_tensors(run_once(model, rows)), [torch.as_tensor(value).double().numpy() for value in given]
