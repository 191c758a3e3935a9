"""What earlier runs have left in an output directory, and elsewhere in a sweep: what is not done again, what goes on.

One run at a time works in a directory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from gsprune.app.composed import check_objective
from gsprune.files.disk import read_object, refusing, remove_leftovers, spared, write_json
from gsprune.files.layout import TRACKING as RECORD
from gsprune.files.locks import Lock
from gsprune.settings.identity import config_hash, differences, settings
from gsprune.sweeps.record import Sweep, fetch, set_aside
from gsprune.sweeps.results import JobResult, read_results
from gsprune.text.display import logger, one_line
from gsprune.text.redact import cleaned
from gsprune.training.checkpoints import MAX_RECORD, Checkpoints
from gsprune.training.checkpoints import RECORD as STATE

SETTINGS = Path("checkpoint", "settings.json")  # of the run in the output directory, to tell what is not the same
LOCK = "run.lock"  # in the output directory, held by the process that writes there
LEAVING = 10.0  # seconds that what a killed process has left behind (workers that load data) may still hold it
log = logger(__name__)


@contextlib.contextmanager
def alone(folder: Path, *, seconds: float | None = None) -> Iterator[None]:
    """Keep every other run out of the output directory.

    Args:
        seconds: to wait for another one to leave; `LEAVING` unless told.

    Raises:
        ValueError: one is going on there, whose files stay as they are.
    """
    lock = Lock(folder / LOCK)
    if not lock.acquire(seconds=LEAVING if seconds is None else seconds):
        raise ValueError(f"{folder} is in use by another run: wait for its end, or give another hydra.run.dir")
    try:
        yield
    finally:
        lock.release()


def tidy(folder: Path) -> None:
    """Remove what processes that were killed while they wrote a run's files have left of them."""
    for place in (".", "checkpoint", "masks", "figures", "figures/masks"):
        remove_leftovers(folder / place)


def finished_here(cfg: DictConfig, folder: Path) -> dict[str, Any] | None:
    """The result in a folder where this job has finished.

    Raises:
        ValueError: that of another configuration is there, which must not be lost by mistake.
    """
    _check_readable(folder / "result.json")
    result = read_object(folder / "result.json")
    ended = result.get("status") == "finished" and read_object(folder / RECORD).get("status") != "RUNNING"
    if not ended or cfg.trainer.get("resume") != "auto":
        return None
    try:
        mine = config_hash(cfg)
    except ValueError:  # the job itself will say what is wrong
        return None
    if result.get("config_hash") != mine:
        raise ValueError(of_another(folder, cfg, unfinished=False))
    check_objective(cfg.objective, cfg.trainer)
    log.info("not done again: %s has finished with the same configuration (trainer.resume=never does it again)", folder)
    _tidy_if_free(folder)
    return result


@refusing()
def _check_readable(path: Path) -> None:
    """Refuse to go on where the disk does not answer: the record of what is done there may be a good one."""
    if path.is_file():
        path.read_bytes()


@refusing()
def _owner(folder: Path) -> str | None:
    """The configuration of the newest checkpoint in a folder, as far as its record tells; None if there is none."""
    for path in Checkpoints(folder / "checkpoint").paths()[-1:]:
        state = read_object(path / STATE, most=MAX_RECORD).get("state")
        owner = state.get("config_hash") if isinstance(state, dict) else None
        return owner if isinstance(owner, str) else None
    return None


def finished_before(cfg: DictConfig, folder: Path, sweep: Sweep) -> dict[str, Any] | None:
    """The result of an equal job of this sweep; if there is none, the folder is made ready for the one to come.

    What other jobs have done there is set aside, and what this one has left unfinished in another folder is fetched.

    Raises:
        ValueError: what is there cannot be read just now.
    """
    _check_readable(folder / "result.json")
    try:
        mine = config_hash(cfg)
    except ValueError:  # the job itself will say what is wrong
        mine = None
    here = read_results(folder).jobs if (folder / "result.json").is_file() else []
    job = next((job for job in here if mine and job.config_hash == mine and job.status == "finished"), None)
    job = job or (sweep.finished(mine) if mine else None)
    if job is not None:
        check_objective(cfg.objective, cfg.trainer)  # it is no part of the hash: an equal job may have had a right one
    owner = _owner(folder)
    if job is None or job.folder != folder:
        others = [other for other in here if other.status == "finished"]
        if not others and mine and owner not in (mine, None):  # its result may be of yet another one, or missing
            others = [JobResult(folder, {"status": "interrupted", "config_hash": owner}, sweep.directory)]
        for other in others:
            log.info("what another job has left in %s is kept in %s", folder, set_aside(folder, other))
    if job is None:
        if mine and owner != mine and not any(other.config_hash == mine for other in here):
            _fetch_unfinished(mine, folder, sweep)
        return None
    log.info("not done again: %s has finished with the same configuration", job.folder)
    _tidy_if_free(job.folder)
    if job.folder != folder:
        same_as = sweep.name_of(job.folder)
        with spared("result.json", []):
            write_json(folder / "result.json", {"status": "skipped", "same_as": same_as, "config_hash": mine})
    return dict(job.result)


def _tidy_if_free(folder: Path) -> None:
    """A run may have been killed at its very end, when its result was there; or it is at that end just now."""
    with contextlib.suppress(ValueError), alone(folder, seconds=0):
        tidy(folder)


def _fetch_unfinished(mine: str, folder: Path, sweep: Sweep) -> None:
    """Fetch the checkpoint of an equal job that was interrupted in another folder, if nobody works there."""
    job = sweep.unfinished(mine)
    lock = sweep.lock(f"job {job.name}") if job else None
    if job is None or lock is None or not lock.acquire():
        return
    try:
        if read_object(job.folder / "result.json").get("config_hash") == mine:
            fetch(job, folder)
            log.info("what was left unfinished in %s goes on in %s", job.folder, folder)
    finally:
        lock.release()


def how_to_go_on(cfg: DictConfig, folder: Path, sweep: Sweep | None) -> str:
    """What to do with a run that has ended before its time."""
    more = "sweep.resume=true" if sweep else f"hydra.run.dir={folder}"
    less = " and without trainer.resume=never" if cfg.trainer.get("resume") == "never" else ""
    with contextlib.suppress(OSError):
        if Checkpoints(folder / "checkpoint").paths():
            return f"the same command with {more}{less} goes on from the newest checkpoint"
        return f"the same command with {more} starts anew: there is no checkpoint yet"
    return f"the same command with {more}{less} goes on once {folder / 'checkpoint'} can be read"


def on_record(cfg: DictConfig) -> dict[str, str]:
    """A job's settings as they are put into a file, and compared with those in one."""
    record: dict[str, str] = cleaned(settings(cfg))
    return record


def of_another(folder: Path, cfg: DictConfig, *, unfinished: bool) -> str:
    """Why a run is refused in a directory that holds one of another configuration, with what is not the same."""
    before = read_object(folder / SETTINGS)
    told = one_line(differences(before, on_record(cfg))) or "of a value that is taken from elsewhere"
    told = told if before else "which settings differ is not on record"
    what, then = ("an unfinished", "give the same one to go on with it, ") if unfinished else ("a finished", "give ")
    return (
        f"{folder} holds {what} run of another configuration ({told}): {then}trainer.resume=never to write "
        f"over it, or another hydra.run.dir"
    )
