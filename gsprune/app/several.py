"""A job in several processes: started from here, each with what Hydra has set up, or by torchrun.

What the processes do is the job's own; what they tell each other is in `distributed.py`, how they are started in
`launcher.py`.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log, setup_globals
from omegaconf import DictConfig, OmegaConf

from gsprune import collectives
from gsprune.app import launcher
from gsprune.app.composed import build
from gsprune.app.console import warn_on_one_line
from gsprune.app.earlier import alone, how_to_go_on
from gsprune.files.disk import read_object, write_json
from gsprune.files.layout import TRACKING as RECORD
from gsprune.settings.identity import config_hash
from gsprune.sweeps.record import Sweep, last_line
from gsprune.text.display import logger
from gsprune.tracking.tracker import Tracker
from gsprune.training.trainer import Trainer

log = logger(__name__)
Work = Callable[[DictConfig, Path, "Sweep | None"], dict[str, Any]]  # configuration, output directory


def run_in_several(work: Work, cfg: DictConfig, folder: Path, sweep: Sweep | None) -> dict[str, Any]:
    """What `work` returns in the first of several new processes, which writes and reports."""
    trainer: Trainer = build(cfg.trainer)  # a mistake there ends here, before anything is started
    if trainer.nodes > 1 and sweep is not None:
        raise ValueError(
            f"trainer.nodes={trainer.nodes} is not allowed in a sweep, which one machine runs: it must be 1"
        )
    processes = launcher.Processes(
        trainer.devices, trainer.nodes, trainer.rendezvous, trainer.timeout_minutes, name=config_hash(cfg)[:16]
    )
    hydra = HydraConfig.instance().cfg if HydraConfig.initialized() else None
    kind = trainer.torch_device.type
    with alone(folder):
        pass  # from here on that is the first process's
    try:
        return launcher.launch(processes, kind, _run_as_one_of_several, work, cfg, folder, sweep, hydra)
    except (launcher.ProcessFailed, ValueError) as error:
        with contextlib.suppress(ValueError), alone(folder):  # unless another run has come first
            if read_object(folder / "result.json").get("status") == "running":  # the first process could say nothing
                log.warning("%s", how_to_go_on(cfg, folder, sweep))
            _note_failure(cfg, folder, error)
        raise


def _run_as_one_of_several(
    work: Work, cfg: DictConfig, folder: Path, sweep: Sweep | None, hydra: DictConfig | None
) -> dict[str, Any]:
    """One process's part. What Hydra and `train.py` have set up in the process that started it is set up here, too."""
    quiet = collectives.rank() != 0
    if hydra is not None:
        setup_globals()
        HydraConfig.instance().set_config(hydra)
        if not quiet:
            configure_log(hydra.hydra.job_logging, hydra.hydra.verbose)
    _speak_once(quiet=quiet)
    return work(cfg, folder, sweep)


def as_torchrun_has_it(cfg: DictConfig, sweep: Sweep | None) -> DictConfig:
    """The configuration with the number of processes that torchrun has started, of which the first one speaks.

    Raises:
        ValueError: they cannot do this job.
    """
    if sweep is not None:
        raise ValueError("torchrun cannot run a sweep: python train.py --multirun trainer.devices=<number> can")
    if "${now:" in _run_dir():
        raise ValueError(
            "torchrun starts every process at another moment, so they need a directory without the time in its name: "
            "hydra.run.dir=<directory>"
        )
    _speak_once(quiet=os.environ["RANK"] != "0")
    cfg = copy.deepcopy(cfg)
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in os.environ else int(os.environ["WORLD_SIZE"])
    there = int(os.environ["WORLD_SIZE"]) // here
    if (cfg.trainer.devices, cfg.trainer.nodes) not in ((1, 1), (here, there)):
        raise ValueError(
            f"trainer.devices={cfg.trainer.devices} is not allowed: torchrun has started {here} on each of {there} "
            f"machines, so leave it out"
        )
    cfg.trainer.devices, cfg.trainer.nodes = here, there
    cfg.trainer.rendezvous = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return cfg


def run_under_torchrun(work: Work, cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """This process's part of a job that torchrun has started several processes for."""
    trainer: Trainer = build(cfg.trainer)
    with launcher.taking_part(trainer.torch_device.type, timeout_minutes=trainer.timeout_minutes):
        return work(cfg, folder, None)


def _run_dir() -> str:
    """`hydra.run.dir` as it was written, with the resolvers in it; empty outside Hydra."""
    if not HydraConfig.initialized():
        return ""
    written: Any = OmegaConf.to_container(HydraConfig.instance().cfg, resolve=False)
    return str(written["hydra"]["run"]["dir"])


def _speak_once(*, quiet: bool) -> None:
    """Of several processes one says what all of them would say."""
    if quiet:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    else:
        warnings.showwarning = warn_on_one_line


def _note_failure(cfg: DictConfig, folder: Path, error: Exception) -> None:
    """What ended the job, in place of what the first process knew of it (if it had time to write anything)."""
    path = folder / "result.json"
    result = read_object(path)
    with contextlib.suppress(OSError):
        if result.get("status") != "finished":
            write_json(path, {**result, "status": "failed", "error": last_line(error)})
    if isinstance(run_id := read_object(folder / RECORD).get("run_id"), str):
        tracker: Tracker = build(cfg.tracking, output_dir=str(folder), run_id=run_id)
        tracker.close_killed()
