"""Sends what an outbox holds to one MLflow run: while the run goes on, within deadlines, or later."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from gsprune.settings.addresses import database_file
from gsprune.tracking import mlflow_client
from gsprune.tracking.mlflow_client import THREAD, RemoteRun, chunks, is_locked
from gsprune.tracking.outbox import Event, Outbox

__all__ = ["Deadlines", "Drain"]

Call = Callable[[str, Callable[[], object], float], object]  # kind of the call, what to do, megabytes it transfers
_TOGETHER = 200  # events with metrics, in one call
_REQUESTS = {
    "start": 4,
    "image": 4,
    "model": 12,
}  # of calls that ask several things of a server, and would do harm twice
_SECONDS_A_MB = 0.1  # that a file may take for nothing
_BRIEF = 1.0  # seconds for a server that has left this process waiting
_silent: dict[str, float] = {}  # servers that left this process waiting -> until when they are asked only briefly


class Drain:
    """Sends what MLflow has not acknowledged; the first fault ends it, and what was sent until then stays so.

    Args:
        call: makes each call, `Deadlines` for instance.
    """

    def __init__(self, outbox: Outbox, run: RemoteRun, call: Call = lambda kind, job, megabytes: job()) -> None:
        self.outbox, self.run, self._call = outbox, run, call

    def begin(self) -> None:
        """Find the run in MLflow, or create it."""
        for place, event in list(self.outbox.pending.items()):
            if event.get("kind") == "start":
                self._send(place, event)

    def send(self, *, seconds: float = math.inf) -> None:
        """Send the rest, metrics first; begin no call for another event later than `seconds` from now."""
        until = time.monotonic() + seconds
        self.begin()
        self._send_metrics()
        for place, event in list(self.outbox.pending.items()):
            if time.monotonic() > until:
                return
            self._send(place, event)

    def _send_metrics(self) -> None:
        pending = [(place, event) for place, event in self.outbox.pending.items() if event.get("kind") == "metrics"]
        for some in chunks(pending, _TOGETHER):
            self._call("metrics", partial(self.run.metrics, events=[event for _, event in some]), 0.0)
            self.outbox.acknowledge([place for place, _ in some])

    def _send(self, place: int, event: Event) -> None:
        if event:
            kind, size, fields = event["kind"], 0.0, {name: item for name, item in event.items() if name != "kind"}
            if "path" in fields:
                path = self.outbox.folder / fields["path"]
                fields["path"], size = str(path), path.stat().st_size / 1e6
            if "files" in fields:
                files = [self.outbox.folder / name for name in fields["files"]]
                fields["files"], size = [*map(str, files)], sum(path.stat().st_size for path in files) / 1e6
            if fields.get("time_ms", 0) is None:  # an end whose time is not on record
                fields["time_ms"] = self.outbox.last_ms or self.run.began
            self._call(kind, partial(getattr(self.run, kind), **fields), size)
        if self.run.created and self.outbox.acknowledged:  # by a run that is no longer there
            self.outbox.forget()
        self.run.created = False
        self.outbox.acknowledge([place])


class Deadlines:
    """Makes calls to MLflow in a thread of their own, each with a deadline, and raises what they raise.

    A call that fails at once is made a second time. Answers that take longer than usual (0.2 s; 0.5 s for a local
    database) use up a patience of `timeout_s` in all, which shortens the deadlines that follow. A run that this process
    begins within ten minutes of a server's silence gives that server a second to answer.

    Raises:
        TimeoutError: the call did not end before its deadline.
    """

    def __init__(self, uri: str, timeout_s: float) -> None:
        local = database_file(uri) is not None
        brief = _BRIEF if _silent.get(uri, 0.0) > time.monotonic() else timeout_s
        self._uri, self._timeout_s, self._caller = uri, timeout_s, _Caller()
        self.limit = max(timeout_s, mlflow_client.LOCKED) if local else timeout_s
        self._start_limit = max(timeout_s, 120.0) if local else min(timeout_s, brief)  # another may be creating it
        self._patience = max(timeout_s, 30.0) if local else timeout_s  # seconds that slow answers may still cost
        self._normal = 0.5 if local else 0.2  # seconds that an answer may take for nothing

    def __call__(self, kind: str, job: Callable[[], object], megabytes: float = 0.0) -> None:
        transfer, begin = _SECONDS_A_MB * megabytes, time.monotonic()
        try:
            self._call(kind, job, transfer)
        except TimeoutError:
            if kind == "start":
                _silent[self._uri] = time.monotonic() + 600
            raise
        self._lose_patience(kind, time.monotonic() - begin - transfer)
        if kind == "start":
            _silent.pop(self._uri, None)

    def at_once(self, job: Callable[[], object]) -> None:
        """A call that takes no patience."""
        self._caller.call(job, self.limit)

    def close(self) -> None:
        self._caller.close()

    def _call(self, kind: str, job: Callable[[], object], transfer: float) -> None:
        """A call that fails at once is made once more if twice does no harm: the server may have hung up just then."""
        left = min(self.limit, self._patience + self._usual(kind))
        limit = self._start_limit if kind == "start" else left + transfer
        begin = time.monotonic()
        try:
            self._caller.call(job, limit)
        except TimeoutError as error:
            if time.monotonic() - begin < limit:  # the call's own, which knows why
                raise
            if (file := database_file(self._uri)) is not None and is_locked(file, seconds=0):
                raise TimeoutError(f"another program has locked the database for more than {limit:g} s") from error
            if left == self.limit or kind == "start":
                raise
            raise TimeoutError(f"its slow answers have cost tracking.timeout_s={self._timeout_s:g} in all") from error
        except Exception:
            seconds = time.monotonic() - begin
            if kind in _REQUESTS or seconds > self._normal:
                raise
            self._caller.call(job, limit - seconds)

    def _lose_patience(self, kind: str, seconds: float) -> None:
        if kind != "start" or self._start_limit <= self._timeout_s:
            self._patience = max(0.0, self._patience - max(0.0, seconds - self._usual(kind)))

    def _usual(self, kind: str) -> float:
        return self._normal * _REQUESTS.get(kind, 1)


class _Caller:
    """Runs calls one after the other in a thread of their own, so that one which never returns can be left behind.

    The thread is a daemon: it does not keep the interpreter from ending.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def close(self) -> None:
        """The thread ends, at once or when its call returns; a call after this one has a new thread."""
        if self._thread is not None:
            self._jobs.put(None)
        self._jobs, self._thread = queue.SimpleQueue(), None

    def call(self, job: Callable[[], object], seconds: float) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, args=(self._jobs,), name=THREAD, daemon=True)
            self._thread.start()
        answer: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._jobs.put((job, answer))
        try:
            error = answer.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError(f"no answer within {seconds:g} s") from None
        if error is not None:
            raise error if isinstance(error, Exception) else RuntimeError(repr(error))

    @staticmethod
    def _work(jobs: queue.SimpleQueue[Any]) -> None:
        while (task := jobs.get()) is not None:
            job, answer = task
            try:
                job()
            except BaseException as error:
                answer.put(error)
            else:
                answer.put(None)
            del task, job, answer  # a thread that waits keeps nothing alive
