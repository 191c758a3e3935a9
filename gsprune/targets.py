"""What is being pruned, behind one interface: one tensor's weights, or one structure's units. Imports torch alone.

A target owns its running score and its mask. It knows nothing of schedules, of other targets or of when a mask is due.
Legend: r x n = selection groups as `selection.select` ranks them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gsprune.blocks import Scratch, blocks
from gsprune.criteria import Criterion
from gsprune.names import choose
from gsprune.patterns import Pattern, Tile
from gsprune.selection import PRUNED

if TYPE_CHECKING:
    from gsprune.structures import Member, Structure

_MAGNITUDE_BITS = 0x7FFFFFFF  # all of a float32 but its sign


class Verdict:
    """Whether this step's gradients count, kept on the device: nothing waits for it.

    A batch that does not count adds nothing and lets nothing decay: magnitudes are masked to 0 bit by bit (0 * inf
    would be NaN), and the factor of the running score is 1.
    """

    def __init__(self, finite: Tensor, decay: float) -> None:
        bits = torch.full_like(finite, _MAGNITUDE_BITS, dtype=torch.int32)
        self.bits = torch.where(finite, bits, torch.zeros_like(bits))
        factor = torch.full_like(finite, decay, dtype=torch.float32)
        self.decay = torch.where(finite, factor, torch.ones_like(factor))

    def add_(self, score: Tensor, change: Tensor) -> None:
        """score <- decay * score + abs(change); overwrites `change` (both float32)."""
        change.view(torch.int32).bitwise_and_(self.bits)
        torch.addcmul(change, score, self.decay, out=score)


class Target(ABC):
    """One tensor's weights or one structure's units: what can be scored, selected and masked.

    Attributes:
        name: of the tensor or structure.
        score: running score S, float32: of the weight's shape, or (units,). -inf where pruned.
        keep: mask of the same shape, True = kept; None before the first mask.
        total, pruned: number of weights or units, and how many are pruned.
    """

    name: str
    score: Tensor
    keep: Tensor | None = None
    total: int
    pruned: int = 0

    @abstractmethod
    def probe(self, criterion: Criterion) -> Tensor:
        """A 0-dim tensor that is finite if and only if what this step would add is."""

    @abstractmethod
    def accumulate_(self, criterion: Criterion, verdict: Verdict, scratch: Scratch) -> None:
        """Add this step's change to the running score."""

    @abstractmethod
    def compute_(self, criterion: Criterion) -> None:
        """Set the score of a criterion that is not cumulative."""

    @abstractmethod
    def groups(self) -> Tensor:
        """Scores of the selection groups, (r, n)."""

    def protected(self, groups: Tensor) -> Tensor | None:
        """Groups that are kept whatever the sparsity."""
        return None

    @abstractmethod
    def set_keep(self, keep_rn: Tensor) -> None:
        """Take over a selection: the mask, and -inf in the score of what it prunes."""

    @abstractmethod
    def apply_(self, scratch: Scratch) -> None:
        """Zero the pruned entries of the weights."""

    @abstractmethod
    def mask_state_(self, optimizer: Optimizer, scratch: Scratch) -> None:
        """Zero the optimizer's memory (momentum, moments) of the pruned entries."""

    def load(self, score: Tensor, keep: Tensor | None) -> None:
        """Take over a saved score and mask."""
        for saved in (score, keep):
            if saved is not None and saved.shape != self.score.shape:
                raise ValueError(f"{self.name} has shape {_dims(self.score)}, the saved state {_dims(saved)}")
        self.score.copy_(score)
        if keep is not None:
            self._take(keep.to(self.score.device))

    def _take(self, keep: Tensor) -> None:
        self.keep = torch.empty_like(self.score, dtype=torch.bool).copy_(keep)
        self.score.masked_fill_(~self.keep, PRUNED)
        self.pruned = self.total - int(self.keep.sum())


class WeightTarget(Target):
    """Single weights, tiles or blocks of one weight tensor."""

    def __init__(self, name: str, weight: nn.Parameter, pattern: Pattern, *, per_channel: bool = False) -> None:
        pattern.check(name, weight.shape)
        self.name, self.weight, self.pattern, self.per_channel = name, weight, pattern, per_channel
        self.score = torch.zeros_like(weight, dtype=torch.float32, requires_grad=False)
        self.total = weight.numel()

    def probe(self, criterion: Criterion) -> Tensor:
        # A sum is the cheapest pass that inf and NaN survive; it overflows only where the gradient is useless anyway.
        return _grad(self.name, self.weight).sum(dtype=torch.float32)

    def accumulate_(self, criterion: Criterion, verdict: Verdict, scratch: Scratch) -> None:
        tensors = (self.weight.detach(), _grad(self.name, self.weight), self.score)
        for weight, grad, score in blocks(*tensors):
            change = criterion.weights(weight, grad, name=self.name, out=scratch.like(score))
            verdict.add_(score, change)

    def compute_(self, criterion: Criterion) -> None:
        self.score.copy_(criterion.weights(self.weight.detach(), None, name=self.name))
        if self.keep is not None:
            self.score.masked_fill_(~self.keep, PRUNED)

    def groups(self) -> Tensor:
        groups = self.pattern.to_groups(self.score)
        return groups if self.per_channel else groups.reshape(1, -1)

    def protected(self, groups: Tensor) -> Tensor | None:
        return self.pattern.protected(groups)

    def set_keep(self, keep_rn: Tensor) -> None:
        rows = len(self.weight) // self.pattern.rows if isinstance(self.pattern, Tile) else len(self.weight)
        self._take(self.pattern.to_weights(keep_rn.reshape(rows, -1), self.weight.shape))

    def apply_(self, scratch: Scratch) -> None:
        self._multiply_(self.weight.detach(), scratch)

    def mask_state_(self, optimizer: Optimizer, scratch: Scratch) -> None:
        for state in _state(optimizer, self.weight):
            self._multiply_(state, scratch)

    def _multiply_(self, values: Tensor, scratch: Scratch) -> None:
        if self.keep is None:
            return
        # bool -> float32 by way of uint8, which has a vectorised conversion: half the time of values.mul_(keep)
        for value, keep in blocks(values, self.keep.view(torch.uint8)):
            value.mul_(scratch.like(keep).copy_(keep))


class UnitTarget(Target):
    """The units of one structure."""

    def __init__(self, structure: Structure, model: nn.Module) -> None:
        self.name, self.structure = structure.name, structure
        self.tensors = {member.tensor: model.get_parameter(member.tensor) for member in _scored(structure)}
        device = self.tensors[structure.consumers[0].tensor].device
        self._here = _moved(structure, device)
        self._rows: dict[Member, Tensor] = {}  # the mask as one row of each consumer
        self.score = torch.zeros(structure.units, device=device)
        self.total = structure.units
        self._change: Tensor | None = None

    def probe(self, criterion: Criterion) -> Tensor:
        self._change = criterion.units(self._here, self._read).float()
        return self._change.sum()

    def accumulate_(self, criterion: Criterion, verdict: Verdict, scratch: Scratch) -> None:
        assert self._change is not None
        verdict.add_(self.score, self._change)
        self._change = None

    def compute_(self, criterion: Criterion) -> None:
        self.score.copy_(criterion.units(self._here, lambda name: (self.tensors[name].detach(), None)))
        if self.keep is not None:
            self.score.masked_fill_(~self.keep, PRUNED)

    def groups(self) -> Tensor:
        return self.score.reshape(1, -1)

    def set_keep(self, keep_rn: Tensor) -> None:
        self._take(keep_rn.reshape(-1))

    def apply_(self, scratch: Scratch) -> None:
        for member, row in self._rows.items():
            self.tensors[member.tensor].detach().mul_(row)  # a fifth of the time of filling the pruned columns

    def mask_state_(self, optimizer: Optimizer, scratch: Scratch) -> None:
        for member, row in self._rows.items():
            for state in _state(optimizer, self.tensors[member.tensor]):
                state.mul_(row)

    def _take(self, keep: Tensor) -> None:
        super()._take(keep)
        assert self.keep is not None
        self._rows = {m: self._row(m, m.index[~self.keep].flatten()) for m in self._here.consumers}

    def _row(self, member: Member, pruned: Tensor) -> Tensor:
        """Ones, and zeros in the pruned columns: as one row of the tensor, in its memory layout."""
        return torch.ones_like(self.tensors[member.tensor].detach()[:1]).index_fill_(member.dim, pruned, 0)

    def _read(self, name: str) -> tuple[Tensor, Tensor | None]:
        return self.tensors[name].detach(), _grad(name, self.tensors[name])


def weight_targets(
    model: nn.Module, pattern: Pattern, *, include: Sequence[str], exclude: Sequence[str], per_channel: bool
) -> list[WeightTarget]:
    """A target for every convolution's and linear layer's weight the name patterns choose.

    Raises:
        ValueError: a name pattern matches nothing, two chosen names are one tensor, or a tile does not fit.
    """
    named = {
        f"{name}.weight" if name else "weight": module._parameters["weight"]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and module._parameters.get("weight") is not None
    }
    chosen = choose({name: (name, name.removesuffix(".weight")) for name in named}, include, exclude)
    seen: dict[int, str] = {}
    for name in chosen:
        first = seen.setdefault(id(named[name]), name)
        if first != name:
            raise ValueError(f"{first} and {name} are one tensor and would be pruned twice: exclude one of them")
    weights = ((name, named[name]) for name in chosen)
    return [WeightTarget(name, w, pattern, per_channel=per_channel) for name, w in weights if w is not None]


def _scored(structure: Structure) -> Iterable[Member]:
    yield from structure.producers
    yield from structure.gates
    yield from structure.consumers


def _moved(structure: Structure, device: torch.device) -> Structure:
    """The structure with its positions on the device of its tensors: looking them up copies nothing."""
    here = {m: replace(m, index=m.index.to(device)) for m in _scored(structure)}
    producers, gates, consumers = (
        tuple(here[m] for m in side) for side in (structure.producers, structure.gates, structure.consumers)
    )
    return replace(structure, producers=producers, gates=gates, consumers=consumers)


def _grad(name: str, parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise ValueError(f"{name} has no gradient: it is frozen or not used by the loss; exclude it from pruning")
    return parameter.grad


def _state(optimizer: Optimizer, parameter: Tensor) -> list[Tensor]:
    """The optimizer's tensors that have one entry for each of the parameter's."""
    state = optimizer.state.get(parameter, {})
    return [v for v in state.values() if isinstance(v, Tensor) and v.shape == parameter.shape]


def _dims(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) if tensor.dim() else "one number"


assert math.isinf(PRUNED)  # a pruned score has to survive decay * score + change
