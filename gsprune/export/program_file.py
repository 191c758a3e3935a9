"""The file of a `torch.export` program that others serve: on the CPU, with its signature, and without samples of data.

>>> import tempfile
>>> net, x = nn.Linear(4, 3), torch.ones(5, 4)
>>> with tempfile.TemporaryDirectory() as folder:
...     write_program(f"{folder}/model.pt2", net, torch.ones(1, 4))
...     program = torch.export.load(f"{folder}/model.pt2").module()
>>> torch.equal(program(x), net(x))
True
"""

from __future__ import annotations

import inspect
import json
import os
from typing import Any

import torch
from torch import Tensor, nn

from gsprune.export.exported_program import batch_size, copy_to_export, exported, quietly, run_once
from gsprune.files.disk import aside
from gsprune.files.layout import SIGNATURE
from gsprune.structures.example import Example, arguments, logits_of, map_tensors, plain

__all__ = ["write_program"]


def write_program(path: str | os.PathLike[str], model: nn.Module, example_input: Example) -> None:
    """Write a network as `torch.export.save` does, so that `torch.export.load(path).module()` runs it without its code.

    The program computes on the CPU, for any batch size. Of what is no tensor, such as transformers' outputs, it returns
    `logits`. The samples of `example_input`, which torch would keep in the file, are zeros there.

    An entry `signature.json` of the file says what it takes and returns: `torch`, and of `inputs` and `outputs` each
    tensor's dtype and shape, with -1 for the batch, and the name of a keyword.

    Args:
        path: the file, whose name ends with .pt2.
        example_input: as of `to_exported_program`.

    Raises:
        ValueError: as of `to_exported_program`.
        OSError: the file cannot be written.
    """
    twin = copy_to_export(model).cpu()
    example = map_tensors(lambda tensor: plain(tensor).cpu(), example_input)
    with quietly():
        outputs = run_once(twin, example)
        if not isinstance(outputs, Tensor):
            _return_logits(twin)
        program = exported(twin, example)
    program.example_inputs = map_tensors(torch.zeros_like, program.example_inputs)  # an empty entry MLflow refuses
    told = json.dumps(_signature(example, logits_of(outputs)))
    with aside(path) as temporary, temporary.open("wb") as file:
        torch.export.save(program, file, extra_files={SIGNATURE: told})


def _return_logits(model: Any) -> None:
    """Let a network return the scores of the classes alone. torch.export needs the names of its arguments."""
    forward = model.forward

    def logits(*args: Any, **kwargs: Any) -> Tensor:
        return logits_of(forward(*args, **kwargs))

    logits.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    model.forward = logits


def _signature(example: Example, outputs: Tensor) -> dict[str, Any]:
    args, kwargs = arguments(example)
    batch = batch_size(example)
    named = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
    inputs = [_spec(value, batch) for value in args if isinstance(value, Tensor)]
    inputs += [{"name": name, **_spec(value, batch)} for name, value in named.items()]
    return {"torch": torch.__version__, "inputs": inputs, "outputs": [_spec(outputs, batch)]}


def _spec(tensor: Tensor, batch: int) -> dict[str, Any]:
    shape = list(tensor.shape)
    if shape[:1] == [batch]:
        shape[0] = -1
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": shape}
