"""Which structures are put aside, and how many tests that takes."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from gsprune import find_structures
from gsprune.proof import LEAK, Masked, Problem, inputs_like, rounds_on, sift


class Mixed(nn.Module):
    """Neurons one of which may be seen beside its columns."""

    def __init__(self, *, leaks: bool) -> None:
        super().__init__()
        self.up, self.down, self.leaks = nn.Linear(4, 6), nn.Linear(6, 4), leaks

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).tanh()
        return self.down(hidden) + (hidden.sum(-1, keepdim=True) if self.leaks else 0.0)


def _plain_twin() -> tuple[nn.Module, Tensor, tuple[Any, ...]]:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Mixed(leaks=False) for _ in range(5))), torch.randn(3, 4, dtype=torch.float64)
    structures = find_structures(model, x.float()).structures
    return model.double(), x, structures


def test_gradients_name_every_leak_at_once_and_leave_the_values_alone() -> None:
    model, x, structures = _plain_twin()
    for place in (1, 3):
        model[place].leaks = True  # type: ignore[index, union-attr]
    before = [p.detach().clone() for p in model.parameters()]
    problem = Masked(model, rounds_on(inputs_like(model, x))).leak(structures)
    assert problem is not None
    assert problem.text == LEAK
    assert problem.is_certain
    assert [s.name for s in problem.suspects] == ["1.up", "3.up"]
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_every_unit_is_gone_in_one_of_the_rounds() -> None:
    _, x, structures = _plain_twin()
    first, second = rounds_on([x])
    for structure in structures:
        assert torch.equal(first.keep(structure), ~second.keep(structure))
        assert 1 <= int(first.keep(structure).sum()) < structure.units


def test_innocent_suspects_are_taken_back() -> None:
    everything: Any = [SimpleNamespace(name=name) for name in "abcdefgh"]
    calls = []

    def test(some: Sequence[Any]) -> Problem | None:
        calls.append("".join(s.name for s in some))
        return Problem("breaks", [s for s in some if s.name in "cd"]) if any(s.name == "c" for s in some) else None

    kept, broken = sift(everything, test)
    assert ["".join(s.name for s in kept), broken] == ["abdefgh", {"c": "breaks"}]
    assert calls == ["abcdefgh", "abefgh", "abefghcd", "abefghc", "abefghd"]
