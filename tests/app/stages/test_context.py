"""What the stages of a job share: files that are retried, processes that write nothing, outputs that are on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import configure

from gsprune.app.configuration import NUMBERS
from gsprune.app.stages.context import PARTS, Context, Writer, load_or_compute
from gsprune.app.stopwatch import Stopwatch


class Disk:
    """Full until `room` is true."""

    def __init__(self) -> None:
        self.room, self.written = False, 0

    def write(self) -> None:
        if not self.room:
            raise OSError(28, "No space left on device")
        self.written += 1


def test_a_file_that_failed_is_retried_until_it_is_written() -> None:
    writer, disk = Writer(Stopwatch(*PARTS), active=True), Disk()
    writer.write_or_retry("masks/epoch_0001.safetensors", disk.write)
    assert writer.retry() == []
    assert writer.unwritten == ["masks/epoch_0001.safetensors"]
    disk.room = True
    assert writer.retry() == ["masks/epoch_0001.safetensors"]
    assert (writer.unwritten, writer.retry(), disk.written) == ([], [], 1)


def test_a_file_that_is_written_at_once_is_not_retried() -> None:
    writer, disk = Writer(Stopwatch(*PARTS), active=True), Disk()
    writer.write("plan.json", disk.write)
    disk.room = True
    assert (writer.retry(), writer.unwritten) == ([], ["plan.json"])


@pytest.mark.parametrize("first", [True, False])
def test_only_the_first_process_writes(tmp_path: Path, first: bool) -> None:
    job = Context(configure(), tmp_path, first=first)
    job.write_result("running")
    assert [path.name for path in tmp_path.iterdir()] == (["result.json"] if first else [])
    job.tracker.log_metrics({"loss": 0.5}, step=1)  # silent in both until the record is opened
    job.tracker.finish("FINISHED")
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_result_starts_with_all_its_numbers(tmp_path: Path) -> None:
    cfg = configure("seed=3")
    job = Context(cfg, tmp_path)
    assert list(job.result)[: len(NUMBERS) + 2] == ["status", *NUMBERS, "unwritten"]
    assert (job.result["status"], job.result["seed"], job.result["accuracy"]) == ("running", cfg.seed, None)
    job.cfg.seed = 5
    assert cfg.seed != 5  # an own copy


def test_an_output_on_disk_is_not_computed_again() -> None:
    stored: list[int] = []
    held: list[str] = []

    @contextlib.contextmanager
    def lock() -> Iterator[None]:
        held.append("taken")
        yield
        held.append("released")

    def load() -> int | None:
        assert held[-1] == "taken"
        return stored[0] if stored else None

    assert load_or_compute(load, lambda: 3, stored.append, lock=lock()) == (3, False)
    assert load_or_compute(load, lambda: 4, stored.append, lock=lock()) == (3, True)
    assert stored == [3]
    assert held == ["taken", "released"] * 2
