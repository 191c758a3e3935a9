"""The interface of what is pruned.

A `Target` is one tensor or one structure with its score and its mask, as selection sees it. `Targets` are all targets
of a rule in one flat score and one flat mask, as a training step sees them. Neither has a schedule. Legend: r x n =
selection groups as `selection.select` ranks them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gsprune.criteria import Criterion
from gsprune.ranking.blocks import Scratch
from gsprune.ranking.selection import PRUNED, pruned_count, select
from gsprune.structures.shards import is_sharded

if TYPE_CHECKING:
    from gsprune.structures.structure import Member, Structure

_ALL_BITS, _MAGNITUDE_BITS = -1, 0x7FFFFFFF  # of a float32: all, and all but its sign


_GIVEN: ContextVar[frozenset[int]] = ContextVar("given", default=frozenset())


@contextmanager
def given_gradients(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Inside the block these tensors count as ones with a gradient, though they are frozen: the caller sets `.grad`."""
    before = _GIVEN.set(_GIVEN.get() | {id(tensor) for tensor in tensors})
    try:
        yield
    finally:
        _GIVEN.reset(before)


class Verdict:
    """Whether this step's gradients count, as a tensor on the device: the host does not wait for it.

    A batch that does not count adds nothing, and no score decays: the bits of magnitudes are masked to 0 (0 * inf is
    NaN), and the factor of the running score is 1. Gradients that are scaled make the change too large by the scale to
    the power of the criterion's `degree`. `decay` is the criterion's own, unless another is given.
    """

    def __init__(
        self, finite: Tensor, criterion: Criterion, grad_scale: Tensor | None = None, *, decay: float | None = None
    ) -> None:
        self.finite, self._newest = finite, 1 - criterion.decay  # the share of the newest change in an average
        self.grad_scale = None if grad_scale is None else grad_scale**criterion.degree
        bits = torch.full_like(finite, _ALL_BITS if criterion.signed else _MAGNITUDE_BITS, dtype=torch.int32)
        self.bits = torch.where(finite, bits, torch.zeros_like(bits))
        self.decay = self._factor(criterion.decay if decay is None else decay)
        self.spread_decay = self._factor(criterion.spread_decay or 1.0)

    def add_(self, score: Tensor, change: Tensor, spread: Tensor | None = None) -> None:
        """score <- decay * score + abs(change), and so the spread; overwrites `change` (all float32)."""
        self._add_(score, change, self.decay, self.grad_scale)
        if spread is not None:
            change.sub_(score, alpha=self._newest)
            self._add_(spread, change, self.spread_decay, None)

    def _add_(self, running: Tensor, change: Tensor, decay: Tensor, grad_scale: Tensor | None) -> None:
        change.view(torch.int32).bitwise_and_(self.bits)
        if grad_scale is not None:
            change.div_(grad_scale)
        torch.addcmul(change, running, decay, out=running)

    def _factor(self, decay: float) -> Tensor:
        factor = torch.full_like(self.finite, decay, dtype=torch.float32)
        return torch.where(self.finite, factor, torch.ones_like(factor))


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
        spread: of the same shape, the second running average of a criterion that has one.
        keep: mask of the same shape, True = kept.
        total, pruned: number of weights or units, and how many are pruned.
        due: whether the next probe looks at it: of several optimizers each step has its own part.
    """

    name: str
    score: Tensor
    spread: Tensor | None = None
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
        """Use the tensors that the model has now (`load_state_dict(assign=True)` replaces them)."""

    @abstractmethod
    def mask(self, network: nn.Module) -> None:
        """Zero what is pruned in the model, or in a copy of it. In the end and at updates: it also zeroes a NaN."""

    @property
    def ranked(self) -> Tensor:
        """What is ranked, of the score's shape; -inf where pruned."""
        return self.score if self.spread is None else (self.score * self.spread).masked_fill_(~self.keep, PRUNED)

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
        return float(groups.amax())  # the maximum of a NaN is NaN

    def range(self, groups: Tensor) -> tuple[float, float]:
        """The lowest and the highest group score of what is not pruned."""
        left = groups.nan_to_num(nan=math.nan, posinf=math.inf, neginf=math.inf)  # a sixth of the time of masked_fill
        return -self.best(left.neg_()), self.best(groups)

    @property
    def running(self) -> dict[str, Tensor]:
        """All that is kept of its scores, by name: the running score, and its spread where there is one."""
        return {self.name: self.score} | ({f"{self.name}:spread": self.spread} if self.spread is not None else {})

    def check(self, *saved: Tensor) -> None:
        """Raise a ValueError if a saved score or mask has another shape."""
        for one in saved:
            if one.shape != self.shape:
                raise ValueError(f"{self.name} has shape {_dims(self.shape)}, the saved state {_dims(one.shape)}")

    def load(self, scores: Mapping[str, Tensor], keep: Tensor) -> None:
        """Take over saved scores, named as in `running`, and a mask, all of this target's shape."""
        for name, running in self.running.items():
            running.copy_(self.here(scores[name]))
        self._take(self.here(keep))

    def _take(self, keep: Tensor) -> None:
        self.keep.copy_(keep)
        self.pruned = self.total - int(self.keep.count_nonzero())


class Targets(ABC):
    """All targets of a pruner, whose scores and masks are views of two flat tensors.

    Attributes:
        targets: the single ones, in the model's order.
        score, keep: all scores (float32) and all masks (bool), one after the other.
        spread: as the scores, where the criterion has a second running average.
    """

    def __init__(self, targets: Sequence[Target], total: int, device: torch.device) -> None:
        self.targets = targets
        self.score = torch.zeros(total, device=device)
        self.spread: Tensor | None = None
        self.keep = torch.ones(total, dtype=torch.bool, device=device)
        self.present = [False] * len(targets)  # in the step that was probed last
        self.scratch = Scratch()

    @abstractmethod
    def _share_out(self) -> None:
        """Make the targets' scores and masks views of the flat ones."""

    def keep_spread(self) -> None:
        """Keep a second running average beside every score."""
        self.spread = torch.zeros_like(self.score)
        self._share_out()

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
        return [name for name, tensor in read.items() if not tensor.requires_grad and id(tensor) not in _GIVEN.get()]

    def any_score(self) -> bool:
        """Whether any running score is not 0."""
        return bool(self.score.any())

    def select(
        self, groups: Sequence[Tensor], share: float, targets: Sequence[Target], *, least: Callable[[int, str], int]
    ) -> list[Tensor]:
        """What to keep of some targets' groups, ranked together, to prune that share of them.

        Args:
            least: groups in a row of a target, and what it prunes -> how many of them stay in any case.
        """
        n, rows = sum(group.shape[1] for group in groups), len(groups[0])
        pairs = [*zip(targets, groups, strict=True)]
        gone = [target.pruned * group.numel() // target.total for target, group in pairs]
        k = max(pruned_count(share, n), sum(gone) // rows)  # what is pruned stays pruned
        protected = [target.protected(group) for target, group in zip(targets, groups, strict=True)]
        known = [safe for safe in protected if safe is not None]
        alive = [
            group.shape[1] - lost // rows for group, lost in zip(groups, gone, strict=True)
        ]  # none: all went along
        kept = [min(least(group.shape[1], t.of), left) for (t, group), left in zip(pairs, alive, strict=True)]
        return select(groups, k, protected=known or None, min_kept=kept)

    @abstractmethod
    def probe(self, criterion: Criterion, judged: Collection[int] = ()) -> Tensor:
        """A 0-dim bool on the device: whether what this step would add is finite.

        A target whose gradient is None keeps its score in this step. `present` says which targets have a gradient.

        Args:
            judged: tensors (by id) whose gradients somebody else has looked through, and says whether they are finite.
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


Piece = tuple[int, int, int, int]  # tensor, its entries from, to, and where they lie in the block


def cut_in_blocks(sizes: Sequence[int], block: int) -> list[tuple[int, int, list[Piece]]]:
    """Tensors of these sizes, one after the other, cut into blocks: (from, to, pieces) each.

    Example:
        >>> cut_in_blocks([3, 4], 5)
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


def merged_runs(pieces: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pieces (from, to) in order, those that touch as one.

    Example:
        >>> merged_runs([(0, 3), (3, 5), (8, 9)])
        [(0, 5), (8, 9)]
    """
    runs: list[tuple[int, int]] = []
    for lo, hi in pieces:
        if runs and runs[-1][1] == lo:
            runs[-1] = (runs[-1][0], hi)
        else:
            runs.append((lo, hi))
    return runs


def strided(grad: Tensor) -> Tensor:
    """The gradient of a table that is looked up may be sparse."""
    return grad.to_dense() if grad.is_sparse else grad


def flat_line(tensor: Tensor) -> Tensor:
    """The tensor's memory as one line."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def scored_members(structure: Structure) -> Iterable[Member]:
    """What is scored or masked."""
    yield from structure.producers
    yield from structure.gates
    yield from structure.masked


def moved(structure: Structure, device: torch.device) -> Structure:
    """The structure with its positions on the device of its tensors: looking them up copies nothing."""
    here = {m: replace(m, index=m.index.to(device)) for m in scored_members(structure)}
    producers, gates, consumers, norms = (
        tuple(here.get(m, m) for m in side)
        for side in (structure.producers, structure.gates, structure.consumers, structure.norms)
    )
    return replace(structure, producers=producers, gates=gates, consumers=consumers, norms=norms)


def one_device(tensors: Iterable[Tensor]) -> torch.device:
    first, *others = dict.fromkeys(tensor.device for tensor in tensors)
    if others:
        raise ValueError(f"what is to be pruned lies on {first} and on {others[0]}: it has to be on one device")
    check_values([first])
    return first


def check_values(devices: Iterable[torch.device]) -> None:
    """ValueError for the meta device, but where something is only counted."""
    if any(device.type == "meta" for device in devices) and not _COUNTS_ONLY.get():
        raise ValueError("the model is on the meta device, which holds no values: build it on another one")


_COUNTS_ONLY = ContextVar("counts_only", default=False)


@contextmanager
def counting_only() -> Iterator[None]:
    """Inside, what is to be pruned may lie on the meta device: it can be counted, and no more."""
    before = _COUNTS_ONLY.set(True)
    try:
        yield
    finally:
        _COUNTS_ONLY.reset(before)


def of_shape(network: nn.Module, name: str, shape: torch.Size) -> nn.Parameter:
    """The network's parameter of that name, which has to be as long as what was made for it."""
    found = _parameter(network, name)
    if found is None:
        raise ValueError(f"the model has no {name} any more, which is pruned here")
    if found.shape != shape:
        raise ValueError(f"{name} is {_dims(found.shape)} now, but what is pruned of it is {_dims(shape)}")
    return found


def check_spread_alike(name: str, now: Tensor, before: Tensor) -> None:
    """ValueError for a tensor that was in one piece when the pruner was made and is not now, or the other way round."""
    if is_sharded(now) != is_sharded(before):
        raise ValueError(f"{name} is spread over processes differently now: make the Pruner after fully_shard")


def tensor_of(network: nn.Module, name: str) -> Tensor:
    """The network's parameter, buffer or plain attribute of that name."""
    path, _, leaf = name.rpartition(".")
    found = _parameter(network, name)
    return getattr(network.get_submodule(path), leaf) if found is None else found


def _parameter(network: nn.Module, name: str) -> nn.Parameter | None:
    try:
        return network.get_parameter(name)
    except AttributeError:
        return None


def _dims(shape: torch.Size) -> str:
    return " x ".join(map(str, shape)) or "one number"
