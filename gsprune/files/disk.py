"""Atomic writes of files and folders, and JSON that any reader accepts."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gsprune.text.display import logger, one_line
from gsprune.text.redact import redacted

__all__ = [
    "Damaged",
    "aside",
    "folder_aside",
    "json_data",
    "number",
    "put_aside",
    "read_json",
    "read_object",
    "reason",
    "refusing",
    "remove_folder",
    "remove_leftovers",
    "spared",
    "write_atomic",
    "write_json",
]

log = logger(__name__)
_MAX_JSON = 32_000_000  # bytes, which may be 25 times as many in memory; a plan of a million units has 10 million
_NON_FINITE = {math.inf: "Infinity", -math.inf: "-Infinity"}


class Damaged(ValueError):
    """The content of a file is proved to differ from what was written. Any other fault of reading may be temporary."""


@contextmanager
def aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` at the end of the block.

    The file is flushed to the disk before the rename and its folder after it. A reader, also after a power cut, sees
    the old file or the new one, never a part of one. If the block raises, the old file stays and the temporary one is
    removed. A missing folder is created. Permissions follow the user's umask.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened, and the rename is all there is
        _flush(path.parent)


@contextmanager
def folder_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`aside` for a folder: it appears with all of its files or not at all.

    An existing folder is replaced; for a moment there is no folder of that name.
    """
    path = Path(path)
    temporary = _temporary(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            file.chmod(temporary.stat().st_mode & 0o666)
            _flush(file)
        if os.name == "posix":
            _flush(temporary)
        remove_folder(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if os.name == "posix":
        _flush(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder if it exists. After an interruption the folder is whole, or its name is gone."""
    if path.is_dir():
        temporary = _temporary(path)
        os.replace(path, temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders of processes that were killed during a write."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.[0-9a-f]{32}\.tmp", path.name):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def put_aside(path: Path, mark: str = "damaged") -> Path:
    """Rename a file or folder that must be neither used nor lost.

    Returns its new path, `<mark>-<name>`, with a number if that exists.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = Path(folder.name, "a.json")
    >>> for _ in range(2):
    ...     _ = path.write_text("{")
    ...     print(put_aside(path).name)
    damaged-a.json
    damaged-2-a.json
    """
    tries = (path.with_name(f"{mark}{f'-{number}' if number > 1 else ''}-{path.name}") for number in itertools.count(1))
    there = next(other for other in tries if not os.path.lexists(other))
    os.replace(path, there)
    return there


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` through `aside`: an interrupted write leaves the old file."""
    with aside(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | os.PathLike[str], obj: object) -> None:
    """Write `obj` as indented JSON, atomically. NaN and infinities become strings, see `json_data`."""
    text = json.dumps(json_data(obj), indent=2, allow_nan=False, ensure_ascii=False)
    write_atomic(path, (text + "\n").encode())


@contextmanager
def spared(name: str, unwritten: list[str], meaning: str = "") -> Iterator[None]:
    """Around the write of an optional file: an OSError becomes one warning, and the run continues.

    Args:
        unwritten: names of the files whose last write failed. A name in it is not warned about again, and is removed
            by the next write that succeeds.
        meaning: end of the warning: what the run lacks without this file.

    >>> unwritten = []
    >>> with spared("history.png", unwritten):
    ...     raise OSError(28, "No space left on device")
    >>> unwritten
    ['history.png']
    >>> with spared("history.png", unwritten):
    ...     pass
    >>> unwritten
    []
    """
    try:
        yield
    except OSError as error:
        if name not in unwritten:
            more = f"; {meaning}" if meaning else ""
            log.warning("%s could not be written, the run goes on without it: %s%s", name, reason(error), more)
            unwritten.append(name)
    else:
        if name in unwritten:
            unwritten.remove(name)


def reason(error: OSError) -> str:
    """
    >>> reason(OSError(28, "No space left on device", "a/b.png")), reason(OSError("gone"))
    ('No space left on device', 'gone')
    """
    return error.strerror or str(error)


def json_data(obj: object) -> Any:
    """`obj` as values that JSON can hold, without passwords. NaN and infinities become strings that `float()` reads.

    >>> json_data({"loss": float("nan"), "kept": (1, 2), "worst": float("-inf")})
    {'loss': 'NaN', 'kept': [1, 2], 'worst': '-Infinity'}
    """
    if isinstance(obj, Mapping):
        return {str(key): json_data(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [json_data(value) for value in obj]
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else _NON_FINITE.get(obj, "NaN")
    if isinstance(obj, str):
        return redacted(obj)
    if obj is None or isinstance(obj, (bool, int)):
        return obj
    if hasattr(obj, "item"):  # a number of numpy or torch
        return json_data(obj.item())
    if isinstance(obj, os.PathLike):
        return json_data(os.fspath(obj))
    raise TypeError(f"a {type(obj).__name__} cannot be written as JSON")


def number(value: Any) -> float:
    """A float from a number of Python, numpy or torch, or from a string that `json_data` writes; an integer stays one.

    Raises:
        ValueError, TypeError, OverflowError: `value` is none of these, or an integer larger than any float.

    >>> number(3), number("-Infinity"), number(json_data(0.1))
    (3, -inf, 0.1)
    """
    as_float = float(value)  # raises where an integer is larger than any float
    return value if type(value) is int else as_float


def read_json(path: str | os.PathLike[str], *, most: int | None = None) -> Any:
    """The content of a JSON file of at most `most` bytes (default 32 MB).

    Raises:
        ValueError: there is no such file, or it is larger.
        Damaged: its content is not JSON.
    """
    most = _MAX_JSON if most is None else most
    path = Path(path)
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path.absolute()} {'is not a file' if path.exists() else 'does not exist'}")
    if path.stat().st_size > most:
        raise ValueError(f"{path} is too large: it has more than {most:,} bytes")
    content = path.read_bytes()
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deep
        raise Damaged(f"{path} is not valid JSON ({type(error).__name__}: {error})") from None


def read_object(path: str | os.PathLike[str], *, most: int | None = None) -> dict[str, Any]:
    """The object in a JSON file; empty if the file cannot be read or holds none."""
    with suppress(ValueError, OSError):
        found = read_json(path, most=most)
        return found if isinstance(found, dict) else {}
    return {}


def sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal digest of the file's content, which is read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sha256_of_json(data: Any) -> str:
    """Of data as JSON with sorted keys, as hexadecimal digits.

    >>> sha256_of_json({"a": 1, "b": 2}) == sha256_of_json({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


@contextmanager
def refusing() -> Iterator[None]:
    """Around the reading of an untrusted file: the message of a ValueError is cut to one short line.

    An OSError and a MemoryError become a ValueError.
    """
    try:
        yield
    except ValueError as error:
        told = one_line(str(error))
        if told == str(error):
            raise
        raise (Damaged if isinstance(error, Damaged) else ValueError)(told) from None
    except MemoryError:
        raise ValueError("the file needs more memory than there is") from None
    except OSError as error:
        raise ValueError(one_line(f"{error.filename or 'the file'} cannot be read ({reason(error)})")) from None
