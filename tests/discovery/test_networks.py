"""torchvision's convolutional networks: pruned by half with both criteria, masked equals shrunk, training goes on."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
from torch import Tensor, nn

from gsprune import Pruner
from gsprune.criteria import Abs, Weighted
from gsprune.schedules import OneShot
from gsprune.structures.example import call, tensors_in

models = pytest.importorskip("torchvision.models")
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def densenet() -> nn.Module:
    return models.DenseNet(growth_rate=8, block_config=(6, 12, 24, 16), num_init_features=16, num_classes=5)


def convnext() -> nn.Module:
    widths = [24, 48, 96, 192]
    stages = [
        models.convnext.CNBlockConfig(width, after, depth)
        for width, after, depth in zip(widths, [*widths[1:], None], [3, 3, 9, 3], strict=True)
    ]
    return models.ConvNeXt(stages, num_classes=5)


def vgg() -> nn.Module:
    """A quarter of the channels, and hidden layers of 64 instead of 4,096."""
    widths = [w if w == "M" else w // 4 for w in models.vgg.cfgs["D"]]
    hidden = [nn.Linear(128 * 49, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout()]
    features = models.vgg.make_layers(widths, batch_norm=True)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(7), nn.Flatten(), *hidden, nn.Linear(64, 5))


def vit() -> nn.Module:
    return models.VisionTransformer(64, 16, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=5)


# name -> builder (thinner where the full width adds time alone), what is found, what stays
Case = tuple[Callable[[], nn.Module], dict[str, int], set[str]]
LAST = "it feeds the model's output"
NORM = "it passes a LayerNorm, which mixes units"
ZOO: dict[str, Case] = {
    "resnet18": (lambda: models.resnet18(num_classes=5), {"channels": 12}, {LAST}),
    "resnet50": (lambda: models.resnet50(num_classes=5, width_per_group=16), {"channels": 37}, {LAST}),
    "mobilenet_v2": (lambda: models.mobilenet_v2(num_classes=5), {"channels": 25}, {LAST}),
    "mobilenet_v3_small": (lambda: models.mobilenet_v3_small(num_classes=5), {"channels": 26, "neurons": 1}, {LAST}),
    "efficientnet_b0": (lambda: models.efficientnet_b0(num_classes=5), {"channels": 40}, {LAST}),
    "densenet121": (densenet, {"channels": 120}, {LAST}),
    "convnext_tiny": (convnext, {"neurons": 18}, {LAST, NORM}),
    "regnet_y_400mf": (lambda: models.regnet_y_400mf(num_classes=5), {"channels": 21}, {LAST, "grouped"}),
    "vgg16_bn": (vgg, {"channels": 13, "neurons": 2}, {LAST}),
    "googlenet": (
        lambda: models.googlenet(num_classes=5, aux_logits=True, init_weights=False),
        {"channels": 59, "neurons": 2},
        {LAST},
    ),
    "vit_b_16": (vit, {"heads": 2, "neurons": 2}, {LAST, NORM}),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(7)
    model = nets.settle(ZOO[name][0]())
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():  # torchvision's ViT: no gradient passes its head
            nn.init.normal_(module.weight, std=0.02)
    return model


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([out.square().mean() for out in tensors_in(call(model, x))]).sum()


@pytest.mark.slow
@pytest.mark.parametrize("criterion", [Abs, Weighted])
@pytest.mark.parametrize("name", ZOO)
def test_half_of_the_units_go_and_training_goes_on(name: str, criterion: Callable[[], Any]) -> None:
    model = build(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    options = {"schedule": OneShot(), "example_input": X[:1], "steps_per_epoch": 1, "epochs": 1}
    pruner = Pruner(model, criterion(), target_sparsity=0.5, optimizer=optimizer, **options)
    _, kinds, reasons = ZOO[name]
    assert Counter(target.structure.kind for target in pruner.targets) == kinds
    told = {"grouped" if reason.endswith("is a grouped convolution") else reason for reason in pruner.skipped.values()}
    assert told == reasons
    for _ in range(2):
        optimizer.zero_grad()
        loss(model.train(), X).backward()
        pruner.on_before_optimizer_step()
        optimizer.step()
        pruner.on_step_end()
        pruner.on_epoch_end()
        pruner.on_step_begin(0)
    masked = copy.deepcopy(model)
    pruner.on_train_end()
    assert all(target.pruned == target.total // 2 for target in pruner.targets)
    small, large = (copy.deepcopy(m).double().eval()(X.double()) for m in (model, masked))
    torch.testing.assert_close(small, large, rtol=1e-9, atol=1e-9 * float(large.detach().abs().max()))
    optimizer.zero_grad()
    loss(model.train(), X).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    optimizer.step()
    assert bool(torch.isfinite(loss(model, X)))
