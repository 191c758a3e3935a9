"""Targets of whole units."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gsprune.criteria import Criterion, GateGradient
from gsprune.pruner.targets import (
    Target,
    Targets,
    Verdict,
    check_spread_alike,
    merged_runs,
    moved,
    of_shape,
    one_device,
    scored_members,
    strided,
    tensor_of,
)
from gsprune.ranking.blocks import dot_along
from gsprune.ranking.selection import PRUNED
from gsprune.structures.shards import check_layout, here, is_sharded, part_like, ranks_of, whole, zero_at_
from gsprune.surgery.optimizers import moments

if TYPE_CHECKING:
    from gsprune.structures.structure import Member, Structure


class UnitTarget(Target):
    """The units of one structure."""

    tensors: dict[str, nn.Parameter]  # of a sharded model each process has some rows, and all of score and mask
    buffers: dict[str, Tensor]
    _vectors: list[Tensor] | None  # that are all a criterion reads; None: not known yet

    def __init__(self, structure: Structure, model: nn.Module) -> None:
        self.name, self.total, self.of = structure.name, structure.units, structure.kind
        self.structure = structure  # of the dense network, as are score and mask
        self._look(model, structure)
        self.placed = moved(structure, one_device(self.tensors.values()))  # as it lies in the model now
        self._left: Tensor | None = None  # units that the model still has; None: all
        self._rows: dict[Member, Tensor] = {}  # the mask as one row of each consumer
        self._seen = False  # whether a gradient was read in this step

    def own(self) -> Mapping[str, nn.Parameter]:
        return self.tensors

    def named(self, model: nn.Module) -> Mapping[str, nn.Parameter]:
        norms = {member.tensor for member in self.placed.norms}
        return self.tensors | {name: tensor for name, tensor in model.named_parameters() if name in norms}

    def find(self, model: nn.Module) -> None:
        found = {name: of_shape(model, name, tensor.shape) for name, tensor in self.tensors.items()}
        for name, tensor in found.items():
            check_spread_alike(name, tensor, self.tensors[name])
        self.tensors, self._vectors = found, None
        self.buffers = {name: tensor_of(model, name) for name in self.buffers}

    def mask(self, network: nn.Module) -> None:
        left = self.keep if self._left is None else self.keep[self._left]
        for m in self.placed.masked:
            known = self.tensors.get(m.tensor)
            tensor = tensor_of(network, m.tensor) if known is None else of_shape(network, m.tensor, known.shape)
            zero_at_(tensor, m.dim, m.index[~left].flatten())

    def _look(self, model: nn.Module, structure: Structure) -> None:
        """Take the tensors of a structure out of the model in which it lies so."""
        names = dict.fromkeys(member.tensor for member in scored_members(structure))
        found = {name: tensor_of(model, name) for name in names}
        self.tensors = {name: tensor for name, tensor in found.items() if isinstance(tensor, nn.Parameter)}
        self._vectors = None
        self.buffers = {name: tensor for name, tensor in found.items() if name not in self.tensors}

    def scored(self, criterion: Criterion) -> Mapping[str, Tensor]:
        read: dict[str, Tensor] = {}

        def note(name: str) -> tuple[Tensor, Tensor | None]:
            if name in self.tensors:
                read[name] = self.tensors[name]
            return (self._tensor(name).detach(),) * 2

        with torch.no_grad():
            criterion.units(self.placed, note)
        return read

    def change(self, criterion: Criterion) -> Tensor | None:
        """What the criterion says of this step, (units,); 0 for units that were cut out. None if it saw no gradient."""
        self._seen = False
        if not self.due or not self.placed.masked:  # all went with a branch
            return None
        change = self.dense(criterion.units(self.placed, self._read))
        return change if self._seen else None

    def vectors(self, criterion: GateGradient) -> list[Tensor]:
        """What to multiply with its gradient for the change, entry by entry, where that is all of it: affine pairs."""
        if not self.due or not self.placed.masked:
            return []
        if self._vectors is None:
            members = criterion.members(self.placed)
            plain = all(m.in_order and m.index.shape[1] == 1 and self._is_vector(m.tensor) for m in members)
            self._vectors = [self.tensors[m.tensor] for m in members] if plain else []
        return self._vectors

    def _is_vector(self, name: str) -> bool:
        return name in self.tensors and self.tensors[name].dim() == 1 and not is_sharded(self.tensors[name])

    def compute(self, criterion: Criterion) -> Tensor:
        """What the criterion says without gradients, (units,)."""
        if not self.placed.masked:
            return torch.zeros_like(self.score)
        return self.dense(criterion.units(self.placed, self._read_weights))

    def move(self, structure: Structure, model: nn.Module) -> None:
        """The model was cut down to the units kept, which lie there as `structure` says."""
        self._look(model, structure)
        self.placed = moved(structure, self.keep.device)
        self._left = self.keep.nonzero().flatten()
        self._rows = {}

    def groups(self) -> Tensor:
        return self.ranked.reshape(1, -1)

    def set_keep(self, keep_rn: Tensor) -> None:
        self._take(keep_rn.reshape(-1))

    def masked(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each tensor that is masked, and the ones and zeros that what lies here of it has to be multiplied by."""
        return ((self._tensor(member.tensor), row) for member, row in self._rows.items())

    def _tensor(self, name: str) -> Tensor:
        return self.tensors[name] if name in self.tensors else self.buffers[name]

    def _take(self, keep: Tensor) -> None:
        super()._take(keep)
        left = self.keep if self._left is None else self.keep[self._left]
        masked = self.placed.masked if self.pruned else ()
        self._rows = {m: self._row(m, m.index[~left].flatten()) for m in masked}

    def dense(self, values: Tensor) -> Tensor:
        """Values of the units that are left, at their places among all."""
        values = whole(values)  # a criterion that sums in its own way gets tensors in parts, and may return one
        if self._left is None:
            return values
        return values.new_zeros(self.total).index_copy_(0, self._left, values)

    def _row(self, member: Member, pruned: Tensor) -> Tensor:
        """Ones, and zeros at what is pruned; of columns as one row of the tensor, in its memory layout."""
        tensor = self._tensor(member.tensor).detach()
        if member.dim == 1:
            return torch.ones_like(here(tensor)[:1]).index_fill_(1, pruned, 0)
        lengths = [n if dim == member.dim else 1 for dim, n in enumerate(tensor.shape)]
        row = here(tensor).new_ones(lengths).index_fill_(member.dim, pruned, 0)
        return part_like(row, tensor) if member.dim == 0 else row

    def _read(self, name: str) -> tuple[Tensor, Tensor | None]:
        tensor = self._tensor(name)  # not detached: hooks run under no_grad
        if tensor.grad is None:  # it took no part in this step, so nothing of a unit's change comes from it
            return tensor, torch.zeros_like(tensor) if is_sharded(tensor) else tensor.new_zeros(()).expand(tensor.shape)
        self._seen = True
        return tensor, strided(tensor.grad)

    def _read_weights(self, name: str) -> tuple[Tensor, Tensor | None]:
        """A tensor without its gradient, for criteria that need none."""
        return self._tensor(name).detach(), None


class UnitTargets(Targets):
    """All units of all structures. A structure's mask zeroes the columns that read its pruned units, and of a residual
    stream also what writes them."""

    targets: Sequence[UnitTarget]

    def __init__(self, targets: Sequence[UnitTarget]) -> None:
        total = sum(target.total for target in targets)
        super().__init__(targets, total, one_device(t for target in targets for t in target.tensors.values()))
        _check_shards(targets)
        self._share_out()
        self._changes = self.score

    def _share_out(self) -> None:
        start = 0
        for target in self.targets:
            own = slice(start, start + target.total)
            target.score, target.keep = self.score[own], self.keep[own]
            target.spread = None if self.spread is None else self.spread[own]
            start += target.total

    def probe(self, criterion: Criterion, judged: Collection[int] = ()) -> Tensor:
        together = self._of_vectors(criterion)
        changes = [together[i] if i in together else target.change(criterion) for i, target in enumerate(self.targets)]
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

    def _of_vectors(self, criterion: Criterion) -> dict[int, Tensor]:
        """The changes of the targets that are read off vectors, by number: a few operations for all with as many each.

        A network has a hundred of these: one by one, what starts each operation takes longer than the operation.
        """
        if not isinstance(criterion, GateGradient) or type(criterion).units is not GateGradient.units:
            return {}
        alike: dict[int, list[tuple[int, list[Tensor]]]] = {}
        for i, target in enumerate(self.targets):
            if vectors := target.vectors(criterion):
                alike.setdefault(len(vectors), []).append((i, vectors))
        changes: dict[int, Tensor] = {}
        for depth, found in alike.items():
            lines = [vectors[layer] for layer in range(depth) for _, vectors in found]
            grads = [grad for line in lines if (grad := line.grad) is not None]
            if len(grads) < len(lines):
                continue
            products = dot_along(torch.cat(lines), torch.cat(grads), 0)
            sums = criterion.of_sums(products.reshape(depth, -1).sum(0))
            pieces = sums.split_with_sizes([self.targets[i].placed.units for i, _ in found])
            changes |= {i: self.targets[i].dense(piece) for (i, _), piece in zip(found, pieces, strict=True)}
        return changes

    def accumulate_(self, criterion: Criterion, verdict: Verdict) -> None:
        ends = list(itertools.accumulate(target.total for target in self.targets))
        places = zip(self.targets, ends, self.present, strict=True)
        for lo, hi in merged_runs([(end - target.total, end) for target, end, scored in places if scored]):
            verdict.add_(self.score[lo:hi], self._changes[lo:hi], None if self.spread is None else self.spread[lo:hi])

    def compute_(self, criterion: Criterion) -> None:
        for target in self.targets:
            target.score.copy_(target.compute(criterion))
        self.settle_()

    def settle_(self) -> None:
        self.score.masked_fill_(~self.keep, PRUNED)
        if self.spread is not None:
            self.spread.masked_fill_(~self.keep, 0)

    def apply_(self) -> None:
        for target in reversed(self.targets):  # what the optimizer wrote last is still in the cache
            for tensor, row in target.masked():  # a fifth of the time of filling the pruned columns
                here(tensor).mul_(row)

    def mask_state_(self, optimizers: Sequence[Optimizer]) -> None:
        for target in self.targets:
            for tensor, row in target.masked():
                for state in moments(optimizers, tensor):
                    here(state).mul_(row)

    def mask_grads_(self) -> None:
        for target in self.targets:
            for tensor, row in target.masked():
                if tensor.grad is not None:
                    _multiply_(here(tensor.grad), row)


def _multiply_(grad: Tensor, row: Tensor) -> None:
    """A gradient by a row of ones and zeros; that of a table that is looked up may be sparse, and has some rows."""
    if not grad.is_sparse:
        grad.mul_(row)
    elif len(row) == 1:
        grad._values().mul_(row)
    else:
        values = grad._values()
        values.mul_(row[grad._indices()[0]].expand_as(values))


def _check_shards(targets: Sequence[UnitTarget]) -> None:
    """ValueError where some of the tensors are spread over processes, and others are not or over other processes."""
    tensors = {name: tensor for target in targets for name, tensor in target.tensors.items()}
    sharded = {name: tensor for name, tensor in tensors.items() if is_sharded(tensor)}
    for name, tensor in sharded.items():
        check_layout(name, tensor)
        first = next(iter(sharded))
        if ranks_of(tensor) != ranks_of(sharded[first]):
            raise ValueError(f"{first} and {name} are cut over different processes: exclude one of them")
    if sharded and (other := next((name for name in tensors if name not in sharded), None)) is not None:
        raise ValueError(f"{next(iter(sharded))} is cut over several processes and {other} is not: exclude one of them")
