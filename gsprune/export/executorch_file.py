"""A network as an ExecuTorch program, checked with ExecuTorch's runtime against PyTorch's outputs.

The extra `[executorch]` is imported only where a file is written.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gsprune.export.exported_program import arguments_in_order, copy_to_export, innermost_line, quietly, run_once
from gsprune.export.onnx_file import TOLERANCE, difference
from gsprune.extras import need
from gsprune.files.disk import write_atomic
from gsprune.structures.attention import no_fast_path
from gsprune.structures.example import Example, map_tensors, plain, tensors_in


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
            torch.export or ExecuTorch cannot follow it, or ExecuTorch computes something else. A file at `path` stays
            as it was then.
        OSError: the file cannot be written.
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
        found = _check(twin, example, program, tolerance)
    write_atomic(path, program)
    return found


def _lowered(model: nn.Module, example: Example) -> bytes:
    exir: Any = need("executorch.exir")
    xnnpack: Any = need("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    args, kwargs = arguments_in_order(model, example)
    program = torch.export.export(model, args, kwargs, strict=False)
    lowered = exir.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
    return bytes(lowered.to_executorch().buffer)


def _check(model: nn.Module, example: Example, program: bytes, tolerance: float) -> float:
    try:
        method = need("executorch.runtime").Runtime.get().load_program(program).load_method("forward")
    except Exception as error:
        raise ValueError(f"ExecuTorch cannot load {type(model).__name__}: {innermost_line(error)}") from error
    found = 0.0
    for rows in (
        example,
        map_tensors(lambda tensor: tensor * 0.875 if tensor.is_floating_point() else tensor, example),
    ):
        wanted = _tensors(run_once(model, rows))
        given = [torch.as_tensor(value) for value in method.execute(_tensors(arguments_in_order(model, rows)))]
        if len(given) != len(wanted):
            raise ValueError(f"ExecuTorch gives {len(given)} outputs of {type(model).__name__}, PyTorch {len(wanted)}")
        for a, b in zip(wanted, given, strict=True):
            found = max(found, difference(a.double().numpy(), b.double().numpy()))
    if not found <= tolerance:
        raise ValueError(
            f"ExecuTorch does not compute what PyTorch does with {type(model).__name__}: the largest difference is "
            f"{found:.3g} of an output's largest value, {tolerance:.3g} is allowed"
        )
    return found


def _tensors(value: Any) -> list[Tensor]:
    return list(tensors_in(value, floating=False))
