"""The slow obvious version of what the library does fast: plain loops over Python floats. Tests compare the two."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gsprune.structures.structure import Member, Structure
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.cut_plan import plan_cut


def select(parts: Sequence[Sequence[float]], k: int, *, min_kept: int = 0) -> list[list[bool]]:
    """Keep masks of one ranking: the k lowest go, of equals the last; `min_kept` best of each part are out of reach."""
    safe = set()
    for p, part in enumerate(parts):
        best = sorted(range(len(part)), key=lambda i, part=part: (-part[i], i))
        safe |= {(p, i) for i in best[:min_kept]}
    order = sorted(
        ((p, i) for p, part in enumerate(parts) for i in range(len(part)) if (p, i) not in safe),
        key=lambda at: (parts[at[0]][at[1]], -at[0], -at[1]),
    )
    gone = set(order[: max(k, 0)])
    return [[(p, i) not in gone for i in range(len(part))] for p, part in enumerate(parts)]


def tile_sums(matrix: Tensor, rows: int, cols: int) -> list[list[float]]:
    """Sum over each rows x cols tile of a 2-d tensor."""
    return [
        [
            math.fsum(float(matrix[r + i, c + j]) for i in range(rows) for j in range(cols))
            for c in range(0, matrix.shape[1], cols)
        ]
        for r in range(0, matrix.shape[0], rows)
    ]


def loss(output: Tensor) -> Tensor:
    """A scalar that weighs every output differently and is not linear in them."""
    return (output * torch.linspace(-1, 2, output.numel()).to(output).view_as(output)).sum() ** 2


def weight_gates(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """Gradient of a gate of ones on each weight of a tensor: how the loss changes when the weight is scaled."""
    weight = model.get_parameter(name).detach()
    gate = torch.ones_like(weight, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(torch.func.functional_call(model, {name: weight * gate}, (x,))), gate)
    return gradient


def unit_gates(model: nn.Module, members: Sequence[Member], x: Tensor) -> Tensor:
    """Gradient of a gate of ones on each unit, really built into the forward pass.

    The gate stands in front of the modules that read the units (members along dim 1) or behind those that produce
    them (members along dim 0).
    """
    gate = torch.ones(len(members[0].index), dtype=torch.float64, requires_grad=True)

    def scale(module: nn.Module, member: Member, tensor: Tensor) -> Tensor:
        width = member.index.shape[1]
        ones = torch.ones(member.size, dtype=torch.float64)
        factor = ones.index_copy(0, member.index.flatten(), gate.repeat_interleave(width))
        images = isinstance(module, (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm))
        return tensor * (factor.view(1, -1, *[1] * (tensor.dim() - 2)) if images else factor)

    handles = []
    for name, member in {m.tensor.rpartition(".")[0]: m for m in members}.items():
        module = model.get_submodule(name)
        if member.dim == 1:
            before = lambda module, args, m=member: (scale(module, m, args[0]), *args[1:])  # noqa: E731
            handles.append(module.register_forward_pre_hook(before))
        else:
            behind = lambda module, _, output, m=member: scale(module, m, output)  # noqa: E731
            handles.append(module.register_forward_hook(behind))
    (gradient,) = torch.autograd.grad(loss(model(x)), gate)
    for handle in handles:
        handle.remove()
    return gradient


def accumulate(steps: Sequence[Tensor], decay: float) -> Tensor:
    """S <- decay * S + change, in float64; the changes are magnitudes, or signed."""
    score = torch.zeros_like(steps[0], dtype=torch.float64)
    for change in steps:
        score = decay * score + change.double()
    return score


def spread(steps: Sequence[Tensor], decay: float, spread_decay: float) -> Tensor:
    """U <- spread_decay * U + abs(change - its running mean), in float64."""
    mean, spread = (torch.zeros_like(steps[0], dtype=torch.float64) for _ in range(2))
    for change in steps:
        mean = decay * mean + (1 - decay) * change.double()
        spread = spread_decay * spread + (change.double() - mean).abs()
    return spread


def platon(steps: Sequence[Sequence[float]], beta1: float, beta2: float) -> list[float]:
    """PLATON's score of each entry, as in the paper's equations 7 to 10; `steps` are magnitudes of w * g."""
    scores = []
    for changes in zip(*steps, strict=True):
        sensitivity = uncertainty = 0.0
        for change in changes:
            sensitivity = beta1 * sensitivity + (1 - beta1) * change
            uncertainty = beta2 * uncertainty + (1 - beta2) * abs(change - sensitivity)
        scores.append(sensitivity * uncertainty)
    return scores


def row_norms(model: nn.Module, members: Sequence[Member]) -> Tensor:
    """Euclidean norm of everything that belongs to each unit."""
    rows = [
        [
            float(w)
            for m in members
            for i in m.index[unit]
            for w in model.get_parameter(m.tensor).detach().select(m.dim, int(i)).flatten()
        ]
        for unit in range(len(members[0].index))
    ]
    return torch.tensor([math.hypot(*row) for row in rows], dtype=torch.float64)


def drawn(seed: str, shape: Sequence[int]) -> Tensor:
    """U(0, 1) from the checksum of a text: what is drawn today has to be drawn again when a run is resumed."""
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(zlib.crc32(seed.encode()))).double()


def gate_sums(model: nn.Module, members: Sequence[Member]) -> Tensor:
    """The gradient of a gate on each unit: the sum of weight times gradient over what the members have of it."""
    parts = []
    for member in members:
        parameter = model.get_parameter(member.tensor)
        assert parameter.grad is not None
        change = (parameter * parameter.grad).detach().movedim(member.dim, 0)
        parts.append(torch.stack([change[index].sum() for index in member.index]))
    return torch.stack(parts).sum(0)


def masked(model: nn.Module, structures: Sequence[Structure], keeps: Sequence[Tensor]) -> nn.Module:
    """A copy in which what a mask zeroes is zeroed position by position."""
    twin = copy.deepcopy(model)
    state = dict(twin.named_parameters(remove_duplicate=False)) | dict(twin.named_buffers())
    plain = ((path, module, leaf) for path, module in twin.named_modules() for leaf in vars(module))
    state |= {f"{path}.{leaf}".lstrip("."): getattr(module, leaf) for path, module, leaf in plain}
    for structure, keep in zip(structures, keeps, strict=True):
        for member in structure.masked:
            for unit in torch.nonzero(~keep).flatten().tolist():
                for position in member.index[unit].tolist():
                    state[member.tensor].data.select(member.dim, position).zero_()
    return twin


def budget_cut(
    model: nn.Module,
    structures: Sequence[Structure],
    scores: Sequence[Sequence[float]],
    wanted: float,
    cost: Callable[[nn.Module], int],
) -> list[list[bool]]:
    """Of every count of removed units, the masks whose really smaller copy costs nearest to `wanted` of the model."""
    best, distance = [[True] * len(part) for part in scores], (1 - wanted) * cost(model)
    for k in range(1, sum(map(len, scores)) - len(scores) + 1):
        keeps = select(scores, k, min_kept=1)
        twin = copy.deepcopy(model)
        apply_cut(twin, plan_cut(structures, [torch.tensor(keep) for keep in keeps]))
        off = abs(cost(twin) - wanted * cost(model))
        if off < distance:
            best, distance = keeps, off
    return best


def eliminate(readers, damping: float) -> torch.Tensor:
    """`gsprune.ranking.elimination.eliminate`: every step tries every unit and refits all that is left from scratch."""
    units = len(readers[0].columns)
    grams = []
    for reader in readers:
        gram = reader.gram.double()
        grams.append(gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64))
    gone: list[int] = []
    price, before, dearest = torch.zeros(units, dtype=torch.float64), 0.0, 0.0

    def error(removed: list[int]) -> float:
        total = 0.0
        for reader, gram in zip(readers, grams, strict=True):
            weight, kept = reader.weight.double(), torch.ones(len(gram), dtype=torch.bool)
            kept[reader.columns[removed].flatten()] = False
            lost = weight.clone()
            if kept.any():
                lost[:, kept] -= torch.linalg.solve(gram[kept][:, kept], (weight @ gram[:, kept]).T).T
            total += float(((lost @ gram) * lost).sum())
        return total

    while len(gone) < units:
        found = {u: error([*gone, u]) - before for u in range(units) if u not in gone}
        best = min(found, key=lambda u: found[u])
        dearest = max(dearest, found[best])
        price[best] = dearest
        before += found[best]
        gone.append(best)
    return price


def wanda(weight: Tensor, inputs: Tensor) -> Tensor:
    """abs(w_ij) times the root mean square of input j, entry by entry; inputs (n, k)."""
    rows, columns = weight.shape
    norms = [math.sqrt(math.fsum(float(x) ** 2 for x in inputs[:, j]) / len(inputs)) for j in range(columns)]
    scores = [[abs(float(weight[i, j])) * norms[j] for j in range(columns)] for i in range(rows)]
    return torch.tensor(scores, dtype=torch.float64)


def surgeon(
    weight: Tensor,
    inputs: Tensor,
    *,
    damping: float,
    block: int,
    sparsity: float,
    n_of_m: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """SparseGPT row by row: the inverse of H over the columns that are free is computed anew for every column."""
    x = inputs.double()
    h = x.T @ x / len(x)
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    new, keep = weight.double().clone(), torch.ones(weight.shape, dtype=torch.bool)
    rows, columns = weight.shape
    inverse = [torch.linalg.inv(h[j:, j:]) for j in range(columns)]
    pruned = 0
    for j in range(columns):
        if n_of_m is not None and j % n_of_m[1] == 0:
            n, m = n_of_m
            for i in range(rows):
                scores = [float(new[i, c]) ** 2 / float(inverse[c][0, 0]) for c in range(j, j + m)]
                (kept,) = select([scores], m - n)
                keep[i, j : j + m] = torch.tensor(kept)
        elif n_of_m is None and j % block == 0:
            stop = min(j + block, columns)
            scores = [float(new[i, c]) ** 2 / float(inverse[c][0, 0]) for i in range(rows) for c in range(j, stop)]
            due = math.floor(sparsity * rows * stop + 0.5) - pruned
            pruned += due
            (kept,) = select([scores], due)
            keep[:, j:stop] = torch.tensor(kept).view(rows, stop - j)
        for i in range(rows):
            if not keep[i, j]:
                new[i, j:] -= new[i, j] / inverse[j][0, 0] * inverse[j][0]
                new[i, j] = 0
    return new, keep


def exchange(gates: Sequence[Sequence[float]], removed: int) -> list[bool]:
    """Of gate gradients (samples x units): the set that goes, every exchange tried one by one."""
    columns = [list(column) for column in zip(*gates, strict=True)]

    def change(gone: Sequence[int]) -> float:
        return math.fsum(math.fsum(columns[u][b] for u in gone) ** 2 for b in range(len(gates)))

    order = sorted(range(len(columns)), key=lambda u: (change([u]), u))
    gone = order[:removed]
    for unit in order[removed:] if removed else []:
        tried = [gone, *([*gone[:i], unit, *gone[i + 1 :]] for i in range(removed))]
        gone = min(tried, key=change)
    return [u not in gone for u in range(len(columns))]


def expert_scores(model: Any, place: int, gone: Mapping[int, Tensor], data: Any) -> Tensor:
    """What the outputs feel if one more expert of layer `place` is closed, sample by sample, expert by expert."""
    before = {i: model[i].closed for i in gone}
    scores = torch.zeros(len(gone[place]))
    try:
        for batch in data.batches:
            for row in range(batch.size):
                one = batch.rows(row, row + 1)
                for i, mask in gone.items():
                    model[i].closed = mask
                x = one.inputs
                for layer in model[:place]:
                    x = layer(x)
                y = model[place](x).detach().requires_grad_()
                (slope,) = torch.autograd.grad(data.loss(lambda _, y=y: model[place + 1 :](y), one), y)
                for expert in (~gone[place]).nonzero().flatten().tolist():
                    model[place].closed = gone[place].clone().index_fill_(0, torch.tensor(expert), True)
                    scores[expert] += float((slope * (model[place](x) - y)).detach().sum()) ** 2
    finally:
        for i, mask in before.items():
            model[i].closed = mask
    return scores / data.size
