"""Range checks of training settings."""

from __future__ import annotations

from collections.abc import Sequence

from gsprune.text.names import did_you_mean


def check(ok: bool, name: str, given: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name}={given} is not allowed: it must be {allowed}")


def check_choice(name: str, given: object, choices: Sequence[str], *, more: str = "") -> None:
    """
    >>> check_choice("trainer.resume", "nevr", ["auto", "never"])
    Traceback (most recent call last):
    ValueError: trainer.resume=nevr is not allowed: it must be one of auto, never; did you mean 'never'?
    """
    check(given in choices, name, given, f"one of {', '.join(choices)}{more}{did_you_mean(given, choices)}")


def check_share(name: str, given: float) -> None:
    check(0 <= given <= 1, name, given, "from 0 to 1")
