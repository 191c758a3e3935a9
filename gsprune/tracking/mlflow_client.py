"""One run in an MLflow store: what is asked of MLflow's client, and the limits and errors of it."""

from __future__ import annotations

import contextlib
import logging
import os
import posixpath
import re
import shlex
import sqlite3
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from gsprune.extras import need
from gsprune.files.layout import PROGRAM
from gsprune.files.locks import Lock
from gsprune.settings.addresses import command_directory, database_file, resolve_tracking_uri
from gsprune.text.display import one_line, tag
from gsprune.text.redact import redacted, redacted_message
from gsprune.tracking.mlflow_flavour import write_flavour
from gsprune.tracking.mlflow_names import fit_tags
from gsprune.tracking.views import VIEW, experiment_tags, sweep_key, sweep_view

__all__ = ["DeletedError", "RemoteRun", "brief_error", "download_artifact", "import_client", "register_model"]

THREAD = "gsprune-tracking"
LOCKED = 10.0  # seconds that a local database which another program has locked may cost
RECORD_TAG = "gsprune.record"
SWEEP_TAG = "sweep.directory"  # of the parent run of a sweep
NESTED = "mlflow.parentRunId"


class DeletedError(RuntimeError):
    """Somebody deleted the experiment, or the run, while it was needed; the text says how to restore it."""


class RemoteRun:
    """A run in MLflow, one method for each kind of event; arguments are plain JSON values.

    What MLflow is known to have is not sent: parameters (which cannot change) and equal tags; metrics and pictures of a
    step too if `once`. Uses a client with an explicit run id: MLflow's global active run and tracking URI stay as they
    are.

    Args:
        run_id, record: how to find a run that exists: by its id, or else (if `once`) by its tag `gsprune.record`.
        once: this may not be the first process that sends this run's record.
        exact: metrics may be sent in another order than that of their steps. Else what has come before the last step of
            a metric is taken to be there.
    """

    def __init__(
        self,
        uri: str,
        *,
        experiment: str,
        artifact_root: str | os.PathLike[str] | None = None,
        run_name: str | None = None,
        parent_run_id: str | None = None,
        run_id: str | None = None,
        record: str | None = None,
        once: bool = False,
        exact: bool = False,
    ) -> None:
        self.run_id: str | None = None  # of the run that was found or created
        self.status: str | None = None
        self.began = 0  # milliseconds
        self.created = False
        self.ended: str | None = None  # the status that this process has given it
        self.record, self.once, self._exact = record, once, exact
        self.counts = dict.fromkeys(("run", "parameters", "tags", "metrics", "pictures", "files", "models"), 0)
        self._uri, self._experiment, self._wanted = uri, experiment, run_id
        self._name = None if run_name is None else one_line(run_name, 1000)
        self._location = _artifact_location(uri, experiment, artifact_root)
        self._parent = {NESTED: parent_run_id} if parent_run_id else {}
        self._params: set[str] = set()
        self._tags: dict[str, str] = {}
        self._last_steps: dict[str, int] = {}
        self._steps: dict[str, set[int]] = {}  # of metrics for which the last step was not enough to tell
        self._pictures: dict[tuple[str, str], list[str]] | None = None  # key and step -> names of files
        self._client: Any = None
        self.experiment_id = ""

    # finding and creating

    def attach(self) -> Any:
        """Go on with the run as it is in MLflow; returns it, or None if there is none."""
        self.experiment_id = self._open()
        found = self._find(self._wanted) if self._wanted else None
        if found is None and self.once and self.record:
            tagged = f"tags.`{RECORD_TAG}` = '{self.record}'"
            order = ["attributes.start_time ASC"]
            tried = self._client.search_runs([self.experiment_id], tagged, max_results=1, order_by=order)
            found = next(iter(tried), None)
        if found is not None:
            self.run_id, self.status, self.began = found.info.run_id, found.info.status, found.info.start_time
            self._params, self._tags = set(found.data.params), dict(found.data.tags)
            self._last_steps = {metric.key: metric.step for metric in found.data.to_proto().metrics}
        return found

    def start(self, *, params: Mapping[str, str], tags: Mapping[str, str], time_ms: int) -> None:
        found = None if self.run_id else self.attach()
        if found is not None and found.info.lifecycle_stage != "active":
            self.run_id, self._params, self._tags, self._last_steps = None, set(), {}, {}
        if self.run_id is None:
            self._create(tags, time_ms)
        elif found is not None:  # it was attached here: a run goes on
            self._client.update_run(self.run_id, status="RUNNING", name=self._name)
            self.status = "RUNNING"
        if SWEEP_TAG in tags and self.run_id is not None:
            self._offer_views({sweep_key(self.run_id): sweep_view(self.run_id)})
        self.params(params=params)
        self.tags(tags=tags)

    def _create(self, tags: Mapping[str, str], time_ms: int) -> None:
        first = dict(islice(fit_tags({**self._parent, **tags}).items(), 50))
        run = self._client.create_run(self.experiment_id, start_time=time_ms, run_name=self._name, tags=first)
        self.run_id, self.began, self._tags, self.created = run.info.run_id, time_ms, first, True
        self.status = "RUNNING"
        self.counts["run"] += 1

    def _offer_views(self, views: Mapping[str, str]) -> None:
        """Add views to the experiment; one that may not be changed does without."""
        from mlflow.exceptions import MlflowException

        with contextlib.suppress(MlflowException):
            for key, state in views.items():
                self._client.set_experiment_tag(self.experiment_id, f"{VIEW}{key}", state)

    # what belongs to the run

    def params(self, *, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        for some in chunks((item for item in params.items() if item[0] not in self._params), 100):
            self._client.log_batch(self.run_id, params=[Param(key, tag(value, 6000)) for key, value in some])
            self._params |= {key for key, _ in some}
            self.counts["parameters"] += len(some)

    def tags(self, *, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        wanted = fit_tags(tags)
        if RECORD_TAG in self._tags:  # by which the run is found; an earlier try may have had another
            wanted.pop(RECORD_TAG, None)
        for some in chunks([item for item in wanted.items() if self._tags.get(item[0]) != item[1]], 100):
            self._client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in some])
            self._tags |= dict(some)
            self.counts["tags"] += len(some)

    def metrics(self, *, events: Sequence[Mapping[str, Any]]) -> None:
        from mlflow.entities import Metric

        new: dict[tuple[str, int], Any] = {}
        for event in events:
            for key, value in event["values"].items():
                at = (key, event["step"])
                if not (self.once and self._has(*at)):
                    new.setdefault(at, Metric(key, float(value), event["time_ms"], event["step"]))
        for some in chunks(new.items(), 1000):
            self._client.log_batch(self.run_id, metrics=[metric for _, metric in some])
            for (key, step), _ in some:
                self._last_steps[key] = max(step, self._last_steps.get(key, step))
                self._steps.get(key, set()).add(step)
            self.counts["metrics"] += len(some)

    def _has(self, key: str, step: int) -> bool:
        """Whether MLflow has a metric at a step. The last steps come with the run; all steps cost a call per metric."""
        last = self._last_steps.get(key)
        if last is None or step >= last or not self._exact:
            return last is not None and step <= last
        if key not in self._steps:
            self._steps[key] = {metric.step for metric in self._client.get_metric_history(self.run_id, key)}
        return step in self._steps[key]

    def artifact(self, *, path: str, folder: str | None) -> None:
        self._client.log_artifact(self.run_id, path, folder)
        self.counts["files"] += 1

    def image(self, *, path: str, key: str, step: int, time_ms: int) -> None:
        """MLflow keeps two files for each picture, of which a call that was cut off may have left one."""
        from PIL import Image

        there = self._picture_files().get((key, str(step)), []) if self.once else []
        if any(name.endswith(".webp") for name in there):
            return
        with Image.open(path) as picture:
            if there:
                self._small_image(picture, there[0].removesuffix(".png") + "+compressed.webp")
            else:
                self._client.log_image(self.run_id, picture, key=key, step=step, timestamp=time_ms, synchronous=True)
        self.counts["pictures"] += 1

    def model(
        self,
        *,
        name: str,
        files: Sequence[str],
        params: Mapping[str, str],
        values: Mapping[str, float],
        step: int,
        time_ms: int,
        dataset: Mapping[str, str] | None = None,
    ) -> None:
        """A logged model with files, parameters and metrics of its own; it is ready once MLflow has all of it."""
        from mlflow.entities import LoggedModelOutput, Metric

        run = self._client.get_run(self.run_id)
        mine = f"name = '{name}' AND source_run_id = '{self.run_id}'"
        tried = self._client.search_logged_models([run.info.experiment_id], mine) if self.once else []
        model = next(iter(tried), None)
        if model is None:
            settings = {key: tag(value, 6000) for key, value in params.items()}
            model = self._client.create_logged_model(
                run.info.experiment_id, name=name, source_run_id=self.run_id, params=settings
            )
        elif str(model.status) == "READY":
            return
        outputs = getattr(run, "outputs", None)
        if model.model_id not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:
            self._client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step)])
        _log_files(self._client, model.model_id, self.run_id, [*map(Path, files)])
        on = {} if dataset is None else {f"dataset_{key}": value for key, value in dataset.items()}
        if dataset is not None:
            self._dataset(dataset)
        measured = [Metric(key, float(v), time_ms, step, model_id=model.model_id, **on) for key, v in values.items()]
        self._client.log_batch(self.run_id, metrics=measured)
        self._client.finalize_logged_model(model.model_id, "READY")
        self.counts["models"] += 1

    def _dataset(self, dataset: Mapping[str, str]) -> None:
        """An input of the run, which MLflow keeps once."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        what = Dataset(dataset["name"], dataset["digest"], source_type="code", source="{}")
        context = InputTag("mlflow.data.context", "eval")
        self._client.log_inputs(self.run_id, datasets=[DatasetInput(what, [context])])

    def _picture_files(self) -> dict[tuple[str, str], list[str]]:
        if self._pictures is None:
            self._pictures = {}
            for file in self._client.list_artifacts(self.run_id, "images"):
                name = posixpath.basename(file.path)
                self._pictures.setdefault(_image_of(name), []).append(name)
        return self._pictures

    def _small_image(self, picture: Any, name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            picture.thumbnail((256, 256))
            picture.save(Path(folder, name))
            self._client.log_artifact(self.run_id, str(Path(folder, name)), "images")
        self.tags(tags={"mlflow.loggedImages": "True"})

    def children(
        self, *, except_for: Sequence[str], killed: Sequence[str], finished: Sequence[str], time_ms: int
    ) -> None:
        """MLflow cannot know that a process was killed: its run stays RUNNING until someone ends it."""
        experiment_id = self._client.get_run(self.run_id).info.experiment_id
        nested = f"tags.{NESTED} = '{self.run_id}' and attributes.status = 'RUNNING'"
        found = self._client.search_runs([experiment_id], nested, max_results=5000)
        seen = {run.info.run_id for run in found}
        found += [run for run in map(self._find, set(killed) - seen) if run and run.info.status == "RUNNING"]
        for run in found:
            if run.info.run_id not in except_for:
                status = "FINISHED" if run.info.run_id in finished else "KILLED"
                self._client.set_terminated(run.info.run_id, status, end_time=time_ms)

    def finish(self, *, status: str, time_ms: int) -> None:
        if self.status != status:
            self._client.set_terminated(self.run_id, status, end_time=time_ms)
            self.status = self.ended = status

    # the store

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
        from mlflow import MlflowClient

        file = database_file(self._uri)
        if file is None:
            self._client = MlflowClient(tracking_uri=self._uri)
            return self._find_experiment()
        lock = Lock(Path(f"{file}.lock"))
        if not lock.acquire(seconds=100):
            raise TimeoutError(f"{lock.path} has been held by another process for 100 s")
        try:
            if is_locked(file, seconds=LOCKED - 2):  # MLflow itself would wait 20 s, several times
                raise TimeoutError(f"another program has locked the database for more than {LOCKED - 2:g} s")
            self._client = MlflowClient(tracking_uri=self._uri)
            return self._find_experiment()
        finally:
            lock.release()

    def _find_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

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
        self.experiment_id = str(found.experiment_id)
        wanted = experiment_tags(time_ms=int(time.time() * 1000)).items()
        missing = {
            key.removeprefix(VIEW): state for key, state in wanted if key.startswith(VIEW) and key not in found.tags
        }
        self._offer_views(missing)
        return self.experiment_id

    @property
    def _command(self) -> str:
        return f"MLFLOW_TRACKING_URI={shlex.quote(redacted(self._uri))} mlflow"

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


def chunks(items: Iterable[Any], size: int) -> Iterable[list[Any]]:
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


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
        where = redacted(uri)
        raise ValueError(f"the run {run_id} at {where} has no {name} to start from ({brief_error(error)})") from None


def register_model(tracking_uri: str, run_id: str, folder: Path, name: str, *, alias: str | None = None) -> str:
    """Add a folder to a run as a logged model, and register it as a new version of the model `name`.

    Args:
        alias: is moved to the new version.

    Returns what was made, such as "digits, version 3, champion".

    Raises:
        ValueError: MLflow cannot be reached, has no such run, or refuses the name.
    """
    uri = resolve_tracking_uri(tracking_uri)
    try:
        import_client(timeout_s=30)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        run = client.get_run(run_id)
        model = client.create_logged_model(run.info.experiment_id, name="taken", source_run_id=run_id)
        _log_files(client, model.model_id, run_id, sorted(folder.iterdir()))
        client.finalize_logged_model(model.model_id, "READY")
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = model.artifact_location  # "models:/<id>" would be looked for in the store of the environment
        version = client.create_model_version(name, source, run_id=run_id, model_id=model.model_id)
        if alias is not None:
            client.set_registered_model_alias(name, alias, version.version)
    except Exception as error:
        where = redacted(uri)
        raise ValueError(f"the model {name} cannot be registered at {where} ({brief_error(error)})") from None
    return ", ".join([version.name, f"version {version.version}", *([alias] if alias else [])])


def _log_files(client: Any, model_id: str, run_id: str | None, files: Sequence[Path]) -> None:
    """The files of a logged model; where a program is one of them, `mlflow.pytorch.load_model` loads the model."""
    for path in files:
        client.log_model_artifact(model_id, str(path))
    for program in (path for path in files if path.name == PROGRAM):
        with tempfile.TemporaryDirectory() as folder:
            write_flavour(Path(folder), program, model_id=model_id, run_id=run_id)
            for path in sorted(Path(folder).iterdir()):
                client.log_model_artifact(model_id, str(path))


def brief_error(error: BaseException) -> str:
    text = redacted_message(" ".join(f"{type(error).__name__}: {error}".split()))
    return text if len(text) <= 400 else text[:397] + "..."
