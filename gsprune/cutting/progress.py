"""One line on the terminal while a network is cut: what is done, how far it is, how long it still takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from gsprune.text.table import clock

Report = Callable[[str, float], None]  # what is being done; the share of it that is done, in [0, 1]


class Line:
    """Writes to a stream, over itself; to no stream that is not a terminal.

    >>> import io
    >>> stream = io.StringIO(); stream.isatty = lambda: True
    >>> line = Line(stream); line("scoring", 0.5); line.close()
    >>> "scoring  50 %" in stream.getvalue()
    True
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._shows = self._stream.isatty()
        self._what, self._since, self._width, self._last = "", 0.0, 0, 0.0

    def __call__(self, what: str, share: float) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._since, self._last = what, now, 0.0
        if self._shows and (now - self._last > 0.2 or share >= 1):
            self._last = now
            left = (now - self._since) * (1 - share) / share if share > 0 else None
            text = f"{what} {100 * share:3.0f} %" + (f", {clock(left)} left" if left is not None and share < 1 else "")
            self._stream.write("\r" + text.ljust(self._width))
            self._stream.flush()
            self._width = len(text)

    def close(self) -> None:
        """Leave an empty line."""
        if self._shows and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()


def silent(what: str, share: float) -> None:
    """Shows nothing."""
