"""The record of a run: always on the local disk, and in MLflow too when asked for and reachable.

A fault of tracking never ends a training run and costs it seconds at most. Everything is written to the output
directory first; after the first call to MLflow that fails or takes too long the run makes no further one, also when the
server is back, and what was not sent is listed in `unsent.jsonl`: `gsprune sync` uploads it.

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
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from gsprune.files.disk import aside, number, plain, spared, write_atomic
from gsprune.text.display import logger
from gsprune.text.redact import cleaned, told

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Self

__all__ = ["SilentTracker", "Tracker", "read_metrics"]

Status = Literal["FINISHED", "FAILED", "KILLED"]
Event = dict[str, Any]
log = logger(__name__)


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
        self._metrics = Log(self.output_dir / "metrics.jsonl")
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


class Log:
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
    kept = {row["step"]: row for row in reversed(json_lines(folder / "metrics.jsonl")) if type(row.get("step")) is int}
    lines = []
    for step, values in enumerate(rows, 1):
        known = {name: number(value) for name, value in values.items()}
        old = {name: value for name, value in kept.get(step, {}).items() if name not in ("step", "time")}
        same = step in kept and old == plain(known)  # it has the time at which it was logged
        lines.append(kept[step] if same else {"step": step, "time": round(time.time(), 3), **plain(known)})
    _write_lines(folder / "metrics.jsonl", lines)
    unsent, events = folder / "unsent.jsonl", dict[str, Event]()
    for place, event in enumerate(json_lines(unsent)):
        if event.get("kind") == "finish":
            continue
        at = event.get("step") if event.get("kind") in ("metrics", "image") else None
        if type(at) is not int:
            events[str(place)] = event
        elif at <= len(rows):
            events.setdefault(f"{event['kind']} {at}", event)  # the numbers at the end have the last epoch's step
    if unsent.exists():
        _write_lines(unsent, events.values())


def json_lines(path: Path) -> list[dict[str, Any]]:
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


def brief_error(error: BaseException) -> str:
    text = told(" ".join(f"{type(error).__name__}: {error}".split()))
    return text if len(text) <= 400 else text[:397] + "..."
