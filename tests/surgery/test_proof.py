"""Which structures are put aside, and how many tests that takes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gsprune import Pruner, find_structures
from gsprune.criteria import Weighted
from gsprune.schedules import OneShot
from gsprune.surgery.proof import LEAK, Masked, Problem, rounds_on, sift
from gsprune.surgery.readings import readings


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
    problem = Masked(model, x, structures, readings(model, x)).leak(structures)
    assert problem is not None
    assert problem.text == LEAK
    assert problem.is_certain
    assert [s.name for s in problem.suspects] == ["1.up", "3.up"]
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_every_unit_is_gone_in_one_of_the_rounds() -> None:
    _, x, structures = _plain_twin()
    first, second = rounds_on(x)
    for structure in structures:
        assert torch.equal(first.keep(structure), ~second.keep(structure))
        assert 1 <= int(first.keep(structure).sum()) < structure.units


class Positive(Mixed):
    """Runs on positive numbers only."""

    def __init__(self, *, raises: bool) -> None:
        super().__init__(leaks=False)
        self.raises = raises

    def forward(self, x: Tensor) -> Tensor:
        if self.raises and (x <= 0).any():
            raise ValueError("not positive")
        return super().forward(x) / (x > 0)


@pytest.mark.parametrize("raises", [True, False], ids=["raises", "infinite"])
def test_without_noise_every_unit_is_gone_in_one_of_two_rounds_on_the_example(raises: bool) -> None:
    model, x = Positive(raises=raises).double(), torch.tensor([[1e-3, 4.0, 0.5, 0.1]] * 8, dtype=torch.float64)
    structures = find_structures(Mixed(leaks=False), x.float()).structures
    masked = Masked(model, x, structures, readings(model, x))
    assert [round_.args is x for round_ in masked.rounds] == [True, True]
    first, second = (round_.keep(structures[0]) for round_ in masked.rounds)
    assert torch.equal(first, ~second)
    assert masked.leak(structures) is None


def test_innocent_suspects_are_taken_back() -> None:
    everything: Any = [SimpleNamespace(name=name) for name in "abcdefgh"]
    calls = []

    def test(some: Sequence[Any]) -> Problem | None:
        calls.append("".join(s.name for s in some))
        return Problem("breaks", [s for s in some if s.name in "cd"]) if any(s.name == "c" for s in some) else None

    kept, broken = sift(everything, test)
    assert ["".join(s.name for s in kept), broken] == ["abdefgh", {"c": "breaks"}]
    assert calls == ["abcdefgh", "abefgh", "abefghcd", "abefghc", "abefghd"]


def test_of_many_that_are_alike_and_fail_in_the_same_words_a_few_are_tested_alone() -> None:
    everything: Any = [SimpleNamespace(name=f"{kind}{i}") for i in range(40) for kind in ("good", "bad", "worse")]
    tests: list[int] = []

    def test(some: Sequence[Any]) -> Problem | None:
        tests.append(len(some))
        wrong = [s for s in some if not s.name.startswith("good")]
        return Problem(f"{wrong[0].name[:3]} of {len(some)}", wrong[:1]) if wrong else None

    kept, broken = sift(everything, test, {s.name: s.name.rstrip("0123456789") for s in everything})
    assert [s.name for s in kept] == [f"good{i}" for i in range(40)]
    assert len(broken) == 80
    assert len(tests) <= 2 * (2 * 4) + 1  # three and the rest of each kind are put aside, and tried again


def test_one_that_passes_among_alike_ones_that_fail_in_other_words_is_taken_back() -> None:
    everything: Any = [SimpleNamespace(name=letter) for letter in "abcdefghijkl"]

    def test(some: Sequence[Any]) -> Problem | None:
        wrong = [s for s in some if s.name != "j"]
        return Problem(f"because of {wrong[0].name}", wrong[:1]) if wrong else None

    kept, _ = sift(everything, test, dict.fromkeys("abcdefghijkl", "all"))
    assert [s.name for s in kept] == ["j"]


class Ghost(nn.Module):
    """A module of GhostNet: half of its channels are made from the other half, and both go on side by side."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.primary = nn.Sequential(nn.Conv2d(inputs, half, 1), nn.BatchNorm2d(half), nn.ReLU())
        self.cheap = nn.Sequential(nn.Conv2d(half, half, 3, padding=1, groups=half), nn.BatchNorm2d(half), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        primary = self.primary(x)
        return torch.cat([primary, self.cheap(primary)], 1)


class GhostStream(nn.Module):
    """Ghost modules in a residual stream: a channel of it goes with the one that is made from it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.wide = nn.ModuleList(Ghost(8, 16) for _ in range(2))
        self.narrow = nn.ModuleList(Ghost(16, 8) for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for wide, narrow in zip(self.wide, self.narrow, strict=True):
            x = x + narrow(wide(x))
        return self.head(x.mean((2, 3)))


def test_a_stream_of_ghost_modules_is_cut_in_pairs() -> None:
    torch.manual_seed(0)
    model, x = GhostStream().double(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    dense = sum(parameter.numel() for parameter in model.parameters())
    settings = {"schedule": OneShot(), "example_input": x[:1], "steps_per_epoch": 1, "epochs": 1}
    pruner = Pruner(model, Weighted(), target_sparsity=0.5, **settings)
    units = {target.name: target.total for target in pruner.targets}
    assert units == {"stem": 4, "wide.0.primary.0": 8, "wide.1.primary.0": 8}
    model(x).square().sum().backward()
    pruner.on_before_optimizer_step()
    pruner.on_epoch_end()
    pruner.on_step_begin(0)
    masked = copy.deepcopy(model).eval()
    small = pruner.finish().eval()
    assert sum(parameter.numel() for parameter in small.parameters()) < dense / 2
    assert (small.stem.out_channels, small.wide[0].primary[0].out_channels) == (4, 4)
    torch.testing.assert_close(small(x), masked(x), rtol=1e-10, atol=1e-12)


class Gated(nn.Module):
    """A leak that an example of zeros turns off."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).tanh()
        total = torch.from_numpy(hidden.detach().numpy().sum(-1, keepdims=True))  # no trace sees it
        return self.down(hidden) + total * x.sum(-1, keepdim=True)


def test_noise_beside_the_example_shows_what_the_example_hides() -> None:
    torch.manual_seed(0)
    found = find_structures(Gated(), torch.zeros(2, 4))
    assert found.structures == ()
    assert "does not silence them" in found.skipped["up"]
