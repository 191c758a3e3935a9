"""One set of second moments for all cuts of a network: of what its layers read before any cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from gsprune.repair.calibrating import held_back_split
from gsprune.repair.gram import (
    OWN_PASS,
    POSITIONS,
    Moments,
    Seen,
    choose_rows,
    kept_rows,
    matrix_of,
    multiplies,
    positions,
    read_rows,
    rows_dim,
    why_no_matrix,
)
from gsprune.repair.least_squares import DAMPING, refit
from gsprune.repair.observing import observe
from gsprune.repair.report import LayerRepair, RepairReport
from gsprune.structures.attention import no_fast_path
from gsprune.structures.example import call
from gsprune.structures.running import device_of, evaluating, hooked, same_randomness, to_device_of
from gsprune.surgery.cut_plan import CutPlan
from gsprune.text.names import joined

WIDEST = 4096  # columns of a layer whose moments are kept: they take 0.3 GB


class SharedMoments:
    """Refits the consumers of any cut of a network from one pass of the network itself.

    With x what a layer reads in the dense network, S the columns that stay and C the second moment of x about its mean

        W' = W C[:, S] (C[S, S] + lambda)^-1

    so the moments of every cut are a part of those of the dense network. What a cut changes before the layer is not
    seen: `least_squares` fits better, at the price of one pass of both networks a cut.

    Args:
        dense: not changed.
        batches: as of `least_squares`.
        names: modules whose columns may go.
        held_back: share of samples that chooses lambda and judges.

    >>> dense, x = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), torch.randn(50, 2)
    >>> small = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> kept = torch.tensor([0, 2])
    >>> plan = CutPlan({"1.weight": {1: kept}}, {"1.weight": {1: 3}}, {})
    >>> _ = small[1].load_state_dict({"weight": dense[1].weight[:, kept].detach(), "bias": dense[1].bias.detach()})
    >>> [layer.name for layer in SharedMoments(dense, [x], ["1"]).refit(small, plan).repaired]
    ['1']
    """

    def __init__(
        self, dense: nn.Module, batches: Iterable[Any], names: Sequence[str], *, held_back: float = 0.2
    ) -> None:
        self._dense, self._names = dense, list(names)
        inputs, is_held_back = held_back_split(batches, held_back)
        seen, modules = observe(dense, inputs[0]), dict(dense.named_modules())
        owners = Counter(id(p) for m in modules.values() for p in m._parameters.values() if p is not None)
        self.left = {name: why for name in names if (why := _why_not(modules[name], owners, seen.calls[name]))}
        if not any(is_held_back):
            self.left |= dict.fromkeys(names, "there is one sample only, and none can be held back to judge by")
        self._moments: dict[str, tuple[Moments, Moments]] = {}
        self._squares: dict[str, Tensor] = {}
        device = device_of(dense)
        home = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64

        def note(name: str, module: Any, args: tuple[Any, ...], output: Tensor, is_judge: bool) -> None:
            if not positions(module, output):  # an expert that gets no token
                return
            if name not in self._moments and not multiplies(module, args[0], output):
                self.left[name] = OWN_PASS
            if name in self.left:
                return
            if name not in self._moments:
                columns = matrix_of(module).shape[2]
                self._moments[name] = (Moments.none(1, columns, 0, home), Moments.none(1, columns, 0, home))
            chosen = choose_rows([positions(module, output)], max(1, POSITIONS // len(inputs)))[0]
            rows = read_rows(module, args[0], None if chosen is None else chosen.to(args[0].device))
            self._moments[name][is_judge].add(rows, rows.new_zeros(len(rows), 1, 0))

        wanted = [name for name in names if name not in self.left]
        with evaluating([dense]), no_fast_path(), same_randomness(dense), torch.no_grad():
            for batch, is_judge in zip(inputs, is_held_back, strict=True) if wanted else ():
                hooks = (
                    modules[name].register_forward_hook(
                        lambda m, args, out, name=name, is_judge=is_judge: note(name, m, args, out, is_judge)
                    )
                    for name in wanted
                )
                with hooked(hooks):
                    call(dense, to_device_of(dense, batch))
        self.left |= {name: "a pass does not reach it" for name in wanted if name not in {*self._moments, *self.left}}

    def refit(self, small: nn.Module, plan: CutPlan, *, damping: Sequence[float] = DAMPING) -> RepairReport:
        """Change, in place, the layers of the network that `plan` left of the dense one."""
        found: list[LayerRepair] = []
        for name in self._names:
            weight, dense = joined(name, "weight"), cast(Any, self._dense.get_submodule(name))
            cuts, dim = plan.kept.get(weight, {}), 1 - rows_dim(dense)
            if dim not in cuts:
                continue
            if name in self.left:
                found.append(LayerRepair(name, reason=self.left[name]))
                continue
            layer: Any = small.get_submodule(name)
            width = matrix_of(dense).shape[2] // plan.sizes[weight][dim]
            columns = (cuts[dim][:, None] * width + torch.arange(width, device=cuts[dim].device)).flatten()
            kept = kept_rows(dense, cuts, plan.sizes[weight])
            rows = torch.arange(dense.weight.shape[1 - dim]) if kept is None else kept
            fit, judge = (_lacking(part, columns, dense, rows, layer) for part in self._moments[name])
            variance = float(self._squares_of(name, dense)[rows].sum()) / max(1, judge.n)
            found.append(refit(name, layer, Seen(fit, judge, variance), damping))
        return RepairReport(tuple(found))

    def _squares_of(self, name: str, dense: Any) -> Tensor:
        """Of each output of a dense layer, (o,): the sum of squares about its mean over the held-back samples."""
        if name not in self._squares:
            xx = self._moments[name][1].xx
            weight = matrix_of(dense).to(xx.device).double()
            self._squares[name] = ((weight @ xx) * weight).sum(2)[0]
        return self._squares[name]


def _why_not(module: nn.Module, owners: Counter[int], calls: int) -> str | None:
    reason = why_no_matrix(module)
    if reason is None and getattr(module, "groups", 1) > 1:
        reason = "it is a grouped convolution"
    if reason is None and (columns := matrix_of(module).shape[2]) > WIDEST:
        reason = f"it has {columns} columns, more than {WIDEST}"
    if reason is None and any(owners[id(p)] > 1 for p in module._parameters.values() if p is not None):
        reason = "it shares its weight with another module"
    return reason or ("it is called more than once in a pass" if calls > 1 else None)


def _lacking(seen: Moments, columns: Tensor, dense: Any, rows: Tensor, layer: Any) -> Moments:
    """Moments of x, the columns that stay, and of y, what the layer lacks; products go over the columns it lacks."""
    device = seen.xx.device
    columns, rows = columns.to(device), rows.to(device)
    before, now = (matrix_of(module).to(device).double() for module in (dense, layer))
    lacking = before[:, rows].index_add(2, columns, -now)  # y = (W - W_now at the columns that stay) x
    gone = lacking[0].any(0).nonzero().flatten()
    lacking, across = lacking[:, :, gone], seen.xx[:, gone]
    mean = (lacking @ seen.mean_x[:, gone, None])[:, :, 0]
    if layer.bias is not None:
        mean = mean + (dense.bias.detach().to(device)[rows] - layer.bias.detach().to(device)).double()
    squares = ((lacking @ across[:, :, gone]) * lacking).sum(2)
    inner = seen.xx[:, columns][:, :, columns]
    return Moments(seen.n, seen.mean_x[:, columns], mean, inner, lacking @ across[:, :, columns], squares)
