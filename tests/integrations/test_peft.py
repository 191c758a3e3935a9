"""Units under LoRA: found through PEFT's wrapping, scored by the adapters' gradients, masked and cut so that a merge
keeps it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from facts import refused
from torch import Tensor, nn

from gsprune import Pruner, find_structures, load_pruned, save_pruned
from gsprune.criteria import Abs, Magnitude, Weighted
from gsprune.schedules import OneShot
from gsprune.structures.matrices import find_matrices

peft = pytest.importorskip("peft")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = {"input_ids": torch.arange(12).reshape(2, 6) % 11}


def llama(modules: list[str] = ALL, **settings: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=11, num_hidden_layers=1, head_dim=4, **sizes))
    given = {"r": 3, "lora_alpha": 6, "target_modules": modules, **settings}
    model = peft.get_peft_model(base, peft.LoraConfig(**given))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)  # after some training
    return model.eval()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def pruner_of(model: nn.Module, criterion: Any = None, **settings: Any) -> tuple[Any, torch.optim.Optimizer]:
    from gsprune.integrations.peft import LoraPruner

    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    run = {"target_sparsity": 0.5, "schedule": OneShot(start_epoch=0.5), "steps_per_epoch": 4, "epochs": 1}
    found = LoraPruner(model, criterion or Abs(), optimizer=optimizer, example_input=TOKENS, **{**run, **settings})
    return found, optimizer


def loss_of(model: Any) -> Tensor:
    loss: Tensor = model(**TOKENS, labels=TOKENS["input_ids"]).loss
    return loss


def test_heads_and_neurons_are_found_and_ranks_are_not() -> None:
    found = find_structures(llama(), TOKENS)
    kinds = {s.name.removeprefix("base_model.model.model."): (s.kind, s.units) for s in found.structures}
    assert kinds == {
        "embed_tokens": ("residual", 16),
        "layers.0.self_attn": ("heads", 2),
        "layers.0.mlp.gate_proj.base_layer": ("neurons", 12),
    }
    ranks = [name for name, why in found.skipped.items() if "rank of an adapter" in why]
    assert len(ranks) == len(ALL)
    assert all(".lora_A." in name for name in ranks)


def test_the_estimate_is_that_of_loraprune_and_is_gone_after_it() -> None:
    from gsprune.integrations.peft import estimated_gradients

    model = llama(["down_proj"])
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    a, b, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, torch.tensor(8.0)
    loss_of(model).backward()
    da, db = a.grad.clone(), b.grad.clone()
    before = b.detach() @ a.detach()
    after = (b.detach() - db) @ (a.detach() - da)  # a step of SGD with a rate of 1
    with estimated_gradients(model):
        assert torch.allclose(layer.base_layer.weight.grad, 2 * (before - after), atol=1e-7)
    a.grad, b.grad = a.grad * scale, b.grad * scale
    with estimated_gradients(model, scale):
        assert torch.allclose(layer.base_layer.weight.grad, 2 * scale * (before - after), atol=1e-6)
    assert layer.base_layer.weight.grad is None


def test_a_score_is_that_of_the_merged_weight() -> None:
    """W * G and A * dA add up to (W + s B A) * G where G is the true gradient."""
    model = llama(["down_proj"])
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    w, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    w.requires_grad_(True)
    loss_of(model).backward()
    merged = (w + 2 * b @ a) * w.grad
    assert torch.allclose((w * w.grad).sum(0) + (a * a.grad).sum(0), merged.sum(0), atol=1e-7)


@pytest.mark.parametrize("shrink", ["at_end", "each_update"])
def test_masks_and_cuts_survive_the_merge(shrink: str, tmp_path: Any) -> None:
    model = llama()
    pruner, optimizer = pruner_of(model, shrink=shrink)
    pruner.attach()
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    masked = copy.deepcopy(model)
    pruner.finish()
    assert pruner.sparsity == 0.5
    kept = {name: int(mask.sum()) for name, mask in pruner.dense_masks().items()}
    assert sum(kept.values()) == 7
    expected = masked(**TOKENS).logits
    merged = model.merge_and_unload()
    mlp = merged.model.layers[0].mlp
    neurons = kept["base_model.model.model.layers.0.mlp.gate_proj.base_layer"]
    assert (type(mlp.down_proj), tuple(mlp.down_proj.weight.shape)) == (nn.Linear, (16, neurons))
    assert torch.allclose(merged(**TOKENS).logits, expected, atol=1e-5)
    if shrink == "at_end":
        whole = masked.merge_and_unload().model.layers[0].mlp.down_proj.weight
        assert int((whole == 0).all(0).sum()) == 12 - neurons


def test_it_is_saved_with_its_adapters_and_loaded(tmp_path: Any) -> None:
    model = llama()
    pruner, optimizer = pruner_of(model)
    pruner.attach()
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    pruner.finish()
    save_pruned(tmp_path, model, pruner.plan)
    again = load_pruned(tmp_path, llama())
    assert torch.equal(again(**TOKENS).logits, model(**TOKENS).logits)


def test_scores_are_kept_over_a_resume() -> None:
    first, second = llama(), llama()
    (one, optimizer), (other, _) = pruner_of(first), pruner_of(second)
    loss_of(first).backward()
    one.on_step_begin(0)
    one.on_before_optimizer_step()
    other.load_state_dict(one.state_dict())
    assert all(score.any() and torch.equal(score, other.scores()[name]) for name, score in one.scores().items())
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in first.parameters())


def test_the_loops_of_others_take_it_by_themselves(tmp_path: Any) -> None:
    from torch.utils.data import Dataset
    from transformers import Trainer, TrainingArguments

    from gsprune.integrations.peft import LoraPruner
    from gsprune.integrations.transformers import PruningCallback

    class Words(Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, k: int) -> dict[str, Tensor]:
            row = TOKENS["input_ids"][k % 2]
            return {"input_ids": row, "labels": row}

    model = llama()
    callback = PruningCallback(Abs(), target_sparsity=0.5, scope="local")
    quiet: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    arguments = TrainingArguments(str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4, **quiet)
    Trainer(model, arguments, train_dataset=Words(), callbacks=[callback]).train()
    assert type(callback.pruner) is LoraPruner
    merged = model.merge_and_unload()
    assert tuple(merged.model.layers[0].mlp.down_proj.weight.shape) == (16, 6)
    assert merged.model.layers[0].self_attn.q_proj.out_features == 8


REFUSED = {
    "a layer without an adapter": (lambda: llama(["q_proj", "o_proj"]), {}, ["down_proj", "never gets a gradient"]),
    "DoRA": (lambda: llama(use_dora=True), {}, ["Dora", "variant"]),
    "a bias that is frozen": (lambda: llama(["q_proj"]), {"criterion": Weighted()}, ["never gets a gradient"]),
    "single weights": (lambda: llama(), {"criterion": Magnitude(), "example_input": None}, ["single weights"]),
    "no adapter": (lambda: llama().merge_and_unload(), {}, ["no LoRA layer", "gsprune.Pruner"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_work_is_refused(case: str) -> None:
    from gsprune.integrations.peft import LoraPruner

    make, changes, facts = REFUSED[case]
    model = make()
    given: dict[str, Any] = {"criterion": Abs(), "target_sparsity": 0.5, "example_input": TOKENS, **changes}
    with refused(*facts):
        LoraPruner(model, given.pop("criterion"), **given)


def test_a_merged_adapter_and_trained_weights_are_refused() -> None:
    from gsprune.integrations.peft import LoraPruner

    settings: dict[str, Any] = {"target_sparsity": 0.5, "example_input": TOKENS}
    model = llama()
    model.merge_adapter()
    with refused("merged", "gsprune.Pruner"):
        LoraPruner(model, Abs(), **settings)
    model.unmerge_adapter()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with refused("base_layer.weight", "freeze"):
        LoraPruner(model, Abs(), **settings)


def test_single_weights_under_an_adapter_are_left_alone_by_any_pruner() -> None:
    model = llama(["down_proj"])
    reasons = {matrix.name.partition("mlp.")[2]: matrix.reason for matrix in find_matrices(model)}
    assert reasons["gate_proj.weight"] is None
    assert "merge" in str(reasons["down_proj.base_layer.weight"])
    assert "adapter" in str(reasons["down_proj.lora_A.default.weight"])
    with refused("down_proj.base_layer", "merge the adapters"):
        Pruner(model, Magnitude(), target_sparsity=0.5, include=["*down_proj.base_layer"])
