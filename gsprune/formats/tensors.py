"""Named tensors in one safetensors file, with a header that is read and checked before anything is allocated."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gsprune.files.disk import aside

VERSION = 1
MAX_HEADER = 16_000_000  # bytes of a safetensors file's JSON, which becomes 25 times as many: some 100,000 tensors


def state_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of `model.state_dict()`, contiguous on the CPU, each stored once; and the names tied to them.

    >>> import torch
    >>> layer = torch.nn.Linear(2, 2, bias=False)
    >>> model = torch.nn.ModuleDict({"a": layer, "b": layer})
    >>> tensors, ties = state_tensors(model)
    >>> list(tensors), ties
    (['a.weight'], {'b.weight': 'a.weight'})
    """
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, tensor in getattr(model, "_orig_mod", model).state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name!r} in the model's state is a {type(tensor).__name__}, not a tensor")
        if tensor.is_quantized or is_traceable_wrapper_subclass(tensor):
            kind = "quantised tensor" if tensor.is_quantized else type(tensor).__name__
            raise ValueError(
                f"{name!r} is a {kind}, which a file of plain tensors cannot hold: save the network before it is "
                f"quantised or spread over processes, and quantise what was loaded"
            )
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and first.setdefault(place, name) != name:
            ties[name] = first[place]
            continue
        own = tensor.detach().cpu().contiguous()
        shares = own.untyped_storage().nbytes() != own.nbytes  # a view: the format refuses shared memory
        tensors[name] = own.clone() if shares else own
    return tensors, ties


@dataclass(frozen=True)
class Header:
    path: Path
    metadata: Mapping[str, str]
    shapes: Mapping[str, list[int]]
    dtypes: Mapping[str, str]


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    with aside(path) as temporary:
        write_tensors(temporary, tensors, metadata)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """`save_file`, whose faults of the disk come in a class of their own, with an OSError for them.

    Equal tensors are equal files to the last byte: the library writes metadata in an order that changes.
    """
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length  # it was compact already
        file.seek(8)
        file.write(text.ljust(length))


def read_header(path: str | os.PathLike[str], wanted: str) -> Header:
    """Names, shapes and metadata, after checking that the file is whole and of the wanted format."""
    path = Path(path)
    table = read_table(path)
    metadata = table.pop("__metadata__", {})
    try:
        with safetensors.safe_open(path, framework="np") as file:  # maps the file, allocates nothing
            names = list(file.keys())
    except Exception as error:  # SafetensorError derives from Exception only
        raise ValueError(f"{path} is a damaged safetensors file ({error})") from None
    if not isinstance(metadata, dict) or metadata.get("format") != wanted:
        raise ValueError(f"{path} is a safetensors file, but not of the format {wanted!r}")
    if metadata.get("version") != str(VERSION):
        raise ValueError(f"{path} has format version {metadata.get('version')!r}, this gsprune reads {VERSION}")
    shapes = {name: list(table[name]["shape"]) for name in names}
    return Header(path, metadata, shapes, {name: str(table[name]["dtype"]) for name in names})


def read_table(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, as it stands there; ValueError where the file is not whole."""
    if not path.is_file():
        raise ValueError(f"{path.absolute()} does not exist")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if size > 8 and length <= MAX_HEADER else b""
    if not text.startswith(b"{"):
        raise ValueError(f"{path} is not a safetensors file")
    if len(text) < length:
        raise ValueError(f"{path} is truncated: its header has {length} bytes, the file {size}")
    try:
        table = json.loads(text)
        data = max((entry["data_offsets"][1] for key, entry in table.items() if key != "__metadata__"), default=0)
        short = 8 + length + data > size
    except (ValueError, RecursionError, TypeError, KeyError, IndexError, AttributeError):
        raise ValueError(f"{path} is not a safetensors file: its header cannot be read") from None
    if short:
        raise ValueError(f"{path} is truncated: {8 + length + data} bytes expected, {size} found")
    assert isinstance(table, dict)
    return table
