"""Modules that are told the widths they have: found, masked equals cut, saved, pickled; torch.fx is refused."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from conformance import Network, NetworkTester
from facts import refused
from torch import Tensor, nn

from gsprune import find_structures
from gsprune.structures.structure import Structure
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.cut_plan import CutPlan
from gsprune.surgery.narrow_forward import NarrowForward, by_module
from gsprune.surgery.shrink import Shrinker, shrink

WIDTH, HEADS = 12, 4


class Windowed(nn.Module):
    """As a window attention: head width and scale out of the width of its input, which its output takes again."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), HEADS
        self.table = nn.Parameter(torch.randn(9, HEADS))

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * (c // self.num_heads) ** -0.5, qkv[1], qkv[2]
        near = (torch.arange(t)[:, None] - torch.arange(t)).clamp(-4, 4) + 4
        bias = self.table[near.reshape(-1)].view(t, t, -1).permute(2, 0, 1)
        weights = (q @ k.transpose(-1, -2) + bias[None]).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, t, c))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attentions = nn.ModuleList(Windowed() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(norm(x))
        return self.head(x.mean(1))


class Flat(nn.Module):
    """The width as a number, and parts of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Linear(6 * 36, 10)
        self.d, self.e = nn.Linear(4, 5), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.b(F.relu(self.a(x)).view(-1, 8, 6, 6)))
        left, right = self.c(hidden.reshape(len(x), 6 * 36)).split([4, 6], dim=1)
        return torch.cat([self.d(left), self.e(right) / right.shape[1]], 1)


class Made(nn.Module):
    """Tensors of its own that are as wide as its units, one of which is written part by part."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.a(x)) + torch.full((x.shape[0], 8), 0.5, dtype=x.dtype)
        parts = hidden.new_zeros((x.shape[0], 4, 8))
        parts[:, :2] = hidden[:, None]
        parts[:, 2:] = 2 * hidden[:, None]
        wide = torch.cat([self.b(parts).sum(1), x.new_ones(1, 10)])
        return self.c(wide * torch.ones(10, dtype=x.dtype))


class TestTold(NetworkTester):
    networks: ClassVar = {
        "windows": Network(
            Encoder,
            torch.randn(2, 5, 6),
            {"residual": 1, "heads": 2},
            kinds=("residual", "heads"),
            others=[torch.randn(3, 7, 6)],
            again=True,
            onnx=True,
        ),
        "made": Network(Made, torch.randn(2, 6), {"neurons": 2}, others=[torch.randn(5, 6)], again=True, onnx=True),
        "flat": Network(
            Flat, torch.randn(2, 3, 8, 8), {"channels": 2, "neurons": 2}, others=[torch.randn(5, 3, 8, 8)], again=True
        ),
    }


def cut_encoder() -> tuple[nn.Module, CutPlan, Tensor]:
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(2, 5, 6)
    structures = find_structures(model, x).structures
    return model, shrink(model, structures, [first_third(s) for s in structures], example_input=x), x


def first_third(structure: Structure) -> Tensor:
    return torch.arange(structure.units) < structure.units // 3 + 1


def test_only_modules_that_insist_are_told() -> None:
    model, plan, _ = cut_encoder()
    assert set(by_module(plan.attributes)) == {"attentions.0", "attentions.1"}
    assert [type(m) is not Windowed and isinstance(m, Windowed) for m in model.attentions] == [True, True]
    numbers = by_module(plan.attributes)["attentions.0"]
    assert numbers["shape"] == {0: {2: 12}}
    assert numbers["size"] == {0: {2: 3, 3: 2, 4: 3}, 2: {2: 2}, 3: {2: 6}}
    assert model.attentions[0].num_heads == 4  # it goes on counting as in the dense network
    own = find_structures(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(1, 4)).structures
    assert [dict(s.sizes) for s in own] == [{}]


def test_hooks_that_ask_for_shapes_do_not_count() -> None:
    model, _, x = cut_encoder()
    expected = model(x)
    seen = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda m, i: seen.append((i[0].shape, i[0].reshape(-1))))
        module.register_forward_hook(lambda m, i, o: seen.append((o.size(0), o.view(-1), o.split(1))))
    assert torch.equal(model(x), expected)


@pytest.mark.slow
def test_compiled_and_traced_as_it_is() -> None:
    model, _, x = cut_encoder()
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))
    torch.testing.assert_close(torch.jit.trace(model, x)(2 * x), model(2 * x))
    torch.testing.assert_close(torch.export.export(model, (x,), strict=False).module()(x), model(x))
    with refused("Windowed", "torch.fx"):
        torch.fx.symbolic_trace(model)


def test_a_plan_names_a_module_that_is_not_there() -> None:
    _, plan, _ = cut_encoder()
    other = nn.Sequential(nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3))
    with refused("attentions.0"):
        shrunk = CutPlan({}, {}, {n: v for n, v in plan.attributes.items() if n.startswith("attentions.0")})
        apply_cut(other, shrunk)
    assert not any(isinstance(m, NarrowForward) for m in other.modules())


def test_cut_twice_while_training_as_at_once() -> None:
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(2, 5, 6)
    at_once = copy.deepcopy(model)
    structures = find_structures(model, x).structures
    shrinker = Shrinker(model, structures, example_input=x)
    shrinker.cut([torch.arange(s.units) < s.units - (s.kind == "heads") for s in structures])
    shrinker.cut([first_third(s) for s in structures])
    plan = shrink(at_once, structures, [first_third(s) for s in structures], example_input=x)
    assert shrinker.plan is not None
    assert shrinker.plan.to_json() == plan.to_json()
    torch.testing.assert_close(model(x), at_once(x))
