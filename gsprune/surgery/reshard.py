"""Cut units out of a network that is spread over processes: the smaller one, spread anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gsprune.structures.example import Example, answers_in, call, example_of
from gsprune.structures.one_piece import in_one_piece, reshard
from gsprune.structures.shards import here, is_sharded, is_sharded_model, part_like
from gsprune.surgery.apply import apply_cut, with_ties
from gsprune.surgery.cut_plan import CutPlan, Cuts, cut_tensor

__all__ = ["cut_sharded"]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the largest output; of fewer bits 0.05


def cut_sharded(
    model: nn.Module, plan: CutPlan, shard: Callable[[nn.Module], Any], *, example_input: Example
) -> nn.Module:
    """The smaller network that a cut plan leaves of one that `fully_shard` has spread over processes.

    Every process calls it. The small network is built without values, `shard` spreads it, and each parameter is then
    gathered, cut and dealt out again, one at a time: no process holds more than one in one piece. Weights equal those
    of the cut in one process to the last bit. Make a new optimizer for it.

    Args:
        model: masked, as `pruner.finish()` leaves it; it stays as it is.
        plan: `pruner.next_plan()`.
        shard: what spreads a network of this kind in place, as it spread this one: calls `fully_shard` on its layers
            and on itself. Its parameters lie on the meta device.
        example_input: both networks are compared on it.

    Returns:
        The smaller network, in the mode (training or evaluation) of the model.

    Raises:
        ValueError: the model is in one piece, the plan does not fit it, `shard` left a parameter in one piece, or the
            small network does not compute what the masked one does (1e-9 of the largest output in float64, 1e-4 in
            float32, 0.05 below).
    """
    if not is_sharded_model(model):
        raise ValueError("the model is in one piece: cut it with gsprune.surgery.apply.apply_cut, or let the pruner")
    reshard(model)
    small = in_one_piece(model)
    apply_cut(small, plan)
    values = {name: buffer.clone() for name, buffer in small.named_buffers()}
    shard(small)
    device = next(model.parameters()).device
    small.to_empty(device=device)
    with torch.no_grad():
        for name, buffer in small.named_buffers():
            buffer.copy_(values[name])
        cuts = with_ties(model, plan.without_removed()).kept
        for name, parameter in small.named_parameters():
            if not is_sharded(parameter):
                raise ValueError(f"shard left {name} in one piece: it has to spread the network as the model is")
            _fill(parameter, model.get_parameter(name), cuts.get(name, {}))
    _compare(model, small, example_of(example_input))
    return small.train(model.training)


def _fill(parameter: Tensor, old: Tensor, cuts: Cuts) -> None:
    """Deal out what stays of a tensor; columns go before it is gathered, rows after."""
    columns = {dim: kept for dim, kept in cuts.items() if dim}
    shape = [len(columns.get(dim, ())) or size for dim, size in enumerate(old.shape)]
    mine = cut_tensor(here(old), columns) if columns else here(old)
    rows = _gathered(mine, old, shape) if is_sharded(old) else mine
    kept = cut_tensor(rows, {0: cuts[0]}) if 0 in cuts else rows
    here(parameter).copy_(part_like(kept, parameter))


def _gathered(mine: Tensor, like: Any, shape: list[int]) -> Tensor:
    """This process's rows and those of all others, laid out as those of `like`."""
    from torch.distributed.tensor import DTensor  # slow to import

    stride = torch.empty(shape, device="meta").stride()
    parts = DTensor.from_local(
        mine, like.device_mesh, like.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    return parts.full_tensor()


def _compare(model: nn.Module, small: nn.Module, example_input: Example) -> None:
    """ValueError where the two give other outputs."""
    found = []
    for network in (model, small):
        training = network.training
        with torch.no_grad():
            found.append([answer.double() for answer in answers_in(call(network.eval(), example_input))])
        network.train(training)
        reshard(network)
    if not found[0]:
        raise ValueError(f"{type(small).__name__} returns no tensor to compare the smaller network by")
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for masked, cut in zip(*found, strict=True):
        most = _TOLERANCE.get(dtype, 0.05) * float(masked.abs().max())
        off = float((masked - cut).abs().max())
        if not off <= most:
            raise ValueError(
                f"the smaller network does not compute what the masked one does: outputs differ by {off:.2g}, which is "
                f"more than {most:.2g}; the model was left as it was"
            )
