"""What is written to the disk comes back equal, and damaged or foreign files end in one sentence."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from facts import refused
from torch import Tensor, nn

import gsprune
from gsprune import Pruner
from gsprune.criteria import Magnitude
from gsprune.discovery.find import find_structures
from gsprune.files import disk
from gsprune.files.disk import json_data, read_json, write_atomic, write_json
from gsprune.formats.masks import load_masks, save_masks
from gsprune.formats.network import load_pruned, load_state, read_cut_plan, save_pruned
from gsprune.formats.scores import SavedScores, load_scores, save_scores
from gsprune.formats.tensors import state_tensors
from gsprune.schedules import OneShot
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.cut_plan import CutPlan, plan_cut
from gsprune.training.checkpoints import write_state

NOTHING = CutPlan(kept={}, sizes={}, attributes={})


class Net(nn.Module):
    def __init__(self, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 4, 3, padding=1)
        self.head = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(torch.relu(self.norm(self.conv1(x))))
        return self.head(x.mean((2, 3)))


def pictures() -> Tensor:
    return torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def shrunk_net() -> tuple[Net, CutPlan]:
    """A trained-looking net whose first convolution keeps channels 1, 2, 5 of 8."""
    torch.manual_seed(0)
    model = Net()
    model(pictures())  # running statistics that are not the initial ones
    structures = [s for s in find_structures(model, pictures()).structures if s.name == "conv1"]
    keep = torch.tensor([False, True, True, False, False, True, False, False])
    plan = plan_cut(structures, [keep])
    apply_cut(model, plan)
    return model.eval(), plan


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, plan = shrunk_net()
    save_pruned(tmp_path, model, plan, extra={"accuracy": 0.5})
    return tmp_path


# --- atomic writes -----------------------------------------------------------------------------------------


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"accuracy": 1})

    def write_half() -> None:
        with disk.aside(path) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert read_json(path) == {"accuracy": 1}
    assert os.listdir(tmp_path) == ["result.json"]


def test_a_write_is_flushed_before_and_after_its_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    flush, replace = disk._flush, os.replace
    monkeypatch.setattr(disk, "_flush", lambda path: (steps.append(f"flush {path.suffix}"), flush(path)))
    monkeypatch.setattr(os, "replace", lambda old, new: (steps.append("rename"), replace(old, new)))
    write_atomic(tmp_path / "new" / "a.bin", b"abc")
    assert (tmp_path / "new" / "a.bin").read_bytes() == b"abc"
    assert steps == ["flush .tmp", "rename", "flush "]


def test_json_is_valid_whatever_the_numbers(tmp_path: Path) -> None:
    values = {"nan": math.nan, "inf": -math.inf, "tensor": torch.tensor(2), "path": tmp_path, "pair": (1, None)}
    write_json(tmp_path / "a.json", values)
    text = (tmp_path / "a.json").read_text()
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read == {"nan": "NaN", "inf": "-Infinity", "tensor": 2, "path": str(tmp_path), "pair": [1, None]}
    with refused("set", "JSON", error=TypeError):
        json_data({1})


# --- masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (8,), (13,), (3, 5), (4, 3, 3, 3), (0, 7)])
def test_masks_come_back_equal(tmp_path: Path, shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    save_masks(tmp_path / "masks" / "a.safetensors", {"w": mask, "all": torch.ones(9, dtype=torch.bool)})
    back = load_masks(tmp_path / "masks" / "a.safetensors")
    assert list(back) == ["w", "all"]  # in the order they were given
    assert back["w"].dtype == torch.bool
    assert back["w"].shape == mask.shape
    assert torch.equal(back["w"], mask)


def test_masks_of_a_view_and_no_masks_at_all(tmp_path: Path) -> None:
    mask = torch.tensor([[True, False, False], [True, True, False]])
    save_masks(tmp_path / "a", {"t": mask.t()})
    assert load_masks(tmp_path / "a")["t"].tolist() == [[True, True], [False, True], [False, False]]
    save_masks(tmp_path / "a", {})
    assert load_masks(tmp_path / "a") == {}


def test_a_mask_takes_one_bit_a_weight(tmp_path: Path) -> None:
    save_masks(tmp_path / "a", {"w": torch.ones(1000, 80, dtype=torch.bool)})
    assert 10_000 < (tmp_path / "a").stat().st_size < 10_300


def test_equal_tensors_are_equal_files_that_others_may_read(tmp_path: Path) -> None:
    """safetensors writes metadata in an order that changes, and files for their owner alone."""
    before = os.umask(0o022)
    try:
        for number in range(8):
            save_masks(tmp_path / f"{number}", {"w": torch.tensor([True]), 'b"': torch.tensor([[False]])})
            write_state(tmp_path / f"state-{number}", {"w": torch.ones(2)})
    finally:
        os.umask(before)
    assert len({(tmp_path / f"{number}").read_bytes() for number in range(8)}) == 1
    assert len({(tmp_path / f"state-{number}" / "state.safetensors").read_bytes() for number in range(8)}) == 1
    if os.name == "posix":
        written = [tmp_path / "0", *(tmp_path / "state-0").iterdir()]
        assert {path.stat().st_mode & 0o777 for path in written} == {0o644}
    assert load_masks(tmp_path / "0")['b"'].tolist() == [[False]]


def test_masks_are_bool(tmp_path: Path) -> None:
    with refused("'w'", "torch.float32", "torch.bool"):
        save_masks(tmp_path / "a", {"w": torch.ones(3)})


def damage_cases() -> list[tuple[str, object, str]]:
    huge = {"w": {"dtype": "U8", "shape": [2**60], "data_offsets": [0, 2**60]}}
    return [
        ("empty", lambda data: b"", "is not a safetensors file"),
        ("text", lambda data: b"a,b,c\n1,2,3\n" * 9, "is not a safetensors file"),
        ("pickle", lambda data: pickle.dumps({"w": 1}), "is not a safetensors file"),
        ("half a header", lambda data: data[:40], "is truncated: its header has"),
        ("no data", lambda data: data[:-1], "is truncated: "),
        ("more data", lambda data: data + b"\0", "is a damaged safetensors file"),
        ("huge", lambda data: framed(huge), "is truncated: 11529215"),
        ("nested", lambda data: framed(None, b"{" + b'"a":[' * 100_000), "its header cannot be read"),
        ("offsets", lambda data: framed({"w": {"dtype": "U8", "shape": [1], "data_offsets": 3}}), "cannot be read"),
        ("another format", lambda data: framed({}), "but not of the format 'gsprune-masks'"),
        ("later version", lambda data: data.replace(b'"version":"1"', b'"version":"9"'), "has format version '9'"),
        ("shape", lambda data: data.replace(b"[3,5]", b"[3,6]").replace(b"[3, 5]", b"[3, 6]"), "needs 3 bytes"),
        ("sign", lambda data: data.replace(b"[3, 5]", b"[3,-5]"), "impossible shape"),
        ("overflow", lambda data: data.replace(b"[3, 5]", b"[9e9] "), "impossible shape"),
        ("bits", lambda data: data[:-1] + b"\xff", "has bits set beyond its last element"),
    ]


def framed(table: object, text: bytes | None = None) -> bytes:
    header = json.dumps(table).encode() if text is None else text
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(("name", "change", "sentence"), damage_cases(), ids=lambda value: str(value)[:20])
def test_damaged_masks_end_in_one_sentence(tmp_path: Path, name: str, change: object, sentence: str) -> None:
    path = tmp_path / "masks.safetensors"
    save_masks(path, {"w": torch.ones(3, 5, dtype=torch.bool)})
    data = change(path.read_bytes())
    if name in ("shape", "sign", "overflow", "later version"):
        assert data != path.read_bytes(), "the test's own change did nothing"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=sentence) as caught:
        load_masks(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="masks does not exist"):
        load_masks(tmp_path / "masks")


# --- scores ------------------------------------------------------------------------------------------------


def save_some(path: Path) -> bytes:
    save_scores(path, {"w": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2)}, criterion="Weighted", steps=90)
    return path.read_bytes()


def test_scores_come_back_equal_with_where_they_are_from(tmp_path: Path) -> None:
    grid = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    flat = torch.arange(10.0)
    given = {"conv": grid, "part": flat[2:5], "same": flat[2:5], "none": torch.zeros(0, 3)}
    save_scores(tmp_path / "new" / "scores.safetensors", given, criterion="Elementwise", steps=0)
    back = load_scores(tmp_path / "new" / "scores.safetensors")
    assert isinstance(back, SavedScores)
    assert (back.criterion, back.steps, set(back.scores)) == ("Elementwise", 0, set(given))
    assert all(torch.equal(back.scores[name], score) for name, score in given.items())
    assert {score.dtype for score in back.scores.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("scores", "criterion", "steps", "sentence"),
    [
        ([1.0, math.inf], "Abs", 1, "score 'w' holds a value that is not finite"),
        ([1.0, math.nan], "Abs", 1, "score 'w' holds a value that is not finite"),
        ([1, 2], "Abs", 1, "score 'w' is torch.int64, but scores are torch.float32"),
        ([1.0], "Abs(decay=1)", 1, "the scores to be saved: the criterion is 'Abs(decay=1)': it must be the name of a"),
        ([1.0], "Abs", -1, "the scores to be saved: the number of steps is '-1': it must be 0 or more"),
    ],
)
def test_scores_that_cannot_be_are_not_saved(
    tmp_path: Path, scores: list[float], criterion: str, steps: int, sentence: str
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the sentence is compared
        save_scores(tmp_path / "a", {"w": torch.tensor(scores)}, criterion=criterion, steps=steps)
    assert str(caught.value).startswith(sentence)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda data: b"", "is not a safetensors file"),
        (lambda data: pickle.dumps({"w": 1}), "is not a safetensors file"),
        (lambda data: data[:40], "is truncated: its header has"),
        (lambda data: data[:-1], "is truncated: "),
        (lambda data: data + b"\0", "is a damaged safetensors file"),
        (lambda data: data.replace(b"gsprune-scores", b"gsprune-masks!"), "but not of the format 'gsprune-scores'"),
        (lambda data: data.replace(b'"version":"1"', b'"version":"9"'), "has format version '9', this gsprune reads 1"),
        (lambda data: data.replace(b'"F32"', b'"I32"'), "score 'a' is I32, but scores are F32"),
        (
            lambda data: data.replace(b"Weighted", b"Wei(hted"),
            "the criterion is 'Wei(hted': it must be the name of a c",
        ),
        (lambda data: data.replace(b'"criterion"', b'"Criterion"'), "the criterion is '': it must be the name of a cl"),
        (lambda data: data.replace(b'"90"', b'"-9"'), "the number of steps is '-9': it must be 0 or more"),
        (lambda data: framed(EMPTY | {"w": entry([2**62, 0])}), r"score 'w' .* impossible shape|damaged"),
        (lambda data: framed(EMPTY | {"w": entry([0, 2**62, 2**62])}), r"score 'w' .* impossible shape|damaged"),
        (lambda data: framed(EMPTY | {"w": {**entry([2**50]), "data_offsets": [0, 2**52]}}), "is truncated: 45035996"),
    ],
)
def test_damaged_scores_end_in_one_sentence(tmp_path: Path, change: Callable[[bytes], bytes], sentence: str) -> None:
    path = tmp_path / "scores.safetensors"
    data = save_some(path)
    assert change(data) != data, "the test's own change did nothing"
    path.write_bytes(change(data))
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")) as caught:
        load_scores(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


EMPTY = {"__metadata__": {"format": "gsprune-scores", "version": "1", "criterion": "Abs", "steps": "1"}}


def entry(shape: list[int]) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}


def test_any_changed_byte_gives_scores_or_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    data = save_some(path)
    header = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    for place in range(header):
        for value in b'\0"9{\xff':
            path.write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
            try:
                load_scores(path)
            except ValueError as error:
                refused += "\n" not in str(error)
    assert 4 * header < refused < 5 * header


def test_masks_are_no_scores_and_a_missing_file_says_so(tmp_path: Path) -> None:
    save_masks(tmp_path / "masks", {"w": torch.ones(9, dtype=torch.bool)})
    with refused("masks", "'gsprune-scores'"):
        load_scores(tmp_path / "masks")
    with pytest.raises(ValueError, match=r"nowhere does not exist$"):
        load_scores(tmp_path / "nowhere")


# --- the smaller model -------------------------------------------------------------------------------------


def test_a_shrunk_model_comes_back_equal(saved: Path) -> None:
    model, _ = shrunk_net()
    torch.manual_seed(99)
    back = gsprune.load_pruned(saved, Net().train())
    assert back.conv1.weight.shape == (3, 1, 3, 3)
    assert (back.conv1.out_channels, back.norm.num_features, back.conv2.in_channels) == (3, 3, 3)
    assert not back.training
    assert torch.equal(back(pictures()), model(pictures()))
    assert read_json(saved / "pruning.json")["extra"] == {"accuracy": 0.5}


def test_an_elementwise_pruned_model_comes_back_equal(tmp_path: Path) -> None:
    model = Net().eval()
    with torch.no_grad():
        model.conv1.weight[::2] = 0
    save_pruned(tmp_path, model, NOTHING)
    back = load_pruned(tmp_path, Net())
    assert torch.equal(back(pictures()), model(pictures()))
    assert int((back.conv1.weight == 0).sum()) == 4 * 9


@pytest.mark.slow
def test_a_fresh_process_reads_the_same_outputs(saved: Path) -> None:
    code = (
        "import gsprune, sys, torch; sys.path[:0] = sys.argv[1], sys.argv[3]; from test_formats import Net, pictures\n"
        "torch.save(gsprune.load_pruned(sys.argv[2], Net())(pictures()).detach(), sys.argv[2] + '/outputs.pt')"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(saved), str(Path(__file__).parents[1])], check=True
    )
    model, _ = shrunk_net()
    assert torch.equal(torch.load(saved / "outputs.pt", weights_only=True), model(pictures()))


def test_nothing_is_unpickled(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a pickle was read")

    for place, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(place, name, refuse)
    model, _ = shrunk_net()
    assert torch.equal(load_pruned(saved, Net())(pictures()), model(pictures()))


def test_tied_views_and_compiled_models_are_saved_once_and_come_back(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(6, 4)
            self.out = nn.Linear(4, 6, bias=False)
            self.out.weight = self.embed.weight
            self.register_buffer("part", torch.arange(10.0)[2:5])

    model = Tied()
    compiled = nn.Module()  # torch.compile wraps a model like this; the real one takes 10 s to import
    compiled._orig_mod = model
    tensors, ties = state_tensors(compiled)
    assert sorted(tensors) == ["embed.weight", "part"]
    assert ties == {"out.weight": "embed.weight"}
    save_pruned(tmp_path, model, NOTHING)
    back = load_pruned(tmp_path, Tied())
    assert back.out.weight is back.embed.weight
    assert torch.equal(back.embed.weight, model.embed.weight)
    assert back.part.tolist() == [2, 3, 4]


def test_low_precision_and_channels_last_come_back(tmp_path: Path) -> None:
    model = Net().to(torch.bfloat16).to(memory_format=torch.channels_last)
    save_pruned(tmp_path, model, NOTHING)
    back = load_pruned(tmp_path, Net().to(torch.bfloat16))
    assert torch.equal(back.conv2.weight, model.conv2.weight)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda: Net(classes=4), r"'head.weight' has shape \[4, 4\] in the model but \[3, 4\] in the file"),
        (lambda: Net(width=16), r"'conv1.weight' has shape \[16, 1, 3, 3\] .* from one with 8 in dimension 0"),
        (lambda: nn.Linear(4, 3), "it has no tensor 'conv1.weight'; the nearest is 'weight'"),
        (lambda: nn.ModuleDict({"conv1": nn.Conv2d(1, 8, 3)}), "it has no tensor 'conv2.weight'"),
    ],
)
def test_another_architecture_is_named_and_left_alone(saved: Path, model: object, sentence: str) -> None:
    model = model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"the model does not fit the file: .*{sentence}"):
        load_pruned(saved, model)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.training


def test_a_tensor_that_the_file_lacks_is_named(saved: Path) -> None:
    model = Net()
    model.extra = nn.Linear(1, 1)
    with refused("'extra.weight'", "model.safetensors"):
        load_pruned(saved, model)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda r: r["plan"]["tensors"]["conv1.weight"]["0"].update(kept=[0, 2, 5]),
            "was edited, or it does not belong",
        ),
        (lambda r: r["shapes"].update(head=[1]), "was edited"),
        (lambda r: r["plan"]["attributes"].update({"conv1.out_channels": 1}), "was edited"),
        (lambda r: r.update(format="yaml"), "is not the record of a pruned model"),
        (lambda r: r.update(version=2), "has format version 2, this gsprune reads 1"),
        (lambda r: r.pop("plan"), "lacks plan"),
        (lambda r: r.update(ties=["a"]), "'ties' must map names to names"),
    ],
)
def test_an_edited_record_is_refused(saved: Path, change: object, sentence: str) -> None:
    record = read_json(saved / "pruning.json")
    change(record)
    write_json(saved / "pruning.json", record)
    with pytest.raises(ValueError, match=f"pruning.json.*{sentence}"):
        load_pruned(saved, Net())


def test_an_attribute_that_is_not_a_size_is_refused(tmp_path: Path) -> None:
    save_pruned(tmp_path, Net(), CutPlan(kept={}, sizes={}, attributes={"conv1.training": 1}))
    with refused("conv1.training", "1", "True"):
        load_pruned(tmp_path, Net())


def test_files_of_two_runs_are_not_mixed(saved: Path, tmp_path: Path) -> None:
    save_pruned(tmp_path / "other", Net(), NOTHING)
    os.replace(tmp_path / "other" / "pruning.json", saved / "pruning.json")
    with refused("pruning.json", "model.safetensors"):
        load_pruned(saved, Net())


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff"])
def test_a_record_that_is_not_json_is_refused(saved: Path, text: str) -> None:
    (saved / "pruning.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"pruning.json is not valid JSON") as caught:
        load_pruned(saved, Net())
    assert len(str(caught.value)) < 400


def test_truncated_weights_and_missing_files_are_refused(saved: Path) -> None:
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated"):
        load_pruned(saved, Net())
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model.safetensors does not exist"):
        load_pruned(saved, Net())
    with pytest.raises(ValueError, match=r"pruning.json does not exist"):
        load_pruned(saved / "nowhere", Net())


def test_weights_that_were_changed_are_refused(saved: Path) -> None:
    data = bytearray((saved / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (saved / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"model.safetensors was changed after it was saved$"):
        load_pruned(saved, Net())


def encoder(heads: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, heads, 16, batch_first=True), 1)


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_an_attention_cut_in_other_heads_is_another_architecture(kind: str, tmp_path: Path) -> None:
    """All its tensors have the same shapes."""
    model, x = encoder(4), torch.randn(2, 3, 32)
    pruner = Pruner(
        model, Magnitude(), structured=True, kinds=[kind], target_sparsity=0.5, schedule=OneShot(), example_input=x
    )
    pruner.on_step_begin(0)
    pruner.on_train_end()
    save_pruned(tmp_path, model.eval(), pruner.plan)
    other = encoder(8)
    before = copy.deepcopy(other.state_dict())
    facts = {
        "heads": ["layers.0.self_attn.head_dim", "4 here", "8 in the file"],
        "neurons": ["layers.0.self_attn.num_heads", "8 here", "4 in the file"],
    }
    with refused(*facts[kind]):
        load_pruned(tmp_path, other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    assert torch.equal(load_pruned(tmp_path, encoder(4))(x), model(x))


def test_a_convolution_with_another_stride_is_another_architecture(tmp_path: Path) -> None:
    save_pruned(tmp_path, nn.Conv2d(1, 2, 3, stride=2), None)
    with refused("stride", "[1, 1] here", "[2, 2] in the file"):
        load_pruned(tmp_path, nn.Conv2d(1, 2, 3))


def test_a_model_that_cannot_take_weights_is_refused(saved: Path) -> None:
    with refused("meta device"):
        load_pruned(saved, Net().to("meta"))
    with refused("OptimizedModule"):
        load_pruned(saved, torch.compile(Net()))
    with pytest.raises(ValueError, match=r"model.safetensors.*does not exist$|is not a folder$|Not a directory"):
        load_pruned(saved / "model.safetensors", Net())


def test_a_model_pruned_twice_is_rebuilt_from_the_dense_one(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32)

    def prune(model: nn.Module) -> CutPlan:
        settings = {"target_sparsity": 0.5, "schedule": OneShot(), "example_input": x}
        pruner = Pruner(model, Magnitude(), structured=True, **settings)
        pruner.on_step_begin(0)
        pruner.on_train_end()
        assert pruner.plan is not None
        return pruner.plan

    model = encoder(4).eval()
    save_pruned(tmp_path / "first", model, prune(model))
    again = load_pruned(tmp_path / "first", encoder(4))
    second = prune(again)
    save_pruned(tmp_path / "second", again, second.after(read_cut_plan(tmp_path / "first")))
    rebuilt = load_pruned(tmp_path / "second", encoder(4))
    assert (rebuilt.layers[0].self_attn.num_heads, rebuilt.layers[0].linear1.out_features) == (1, 4)
    assert torch.equal(rebuilt(x), again(x))
    with refused("dimension", "second plan"):
        second.after(second)


def test_a_header_that_would_take_a_gigabyte_in_memory_is_not_read(tmp_path, monkeypatch):
    save_masks(tmp_path / "masks.safetensors", {"w": torch.ones(3, dtype=torch.bool)})
    monkeypatch.setattr("gsprune.formats.tensors.MAX_HEADER", 50)
    with pytest.raises(ValueError, match=r"masks.safetensors is not a safetensors file$"):
        load_masks(tmp_path / "masks.safetensors")


class Versioned(nn.Linear):
    """Asks for the version of its format, as torchvision's MNASNet and BatchNorm do."""

    _version = 3

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        self.loaded_as = metadata.get("version")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_the_version_of_a_layers_format_travels_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Versioned(4, 2), nn.BatchNorm1d(2))
    save_pruned(tmp_path, model, None)
    monkeypatch.setattr(Versioned, "_version", 4)  # the class has moved on since then
    again = load_pruned(tmp_path, nn.Sequential(Versioned(4, 2), nn.BatchNorm1d(2)))
    assert again[0].loaded_as == 3
    assert torch.equal(again[0].weight, model[0].weight)
    other = nn.Sequential(Versioned(4, 2), nn.BatchNorm1d(2))
    load_state(other, *state_tensors(model))
    assert other[0].loaded_as == 4
    assert torch.equal(other[0].weight, model[0].weight)


@pytest.mark.parametrize("versions", [["0"], {"0": "3"}, {"0": True}])
def test_versions_that_are_none_are_refused(tmp_path: Path, versions: object) -> None:
    save_pruned(tmp_path, nn.Linear(4, 2), None)
    record = json.loads((tmp_path / "pruning.json").read_text())
    (tmp_path / "pruning.json").write_text(json.dumps({**record, "versions": versions}))
    with pytest.raises(ValueError, match="versions"):
        load_pruned(tmp_path, nn.Linear(4, 2))
