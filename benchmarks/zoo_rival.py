"""Networks cut at half by torch-pruning, as its examples do: `zoo.py` puts the figures beside ours.

Layers that make the outputs are left alone. Attentions are pruned in three ways, the first that runs and keeps the
output's shape counts: whole heads, dimensions of every head, and without saying what the heads are. Attributes that
count heads or their width are set afterwards, as its examples do by hand for each kind of network.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from zoo_vision import Entry

from gsprune.structures.attention import GROUP_NAMES, HEAD_NAMES, SIZE_NAMES, WIDTH_NAMES
from gsprune.structures.example import call, tensors_in
from gsprune.structures.matrices import is_conv1d

_QUERIES = (
    *("qkv", "q", "query", "q_proj", "qkv_proj", "to_q", "to_qkv", "c_attn", "Wqkv", "in_proj", "query_key_value"),
    *("q_lin", "query_proj"),
)
_KEYS = ("k", "v", "kv", "key", "value", "k_proj", "v_proj", "to_k", "to_v", "k_lin", "v_lin", "key_proj", "value_proj")
_FUSED = ("qkv", "c_attn", "in_proj", "query_key_value")


def rival_of(entry: Entry, limit: float) -> dict[str, Any]:
    """The share of the parameters that is left and the seconds of the way that succeeds, or the first way's error."""
    first: str | None = None
    for way in ("heads", "dimensions", "plain"):
        torch.manual_seed(0)
        model, x = entry.build().eval(), entry.example()
        heads = dict(_heads(model))
        if way != "plain" and not heads:
            continue
        start = time.process_time()
        try:
            before = sum(p.numel() for p in model.parameters())
            shapes = _shapes(model, x)
            _prune(model, x, way, heads, entry.ends(model) if entry.ends else _ends(model, x))
            if _shapes(model, x) != shapes:
                raise ValueError("other shapes of the output")
            left = sum(p.numel() for p in model.parameters()) / before
            return {"left": left, "seconds": time.process_time() - start, "way": way}
        except Exception as error:
            text = (str(error).strip().splitlines() or [""])[0]
            first = first or f"{type(error).__name__}: {text}"[:100]
    return {"error": first}


def _prune(model: nn.Module, x: Any, way: str, heads: dict[nn.Module, int], ends: list[nn.Module]) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    options: dict[str, Any] = {}
    if way != "plain":
        share = 0.5 if way == "heads" else 0.0
        options = {"num_heads": dict(heads), "prune_num_heads": way == "heads", "prune_head_dims": way != "heads"}
        options |= {"head_pruning_ratio": share}
    pruner = tp.pruner.BasePruner(
        model,
        x,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=ends,
        output_transform=lambda y: [t for t in tensors_in(y) if t.grad_fn is not None],
        out_channel_groups={
            layer: 2 for name, layer in model.named_modules() if name.endswith("gate_up_proj") and _is_linear(layer)
        },
        **options,
    )
    pruner.step()
    for module in model.modules():
        mine = {name: layer for name, layer in module.named_children() if layer in heads}
        if way != "plain" and mine:
            _set(module, mine, pruner.num_heads)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)


def _heads(model: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """Projections of attentions and the number of their heads."""
    for module in model.modules():
        heads, groups = _number(module, HEAD_NAMES), _number(module, GROUP_NAMES)
        config = getattr(module, "config", None)
        heads = heads or getattr(config, "num_attention_heads", None)
        if hasattr(module, "q_proj"):
            groups = groups or getattr(config, "num_key_value_heads", None)
        if type(heads) is not int or isinstance(module, nn.MultiheadAttention):
            continue
        for name, layer in module.named_children():
            if _is_linear(layer) and name in (*_QUERIES, *_KEYS):
                number = groups if groups and name in ("k_proj", "v_proj") else heads
                if layer.weight.shape[0] % number == 0:
                    yield layer, number


def _number(module: nn.Module, names: tuple[str, ...]) -> int | None:
    return next((getattr(module, n) for n in names if type(getattr(module, n, None)) is int), None)


def _set(module: Any, layers: dict[str, Any], heads: dict[nn.Module, int]) -> None:
    name, layer = next(iter(layers.items()))
    width = layer.weight.shape[0] // (3 if any(part in name.lower() for part in _FUSED) else 1)
    number = heads.get(layer, _number(module, HEAD_NAMES))
    groups = heads.get(layers["k_proj"]) if "k_proj" in layers else None
    amounts: dict[tuple[str, ...], int | None] = {
        HEAD_NAMES: number,
        GROUP_NAMES: groups,
        tuple(n for n in SIZE_NAMES if "groups" not in n): width // number if number else None,
        (*WIDTH_NAMES, "embed_dim", "dim", "hidden_size", "n_embd"): width,
    }
    for names, amount in amounts.items():
        for attribute in names:
            if amount and type(getattr(module, attribute, None)) is int:
                setattr(module, attribute, amount)
    if groups and number:
        module.num_key_value_groups = number // groups


def _ends(model: nn.Module, x: Any) -> list[nn.Module]:
    """The layers that make the outputs, by autograd's graph."""
    made: dict[Any, nn.Module] = {}

    def note(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            made[output.grad_fn] = module

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd) or is_conv1d(m)]
    hooks = [m.register_forward_hook(note) for m in layers]
    open_ = [t.grad_fn for t in tensors_in(call(model, x))]
    for hook in hooks:
        hook.remove()
    found, seen = [], set()
    while open_:
        node = open_.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in made:
            found.append(made[node])
        else:
            open_ += [before for before, _ in node.next_functions]
    return list(dict.fromkeys(found))


def _shapes(model: nn.Module, x: Any) -> list[torch.Size]:
    with torch.no_grad():
        return [t.shape for t in tensors_in(call(model.eval(), x))]
