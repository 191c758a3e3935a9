"""SIGTERM and SIGINT (Ctrl-C, a time limit): a run stops between two steps, with the signal's exit code."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interrupted", "Stop"]

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(SystemExit):
    """The process was asked to stop; its exit code is 128 + the number of the signal: 143 SIGTERM, 130 SIGINT.

    >>> str(Interrupted(signal.SIGTERM)), Interrupted(signal.SIGINT).code
    ('stopped by SIGTERM', 130)
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signal = signal.Signals(signum)

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int]]:
        return Interrupted, (int(self.signal),)  # sent from a worker process to its parent

    def __str__(self) -> str:
        return f"stopped by {self.signal.name}"


class Stop:
    """Within this context a signal raises `Interrupted`; within `deferred`, the first one waits until `check`.

    An ignored signal (nohup) stays ignored. Outside the main thread, where Python handles no signals, nothing changes.

    Args:
        patient: within `deferred` a second signal waits too: the parent process forwards its signals and decides.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self._signum: int | None = None
        self._patient = patient
        self._deferring = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def signum(self) -> int:
        """The number of the signal received; 0 for none."""
        return self._signum or 0

    def check(self) -> None:
        """Raise `Interrupted` if a signal was received."""
        if self._signum is not None:
            raise Interrupted(self._signum)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block the caller polls `signum` and stops by itself; the end of the block calls `check`."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        self.check()

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._before[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for signum, handler in self._before.items():
            # None: installed by a program around Python, and no handler that Python could put back
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, signum: int, _: FrameType | None) -> None:
        waits = self._deferring and (self._signum is None or self._patient)
        self._signum = signum
        if not waits:
            raise Interrupted(signum)
