"""The command `gsprune`, also `python -m gsprune`.

    gsprune doctor                            # versions, devices, tracking database, what is missing
    gsprune plan --model torchvision:resnet18 --input 1,3,224,224
    gsprune cut --model my_nets:build --weights trained.safetensors --data batches/ --macs 0.5 --out smaller
    gsprune report multirun/<date>/<time>     # report.html, summary.csv and pareto.svg of a sweep
    gsprune take multirun/<date>/<time>       # the network that the report says to take
    gsprune sync outputs/<date>/<time>        # what a run could not send to MLflow
    gsprune convert head_conf.yaml            # a file of Intel Neural Compressor as a choice of the group `pruner`

Each has a `--help`. Training is `train.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from gsprune.extras import MissingExtraError, need
from gsprune.text.names import did_you_mean

# command -> its module, or module:function where a module has several; what it is for
COMMANDS = {
    "doctor": ("gsprune.app.doctor", "show versions, devices, database, and what is missing"),
    "plan": ("gsprune.app.network_commands:plan", "print what would be pruned of a network, and what that saves"),
    "cut": ("gsprune.app.network_commands:cut", "make a trained network smaller"),
    "report": ("gsprune.sweeps.report", "write report.html, summary.csv and pareto.svg of a sweep"),
    "take": ("gsprune.sweeps.take", "copy or register the network that a sweep's report says to take"),
    "sync": ("gsprune.tracking.sync", "upload to MLflow what runs could not send"),
    "convert": ("gsprune.integrations.inc", "print a file of Intel Neural Compressor as a choice of the group pruner"),
}
SHELLS = ("bash", "zsh", "tcsh")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands; its exit code.

    >>> main(["report", "/no/such/sweep"])
    1
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["--print-completion"]:
            return _print_completion(given[1:])
        if given and not given[0].startswith("-") and given[0] not in COMMANDS:
            near = did_you_mean(given[0], COMMANDS)
            return _refuse(f"{given[0]} is not a command: there are {', '.join(COMMANDS)}{near}")
        chosen = _make_parser().parse_args(given[:1]).command
        module, _, function = COMMANDS[chosen][0].partition(":")
        return int(getattr(import_module(module), function or "main")(given[1:]))
    except MissingExtraError as error:
        return _refuse(str(error))


def _make_parser(*, whole: bool = False) -> argparse.ArgumentParser:
    """Of all commands; `whole` with the options of each, for which it imports them."""
    parser = argparse.ArgumentParser(
        prog="gsprune",
        description="Plan, cut, and work with what runs and sweeps left.",
        epilog='Completion: eval "$(gsprune --print-completion bash)" (or zsh), which needs the package shtab.',
    )
    parser.add_argument("--print-completion", choices=SHELLS, metavar="SHELL", help="bash, zsh or tcsh")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, (address, text) in COMMANDS.items():
        parents = [_parser_of(address)] if whole else []
        commands.add_parser(name, help=text, add_help=False, parents=parents, conflict_handler="resolve")
    return parser


def _parser_of(address: str) -> argparse.ArgumentParser:
    """That of one command: `make_parser` of its module, or `make_<function>_parser`."""
    module, _, function = address.partition(":")
    made: argparse.ArgumentParser = getattr(
        import_module(module), f"make_{function}_parser" if function else "make_parser"
    )()
    return made


def _print_completion(arguments: Sequence[str]) -> int:
    """The completion script of a shell: `eval "$(gsprune --print-completion bash)"`."""
    shell = next(iter(arguments), "bash")
    if shell not in SHELLS:
        return _refuse(f"--print-completion {shell} is not allowed: it must be one of {', '.join(SHELLS)}")
    print(need("shtab").complete(_make_parser(whole=True), shell))
    return 0


def _refuse(text: str) -> int:
    print(f"Error: {text}", file=sys.stderr)
    return 1
