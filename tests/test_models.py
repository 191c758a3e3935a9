"""The reference networks: shapes, sizes, what they promise to the pruner, and their errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gsprune import models

BUILDERS = [
    models.lenet_300_100,
    models.convnet,
    models.vit_tiny,
    models.resnet18,
    models.resnet50,
    models.mobilenet_v3_small,
]


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 1), (32, 3)])
def test_forward_backward_on_every_shape(build: Any, size: int, channels: int) -> None:
    torch.manual_seed(0)
    model = build(image_size=size, in_channels=channels, num_classes=7)
    out = model(torch.randn(2, channels, size, size))
    assert out.shape == (2, 7)
    out.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("size", [64, 96, 224])
def test_large_pictures(build: Any, size: int) -> None:
    with torch.device("meta"):  # shapes alone
        out = build(image_size=size, in_channels=4, num_classes=3).eval()(torch.empty(1, 4, size, size))
    assert out.shape == (1, 3)


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_no_dropout_by_default(build: Any) -> None:
    with torch.device("meta"):
        model = build(image_size=32, in_channels=3, num_classes=10)
    assert all(m.p == 0 for m in model.modules() if isinstance(m, nn.Dropout))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "image_size", "parameters"),
    [
        ("lenet_300_100", 28, 266_610),
        ("resnet18", 224, 11_689_512),  # torchvision's own number for 1,000 classes
        ("resnet50", 224, 25_557_032),
        ("mobilenet_v3_small", 224, 2_542_856),
        ("resnet18", 32, 11_689_512 - 9408 + 1728),  # 7x7 stem against 3x3
    ],
)
def test_parameter_counts(name: str, image_size: int, parameters: int) -> None:
    lenet = name == "lenet_300_100"
    with torch.device("meta"):
        model = getattr(models, name)(
            image_size=image_size, in_channels=1 if lenet else 3, num_classes=10 if lenet else 1000
        )
    assert count(model) == parameters


@pytest.mark.parametrize("build", [models.resnet18, models.resnet50])
def test_small_pictures_get_the_small_stem(build: Any) -> None:
    small, large = (build(image_size=size, in_channels=3, num_classes=10) for size in (64, 65))
    assert (small.conv1.kernel_size, small.conv1.stride) == ((3, 3), (1, 1))
    assert isinstance(small.maxpool, nn.Identity)
    assert (large.conv1.kernel_size, large.conv1.stride) == ((7, 7), (2, 2))
    assert isinstance(large.maxpool, nn.MaxPool2d)


@pytest.mark.parametrize(
    ("image_size", "patch", "tokens"), [(8, 2, 16), (28, 4, 49), (32, 4, 64), (96, 12, 64), (224, 16, 196)]
)
def test_patch_size_follows_the_picture(image_size: int, patch: int, tokens: int) -> None:
    model = models.vit_tiny(image_size=image_size, in_channels=1, num_classes=10)
    assert model.patchify.kernel_size == (patch, patch)
    assert model.position.shape == (1, tokens, 96)


def test_attention_is_the_textbook_formula() -> None:
    torch.manual_seed(0)
    attention = models.Attention(6, 2).double()
    x = torch.randn(1, 3, 6, dtype=torch.float64)
    heads = []
    for head in (slice(0, 3), slice(3, 6)):
        q, k, v = (layer(x)[0, :, head] for layer in (attention.q, attention.k, attention.v))
        heads.append(torch.softmax(q @ k.T / 3**0.5, dim=-1) @ v)
    torch.testing.assert_close(attention(x)[0], attention.proj(torch.cat(heads, dim=-1)))


def test_attention_runs_with_a_head_removed() -> None:
    """Cutting head 1 out of the four projections equals zeroing its columns of `proj`."""
    torch.manual_seed(0)
    attention = models.Attention(12, 4).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    kept = torch.tensor([0, 1, 2, 6, 7, 8, 9, 10, 11])
    with torch.no_grad():
        attention.proj.weight[:, 3:6] = 0
        expected = attention(x)
        for layer in (attention.q, attention.k, attention.v):
            layer.weight = nn.Parameter(layer.weight[kept])
            layer.bias = nn.Parameter(layer.bias[kept])
        attention.proj.weight = nn.Parameter(attention.proj.weight[:, kept])
        torch.testing.assert_close(attention(x), expected)


def test_residual_block_adds_its_input() -> None:
    block = models.ResidualBlock(4).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(block(x), x.relu())


def test_the_seed_decides_the_weights() -> None:
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(models.vit_tiny(image_size=8, in_channels=1, num_classes=10).position)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("convnet", {"width": 0}, "width is 0: it must be 1 or more"),
        ("resnet18", {"num_classes": 0}, "num_classes is 0: it must be 1 or more"),
        ("lenet_300_100", {"image_size": -1}, "image_size is -1: it must be 1 or more"),
        ("vit_tiny", {"patch_size": 5}, "patch_size 5 does not divide image_size 32; 4 does"),
        ("vit_tiny", {"num_heads": 5}, "num_heads 5 does not divide dim 96; 4 does"),
        ("vit_tiny", {"depth": 0}, "depth is 0: it must be 1 or more"),
    ],
)
def test_errors(name: str, change: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        getattr(models, name)(**{"image_size": 32, "in_channels": 3, "num_classes": 10, **change})
