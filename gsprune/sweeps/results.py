"""The results of a sweep's jobs, read from their folders: `result.json` and overrides.

Files are untrusted: a half-written one, another program's folder or a value of the wrong type is listed with a reason
and never stops the reading.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from gsprune.files.disk import Damaged, read_json
from gsprune.files.layout import NOT_JOBS, RESULT
from gsprune.text.display import quoted
from gsprune.text.names import natural
from gsprune.text.redact import redacted_data

__all__ = ["STATUSES", "JobResult", "Results", "read_overrides", "read_results"]

STATUSES = ("running", "finished", "failed", "interrupted", "skipped")
_MAX_BYTES = 16_000_000
_MAX_DEPTH = 16
_JSON_TYPES = {list: "list", str: "text", bool: "truth value", type(None): "null"}


@dataclass(frozen=True)
class JobResult:
    """One job: its folder, and the object in its `result.json`, whose values may be of any type."""

    folder: Path
    result: Mapping[str, Any]
    sweep: Path = field(default=Path())

    @property
    def name(self) -> str:
        """The folder as seen from the sweep directory, with slashes: "3" or "weighted/3"."""
        return _relative(self.folder, self.sweep)

    @property
    def status(self) -> str:
        """running (also after a kill), finished, failed, interrupted (Ctrl-C) or skipped."""
        return str(self.result["status"])

    @property
    def config_hash(self) -> str | None:
        return self.text("config_hash")

    @cached_property
    def overrides(self) -> dict[str, str]:
        """The overrides of the command line, key -> value: from `result.json`, else from `.hydra/overrides.yaml`."""
        listed = self.result.get("overrides")
        if isinstance(listed, list):
            return read_overrides(text for text in listed if isinstance(text, str))
        return read_overrides(_hydra_overrides(self.folder))

    @property
    def choices(self) -> dict[str, str]:
        """The option of each configuration group, as far as `result.json` has it."""
        return {group: option for group, option in self._items("choices") if isinstance(option, str)}

    def number(self, *path: str) -> float | None:
        """A finite number of the result, or None: `number("accuracy")`, `number("timings", "train")`.

        >>> job = JobResult(Path("0"), {"status": "finished", "loss": "NaN", "timings": {"train": 2}})
        >>> job.number("loss"), job.number("timings", "train"), job.number("accuracy")
        (None, 2.0, None)
        """
        return _finite(self._find(path))

    def text(self, *path: str) -> str | None:
        """A non-empty text of the result, or None."""
        value = self._find(path)
        return value if isinstance(value, str) and value else None

    def numbers(self, *path: str) -> dict[str, float]:
        """The finite numbers of an object of the result, such as `timings`; empty if there is no such object."""
        return {name: found for name, value in self._items(*path) if (found := _finite(value)) is not None}

    def _items(self, *path: str) -> Iterable[tuple[str, object]]:
        value = self._find(path)
        return value.items() if isinstance(value, dict) else ()

    def _find(self, path: tuple[str, ...]) -> object:
        value: object = self.result
        for part in path:
            value = value.get(part) if isinstance(value, Mapping) else None
        return value


@dataclass
class Results:
    """The jobs of a sweep in natural order; `skipped`: unusable folders and the reason for each."""

    directory: Path
    jobs: list[JobResult] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def with_status(self, status: str) -> list[JobResult]:
        return [job for job in self.jobs if job.status == status]


def read_results(directory: str | os.PathLike[str]) -> Results:
    """Read every job under `directory`, at any depth: a folder with a `result.json` or a `.hydra` is a job.

    Silently left out are hidden folders, the dense cache, MLflow's folders, and jobs of status "skipped", as an equal
    job is listed elsewhere. Symbolic links to folders are not followed.

    Raises:
        ValueError: the directory does not exist.
    """
    root = Path(directory)
    if not root.is_dir():
        raise ValueError(f"{root} is not a directory: give that of a sweep, such as multirun/<date>/<time>")
    results = Results(root)
    if (root / RESULT).is_file():  # a single job
        _read_job(results, root)
        return results
    for folder in _folders(root, root):
        _walk(results, folder, depth=1)
    results.jobs.sort(key=lambda job: natural(job.name))
    results.skipped = {name: results.skipped[name] for name in sorted(results.skipped, key=natural)}
    return results


def read_overrides(texts: Iterable[str]) -> dict[str, str]:
    """Hydra's overrides as key -> value, without the signs that add or remove; the last of equal keys counts.

    >>> read_overrides(["pruner=abs", "+tracking.tags.a=1", "~dataset", "++seed=3"])
    {'pruner': 'abs', 'tracking.tags.a': '1', 'dataset': '', 'seed': '3'}
    """
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if equals or key.startswith("~"):
            name = key.strip().lstrip("+~")
            found[name] = redacted_data({name: value})[name]
    return found


def _walk(results: Results, folder: Path, *, depth: int) -> bool:
    """Read the jobs in this folder and below; False without any, with a reason for the highest such folder."""
    name = _relative(folder, results.directory)
    if (folder / RESULT).exists():
        _read_job(results, folder)
        return True
    if (folder / ".hydra").is_dir():
        results.skipped[name] = f"it has no {RESULT}: the job has only begun, or was killed at once"
        return True
    before = dict(results.skipped)
    below = _folders(folder, results.directory, results.skipped) if depth < _MAX_DEPTH else []
    found = [_walk(results, inner, depth=depth + 1) for inner in below]  # all of them, before asking
    if any(found):
        return True
    results.skipped = {**before, name: results.skipped.get(name, f"it is not a job: it has no {RESULT} and no .hydra")}
    return False


def _folders(folder: Path, root: Path, skipped: dict[str, str] | None = None) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            inner = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        if skipped is None:
            raise ValueError(f"{folder} cannot be read ({error.strerror})") from None
        skipped[_relative(folder, root)] = f"it cannot be read ({error.strerror})"
        return []
    return [folder / name for name in inner if not name.startswith(".") and name not in NOT_JOBS]


def _read_job(results: Results, folder: Path) -> None:
    try:
        result = _read_result(folder / RESULT)
    except ValueError as error:
        results.skipped[_relative(folder, results.directory)] = f"its {RESULT} {error}"
        return
    if result["status"] != "skipped":
        results.jobs.append(JobResult(folder, result, results.directory))


def _read_result(path: Path) -> dict[str, Any]:
    """The object in the file.

    Raises:
        ValueError: it is no object, or its status is unknown, or its accuracy neither None nor a share.
    """
    result = _load(path)
    if not isinstance(result, dict):
        raise ValueError(f"holds a {_JSON_TYPES.get(type(result), 'number')}, not an object")
    if result.get("status") not in STATUSES:
        raise ValueError(f"has the status {quoted(result.get('status'), 40)}, not {' or '.join(STATUSES)}")
    if not _is_share(result.get("accuracy")):
        raise ValueError(f"has the accuracy {quoted(result['accuracy'], 40)}, not a number from 0 to 1")
    return result


def _load(path: Path) -> object:
    try:
        return read_json(path, most=_MAX_BYTES)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    except Damaged:
        raise ValueError("is not valid JSON: half written, or of another program") from None
    except ValueError:
        raise ValueError(f"is not a file of at most {_MAX_BYTES:,} bytes") from None


def _is_share(value: object) -> bool:
    """Whether it is None, NaN or infinite, as in a diverged or unfinished job, or lies between 0 and 1."""
    number = _as_float(value)
    return value is None if number is None else 0 <= number <= 1 or not math.isfinite(number)


def _hydra_overrides(folder: Path) -> list[str]:
    """The texts in `.hydra/overrides.yaml`; none if it is not a plain list of texts.

    This reads YAML events: a loader (PyYAML's, OmegaConf's) builds nested nodes, which can overflow libyaml's stack and
    end the process, or take unlimited time and memory (mappings that merge others).
    """
    import yaml

    path = folder / ".hydra" / "overrides.yaml"
    with suppress(OSError, ValueError, yaml.YAMLError):
        if not path.is_file() or path.stat().st_size > _MAX_BYTES // 100:
            return []
        events = yaml.parse(path.read_bytes(), Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))
        begin, texts = list(islice(events, 3)), list[str]()  # of the stream, of its document, of a list
        if isinstance(begin[-1], yaml.SequenceStartEvent):
            while isinstance(event := next(events), yaml.ScalarEvent):
                texts.append(event.value)
            return texts if isinstance(event, yaml.SequenceEndEvent) else []
    return []


def _finite(value: object) -> float | None:
    number = _as_float(value)
    return number if number is not None and math.isfinite(number) else None


def _as_float(value: object) -> float | None:
    """Numbers, and the texts that `files.disk.plain` writes for what JSON cannot hold; None for everything else."""
    if value in ("NaN", "Infinity", "-Infinity"):
        return float(str(value))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _relative(folder: Path, root: Path) -> str:
    return folder.name if folder == root else folder.relative_to(root).as_posix()
