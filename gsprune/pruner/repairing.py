"""Repair while training: what a mask update takes away is made up for before the next step.

The dense network of such a repair is the network as it is trained just before the mask update. Units that earlier
updates removed are no longer missed: the network has trained without them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gsprune.collectives import broadcast, world_size
from gsprune.pruner.part import Part
from gsprune.structures.norms import stream_norm
from gsprune.structures.twin import every_tensor
from gsprune.surgery.optimizers import Optimizers, every_optimizer

if TYPE_CHECKING:
    from gsprune.repair import Repair, RepairReport
    from gsprune.surgery.cut_plan import CutPlan


class Repairs:
    """Repairs a model, and the copies that are pruned along with it, around each mask update of units.

    Attributes:
        report: of the model's last repair.

    Raises:
        ValueError: single weights are pruned too; the model does not run on the samples.
    """

    def __init__(self, repair: Repair, model: nn.Module, copies: Sequence[nn.Module], parts: Sequence[Part]) -> None:
        if not parts or any(not part.units for part in parts):
            raise ValueError(
                "repair is of what removed units leave behind: it takes rules that prune units, and no other"
            )
        repair.check(model)
        self._repair, self._networks = repair, (model, *copies)
        self._before: list[nn.Module] = []
        self.report: RepairReport | None = None

    def keep(self) -> None:
        """Before a mask update: the networks as they are."""
        from gsprune.structures.twin import copy_of

        self._before = [copy_of(network) for network in self._networks]

    def forget(self) -> None:
        self._before = []

    def mend(self, plan: CutPlan, *, is_cut: bool, optimizers: Optimizers | None = None) -> None:
        """After it: the networks, cut by the plan or masked as it says, are fitted to what they were.

        Args:
            optimizers: the weights that a schedule-free one holds besides, from which it computes the network's, move
                along with these.
        """
        others = _weights_beside(optimizers)
        for network, before in zip(self._networks, self._before, strict=True):
            small = network if is_cut else _cut_copy(network, plan)
            report = self._repair(small, before, plan)
            _write(network, small, None if is_cut else plan, [layer.name for layer in report.repaired])
            self.report = report if network is self._networks[0] else self.report
        with torch.no_grad():
            for parameter, beside, value in others:
                beside.add_(parameter.detach() - value)
        self.forget()


def _weights_beside(optimizers: Optimizers | None) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(parameter, the other weights that its schedule-free optimizer steps from, the parameter's value now)."""
    found = []
    for optimizer in every_optimizer(optimizers):
        if hasattr(optimizer, "train") and hasattr(optimizer, "eval"):
            for parameter, state in optimizer.state.items():
                beside = state.get("z")
                if isinstance(beside, Tensor) and beside.shape == parameter.shape:
                    found.append((parameter, beside, parameter.detach().clone()))
    return found


def _cut_copy(network: nn.Module, plan: CutPlan) -> nn.Module:
    from gsprune.structures.twin import copy_of
    from gsprune.surgery.apply import apply_cut

    small = copy_of(network)
    apply_cut(small, plan)
    return small


@torch.no_grad()
def _write(network: nn.Module, small: nn.Module, plan: CutPlan | None, layers: Sequence[str]) -> None:
    """The repaired layers' tensors at their places in the network, the first process's in every process."""
    here, repaired = _tensors(network), set(layers)
    values = {name: t for name, t in _tensors(small).items() if name.rpartition(".")[0] in repaired}
    values |= {} if plan is None else _at_full_width(small, values)
    if world_size() > 1:
        values = broadcast({name: value.detach().cpu() for name, value in values.items()})
    elif plan is None:
        return
    for name, value in values.items():
        tensor, cuts = here[name], plan.kept.get(name, {}) if plan else {}
        places = [cuts.get(dim, torch.arange(size)).to(tensor.device) for dim, size in enumerate(tensor.shape[:2])]
        rows = (places[0][:, None], places[1]) if len(places) == 2 else tuple(places)
        tensor[rows or ...] = value.to(tensor)


def _at_full_width(small: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of RMSNorms that a cut has scaled to fewer entries, the weights over all of them."""
    found = {}
    for name, weight in values.items():
        path, _, leaf = name.rpartition(".")
        norm: Any = small.get_submodule(path)
        if leaf == "weight" and hasattr(norm, "dense_norm"):
            growth = math.sqrt(norm.dense_norm[0] / len(weight))
            offset = getattr(stream_norm(norm), "offset", 0.0)
            found[name] = (weight + offset) / growth - offset
    return found


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return every_tensor(network)
