"""Networks on the meta device, which are too large to load: the same structures and counts, and no proof."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from facts import refused
from torch import nn
from torchvision.models import resnet18
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import gsprune
from gsprune.criteria import Magnitude
from gsprune.structures.example import map_tensors

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
IDS = {"input_ids": torch.arange(10).reshape(2, 5)}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "resnet18": (lambda: resnet18(num_classes=10), torch.randn(1, 3, 64, 64)),
    "BERT": (lambda: BertForSequenceClassification(BertConfig(**SIZES)), IDS),
    "Llama": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)), IDS),
}


def both(name: str) -> tuple[nn.Module, nn.Module, Any, Any]:
    """A network and its input, and the same on the meta device."""
    make, x = NETWORKS[name]
    torch.manual_seed(0)
    real = make().eval()
    with torch.device("meta"):
        meta = make().eval()
    return real, meta, x, map_tensors(lambda tensor: tensor.to("meta"), x)


@pytest.mark.parametrize("name", NETWORKS)
def test_structures_and_counts_are_those_of_the_real_network(name: str) -> None:
    real, meta, x, x_meta = both(name)
    with pytest.warns(UserWarning, match="not proven.*meta device"):
        found = gsprune.find_structures(meta, x_meta)
    assert "meta device" in found.proof
    known = gsprune.find_structures(real, x)
    assert [(s.name, s.kind, s.units) for s in found.structures] == [
        (s.name, s.kind, s.units) for s in known.structures
    ]
    for s, t in zip(found.structures, known.structures, strict=True):
        assert [(m.tensor, m.dim, m.index.tolist()) for m in s.members] == [
            (m.tensor, m.dim, m.index.tolist()) for m in t.members
        ]
    with pytest.warns(UserWarning, match="not proven"):
        planned = gsprune.plan(meta, x_meta, macs=0.5)
    assert str(planned) == str(gsprune.plan(real, x, macs=0.5))
    assert all(p.is_meta for p in meta.parameters())


def test_nothing_else_takes_it() -> None:
    _, meta, _, x = both("resnet18")
    with refused("meta device"):
        gsprune.Pruner(meta, Magnitude(), structured=True, target_sparsity=0.5, example_input=x)
    with refused("meta device"):
        gsprune.cut(meta, [(x, torch.zeros(1, dtype=torch.long, device="meta"))], nn.functional.cross_entropy, macs=0.5)
