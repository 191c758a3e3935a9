"""What is being pruned, behind one interface: single weights of tensors, or units of structures. Imports torch alone.

A `Target` is one tensor or one structure, with its score and its mask: what selection looks at. `Targets` are all of
them together, side by side in one flat score and one flat mask: what a training step works through. Neither knows of
schedules or of when a mask is due. Legend: r x n = selection groups as `selection.select` ranks them.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gsprune.blocks import BLOCK, Scratch
from gsprune.criteria import Criterion
from gsprune.matrices import Matrix, find_matrices, is_sharded
from gsprune.names import choose
from gsprune.optimizers import moments
from gsprune.patterns import Pattern, Tile
from gsprune.selection import PRUNED, pruned_count, select

if TYPE_CHECKING:
    from gsprune.structures import Member, Structure

_MAGNITUDE_BITS = 0x7FFFFFFF  # all of a float32 but its sign


class Verdict:
    """Whether this step's gradients count, kept on the device: nothing waits for it.

    A batch that does not count adds nothing and lets nothing decay: magnitudes are masked to 0 bit by bit (0 * inf
    would be NaN), and the factor of the running score is 1.
    """

    def __init__(self, finite: Tensor, decay: float, grad_scale: Tensor | None = None) -> None:
        self.grad_scale = grad_scale
        bits = torch.full_like(finite, _MAGNITUDE_BITS, dtype=torch.int32)
        self.finite = finite
        self.bits = torch.where(finite, bits, torch.zeros_like(bits))
        factor = torch.full_like(finite, decay, dtype=torch.float32)
        self.decay = torch.where(finite, factor, torch.ones_like(factor))

    def add_(self, score: Tensor, change: Tensor) -> None:
        """score <- decay * score + abs(change); overwrites `change` (both float32)."""
        change.view(torch.int32).bitwise_and_(self.bits)
        if self.grad_scale is not None:
            change.div_(self.grad_scale)
        torch.addcmul(change, score, self.decay, out=score)


@dataclass(frozen=True)
class Share:
    """How many are pruned, of how many, of what: every figure of a run's sparsity is one of these.

    >>> share = Share(3, 4, "heads")
    >>> share.pruned / share.total, float(share), float(Share(0, 0, "weights"))
    (0.75, 0.75, 0.0)
    """

    pruned: int
    total: int
    of: str  # weights, channels, neurons, heads; several are named side by side, and nothing is ""

    def __float__(self) -> float:
        return self.pruned / self.total if self.total else 0.0


def sum_of(shares: Iterable[Share]) -> Share:
    """All of them as one; kinds of units are named side by side, and of single weights beside units it is of weights.

    >>> sum_of([Share(1, 2, "heads"), Share(1, 8, "heads")]), sum_of([Share(1, 2, "heads"), Share(1, 8, "neurons")])
    (Share(pruned=2, total=10, of='heads'), Share(pruned=2, total=10, of='heads and neurons'))
    """
    found = list(shares)
    kinds = list(dict.fromkeys(share.of for share in found))
    of = "weights" if "weights" in kinds else " and ".join(kinds)
    return Share(sum(share.pruned for share in found), sum(share.total for share in found), of)


class Target(ABC):
    """One tensor's weights or one structure's units.

    Attributes:
        name: of the tensor or structure.
        of: what is pruned here: weights, channels, neurons or heads.
        score: running score S, float32: of the weight's shape, or (units,). -inf where pruned.
        keep: mask of the same shape, True = kept.
        total, pruned: number of weights or units, and how many are pruned.
        due: whether the next probe looks at it: of several optimizers each step has its own part.
    """

    name: str
    score: Tensor
    keep: Tensor
    total: int
    pruned: int = 0
    of: str = "weights"
    due: bool = True

    @property
    def share(self) -> Share:
        """Pruned, of the dense network's."""
        return Share(self.pruned, self.total, self.of)

    @abstractmethod
    def own(self) -> Mapping[str, nn.Parameter]:
        """What is scored and masked, by name."""

    def replaced(self, model: nn.Module) -> bool:
        """Whether the model has other tensors in their place by now, or none."""
        return any(_parameter(model, name) is not tensor for name, tensor in self.own().items())

    @abstractmethod
    def scored(self, criterion: Criterion) -> Mapping[str, Tensor]:
        """The tensors whose gradients the criterion reads, by name."""

    @abstractmethod
    def named(self, model: nn.Module) -> Mapping[str, nn.Parameter]:
        """What is scored, masked or cut, by name."""

    @abstractmethod
    def find(self, model: nn.Module) -> None:
        """Go on with the tensors that the model has now (`load_state_dict(assign=True)` puts others in their place)."""

    @abstractmethod
    def mask(self, network: nn.Module) -> None:
        """Zero what is pruned in the model, or in a copy of it. In the end and at updates: it also zeroes a NaN."""

    @abstractmethod
    def groups(self) -> Tensor:
        """Scores of the selection groups, (r, n)."""

    def protected(self, groups: Tensor) -> Tensor | None:
        """Groups that are kept whatever the sparsity."""
        return None

    @abstractmethod
    def set_keep(self, keep_rn: Tensor) -> None:
        """Take over a selection."""

    @property
    def shape(self) -> torch.Size:
        """Of the whole score, also where this process has a part of it."""
        return self.score.shape

    def here(self, tensor: Tensor) -> Tensor:
        """The part of a tensor of that shape that this process has: all of it."""
        return tensor

    def outside(self, tensor: Tensor) -> Tensor:
        """What this process has of a score or mask, as others are to see it."""
        return tensor

    def best(self, groups: Tensor) -> float:
        """The highest of the group scores; NaN or inf if one of them is."""
        return float(groups.max())  # the maximum of a NaN is NaN

    def range(self, groups: Tensor) -> tuple[float, float]:
        """The lowest and the highest group score of what is not pruned."""
        return -self.best(-groups.masked_fill(groups.isneginf(), math.inf)), self.best(groups)

    def check(self, score: Tensor, keep: Tensor) -> None:
        """Raise a ValueError if a saved score or mask has another shape."""
        for saved in (score, keep):
            if saved.shape != self.shape:
                raise ValueError(f"{self.name} has shape {_dims(self.shape)}, the saved state {_dims(saved.shape)}")

    def load(self, score: Tensor, keep: Tensor) -> None:
        """Take over a saved score and mask of this target's shape."""
        self.score.copy_(self.here(score))
        self._take(self.here(keep))

    def _take(self, keep: Tensor) -> None:
        self.keep.copy_(keep)
        self.pruned = self.total - int(self.keep.sum())


class Targets(ABC):
    """All targets of a pruner, whose scores and masks are views of two flat tensors.

    Attributes:
        targets: the single ones, in the model's order.
        score, keep: all scores (float32) and all masks (bool), one after the other.
    """

    kind: ClassVar[str]

    def __init__(self, targets: Sequence[Target], total: int, device: torch.device) -> None:
        self.targets = targets
        self.score = torch.zeros(total, device=device)
        self.keep = torch.ones(total, dtype=torch.bool, device=device)
        self.present = [False] * len(targets)  # in the step that was probed last
        self.scratch = Scratch()

    @abstractmethod
    def _share_out(self) -> None:
        """Make the targets' scores and masks views of the flat ones."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pickling gives every view a memory of its own."""
        vars(self).update(state)
        self._share_out()

    @property
    def pruned(self) -> bool:
        """Whether there is anything to mask."""
        return any(target.pruned for target in self.targets)

    def frozen(self, criterion: Criterion) -> list[str]:
        """The tensors of what is due that the criterion reads a gradient of, and that get none (`requires_grad`)."""
        due = [target for target in self.targets if target.due]
        read = {name: tensor for target in due for name, tensor in target.scored(criterion).items()}
        return [name for name, tensor in read.items() if not tensor.requires_grad]

    def any_score(self) -> bool:
        """Whether any running score is not 0."""
        return bool(self.score.any())

    def select(
        self, groups: Sequence[Tensor], share: float, targets: Sequence[Target], *, min_kept: int
    ) -> list[Tensor]:
        """What to keep of some targets' groups, ranked together, to prune that share of them."""
        n, rows = sum(group.shape[1] for group in groups), len(groups[0])
        gone = sum(target.pruned * group.numel() // target.total for target, group in zip(targets, groups, strict=True))
        k = max(pruned_count(share, n), gone // rows)  # what is pruned stays pruned
        protected = [target.protected(group) for target, group in zip(targets, groups, strict=True)]
        known = [safe for safe in protected if safe is not None]
        return select(groups, k, protected=known or None, min_kept=min_kept)

    @abstractmethod
    def probe(self, criterion: Criterion) -> Tensor:
        """A 0-dim bool on the device: whether what this step would add is finite.

        A target without a gradient (None) has taken no part in this step: nothing is added, and its score stays as it
        is. `present` says which ones have one.
        """

    @abstractmethod
    def accumulate_(self, criterion: Criterion, verdict: Verdict) -> None:
        """Add this step's changes to the running scores; `probe` came before."""

    @abstractmethod
    def compute_(self, criterion: Criterion) -> None:
        """Set the scores of a criterion that is not cumulative."""

    @abstractmethod
    def settle_(self) -> None:
        """Write -inf into the scores of what is pruned."""

    @abstractmethod
    def apply_(self) -> None:
        """Zero what is pruned."""

    @abstractmethod
    def mask_state_(self, optimizers: Sequence[Optimizer]) -> None:
        """Zero the optimizers' memory (momentum, moments) of what is pruned."""

    @abstractmethod
    def mask_grads_(self) -> None:
        """Zero the gradients of what is pruned."""


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
        found = _of_shape(model, self.name, self.weight.shape)
        if is_sharded(found) != is_sharded(self.weight):
            raise ValueError(f"{self.name} is spread over processes differently now: make the Pruner after fully_shard")
        self.weight = found

    def mask(self, network: nn.Module) -> None:
        weight = self.here(_of_shape(network, self.name, self.weight.shape)).detach()
        weight.masked_fill_(~self.keep.to(weight.device), 0)

    def groups(self) -> Tensor:
        groups = self.pattern.to_groups(self._outputs_first(self.score))
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
        return _line(weight)

    def grad_line(self) -> Tensor | None:
        """The gradient as one line, in the weight's own memory format; None if there is none."""
        if self.weight.grad is None or not self.due:
            return None
        grad, weight = self.here(_strided(self.weight.grad)), self.here(self.weight)
        return _line(grad if grad.stride() == weight.stride() else torch.empty_like(weight).copy_(grad))


class WeightTargets(Targets):
    """All single weights, worked through in blocks of memory that fit the cache, whatever tensor they belong to."""

    kind = "weights"
    targets: Sequence[WeightTarget]

    def __init__(self, targets: Sequence[WeightTarget]) -> None:
        weights = [target.here(target.weight) for target in targets]
        sizes = [weight.numel() for weight in weights]
        super().__init__(targets, sum(sizes), _one_device(weights))
        self._share_out()
        largest = max(sizes)
        self._blocks = _cut(sizes, BLOCK if self.score.is_cpu else max(BLOCK, largest))

    def _share_out(self) -> None:
        start = 0
        for target in self.targets:
            weight = target.here(target.weight)
            stop = start + weight.numel()
            target.score = self.score[start:stop].as_strided(weight.shape, weight.stride())
            target.keep = self.keep[start:stop].as_strided(weight.shape, weight.stride())
            start = stop

    def probe(self, criterion: Criterion) -> Tensor:
        # a sum is the cheapest pass that inf and NaN survive; it overflows only where the gradient is useless anyway
        grads = [(target, target.weight.grad if target.due else None) for target in self.targets]
        self.present = [grad is not None for _, grad in grads]
        sums = [target.here(grad).sum(dtype=torch.float32) for target, grad in grads if grad is not None]
        return torch.stack(sums or [self.score.new_zeros(())]).isfinite().all()

    def accumulate_(self, criterion: Criterion, verdict: Verdict) -> None:
        weights = [target.line() for target in self.targets]
        grads = [target.grad_line() for target in self.targets]
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
            for lo, hi in _runs(filled):
                verdict.add_(self.score[start + lo : start + hi], changes[lo:hi])

    def compute_(self, criterion: Criterion) -> None:
        for target in self.targets:
            target.score.copy_(criterion.weights(target.value(), None, name=target.name))
        self.settle_()

    def settle_(self) -> None:
        for start, stop, _ in self._blocks:
            # 1 / mask - 1 is 0 where kept and inf where pruned; a third of the time of a masked fill
            self.score[start:stop].sub_(self._mask(start, stop).reciprocal_().sub_(1))

    def apply_(self) -> None:
        weights = [target.line() for target in self.targets] if self.pruned else []
        for start, stop, pieces in self._blocks if self.pruned else ():
            mask = self._mask(start, stop)
            for i, lo, hi, at in pieces:
                weights[i][lo:hi].mul_(mask[at : at + hi - lo])

    def mask_state_(self, optimizers: Sequence[Optimizer]) -> None:
        for target in self.targets:
            for state in moments(optimizers, target.weight):
                target.here(state).mul_(target.keep)

    def mask_grads_(self) -> None:
        for target in self.targets if self.pruned else ():
            if target.weight.grad is not None:
                target.here(target.weight.grad).mul_(target.keep)

    def _mask(self, start: int, stop: int) -> Tensor:
        """The flat mask as ones and zeros; by way of uint8, whose conversion is vectorised."""
        return self.scratch.take(stop - start, self.keep.device).copy_(self.keep[start:stop].view(torch.uint8))


class UnitTarget(Target):
    """The units of one structure."""

    def __init__(self, structure: Structure, model: nn.Module) -> None:
        self.name, self.total, self.of = structure.name, structure.units, structure.kind
        self.tensors = {member.tensor: model.get_parameter(member.tensor) for member in _scored(structure)}
        self.structure = structure  # of the dense network, as are score and mask
        self.placed = _moved(structure, _one_device(self.tensors.values()))  # as it lies in the model now
        self._left: Tensor | None = None  # units that the model still has; None: all
        self._rows: dict[Member, Tensor] = {}  # the mask as one row of each consumer
        self._seen = False  # whether a gradient was read in this step

    def own(self) -> Mapping[str, nn.Parameter]:
        return self.tensors

    def named(self, model: nn.Module) -> Mapping[str, nn.Parameter]:
        norms = {member.tensor for member in self.placed.norms}
        return self.tensors | {name: tensor for name, tensor in model.named_parameters() if name in norms}

    def find(self, model: nn.Module) -> None:
        self.tensors = {name: _of_shape(model, name, tensor.shape) for name, tensor in self.tensors.items()}

    def mask(self, network: nn.Module) -> None:
        here = self.keep if self._left is None else self.keep[self._left]
        for m in self.placed.consumers:
            tensor = _of_shape(network, m.tensor, self.tensors[m.tensor].shape).detach()
            tensor.index_fill_(m.dim, m.index[~here].flatten().to(tensor.device), 0)

    def scored(self, criterion: Criterion) -> Mapping[str, Tensor]:
        read: dict[str, Tensor] = {}

        def note(name: str) -> tuple[Tensor, Tensor | None]:
            read[name] = self.tensors[name]
            return (self.tensors[name].detach(),) * 2

        with torch.no_grad():
            criterion.units(self.placed, note)
        return read

    def change(self, criterion: Criterion) -> Tensor | None:
        """What the criterion says of this step, (units,); 0 for units that were cut out. None if it saw no gradient."""
        self._seen = False
        if not self.due:
            return None
        change = self._dense(criterion.units(self.placed, self._read))
        return change if self._seen else None

    def compute(self, criterion: Criterion) -> Tensor:
        """What the criterion says without gradients, (units,)."""
        return self._dense(criterion.units(self.placed, self._read_weights))

    def move(self, structure: Structure, model: nn.Module) -> None:
        """The model was cut down to the units kept, which lie there as `structure` says."""
        self.tensors = {member.tensor: model.get_parameter(member.tensor) for member in _scored(structure)}
        self.placed = _moved(structure, self.keep.device)
        self._left = self.keep.nonzero().flatten()
        self._rows = {}

    def groups(self) -> Tensor:
        return self.score.reshape(1, -1)

    def set_keep(self, keep_rn: Tensor) -> None:
        self._take(keep_rn.reshape(-1))

    def masked(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each consumer, and the row of ones and zeros that its rows have to be multiplied by."""
        return ((self.tensors[member.tensor], row) for member, row in self._rows.items())

    def _take(self, keep: Tensor) -> None:
        super()._take(keep)
        here = self.keep if self._left is None else self.keep[self._left]
        self._rows = {m: self._row(m, m.index[~here].flatten()) for m in self.placed.consumers}

    def _dense(self, values: Tensor) -> Tensor:
        """Values of the units that are left, at their places among all."""
        if self._left is None:
            return values
        return values.new_zeros(self.total).index_copy_(0, self._left, values)

    def _row(self, member: Member, pruned: Tensor) -> Tensor:
        """Ones, and zeros in the pruned columns: as one row of the tensor, in its memory layout."""
        return torch.ones_like(self.tensors[member.tensor].detach()[:1]).index_fill_(member.dim, pruned, 0)

    def _read(self, name: str) -> tuple[Tensor, Tensor | None]:
        tensor = self.tensors[name]  # not detached: hooks run under no_grad
        if tensor.grad is None:  # it took no part in this step, so nothing of a unit's change comes from it
            return tensor, tensor.new_zeros(()).expand(tensor.shape)
        self._seen = True
        return tensor, _strided(tensor.grad)

    def _read_weights(self, name: str) -> tuple[Tensor, Tensor | None]:
        """A tensor without its gradient, for criteria that need none."""
        return self.tensors[name].detach(), None


class UnitTargets(Targets):
    """All units of all structures. A structure's mask zeroes the columns that read its pruned units."""

    kind = "units"
    targets: Sequence[UnitTarget]

    def __init__(self, targets: Sequence[UnitTarget]) -> None:
        total = sum(target.total for target in targets)
        super().__init__(targets, total, _one_device(t for target in targets for t in target.tensors.values()))
        self._share_out()
        self._changes = self.score

    def _share_out(self) -> None:
        start = 0
        for target in self.targets:
            target.score, target.keep = (flat[start : start + target.total] for flat in (self.score, self.keep))
            start += target.total

    def probe(self, criterion: Criterion) -> Tensor:
        changes = [target.change(criterion) for target in self.targets]
        self.present = [change is not None for change in changes]
        blank = [
            target.score if change is None else change for target, change in zip(self.targets, changes, strict=True)
        ]
        self._changes = torch.cat(blank).float()
        seen = [change for change in changes if change is not None]
        return (
            (self._changes if len(seen) == len(changes) else torch.cat([*seen, self.score.new_zeros(1)]))
            .isfinite()
            .all()
        )

    def accumulate_(self, criterion: Criterion, verdict: Verdict) -> None:
        ends = list(itertools.accumulate(target.total for target in self.targets))
        places = zip(self.targets, ends, self.present, strict=True)
        for lo, hi in _runs([(end - target.total, end) for target, end, here in places if here]):
            verdict.add_(self.score[lo:hi], self._changes[lo:hi])

    def compute_(self, criterion: Criterion) -> None:
        for target in self.targets:
            target.score.copy_(target.compute(criterion))
        self.settle_()

    def settle_(self) -> None:
        self.score.masked_fill_(~self.keep, PRUNED)

    def apply_(self) -> None:
        for target in self.targets:
            for tensor, row in target.masked():
                tensor.detach().mul_(row)  # a fifth of the time of filling the pruned columns

    def mask_state_(self, optimizers: Sequence[Optimizer]) -> None:
        for target in self.targets:
            for tensor, row in target.masked():
                for state in moments(optimizers, tensor):
                    state.mul_(row)

    def mask_grads_(self) -> None:
        for target in self.targets:
            for tensor, row in target.masked():
                if tensor.grad is not None:
                    tensor.grad.mul_(row)


def weight_targets(
    model: nn.Module, pattern: Pattern, *, include: Sequence[str], exclude: Sequence[str], per_channel: bool
) -> tuple[WeightTargets, dict[str, str]]:
    """A target for every matrix weight that the name patterns choose, and what is left out unasked -> why.

    Raises:
        ValueError: a name pattern matches nothing, two chosen names are one tensor, or a tile does not fit.
    """
    is_plain = pattern == Tile(1, 1) and not per_channel
    found = {matrix.name: matrix if is_plain else _by_layout(matrix) for matrix in find_matrices(model)}
    offered = {name: matrix for name, matrix in found.items() if matrix.reason is None or matrix.by_name}
    reasons = {name: matrix.reason for name, matrix in found.items() if matrix.reason is not None}
    aliases = {name: matrix.aliases for name, matrix in offered.items()}
    why = {alias: matrix.reason for matrix in found.values() for alias in matrix.aliases if alias and matrix.reason}
    chosen = [offered[name] for name in choose(aliases, include, exclude, skipped=why, by_name=reasons.keys())]
    if not is_plain:
        _refuse_transposed(chosen)
    _refuse_twice(chosen)
    pruned = {id(matrix.weight): matrix.name for matrix in chosen}
    skipped = {
        name: reason
        if id(found[name].weight) not in pruned
        else f"it is one tensor with {pruned[id(found[name].weight)]}"
        for name, reason in reasons.items()
        if name not in pruned.values()
    }
    return _weight_targets(chosen, pattern, per_channel=per_channel), skipped


def _weight_targets(chosen: Sequence[Matrix], pattern: Pattern, *, per_channel: bool) -> WeightTargets:
    pieces = [matrix.name for matrix in chosen if is_sharded(matrix.weight)]
    if not pieces:
        return WeightTargets(
            [
                WeightTarget(
                    m.name,
                    m.weight,
                    pattern,
                    per_channel=per_channel,
                    inputs_first=m.order == "columns",
                    value=m.value,
                )
                for m in chosen
            ]
        )
    from gsprune.sharded import ShardedWeight, ShardedWeights  # slow to import

    for matrix in chosen:
        if not is_sharded(matrix.weight):
            raise ValueError(f"{pieces[0]} is cut over several processes and {matrix.name} is not: exclude one of them")
    return ShardedWeights([ShardedWeight(m.name, m.weight, pattern, per_channel=per_channel) for m in chosen])


def _by_layout(matrix: Matrix) -> Matrix:
    """For patterns and `per_channel`, which have to know the axis of the inputs."""
    if matrix.order != "unknown" or (matrix.reason is not None and not matrix.by_name):
        return matrix
    reason = matrix.reason or "which of its axes are inputs is not known, so that it takes pattern 1x1 only"
    return replace(matrix, reason=reason, by_name=False)


def _refuse_transposed(matrices: Iterable[Matrix]) -> None:
    for matrix in matrices:
        if matrix.order == "transposed":
            raise ValueError(
                f"{matrix.name} has its inputs as rows (a transposed convolution): it takes pattern 1x1 only"
            )


def _refuse_twice(matrices: Iterable[Matrix]) -> None:
    seen: dict[int, str] = {}
    for matrix in matrices:
        first = seen.setdefault(id(matrix.weight), matrix.name)
        if first != matrix.name:
            raise ValueError(f"{first} and {matrix.name} are one tensor and would be pruned twice: exclude one of them")


Piece = tuple[int, int, int, int]  # tensor, its entries from, to, and where they lie in the block


def _cut(sizes: Sequence[int], block: int) -> list[tuple[int, int, list[Piece]]]:
    """Tensors of these sizes, one after the other, cut into blocks: (from, to, pieces) each.

    Example:
        >>> _cut([3, 4], 5)
        [(0, 5, [(0, 0, 3, 0), (1, 0, 2, 3)]), (5, 7, [(1, 2, 4, 0)])]
    """
    blocks: list[tuple[int, int, list[Piece]]] = []
    start, pieces, filled = 0, [], 0
    for i, size in enumerate(sizes):
        done = 0
        while done < size:
            take = min(block - filled, size - done)
            pieces.append((i, done, done + take, filled))
            done, filled = done + take, filled + take
            if filled == block:
                blocks.append((start, start + filled, pieces))
                start, pieces, filled = start + filled, [], 0
    return [*blocks, (start, start + filled, pieces)] if filled else blocks


def _runs(pieces: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pieces (from, to) in order, those that touch as one.

    Example:
        >>> _runs([(0, 3), (3, 5), (8, 9)])
        [(0, 5), (8, 9)]
    """
    runs: list[tuple[int, int]] = []
    for lo, hi in pieces:
        if runs and runs[-1][1] == lo:
            runs[-1] = (runs[-1][0], hi)
        else:
            runs.append((lo, hi))
    return runs


def _strided(grad: Tensor) -> Tensor:
    """The gradient of a table that is looked up may be sparse."""
    return grad.to_dense() if grad.is_sparse else grad


def _line(tensor: Tensor) -> Tensor:
    """The tensor's memory as one line."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


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


def _one_device(tensors: Iterable[Tensor]) -> torch.device:
    first, *others = dict.fromkeys(tensor.device for tensor in tensors)
    if others:
        raise ValueError(f"what is to be pruned lies on {first} and on {others[0]}: it has to be on one device")
    if first.type == "meta":
        raise ValueError("the model is on the meta device, which holds no values: build it on another one")
    return first


def _of_shape(network: nn.Module, name: str, shape: torch.Size) -> nn.Parameter:
    """The network's parameter of that name, which has to be as long as what was made for it."""
    found = _parameter(network, name)
    if found is None:
        raise ValueError(f"the model has no {name} any more, which is pruned here")
    if found.shape != shape:
        raise ValueError(f"{name} is {_dims(found.shape)} now, but what is pruned of it is {_dims(shape)}")
    return found


def _parameter(network: nn.Module, name: str) -> nn.Parameter | None:
    try:
        return network.get_parameter(name)
    except AttributeError:
        return None


def _dims(shape: torch.Size) -> str:
    return " x ".join(map(str, shape)) or "one number"


assert math.isinf(PRUNED)  # a pruned score has to survive decay * score + change
