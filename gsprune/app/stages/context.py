"""What all stages of a job share: its configuration, its result so far, and everything that it writes or prints."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig

from gsprune import collectives
from gsprune.app.configuration import NUMBERS, hydra_choices, run_name
from gsprune.app.console import Progress
from gsprune.app.stopwatch import Stopwatch
from gsprune.files.disk import spared, write_json
from gsprune.settings.recorded import hide
from gsprune.sweeps.sweep_dir import Sweep
from gsprune.text.redact import redact_logs
from gsprune.tracking.tracker import SilentTracker, Tracker
from gsprune.training.signals import Stop

PARTS = ("start", "train", "measure", "files", "tracking")  # what the seconds of a job are spent on
Output = TypeVar("Output")


class Writer:
    """Writes files that a run can do without: a fault of the disk is one warning, and the run continues.

    In all processes but the first it writes nothing.

    Attributes:
        unwritten: names of the files that are not on disk as they should be.
    """

    def __init__(self, watch: Stopwatch, *, active: bool) -> None:
        self.unwritten: list[str] = []
        self._active, self._watch = active, watch
        self._pending: dict[str, Callable[[], None]] = {}

    def write(self, name: str, write: Callable[[], None], meaning: str = "") -> None:
        """Call `write`; the warning of a fault ends with `meaning`: what the lack of this file means."""
        if self._active:
            with spared(name, self.unwritten, meaning):
                write()

    def write_or_retry(
        self, name: str, write: Callable[[], None], meaning: str = "it is tried again at the next checkpoint"
    ) -> None:
        """The same for a file that `retry` tries again after a fault."""
        if not self._active:
            return
        self._pending[name] = write
        with self._watch.part("files"), spared(name, self.unwritten, meaning):
            write()
            del self._pending[name]

    def retry(self) -> list[str]:
        """Write the files that failed; returns the names of those that are there now."""
        tried = dict(self._pending)
        for name, write in tried.items():
            self.write_or_retry(name, write)
        return [name for name in tried if name not in self._pending]


class Context:
    """What all stages of a job share.

    Attributes:
        cfg: the configuration, an own copy.
        folder: the output directory.
        sweep: that the job belongs to.
        first: whether this process is the first of the job's: the one that writes, tracks and prints.
        result: what `result.json` holds, in the order of its keys.
        numbers: what a stage measures besides, for the tracker.
        watch: seconds by part of the job.
        progress, tracker: silent until `set_up` and `open_record` replace them in the first process.
        save_model: writes the newest network; a job that fails calls it. None while there is nothing worth keeping.
    """

    def __init__(self, cfg: DictConfig, folder: Path, sweep: Sweep | None = None, *, first: bool | None = None) -> None:
        hide(cfg)
        redact_logs()
        self.cfg, self.folder, self.sweep = copy.deepcopy(cfg), folder, sweep
        self.first = collectives.rank() == 0 if first is None else first
        self.watch = Stopwatch(*PARTS)
        self.stop = Stop(patient=collectives.world_size() > 1)
        self.writer = Writer(self.watch, active=self.first)
        self.progress: Progress = Progress(0)
        self.tracker: Tracker = SilentTracker(folder)
        self.save_model: Callable[[], None] | None = None
        self.result = _new_result(cfg)
        self.numbers: dict[str, float] = {}

    def count_seconds(self) -> None:
        self.result["timings"] = self.watch.read()
        self.result["seconds"] = sum(self.result["timings"].values())

    def write_result(self, status: str) -> None:
        """Write `result.json` with this status and the seconds so far."""
        self.result["status"] = status
        self.count_seconds()
        self.result["unwritten"] = list(dict.fromkeys([*self.writer.unwritten, *self.tracker.unwritten]))
        self.write_result_file()

    def write_result_file(self) -> None:
        self.writer.write("result.json", lambda: write_json(self.folder / "result.json", self.result))

    def track_file(self, name: str, *, folder: str | None = None) -> None:
        """Give a file to the tracker, unless an earlier version of it is on disk."""
        if name not in self.writer.unwritten:
            self.tracker.log_artifact(self.folder / name, folder=folder)


def load_or_compute(
    load: Callable[[], Output | None],
    compute: Callable[[], Output],
    store: Callable[[Output], None] = lambda output: None,
    *,
    lock: contextlib.AbstractContextManager[None] | None = None,
) -> tuple[Output, bool]:
    """The output of a stage, and whether it was on disk already; otherwise it is computed and stored.

    Under `lock` one of several jobs that want the same output computes it, and the others read it.

    >>> load_or_compute(lambda: None, lambda: 3)
    (3, False)
    """
    with lock or contextlib.nullcontext():
        if (found := load()) is not None:
            return found, True
        made = compute()
        store(made)
        return made, False


def _new_result(cfg: DictConfig) -> dict[str, Any]:
    unknown = ("mlflow_run_id", "config_hash", "device", "sparsity_of", "layers", "latency_note", "dense")
    seed = cfg.get("seed") if type(cfg.get("seed")) is int else None  # `set_up` refuses anything else
    result: dict[str, Any] = {"status": "running", **dict.fromkeys(NUMBERS), "unwritten": []}
    result |= {**dict.fromkeys(unknown), "shrunk": False}
    return result | {"name": run_name(cfg), "seed": seed, **hydra_choices()}
