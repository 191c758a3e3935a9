"""Layers that compute all units alike, each in rows of its own: queries that are pooled head by head, products along
tokens. What they give of a unit that is gone is nobody's, and the proof compares what they give of the others."""

from __future__ import annotations

from typing import ClassVar

import torch
from conformance import OUTPUT, Network, NetworkTester
from torch import Tensor, nn

from gsprune.discovery.find import find_structures

X = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(2))
WIDTH, HEADS, SIZE, TOKENS = 8, 4, 5, 6


class Pooled(nn.Module):
    """One convolution and one norm pool the queries of each head, which are among the samples (MViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * SIZE) for _ in range(3))
        self.pool = nn.Conv1d(SIZE, SIZE, 3, padding=1, groups=SIZE)
        self.norm, self.o = nn.LayerNorm(SIZE), nn.Linear(HEADS * SIZE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (layer(x).view(batch, tokens, HEADS, SIZE).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q = self.pool(q.transpose(2, 3).reshape(batch * q.shape[1], SIZE, tokens))
        q = self.norm(q.reshape(batch, -1, SIZE, tokens).transpose(2, 3))
        return self.o(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Along(nn.Module):
    """A product along tokens, of each channel by itself, which an affine pair follows (ResMLP)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.scale = nn.Linear(TOKENS, TOKENS), nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale * self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return x + self.down(torch.relu(self.up(x)))


class Gated(nn.Module):
    """Half of the neurons gate the others, after a norm and a product along tokens (gMLP)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.tokens = nn.Linear(WIDTH, 12), nn.LayerNorm(6), nn.Linear(TOKENS, TOKENS)
        self.down = nn.Linear(6, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        u, v = nn.functional.gelu(self.up(x)).chunk(2, dim=-1)
        v = self.tokens(self.norm(v).transpose(1, 2)).transpose(1, 2)
        return self.down(u * v)


class Sliced(nn.Module):
    """The first channels of a stream are another one's, and its forward pass names how many (ReXNet, FasterNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 5
        self.first, self.wide, self.part = nn.Linear(WIDTH, 5), nn.Linear(5, 9), nn.Linear(3, 3)
        self.forward = self.forward_in_parts

    def forward_in_parts(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        y = self.wide(x)
        y = torch.cat([y[..., 0 : self.width] + x, y[..., self.width :]], -1)
        y[..., :3] = self.part(y[..., :3].clone())
        return y


class Chunks(nn.Module):
    """Unequal parts of a chunk, the first two of which are added (EdgeNeXt)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 11)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = torch.relu(self.first(x)).chunk(3, dim=-1)
        return torch.cat([a + b, c], -1)


class Windows(nn.Module):
    """Pairs of tokens that overlap in memory, of a width that is a number (Longformer)."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.first = 10, nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        batch, token, channel = y.stride()
        size = (len(y), y.shape[1] - 1, 2, self.width)
        return y.as_strided(size=size, stride=(batch, token, token, channel)).sum(2)


class Mixed(nn.Module):
    """A norm reads a stream into which a product along tokens writes its bias at every position (Mixer)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.tokens = nn.Linear(WIDTH, 10), nn.LayerNorm(10), nn.Linear(TOKENS, TOKENS)
        self.last, self.out = nn.LayerNorm(10), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.out(self.last(x))


def _between(make: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), make(), nn.Linear(WIDTH, 2))


INSIDE = "inside of units"


class TestLayersAlike(NetworkTester):
    networks: ClassVar[dict[str, Network]] = {
        "pooled": Network(
            lambda: nn.Sequential(Pooled(), nn.Linear(WIDTH, 2)),
            X,
            [("0", "heads", HEADS), ("0.o", "neurons", WIDTH)],
            skipped=(OUTPUT, INSIDE),
            others=[X[:1], X[:, :3]],
            again=True,
        ),
        "along": Network(
            lambda: _between(Along), X, [("0", "neurons", WIDTH), ("1.up", "neurons", 12)], skipped=None, others=[X[:1]]
        ),
        "gated": Network(
            lambda: nn.Sequential(Gated(), nn.Linear(WIDTH, 2)),
            X,
            {"residual": 1, "neurons": 1},
            skipped=None,
            kinds=["residual", "neurons"],
            others=[X[:1]],
        ),
        "sliced": Network(
            lambda: nn.Sequential(Sliced(), nn.Linear(9, 2)), X, {"neurons": 3}, others=[X[:1], X[:, :2]], again=True
        ),
        "windows": Network(lambda: nn.Sequential(Windows(), nn.Linear(10, 2)), X, {"neurons": 1}, others=[X[:1]]),
        "chunks": Network(
            lambda: nn.Sequential(Chunks(), nn.Linear(7, 2)), X, {"neurons": 2}, others=[X[:1], X[:, :2]], again=True
        ),
    }


def test_a_bias_that_is_written_at_every_position_of_a_normed_stream_keeps_it() -> None:
    found = find_structures(Mixed(), X)
    assert "first" not in {s.name for s in found.structures}
    assert "does not compute what the masked one does" in found.skipped["first"]


def test_what_the_layers_give_of_a_unit_is_known() -> None:
    (heads,) = (s for s in find_structures(nn.Sequential(Pooled(), nn.Linear(WIDTH, 2)), X).structures[:1])
    assert dict(heads.alike) == {"0.pool": (0, 1)}
    stream = find_structures(_between(Along), X).structures[0]
    assert dict(stream.alike) == {"1.tokens": (1, 1)}
