"""Which units of one structure go together: a choice that knows that removals add up or cancel."""

from __future__ import annotations

import torch
from torch import Tensor


def exchange(gates: Tensor, removed: int) -> Tensor:
    """Choose the units to remove so that, together, they change the loss little.

    With G the gate gradients and S a set of units, the loss changes by about 1/2 mean over samples of
    (sum over u in S of G[:, u])^2 when S is removed, which is ||G_S 1||^2 up to a factor. Start from the units with the
    smallest ||g_u||^2; each further unit, the smallest first, comes in, and the member whose leaving makes
    ||G_S 1||^2 smallest goes out. So the sum never grows. One step takes O(samples * removed).

    Args:
        gates: G, (samples, units), the gradient of a gate on each unit's output on each sample; float, finite.
        removed: how many units go, 0 to `units`.

    Returns:
        bool (units,), True = kept, on the device of `gates`. Of equals the lower index goes.

    Raises:
        ValueError: `gates` has another shape or type or is not finite; `removed` is out of its range.

    Source: the rearrangement of Kwon et al., "A fast post-training pruning framework for transformers", 2022.

    Example:
        The units 1 and 2 matter more than unit 0, but without both of them the loss is what it was:

        >>> gates = torch.tensor([[1.0, 2.0, -2.0], [1.0, -3.0, 3.0]])
        >>> exchange(gates, removed=1).tolist(), exchange(gates, removed=2).tolist()
        ([False, True, True], [True, False, False])
    """
    _check(gates, removed)
    units = gates.shape[1]
    if removed in (0, units):
        return torch.full((units,), removed == 0, device=gates.device)
    rows = gates.detach().T.to(torch.promote_types(gates.dtype, torch.float32)).contiguous()
    norms = rows.square().sum(1)
    order = norms.argsort(stable=True)
    inside = torch.cat([order[:1], order[:removed]])  # in the first place the unit that comes in, then the members
    members = rows[inside]
    total = members[1:].sum(0)
    for unit in torch.split(order[removed:], 1):
        row = rows[unit]
        members[:1], inside[:1] = row, unit
        total += row[0]
        out = (norms[inside] - 2 * members @ total).argmin().view(1)  # ||total - g||^2 - ||total||^2
        total -= members[out][0]
        members.index_copy_(0, out, row)
        inside.index_copy_(0, out, unit)
    keep = torch.ones(units, dtype=torch.bool, device=gates.device)
    return keep.index_fill_(0, inside[1:], False)


def _check(gates: Tensor, removed: int) -> None:
    if gates.dim() != 2 or not gates.is_floating_point():
        raise ValueError(f"gates is {gates.dtype} of shape {list(gates.shape)}: it must be float, (samples, units)")
    if isinstance(removed, bool) or not isinstance(removed, int) or not 0 <= removed <= gates.shape[1]:
        raise ValueError(f"removed is {removed!r}: it must be a whole number from 0 to the {gates.shape[1]} units")
    if not bool(gates.isfinite().all()):
        raise ValueError("gates holds a value that is not finite")
