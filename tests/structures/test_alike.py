"""Which structures of a network are alike."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import nets
import pytest
import torch
from torch import nn

from gsprune.discovery.find import find_structures
from gsprune.structures.alike import alike
from gsprune.zoo.models import resnet18


def residual() -> nn.Module:
    return resnet18(num_classes=10, in_channels=3, image_size=32)


CASES: dict[str, tuple[Callable[[], nn.Module], list[list[str]]]] = {
    "attention": (nets.ViT, [["patch"], ["blocks.0.attn", "blocks.1.attn"], ["blocks.0.fc1", "blocks.1.fc1"]]),
    "a stream and what is inside a block": (nets.ResNet, [["stem"], ["conv1"]]),
    "depthwise": (nets.Mobile, [["expand"], ["fc1"]]),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_alike(name: str) -> None:
    make, expected = CASES[name]
    model = make()
    structures = find_structures(model, nets.images(2)).structures
    assert [[structures[i].name for i in numbers] for numbers in alike(model, structures)] == expected


def test_blocks_of_a_residual_network_are_one_set_and_streams_are_not_among_them() -> None:
    model = residual()
    structures = find_structures(model, torch.zeros(1, 3, 32, 32)).structures
    sets = [{structures[i].name for i in numbers} for numbers in alike(model, structures)]
    inside = {name for name, _ in model.named_modules() if name.startswith("layer") and name.endswith("conv1")}
    assert inside in sets
    assert sorted(i for numbers in alike(model, structures) for i in numbers) == [*range(len(structures))]


def test_width_does_not_matter_and_the_kernel_does() -> None:
    def net(*kernels: int) -> nn.Module:
        widths = [3, 4, 7, 5, 6]
        layers = zip(itertools.pairwise(widths), kernels, strict=True)
        return nn.Sequential(*(nn.Conv2d(i, o, k, padding=k // 2) for (i, o), k in layers))

    def sets(*kernels: int) -> list[list[int]]:
        model = net(*kernels)
        return alike(model, find_structures(model, nets.images(2)).structures)

    assert sets(3, 3, 3, 3) == [[0, 1, 2]]
    assert sets(3, 3, 3, 1) == [[0, 1], [2]]
