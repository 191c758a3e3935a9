"""What attentions of any library have in common: the names of their head counts and widths, and their kernels."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

# Attributes by which attentions of whatever library say how their projections are cut.
HEAD_NAMES = ("num_heads", "num_attention_heads", "n_heads", "heads", "nhead", "n_head")
GROUP_NAMES = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
WIDTH_NAMES = ("all_head_size", "inner_dim", "attn_dim", "attention_dim", "split_size")
STREAM_NAMES = ("hidden_dim", "embed_dim", "hidden_size", "d_model", "kv_lora_rank")  # of its layers
SIZE_NAMES = ("head_dim", "attention_head_size", "head_size", "d_head", "num_key_value_groups")  # not cut


def reads(module: nn.Module, *names: str) -> bool:
    """Whether a module's own `forward` names all of these attributes (of itself or of what it holds)."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and set(names) <= set(code.co_names)


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Inside the block PyTorch's encoder layers run as in training: their fused path puts zeros at padded positions."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def attention_kernel(model: nn.Module) -> str:
    """The name of transformers' attention function; "" for other models."""
    return str(getattr(getattr(model, "config", None), "_attn_implementation", None) or "")


def set_attention_kernel(model: nn.Module, name: str) -> None:
    model.set_attn_implementation(name)  # type: ignore[operator]
