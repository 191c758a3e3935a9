"""What to tell a user whose batch does not fit into memory."""

from __future__ import annotations

from omegaconf import DictConfig
from torch import OutOfMemoryError


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
    """What to try when a batch does not fit.

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
