"""Small networks that hold one way of coupling units each, for the tests of discovery and surgery."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))


class ResNet(nn.Module):
    """conv-BN-ReLU, one residual block, pool, linear: the stem and conv2 share the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.head(F.relu(x + y).mean((2, 3)))


def flat(pool: int = 1) -> nn.Module:
    """conv -> flatten -> linear: every channel is read by (8 / pool)^2 columns."""
    size = 8 // pool
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.PReLU(4), nn.MaxPool2d(pool), nn.Flatten(), nn.Linear(4 * size**2, 3)
    )


class Mobile(nn.Module):
    """Expand, depthwise, squeeze-and-excite, project."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depth, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.fc1, self.fc2 = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.project = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.bn2(self.depth(F.hardswish(self.bn1(self.expand(x))))))
        scale = F.hardsigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))
        return self.project(x * scale).mean((2, 3))


class Dense(nn.Module):
    """Concatenation in front of a pre-activation BatchNorm, and the input of the block read again later."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(10), nn.Conv2d(10, 5, 1)
        self.head = nn.Linear(15, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], 1)
        x = torch.cat([self.conv2(F.relu(self.norm2(x))), x], 1)
        return self.head(x.mean((2, 3)))


class CatAdd(nn.Module):
    """a and b side by side meet c: c's rows belong to two structures."""

    def __init__(self, *, first: str = "a") -> None:
        super().__init__()
        rows = {"a": 4, "b": 6, "c": 10}
        for name in sorted(rows, key=lambda n: n != first):
            setattr(self, name, nn.Conv2d(3, rows[name], 1))
        self.out = nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(torch.cat([self.a(x), self.b(x)], 1) + self.c(x)))


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int, *, fused: bool = True) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fused = num_heads, width // num_heads, fused
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) / self.head_dim**0.5).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int, *, fused: bool) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, num_heads, fused=fused)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 10), nn.Linear(10, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Feedforward(nn.Module):
    """A residual block of two layers behind a norm."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


class ViT(nn.Module):
    def __init__(self, *, fused: bool = True) -> None:
        super().__init__()
        self.patch, self.pos = nn.Conv2d(3, 12, 4, stride=4), nn.Parameter(torch.randn(1, 4, 12))
        self.blocks = nn.ModuleList(Block(12, 4, fused=fused) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class BertAttention(nn.Module):
    """Hugging Face's names: a head count, a head size and a width that the forward pass does not derive."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = 4, 3, 12
        self.query, self.key, self.value = (nn.Linear(8, 12) for _ in range(3))
        self.out = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.num_attention_heads, self.attention_head_size)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x + self.out(y.reshape(*x.shape[:2], self.all_head_size))


def of_pictures() -> nn.Module:
    """A conv net on 3 x 8 x 8, in eval mode."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    model = nn.Sequential(*layers)
    model(torch.randn(16, 3, 8, 8))  # statistics that are not 0 and 1
    return model.eval()


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def settle(model: nn.Module) -> nn.Module:
    """Random affine pairs and running statistics: fresh ones (1, 0) hide mistakes."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model
