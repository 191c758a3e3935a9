"""Weights that are cut over several processes by `torch.distributed.fsdp.fully_shard`, pruned one by one.

Each process scores and masks its own rows; the ranking is over all rows. The masks equal those of the same network in
one process, ties included, and no process holds all scores.

Legend: a part is one tensor's scores in this process, (1, n_i), its rows in order; n_i may be 0. Rows are dealt out in
runs, in the order of the processes, so an index in the whole tensor grows with the process and with the index here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gsprune.criteria import Criterion
from gsprune.pruner.targets import Target
from gsprune.pruner.weights import WeightTarget, WeightTargets
from gsprune.ranking.patterns import Pattern, Tile
from gsprune.ranking.selection import pruned_count
from gsprune.structures.shards import check_layout, group_of, here, is_sharded, part_like, ranks_of, whole

__all__ = ["ShardedWeight", "ShardedWeights", "select"]

_BYTES = (24, 16, 8, 0)  # where the four bytes of a float32 begin, the highest first


class ShardedWeight(WeightTarget):
    """Single weights of a tensor of which this process has some rows. `score` and `keep` are of those rows.

    `total` and `pruned` count the whole tensor. Masks and scores are given out as `DTensor`s laid out like the weight
    (`.full_tensor()` gathers one), and are taken back as such or whole.
    """

    def __init__(self, name: str, weight: nn.Parameter, pattern: Pattern, *, per_channel: bool = False) -> None:
        if pattern != Tile(1, 1) or per_channel:
            raise ValueError(
                f"{name} is cut over several processes, where only single weights are ranked: take pattern 1x1 "
                f"without per_channel"
            )
        assert isinstance(weight, DTensor)
        check_layout(name, weight)
        self.mesh, self.placements, self.group = weight.device_mesh, weight.placements, group_of(weight)
        super().__init__(name, weight, pattern, per_channel=per_channel)

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def here(self, tensor: Tensor) -> Tensor:
        return here(tensor) if is_sharded(tensor) else part_like(tensor.detach(), self.weight)

    def outside(self, tensor: Tensor) -> Tensor:
        shape, stride = self.weight.shape, self.weight.stride()
        return DTensor.from_local(tensor, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)

    def set_keep(self, keep_rn: Tensor) -> None:
        self._take(keep_rn.reshape(self.keep.shape))

    def groups(self) -> Tensor:
        return self.ranked.reshape(1, self.score.numel())  # also of no rows

    def best(self, groups: Tensor) -> float:
        highest = groups.max() if groups.numel() else groups.new_tensor(-math.inf)
        highest = highest.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.group)
        return float(highest)

    def _take(self, keep: Tensor) -> None:
        self.keep.copy_(keep)
        kept = self.keep.sum()
        dist.all_reduce(kept, group=self.group)
        self.pruned = self.total - int(kept)


class ShardedWeights(WeightTargets):
    """All single weights of a model whose rows are cut over the processes of one group."""

    targets: Sequence[ShardedWeight]

    def __init__(self, targets: Sequence[ShardedWeight]) -> None:
        self.group = targets[0].group
        for target in targets:
            if ranks_of(target.weight) != ranks_of(targets[0].weight):
                raise ValueError(
                    f"{targets[0].name} and {target.name} are cut over different processes: exclude one of them"
                )
        super().__init__(targets)

    def probe(self, criterion: Criterion, judged: Collection[int] = ()) -> Tensor:
        if criterion.normalize:
            raise ValueError(f"{criterion} normalizes whole tensors, which no process has: set normalize to false")
        finite = super().probe(criterion).int()  # a batch counts in all processes or in none
        dist.all_reduce(finite, dist.ReduceOp.MIN, group=self.group)
        return finite.bool()

    def compute_(self, criterion: Criterion) -> None:
        for target in self.targets:
            weight = whole(target.weight.detach())  # one at a time: the score may depend on all of it
            target.score.copy_(target.here(criterion.weights(weight, None, name=target.name)))
        self.settle_()

    def any_score(self) -> bool:
        found = self.score.any().int()
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return bool(found)

    def select(
        self, groups: Sequence[Tensor], share: float, targets: Sequence[Target], *, least: Callable[[int, str], int]
    ) -> list[Tensor]:
        totals = [target.total for target in targets]
        k = max(pruned_count(share, sum(totals)), sum(target.pruned for target in targets))
        return select(groups, k, totals=totals, group=self.group, min_kept=[least(t.total, t.of) for t in targets])


def select(
    scores: Sequence[Tensor],
    k: int,
    *,
    totals: Sequence[int],
    group: dist.ProcessGroup | None,
    min_kept: int | Sequence[int] = 0,
) -> list[Tensor]:
    """`selection.select` for one row of which each process has a piece of every part; every process calls it.

    The k-th smallest score is found byte by byte: four histograms of 256 counts are summed over the processes (8 KiB
    in all, whatever the size of the model), and among ties each process learns how many lie before its own (8 bytes a
    part from each).

    Args:
        scores: this process's pieces, (1, n_i), float32, never NaN. Left as they are.
        totals: groups of each part over all processes.

    Returns:
        This process's pieces of the masks.
    """
    wanted = [min_kept] * len(totals) if isinstance(min_kept, int) else min_kept
    kept = [min(least, total) for least, total in zip(wanted, totals, strict=True)]
    if len(scores) == 1:
        k = min(k, totals[0] - kept[0])
    keeps = _select(scores, k, sum(totals), group)
    counts = torch.stack([keep.sum() for keep in keeps])
    dist.all_reduce(counts, group=group)
    if all(int(count) >= m for count, m in zip(counts, kept, strict=True)):
        return keeps
    safe = [_select([score], total - m, total, group)[0] for score, total, m in zip(scores, totals, kept, strict=True)]
    lifted = [score.masked_fill(best, math.inf) for score, best in zip(scores, safe, strict=True)]
    return _select(lifted, min(k, sum(totals) - sum(kept)), sum(totals), group)


def _select(scores: Sequence[Tensor], k: int, n: int, group: dist.ProcessGroup | None) -> list[Tensor]:
    if k <= 0:
        return [torch.ones_like(score, dtype=torch.bool) for score in scores]
    keys = [_in_order(score.reshape(-1)) for score in scores]
    threshold, doomed = _kth_smallest(torch.cat(keys), min(k, n), group)
    ties = [key == threshold for key in keys]
    before, room = _ties_before(torch.stack([tie.sum() for tie in ties]), doomed, group)
    return [
        ((key > threshold) | (tie & (tie.cumsum(0) + first <= room))).reshape(score.shape)
        for key, tie, first, score in zip(keys, ties, before, scores, strict=True)
    ]


def _in_order(score: Tensor) -> Tensor:
    """int32 that compare as the floats do: their bits, upside down below 0. -0.0 is 0.0."""
    bits = (score.float() + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _kth_smallest(keys: Tensor, k: int, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """The k-th smallest of all keys everywhere, and how many of its equals are among the k smallest."""
    value = 0
    for shift in _BYTES:
        digits = (keys >> shift) + 128 if shift == _BYTES[0] else (keys >> shift) & 255
        counts = torch.bincount(digits, minlength=256)
        dist.all_reduce(counts, group=group)
        below = counts.cumsum(0)
        digit = int((below < k).sum())
        k -= int(below[digit - 1]) if digit else 0
        value = (value << 8) | digit
        keys = keys[digits == digit]
    return value - (1 << 31), k


def _ties_before(ties: Tensor, doomed: int, group: dist.ProcessGroup | None) -> tuple[Tensor, int]:
    """How many ties come before this process's own in each part, and how many are kept: the first ones."""
    number = dist.get_rank(group)
    everywhere = [torch.empty_like(ties) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everywhere, ties, group=group)
    counts = torch.stack(everywhere)  # (processes, parts)
    parts = counts.sum(0)
    before = parts.cumsum(0) - parts + counts[:number].sum(0)
    return before, int(parts.sum()) - doomed
