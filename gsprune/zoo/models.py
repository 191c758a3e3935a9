"""Small reference networks, and torchvision's, all built as `f(image_size=, in_channels=, num_classes=, ...)`.

They have no dropout and no downloaded weights. For texts there is `hf_sequence_classification`, which takes any network
of the library transformers.

Axes in names: n batch, t token, d width of the token, h head, c channel.
"""

from __future__ import annotations

import inspect
import os
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsprune.extras import need
from gsprune.zoo import hf
from gsprune.zoo.sizes import check_at_least, check_divides

SMALL = 64  # pictures up to this size get a stem that keeps their resolution


def lenet_300_100(*, image_size: int, in_channels: int, num_classes: int) -> nn.Sequential:
    """Two hidden layers of 300 and 100 neurons on the flattened picture.

    Shapes: (n, in_channels, image_size, image_size) -> (n, num_classes).
    Source: LeCun et al., "Gradient-based learning applied to document recognition", 1998.

    >>> [tuple(p.shape) for p in lenet_300_100(image_size=8, in_channels=1, num_classes=10).parameters()][::2]
    [(300, 64), (100, 300), (10, 100)]
    """
    check_at_least(1, image_size=image_size, in_channels=in_channels, num_classes=num_classes)
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(in_channels * image_size**2, 300),
            relu1=nn.ReLU(),
            fc2=nn.Linear(300, 100),
            relu2=nn.ReLU(),
            fc3=nn.Linear(100, num_classes),
        )
    )


class ResidualBlock(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x)))))), both convolutions 3x3: (n, channels, h, w) -> the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(inner)))


class ConvNet(nn.Module):
    """The network of `convnet`."""

    def __init__(self, *, in_channels: int, num_classes: int, width: int, stem_stride: int) -> None:
        super().__init__()
        self.stem = _conv(in_channels, width, stride=stem_stride)
        self.stem_bn = nn.BatchNorm2d(width)
        self.down = _conv(width, 2 * width, stride=2)
        self.down_bn = nn.BatchNorm2d(2 * width)
        self.block = ResidualBlock(2 * width)
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_bn(self.stem(x)))
        x = F.relu(self.down_bn(self.down(x)))
        return self.head(self.block(x).mean(dim=(2, 3)))  # type: ignore[no-any-return]


def convnet(*, image_size: int, in_channels: int, num_classes: int, width: int = 32) -> ConvNet:
    """Conv-BatchNorm-ReLU twice, one residual block, mean over the picture, one linear layer.

    Shapes: (n, in_channels, image_size, image_size) -> (n, num_classes); any size from 8x8 up. Above 64x64 the first
    convolution has stride 4, so that the cost stays that of a small picture.

    Args:
        width: channels of the first stage; the second has twice as many.

    >>> sum(p.numel() for p in convnet(image_size=8, in_channels=1, num_classes=10).parameters())
    93546
    """
    check_at_least(1, image_size=image_size, in_channels=in_channels, num_classes=num_classes, width=width)
    stride = 1 if image_size <= SMALL else 4
    return ConvNet(in_channels=in_channels, num_classes=num_classes, width=width, stem_stride=stride)


class Attention(nn.Module):
    """Self-attention with separate q, k, v and proj: (n, t, dim) -> (n, t, dim).

    The outputs of the projections give the number of heads at run time, so a head is removed by removing its
    `head_dim` rows of q, k and v and its columns of proj.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_ntd: Tensor) -> Tensor:
        q, k, v = (
            layer(x_ntd).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        mixed_nhtd = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed_nhtd.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Linear, GELU, Linear: (n, t, dim) -> (n, t, dim)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-LayerNorm block: x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class ViT(nn.Module):
    """The network of `vit_tiny`."""

    def __init__(
        self, *, tokens: int, patch: int, in_channels: int, num_classes: int, dim: int, blocks: list[Block]
    ) -> None:
        super().__init__()
        self.patchify = nn.Conv2d(in_channels, dim, kernel_size=patch, stride=patch)
        self.position = nn.Parameter(torch.zeros(1, tokens, dim))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        tokens_ntd = self.patchify(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens_ntd)).mean(dim=1))  # type: ignore[no-any-return]


def vit_tiny(
    *,
    image_size: int,
    in_channels: int,
    num_classes: int,
    patch_size: int | None = None,
    dim: int = 96,
    depth: int = 4,
    num_heads: int = 4,
    mlp_ratio: int = 4,
) -> ViT:
    """A small vision transformer: patches, learned positions, pre-LayerNorm blocks, mean over the tokens.

    Shapes: (n, in_channels, image_size, image_size) -> (n, num_classes).
    Source: Dosovitskiy et al., "An image is worth 16x16 words", 2021, with the mean in place of a class token.

    Args:
        patch_size: side of a patch in pixels; must divide `image_size`. None: the largest divisor of `image_size`
            that is at most a seventh of it (at least 2, at most 16): 2 at 8x8, 4 at 28x28 and 32x32, 16 at 224x224.
        dim: width of a token, a multiple of `num_heads`.
        mlp_ratio: hidden neurons of a block's MLP, in multiples of `dim`.

    Raises:
        ValueError: a size below 1, a patch that does not divide the picture, heads that do not divide the width.

    >>> model = vit_tiny(image_size=8, in_channels=1, num_classes=10)
    >>> model.patchify.kernel_size, model.position.shape, model.blocks[0].attn.head_dim
    ((2, 2), torch.Size([1, 16, 96]), 24)
    """
    patch = _patch_size(image_size) if patch_size is None else patch_size
    check_at_least(1, image_size=image_size, in_channels=in_channels, num_classes=num_classes, patch_size=patch)
    check_at_least(1, dim=dim, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio)
    check_divides("patch_size", patch, "image_size", image_size)
    check_divides("num_heads", num_heads, "dim", dim)
    return ViT(
        tokens=(image_size // patch) ** 2,
        patch=patch,
        in_channels=in_channels,
        num_classes=num_classes,
        dim=dim,
        blocks=[Block(dim, num_heads, mlp_ratio * dim) for _ in range(depth)],
    )


def resnet18(*, image_size: int, in_channels: int, num_classes: int) -> nn.Module:
    """torchvision's ResNet-18, untrained; see `resnet50` for the effect of `image_size`."""
    return _resnet("resnet18", image_size, in_channels, num_classes)


def resnet50(*, image_size: int, in_channels: int, num_classes: int) -> nn.Module:
    """torchvision's ResNet-50, untrained.

    Shapes: (n, in_channels, image_size, image_size) -> (n, num_classes). Pictures up to 64x64 get the usual stem for
    small pictures: one 3x3 convolution with stride 1 and no pooling, instead of 7x7 with stride 2 and pooling.
    Source: He et al., "Deep residual learning for image recognition", 2016, sections 4.1 and 4.2.
    """
    return _resnet("resnet50", image_size, in_channels, num_classes)


def mobilenet_v3_small(*, image_size: int, in_channels: int, num_classes: int, norm_momentum: float = 0.1) -> nn.Module:
    """torchvision's MobileNetV3-Small, untrained and without its dropout.

    Shapes: (n, in_channels, image_size, image_size) -> (n, num_classes). Pictures up to 64x64 pass the first
    convolution at full resolution (stride 1).
    Source: Howard et al., "Searching for MobileNetV3", 2019.

    Args:
        norm_momentum: of BatchNorm's running averages. With torchvision's 0.01 evaluation means nothing before
            thousands of steps; 0.1 is torch's default.
    """
    build = need("torchvision.models").mobilenet_v3_small
    check_at_least(1, image_size=image_size, in_channels=in_channels, num_classes=num_classes)
    norm = partial(nn.BatchNorm2d, eps=0.001, momentum=norm_momentum)
    model = build(weights=None, num_classes=num_classes, dropout=0.0, norm_layer=norm)
    first = model.features[0][0]
    stride = 1 if image_size <= SMALL else 2
    model.features[0][0] = _first_conv(in_channels, first.out_channels, kernel=3, stride=stride)
    return model  # type: ignore[no-any-return]


class LogitsOnly(nn.Module):
    """Mixed into a network of transformers: the forward pass takes a batch of the loaders, and returns the logits.

    Names of parameters, configuration and methods of the network stay.
    """

    def forward(
        self,
        input_ids: Tensor | Mapping[str, Tensor],
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Shapes: (n, t) each -> (n, num_classes). One mapping of them by name is allowed too."""
        if isinstance(input_ids, Mapping):
            return self(**input_ids)  # type: ignore[no-any-return]
        whole = super().forward
        takes_types = token_type_ids is not None and "token_type_ids" in inspect.signature(whole).parameters
        types = {"token_type_ids": token_type_ids} if takes_types else {}
        return whole(input_ids, attention_mask=attention_mask, **types).logits  # type: ignore[no-any-return]


def logits_only(network: nn.Module) -> nn.Module:
    """Mix `LogitsOnly` into a network, in place; its class keeps its name."""
    network.__class__ = type(type(network).__name__, (LogitsOnly, type(network)), {"__module__": __name__})
    return network


def hf_sequence_classification(
    name: str | os.PathLike[str] | None,
    *,
    num_classes: int,
    tokenizer: str | os.PathLike[str],
    max_length: int,
    pretrained: bool = True,
    config: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A network for texts from transformers (extra `[hf]`), such as BERT with a linear layer on top, in float32.

    Only its forward pass differs from the library's network, so a pruned one loads into one made by `from_pretrained`.
    Shapes: `input_ids`, `attention_mask` (and `token_type_ids`), (n, t) each -> (n, num_classes). Attention is torch's
    fused one. Weights come from safetensors files only; a head that does not fit `num_classes` starts at random.

    Args:
        name: a folder, or a name on the Hugging Face hub; None is allowed with `pretrained=False`.
        tokenizer, max_length: of the data, to check that the network can read them.
        pretrained: start from the weights of `name`; False: from random ones.
        config: changed settings of the network, such as {"hidden_dropout_prob": 0.0}; without a `name` all settings,
            with the kind of network as `model_type`.

    Raises:
        ValueError: an unknown name or setting, or texts that the network cannot read.
    """
    check_at_least(1, num_classes=num_classes)
    if pretrained and name is None:
        raise ValueError("model.name is null: give a folder or a name on the hub, or model.pretrained=false")
    pieces = hf.load_tokenizer(tokenizer)
    settings = config or {}
    network_config = hf.load_config(name, settings)
    if name is None and "vocab_size" not in settings:
        network_config.vocab_size = len(pieces)
    network_config.num_labels, network_config.pad_token_id = num_classes, hf.padding_id(pieces)
    network_config.use_cache = False  # a decoder would return keys and values that nothing reads
    for limit, needed, what in (
        ("vocab_size", len(pieces), "the tokenizer has {} tokens"),
        ("max_position_embeddings", max_length, "dataset.max_length is {}"),
    ):
        most = getattr(network_config, limit, None)
        if most is not None and most < needed:
            raise ValueError(f"{what.format(f'{needed:,}')}, but the model's {limit} is {most:,}")
    kind = "AutoModelForSequenceClassification"
    return logits_only(hf.make_network(kind, network_config, name=name if pretrained else None))


def _resnet(name: str, image_size: int, in_channels: int, num_classes: int) -> nn.Module:
    check_at_least(1, image_size=image_size, in_channels=in_channels, num_classes=num_classes)
    model: Any = need("torchvision.models").get_model(name, weights=None, num_classes=num_classes)
    if image_size <= SMALL:
        model.conv1 = _first_conv(in_channels, 64, kernel=3, stride=1)
        model.maxpool = nn.Identity()
    elif in_channels != 3:
        model.conv1 = _first_conv(in_channels, 64, kernel=7, stride=2)
    return model  # type: ignore[no-any-return]


def _first_conv(in_channels: int, out_channels: int, *, kernel: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")  # as torchvision does for its own
    return conv


def _conv(in_channels: int, out_channels: int, *, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def _patch_size(image_size: int) -> int:
    largest = min(max(2, image_size // 7), 16)
    return next((size for size in range(largest, 0, -1) if image_size % size == 0), 1)
