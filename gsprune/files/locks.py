"""Locks between processes, on files. The system frees a lock when its holder dies.

On a file system without locks, or on a full disk, a warning says so and the lock keeps nobody out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gsprune.extras import need
from gsprune.text.display import logger

__all__ = ["Lock", "file_name"]

log = logger(__name__)


class Lock:
    """A lock on a file, which is created with its folder on first use.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> first, second = Lock(Path(folder.name) / "a.lock"), Lock(Path(folder.name) / "a.lock")
    >>> first.acquire(), second.acquire()
    (True, False)
    >>> first.release(); second.acquire(); second.release()
    True
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Any = None  # filelock comes with an extra: imported when a lock is taken

    def acquire(self, *, seconds: float = 0) -> bool:
        """Whether the lock is held now. Waits up to `seconds` for another holder; without limit if negative."""
        filelock = need("filelock")
        self._lock = self._lock or filelock.FileLock(self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=seconds)
        except filelock.Timeout:
            return False
        except (OSError, NotImplementedError) as error:
            log.warning("%s cannot be locked (%s): nothing keeps other processes out", self.path, error)
        return True

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def is_held(self) -> bool:
        """Whether another process, or another `Lock`, holds it now."""
        if not self.path.exists():
            return False
        free = self.acquire()
        if free:
            self.release()
        return not free

    @contextmanager
    def held(self, *, waiting_for: str) -> Iterator[None]:
        """Hold the lock; if another process has it, log "waiting for another process <waiting_for>" and wait."""
        if not self.acquire():
            log.info("waiting for another process %s", waiting_for)
            self.acquire(seconds=-1)
        try:
            yield
        finally:
            self.release()


def file_name(what: str) -> str:
    """A file name for any text: readable at its start, and no two alike.

    >>> file_name("job a/0") == file_name("job a_0"), len(file_name("x" * 1000))
    (False, 77)
    """
    readable = re.sub(r"[^\w.\-]", "_", what)[:60]
    return f"{readable}-{hashlib.sha256(what.encode('utf-8', 'replace')).hexdigest()[:16]}"
