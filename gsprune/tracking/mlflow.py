"""A run's record in MLflow: one thread calls, a circuit breaker stops calling, what was not sent stays on disk."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsprune.files.disk import read_object, write_json
from gsprune.files.layout import SENDING, TRACKING, TRACKING_LOCK
from gsprune.files.locks import Lock
from gsprune.settings.addresses import database_file, resolve_tracking_uri
from gsprune.text.display import logger
from gsprune.text.redact import clean_texts, cleaned, told, without_passwords
from gsprune.tracking.store import (
    LOCKED,
    RECORD_TAG,
    THREAD,
    DeletedError,
    Names,
    Store,
    flatten,
    import_client,
    is_locked,
    megabytes,
    origin,
)
from gsprune.tracking.tracker import Event, Log, Status, Tracker, brief_error, json_lines

if TYPE_CHECKING:
    import numpy as np

__all__ = ["MLflowTracker"]

_REQUESTS = {"start": 4, "image": 4}  # of calls that ask several things of a server, and would do harm twice
_SECONDS_A_MB = 0.1  # that a file may take for nothing
log = logger(__name__)
_BRIEF = 1.0  # seconds for a server that has left this process waiting
_silent: dict[str, float] = {}  # servers that left this process waiting -> until when they are asked only briefly


# --- MLflow ------------------------------------------------------------------------------------------------


class MLflowTracker(Tracker):
    """The local record of `Tracker`, and the same in one MLflow run.

    Every call to MLflow has a deadline and stands behind a circuit breaker: after the first that fails (at once: made
    a second time) or is late, or when slow answers of a server have cost `timeout_s` in all beyond 0.2 s each (a local
    database: half a second), one warning says so and MLflow is left alone until `gsprune sync`. A run that
    the same process begins within ten minutes of a server's silence gives that server a second to speak.

    Args:
        tracking_uri: MLflow's own; None takes `MLFLOW_TRACKING_URI`, else `mlflow.db` in the directory of the command.
        experiment: created when missing, with an absolute artifact location.
        artifact_root: a folder or URI where a new experiment keeps its files, in a folder of its name. None:
            `mlartifacts` beside a local database, the server's choice otherwise (so too for a relative folder).
        run_name: shown in MLflow; None lets MLflow invent one.
        parent_run_id: nests this run under that one (a sweep).
        run_id: goes on with that run, which may have ended, if it is still there.
        timeout_s: seconds a server may take for one call (files: and one more for every 10 MB). A local
            database, which other processes may keep waiting, is given 10 at least, and 30 in all.

    `run_id` is None until `start` has reached MLflow.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        *,
        tracking_uri: str | None = None,
        experiment: str = "gsprune",
        artifact_root: str | os.PathLike[str] | None = None,
        run_name: str | None = None,
        parent_run_id: str | None = None,
        run_id: str | None = None,
        timeout_s: float = 5.0,
        **_: object,
    ) -> None:
        if not timeout_s > 0:
            raise ValueError(f"tracking.timeout_s={timeout_s} is not allowed: it must be above 0")
        super().__init__(output_dir)
        uri = resolve_tracking_uri(tracking_uri)
        self.tracking_uri, self.experiment, self.timeout_s = uri, experiment, timeout_s
        self._store = Store(uri, experiment, artifact_root, run_name, parent_run_id, run_id)
        local = database_file(uri) is not None
        self._limit = max(timeout_s, LOCKED) if local else timeout_s
        brief = _BRIEF if _silent.get(uri, 0.0) > time.monotonic() else timeout_s
        self._start_limit = max(timeout_s, 120.0) if local else min(timeout_s, brief)  # another may be creating it
        self._caller = _Caller()
        self._patience = max(timeout_s, 30.0) if local else timeout_s  # seconds that slow answers may still cost
        self._normal = 0.5 if local else 0.2  # seconds that an answer may take for nothing
        self._names = Names()
        self._unsent = Log(self.output_dir / "unsent.jsonl")
        self._lock = Lock(self.output_dir / TRACKING_LOCK)
        self._identity = {
            "record": uuid.uuid4().hex,  # a tag of the run, which is found by it when its id was never heard
            "run_name": run_name,
            "parent_run_id": parent_run_id,
            "artifact_root": None if artifact_root is None else without_passwords(os.fspath(artifact_root)),
        }
        self._continued = run_id
        self.stopped: str | None = None  # why MLflow is no longer called

    def start(
        self,
        *,
        config: Mapping[str, Any],
        tags: Mapping[str, str],
        rows: Sequence[Mapping[str, float]] | None = None,
    ) -> None:
        super().start(config=config, tags=tags, rows=rows)
        self._store.once = rows is not None
        self._lock.acquire()
        self._sent()  # what a run that was killed was at is done again by one that goes on
        self._note("RUNNING")
        params = {self._names[key]: value for key, value in flatten(cleaned(config)).items()}
        self._connect()
        tags = {**origin(), **tags, RECORD_TAG: str(self._identity["record"])}
        self._send("start", params=params, tags=tags, time_ms=int(time.time() * 1000))
        self.run_id = self._store.run_id
        if (self.output_dir / "config.yaml").is_file():
            self._send("artifact", path=str(self.output_dir / "config.yaml"), folder=None)
        self._note("RUNNING")

    def log_metrics(self, values: Mapping[str, float], *, step: int) -> None:
        event = self._record_metrics(values, step)
        named = {self._names[name]: value for name, value in event.pop("values").items()}
        self._send("metrics", values=named, **event)

    def log_artifact(self, path: str | os.PathLike[str], *, folder: str | None = None) -> None:
        kept = self._keep(path, folder)
        if kept.exists():  # a full disk may have kept it from being written
            self._send("artifact", path=str(kept), folder=folder)

    def log_image(self, array: np.ndarray, *, key: str, step: int) -> None:
        path, now = self._save_image(array, key, step), int(time.time() * 1000)
        key = re.sub(r"[^a-zA-Z0-9_\-./ ]", "_", key)
        if path.exists():
            self._send("image", path=str(path), key=key, step=step, time_ms=now)

    def log_tags(self, tags: Mapping[str, str]) -> None:
        self._send("tags", tags=dict(tags))

    def log_params(self, params: Mapping[str, str]) -> None:
        self._send("params", params={self._names[key]: value for key, value in params.items()})

    def close_children(
        self, *, except_for: Sequence[str], killed: Sequence[str] = (), finished: Sequence[str] = ()
    ) -> None:
        runs = {"except_for": list(except_for), "killed": list(killed), "finished": list(finished)}
        self._send("children", **runs, time_ms=int(time.time() * 1000))

    def close_killed(self) -> None:
        note = read_object(self.output_dir / TRACKING)
        mine = {"status": "RUNNING", "run_id": self._continued, "tracking_uri": without_passwords(self.tracking_uri)}
        if not mine.items() <= note.items() or not self._lock.acquire():
            return
        self._identity, self.stopped = {key: note.get(key) for key in self._identity}, note.get("stopped")
        for event in json_lines(self.output_dir / SENDING):  # the call in which it was killed
            self._locally(self._unsent.path, lambda event=event: self._unsent.append(event))  # type: ignore[misc]
        if self.stopped is None:
            self._connect()
        self.finish("FAILED")

    def finish(self, status: Status) -> None:
        if self._finished:
            return
        super().finish(status)
        self._send("finish", status=status, time_ms=int(time.time() * 1000))
        self._locally(self._unsent.path, self._unsent.flush)
        self._note(status)
        self._lock.release()
        self._caller.close()

    @property
    def unsent(self) -> bool:
        """Whether MLflow lacks something, of this try or one before it, that `gsprune sync` can send."""
        return self.stopped is not None or self._unsent.path.is_file()

    def _connect(self) -> None:
        try:
            import_client(self.timeout_s)
        except Exception as error:  # not installed, or broken: the run needs neither
            self._stop(error)

    def _send(self, kind: str, **event: Any) -> None:
        """Make one call to MLflow, unless the breaker is open: then list it in unsent.jsonl."""
        event |= {name: clean_texts(event[name]) for name in ("params", "tags") if name in event}
        listed = {"kind": kind, **event, **({"path": self._inside(event["path"])} if "path" in event else {})}
        if self.stopped is None:
            transfer, begin = _SECONDS_A_MB * megabytes(event.get("path")), time.monotonic()
            self._sending(listed)
            try:
                self._call(kind, event, transfer)
            except Exception as error:
                self._stop(error)
                if isinstance(error, TimeoutError) and kind == "start":
                    _silent[self.tracking_uri] = time.monotonic() + 600
            else:
                self._lose_patience(kind, time.monotonic() - begin - transfer)
                if kind == "start":
                    _silent.pop(self.tracking_uri, None)
                return self._sent()
        if kind != "children":  # which runs are open is true of now only
            self._locally(self._unsent.path, lambda: self._unsent.append(listed))
        self._sent()

    def _sending(self, event: Event) -> None:
        """Say what is under way, for a run that is killed in it; metrics are on record anyhow."""
        if event["kind"] not in ("metrics", "children"):
            with contextlib.suppress(OSError):
                (self.output_dir / SENDING).write_text(json.dumps(event) + "\n", encoding="utf-8")

    def _sent(self) -> None:
        with contextlib.suppress(OSError):
            (self.output_dir / SENDING).unlink(missing_ok=True)

    def _call(self, kind: str, event: Event, transfer: float) -> None:
        """A call that fails at once is made once more if twice does no harm: the server may have hung up just then."""
        left = min(self._limit, self._patience + self._usual(kind))
        limit = self._start_limit if kind == "start" else left + transfer
        begin = time.monotonic()
        try:
            self._caller.call(lambda: getattr(self._store, kind)(**event), limit)
        except TimeoutError as error:
            if (file := database_file(self.tracking_uri)) is not None and is_locked(file, seconds=0):
                raise TimeoutError(f"another program has locked the database for more than {limit:g} s") from error
            if left == self._limit or kind == "start":
                raise
            raise TimeoutError(f"its slow answers have cost tracking.timeout_s={self.timeout_s:g} in all") from error
        except Exception:
            seconds = time.monotonic() - begin
            if kind in _REQUESTS or seconds > self._normal:
                raise
            self._caller.call(lambda: getattr(self._store, kind)(**event), limit - seconds)

    def _lose_patience(self, kind: str, seconds: float) -> None:
        if kind != "start" or self._start_limit <= self.timeout_s:
            self._patience = max(0.0, self._patience - max(0.0, seconds - self._usual(kind)))

    def _usual(self, kind: str) -> float:
        return self._normal * _REQUESTS.get(kind, 1)

    def _inside(self, path: str) -> str:
        """A path as seen from the output directory, which may be moved before somebody reads this."""
        kept = Path(path)
        return kept.relative_to(self.output_dir).as_posix() if kept.is_relative_to(self.output_dir) else path

    def _stop(self, error: BaseException) -> None:
        if "'active' state" in str(error):
            try:
                self._caller.call(self._store.explain, self._limit)
            except Exception as reason:
                error = reason if isinstance(reason, DeletedError) else error
        self._caller.close()
        self.stopped = told(str(error)) if isinstance(error, DeletedError) else brief_error(error)
        log.warning(
            "tracking to MLflow at %s stopped (%s); the run goes on, and its record is in %s: "
            "`gsprune sync` with that directory uploads it",
            without_passwords(self.tracking_uri),
            self.stopped,
            self.output_dir,
        )
        self._note("RUNNING")

    def _note(self, status: str) -> None:
        note = {
            "tracking_uri": without_passwords(self.tracking_uri),
            "experiment": self.experiment,
            "run_id": self._store.run_id or self._continued,
            "status": status,
            "stopped": self.stopped,
            **self._identity,
        }
        path = self.output_dir / TRACKING
        self._locally(path, lambda: write_json(path, note))


class _Caller:
    """Runs calls one after the other in a thread of their own, so that one which never returns can be left behind.

    The thread is a daemon: it does not keep the interpreter from ending.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], queue.SimpleQueue[Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def close(self) -> None:
        """The thread ends, at once or when its call returns; a call after this one has a new thread."""
        if self._thread is not None:
            self._jobs.put(None)
        self._jobs, self._thread = queue.SimpleQueue(), None

    def call(self, job: Callable[[], None], seconds: float) -> None:
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
    def _work(jobs: queue.SimpleQueue[tuple[Callable[[], None], queue.SimpleQueue[Any]] | None]) -> None:
        while (task := jobs.get()) is not None:
            job, answer = task
            try:
                job()
            except BaseException as error:
                answer.put(error)
            else:
                answer.put(None)
            del task, job, answer  # a thread that waits keeps nothing alive
