"""The record of a run: always on the local disk, and in MLflow too when asked for and reachable.

A fault of tracking never ends a training run and costs it seconds at most. Everything is written to the output
directory first; after the first call to MLflow that fails or takes too long the run makes no further one, also when the
server is back, and what was not sent is listed in `unsent.jsonl`: `python -m gsprune.sync` uploads it. Imports the
standard library; mlflow only in `start`.

In the output directory:

    metrics.jsonl                  one JSON object a line: {"step": 3, "time": 1753000000.0, "val/loss": 0.1, ...}
    config.yaml                    the configuration, what it takes from the environment unresolved
    tracking.json                  where the run was sent, under which id, and whether that stopped
    tracking.lock                  held while the run goes on, so that nobody uploads it under its hands
    figures/<key>/0003.png         every picture given to `log_image`
    unsent.jsonl                   only after a fault: the calls that did not reach MLflow, in order
    sending.jsonl                  only while a call is under way, or after a kill in it: that call
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import posixpath
import queue
import re
import shlex
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from gsprune.addresses import command_directory, database_file, resolve_tracking_uri
from gsprune.files import aside, number, plain, read_object, spared, write_atomic, write_json
from gsprune.locks import Lock
from gsprune.redact import clean_texts, cleaned, told, without_passwords
from gsprune.shown import logger, one_line, tag
from gsprune.views import experiment_tags

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Self

__all__ = ["MLflowTracker", "SilentTracker", "Tracker", "read_metrics"]

Status = Literal["FINISHED", "FAILED", "KILLED"]
Event = dict[str, Any]
log = logger(__name__)
_THREAD = "gsprune-tracking"
_REQUESTS = {"start": 4, "image": 4}  # of calls that ask several things of a server, and would do harm twice
_SECONDS_A_MB = 0.1  # that a file may take for nothing
_LOCKED = 10.0  # seconds that a local database which another program has locked may cost
_BRIEF = 1.0  # seconds for a server that has left this process waiting
_silent: dict[str, float] = {}  # servers that left this process waiting -> until when they are asked only briefly
RECORD, LOCK, SENDING = "tracking.json", "tracking.lock", "sending.jsonl"
RECORD_TAG = "gsprune.record"


# --- the local record --------------------------------------------------------------------------------------


class Tracker:
    """Records a run in its output directory and nowhere else (`tracking=none`); the base of every tracker.

    No method raises because something could not be recorded: a disk that is full costs a warning. As a context
    manager it calls `finish` with "FINISHED", "KILLED" (KeyboardInterrupt) or "FAILED" (any other exception).

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> with Tracker(folder.name) as tracker:
    ...     tracker.start(config={"epochs": 1}, tags={})
    ...     tracker.log_metrics({"sparsity": 0.5}, step=0)
    >>> read_metrics(folder.name + "/metrics.jsonl")[0]["sparsity"]
    0.5
    """

    run_id: str | None = None

    def __init__(self, output_dir: str | os.PathLike[str], **_: object) -> None:
        self.output_dir = Path(output_dir).absolute()
        self.unwritten: list[str] = []  # files that a fault of the disk has kept out of the record
        self._metrics = _Log(self.output_dir / "metrics.jsonl")
        self._finished = False

    def start(
        self,
        *,
        config: Mapping[str, Any],
        tags: Mapping[str, str],
        rows: Sequence[Mapping[str, float]] | None = None,
    ) -> None:
        """Begin the record: `config` is the configuration as a plain nested dict, of which secrets are masked.

        Args:
            rows: to go on with the record of a run that was interrupted, the metrics of step 1, 2, ... that it is known
                to have logged; what it has recorded after them is dropped, and comes again. None: a new record.
        """
        self._locally(self.output_dir, lambda: self.output_dir.mkdir(parents=True, exist_ok=True))
        if rows is not None:
            self._locally(self._metrics.path, lambda: _rewind(self.output_dir, rows))
        for old in ("metrics.jsonl", "unsent.jsonl") if rows is None else ():  # of another run in the same directory
            path = self.output_dir / old
            self._locally(path, lambda path=path: path.unlink(missing_ok=True))  # type: ignore[misc]
        path = self.output_dir / "config.yaml"
        self._locally(path, lambda: _write_yaml(path, cleaned(config)))

    def log_metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """One line of metrics.jsonl. NaN and infinities are written as strings that `float()` reads."""
        self._record_metrics(values, step)

    def log_artifact(self, path: str | os.PathLike[str], *, folder: str | None = None) -> None:
        """Keep a file or folder. One that lies outside the output directory is copied into it, under `folder`."""
        self._keep(path, folder)

    def log_image(self, array: np.ndarray, *, key: str, step: int) -> None:
        """Keep a picture (height, width, 3; uint8) as figures/<key>/<step>.png."""
        self._save_image(array, key, step)

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Add tags to the run; the local record has no use for them."""

    def log_params(self, params: Mapping[str, str]) -> None:
        """Add parameters that were not known at the start; the local record has no use for them."""

    def close_children(
        self, *, except_for: Sequence[str], killed: Sequence[str] = (), finished: Sequence[str] = ()
    ) -> None:
        """End the runs nested under this one that are still open, as KILLED or `finished`, but for some; and `killed`
        ones wherever they are. The local record has none."""

    def close_killed(self) -> None:
        """End a run that is open here because its process was killed, as FAILED. The local record has no end."""

    def finish(self, status: Status) -> None:
        """Close the record. Calls after the first do nothing."""
        self._finished = True
        self._locally(self._metrics.path, self._metrics.flush)  # there may be room by now

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        if kind is None:
            self.finish("FINISHED")
        else:
            self.finish("KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")

    def _record_metrics(self, values: Mapping[str, float], step: int) -> Event:
        now, numbers = time.time(), {name: number(value) for name, value in values.items()}
        row = {"step": step, "time": round(now, 3), **plain(numbers)}
        self._locally(self._metrics.path, lambda: self._metrics.append(row))
        return {"values": plain(numbers), "step": step, "time_ms": int(now * 1000)}

    def _keep(self, path: str | os.PathLike[str], folder: str | None) -> Path:
        source = Path(path).absolute()
        if source.is_relative_to(self.output_dir):
            return source
        target = self.output_dir / (folder or "") / source.name
        copied = self._locally(target, lambda: _copy(source, target))
        return target if copied else source

    def _save_image(self, array: np.ndarray, key: str, step: int) -> Path:
        from gsprune.drawing import save_picture

        path = self.output_dir / "figures" / re.sub(r"[^\w.\-]", "_", key) / f"{step:04d}.png"
        self._locally(path, lambda: save_picture(path, array))
        return path

    def _locally(self, path: Path, write: Callable[[], object]) -> bool:
        """Do a local write; a fault (disk full, no right to write) is one warning for each file."""
        done = False
        with spared(os.path.relpath(path, self.output_dir).replace(os.sep, "/"), self.unwritten):
            write()
            done = True
        return done


class SilentTracker(Tracker):
    """Records nothing at all: of several processes that train together, one has the record."""

    def _locally(self, path: Path, write: Callable[[], object]) -> bool:
        return True


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, numbers only; a line torn by a crash is left out. No file: no rows."""
    rows = []
    lines = Path(path).read_bytes().split(b"\n") if Path(path).is_file() else []
    for line in lines:
        try:
            row = json.loads(line)
            rows.append({name: number(value) for name, value in row.items()})
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            continue
    return rows


class _Log:
    """A file of JSON lines. What could not be written (disk full) is kept, and written with the next line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept: list[str] = []

    def append(self, row: Mapping[str, Any]) -> None:
        self._kept.append(json.dumps(row, allow_nan=False) + "\n")
        self.flush()

    def flush(self) -> None:
        if self._kept:
            _append(self.path, "".join(self._kept).encode())
            self._kept.clear()


def _append(path: Path, lines: bytes) -> None:
    """Add lines, all or none. One that a crash left unfinished is closed first, so that it spoils only itself."""
    with path.open("ab+", buffering=0) as file:  # opened each time: 0.1 ms, and nothing to lose in a crash
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(-1, os.SEEK_END)
            lines = lines if file.read(1) == b"\n" else b"\n" + lines
        try:
            while lines:
                lines = lines[file.write(lines) :]
        except OSError:
            file.truncate(size)
            raise


def _rewind(folder: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Make metrics.jsonl the `rows` of step 1, 2, ..., and leave out of unsent.jsonl what is after them, and an end."""
    kept = {row["step"]: row for row in reversed(_json_lines(folder / "metrics.jsonl")) if type(row.get("step")) is int}
    lines = []
    for step, values in enumerate(rows, 1):
        known = {name: number(value) for name, value in values.items()}
        old = {name: value for name, value in kept.get(step, {}).items() if name not in ("step", "time")}
        same = step in kept and old == plain(known)  # it has the time at which it was logged
        lines.append(kept[step] if same else {"step": step, "time": round(time.time(), 3), **plain(known)})
    _write_lines(folder / "metrics.jsonl", lines)
    unsent, events = folder / "unsent.jsonl", dict[str, Event]()
    for place, event in enumerate(_json_lines(unsent)):
        if event.get("kind") == "finish":
            continue
        at = event.get("step") if event.get("kind") in ("metrics", "image") else None
        if type(at) is not int:
            events[str(place)] = event
        elif at <= len(rows):
            events.setdefault(f"{event['kind']} {at}", event)  # the numbers at the end have the last epoch's step
    if unsent.exists():
        _write_lines(unsent, events.values())


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one a line; a line torn by a crash is left out."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [item for item in found if isinstance(item, dict)]


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode())


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True, copy_function=_copy_file)
    else:
        _copy_file(source, target)


def _copy_file(source: str | Path, target: str | Path) -> None:
    with aside(target) as temporary:
        shutil.copy2(source, temporary)


def _write_yaml(path: Path, config: Mapping[str, Any]) -> None:
    from omegaconf import OmegaConf

    write_atomic(path, OmegaConf.to_yaml(OmegaConf.create(dict(config))).encode())


def _brief(error: BaseException) -> str:
    text = told(" ".join(f"{type(error).__name__}: {error}".split()))
    return text if len(text) <= 400 else text[:397] + "..."


# --- MLflow ------------------------------------------------------------------------------------------------


class MLflowTracker(Tracker):
    """The local record of `Tracker`, and the same in one MLflow run.

    Every call to MLflow has a deadline and stands behind a circuit breaker: after the first that fails (at once: made
    a second time) or is late, or when slow answers of a server have cost `timeout_s` in all beyond 0.2 s each (a local
    database: half a second), one warning says so and MLflow is left alone until `python -m gsprune.sync`. A run that
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
        self._limit = max(timeout_s, _LOCKED) if local else timeout_s
        brief = _BRIEF if _silent.get(uri, 0.0) > time.monotonic() else timeout_s
        self._start_limit = max(timeout_s, 120.0) if local else min(timeout_s, brief)  # another may be creating it
        self._caller = _Caller()
        self._patience = max(timeout_s, 30.0) if local else timeout_s  # seconds that slow answers may still cost
        self._normal = 0.5 if local else 0.2  # seconds that an answer may take for nothing
        self._names = Names()
        self._unsent = _Log(self.output_dir / "unsent.jsonl")
        self._lock = Lock(self.output_dir / LOCK)
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
        tags = {**_origin(), **tags, RECORD_TAG: str(self._identity["record"])}
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
        note = read_object(self.output_dir / RECORD)
        mine = {"status": "RUNNING", "run_id": self._continued, "tracking_uri": without_passwords(self.tracking_uri)}
        if not mine.items() <= note.items() or not self._lock.acquire():
            return
        self._identity, self.stopped = {key: note.get(key) for key in self._identity}, note.get("stopped")
        for event in _json_lines(self.output_dir / SENDING):  # the call in which it was killed
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
        """Whether MLflow lacks something, of this try or one before it, that `python -m gsprune.sync` can send."""
        return self.stopped is not None or self._unsent.path.is_file()

    def _connect(self) -> None:
        try:
            _import_client(self.timeout_s)
        except Exception as error:  # not installed, or broken: the run needs neither
            self._stop(error)

    def _send(self, kind: str, **event: Any) -> None:
        """Make one call to MLflow, unless the breaker is open: then list it in unsent.jsonl."""
        event |= {name: clean_texts(event[name]) for name in ("params", "tags") if name in event}
        listed = {"kind": kind, **event, **({"path": self._inside(event["path"])} if "path" in event else {})}
        if self.stopped is None:
            transfer, begin = _SECONDS_A_MB * _megabytes(event.get("path")), time.monotonic()
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
            if (file := database_file(self.tracking_uri)) is not None and _is_locked(file, seconds=0):
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
        self.stopped = told(str(error)) if isinstance(error, DeletedError) else _brief(error)
        log.warning(
            "tracking to MLflow at %s stopped (%s); the run goes on, and its record is in %s: "
            "`python -m gsprune.sync` with that directory uploads it",
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
        path = self.output_dir / RECORD
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
            self._thread = threading.Thread(target=self._work, args=(self._jobs,), name=_THREAD, daemon=True)
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


class DeletedError(RuntimeError):
    """Somebody has deleted the experiment, or the run, while it was needed; the text says how it comes back."""


class Store:
    """What a run asks of MLflow, one method for each kind of event; arguments are plain JSON values.

    Uses a client with an explicit run id: mlflow's global active run and tracking URI stay as they are.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        artifact_root: str | os.PathLike[str] | None,
        run_name: str | None,
        parent_run_id: str | None,
        run_id: str | None,
    ) -> None:
        self.run_id: str | None = None
        self._continued = run_id
        self.once = False  # whether what the run has already of the following is not sent again
        self._params: set[str] = set()
        self._steps: dict[str, int] = {}  # the last step of each metric: steps only grow
        self._images: set[tuple[str, str]] = set()  # key and step
        self._uri, self._experiment = uri, experiment
        self._run_name = None if run_name is None else one_line(run_name, 1000)
        self._location = _artifact_location(uri, experiment, artifact_root)
        self._parent = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
        self._client: Any = None

    def start(self, *, params: Mapping[str, str], tags: Mapping[str, str], time_ms: int) -> None:
        experiment_id = self._open()
        if self._reopen():
            return self.tags(tags=tags)
        tags = fit_tags({**self._parent, **tags})
        run = self._client.create_run(
            experiment_id, start_time=time_ms, run_name=self._run_name, tags=dict(islice(tags.items(), 50))
        )
        self.run_id = run.info.run_id
        self.tags(tags=dict(islice(tags.items(), 50, None)))
        self.params(params=params)

    def params(self, *, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        entries = [Param(key, tag(value, 6000)) for key, value in params.items() if key not in self._params]
        for some in _chunks(entries, 100):
            self._client.log_batch(self.run_id, params=some)

    def metrics(self, *, values: Mapping[str, float], step: int, time_ms: int) -> None:
        from mlflow.entities import Metric

        new = {name: value for name, value in values.items() if step > self._steps.get(name, step - 1)}
        entries = [Metric(name, float(value), time_ms, step) for name, value in new.items()]
        for some in _chunks(entries, 1000):
            self._client.log_batch(self.run_id, metrics=some)

    def tags(self, *, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        for some in _chunks([RunTag(key, value) for key, value in fit_tags(tags).items()], 100):
            self._client.log_batch(self.run_id, tags=some)

    def artifact(self, *, path: str, folder: str | None) -> None:
        log_files = self._client.log_artifacts if os.path.isdir(path) else self._client.log_artifact
        log_files(self.run_id, path, folder)

    def image(self, *, path: str, key: str, step: int, time_ms: int) -> None:
        from PIL import Image

        if (key, str(step)) in self._images:
            return
        with Image.open(path) as picture:
            self._client.log_image(self.run_id, picture, key=key, step=step, timestamp=time_ms, synchronous=True)

    def children(
        self, *, except_for: Sequence[str], killed: Sequence[str], finished: Sequence[str], time_ms: int
    ) -> None:
        """MLflow cannot know that a process was killed: its run stays RUNNING until someone ends it."""
        experiment_id = self._client.get_run(self.run_id).info.experiment_id
        nested = f"tags.mlflow.parentRunId = '{self.run_id}' and attributes.status = 'RUNNING'"
        found = self._client.search_runs([experiment_id], nested, max_results=5000)
        seen = {run.info.run_id for run in found}
        found += [run for run in map(self._find, set(killed) - seen) if run and run.info.status == "RUNNING"]
        for run in found:
            if run.info.run_id not in except_for:
                status = "FINISHED" if run.info.run_id in finished else "KILLED"
                self._client.set_terminated(run.info.run_id, status, end_time=time_ms)

    def finish(self, *, status: str, time_ms: int) -> None:
        if self.run_id is None:  # another process has begun the run
            self.attach(self._continued, None)
        self._client.set_terminated(self.run_id, status, end_time=time_ms)

    def attach(self, run_id: str | None, record: str | None) -> Any:
        """Go on with the run of that id, or else of that record, as it is; returns it, or None if there is neither."""
        experiment_id = self._open()
        found = self._find(run_id) if run_id else None
        if found is None and record:
            tagged = f"tags.`{RECORD_TAG}` = '{record}'"
            order = ["attributes.start_time ASC"]
            found = next(iter(self._client.search_runs([experiment_id], tagged, max_results=1, order_by=order)), None)
        self.run_id = found.info.run_id if found is not None else None
        return found

    def steps(self, key: str) -> set[int]:
        """The steps at which the run has that metric."""
        return {metric.step for metric in self._client.get_metric_history(self.run_id, key)}

    def many_metrics(self, entries: Iterable[tuple[str, float, int, int]]) -> None:
        """(name, value, time in milliseconds, step) each."""
        from mlflow.entities import Metric

        for some in _chunks((Metric(*entry) for entry in entries), 1000):
            self._client.log_batch(self.run_id, metrics=some)

    def files(self, folder: str) -> set[str]:
        """The names of the run's artifacts in a folder."""
        return {posixpath.basename(found.path) for found in self._client.list_artifacts(self.run_id, folder)}

    def find(self, run_id: str) -> Any:
        """A run of any experiment, deleted or not, or None if this store has no such one."""
        self._open()
        return self._find(run_id)

    def copy_files(self, run_id: str) -> int:
        """Give this run the artifacts of another one; returns how many files they are."""
        if not self._client.list_artifacts(run_id):
            return 0
        with tempfile.TemporaryDirectory() as folder:
            self._client.download_artifacts(run_id, "", folder)
            self._client.log_artifacts(self.run_id, folder)
            return sum(path.is_file() for path in Path(folder).rglob("*"))

    def _reopen(self) -> bool:
        """Go on with the run of that id; False when there is none, or it was deleted."""
        found = self._find(self._continued) if self._continued else None
        if found is None or found.info.lifecycle_stage != "active":
            return False
        self.run_id = self._continued
        self._client.update_run(self.run_id, status="RUNNING", name=self._run_name)
        if self.once:
            self._params = set(found.data.params)
            self._steps = {metric.key: metric.step for metric in found.data.to_proto().metrics}
            names = [posixpath.basename(file.path) for file in self._client.list_artifacts(self.run_id, "images")]
            self._images = {_image_of(name) for name in names}
        return True

    def _find(self, run_id: str) -> Any:
        """The run, or None if this store has no such one; any other fault is raised."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # the latter: no such id
                return None
            raise

    def _open(self) -> str:
        """Connect and return the experiment's id. Under a lock: two processes that create one database break it."""
        file = database_file(self._uri)
        if file is None:
            return self._find_experiment()
        lock = Lock(Path(f"{file}.lock"))
        if not lock.acquire(seconds=100):
            raise TimeoutError(f"{lock.path} has been held by another process for 100 s")
        try:
            if _is_locked(file, seconds=_LOCKED - 2):  # MLflow itself would wait 20 s, several times
                raise TimeoutError(f"another program has locked the database for more than {_LOCKED - 2:g} s")
            return self._find_experiment()
        finally:
            lock.release()

    def _find_experiment(self) -> str:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self._client = MlflowClient(tracking_uri=self._uri)
        found = self._client.get_experiment_by_name(self._experiment)
        if found is None:
            try:
                tags = experiment_tags(time_ms=int(time.time() * 1000))
                return str(self._client.create_experiment(self._experiment, self._location, tags=tags))
            except MlflowException:  # another process was faster
                found = self._client.get_experiment_by_name(self._experiment)
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise DeletedError(self._how_to_restore(found.experiment_id))
        return str(found.experiment_id)

    @property
    def _command(self) -> str:
        return f"MLFLOW_TRACKING_URI={shlex.quote(without_passwords(self._uri))} mlflow"

    def _how_to_restore(self, experiment_id: str) -> str:
        return (
            f"the experiment {self._experiment} was deleted in MLflow: "
            f"`{self._command} experiments restore -x {experiment_id}` brings it back, "
            "and tracking.experiment=<name> takes another"
        )

    def explain(self) -> None:
        """
        Raises:
            DeletedError: the run, or its experiment, was deleted.
        """
        run = self._find(self.run_id) if self.run_id else None
        if run is None:
            return
        found = self._client.get_experiment(run.info.experiment_id)
        if found.lifecycle_stage != "active":
            raise DeletedError(self._how_to_restore(found.experiment_id))
        if run.info.lifecycle_stage != "active":
            restore = f"{self._command} runs restore --run-id {self.run_id}"
            raise DeletedError(f"the run {self.run_id} was deleted in MLflow: `{restore}` brings it back")


def _image_of(name: str) -> tuple[str, str]:
    """Key and step of a picture, by the file name that MLflow gave it; its releases differ in the signs between.

    >>> _image_of("masks~a+step+3+timestamp+1753000000000+b7d1.png")
    ('masks/a', '3')
    """
    key, _, step, *_ = [*re.split("[+%]", name), "", "", ""]
    return re.sub("[~#]", "/", key), step


def _import_client(timeout_s: float) -> None:
    """Import mlflow with short HTTP time-outs (its own add up to minutes) and without chatter on the console.

    MLflow makes no call twice by itself: one that was only slow would leave two runs. What the user has set in the
    environment stays. MLflow's usage reports are off unless the user sets
    MLFLOW_DISABLE_TELEMETRY=false: without a network they would hold up the end of the process.
    """
    settings = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, round(timeout_s))),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    import mlflow

    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        logging.getLogger(mlflow.__name__).setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").addFilter(_not_ours)
    for handler in logging.getLogger(mlflow.__name__).handlers:
        handler.addFilter(_not_ours)


def _not_ours(record: logging.LogRecord) -> bool:
    """Lets pass what other threads' calls log: a fault of ours is followed by success or by our own warning."""
    return record.threadName != _THREAD


def connect(
    uri: str,
    *,
    experiment: str,
    artifact_root: str | None = None,
    run_name: str | None = None,
    parent_run_id: str | None = None,
    timeout_s: float = 30,
) -> Store:
    """A store without deadlines but those of HTTP, for uploads that nobody's training waits for."""
    _import_client(timeout_s)
    return Store(uri, experiment, artifact_root, run_name, parent_run_id, None)


def _is_locked(file: Path, *, seconds: float) -> bool:
    """Whether another process has kept a SQLite file locked for that long; one that is not there is not."""
    if not file.is_file():
        return False
    try:
        with contextlib.closing(sqlite3.connect(file, timeout=seconds, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")
    except sqlite3.OperationalError as error:
        return "locked" in str(error)
    except sqlite3.Error:  # not a database: MLflow says so
        return False
    return False


def _artifact_location(uri: str, experiment: str, root: str | os.PathLike[str] | None) -> str | None:
    file = database_file(uri)
    name = re.sub(r"[^\w.\-]", "_", experiment)
    if isinstance(root, str) and "://" in root:
        return f"{root.rstrip('/')}/{name}"
    if file is not None:
        return (command_directory() / root if root else file.parent / "mlartifacts").joinpath(name).as_uri()
    if root and Path(root).is_absolute():
        return (Path(root) / name).as_uri()
    return None  # a folder relative to this process means nothing to a server


def _origin() -> dict[str, str]:
    """What the columns "User" and "Source" of MLflow's table show."""
    tags = {"mlflow.source.name": sys.argv[0] or "python", "mlflow.source.type": "LOCAL"}
    try:
        return {**tags, "mlflow.user": getpass.getuser()}
    except (OSError, KeyError, ImportError):  # a container's user may have no name
        return tags


def fit_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {Names.clean(key): tag(str(value)) for key, value in tags.items()}


def _megabytes(path: str | None) -> float:
    if path is None or not os.path.exists(path):
        return 0.0
    files = [Path(path)] if os.path.isfile(path) else [file for file in Path(path).rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6


def _chunks(items: Iterable[Any], size: int) -> Iterable[list[Any]]:
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


class Names:
    """Names that MLflow accepts, one for each of ours, the same every time, no two alike.

    >>> names = Names()
    >>> names["kept/layers[0].heads"], names["kept/layers(0).heads"], names["kept/layers[0].heads"]
    ('kept/layers_0_.heads', 'kept/layers_0_.heads_2', 'kept/layers_0_.heads')
    """

    def __init__(self) -> None:
        self._given: dict[str, str] = {}

    def __getitem__(self, name: str) -> str:
        if name not in self._given:
            taken, clean, number = set(self._given.values()), self.clean(name), 2
            choice = clean
            while choice in taken:
                choice, number = f"{clean}_{number}", number + 1
            self._given[name] = choice
        return self._given[name]

    @staticmethod
    def clean(name: str) -> str:
        """Letters, digits and `_ - . / space` stay (MLflow on Windows takes no more); at most 240 characters."""
        clean = posixpath.normpath(re.sub(r"[^\w.\-/ ]", "_", name)).lstrip("/")
        while clean.startswith("../"):
            clean = clean[3:]
        return clean[:240].rstrip("/") if clean not in ("", ".", "..") else "_"


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested configuration as dotted names and texts; lists of plain values stay one entry.

    >>> flatten({"pruner": {"keep": None, "include": ["*"]}, "stages": [{"epochs": 3}]})
    {'pruner.keep': 'null', 'pruner.include': '["*"]', 'stages.0.epochs': '3'}
    """
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            text = value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False)
            flat[name] = without_passwords(text)
    return flat


def download_artifact(tracking_uri: str | None, run_id: str, name: str, folder: str | os.PathLike[str]) -> Path:
    """Fetch a file of another run into `folder`.

    Raises:
        ValueError: MLflow cannot be reached, or has no such run or file.
    """
    uri = resolve_tracking_uri(tracking_uri)
    try:
        _import_client(timeout_s=30)
        from mlflow import MlflowClient

        Path(folder).mkdir(parents=True, exist_ok=True)
        return Path(MlflowClient(tracking_uri=uri).download_artifacts(run_id, name, str(folder)))
    except Exception as error:
        where = without_passwords(uri)
        raise ValueError(f"the run {run_id} at {where} has no {name} to start from ({_brief(error)})") from None
