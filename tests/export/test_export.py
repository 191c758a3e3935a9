"""Exported networks compute what PyTorch does, for any batch size; what cannot be exported leaves nothing behind."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from facts import refused
from torch import Tensor, nn

from gsprune import Pruner
from gsprune.criteria import Abs, Criterion, Elementwise
from gsprune.discovery.find import find_structures
from gsprune.export import onnx_file, to_exported_program, to_onnx
from gsprune.formats.network import save_pruned
from gsprune.schedules import OneShot
from gsprune.surgery.shrink import shrink
from gsprune.zoo.models import convnet, vit_tiny

SHAPE = {"image_size": 8, "in_channels": 1, "num_classes": 10}


@pytest.fixture
def onnx() -> Any:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnx")


def digits(batch: int = 4) -> Tensor:
    return torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def pruned(model: nn.Module, criterion: Criterion, x: Tensor) -> Pruner:
    """`model` with half of what the criterion scores gone, after two steps."""
    pruner = Pruner(
        model, criterion, target_sparsity=0.5, example_input=x, schedule=OneShot(), steps_per_epoch=1, epochs=2
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner.attach(optimizer)
    for _ in range(2):
        F.cross_entropy(model(x), torch.arange(len(x)) % 10).backward()
        optimizer.step()
        optimizer.zero_grad()
    pruner.finish()
    return pruner


def small_convnet() -> nn.Module:
    torch.manual_seed(0)
    model = convnet(**SHAPE)
    pruned(model, Abs(), digits())
    assert model.stem.out_channels == 16
    return model


def zeroed_convnet() -> nn.Module:
    torch.manual_seed(0)
    model = convnet(**SHAPE, width=8)
    pruned(model, Elementwise(), digits())
    return model


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    model = vit_tiny(**SHAPE)
    pruned(model, Abs(), digits())
    return model


class Two(nn.Module):
    """Keyword arguments in another order than the example's, a constant, and two named outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor, weights: Tensor, scale: float = 1.0, note: str | None = None) -> dict[str, Any]:
        x = self.embed(tokens) * weights[..., None] * scale
        return {"logits": self.head(x.mean(1)), "nothing": None, "best": x.argmax(-1)}


class Branch(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else -super().forward(x)


class Fixed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(2, -1))


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5))


class Inverse(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svd(super().forward(x))[1]


def two() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    example = {"weights": torch.rand(2, 5), "tokens": torch.randint(7, (2, 5)), "note": "x", "scale": 2.0}
    return Two(), example


def session(path: Path) -> Any:
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def axes(values: Any) -> dict[str, list[str | int]]:
    return {value.name: list(value.shape) for value in values}


# ---- torch.export


@pytest.mark.parametrize("build", [small_convnet, zeroed_convnet, small_vit])
def test_a_program_takes_any_batch(build: Callable[[], nn.Module]) -> None:
    model = build()
    program = to_exported_program(model, digits(1)).module()
    for batch in (1, 2, 5):
        x = digits(batch)
        torch.testing.assert_close(program(x), model.eval()(x))


def test_a_program_can_be_saved_and_read_again(tmp_path: Path) -> None:
    model, example = two()
    torch.export.save(to_exported_program(model, example), tmp_path / "two.pt2")
    program = torch.export.load(tmp_path / "two.pt2").module()
    larger = example | {"weights": torch.rand(6, 5), "tokens": torch.randint(7, (6, 5))}
    given, wanted = program(**larger), model(**larger)
    assert list(given) == ["logits", "nothing", "best"]
    torch.testing.assert_close(given["logits"], wanted["logits"])
    assert torch.equal(given["best"], wanted["best"])


def test_the_model_is_as_it_was() -> None:
    model = convnet(**SHAPE)
    model.block.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes, parameters = [m.training for m in model.modules()], list(model.parameters())
    fast = torch.backends.mha.get_fastpath_enabled()
    program = to_exported_program(model, digits())
    assert [m.training for m in model.modules()] == modes
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled() == fast
    model.head.weight.data.zero_()
    assert program.state_dict["head.weight"].abs().sum() > 0  # a copy


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (
            Branch(4, 2),
            torch.ones(2, 4),
            r"Branch cannot be exported: its forward takes another way depending on the values of a tensor "
            r"\(test_export.py, line \d+\)",
        ),
        (
            Fixed(4, 2),
            torch.ones(2, 4),
            "Fixed cannot be exported: its forward does not work alike for every batch size",
        ),
        (
            nn.Linear(4, 2),
            torch.ones(2, 3),
            r"Linear does not run on the example input as a batch of 2: "
            r"(addmm: )?mat1 and mat2 shapes cannot be multiplied \(2x3 and 4x2\)",  # torch's own words
        ),
        (nn.Linear(4, 2), torch.ones(0, 4), "the example input is an empty batch: it must hold 1 sample or more"),
        (nn.Linear(4, 2), {"input": 3}, "the example input has no tensor with a batch dimension"),
        (nn.DataParallel(nn.Linear(4, 2)), torch.ones(2, 4), r"DataParallel is a wrapper, pass .*"),
    ],
)
def test_what_cannot_be_exported_says_why_in_one_sentence(
    model: nn.Module, example: Any, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        to_exported_program(model, example)
    assert capfd.readouterr() == ("", "")


# ---- ONNX


@pytest.mark.slow
@pytest.mark.parametrize("build", [small_convnet, zeroed_convnet, small_vit])
def test_a_file_gives_what_pytorch_does_for_any_batch(
    build: Callable[[], nn.Module], tmp_path: Path, onnx: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    model, path = build().train(), tmp_path / "new" / "net.onnx"
    assert to_onnx(model, digits(1), path) < 1e-5
    assert model.training
    assert [p.name for p in path.parent.iterdir()] == ["net.onnx"]
    net = session(path)
    assert axes(net.get_inputs()) == {"x": ["batch", 1, 8, 8]}
    assert axes(net.get_outputs()) == {"output": ["batch", 10]}
    model.eval()
    for batch in (1, 2, 7):
        x = digits(batch)
        torch.testing.assert_close(torch.from_numpy(net.run(None, {"x": x.numpy()})[0]), model(x), rtol=1e-4, atol=1e-5)
    assert str(Path(__file__).parents[2]).encode() not in path.read_bytes()  # no paths of this machine
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_zeros_stay_zeros(tmp_path: Path, onnx: Any) -> None:
    model = zeroed_convnet()
    to_onnx(model, digits(), tmp_path / "net.onnx")
    weights = [onnx.numpy_helper.to_array(w) for w in onnx.load(tmp_path / "net.onnx").graph.initializer]
    given = sorted(int((w == 0).sum()) for w in weights if w.ndim > 1)
    wanted = sorted(int((w == 0).sum()) for w in model.parameters() if w.dim() > 1)
    assert given == wanted
    assert sum(wanted) > 1000


@pytest.mark.slow
def test_named_inputs_and_outputs(tmp_path: Path, onnx: Any, capfd: pytest.CaptureFixture[str]) -> None:
    model, example = two()
    path = tmp_path / "two.onnx"
    to_onnx(model, example, path, opset=18)
    assert capfd.readouterr() == ("", "")
    assert onnx.load(path).opset_import[0].version == 18
    net = session(path)
    assert list(axes(net.get_inputs()).items()) == [("tokens", ["batch", 5]), ("weights", ["batch", 5])]
    assert axes(net.get_outputs()) == {"logits": ["batch", 3], "best": ["batch", 5]}
    tokens, weights = torch.randint(7, (9, 5)), torch.rand(9, 5)
    logits, best = net.run(None, {"tokens": tokens.numpy(), "weights": weights.numpy()})
    wanted = model(tokens, weights, 2.0)
    torch.testing.assert_close(torch.from_numpy(logits), wanted["logits"])
    assert (best == wanted["best"].numpy()).all()


@pytest.mark.slow
def test_encoder_layers_with_padding(tmp_path: Path, onnx: Any) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    example = {"src": torch.randn(2, 5, 8), "src_key_padding_mask": torch.arange(5) >= torch.tensor([[5], [3]])}
    model = nn.TransformerEncoder(layer, 1).requires_grad_(False)
    assert to_onnx(model, example, tmp_path / "encoder.onnx") < 1e-5


@pytest.mark.slow
def test_bert_shrunk(tmp_path: Path, onnx: Any, capfd: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=4, intermediate_size=16, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config).eval()
    example = {"attention_mask": torch.ones(2, 6, dtype=torch.long), "input_ids": torch.randint(20, (2, 6))}
    found = find_structures(model, example).structures
    assert {s.kind for s in found} == {"heads", "neurons", "residual"}
    found = [s for s in found if s.kind != "residual"]
    shrink(model, found, [torch.arange(s.units) % 2 == 0 for s in found], example_input=example)
    capfd.readouterr()
    assert to_onnx(model, example, tmp_path / "bert.onnx") < 1e-5
    assert capfd.readouterr() == ("", "")
    net = session(tmp_path / "bert.onnx")
    assert axes(net.get_inputs()) == {"input_ids": ["batch", 6], "attention_mask": ["batch", 6]}
    assert axes(net.get_outputs()) == {"logits": ["batch", 3]}
    padded = {"input_ids": torch.randint(20, (3, 6)), "attention_mask": torch.arange(6) < torch.tensor([[6], [2], [4]])}
    padded["attention_mask"] = padded["attention_mask"].long()
    (given,) = net.run(None, {name: tensor.numpy() for name, tensor in padded.items()})
    torch.testing.assert_close(torch.from_numpy(given), model(**padded).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_decoder_leaves_without_its_cache(tmp_path: Path, onnx: Any) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 16}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model, tokens = transformers.LlamaForCausalLM(config).eval(), torch.randint(20, (2, 6))
    assert to_onnx(model, {"input_ids": tokens}, tmp_path / "llama.onnx") < 1e-5
    assert axes(session(tmp_path / "llama.onnx").get_outputs()) == {"logits": ["batch", 6, 20]}
    assert model.config.use_cache
    program = to_exported_program(model, {"input_ids": tokens}).module()
    torch.testing.assert_close(program(input_ids=tokens).logits, model(tokens).logits)


@pytest.mark.slow
def test_weights_too_large_for_one_file_lie_beside_it(
    tmp_path: Path, onnx: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = nn.Sequential(nn.Linear(64, 32), nn.ReLU()), tmp_path / "net.onnx"
    monkeypatch.setattr(onnx_file, "SINGLE_FILE", 1000)
    to_onnx(model, torch.ones(1, 64), path)
    first = sorted(p.name for p in tmp_path.iterdir())
    assert re.fullmatch(r"net\.onnx net\.onnx\.[0-9a-f]{8}\.data", " ".join(first))
    assert session(path).run(None, {"input": torch.ones(2, 64).numpy()})[0].shape == (2, 32)

    with refused("1e-15"):
        to_onnx(nn.Sequential(nn.Linear(64, 32), nn.Tanh()), torch.rand(1, 64), path, tolerance=1e-15)
    assert sorted(p.name for p in tmp_path.iterdir()) == first
    assert session(path).run(None, {"input": torch.ones(2, 64).numpy()})[0].min() == 0  # the older file, whole

    to_onnx(model, torch.ones(1, 64), path)
    second = sorted(p.name for p in tmp_path.iterdir())
    assert len(second) == 2
    assert second != first


@pytest.mark.slow
def test_a_file_that_disagrees_is_not_left(tmp_path: Path, onnx: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with refused("Noisy", "'output'", "0.0001"):
        to_onnx(Noisy(64, 8), torch.ones(4, 64), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Branch(4, 4), {}, "Branch cannot be exported: its forward takes another way"),
        (Inverse(4, 4), {}, "Inverse cannot be written as ONNX: No ONNX function found for .*svd"),
        (nn.Linear(4, 4), {"opset": 99}, r"Linear cannot be written with opset 99: torch gives opset \d+$"),
        (nn.Linear(4, 4).bfloat16(), {}, "onnxruntime cannot read Linear as ONNX: .*"),
        (nn.Linear(4, 4), {"tolerance": 0.0}, r"tolerance is 0\.0: it must be above 0$"),
    ],
)
def test_errors_leave_no_file(
    model: nn.Module, options: dict[str, Any], message: str, tmp_path: Path, onnx: Any
) -> None:
    example = torch.ones(3, 4, dtype=next(model.parameters()).dtype)
    with pytest.raises(ValueError, match=f"^{message}"):
        to_onnx(model, example, tmp_path / "net.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_shows_before_the_work(
    tmp_path: Path, onnx: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "to_onnx_program", lambda *_: pytest.fail("the work has begun"))
    with refused(tmp_path, "folder"):
        to_onnx(nn.Linear(4, 2), torch.ones(1, 4), tmp_path)
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "net.onnx"
    with refused(path, "File exists"):
        to_onnx(nn.Linear(4, 2), torch.ones(1, 4), path)


@pytest.mark.parametrize("name", ["onnx", "onnxruntime", "onnxscript"])
def test_without_the_extra(name: str, tmp_path: Path, onnx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with refused(name, "gsprune[onnx]"):
        to_onnx(nn.Linear(4, 2), torch.ones(1, 4), tmp_path / "net.onnx")


FRESH = """
import logging, sys, torch, gsprune
from gsprune.export import to_exported_program, to_onnx
from gsprune.zoo.models import convnet

logging.basicConfig(level=logging.INFO)  # where an application hears everybody
model = gsprune.load_pruned(sys.argv[1], convnet(image_size=8, in_channels=1, num_classes=10))
program = to_exported_program(model, torch.ones(1, 1, 8, 8))
torch.save(program.module()(torch.ones(3, 1, 8, 8)), sys.argv[1] + "/given.pt")
to_onnx(model, torch.ones(1, 1, 8, 8), sys.argv[2])
"""


@pytest.mark.slow
def test_a_loaded_model_is_exported_in_a_fresh_process(tmp_path: Path, onnx: Any) -> None:
    torch.manual_seed(0)
    model = convnet(**SHAPE)
    plan = pruned(model, Abs(), digits()).plan
    assert plan is not None
    save_pruned(tmp_path, model, plan)
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path), str(tmp_path / "net.onnx")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    x = torch.ones(3, 1, 8, 8)
    wanted = model.eval()(x)
    torch.testing.assert_close(torch.load(tmp_path / "given.pt", weights_only=True), wanted)
    given = torch.from_numpy(session(tmp_path / "net.onnx").run(None, {"x": x.numpy()})[0])
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)
