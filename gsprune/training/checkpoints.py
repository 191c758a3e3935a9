"""Checkpoints of a run: nested data with tensors, one folder each, of which the last two are kept.

Files are untrusted: nothing is unpickled, everything is checked before use, and every fault is a ValueError of one
sentence. A checkpoint that is proved damaged is renamed, and the one before it is used. Any other fault (another
version, a disk that does not answer) may be temporary: the checkpoint is refused and stays as it is.

In the folder `checkpoint/` of a run:

    epoch_0003_step_000020/        after 3 epochs and 20 steps of the fourth
        state.safetensors          every tensor
        state.json                 everything else, and the sha256 of both files

A folder appears whole: it is written under another name, flushed to the disk and renamed.

Why not `torch.save` and `torch.load(weights_only=True)`: a full disk raises a RuntimeError without an error number, a
view is written with its whole storage, and numbers of numpy are written but not read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
from torch import Tensor

from gsprune.files.disk import (
    Damaged,
    folder_aside,
    json_data,
    number,
    put_aside,
    read_json,
    refusing,
    remove_folder,
    sha256,
)
from gsprune.formats.tensors import read_header, write_tensors
from gsprune.text.display import logger

__all__ = ["Checkpoints", "Saved", "read_state", "write_state"]

FORMAT = "gsprune-run-state"
VERSION = 1
TENSORS, RECORD = "state.safetensors", "state.json"
KEPT = 2
_NAME = re.compile(r"epoch_(\d{4,9})_step_(\d{6,12})")
MAX_RECORD = 128_000_000  # bytes of state.json: the metrics of fifty thousand epochs
_KIND = "$"  # marks a type that JSON lacks
log = logger(__name__)


class Saved(NamedTuple):
    """A checkpoint that was read: its folder, and the state as it was given to `write`."""

    path: Path
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints in a folder.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> checkpoints = Checkpoints(Path(folder.name))
    >>> for step in (7, 8, 9):
    ...     _ = checkpoints.write({"step": step}, epoch=3, step=step)
    >>> [path.name for path in checkpoints.paths()], checkpoints.newest().state
    (['epoch_0003_step_000008', 'epoch_0003_step_000009'], {'step': 9})
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def paths(self) -> list[Path]:
        """The folders of the checkpoints, the oldest first.

        Raises:
            OSError: the folder of the checkpoints cannot be read.
        """
        if not os.path.lexists(self.folder):
            return []
        names = [name for name in os.listdir(self.folder) if _NAME.fullmatch(name)]  # a broken link raises
        return sorted((path for path in map(self.folder.joinpath, names) if path.is_dir()), key=_progress)

    def write(self, state: Mapping[str, Any], *, epoch: int, step: int) -> Path:
        """Write a checkpoint, then remove all but the last two.

        Args:
            epoch, step: finished epochs of the run, and finished steps of the next epoch.

        Raises:
            ValueError: the state holds a type that cannot be written as data.
            OSError: the write failed, for example on a full disk; earlier checkpoints are unchanged.
        """
        path = self.folder / f"epoch_{epoch:04d}_step_{step:06d}"
        write_state(path, state)
        self.keep(KEPT)
        return path

    def keep(self, count: int) -> None:
        """Remove all but the last `count`."""
        for old in self.paths()[:-count]:
            remove_folder(old)

    @refusing()
    def newest(self, check: Callable[[Mapping[str, Any]], None] = lambda state: None) -> Saved | None:
        """The newest checkpoint that is whole. A damaged one is renamed to `damaged-epoch_...`, with a warning.

        Raises:
            ValueError: a checkpoint cannot be read but is not proved damaged, or `check` refuses it. It stays there.
        """
        paths = self.paths()[::-1]
        for path in paths:
            try:
                return self._read(path, check)
            except Damaged as error:
                last = path == paths[-1]
                then = "no other is left, and the run starts anew" if last else "the one before it is tried"
                aside = put_aside(path).name
                log.warning("the checkpoint %s is damaged and set aside as %s, %s: %s", path.name, aside, then, error)
            except ValueError as error:
                raise ValueError(
                    f"the checkpoint {path} cannot be used now, and is kept: {error}; fix that and run the same "
                    f"command again, or start without it with trainer.resume=never"
                ) from error
        return None

    @staticmethod
    @refusing()
    def _read(path: Path, check: Callable[[Mapping[str, Any]], None]) -> Saved:
        state = read_state(path)
        check(state)
        return Saved(path, state)

    def remove_all(self) -> None:
        for path in self.paths():
            remove_folder(path)


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write nested dicts, lists, tuples, numbers, strings, None and tensors as one folder, whole or not at all.

    Raises:
        ValueError: the state holds another type.
        OSError: the write failed.
    """
    packer = _Packer()
    tree = packer.pack(state)
    with folder_aside(path) as temporary:
        metadata = {"format": FORMAT, "version": str(VERSION)}
        write_tensors(temporary / TENSORS, packer.tensors, metadata)
        record = {"format": FORMAT, "version": VERSION, "tensors": sha256(temporary / TENSORS), "state": tree}
        text = json.dumps({**record, "sha256": _digest(record)}, allow_nan=False)
        (temporary / RECORD).write_text(text + "\n", encoding="utf-8")


@refusing()
def read_state(path: Path) -> dict[str, Any]:
    """The state as it was given to `write_state`; its tensors are on the CPU.

    Raises:
        Damaged: the content of a file differs from what was written.
        ValueError: a file is missing, cannot be read, has another version or another format.
    """
    tree, mark = _read_tree(path / RECORD)
    if not (path / TENSORS).is_file():
        raise ValueError(f"{path / TENSORS} is not there")
    if sha256(path / TENSORS) != mark:
        raise Damaged(f"{path / TENSORS} is damaged, or it does not belong to the {RECORD} beside it")
    header = read_header(path / TENSORS, FORMAT)
    try:
        with safetensors.safe_open(header.path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in header.shapes}
    except (OSError, MemoryError):
        raise
    except Exception as error:  # SafetensorError derives from Exception only
        raise ValueError(f"{header.path} is a safetensors file that cannot be read ({error})") from None
    try:
        state = _unpack(tree, tensors)
    except (KeyError, TypeError, ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"{path / RECORD} is not the record of a checkpoint ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path / RECORD} is not the record of a checkpoint")
    return state


def _read_tree(path: Path) -> tuple[Any, str]:
    try:
        record = read_json(path, most=MAX_RECORD)
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise Damaged(f"{path} is not the record of a checkpoint")
        if record.get("version") != VERSION:
            raise ValueError(
                f"{path} has format version {str(record.get('version'))[:20]}, this gsprune reads {VERSION}"
            )
        mark = record.pop("sha256", None)
        if mark != _digest(record):
            raise Damaged(f"{path} is damaged or was edited: its sha256 is another")
        return record["state"], str(record["tensors"])
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except (KeyError, RecursionError, TypeError) as error:
        raise ValueError(f"{path} is not the record of a checkpoint ({type(error).__name__})") from None


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _progress(path: Path) -> tuple[int, int]:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2])


# --- nested data as JSON, tensors separately --------------------------------------------------------------


class _Packer:
    """Turns values into JSON and collects tensors; a type that JSON lacks becomes {"$": kind, ...}."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._addresses: set[int] = set()  # of the tensors' memory

    def pack(self, value: Any, where: str = "") -> Any:
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {_KIND: "float", "value": json_data(value)}
        if isinstance(value, Tensor):
            return {_KIND: "tensor", "name": self._keep(value, where)}
        if isinstance(value, Mapping):
            if all(isinstance(key, str) for key in value) and _KIND not in value:
                return {key: self.pack(item, f"{where}/{key}") for key, item in value.items()}
            items = [[self.pack(key, where), self.pack(item, f"{where}/{key}")] for key, item in value.items()]
            return {_KIND: "dict", "items": items}
        if isinstance(value, (list, tuple)):
            items = [self.pack(item, f"{where}/{i}") for i, item in enumerate(value)]
            return items if isinstance(value, list) else {_KIND: "tuple", "items": items}
        if hasattr(value, "item"):  # a number of numpy
            return self.pack(value.item(), where)
        raise ValueError(f"{where.strip('/')} is a {type(value).__name__}, which a checkpoint cannot hold")

    def _keep(self, tensor: Tensor, where: str) -> str:
        """Collect a tensor as safetensors needs it: on the CPU, contiguous, without memory shared with another."""
        name = where.strip("/") if where.strip("/") not in self.tensors else f"{where}#{len(self.tensors)}"
        own = tensor.detach().cpu().contiguous()
        if own.untyped_storage().nbytes() != own.nbytes or own.data_ptr() in self._addresses:
            own = own.clone()
        self._addresses.add(own.data_ptr())
        self.tensors[name] = own
        return name


def _unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unpack(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    kind = tree.get(_KIND)
    if kind is None:
        return {key: _unpack(item, tensors) for key, item in tree.items()}
    if kind == "tensor":
        return tensors[tree["name"]]
    if kind == "float":
        return number(tree["value"])
    if kind == "tuple":
        return tuple(_unpack(tree["items"], tensors))
    if kind == "dict":
        return {_unpack(key, tensors): _unpack(item, tensors) for key, item in tree["items"]}
    raise ValueError(f"unknown kind {kind!r}")
