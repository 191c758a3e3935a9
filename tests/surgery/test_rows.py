"""Tokens and classes that are kept: rows of embeddings and heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import by_hand
import pytest
import torch
from facts import refused
from torch import nn

import gsprune

KEEP = [0, 2, 3, 7, 10]


def of_llama(*, tied: bool = True) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 2, "eos_token_id": 10, "pad_token_id": 0}
    config = transformers.LlamaConfig(vocab_size=11, tie_word_embeddings=tied, **sizes, **ids)
    return config, lambda: transformers.LlamaForCausalLM(config).eval()


def test_an_embedding_and_the_head_that_shares_its_weight_go_together(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = by_hand.Stream().eval()
    optimizer = torch.optim.AdamW(net.parameters())
    ids = torch.tensor([[2, 7, 10]])
    before = net(ids)
    before.sum().backward()
    optimizer.step()
    before = net(ids)
    plan = gsprune.cut_rows(net, "head", torch.tensor([10, 7, 0, 3, 2]), optimizer=optimizer)
    assert net.head.weight is net.table.weight
    assert (net.table.num_embeddings, net.head.out_features) == (5, 5)
    torch.testing.assert_close(net(torch.tensor([[1, 3, 4]])), before[..., KEEP])
    assert optimizer.state[net.table.weight]["exp_avg"].shape == (5, 8)
    gsprune.save_pruned(tmp_path, net, plan)
    loaded = gsprune.load_pruned(tmp_path, by_hand.Stream())
    assert loaded.head.weight is loaded.table.weight
    torch.testing.assert_close(loaded(torch.tensor([[1, 3, 4]])), before[..., KEEP])


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_of_transformers(tied: bool, tmp_path: Path) -> None:
    """Counts and special tokens go along; a network that was built from the same configuration is not touched."""
    config, build = of_llama(tied=tied)
    torch.manual_seed(0)
    model = build()
    before = model(torch.tensor([[2, 7, 3]])).logits
    plan = gsprune.cut_rows(model, ["lm_head", "model.embed_tokens"], [i in KEEP for i in range(11)])
    ids = torch.tensor([[1, 3, 2]])
    torch.testing.assert_close(model(ids).logits, before[..., KEEP])
    assert model.config.vocab_size == model.model.config.vocab_size == model.vocab_size == 5
    assert (model.config.bos_token_id, model.config.eos_token_id, model.model.embed_tokens.padding_idx) == (1, 4, 0)
    assert (config.vocab_size, config.eos_token_id) == (11, 10)
    assert model.generation_config.eos_token_id == 4
    assert model(ids, labels=ids).loss.isfinite()
    assert model.generate(ids, max_new_tokens=3, do_sample=False).max() < 5
    gsprune.save_pruned(tmp_path, model, plan)
    loaded = gsprune.load_pruned(tmp_path, build())
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.eos_token_id == 4


def test_classes_of_a_classifier_keep_their_names() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=9, num_labels=4, id2label=dict(enumerate("abcd")), **sizes)
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    ids = torch.tensor([[1, 3, 2]])
    before = model(ids).logits
    gsprune.cut_rows(model, "classifier", [3, 1])
    assert torch.allclose(model(ids).logits, before[:, [1, 3]])
    assert (model.num_labels, model.config.id2label) == (2, {0: "b", 1: "d"})
    assert model(ids, labels=torch.tensor([1])).loss.isfinite()


def test_what_is_refused() -> None:
    net = nn.Sequential(nn.Embedding(6, 4, padding_idx=5), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    before = repr(net)
    with refused("'7'", "no layer"):
        gsprune.cut_rows(net, "7", [0])
    with refused("'2'", "LayerNorm"):
        gsprune.cut_rows(net, "2", [0])
    with refused("'1' has 6", "'3' 3"):
        gsprune.cut_rows(net, ["1", "3"], [0])
    with refused("0 to 6", "0 to 5"):
        gsprune.cut_rows(net, "1", [6, 0])
    with refused("twice"):
        gsprune.cut_rows(net, "1", [2, 2])
    with refused("shape (5,)", "6 rows"):
        gsprune.cut_rows(net, "1", [True] * 5)
    with refused("keep one"):
        gsprune.cut_rows(net, "1", [])
    with refused("0.padding_idx", "5"):
        gsprune.cut_rows(net, "0", [0, 1])
    with refused("a Sequential", "Linear"):
        gsprune.cut_rows(net, "", [0])
    assert repr(net) == before


def test_special_tokens_that_do_not_stay_are_refused() -> None:
    _, build = of_llama()
    model = build()
    with refused("eos_token_id", "10"):
        gsprune.cut_rows(model, "lm_head", [0, 2, 3])
    assert model.config.vocab_size == 11
