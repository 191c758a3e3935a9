"""MLflow's store behind one interface: addresses, names, limits and errors of its client."""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import posixpath
import re
import shlex
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from gsprune.extras import need
from gsprune.files.disk import plain
from gsprune.files.locks import Lock
from gsprune.settings.addresses import command_directory, database_file, resolve_tracking_uri
from gsprune.text.display import one_line, tag
from gsprune.text.redact import without_passwords
from gsprune.tracking.tracker import brief_error
from gsprune.tracking.views import experiment_tags

THREAD = "gsprune-tracking"
LOCKED = 10.0  # seconds that a local database which another program has locked may cost
RECORD_TAG = "gsprune.record"


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
            if is_locked(file, seconds=LOCKED - 2):  # MLflow itself would wait 20 s, several times
                raise TimeoutError(f"another program has locked the database for more than {LOCKED - 2:g} s")
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


def import_client(timeout_s: float) -> None:
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
    mlflow = need("mlflow")
    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        logging.getLogger(mlflow.__name__).setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").addFilter(_not_ours)
    for handler in logging.getLogger(mlflow.__name__).handlers:
        handler.addFilter(_not_ours)


def _not_ours(record: logging.LogRecord) -> bool:
    """Lets pass what other threads' calls log: a fault of ours is followed by success or by our own warning."""
    return record.threadName != THREAD


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
    import_client(timeout_s)
    return Store(uri, experiment, artifact_root, run_name, parent_run_id, None)


def is_locked(file: Path, *, seconds: float) -> bool:
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


def origin() -> dict[str, str]:
    """What the columns "User" and "Source" of MLflow's table show."""
    tags = {"mlflow.source.name": sys.argv[0] or "python", "mlflow.source.type": "LOCAL"}
    try:
        return {**tags, "mlflow.user": getpass.getuser()}
    except (OSError, KeyError, ImportError):  # a container's user may have no name
        return tags


def fit_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {Names.clean(key): tag(str(value)) for key, value in tags.items()}


def megabytes(path: str | None) -> float:
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
        import_client(timeout_s=30)
        from mlflow import MlflowClient

        Path(folder).mkdir(parents=True, exist_ok=True)
        return Path(MlflowClient(tracking_uri=uri).download_artifacts(run_id, name, str(folder)))
    except Exception as error:
        where = without_passwords(uri)
        raise ValueError(f"the run {run_id} at {where} has no {name} to start from ({brief_error(error)})") from None
