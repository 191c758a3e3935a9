"""Pruned networks of transformers in files that transformers reads, and in those that it cannot read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import by_hand
import pytest
import torch
from facts import refused
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import gsprune
from gsprune import Pruner
from gsprune.criteria import Abs, Magnitude
from gsprune.discovery.branches import find_branches
from gsprune.integrations.pretrained import from_pretrained, save_pretrained
from gsprune.schedules import OneShot
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.cut_plan import plan_cut
from gsprune.surgery.shrink import shrink

IDS = torch.tensor([[7, 6, 5, 1, 1], [1, 2, 3, 4, 5]])
WITHOUT_GSPRUNE = """
import sys
sys.modules["gsprune"] = None
import torch
import transformers
model = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1])
print(model.generate(torch.tensor([[7, 6, 5]]), max_new_tokens=8, do_sample=False).tolist())
"""


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4)).eval()


def bert() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 50}
    return BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=4)).eval()


def pruned(model: nn.Module, **settings: Any) -> Pruner:
    given = {"target_sparsity": 0.5} | settings
    pruner = Pruner(model, Magnitude(), structured=True, schedule=OneShot(), example_input={"input_ids": IDS}, **given)
    pruner.on_step_begin(0)
    pruner.on_train_end()
    return pruner


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def tokens_of(model: Any) -> Any:
    return model.generate(torch.tensor([[7, 6, 5]]), max_new_tokens=8, do_sample=False).tolist()


def tokens_without_gsprune(folder: Path, model: Any) -> Any:
    command = [sys.executable, "-c", WITHOUT_GSPRUNE, folder, type(model).__name__]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


@pytest.mark.slow
def test_an_even_cut_loads_and_generates_without_gsprune(tmp_path: Path) -> None:
    model = llama()
    pruner = pruned(model, scope="local")
    assert save_pretrained(tmp_path, model, pruner.plan)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["intermediate_size"], config["num_attention_heads"], config["num_key_value_heads"]) == (24, 4, 2)
    assert (config["hidden_size"], config["head_dim"]) == (32, 4)
    assert tokens_without_gsprune(tmp_path, model) == tokens_of(model)


def step(**settings: Any) -> Any:
    """Of transformers 5.24, whose constructor reads numbers of heads layer by layer."""
    step3p7 = pytest.importorskip("transformers.models.step3p7.modeling_step3p7")
    torch.manual_seed(0)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4, "sliding_window": 4, **settings}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    text = {**sizes, **heads, "mlp_layer_types": ["dense", "dense"], "pad_token_id": 0}
    eyes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = step3p7.Step3p7Config(text_config=text, vision_config=eyes, image_token_id=49)
    return step3p7.Step3p7ForConditionalGeneration(config).eval()


@pytest.mark.slow
def test_layers_that_differ_load_and_generate_without_gsprune(tmp_path: Path) -> None:
    """8 heads in one layer and 4 in the other; num_experts_per_tok is 8, too, and stays."""
    model = step()
    pruner = pruned(model, scope="global", kinds=["heads"], target_sparsity=0.25)
    layers = model.model.language_model.layers
    assert sorted(layer.self_attn.q_proj.out_features for layer in layers) == [16, 32]
    assert save_pretrained(tmp_path, model, pruner.plan)
    assert not (tmp_path / "pruning.json").exists()
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert (text["num_attention_heads"], text["num_key_value_heads"], text["num_experts_per_tok"]) == (8, 4, 8)
    ((layer, numbers),) = text["per_layer_config"].items()
    assert numbers == {"num_attention_heads": 4, "num_key_value_heads": 2}
    assert layers[int(layer)].self_attn.q_proj.out_features == 16
    assert tokens_without_gsprune(tmp_path, model) == tokens_of(model)


def test_numbers_that_differ_from_layer_to_layer_before_the_cut(tmp_path: Path) -> None:
    """Gemma 4: full attention has wider heads, and fewer key/value heads, than sliding attention."""
    gemma4 = pytest.importorskip("transformers.models.gemma4.modeling_gemma4")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50, "pad_token_id": 0}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4, "attention_k_eq_v": True}
    full = {"global_head_dim": 8, "num_global_key_value_heads": 2}
    other = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
    kinds = ["sliding_attention", "full_attention"]
    config = gemma4.Gemma4TextConfig(**sizes, **heads, **full, **other, layer_types=kinds)
    if not hasattr(config, "per_layer_config"):
        pytest.skip("transformers has per_layer_config from 5.15 on")
    model = gemma4.Gemma4ForCausalLM(config).eval()
    pruner = pruned(model, scope="local")
    assert save_pretrained(tmp_path, model, pruner.plan)
    again = type(model).from_pretrained(tmp_path, local_files_only=True).eval()
    assert [layer.num_key_value_heads for layer in again.config.per_layer_config] == [2, 1]
    assert [layer.head_dim for layer in again.config.per_layer_config] == [4, 8]
    assert (again.config.num_attention_heads, again.config.intermediate_size) == (4, 24)
    assert torch.equal(logits(again), logits(model))


def test_a_number_that_happens_to_be_equal_stays(tmp_path: Path) -> None:
    """A window and positions of the dense width are none of what was cut, and no shape shows them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    config = MistralConfig(**sizes, **heads, sliding_window=32, max_position_embeddings=32)
    model = MistralForCausalLM(config).eval()
    pruner = pruned(model, scope="local", kinds=["heads"])
    assert save_pretrained(tmp_path, model, pruner.plan)
    again = MistralForCausalLM.from_pretrained(tmp_path, local_files_only=True).eval()
    assert (again.config.sliding_window, again.config.max_position_embeddings) == (32, 32)
    words = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(again(words).logits, model(words).logits)


def test_an_uneven_cut_is_read_by_our_own(tmp_path: Path) -> None:
    model = llama()
    pruner = pruned(model, scope="global", kinds=["neurons"])
    assert len({layer.mlp.up_proj.out_features for layer in model.model.layers}) == 2
    with refused("LlamaForCausalLM", "config.json", "of 48", "one number for both"):
        save_pretrained(tmp_path / "plain", model, pruner.plan, plain=True)
    assert not (tmp_path / "plain").exists()
    assert not save_pretrained(tmp_path, model, pruner.plan)
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(model))
    assert json.loads((tmp_path / "config.json").read_text())["intermediate_size"] == 48


@pytest.mark.parametrize(("kinds", "plain"), [(["neurons"], True), (["heads"], False)])
def test_bert_has_no_width_of_a_head_of_its_own(kinds: list[str], plain: bool, tmp_path: Path) -> None:
    model = bert()
    pruner = pruned(model, scope="local", kinds=kinds, exclude=["bert.pooler*", "classifier*"])
    if not plain:
        with refused("BertForSequenceClassification", "config.json", "8 of 16"):
            save_pretrained(tmp_path, model, pruner.plan, plain=True)
    assert save_pretrained(tmp_path, model, pruner.plan) == plain
    again = from_pretrained(tmp_path)
    assert type(again) is BertForSequenceClassification
    assert torch.equal(logits(again), logits(model))


def test_a_uniform_budget_is_a_plain_network(tmp_path: Path) -> None:
    model, budget = llama(), {"macs": 0.7, "uniform": True}
    cut = gsprune.cut(model, [{"input_ids": IDS, "labels": IDS}], budget=budget, progress=False)  # type: ignore[call-overload]
    layers = cut.model.model.layers
    assert len({(layer.mlp.gate_proj.out_features, layer.self_attn.q_proj.out_features) for layer in layers}) == 1
    assert layers[0].mlp.gate_proj.out_features < 48
    assert save_pretrained(tmp_path, cut.model, cut.plan)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path)), logits(cut.model))


def test_a_number_of_heads_that_transformers_refuses_is_no_plain_file(tmp_path: Path) -> None:
    """6 heads of width 4 in a hidden size of 32; early releases of transformers 5 take them."""
    model = llama()
    pruner = pruned(model, keep={"heads": 3}, target_sparsity=None)
    assert model.config.hidden_size % model.model.layers[0].self_attn.q_proj.out_features != 0
    try:
        LlamaConfig(hidden_size=32, num_attention_heads=6, num_key_value_heads=3, head_dim=4)
        takes = True
    except Exception:  # of huggingface_hub's dataclasses
        takes = False
    assert save_pretrained(tmp_path, model, pruner.plan) == takes
    assert torch.equal(logits(from_pretrained(tmp_path).eval()), logits(model))


def test_what_config_json_cannot_say_is_no_plain_file(tmp_path: Path) -> None:
    """The shapes are those of a smaller configuration, and the network computes something else."""
    model = llama()
    pruner = pruned(model, scope="local", kinds=["neurons"])
    model.model.norm.variance_epsilon = 0.5
    assert not save_pretrained(tmp_path, model, pruner.plan)


def test_saving_again_in_the_other_form_leaves_no_record(tmp_path: Path) -> None:
    model = llama()
    pruner = pruned(model, scope="global", kinds=["neurons"])
    save_pretrained(tmp_path, model, pruner.plan)
    assert save_pretrained(tmp_path, llama(), None)
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(llama()))


def test_what_is_not_of_transformers_is_refused(tmp_path: Path) -> None:
    with refused("Linear", "save_pruned"):
        save_pretrained(tmp_path, nn.Linear(2, 2), None)
    with refused(str(tmp_path), "config.json"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["Own"]}')
    with refused("Own"):
        from_pretrained(tmp_path)


def test_a_stream_of_half_the_width_is_a_plain_network_with_an_eps_of_its_own(tmp_path: Path) -> None:
    """An RMSNorm over half of the positions has twice the eps, which config.json says."""
    model = llama()
    (stream,) = by_hand.in_llama(model)
    plan = shrink(model, [stream], [torch.arange(32) % 2 == 0], example_input={"input_ids": IDS})
    assert save_pretrained(tmp_path, model, plan)
    again = LlamaForCausalLM.from_pretrained(tmp_path, local_files_only=True).eval()
    assert (again.config.hidden_size, again.config.rms_norm_eps) == (16, pytest.approx(2 * LlamaConfig().rms_norm_eps))
    torch.testing.assert_close(logits(again), logits(model))


def test_tokens_that_stay_are_in_the_configuration(tmp_path: Path) -> None:
    model = llama()
    plan = gsprune.cut_rows(model, ["lm_head", "model.embed_tokens"], range(8))
    before = logits(model)
    assert save_pretrained(tmp_path, model, plan)
    again = LlamaForCausalLM.from_pretrained(tmp_path, local_files_only=True).eval()
    assert again.config.vocab_size == 8
    torch.testing.assert_close(logits(again), before)


def test_a_configuration_that_rows_have_changed_does_not_hide_another_cut(tmp_path: Path) -> None:
    model = llama()
    structures = find_branches(model, {"input_ids": IDS}).structures
    plan = plan_cut(structures, [torch.tensor([i > 0]) for i in range(len(structures))])
    apply_cut(model, plan)
    both = gsprune.cut_rows(model, ["lm_head", "model.embed_tokens"], range(8)).after(plan)
    with refused("cut_rows", "save_pruned"):
        save_pretrained(tmp_path, model, both)


def test_a_network_without_one_attention_comes_back_by_gsprune(tmp_path: Path) -> None:
    model = llama()
    structures = find_branches(model, {"input_ids": IDS}).structures
    plan = plan_cut(structures, [torch.tensor([i > 0]) for i in range(len(structures))])
    apply_cut(model, plan)
    assert not save_pretrained(tmp_path, model, plan)
    torch.testing.assert_close(logits(from_pretrained(tmp_path)), logits(model))


def test_the_trainer_saves_a_cut_network_as_transformers_reads_it(tmp_path: Path) -> None:
    """Its own `config.json` would be that of the dense network."""
    from transformers import Trainer, TrainingArguments

    from gsprune.integrations.transformers import PruningCallback

    words = torch.arange(64).reshape(8, 8) % 31
    data = [{"input_ids": row, "labels": row} for row in words]
    quiet: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path / "out"), num_train_epochs=2, per_device_train_batch_size=4, **quiet)
    callback = PruningCallback(Abs(), target_sparsity=0.5)
    trainer = Trainer(llama(), arguments, train_dataset=data, callbacks=[callback])
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "pruning.json").exists()
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert again.config.intermediate_size == 24
    with torch.no_grad():
        assert torch.equal(again(words).logits, trainer.model.eval()(words).logits)
    with refused("push_to_hub"):
        trainer.model.save_pretrained(tmp_path / "saved", push_to_hub=True)
