"""Files that are written whole or not at all, and JSON that any reader accepts."""

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
from gsprune.text.redact import without_passwords

__all__ = [
    "Damaged",
    "aside",
    "folder_aside",
    "number",
    "plain",
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
    """What a file holds is proved not to be what was written there; any other fault of reading may pass."""


@contextmanager
def aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it becomes `path`.

    The temporary file is flushed to the disk before the rename and the folder after it, so a reader
    (also one after a power cut) sees the old file or the new one, never a part. When the block raises, the old
    file stays and the temporary one is removed. The folder is made if it is missing. Who may read the file is what the
    user's umask says, whatever writes it.
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
    """`aside` for a folder of files: it appears with all of them or not at all.

    A folder that is there already is replaced, with a moment in between when there is none.
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
    """Remove a folder that may be missing; interrupted, it leaves the whole folder or none of that name."""
    if path.is_dir():
        temporary = _temporary(path)
        os.replace(path, temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed while they wrote have left in a folder."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.[0-9a-f]{32}\.tmp", path.name):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def put_aside(path: Path, mark: str = "damaged") -> Path:
    """Rename what must neither be used nor lost; returns its new path, `<mark>-<name>`, numbered if that is taken.

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
    """Write `data` to `path` aside, fsync, rename: an interrupted write leaves the old file."""
    with aside(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | os.PathLike[str], obj: object) -> None:
    """Write `obj` as indented JSON, atomically. NaN and infinities become strings, see `plain`."""
    text = json.dumps(plain(obj), indent=2, allow_nan=False, ensure_ascii=False)
    write_atomic(path, (text + "\n").encode())


@contextmanager
def spared(name: str, unwritten: list[str], meaning: str = "") -> Iterator[None]:
    """Write a file that a run can do without: a fault of the disk is one warning, and the block is left.

    The warning ends with `meaning`: what the lack of this file means.

    `unwritten` lists the names of such files that are not on the disk as they should be. A name that is in it already
    is not warned of again, and goes out of it when a later write ends well. With `aside` the last good file stays.

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


def plain(obj: object) -> Any:
    """`obj` as what JSON can hold, without passwords. JSON has no NaN; the strings used here are read by `float()`.

    >>> plain({"loss": float("nan"), "kept": (1, 2), "worst": float("-inf")})
    {'loss': 'NaN', 'kept': [1, 2], 'worst': '-Infinity'}
    """
    if isinstance(obj, Mapping):
        return {str(key): plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [plain(value) for value in obj]
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else _NON_FINITE.get(obj, "NaN")
    if isinstance(obj, str):
        return without_passwords(obj)
    if obj is None or isinstance(obj, (bool, int)):
        return obj
    if hasattr(obj, "item"):  # a number of numpy or torch
        return plain(obj.item())
    if isinstance(obj, os.PathLike):
        return plain(os.fspath(obj))
    raise TypeError(f"a {type(obj).__name__} cannot be written as JSON")


def number(value: Any) -> float:
    """Numbers of Python, numpy and torch, and the strings that `plain` writes for NaN and infinities; integers stay.

    Raises:
        ValueError, TypeError, OverflowError: it is none of those, or an integer that is larger than any float.

    >>> number(3), number("-Infinity"), number(plain(0.1))
    (3, -inf, 0.1)
    """
    as_float = float(value)  # raises where an integer is larger than any float
    return value if type(value) is int else as_float


def read_json(path: str | os.PathLike[str], *, most: int | None = None) -> Any:
    """The content of a JSON file of at most so many bytes.

    Raises:
        ValueError: in one sentence: there is no such file, or it is too large.
        Damaged: what it holds is not JSON.
    """
    most = _MAX_JSON if most is None else most
    path = Path(path)
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    if path.stat().st_size > most:
        raise ValueError(f"{path} is too large: it has more than {most:,} bytes")
    content = path.read_bytes()
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deep
        raise Damaged(f"{path} is not valid JSON ({type(error).__name__}: {error})") from None


def read_object(path: str | os.PathLike[str], *, most: int | None = None) -> dict[str, Any]:
    """The object in a JSON file; empty when there is none that can be read."""
    with suppress(ValueError, OSError):
        found = read_json(path, most=most)
        return found if isinstance(found, dict) else {}
    return {}


def sha256(path: str | os.PathLike[str]) -> str:
    """Of the file's content, as hexadecimal digits; reads it in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def refusing() -> Iterator[None]:
    """Around the reading of a stranger's file: what a ValueError quotes from it comes out on one line, and not long.

    A file that the system does not let us read, or that needs more memory than there is, is refused too.
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
