"""What a sweep's directory says: its record, its jobs, locks; what a job asks, wherever it runs."""

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

from gsprune.files.disk import put_aside, read_object, write_json
from gsprune.files.layout import SWEEP
from gsprune.files.locks import Lock, file_name
from gsprune.settings.hydra_files import as_given, recorded_overrides
from gsprune.sweeps.results import JobResult, read_results
from gsprune.text.redact import cleaned

__all__ = ["Sweep", "current_sweep", "parent_run_id"]

# --- what a job asks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """The directory of a sweep, as any process sees it."""

    directory: Path

    @property
    def record(self) -> Mapping[str, Any]:
        """What `sweep.json` holds; empty when there is none or it is damaged."""
        return read_object(self.directory / SWEEP)

    @property
    def parent_run_id(self) -> str | None:
        """The MLflow run that the jobs belong under; None when the sweep is not tracked."""
        found = self.text("parent_run_id")
        return found if found is not None and re.fullmatch("[0-9a-zA-Z]{1,64}", found) else None

    def text(self, key: str) -> str | None:
        """A text of `sweep.json` that is not empty and holds no left-out password, or None."""
        found = self.record.get(key)
        return found if isinstance(found, str) and found and "***@" not in found else None

    def finished(self, config_hash: str) -> JobResult | None:
        """The job with that configuration, if it has finished."""
        done = read_results(self.directory).with_status("finished")
        return next((job for job in done if job.config_hash == config_hash), None)

    def unfinished(self, config_hash: str) -> JobResult | None:
        """The job with that configuration that has left a checkpoint, if it has not finished."""
        begun = [job for job in read_results(self.directory).jobs if job.status != "finished"]
        left = [job for job in begun if any((job.folder / "checkpoint").glob("epoch_*"))]
        return next((job for job in left if job.config_hash == config_hash), None)

    def lock(self, name: str) -> Lock:
        """A lock between processes for a thing of this sweep."""
        return Lock(self.directory / ".gsprune" / "locks" / file_name(name))

    def is_open(self) -> bool:
        """Whether a process is sweeping here now, so that "running" in the record is true."""
        return self.lock("sweep").is_held()

    def name_of(self, folder: Path) -> str:
        """A job's folder as it is called in the sweep: "3" or "seed=0/3".

        >>> Sweep(Path("/sweeps/a")).name_of(Path("/sweeps/a/seed=0/3"))
        'seed=0/3'
        """
        return folder.relative_to(self.directory).as_posix()

    def is_running(self, job: JobResult) -> bool:
        """Whether a process has the job's lock, so that "running" is true of it and not left by one that was killed."""
        return self.lock(f"job {job.name}").is_held()

    def folder_of(self, name: str, config_hash: str) -> str:
        """The folder of the finished job with that configuration: `name`, unless it was set aside since."""
        before = read_results(self.directory / name).jobs if (self.directory / name / "result.json").is_file() else []
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
    """The MLflow run of this process's sweep, for jobs that do their own tracking.

    `start_run` is the shorter way.

    >>> parent_run_id() is None
    True
    """
    sweep = current_sweep()
    return sweep.parent_run_id if sweep is not None else None


def set_aside(folder: Path, job: JobResult) -> Path:
    """Move what another job has left in `folder` beside it, where it still counts; Hydra's own files stay.

    A sweep that was extended numbers its jobs anew, and what was done must not be written over.
    """
    known = re.fullmatch("[0-9a-f]{8,64}", job.config_hash or "")  # anything else would name another folder
    mark = known[0] if known else hashlib.sha256((folder / "result.json").read_bytes()).hexdigest()
    beside, count = folder.with_name(f"{folder.name}-{mark[:8]}"), 1
    while beside.exists():
        if job.status == read_object(beside / "result.json").get("status") == "finished":
            shutil.rmtree(beside)  # the same configuration, done twice
        else:
            count += 1
            beside = folder.with_name(f"{folder.name}-{mark[:8]}-{count}")
    beside.mkdir()
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "result.json"):  # what makes it count, last
        if path.name != ".hydra" and path.suffix != ".log":
            os.replace(path, beside / path.name)
    if read_object(beside / "result.json").get("config_hash") != job.config_hash:  # its own record was lost
        write_json(beside / "result.json", dict(job.result))
    return beside


def fetch(job: JobResult, folder: Path) -> None:
    """Move what a job has left to `folder`, where it goes on; Hydra's own files stay."""
    for path in sorted(job.folder.iterdir(), key=lambda path: path.name == "result.json"):
        if path.name != ".hydra" and path.suffix != ".log":
            if (folder / path.name).is_dir():
                put_aside(folder / path.name, "earlier")
            os.replace(path, folder / path.name)
    with suppress(OSError):  # other jobs' folders have Hydra's files
        job.folder.rmdir()


# --- resuming ----------------------------------------------------------------------------------------------


def without_sweep_settings(overrides: Iterable[str]) -> list[str]:
    """Overrides but for those that only say how to go about the sweep.

    >>> without_sweep_settings(["pruner=abs", "sweep.resume=true", "sweep.check=false", "+sweep.lr=1"])
    ['pruner=abs', '+sweep.lr=1']
    """
    return [override for override in as_given(overrides) if not re.match(r"\+*sweep\.(resume|check)=", override)]


def command_identity(config: DictConfig) -> str:
    """The same for the same command: application, configuration and overrides in any order, `sweep.resume` apart."""
    params = OmegaConf.to_container(config.hydra.sweeper.get("params") or OmegaConf.create({}))
    what = [
        str(config.hydra.job.name),
        str(config.hydra.job.config_name),
        sorted(recorded_overrides(without_sweep_settings(config.hydra.overrides.task))),  # a hash can be guessed
        cleaned(params),
    ]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def find_begun(config: DictConfig, identity: str) -> Path | None:
    """The newest sweep of the same command where this configuration would put one, with any time in the path."""
    sweep = OmegaConf.to_container(config.hydra.sweep, resolve=False)
    assert isinstance(sweep, dict)
    sweeps = [Sweep(Path(path).parent) for path in glob.glob(f"{_as_glob(str(sweep['dir']))}/{SWEEP}")]
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
