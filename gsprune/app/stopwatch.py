"""Seconds that a run spends on each of its parts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Stopwatch:
    """Seconds of wall-clock time by part; a part inside another takes its time out of the outer one.

    >>> watch = Stopwatch("start", "train")
    >>> with watch.part("train"):
    ...     pass
    >>> list(watch.read()), watch.read()["start"] > 0
    (['start', 'train'], True)
    """

    def __init__(self, first: str, *others: str) -> None:
        """The watch runs from now on, for `first` while nothing else is open."""
        self._seconds = dict.fromkeys((first, *others), 0.0)
        self._open, self._since = first, time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def add(self, seconds: Mapping[str, float]) -> None:
        """What an earlier process has spent on these parts."""
        for name, more in seconds.items():
            self._seconds[name] += more

    def read(self) -> dict[str, float]:
        self._switch(self._open)
        return dict(self._seconds)

    def _switch(self, name: str) -> str:
        before, now = self._open, time.perf_counter()
        self._seconds[before] += now - self._since
        self._open, self._since = name, now
        return before
