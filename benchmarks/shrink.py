"""What shrinking brings: how much of the saved work shows as saved time.

    python benchmarks/shrink.py latency [--models bert resnet50] [--runtimes eager openvino] [--json latency.json]
    python benchmarks/shrink.py training [--models resnet18] [--json training.json]
    python benchmarks/shrink.py runtimes [--models resnet18] [--runtimes onnxruntime] [--json runtimes.json]
    python benchmarks/shrink.py widths [--runtimes onnxruntime] [--threads 1]

`latency` compares dense and pruned in turns, with the 95 % interval of the ratio, or says that the clock cannot tell: a
BERT-base (12 layers, 8 of 12 heads, 600 of 3,072 neurons, 128 tokens) and ResNet-50 at half its multiply-accumulates,
in PyTorch (in channels_last), in onnxruntime and in OpenVINO, there in float32 and in int8 (weights by channels; scales
of activations from one batch, of BERT in onnxruntime of each pass). Weights are random: which units go does not matter.
`training` prunes half of all units over two epochs of 20 steps (batch 16, 64x64 pictures) and trains a third, with
units masked and with units cut out at each update, the steps of both in turns. `runtimes` cuts six networks to half of
their milliseconds in each runtime (`budget={"latency": 0.5, "runtime": ...}`), and times dense and cut network again,
in turns, as they are exported. `widths` times four convolutions of as many channels each, since runtimes compute
channels in blocks.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from gsprune import Pruner
from gsprune.cost.budgets import Budget
from gsprune.cost.counting import count_macs
from gsprune.criteria import Abs
from gsprune.discovery.find import find_structures
from gsprune.export.exported_program import arguments_in_order
from gsprune.export.onnx_file import to_onnx
from gsprune.export.runtimes import Measure
from gsprune.latency import LEAST, in_turns, latency_ms
from gsprune.schedules import Linear
from gsprune.structures.example import tensors_in
from gsprune.structures.structure import Structure
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.cut_plan import plan_cut

Built = tuple[nn.Module, Any]
TOKENS, VOCABULARY = 128, 1000  # the embedding's height adds no work


def picture(name: str, size: int = 224, **options: Any) -> Callable[[], Built]:
    def build() -> Built:
        from torchvision.models import get_model

        return get_model(name, **options), torch.randn(1, 3, size, size)

    return build


def text(family: str, head: str, **sizes: Any) -> Callable[[], Built]:
    def build() -> Built:
        import transformers

        transformers.logging.set_verbosity_error()
        config = getattr(transformers, f"{family}Config")(vocab_size=VOCABULARY, **sizes)
        return getattr(transformers, f"{family}For{head}")(config), tokens(1)

    return build


def tokens(batch: int) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (batch, TOKENS))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


LABELS = "SequenceClassification"
WIDTHS = (64, 63, 62, 60, 56, 52, 48, 47, 46, 44, 40, 33, 32)
SIX = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "vit", "small_bert")
RUNTIMES = ("eager", "onnxruntime", "openvino")
ZOO: dict[str, Callable[[], Built]] = {
    "resnet18": picture("resnet18"),
    "resnet50": picture("resnet50"),
    "bert": text("Bert", LABELS),
    "mobilenet_v2": picture("mobilenet_v2"),
    "efficientnet_b0": picture("efficientnet_b0"),
    "vit": picture("vit_b_16", image_size=224),
    "small_bert": text("Bert", LABELS, hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
}


# ---- latency


def latency(names: Sequence[str], kinds: Sequence[str], repeats: int) -> dict[str, float]:
    """Ratios dense / pruned of time and of work, and their quotient."""
    result: dict[str, float] = {}
    if "bert" in names:
        dense, x = ZOO["bert"]()
        found = find_structures(dense, x, include=("*.self", "*.intermediate.dense")).structures
        small = cut(dense, found, [8 if s.kind == "heads" else 600 for s in found])
        for batch in (1, 8):
            result |= everywhere(f"bert/batch_{batch}", dense, small, tokens(batch), kinds, repeats)
    if "resnet50" in names:
        dense, x = ZOO["resnet50"]()
        found = find_structures(dense, x).structures
        share = 2**-0.5  # the work of a layer goes with both its widths; runtimes compute 16 channels at once
        small = cut(dense, found, [16 * round(s.units * share / 16) for s in found])
        dense, small = (m.to(memory_format=torch.channels_last) for m in (dense, small))
        for batch in (1, 8):
            images = torch.randn(batch, 3, 224, 224).to(memory_format=torch.channels_last)
            result |= everywhere(f"resnet50/batch_{batch}", dense, small, images, kinds, repeats)
    return result


def everywhere(
    name: str, dense: nn.Module, small: nn.Module, x: Any, kinds: Sequence[str], repeats: int
) -> dict[str, float]:
    """The two networks in each runtime, and in foreign ones in int8 as well."""
    result: dict[str, float] = {}
    for kind in kinds:
        measure = Measure(kind)
        for precision in ("float32", "int8") if measure.is_foreign else ("float32",):
            prepared = measure.prepared if precision == "float32" else partial(in_int8, measure)
            result |= compare(f"{name}/{kind}/{precision}", dense, small, x, prepared, repeats)
    return result


def in_int8(measure: Measure, model: nn.Module, x: Any) -> nn.Module:
    """The network in int8 with its input, ready to run.

    Scales of activations are those of the input, or are found anew in each pass where onnxruntime runs a transformer,
    as its documentation advises.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    fed = [*tensors_in(arguments_in_order(model, x), floating=False)]
    settings: dict[str, Any] = {"weight_type": QuantType.QInt8, "per_channel": True}
    settings["op_types_to_quantize"] = ["MatMul", "Gemm", "Conv"]
    with tempfile.TemporaryDirectory() as folder:
        path, quantised = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        to_onnx(model, x, path)
        quant_pre_process(path, path, skip_symbolic_shape=True)
        if measure.runtime == "onnxruntime" and isinstance(x, dict):
            quantize_dynamic(path, quantised, **settings)
        else:
            names = [node.name for node in onnx.load(path).graph.input]
            batches = iter([{name: tensor.numpy() for name, tensor in zip(names, fed, strict=True)}])
            source: Any = SimpleNamespace(get_next=lambda: next(batches, None))
            quantize_static(path, quantised, source, quant_format=QuantFormat.QDQ, **settings)
        return measure.session(onnx.load(quantised), fed, type(model).__name__)


def cut(dense: nn.Module, structures: Sequence[Structure], counts: Sequence[int]) -> nn.Module:
    """A copy with `counts[i]` random units of structure i."""
    keeps = [torch.randperm(s.units) < count for s, count in zip(structures, counts, strict=True)]
    small = copy.deepcopy(dense)
    apply_cut(small, plan_cut(structures, keeps))
    return small


def compare(
    name: str, dense: nn.Module, small: nn.Module, x: Any, prepared: Callable[..., nn.Module], repeats: int
) -> dict[str, float]:
    work = count_macs(dense, x) / count_macs(small, x)
    found = in_turns(prepared(dense, x), prepared(small, x), (), repeats=repeats, max_seconds=120)
    if found.note is not None:
        print(f"{name:50s} {found.note}", flush=True)
    figures = {
        "dense_ms": found.dense_ms,
        "pruned_ms": found.ms,
        "speedup": found.speedup,
        "speedup_low": found.low,
        "speedup_high": found.high,
        "macs_ratio": work,
        "share_of_macs_ratio": None if found.speedup is None else found.speedup / work,
    }
    result = {f"{name}/{key}": value for key, value in figures.items() if value is not None}
    for key, value in result.items():
        print(f"{key:50s} {value:12.3f}", flush=True)
    return result


# ---- budgets in other runtimes


def runtimes(names: Sequence[str], kinds: Sequence[str], repeats: int) -> dict[str, float]:
    """What a latency budget of a half says it has reached, and what the exported networks take afterwards."""
    result: dict[str, float] = {}
    for name in names:
        dense, x = ZOO[name]()
        structures = find_structures(dense.eval(), x).structures
        structures = [s for s in structures if s.kind != "residual"]
        for kind in kinds:
            measure, begin = Measure(kind), time.perf_counter()
            budget = Budget("latency", 0.5, dense, structures, x, min_share=0.1, measure=measure)
            keeps = budget.cut([torch.rand(s.units) for s in structures], 0.5)
            seconds, predicted = time.perf_counter() - begin, budget.reached
            small = copy.deepcopy(dense)
            apply_cut(small, plan_cut(structures, keeps))
            pair = {n: measure.prepared(m, x) for n, m in (("dense", dense), ("small", small))}
            ms = latency_ms(pair, (), repeats=repeats, max_seconds=20)
            found = ms["small"] / ms["dense"]
            work = count_macs(small, x) / count_macs(dense, x)
            figures = {"dense_ms": ms["dense"], "small_ms": ms["small"], "share": found, "told": predicted}
            figures |= {"error": abs(predicted / found - 1), "macs": work, "seconds": seconds}
            print(f"{name:16s} {kind:12s}", "  ".join(f"{k} {v:.3f}" for k, v in figures.items()), flush=True)
            result |= {f"{name}/{kind}/{key}": value for key, value in figures.items()}
    return result


def widths(kinds: Sequence[str], repeats: int) -> dict[str, float]:
    """Time of four 3 x 3 convolutions of c channels on 28 x 28 positions, as a share of that of 64 channels."""
    result: dict[str, float] = {}
    x = torch.randn(1, 3, 28, 28)
    for kind in kinds:
        measure, nets = Measure(kind), {}
        for c in WIDTHS:
            convs = [nn.Conv2d(a, c, 3, padding=1) for a in (3, c, c, c)]
            nets[str(c)] = measure.prepared(nn.Sequential(*[m for conv in convs for m in (conv, nn.ReLU())]).eval(), x)
        ms = latency_ms(nets, (), repeats=10 * repeats, max_seconds=20)
        print(f"{kind:12s}", "  ".join(f"{c}: {ms[str(c)] / ms['64']:.2f}" for c in WIDTHS), flush=True)
        result |= {f"{kind}/{c}": ms[str(c)] / ms["64"] for c in WIDTHS}
    return result


# ---- training


def training(names: Sequence[str], steps: int = 20, epochs: int = 3) -> dict[str, float]:
    """Seconds of training with units masked and with units cut out at each update, mask updates included."""
    result: dict[str, float] = {}
    for name in (name for name in names if name in ("resnet18", "resnet50")):
        seconds: dict[str, list[float]] = {"at_end": [], "each_update": []}
        runs = {when: run_of(name, when, steps) for when in seconds}
        for epoch in range(epochs):
            for _, pruner, _ in runs.values():
                pruner.on_epoch_begin(epoch)
            for step in range(steps):
                for when in sorted(runs, reverse=bool(step % 2)):
                    start = time.perf_counter()
                    train_step(*runs[when], step)
                    seconds[when].append(time.perf_counter() - start)
        for when, values in seconds.items():
            result[f"{name}/{when}/all_seconds"] = sum(values)
            result[f"{name}/{when}/last_epoch_ms_a_step"] = 1000 * statistics.median(values[-steps:])
        for what in ("all_seconds", "last_epoch_ms_a_step"):
            result[f"{name}/speedup/{what}"] = result[f"{name}/at_end/{what}"] / result[f"{name}/each_update/{what}"]
    for key, value in result.items():
        print(f"{key:50s} {value:10.2f}")
    return result


Run = tuple[nn.Module, Pruner, torch.optim.Optimizer]


def run_of(name: str, when: Any, steps: int) -> Run:
    torch.manual_seed(0)
    model, _ = ZOO[name]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    schedule = Linear(end_epoch=2, update_frequency=0.5)
    options = {"example_input": torch.randn(1, 3, 64, 64), "steps_per_epoch": steps, "optimizer": optimizer}
    return model, Pruner(model, Abs(), target_sparsity=0.5, schedule=schedule, shrink=when, **options), optimizer


def train_step(model: nn.Module, pruner: Pruner, optimizer: torch.optim.Optimizer, step: int) -> None:
    pruner.on_step_begin(step)
    x, y = torch.randn(16, 3, 64, 64), torch.randint(0, 1000, (16,))
    nn.functional.cross_entropy(model(x), y).backward()
    pruner.on_before_optimizer_step()
    optimizer.step()
    pruner.on_step_end()
    optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["latency", "training", "runtimes", "widths"])
    parser.add_argument("--models", nargs="+", choices=list(ZOO), metavar="NAME")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES)
    parser.add_argument("--repeats", type=int, default=LEAST)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", category=UserWarning)
    names = args.models or (SIX if args.part == "runtimes" else ("resnet18", "resnet50", "bert"))
    parts = {
        "latency": lambda names: latency(names, args.runtimes, args.repeats),
        "training": training,
        "runtimes": lambda names: runtimes(names, args.runtimes, args.repeats),
        "widths": lambda names: widths(args.runtimes, args.repeats),
    }
    result: Any = parts[args.part](names)
    if args.json is not None:
        processor = platform.processor() or platform.machine()
        machine = {"torch": torch.__version__, "processor": processor, "threads": args.threads}
        args.json.write_text(json.dumps({"machine": machine, "result": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
