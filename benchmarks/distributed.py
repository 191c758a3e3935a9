"""Several processes: weak scaling of a training step with the pruner's hooks, and what an update sends.

    python benchmarks/distributed.py [--processes 2] [--batch 32] [--repeats 15] [--json distributed.json]

Each process has the same batch, so a step on N of them takes N times the samples; at best it takes as long as on one.
Taken in turns in one start: process 0 trains alone, then all train together, all of them with one thread. The bytes are
counted and not measured: `paper` has the formulas, for one process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gsprune import Pruner
from gsprune.collectives import check_masks, rank
from gsprune.criteria import Elementwise
from gsprune.schedules import Linear
from gsprune.training.data_parallel import data_parallel
from gsprune.training.launcher import Processes, launch
from gsprune.zoo.models import resnet18

WARM_UP = 2


def measure(batch: int, repeats: int) -> dict[str, float]:
    """Median seconds of a step alone and together, and of the comparison of the masks. Runs in every process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = resnet18(image_size=32, num_classes=10, in_channels=3)
    images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(rank()))
    labels = torch.randint(10, (batch,), generator=torch.Generator().manual_seed(rank()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    schedule = Linear(end_epoch=1e6, update_frequency=1e6)
    pruner = Pruner(model, Elementwise(), target_sparsity=0.9, schedule=schedule, optimizer=optimizer)
    both = data_parallel(model)
    times: dict[str, list[float]] = {"alone": [], "together": [], "masks": []}
    for turn in range(repeats + WARM_UP):
        dist.barrier()
        alone = timed(lambda: step(model, pruner, optimizer, images, labels)) if rank() == 0 else 0.0
        dist.barrier()
        together = timed(lambda: step(both, pruner, optimizer, images, labels))
        masks = timed(lambda: check_masks(pruner.masks()))
        if turn >= WARM_UP:
            for name, value in (("alone", alone), ("together", together), ("masks", masks)):
                times[name].append(value)
    return {name: statistics.median(values) for name, values in times.items()}


def step(forward: nn.Module, pruner: Pruner, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    pruner.on_step_begin(0)
    nn.functional.cross_entropy(forward(images), labels).backward()
    pruner.on_before_optimizer_step()
    optimizer.step()
    pruner.on_step_end()
    optimizer.zero_grad(set_to_none=True)


def timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def paper(parameters: int, tensors: int, processes: int) -> dict[str, float]:
    """Bytes that one process sends in a step and in a mask update, with rings: an all-reduce of B bytes costs it
    2 (N - 1) / N * B, a gather of B bytes from each (N - 1) * B.
    """
    ring = 2 * (processes - 1) / processes
    histograms, per_tensor = 4 * 256 * 8, 4 + 8 + 8  # finite?, kept (min_kept), pruned
    ties = 8 * tensors * (processes - 1)
    return {
        "gradients, a step": ring * 4 * parameters,
        "gradients, a step and a parameter": ring * 4,
        "hash of the masks, an update": 32 * (processes - 1),
        "FSDP2: is the gradient finite, a step": ring * 4,
        "FSDP2: global selection, an update": ring * (histograms + per_tensor * tensors) + ties,
        "FSDP2: local selection, an update": ring * (histograms + per_tensor) * tensors + ties,
        "FSDP2: the same by gathering all scores": (processes - 1) / processes * 4 * parameters,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    before = os.getloadavg()[0]
    found: dict[str, Any] = dict(launch(Processes(given.processes), "cpu", measure, given.batch, given.repeats))
    found |= {"efficiency": found["alone"] / found["together"], "load_before": before, "cores": os.cpu_count()}
    found["bytes"] = {str(n): paper(25_557_032, 54, n) for n in (2, 8, 64)}  # ResNet-50
    for name, value in found.items():
        print(name, value)
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
