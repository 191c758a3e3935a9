"""Choose by name: `*` patterns to include and to exclude. Imports nothing but the standard library."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase


def choose(
    names: Mapping[str, Iterable[str]],
    include: Sequence[str],
    exclude: Sequence[str],
    *,
    skipped: Mapping[str, str] | None = None,
    by_name: Collection[str] = (),
) -> list[str]:
    """The names that a pattern includes and none excludes, in the order given.

    Args:
        names: name -> everything a pattern may match to mean it (the name itself, its module, ...).
        include: patterns with `*`, `?` and `[...]`, case matters.
        exclude: patterns that win over `include`.
        skipped: name -> why it is not on offer; told when it is all that an `include` pattern matches.
        by_name: those of `names` that a pattern includes only if it means them: it has no wildcard, or matches nothing
            else (and is not "*").

    Raises:
        ValueError: a pattern that matches nothing (the nearest name is told), or nothing left to prune.

    Example:
        >>> layers = {"conv1.weight": ["conv1.weight", "conv1"], "fc.weight": ["fc.weight", "fc"]}
        >>> choose(layers, ["*"], ["fc"])
        ['conv1.weight']
    """
    for kind, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise ValueError(f"{kind} is {patterns!r}: it must be a list of patterns, [{patterns!r}]")
        for pattern in patterns:
            if not any(_matches(aliases, [pattern]) for aliases in names.values()):
                _check_skipped(kind, pattern, names, skipped or {})
    wide = [aliases for name, aliases in names.items() if name not in by_name]
    meant = [pattern for pattern in include if _means(pattern, wide)]
    chosen = [
        name
        for name, aliases in names.items()
        if _matches(aliases, meant if name in by_name else include) and not _matches(aliases, exclude)
    ]
    if not chosen:
        why = next((f" ({name}: {reason})" for name, reason in (skipped or {}).items()), "")
        raise ValueError(f"nothing is left to prune: include is {list(include)}, exclude is {list(exclude)}{why}")
    return chosen


def _means(pattern: str, wide: Sequence[Iterable[str]]) -> bool:
    """Whether a pattern is about what it matches, and not about everything."""
    if not re.search(r"[*?\[]", pattern):
        return True
    return bool(pattern.strip("*")) and not any(_matches(aliases, [pattern]) for aliases in wide)


def _check_skipped(kind: str, pattern: str, names: Mapping[str, Iterable[str]], skipped: Mapping[str, str]) -> None:
    """The error for a pattern that matches nothing on offer; to exclude what is skipped anyway is none."""
    hit = next((name for name in skipped if fnmatchcase(name, pattern)), None)
    if hit is None:
        raise ValueError(
            f"{kind} pattern {pattern!r} matches nothing that can be pruned{_nearest(pattern, names, skipped)}"
        )
    if kind == "include":
        raise ValueError(f"include pattern {pattern!r} matches nothing that can be pruned ({hit}: {skipped[hit]})")


def _matches(aliases: Iterable[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(alias, pattern) for alias in aliases for pattern in patterns)


def _nearest(pattern: str, names: Mapping[str, Iterable[str]], skipped: Mapping[str, str]) -> str:
    aliases = sorted({*skipped, *(alias for group in names.values() for alias in group)})
    near = difflib.get_close_matches(pattern, aliases, n=1, cutoff=0.4)
    if near:
        return f"; the nearest name is {near[0]!r}"
    return f"; there are {', '.join(aliases[:8])}{', ...' if len(aliases) > 8 else ''}" if aliases else ""
