"""Networks and tensors as a command line names them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gsprune.extras import need
from gsprune.text.display import first_line, quoted
from gsprune.text.names import did_you_mean

__all__ = ["FORMS", "load_network", "read_batches", "read_input", "read_tensors"]

FORMS = "torchvision:NAME (torchvision:NAME@WEIGHTS with its trained weights), or MODULE:FUNCTION of your own"
DTYPES = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16, "long": torch.int64}


def load_network(address: str, weights: str | None = None) -> tuple[nn.Module, Any]:
    """The network at an address such as "torchvision:resnet18", and its example input; None where it brings none.

    A function of the user's own takes no arguments, and returns the network or (network, example input). Modules are
    found from the working directory on.

    Args:
        weights: a file of its state_dict: safetensors, or PyTorch's own format, which is read without unpickling code.

    Raises:
        ValueError: in one sentence.
    """
    source, colon, name = address.partition(":")
    if not colon or not source or not name:
        raise ValueError(f"--model {quoted(address)} names no network: give {FORMS}")
    made = _torchvision(name) if source == "torchvision" else _own(source, name)
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {address} gives a {type(model).__name__}: it must give a torch.nn.Module")
    if weights is not None:
        _load(model, weights)
    return model, example


def _torchvision(text: str) -> nn.Module:
    models = need("torchvision.models")
    name, _, weights = text.partition("@")
    known = models.list_models()
    if name not in known:
        raise ValueError(f"torchvision has no model {quoted(name)}{did_you_mean(name, known)}")
    try:
        made: nn.Module = models.get_model(name, weights=weights or None)
    except ValueError as error:
        raise ValueError(f"torchvision:{text} cannot be made: {first_line(error)}") from error
    except OSError as error:
        raise ValueError(f"the weights of torchvision:{text} could not be fetched: {first_line(error)}") from error
    return made


def _own(module: str, name: str) -> Any:
    sys.path[:0] = [] if str(Path.cwd()) in sys.path else [str(Path.cwd())]
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise ValueError(f"--model {module}:{name}: there is no module {error.name} here") from None
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{module} has no {part}{did_you_mean(part, vars(found))}")
        found = getattr(found, part)
    return found if isinstance(found, nn.Module) or not callable(found) else found()


def _load(model: nn.Module, path: str) -> None:
    state = read_tensors(Path(path))
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise ValueError(f"--weights {path} holds a {type(state).__name__}: it must be a state_dict")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise ValueError(f"--weights {path} does not fit the network: {told[:400]}") from error


def read_tensors(path: Path) -> Any:
    """What a .safetensors, .pt or .pth file holds; no code in it is run.

    Raises:
        ValueError: it is no such file.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from error
    except Exception as error:  # pickle's own errors, of which torch's message is a page
        raise ValueError(f"{path} holds more than tensors, which is not read") from error


def read_input(texts: Sequence[str]) -> Any:
    """Random inputs of the shapes that a command line gives, one for each argument of the network.

    >>> read_input(["1,3,8,8"]).shape, read_input(["2,4:long", "2,4"])[0].dtype
    (torch.Size([1, 3, 8, 8]), torch.int64)

    Raises:
        ValueError: a text is no shape.
    """
    made = tuple(_random(text) for text in texts)
    return made[0] if len(made) == 1 else made


def _random(text: str) -> Tensor:
    sizes, _, kind = text.partition(":")
    parts = sizes.replace("x", ",").split(",")
    right = all(part.strip().isdigit() and int(part) > 0 for part in parts)
    if not right or (kind and kind not in DTYPES):
        kinds = ", ".join(DTYPES)
        raise ValueError(f"--input {quoted(text)} is no shape: give sizes such as 1,3,224,224, or 1,128:long ({kinds})")
    shape = [int(part) for part in parts]
    generator = torch.Generator().manual_seed(0)
    if kind == "long":
        return torch.randint(2, shape, generator=generator)
    return torch.randn(shape, generator=generator).to(DTYPES[kind or "float"])


def read_batches(path: Path) -> list[Any]:
    """Batches for a cut: of a file, or of every file in a folder, in the order of their names.

    A file holds a tensor of inputs; a pair (inputs, targets); a mapping with "inputs" and "targets"; or any other
    mapping, whose tensors are the arguments of the network.

    Raises:
        ValueError: there is none, or one holds something else.
    """
    files = sorted(_tensor_files(path)) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"--data {path} holds no .pt, .pth or .safetensors file")
    return [_batch(file, read_tensors(file)) for file in files]


def _tensor_files(folder: Path) -> Iterator[Path]:
    return (file for file in folder.iterdir() if file.suffix in (".pt", ".pth", ".safetensors"))


def _batch(file: Path, found: Any) -> Any:
    if isinstance(found, dict) and "inputs" in found:
        return (found["inputs"], found["targets"]) if "targets" in found else found["inputs"]
    whole = isinstance(found, Tensor | dict) or (isinstance(found, tuple | list) and len(found) == 2)
    if not whole:
        raise ValueError(
            f"{file} holds a {type(found).__name__}: it must be inputs, a pair (inputs, targets) or a mapping"
        )
    return tuple(found) if isinstance(found, list) else found
