"""Attentions and streams as other libraries write them, each in a few lines."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from conformance import OUTPUT, Network, NetworkTester
from facts import refused
from torch import Tensor, nn

from gsprune.discovery.find import find_structures
from gsprune.surgery.shrink import mask_units, shrink

X = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(1))
WIDTH, HEADS, SIZE = 12, 4, 5


class Attention(nn.Module):
    """Heads of any width; `bias` is added to the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * SIZE) for _ in range(3))
        self.o = nn.Linear(HEADS * SIZE, WIDTH)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, SIZE).transpose(1, 2)

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(memory)), self.split(self.v(memory))
        weights = (q @ k.transpose(-1, -2) + bias).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class Normed(Attention):
    """Queries, and keys, of all heads pass one norm; keys are written into a tensor beside what all heads share."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.RMSNorm(HEADS * SIZE), nn.LayerNorm(HEADS * SIZE)
        self.shared, self.more = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, HEADS * 3)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = self.split(self.q_norm(self.q(x))), self.split(self.k_norm(self.k(x))), self.split(self.v(x))
        more = self.more(x).unflatten(-1, (-1, 3)).transpose(1, 2)
        keys = k.new_empty(*k.shape[:-1], SIZE + 3)
        keys[..., :SIZE].copy_(k)
        keys[..., SIZE:].copy_(self.shared(x)[:, None].expand(-1, self.num_heads, -1, -1))
        weights = (torch.cat([q, more], -1) @ keys.transpose(-1, -2)).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class Merged(Attention):
    """Batch and heads are one dimension, and the width is that of the input, as fairseq's attentions have it."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        batch, length, width = x.shape
        shape = (batch * HEADS, -1, width // HEADS)
        parts = (self.split(y).reshape(shape) for y in (self.q(x), self.k(x), self.v(x)))
        y = nn.functional.scaled_dot_product_attention(*parts).view(batch, HEADS, length, width // HEADS)
        return self.o(y.transpose(1, 2).reshape(batch, length, width))

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], HEADS, x.shape[2] // HEADS).transpose(1, 2)

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))


class Queries(nn.Module):
    """Learned queries look at the input: what they are read by is no weight of the layer after it."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.attention, self.head = nn.Parameter(torch.randn(1, 3, WIDTH)), Attention(), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(self.queries.expand(len(x), -1, -1), x))


class SharedZeros(nn.Module):
    """One tensor of zeros, made with a number of heads, is added to the scores of two attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Attention(), Attention(), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        bias = x.new_zeros(1, self.first.num_heads, x.shape[1], x.shape[1])
        x = self.first(x, x, bias)
        return self.head(self.second(x, x, bias))


class Configured(Attention):
    """Fused rows, split where the configuration, which other layers share, says."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        del self.q, self.k, self.v, self.num_heads
        self.config, self.qkv = config, nn.Linear(WIDTH, 3 * HEADS * SIZE)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        end = self.config.n_head * SIZE
        parts = [
            t.unflatten(-1, (-1, SIZE)).transpose(1, 2)
            for t in (lambda y: (y[..., :end], y[..., end:-end], y[..., -end:]))(self.qkv(x))
        ]
        return self.o(nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


def configured() -> nn.Module:
    config = SimpleNamespace(n_head=HEADS)
    return nn.Sequential(Configured(config), Configured(config), nn.Linear(WIDTH, 2))


class Written(nn.Module):
    """Einsums over matrices with an axis of heads; the last one sums over heads and places."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Parameter(torch.randn(WIDTH, HEADS, SIZE) / 4) for _ in range(4))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bih,hnd->bind", x, w) for w in (self.q, self.k, self.v))
        weights = torch.einsum("bind,bjnd->bnij", q, k).softmax(-1)
        return self.head(torch.einsum("bind,hnd->bih", torch.einsum("bnij,bjnd->bind", weights, v), self.o))


class Stream(nn.Module):
    """Positions are a table that is no parameter; the stream is pooled over places, and is an output as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(12, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)
        self.positions = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.embed(x) + self.positions.to(x.dtype)
        x = nn.functional.avg_pool2d(x[:, None], (2, 1))[:, 0]
        return {"logits": self.head(self.norm(x)), "last_hidden_state": x}


class Latent(nn.Module):
    """Keys and values come out of a narrow latent, which is split off by its width."""

    def __init__(self) -> None:
        super().__init__()
        self.kv_lora_rank = 8
        self.down, self.norm, self.up = nn.Linear(12, 8 + 3), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        latent, rest = self.down(x).split([self.kv_lora_rank, 3], -1)
        return self.up(self.norm(latent)) + rest.sum(-1, keepdim=True)


class TestKinds(NetworkTester):
    networks: ClassVar = {
        "queries": Network(Queries, X, [("attention", "heads", HEADS), ("attention.o", "neurons", WIDTH)]),
        "zeros": Network(SharedZeros, X, {"heads": 1, "neurons": 2}),
        "configured": Network(configured, X, {"heads": 2, "neurons": 2}),
        "normed": Network(
            lambda: nn.Sequential(Normed(), nn.Linear(WIDTH, 2)), X, {"heads": 1, "neurons": 1}, skipped=None
        ),
        "merged": Network(
            lambda: nn.Sequential(Merged(), nn.Linear(WIDTH, 2)),
            X,
            {"heads": 1, "neurons": 1},
            others=[X[:1], X[:, :3]],
        ),
        "einsums": Network(Written, X, {"heads": 1, "neurons": 1}),
        "stream": Network(Stream, X, {"residual": 1}, kinds=["residual"], others=[X[:1]]),
        "latent": Network(Latent, X, {"residual": 1}, skipped=None, kinds=["residual"]),
    }


def test_an_output_without_logits_keeps_its_hidden_states() -> None:
    class Bare(Stream):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"last_hidden_state": super().forward(x)["last_hidden_state"]}

    with refused("embed", OUTPUT):
        find_structures(Bare(), X)


def test_a_layer_whose_configuration_is_set_has_it_alone() -> None:
    model = configured().double()
    structures = [s for s in find_structures(model, X).structures if s.kind == "heads"]
    keeps = [torch.arange(HEADS) < 1, torch.arange(HEADS) < 3]
    masked = copy.deepcopy(model)
    mask_units(masked, structures, keeps)
    shrink(model, structures, keeps, example_input=X)
    assert [layer.config.n_head for layer in list(model)[:2]] == [1, 3]
    torch.testing.assert_close(model(X.double()), masked(X.double()))
