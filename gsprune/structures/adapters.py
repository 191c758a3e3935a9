"""LoRA layers, as PEFT wraps others in them: by what they hold, without importing PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from gsprune.text.names import joined

__all__ = ["adapted_weights", "is_rank", "lora_layers"]


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that add the product of two low-rank matrices to what their `base_layer` computes."""
    for name, module in model.named_modules():
        down, base = getattr(module, "lora_A", None), getattr(module, "base_layer", None)
        if isinstance(down, nn.ModuleDict) and isinstance(base, nn.Module) and (len(down) or _tables(module)):
            yield name, module


def adapted_weights(model: nn.Module) -> dict[str, str]:
    """Why single weights of these tensors are left alone: those that something is added to, and what is added."""
    found: dict[str, str] = {}
    for path, layer in lora_layers(model):
        found[joined(path, "base_layer.weight")] = ADDED_TO
        for name, _ in layer.named_parameters(prefix=path):
            if ".lora_" in name:
                found[name] = ADAPTER
    return found


def is_rank(name: str) -> bool:
    """Whether units of this layer are the rank of an adapter.

    >>> is_rank("layers.0.q_proj.lora_A.default"), is_rank("layers.0.q_proj.base_layer")
    (True, False)
    """
    return any(part in ("lora_A", "lora_embedding_A") for part in name.split("."))


ADDED_TO = "an adapter adds to it, so that a zero here is none in what the layer computes: merge the adapters first"
ADAPTER = "it is part of an adapter"
RANK = "its units are the rank of an adapter, which the adapter's configuration fixes"


def _tables(module: Any) -> int:
    return len(getattr(module, "lora_embedding_A", ()))
