"""The output directory of a run: its lock, and the results of earlier runs, which are not computed again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from gsprune.app.configuration import check_objective
from gsprune.files.disk import read_object, refusing, remove_leftovers, spared, write_json
from gsprune.files.layout import RESULT, TRACKING
from gsprune.files.locks import Lock
from gsprune.settings.identity import config_hash, differences, settings
from gsprune.sweeps.results import JobResult, read_results
from gsprune.sweeps.sweep_dir import Sweep, fetch, set_aside
from gsprune.text.display import logger, one_line
from gsprune.text.redact import redacted_data
from gsprune.training.checkpoints import MAX_RECORD, RECORD, Checkpoints

SETTINGS = Path("checkpoint", "settings.json")  # of the run in the directory, to name the differences to another
LOCK = "run.lock"  # held by the process that writes in the directory
LEAVING = 10.0  # seconds that data workers of a killed process may still hold the lock
log = logger(__name__)


@contextlib.contextmanager
def locked(folder: Path, *, seconds: float | None = None) -> Iterator[None]:
    """Keep every other run out of the output directory.

    Args:
        seconds: to wait for another run to leave; `LEAVING` unless told.

    Raises:
        ValueError: another run works there; its files stay as they are.
    """
    lock = Lock(folder / LOCK)
    if not lock.acquire(seconds=LEAVING if seconds is None else seconds):
        raise ValueError(f"{folder} is in use by another run: wait for its end, or give another hydra.run.dir")
    try:
        yield
    finally:
        lock.release()


def remove_temporary(folder: Path) -> None:
    """Remove temporary files of processes that were killed while they wrote a run's files."""
    for place in (".", "checkpoint", "checkpoint/cut", "masks", "figures", "figures/masks"):
        remove_leftovers(folder / place)


def finished_here(cfg: DictConfig, folder: Path) -> dict[str, Any] | None:
    """The result in a folder where this job has finished.

    Raises:
        ValueError: the result is of another configuration, and must not be lost by mistake.
    """
    _check_readable(folder / RESULT)
    result = read_object(folder / RESULT)
    ended = result.get("status") == "finished" and read_object(folder / TRACKING).get("status") != "RUNNING"
    mine = _hash(cfg) if ended and cfg.trainer.get("resume") == "auto" else None
    if mine is None:
        return None
    if result.get("config_hash") != mine:
        raise ValueError(other_configuration(folder, cfg, unfinished=False))
    check_objective(cfg.objective, cfg.trainer)
    log.info("not run again: %s has finished with the same configuration (trainer.resume=never runs it again)", folder)
    _remove_temporary_if_free(folder)
    return result


def finished_in_sweep(cfg: DictConfig, folder: Path, sweep: Sweep) -> dict[str, Any] | None:
    """The result of an equal job of this sweep; if there is none, the folder is prepared for the job.

    Files of other jobs in the folder are set aside, and the checkpoint of an equal job that was interrupted in another
    folder is moved here.

    Raises:
        ValueError: the result in the folder cannot be read just now.
    """
    _check_readable(folder / RESULT)
    mine = _hash(cfg)
    here = read_results(folder).jobs if (folder / RESULT).is_file() else []
    job = next((job for job in here if mine and job.config_hash == mine and job.status == "finished"), None)
    job = job or (sweep.finished(mine) if mine else None)
    if job is not None:
        check_objective(cfg.objective, cfg.trainer)  # no part of the hash: an equal job may have had a right one
    owner = _owner(folder)
    if job is None or job.folder != folder:
        others = [other for other in here if other.status == "finished"]
        if not others and mine and owner not in (mine, None):  # the result may be of yet another job, or missing
            others = [JobResult(folder, {"status": "interrupted", "config_hash": owner}, sweep.directory)]
        for other in others:
            log.info("the files of another job in %s are moved to %s", folder, set_aside(folder, other))
    if job is None:
        if mine and owner != mine and not any(other.config_hash == mine for other in here):
            _fetch_unfinished(mine, folder, sweep)
        return None
    log.info("not run again: %s has finished with the same configuration", job.folder)
    _remove_temporary_if_free(job.folder)
    if job.folder != folder:
        note = {"status": "skipped", "same_as": sweep.name_of(job.folder), "config_hash": mine}
        with spared(RESULT, []):
            write_json(folder / RESULT, note)
    return dict(job.result)


def resume_hint(cfg: DictConfig, folder: Path, sweep: Sweep | None) -> str:
    """How to resume a run that has ended early."""
    more = "sweep.resume=true" if sweep else f"hydra.run.dir={folder}"
    less = " and without trainer.resume=never" if cfg.trainer.get("resume") == "never" else ""
    with contextlib.suppress(OSError):
        if Checkpoints(folder / "checkpoint").paths():
            return f"the same command with {more}{less} resumes from the newest checkpoint"
        return f"the same command with {more} starts anew: there is no checkpoint yet"
    return f"the same command with {more}{less} resumes once {folder / 'checkpoint'} can be read"


def readable_settings(cfg: DictConfig) -> dict[str, str]:
    """A job's settings as `SETTINGS` holds them, without secrets."""
    record: dict[str, str] = redacted_data(settings(cfg))
    return record


def other_configuration(folder: Path, cfg: DictConfig, *, unfinished: bool) -> str:
    """Why a run is refused in the directory of a run of another configuration, with the settings that differ."""
    before = read_object(folder / SETTINGS)
    told = one_line(differences(before, readable_settings(cfg))) or "of a value that is taken from elsewhere"
    told = told if before else "which settings differ is not on record"
    what, then = ("an unfinished", "give the same one to resume it, ") if unfinished else ("a finished", "give ")
    return (
        f"{folder} holds {what} run of another configuration ({told}): {then}trainer.resume=never to write "
        f"over it, or another hydra.run.dir"
    )


def _hash(cfg: DictConfig) -> str | None:
    """None where the configuration has a mistake, which the job itself reports."""
    with contextlib.suppress(ValueError):
        return config_hash(cfg)
    return None


@refusing()
def _check_readable(path: Path) -> None:
    """Refuse to continue where the disk does not answer: the result there may be a good one."""
    if path.is_file():
        path.read_bytes()


@refusing()
def _owner(folder: Path) -> str | None:
    """The configuration of the newest checkpoint in a folder, as far as its record tells; None if there is none."""
    for path in Checkpoints(folder / "checkpoint").paths()[-1:]:
        state = read_object(path / RECORD, most=MAX_RECORD).get("state")
        owner = state.get("config_hash") if isinstance(state, dict) else None
        return owner if isinstance(owner, str) else None
    return None


def _remove_temporary_if_free(folder: Path) -> None:
    """A run may have been killed after it wrote its result; or it ends at this moment."""
    with contextlib.suppress(ValueError), locked(folder, seconds=0):
        remove_temporary(folder)


def _fetch_unfinished(mine: str, folder: Path, sweep: Sweep) -> None:
    """Move the checkpoint of an equal job that was interrupted in another folder, if no run works there."""
    job = sweep.unfinished(mine)
    lock = sweep.lock(f"job {job.name}") if job else None
    if job is None or lock is None or not lock.acquire():
        return
    try:
        if read_object(job.folder / RESULT).get("config_hash") == mine:
            fetch(job, folder)
            log.info("the unfinished run of %s resumes in %s", job.folder, folder)
    finally:
        lock.release()
