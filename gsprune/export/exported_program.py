"""A network as a `torch.export` program; and what every file that leaves PyTorch takes: copy, example, silence.

Dense, masked (zeros in place) and shrunk networks alike; the batch stays free, every other size is the example's. Of a
decoder of transformers its forward pass leaves, without the cache of keys and values that `generate` passes on.
All work happens on a copy in evaluation mode.

>>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
>>> program = to_exported_program(net, torch.ones(1, 4))
>>> program.module()(torch.ones(5, 4)).shape
torch.Size([5, 3])
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gsprune.structures.example import Example, arguments, call, map_tensors, plain, tensors_in
from gsprune.structures.twin import copy_of, refuse_wrapped
from gsprune.text.display import first_line


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
    twin = copy_to_export(model)
    device = next((t.device for t in [*twin.parameters(), *twin.buffers()]), None)
    example = map_tensors(lambda tensor: plain(tensor).to(device), example_input)
    with quietly():
        run_once(twin, example)
        return exported(twin, example)


# ---- the example: whatever starts with the batch, in batches of any size


def batch_size(example_input: Example) -> int:
    first = next((leaf for leaf in tensors_in(example_input, floating=False) if leaf.dim()), None)
    if first is None:
        raise ValueError("the example input has no tensor with a batch dimension")
    if len(first) == 0:
        raise ValueError("the example input is an empty batch: it must hold 1 sample or more")
    return len(first)


def at_batch(example_input: Example, size: int, *, found: list[Tensor] | None = None) -> Example:
    """The example with `size` rows: the first ones, or from the start again, then with floating numbers scaled.

    The tensors that have the batch are added to `found`.
    """
    batch = batch_size(example_input)

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


def arguments_in_order(model: nn.Module, example_input: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments, the latter in the order of `forward`: that of the exported inputs."""
    args, kwargs = arguments(example_input)
    known = [name for name in inspect.signature(model.forward).parameters if name in kwargs]
    return args, {name: kwargs[name] for name in dict.fromkeys([*known, *kwargs])}


def all_tensors(value: Any) -> list[Tensor]:
    """The tensors of arguments or outputs in order, those of integers too."""
    return list(tensors_in(value, floating=False))


# ---- torch.export


def copy_to_export(model: nn.Module) -> nn.Module:
    refuse_wrapped(model)
    try:
        twin = copy_of(model).eval()
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be copied: {innermost_line(error)}") from error
    for module in twin.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False
    return twin


def run_once(model: nn.Module, example_input: Example) -> Any:
    """What the model returns, without gradients."""
    try:
        with torch.no_grad():
            return call(model, example_input)
    except Exception as error:
        batch = batch_size(example_input)
        raise ValueError(
            f"{type(model).__name__} does not run on the example input as a batch of {batch}: {innermost_line(error)}"
        ) from error


def exported(model: nn.Module, example_input: Example) -> torch.export.ExportedProgram:
    axes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    found: list[Tensor] = []
    size = max(batch_size(example_input), 2)  # torch.export takes a size of one for a constant
    args, kwargs = arguments_in_order(model, at_batch(example_input, size, found=found))
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
    return f"{innermost_line(error)}{_place(error)}"


def _place(error: Exception) -> str:
    """The innermost line of the user's (or a library's, but not torch's) code."""
    ours = (str(Path(torch.__file__).parent), __file__)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def innermost_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # the exporter wraps the reason in advice of a page
        error = error.__cause__
    return first_line(error).rstrip(".")


# ---- surroundings


@contextlib.contextmanager
def quietly() -> Iterator[None]:
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
