"""What pruning costs and gains on a GPU, in one command: hooks, mask update, memory, training, latency, 2:4, a cut.

    python benchmarks/gpu.py                           # a GPU; about five minutes; writes gpu.json
    python benchmarks/gpu.py --device cpu --quick      # tries every part on the CPU with small networks; writes nothing
    python benchmarks/gpu.py --parts training latency

ResNet-50 (224 x 224, `channels_last`) and a BERT-base-sized encoder (12 layers, 12 heads, 3,072 neurons, 128 tokens),
both with synthetic data. Ratios are taken in one run, in turns, and are medians; clocks wait for the device. It needs
torch, torchvision and this library; `gpu_bundle.sh` makes a folder of what a machine without network lacks beside them.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hooks
import torch
import torchvision
from hooks import encoder, synchronize
from torch import Tensor, nn

import gsprune
from gsprune import Pruner, find_structures
from gsprune.cost.counting import count_macs
from gsprune.criteria import Abs, Criterion, Elementwise, Weighted
from gsprune.export.semi_structured import to_semi_structured
from gsprune.latency import in_turns
from gsprune.schedules import Linear
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.cut_plan import plan_cut
from gsprune.zoo.models import convnet

RESULTS = Path(__file__).with_name("gpu.json")
STEPS = 10  # of an epoch of training


@dataclass(frozen=True)
class Setting:
    device: torch.device
    quick: bool
    repeats: int = 30

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of latency and cuts; half precision is the one that the device is fast in."""
        return torch.float32, torch.float16 if self.device.type == "cuda" else torch.bfloat16


Figures = dict[str, float | str]


def networks(given: Setting) -> dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]]:
    """Name -> a fresh network, and a batch of inputs; on the device."""

    def resnet() -> nn.Module:
        if given.quick:
            model: nn.Module = convnet(image_size=16, in_channels=3, num_classes=10)
        else:
            model = torchvision.models.resnet50(weights=None)
        return model.to(given.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def images(batch: int) -> Tensor:
        size = 16 if given.quick else 224
        return torch.randn(batch, 3, size, size, device=given.device).to(memory_format=torch.channels_last)

    def bert() -> nn.Module:
        if given.quick:
            return nn.Sequential(*(hooks.Layer(64, 4, 128) for _ in range(2)), nn.Linear(64, 2)).to(given.device)
        return encoder().to(given.device)

    def tokens(batch: int) -> Tensor:
        return torch.randn(batch, 128, 64 if given.quick else 768, device=given.device)

    return {"resnet50": (resnet, images), "bert_base": (bert, tokens)}


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


# ---- the parts


def step_hooks(given: Setting) -> Figures:
    """`hooks.py` on this device, and whether a step's hooks ever wait for it."""
    found: Figures = {**hooks.memory(given.device)}
    if not given.quick:
        found |= hooks.update(given.repeats, given.device)
        found |= hooks.resnet(given.repeats, given.device) | hooks.bert(given.repeats, given.device)
    if given.device.type == "cuda":
        found["hooks/waits for the device"] = waits(given)
    return found


def waits(given: Setting) -> str:
    """Names of the criteria whose hooks read a value of the device in a step between two mask updates."""
    wrong = []
    make, inputs = networks(given)["resnet50"]
    for criterion in (Elementwise(), Abs(), Weighted()):
        model, x = make(), inputs(8)
        hooks.gradients(model, x)
        pruner = hooks.make_pruner(model, criterion, x)
        hooks.gradients(model, x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            hooks.hooks_of_one_step(pruner)()
        except RuntimeError:
            wrong.append(type(criterion).__name__)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return ", ".join(wrong) or "never"


def training(given: Setting) -> Figures:
    """Steps under bfloat16 autocast: dense, with masks, and cut at each update; and the peak of memory."""
    found: Figures = {}
    for name, (make, inputs) in networks(given).items():
        x = inputs(4 if given.quick else 32)
        for label, settings in {
            "dense": None,
            "elementwise, masked": (Elementwise(), "at_end"),
            "weighted, masked": (Weighted(), "at_end"),
            "weighted, cut at each update": (Weighted(), "each_update"),
        }.items():
            seconds, peak = trained(make(), x, settings, given)
            found[f"training/{name}/{label}/ms_a_step"] = 1000 * seconds
            if peak:
                found[f"training/{name}/{label}/peak_mib"] = peak / 2**20
        dense = found[f"training/{name}/dense/ms_a_step"]
        for label in ("elementwise, masked", "weighted, masked", "weighted, cut at each update"):
            found[f"training/{name}/{label}/to_dense"] = float(found[f"training/{name}/{label}/ms_a_step"]) / float(
                dense
            )
    return found


def trained(model: nn.Module, x: Tensor, settings: tuple[Criterion, Any] | None, given: Setting) -> tuple[float, int]:
    """Median seconds of a step of the last epoch of three, half of the weights or units pruned; peak bytes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    if settings is None:
        pruner = Pruner(model, rules=[])  # prunes nothing
    else:
        criterion, shrink = settings
        options: dict[str, Any] = {"schedule": Linear(end_epoch=1, update_frequency=0.5), "shrink": shrink}
        options |= {"example_input": x[:1].contiguous()} if criterion.scores_units else {}
        pruner = Pruner(model, criterion, target_sparsity=0.5, steps_per_epoch=STEPS, optimizer=optimizer, **options)
    if given.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for epoch in range(3):
        pruner.on_epoch_begin(epoch)
        for step in range(STEPS):
            synchronize(given.device)
            start = time.perf_counter()
            pruner.on_step_begin(step)
            optimizer.zero_grad()
            with torch.autocast(given.device.type, dtype=torch.bfloat16):
                loss = loss_of(model, x)
            loss.backward()
            pruner.on_before_optimizer_step()
            optimizer.step()
            pruner.on_step_end()
            synchronize(given.device)
            times.append(time.perf_counter() - start)
        pruner.on_epoch_end()
    peak = torch.cuda.max_memory_allocated() if given.device.type == "cuda" else 0
    return statistics.median(times[-STEPS + 1 :]), peak


def latency(given: Setting) -> Figures:
    """The dense network against one with about half of its MACs, two data types and batch sizes."""
    found: Figures = {}
    for name, (make, inputs) in networks(given).items():
        dense = make().eval()
        structures = find_structures(dense, inputs(1)).structures
        counts = [kept(s.units, s.kind) for s in structures]
        small = copy.deepcopy(dense)
        keeps = [torch.randperm(s.units) < n for s, n in zip(structures, counts, strict=True)]
        apply_cut(small, plan_cut(structures, keeps))
        work = count_macs(dense, inputs(1)) / count_macs(small, inputs(1))
        found[f"latency/{name}/fewer MACs"] = work
        for dtype in given.dtypes:
            pair = [copy.deepcopy(m).to(dtype) for m in (dense, small)]
            for batch in (1, 4) if given.quick else (1, 64):
                result = in_turns(*pair, inputs(batch).to(dtype), repeats=given.repeats, max_seconds=20)
                key = f"latency/{name}/{str(dtype).removeprefix('torch.')}/batch {batch}"
                times = {"dense_ms": result.dense_ms, "ms": result.ms, "faster": result.speedup}
                found |= {f"{key}/{what}": value for what, value in times.items() if value is not None}
                if result.note is not None:
                    found[key] = result.note
    return found


def kept(units: int, kind: str) -> int:
    """About 0.7 of the units, in the multiples that a GPU likes."""
    wanted = round(units * 2**-0.5)
    return wanted if kind == "heads" or units < 16 else max(8, 8 * round(wanted / 8))


def two_to_four(given: Setting) -> Figures:
    """The encoder's linear layers, 2:4 by magnitude, compressed where that is faster."""
    make, inputs = networks(given)["bert_base"]
    half = given.dtypes[1]
    model, x = make().to(half).eval(), inputs(2 if given.quick else 64).to(half)
    pruned = gsprune.cut(model, [x], pattern="2:4", repair=None, progress=False).model
    if given.device.type != "cuda":
        return {"2:4": "layers are compressed on CUDA alone"}
    sparse = to_semi_structured(pruned, x)
    found: Figures = {"2:4/layers": float(len(sparse.layers)), "2:4/compressed": float(len(sparse.converted))}
    result = in_turns(pruned, sparse.model, x, repeats=given.repeats, max_seconds=20)
    found["2:4/network faster"] = result.note if result.speedup is None else result.speedup
    return found


def cuts(given: Setting) -> Figures:
    """Seconds of `gsprune.cut` to half of the MACs with 512 samples, and how much less error the repair leaves."""
    found: Figures = {}
    for name, (make, inputs) in networks(given).items():
        batches = [inputs(8 if given.quick else 32) for _ in range(2 if given.quick else 16)]
        synchronize(given.device)
        start = time.perf_counter()
        cut = gsprune.cut(make().eval(), batches, macs=0.5, progress=False)
        synchronize(given.device)
        found[f"cut/{name}/seconds"] = time.perf_counter() - start
        assert cut.repaired is not None
        layers = cut.repaired.repaired
        found[f"cut/{name}/error left of a layer, median"] = statistics.median(one.after / one.before for one in layers)
    return found


PARTS: dict[str, Callable[[Setting], Figures]] = {
    "hooks": step_hooks,
    "training": training,
    "latency": latency,
    "2:4": two_to_four,
    "cuts": cuts,
}


def table(machine: dict[str, str], figures: Figures) -> str:
    """Markdown, for README.md beside this file."""
    rows = [f"| {name} | {value if isinstance(value, str) else f'{value:.4g}'} |" for name, value in figures.items()]
    return "\n".join([f"{machine['device']}, torch {machine['torch']}", "", "| | |", "|---|---:|", *rows])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small networks, few repeats; writes no file")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here: --device cpu --quick tries the command without one")
    torch.manual_seed(0)
    setting = Setting(device, given.quick)
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
    }
    figures: Figures = {}
    for name in given.parts:
        start = time.perf_counter()
        figures |= PARTS[name](setting)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    print(table(machine, figures))
    if not given.quick:
        given.json.write_text(json.dumps({"machine": machine, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
