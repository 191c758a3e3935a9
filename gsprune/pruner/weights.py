"""Targets of single weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gsprune.criteria import Criterion
from gsprune.pruner.compiled import add_product_
from gsprune.pruner.targets import (
    Target,
    Targets,
    Verdict,
    check_spread_alike,
    cut_in_blocks,
    flat_line,
    merged_runs,
    of_shape,
    one_device,
    strided,
)
from gsprune.ranking.blocks import BLOCK
from gsprune.ranking.patterns import Pattern, Tile
from gsprune.surgery.optimizers import moments


class WeightTarget(Target):
    """Single weights, tiles or blocks of one weight tensor."""

    def __init__(
        self,
        name: str,
        weight: nn.Parameter,
        pattern: Pattern,
        *,
        per_channel: bool = False,
        inputs_first: bool = False,
        value: Callable[[], Tensor] | None = None,
    ) -> None:
        self.name, self.weight, self.pattern, self.per_channel = name, weight, pattern, per_channel
        self._inputs_first = inputs_first
        self._turned = inputs_first and (per_channel or pattern != Tile(1, 1))  # single weights have no layout
        self._value = value
        pattern.check(name, self._outputs_first(weight).shape)
        here = self.here(weight)
        if here.stride() != torch.empty_like(here).stride():
            raise ValueError(f"{name} shares or skips memory (its strides are {here.stride()}): exclude it")
        self.total = weight.numel()

    @property
    def outputs(self) -> int:
        """Rows of the matrix, as `y = W x` has it."""
        return self.weight.shape[1 if self._inputs_first else 0]

    def own(self) -> Mapping[str, nn.Parameter]:
        return {self.name: self.weight}

    def scored(self, criterion: Criterion) -> Mapping[str, Tensor]:
        return self.own()

    def value(self) -> Tensor:
        """What the layer computes with: the weight, or what is computed from it."""
        return self.weight.detach() if self._value is None else self._value()

    def named(self, model: nn.Module) -> Mapping[str, nn.Parameter]:
        return self.own()

    def find(self, model: nn.Module) -> None:
        found = of_shape(model, self.name, self.weight.shape)
        check_spread_alike(self.name, found, self.weight)
        self.weight = found

    def mask(self, network: nn.Module) -> None:
        weight = self.here(of_shape(network, self.name, self.weight.shape)).detach()
        weight.masked_fill_(~self.keep.to(weight.device), 0)

    def groups(self) -> Tensor:
        groups = self.pattern.to_groups(self._outputs_first(self.ranked))
        return groups if self.per_channel else groups.reshape(1, -1)

    def protected(self, groups: Tensor) -> Tensor | None:
        return self.pattern.protected(groups)

    def set_keep(self, keep_rn: Tensor) -> None:
        shape = self._outputs_first(self.weight).shape
        rows = shape[0] // self.pattern.rows if isinstance(self.pattern, Tile) else shape[0]
        self._take(self._outputs_first(self.pattern.to_weights(keep_rn.reshape(rows, -1), shape)))

    def _outputs_first(self, tensor: Tensor) -> Tensor:
        """As patterns see it; its own inverse."""
        return tensor.transpose(0, 1) if self._turned else tensor

    def drop(self, kept: Mapping[int, Tensor]) -> None:
        """Prune every position that is not kept of these dimensions."""
        keep = self.keep.clone()
        for dim, positions in kept.items():
            gone = torch.ones(keep.shape[dim], dtype=torch.bool).index_fill_(0, positions, False)
            keep.index_fill_(dim, gone.nonzero().flatten().to(keep.device), False)
        self._take(keep)

    def line(self) -> Tensor:
        """The weight's memory as one line.

        Raises:
            ValueError: the weight was moved or laid out anew since the pruner was made.
        """
        weight = self.here(self.weight)
        if weight.stride() != self.score.stride() or weight.device != self.score.device:
            raise ValueError(
                f"{self.name} changed its device or memory format: move the model before making the Pruner"
            )
        return flat_line(weight)

    def grad_line(self) -> Tensor | None:
        """The gradient as one line, in the weight's own memory format; None if there is none."""
        if self.weight.grad is None or not self.due:
            return None
        grad, weight = self.here(strided(self.weight.grad)), self.here(self.weight)
        return flat_line(grad if grad.stride() == weight.stride() else torch.empty_like(weight).copy_(grad))


class WeightTargets(Targets):
    """All single weights, worked through in blocks of memory that fit the cache, whatever tensor they belong to."""

    targets: Sequence[WeightTarget]

    def __init__(self, targets: Sequence[WeightTarget]) -> None:
        weights = [target.here(target.weight) for target in targets]
        self._sizes = [weight.numel() for weight in weights]
        super().__init__(targets, sum(self._sizes), one_device(weights))
        self._share_out()
        self._blocks = cut_in_blocks(self._sizes, BLOCK if self.score.is_cpu else max(BLOCK, *self._sizes))

    def _share_out(self) -> None:
        start = 0
        for target in self.targets:
            weight = target.here(target.weight)
            stop = start + weight.numel()
            target.score = self.score[start:stop].as_strided(weight.shape, weight.stride())
            target.keep = self.keep[start:stop].as_strided(weight.shape, weight.stride())
            if self.spread is not None:
                target.spread = self.spread[start:stop].as_strided(weight.shape, weight.stride())
            start = stop

    def probe(self, criterion: Criterion, judged: Collection[int] = ()) -> Tensor:
        # a sum is the cheapest pass that inf and NaN survive; it overflows only where the gradient is useless anyway
        grads = [(target, target.weight.grad if target.due else None) for target in self.targets]
        self.present = [grad is not None for _, grad in grads]
        unknown = [(t, grad) for t, grad in grads if grad is not None and id(t.weight) not in judged]
        sums = [target.here(grad).sum(dtype=torch.float32) for target, grad in unknown]
        return torch.stack(sums or [self.score.new_zeros(())]).isfinite().all()

    def accumulate_(self, criterion: Criterion, verdict: Verdict) -> None:
        weights = [target.line() for target in self.targets]
        grads = [target.grad_line() for target in self.targets]
        if criterion.compiled:
            for target, weight, grad in reversed([*zip(self.targets, weights, grads, strict=True)]):
                if grad is not None:
                    add_product_(flat_line(target.score), weight, grad, verdict.bits, verdict.decay, verdict.grad_scale)
            return
        for start, stop, pieces in reversed(self._blocks):  # what was probed last is still in the cache
            changes = self.scratch.take(stop - start, self.score.device)
            filled = []
            for i, lo, hi, at in pieces:
                if (grad := grads[i]) is None:
                    continue
                out = changes[at : at + hi - lo]
                change = criterion.weights(weights[i][lo:hi], grad[lo:hi], name=self.targets[i].name, out=out)
                if change is not out:
                    out.copy_(change)
                filled.append((at, at + hi - lo))
            for lo, hi in merged_runs(filled):
                own = slice(start + lo, start + hi)
                verdict.add_(self.score[own], changes[lo:hi], None if self.spread is None else self.spread[own])

    def compute_(self, criterion: Criterion) -> None:
        for target in self.targets:
            target.score.copy_(criterion.weights(target.value(), None, name=target.name))
        self.settle_()

    def settle_(self) -> None:
        for start, stop, _ in self._blocks:
            # 1 / mask - 1 is 0 where kept and inf where pruned; a third of the time of a masked fill
            self.score[start:stop].sub_(self._mask(start, stop).reciprocal_().sub_(1))
            if self.spread is not None:
                self.spread[start:stop].masked_fill_(~self.keep[start:stop], 0)

    def apply_(self) -> None:
        masks = _as_bytes(self.keep).split_with_sizes(self._sizes)
        for target, mask in zip(self.targets, masks, strict=True):
            if target.pruned:
                target.line().mul_(mask)

    def mask_state_(self, optimizers: Sequence[Optimizer]) -> None:
        for target in self.targets:
            for state in moments(optimizers, target.weight):
                target.here(state).mul_(_as_bytes(target.keep))

    def mask_grads_(self) -> None:
        for target in self.targets if self.pruned else ():
            if target.weight.grad is not None:
                target.here(target.weight.grad).mul_(_as_bytes(target.keep))

    def _mask(self, start: int, stop: int) -> Tensor:
        """The flat mask as ones and zeros."""
        return self.scratch.take(stop - start, self.keep.device).copy_(_as_bytes(self.keep[start:stop]))


def _as_bytes(keep: Tensor) -> Tensor:
    """A mask as ones and zeros, the same memory: products with these are vectorised, with bool they are not."""
    return keep.view(torch.int8)
