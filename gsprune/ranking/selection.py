"""The exact selection that every pruner uses: scores and a count in, masks out.

Legend: r = rows that are ranked side by side, each on its own; n = selection groups in a row.
A part is one tensor's (or structure's) groups, (r, n_i); the parts given together share one ranking along n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

PRUNED = -math.inf  # the score of a group that is pruned already: nothing ranks below it, so it stays pruned
SHORT = 64  # rows up to this long are sorted
LARGE = 1 << 20  # a row longer than this is bracketed by a sample first
STRIDE = 127  # of the sample; odd, so that it does not walk down one column of a weight


def pruned_count(sparsity: float, n: int) -> int:
    """How many of `n` groups a sparsity in [0, 1) means: floor(sparsity * n + 0.5).

    Example:
        >>> [pruned_count(s, 10) for s in (0.0, 0.04, 0.05, 0.9)]
        [0, 0, 1, 9]
    """
    return math.floor(sparsity * n + 0.5)


def least_kept(n: int, min_kept: int, min_share: float = 0.0) -> int:
    """Groups of `n` that stay at least: `min_kept` of them, and that share, rounded up.

    Example:
        >>> [least_kept(n, 2, 0.1) for n in (1, 4, 20, 30, 31)]
        [1, 2, 2, 3, 4]
    """
    return min(n, max(min_kept, math.ceil(min_share * n - 1e-9)))


def select(
    scores: Sequence[Tensor], k: int, *, protected: Sequence[Tensor] | None = None, min_kept: int | Sequence[int] = 0
) -> list[Tensor]:
    """Prune the k lowest-scored groups of every row of one ranking over all parts: exactly k, whatever the ties.

    Ties go by index: the lower index (of the earlier part) is kept. k falls where `protected` and `min_kept` leave
    fewer to prune. A selection and no sort: on 25.5 million scores a tenth of the time.

    Args:
        scores: parts (r, n_i), float, higher is kept; -inf (`PRUNED`) goes first. Never NaN. Left as they are.
        k: groups to prune in each row, over all parts.
        protected: parts (r, n_i), bool: True is kept in any case, equally many in each row. None: nothing is.
        min_kept: groups kept at least in each row of each part (all of them in a part that has fewer); one number, or
            one for each part.

    Returns:
        Parts (r, n_i), bool, True = kept.

    Example:
        >>> scores = torch.tensor([[3.0, 1.0, 2.0, 1.0]])
        >>> [select([scores], k)[0].int().tolist() for k in (1, 2, 3)]
        [[[1, 1, 1, 0]], [[1, 0, 1, 0]], [[1, 0, 0, 0]]]
    """
    wanted = [min_kept] * len(scores) if isinstance(min_kept, int) else min_kept
    kept = [min(least, score.shape[1]) for least, score in zip(wanted, scores, strict=True)]
    if len(scores) == 1:
        k = min(k, scores[0].shape[1] - kept[0])
    keeps = _select(scores, k, protected)
    if all(not m or int(_counts(keep).min()) >= m for keep, m in zip(keeps, kept, strict=True)):
        return keeps
    best = [_select([score], score.shape[1] - m, None)[0] for score, m in zip(scores, kept, strict=True)]
    if protected is not None:
        best = [b | p for b, p in zip(best, protected, strict=True)]
    return _select(scores, k, best)


def _select(scores: Sequence[Tensor], k: int, protected: Sequence[Tensor] | None) -> list[Tensor]:
    n = sum(score.shape[1] for score in scores)
    k = min(k, n)
    if protected is not None:
        k = min(k, n - int(sum(int(safe.sum(1).max()) for safe in protected)))
        scores = [score.masked_fill(safe, math.inf) for score, safe in zip(scores, protected, strict=True)]
    if k <= 0:
        return [torch.ones_like(score, dtype=torch.bool) for score in scores]
    if len(scores[0]) == 1 and n > LARGE and (keeps := _by_sample(scores, k, n)) is not None:
        return keeps
    (threshold_r1,) = _kth_smallest_(torch.cat(tuple(scores), dim=1), k)
    return _above(scores, threshold_r1, n - k)


def _above(scores: Sequence[Tensor], threshold_r1: Tensor, count: int) -> list[Tensor]:
    """What is above the threshold, and as many of the ties as make up `count`, lowest index first."""
    keeps = [score > threshold_r1 for score in scores]
    room_r = count - torch.stack([_counts(keep) for keep in keeps]).sum(0)
    for score, keep in zip(scores, keeps, strict=True):
        tie = score == threshold_r1
        keep |= tie & (tie.cumsum(1, dtype=torch.int32) <= room_r.unsqueeze(1))
        room_r = (room_r - _counts(tie)).clamp_(min=0)
    return keeps


def _by_sample(scores: Sequence[Tensor], k: int, n: int) -> list[Tensor] | None:
    """The same for one long row, just as exact; None if the sample misleads.

    A sample brackets the threshold between two values, and only what lies between them is ranked (Floyd and Rivest,
    1975). The gain is memory never touched: to write 25 million fresh floats can take longer than to select.
    """
    sample = torch.cat([score[:, ::STRIDE] for score in scores], dim=1)
    m = sample.shape[1]
    at, slack = k * m / n, 3 * math.sqrt(m)  # six standard deviations of a rank in the sample, at the median
    low, high = _kth_smallest_(sample, max(1, math.floor(at - slack)), min(m, math.ceil(at + slack)))
    reach = torch.gt if float(low) == PRUNED else torch.ge  # what is pruned already goes without being ranked
    keeps = [reach(score, low) for score in scores]
    rank = k - (n - sum(int(_counts(keep)) for keep in keeps))
    places = [_places((score <= high).logical_and_(keep)) for score, keep in zip(scores, keeps, strict=True)]
    between = torch.cat([score.view(-1)[place] for score, place in zip(scores, places, strict=True)])
    if not 0 <= rank <= len(between) <= n / 4:
        return None  # the threshold is outside the bracket, or so many are equal that it narrows nothing
    (ranked,) = _select([between.unsqueeze(0)], rank, None)
    for keep, place, kept in zip(keeps, places, torch.split(ranked[0], [len(p) for p in places]), strict=True):
        keep.view(-1)[place] = kept
    return keeps


def _counts(mask: Tensor) -> Tensor:
    """How many of each row are True, (r,)."""
    if len(mask) == 1 and mask.device.type == "cpu":  # a hundredth of the time of a sum
        return torch.tensor([np.count_nonzero(mask.numpy())])
    return mask.sum(1)


def _places(mask: Tensor) -> Tensor:
    """Which of one row are True."""
    if mask.device.type == "cpu":  # a sixth of the time of torch.nonzero
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero().view(-1)


def _kth_smallest_(pool: Tensor, *ks: int) -> list[Tensor]:
    """The k-th smallest of every row, (r, 1), for each k; shuffles the pool."""
    if pool.shape[1] <= SHORT:  # many rows, as the blocks of an N:M pattern: one vectorised sort is faster
        values = pool.sort(dim=1).values
        return [values[:, k - 1 : k] for k in ks]
    if pool.device.type == "cpu":  # numpy's partition, in place: ten times as fast here as torch.kthvalue
        pool.numpy().partition([k - 1 for k in ks], axis=1)
        return [pool[:, k - 1 : k].clone() for k in ks]
    return [pool.kthvalue(k, dim=1, keepdim=True).values for k in ks]
