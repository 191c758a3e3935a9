"""Nested data (mappings, lists, tuples) leaf by leaf, as configurations and JSON have it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = ["leaves", "mapped"]

Path = tuple[Any, ...]


def mapped(data: Any, function: Callable[[Any, Path], Any], path: Path = ()) -> Any:
    """The data with `function(leaf, path)` in place of each leaf; mappings become dicts, tuples become lists.

    >>> mapped({"a": [1, 2], "b": 3}, lambda leaf, path: leaf if path == ("a", 1) else 0)
    {'a': [0, 2], 'b': 0}
    """
    if isinstance(data, Mapping):
        return {key: mapped(value, function, (*path, key)) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [mapped(value, function, (*path, index)) for index, value in enumerate(data)]
    return function(data, path)


def leaves(data: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and value of each leaf; all parts of a path are texts.

    >>> list(leaves({"a": [1, 2], "b": {}}))
    [(('a', '0'), 1), (('a', '1'), 2)]
    """
    found: list[tuple[tuple[str, ...], Any]] = []
    mapped(data, lambda leaf, path: found.append((tuple(map(str, path)), leaf)))
    return iter(found)
