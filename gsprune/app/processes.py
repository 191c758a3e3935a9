"""A job in several processes: started from here, each with what Hydra has set up, or by torchrun.

`training/launcher.py` starts processes, `collectives.py` has what they tell each other.
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
from gsprune.app.configuration import build
from gsprune.app.console import warn_on_one_line
from gsprune.app.output_dir import locked, resume_hint
from gsprune.files.disk import read_object, write_json
from gsprune.files.layout import RESULT, TRACKING
from gsprune.settings.identity import config_hash
from gsprune.sweeps.sweep_dir import Sweep
from gsprune.text.display import logger
from gsprune.text.redact import last_line
from gsprune.tracking.tracker import Tracker
from gsprune.training import launcher
from gsprune.training.trainer import Trainer

log = logger(__name__)
Work = Callable[[DictConfig, Path, "Sweep | None"], dict[str, Any]]  # configuration, output directory


def run_in_processes(work: Work, cfg: DictConfig, folder: Path, sweep: Sweep | None) -> dict[str, Any]:
    """What `work` returns in the first of several new processes, which writes and reports."""
    trainer: Trainer = build(cfg.trainer)  # a mistake there ends here, before any process starts
    if trainer.nodes > 1 and sweep is not None:
        raise ValueError(
            f"trainer.nodes={trainer.nodes} is not allowed in a sweep, which one machine runs: it must be 1"
        )
    processes = launcher.Processes(
        trainer.devices, trainer.nodes, trainer.rendezvous, trainer.timeout_minutes, name=config_hash(cfg)[:16]
    )
    hydra = HydraConfig.instance().cfg if HydraConfig.initialized() else None
    kind = trainer.torch_device.type
    with locked(folder):
        pass  # from here on the first process holds it
    try:
        return launcher.launch(processes, kind, _run_as_one_of_several, work, cfg, folder, sweep, hydra)
    except (launcher.ProcessFailed, ValueError) as error:
        with contextlib.suppress(ValueError), locked(folder):  # unless another run has started there
            if read_object(folder / RESULT).get("status") == "running":  # the first process was killed
                log.warning("%s", resume_hint(cfg, folder, sweep))
            _record_failure(cfg, folder, error)
        raise


def run_under_torchrun(work: Work, cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """This process's part of a job that torchrun has started several processes for."""
    trainer: Trainer = build(cfg.trainer)
    with launcher.taking_part(trainer.torch_device.type, timeout_minutes=trainer.timeout_minutes):
        return work(cfg, folder, None)


def for_torchrun(cfg: DictConfig, sweep: Sweep | None) -> DictConfig:
    """The configuration with the number of processes that torchrun has started, of which the first one prints.

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
    _print_once(quiet=os.environ["RANK"] != "0")
    cfg = copy.deepcopy(cfg)
    total = int(os.environ["WORLD_SIZE"])
    here = int(os.environ.get("LOCAL_WORLD_SIZE", total))
    if (cfg.trainer.devices, cfg.trainer.nodes) not in ((1, 1), (here, total // here)):
        raise ValueError(
            f"trainer.devices={cfg.trainer.devices} is not allowed: torchrun has started {here} on each of "
            f"{total // here} machines, so leave it out"
        )
    cfg.trainer.devices, cfg.trainer.nodes = here, total // here
    cfg.trainer.rendezvous = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return cfg


def _run_as_one_of_several(
    work: Work, cfg: DictConfig, folder: Path, sweep: Sweep | None, hydra: DictConfig | None
) -> dict[str, Any]:
    """One process's part, after the setup that Hydra and `train.py` have done in the process that started it."""
    quiet = collectives.rank() != 0
    if hydra is not None:
        setup_globals()
        HydraConfig.instance().set_config(hydra)
        if not quiet:
            configure_log(hydra.hydra.job_logging, hydra.hydra.verbose)
    _print_once(quiet=quiet)
    return work(cfg, folder, sweep)


def _run_dir() -> str:
    """`hydra.run.dir` as it was written, with the resolvers in it; empty outside Hydra."""
    if not HydraConfig.initialized():
        return ""
    written: Any = OmegaConf.to_container(HydraConfig.instance().cfg, resolve=False)
    return str(written["hydra"]["run"]["dir"])


def _print_once(*, quiet: bool) -> None:
    """One process prints what all of them would print."""
    if quiet:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    else:
        warnings.showwarning = warn_on_one_line


def _record_failure(cfg: DictConfig, folder: Path, error: Exception) -> None:
    """Write what ended the job, in place of what the first process has written, if anything."""
    result = read_object(folder / RESULT)
    with contextlib.suppress(OSError):
        if result.get("status") != "finished":
            write_json(folder / RESULT, {**result, "status": "failed", "error": last_line(error)})
    if isinstance(run_id := read_object(folder / TRACKING).get("run_id"), str):
        tracker: Tracker = build(cfg.tracking, output_dir=str(folder), run_id=run_id)
        tracker.close_killed()
