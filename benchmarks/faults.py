"""What it takes to lose nothing: runs killed at random moments, the cost of a checkpoint and of a guarded step.

    python benchmarks/faults.py kills [--count 100] [--seed 0]
    python benchmarks/faults.py checkpoint [--repeats 5] [--device cpu] [--folder .]
    python benchmarks/faults.py guard [--repeats 16] [--device cpu]

`kills` kills runs with SIGKILL, also inside the write of a checkpoint, goes on with them and compares what they leave
with runs left alone (tests/kills.py does the work). `checkpoint` writes and reads the checkpoints of ResNet-50 with a
pruner of single weights (scores and masks of 25.5 million) and of the digits' convnet, and takes the time of a
training step of ResNet-50 (batch 8 x 3 x 64 x 64) beside it. It prints a markdown table. `guard` makes steps of that
network with and without the guard against bad numbers, in turns on one thread, and prints the median of the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from gsprune import Pruner
from gsprune.criteria import Elementwise
from gsprune.formats.tensors import state_tensors
from gsprune.schedules import OneShot
from gsprune.training.checkpoints import Checkpoints, read_state
from gsprune.training.guard import Guard
from gsprune.training.loop_state import LoopState
from gsprune.training.optimization import make_optimizer
from gsprune.zoo.models import convnet

ROOT = Path(__file__).parents[1]
CIFAR10 = 45_000  # training samples
OPTIMIZERS = {"SGD, momentum": partial(torch.optim.SGD, momentum=0.9), "AdamW": torch.optim.AdamW}


def kills(count: int, seed: int) -> None:
    command = [sys.executable, str(ROOT / "tests" / "kills.py"), "--count", str(count), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout:
        raise SystemExit(done.stderr)
    tried = json.loads(done.stdout)
    print(f"{tried['kills']} kills in {tried['runs']} runs, {tried['inside_write']} inside the write of a checkpoint")
    print(f"{tried['continued']} tries went on from a checkpoint; {tried['seconds']:.0f} s")
    print("bit-identical: " + ("all" if not tried["differences"] else f"NOT: {tried['differences']}"))
    raise SystemExit(done.returncode)


class Training:
    """A network, its optimizer and a pruner with active masks, one step after they were made."""

    def __init__(self, model: nn.Module, batch: Tensor, optimizer: Callable[..., Any]) -> None:
        self.model, self.batch, self.labels = (
            model,
            batch,
            torch.zeros(len(batch), dtype=torch.int64, device=batch.device),
        )
        self.optimizer = make_optimizer(optimizer, model, lr=1e-3)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        self.pruner = Pruner(model, Elementwise(), target_sparsity=0.5, schedule=OneShot(start_epoch=1.0))
        self.step()
        self.pruner.on_epoch_begin(1)
        self.pruner.on_step_begin(0)
        assert self.pruner.updates == 1

    def step(self) -> None:
        F.cross_entropy(self.model(self.batch), self.labels).backward()
        self.pruner.on_before_optimizer_step()
        self.optimizer.step()
        self.pruner.on_step_end()
        self.optimizer.zero_grad()
        if self.batch.is_cuda:
            torch.cuda.synchronize()

    def state(self) -> dict[str, Any]:
        """As a job's: `gsprune.app.job` adds the metrics so far."""
        return {
            "model": state_tensors(self.model)[0],
            "optimizer": self.optimizer.state_dict(),
            "lr_schedule": self.schedule.state_dict(),
            "pruner": self.pruner.state_dict(),
            "loop": LoopState(self.batch.device, {}).state_dict(),
        }


def checkpoint(repeats: int, device: torch.device, folder: Path) -> None:
    nets = {
        "ResNet-50": (torchvision.models.resnet50, torch.randn(8, 3, 64, 64)),
        "convnet on digits": (lambda: convnet(image_size=8, in_channels=1, num_classes=10), torch.randn(64, 1, 8, 8)),
    }
    print("| | MB | write | read | a step | of an epoch of 45,000 samples | of 10 minutes |")
    print("|---|---|---|---|---|---|---|")
    for name, (build, batch) in nets.items():
        for kind, factory in OPTIMIZERS.items():
            training = Training(build().to(device), batch.to(device), factory)
            print(f"| {name}, {kind} | " + " | ".join(_row(training, repeats, folder)) + " |", flush=True)


def _row(training: Training, repeats: int, folder: Path) -> list[str]:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        checkpoints = Checkpoints(Path(place))
        number = iter(range(10**6))
        write = _median(repeats, lambda: checkpoints.write(training.state(), epoch=0, step=next(number)))
        newest = checkpoints.paths()[-1]
        read = _median(repeats, lambda: read_state(newest))
        megabytes = sum(file.stat().st_size for file in newest.iterdir()) / 1e6
    step = _median(repeats, training.step)
    epoch = step * CIFAR10 / len(training.batch)
    times = [f"{write:.3f} s", f"{read:.3f} s", f"{1e3 * step:.0f} ms"]
    return [f"{megabytes:.1f}", *times, f"{write / epoch:.2%}", f"{write / 600:.3%}"]


def guard(repeats: int, device: torch.device) -> None:
    torch.set_num_threads(1)
    model, batch = torchvision.models.resnet50().to(device), torch.randn(8, 3, 64, 64, device=device)
    labels = torch.zeros(len(batch), dtype=torch.int64, device=device)
    for kind in ("fused", "foreach"):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, **{kind: True})
        guarded = Guard(model, optimizer, limit=20)

        def plain_step(optimizer: torch.optim.Optimizer = optimizer) -> None:
            F.cross_entropy(model(batch), labels).backward()
            optimizer.step()

        def guarded_step(guarded: Guard = guarded) -> None:
            guarded.begin()
            F.cross_entropy(model(batch), labels).backward()
            guarded.judge()
            guarded.step()
            guarded.look()

        ratios = []
        for turn in range(repeats + 1):
            plain, other = (_seconds(step, optimizer, device) for step in (plain_step, guarded_step))
            ratios += [other / plain] if turn else []
        print(f"{kind} SGD: {statistics.median(ratios):.3f} of a step without the guard ({repeats} pairs)")


def _seconds(step: Callable[[], None], optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    began = time.perf_counter()
    step()
    optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _median(repeats: int, run: Callable[[], Any]) -> float:
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("kills")
    command.add_argument("--count", type=int, default=100)
    command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("checkpoint")
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    command.add_argument("--folder", type=Path, default=Path())
    command = commands.add_parser("guard")
    command.add_argument("--repeats", type=int, default=16)
    command.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    wanted = parser.parse_args()
    if wanted.command == "kills":
        kills(wanted.count, wanted.seed)
    elif wanted.command == "guard":
        guard(wanted.repeats, wanted.device)
    else:
        checkpoint(wanted.repeats, wanted.device, wanted.folder)


if __name__ == "__main__":
    main()
