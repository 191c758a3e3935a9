"""What shrinking brings and costs: a table of architectures, and how much of the saved work shows as saved time.

    python benchmarks/shrink.py zoo [--models resnet18 llama] [--json zoo.json]
    python benchmarks/shrink.py latency [--repeats 15] [--models bert resnet50] [--json latency.json]

`zoo` prints a markdown table: what can be pruned, what stays and why, seconds to find structures and to shrink half of
every one of them, and the multiply-accumulates left. `latency` compares dense and pruned, interleaved medians: a
BERT-base (12 layers, 8 of 12 heads, 600 of 3,072 neurons, 128 tokens) and ResNet-50 at half its multiply-accumulates in
channels_last. Weights are random: which units go does not matter for time.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gsprune.metrics import count_macs, latency_ms
from gsprune.shrink import apply_plan, plan_shrink, shrink
from gsprune.structures import Found, Structure, find_structures

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


def vit() -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig()), {"pixel_values": torch.randn(1, 3, 224, 224)}


def tokens(batch: int) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (batch, TOKENS))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


LABELS = "SequenceClassification"
DECODER = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
ZOO: dict[str, Callable[[], Built]] = {
    "resnet18": picture("resnet18"),
    "resnet50": picture("resnet50"),
    "mobilenet_v2": picture("mobilenet_v2"),
    "mobilenet_v3_small": picture("mobilenet_v3_small"),
    "efficientnet_b0": picture("efficientnet_b0"),
    "densenet121": picture("densenet121"),
    "convnext_tiny": picture("convnext_tiny"),
    "regnet_y_400mf": picture("regnet_y_400mf"),
    "vgg16_bn": picture("vgg16_bn"),
    "googlenet": picture("googlenet", aux_logits=True, init_weights=False),
    "inception_v3": picture("inception_v3", 299, aux_logits=True, init_weights=False),
    "vit_b_16": picture("vit_b_16"),
    "bert": text("Bert", LABELS),
    "roberta": text("Roberta", LABELS),
    "distilbert": text("DistilBert", LABELS),
    "electra": text("Electra", LABELS),
    "minilm": text("Bert", LABELS, hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
    "vit (transformers)": vit,
    "llama": text("Llama", "CausalLM", num_key_value_heads=4, **DECODER),
    "qwen2": text("Qwen2", "CausalLM", num_key_value_heads=4, **DECODER),
}


def zoo(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Find, halve and shrink every network; a line of a markdown table each."""
    print("| network | can be pruned | stays, and why | find, s | shrink, s | MACs at half |")
    print("|---|---|---|---:|---:|---:|")
    rows = {}
    for name in names:
        model, x = ZOO[name]()
        start = time.perf_counter()
        found = find_structures(model, x)
        between = time.perf_counter()
        before = count_macs(model, x)
        again = time.perf_counter()
        shrink(model, found.structures, [first_half(s) for s in found.structures], example_input=x)
        end = time.perf_counter()
        row = {
            "found": offered(found),
            "skipped": reasons(found),
            "find_seconds": between - start,
            "shrink_seconds": end - again,
            "macs_ratio": count_macs(model, x) / before,
        }
        rows[name] = row
        cells = (row["found"], row["skipped"], f"{row['find_seconds']:.1f}", f"{row['shrink_seconds']:.1f}")
        print("|", " | ".join([name, *cells, f"{row['macs_ratio']:.2f}"]), "|", flush=True)
    return rows


def first_half(structure: Structure) -> Tensor:
    return torch.arange(structure.units) < (structure.units + 1) // 2


def offered(found: Found) -> str:
    """As "12 x channels (2,880 units)"."""
    counts, units = Counter(s.kind for s in found.structures), Counter[str]()
    for structure in found.structures:
        units[structure.kind] += structure.units
    return ", ".join(f"{count} x {kind} ({units[kind]:,} units)" for kind, count in counts.items())


def reasons(found: Found) -> str:
    """Each reason once, without the names in it."""
    plain = (re.sub(r"'[^']*' is", "one is", reason) for reason in found.skipped.values())
    return "; ".join(f"{count} x {reason}" for reason, count in Counter(plain).items())


# ---- latency


def latency(names: Sequence[str], repeats: int) -> dict[str, float]:
    """Ratios dense / pruned of time and of work, and their quotient."""
    result: dict[str, float] = {}
    if "bert" in names:
        dense, x = ZOO["bert"]()
        found = find_structures(dense, x, include=("*.self", "*.intermediate.dense")).structures
        small = cut(dense, found, [8 if s.kind == "heads" else 600 for s in found])
        for batch in (1, 8):
            result |= compare(f"bert/batch_{batch}", dense, small, tokens(batch), repeats)
    if "resnet50" in names:
        dense, x = ZOO["resnet50"]()
        found = find_structures(dense, x).structures
        share = 2**-0.5  # the work of a layer goes with both its widths
        small = cut(dense, found, [8 * round(s.units * share / 8) for s in found])
        pair = [m.to(memory_format=torch.channels_last) for m in (dense, small)]
        for batch in (1, 8):
            images = torch.randn(batch, 3, 224, 224).to(memory_format=torch.channels_last)
            result |= compare(f"resnet50/batch_{batch}", *pair, images, repeats)
    return result


def cut(dense: nn.Module, structures: Sequence[Structure], counts: Sequence[int]) -> nn.Module:
    """A copy with `counts[i]` random units of structure i."""
    keeps = [torch.randperm(s.units) < count for s, count in zip(structures, counts, strict=True)]
    small = copy.deepcopy(dense)
    apply_plan(small, plan_shrink(structures, keeps))
    return small


def compare(name: str, dense: nn.Module, small: nn.Module, x: Any, repeats: int) -> dict[str, float]:
    times = latency_ms({"dense": dense, "pruned": small}, x, repeats=repeats, max_seconds=120)
    work = count_macs(dense, x) / count_macs(small, x)
    speedup = times["dense"] / times["pruned"]
    result = {
        f"{name}/dense_ms": times["dense"],
        f"{name}/pruned_ms": times["pruned"],
        f"{name}/speedup": speedup,
        f"{name}/macs_ratio": work,
        f"{name}/share_of_macs_ratio": speedup / work,
    }
    for key, value in result.items():
        print(f"{key:40s} {value:12.3f}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["zoo", "latency"])
    parser.add_argument("--models", nargs="+", choices=list(ZOO), default=list(ZOO), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", category=UserWarning)
    result: Any = zoo(args.models) if args.part == "zoo" else latency(args.models, args.repeats)
    if args.json is not None:
        processor = platform.processor() or platform.machine()
        machine = {"torch": torch.__version__, "processor": processor, "threads": args.threads}
        args.json.write_text(json.dumps({"machine": machine, "result": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
