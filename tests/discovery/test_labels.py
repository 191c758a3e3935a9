"""Labels through single operations: what is tied, what stays and why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsprune.discovery.classes import Classes, tied
from gsprune.discovery.follow import follow
from gsprune.discovery.labels import _blocks, is_outer


class Op(nn.Module):
    """Rows of `a` pass a function, which `b` reads."""

    def __init__(self, rows: int, columns: int, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(3, rows, bias=False), nn.Linear(columns, 2, bias=False), function
        self.extra = nn.Parameter(torch.rand(rows))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.function(self.a(x), self.extra))
        return out


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(3))


def coupled(rows: int, columns: int, function: Callable[[Tensor, Tensor], Tensor]) -> list[tuple[list[int], list[int]]]:
    """Of every class that may be cut: the rows of `a` and the columns of `b`."""
    log, _ = follow(Op(rows, columns, function), X)
    classes = Classes(log)
    axes = {(axis.tensor, axis.dim): axis for axis in log.atoms.axes}
    first, second = axes["a.weight", 0], axes["b.weight", 1]
    found = []
    for root in dict.fromkeys(classes.roots[first.first : first.first + first.size].tolist()):
        if classes.why(root) is None:
            sides = [(classes.roots[a.first : a.first + a.size] == root).nonzero().flatten() for a in (first, second)]
            found.append((sides[0].tolist(), sides[1].tolist()))
    return found


def each(count: int) -> list[tuple[list[int], list[int]]]:
    return [([u], [u]) for u in range(count)]


@pytest.mark.parametrize(
    ("rows", "columns", "function", "expected"),
    [
        (4, 4, lambda h, p: h.relu() + h.sigmoid() * p, each(4)),
        (4, 4, lambda h, p: h.view(5, 2, 2).flatten(1), [([0, 2], [0, 2]), ([1, 3], [1, 3])]),
        (4, 4, lambda h, p: h.view(5, 2, 2).transpose(1, 2).flatten(1), [([0, 2], [0, 1]), ([1, 3], [2, 3])]),
        (4, 4, lambda h, p: h.flip(1), [([u], [3 - u]) for u in range(4)]),
        (4, 8, lambda h, p: h.repeat(1, 2), [([u], [u, u + 4]) for u in range(4)]),
        (4, 8, lambda h, p: h.repeat_interleave(2, 1), [([u], [2 * u, 2 * u + 1]) for u in range(4)]),
        (4, 8, lambda h, p: torch.cat([h, -h], 1), [([u], [u, u + 4]) for u in range(4)]),
        (4, 6, lambda h, p: torch.cat([torch.rand(5, 2), h], 1), [([u], [u + 2]) for u in range(4)]),
        (4, 6, lambda h, p: F.pad(h, (1, 1)), [([u], [u + 1]) for u in range(4)]),
        (4, 2, lambda h, p: F.glu(h), [([0, 2], [0]), ([1, 3], [1])]),
        (4, 2, lambda h, p: h[:, :2] * h[:, 2:], [([0, 2], [0]), ([1, 3], [1])]),
        (4, 4, lambda h, p: torch.stack([h, h]).mean(0), each(4)),
        (4, 4, lambda h, p: h[:, torch.tensor([2, 0, 3, 1])], [([0], [1]), ([1], [3]), ([2], [0]), ([3], [2])]),
        (4, 4, lambda h, p: torch.where(h > 0, h, torch.zeros_like(h)), each(4)),
        (4, 4, lambda h, p: torch.zeros(5, 4).copy_(h).mul_(p), each(4)),
        (4, 4, lambda h, p: h.cumsum(0), each(4)),
        (4, 4, lambda h, p: (h @ h.mT).softmax(1) @ h, []),  # attention with a single head
        (4, 4, lambda h, p: h + torch.arange(4.0), []),
        (4, 4, lambda h, p: h.softmax(1), []),
        (4, 4, lambda h, p: h / h.norm(dim=1, keepdim=True), each(4)),
        (4, 4, lambda h, p: h / h.amax(dim=1, keepdim=True), []),
        (4, 4, lambda h, p: h.cumsum(1), []),
        (4, 4, lambda h, p: h.sort(1).values, []),
    ],
)
def test_rows_and_columns_that_go_together(
    rows: int, columns: int, function: Callable[[Tensor, Tensor], Tensor], expected: list[tuple[list[int], list[int]]]
) -> None:
    assert coupled(rows, columns, function) == expected


def test_a_part_that_is_written_into_a_tensor_is_known_there() -> None:
    def function(h: Tensor, p: Tensor) -> Tensor:
        out = h.new_zeros(5, 4)
        out[:, :2] = h[:, 2:]
        out[:, 2:] = h[:, :2]
        return out

    assert coupled(4, 4, function) == [([0], [2]), ([1], [3]), ([2], [0]), ([3], [1])]


def test_an_operation_without_a_rule_is_named() -> None:
    log, _ = follow(Op(4, 4, lambda h, p: torch.fft.fft(h).real), X)
    assert {reason for _, reason in log.pins if "not followed" in reason} == {
        "it passes aten._fft_r2c, which is not followed"
    }


def test_labels_are_gone_afterwards() -> None:
    model = Op(4, 4, lambda h, p: h)
    follow(model, X)
    assert not any(vars(p) for p in model.parameters())
    assert not model._forward_hooks
    assert model.training


def test_ties_over_any_number_of_steps() -> None:
    chain = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    roots = tied(1002, chain[:-1], chain[1:])
    assert roots[:1000].tolist() == [0] * 1000
    assert roots[1000:].tolist() == [1000, 1001]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ((6, 2), (2, 3, 2), [([0], [0, 1]), ([1], [2])]),
        ((2, 3, 4), (6, 4), [([0, 1], [0]), ([2], [1])]),
        ((4, 6), (6, 4), [([0, 1], [0, 1])]),
        ((5,), (5, 1, 1), [([0], [0]), ([], [1, 2])]),
        ((1, 5), (5,), [([0, 1], [0])]),
    ],
)
def test_blocks_of_a_reshape(
    old: tuple[int, ...], new: tuple[int, ...], expected: list[tuple[list[int], list[int]]]
) -> None:
    assert _blocks(old, new) == expected


def test_blocks_are_told_from_places_inside() -> None:
    heads = torch.arange(12).view(3, 4)
    assert is_outer(heads, 0)
    assert not is_outer(heads, 1)
    assert is_outer(heads.repeat_interleave(2, 0), 0)
