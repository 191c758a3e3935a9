"""Names and texts that MLflow accepts."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Mapping
from typing import Any

from gsprune.files.disk import json_data
from gsprune.text.display import tag
from gsprune.text.redact import redacted

__all__ = ["Names", "allowed_name", "fit_tags", "flatten"]


# The page of a run sorts groups of charts by name and opens all of them, which no tag changes: the groups with a chart
# for each layer come after `train` and `val` by their names alone.
_BY_LAYER, _WHERE = ("kept/", "sparsity/"), "where/"


class Names:
    """Maps each of our names to one that MLflow accepts; the same name gives the same result, no two names share one.

    Numbers of single layers get a group behind `train/` and `val/`.

    >>> names = Names()
    >>> names["kept/layers[0].heads"], names["kept/layers(0).heads"], names["kept/layers[0].heads"]
    ('where/kept/layers_0_.heads', 'where/kept/layers_0_.heads_2', 'where/kept/layers_0_.heads')
    """

    def __init__(self) -> None:
        self._given: dict[str, str] = {}

    def __getitem__(self, name: str) -> str:
        if name not in self._given:
            taken, allowed, number = set(self._given.values()), allowed_name(_grouped(name)), 2
            choice = allowed
            while choice in taken:
                choice, number = f"{allowed}_{number}", number + 1
            self._given[name] = choice
        return self._given[name]


def allowed_name(name: str) -> str:
    """Letters, digits and `_ - . / space` stay (MLflow on Windows accepts no more); at most 240 characters."""
    name = posixpath.normpath(re.sub(r"[^\w.\-/ ]", "_", name)).lstrip("/")
    while name.startswith("../"):
        name = name[3:]
    return name[:240].rstrip("/") if name not in ("", ".", "..") else "_"


def _grouped(name: str) -> str:
    return f"{_WHERE}{name}" if name.startswith(_BY_LAYER) else name


def fit_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {allowed_name(key): tag(str(value)) for key, value in tags.items()}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested configuration as dotted names and texts; lists of plain values stay one entry.

    >>> flatten({"pruner": {"keep": None, "include": ["*"]}, "stages": [{"epochs": 3}]})
    {'pruner.keep': 'null', 'pruner.include': '["*"]', 'stages.0.epochs': '3'}
    """
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            text = value if isinstance(value, str) else json.dumps(json_data(value), ensure_ascii=False)
            flat[name] = redacted(text)
    return flat
