"""Running statistics of BatchNorm, taken anew in the network as it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from gsprune.repair.calibrating import held_back_split, inputs_of
from gsprune.repair.lockstep import Visit, lockstep
from gsprune.repair.norms import BATCH, refit_norm, why_no_norm
from gsprune.repair.observing import observe
from gsprune.repair.report import LayerRepair, RepairReport
from gsprune.repair.undoing import undone_on_error
from gsprune.surgery.cut_plan import CutPlan
from gsprune.text.names import joined


def batchnorm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    dense: nn.Module | None = None,
    plan: CutPlan | None = None,
    held_back: float = 0.2,
) -> RepairReport:
    """Re-estimate, in place, the mean and variance that each BatchNorm of a cut network normalises by.

    One pass in evaluation mode: a BatchNorm's statistics are those of what it reads over all samples together, with the
    BatchNorms before it re-estimated already. Weights stay as they are.

    Args:
        model: the network that `plan` left of `dense`.
        batches: inputs as the network is called with, or pairs or mappings with labels, which are not used. They must
            be like the training data: statistics of other data break a network.
        dense: the network before the cut. With it a channel's statistics are changed only where its output comes
            nearer to the dense one's on samples that are held back.
        held_back: the share of samples that judges; without `dense` all samples are used.

    Raises:
        ValueError: no batches, or as `least_squares`.

    >>> import torch
    >>> norm, x = nn.BatchNorm1d(1), torch.tensor([[1.0], [3.0], [5.0]])
    >>> batchnorm(nn.Sequential(norm), [x])
    Repaired 1 of 1 layer
    >>> norm.running_mean.item(), norm.running_var.item()
    (3.0, 4.0)
    """
    if dense is None:
        inputs = [inputs_of(batch) for batch in batches]
        if not inputs:
            raise ValueError("there are no batches: a repair needs some samples, labels are not needed")
        is_held_back = [False] * len(inputs)
    else:
        inputs, is_held_back = held_back_split(batches, held_back)
    calls = observe(model, inputs[0]).calls
    norms = {name: m for name, m in model.named_modules() if isinstance(m, BATCH)}
    left = {name: why for name, m in norms.items() if (why := why_no_norm(m, "statistics")) is not None}
    left |= {name: "it is called more than once in a pass" for name in norms if calls[name] > 1}
    if dense is not None and not any(is_held_back):
        left |= dict.fromkeys(norms, "there is one sample only, and none can be held back to judge by")
    wanted = [name for name in calls if name in norms and name not in left]
    left |= {name: "a pass does not reach it" for name in norms if not calls[name]}
    kept, found = plan.kept if plan else {}, list[LayerRepair]()

    def visit(visit: Visit) -> None:
        rows = kept.get(joined(visit.name, "running_mean"), {}).get(0)
        found.append(refit_norm(visit, rows, "statistics"))

    with undone_on_error(model, wanted):
        lockstep(dense, model, inputs, wanted, visit, held_back=is_held_back, left=left)
    return RepairReport((*found, *(LayerRepair(name, reason=why) for name, why in left.items())))
