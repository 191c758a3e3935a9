"""torchvision's networks, thinner and with fewer blocks where more add time alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from conformance import OUTPUT, Network, NetworkTester
from torch import nn

models = pytest.importorskip("torchvision.models")
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def densenet() -> nn.Module:
    return models.DenseNet(growth_rate=8, block_config=(2, 3, 3, 2), num_init_features=16, num_classes=5)


def efficientnet() -> nn.Module:
    """Half as wide and half as deep."""
    blocks, last = models.efficientnet._efficientnet_conf("efficientnet_b0", width_mult=0.5, depth_mult=0.5)
    return models.EfficientNet(blocks, 0.2, num_classes=5, last_channel=last)


def resnet50() -> nn.Module:
    """Two blocks a stage, a quarter of the width."""
    return models.ResNet(models.resnet.Bottleneck, [2, 2, 2, 2], num_classes=5, width_per_group=16)


def convnext() -> nn.Module:
    widths = [24, 48, 96, 192]
    stages = [
        models.convnext.CNBlockConfig(width, after, depth)
        for width, after, depth in zip(widths, [*widths[1:], None], [2, 2, 3, 2], strict=True)
    ]
    return models.ConvNeXt(stages, num_classes=5)


def vgg() -> nn.Module:
    """A quarter of the channels, and hidden layers of 64 instead of 4,096."""
    widths = [w if w == "M" else w // 4 for w in models.vgg.cfgs["D"]]
    hidden = [nn.Linear(128 * 49, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout()]
    features = models.vgg.make_layers(widths, batch_norm=True)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(7), nn.Flatten(), *hidden, nn.Linear(64, 5))


def googlenet() -> nn.Module:
    return models.googlenet(num_classes=5, aux_logits=True, init_weights=False)


def vit() -> nn.Module:
    return models.VisionTransformer(64, 16, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=5)


def network(make: Callable[[], nn.Module], found: dict[str, int], *reasons: str, **options: Any) -> Network:
    return Network(make, X, found, skipped={OUTPUT, *reasons}, **options)


@pytest.mark.slow
class TestTorchvision(NetworkTester):
    networks: ClassVar = {
        "resnet18": network(lambda: models.resnet18(num_classes=5), {"channels": 12}),
        "resnet50": network(resnet50, {"channels": 21}),
        "mobilenet_v2": network(lambda: models.mobilenet_v2(num_classes=5), {"channels": 25}),
        "mobilenet_v3_small": network(lambda: models.mobilenet_v3_small(num_classes=5), {"channels": 26, "neurons": 1}),
        "efficientnet": network(efficientnet, {"channels": 28}),
        "densenet121": network(densenet, {"channels": 24}),
        "convnext_tiny": network(convnext, {"neurons": 9}),
        "regnet_y_400mf": network(lambda: models.regnet_y_400mf(num_classes=5), {"channels": 53}),
        "vgg16_bn": network(vgg, {"channels": 13, "neurons": 2}),
        "googlenet": network(googlenet, {"channels": 59, "neurons": 2}),
        "vit_b_16": network(vit, {"heads": 2, "neurons": 2}),
    }
