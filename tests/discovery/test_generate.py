"""`generate` with a cache: what was cut gives the tokens that the masked network gives, family by family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from gsprune.discovery.branches import find_branches
from gsprune.discovery.find import find_structures
from gsprune.surgery.shrink import mask_units, shrink

transformers = pytest.importorskip("transformers", minversion="5")

IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(1))
TEXT: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"intermediate_size": 40, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
TEXT |= {"pad_token_id": 0}
GROUPED = TEXT | {"num_key_value_heads": 2}
LATENT = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
LATENT |= {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
LATENT |= {"first_k_dense_replace": 1}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
T5 |= {"decoder_start_token_id": 0, "eos_token_id": 2}
BART = {"vocab_size": 50, "d_model": 32, "max_position_embeddings": 64, "decoder_start_token_id": 2}
for _side in ("encoder", "decoder"):
    BART |= {f"{_side}_layers": 2, f"{_side}_attention_heads": 4, f"{_side}_ffn_dim": 40}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", TEXT),
    "FalconForCausalLM": ("FalconConfig", {k: v for k, v in TEXT.items() if k != "intermediate_size"}),
    "BloomForCausalLM": ("BloomConfig", {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "Phi3ForCausalLM": ("Phi3Config", GROUPED),
    "Olmo2ForCausalLM": ("Olmo2Config", GROUPED),
    "Gemma2ForCausalLM": ("Gemma2Config", GROUPED | {"head_dim": 8}),
    "MixtralForCausalLM": ("MixtralConfig", GROUPED | {"num_local_experts": 4}),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", TEXT | LATENT),
    "MambaForCausalLM": ("MambaConfig", {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "T5ForConditionalGeneration": ("T5Config", T5),
    "BartForConditionalGeneration": ("BartConfig", BART),
}


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    config, sizes = FAMILIES[name]
    torch.manual_seed(5)
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes)).double().eval()
    if "Mixtral" in name or "Deepseek" in name:
        model.set_experts_implementation("eager")  # the other has no float64
    x = {"input_ids": IDS}
    return model, x | {"decoder_input_ids": IDS[:, :3]} if "Conditional" in name else x


def tokens(model: Any) -> torch.Tensor:
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=True, **options)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_heads_neurons_and_the_stream(name: str) -> None:
    model, x = build(name)
    structures = find_structures(model, x).structures
    assert any(s.kind == "residual" for s in structures)
    generator = torch.Generator().manual_seed(6)
    keeps = [torch.randperm(s.units, generator=generator) < max(1, s.units // 2) for s in structures]
    masked = copy.deepcopy(model)
    mask_units(masked, structures, keeps)
    shrink(model, structures, keeps, example_input=x)
    assert torch.equal(tokens(model), tokens(masked))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_branches(name: str) -> None:
    model, x = build(name)
    structures = find_branches(model, x).structures
    assert structures
    keeps = [torch.tensor([number % 2 == 0]) for number in range(len(structures))]
    masked = copy.deepcopy(model)
    mask_units(masked, structures, keeps)
    shrink(model, structures, keeps, example_input=x)
    assert torch.equal(tokens(model), tokens(masked))
