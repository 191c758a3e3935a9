"""The peers' figures and gsprune's in one process, in turns: torch.nn.utils.prune and torch-pruning.

    pip install --target FOLDER --no-deps torch-pruning
    python benchmarks/peers.py --packages FOLDER [--inc ENVIRONMENT] [--quick] [--threads 2] [--json peers.json]

`update`: half of all weights of a ResNet-50 chosen by magnitude in one ranking and masked: `global_unstructured` with
L1Unstructured, and a mask update of `Pruner(model, Magnitude())`. `step`: a training step with these masks: the forward
hooks of torch.nn.utils.prune, which multiply every weight in every pass, and the hooks of a `Pruner`, which scores
beside; each against the same step of the dense network. `cut`: seconds to find the structures of a ResNet-50 and to cut
it to half of its MACs, by both magnitudes. `latency`: dense and cut networks, batch 1 and 8. `ancestor`: the pruner of
Intel Neural Compressor that gsprune comes from, in an environment of its own (`inc_env.sh`), between two measurements
of gsprune's: a mask update (its own is layer by layer, gsprune's one ranking), and what the hooks of a step take.
`--quick` takes a ResNet-18 on 64 x 64 pictures.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from hooks import interleaved
from torch import Tensor, nn
from torch.nn.utils import prune

from gsprune import Pruner
from gsprune.cost.counting import count_macs, count_parameters
from gsprune.criteria import Elementwise, Magnitude
from gsprune.latency import LEAST, compare
from gsprune.schedules import Linear, OneShot

CPU = torch.device("cpu")


class Work:
    """A network, a batch that it is trained on, and one picture."""

    def __init__(self, quick: bool) -> None:
        self.name, self.size = ("resnet18", 64) if quick else ("resnet50", 224)
        self.batch = torch.randn(8, 3, 64, 64)
        self.picture = torch.randn(1, 3, self.size, self.size)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        network: nn.Module = torchvision.models.get_model(self.name)
        return network


def weights_of(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(m, "weight") for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def pruner_of(model: nn.Module, criterion: Any) -> Pruner:
    return Pruner(model, criterion, target_sparsity=0.5, schedule=OneShot(), steps_per_epoch=1)


def update(work: Work, repeats: int) -> dict[str, float]:
    """Milliseconds of one choice over all weights, masks set."""
    times: dict[str, list[float]] = {"torch": [], "gsprune": []}
    for turn in range(repeats + 1):
        theirs, ours = work.model(), work.model()
        pruner = pruner_of(ours, Magnitude())

        def torch_prune(model: nn.Module = theirs) -> None:
            prune.global_unstructured(weights_of(model), prune.L1Unstructured, amount=0.5)

        runs: dict[str, Callable[[], None]] = {"torch": torch_prune, "gsprune": lambda p=pruner: p.on_step_begin(0)}
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:  # the first is for the caches
                times[name].append(1e3 * (time.perf_counter() - start))
        zeros = sum(int((m.weight == 0).sum()) for m, _ in weights_of(theirs))
        assert abs(zeros - sum(t.pruned for t in pruner.targets)) <= 1, "both prune half"
    found = {f"update/{name}_ms": statistics.median(values) for name, values in times.items()}
    return {**found, "update/faster": found["update/torch_ms"] / found["update/gsprune_ms"]}


def step(work: Work, repeats: int) -> dict[str, float]:
    """Milliseconds of a training step: dense, with masks of torch.nn.utils.prune, and with a pruner."""

    def stepping(model: nn.Module, pruner: Pruner | None = None) -> Callable[[], None]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

        def one() -> None:
            if pruner is not None:
                pruner.on_step_begin(1)
            model(work.batch).square().mean().backward()
            if pruner is not None:
                pruner.on_before_optimizer_step()
            optimizer.step()
            if pruner is not None:
                pruner.on_step_end()
            optimizer.zero_grad()

        return one

    theirs, ours = work.model(), work.model()
    prune.global_unstructured(weights_of(theirs), prune.L1Unstructured, amount=0.5)
    pruner = Pruner(ours, Elementwise(), target_sparsity=0.9, schedule=OneShot(), steps_per_epoch=10)
    pruner.on_step_begin(0)
    ours(work.batch).square().mean().backward()
    pruner.on_before_optimizer_step()
    pruner.on_step_begin(1)  # the mask
    found = interleaved(
        repeats, CPU, dense=stepping(work.model()), torch=stepping(theirs), gsprune=stepping(ours, pruner)
    )
    result = {f"step/{name}_ms": value for name, value in found.items()}
    return {**result, **{f"step/{name}_to_dense": found[name] / found["dense"] for name in ("torch", "gsprune")}}


def cut(work: Work, repeats: int, tp: Any) -> dict[str, float]:
    """Seconds to half of the MACs, what both left, and milliseconds of what is left."""
    dense, x = work.model().eval(), work.picture
    seconds: dict[str, list[float]] = {"torch_pruning": [], "gsprune": []}
    small: dict[str, nn.Module] = {}
    macs = count_macs(dense, x)
    ratio = _ratio_for_half(dense, x, tp, macs)
    for _ in range(max(1, repeats // 5)):
        for name in seconds:
            model, start = copy.deepcopy(dense), time.perf_counter()
            small[name] = _by_torch_pruning(model, x, tp, ratio) if name == "torch_pruning" else _by_gsprune(model, x)
            seconds[name].append(time.perf_counter() - start)
    result = {f"cut/{name}_s": statistics.median(values) for name, values in seconds.items()}
    for name, model in small.items():
        result[f"cut/{name}_macs"] = count_macs(model, x) / macs
        result[f"cut/{name}_params"] = count_parameters(model) / count_parameters(dense)
        for batch in (1, 8):
            found = compare(dense, model, x.expand(batch, -1, -1, -1).contiguous(), repeats=max(LEAST, repeats))
            if found.note is not None:
                print(f"latency/{name}/batch_{batch}: {found.note}", flush=True)
            figures = {"dense_ms": found.dense_ms, "ms": found.ms, "faster": found.speedup}
            result |= {f"latency/{name}/batch_{batch}/{k}": v for k, v in figures.items() if v is not None}
    return result


def ancestor(work: Work, environment: Path, repeats: int, threads: int) -> dict[str, float]:
    """Milliseconds of Intel Neural Compressor's `GradientSensitivityPruner` (`inc.py`), gsprune's before and after."""
    command = [environment / "bin" / "python", Path(__file__).with_name("inc.py"), "--model", work.name]
    ours = [_own_hooks(work, repeats)]
    options = ["--repeats", str(max(1, repeats // 5)), "--threads", str(threads)]
    text = subprocess.run([*command, *options], stdout=subprocess.PIPE, text=True, check=True).stdout
    theirs: dict[str, float] = json.loads(text.splitlines()[-1])
    ours.append(_own_hooks(work, repeats))
    result: dict[str, float] = {}
    for name, value in theirs.items():
        mine = statistics.mean(found[name] for found in ours)
        result |= {
            f"ancestor/{name}": value,
            f"ancestor/gsprune_{name}": mine,
            f"ancestor/{name.removesuffix('_ms')}_faster": value / mine,
        }
    return result


def _own_hooks(work: Work, repeats: int) -> dict[str, float]:
    """Milliseconds of a mask update over all weights, and of the hooks of a step with these masks."""
    updates, hooks = [], []
    for _ in range(repeats):
        model = work.model()
        # half of 0.9 in the first of two updates: scores are still needed afterwards
        schedule = Linear(end_epoch=1, update_frequency=1)
        pruner = Pruner(model, Elementwise(), target_sparsity=0.9, schedule=schedule)
        model(work.batch).square().mean().backward()
        pruner.on_before_optimizer_step()
        start = time.perf_counter()
        pruner.on_epoch_begin(0)
        pruner.on_step_begin(0)
        updates.append(1e3 * (time.perf_counter() - start))
        assert 0.4 < pruner.sparsity < 0.5, pruner.sparsity
        assert not pruner.finished
        start = time.perf_counter()
        pruner.on_before_optimizer_step()
        pruner.on_step_end()
        hooks.append(1e3 * (time.perf_counter() - start))
    return {"update_ms": statistics.median(updates), "hooks_ms": statistics.median(hooks)}


def _by_torch_pruning(model: nn.Module, x: Tensor, tp: Any, ratio: float) -> nn.Module:
    """As its README does: group magnitude, one ratio for every layer, the classifier left alone."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    tp.pruner.BasePruner(model, x, importance, pruning_ratio=ratio, ignored_layers=[model.fc]).step()
    return model.eval()


def _ratio_for_half(dense: nn.Module, x: Tensor, tp: Any, macs: float) -> float:
    """The share of channels that leaves half of the MACs, by bisection; not timed."""
    low, high = 0.0, 0.9
    for _ in range(7):
        middle = (low + high) / 2
        left = count_macs(_by_torch_pruning(copy.deepcopy(dense), x, tp, middle), x) / macs
        low, high = (middle, high) if left > 0.5 else (low, middle)
    return (low + high) / 2


def _by_gsprune(model: nn.Module, x: Tensor) -> nn.Module:
    options: dict[str, Any] = {"kinds": ["channels"], "budget": {"macs": 0.5, "round_to": 8}, "scope": "local"}
    pruner = Pruner(
        model, Magnitude(), structured=True, schedule=OneShot(), steps_per_epoch=1, example_input=x, **options
    )
    pruner.on_step_begin(0)
    pruner.on_train_end()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", help="a folder with torch_pruning")
    parser.add_argument("--inc", type=Path, help="an environment with Intel Neural Compressor (inc_env.sh)")
    parser.add_argument("--only", choices=["update", "step", "cut", "ancestor"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=UserWarning)
    if args.packages:
        sys.path.append(args.packages)
    import torch_pruning as tp

    work, repeats = Work(args.quick), 3 if args.quick else args.repeats
    parts: dict[str, Callable[[], dict[str, float]]] = {
        "update": lambda: update(work, repeats),
        "step": lambda: step(work, repeats),
        "cut": lambda: cut(work, repeats, tp),
    }
    if args.inc is not None:
        parts["ancestor"] = lambda: ancestor(work, args.inc, repeats, args.threads)
    result: dict[str, float] = {}
    for name, part in parts.items():
        if args.only in (None, name):
            found = part()
            result |= found
            for key, value in found.items():
                print(f"{key:45s} {value:12.3f}", flush=True)
    if args.json:
        versions = {"torch": torch.__version__, "torch_pruning": tp.__version__}
        machine = {**versions, "processor": platform.processor() or platform.machine(), "threads": args.threads}
        args.json.write_text(json.dumps({"machine": machine, "result": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
