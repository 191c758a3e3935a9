"""Upload what a run could not send to MLflow while it trained: `gsprune sync DIRECTORY`.

The directory is a run's output directory, a sweep's (its jobs come to lie under its parent run), or a folder of those.
What a run has left there (tracking.py) is compared with what MLflow has, and the rest is sent: the run itself if it was
never made, parameters, tags, each metric of a step once, files, pictures, the status and when it ended, all with the
times and steps on record. A second call has nothing to send. One that was cut off is simply made again.

Files are data from strangers: types and sizes are checked, nothing outside the run's directory is read, and what cannot
be used is named and left out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from typing import Any

from gsprune.files.disk import number, read_json, write_json
from gsprune.files.layout import NOT_JOBS, RESULT, SENDING, SWEEP
from gsprune.files.layout import TRACKING as RECORD
from gsprune.files.layout import TRACKING_LOCK as LOCK
from gsprune.files.locks import Lock
from gsprune.settings.addresses import SCHEMES, database_file, resolve_tracking_uri
from gsprune.text.names import natural
from gsprune.text.redact import say, without_passwords
from gsprune.tracking.store import RECORD_TAG, DeletedError, Names, Store, connect, fit_tags

__all__ = ["Sent", "main", "sync"]

PARENT = ".gsprune"  # where a sweep keeps the record of its parent run
NESTED = "mlflow.parentRunId"
ENDED = ("FINISHED", "FAILED", "KILLED")
CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4")
_MAX_BYTES = 16_000_000  # of a JSON file, and of one line of JSON
_MAX_LINES = 500_000_000  # bytes of a file of JSON lines
_MAX_PIXELS = 100_000_000
_MAX_DEPTH = 16
_MAX_PRINTED = 20


@dataclass
class Sent:
    """What was sent of one run; `left_out` says what could not be used, and why."""

    folder: Path
    run_id: str | None = None
    uri: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    ended: str | None = None
    left_out: list[str] = field(default_factory=list)

    def add(self, what: str, count: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + count

    def __bool__(self) -> bool:
        return bool(self.ended) or any(self.counts.values())

    def __str__(self) -> str:
        """
        >>> print(Sent(Path("3"), counts={"run": 1, "parameters": 40, "metrics": 2}, ended="FINISHED"))
        1 run, 40 parameters, 2 metrics, its end (FINISHED)
        """
        parts = [f"{count} {what}" for what, count in self.counts.items() if count]
        return ", ".join([*parts, f"its end ({self.ended})"] if self.ended else parts) or "nothing"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `gsprune sync`: 0 when everything below the directory is in MLflow afterwards, else 1."""
    parser = argparse.ArgumentParser(
        prog="gsprune sync",
        description="Upload to MLflow what runs could not send while they trained. Nothing is sent twice.",
    )
    parser.add_argument("directory", help="of a run, of a sweep, or a folder of those")
    parser.add_argument("--tracking-uri", help="where to send it, if not where the runs tried to")
    parser.add_argument("--experiment", help="send all of it to this one, if that of the runs is no longer there")
    given = parser.parse_args(arguments)
    try:
        folders = find_records(Path(given.directory))
    except ValueError as error:
        say(f"Error: {error}", file=sys.stderr)
        return 1
    sent, faults = _sync_all(folders, given.tracking_uri, given.experiment)
    for one in sent:
        if one:
            say(f"{one.folder}: sent {one} to {one.uri}, run {one.run_id}")
        for index, reason in enumerate(one.left_out):
            if index == _MAX_PRINTED:
                say(f"{one.folder}: left out {len(one.left_out) - index} more")
                break
            say(f"{one.folder}: left out {reason}")
    for fault in faults:
        say(f"Error: {fault}", file=sys.stderr)
    if not faults and not any(sent):
        where = " and ".join(sorted({one.uri for one in sent}))
        runs = "the run" if len(folders) == 1 else f"all {len(folders)} runs"
        say(f"Nothing to send: {where} has {runs} in {given.directory}")
    return 1 if faults else 0


def _sync_all(folders: Sequence[Path], uri: str | None, experiment: str | None) -> tuple[list[Sent], list[str]]:
    sent, faults, dead = [], [], set[str]()
    for folder in folders:
        try:
            sent.append(sync(folder, tracking_uri=uri, experiment=experiment, avoid=dead))
        except (ValueError, OSError) as error:
            if str(error) not in faults:
                faults.append(str(error))
    return sent, faults


def find_records(root: Path) -> list[Path]:
    """The folders under `root` that hold a record of tracking, a sweep's own before those of its jobs.

    Raises:
        ValueError: no such directory, or no record in it.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is not a directory: give that of a run, of a sweep, or a folder of those")
    found = []
    for name, folders, files in os.walk(root):
        folder = Path(name)
        deep = len(folder.relative_to(root).parts) >= _MAX_DEPTH
        folders[:] = [] if deep else sorted(filter(_may_hold_runs, folders), key=lambda n: (n != PARENT, natural(n)))
        if RECORD in files:
            found.append(folder)
    if not found:
        raise ValueError(f"{root} holds no run that was tracked with MLflow: there is no {RECORD} in it or below")
    return found


def _may_hold_runs(name: str) -> bool:
    return name == PARENT or (not name.startswith(".") and name not in NOT_JOBS)


def sync(
    folder: Path, *, tracking_uri: str | None = None, experiment: str | None = None, avoid: set[str] | None = None
) -> Sent:
    """Send what MLflow lacks of the run that has left its record in `folder`.

    Args:
        tracking_uri: where to; None: where the run tried to.
        experiment: send the whole run to this one, as a new run there, if it is not in it already.
        avoid: addresses that did not answer, for a caller with several runs.

    Raises:
        ValueError: one sentence; the record is damaged, the run still goes on, or MLflow does not answer or
            refuses. What was sent until then stays, and the record stays as it was.
    """
    lock = Lock(folder / LOCK)
    if not lock.acquire():
        raise ValueError(f"the run in {folder} still goes on, or is being uploaded by another process")
    try:
        return _Upload(_Record(folder), tracking_uri, experiment, set() if avoid is None else avoid).run()
    finally:
        lock.release()


# --- what a run has left -----------------------------------------------------------------------------------


class _Record:
    """The files of one run; every value is of the type it should be, or None."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.left_out = folder, list[str]()
        self._root = folder.resolve()
        note = self._object(RECORD)
        if note is None:
            raise ValueError(f"{folder / RECORD} is not the record of a run: it is damaged, or of another program")
        self.note = note
        listed = list(self._lines("unsent.jsonl"))
        listed += [event for event in self._lines(SENDING) if event not in listed]
        self.events = [event for event in listed if isinstance(event.get("kind"), str)]
        self.run_id, self.parent_run_id, self.record = map(self._id, ("run_id", "parent_run_id", "record"))
        self.moved_from = self._id("moved_from")

    def text(self, key: str) -> str | None:
        value = self.note.get(key)
        return value if isinstance(value, str) and 0 < len(value) <= 2000 and value.isprintable() else None

    @property
    def status(self) -> str | None:
        """FINISHED, FAILED or KILLED; None when the run did not come to say so."""
        return status if (status := self.text("status")) in ENDED else None

    @property
    def complete(self) -> bool:
        """Whether MLflow has it all, as far as the run knows."""
        return (
            self.note.get("stopped") is None
            and self.run_id is not None
            and self.status is not None
            and not any(path.exists() for path in self.unsent)
        )

    @property
    def unsent(self) -> tuple[Path, ...]:
        return self.folder / "unsent.jsonl", self.folder / SENDING

    def of_kind(self, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] in kinds]

    def texts(self, field_name: str, *kinds: str) -> dict[str, str]:
        """The entries of those events together, the later one counting."""
        found: dict[str, str] = {}
        for event in self.of_kind(*kinds):
            entries = event.get(field_name)
            for key, value in entries.items() if isinstance(entries, dict) else ():
                if isinstance(value, str) and key.strip():
                    found[Names.clean(key)] = value
        return found

    @cached_property
    def metrics(self) -> dict[tuple[str, int], tuple[float, int]]:
        """(name, step) -> value and time, each once: of metrics.jsonl, and what only unsent.jsonl has."""
        found: dict[tuple[str, int], tuple[float, int]] = {}
        names = Names()
        for row in self._lines("metrics.jsonl"):
            step, moment = row.pop("step", None), _number(row.pop("time", None))
            named = {names[key]: value for key, value in row.items() if key.strip()}
            _add(found, named, step, None if moment is None else moment * 1000)
        for event in self.of_kind("metrics"):
            values = event.get("values")
            _add(found, values if isinstance(values, dict) else {}, event.get("step"), _number(event.get("time_ms")))
        return found

    def files(self) -> Iterator[tuple[Path, str | None]]:
        """Files to be sent, and the folder among the artifacts that each belongs into."""
        for event in self.of_kind("artifact"):
            path, folder = self.inside(event.get("path")), event.get("folder")
            if path is None or not _is_folder(folder):
                self._leave_out(event.get("path"))
            elif path.is_file():
                yield path, folder
            else:
                yield from self._below(path, folder)

    def inside(self, name: object) -> Path | None:
        """The file or folder of that name if it lies in the run's directory, links followed; else None."""
        if not isinstance(name, str) or "\0" in name:
            return None
        try:
            path = (self._root / name).resolve()
            usable = path.is_relative_to(self._root) and (path.is_file() or path.is_dir())
        except (OSError, ValueError, RuntimeError):  # too long, or links in a circle
            return None
        return path if usable else None

    def _below(self, path: Path, folder: str | None) -> Iterator[tuple[Path, str | None]]:
        for name, folders, files in os.walk(path):
            folders.sort()
            for file in sorted(files):
                found = self.inside(str(Path(name, file)))
                place = PurePosixPath(folder or "", Path(name).relative_to(path).as_posix())
                if found is None:
                    self._leave_out(str(Path(name, file)))
                else:
                    yield found, None if place == PurePosixPath() else str(place)

    def _leave_out(self, name: object) -> None:
        self.left_out.append(f"{str(name)[:200]}: it is not a file in the run's directory")

    def _id(self, key: str) -> str | None:
        value = self.text(key)
        return value if value is not None and re.fullmatch("[0-9a-zA-Z]{1,64}", value) else None

    def _object(self, name: str) -> dict[str, Any] | None:
        path = self.inside(name)
        if path is None or not _is_small(path):
            return None
        try:
            found = read_json(path)
        except (ValueError, OSError):
            return None
        return found if isinstance(found, dict) else None

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The objects in a file of JSON lines; a line that is none (torn by a crash) is counted and left out."""
        path = self.inside(name)
        bad = 0
        if path is not None and path.stat().st_size > _MAX_LINES:
            raise ValueError(f"{self.folder / name} has more than {_MAX_LINES:,} bytes: no run writes that much")
        if path is not None and path.is_file():
            with path.open("rb") as file:
                while line := file.readline(_MAX_BYTES):
                    row = _json(line)
                    if isinstance(row, dict):
                        yield row
                    else:
                        bad += bool(line.strip())
        if bad:
            self.left_out.append(f"{bad} lines of {name} that cannot be read")


def _json(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _add(
    found: dict[tuple[str, int], tuple[float, int]], values: dict[str, Any], step: object, time_ms: float | None
) -> None:
    if type(step) is not int or not 0 <= step < 2**63 or time_ms is None or not 0 <= time_ms < 2**53:
        return
    for key, value in values.items():
        known = _number(value)
        if known is not None and key.strip():
            found.setdefault((Names.clean(key), step), (known, round(time_ms)))


def _number(value: object) -> float | None:
    """Numbers, and the texts that stand for NaN and infinities."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and value not in ("NaN", "Infinity", "-Infinity"):
        return None
    try:
        return float(number(value))
    except OverflowError:
        return None


def _is_folder(folder: object) -> bool:
    """Whether an artifact's folder is none, or a plain path below the root of the artifacts."""
    if folder is None:
        return True
    plain = isinstance(folder, str) and re.fullmatch(r"[\w\-. /]{1,500}", folder)
    return bool(plain) and not {"..", ".", ""} & set(str(folder).split("/"))


def _is_small(path: Path) -> bool:
    facts = path.stat()
    return S_ISREG(facts.st_mode) and facts.st_size <= _MAX_BYTES


# --- what MLflow lacks -------------------------------------------------------------------------------------


class _Upload:
    """One record on its way into one store."""

    def __init__(self, record: _Record, uri: str | None, experiment: str | None, avoid: set[str]) -> None:
        self.record, self._avoid = record, avoid
        self.uri = _address(record, uri)
        noted = record.text("experiment") or "gsprune"
        self.experiment, self.moves = experiment or noted, experiment not in (None, noted)
        self._origin = record.run_id if self.moves else record.moved_from  # the run that this one takes over
        self.parent = record.parent_run_id or _parent_of(record.folder)
        if self.moves:
            self.parent = _parent_of(record.folder) or record.parent_run_id
        self.sent = Sent(record.folder, record.run_id, without_passwords(self.uri), left_out=record.left_out)

    def run(self) -> Sent:
        if self.record.complete and self.parent == self.record.parent_run_id and not self.moves:
            self.sent.uri = self.record.text("tracking_uri") or self.sent.uri
            return self.sent
        if self.uri in self._avoid:
            raise ValueError(_unreachable(self.uri))
        self._check_database()
        store = self._connect()
        from mlflow.exceptions import MlflowException
        from requests import RequestException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            self._send(store)
        except DeletedError as error:
            raise ValueError(f"{error} (here: --experiment <name>)") from None
        except (MlflowException, RequestException, SQLAlchemyError, TimeoutError) as error:
            self._avoid.add(self.uri)
            first = " ".join(str(error).split())[:300]
            raise ValueError(f"{_unreachable(self.uri)} ({without_passwords(first)})") from None
        return self.sent

    def _check_database(self) -> None:
        """MLflow would make a new and empty database where the old one is not mounted."""
        file = database_file(self.uri)
        if file is not None and not (file.is_file() or (self.record.run_id is None and file.parent.is_dir())):
            raise ValueError(f"{file} does not exist, and the record stays as it was")

    def _connect(self) -> Store:
        record = self.record
        return connect(
            self.uri,
            experiment=self.experiment,
            artifact_root=record.text("artifact_root"),
            run_name=record.text("run_name"),
            parent_run_id=self.parent,
        )

    def _send(self, store: Store) -> None:
        run = self._find(store)
        self._keep_id(store)
        self._send_texts(store, run)
        self._send_metrics(store, run)
        if self._source is not None:
            self.sent.add("files", store.copy_files(self._source.info.run_id))
        self._send_pictures(store)
        self._send_files(store)
        self._end(store, run)
        self._close()

    def _find(self, store: Store) -> Any:
        """The run as MLflow has it, made if it was never made."""
        record = self.record
        run = store.attach(None if self.moves else record.run_id, record.record)
        self._source = store.find(self._origin) if self._origin else None
        if run is not None and run.info.lifecycle_stage != "active":
            raise ValueError(f"the run {store.run_id} of {record.folder} was deleted in MLflow: nothing is sent")
        if run is not None:
            return run
        began = next((_number(event.get("time_ms")) for event in record.of_kind("start")), None)
        if began is None and self._source is not None:
            began = _number(self._source.info.start_time)
        if began is None or not 0 <= began < 2**53:
            raise ValueError(
                f"the run {record.run_id or 'without an id'} of {record.folder} is not at {self.sent.uri}, and its "
                "record does not hold its beginning: it was begun in another store"
            )
        mark = {RECORD_TAG: record.record} if record.record else {}
        store.start(params={}, tags={**record.texts("tags", "start"), **mark}, time_ms=int(began))
        self.sent.add("run")
        return store.attach(store.run_id, None)

    def _keep_id(self, store: Store) -> None:
        """In the records, so that other commands find the run."""
        self.sent.run_id = store.run_id
        if store.run_id == self.record.run_id:
            return
        self._note(
            run_id=store.run_id, experiment=self.experiment, **({"moved_from": self._origin} if self._origin else {})
        )
        if self.record.folder.name == PARENT:
            _fill(self.record.folder.parent / SWEEP, "parent_run_id", store.run_id, self._origin)
        else:
            _fill(self.record.folder / RESULT, "mlflow_run_id", store.run_id, self._origin)

    def _send_texts(self, store: Store, run: Any) -> None:
        before = self._source.data if self._source is not None else None
        params = {**(before.params if before else {}), **self.record.texts("params", "start", "params")}
        params = {key: value for key, value in params.items() if key not in run.data.params}
        store.params(params=params)
        self.sent.add("parameters", len(params))
        nested = {NESTED: self.parent} if self.parent else {}
        tags = fit_tags({**(before.tags if before else {}), **self.record.texts("tags", "start", "tags"), **nested})
        tags.pop(RECORD_TAG, None)  # that of the run is there, and a try before it may have had another
        tags = {key: value for key, value in tags.items() if run.data.tags.get(key) != value}
        store.tags(tags=tags)
        self.sent.add("tags", len(tags))

    def _send_metrics(self, store: Store, run: Any) -> None:
        wanted = self.record.metrics
        there = {key: store.steps(key) for key in dict.fromkeys(key for key, _ in wanted) if key in run.data.metrics}
        missing = {at: found for at, found in wanted.items() if at[1] not in there.get(at[0], ())}
        store.many_metrics((key, value, moment, step) for (key, step), (value, moment) in missing.items())
        self.sent.add("metrics", len(missing))

    def _send_files(self, store: Store) -> None:
        for path, folder in self.record.files():
            store.artifact(path=str(path), folder=folder)
            self.sent.add("files")

    def _send_pictures(self, store: Store) -> None:
        events = self.record.of_kind("image")
        there = store.files("images") if events else set()
        for event in events:
            picture = _Picture.of(event, self.record)
            if picture is None:
                self.record.left_out.append(f"{str(event.get('path'))[:200]}: it is not a picture in the directory")
            else:
                self.sent.add("pictures", picture.send(store, there))

    def _end(self, store: Store, run: Any) -> None:
        """Its own end; that of a run which was killed is the time of its last metrics."""
        ends = [event for event in self.record.of_kind("finish") if event.get("status") in ENDED]
        status = str(ends[-1]["status"]) if ends else self.record.status or "KILLED"
        moment = _number(ends[-1].get("time_ms")) if ends else None
        if moment is None or not 0 <= moment < 2**53:
            moment = max((moment for _, moment in self.record.metrics.values()), default=run.info.start_time)
        if run.info.status != status:
            store.finish(status=status, time_ms=int(moment))
            self.sent.ended = status
        self._status = status

    def _close(self) -> None:
        """The record says that all is sent: first in the note, for a call that is killed between the two."""
        self.record.note.pop("moved_from", None)
        self._note(status=self._status, stopped=None, parent_run_id=self.parent)
        for path in self.record.unsent:
            path.unlink(missing_ok=True)

    def _note(self, **values: Any) -> None:
        self.record.note |= values
        write_json(self.record.folder / RECORD, self.record.note)


@dataclass(frozen=True)
class _Picture:
    """A picture as `Tracker.log_image` has listed it."""

    path: Path
    key: str
    step: int
    time_ms: int

    @classmethod
    def of(cls, event: dict[str, Any], record: _Record) -> _Picture | None:
        path, key, step, moment = (event.get(name) for name in ("path", "key", "step", "time_ms"))
        file = record.inside(path)
        named = isinstance(key, str) and re.fullmatch(r"[a-zA-Z0-9_\-./ ]{1,200}", key)
        counted = all(type(value) is int and 0 <= value < 2**53 for value in (step, moment))
        if file is None or not named or not counted or not _is_picture(file):
            return None
        return cls(file, str(key), step, moment)  # type: ignore[arg-type]

    def send(self, store: Store, there: set[str]) -> int:
        """Whether it had to be sent. MLflow keeps two files for each, of which a cut-off call may have left one."""
        begin = f"{self.key.replace('/', '~')}+step+{self.step}+timestamp+{self.time_ms}+"
        mine = sorted(name for name in there if name.startswith(begin))
        if not mine:
            store.image(path=str(self.path), key=self.key, step=self.step, time_ms=self.time_ms)
        elif not any(name.endswith(".webp") for name in mine):
            self._send_small(store, mine[0].removesuffix(".png") + "+compressed.webp")
        else:
            return 0
        return 1

    def _send_small(self, store: Store, name: str) -> None:
        from PIL import Image

        with tempfile.TemporaryDirectory() as folder, Image.open(self.path) as picture:
            picture.thumbnail((256, 256))
            picture.save(Path(folder, name))
            store.artifact(path=str(Path(folder, name)), folder="images")
        store.tags(tags={"mlflow.loggedImages": "True"})


def _is_picture(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as picture:
            if not 0 < math.prod(picture.size) <= _MAX_PIXELS:
                return False
            picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True


def _address(record: _Record, given: str | None) -> str:
    """Where to: as given, else as recorded. A password is never on record: the environment may have it."""
    if given:
        return resolve_tracking_uri(given)
    noted, here = record.text("tracking_uri"), os.environ.get("MLFLOW_TRACKING_URI")
    if here and without_passwords(here) == noted:
        return here
    if noted is None or not re.match(rf"(?:{'|'.join(SCHEMES)})(?:\+\w+)?:", noted):
        raise ValueError(f"{record.folder / RECORD} names no tracking server: give one with --tracking-uri")
    if "***@" in noted:
        raise ValueError(f"{noted} needs its password, which is on no record: give it all with --tracking-uri")
    if noted.startswith("http") and _has_credentials():
        raise ValueError(
            f"{noted} is named by {record.folder / RECORD} alone, and MLflow would send it the password that the "
            "environment has: give it with --tracking-uri if it is yours"
        )
    return resolve_tracking_uri(noted)


def _has_credentials() -> bool:
    """Whether MLflow's client logs in, at whatever server it talks to, with what only its user's own may see."""
    return any(os.environ.get(name) for name in CREDENTIALS) or Path("~/.mlflow/credentials").expanduser().exists()


def _parent_of(folder: Path) -> str | None:
    """The run of the sweep that a job's folder belongs to, if it is known by now."""
    if folder.name == PARENT:
        return None
    for above in [folder, *folder.absolute().parents][:_MAX_DEPTH]:
        if (above / SWEEP).is_file() and (above / PARENT / RECORD).is_file():
            try:
                return _Record(above / PARENT).run_id
            except ValueError:
                return None
    return None


def _fill(path: Path, key: str, value: str | None, before: str | None) -> None:
    """Put a run's id into a record that had to do without, or has that of the run which it was `before`. What a link
    leads to would become a file of the run's."""
    try:
        found = read_json(path) if path.is_file() and not path.is_symlink() and _is_small(path) else None
    except (ValueError, OSError):
        return
    if isinstance(found, dict) and key in found and found[key] in (None, before):
        write_json(path, {**found, key: value})


def _unreachable(uri: str) -> str:
    return f"MLflow at {without_passwords(uri)} does not answer or refuses, and what it lacks stays on record"
