"""Networks of transformers cut from files to files, one layer in memory at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from facts import refused
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from gsprune.integrations.layer_by_layer import cut_pretrained
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.cut_plan import cut_tensor

IDS = torch.randint(0, 50, (12, 9), generator=torch.Generator().manual_seed(1))


def llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    config = LlamaConfig(**{**sizes, "num_attention_heads": 8, "num_key_value_heads": 4, **settings})
    return LlamaForCausalLM(config).eval()


def saved(folder: Path, model: Any, *, files: str = "20KB") -> Path:
    model.save_pretrained(folder, max_shard_size=files)
    return folder


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.slow
def test_without_a_repair_the_files_hold_what_the_plan_keeps_to_the_last_bit(tmp_path):
    dense = llama().bfloat16()
    source = saved(tmp_path / "dense", dense)
    (source / "tokenizer.json").write_text("{}", encoding="utf8")
    found = cut_pretrained(source, tmp_path / "small", IDS.split(5), sparsity=0.5, repair=None)
    before, after = tensors_of(source), tensors_of(tmp_path / "small")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], cut_tensor(tensor, found.plan.kept.get(name, {}))), name
        assert after[name].dtype == torch.bfloat16
    assert len(found.plan.kept) == 14  # of each layer the seven matrices
    small = LlamaForCausalLM.from_pretrained(tmp_path / "small", local_files_only=True)
    config = small.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (4, 2, 24)
    assert (found.small, found.dense) == tuple(sum(p.numel() for p in m.parameters()) for m in (small, dense))
    apply_cut(dense, found.plan)
    assert torch.equal(logits(small.eval()), logits(dense))
    assert (tmp_path / "small" / "tokenizer.json").is_file()
    assert found.layers == {"model.layers.0": None, "model.layers.1": None}
    assert found.samples == 12


@pytest.mark.slow
def test_the_repair_brings_the_answers_nearer_to_those_of_the_whole_network(tmp_path):
    dense = llama()
    source = saved(tmp_path / "dense", dense, files="1GB")  # one file, without an index
    off = {}
    for repair in ("least_squares", None):
        target = tmp_path / str(repair)
        found = cut_pretrained(source, target, [IDS], sparsity=0.5, repair=repair)
        off[repair] = float((logits(LlamaForCausalLM.from_pretrained(target).eval()) - logits(dense)).norm())
    assert off["least_squares"] < 0.8 * off[None]
    assert "2 layers cut by 12 samples" in repr(found)


@pytest.mark.slow
def test_heads_alone_and_a_tied_embedding(tmp_path):
    source = saved(tmp_path / "dense", llama(tie_word_embeddings=True))
    cut_pretrained(source, tmp_path / "small", [IDS], kinds=["heads"], calibration=4)
    small = LlamaForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert (small.config.num_attention_heads, small.config.intermediate_size) == (4, 48)
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert "lm_head.weight" not in tensors_of(tmp_path / "small")


def test_what_cannot_be_cut_so_is_said_in_one_sentence(tmp_path):
    source = saved(tmp_path / "dense", llama())
    out = tmp_path / "out"
    with refused("whole sequences", "(samples, length)"):
        cut_pretrained(source, out, [torch.zeros(2, 3)])
    with refused("9", "8 tokens"):
        cut_pretrained(source, out, [IDS, IDS[:, :8]])
    with refused("batches is empty"):
        cut_pretrained(source, out, [])
    with refused("no config.json"):
        cut_pretrained(tmp_path, out, [IDS])
    common = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 50}
    sliding = Gemma2ForCausalLM(Gemma2Config(**common, num_attention_heads=2, num_key_value_heads=2, head_dim=8))
    with refused("Gemma2ForCausalLM", "full_attention and sliding_attention"):
        cut_pretrained(saved(tmp_path / "sliding", sliding), out, [IDS])
    index = json.loads((source / "model.safetensors.index.json").read_text())
    lost = index["weight_map"].pop("model.layers.1.mlp.up_proj.weight")
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused("model.layers.1.mlp.up_proj.weight", "LlamaForCausalLM"):
        cut_pretrained(source, out, [IDS])
    index["weight_map"]["model.layers.1.mlp.up_proj.weight"] = f"../{lost}"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused(f"../{lost}", "outside the folder"):
        cut_pretrained(source, out, [IDS])
    index["weight_map"]["model.layers.1.mlp.up_proj.weight"] = next(
        file for file in index["weight_map"].values() if file != lost
    )
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused("model.layers.1.mlp.up_proj.weight", "index"):
        cut_pretrained(source, out, [IDS])
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_other_networks_with_a_list_of_layers(tmp_path, kind):
    torch.manual_seed(0)
    model: Any
    if kind == "bert":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
        model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=50))
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_inner=48, n_layer=3, n_head=4, vocab_size=50, n_positions=16))
    source, out = saved(tmp_path / "dense", model.eval()), tmp_path / "small"
    found = cut_pretrained(source, out, [IDS], kinds=["neurons"], sparsity=0.5)
    small = type(model).from_pretrained(out).eval()
    assert sum(p.numel() for p in small.parameters()) == found.small < found.dense
    apply_cut(model, found.plan)
    assert [p.shape for p in model.parameters()] == [p.shape for p in small.parameters()]


LIMITED = """
import resource, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from gsprune.integrations.layer_by_layer import cut_pretrained
torch.set_num_threads(1)
source, small, megabytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
ids = torch.randint(0, 50, (8, 16), generator=torch.Generator().manual_seed(0))
cut_pretrained(sys.argv[4], small + "-first", [ids])  # what is imported on the way does not count
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + megabytes * 2**20,) * 2)
print(cut_pretrained(source, small, [ids]))
try:
    model = LlamaForCausalLM.from_pretrained(source)
    print("loaded", sum(p.clone().numel() for p in model.parameters()))
except (MemoryError, RuntimeError) as error:
    print("too large for this process:", type(error).__name__)
"""


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit counts private memory on Linux")
def test_a_network_that_does_not_fit_into_memory_is_cut(tmp_path):
    """84 MB of parameters in a process that may take 56 MB more than it has."""
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    large = llama(**sizes, num_hidden_layers=4, vocab_size=80_000)
    saved(tmp_path / "dense", large), saved(tmp_path / "tiny", llama(**sizes))
    arguments = [str(tmp_path / "dense"), str(tmp_path / "small"), "56", str(tmp_path / "tiny")]
    # freed memory goes back to the system at once: what is left of earlier steps does not count
    memory = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **memory},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "4 layers cut by 8 samples" in result.stdout
    assert "too large for this process" in result.stdout
    small = LlamaForCausalLM.from_pretrained(tmp_path / "small")
    assert (small.config.num_attention_heads, small.config.intermediate_size) == (4, 128)
    assert torch.equal(small.lm_head.weight, large.lm_head.weight)
