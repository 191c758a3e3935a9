"""What the jobs of a sweep left behind, read back: the folders, their `result.json` and their overrides.

Files are data from strangers: a half-written one, another program's folder or a value of the wrong type is named with a
reason and never stops the reading.
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
from stat import S_ISREG
from typing import Any

from gsprune.files.disk import read_json
from gsprune.files.layout import NOT_JOBS, RESULT
from gsprune.text.names import natural
from gsprune.text.redact import cleaned

__all__ = ["STATUSES", "JobResult", "Results", "read_overrides", "read_results"]

STATUSES = ("running", "finished", "failed", "interrupted", "skipped")
_MAX_BYTES = 16_000_000
_MAX_DEPTH = 16


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
        """running (also of a job that was killed), finished, failed, interrupted (Ctrl-C) or skipped."""
        return str(self.result["status"])

    @property
    def config_hash(self) -> str | None:
        return self.text("config_hash")

    @cached_property
    def overrides(self) -> dict[str, str]:
        """What was set on the command line, key -> value: of `result.json`, else of `.hydra/overrides.yaml`."""
        listed = self.result.get("overrides")
        if isinstance(listed, list):
            return read_overrides(text for text in listed if isinstance(text, str))
        return read_overrides(_hydra_overrides(self.folder))

    @property
    def choices(self) -> dict[str, str]:
        """The option of each configuration group, as far as `result.json` tells."""
        found = self.result.get("choices")
        pairs = found.items() if isinstance(found, dict) else ()
        return {group: option for group, option in pairs if isinstance(option, str)}

    def number(self, *path: str) -> float | None:
        """A finite number of the result, or None: `number("accuracy")`, `number("timings", "train")`.

        >>> job = JobResult(Path("0"), {"status": "finished", "loss": "NaN", "timings": {"train": 2}})
        >>> job.number("loss"), job.number("timings", "train"), job.number("accuracy")
        (None, 2.0, None)
        """
        return _finite(self._find(path))

    def text(self, *path: str) -> str | None:
        """A text of the result that is not empty, or None."""
        value = self._find(path)
        return value if isinstance(value, str) and value else None

    def numbers(self, *path: str) -> dict[str, float]:
        """The finite numbers of an object of the result, such as `timings`; empty when there is no such object."""
        value = self._find(path)
        pairs = value.items() if isinstance(value, dict) else ()
        return {name: number for name, number in ((n, _finite(v)) for n, v in pairs) if number is not None}

    def _find(self, path: tuple[str, ...]) -> object:
        value: object = self.result
        for part in path:
            value = value.get(part) if isinstance(value, Mapping) else None
        return value


@dataclass
class Results:
    """The jobs of a sweep in natural order, and the folders that could not be used with the reason for each."""

    directory: Path
    jobs: list[JobResult] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def with_status(self, status: str) -> list[JobResult]:
        return [job for job in self.jobs if job.status == status]


def read_results(directory: str | os.PathLike[str]) -> Results:
    """Read every job under `directory`, at any depth: a folder with a `result.json` or a `.hydra` is a job.

    Left out in silence are hidden folders, the dense cache, MLflow's folders, and jobs of status "skipped": an
    equal job is listed elsewhere. Symbolic links to folders are not followed.

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
    """Hydra's overrides as key -> value, without the signs that add or remove; of equal keys the last one counts.

    >>> read_overrides(["pruner=abs", "+tracking.tags.a=1", "~dataset", "++seed=3"])
    {'pruner': 'abs', 'tracking.tags.a': '1', 'dataset': '', 'seed': '3'}
    """
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if equals or key.startswith("~"):
            name = key.strip().lstrip("+~")
            found[name] = cleaned({name: value})[name]
    return found


def _walk(results: Results, folder: Path, *, depth: int) -> bool:
    """Read the jobs in this folder and below; False when there is none, which is said of the highest such folder."""
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
        results.skipped[_relative(folder, results.directory)] = str(error)
        return
    if result["status"] != "skipped":
        results.jobs.append(JobResult(folder, result, results.directory))


def _read_result(path: Path) -> dict[str, Any]:
    """The object in the file, with a known status and an accuracy that is none or a share; else ValueError."""
    result = _load(path)
    if not isinstance(result, dict):
        raise ValueError(f"its {RESULT} holds a {_kind(result)}, not an object")
    if result.get("status") not in STATUSES:
        raise ValueError(f"its {RESULT} has the status {_short(result.get('status'))}, not {' or '.join(STATUSES)}")
    if not _is_share(result.get("accuracy")):
        raise ValueError(f"its {RESULT} has the accuracy {_short(result['accuracy'])}, not a number from 0 to 1")
    return result


def _load(path: Path) -> object:
    try:
        facts = path.stat()
        ordinary = S_ISREG(facts.st_mode) and facts.st_size <= _MAX_BYTES
        result = read_json(path) if ordinary else None
    except OSError as error:
        raise ValueError(f"its {RESULT} cannot be read ({error.strerror})") from None
    except ValueError:
        raise ValueError(f"its {RESULT} is not valid JSON: half written, or of another program") from None
    if not ordinary:
        raise ValueError(f"its {RESULT} is not a file of at most {_MAX_BYTES:,} bytes")
    return result


def _is_share(value: object) -> bool:
    """None, NaN and infinity are what a diverged or unfinished job has; any other must lie between 0 and 1."""
    number = _as_float(value)
    return value is None if number is None else 0 <= number <= 1 or not math.isfinite(number)


def _hydra_overrides(folder: Path) -> list[str]:
    """The texts in `.hydra/overrides.yaml`; none when it is not a list of texts alone.

    Read piece by piece: a loader would build what is nested, for which its stack may be too small (libyaml's then
    takes the process with it) and time and memory too (mappings that merge others).
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
    """Numbers, and the texts that `files.plain` writes for what JSON cannot hold; everything else is None."""
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


def _kind(value: object) -> str:
    kinds = {list: "list", str: "text", bool: "truth value", type(None): "null"}
    return kinds.get(type(value), "number")


def _short(value: object) -> str:
    """A value as a sentence can hold it: on one line, not longer than 40 characters.

    >>> _short("abc"), _short([0] * 100)
    ("'abc'", '[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,…')
    """
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
