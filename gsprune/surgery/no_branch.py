"""A module in the place of a residual branch that was cut out: it adds nothing, whatever it is called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gsprune.structures.example import tensors_in


class NoBranch(nn.Module):
    """Answers with zeros of the shape and type of the first tensor that it is given.

    In the place of an attention of transformers it keeps the key/value cache as long as the others' are: caches count
    the tokens seen by the first layer.

    Args:
        outputs: 0, it returns a tensor; n, a tuple of n, the zeros and then None.
        layer_idx: which layer of a cache is its own, if any.

    >>> NoBranch()(torch.ones(2)), NoBranch(2)(hidden_states=torch.ones(1))
    (tensor([0., 0.]), (tensor([0.]), None))
    """

    def __init__(self, outputs: int = 0, layer_idx: int | None = None) -> None:
        super().__init__()
        self.outputs, self.layer_idx = outputs, layer_idx

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros."""
        first = next(tensors_in((args, kwargs)))
        zeros = torch.zeros_like(first)
        cache = kwargs.get("past_key_values", kwargs.get("past_key_value"))
        if self.layer_idx is not None and callable(getattr(cache, "update", None)):
            self._count(cache, first)
        return zeros if not self.outputs else (zeros, *[None] * (self.outputs - 1))

    def extra_repr(self) -> str:
        return f"outputs={self.outputs}" if self.outputs else ""

    def _count(self, cache: Any, tokens: Tensor) -> None:
        """One head of width 1 for each token."""
        nothing = tokens.new_zeros(tokens.shape[0], 1, tokens.shape[1], 1)
        cache.update(nothing, nothing, self.layer_idx)


def no_branch(module: nn.Module, outputs: int) -> NoBranch:
    """What takes the place of `module`, in its mode, with its numbers and flags, which others may look at."""
    layer = getattr(module, "layer_idx", None)
    new = NoBranch(outputs, layer if type(layer) is int else None).train(module.training)
    for name, value in vars(module).items():
        if not name.startswith("_") and name not in vars(new) and isinstance(value, bool | int | float | str | tuple):
            setattr(new, name, value)
    return new


def inside(name: str, paths: Any) -> bool:
    """Whether a tensor, attribute or module is one of these modules', or one of these.

    >>> inside("blocks.0.attn.q.weight", ["blocks.0.attn"]), inside("blocks.0.attn2.weight", ["blocks.0.attn"])
    (True, False)
    """
    return any(name == path or name.startswith(f"{path}.") for path in paths)
