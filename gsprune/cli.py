"""The command `gsprune`, also `python -m gsprune`: what is done with files that runs and sweeps left.

    gsprune report multirun/<date>/<time>     # report.html, summary.csv and pareto.png of a sweep
    gsprune sync outputs/<date>/<time>        # what a run could not send to MLflow
    gsprune convert head_conf.yaml            # a file of Intel Neural Compressor as a choice of the group `pruner`

Each has a `--help`. Training is `train.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "report": ("gsprune.sweeps.report", "write report.html, summary.csv and pareto.png of a sweep"),
    "sync": ("gsprune.tracking.sync", "upload to MLflow what runs could not send"),
    "convert": ("gsprune.integrations.inc", "print a file of Intel Neural Compressor as a choice of the group pruner"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands; its exit code.

    >>> main(["report", "/no/such/sweep"])
    1
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="gsprune", description="Work with the files of runs and sweeps.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    chosen = parser.parse_args(given[:1]).command
    return int(import_module(COMMANDS[chosen][0]).main(given[1:]))
