"""Layers whose single weights are pruned, refitted to the dense network's outputs: what is pruned stays 0.

Legend: g = groups, o = outputs, k = columns of a layer seen as a matrix (`gsprune.repair.gram`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.hooks import RemovableHandle

from gsprune.repair.calibrating import held_back_split
from gsprune.repair.gram import (
    OWN_PASS,
    Moments,
    Seen,
    as_matrix,
    as_weight,
    error,
    matrix_of,
    moments_of,
    multiplies,
    why_no_matrix,
    write_matrix,
)
from gsprune.repair.least_squares import BLOCK, WIDEST, checked_damping
from gsprune.repair.lockstep import CalledAgainError, Visit, lockstep
from gsprune.repair.observing import reads_one_tensor
from gsprune.repair.packed import MIXED, of_projections
from gsprune.repair.report import LayerRepair, RepairReport
from gsprune.structures.example import Example
from gsprune.structures.running import hooked

DAMPING = (1e-2, 1e-1)
STEPS = 16  # of conjugate gradients at most
EVERY = 4  # steps between two looks at the held-back part
# Columns of a layer (None: all) and the moments of what they read: one pair, or of wide layers one a block, in order.
Blocks = Iterable[tuple[Tensor | None, Moments]]
Choose = Callable[["Site", Any, Blocks], tuple[Tensor, Tensor | None]]


def masked_least_squares(
    small: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    masks: Mapping[str, Tensor],
    *,
    damping: Sequence[float] = DAMPING,
    held_back: float = 0.2,
) -> RepairReport:
    """Refit what the masks keep of single weights, in place, to the outputs of the dense network's layers.

    In the order of the pass, with x' what a layer reads in the small network and y what the dense layer gives,

        (W', b') = argmin  sum over samples of |W' x' + b' - y|^2  +  lambda |W' - W|^2,  W' = 0 where pruned

    for every row at once by conjugate gradients from the masked weights, which end where the error on held-back samples
    grows: with few samples the way there is a better answer than its end. A fit is kept only where that error fell.

    Args:
        small: a network whose masked weights are 0.
        dense: the network before; it is not changed.
        batches: inputs as the networks are called with, or pairs or mappings with labels, which are not used.
        masks: tensor name -> bool, True = kept, as `Pruner.masks` gives them.
        damping: values of lambda to choose from, as shares of the mean square of the columns.
        held_back: the share of samples that judges.

    Raises:
        ValueError: no batches; a mask is of no tensor of the network, or of another shape; damping is negative.

    Source: the reconstruction step of Frantar and Alistarh, "SparseGPT", 2023, solved for all weights of a row.

    >>> _ = torch.manual_seed(0)
    >>> dense, x = nn.Linear(3, 2), torch.randn(50, 1) * torch.ones(3)
    >>> small, masks = nn.Linear(3, 2), {"weight": torch.tensor([[True, False, False], [False, True, True]])}
    >>> _ = small.load_state_dict(dense.state_dict())
    >>> _ = small.weight.data.mul_(masks["weight"])
    >>> report = masked_least_squares(small, dense, [x], masks, damping=[1e-9])
    >>> torch.allclose(small(x), dense(x), atol=1e-4), int(small.weight.count_nonzero())
    (True, 3)
    """
    damping = checked_damping(damping)
    shapes = {name: parameter.shape for name, parameter in small.named_parameters(remove_duplicate=False)}
    for name, mask in masks.items():
        if shapes.get(name) != mask.shape:
            here = f"it is {[*shapes[name]]}" if name in shapes else f"{type(small).__name__} has no such tensor"
            raise ValueError(f"there is a mask of shape {[*mask.shape]} for {name}, but {here}")
    inputs, is_held_back = held_back_split(batches, held_back)
    sites, left = find_sites(small, masks)

    def choose(site: Site, layer: Any, blocks: Blocks) -> tuple[Tensor, None]:
        return as_matrix(layer, masks[site.tensor]), None

    walked = walk(dense, small, inputs, is_held_back, sites, choose, damping=damping)
    return RepairReport((*walked.layers, *(LayerRepair(name, reason=why) for name, why in left.items())))


# ---- where tensors are multiplied


@dataclass(frozen=True)
class Site:
    """A tensor, and the module whose inputs it is multiplied with."""

    tensor: str
    module: str
    is_packed: bool  # the query, key and value rows of an attention, one below the other


def find_sites(model: nn.Module, tensors: Iterable[str]) -> tuple[list[Site], dict[str, str]]:
    """Of these parameters, those whose inputs can be seen; the others -> why not.

    >>> find_sites(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.GRU(2, 2)}), ["a.weight", "b.weight_hh_l0"])
    ([Site(tensor='a.weight', module='a', is_packed=False)], {'b.weight_hh_l0': 'it is a GRU'})
    """
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    sites, left = [], {}
    for name in tensors:
        path, _, local = name.rpartition(".")
        module: Any = model.get_submodule(path)
        packed = isinstance(module, nn.MultiheadAttention) and local == "in_proj_weight"
        computed = isinstance(module, ParametrizationList)
        reason = "its layer's weight is computed from it" if computed else None if packed else why_no_matrix(module)
        if reason is None and not packed and local != "weight":
            reason = f"it is {local!r} of a {type(module).__name__}"
        elif reason is None and owners[id(module._parameters[local])] > 1:
            reason = "it is shared by several modules"
        if reason is None:
            sites.append(Site(name, path, packed))
        else:
            left[name] = reason
    return sites, left


# ---- all layers


@dataclass(frozen=True)
class Walked:
    """What happened to each site, and the masks that were chosen of those that were reached: tensor name -> bool."""

    layers: list[LayerRepair]
    keeps: dict[str, Tensor]


def walk(
    dense: nn.Module,
    small: nn.Module,
    inputs: Sequence[Example],
    held_back: Sequence[bool],
    sites: Sequence[Site],
    choose: Choose,
    *,
    damping: Sequence[float] | None = DAMPING,
    multiple: int = 1,
    progress: Callable[[float], None] | None = None,
) -> Walked:
    """Visit the sites in the order of the pass; at each, choose what stays, and refit that.

    Args:
        choose: of a site, its layer and the moments of the fitting part (y: what the layer lacks as it is): the mask
            (g, o, k), and the criterion's own new weights, if it has some.
        damping: of the fits; None: no fit, weights are the criterion's or the layer's own.
        multiple: of so many inputs, or channels, are the blocks of a wide layer.
        progress: told the share of the sites that is done.

    Everything is as it was after an error.
    """
    before = {site.tensor: small.get_parameter(site.tensor).detach().clone() for site in sites}
    biases = {name: p.detach().clone() for site in sites for name, p in _biases(small, site)}
    wanted = {site.module: site for site in sites}
    again: dict[str, str] = {}
    while True:
        visitor = _Visitor(wanted, choose, damping, progress, multiple=multiple)
        left: dict[str, str] = {}
        try:
            with hooked(visitor.hooks(small)):
                lockstep(dense, small, inputs, [*wanted], visitor, held_back=list(held_back), left=left)
        except BaseException as problem:
            _restore(small, {**before, **biases})
            if not isinstance(problem, CalledAgainError):
                raise
            again[wanted.pop(problem.name).tensor] = "it is used more than once in a pass"
            continue
        lost = {**again, **{wanted[name].tensor: why for name, why in left.items()}}
        return Walked([*visitor.layers, *(LayerRepair(name, reason=why) for name, why in lost.items())], visitor.keeps)


def _biases(small: nn.Module, site: Site) -> Iterator[tuple[str, Tensor]]:
    local = "in_proj_bias" if site.is_packed else "bias"
    bias = small.get_submodule(site.module)._parameters.get(local)
    if bias is not None:
        yield f"{site.module}.{local}" if site.module else local, bias


@torch.no_grad()
def _restore(small: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        small.get_parameter(name).copy_(value)


class _Visitor:
    def __init__(
        self,
        sites: Mapping[str, Site],
        choose: Choose,
        damping: Sequence[float] | None,
        progress: Callable[[float], None] | None,
        *,
        multiple: int,
    ) -> None:
        self._sites, self._choose, self._damping, self._progress = sites, choose, damping, progress
        self._multiple = multiple
        self._mixed: set[str] = set()  # attentions whose query, key and value are not one tensor
        self.layers: list[LayerRepair] = []
        self.keeps: dict[str, Tensor] = {}

    def hooks(self, small: nn.Module) -> Iterator[RemovableHandle]:
        """See which attentions read one tensor three times."""

        def look(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if not reads_one_tensor(args, kwargs):
                self._mixed.add(name)

        for name, site in self._sites.items():
            if site.is_packed:
                yield small.get_submodule(name).register_forward_pre_hook(
                    lambda module, args, kwargs, name=name: look(name, args, kwargs), with_kwargs=True
                )

    def __call__(self, visit: Visit) -> None:
        site = self._sites[visit.name]
        if site.is_packed and visit.name in self._mixed:
            self.layers.append(LayerRepair(site.tensor, reason=MIXED))
            return
        if site.is_packed:
            visit = of_projections(visit)
        layer: Any = visit.small
        first = visit.filled
        if type(visit.dense) is type(layer) and not multiplies(
            visit.dense, visit.dense_inputs[first], visit.outputs[first]
        ):
            self.layers.append(LayerRepair(site.tensor, reason=OWN_PASS))
            return
        blocks = column_blocks(layer, self._multiple)
        seen = moments_of(visit, residual=True, columns=blocks[0])
        if not seen.fit.n:
            self.layers.append(LayerRepair(site.tensor, reason="no sample reaches it"))
        elif not (seen.fit.is_finite and seen.judge.is_finite):
            self.layers.append(LayerRepair(site.tensor, reason="what it reads or should give is not finite"))
        else:
            self._prune(site, visit, blocks, seen)
        if self._progress is not None:
            self._progress(len(self.layers) / len(self._sites))

    def _prune(self, site: Site, visit: Visit, blocks: Sequence[Tensor | None], seen: Seen) -> None:
        """Choose what stays of a layer, and refit that; `seen` are the moments of the first block."""
        layer = visit.small
        later = ((block, moments_of(visit, residual=True, columns=block).fit) for block in blocks[1:])
        keep, offer = self._choose(site, layer, chain([(blocks[0], seen.fit)], later))
        self.keeps[site.tensor] = as_weight(layer, keep)
        if blocks[0] is None:
            found = refit_support(site.tensor, layer, seen.fit, seen.judge, keep, offer, self._damping)
        else:
            found = _refit_wide(site.tensor, visit, blocks, keep, offer, self._damping)
        size = seen.variance or 1.0
        self.layers.append(replace(found, before=found.before / size, after=found.after / size))


def column_blocks(layer: Any, multiple: int) -> list[Tensor | None]:
    """Of a wide layer, its columns in blocks of whole channels, so many at a time; of another [None]: all at once.

    >>> [column_blocks(nn.Linear(4, 2), 1), [len(block) for block in column_blocks(nn.Linear(9000, 2), 1000)]]
    [[None], [2000, 2000, 2000, 2000, 1000]]
    """
    width = matrix_of(layer).shape[2]
    if width <= WIDEST:
        return [None]
    kernel = getattr(layer, "kernel_size", ())
    size = torch.Size(kernel).numel() if isinstance(kernel, tuple) else 1
    channels = max(1, BLOCK // size // multiple) * multiple
    return [*torch.arange(width).split(channels * size)]  # type: ignore[no-untyped-call]


# ---- one layer


@torch.no_grad()
def refit_support(
    name: str,
    layer: Any,
    fit: Moments,
    judge: Moments,
    keep_gok: Tensor,
    offer_gok: Tensor | None,
    damping: Sequence[float] | None,
    *,
    columns: Tensor | None = None,
) -> LayerRepair:
    """Zero what is not kept, and refit the rest where that lowers the error on the other part; in place.

    Args:
        fit, judge: y is what the layer lacks as it is.
        offer_gok: weights that are taken where they are better than any fit; None: there are none.
        damping: of the fit, to choose from; None: no fit, the offer is taken, or the layer's own weights.
        columns: that all of these are of, and that are changed; None: all.
    """
    whole = matrix_of(layer)
    old = (whole if columns is None else whole[..., columns.to(whole.device)]).to(fit.xx.device).double()
    keep = keep_gok.to(old.device)
    has_bias = layer.bias is not None
    none = torch.zeros_like(fit.mean_y)

    def change(weight: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, float]:
        """As the layer's type rounds it, and the error then."""
        weight = weight.masked_fill(~keep, 0).to(layer.weight.dtype).double() - old
        if has_bias:
            bias = layer.bias.detach().to(shift.device).view(shift.shape)
            shift = (bias.double() + shift).to(bias.dtype).double() - bias.double()
        return weight, shift, float(error(judge, weight, shift).sum())

    masked = change(old, none)
    offered = masked if offer_gok is None else change(offer_gok.to(old.device).double(), none)
    if damping is None or not judge.n:
        reason = None if damping is None else "there is one sample only, and none can be held back to judge by"
        _write(layer, old, keep, offered, columns)
        return LayerRepair(name, masked[2], offered[2], reason=reason)
    best, chosen = min(masked, offered, key=lambda found: found[2]), None
    double = layer.weight.dtype is torch.float64
    for value in damping:
        seen = masked[2]
        for weight in _conjugate(fit, keep, masked[0], value, has_bias=has_bias, double=double):
            shift = fit.mean_y - (weight @ fit.mean_x[:, :, None])[:, :, 0] if has_bias else none
            found = change(old + weight, shift)
            if found[2] < best[2]:
                best, chosen = found, value
            if not found[2] < seen:
                break
            seen = found[2]
    _write(layer, old, keep, best, columns)
    if best is masked:
        return LayerRepair(name, masked[2], masked[2], reason="no fit lowers its error on the held-back samples")
    return LayerRepair(name, masked[2], best[2], chosen)


def _write(layer: Any, old: Tensor, keep: Tensor, found: tuple[Tensor, Tensor, float], columns: Tensor | None) -> None:
    weight, shift, _ = found
    new = (old + weight).masked_fill(~keep, 0).to(device=layer.weight.device, dtype=layer.weight.dtype)
    if columns is not None:
        new = matrix_of(layer).index_copy(2, columns.to(new.device), new)
    write_matrix(layer, new)
    if layer.bias is not None:
        bias = layer.bias.detach()
        layer.bias.data.copy_((bias.double() + shift.flatten().to(bias.device)).to(bias.dtype))


@torch.no_grad()
def _refit_wide(
    name: str,
    visit: Visit,
    blocks: Sequence[Tensor | None],
    keep: Tensor,
    offer: Tensor | None,
    damping: Sequence[float] | None,
) -> LayerRepair:
    """The same of a wide layer: the masked weights, or the offered ones where these are better, refitted by blocks."""
    layer: Any = visit.small
    own, none = matrix_of(layer).clone(), torch.arange(0)
    errors = []
    for weight in (own, *([offer] if offer is not None else [])):
        write_matrix(layer, weight.to(own).masked_fill(~keep.to(own.device), 0))
        judge = moments_of(visit, residual=True, columns=none).judge
        errors.append(float((judge.yy / max(1, judge.n) + judge.mean_y**2).sum()))
    before, after = errors[0], errors[-1]
    if damping is not None and judge.n and before <= after:  # an offer stays without a fit, whatever it does
        write_matrix(layer, own.masked_fill(~keep.to(own.device), 0))
        after = before
    if damping is None or not judge.n:
        reason = None if damping is None else "there is one sample only, and none can be held back to judge by"
        return LayerRepair(name, before, after, reason=reason)
    chosen = None
    for block in blocks:
        assert block is not None
        seen = moments_of(visit, residual=True, columns=block)
        found = refit_support(name, layer, seen.fit, seen.judge, keep[..., block], None, damping, columns=block)
        after, chosen = found.after, chosen if found.damping is None else found.damping
    if not after < before:
        return LayerRepair(name, before, before, reason="no fit lowers its error on the held-back samples")
    return LayerRepair(name, before, after, chosen)


def _conjugate(
    fit: Moments, keep: Tensor, start: Tensor, damping: float, *, has_bias: bool, double: bool
) -> Iterator[Tensor]:
    """Changes of the weights, float64, ever nearer to the least-squares one; what is not kept stays as it starts.

    Conjugate gradients on the normal equations of all rows at once, preconditioned by the Gram matrix's diagonal.
    """
    xx, yx = fit.xx, fit.yx
    if not has_bias:
        xx = xx + fit.n * fit.mean_x[:, :, None] * fit.mean_x[:, None]
        yx = yx + fit.n * fit.mean_y[:, :, None] * fit.mean_x[:, None]
    mean = xx.diagonal(dim1=1, dim2=2).mean(1)
    size = torch.where(mean > 0, mean, 1.0)[:, None, None]
    dtype = torch.float64 if double else torch.float32
    gram, right, weight, free = (value.to(dtype) for value in (xx / size, yx / size, start, keep))
    gram.diagonal(dim1=1, dim2=2).add_(damping)
    diagonal = gram.diagonal(dim1=1, dim2=2)[:, None]
    scale = torch.where(diagonal > 0, 1 / diagonal, 1.0)
    residual = (right - weight @ gram) * free
    toward = residual * scale
    norm = (residual * toward).sum(2, keepdim=True)
    for step in range(1, STEPS + 1):
        image = (toward @ gram) * free
        curve = (toward * image).sum(2, keepdim=True)
        length = torch.where(curve > 0, norm / curve, 0.0)
        weight, residual = weight + length * toward, residual - length * image
        down = residual * scale
        before, norm = norm, (residual * down).sum(2, keepdim=True)
        toward = down + torch.where(before > 0, norm / before, 0.0) * toward
        if step % EVERY == 0:
            yield weight.double()
