"""An error that runs out of memory, as a sentence that says what to try."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig
from torch import OutOfMemoryError


@contextmanager
def explain_out_of_memory(cfg: DictConfig, result: Mapping[str, Any]) -> Iterator[None]:
    """Turn an error of too little memory, of the device or the machine, into a ValueError with settings to try.

    Args:
        result: of the job so far: its `device` is named, if it is known yet.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        device = result["device"] or cfg.trainer.device
        raise ValueError(f"{device} ran out of memory{smaller_steps(cfg)}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """
    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    True
    >>> is_out_of_memory(RuntimeError("shapes do not match"))
    False
    """
    said = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (OutOfMemoryError, MemoryError)) or any(text in str(error) for text in said)


def smaller_steps(cfg: DictConfig) -> str:
    """Settings to try when a batch does not fit.

    >>> from omegaconf import OmegaConf
    >>> trainer = {"accumulate_steps": 1, "precision": "fp32"}
    >>> print(smaller_steps(OmegaConf.create({"dataset": {"batch_size": 2}, "trainer": trainer})).strip())
    with dataset.batch_size=2: try dataset.batch_size=1 trainer.accumulate_steps=2 (as large a step, in smaller \
parts), trainer.precision=bf16, or a smaller model
    """
    size, parts = cfg.dataset.get("batch_size"), cfg.trainer.accumulate_steps
    tips = []
    if isinstance(size, int) and size > 1:
        fewer = f"dataset.batch_size={size // 2} trainer.accumulate_steps={2 * parts}"
        tips.append(f"{fewer} (as large a step, in smaller parts)")
    if cfg.trainer.precision == "fp32":
        tips.append("trainer.precision=bf16")
    given = f" with dataset.batch_size={size}" if isinstance(size, int) else ""
    return f"{given}: try {', '.join([*tips, 'or a smaller model'])}" if tips else f"{given}: try a smaller model"
