"""Twenty pruned networks by six ways out: each is written here, and read and compared in a fresh process.

    python benchmarks/ways.py              # all; prints a Markdown table, and what could not be written and why
    python benchmarks/ways.py mlp vit-hf   # some

Of each network half of the heads, neurons and channels are cut, in every layer alike. What is read has to give the
outputs that PyTorch gave before, to 1e-4 of the largest. Only the first way's process can import gsprune.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WAYS = {
    "own": "gsprune.load_pruned",
    "library": "the library alone",
    "export": "torch.export",
    "onnx": "ONNX",
    "openvino": "OpenVINO",
    "executorch": "ExecuTorch",
}
CLOSE = 1e-4
IDS = {"input_ids": torch.arange(16).reshape(2, 8) % 31}
PICTURE = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


# ---- the networks, as they are before


def hf(kind: str, **settings: Any) -> nn.Module:
    import transformers

    cls = getattr(transformers, kind)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    made: nn.Module = cls(cls.config_class(**{**sizes, **settings}))
    made.config.use_cache = False  # type: ignore[union-attr]
    return made


def words(kind: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: hf(kind, vocab_size=31, **settings)


def pictures(kind: str) -> Callable[[], nn.Module]:
    return lambda: hf(kind, image_size=32, patch_size=8)


def from_timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        made: nn.Module = timm.create_model(name, num_classes=5, **settings)
        for parameter in made.parameters():
            if parameter.dim() > 1 and not parameter.any():  # a head that gives 0 until it is trained
                nn.init.normal_(parameter, std=0.1)
        return made

    return make


def from_torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        made: nn.Module = getattr(torchvision.models, name)(num_classes=5)
        return made

    return make


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 32), nn.ReLU(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 5))


def convnet() -> nn.Module:
    first = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(32, 5))


small_gpt = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 32}
small_bert = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
small_llama = {"num_key_value_heads": 2, "head_dim": 8}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "bert": (words("BertForSequenceClassification"), IDS),
    "distilbert": (words("DistilBertForSequenceClassification", **small_bert), IDS),
    "electra": (words("ElectraForSequenceClassification"), IDS),
    "roberta": (words("RobertaForSequenceClassification"), IDS),
    "gpt2": (words("GPT2LMHeadModel", **small_gpt), IDS),
    "llama": (words("LlamaForCausalLM", **small_llama), IDS),
    "mistral": (words("MistralForCausalLM", **small_llama), IDS),
    "qwen3": (words("Qwen3ForCausalLM", **small_llama), IDS),
    "vit-hf": (pictures("ViTForImageClassification"), {"pixel_values": PICTURE}),
    "deit-hf": (pictures("DeiTForImageClassification"), {"pixel_values": PICTURE}),
    "vit-timm": (
        from_timm("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3),
        PICTURE,
    ),
    "mixer": (from_timm("mixer_s16_224", img_size=32), PICTURE),
    "convnext": (from_timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), PICTURE),
    "mobilenetv3": (from_timm("mobilenetv3_small_050"), PICTURE),
    "resnet10t": (from_timm("resnet10t"), PICTURE),
    "resnet18": (from_torchvision("resnet18"), PICTURE),
    "mobilenet_v2": (from_torchvision("mobilenet_v2"), PICTURE),
    "shufflenet_v2": (from_torchvision("shufflenet_v2_x0_5"), PICTURE),
    "mlp": (mlp, PICTURE),
    "convnet": (convnet, PICTURE),
}


# ---- writing


def build(name: str, folder: Path, ways: list[str]) -> tuple[dict[str, str], float]:
    """Write a network by these ways; why one is not possible, and the share of its parameters that is left.

    What begins with "-" is no fault.
    """
    import gsprune
    from gsprune.criteria import Magnitude
    from gsprune.schedules import OneShot

    make, example = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    dense = sum(parameter.numel() for parameter in model.parameters())
    rule: dict[str, Any] = {"target_sparsity": 0.5, "schedule": OneShot(), "scope": "local"}
    pruner = gsprune.Pruner(model, Magnitude(), structured=True, example_input=example, **rule)
    pruner.on_step_begin(0)
    pruner.on_train_end()
    model.eval()
    folder.mkdir(parents=True)
    with torch.no_grad():
        torch.save((example, first(called(model, example))), folder / "expected.pt")
    writers: dict[str, Callable[[], object]] = {
        "own": lambda: gsprune.save_pruned(folder / "own", model, pruner.plan),
        "library": lambda: by_library(model, pruner.plan, example, folder / "library"),
        "export": lambda: torch.export.save(gsprune.export.to_exported_program(model, example), folder / "program.pt2"),
        "onnx": lambda: gsprune.export.to_onnx(model, example, folder / "network.onnx"),
        "openvino": lambda: gsprune.export.to_openvino(model, example, folder / "network.xml"),
        "executorch": lambda: gsprune.export.to_executorch(model, example, folder / "network.pte"),
    }
    missing = {}
    for way in ways:
        try:
            writers[way]()
        except Exception as error:
            missing[way] = str(error).splitlines()[0] or type(error).__name__
    return missing, sum(parameter.numel() for parameter in model.parameters()) / dense


def by_library(model: nn.Module, plan: Any, example: Any, folder: Path) -> None:
    from gsprune.integrations import pretrained

    if hasattr(model, "save_pretrained"):
        plain = pretrained.save_pretrained(folder, model, plan, example_input=example)
    elif hasattr(model, "pretrained_cfg"):
        from gsprune.integrations import timm

        plain = timm.save_pretrained(folder, model, plan, example_input=example)
    else:
        raise ValueError("- the library has no files of its own")
    if not plain:
        raise ValueError("- its arguments cannot say what is left: its folder is read with gsprune")


# ---- reading, in a fresh process


def check(way: str, folder: Path, names: list[str]) -> None:
    """Print what each network of a way differs by, as JSON; of one that cannot be read why."""
    if way != "own":
        sys.modules["gsprune"] = None  # type: ignore[assignment]
    found: dict[str, Any] = {}
    for name in names:
        example, wanted = torch.load(folder / name / "expected.pt")
        try:
            with torch.no_grad():
                given = READERS[way](name, folder / name, example)
            found[name] = float((given - wanted).abs().max() / wanted.abs().max())
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    print(json.dumps(found))


def read_own(name: str, folder: Path, example: Any) -> Tensor:
    import gsprune

    return first(called(gsprune.load_pruned(folder / "own", NETWORKS[name][0]()), example))


def read_library(name: str, folder: Path, example: Any) -> Tensor:
    config = json.loads((folder / "library" / "config.json").read_text())
    if "architecture" in config:
        import timm

        model: nn.Module = timm.create_model(f"local-dir:{folder / 'library'}", pretrained=True)
    else:
        import transformers

        kind = getattr(transformers, config["architectures"][0])
        model = kind.from_pretrained(folder / "library", local_files_only=True)
    return first(called(model.eval(), example))


def read_export(name: str, folder: Path, example: Any) -> Tensor:
    if isinstance(example, dict):  # the program returns a class of transformers, which has to be known
        import transformers.modeling_outputs  # noqa: F401
    return first(called(torch.export.load(folder / "program.pt2").module(), example))


def read_onnx(name: str, folder: Path, example: Any) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "network.onnx")
    (given,) = session.get_inputs()
    return torch.from_numpy(session.run(None, {given.name: only(example).numpy()})[0])


def read_openvino(name: str, folder: Path, example: Any) -> Tensor:
    import openvino

    compiled = openvino.compile_model(folder / "network.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled([only(example).numpy()])[0].copy())


def read_executorch(name: str, folder: Path, example: Any) -> Tensor:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(folder / "network.pte").load_method("forward")
    return torch.as_tensor(method.execute([only(example)])[0]).clone()


READERS = {
    "own": read_own, "library": read_library, "export": read_export,
    "onnx": read_onnx, "openvino": read_openvino, "executorch": read_executorch,
}  # fmt: skip


def called(model: Callable[..., Any], example: Any) -> Any:
    return model(**example) if isinstance(example, dict) else model(example)


def first(outputs: Any) -> Tensor:
    """The first tensor of what a network returns."""
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return outputs if isinstance(outputs, Tensor) else next(value for value in values if isinstance(value, Tensor))


def only(example: Any) -> Tensor:
    (tensor,) = example.values() if isinstance(example, dict) else (example,)
    return tensor


# ---- the table


def table(found: dict[str, dict[str, Any]], left: dict[str, float], ways: list[str]) -> str:
    lines = [f"| network | parameters left | {' | '.join(WAYS[way] for way in ways)} |", "|---" * (len(ways) + 2) + "|"]
    for name, row in found.items():
        cells = [cell(row[way]) for way in ways]
        lines.append(f"| {name} | {100 * left[name]:.0f} % | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(value: Any) -> str:
    """
    >>> cell(3e-6), cell(0.2), cell("- no files"), cell("fault")
    ('yes', 'differs', '-', 'no')
    """
    if isinstance(value, str):
        return "-" if value.startswith("-") else "no"
    return "yes" if value <= CLOSE else "differs"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--ways", default=",".join(WAYS), help="some of them, separated by commas")
    parser.add_argument("--check", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    names = given.names or list(NETWORKS)
    if given.check:
        check(given.check[0], Path(given.check[1]), names)
        return 0
    ways = given.ways.split(",")
    found: dict[str, dict[str, Any]] = {}
    left: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="ways-") as folder:
        for name in names:
            found[name], left[name] = build(name, Path(folder, name), ways)
            print(f"{name}: written", file=sys.stderr)
        for way in ways:
            some = [name for name in names if way not in found[name]]
            command = [sys.executable, __file__, "--check", way, folder, *some]
            done = subprocess.run(command, capture_output=True, text=True, check=False) if some else None
            if done is not None and done.returncode:
                raise RuntimeError(done.stderr)
            for name, value in json.loads(done.stdout.splitlines()[-1] if done else "{}").items():
                found[name][way] = value
    print(table(found, left, ways))
    for name in names:
        for way in ways:
            if cell(found[name][way]) != "yes":
                print(f"{name}, {WAYS[way]}: {found[name][way]}")
    return int(any(cell(found[name][way]) in ("no", "differs") for name in names for way in ways))


if __name__ == "__main__":
    sys.exit(main())
