"""PEFT: units are pruned while LoRA trains the network; frozen weights are scored by the adapters' gradients."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gsprune.criteria.base import Criterion
from gsprune.extras import need
from gsprune.pruner.pruner import Pruner
from gsprune.pruner.rule import Rule, Settings
from gsprune.pruner.targets import given_gradients
from gsprune.structures.adapters import lora_layers
from gsprune.structures.matrices import is_conv1d

__all__ = ["LoraPruner"]


class LoraPruner(Pruner):
    """A `gsprune.Pruner` of units for a `PeftModel` whose adapters are LoRA and whose other weights are frozen.

    A frozen weight W, to which the layer adds s * B A, has no gradient. Its estimate is the change of that sum in a
    step of plain SGD (LoRAPrune, Zhang et al., ACL 2024, equation 7):

        G = s * (dB A + B dA - dB dA)        with dA, dB the gradients of A, B

    It is made for each score and dropped again, so it costs the memory of the scored weights for that moment. `Abs`
    and `Fisher` sum w * g over all columns that read a unit, W's and A's, which is the sum over the merged weight.
    Units are masked and cut in W, A and B alike: `merge_and_unload` keeps both. Ranks of adapters are no units.

    Args:
        model: a `PeftModel`, or a network with its adapters injected.
        optimizer: of the adapters.
        criterion, settings: as of `gsprune.Pruner`; rules of units only. Every layer whose weights a criterion reads
            (for `Abs` those behind the units: output projections, `down_proj`) needs an adapter.

    Raises:
        ValueError: there is no LoRA layer; adapters are merged, several or none are active, or are of another kind
            (DoRA and other variants, embeddings, convolutions, quantised layers); a rule prunes single weights; what
            `Pruner` refuses, such as a weight without an adapter.
        MissingExtraError: peft is not installed.

    Example:
        `pruner = LoraPruner(model, Abs(), optimizer=optimizer, target_sparsity=0.25, example_input=batch,
        steps_per_epoch=len(loader), epochs=3)`, then `attach`, train, `finish`, `model.merge_and_unload()`.
    """

    def __init__(self, model: nn.Module, criterion: Criterion | None = None, **settings: Any) -> None:
        check_adapters(model)
        own: Any = {name: settings[name] for name in Settings.__annotations__ if name in settings}
        given = settings.get("rules") or ([] if criterion is None else [Rule(criterion, **own)])
        if any(isinstance(rule, Rule) and not rule.units for rule in given):
            raise ValueError(
                "single weights cannot be pruned under LoRA: an adapter adds to them, and their zeros would not "
                "survive the merge; merge first (merge_and_unload), or prune units"
            )
        with given_gradients(_frozen(model)):
            super().__init__(model, criterion, **settings)

    def _score(
        self,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        *,
        held: Collection[int] | None = None,
        judged: Collection[int] = (),
    ) -> None:
        if self.finished and self.updates:
            return
        with estimated_gradients(self.model, grad_scale):
            super()._score(grad_scale, found_inf, held=held, judged=judged)


def check_adapters(model: nn.Module) -> None:
    """
    Raises:
        ValueError: the model has no LoRA layer that can be followed, or one that cannot.
    """
    peft: Any = need("peft")
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no LoRA layer: make it with peft.get_peft_model, or use gsprune.Pruner"
        )
    for name, layer in layers.items():
        base, active = layer.base_layer, list(layer.active_adapters)
        if type(layer) is not peft.tuners.lora.Linear or not (isinstance(base, nn.Linear) or is_conv1d(base)):
            kind, inner = type(layer).__name__, type(base).__name__
            raise ValueError(
                f"{name} is LoRA's {kind} around a {inner}: only plain linear layers can be pruned under LoRA"
            )
        if layer.merged or layer.disable_adapters:
            raise ValueError(
                f"the adapter of {name} is merged or disabled: its weights can be pruned by gsprune.Pruner"
            )
        if len(active) != 1 or active[0] not in layer.lora_A:
            raise ValueError(f"{name} has {len(active)} active adapters: one has to be")
        if active[0] in getattr(layer, "lora_variant", {}):
            variant = type(layer.lora_variant[active[0]]).__name__
            raise ValueError(f"{name} is a variant of LoRA ({variant}), whose gradients say something else")
        if base.weight.requires_grad:
            raise ValueError(f"{name}.base_layer.weight is trained itself: freeze it, or use gsprune.Pruner")


@contextmanager
def estimated_gradients(model: nn.Module, scale: Tensor | None = None) -> Iterator[None]:
    """Inside the block every frozen weight under an adapter has its estimate as `.grad`, where the adapter has one.

    Args:
        scale: that the adapters' gradients are multiplied by (of a gradient scaler); the estimate is, too.
    """
    weights = []
    try:
        with torch.no_grad():
            for _, layer in lora_layers(model):
                grad = _estimate(layer, scale)
                if grad is not None:
                    layer.base_layer.weight.grad = grad
                    weights.append(layer.base_layer.weight)
        with given_gradients(_frozen(model)):
            yield
    finally:
        for weight in weights:
            weight.grad = None


def _estimate(layer: Any, scale: Tensor | None) -> Tensor | None:
    (name,) = layer.active_adapters
    a_ri, b_or = layer.lora_A[name].weight, layer.lora_B[name].weight  # r = ranks, i = inputs, o = outputs
    if a_ri.grad is None or b_or.grad is None:
        return None
    da, db = a_ri.grad.float(), b_or.grad.float()
    both = db @ da if scale is None else db @ da / scale.to(db.device)
    grad: Tensor = layer.scaling[name] * (db @ a_ri.float() + b_or.float() @ da - both)
    weight: Tensor = layer.base_layer.weight
    return (grad.T if layer.fan_in_fan_out else grad).to(weight.dtype)


def _frozen(model: nn.Module) -> list[Tensor]:
    return [layer.base_layer.weight for _, layer in lora_layers(model)]
