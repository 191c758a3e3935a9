"""Hugging Face's transformers; nothing is downloaded."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from conformance import OUTPUT, Network, NetworkTester
from facts import refused
from torch import Tensor, nn

from gsprune import Pruner
from gsprune.criteria import Abs
from gsprune.discovery.find import find_structures
from gsprune.structures.running import outputs
from gsprune.structures.structure import INNER, Structure
from gsprune.surgery.shrink import mask_units, shrink

transformers = pytest.importorskip("transformers", minversion="5")
transformers.logging.set_verbosity_error()

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
}
DISTIL: dict[str, Any] = {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40}
PICTURE: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 40}
GROUPED = SIZES | {"num_key_value_heads": 2}
SPECS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", SIZES),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", SIZES),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", SIZES),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", SIZES | {"embedding_size": 16}),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig", DISTIL),
    "vit": ("ViTForImageClassification", "ViTConfig", PICTURE | {"image_size": 16, "patch_size": 4}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "llama-full": ("LlamaForCausalLM", "LlamaConfig", SIZES),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", GROUPED | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 8}),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED),
}
DECODERS = ("llama", "llama-full", "llama-tied", "qwen2", "qwen3", "mistral")
PIXELS = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))}
IDS = torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(1))
TOKENS = {"input_ids": IDS, "attention_mask": (torch.arange(7) < torch.tensor([[7], [6], [4]])).long()}


def build(name: str, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    model, config, sizes = SPECS[name]
    torch.manual_seed(5)
    made = getattr(transformers, model)(getattr(transformers, config)(**{**sizes, **options}))
    return made.eval(), PIXELS if name == "vit" else TOKENS


def logits(model: nn.Module, x: dict[str, Tensor]) -> Tensor:
    return model(**x).logits


def double(model: nn.Module, x: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    return copy.deepcopy(model).double().eval(), {k: v.double() if v.is_floating_point() else v for k, v in x.items()}


def uneven(structures: tuple[Structure, ...]) -> list[Tensor]:
    """Other units in every structure, and another number of them in the second layer."""
    generator = torch.Generator().manual_seed(6)
    counts = [max(1, s.units // 2 + (1 if ".1." in s.name and s.units > 2 else 0)) for s in structures]
    return [torch.randperm(s.units, generator=generator) < n for s, n in zip(structures, counts, strict=True)]


def inner(model: nn.Module, x: Any) -> tuple[Structure, ...]:
    """What is pruned where no kinds are named: norms of Llama compute in float32, so streams agree to 1e-6 only."""
    return tuple(s for s in find_structures(model, x).structures if s.kind in INNER)


BERT = ("{}.encoder.layer.{}.attention.self", "{}.encoder.layer.{}.intermediate.dense")
LAYERS = {  # attention and hidden layer
    "distilbert": ("distilbert.transformer.layer.{}.attention", "distilbert.transformer.layer.{}.ffn.lin1"),
    "vit": ("vit.layers.{}.attention", "vit.layers.{}.mlp.fc1"),
    "decoder": ("model.layers.{}.self_attn", "model.layers.{}.mlp.gate_proj"),
    **{name: tuple(part.format(name, "{}") for part in BERT) for name in ("bert", "roberta", "electra")},
}
CLASSIFIERS = {
    "bert": "bert.pooler.dense",
    "roberta": "classifier.dense",
    "electra": "classifier.dense",
    "distilbert": "pre_classifier",
}


def network(name: str, **options: Any) -> Network:
    attention, hidden = LAYERS["decoder" if name in DECODERS else name.removesuffix("-mlm")]
    heads = 2 if name in DECODERS and name != "llama-full" else 4
    found = [
        structure
        for i in (0, 1)
        for structure in ((attention.format(i), "heads", heads), (hidden.format(i), "neurons", 40))
    ]
    found += [(CLASSIFIERS[name], "neurons", 32)] if name in CLASSIFIERS else []
    return Network(lambda: build(name)[0], build(name)[1], found, {OUTPUT}, trains=False, **options)


class TestTransformers(NetworkTester):
    networks: ClassVar = {name: network(name, again=name in ("bert", "llama")) for name in SPECS}


@pytest.mark.parametrize("name", ["bert", "vit", "llama", "qwen3"])
def test_the_eager_kernel_and_the_configuration_stay(name: str) -> None:
    model, x = build(name, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    structures = inner(model, x)
    keeps = uneven(structures)
    masked, _ = double(model, x)
    mask_units(masked, structures, keeps)
    config = model.config.to_dict()
    shrink(model, structures, keeps, example_input=x)
    small, x64 = double(model, x)
    torch.testing.assert_close(logits(small, x64), logits(masked, x64), rtol=1e-9, atol=1e-11)
    assert model.config.to_dict() == config  # what the dense constructor needs; no forward pass reads it
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", DECODERS)
def test_pruned_decoders_generate_what_the_masked_ones_do(name: str) -> None:
    model, x = build(name)
    structures = inner(model, x)
    masked, _ = double(model, x)
    mask_units(masked, structures, uneven(structures))
    shrink(model, structures, uneven(structures), example_input=x)
    small, _ = double(model, x)
    left = {"input_ids": IDS, "attention_mask": TOKENS["attention_mask"].flip(1)}
    for cache in (None, "static"):
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
        assert torch.equal(small.generate(**left, **options), masked.generate(**left, **options))


def test_attributes_are_those_of_the_smaller_modules() -> None:
    model, x = build("bert")
    structures = inner(model, x)
    shrink(model, structures, uneven(structures), example_input=x)
    layers = [layer.attention.self for layer in model.bert.encoder.layer]
    shape = [(m.num_attention_heads, m.attention_head_size, m.all_head_size, m.query.out_features) for m in layers]
    assert shape == [(2, 8, 16, 16), (3, 8, 24, 24)]

    model, x = build("llama", num_attention_heads=8, head_dim=4, num_key_value_heads=4)
    structures = inner(model, x)
    shrink(model, structures, uneven(structures), example_input=x)
    shape = [
        (m.head_dim, m.num_key_value_groups, m.q_proj.out_features, m.k_proj.out_features, m.o_proj.in_features)
        for m in (layer.self_attn for layer in model.model.layers)
    ]
    assert shape == [(4, 2, 16, 8, 16), (4, 2, 24, 12, 24)]


def test_a_key_value_head_goes_with_its_query_heads() -> None:
    model, x = build("llama", num_attention_heads=8, head_dim=4, num_key_value_heads=2)
    heads = inner(model, x)[0]
    assert heads.name == "model.layers.0.self_attn"
    width = {m.tensor.split(".")[-2]: m.index.shape[1] for m in (*heads.producers, *heads.consumers)}
    assert width == {"q_proj": 16, "k_proj": 4, "v_proj": 4, "o_proj": 16}
    assert [m.tensor for m in heads.gates] == ["model.layers.0.self_attn.v_proj.weight"]


def test_query_heads_go_by_themselves_where_one_key_value_head_serves_them_all() -> None:
    found = find_structures(*build("llama", num_key_value_heads=1))
    assert [(s.kind, s.units) for s in found.structures[1:3]] == [("heads", 4), ("neurons", 40)]
    assert [m.tensor.split(".")[-2] for m in found.structures[1].producers] == ["q_proj"]
    assert all(f"model.layers.{i}.self_attn.v_proj" in found.skipped for i in (0, 1))
    with refused("model.layers.0.self_attn.k_proj", "removed as a whole"):
        find_structures(*build("llama", num_key_value_heads=1), include=("*.k_proj",))


def test_tensors_as_example_inputs_and_attention_weights_as_outputs() -> None:
    model, _ = build("bert")
    assert [s.units for s in find_structures(model, (IDS,)).structures[:3]] == [32, 4, 40]
    model, x = build("bert", attn_implementation="eager", output_attentions=True)
    found = find_structures(model, x)
    assert [s.kind for s in found.structures] == [
        "residual",
        *["neurons"] * 3,
    ]  # weights of every head are an output: all are needed


def test_tied_embeddings_and_frozen_layers() -> None:
    model, x = build("bert-mlm")
    tied = model.cls.predictions.decoder.weight
    assert tied is model.bert.embeddings.word_embeddings.weight
    structures = inner(model, x)
    shrink(model, structures, uneven(structures), example_input=x)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight is tied
    for parameter in (model := build("bert")[0]).bert.encoder.layer[0].parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with refused("bert.encoder.layer.0.attention.output.dense.weight", "1 more", "gradient"):
        Pruner(model, Abs(), target_sparsity=0.5, example_input=x, steps_per_epoch=1, epochs=1)
    logits(model, x).sum().backward()
    rest = Pruner(model, Abs(), target_sparsity=0.5, example_input=x, exclude=["*.layer.0.*"], optimizer=optimizer)
    rest.on_before_optimizer_step()


def test_layers_of_gpt2_are_cut_like_linear_ones() -> None:
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, pad_token_id=0)
    model = transformers.GPT2ForSequenceClassification(config).eval()
    structures = inner(model, {"input_ids": IDS})
    assert [(s.kind, s.units) for s in structures] == [("heads", 4), ("neurons", 128)] * 2
    heads = structures[0]
    assert [(m.tensor.rpartition(".")[0], m.dim, m.index.shape[1]) for m in heads.producers] == [
        ("transformer.h.0.attn.c_attn", 1, 24),
        ("transformer.h.0.attn.c_attn", 0, 24),
    ]
    assert [m.index.shape[1] for m in heads.gates] == [8, 8]  # the values alone
    masked, x = double(model, {"input_ids": IDS})
    mask_units(masked, structures, uneven(structures))
    shrink(model, structures, uneven(structures), example_input={"input_ids": IDS})
    assert model.transformer.h[0].attn.c_attn.weight.shape == (32, 48)
    torch.testing.assert_close(logits(double(model, x)[0], x), logits(masked, x), rtol=1e-9, atol=1e-11)


def test_layers_shared_in_depth_are_found_once() -> None:
    config = transformers.AlbertConfig(**SIZES, embedding_size=16)
    model = transformers.AlbertForSequenceClassification(config).eval()
    found = find_structures(model, TOKENS)
    assert [(s.kind, s.units) for s in found.structures if s.kind == "heads"] == [("heads", 4)]
    masked, x = double(model, TOKENS)
    mask_units(masked, found.structures, uneven(found.structures))
    shrink(model, found.structures, uneven(found.structures), example_input=TOKENS)
    torch.testing.assert_close(logits(double(model, x)[0], x), logits(masked, x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["bert", "vit", "llama", "llama-tied"])
def test_the_stream_goes_through_every_layer(name: str) -> None:
    model, x = build(name)
    stream = next(s for s in find_structures(model, x).structures if s.kind == "residual")
    assert stream.units == 32
    params = sum(p.numel() for p in model.parameters())
    keep = torch.arange(32) % 2 == 0
    masked, x64 = double(model, x)
    mask_units(masked, [stream], [keep])
    shrink(model, [stream], [keep], example_input=x)
    assert sum(p.numel() for p in model.parameters()) < 0.6 * params
    tolerance = 1e-5 if name in DECODERS else 1e-10  # a norm that computes in float32
    small, _ = double(model, x)
    torch.testing.assert_close(logits(small, x64), logits(masked, x64), rtol=tolerance, atol=tolerance)


def test_experts_lose_neurons() -> None:
    config = transformers.MixtralConfig(**GROUPED, num_local_experts=4)
    torch.manual_seed(5)
    model = transformers.MixtralForCausalLM(config).eval()
    neurons = [s for s in inner(model, {"input_ids": IDS}) if s.kind == "neurons"]
    assert [s.units for s in neurons] == [40, 40]
    assert [(m.dim, m.index.shape[1]) for m in (*neurons[0].producers, *neurons[0].consumers)] == [(1, 2), (2, 1)]


def test_the_outputs_of_a_model_in_training_mode_are_left_alone() -> None:
    model, x = build("llama")
    model.train()
    before = copy.deepcopy(model.state_dict())
    find_structures(model, x)
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert not any("forward" in vars(m) for m in model.modules())
    assert len(outputs(model.eval(), x)) >= 1
