"""Tensors that `torch.distributed.fsdp.fully_shard` has cut over several processes: this process's part, and sums over
all parts.

A process holds some rows of each parameter (a `DTensor`), in one run, in the order of the processes; it may hold none.
"""

from __future__ import annotations

from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def is_sharded(tensor: Tensor) -> bool:
    """Whether other processes have parts of it (a `DTensor`, as `fully_shard` makes them)."""
    return type(tensor) not in _PLAIN and hasattr(
        tensor, "placements"
    )  # in hooks: an attribute that is missing is slow


def is_sharded_model(model: nn.Module) -> bool:
    """Whether a parameter of it is spread over processes."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def check_layout(name: str, tensor: Any) -> None:
    """ValueError for a tensor that is not cut into rows along one dimension of the mesh."""
    from torch.distributed.tensor import Replicate, Shard  # slow to import

    cut = [placement for placement in tensor.placements if not isinstance(placement, Replicate)]
    if cut != [Shard(0)]:
        raise ValueError(
            f"{name} is laid out over several processes as {tensor.placements}: only rows may be cut, by one "
            f"dimension of the mesh"
        )


def group_of(tensor: Any) -> dist.ProcessGroup:
    """The processes that share its rows."""
    return cast(dist.ProcessGroup, tensor.device_mesh.get_group(_cut_dim(tensor)))


def ranks_of(tensor: Any) -> list[int]:
    """The numbers of the processes that share its rows."""
    return dist.get_process_group_ranks(group_of(tensor))


def here(tensor: Tensor) -> Tensor:
    """What lies in this process; all of a tensor that is in one piece."""
    return cast(Any, tensor.detach()).to_local() if is_sharded(tensor) else tensor.detach()


def rows_here(tensor: Any) -> tuple[int, int]:
    """The first of this process's rows among those of the whole tensor, and the one after the last.

    >>> import torch
    >>> rows_here(torch.zeros(5, 2))
    (0, 5)
    """
    if not is_sharded(tensor):
        return 0, len(tensor)
    number, count = tensor.device_mesh.get_local_rank(_cut_dim(tensor)), tensor.device_mesh.size(_cut_dim(tensor))
    most = -(-len(tensor) // count)  # as `torch.chunk` does, of which `Shard` is made
    return min(number * most, len(tensor)), min((number + 1) * most, len(tensor))


def part_like(whole: Tensor, tensor: Any) -> Tensor:
    """Of a tensor with the rows of `tensor` those that this process has of that."""
    first, end = rows_here(tensor)
    return whole[first:end]


def sum_parts_(values: Tensor, tensor: Any) -> Tensor:
    """The sum, in place, of what each of the processes that share `tensor` has: the same bits in all of them."""
    dist.all_reduce(values, group=group_of(tensor))
    return values


def zero_at_(tensor: Tensor, dim: int, positions: Tensor) -> None:
    """Zero positions of a dimension, counted in the whole tensor.

    >>> import torch
    >>> w = torch.ones(2, 3)
    >>> zero_at_(w, 1, torch.tensor([0, 2]))
    >>> w.tolist()
    [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    """
    positions = positions.to(tensor.device)
    if dim == 0 and is_sharded(tensor):
        first, end = rows_here(tensor)
        positions = positions[(positions >= first) & (positions < end)] - first
    here(tensor).index_fill_(dim, positions, 0)


def whole(tensor: Tensor) -> Tensor:
    """A tensor in one piece, gathered from all processes where it is not."""
    return cast(Tensor, cast(Any, tensor).full_tensor()) if is_sharded(tensor) else tensor


def _cut_dim(tensor: Any) -> int:
    from torch.distributed.tensor import Shard  # slow to import

    return [*tensor.placements].index(Shard(0))
