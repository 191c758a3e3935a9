"""A sweep as every process sees it, through its directory: its record, its jobs and its locks."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from gsprune.files.disk import put_aside, read_object, sha256, write_json
from gsprune.files.layout import RESULT, SWEEP
from gsprune.files.locks import Lock, file_name
from gsprune.settings.hydra_files import as_given, recorded_overrides, sweeper_params
from gsprune.sweeps.results import JobResult, read_results
from gsprune.text.redact import redacted_data

__all__ = ["Sweep", "current_sweep", "parent_run_id"]


@dataclass(frozen=True)
class Sweep:
    """The directory of a sweep, as any process sees it."""

    directory: Path

    @property
    def record(self) -> Mapping[str, Any]:
        """The content of `sweep.json`; empty if it is missing or damaged."""
        return read_object(self.directory / SWEEP)

    @property
    def parent_run_id(self) -> str | None:
        """The MLflow run of the sweep, the parent of its jobs' runs; None if the sweep is not tracked."""
        found = self.text("parent_run_id")
        return found if found is not None and re.fullmatch("[0-9a-zA-Z]{1,64}", found) else None

    def text(self, key: str) -> str | None:
        """A non-empty text of `sweep.json` without a redacted password, or None."""
        found = self.record.get(key)
        return found if isinstance(found, str) and found and "***@" not in found else None

    def finished(self, config_hash: str) -> JobResult | None:
        """The finished job with that configuration."""
        done = read_results(self.directory).with_status("finished")
        return next((job for job in done if job.config_hash == config_hash), None)

    def unfinished(self, config_hash: str) -> JobResult | None:
        """The unfinished job with that configuration that has a checkpoint."""
        jobs = (job for job in read_results(self.directory).jobs if job.status != "finished")
        same = (job for job in jobs if job.config_hash == config_hash)
        return next((job for job in same if any((job.folder / "checkpoint").glob("epoch_*"))), None)

    def lock(self, name: str) -> Lock:
        """The lock with that name, between the processes of this sweep."""
        return Lock(self.directory / ".gsprune" / "locks" / file_name(name))

    def is_open(self) -> bool:
        """Whether a process runs this sweep now; `sweep.json` says "running" after a kill too."""
        return self.lock("sweep").is_held()

    def name_of(self, folder: Path) -> str:
        """A job's folder as it is called in the sweep: "3" or "seed=0/3".

        >>> Sweep(Path("/sweeps/a")).name_of(Path("/sweeps/a/seed=0/3"))
        'seed=0/3'
        """
        return folder.relative_to(self.directory).as_posix()

    def is_running(self, job: JobResult) -> bool:
        """Whether a process runs the job now; its status is "running" after a kill too."""
        return self.lock(f"job {job.name}").is_held()

    def folder_of(self, name: str, config_hash: str) -> str:
        """The folder of the finished job with that configuration: `name`, unless the job was set aside since."""
        before = read_results(self.directory / name).jobs if (self.directory / name / RESULT).is_file() else []
        if any(job.config_hash == config_hash for job in before):
            return name
        found = self.finished(config_hash)
        return found.name if found is not None else name


def current_sweep() -> Sweep | None:
    """The sweep that this process's Hydra job belongs to; None outside of one.

    >>> current_sweep() is None
    True
    """
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return None
    depth = len(Path(str(hydra.sweep.subdir)).parts)
    folder = Path(hydra.runtime.output_dir)  # absolute and right under every launcher, unlike the working directory
    return Sweep(folder.parents[depth - 1] if depth else folder)


def parent_run_id() -> str | None:
    """The MLflow run of this process's sweep, for jobs that do their own tracking; see `start_run`.

    >>> parent_run_id() is None
    True
    """
    sweep = current_sweep()
    return sweep.parent_run_id if sweep is not None else None


def set_aside(folder: Path, job: JobResult) -> Path:
    """Move another job's results out of `folder`, into a folder beside it that is a job too; Hydra's own files stay.

    An extended sweep numbers its jobs anew, and must not overwrite finished ones.
    """
    known = re.fullmatch("[0-9a-f]{8,64}", job.config_hash or "")  # anything else would name another folder
    mark = known[0] if known else sha256(folder / RESULT)
    beside, count = folder.with_name(f"{folder.name}-{mark[:8]}"), 1
    while beside.exists():
        if job.status == read_object(beside / RESULT).get("status") == "finished":
            shutil.rmtree(beside)  # the same configuration, done twice
        else:
            count += 1
            beside = folder.with_name(f"{folder.name}-{mark[:8]}-{count}")
    beside.mkdir()
    _move_results(folder, beside)
    if read_object(beside / RESULT).get("config_hash") != job.config_hash:  # its own record was lost
        write_json(beside / RESULT, dict(job.result))
    return beside


def fetch(job: JobResult, folder: Path) -> None:
    """Move a job's results to `folder`, where it continues; Hydra's own files stay."""
    _move_results(job.folder, folder)
    with suppress(OSError):  # other jobs' folders have Hydra's files
        job.folder.rmdir()


def _move_results(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir(), key=lambda path: path.name == RESULT):  # last: with it the folder is a job
        if path.name != ".hydra" and path.suffix != ".log":
            if (target / path.name).is_dir():
                put_aside(target / path.name, "earlier")
            os.replace(path, target / path.name)


# --- resuming ----------------------------------------------------------------------------------------------


def without_sweep_settings(overrides: Iterable[str]) -> list[str]:
    """The overrides without those that change how the sweep runs, and not its jobs.

    >>> without_sweep_settings(["pruner=abs", "sweep.resume=true", "report.max_drop=2", "+sweep.lr=1"])
    ['pruner=abs', '+sweep.lr=1']
    """
    ours = r"\+*(sweep\.(resume|check)|report\.(max_drop|by))="
    return [override for override in as_given(overrides) if not re.match(ours, override)]


def command_identity(config: DictConfig) -> str:
    """Equal for equal commands: application, configuration and overrides in any order, without how the sweep runs."""
    what = [
        str(config.hydra.job.name),
        str(config.hydra.job.config_name),
        sorted(recorded_overrides(without_sweep_settings(config.hydra.overrides.task))),  # a hash can be guessed
        redacted_data(sweeper_params(config)),
    ]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def find_begun(config: DictConfig, identity: str) -> Path | None:
    """The newest sweep of the same command in a directory that this configuration can give, at any time."""
    written: Any = OmegaConf.to_container(config.hydra.sweep, resolve=False)
    sweeps = [Sweep(Path(path).parent) for path in glob.glob(f"{_as_glob(str(written['dir']))}/{SWEEP}")]
    same = [sweep for sweep in sweeps if sweep.record.get("identity") == identity]
    newest = max(same, key=lambda sweep: (str(sweep.record.get("started")), str(sweep.directory)), default=None)
    return newest.directory if newest is not None else None


def _as_glob(template: str) -> str:
    """
    >>> _as_glob("multirun/${now:%Y-%m-%d}/${now:%H-%M-%S}"), _as_glob("a[1]/${oc.env:X,${now:%H}}")
    ('multirun/*/*', 'a[[]1]/*')
    """
    while (shorter := re.sub(r"\$\{[^{}]*\}", "\0", template)) != template:
        template = shorter
    return glob.escape(template).replace("\0", "*")
