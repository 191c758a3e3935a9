"""The slow obvious version of what the library does fast: plain loops over Python floats. Tests compare the two."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gsprune.structures.structure import Member, Structure
from gsprune.surgery.apply import apply_plan
from gsprune.surgery.plan import plan_shrink


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


def gate_gradient(model: nn.Module, layer: nn.Module, units: int, loss: object, *, before: bool = False) -> Tensor:
    """Gradient of a gate of ones on each unit of `layer`'s output (or, with `before`, input), by really building it.

    `loss` is a function of the model that runs the forward pass.
    """
    gate = torch.ones(units, dtype=torch.float64, requires_grad=True)

    def scale(tensor: Tensor) -> Tensor:
        return tensor * gate.view(1, -1, *[1] * (tensor.dim() - 2))

    if before:
        handle = layer.register_forward_pre_hook(lambda _, args: (scale(args[0]), *args[1:]))
    else:
        handle = layer.register_forward_hook(lambda _, __, output: scale(output))
    try:
        (gradient,) = torch.autograd.grad(loss(model), gate)  # type: ignore[operator]
    finally:
        handle.remove()
    return gradient


def accumulate(steps: Sequence[Tensor], decay: float) -> Tensor:
    """S <- decay * S + abs(change), in float64."""
    score = torch.zeros_like(steps[0], dtype=torch.float64)
    for change in steps:
        score = decay * score + change.double().abs()
    return score


def gate_sums(model: nn.Module, members: Sequence[Member]) -> Tensor:
    """The gradient of a gate on each unit: the sum of weight times gradient over what the members have of it."""
    parts = []
    for member in members:
        parameter = model.get_parameter(member.tensor)
        assert parameter.grad is not None
        change = (parameter * parameter.grad).detach().movedim(member.dim, 0)
        parts.append(torch.stack([change[index].sum() for index in member.index]))
    return torch.stack(parts).sum(0)


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
        apply_plan(twin, plan_shrink(structures, [torch.tensor(keep) for keep in keeps]))
        off = abs(cost(twin) - wanted * cost(model))
        if off < distance:
            best, distance = keeps, off
    return best
