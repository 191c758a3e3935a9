"""What a job calls to record a run: always on the local disk, and in MLflow too when asked for and reachable.

A fault of tracking never ends a run and costs it seconds at most. Everything is written to the output directory first
(`outbox.py` describes the files) and then sent from there (`drain.py`); after the first call to MLflow that fails or
takes too long this process makes no further one, and `gsprune sync` sends the rest later. Besides the record:

    config.yaml                    the configuration, with what it takes from the environment unresolved
    tracking.lock                  held while the run goes on, so that nobody uploads it meanwhile
    figures/<key>/0003.png         every picture given to `log_image`
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from gsprune.files.disk import aside, json_data, number, read_object, spared, write_atomic, write_json
from gsprune.files.layout import CONFIG, METRICS, OUTBOX, SENDING, TRACKING, TRACKING_LOCK, UNSENT
from gsprune.files.locks import Lock
from gsprune.settings.addresses import resolve_tracking_uri
from gsprune.text.display import logger
from gsprune.text.redact import redacted, redacted_data, redacted_message, redacted_texts
from gsprune.tracking.drain import Deadlines, Drain
from gsprune.tracking.mlflow_client import RECORD_TAG, SWEEP_TAG, DeletedError, RemoteRun, brief_error, import_client
from gsprune.tracking.mlflow_names import Names, flatten
from gsprune.tracking.outbox import Log, Outbox, identifier, read_metrics, rewind
from gsprune.tracking.views import Page, run_page, sweep_page

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Self

__all__ = ["MLflowTracker", "SilentTracker", "Tracker", "read_metrics"]

Status = Literal["FINISHED", "FAILED", "KILLED"]
log = logger(__name__)


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
        self._metrics = Log(self.output_dir / METRICS)
        self._finished = False

    def start(
        self,
        *,
        config: Mapping[str, Any],
        tags: Mapping[str, str],
        rows: Sequence[Mapping[str, float]] | None = None,
    ) -> None:
        """Begin the record: `config` is the configuration as a plain nested dict, of which secrets are redacted.

        Args:
            rows: to go on with the record of a run that was interrupted, the metrics of step 1, 2, ... that it is known
                to have logged; what it has recorded after them is dropped, and comes again. None: a new record.
        """
        self._locally(self.output_dir, lambda: self.output_dir.mkdir(parents=True, exist_ok=True))
        if rows is not None:
            self._locally(self._metrics.path, lambda: rewind(self.output_dir, rows))
        for old in (METRICS, OUTBOX, UNSENT, SENDING) if rows is None else ():  # of another run in the same directory
            path = self.output_dir / old
            self._locally(path, lambda path=path: path.unlink(missing_ok=True))  # type: ignore[misc]
        path = self.output_dir / CONFIG
        self._locally(path, lambda: _write_yaml(path, redacted_data(config)))

    def log_metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """One line of metrics.jsonl. NaN and infinities are written as strings that `float()` reads."""
        self._record_metrics(values, step)

    def log_artifact(self, path: str | os.PathLike[str], *, folder: str | None = None) -> None:
        """Keep a file or folder. One that lies outside the output directory is copied into it, under `folder`."""
        self._keep(path, folder)

    def log_image(self, array: np.ndarray, *, key: str, step: int) -> None:
        """Keep a picture (height, width, 3; uint8) as figures/<key>/<step>.png."""
        self._save_image(array, key, step)

    def log_model(
        self,
        name: str,
        files: Sequence[str | os.PathLike[str]],
        *,
        params: Mapping[str, str],
        values: Mapping[str, float],
        step: int,
        dataset: Mapping[str, str] | None = None,
    ) -> None:
        """Add a network of a run, with its files, settings and numbers; here its files are kept as artifacts.

        Args:
            name: of letters, digits, "-" and "_".
            files: inside the output directory.
            dataset: what the numbers were measured on, a `name` and a `digest` of at most 36 characters.
        """
        for path in files:
            self.log_artifact(path, folder=f"models/{name}")

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

    def _record_metrics(self, values: Mapping[str, float], step: int) -> dict[str, Any]:
        numbers = {name: number(value) for name, value in values.items()}
        row = {"step": step, "time": round(time.time(), 3), **json_data(numbers)}
        self._locally(self._metrics.path, lambda: self._metrics.append(row))
        return row

    def _keep(self, path: str | os.PathLike[str], folder: str | None) -> Path:
        source = Path(path).absolute()
        if source.is_relative_to(self.output_dir):
            return source
        target = self.output_dir / (folder or "") / source.name
        copied = self._locally(target, lambda: _copy(source, target))
        return target if copied else source

    def _save_image(self, array: np.ndarray, key: str, step: int) -> Path:
        from gsprune.plots.drawing import save_picture

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


class MLflowTracker(Tracker):
    """The local record of `Tracker`, and the same in one MLflow run.

    Every call to MLflow has a deadline and stands behind a circuit breaker: after the first that fails (at once: made
    a second time) or is late, or when slow answers of a server have cost `timeout_s` in all beyond 0.2 s each (a local
    database: half a second), one warning says so and MLflow is left alone until `gsprune sync`. A run that
    the same process begins within ten minutes of a server's silence gives that server a second to answer. A run that
    goes on sends first what its earlier processes could not send, for `timeout_s` at most.

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
        log_program: whether a job is to write each logged model as a program too, which `mlflow.pytorch.load_model`
            loads.

    Raises:
        ValueError: `timeout_s` is not above 0, or MLflow cannot track at that address.

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
        log_program: bool = True,
        **_: object,
    ) -> None:
        if not timeout_s > 0:
            raise ValueError(f"tracking.timeout_s={timeout_s} is not allowed: it must be above 0")
        super().__init__(output_dir)
        self.tracking_uri, self.experiment, self.timeout_s = resolve_tracking_uri(tracking_uri), experiment, timeout_s
        self.log_program = log_program
        self.stopped: str | None = None  # why MLflow is no longer called
        self._identity = {
            "record": uuid.uuid4().hex,  # a tag of the run, which is found by it when its id was never heard
            "run_name": run_name,
            "parent_run_id": parent_run_id,
            "artifact_root": None if artifact_root is None else redacted(os.fspath(artifact_root)),
        }
        self._continued, self._names = run_id, Names()
        self._run = RemoteRun(
            self.tracking_uri,
            experiment=experiment,
            artifact_root=artifact_root,
            run_name=run_name,
            parent_run_id=parent_run_id,
            run_id=run_id,
        )
        self._outbox = Outbox(self.output_dir, write=self._locally)
        self._deadlines = Deadlines(self.tracking_uri, timeout_s)
        self._lock = Lock(self.output_dir / TRACKING_LOCK)
        self._is_sweep = False

    def start(
        self,
        *,
        config: Mapping[str, Any],
        tags: Mapping[str, str],
        rows: Sequence[Mapping[str, float]] | None = None,
    ) -> None:
        super().start(config=config, tags=tags, rows=rows)
        self._lock.acquire()
        if rows is not None:
            self._go_on()
        self._note("RUNNING")
        params = {self._names[key]: value for key, value in flatten(redacted_data(config)).items()}
        self._is_sweep = SWEEP_TAG in tags
        tags = {**_origin(), **tags, RECORD_TAG: str(self._identity["record"])}
        began = min(self._outbox.times("start"), default=_now_ms())
        self._add("start", params=params, tags=tags, time_ms=began)
        self._connect()
        self._send(seconds=self.timeout_s)
        self._outbox.put_off()
        self.run_id = self._run.run_id
        if (self.output_dir / CONFIG).is_file():
            self._log("artifact", path=self.output_dir / CONFIG, folder=None)
        self._note("RUNNING")

    def log_metrics(self, values: Mapping[str, float], *, step: int) -> None:
        row = self._record_metrics(values, step)
        named = {self._names[name]: _rounded(value) for name, value in row.items() if name not in ("step", "time")}
        self._log("metrics", values=named, step=step, time_ms=round(row["time"] * 1000))

    def log_artifact(self, path: str | os.PathLike[str], *, folder: str | None = None) -> None:
        kept = self._keep(path, folder)
        for path in sorted(kept.rglob("*")) if kept.is_dir() else [kept]:
            place = PurePosixPath(folder or "", *(path.parent.relative_to(kept).parts if path != kept else ()))
            if path.is_file():  # a full disk may have kept it from being written
                self._log("artifact", path=path, folder=None if place == PurePosixPath() else str(place))

    def log_image(self, array: np.ndarray, *, key: str, step: int) -> None:
        path, now = self._save_image(array, key, step), _now_ms()
        key = re.sub(r"[^a-zA-Z0-9_\-./ ]", "_", key)
        if path.exists():
            self._log("image", path=path, key=key, step=step, time_ms=now)

    def log_model(
        self,
        name: str,
        files: Sequence[str | os.PathLike[str]],
        *,
        params: Mapping[str, str],
        values: Mapping[str, float],
        step: int,
        dataset: Mapping[str, str] | None = None,
    ) -> None:
        written = [path for path in map(Path, files) if path.is_file()]
        inside = [path.absolute().relative_to(self.output_dir).as_posix() for path in written]
        named = {self._names[key]: value for key, value in json_data(dict(values)).items()}
        if inside:
            fields = {"files": inside, "params": dict(params), "values": named, "step": step, "time_ms": _now_ms()}
            known = {} if dataset is None else {"dataset": dict(dataset)}
            self._log("model", name=name, **fields, **known)

    def log_tags(self, tags: Mapping[str, str]) -> None:
        self._log("tags", tags=dict(tags))

    def log_params(self, params: Mapping[str, str]) -> None:
        self._log("params", params={self._names[key]: value for key, value in params.items()})

    def close_children(
        self, *, except_for: Sequence[str], killed: Sequence[str] = (), finished: Sequence[str] = ()
    ) -> None:
        """Which runs are open is true of now only: this is no part of the record."""
        runs = {"except_for": list(except_for), "killed": list(killed), "finished": list(finished)}
        self._call(lambda: self._deadlines("children", partial(self._run.children, **runs, time_ms=_now_ms())))

    def close_killed(self) -> None:
        note = read_object(self.output_dir / TRACKING)
        mine = {"status": "RUNNING", "run_id": self._continued, "tracking_uri": redacted(self.tracking_uri)}
        if not mine.items() <= note.items() or not self._lock.acquire():
            return
        self._identity, self.stopped = {key: note.get(key) for key in self._identity}, note.get("stopped")
        self._go_on()
        self._connect()
        self._call(lambda: self._deadlines("attach", self._run.attach))
        self.finish("FAILED")

    def finish(self, status: Status) -> None:
        if self._finished:
            return
        super().finish(status)
        self._log("finish", status=status, time_ms=_now_ms())
        self._outbox.flush()
        self._note(status)
        self._lock.release()
        self._deadlines.close()

    @property
    def page(self) -> Page:
        """The page of this run in MLflow; of a sweep the page of its jobs."""
        note = {"tracking_uri": self.tracking_uri, "experiment_id": self._run.experiment_id, "run_id": self.run_id}
        return sweep_page(note) if self._is_sweep else run_page(note)

    @property
    def unsent(self) -> bool:
        """Whether MLflow lacks something, of this process or one before it, that `gsprune sync` can send."""
        return self.stopped is not None or self._outbox.lacking

    def _go_on(self) -> None:
        """Take over the record of earlier processes: what MLflow may have of it is not sent twice."""
        try:
            self._outbox.load()
        except (OSError, ValueError) as error:
            self._stop(error)
        note = read_object(self.output_dir / TRACKING)
        self._identity["record"] = self._run.record = identifier(note, "record") or self._identity["record"]
        self._run.once = True

    def _log(self, kind: str, **event: Any) -> None:
        self._add(kind, **event)
        self._send()

    def _add(self, kind: str, **event: Any) -> None:
        event |= {name: redacted_texts(event[name]) for name in ("params", "tags") if name in event}
        if "path" in event:  # as seen from the output directory, which may be moved before it is sent
            inside = event["path"].is_relative_to(self.output_dir)
            event["path"] = (event["path"].relative_to(self.output_dir) if inside else event["path"]).as_posix()
        self._outbox.add(kind, **event)

    def _connect(self) -> None:
        self._call(lambda: import_client(self.timeout_s))  # not installed, or broken: the run needs neither

    def _send(self, **limit: float) -> None:
        self._call(lambda: Drain(self._outbox, self._run, self._deadlines).send(**limit))

    def _call(self, job: Callable[[], object]) -> None:
        """Do something that needs MLflow, unless the breaker is open; a fault opens it."""
        if self.stopped is None:
            try:
                job()
            except Exception as error:
                self._stop(error)

    def _stop(self, error: BaseException) -> None:
        if "'active' state" in str(error):
            try:
                self._deadlines.at_once(self._run.explain)
            except Exception as reason:
                error = reason if isinstance(reason, DeletedError) else error
        self._deadlines.close()
        self.stopped = redacted_message(str(error)) if isinstance(error, DeletedError) else brief_error(error)
        log.warning(
            "tracking to MLflow at %s stopped (%s); the run goes on, and its record is in %s: "
            "`gsprune sync` with that directory uploads it",
            redacted(self.tracking_uri),
            self.stopped,
            self.output_dir,
        )
        self._note("RUNNING")

    def _note(self, status: str) -> None:
        note = {
            "tracking_uri": redacted(self.tracking_uri),
            "experiment": self.experiment,
            "experiment_id": self._run.experiment_id or None,
            "run_id": self._run.run_id or self._continued,
            "status": status,
            "stopped": self.stopped,
            **self._identity,
        }
        path = self.output_dir / TRACKING
        self._locally(path, lambda: write_json(path, note))


def _rounded(value: Any) -> Any:
    """A number as a table shows it: six digits; metrics.jsonl has all.

    >>> _rounded(0.9916666746139526), _rounded(93546), _rounded("NaN")
    (0.991667, 93546, 'NaN')
    """
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _now_ms() -> int:
    return int(time.time() * 1000)


def _origin() -> dict[str, str]:
    """What the columns "User" and "Source" of MLflow's table show."""
    tags = {"mlflow.source.name": sys.argv[0] or "python", "mlflow.source.type": "LOCAL"}
    try:
        return {**tags, "mlflow.user": getpass.getuser()}
    except (OSError, KeyError, ImportError):  # a container's user may have no name
        return tags


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
