"""Names: patterns that include and exclude them, many names in few words, natural order."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

__all__ = ["check_patterns", "choose", "did_you_mean", "joined", "natural", "nearest"]

_LINES = 10  # of reasons
_NAMES = 6  # for one reason


def joined(path: str, leaf: str) -> str:
    """The name of a module's tensor or attribute; the root module's path is "".

    >>> joined("layer.0", "weight"), joined("", "weight")
    ('layer.0.weight', 'weight')
    """
    return f"{path}.{leaf}" if path else leaf


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
        skipped: name -> why it cannot be chosen; in the error if an `include` pattern matches nothing else.
        by_name: those of `names` that a pattern includes only if it means them: it has no wildcard, or it matches
            nothing else and is not "*".

    Raises:
        ValueError: a pattern that matches nothing (with the nearest name), or nothing left to prune.

    Example:
        >>> layers = {"conv1.weight": ["conv1.weight", "conv1"], "fc.weight": ["fc.weight", "fc"]}
        >>> choose(layers, ["*"], ["fc"])
        ['conv1.weight']
    """
    check_patterns(include, exclude)
    if not names and not skipped:
        raise ValueError("there is nothing in this model that could be pruned")
    for kind, patterns in (("include", include), ("exclude", exclude)):
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


def check_patterns(include: object, exclude: object) -> None:
    """ValueError if one of them is no list of patterns: Python would read a string letter by letter.

    >>> check_patterns(["*"], "fc")
    Traceback (most recent call last):
    ValueError: exclude is 'fc': it must be a list of patterns, ['fc']
    """
    for kind, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise ValueError(f"{kind} is {patterns!r}: it must be a list of patterns, [{patterns!r}]")
        if not isinstance(patterns, Collection) or not all(isinstance(pattern, str) for pattern in patterns):
            raise ValueError(f"{kind} is {patterns!r}: it must be a list of patterns, such as ['layer1*']")


def _means(pattern: str, wide: Sequence[Iterable[str]]) -> bool:
    """Whether a pattern means what it matches, and not everything."""
    if not re.search(r"[*?\[]", pattern):
        return True
    return bool(pattern.strip("*")) and not any(_matches(aliases, [pattern]) for aliases in wide)


def _check_skipped(kind: str, pattern: str, names: Mapping[str, Iterable[str]], skipped: Mapping[str, str]) -> None:
    """The error for a pattern that matches nothing; excluding what is skipped is no error."""
    hit = next((name for name in skipped if fnmatchcase(name, pattern)), None)
    if hit is None:
        raise ValueError(
            f"{kind} pattern {pattern!r} matches nothing that can be pruned{_nearest(pattern, names, skipped)}"
        )
    if kind == "include":
        matched = f"include pattern {pattern!r} matches nothing that can be pruned"
        what = "nothing in this model can be pruned" if pattern == "*" else matched
        raise ValueError(f"{what} ({hit}: {skipped[hit]})")


def _matches(aliases: Iterable[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(alias, pattern) for alias in aliases for pattern in patterns)


def _nearest(pattern: str, names: Mapping[str, Iterable[str]], skipped: Mapping[str, str]) -> str:
    aliases = sorted({*skipped, *(alias for group in names.values() for alias in group)})
    near = difflib.get_close_matches(pattern, aliases, n=1, cutoff=0.4)
    if near:
        return f"; the nearest name is {near[0]!r}"
    return f"; there are {', '.join(aliases[:8])}{', ...' if len(aliases) > 8 else ''}" if aliases else ""


def did_you_mean(name: object, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """The nearest known name, as the end of an error message; "" if none is near.

    >>> did_you_mean("trian", ["train", "val"]), did_you_mean("x", ["train"])
    ("; did you mean 'train'?", '')
    """
    near = nearest(str(name), known, cutoff=cutoff)
    return f"; did you mean {near!r}?" if near else ""


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known name that is most like this one; None if none is.

    >>> nearest("weigthed", ["weighted", "abs"]), nearest("x", ["abs"])
    ('weighted', None)
    """
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


# ---- many names in few words


def lines_by_reason(texts: Mapping[str, str]) -> list[str]:
    """One line for each text, with its names; the texts after the tenth are only counted.

    >>> lines_by_reason({"a.0": "it is small", "b": "it is odd", "a.1": "it is small"})
    ['a.{0,1}: it is small', 'b: it is odd']
    """
    about: dict[str, list[str]] = {}
    for name, text in texts.items():
        about.setdefault(text, []).append(name)
    lines = [f"{_named(names)}: {text}" for text, names in about.items()]
    more = sum(len(names) for names in [*about.values()][_LINES:])
    return [*lines[:_LINES], f"and {more} more"] if more else lines


def _named(names: Sequence[str]) -> str:
    """A few names, folded, and the number of others."""
    groups = [folded(group) for group in alike(names)]
    more = len(groups) - _NAMES
    return ", ".join(groups[:_NAMES]) + (f" and {more} more" if more > 0 else "")


def alike(names: Sequence[str]) -> list[list[str]]:
    """Names in groups that differ only in one number.

    >>> alike(["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2"])
    [['conv1'], ['layer1.0.conv1', 'layer1.1.conv1'], ['layer1.0.conv2', 'layer1.1.conv2']]
    """
    shapes: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        shapes.setdefault(tuple(_parts(name)[::2]), []).append(name)
    return [group for same in shapes.values() for group in _split(same)]


def _split(names: Sequence[str]) -> list[list[str]]:
    """Names of one shape in the fewest groups."""
    best: list[list[str]] = [[name] for name in names]
    for place in range(1, len(_parts(names[0])), 2):
        groups: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            parts = _parts(name)
            groups.setdefault((*parts[:place], *parts[place + 1 :]), []).append(name)
        best = min(best, [*groups.values()], key=len)
    return best


def folded(names: Sequence[str]) -> str:
    """One name for a group of `alike`.

    >>> folded([f"layer1.{i}.conv2" for i in (0, 1, 2, 5)])
    'layer1.{0-2,5}.conv2'
    """
    columns = [list(dict.fromkeys(column)) for column in zip(*map(_parts, names), strict=True)]
    return "".join(column[0] if len(column) == 1 else _range([int(number) for number in column]) for column in columns)


def _range(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(f"{r[0]}-{r[-1]}" if len(r) > 2 else ",".join(map(str, r)) for r in runs) + "}"


def _parts(name: str) -> list[str]:
    """Text and numbers in turn; numbers are the odd ones."""
    return re.split(r"(\d+)", name)


def natural(name: str) -> tuple[tuple[bool, float, str], ...]:
    """A sort key with numbers by value: 2 comes before 10, and 0.03 before 0.1.

    >>> sorted(["10", "2", "a/10", "a/9", "1-b", "lr=0.1", "lr=0.03"], key=natural)
    ['1-b', '2', '10', 'a/9', 'a/10', 'lr=0.03', 'lr=0.1']
    """
    parts = re.split(r"([0-9]+(?:[.][0-9]+)?)", name)
    return tuple((index % 2 == 0, float(part) if index % 2 else 0.0, part) for index, part in enumerate(parts) if part)
