"""Checks of sizes that networks and data sets are built with."""

from __future__ import annotations

__all__ = ["check_at_least", "check_divides"]


def check_at_least(least: int, **sizes: int) -> None:
    """
    >>> check_at_least(1, width=0)
    Traceback (most recent call last):
    ValueError: width is 0: it must be 1 or more
    """
    for name, size in sizes.items():
        if size < least:
            raise ValueError(f"{name} is {size}: it must be {least} or more")


def check_divides(name: str, size: int, whole_name: str, whole: int) -> None:
    """
    >>> check_divides("patch_size", 5, "image_size", 28)
    Traceback (most recent call last):
    ValueError: patch_size 5 does not divide image_size 28; 4 does
    """
    if whole % size:
        near = min((d for d in range(1, whole + 1) if whole % d == 0), key=lambda d: abs(d - size))
        raise ValueError(f"{name} {size} does not divide {whole_name} {whole}; {near} does")
