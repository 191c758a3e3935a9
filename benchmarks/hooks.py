"""What pruning costs: the hooks of one step, one global mask update, memory. Ratios are taken in one run, interleaved.

    python benchmarks/hooks.py [--repeats 15] [--processes 5] [--json hooks.json] [--device cpu]

ResNet-50 (25.5 M prunable weights, batch 8 x 3 x 64 x 64) and a BERT-base-sized encoder (12 layers, 12 heads, 3,072
neurons, batch 8 x 128). The yardstick for the hooks is one plain `copy_` pass over the same weights, or the training
step itself; for the update it is one full sort. `hooks` is with active masks, `scores` before the first mask, `judged`
as `hooks` where a guard or a gradient scaler has said that the gradients are finite. Where in memory a process has its
tensors moves times by a tenth: figures are medians over several processes, one after the other.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from gsprune import Pruner
from gsprune.criteria import Abs, Criterion, Elementwise, Weighted
from gsprune.schedules import Linear

EPOCHS = 1000  # the schedule is in its middle: masks are active and scores still grow


class Attention(nn.Module):
    """Multi-head self-attention with separate projections, as in BERT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """One post-LayerNorm encoder layer."""

    def __init__(self, width: int, heads: int, neurons: int) -> None:
        super().__init__()
        self.attention, self.norm1, self.norm2 = Attention(width, heads), nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, neurons), nn.GELU(), nn.Linear(neurons, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


def encoder() -> nn.Module:
    return nn.Sequential(*(Layer(768, 12, 3072) for _ in range(12)), nn.Linear(768, 2))


def make_pruner(model: nn.Module, criterion: Criterion, batch: Tensor, *, masked: bool = True) -> Pruner:
    """A pruner in the middle of its schedule (about half is pruned, scores still grow), or before its first mask."""
    schedule = Linear(start_epoch=0 if masked else EPOCHS, end_epoch=2 * EPOCHS, update_frequency=EPOCHS)
    pruner = Pruner(model, criterion, target_sparsity=0.9, schedule=schedule, example_input=batch[:2])
    pruner.on_before_optimizer_step()
    if not masked:
        return pruner
    pruner.on_epoch_begin(EPOCHS + 1)
    pruner.on_step_begin(0)
    assert 0.2 < pruner.sparsity < 0.7, pruner.sparsity
    assert not pruner.finished
    return pruner


def hooks_of_one_step(pruner: Pruner) -> Callable[[], None]:
    def hooks() -> None:
        pruner.on_step_begin(1)
        pruner.on_before_optimizer_step()
        pruner.on_step_end()

    return hooks


def judged(pruner: Pruner) -> Callable[[], None]:
    """The same, of an optimizer that a guard has told that all gradients are finite."""
    optimizer: Any = torch.optim.SGD(pruner.model.parameters(), lr=0.0)
    finite = torch.zeros((), device=next(pruner.model.parameters()).device)
    hooks = hooks_of_one_step(pruner)

    def told() -> None:
        optimizer.found_inf, pruner.optimizer = finite, optimizer
        hooks()
        pruner.optimizer = None

    return told


def interleaved(repeats: int, device: torch.device, **runs: Callable[[], Any]) -> dict[str, float]:
    """Median milliseconds of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 2):
        for name, run in runs.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if turn >= 2:  # warm-up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def gradients(model: nn.Module, batch: Tensor) -> None:
    model.zero_grad()
    model(batch).square().mean().backward()


def resnet(repeats: int, device: torch.device) -> dict[str, float]:
    """Hooks against one copy pass over the prunable weights."""
    batch = torch.randn(8, 3, 64, 64, device=device)
    times: dict[str, float] = {}
    for criterion in (Elementwise(), Elementwise(compiled=True), Abs(), Weighted()):
        model = torchvision.models.resnet50(weights=None).to(device)
        gradients(model, batch)
        unmasked = make_pruner(model, criterion, batch, masked=False)
        gradients(model, batch)
        pruner = make_pruner(model, criterion, batch)
        weights = [p.detach() for p in model.parameters() if p.dim() > 1]
        copies = [torch.empty_like(w) for w in weights]
        gradients(model, batch)
        name = type(criterion).__name__.lower() + ("_compiled" if criterion.compiled else "")
        measured = interleaved(
            repeats,
            device,
            copy=lambda weights=weights, copies=copies: [c.copy_(w) for c, w in zip(copies, weights, strict=True)],
            hooks=hooks_of_one_step(pruner),
            scores=hooks_of_one_step(unmasked),
            judged=judged(pruner),
        )
        times |= {f"resnet50/{name}/{key}_ms": value for key, value in measured.items()}
        times[f"resnet50/{name}/hooks_to_copy"] = measured["hooks"] / measured["copy"]
        times[f"resnet50/{name}/scores_to_copy"] = measured["scores"] / measured["copy"]
        times[f"resnet50/{name}/judged_to_copy"] = measured["judged"] / measured["copy"]
    return times


def update(repeats: int, device: torch.device) -> dict[str, float]:
    """One global mask update over 25.5 M weights against one full sort of their scores."""
    batch = torch.randn(8, 3, 64, 64, device=device)
    model = torchvision.models.resnet50(weights=None).to(device)
    gradients(model, batch)
    pruner = make_pruner(model, Elementwise(), batch)
    scores = torch.cat([target.score.flatten() for target in pruner.targets])
    epochs = iter(range(EPOCHS, 2 * EPOCHS))
    schedule = Linear(target_sparsity=0.9, end_epoch=2 * EPOCHS, update_frequency=1)
    pruner.parts[0].schedules = [schedule] * len(pruner.targets)

    def one_update() -> None:
        before = pruner.updates
        pruner.on_epoch_begin(next(epochs) + 2)
        pruner.on_step_begin(0)
        assert pruner.updates == before + 1

    one_update()
    measured = interleaved(max(3, repeats // 3), device, update=one_update, sort=lambda: torch.sort(scores))
    return {
        "update/update_ms": measured["update"],
        "update/sort_ms": measured["sort"],
        "update/update_to_sort": measured["update"] / measured["sort"],
    }


def bert(repeats: int, device: torch.device) -> dict[str, float]:
    """Hooks of the structured criteria against a whole training step of the encoder."""
    batch = torch.randn(8, 128, 768, device=device)
    times: dict[str, float] = {}
    for criterion in (Abs(), Weighted()):
        model = encoder().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
        gradients(model, batch)
        pruner = make_pruner(model, criterion, batch)
        gradients(model, batch)
        name = type(criterion).__name__.lower()
        measured = timed_step(repeats, device, model, optimizer, batch, hooks_of_one_step(pruner))
        times |= {f"bert_base/{name}/step_ms": measured["step"], f"bert_base/{name}/hooks_ms": measured["hooks"]}
        times[f"bert_base/{name}/hooks_to_step"] = measured["hooks"] / measured["step"]
    return times


def timed_step(
    repeats: int,
    device: torch.device,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Tensor,
    hooks: Callable[[], None],
) -> dict[str, float]:
    def step() -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    return interleaved(max(3, repeats // 3), device, step=step, hooks=hooks)


def memory(device: torch.device) -> dict[str, float]:
    """Bytes a targeted weight: what the pruner holds, and its scratch."""
    model = torchvision.models.resnet50(weights=None).to(device)
    batch = torch.randn(2, 3, 64, 64, device=device)
    gradients(model, batch)
    pruner = make_pruner(model, Elementwise(), batch)
    weights = sum(target.total for target in pruner.targets)
    [part] = pruner.parts
    held = part.all.score.nbytes + part.all.keep.nbytes
    return {
        "memory/bytes_a_weight": held / weights,
        "memory/scratch_bytes": float(part.all.scratch.nbytes),
        "memory/largest_weight_bytes": float(max(4 * target.total for target in pruner.targets)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("hooks.json"))
    parser.add_argument("--only", choices=["resnet", "update", "bert", "memory"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    parts = {
        "resnet": lambda: resnet(args.repeats, device),
        "update": lambda: update(args.repeats, device),
        "bert": lambda: bert(args.repeats, device),
        "memory": lambda: memory(device),
    }
    result: dict[str, float] = {}
    if args.processes > 1:
        result = in_processes(args.processes)
    else:
        for name, part in parts.items():
            if args.only in (None, name):
                result |= part()
    for name, value in result.items():
        print(f"{name:40s} {value:14.4f}")
    machine = {
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": args.threads,
        "processes": args.processes,
    }
    args.json.write_text(json.dumps({"machine": machine, "result": result}, indent=2) + "\n")


def in_processes(count: int) -> dict[str, float]:
    """The medians over as many processes with the same arguments, one after the other."""
    found: list[dict[str, float]] = []
    for _ in range(count):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "hooks.json")
            command = [sys.executable, *sys.argv, "--processes", "1", "--json", path]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            found.append(json.loads(path.read_text())["result"])
    return {name: statistics.median(result[name] for result in found) for name in found[0]}


if __name__ == "__main__":
    main()
