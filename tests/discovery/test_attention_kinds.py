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


class _Table(nn.Module):
    """Scores of places, made by a small network and read by the attention: it is never called itself."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.up, self.down = nn.Linear(2, 7), nn.Linear(7, HEADS)
        self.register_buffer("places", torch.randn(11, 2), persistent=False)
        self.register_buffer("index", torch.arange(6)[:, None] - torch.arange(6) + 5, persistent=False)

    def scores(self) -> Tensor:
        table = self.down(self.up(self.places).relu()).view(-1, self.num_heads)
        return table[self.index.flatten()].view(6, 6, HEADS).permute(2, 0, 1)


class Placed(Attention):
    """Adds the scores of such a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = _Table()

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, self.table.scores())


class Cached(Attention):
    """In evaluation it keeps what it has picked from a table, as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.bias_cache = nn.Parameter(torch.randn(HEADS, 11)), {}
        self.register_buffer("index", torch.arange(6)[:, None] - torch.arange(6) + 5, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if self.training:
            return super().forward(x, x, self.table[:, self.index])
        if str(x.dtype) not in self.bias_cache:
            self.bias_cache[str(x.dtype)] = self.table[:, self.index]
        return super().forward(x, x, self.bias_cache[str(x.dtype)])

    def train(self, mode: bool = True) -> Cached:
        self.bias_cache.clear()
        return super().train(mode)


def cached() -> nn.Module:
    """A network that has run before."""
    model = nn.Sequential(Cached(), nn.Linear(WIDTH, 2)).eval()
    with torch.no_grad():
        model(X)
    return model


class SingleHead(nn.Module):
    """Keys and values are halves of one layer, all in one head: values are as many as keys, which stay."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 16), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).reshape(len(x), -1, 2, 1, 8).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.q(x).reshape(len(x), -1, 1, 8).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).flatten(2))


class OneKey(Attention):
    """Fused rows: all queries, then one key and one value for all of them."""

    def __init__(self) -> None:
        super().__init__()
        del self.q, self.k, self.v
        self.qkv = nn.Linear(WIDTH, (HEADS + 2) * SIZE)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        qkv = self.qkv(x).view(*x.shape[:2], self.num_heads + 2, SIZE)
        parts = (t.transpose(1, 2) for t in (qkv[..., :-2, :], qkv[..., [-2], :], qkv[..., [-1], :]))
        y = nn.functional.scaled_dot_product_attention(*parts)
        return self.o(y.transpose(1, 2).flatten(2))


class Looking(nn.Module):
    """A deformable attention: each head looks at places of a picture that the queries choose."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.value, self.places, self.weights = (nn.Linear(WIDTH, HEADS * n) for n in (SIZE, 3 * 2, 3))
        self.o = nn.Linear(HEADS * SIZE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        value = self.value(x).view(batch, length, self.num_heads, SIZE).flatten(2).transpose(1, 2)
        value = value.reshape(batch * self.num_heads, SIZE, 2, length // 2)
        places = self.places(x).view(batch, length, self.num_heads, 3, 2).tanh().transpose(1, 2).flatten(0, 1)
        weights = self.weights(x).view(batch, length, self.num_heads, 3).softmax(-1).transpose(1, 2)
        seen = nn.functional.grid_sample(value, places, align_corners=False)
        y = (seen * weights.reshape(batch * self.num_heads, 1, length, 3)).sum(-1)
        return self.o(y.view(batch, self.num_heads * SIZE, length).transpose(1, 2))


class Shuffled(nn.Module):
    """Tokens in an order of their own, as many times as they are wide, between two layers of a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(WIDTH, 8), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        order = torch.arange(x.shape[1] - 1, -1, -2, device=x.device).expand(len(x), -1)
        return self.head(self.norm(x.gather(1, order[..., None].repeat(1, 1, x.shape[2]))))


class Remembering(nn.Module):
    """Its state is kept, in a tensor that nothing reads, and its convolution is told its groups by the input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.deep, self.down = nn.Linear(WIDTH, 8), nn.Conv1d(8, 8, 3, groups=8), nn.Linear(8, WIDTH)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).transpose(1, 2)
        batch, width, _ = y.shape
        torch.zeros(batch, width, 3, dtype=y.dtype, device=y.device).copy_(y[..., -3:])
        y = nn.functional.conv1d(y, self.deep.weight, self.deep.bias, padding=2, groups=width)
        return self.head(self.down(y.transpose(1, 2).relu()))


class Mixing(nn.Module):
    """A stream whose attention sends the queries of all heads through one layer: heads stay, the stream is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.attention = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), Attention()
        self.mix, self.head = nn.Linear(SIZE, SIZE), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y, a = self.norm(x), self.attention
        q, k, v = self.mix(a.split(a.q(y))), a.split(a.k(y)), a.split(a.v(y))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(x + a.o(y.transpose(1, 2).flatten(2)))


class Blur(nn.Module):
    """Neighbours are averaged by a convolution whose groups are written down, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.channels, self.head = nn.Linear(WIDTH, 8), 8, nn.Linear(8, 2)
        self.register_buffer("filter", torch.tensor([0.25, 0.5, 0.25]).repeat(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.conv1d(self.up(x).relu().transpose(1, 2), self.filter, groups=self.channels)
        return self.head(y.transpose(1, 2))


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
        "placed": Network(lambda: nn.Sequential(Placed(), nn.Linear(WIDTH, 2)), X, {"heads": 1, "neurons": 2}),
        "cached": Network(cached, X, {"heads": 1, "neurons": 1}),
        "single": Network(
            lambda: nn.Sequential(SingleHead(), nn.Linear(WIDTH, 2)),
            X,
            {"neurons": 1},
            skipped={OUTPUT, "single unit"},
        ),
        "one key": Network(lambda: nn.Sequential(OneKey(), nn.Linear(WIDTH, 2)), X, {"heads": 1, "neurons": 1}),
        "looking": Network(lambda: nn.Sequential(Looking(), nn.Linear(WIDTH, 2)), X, {"heads": 1, "neurons": 1}),
        "shuffled": Network(Shuffled, X, {"residual": 1}, kinds=["residual"], others=[X[:1], X[:, :4]]),
        "mixing": Network(Mixing, X, {"residual": 1}, kinds=["residual"], skipped=None),
        "blur": Network(Blur, X, [("up", "neurons", 8)], again=True, others=[X[:1]]),
        "remembering": Network(Remembering, X, {"neurons": 2}),
        "stream": Network(Stream, X, {"residual": 1}, kinds=["residual"], others=[X[:1]]),
        "latent": Network(Latent, X, {"residual": 1}, skipped=None, kinds=["residual"]),
    }


def test_an_output_without_logits_keeps_its_hidden_states() -> None:
    class Bare(Stream):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"last_hidden_state": super().forward(x)["last_hidden_state"]}

    with refused("embed", OUTPUT):
        find_structures(Bare(), X)


def test_a_table_that_is_read_but_not_called_keeps_its_number_of_heads() -> None:
    """Half of the heads: the attention is told its sizes, and must not halve what the table has halved already."""
    model = nn.Sequential(Placed(), nn.Linear(WIDTH, 2)).double()
    structures = [s for s in find_structures(model, X).structures if s.kind == "heads"]
    masked = copy.deepcopy(model)
    mask_units(masked, structures, keeps := [torch.arange(HEADS) < HEADS // 2])
    shrink(model, structures, keeps, example_input=X)
    torch.testing.assert_close(model(X.double()), masked(X.double()))


def test_a_layer_whose_configuration_is_set_has_it_alone() -> None:
    model = configured().double()
    structures = [s for s in find_structures(model, X).structures if s.kind == "heads"]
    keeps = [torch.arange(HEADS) < 1, torch.arange(HEADS) < 3]
    masked = copy.deepcopy(model)
    mask_units(masked, structures, keeps)
    shrink(model, structures, keeps, example_input=X)
    assert [layer.config.n_head for layer in list(model)[:2]] == [1, 3]
    torch.testing.assert_close(model(X.double()), masked(X.double()))
