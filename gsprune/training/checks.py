"""Range checks of training settings."""

from __future__ import annotations


def check(ok: bool, name: str, given: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name}={given} is not allowed: it must be {allowed}")


def check_share(name: str, given: float) -> None:
    check(0 <= given <= 1, name, given, "from 0 to 1")
