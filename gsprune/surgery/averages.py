"""Averages over more entries than there are: those that were cut out count as zeros.

With x the n entries that are left along a dimension that had N, and c = N - n,

    mean = sum(x) / N,    sum of squares around it = sum((x - mean)^2) + c mean^2.

So of every call that averages: `mean`, `var`, `std`, `var_mean`, `std_mean`, and the functions `layer_norm` and
`rms_norm` over one dimension, `group_norm` of one group and `batch_norm` without statistics of its own (by which
weights are standardised). What is computed of a mean entry by entry is followed, as (x - mean)^2 in a variance that is
written by hand: where entries are gone it holds mean^2. LayerNorms and RMSNorms that are modules are in `narrow_norm`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_MEANS: set[Any] = {Tensor.mean, torch.mean}
_SPREADS: set[Any] = {Tensor.var, torch.var, Tensor.std, torch.std, torch.var_mean, torch.std_mean}
_ROOTS: set[Any] = {Tensor.std, torch.std, torch.std_mean}
_PAIRS: set[Any] = {torch.var_mean, torch.std_mean}
_GROUPS: set[Any] = {F.group_norm, torch.group_norm}
_BATCHES: set[Any] = {F.batch_norm}
_NORMS: set[Any] = {F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm, *_GROUPS, *_BATCHES}
_RMS: set[Any] = {F.rms_norm, torch.rms_norm}


def averaged_dims(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int]:
    """The dimensions of its first argument that a call averages over; none of another call.

    >>> x = torch.ones(2, 3, 4)
    >>> averaged_dims(torch.mean, (x, -1), {}), averaged_dims(Tensor.var, (x,), {}), averaged_dims(torch.sum, (x,), {})
    ([2], [0, 1, 2], [])
    """
    is_norm = func in _NORMS
    if not (is_norm or func in _MEANS or func in _SPREADS) or not args or not isinstance(args[0], Tensor):
        return []
    count = args[0].dim()
    if func in _GROUPS:
        return list(range(1, count)) if _argument(args, kwargs, 1, "num_groups") == 1 else []
    if func in _BATCHES:
        is_alone = _argument(args, kwargs, 1, "running_mean") is None and _argument(args, kwargs, 5, "training")
        return [d for d in range(count) if d != 1] if is_alone else []
    if is_norm:
        shape = _argument(args, kwargs, 1, "normalized_shape")
        return [count - 1] if len(shape) == 1 else []
    dims = _argument(args, kwargs, 1, "dim")
    if dims is None or isinstance(dims, bool) or dims in ((), []):
        return list(range(count))
    return [d % count for d in (dims if isinstance(dims, tuple | list) else [dims])] if count else []


def virtual_average(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], counts: Mapping[int, int]
) -> Any:
    """What a call gives over `counts[d]` entries along dimension d, of which those that are not there are zero.

    >>> x, whole = torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 3.0, 0.0, 0.0]])
    >>> virtual_average(torch.mean, (x, 1), {}, {1: 4}), whole.mean(1)
    (tensor([1.]), tensor([1.]))
    >>> torch.equal(virtual_average(Tensor.var, (x, 1), {}, {1: 4}), whole.var(1))
    True
    """
    x, dims = args[0], averaged_dims(func, args, kwargs)
    lengths = {d: length(x, d) for d in dims}
    virtual = {d: counts.get(d, n) for d, n in lengths.items()}
    if virtual == lengths:
        return func(*args, **kwargs)
    total = math.prod(virtual.values())
    if func in _MEANS:
        return _mean(func, args, kwargs, [d for d in dims if virtual[d] != lengths[d]], total)
    gone = total - math.prod(lengths.values())
    if func in _NORMS:
        return _norm(func, args, kwargs, dims, gone, total)
    mean, squares = _around_mean(x, dims, gone, total)
    variance = squares / (total - _correction(args, kwargs))
    spread = variance.sqrt() if func in _ROOTS else variance
    if not _argument(args, kwargs, 3, "keepdim"):
        mean, spread = (t.squeeze(dims) for t in (mean, spread))
    return (spread, mean) if func in _PAIRS else spread


def _mean(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], narrow: list[int], total: int) -> Tensor:
    """What is gone along one dimension is noted at the result, which has none of it."""
    x: Tensor = args[0]
    made: Tensor = func(*args, **kwargs)
    count = math.prod(length(x, d) for d in averaged_dims(func, args, kwargs))
    made = made * (count / total)
    if len(narrow) > 1:
        return made
    (dim,) = narrow
    left, gone = length(x, dim), getattr(x, _GONE, None)
    if gone is not None and gone.value is not None and gone.dim == dim - x.dim():
        shape = [1 if d == dim else n for d, n in enumerate(x.shape)]
        made = made + func(gone.value.expand(shape), *args[1:], **kwargs) * (gone.missing * count / left / total)
    if made.dim() == x.dim():
        missing = total * left // count - left
        setattr(made, _GONE, Gone(dim - x.dim(), missing, left, None))
    return made


class Gone(NamedTuple):
    """Of a tensor some of whose entries along a dimension (counted from the end) are gone: how many, how many are left,
    and what those would hold, with size 1 there. None: it is an average over that dimension."""

    dim: int
    missing: int
    left: int
    value: Tensor | None


_GONE = "_gsprune_gone"
_ENTRYWISE = {"sub", "rsub", "add", "mul", "pow", "square", "abs"}


def is_followed(func: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Whether a call computes, entry by entry, something of an average or of what differs from one."""
    return getattr(func, "__name__", "").strip("_") in _NAMES and any(hasattr(a, _GONE) for a in args)


_NAMES = _ENTRYWISE | {f"r{name}" for name in _ENTRYWISE}


def note_gone(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
    """Note at the result of such a call what it would hold where entries are gone: these are zero in other tensors.

    The square of the distance from a mean is the square of the mean there.
    """
    gone: Gone = next(getattr(a, _GONE) for a in args if hasattr(a, _GONE))

    def there(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        mine = getattr(value, _GONE, None)
        if mine is not None:
            return value if mine.value is None else mine.value
        is_whole = value.dim() >= -gone.dim and length(value, gone.dim) == gone.left
        return torch.zeros_like(value.narrow(gone.dim, 0, 1)) if is_whole else value

    if isinstance(result, Tensor) and result.dim() >= -gone.dim and length(result, gone.dim) == gone.left:
        setattr(result, _GONE, gone._replace(value=func(*map(there, args), **kwargs)))


def _around_mean(x: Tensor, dims: list[int], gone: int, total: int) -> tuple[Tensor, Tensor]:
    """The mean and the sum of squares around it, with the dimensions kept."""
    mean = x.sum(dims, keepdim=True) / total
    return mean, (x - mean).square().sum(dims, keepdim=True) + gone * mean.square()


def _norm(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], dims: list[int], gone: int, total: int) -> Tensor:
    """The functions layer_norm, rms_norm, group_norm and batch_norm; half precision is computed in float32."""
    x: Tensor = args[0]
    is_rms, is_batch = func in _RMS, func in _BATCHES
    weight = _argument(args, kwargs, 3 if is_batch else 2, "weight")
    bias = None if is_rms else _argument(args, kwargs, 4 if is_batch else 3, "bias")
    eps = _argument(args, kwargs, 7 if is_batch else 3 if is_rms else 4, "eps")
    if eps is None:
        eps = torch.finfo(x.dtype).eps if is_rms else 1e-5
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if is_rms:
        squares = y.square().sum(dims, keepdim=True)
    else:
        mean, squares = _around_mean(y, dims, gone, total)
        y = y - mean
    y = y * torch.rsqrt(squares / total + eps)
    shape = [-1, *[1] * (x.dim() - 2)] if is_batch else [-1, *[1] * (len(dims) - 1)]  # along the channels
    y = y if weight is None else y * weight.view(shape)
    return (y if bias is None else y + bias.view(shape)).to(x.dtype)


def _correction(args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    unbiased = next((a for a in args[1:3] if isinstance(a, bool)), kwargs.get("unbiased"))
    if unbiased is not None:
        return float(unbiased)
    correction = kwargs.get("correction")
    return 1.0 if correction is None else float(correction)


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def length(x: Tensor, dim: int) -> int:
    """As a number, also where torch.jit traces, whose sizes are tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return int(x.shape[dim])
