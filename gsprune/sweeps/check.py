"""Composes and checks every job of a sweep before the first one runs.

The starting process composes each job's configuration as Hydra's own sweeper does, and passes it to a check of the
application.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from gsprune.settings.hydra_files import sweep_overrides
from gsprune.settings.refusals import explained, first_values, sentence
from gsprune.text.display import logger

__all__ = ["Checked", "check_jobs"]

Check = Callable[..., None]  # (configuration of a job, here=whether it will run on this machine)
BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
HERE = ("BasicLauncher", "JoblibLauncher", "LocalLauncher")  # start their jobs on this machine
log = logger(__name__)


@dataclass
class Checked:
    """The jobs of a sweep before they run.

    Attributes:
        jobs: the overrides of each job; None if a search chooses them one by one.
        refused: number of a job -> why it cannot run.
    """

    jobs: list[list[str]] | None
    refused: dict[int, str] = field(default_factory=dict)


def check_jobs(config: DictConfig, check: Check | None) -> Checked:
    """Compose every job of the sweep that `config` describes, and call `check` on each.

    Jobs that differ only in a whole number as their seed count as one. The jobs of a search are not known: the first
    value of each range is checked, and a mistake is a warning, as another value may be right.
    """
    loader = GlobalHydra.instance().config_loader()
    overrides = _overrides(config, loader)
    listed = _listed(config, overrides)
    checked, known = Checked(listed), dict[tuple[str, ...], str | None]()
    here = str(config.hydra.launcher.get("_target_")).rpartition(".")[2] in HERE
    for number, job in enumerate(listed if listed is not None else [first_values(overrides)]):
        same = tuple(text for text in job if not re.fullmatch(r"\+*seed=-?\d+", text))
        if same not in known:
            known[same] = _refusal(config, loader, job, number, check, here)
        if (why := known[same]) is not None and listed is not None:
            checked.refused[number] = why
        elif why is not None:
            log.warning("the search may hold jobs that cannot run: %s: %s", " ".join(job), why)
    return checked


def _overrides(config: DictConfig, loader: ConfigLoader) -> list[Override]:
    """The overrides as Hydra's sweeper parses them."""
    return OverridesParser.create(config_loader=loader).parse_overrides(sweep_overrides(config, resolve=True))


def _listed(config: DictConfig, overrides: list[Override]) -> list[list[str]] | None:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    if config.hydra.sweeper.get("_target_") != BASIC:
        return None
    (jobs,) = BasicSweeper.split_arguments(overrides, None)
    return jobs


def _refusal(
    config: DictConfig, loader: ConfigLoader, overrides: list[str], number: int, check: Check | None, here: bool
) -> str | None:
    try:
        job = loader.load_sweep_config(config, list(overrides))
        with open_dict(job):
            job.hydra.job.id, job.hydra.job.num = str(number), number
        if check is not None:
            with _as_in_a_job(job) as own:
                check(own, here=here)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        told = explained(error, overrides, loader) if isinstance(error, HydraException) else None
        return told or sentence(error)
    except Exception as error:  # unknown to the check: the job itself reports it
        log.debug("job %d could not be checked", number, exc_info=error)
    return None


@contextmanager
def _as_in_a_job(job: DictConfig) -> Iterator[DictConfig]:
    """Set up what Hydra sets up around a job, but for the output directory; hide logs and warnings meanwhile."""
    before, disabled = HydraConfig.instance().cfg, logging.root.manager.disable
    own = copy.deepcopy(job)
    with read_write(own), open_dict(own):
        del own["hydra"]
    with read_write(job.hydra.runtime), open_dict(job.hydra.runtime):
        job.hydra.runtime.output_dir = f"{job.hydra.sweep.dir}/{job.hydra.sweep.subdir}"
    HydraConfig.instance().set_config(job)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield own
    finally:
        logging.disable(disabled)
        HydraConfig.instance().cfg = before
