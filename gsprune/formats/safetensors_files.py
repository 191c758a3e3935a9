"""Checkpoints of safetensors files, read and written one tensor at a time: no file is mapped or held in memory.

A checkpoint is a folder with `model.safetensors`, or with `model.safetensors.index.json` and the files that it names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gsprune.files.disk import write_json
from gsprune.formats.tensors import read_table

__all__ = ["Checkpoint", "Writer"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
METADATA = {"format": "pt"}
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class Checkpoint:
    """The tensors of a checkpoint by name; reading one reads its bytes alone.

    Attributes:
        shapes, dtypes: of each tensor.

    Raises:
        ValueError: the folder has none, or a file is damaged, lacks what the index says, or lies outside the folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.shapes: dict[str, list[int]] = {}
        self.dtypes: dict[str, str] = {}
        self._places: dict[str, tuple[Path, int, int]] = {}  # file, first byte, how many
        for path, names in self._files().items():
            table = read_table(path)
            with path.open("rb") as file:
                start = 8 + int.from_bytes(file.read(8), "little")
            for name in [*names] if names is not None else [key for key in table if key != "__metadata__"]:
                if name not in table:
                    raise ValueError(f"{path} has no tensor {name!r}, which the index of {self.folder} says")
                first, end = table[name]["data_offsets"]
                self.shapes[name], self.dtypes[name] = list(table[name]["shape"]), str(table[name]["dtype"])
                self._places[name] = (path, start + first, end - first)

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own.

        Raises:
            ValueError: it is not of float64, float32, float16 or bfloat16.
        """
        path, first, count = self._places[name]
        tensor = torch.empty(self.shapes[name], dtype=self.dtype(name))
        if tensor.nbytes != count:
            raise ValueError(f"{path} is damaged: {name} has {count} bytes for a shape of {tensor.nbytes}")
        if count:
            with path.open("rb") as file:
                file.seek(first)
                file.readinto(_bytes_of(tensor))
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """What its entries are."""
        if (code := self.dtypes[name]) not in _DTYPES:
            raise ValueError(f"{name} is of {code}: layer by layer only networks in {', '.join(_DTYPES)} are cut")
        return _DTYPES[code]

    def _files(self) -> dict[Path, list[str] | None]:
        """File -> the tensors that are read from it; None: all."""
        index = self.folder / INDEX
        if not index.is_file():
            return {self.folder / SINGLE: None}
        try:
            places = json.loads(index.read_text(encoding="utf8"))["weight_map"]
            found: dict[Path, list[str]] = {}
            for name, file in places.items():
                if Path(file).name != file:
                    raise ValueError(f"{index} names {file!r}, which is outside the folder")
                found.setdefault(self.folder / file, []).append(name)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{index} is no index of safetensors files ({type(error).__name__})") from None
        return {**found}


class Writer:
    """Writes a checkpoint in a known number of files, and its index once all are there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     writer = Writer(folder, 2)
    ...     writer.write({"a": torch.ones(2)})
    ...     writer.write({"b": torch.zeros(1)})
    ...     checkpoint = Checkpoint(folder)
    ...     [checkpoint.read(name).tolist() for name in checkpoint.shapes]
    [[1.0, 1.0], [0.0]]
    """

    def __init__(self, folder: str | os.PathLike[str], files: int) -> None:
        self.folder, self.files = Path(folder), files
        self._places: dict[str, str] = {}
        self._written, self._bytes = 0, 0

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """The next file."""
        self._written += 1
        assert self._written <= self.files
        name = f"model-{self._written:05d}-of-{self.files:05d}.safetensors"
        _write(self.folder / name, tensors)
        self._places |= dict.fromkeys(tensors, name)
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self._written == self.files:
            write_json(self.folder / INDEX, {"metadata": {"total_size": self._bytes}, "weight_map": self._places})


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, from the tensors' own memory: the library would copy each first."""
    table: dict[str, Any] = {"__metadata__": METADATA}
    end = 0
    for name, tensor in tensors.items():
        places = [end, end + tensor.nbytes]
        table[name] = {"dtype": _CODES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": places}
        end += tensor.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # so that what follows is aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            file.write(_bytes_of(tensor))


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    assert tensor.is_contiguous()
    memory: memoryview = tensor.detach().view(-1).view(torch.uint8).numpy().data
    return memory
