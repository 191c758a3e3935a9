"""Repair of layers of every kind, against numpy's least-squares solution; masked equals cut; never worse held back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsprune.repair import RepairReport, least_squares
from gsprune.repair.gram import as_matrix, as_weight, multiplies, read_rows
from gsprune.repair.shared import SharedMoments
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.cut_plan import CutPlan

EXACT = [1e-12]
KEPT = torch.tensor([0, 2, 3, 5])  # of six units


@pytest.fixture(autouse=True)
def seeded() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Gemma(nn.Module):
    """An RMSNorm whose gain is 1 + weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.eps, self.weight = 1e-6, nn.Parameter(0.3 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


GemmaRMSNorm = type("GemmaRMSNorm", (Gemma,), {})


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of pictures."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Reads(nn.Module):
    """a writes six units, b reads them."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Tensor:
        read = torch.tanh(self.a(x))
        return self.b(read, read, read)[0] if isinstance(self.b, nn.MultiheadAttention) else self.b(read)


def pictures(count: int = 40) -> Tensor:
    return torch.randn(count, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def tokens(count: int = 40) -> Tensor:
    return torch.randn(count, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def fit_part(x: Tensor) -> Tensor:
    wanted = round(0.2 * len(x))
    gone = {int((i + 0.5) * len(x) / wanted) for i in range(wanted)}
    return x[[i for i in range(len(x)) if i not in gone]]


def cut(dense: nn.Module, tensors: dict[str, int]) -> tuple[nn.Module, nn.Module, CutPlan]:
    """The network with KEPT of six along these dimensions, that with zeros instead, and the plan."""
    parameters = dict(dense.named_parameters())
    sizes = {name: {dim: parameters[name].shape[dim]} for name, dim in tensors.items()}
    plan = CutPlan({name: {dim: KEPT} for name, dim in tensors.items()}, sizes, {})
    small, masked = copy.deepcopy(dense), copy.deepcopy(dense)
    apply_cut(small, plan)
    gone = torch.tensor([1, 4])
    with torch.no_grad():
        for name, dim in tensors.items():
            dict(masked.named_parameters())[name].index_fill_(dim, gone, 0)
    return small, masked, plan


def solved(x: Tensor, y: Tensor, *, bias: bool = True) -> tuple[Tensor, Tensor]:
    """W (o, k) and b of y = x W^T + b by numpy, of rows x (m, k) and y (m, o)."""
    rows = np.concatenate([x.numpy(), np.ones((len(x), 1))], 1) if bias else x.numpy()
    found = np.linalg.lstsq(rows, y.numpy(), rcond=None)[0]
    return torch.from_numpy(found[: x.shape[1]].T), torch.from_numpy(found[-1])


def check(
    dense: nn.Module, tensors: dict[str, int], x: Tensor, expected: Callable[[nn.Module, Tensor, Tensor], list[Tensor]]
) -> RepairReport:
    """The repaired tensors of b are numpy's, the masked network with them computes the same, no error has risen."""
    dense = dense.double().eval()
    small, masked, plan = cut(dense, tensors)
    report = least_squares(small, dense, [x], plan, damping=EXACT, layers=["b"])
    assert [layer.name for layer in report.repaired] == ["b"], report
    assert report.layers[0].after < report.layers[0].before
    with torch.no_grad():
        read = torch.tanh(small.a(fit_part(x)))
        wanted = expected(small, read, torch.tanh(dense.a(fit_part(x))))
    for found, value in zip((small.b.in_proj_weight, small.b.in_proj_bias) if isinstance(
        small.b, nn.MultiheadAttention) else (small.b.weight, small.b.bias), wanted, strict=False):  # fmt: skip
        torch.testing.assert_close(found.detach(), value.view_as(found), rtol=0, atol=1e-7)
    here = dict(masked.named_parameters())
    with torch.no_grad():
        for name, value in small.named_parameters():
            kept = plan.kept.get(name, {})
            places = [kept.get(dim, torch.arange(size)) for dim, size in enumerate(here[name].shape)]
            here[name][torch.meshgrid(*places, indexing="ij")] = value
    torch.testing.assert_close(masked(x), small(x), rtol=0, atol=1e-10)
    return report


UPS = {
    "plain": {"kernel_size": 3},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "dilation": {"kernel_size": (3, 2), "dilation": (2, 1), "padding": (3, 0), "stride": (1, 3)},
    "1x1": {"kernel_size": 1, "bias": False},
}


@pytest.mark.parametrize("settings", UPS.values(), ids=UPS)
def test_transposed_convolutions(settings: dict[str, Any]) -> None:
    up = nn.ConvTranspose2d(6, 2, **settings)

    def expected(small: Any, read: Tensor, dense_read: Tensor) -> list[Tensor]:
        layer, columns = small.b, []
        for c in range(4):
            for at in np.ndindex(*layer.kernel_size):
                one = torch.zeros(4, 1, *layer.kernel_size, dtype=torch.float64)
                one[(c, 0, *at)] = 1
                given = F.conv_transpose2d(
                    read, one, None, layer.stride, layer.padding, layer.output_padding, 1, layer.dilation
                )
                columns.append(given.flatten())
        dense_out = network.b(dense_read).movedim(1, -1).flatten(0, -2)
        weight, bias = solved(torch.stack(columns, 1), dense_out, bias=layer.bias is not None)
        matrix = weight.view(2, 4, *layer.kernel_size).transpose(0, 1)
        return [matrix.contiguous(), bias] if layer.bias is not None else [matrix.contiguous()]

    network = Reads(nn.Conv2d(3, 6, 3, padding=1), up).double()
    check(network, {"a.weight": 0, "a.bias": 0, "b.weight": 0}, pictures(), expected)


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_rows_times_the_matrix_are_the_transposed_convolution(spatial: int) -> None:
    kind = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[spatial]
    layer = kind(4, 6, 3, stride=2, padding=2, output_padding=1, dilation=2, groups=2).double()
    x = torch.randn(2, 4, *(5, 4, 3)[:spatial], dtype=torch.float64)
    y = layer(x)
    assert multiplies(layer, x, y)
    rows = read_rows(layer, x, torch.tensor([0, 3, 5]))
    found = torch.einsum("mgk,gok->mgo", rows, as_matrix(layer, layer.weight)).flatten(1) + layer.bias
    torch.testing.assert_close(found, y.movedim(1, -1).flatten(0, -2)[[0, 3, 5]])
    assert torch.equal(as_weight(layer, as_matrix(layer, layer.weight)), layer.weight)
    assert not multiplies(layer, x, 2 * y)


def test_conv1d_of_transformers_also_where_its_outputs_are_cut() -> None:
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    network = Reads(nn.Linear(4, 6), Conv1D(5, 6)).double()

    def expected(small: Any, read: Tensor, dense_read: Tensor) -> list[Tensor]:
        weight, bias = solved(read.flatten(0, -2), network.b(dense_read).flatten(0, -2))
        return [weight.T.contiguous(), bias]

    check(network, {"a.weight": 0, "a.bias": 0, "b.weight": 0}, tokens(), expected)
    both = nn.Sequential(Conv1D(6, 4), nn.Tanh(), Conv1D(6, 6), nn.Tanh(), Conv1D(2, 6)).double()
    small, _, plan = cut(both, {"0.weight": 1, "0.bias": 0, "2.weight": 0})
    rows = CutPlan({"2.weight": {1: KEPT}, "2.bias": {0: KEPT}, "4.weight": {0: KEPT}}, {
        "2.weight": {1: 6}, "2.bias": {0: 6}, "4.weight": {0: 6}}, {})  # fmt: skip
    apply_cut(small, rows)
    kept = {**plan.kept, **rows.kept, "2.weight": {0: KEPT, 1: KEPT}}
    sizes = {**plan.sizes, **rows.sizes, "2.weight": {0: 6, 1: 6}}
    x = tokens()
    before = float((small(x) - both(x)).detach().square().mean())
    report = least_squares(small, both, [x], CutPlan(kept, sizes, {}), damping=EXACT)
    assert {layer.name for layer in report.repaired} == {"2", "4"}
    assert float((small(x) - both(x)).detach().square().mean()) < 0.7 * before
    fresh, _, _ = cut(both, {"0.weight": 1, "0.bias": 0, "2.weight": 0})
    found = SharedMoments(both, [x], ["2", "4"]).refit(fresh, plan)
    assert [layer.name for layer in found.repaired] == ["2"]


def test_packed_projections() -> None:
    network = Reads(nn.Linear(4, 6), nn.MultiheadAttention(6, 2, batch_first=True)).double()

    def expected(small: Any, read: Tensor, dense_read: Tensor) -> list[Tensor]:
        packed = F.linear(dense_read, network.b.in_proj_weight, network.b.in_proj_bias)
        return [*solved(read.flatten(0, -2), packed.flatten(0, -2))]

    tensors = {"a.weight": 0, "a.bias": 0, "b.in_proj_weight": 1}
    check(network, tensors, tokens(), expected)
    small, _, plan = cut(network, tensors)
    report = least_squares(small, network, [tokens()], plan, layers="consumers", norms=None)
    assert [layer.name for layer in report.layers] == ["b"]
    again, _, _ = cut(network, tensors)
    whole = least_squares(again, network, [tokens()], plan)  # the output projection after them
    assert {layer.name for layer in whole.layers} == {"a", "b", "b.out_proj"}


def test_projections_of_other_tensors_are_left_with_the_reason() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.MultiheadAttention(6, 2, batch_first=True)
            self.c = nn.MultiheadAttention(6, 2, kdim=4, vdim=4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.a(x), self.a(x).flip(1), self.a(x))[0]
            return self.c(y, x, x)[0]

    dense = Cross().double()
    report = least_squares(copy.deepcopy(dense), dense, [tokens()])
    assert "not one tensor" in report.left["b"]
    assert "weight each" in least_squares(copy.deepcopy(dense), dense, [tokens()], layers=["c"]).left["c"]


NORMS = {
    "rms": lambda: nn.RMSNorm(6),
    "gemma": lambda: GemmaRMSNorm(6),
    "layer": lambda: nn.LayerNorm(6),
}


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_gains_of_norms(make: Callable[[], Any]) -> None:
    """Each gain, and shift, is numpy's of the norm's own output against the dense one's."""
    dense = Reads(nn.Linear(4, 6), make()).double()
    with torch.no_grad():
        dense.b.weight.copy_(torch.rand(6) + 0.5)
    small = copy.deepcopy(dense)
    with torch.no_grad():
        small.a.weight.add_(0.3 * torch.randn(6, 4))
    x = tokens()
    before = copy.deepcopy(small.b)
    report = least_squares(small, dense, [x], layers=["b"])
    assert [layer.name for layer in report.repaired] == ["b"]
    with torch.no_grad():
        read = before(torch.tanh(small.a(fit_part(x)))).flatten(0, -2)
        gave = dense.b(torch.tanh(dense.a(fit_part(x)))).flatten(0, -2)
    offset = 1.0 if isinstance(before, Gemma) else 0.0
    has_bias = getattr(before, "bias", None) is not None
    changed = 0
    for k in range(6):
        scale, shift = solved(read[:, k : k + 1], gave[:, k : k + 1], bias=has_bias)
        gain = scale.item() * (before.weight[k] + offset) - offset
        if not torch.equal(small.b.weight[k], before.weight[k]):  # where the held-back error fell
            torch.testing.assert_close(small.b.weight[k], gain, rtol=0, atol=1e-4)
            changed += 1
            if has_bias:
                expected = scale.item() * before.bias[k] + shift.item()
                torch.testing.assert_close(small.b.bias[k], expected, rtol=0, atol=1e-4)
    assert changed >= 3


def test_a_norm_over_the_channels_of_pictures_is_fitted_channel_by_channel() -> None:
    dense = Reads(nn.Conv2d(3, 6, 3, padding=1), LayerNorm2d(6)).double()
    small = copy.deepcopy(dense)
    with torch.no_grad():
        small.b.weight.mul_(torch.tensor([2.0, 1, 1, 1, 1, 3]))
    report = least_squares(small, dense, [pictures()], layers=["b"])
    assert [layer.name for layer in report.repaired] == ["b"]
    torch.testing.assert_close(small.b.weight, dense.b.weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_wide_layers_are_refitted_block_by_block(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    module = importlib.import_module("gsprune.repair.least_squares")
    monkeypatch.setattr(module, "WIDEST", 8)
    monkeypatch.setattr(module, "BLOCK", 5)
    monkeypatch.setattr(module, "SWEEPS", 200)
    monkeypatch.setattr(module, "ENOUGH", 1 - 1e-9)
    monkeypatch.setattr("gsprune.repair.gram.ENTRIES", 64)
    make: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
        "linear": lambda: (Reads(nn.Linear(4, 18), nn.Linear(18, 3)), tokens(60)),
        "conv": lambda: (Reads(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 2, padding=1)), pictures()),
    }
    dense, x = make[kind]()
    dense = dense.double()
    kept = torch.arange(0, 18, 2) if kind == "linear" else KEPT
    size = 18 if kind == "linear" else 6
    names = {"a.weight": 0, "a.bias": 0, "b.weight": 1}
    plan = CutPlan({n: {dim: kept} for n, dim in names.items()}, {n: {dim: size} for n, dim in names.items()}, {})
    blocks, whole = copy.deepcopy(dense), copy.deepcopy(dense)
    for network in (blocks, whole):
        apply_cut(network, plan)
    found = least_squares(blocks, dense, [x], plan, damping=EXACT, layers=["b"]).layers[0]
    monkeypatch.setattr(module, "WIDEST", 8192)
    best = least_squares(whole, dense, [x], plan, damping=EXACT, layers=["b"]).layers[0]
    assert found.reason is None
    assert found.before == pytest.approx(best.before)
    assert found.before - found.after > 0.95 * (best.before - best.after)


def test_what_reads_an_embedding() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Embedding(30, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    dense = Words().double()
    x = torch.randint(30, (60, 7), generator=torch.Generator().manual_seed(1))
    tensors = {"a.weight": 1, "b.weight": 1}
    small, _, plan = cut(dense, tensors)
    report = least_squares(small, dense, [x], plan, damping=EXACT)
    assert [layer.name for layer in report.layers] == ["b"]
    with torch.no_grad():
        read, gave = small.a(fit_part(x)).flatten(0, -2), dense(fit_part(x)).flatten(0, -2)
    weight, bias = solved(read, gave)
    torch.testing.assert_close(small.b.weight.detach(), weight, rtol=0, atol=1e-8)
    torch.testing.assert_close(small.b.bias.detach(), bias, rtol=0, atol=1e-8)
