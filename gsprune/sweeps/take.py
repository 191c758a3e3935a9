"""Takes a network out of a sweep: the one that its report says to take, or that of a job by name.

    gsprune take multirun/<date>/<time>                      # into taken/<date>_<time>
    gsprune take multirun/<date>/<time> --register digits    # and as a version of a registered model in MLflow, which
                                                             # has the alias "champion" if the report says to take it

What is taken is a folder that `gsprune.load_pruned` reads, with `origin.json` beside the network: where it comes from,
why it was taken, and the sums of its files.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gsprune.files.disk import folder_aside, read_object, sha256, write_json
from gsprune.files.layout import CONFIG, PROGRAM, RESULT, TRACKING
from gsprune.sweeps.report import SweepJobs, add_terms, terms_of
from gsprune.sweeps.results import JobResult
from gsprune.sweeps.sweep_dir import Sweep
from gsprune.text.redact import say

__all__ = ["main", "take"]

NETWORK = ("model.safetensors", "pruning.json")  # what `load_pruned` reads
ALSO = (PROGRAM, "masks.safetensors", RESULT, CONFIG)
ORIGIN = "origin.json"
CHAMPION = "champion"  # alias of the version that a report says to take


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gsprune take",
        description="Copy the network that a sweep's report says to take, with its cut plan, masks and origin.",
    )
    parser.add_argument("directory", help="the directory of the sweep, such as multirun/2026-01-31/12-00-00")
    parser.add_argument("--to", metavar="FOLDER", help="where to (default: taken/ and the name of the sweep)")
    parser.add_argument("--job", metavar="NAME", help="take the network of this job, such as 3, whatever the verdict")
    parser.add_argument("--register", metavar="MODEL", help="register it in MLflow too, as a version of this model")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow's tracking URI (default: that of the job)")
    add_terms(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `gsprune take`: 0 when a network was taken, else 1."""
    given = make_parser().parse_args(arguments)
    try:
        sweep = SweepJobs.read(Path(given.directory), terms_of(given))
        job, why, is_choice = _chosen(sweep, given.job)
        folder = take(sweep.directory, job, _target(sweep.directory, given.to), why)
        say(f"{why}.")
        say(f"Took {job.folder} to {folder}")
        importing, dense = _dense(folder / CONFIG)
        say(f"Load it: {importing}gsprune.load_pruned({str(folder)!r}, {dense})")
        if given.register:
            settings = {"tracking_uri": given.tracking_uri, "alias": CHAMPION if is_choice else None}
            say(f"Registered: {register(job, folder, given.register, **settings)}")
    except (ValueError, OSError) as error:
        say(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def take(sweep: Path, job: JobResult, folder: Path, why: str) -> Path:
    """Copy the network of a job into a new folder, whole or not at all.

    Args:
        why: it is taken; a sentence for `origin.json`.

    Raises:
        ValueError: the folder exists, or the job's network is missing or not the one that it has written.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists: give another folder with --to, or remove it")
    missing = [name for name in NETWORK if not (job.folder / name).is_file()]
    if missing:
        raise ValueError(f"{job.folder} has no {' and no '.join(missing)}: its network was removed, or not written")
    noted = read_object(job.folder / "pruning.json").get("sha256")
    if noted is not None and noted != sha256(job.folder / NETWORK[0]):
        raise ValueError(f"{job.folder / NETWORK[0]} was changed after it was saved")
    with folder_aside(folder) as inside:
        for name in (*NETWORK, *ALSO):
            if (job.folder / name).is_file():
                shutil.copyfile(job.folder / name, inside / name)
        write_json(inside / ORIGIN, _origin(sweep, job, why, inside))
    return folder


def register(
    job: JobResult, folder: Path, name: str, *, tracking_uri: str | None = None, alias: str | None = None
) -> str:
    """Register what was taken as a version of a model in the job's MLflow store; what to say of it.

    Args:
        tracking_uri: of the store; None: as the job's record says.
        alias: of the model, which the version gets.

    Raises:
        ValueError: the job has no run in MLflow, or MLflow cannot be reached, or refuses.
    """
    from gsprune.tracking.mlflow_client import register_model
    from gsprune.tracking.sync import recorded_address

    note = read_object(job.folder / TRACKING)
    if not isinstance(run_id := note.get("run_id"), str):
        raise ValueError(f"{job.folder} has no run in MLflow, which a registered model comes from")
    return register_model(recorded_address(job.folder, note, tracking_uri), run_id, folder, name, alias=alias)


def _chosen(sweep: SweepJobs, name: str | None) -> tuple[JobResult, str, bool]:
    """The job whose network to take, why, and whether it is the report's choice.

    Raises:
        ValueError: there is no such job, or the sweep has no verdict, or several.
    """
    if name is not None:
        found = next((job for job in sweep.usable if job.name == name), None)
        if found is None:
            known = ", ".join(job.name for job in sweep.usable[:20])
            raise ValueError(f"--job {name} is no finished job of {sweep.directory}: there are {known or 'none'}")
        own = next((verdict for verdict in sweep.verdicts if verdict.job == found), None)
        why = str(own) if own else f"Job {found.name} was asked for by name; the sweep's verdict is another"
        return found, why, own is not None
    takes = [(verdict, job) for verdict in sweep.verdicts if (job := verdict.job) is not None]
    if not takes:
        raise ValueError("; ".join(str(verdict) for verdict in sweep.verdicts))
    if len(sweep.verdicts) > 1:
        some = ", ".join(f"--job {job.name} ({verdict.about})" for verdict, job in takes)
        raise ValueError(f"{sweep.directory} has several models or data sets, with a verdict each: choose {some}")
    ((verdict, job),) = takes
    return job, str(verdict), True


def _dense(config: Path) -> tuple[str, str]:
    """What to import, and the call that makes the network which a job's settings describe; without them, a word for it.

    Weights that it began with are of no use to what is loaded into it.
    """
    found = OmegaConf.select(OmegaConf.load(config), "model") if config.is_file() else None
    found = OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
    model = {str(key): value for key, value in found.items() if key != "weights"} if isinstance(found, dict) else {}
    module, _, name = str(model.pop("_target_", "")).rpartition(".")
    plain = all(value is None or isinstance(value, (bool, int, float, str)) for value in model.values())
    if not module or not plain or any(not key.isidentifier() or key.startswith("_") for key in model):
        return "", "dense_network"
    return f"from {module} import {name}; ", f"{name}({', '.join(f'{key}={value!r}' for key, value in model.items())})"


def _target(sweep: Path, given: str | None) -> Path:
    """
    >>> _target(Path("/data/multirun/2026-01-31/12-00-00"), None)
    PosixPath('taken/2026-01-31_12-00-00')
    """
    return Path(given) if given else Path("taken", "_".join(sweep.resolve().parts[-2:]).strip("/"))


def _origin(sweep: Path, job: JobResult, why: str, folder: Path) -> dict[str, Any]:
    note = read_object(job.folder / TRACKING)
    return {
        "taken": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "why": why,
        "sweep": str(sweep.resolve()),
        "command": Sweep(sweep).text("command"),
        "job": job.name,
        "overrides": [f"{key}={value}" for key, value in job.overrides.items()],
        "config_hash": job.config_hash,
        "mlflow": {key: note.get(key) for key in ("tracking_uri", "experiment", "experiment_id", "run_id")},
        "sha256": {path.name: sha256(path) for path in sorted(folder.iterdir())},
    }
