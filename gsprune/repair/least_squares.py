"""Layers whose inputs lost columns, refitted to what the dense network's layers give: no labels, no gradients."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gsprune.repair.calibrating import held_back_split
from gsprune.repair.gram import (
    LACKS_NOTHING,
    OWN_PASS,
    Seen,
    error,
    kept_rows,
    matrix_of,
    moments_of,
    multiplies,
    noise,
    rows_dim,
    solve,
    why_no_matrix,
    write_matrix,
)
from gsprune.repair.lockstep import CalledAgainError, Visit, lockstep
from gsprune.repair.norms import How, Known, norms_in, refit_norm, slope_of, why_no_norm
from gsprune.repair.observing import Observed, Stream, observe
from gsprune.repair.packed import MIXED, is_packed, of_projections
from gsprune.repair.report import LayerRepair, RepairReport
from gsprune.repair.undoing import undone_on_error
from gsprune.structures.matrices import TABLES
from gsprune.surgery.cut_plan import CutPlan
from gsprune.text.names import joined

Which = Literal["consumers", "all"]
_TWICE = "it is called more than once in a pass"
DAMPING = (1e-3, 1e-2, 1e-1)
WIDEST = 8192  # columns of a group: a Gram matrix of them takes half a gigabyte; wider layers are refitted in blocks
BLOCK = 2048  # columns of these
SWEEPS = 4  # over all blocks, at most
ENOUGH = 0.95  # of its error before: a sweep that leaves more is the last


def least_squares(
    small: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    plan: CutPlan | None = None,
    *,
    damping: Sequence[float] = DAMPING,
    held_back: float = 0.2,
    layers: Which | Sequence[str] = "all",
    norms: How | None = "affine",
    streams: bool = True,
    progress: Callable[[float], None] | None = None,
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
        layers: "all"; "consumers", those that lost columns; or names of modules.
        norms: whether the scale and shift of normalisation layers are fitted ("affine"), or a BatchNorm's "statistics"
            are re-estimated; None leaves them.
        streams: whether a layer that adds into a residual stream makes up for what the stream has lost before:
            its y is the dense sum less the small network's stream.
        progress: told the share of the layers that is done, in (0, 1].

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
    seen = observe(dense, inputs[0])
    known = norms_in(small)
    meant = _meant(small, plan, layers, known if norms else {})
    left = _left(small, dense, plan, meant, known, norms, seen)
    if not any(is_held_back):
        left |= dict.fromkeys(meant, "there is one sample only, and none can be held back to judge by")
    paths = {name for name, _ in small.named_modules()}
    order = [*seen.order, *(name for name in meant if name not in seen.order)]  # an attention does not call its parts
    while True:
        repair = _Repair(small, plan, damping, (norms, known), seen.streams if streams else {})
        why_left = dict(left)
        wanted = [name for name in order if name in meant and name not in left]
        places = {name: seen.streams[name].place for name in wanted if streams and name in seen.streams}
        # A place inside of a branch that went is not watched.
        watched = {name: place for name, place in places.items() if place.module in paths}

        def visit(visited: Visit, repair: _Repair = repair, count: int = len(wanted)) -> None:
            repair(visited)
            if progress is not None:
                progress(len(repair.layers) / count)

        try:
            with undone_on_error(small, wanted):
                lockstep(dense, small, inputs, wanted, visit, held_back=is_held_back, watched=watched, left=why_left)
        except CalledAgainError as error:
            left[error.name] = _TWICE
            continue
        return RepairReport((*repair.layers, *(LayerRepair(name, reason=why) for name, why in why_left.items())))


def checked_damping(damping: Sequence[float]) -> list[float]:
    values = [damping] if isinstance(damping, int | float) else [*damping]
    if not values or not all(isinstance(v, int | float) and 0 <= v < math.inf for v in values):
        raise ValueError(f"damping is {damping!r}: it must be a list of numbers from 0")
    return [float(value) for value in values]


# ---- which layers


def _meant(
    small: nn.Module, plan: CutPlan | None, layers: Which | Sequence[str], norms: Mapping[str, Known]
) -> list[str]:
    """Names of the modules to repair, if they can be."""
    modules = dict(small.named_modules())
    if not isinstance(layers, str):
        for name in layers:
            if name not in modules:
                raise ValueError(f"layers names {name!r}, which is no module of {type(small).__name__}")
        return [*layers]
    if layers not in ("consumers", "all"):
        raise ValueError(f'layers is {layers!r}: it must be "consumers", "all" or a list of names')
    is_all = layers == "all" or plan is None
    return [
        name
        for name, m in modules.items()
        if (plan is not None and _lost_columns(name, m, plan))
        or (is_all and (why_no_matrix(m) is None or is_packed(m)))
        or name in norms
    ]


def _lost_columns(name: str, module: nn.Module, plan: CutPlan) -> bool:
    """Whether the plan shortens what a layer reads; an embedding reads no activations."""
    tensors = [tensor for tensor in plan.kept if tensor.rpartition(".")[0] == name]
    columns = 1 - rows_dim(module)
    return not isinstance(module, TABLES) and any(columns in plan.kept[tensor] for tensor in tensors)


def _left(
    small: nn.Module,
    dense: nn.Module,
    plan: CutPlan | None,
    meant: Sequence[str],
    known: Mapping[str, Known],
    norms: How | None,
    seen: Observed,
) -> dict[str, str]:
    """Those of the modules that cannot be repaired -> why."""
    modules, left = dict(small.named_modules()), dict[str, str]()
    owners = Counter(id(p) for m in modules.values() for p in m._parameters.values() if p is not None)
    for name in meant:
        module = modules[name]
        reason = why_no_norm(module, norms or "affine") if name in known else _why_not(module)
        if type(modules.get(name.rpartition(".")[0])) is nn.MultiheadAttention:  # it reads the weight past the module
            reason = reason or "its attention does not call it"
        if any(owners[id(p)] > 1 for p in module._parameters.values() if p is not None):
            reason = reason or "it shares its weight with another module"
        if seen.calls[name] > 1:
            reason = reason or _TWICE
        if name in seen.mixed and is_packed(module):
            reason = reason or MIXED
        if reason is not None:
            left[name] = reason
        elif name not in known:
            _check_fits(name, module, dense, plan.kept if plan else {})
    return left


def _why_not(module: Any) -> str | None:
    if isinstance(module, nn.MultiheadAttention):
        return None if is_packed(module) else "its query, key and value have a weight each"
    return why_no_matrix(module)


def _check_fits(name: str, module: Any, dense: nn.Module, kept: Mapping[str, Mapping[int, Tensor]]) -> None:
    weight = joined(name, weight_of(module))
    try:
        shape = [*dense.get_parameter(weight).shape]
    except AttributeError:
        raise ValueError(f"the dense network has no {weight!r}, which the small one has") from None
    for dim, positions in kept.get(weight, {}).items():
        shape[dim] = len(positions)
    here = getattr(module, weight_of(module)).shape
    if shape != [*here]:
        given = f"{weight!r} has the shape {tuple(here)} in the small network"
        raise ValueError(f"the plan does not lead from the dense network to the small one: {given}, not {tuple(shape)}")


# ---- one layer


class _Repair:
    """Refits each visited layer, and notes how that went."""

    def __init__(
        self,
        small: nn.Module,
        plan: CutPlan | None,
        damping: Sequence[float],
        norms: tuple[How | None, Mapping[str, Known]],
        streams: Mapping[str, Stream],
    ) -> None:
        self._small, self._plan, self._damping = small, plan, damping
        (self._how, self._norms), self._streams = norms, streams
        self.layers: list[LayerRepair] = []

    def __call__(self, visit: Visit) -> None:
        kept = self._kept(visit)
        if self._how and visit.name in self._norms:
            self.layers.append(refit_norm(visit, kept, self._how, self._norms[visit.name]))
            return
        if is_packed(visit.small):
            visit = of_projections(visit)
        if type(visit.dense) is type(visit.small) and not multiplies(
            visit.dense, visit.dense_inputs[visit.filled], visit.outputs[visit.filled]
        ):
            self.layers.append(LayerRepair(visit.name, reason=OWN_PASS))
            return
        norm = self._streams[visit.name].norm if visit.streams else None
        slope = None if norm is None else slope_of(self._small.get_submodule(norm))
        if matrix_of(visit.small).shape[2] > WIDEST:
            self.layers.append(refit_in_blocks(visit, kept, slope, self._damping))
            return
        seen = moments_of(visit, kept=kept, residual=True, slope=slope)
        self.layers.append(refit(visit.name, visit.small, seen, self._damping))

    def _kept(self, visit: Visit) -> Tensor | None:
        """Of the dense layer's outputs, those that the small one has; None: all."""
        weight = joined(visit.name, weight_of(visit.small))
        if self._plan is None or weight not in self._plan.kept:
            return None
        return kept_rows(visit.small, self._plan.kept[weight], self._plan.sizes[weight])


def weight_of(module: nn.Module) -> str:
    """The name of the tensor that a layer multiplies with."""
    return "in_proj_weight" if is_packed(module) else "weight"


def refit_in_blocks(visit: Visit, kept: Tensor | None, slope: Tensor | None, damping: Sequence[float]) -> LayerRepair:
    """Of a wide layer, a block of columns after the other, to what all of them lack; several times over.

    The memory is that of one block's Gram matrix and of `gram.ENTRIES` activations, whatever the width. Each block is
    changed only where the error falls on the held-back part.
    """
    width, found = matrix_of(visit.small).shape[2], list[LayerRepair]()
    for _ in range(SWEEPS):
        for block in torch.arange(width).split(BLOCK):  # type: ignore[no-untyped-call]
            seen = moments_of(visit, kept=kept, residual=True, slope=slope, columns=block)
            found.append(refit(visit.name, visit.small, seen, damping, columns=block))
        sweep = found[-math.ceil(width / BLOCK) :]
        if all(one.reason is not None for one in sweep) or sweep[-1].after > ENOUGH * sweep[0].before:
            break
    changed = [one for one in found if one.reason is None]
    if not changed:
        return replace(found[0], after=found[0].before)
    return LayerRepair(visit.name, found[0].before, found[-1].after, changed[-1].damping)


@torch.no_grad()
def refit(name: str, layer: Any, seen: Seen, damping: Sequence[float], *, columns: Tensor | None = None) -> LayerRepair:
    """Change a layer by what it lacks, y of the moments; each group where its error falls on the held-back part.

    Args:
        columns: that x of the moments is of, and that are changed; None: all.
    """
    fit, judge = seen.fit, seen.judge
    if not (fit.is_finite and judge.is_finite):
        return LayerRepair(name, reason="what it reads or should give is not finite")
    if not fit.n or not judge.n:
        return LayerRepair(name, reason="no sample reaches it")
    weight, bias = torch.zeros_like(fit.yx), torch.zeros_like(fit.yy)
    before = best = error(judge, weight, bias).sum(1)  # of each group
    size = seen.variance or 1.0
    was = float(before.sum()) / size
    if was <= noise(matrix_of(layer).dtype):
        return LayerRepair(name, was, was, reason=LACKS_NOTHING)
    chosen = torch.zeros_like(best)
    for value in damping:
        change, shift = _rounded(layer, *solve(fit, None, value, has_bias=layer.bias is not None), columns)
        after = error(judge, change, shift).sum(1)
        is_better = after < best
        best, chosen = torch.where(is_better, after, best), torch.where(is_better, value, chosen)
        weight, bias = (
            torch.where(is_better[:, None, None], change, weight),
            torch.where(is_better[:, None], shift, bias),
        )
    now = float(best.sum()) / size
    if not now < was:
        return LayerRepair(name, was, was, reason="no fit lowers its error on the held-back samples")
    old = matrix_of(layer)
    mine = old if columns is None else old[..., columns.to(old.device)]
    new = (mine.to(weight.device).double() + weight).to(old.dtype)
    if columns is not None:
        new = old.index_copy(2, columns.to(old.device), new.to(old.device))
    write_matrix(layer, new)
    if layer.bias is not None:
        layer.bias.copy_((layer.bias.to(bias.device).double() + bias.flatten()).to(layer.bias.dtype))
    return LayerRepair(name, was, now, damping=float(chosen[best < before].median()))


def _rounded(layer: Any, weight: Tensor, bias: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """The change that is left when the sums have been rounded to the layer's type."""
    old = matrix_of(layer).to(weight.device)
    old = old if columns is None else old[..., columns.to(old.device)]
    change = (old.double() + weight).to(old.dtype).double() - old.double()
    if layer.bias is None:
        return change, bias
    shift = layer.bias.detach().view(bias.shape).to(bias.device)
    return change, (shift.double() + bias).to(shift.dtype).double() - shift.double()
