"""The results of a sweep as a data frame."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gsprune.extras import need
from gsprune.sweeps.results import JobResult, read_results
from gsprune.sweeps.variants import TEST, VALIDATION, controls

__all__ = ["results"]


def results(directory: str | os.PathLike[str], filters: Mapping[str, object] | None = None, **more: object) -> Any:
    """The jobs of a sweep, or of many, as a pandas data frame: one row a job, in natural order.

    Columns are `job` (its folder as seen from the directory), `folder`, `status`, then one for each override that some
    job has (`pruner`, `seed`, `pruner.target_sparsity`: numbers as numbers), then one for each number of `result.json`
    (`accuracy`, `val_accuracy`, `params`, `timings.train`: shares lie in [0, 1]). `delta` and `val_delta` are the
    test and validation accuracy minus those of the control (`pruner=none`) with the same seed and settings, so paired.
    What a job does not have is missing (NaN, None).

    Args:
        directory: of a sweep or of one job; jobs are found at any depth.
        filters: key -> value or list of values that an override must have: `{"pruner.target_sparsity": 0.5}`.
        more: the same for keys without a dot: `pruner="weighted", seed=[0, 1]`.

    Raises:
        ValueError: the directory does not exist, or a filter names an override that no job has.
        MissingExtraError: pandas is not installed.

    Example:
        >>> import json, pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for k, pruner in enumerate(["weighted", "none"]):
        ...     (folder / str(k)).mkdir()
        ...     job = {"status": "finished", "accuracy": 0.5 + k / 4, "overrides": [f"pruner={pruner}", "seed=0"]}
        ...     _ = (folder / str(k) / "result.json").write_text(json.dumps(job))
        >>> results(folder)[["job", "pruner", "accuracy", "delta"]].to_dict("list")
        {'job': ['0', '1'], 'pruner': ['weighted', 'none'], 'accuracy': [0.5, 0.75], 'delta': [-0.25, nan]}
        >>> list(results(folder, pruner="weighted").job)
        ['0']
    """
    jobs = read_results(directory).jobs
    keys = list(dict.fromkeys(key for job in jobs for key in job.overrides))
    wanted = {**(filters or {}), **more}
    unknown = next((key for key in wanted if key not in keys), None)
    if unknown is not None:
        raise ValueError(f"no job has an override {unknown!r}; there are {', '.join(keys) or 'none'}")
    pairs = controls(jobs) or {}
    rows = [_row(job, keys, pairs.get(job.name)) for job in jobs]
    chosen = [row for row in rows if all(_fits(row.get(key), value) for key, value in wanted.items())]
    first = ["job", "folder", "status", *keys, VALIDATION, TEST, "val_delta", "delta"]
    columns = dict.fromkeys([*first, *(key for row in chosen for key in row)])
    return need("pandas").DataFrame(chosen, columns=list(columns))


def _row(job: JobResult, keys: Sequence[str], control: JobResult | None) -> dict[str, Any]:
    row: dict[str, Any] = {"job": job.name, "folder": str(job.folder), "status": job.status}
    row |= {key: _value(job.overrides[key]) for key in keys if key in job.overrides}
    row |= {key: value for key, value in _numbers(job, ()) if key not in row}
    for column, of in (("val_delta", VALIDATION), ("delta", TEST)):
        mine, other = job.number(of), control.number(of) if control is not None else None
        if mine is not None and other is not None:
            row[column] = mine - other
    return row


def _numbers(job: JobResult, path: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    """Every finite number of a result, by its path; those of lists left out."""
    inner: Any = job.result
    for part in path:
        inner = inner[part]
    for name, value in inner.items():
        if isinstance(value, dict):
            if len(path) < 3:
                yield from _numbers(job, (*path, name))
        elif (number := job.number(*path, name)) is not None:
            yield ".".join((*path, name)), number


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _fits(value: object, wanted: object) -> bool:
    if isinstance(wanted, list | tuple | set | frozenset):
        return any(_fits(value, one) for one in wanted)
    return value == (_value(wanted) if isinstance(wanted, str) else wanted)
