"""Networks that sum or average over units: global response norms, norms written by hand or called as functions."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from conformance import Network, NetworkTester
from torch import Tensor, nn

from gsprune import find_structures
from gsprune.surgery.averages import averaged_dims, virtual_average
from gsprune.surgery.narrow_forward import by_module
from gsprune.surgery.shrink import Shrinker

WIDTH = 8
IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(3))
TOKENS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(4))


class ResponseNorm(nn.Module):
    """Of ConvNeXt V2: the norm of each channel by the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.rand(1, WIDTH, 1, 1) - 0.5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(p=2, dim=(2, 3), keepdim=True)
        return self.gamma * (x * size / (size.mean(dim=1, keepdim=True) + 1e-6)) + self.beta + x


def response() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.GELU(), ResponseNorm(), nn.Conv2d(WIDTH, 4, 1))


class Pool(nn.Module):
    """Of PoolFormer: a stream of channels, whose norm is over all of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, WIDTH, 3), nn.GroupNorm(1, WIDTH)
        self.up, self.down, self.head = nn.Conv2d(WIDTH, 12, 1), nn.Conv2d(12, WIDTH, 1), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(F.group_norm(x, 1).mean((2, 3)))


class Functional(nn.Module):
    """A block whose norm is a line of its forward pass."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.norm, self.gain = norm, nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(x + F.silu(self.b(getattr(self, self.norm)(x))))

    def rms(self, x: Tensor) -> Tensor:
        return self.gain * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def standard(self, x: Tensor) -> Tensor:
        return self.gain * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)

    def both(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        return (x - mean) * (var + 1e-6).rsqrt() * self.gain

    def centred(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        var = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.gain * (x - mean) / torch.sqrt(var + 1e-5)

    def far(self, x: Tensor) -> Tensor:
        apart = torch.mean(x, dim=(1, 2), keepdim=True) - x
        return self.gain * apart / ((apart**2 * apart.abs()).mean((1, 2), keepdim=True) + 1e-5)

    def layer(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gain)

    def root(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),)) * self.gain

    def unit(self, x: Tensor) -> Tensor:
        return self.gain * F.normalize(x, dim=-1) * x.abs().sum(-1, keepdim=True).sqrt()


class Standardised(nn.Conv2d):
    """Rows of its weight have mean 0 and variance 1, over all that they read."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias)


def standardised() -> nn.Module:
    return nn.Sequential(
        *(Standardised(3, WIDTH, 2), nn.ReLU(), Standardised(WIDTH, 6, 2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)),
    )


def functional(norm: str, kind: str = "neurons", **options: Any) -> Network:
    others = [torch.randn(1, 9, 6)]
    return Network(lambda: Functional(norm), TOKENS, {kind: 1}, kinds=(kind,), others=others, **options)


class TestAverages(NetworkTester):
    networks: ClassVar = {
        "response": Network(
            response, IMAGES, [("0", "channels", WIDTH)], others=[torch.randn(5, 3, 9, 7)], again=True, onnx=True
        ),
        "pool": Network(
            Pool,
            IMAGES,
            {"residual": 1, "channels": 1},
            kinds=("residual", "channels"),
            others=[torch.randn(1, 3, 9, 7)],
            again=True,
        ),
        "rms": functional("rms", again=True),
        "standard": functional("standard"),
        "both": functional("both", again=True),
        "centred": functional("centred", again=True, onnx=True),
        "far": functional("far"),
        "standardised": Network(standardised, IMAGES, {"channels": 2}, others=[torch.randn(1, 3, 9, 7)], again=True),
        "layer": functional("layer", "residual", again=True, onnx=True),
        "root": functional("root", "residual"),
        "unit": functional("unit"),
    }


def test_a_module_is_told_the_dense_number_once() -> None:
    model = response().double().eval()
    structures = find_structures(model, IMAGES.double()).structures
    assert dict(structures[0].sizes) == {"2.mean:0:1": (1, WIDTH)}
    shrinker, keep = Shrinker(model, structures, example_input=IMAGES.double()), torch.ones(WIDTH, dtype=torch.bool)
    for gone in (1, 4):
        keep[:gone] = False
        shrinker.cut([keep.clone()])
        assert by_module(shrinker.plan.attributes)["2"]["mean"] == {0: {1: WIDTH}}
        assert model[2].dense_means == {0: {1: WIDTH}}


WHOLE = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
CALLS = [
    (torch.mean, (-1,), {}),
    (Tensor.mean, (), {"dim": (0, 2), "keepdim": True}),
    (Tensor.mean, (), {}),
    (torch.var, (2,), {}),
    (torch.var, (2, False, True), {}),
    (Tensor.std, (), {"dim": (1, 2), "correction": 2}),
    (torch.std_mean, (-1,), {"unbiased": False}),
    (torch.var_mean, (), {"dim": 2, "keepdim": True}),
]


@pytest.mark.parametrize(("func", "args", "kwargs"), CALLS)
def test_entries_that_are_gone_count_as_zeros(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    whole = WHOLE.clone()
    whole[..., 3:] = 0
    left = whole[..., :3]
    expected = func(whole, *args, **kwargs)
    made = virtual_average(func, (left, *args), kwargs, {2: 5})
    for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (made, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("norm", [F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm])
def test_norms_that_are_functions(norm: Any) -> None:
    whole, weight = WHOLE.clone(), torch.rand(5, dtype=torch.float64)
    whole[..., 3:] = 0
    for half in (torch.float64, torch.float16):
        x, w = whole.to(half), weight.to(half)
        made = virtual_average(norm, (x[..., :3], (3,), w[:3]), {"eps": 1e-3}, {2: 5})
        torch.testing.assert_close(made, norm(x, (5,), w, eps=1e-3)[..., :3])
    made = virtual_average(norm, (whole[..., :3], (3,)), {}, {2: 5})
    torch.testing.assert_close(made, norm(whole, (5,))[..., :3])


def test_a_group_norm_of_one_group() -> None:
    whole, weight, bias = WHOLE.clone(), torch.rand(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    whole[:, 2:] = 0
    made = virtual_average(F.group_norm, (whole[:, :2], 1, weight[:2], bias[:2], 1e-3), {}, {1: 3})
    torch.testing.assert_close(made, F.group_norm(whole, 1, weight, bias, 1e-3)[:, :2])


def test_a_batch_norm_without_statistics() -> None:
    whole, weight, bias = WHOLE.clone(), torch.rand(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    whole[..., 3:] = 0
    how = {"training": True, "eps": 1e-3}
    made = virtual_average(F.batch_norm, (whole[..., :3], None, None, weight, bias), how, {2: 5})
    torch.testing.assert_close(made, F.batch_norm(whole, None, None, weight, bias, **how)[..., :3])
    assert averaged_dims(F.batch_norm, (WHOLE, torch.zeros(3), torch.ones(3)), {"training": True}) == []


def test_other_calls_average_over_nothing() -> None:
    assert averaged_dims(F.layer_norm, (WHOLE, (3, 5)), {}) == []
    assert averaged_dims(F.group_norm, (WHOLE, 3), {}) == []
    assert averaged_dims(torch.sum, (WHOLE, 2), {}) == []
    assert averaged_dims(torch.mean, (), {"input": WHOLE}) == []
    same = virtual_average(torch.mean, (WHOLE, 2), {}, {2: 5})
    assert torch.equal(same, WHOLE.mean(2))
