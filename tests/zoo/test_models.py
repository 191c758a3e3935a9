"""The reference networks: shapes, sizes, what they promise to the pruner, and their errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from facts import refused
from torch import Tensor, nn

from gsprune.zoo import models

BUILDERS = [
    models.lenet_300_100,
    models.convnet,
    models.vit_tiny,
    models.resnet18,
    models.resnet50,
    models.mobilenet_v3_small,
]


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 1), (32, 3)])
def test_forward_backward_on_every_shape(build: Any, size: int, channels: int) -> None:
    torch.manual_seed(0)
    model = build(image_size=size, in_channels=channels, num_classes=7)
    out = model(torch.randn(2, channels, size, size))
    assert out.shape == (2, 7)
    out.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("size", [64, 96, 224])
def test_large_pictures(build: Any, size: int) -> None:
    with torch.device("meta"):  # shapes alone
        out = build(image_size=size, in_channels=4, num_classes=3).eval()(torch.empty(1, 4, size, size))
    assert out.shape == (1, 3)


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_no_dropout_by_default(build: Any) -> None:
    with torch.device("meta"):
        model = build(image_size=32, in_channels=3, num_classes=10)
    assert all(m.p == 0 for m in model.modules() if isinstance(m, nn.Dropout))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "image_size", "parameters"),
    [
        ("lenet_300_100", 28, 266_610),
        ("resnet18", 224, 11_689_512),  # torchvision's own number for 1,000 classes
        ("resnet50", 224, 25_557_032),
        ("mobilenet_v3_small", 224, 2_542_856),
        ("resnet18", 32, 11_689_512 - 9408 + 1728),  # 7x7 stem against 3x3
    ],
)
def test_parameter_counts(name: str, image_size: int, parameters: int) -> None:
    lenet = name == "lenet_300_100"
    with torch.device("meta"):
        model = getattr(models, name)(
            image_size=image_size, in_channels=1 if lenet else 3, num_classes=10 if lenet else 1000
        )
    assert count(model) == parameters


@pytest.mark.parametrize("build", [models.resnet18, models.resnet50])
def test_small_pictures_get_the_small_stem(build: Any) -> None:
    small, large = (build(image_size=size, in_channels=3, num_classes=10) for size in (64, 65))
    assert (small.conv1.kernel_size, small.conv1.stride) == ((3, 3), (1, 1))
    assert isinstance(small.maxpool, nn.Identity)
    assert (large.conv1.kernel_size, large.conv1.stride) == ((7, 7), (2, 2))
    assert isinstance(large.maxpool, nn.MaxPool2d)


@pytest.mark.parametrize(
    ("image_size", "patch", "tokens"), [(8, 2, 16), (28, 4, 49), (32, 4, 64), (96, 12, 64), (224, 16, 196)]
)
def test_patch_size_follows_the_picture(image_size: int, patch: int, tokens: int) -> None:
    model = models.vit_tiny(image_size=image_size, in_channels=1, num_classes=10)
    assert model.patchify.kernel_size == (patch, patch)
    assert model.position.shape == (1, tokens, 96)


def test_attention_is_the_textbook_formula() -> None:
    torch.manual_seed(0)
    attention = models.Attention(6, 2).double()
    x = torch.randn(1, 3, 6, dtype=torch.float64)
    heads = []
    for head in (slice(0, 3), slice(3, 6)):
        q, k, v = (layer(x)[0, :, head] for layer in (attention.q, attention.k, attention.v))
        heads.append(torch.softmax(q @ k.T / 3**0.5, dim=-1) @ v)
    torch.testing.assert_close(attention(x)[0], attention.proj(torch.cat(heads, dim=-1)))


def test_attention_runs_with_a_head_removed() -> None:
    """Cutting head 1 out of the four projections equals zeroing its columns of `proj`."""
    torch.manual_seed(0)
    attention = models.Attention(12, 4).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    kept = torch.tensor([0, 1, 2, 6, 7, 8, 9, 10, 11])
    with torch.no_grad():
        attention.proj.weight[:, 3:6] = 0
        expected = attention(x)
        for layer in (attention.q, attention.k, attention.v):
            layer.weight = nn.Parameter(layer.weight[kept])
            layer.bias = nn.Parameter(layer.bias[kept])
        attention.proj.weight = nn.Parameter(attention.proj.weight[:, kept])
        torch.testing.assert_close(attention(x), expected)


def test_residual_block_adds_its_input() -> None:
    block = models.ResidualBlock(4).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(block(x), x.relu())


def test_the_seed_decides_the_weights() -> None:
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(models.vit_tiny(image_size=8, in_channels=1, num_classes=10).position)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize(
    ("name", "change", "facts"),
    [
        ("convnet", {"width": 0}, ("width is 0", "1 or more")),
        ("resnet18", {"num_classes": 0}, ("num_classes is 0", "1 or more")),
        ("lenet_300_100", {"image_size": -1}, ("image_size is -1", "1 or more")),
        ("vit_tiny", {"patch_size": 5}, ("patch_size 5", "image_size 32", "4")),
        ("vit_tiny", {"num_heads": 5}, ("num_heads 5", "dim 96", "4")),
        ("vit_tiny", {"depth": 0}, ("depth is 0", "1 or more")),
    ],
)
def test_errors(name: str, change: dict[str, int], facts: tuple[str, ...]) -> None:
    with refused(*facts):
        getattr(models, name)(**{"image_size": 32, "in_channels": 3, "num_classes": 10, **change})


# --- texts -----------------------------------------------------------------------------------------------------------

TINY = {
    "model_type": "bert",
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film")
BATCH = {
    "input_ids": torch.tensor([[2, 5, 7, 3], [2, 6, 3, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    "token_type_ids": torch.zeros(2, 4, dtype=torch.int64),
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    (folder / "words.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(vocab=str(folder / "words.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny BERT with 5 classes, in half precision."""
    model = bert(tokenizer, num_classes=5)
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    model.half().save_pretrained(folder)
    return folder


def bert(tokenizer: Path, name: str | Path | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    given = {"num_classes": 2, "tokenizer": tokenizer, "max_length": 16, **options}
    if name is None:
        given = {"config": TINY, "pretrained": False, **given}
    return models.hf_sequence_classification(name, **given)


def sentence(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    return str(caught.value)


def test_a_text_model_takes_a_batch_as_a_mapping_or_by_name(tokenizer: Path) -> None:
    model = bert(tokenizer).eval()
    logits = model(BATCH)
    assert isinstance(logits, Tensor)
    assert logits.shape == (2, 2)
    assert torch.equal(model(**BATCH), logits)
    own = type(model).__mro__[2].forward  # the library's, without ours
    assert torch.equal(own(model, **BATCH).logits, logits)
    assert model.double()(BATCH).dtype == torch.float64  # the check after a shrink is in float64
    model.train()(BATCH).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_padding_changes_no_logit(tokenizer: Path) -> None:
    model = bert(tokenizer).eval().double()
    alone = {name: value[1:, :3] for name, value in BATCH.items()}
    torch.testing.assert_close(model(BATCH)[1:], model(alone))


def test_names_of_a_text_models_parameters(tokenizer: Path) -> None:
    model = bert(tokenizer)
    names = [name for name, _ in model.named_parameters()]
    assert type(model).__name__ == "BertForSequenceClassification"
    assert "bert.encoder.layer.1.attention.self.query.weight" in names
    assert names[-2:] == ["classifier.weight", "classifier.bias"]


def test_settings_of_a_text_model(tokenizer: Path) -> None:
    config = bert(tokenizer, num_classes=4).config
    assert (config.num_labels, config.vocab_size, config.pad_token_id) == (4, len(WORDS), 0)
    assert config._attn_implementation == "sdpa"
    assert (config.num_hidden_layers, config.num_attention_heads) == (2, 3)


@pytest.mark.parametrize("kind", ["distilbert", "roberta", "electra", "llama"])
def test_other_text_models(kind: str, tokenizer: Path) -> None:
    names = {"distilbert": ("dim", "n_layers", "n_heads", "hidden_dim")}.get(
        kind, ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    )
    config = {**dict(zip(names, (12, 1, 3, 16), strict=True)), "model_type": kind, "max_position_embeddings": 20}
    config |= {"num_key_value_heads": 3} if kind == "llama" else {}
    model = bert(tokenizer, config=config).eval()
    assert model(BATCH).shape == (2, 2)
    alone = {name: value[1:, :3] for name, value in BATCH.items()}
    torch.testing.assert_close(model(BATCH)[1:], model(alone), atol=1e-5, rtol=1e-4)


def test_weights_come_from_the_folder_in_float32(
    tokenizer: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    first, again, random = (
        bert(tokenizer, checkpoint, num_classes=n, pretrained=kept) for n, kept in ((5, True), (2, True), (5, False))
    )
    assert capfd.readouterr() == ("", "")  # no bars and tables of the library's own
    weights = bert(tokenizer, num_classes=5).half().float().state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in first.state_dict().items())
    assert {value.dtype for value in first.state_dict().values()} <= {torch.float32, torch.int64}
    new = [name for name, value in again.state_dict().items() if value.shape != weights[name].shape]
    assert new == ["classifier.weight", "classifier.bias"]
    assert not torch.equal(random.bert.pooler.dense.weight, first.bert.pooler.dense.weight)


def test_what_is_not_in_the_folder_is_said(tokenizer: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="gsprune.zoo.hf"):
        bert(tokenizer, checkpoint, config={"num_hidden_layers": 3}, num_classes=2)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert all(fact in caplog.messages[0] for fact in (str(checkpoint), "16 tensors of the network", "bert.enc"))
    assert caplog.messages[1].endswith("classifier.bias, classifier.weight")


def test_weights_in_a_pickle_are_not_read(tokenizer: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    torch.save(bert(tokenizer).state_dict(), tmp_path / "pytorch_model.bin")
    found = sentence(lambda: bert(tokenizer, tmp_path))
    assert found.startswith(f"model.name={tmp_path} does not give weights in a safetensors file that fit: ")
    (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:-100])
    found = sentence(lambda: bert(tokenizer, tmp_path))
    assert found.startswith(f"model.name={tmp_path} does not give weights in a safetensors file that fit: ")


def test_code_in_a_folder_is_not_run(tokenizer: Path, checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    found = sentence(lambda: bert(tokenizer, tmp_path))
    assert found.startswith(f"model.name={tmp_path} does not give the configuration of a model: ")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("given", "start"),
    [
        ({"num_classes": 0}, "num_classes is 0: it must be 1 or more"),
        ({"pretrained": True}, "model.name is null: give a folder or a name on the hub, or model.pretrained=false"),
        (
            {"config": {"hidden_size": 12}},
            "model.name is null: give a folder or a name on the hub, or with model.pretrained=false a model_type in "
            "model.config",
        ),
        ({"config": {**TINY, "model_type": "bertt"}}, "model.config is not allowed: "),
        (
            {"config": {**TINY, "hidden_sizes": 3}},
            "model.config is not allowed: a bert model has no setting hidden_sizes; did you mean 'hidden_size'?",
        ),
        ({"config": {**TINY, "num_attention_heads": 5}}, "model.config is not allowed: The hidden size (12) is not a "),
        ({"config": {**TINY, "vocab_size": 7}}, "the tokenizer has 8 tokens, but the model's vocab_size is 7"),
        ({"max_length": 17}, "dataset.max_length is 17, but the model's max_position_embeddings is 16"),
        ({"config": {"model_type": "vit"}}, "model.config is not allowed: Unrecognized configuration class"),
    ],
)
def test_text_model_errors(given: dict[str, Any], start: str, tokenizer: Path) -> None:
    found = sentence(lambda: bert(tokenizer, **given))
    assert found.startswith(start)
    assert "\n" not in found
    assert len(found) < 300


def test_settings_that_a_model_from_a_folder_does_not_have(tokenizer: Path, checkpoint: Path) -> None:
    found = sentence(lambda: bert(tokenizer, checkpoint, config={"hidden_droput_prob": 0.0}))
    assert found.startswith("model.config is not allowed: a bert model has no setting hidden_droput_prob")
    assert found.endswith("'hidden_dropout_prob'?")
    assert sentence(lambda: bert(tokenizer, "/no/where")) == "model.name=/no/where is not a folder"
    model = bert(tokenizer, checkpoint, config={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    assert all(m.p == 0 for m in model.modules() if isinstance(m, nn.Dropout) and m is not model.dropout)
