"""The command `gsprune sync DIRECTORY`: send to MLflow what runs could not send while they trained.

The directory is a run's output directory, a sweep's (its jobs come to lie under its parent run), or a folder of those.
The same `Drain` as in a run sends what MLflow has not acknowledged, all with the times and steps on record, and asks
MLflow first whether it has it. A second call has nothing to send; one that was cut off is simply made again.

Records are data from strangers (`outbox.py` checks them), and what cannot be used is named and left out.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gsprune.files.disk import read_object, write_json
from gsprune.files.layout import NOT_JOBS, RESULT, SWEEP, SWEEP_RUN, TRACKING, TRACKING_LOCK
from gsprune.files.locks import Lock
from gsprune.settings.addresses import SCHEMES, database_file, resolve_tracking_uri
from gsprune.text.names import natural
from gsprune.text.redact import redacted, say
from gsprune.tracking.drain import Drain
from gsprune.tracking.mlflow_client import NESTED, DeletedError, RemoteRun, import_client
from gsprune.tracking.outbox import ENDED, MAX_BYTES, Outbox, identifier, text

__all__ = ["Sent", "main", "recorded_address", "sync"]

CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4")
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

    def __bool__(self) -> bool:
        return bool(self.ended) or any(self.counts.values())

    def __str__(self) -> str:
        """
        >>> print(Sent(Path("3"), counts={"run": 1, "parameters": 40, "metrics": 2}, ended="FINISHED"))
        1 run, 40 parameters, 2 metrics, its end (FINISHED)
        """
        parts = [f"{count} {what}" for what, count in self.counts.items() if count]
        return ", ".join([*parts, f"its end ({self.ended})"] if self.ended else parts) or "nothing"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gsprune sync",
        description="Upload to MLflow what runs could not send while they trained. Nothing is sent twice.",
    )
    parser.add_argument("directory", help="of a run, of a sweep, or a folder of those")
    parser.add_argument("--tracking-uri", help="MLflow's tracking URI (default: that of the runs)")
    parser.add_argument("--experiment", help="send everything to this experiment (default: that of the runs)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `gsprune sync`: 0 when everything below the directory is in MLflow afterwards, else 1."""
    given = make_parser().parse_args(arguments)
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
        folders[:] = [] if deep else sorted(filter(_may_hold_runs, folders), key=lambda n: (n != SWEEP_RUN, natural(n)))
        if TRACKING in files:
            found.append(folder)
    if not found:
        raise ValueError(f"{root} holds no run that was tracked with MLflow: there is no {TRACKING} in it or below")
    return found


def _may_hold_runs(name: str) -> bool:
    return name == SWEEP_RUN or (not name.startswith(".") and name not in NOT_JOBS)


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
    lock = Lock(folder / TRACKING_LOCK)
    if not lock.acquire():
        raise ValueError(f"the run in {folder} still goes on, or is being uploaded by another process")
    try:
        return _Upload(folder, tracking_uri, experiment, set() if avoid is None else avoid).run()
    finally:
        lock.release()


class _Upload:
    """The record in one folder on its way into one store."""

    def __init__(self, folder: Path, uri: str | None, experiment: str | None, avoid: set[str]) -> None:
        note = _read_note(folder)
        if not note:
            raise ValueError(f"{folder / TRACKING} is not the record of a run: it is damaged, or of another program")
        self.folder, self.note, self._avoid = folder, note, avoid
        self.outbox = Outbox(folder)
        self.outbox.load()
        self.uri, self.run_id = recorded_address(folder, self.note, uri), identifier(self.note, "run_id")
        noted = text(self.note, "experiment") or "gsprune"
        self.experiment, self.moves = experiment or noted, experiment not in (None, noted)
        known = identifier(self.note, "parent_run_id")
        self.parent = (_parent_of(folder) or known) if self.moves else (known or _parent_of(folder))
        self.is_new_parent = self.parent != known

    def run(self) -> Sent:
        sent = Sent(self.folder, self.run_id, redacted(self.uri))
        if self._is_complete():
            sent.uri = text(self.note, "tracking_uri") or sent.uri
            return sent
        if self.uri in self._avoid:
            raise ValueError(_unreachable(self.uri))
        self._check_database()
        import_client(30)
        run = self._remote()
        from mlflow.exceptions import MlflowException
        from requests import RequestException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            self._send(run)
        except DeletedError as error:
            raise ValueError(f"{error} (here: --experiment <name>)") from None
        except (MlflowException, RequestException, SQLAlchemyError, TimeoutError) as error:
            self._avoid.add(self.uri)
            first = " ".join(str(error).split())[:300]
            raise ValueError(f"{_unreachable(self.uri)} ({redacted(first)})") from None
        sent.run_id, sent.counts, sent.ended, sent.left_out = run.run_id, run.counts, run.ended, self.outbox.left_out
        return sent

    def _is_complete(self) -> bool:
        """Whether MLflow has it all, as far as the record tells."""
        ended = text(self.note, "status") in ENDED and self.run_id is not None and self.note.get("stopped") is None
        return ended and not (self.outbox.lacking or self.is_new_parent or self.moves)

    def _check_database(self) -> None:
        """MLflow would make a new and empty database where the old one is not mounted."""
        file = database_file(self.uri)
        if file is not None and not (file.is_file() or (self.run_id is None and file.parent.is_dir())):
            raise ValueError(f"{file} does not exist, and the record stays as it was")

    def _remote(self) -> RemoteRun:
        return RemoteRun(
            self.uri,
            experiment=self.experiment,
            artifact_root=text(self.note, "artifact_root"),
            run_name=text(self.note, "run_name"),
            parent_run_id=self.parent,
            run_id=None if self.moves else self.run_id,
            record=identifier(self.note, "record"),
            once=True,
            exact=True,
        )

    def _send(self, run: RemoteRun) -> None:
        found, drain = run.attach(), Drain(self.outbox, run)
        if found is not None and found.info.lifecycle_stage != "active":
            raise ValueError(f"the run {run.run_id} of {self.folder} was deleted in MLflow: nothing is sent")
        at_hand = self.outbox.events if self.moves else self.outbox.pending.values()
        if found is None and not any(event.get("kind") == "start" for event in at_hand):
            raise ValueError(
                f"the run {self.run_id or 'without an id'} of {self.folder} is not at {redacted(self.uri)}, "
                "and the local record has no start to make it from: give the address that it was first tracked to"
            )
        if self.moves:
            self.outbox.forget()
        drain.begin()
        self._keep_id(str(run.run_id))
        run.tags(tags={NESTED: self.parent} if self.parent else {})
        drain.send()
        status = self.outbox.status or text(self.note, "status")
        run.finish(status=status if status in ENDED else "KILLED", time_ms=self.outbox.last_ms or run.began)
        self._keep(status=run.status, stopped=None, parent_run_id=self.parent)

    def _keep_id(self, run_id: str) -> None:
        """In the records, so that other commands find the run."""
        if run_id != self.run_id:
            path, key = self.folder / RESULT, "mlflow_run_id"
            if self.folder.name == SWEEP_RUN:
                path, key = self.folder.parent / SWEEP, "parent_run_id"
            _fill(path, key, run_id, self.run_id)
            self._keep(run_id=run_id, experiment=self.experiment)

    def _keep(self, **values: Any) -> None:
        self.note |= values
        write_json(self.folder / TRACKING, self.note)


def _read_note(folder: Path) -> dict[str, Any]:
    path = folder / TRACKING
    return read_object(path, most=MAX_BYTES) if path.resolve().is_relative_to(folder.resolve()) else {}


def recorded_address(folder: Path, note: dict[str, Any], given: str | None) -> str:
    """Where a run is tracked: as given, else as its record says.

    Raises:
        ValueError: the record names no address, or only part of one, or a server that MLflow would send the password of
            the environment to: only a person may name that one.
    """
    if given:
        return resolve_tracking_uri(given)
    noted, here = text(note, "tracking_uri"), os.environ.get("MLFLOW_TRACKING_URI")
    if here and redacted(here) == noted:
        return here
    if noted is None or not re.match(rf"(?:{'|'.join(SCHEMES)})(?:\+\w+)?:", noted):
        raise ValueError(f"{folder / TRACKING} names no tracking server: give one with --tracking-uri")
    if "***@" in noted:
        raise ValueError(f"{noted} has a password, which is not saved: give the whole address with --tracking-uri")
    if noted.startswith("http") and _has_credentials():
        raise ValueError(
            f"{noted} is named by {folder / TRACKING} alone, and MLflow would send it the password that the "
            "environment has: give it with --tracking-uri if it is yours"
        )
    return resolve_tracking_uri(noted)


def _has_credentials() -> bool:
    """Whether MLflow's client logs in, at whatever server it talks to, with what only its user's own may see."""
    return any(os.environ.get(name) for name in CREDENTIALS) or Path("~/.mlflow/credentials").expanduser().exists()


def _parent_of(folder: Path) -> str | None:
    """The run of the sweep that a job's folder belongs to, if it is known by now."""
    if folder.name == SWEEP_RUN:
        return None
    for above in [folder, *folder.absolute().parents][:_MAX_DEPTH]:
        if (above / SWEEP).is_file() and (above / SWEEP_RUN / TRACKING).is_file():
            return identifier(_read_note(above / SWEEP_RUN), "run_id")
    return None


def _fill(path: Path, key: str, value: str | None, before: str | None) -> None:
    """Put a run's id into a record that had to do without, or has that of the run which it was `before`. What a link
    leads to would become a file of the run's."""
    found = {} if path.is_symlink() else read_object(path, most=MAX_BYTES)
    if key in found and found[key] in (None, before):
        write_json(path, {**found, key: value})


def _unreachable(uri: str) -> str:
    return f"MLflow at {redacted(uri)} does not answer or refuses, and what it lacks stays on record"
