"""`gsprune plan` and `gsprune cut`: of a network that the command line names, or of the configured one.

gsprune plan --model torchvision:resnet18 --input 1,3,224,224 --macs 0.5
gsprune cut --model my_package.nets:build --weights trained.safetensors --data batches/ --macs 0.5 --out smaller
gsprune plan model=resnet18 dataset=cifar10        # of the configuration: python train.py plan=true ...
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gsprune.app.networks import FORMS, load_network, read_batches, read_input
from gsprune.files.disk import reason
from gsprune.text.display import one_line

AMOUNTS = {
    "macs": "share of the MACs that may stay, such as 0.5",
    "params": "share of the parameters that may stay",
    "sparsity": "share of the units that goes, in every structure; with --pattern, of the weights",
}
TRAIN = Path("train.py")


def make_plan_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gsprune plan",
        description="Print what would be pruned, what that saves, what stays and why. Nothing is trained.",
        epilog="Without --model the overrides describe the network, as for train.py, which must be in this directory.",
    )
    _add_network(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, with everything in it")
    return parser


def make_cut_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gsprune cut",
        description="Make a trained network smaller: score its units, cut, repair, and write it to a directory.",
        epilog="Without --model the overrides are those of train.py mode=cut, which must be in this directory.",
    )
    _add_network(parser)
    parser.add_argument("--data", type=Path, help="a file of tensors, or a folder of such files: some hundred samples")
    parser.add_argument("--out", type=Path, default=Path("cut"), help="directory to write to (cut)")
    parser.add_argument("--calibration", type=int, default=512, help="samples that score and repair (512)")
    return parser


def _add_network(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", help="settings of train.py, such as model=resnet18, instead of --model")
    parser.add_argument("--model", help=FORMS)
    parser.add_argument("--weights", help="a file of the network's state_dict: .safetensors, .pt or .pth")
    parser.add_argument("--input", action="append", metavar="SIZES", help="shape of an argument, such as 1,3,224,224")
    for name, text in AMOUNTS.items():
        parser.add_argument(f"--{name}", type=float, help=text)
    parser.add_argument("--pattern", help='of single weights, such as "2:4" or "1x1"; default: whole units are removed')
    parser.add_argument("--kinds", nargs="+", help="kinds of units: channels, neurons, heads")
    parser.add_argument("--include", nargs="+", help="patterns of names that may be pruned")
    parser.add_argument("--exclude", nargs="+", help="patterns of names that stay whole")


def plan(arguments: Sequence[str] | None = None) -> int:
    """`gsprune plan`: 0, or 1 with a sentence about what is wrong."""
    return _run(make_plan_parser(), arguments, _plan, "plan=true")


def cut(arguments: Sequence[str] | None = None) -> int:
    """`gsprune cut`: 0, or 1 with a sentence about what is wrong."""
    return _run(make_cut_parser(), arguments, _cut, "mode=cut")


def _run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None, work: Any, override: str) -> int:
    given = parser.parse_args(arguments)
    try:
        if given.model is None:
            return _hand_on(given, override)
        if given.overrides:
            raise ValueError(
                f"{given.overrides[0]} is an override of the configuration: leave it out, or leave out --model"
            )
        work(given)
        return 0
    except (ValueError, OSError) as error:
        told = str(error) if isinstance(error, ValueError) else f"{error.filename}: {reason(error)}"
        print(one_line(f"Error: {told}", 4000), file=sys.stderr)
        return 1


def _hand_on(given: argparse.Namespace, override: str) -> int:
    """To train.py in this directory, with the overrides."""
    others = [name for name in vars(given) if name not in ("overrides", "model", "out", "calibration")]
    named = [name for name in others if getattr(given, name) not in (None, False)]
    if named:
        raise ValueError(f"--{named[0]} needs --model, which says of which network: {FORMS}")
    if not TRAIN.is_file():
        raise ValueError(f"there is no {TRAIN} in {Path.cwd()}: give --model, {FORMS}")
    command = [sys.executable, os.fspath(TRAIN), override, *given.overrides]
    return subprocess.call(command)


def _settings(given: argparse.Namespace) -> dict[str, Any]:
    """What was given of the settings that `gsprune.plan` and `gsprune.cut` share."""
    names = (*AMOUNTS, "pattern", "kinds", "include", "exclude")
    return {name: value for name in names if (value := getattr(given, name)) is not None}


def _network(given: argparse.Namespace) -> tuple[Any, Any]:
    model, example = load_network(given.model, given.weights)
    if given.input is not None:
        example = read_input(given.input)
    return model.eval(), example


def _plan(given: argparse.Namespace) -> None:
    import gsprune

    model, example = _network(given)
    if example is None:
        raise ValueError("--input is missing: the shape of one sample, such as --input 1,3,224,224")
    found = gsprune.plan(model, example, **_settings(given))
    print(json.dumps(found.to_json(), indent=2) if given.json else found)


def _cut(given: argparse.Namespace) -> None:
    import gsprune

    if given.data is None:
        raise ValueError("--data is missing: some hundred samples as tensors, in a file or a folder of files")
    model, example = _network(given)
    settings = _settings(given)
    if given.pattern is None:
        settings["example_input"] = example
        if not settings.keys() & AMOUNTS.keys():
            raise ValueError(f"nothing says how much to cut: give {', '.join(f'--{name}' for name in AMOUNTS)}")
    batches = read_batches(given.data)
    loss = _loss(batches)
    found: Any = gsprune.cut(model, batches, loss, calibration=given.calibration, **settings)
    print(found)
    gsprune.save_pruned(given.out, found.model, getattr(found, "plan", None))
    print(f"Wrote {given.out}: gsprune.load_pruned({str(given.out)!r}, the dense network) reads it")


def _loss(batches: Sequence[Any]) -> Any:
    """Cross-entropy of labels, mean squared error of other targets; None for inputs alone."""
    import torch.nn.functional as F

    from gsprune.structures.example import logits_of

    if not isinstance(batches[0], tuple):
        return None
    whole = not batches[0][1].is_floating_point()
    of = F.cross_entropy if whole else F.mse_loss
    return lambda outputs, targets: of(logits_of(outputs).float(), targets)
