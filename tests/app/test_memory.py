"""Too little memory: one sentence that says what to try."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from jobs import configure

from gsprune.app import job as room
from gsprune.app.memory import is_out_of_memory, smaller_steps
from gsprune.training.trainer import Trainer


def finished(folder: Path, *overrides: str) -> dict[str, Any]:
    return jobs.finished(folder, "trainer.latency_repeats=0", *overrides)


TOO_SMALL = {
    "of a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB."),
    "of the machine": RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    "of numpy": MemoryError("Unable to allocate 8 GiB"),
}


@pytest.mark.parametrize("error", TOO_SMALL)
@pytest.mark.parametrize("place", ["fit", "score", "evaluate"])
def test_too_little_memory_is_one_sentence(
    error: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: object, **__: object) -> None:
        raise TOO_SMALL[error]

    monkeypatch.setattr(Trainer, place, too_large)
    sentence = (
        "cpu ran out of memory with dataset.batch_size=256: try dataset.batch_size=128 trainer.accumulate_steps=2 "
        "(as large a step, in smaller parts), trainer.precision=bf16, or a smaller model"
    )
    with pytest.raises(ValueError) as found:  # noqa: PT011
        finished(tmp_path)
    assert str(found.value) == sentence
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["error"]) == ("failed", f"ValueError: {sentence}")


def test_too_little_memory_for_a_plan_is_one_sentence_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object, **__: object) -> None:
        raise TOO_SMALL["of a GPU"]

    monkeypatch.setattr(room.predict, "plan", too_large)
    with pytest.raises(ValueError, match=r"^cpu ran out of memory with dataset.batch_size=256: try dataset.batch_size"):
        room.show_plan(configure("pruner=weighted"), output_dir=tmp_path)


def test_a_real_allocation_that_is_too_large_is_recognised() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert is_out_of_memory(error.value)


def test_what_to_try_depends_on_what_was_tried() -> None:
    def told(*overrides: str) -> str:
        return smaller_steps(configure(*overrides))

    assert told("dataset.batch_size=1", "trainer.precision=bf16") == " with dataset.batch_size=1: try a smaller model"
    assert told("dataset.batch_size=1") == (
        " with dataset.batch_size=1: try trainer.precision=bf16, or a smaller model"
    )
    assert told("dataset.batch_size=96", "trainer.accumulate_steps=3", "trainer.precision=fp16") == (
        " with dataset.batch_size=96: try dataset.batch_size=48 trainer.accumulate_steps=6 "
        "(as large a step, in smaller parts), or a smaller model"
    )


def test_other_errors_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Trainer, "fit", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        finished(tmp_path)
