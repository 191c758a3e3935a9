"""Kill runs with SIGKILL at random moments, go on with them, and compare with the same run left alone.

    python tests/kills.py --count 20 --seed 0

Imports are made once; every try is a fork of this process. A try is killed after a random time, by this process, or at
a random event, by itself: before an optimizer step's end, before any file or folder of the run is opened, renamed, made
or removed, and in the middle of a checkpoint's tensors. Prints one JSON object: how many kills, how many of them inside
the write of a checkpoint, how many tries went on from one, and what was not identical (nothing, it should be).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What a run needs, imported before the first fork. No tensor is computed here: that could start threads.
import matplotlib.pyplot
import PIL.Image
import sklearn.datasets  # noqa: F401
import torch._inductor  # noqa: F401  what torch.use_deterministic_algorithms imports
from jobs import configure
from omegaconf import DictConfig
from safetensors.torch import load_file

from gsprune.app import job
from gsprune.app.configuration import TIMED
from gsprune.discovery import find  # noqa: F401
from gsprune.tracking.tracker import read_metrics
from gsprune.training import checkpoints
from gsprune.training.trainer import Trainer

# What a clock has measured, and so differs between any two runs.
CLOCKED = {"seconds", "timings", "epoch_seconds", "time", "latency_note", *TIMED}
WRITING = "/checkpoint/."  # in the paths of what becomes a checkpoint
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
RUNS = (
    ("pruner=weighted", "trainer.checkpoint_minutes=0"),
    ("pruner=weighted", "pruner.shrink=each_update", "trainer.checkpoint_minutes=0", "dataset.batch_size=64"),
    ("pruner=elementwise", "optimizer=adamw", "trainer.accumulate_steps=2", "dataset.batch_size=64"),
    ("pruner=units_and_weights", "optimizer=adamw", "trainer.checkpoint_minutes=0"),
    ("pruner=elementwise", "trainer.precision=fp16", "trainer.checkpoint_minutes=0"),
    ("pruner=weighted", "pruner.target_sparsity=0.3", "trainer.clip_norm=1.0", "trainer.checkpoint_minutes=null"),
)


@dataclass
class Tried:
    """What came of it."""

    kills: int = 0
    inside_write: int = 0
    inside_prepare: int = 0  # before the first step
    continued: int = 0
    runs: int = 0
    differences: list[str] = field(default_factory=list)
    seconds: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    tried = kill_and_resume(wanted.count, seed=wanted.seed)
    print(json.dumps(tried.__dict__))
    raise SystemExit(bool(tried.differences))


def kill_and_resume(count: int, *, seed: int) -> Tried:
    """Kill `count` times in all, in runs of `RUNS` in turns; each is killed until it finishes."""
    chosen, tried, began = random.Random(seed), Tried(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        references: dict[tuple[str, ...], Reference] = {}
        first = chosen.randrange(len(RUNS))
        while tried.kills < count:
            overrides = RUNS[(first + tried.runs) % len(RUNS)]
            if overrides not in references:
                references[overrides] = reference(configure(*overrides), Path(folder, f"whole-{len(references)}"))
            whole, killed = references[overrides], Path(folder, f"killed-{tried.runs}")
            kill_until_finished(configure(*overrides), killed, whole, tried, chosen, most=min(6, count - tried.kills))
            tried.differences += [f"{' '.join(overrides)}: {text}" for text in differences(whole.folder, killed)]
            tried.runs += 1
            shutil.rmtree(killed)
    tried.seconds = time.perf_counter() - began
    return tried


@dataclass
class Reference:
    """A run left alone: its folder, how long it took, and how many events it had, in all and inside a write."""

    folder: Path
    seconds: float
    events: int
    writes: int


def reference(cfg: DictConfig, folder: Path) -> Reference:
    began = time.perf_counter()
    status, told = attempt(cfg, folder, kill_at=None)
    if status != 0:
        raise RuntimeError(f"the run that was left alone failed: {told}")
    events, writes = map(int, told.split()[-2:])
    return Reference(folder, time.perf_counter() - began, events, writes)


def kill_until_finished(
    cfg: DictConfig, folder: Path, whole: Reference, tried: Tried, chosen: random.Random, *, most: int
) -> None:
    kills = 0
    while True:
        timer, kill_at, among = None, None, ""
        if kills < most:
            way = chosen.choice(("time", "event", "write"))
            timer = chosen.uniform(0, whole.seconds) if way == "time" else None
            among = WRITING if way == "write" else ""
            if way != "time":
                # a third: so that a run is killed several times
                kill_at = chosen.randint(1, (whole.writes if among else whole.events) // 3)
        status, told = attempt(cfg, folder, kill_at=kill_at, among=among, seconds=timer)
        tried.continued += "resuming from the checkpoint" in told
        if status == 0:
            return
        if status != -signal.SIGKILL:
            raise RuntimeError(f"a try ended with {status}:\n{told}")
        kills += 1
        tried.kills += 1
        tried.inside_write += WRITING in told.splitlines()[-1] if kill_at else 0
        tried.inside_prepare += "step" not in told


def attempt(
    cfg: DictConfig, folder: Path, *, kill_at: int | None, among: str = "", seconds: float | None = None
) -> tuple[int, str]:
    """Run the job in a fork; returns its exit code (below 0: the signal) and what it told."""
    told = folder.with_name(f"{folder.name}.log")
    told.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        try:
            in_child(cfg, folder, told, kill_at, among)
        except BaseException:
            with told.open("a") as file:
                traceback.print_exc(file=file)
            os._exit(1)
    timer = threading.Timer(seconds, os.kill, (pid, signal.SIGKILL)) if seconds is not None else None
    if timer:
        timer.start()
    _, status = os.waitpid(pid, 0)
    if timer:
        timer.cancel()
    return os.waitstatus_to_exitcode(status), told.read_text() if told.exists() else ""


def in_child(cfg: DictConfig, folder: Path, told: Path, kill_at: int | None, among: str) -> None:
    out = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    seen: Counter[str] = Counter()

    def event(what: str) -> None:
        seen[""] += 1
        seen[WRITING] += WRITING in what
        if seen[among] == kill_at:
            os.write(out, f"\nkilled at {what}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(kind: str, arguments: tuple[Any, ...]) -> None:
        if (
            kind in EVENTS
            and isinstance(arguments[0], (str, os.PathLike))
            and str(arguments[0]).startswith(str(folder))
        ):
            event(f"{kind} {arguments[0]}")

    fit, write_tensors = Trainer.fit, checkpoints.write_tensors

    def counted_fit(self: Trainer, *others: Any, on_rest: Callable[[Any], None], **settings: Any) -> None:
        def counted_rest(at: Any) -> None:
            event("step")
            os.write(out, b"step\n")
            on_rest(at)

        fit(self, *others, on_rest=counted_rest, **settings)

    def torn_write_tensors(path: Path, *others: Any) -> None:
        write_tensors(path, *others)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        event(f"half of {path}")
        path.write_bytes(whole)

    Trainer.fit, checkpoints.write_tensors = counted_fit, torn_write_tensors  # type: ignore[method-assign]
    sys.addaudithook(audit)
    job.run(cfg, output_dir=folder)
    os.write(out, f"\n{seen['']} {seen[WRITING]}\n".encode())
    os._exit(0)


def differences(whole: Path, killed: Path) -> Iterator[str]:
    """What of the weights, masks, metrics and results is not the same, but for what a clock has measured."""
    for name in sorted({*_files(whole), *_files(killed)}):
        ours, theirs = killed / name, whole / name
        if not (ours.is_file() and theirs.is_file()):
            yield f"{name} is in one only"
        elif not SAME.get(theirs.suffix, _same_bytes)(ours, theirs):
            yield f"{name} differs"


def _files(folder: Path) -> list[str]:
    """All files but the pictures of curves (which show seconds nowhere, but are drawn by matplotlib)."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [name for name in found if not name.startswith("checkpoint/epoch_")]


def _same_bytes(ours: Path, theirs: Path) -> bool:
    return ours.read_bytes() == theirs.read_bytes()


def _same_tensors(ours: Path, theirs: Path) -> bool:
    first, second = load_file(ours), load_file(theirs)
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype
        and first[name].shape == second[name].shape
        and first[name].numpy().tobytes() == second[name].numpy().tobytes()
        for name in first
    )


def _same_json(ours: Path, theirs: Path) -> bool:
    first, second = (json.loads(path.read_text()) for path in (ours, theirs))
    return bool(_unclocked(first) == _unclocked(second))


def _same_rows(ours: Path, theirs: Path) -> bool:
    """Row by row, so that none is there twice; every line must be whole."""
    lines = ours.read_text().splitlines()
    first, second = (list(map(_unclocked, read_metrics(path))) for path in (ours, theirs))
    return len(lines) == len(first) and repr(first) == repr(second)


def _unclocked(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in CLOCKED}


SAME: dict[str, Callable[[Path, Path], bool]] = {
    ".safetensors": _same_tensors,
    ".json": _same_json,
    ".jsonl": _same_rows,
}

if __name__ == "__main__":
    matplotlib.use("Agg")
    PIL.Image.init()
    main()
