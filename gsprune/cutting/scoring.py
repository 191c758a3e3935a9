"""Scores of a network that is trained: gradients of gates on units, sample by sample; scores by any criterion.

Legend: b = samples, u = units of a structure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gsprune.criteria.base import Criterion
from gsprune.cutting.calibration import Batch, Calibration
from gsprune.pruner.targets import Verdict
from gsprune.pruner.units import UnitTarget, UnitTargets
from gsprune.ranking.blocks import dot_along
from gsprune.ranking.elimination import Reader
from gsprune.repair.gram import Moments, choose_rows, matrix_of, rows_dim, why_no_matrix
from gsprune.repair.least_squares import least_squares
from gsprune.structures.attention import no_fast_path
from gsprune.structures.example import call, map_tensors
from gsprune.structures.matrices import is_conv1d
from gsprune.structures.running import device_of, evaluating, hooked, same_randomness, to_device_of
from gsprune.structures.structure import INNER, Member, Structure
from gsprune.structures.twin import copy_of
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.cut_plan import plan_cut
from gsprune.surgery.narrow_attention import narrow

SMALL = 4  # samples in a batch whose gradient of the weights stands for a sample's
NARROW = 1024  # columns up to which a linear layer is seen as it is
WIDE = 8192  # columns of a reader whose second moments are taken: half a gigabyte
EACH = 64  # samples that a branch is judged by
FOLLOWING = 2  # branches that are refitted to make up for it
ROWS = 50_000  # of what a layer reads, that its second moments are taken of
Side = tuple[str, int]  # a tensor and one of its dimensions
Progress = Callable[[int], None]  # told how many samples are done
Stop = Callable[[int, Callable[[], Mapping[str, Tensor]]], bool]  # batches done, what they gave -> whether it is enough


def gate_gradients(
    model: nn.Module,
    structures: Sequence[Structure],
    calibration: Calibration,
    *,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> dict[str, Tensor]:
    """Gradient of a gate on each unit's output, sample by sample: g_bu = sum over consumers of w[:, u] * g_b[:, u].

    The same number is the sum over positions of x * dL/dx, x being what the consumer reads of unit u: one backward
    pass of a batch gives the rows of all its samples, and no gradient of a weight is computed. Samples are taken one
    by one where a batch mixes them (checked on the first batch), and consumers that are not called as modules are
    read through the gradient of their weight. `stop` is asked after each batch, with the rows so far.

    Returns:
        Structure name -> float32 (b, u) on the CPU. The network is not changed.

    Raises:
        ValueError: a loss or a gradient is not finite, or nothing of the loss depends on any unit.
    """
    twin = sharing_copy(model, requires_grad=False)
    rows: list[dict[str, Tensor]] = []
    done = 0
    with evaluating([twin]), no_fast_path(), same_randomness(twin):
        reader = _Reader(twin, structures)
        adds_up = _adds_up(reader, calibration)
        for number, batch in enumerate(calibration.batches, start=1):
            if adds_up == "alone":
                rows.extend(reader.read(calibration, batch.rows(i, i + 1)) for i in range(batch.size))
            else:
                factor = batch.size if adds_up == "mean" else 1
                rows.append({name: g_bu * factor for name, g_bu in reader.read(calibration, batch).items()})
            done += batch.size
            if progress is not None:
                progress(done)
            if stop is not None and stop(number, lambda: _stacked(rows)):
                break
    gates = _stacked(rows)
    for name, g_bu in gates.items():
        if not g_bu.isfinite().all():
            raise ValueError(f"a gradient of {name} is not finite: the loss or the weights are too large")
    return gates


def _stacked(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def branch_changes(model: nn.Module, structures: Sequence[Structure], of_outputs: Calibration) -> dict[str, Tensor]:
    """What the outputs z of a network change by without a branch, refitted: s = mean over samples of |z_b - z'_b|^2.

    Of one branch after the other, all others in place: a gate's gradient says little of so large a step. What the next
    branches add to the stream is fitted to what it lacks, as the repair of the cut does with all layers, and makes up
    for most of a branch: at most `EACH` samples are fitted to, and as many compared. The unit is that of
    E (dl_b / da)^2 of a gate's gradients (`Calibration.of_outputs`).

    Returns:
        Structure name -> (1,). Of a single sample nothing is refitted.
    """
    device, gone = device_of(model), torch.ones(1, dtype=torch.bool)
    count = min(EACH, of_outputs.size // 2)
    fitted, others = of_outputs.split(count) if count else (None, of_outputs)
    compared = [b.to(device) for b in (others if others.size <= EACH else others.split(EACH)[0]).batches]
    lasts = [structure.masked[0].tensor.rpartition(".")[0] for structure in structures]

    def answers(network: nn.Module, batch: Batch) -> Any:
        with evaluating([network]), no_fast_path(), same_randomness(network), torch.no_grad():  # the same for both
            return call(network, map_tensors(Tensor.clone, batch.inputs))

    whole, changes = [answers(model, batch) for batch in compared], dict[str, Tensor]()
    for number, structure in enumerate(structures):
        small, plan = copy_of(model), plan_cut([structure], [~gone])
        apply_cut(small, plan)
        _call_projections(small)
        if fitted is not None:
            inputs = [(batch.inputs, None) for batch in fitted.batches]
            here = dict(small.named_modules())
            following = [name for name in lasts[number + 1 :] if name in here][:FOLLOWING]
            if not following or not least_squares(small, model, inputs, plan, layers=following).repaired:
                least_squares(small, model, inputs, plan)
        pairs = zip(whole, compared, strict=True)
        felt = torch.cat([of_outputs.output_change(dense, answers(small, batch), batch) for dense, batch in pairs])
        changes[structure.name] = felt.mean().reshape(1).cpu()
    return changes


def unit_scores(
    model: nn.Module,
    structures: Sequence[Structure],
    criterion: Criterion,
    calibration: Calibration,
    *,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> dict[str, Tensor]:
    """Scores of units by a criterion, (u,) float32 on the CPU.

    A cumulative criterion is asked after each small batch: S <- S + abs(change). The network does not change
    meanwhile, so every sample counts alike and `decay` has no part in it; but one that has a second running average
    (`PLATON`) keeps its decays, and has that average here as "<structure>:spread". `stop` is asked after each batch of
    the calibration data, with the scores so far.
    """
    twin = sharing_copy(model, requires_grad=False)
    targets = UnitTargets([UnitTarget(structure, twin) for structure in structures])
    if averages := criterion.spread_decay is not None:
        targets.keep_spread()
    if not criterion.cumulative:
        with torch.no_grad():
            targets.compute_(criterion)
        return _scores(targets)
    for target in targets.targets:
        for parameter in target.scored(criterion).values():
            parameter.requires_grad_(True)
    done, device = 0, device_of(twin)
    ends = {end: number for number, end in enumerate(accumulate(b.size for b in calibration.batches), start=1)}
    with evaluating([twin]), no_fast_path(), same_randomness(twin), torch.enable_grad():
        for batch in calibration.cut_into(SMALL):
            twin.zero_grad(set_to_none=True)
            calibration.loss(twin, batch.to(device)).backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                finite = targets.probe(criterion)
                targets.accumulate_(criterion, Verdict(finite, criterion, decay=None if averages else 1.0))
            done += batch.size
            if progress is not None:
                progress(done)
            if stop is not None and done in ends and stop(ends[done], lambda: _scores(targets)):
                break
    return _scores(targets)


def _scores(targets: UnitTargets) -> dict[str, Tensor]:
    return {name: running.cpu() for target in targets.targets for name, running in target.running.items()}


def sharing_copy(model: nn.Module, *, requires_grad: bool) -> nn.Module:
    """A copy that shares the values and has parameters of its own, which may be given gradients but not written into.

    Attentions of PyTorch become those that call their output projection as a module.
    """
    twin = copy_of(model, sharing=True)
    fresh: dict[int, nn.Parameter] = {}
    for module in twin.modules():
        for name, old in module._parameters.items():
            if old is not None:
                wanted = requires_grad and old.is_floating_point()
                own = fresh.setdefault(id(old), nn.Parameter(old.detach(), requires_grad=wanted))
                module._parameters[name] = own
    _call_projections(twin)
    return twin


def _call_projections(network: nn.Module) -> None:
    for module in network.modules():
        if type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn:
            narrow(module)


def readers(
    model: nn.Module,
    structures: Sequence[Structure],
    calibration: Calibration,
    *,
    progress: Progress | None = None,
) -> dict[str, list[Reader]]:
    """Structure name -> each of its consumers as a matrix, with the second moments of what it reads.

    Moments are about the mean where the consumer has a bias, which makes up for a mean. A convolution is seen as one
    matrix (o * kernel, in) that reads the channels of a position: its offsets read nearly the same distribution. So is
    a wide linear layer behind a flattening, whose columns are the positions of channels. Rows are samples, tokens or
    positions, at most `ROWS`. Consumers that are wider than `WIDE`, have groups or are not called as modules are left
    out, and so are those of residual streams, which norms read first, and of branches.
    """
    twin, device = sharing_copy(model, requires_grad=False), device_of(model)
    of_streams = [s.name for s in structures if s.kind not in INNER]
    structures = [s for s in structures if s.name not in of_streams]
    modules = dict(twin.named_modules())
    names = dict.fromkeys(m.tensor.rpartition(".")[0] for s in structures for m in s.consumers)
    folds = _folds(modules, structures)
    names = {n: None for n in names if _is_one_matrix(modules[n]) and _columns(modules[n], folds.get(n)) <= WIDE}
    moments: dict[str, Moments] = {}
    home = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    done = 0

    def note(name: str, module: Any, args: tuple[Any, ...], size: int) -> None:
        rows = args[0].movedim(1, -1) if isinstance(module, nn.modules.conv._ConvNd) else args[0]
        rows = rows.reshape(-1, rows.shape[-1])
        if name in folds:
            rows = rows[:, folds[name].T.to(rows.device)].flatten(0, 1)  # (samples * positions, units)
        chosen = choose_rows([len(rows)], max(1, ROWS * size // calibration.size))[0]
        rows = (rows if chosen is None else rows[chosen.to(rows.device)])[:, None]
        if name not in moments:
            moments[name] = Moments.none(1, rows.shape[2], 0, home)
        moments[name].add(rows, rows.new_zeros(len(rows), 1, 0))

    with evaluating([twin]), no_fast_path(), same_randomness(twin), torch.no_grad():
        for batch, example in zip(calibration.batches, calibration.calls(), strict=True):
            hooks = (
                modules[name].register_forward_pre_hook(
                    lambda m, args, name=name, size=batch.size: note(name, m, args, size)
                )
                for name in names
            )
            with hooked(hooks):
                call(twin, to_device_of(twin, example))
            done += batch.size
            if progress is not None:
                progress(done)
    members = {s.name: [m for m in s.consumers if m.tensor.rpartition(".")[0] in moments] for s in structures}
    uses = Counter(m.tensor for found in members.values() for m in found)
    first: dict[str, Reader] = {}  # of matrices that read several structures: these share the moments
    found: dict[str, list[Reader]] = {name: [] for name in of_streams}
    for name, mine in members.items():
        found[name] = []
        for m in mine:
            reader = first[m.tensor] if m.tensor in first else _as_reader(modules, m, moments, folds)
            if uses[m.tensor] > 1:
                first.setdefault(m.tensor, reader)
                reader = replace(reader, columns=m.index.to(reader.gram.device))
            found[name].append(reader)
    return found


def _folds(modules: Mapping[str, nn.Module], structures: Sequence[Structure]) -> dict[str, Tensor]:
    """Wide linear layers all of whose columns are positions of one structure's units -> these, (units, positions)."""
    members = [(m.tensor.rpartition(".")[0], m) for s in structures for m in s.consumers]
    owners = Counter(name for name, _ in members)
    return {
        name: m.index
        for name, m in members
        if isinstance(modules[name], nn.Linear)
        and owners[name] == 1
        and m.index.shape[1] > 1
        and m.index.numel() == m.size > NARROW
    }


def _columns(module: Any, fold: Tensor | None) -> int:
    if fold is not None:
        return len(fold)
    if isinstance(module, nn.modules.conv._ConvNd):
        return int(module.weight.shape[1 - rows_dim(module)])
    return matrix_of(module).shape[2]


def _is_one_matrix(module: Any) -> bool:
    return why_no_matrix(module) is None and bool(getattr(module, "groups", 1) == 1)


def _as_reader(
    modules: Mapping[str, nn.Module], member: Member, moments: Mapping[str, Moments], folds: Mapping[str, Tensor]
) -> Reader:
    name = member.tensor.rpartition(".")[0]
    module: Any = modules[name]
    seen = moments[name]
    gram = seen.xx[0] / max(1, seen.n)
    if module.bias is None:
        gram = gram + seen.mean_x[0][:, None] * seen.mean_x[0]
    weight = module.weight.detach()
    if weight.dim() > 2 and rows_dim(module) == 1:
        weight = weight.transpose(0, 1)
    if name in folds:
        matrix = weight[:, folds[name].T.to(weight.device)].flatten(0, 1)  # (outputs * positions, units)
        return Reader(matrix.to(gram.device), gram, torch.arange(matrix.shape[1], device=gram.device)[:, None])
    matrix = weight.flatten(2).movedim(2, 1).flatten(0, 1) if weight.dim() > 2 else matrix_of(module)[0]
    return Reader(matrix.to(gram.device), gram, member.index.to(gram.device))


class _Reader:
    """Reads the gate gradients of a batch, one backward pass each."""

    def __init__(self, twin: nn.Module, structures: Sequence[Structure]) -> None:
        self.twin, self.structures, self.device = twin, structures, device_of(twin)
        self._modules = dict(twin.named_modules())
        self._sides = dict.fromkeys((m.tensor, m.dim) for s in structures for m in s.consumers)
        self.by_weight: set[Side] = set()  # consumers that are read through the gradient of their weight
        self._indices: dict[Member, Tensor] = {}
        self._known = False
        self._copies = False  # whether inputs are written into after they were read, so that they are kept as copies

    def read(self, calibration: Calibration, batch: Batch) -> dict[str, Tensor]:
        """Structure name -> (b, u) on the CPU, of the batch's loss as it is."""
        assert batch.size == 1 or not self.by_weight
        batch = batch.to(self.device)
        sums: dict[Side, Tensor] = {}
        weights = {name: self.twin.get_parameter(name) for name in dict.fromkeys(name for name, _ in self.by_weight)}
        for parameter in weights.values():
            parameter.requires_grad_(True)
        with torch.enable_grad(), self._watched(batch.size, sums) as written:
            loss = calibration.loss(self.twin, batch)
            if not self._known:
                self._known = True
                self.by_weight = {side for side in self._sides if side not in written.seen}
                if self.by_weight:
                    return self.read(calibration, batch)
            if not loss.requires_grad:
                raise ValueError("the loss does not depend on anything that can be removed")
            slopes = torch.autograd.grad(loss, [*written.leaves, *weights.values()], allow_unused=True)
        for parameter in weights.values():
            parameter.requires_grad_(False)
        if written.stale:
            self._copies = True
            return self.read(calibration, batch)
        slope_of = dict(zip(weights, slopes[len(written.leaves) :], strict=True))
        for name, dim in self.by_weight:
            if (slope := slope_of[name]) is not None:
                sums[name, dim] = dot_along(weights[name].detach(), slope, dim).unsqueeze(0)
        found = torch.cat([self._of(s, sums, batch.size) for s in self.structures], 1).cpu()  # one wait for the device
        parts = found.split([s.units for s in self.structures], 1)  # type: ignore[no-untyped-call]
        return {s.name: part for s, part in zip(self.structures, parts, strict=True)}

    def _of(self, structure: Structure, sums: Mapping[Side, Tensor], size: int) -> Tensor:
        total = torch.zeros(size, structure.units, device=self.device)
        for member in structure.consumers:
            if (found := sums.get((member.tensor, member.dim))) is not None:
                # a grouped convolution reads so many groups
                found = found.unflatten(1, (-1, member.size)).sum(1)  # type: ignore[no-untyped-call]
                total += found[:, self._index(member)].sum(2)
        return total

    def _index(self, member: Member) -> Tensor:
        """On the device, where it stays."""
        if member not in self._indices:
            self._indices[member] = member.index.to(self.device)
        return self._indices[member]

    @contextmanager
    def _watched(self, size: int, sums: dict[Side, Tensor]) -> Iterator[_Watched]:
        watched = _Watched(size, sums, copies=self._copies)

        def hooks() -> Iterator[RemovableHandle]:
            for side in self._sides:
                owner, _, leaf = side[0].rpartition(".")
                module = self._modules[owner]
                if leaf == "weight" and side not in self.by_weight and side[1] == _reads_along(module):
                    yield module.register_forward_pre_hook(
                        lambda m, args, side=side: watched.note(side, m, args), prepend=False
                    )

        with hooked(hooks()):
            yield watched


def _reads_along(module: Any) -> int | None:
    """The dimension of a layer's weight that its input's entries (channels) are multiplied with; None: not known."""
    known = isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or is_conv1d(module)
    return 1 - rows_dim(module) if known else None


class _Watched:
    """What the consumers read in one forward pass, and what the backward pass says of it."""

    def __init__(self, size: int, sums: dict[Side, Tensor], *, copies: bool) -> None:
        self._size, self._sums, self._copies = size, sums, copies
        self.seen: set[Side] = set()
        self.leaves: list[Tensor] = []
        self.stale = False

    def note(self, side: Side, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor):
            return None
        self.seen.add(side)
        read = args[0]
        if not read.requires_grad:  # nothing before it needs a gradient: the backward pass ends here
            leaf = read.detach().requires_grad_()
            self.leaves.append(leaf)
            read = leaf.clone()
        kept = read.detach().clone() if self._copies else read.detach()
        version = kept._version
        axis = (
            kept.dim() - len(module.kernel_size) - 1 if isinstance(module, nn.modules.conv._ConvNd) else kept.dim() - 1
        )

        def add(slope: Tensor) -> None:
            self.stale = self.stale or kept._version != version
            product = (kept * slope).float().movedim(axis, -1)
            samples = self._size if len(product) % self._size == 0 else 1
            found = product.reshape(samples, -1, product.shape[-1]).sum(1)
            self._sums[side] = self._sums[side] + found if side in self._sums else found

        read.register_hook(add)  # type: ignore[no-untyped-call]
        return (read, *args[1:])


def _adds_up(reader: _Reader, calibration: Calibration) -> Literal["mean", "sum", "alone"]:
    """How the loss of a batch adds up its samples'; "alone" where a sample's row in a batch is not its own."""
    batch = max(calibration.batches, key=lambda batch: batch.size)
    ends = (0, batch.size - 1)
    alone = [torch.cat([*reader.read(calibration, batch.rows(i, i + 1)).values()], dim=1)[0] for i in ends]
    if batch.size == 1 or reader.by_weight or not torch.cat(alone).isfinite().all():
        return "alone"
    g_bu = torch.cat([*reader.read(calibration, batch).values()], dim=1)
    ways: dict[Literal["mean", "sum"], int] = {"mean": batch.size, "sum": 1}
    for way, factor in ways.items():
        pairs = [(a, g_bu[i] * factor) for i, a in zip(ends, alone, strict=True)]
        if all(torch.allclose(a, b, rtol=1e-2, atol=1e-3 * float(a.abs().max())) for a, b in pairs):
            return way
    return "alone"
