"""Layers whose inputs lost columns, refitted to what the dense network's layers give: no labels, no gradients."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gsprune.repair.calibrating import held_back_split
from gsprune.repair.gram import Seen, error, matrix_of, moments_of, solve, why_no_matrix, write_matrix
from gsprune.repair.lockstep import CalledAgainError, Visit, lockstep
from gsprune.repair.report import LayerRepair, RepairReport
from gsprune.surgery.cut_plan import CutPlan
from gsprune.text.names import joined

Which = Literal["consumers", "all"]
DAMPING = (1e-3, 1e-2, 1e-1)
WIDEST = 8192  # columns of a group: a Gram matrix of them takes half a gigabyte


def least_squares(
    small: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    plan: CutPlan | None = None,
    *,
    damping: Sequence[float] = DAMPING,
    held_back: float = 0.2,
    layers: Which | Sequence[str] = "consumers",
) -> RepairReport:
    """Refit layers of a cut network, in place, to the outputs of the dense network's layers on some samples.

    In the order of the pass each layer's weight W (the part that was kept, W_kept) and bias b become

        (W', b') = argmin  sum over samples of |W' x' + b' - y|^2  +  lambda |W' - W_kept|^2

    with x' what the layer reads in the small network, which is repaired up to there, and y what the dense layer gives.
    Of a convolution the samples are the positions of its output. A layer is changed only where that lowers the error of
    its output on samples that are held back. Of a single sample nothing can be, and nothing is changed.

    Args:
        small: the network that `plan` left of `dense`; or a masked one, without a plan.
        dense: the network before the cut; it is not changed.
        batches: inputs as the networks are called with, or pairs or mappings with labels, which are not used.
        damping: values of lambda to choose from, as shares of the mean square of the columns.
        held_back: the share of samples that chooses and judges.
        layers: "consumers", those that lost columns; "all"; or names of modules.

    Returns:
        The error of each layer's output before and after, and why a layer was left as it was.

    Raises:
        ValueError: no batches; the plan does not lead from one network to the other; a layer that is not there. The
            small network is as it was then, as after any other error.

    References:
        Least-squares reconstruction of layers: He et al. 2017, "Channel Pruning for Accelerating Very Deep Neural
        Networks" (https://arxiv.org/abs/1707.06168), section 3.1; Kwon et al. 2022, "A Fast Post-Training Pruning
        Framework for Transformers" (https://arxiv.org/abs/2204.09656), section 5.3.

    >>> from gsprune.discovery.find import find_structures
    >>> from gsprune.surgery.shrink import shrink
    >>> _ = torch.manual_seed(0)
    >>> dense, x = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2)), torch.randn(50, 2)
    >>> small = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
    >>> _ = small.load_state_dict(dense.state_dict())
    >>> keep = [torch.tensor([True, True, True, False])]
    >>> plan = shrink(small, find_structures(small, x).structures, keep, example_input=x)
    >>> report = least_squares(small, dense, [x], plan, damping=[1e-9])
    >>> [layer.name for layer in report.repaired], torch.allclose(small(x), dense(x), atol=1e-5)
    (['1'], True)
    """
    damping = checked_damping(damping)
    inputs, is_held_back = held_back_split(batches, held_back)
    wanted, left = _layers(small, dense, plan, layers)
    if not any(is_held_back):
        why = "there is one sample only, and none can be held back to judge by"
        return RepairReport(tuple(LayerRepair(name, reason=why) for name in [*left, *wanted]))
    before = {
        name: [t.detach().clone() for t in small.get_submodule(name)._parameters.values() if t is not None]
        for name in wanted
    }
    while True:
        repair, why_left = _Repair(plan, damping), dict(left)
        try:
            lockstep(dense, small, inputs, wanted, repair, held_back=is_held_back, left=why_left)
        except BaseException as problem:
            _restore(small, before)
            if not isinstance(problem, CalledAgainError):
                raise
            left[problem.name] = "it is called more than once in a pass"
            wanted = [name for name in wanted if name != problem.name]
            continue
        found = [*repair.layers, *(LayerRepair(name, reason=why) for name, why in why_left.items())]
        return RepairReport(tuple(found))


@torch.no_grad()
def _restore(small: nn.Module, values: Mapping[str, Sequence[Tensor]]) -> None:
    for name, tensors in values.items():
        here = [t for t in small.get_submodule(name)._parameters.values() if t is not None]
        for tensor, value in zip(here, tensors, strict=True):
            tensor.copy_(value)


def checked_damping(damping: Sequence[float]) -> list[float]:
    values = [damping] if isinstance(damping, int | float) else [*damping]
    if not values or not all(isinstance(v, int | float) and 0 <= v < math.inf for v in values):
        raise ValueError(f"damping is {damping!r}: it must be a list of numbers from 0")
    return [float(value) for value in values]


# ---- which layers


def _layers(
    small: nn.Module, dense: nn.Module, plan: CutPlan | None, layers: Which | Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Names of the modules to repair, and others that were meant -> why they are left."""
    modules, kept = dict(small.named_modules()), plan.kept if plan else {}
    if isinstance(layers, str):
        if layers not in ("consumers", "all"):
            raise ValueError(f'layers is {layers!r}: it must be "consumers", "all" or a list of names')
        lost = {name.rpartition(".")[0] for name, cuts in kept.items() if 1 in cuts}
        is_all = layers == "all" or plan is None
        meant = [name for name, m in modules.items() if name in lost or (is_all and why_no_matrix(m) is None)]
    else:
        meant = [*layers]
        for name in meant:
            if name not in modules:
                raise ValueError(f"layers names {name!r}, which is no module of {type(small).__name__}")
    owners = Counter(id(p) for m in modules.values() for p in m._parameters.values() if p is not None)
    reasons = {name: _why_not(modules[name], owners) for name in meant}
    for name in meant:
        if reasons[name] is None:
            _check_fits(name, modules[name], dense, kept)
    return [n for n in meant if reasons[n] is None], {n: why for n, why in reasons.items() if why is not None}


def _why_not(module: Any, owners: Mapping[int, int]) -> str | None:
    reason = why_no_matrix(module)
    if reason is not None:
        return reason
    if any(owners[id(p)] > 1 for p in module._parameters.values() if p is not None):
        return "it shares its weight with another module"
    columns = matrix_of(module).shape[2]
    return f"it has {columns} columns, more than {WIDEST}" if columns > WIDEST else None


def _check_fits(name: str, module: Any, dense: nn.Module, kept: Mapping[str, Mapping[int, Tensor]]) -> None:
    weight = joined(name, "weight")
    try:
        shape = [*dense.get_parameter(weight).shape]
    except AttributeError:
        raise ValueError(f"the dense network has no {weight!r}, which the small one has") from None
    for dim, positions in kept.get(weight, {}).items():
        shape[dim] = len(positions)
    if shape != [*module.weight.shape]:
        given = f"{weight!r} has the shape {tuple(module.weight.shape)} in the small network"
        raise ValueError(f"the plan does not lead from the dense network to the small one: {given}, not {tuple(shape)}")


# ---- one layer


class _Repair:
    """Refits each visited layer, and notes how that went."""

    def __init__(self, plan: CutPlan | None, damping: Sequence[float]) -> None:
        self._kept, self._damping = plan.kept if plan else {}, damping
        self.layers: list[LayerRepair] = []

    def __call__(self, visit: Visit) -> None:
        kept = self._kept.get(joined(visit.name, "weight"), {}).get(0)
        self.layers.append(refit(visit.name, visit.small, moments_of(visit, kept=kept, residual=True), self._damping))


@torch.no_grad()
def refit(name: str, layer: Any, seen: Seen, damping: Sequence[float]) -> LayerRepair:
    """Change a layer by what it lacks, the y of the moments; each group where its error falls on the held-back part."""
    fit, judge = seen.fit, seen.judge
    if not (fit.is_finite and judge.is_finite):
        return LayerRepair(name, reason="what it reads or should give is not finite")
    if not fit.n or not judge.n:
        return LayerRepair(name, reason="no sample reaches it")
    weight, bias = torch.zeros_like(fit.yx), torch.zeros_like(fit.yy)
    before = best = error(judge, weight, bias).sum(1)  # of each group
    chosen = torch.zeros_like(best)
    for value in damping:
        change, shift = _rounded(layer, *solve(fit, torch.zeros_like(weight), value, has_bias=layer.bias is not None))
        after = error(judge, change, shift).sum(1)
        is_better = after < best
        best, chosen = torch.where(is_better, after, best), torch.where(is_better, value, chosen)
        weight, bias = (
            torch.where(is_better[:, None, None], change, weight),
            torch.where(is_better[:, None], shift, bias),
        )
    size = seen.variance or 1.0
    was, now = (float(part.sum()) / size for part in (before, best))
    if not now < was:
        return LayerRepair(name, was, was, reason="no fit lowers its error on the held-back samples")
    old = matrix_of(layer)
    write_matrix(layer, (old.to(weight.device).double() + weight).to(old.dtype))
    if layer.bias is not None:
        layer.bias.copy_((layer.bias.to(bias.device).double() + bias.flatten()).to(layer.bias.dtype))
    return LayerRepair(name, was, now, damping=float(chosen[best < before].median()))


def _rounded(layer: Any, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The change that is left when the sums have been rounded to the layer's type."""
    old = matrix_of(layer).to(weight.device)
    change = (old.double() + weight).to(old.dtype).double() - old.double()
    if layer.bias is None:
        return change, bias
    shift = layer.bias.detach().view(bias.shape).to(bias.device)
    return change, (shift.double() + bias).to(shift.dtype).double() - shift.double()
