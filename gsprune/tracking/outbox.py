"""The local record of a run. Everything is written here first; `drain.py` sends it to MLflow.

    metrics.jsonl   one JSON object per line: {"step": 3, "time": 1753000000.0, "val/loss": 0.1, ...}
    outbox.jsonl    what goes to MLflow, one event per line, in order, as MLflow names it:
                      {"kind": "start", "params": {...}, "tags": {...}, "time_ms": 1753000000000}
                      {"kind": "params", "params": {...}} and {"kind": "tags", "tags": {...}}
                      {"kind": "metrics", "values": {"val/loss": 0.1}, "step": 3, "time_ms": ...}
                      {"kind": "artifact", "path": "masks/epoch_0002.safetensors", "folder": "masks"}
                      {"kind": "image", "path": "figures/masks/0002.png", "key": "masks", "step": 2, "time_ms": ...}
                      {"kind": "model", "name": "macs-50", "files": ["curve/macs-50/model.safetensors"],
                       "params": {...}, "values": {"model_accuracy": 0.9}, "step": 50, "time_ms": ...,
                       "dataset": {"name": "digits", "digest": "1a2b3c4d"}}
                      {"kind": "finish", "status": "FINISHED", "time_ms": ...}
                    and the numbers of those that MLflow has acknowledged: {"sent": [0, 1]}
    tracking.json   where the run is sent to, under which id, and whether sending stopped

A record that is read may come from a stranger: types and sizes are checked, nothing outside the run's directory is
used, and what cannot be used is listed in `Outbox.left_out`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gsprune.files.disk import json_data, number, write_atomic
from gsprune.files.layout import METRICS, OUTBOX, SENDING, UNSENT
from gsprune.tracking.mlflow_names import Names, allowed_name

__all__ = ["Log", "Outbox", "identifier", "json_lines", "read_metrics", "rewind", "text"]

ENDED = ("FINISHED", "FAILED", "KILLED")
Event = dict[str, Any]
MAX_BYTES = 16_000_000  # of a JSON file, and of one line of JSON
_MAX_LINES = 500_000_000  # bytes of a file of JSON lines
_MAX_PIXELS = 100_000_000
_MAX_TIME = 2**53  # milliseconds
_DATASET = {"name": 500, "digest": 36}  # characters that MLflow takes


# --- files of JSON lines -----------------------------------------------------------------------------------


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, numbers only; a line torn by a crash is left out. No file: no rows."""
    rows = []
    for row in json_lines(Path(path)):
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            rows.append({name: number(value) for name, value in row.items()})
    return rows


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one per line; a line torn by a crash is left out."""
    found = map(_json, path.read_bytes().split(b"\n")) if path.is_file() else []
    return [item for item in found if isinstance(item, dict)]


def _json(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


class Log:
    """A file of JSON lines. What could not be written (disk full) is kept, and written with the next line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept: list[str] = []

    def keep(self, row: Mapping[str, Any]) -> None:
        self._kept.append(json.dumps(row, allow_nan=False) + "\n")

    def append(self, row: Mapping[str, Any]) -> None:
        self.keep(row)
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


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode())


def rewind(folder: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Make metrics.jsonl the `rows` of step 1, 2, ..., and drop from the outbox what comes after them, and an end."""
    kept = {row["step"]: row for row in reversed(json_lines(folder / METRICS)) if type(row.get("step")) is int}
    lines = []
    for step, values in enumerate(rows, 1):
        known = {name: number(value) for name, value in values.items()}
        old = {name: value for name, value in kept.get(step, {}).items() if name not in ("step", "time")}
        same = step in kept and old == json_data(known)  # it has the time at which it was logged
        lines.append(kept[step] if same else {"step": step, "time": round(time.time(), 3), **json_data(known)})
    write_lines(folder / METRICS, lines)
    outbox = Outbox(folder)
    outbox.read_events()
    if outbox.path.exists() or outbox.earlier:
        outbox.rewind(len(rows))


# --- checks of what is read --------------------------------------------------------------------------------


def text(record: Mapping[str, Any], key: str) -> str | None:
    """The printable text under a key of a record; None when it is something else."""
    value = record.get(key)
    return value if isinstance(value, str) and 0 < len(value) <= 2000 and value.isprintable() else None


def identifier(record: Mapping[str, Any], key: str) -> str | None:
    value = text(record, key)
    return value if value is not None and re.fullmatch("[0-9a-zA-Z]{1,64}", value) else None


def _texts(entries: object) -> dict[str, str]:
    items = entries.items() if isinstance(entries, dict) else ()
    return {allowed_name(key): value for key, value in items if isinstance(value, str) and key.strip()}


def _numbers(values: object) -> dict[str, float]:
    found = {key: _number(value) for key, value in values.items()} if isinstance(values, dict) else {}
    return {allowed_name(key): value for key, value in found.items() if value is not None and key.strip()}


def _number(value: object) -> float | None:
    """A number, or one of the texts that stand for NaN and infinities."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and value not in ("NaN", "Infinity", "-Infinity"):
        return None
    try:
        return float(number(value))
    except OverflowError:
        return None


def _dataset(value: object) -> dict[str, dict[str, str]]:
    """The field `dataset` of a model, where its name and its digest are texts that MLflow takes; else none."""
    given = value if isinstance(value, dict) else {}
    found = {key: known for key, most in _DATASET.items() if (known := text(given, key)) and len(known) <= most}
    return {"dataset": found} if len(found) == len(_DATASET) else {}


def _time_ms(value: object, *, scale: int = 1) -> int | None:
    known = _number(value)
    return round(known * scale) if known is not None and 0 <= known * scale < _MAX_TIME else None


def _is_folder(folder: object) -> bool:
    """Whether an artifact's folder is none, or a plain path below the root of the artifacts."""
    if folder is None:
        return True
    plain_path = isinstance(folder, str) and re.fullmatch(r"[\w\-. /]{1,500}", folder)
    return bool(plain_path) and not {"..", ".", ""} & set(str(folder).split("/"))


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


# --- the outbox --------------------------------------------------------------------------------------------


class Outbox:
    """What goes to MLflow, in order: `pending` maps the number of each event that it has not acknowledged to the event.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> outbox = Outbox(Path(folder.name))
    >>> outbox.add("tags", tags={"a": "1"})
    >>> outbox.add("tags", tags={"b": "2"})
    >>> outbox.acknowledge([0])
    >>> again = Outbox(Path(folder.name))
    >>> again.load()
    >>> again.pending
    {1: {'kind': 'tags', 'tags': {'b': '2'}}}
    """

    def __init__(self, folder: Path, *, write: Callable[[Path, Callable[[], object]], object] | None = None) -> None:
        """`write` is given each file and the function that writes it, and decides what a fault of the disk means."""
        self.folder, self.path = folder, folder / OUTBOX
        self.events: list[Event] = []
        self.pending: dict[int, Event] = {}
        self.left_out: list[str] = []
        self._write = write or (lambda path, act: act())
        self._root, self._log = folder.resolve(), Log(self.path)
        self._sent: set[int] = set()
        self.earlier: list[Path] = []  # files of an earlier version, of which the outbox takes over what they hold

    def add(self, kind: str, **fields: Any) -> None:
        """Record an event, and that it is to be sent."""
        event = {"kind": kind, **fields}
        self.pending[len(self.events)] = event
        self.events.append(event)
        self._append(event)

    def acknowledge(self, numbers: Sequence[int]) -> None:
        """MLflow has these events."""
        self._sent.update(numbers)
        for place in numbers:
            self.pending.pop(place, None)
        self._append({"sent": [*numbers]})

    def flush(self) -> None:
        self._write(self.path, self._log.flush)

    def put_off(self) -> None:
        """Leave what is pending to `gsprune sync`."""
        self.pending = {}

    def forget(self) -> None:
        """Nothing is acknowledged any more: the whole run is sent again, as another one."""
        self._sent, self.left_out[:] = set(), []
        self._rewrite(self.events)
        self._find_pending()

    def rewind(self, steps: int) -> None:
        """Drop ends, and what belongs to later steps, or a second time to the same one: it comes again."""
        kept: dict[object, int] = {}
        for place, event in enumerate(self.events):
            step = event.get("step") if event["kind"] in ("image", "metrics") else None
            if event["kind"] != "finish" and (type(step) is not int or step <= steps):
                kept.setdefault((event["kind"], str(event.get("key")), step) if type(step) is int else place, place)
        self._sent = {new for new, old in enumerate(kept.values()) if old in self._sent}
        self._rewrite([self.events[place] for place in kept.values()])

    def _rewrite(self, events: list[Event]) -> None:
        self.events, self._log = events, Log(self.path)
        self._change(lambda: write_lines(self.path, json_data([*events, {"sent": sorted(self._sent)}])))

    def _append(self, line: Mapping[str, Any]) -> None:
        self._change(lambda: self._log.append(line))

    def _change(self, write: Callable[[], object]) -> None:
        def change() -> None:
            write()
            while self.earlier:
                self.earlier.pop().unlink(missing_ok=True)

        self._write(self.path, change)

    @property
    def acknowledged(self) -> bool:
        """Whether MLflow has something of it."""
        return bool(self._sent)

    @property
    def lacking(self) -> bool:
        """Whether MLflow lacks something of it, as far as the record tells."""
        known = self.path.exists() or self.earlier  # else an earlier version has sent it all
        return bool(known) and any(place not in self._sent for place in range(len(self.events)))

    @property
    def status(self) -> str | None:
        """How the run ended; None when it did not come to say so."""
        ends = [event["status"] for event in self.events if event["kind"] == "finish" and event.get("status") in ENDED]
        return ends[-1] if ends else None

    @property
    def last_ms(self) -> int | None:
        """When the last metrics were logged."""
        return max(self.times("metrics"), default=None)

    def times(self, kind: str) -> list[int]:
        """The times of the events of that kind, but for those that are none."""
        found = (_time_ms(event.get("time_ms")) for event in self.events if event["kind"] == kind)
        return [moment for moment in found if moment is not None]

    # reading

    def load(self) -> None:
        """Read what earlier processes have recorded, and find what of it is pending.

        Raises:
            ValueError: a file is larger than any run writes.
        """
        self.read_events()
        self._find_pending()

    def read_events(self) -> None:
        for line in self._lines(OUTBOX):
            if isinstance(line.get("kind"), str):
                self.events.append(line)
            elif isinstance(line.get("sent"), list):
                self._sent.update(place for place in line["sent"] if type(place) is int)
        if not self.path.exists():
            self._read_earlier()

    def _read_earlier(self) -> None:
        """Take over what an earlier version did not send; its metrics are all in metrics.jsonl."""
        self.earlier = [path for name in (UNSENT, SENDING) if (path := self.folder / name).exists()]
        for event in (line for path in self.earlier for line in self._lines(path.name)):
            if isinstance(event.get("kind"), str) and event["kind"] != "metrics" and event not in self.events:
                self.events.append(event)
        names = Names()
        for row in self._lines(METRICS):
            step, moment = row.pop("step", None), _time_ms(row.pop("time", None), scale=1000)
            values = {names[key]: value for key, value in row.items() if key.strip()}
            self.events.append({"kind": "metrics", "values": values, "step": step, "time_ms": moment})
        for event in self.events:  # they are written with the first line that is added
            self._log.keep(json_data(event))

    def _find_pending(self) -> None:
        unsent = [place for place in range(len(self.events)) if place not in self._sent]
        self.pending = {place: self._checked(self.events[place]) for place in unsent}

    def _checked(self, event: Event) -> Event:
        """What is to be sent for an event that was read; an empty one when it cannot be used."""
        kind, moment, step = event["kind"], _time_ms(event.get("time_ms")), event.get("step")
        if kind in ("artifact", "image"):
            return self._checked_file(event)
        if kind == "model":
            return self._checked_model(event, moment, step)
        if kind == "finish" and event.get("status") in ENDED:
            return {"kind": kind, "status": event["status"], "time_ms": moment}
        if kind == "metrics" and moment is not None and type(step) is int and 0 <= step < 2**63:
            return {"kind": kind, "values": _numbers(event.get("values")), "step": step, "time_ms": moment}
        if kind == "start" and moment is not None:
            texts = {field: _texts(event.get(field)) for field in ("params", "tags")}
            return {"kind": kind, **texts, "time_ms": moment}
        return {"kind": kind, kind: _texts(event.get(kind))} if kind in ("params", "tags") else {}

    def _checked_file(self, event: Event) -> Event:
        path, folder, key = (event.get(name) for name in ("path", "folder", "key"))
        counts = {name: event.get(name) for name in ("step", "time_ms")}
        if event["kind"] == "artifact" and self.is_inside(path) and _is_folder(folder):
            return {"kind": "artifact", "path": path, "folder": folder}
        if event["kind"] == "image" and self.is_inside(path) and _is_picture(self._root / str(path)):
            named = isinstance(key, str) and re.fullmatch(r"[a-zA-Z0-9_\-./ ]{1,200}", key)
            if named and all(type(value) is int and 0 <= value < _MAX_TIME for value in counts.values()):
                return {"kind": "image", "path": path, "key": key, **counts}
        what = {"artifact": "file", "image": "picture"}[event["kind"]]
        self.left_out.append(f"{str(path)[:200]}: it is not a {what} in the run's directory")
        return {}

    def _checked_model(self, event: Event, moment: int | None, step: object) -> Event:
        name, files = event.get("name"), event.get("files")
        named = isinstance(name, str) and re.fullmatch(r"[a-zA-Z0-9_\-]{1,200}", name)
        numbered = moment is not None and type(step) is int and 0 <= step < 2**63
        if named and numbered and isinstance(files, list) and files and all(map(self.is_inside, files)):
            values = {"params": _texts(event.get("params")), "values": _numbers(event.get("values"))}
            known = _dataset(event.get("dataset"))
            return {"kind": "model", "name": name, "files": files, **values, **known, "step": step, "time_ms": moment}
        self.left_out.append(f"{str(name)[:200]}: it is not a model of files in the run's directory")
        return {}

    def is_inside(self, name: object) -> bool:
        """Whether it is the name of a file in the run's directory, links followed."""
        if not isinstance(name, str) or "\0" in name:
            return False
        try:
            path = (self._root / name).resolve()
            return path.is_relative_to(self._root) and path.is_file()
        except (OSError, ValueError, RuntimeError):  # too long, or links in a circle
            return False

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The objects in a file of JSON lines; a line that is none (torn by a crash) is counted and left out."""
        bad = 0
        if not self.is_inside(name):
            return
        with (self.folder / name).open("rb") as file:
            if os.fstat(file.fileno()).st_size > _MAX_LINES:
                raise ValueError(f"{self.folder / name} has more than {_MAX_LINES:,} bytes: no run writes that much")
            while line := file.readline(MAX_BYTES):
                row = _json(line)
                if isinstance(row, dict):
                    yield row
                else:
                    bad += bool(line.strip())
        if bad:
            self.left_out.append(f"{bad} lines of {name} that cannot be read")
