"""Train a network, prune it, measure both. `python train.py --help` lists the groups.

Hydra's entry point: it composes, runs one job and returns what a sweeper optimises. torch is imported when a job runs,
so that `--help` and shell completion are quick.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException

from gsprune.conf import help_text
from gsprune.extras import check_command
from gsprune.moved import check_overrides
from gsprune.settings.instantiation import main_arguments
from gsprune.settings.recorded import hide
from gsprune.settings.refusals import run_command
from gsprune.text.redact import RedactedStream

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONF = Path(__file__).parent / "conf"


@hydra.main(config_path="conf", config_name="config", **main_arguments(CONF))
def main(cfg: DictConfig) -> float | tuple[float, ...] | None:
    """Run one job; returns what a sweeper optimises. With `plan=true` it only prints what it would prune."""
    from gsprune.app.configuration import check_plan, objective
    from gsprune.app.console import warn_on_one_line
    from gsprune.app.job import run, show_plan
    from gsprune.text.display import one_line
    from gsprune.training.launcher import ProcessFailed

    warnings.showwarning = warn_on_one_line
    logging.raiseExceptions = False  # a full disk takes the log file; the screen still has every line, once
    folder = HydraConfig.get().runtime.output_dir
    try:
        if check_plan(cfg):
            show_plan(cfg, output_dir=folder)
            return None
        return objective(run(cfg, output_dir=folder), cfg.objective)
    except (ValueError, ProcessFailed) as error:  # a sentence for the user: Hydra shows this class without a traceback
        if isinstance(error, ProcessFailed) and error.__cause__:  # which has the traceback of the process
            raise
        raise CompactHydraException(one_line(str(error), 4000)) from error


if __name__ == "__main__":
    try:
        check_command(sys.argv[1:])
        check_overrides(sys.argv[1:])
    except ValueError as error:
        sys.exit(str(error))
    help_text.register(CONF)
    hide()  # secrets of the environment; a job hides those of its configuration
    sys.stderr = cast(TextIO, RedactedStream(sys.stderr))
    sys.exit(run_command(main, CONF))
