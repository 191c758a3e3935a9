"""Structures written down by hand, for tests of cutting that ask no finder; and the small networks that they lie in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsprune.structures.structure import Kind, Member, Structure

Side = Sequence[tuple[str, int] | tuple[str, int, str]]


def structure(
    model: nn.Module,
    name: str,
    kind: Kind,
    units: int,
    *,
    producers: Side = (),
    consumers: Side = (),
    norms: Side = (),
    gates: Side | None = None,
    attributes: Mapping[str, int] | None = None,
) -> Structure:
    """Each member is (tensor, dimension), its positions unit after unit; or with "turns": the units take turns."""

    def members(side: Side) -> tuple[Member, ...]:
        return tuple(member(model, entry[0], entry[1], units, turns=len(entry) == 3) for entry in side)

    made, read, on_the_way = map(members, (producers, consumers, norms))
    gate = made if gates is None else members(gates)
    gate = tuple(m for m in gate if isinstance(_tensor(model, m.tensor), nn.Parameter))
    return Structure(name, kind, units, made, read, on_the_way, gate, attributes or {})


def member(model: nn.Module, tensor: str, dim: int, units: int, *, turns: bool = False) -> Member:
    size = _tensor(model, tensor).shape[dim]
    positions = torch.arange(size)
    index = positions.reshape(-1, units).T.contiguous() if turns else positions.reshape(units, -1)
    return Member(tensor, dim, index, size)


def _tensor(model: nn.Module, name: str) -> Tensor:
    home: Any = model
    for part in name.split("."):
        home = getattr(home, part)
    return home  # type: ignore[no-any-return]


# ---- layers of other layouts


def generator_net() -> nn.Module:
    """Transposed convolutions, as in a DCGAN."""
    layers = [nn.ConvTranspose2d(3, 6, 4), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 8, 3, groups=2)]
    return nn.Sequential(*layers, nn.ReLU(), nn.ConvTranspose2d(8, 2, 3))


def in_generator(model: nn.Module) -> list[Structure]:
    pair = [("1.weight", 0), ("1.bias", 0), ("1.running_mean", 0), ("1.running_var", 0)]
    first = structure(
        model,
        "0",
        "channels",
        3,
        producers=[("0.weight", 1, "turns"), ("0.bias", 0, "turns")],
        consumers=[("3.weight", 0, "turns")],
        norms=[(name, dim, "turns") for name, dim in pair],
    )
    rows: Side = [("3.weight", 1), ("3.bias", 0, "turns")]
    second = structure(model, "3", "channels", 4, producers=rows, consumers=[("5.weight", 0, "turns")])
    return [first, second]


def grouped() -> nn.Module:
    """A convolution with two groups, between two without."""
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=2), nn.ReLU(), nn.Conv2d(12, 2, 1)]
    return nn.Sequential(*layers)


def in_grouped(model: nn.Module) -> list[Structure]:
    """Unit k is the k-th channel of each group."""
    rows: Side = [("0.weight", 0, "turns"), ("0.bias", 0, "turns")]
    first = structure(model, "0", "channels", len(model[0].weight) // 2, producers=rows, consumers=[("2.weight", 1)])
    rows = [("2.weight", 0, "turns"), ("2.bias", 0, "turns")]
    return [
        first,
        structure(
            model, "2", "channels", len(model[2].weight) // 2, producers=rows, consumers=[("4.weight", 1, "turns")]
        ),
    ]


def whole_groups() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(), nn.Conv2d(12, 2, 1))


def in_whole_groups(model: nn.Module) -> list[Structure]:
    """Unit k is the k-th group: what it reads, and what it computes."""
    made: Side = [("0.weight", 0), ("0.bias", 0), ("2.weight", 0), ("2.bias", 0)]
    read: Side = [("4.weight", 1)]
    return [structure(model, "0", "channels", 4, producers=made, consumers=read, attributes={"2.groups": 1})]


def normed_groups() -> nn.Module:
    """GroupNorm, and an InstanceNorm with an affine pair and statistics."""
    layers = [nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 6, 3)]
    norm = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
    return nn.Sequential(*layers, norm, nn.ReLU(), nn.Conv2d(6, 2, 1))


def in_normed_groups(model: nn.Module) -> list[Structure]:
    rows: Side = [("0.weight", 0), ("0.bias", 0)]
    pair: Side = [("1.weight", 0), ("1.bias", 0)]
    groups = {"1.num_groups": 1}
    first = structure(model, "0", "channels", 4, producers=rows, consumers=[("3.weight", 1)], norms=pair,
                      attributes=groups)  # fmt: skip
    rows = [("3.weight", 0), ("3.bias", 0)]
    pair = [(f"4.{name}", 0) for name in ("weight", "bias", "running_mean", "running_var")]
    return [first, structure(model, "3", "channels", 6, producers=rows, consumers=[("6.weight", 1)], norms=pair)]


class Scaled(nn.Module):
    """A scale (c, 1, 1) and a buffer (1, c, 1, 1) on the way between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1)
        self.gamma = nn.Parameter(torch.rand(6, 1, 1) + 0.5)
        self.shift: Tensor
        self.register_buffer("shift", torch.rand(1, 6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x) * self.gamma + self.shift))  # type: ignore[no-any-return]


def in_scaled(model: nn.Module) -> list[Structure]:
    made: Side = [("first.weight", 0), ("first.bias", 0), ("gamma", 0), ("shift", 1)]
    return [structure(model, "first", "channels", 6, producers=made, consumers=[("last.weight", 1)],
                      gates=[("first.weight", 0), ("first.bias", 0)])]  # fmt: skip


class Words(nn.Module):
    """An embedding, a bag of words, and a bilinear layer of both."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.bag = nn.Embedding(11, 6), nn.EmbeddingBag(11, 5, mode="sum")
        self.pair, self.out = nn.Bilinear(6, 5, 7), nn.Linear(7, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.pair(self.table(ids).mean(1), self.bag(ids))))  # type: ignore[no-any-return]


def in_words(model: nn.Module) -> list[Structure]:
    made: Side = [("table.weight", 1)]
    first = structure(
        model, "table", "neurons", model.table.embedding_dim, producers=made, consumers=[("pair.weight", 1)]
    )
    made = [("bag.weight", 1)]
    second = structure(model, "bag", "neurons", model.bag.embedding_dim, producers=made, consumers=[("pair.weight", 2)])
    made = [("pair.weight", 0), ("pair.bias", 0)]
    return [
        first,
        second,
        structure(model, "pair", "neurons", model.pair.out_features, producers=made, consumers=[("out.weight", 1)]),
    ]


def weight_normed(*, hooks: bool = False) -> nn.Module:
    """A convolution whose weight is g * v / |v|, by a parametrisation or by the hook of before."""
    norm = nn.utils.weight_norm if hooks else nn.utils.parametrizations.weight_norm
    return nn.Sequential(norm(nn.Conv1d(3, 6, 3)), nn.ReLU(), nn.Conv1d(6, 2, 1))


def in_weight_normed(model: nn.Module) -> list[Structure]:
    names = ("0.weight_g", "0.weight_v")
    if hasattr(model[0], "parametrizations"):
        names = ("0.parametrizations.weight.original0", "0.parametrizations.weight.original1")
    made: Side = [*((name, 0) for name in names), ("0.bias", 0)]
    return [structure(model, "0", "channels", 6, producers=made, consumers=[("2.weight", 1)])]


class Experts(nn.Module):
    """Three experts side by side in one tensor, of which every token has all."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(shape)) for shape in ((3, 8, 6), (3, 6, 8)))
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(torch.einsum("bd,edf->ebf", x, self.up))
        return self.out(torch.einsum("ebf,efd->bd", hidden, self.down))  # type: ignore[no-any-return]


def in_experts(model: nn.Module) -> list[Structure]:
    return [structure(model, "", "neurons", 6, producers=[("up", 2)], consumers=[("down", 1)])]


class Recurrent(nn.Module):
    """A recurrent layer of two levels in both directions, and one of one level that reads it."""

    def __init__(self, make: type[nn.RNNBase]) -> None:
        super().__init__()
        self.first = make(3, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.last, self.out = make(12, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.last(self.first(x)[0])[0].mean(1))  # type: ignore[no-any-return]


def in_recurrent(model: nn.Module) -> list[Structure]:
    """Unit j is hidden unit j of every level and direction, with all its gates."""
    ends = [f"_l{level}{way}" for level in (0, 1) for way in ("", "_reverse")]
    rows: Side = [(f"first.{part}{end}", 0, "turns") for end in ends for part in _PARTS]
    read: Side = [(f"first.weight_hh{end}", 1) for end in ends]
    read = [*read, *((f"first.weight_ih{end}", 1, "turns") for end in ends[2:]), ("last.weight_ih_l0", 1, "turns")]
    first = structure(model, "first", "neurons", 6, producers=rows, consumers=read)
    rows = [(f"last.{part}_l0", 0, "turns") for part in _PARTS]
    read = [("last.weight_hh_l0", 1), ("out.weight", 1)]
    return [first, structure(model, "last", "neurons", 5, producers=rows, consumers=read)]


_PARTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


# ---- residual streams


class Stream(nn.Module):
    """Tokens with learnt and fixed positions, two blocks with a norm before each branch, a head tied to the table."""

    def __init__(self, norm: Any = nn.LayerNorm, *, width: int = 8, tied: bool = True) -> None:
        super().__init__()
        self.table, self.pos = nn.Embedding(11, width), nn.Parameter(torch.randn(1, 6, width))
        self.fixed: Tensor
        self.register_buffer("fixed", torch.randn(6, width))
        self.blocks = nn.ModuleList(StreamBlock(norm, width) for _ in range(2))
        self.norm, self.head = norm(width), nn.Linear(width, 11, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = self.table(ids) + self.pos[:, :length] + self.fixed[:length]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class StreamBlock(nn.Module):
    def __init__(self, norm: Any, width: int) -> None:
        super().__init__()
        self.norm1, self.qkv, self.proj = norm(width), nn.Linear(width, 24), nn.Linear(8, width)
        self.norm2, self.fc1, self.fc2 = norm(width), nn.Linear(width, 10), nn.Linear(10, width)
        self.scale = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.scale * self.proj(mixed)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))  # type: ignore[no-any-return]


def in_stream(model: nn.Module) -> list[Structure]:
    """Everything that writes into the stream and reads it; and the neurons of the first block beside it."""
    width = model.table.weight.shape[1]
    written: list[Any] = [("table.weight", 1), ("pos", 2), ("fixed", 1)]
    read: list[Any] = [("head.weight", 1)]
    norms: list[Any] = []
    attributes: dict[str, int] = {}
    for name in ("blocks.0", "blocks.1"):
        written += [(f"{name}.{part}", 0) for part in ("proj.weight", "proj.bias", "scale", "fc2.weight", "fc2.bias")]
        read += [(f"{name}.{part}.weight", 1) for part in ("qkv", "fc1")]
    for name in ("norm", *(f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2))):
        norm = model.get_submodule(name)
        norms += [(f"{name}.{part}", 0) for part in ("weight", "bias") if getattr(norm, part, None) is not None]
        if getattr(norm, "weight", None) is None:
            attributes[f"{name}.normalized_shape"] = 1
    stream = structure(model, "table", "residual", width, producers=written, consumers=read, norms=norms,
                       attributes=attributes)  # fmt: skip
    made: Side = [("blocks.0.fc1.weight", 0), ("blocks.0.fc1.bias", 0)]
    return [
        stream,
        structure(
            model,
            "blocks.0.fc1",
            "neurons",
            model.blocks[0].fc1.out_features,
            producers=made,
            consumers=[("blocks.0.fc2.weight", 1)],
        ),
    ]


def encoder(*, norm_first: bool) -> nn.Module:
    """PyTorch's own encoder between two linear layers: with norms behind the branches these write into the stream."""
    layer = nn.TransformerEncoderLayer(8, 2, 10, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.Sequential(nn.Linear(5, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 2))


def in_encoder(model: nn.Module) -> list[Structure]:
    layers = [f"1.layers.{i}" for i in (0, 1)]
    written: Side = [("0.weight", 0), ("0.bias", 0)]
    outs = ("self_attn.out_proj.weight", "self_attn.out_proj.bias", "linear2.weight", "linear2.bias")
    written = [*written, *((f"{layer}.{part}", 0) for layer in layers for part in outs)]
    read: Side = [(f"{layer}.{part}", 1) for layer in layers for part in ("self_attn.in_proj_weight", "linear1.weight")]
    norms: Side = [(f"{layer}.norm{i}.{part}", 0) for layer in layers for i in (1, 2) for part in ("weight", "bias")]
    return [
        structure(model, "0", "residual", 8, producers=written, consumers=[*read, ("2.weight", 1)], norms=norms),
    ]


class ChannelsFirst(nn.LayerNorm):
    """A LayerNorm over the channels of pictures, as ConvNeXt has."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ConvNet(nn.Module):
    """A stem, one block of a ConvNeXt, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0, self.depth = nn.Conv2d(3, 6, 2, stride=2), ChannelsFirst(6), nn.Conv2d(6, 6, 3, groups=6)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)
        self.gamma, self.head = nn.Parameter(torch.rand(6) + 0.5), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(self.stem(x))
        y = self.norm(self.depth(F.pad(x, (1, 1, 1, 1))).movedim(1, -1))
        x = x + (self.gamma * self.fc2(F.gelu(self.fc1(y)))).movedim(-1, 1)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def in_convnet(model: nn.Module) -> list[Structure]:
    written: Side = [(f"{name}.{part}", 0) for name in ("stem", "depth", "fc2") for part in ("weight", "bias")]
    norms: Side = [(f"{name}.{part}", 0) for name in ("norm0", "norm") for part in ("weight", "bias")]
    read: Side = [("fc1.weight", 1), ("head.weight", 1)]
    stream = structure(
        model, "stem", "residual", len(model.gamma), producers=[*written, ("gamma", 0)], consumers=read, norms=norms
    )
    made: Side = [("fc1.weight", 0), ("fc1.bias", 0)]
    return [
        stream,
        structure(model, "fc1", "neurons", model.fc1.out_features, producers=made, consumers=[("fc2.weight", 1)]),
    ]


def in_llama(model: nn.Module) -> list[Structure]:
    """The stream of a Llama of transformers."""
    layers = [name.removesuffix(".input_layernorm") for name, _ in model.named_modules() if "input_layernorm" in name]
    written: Side = [(f"{name}.{part}.weight", 0) for name in layers for part in ("self_attn.o_proj", "mlp.down_proj")]
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    read: Side = [(f"{name}.{part}.weight", 1) for name in layers for part in parts]
    norms = ["model.norm", *(f"{n}.{part}_layernorm" for n in layers for part in ("input", "post_attention"))]
    return [
        structure(
            model,
            "model.embed_tokens",
            "residual",
            model.model.embed_tokens.embedding_dim,
            producers=[("model.embed_tokens.weight", 1), *written],
            consumers=[*read, ("lm_head.weight", 1)],
            norms=[(f"{name}.weight", 0) for name in norms],
        )
    ]


class Cell(nn.Module):
    """A recurrent cell that is called at each step, over a line of five numbers."""

    def __init__(self, make: type[nn.RNNCellBase] = nn.GRUCell) -> None:
        super().__init__()
        self.cell, self.out = make(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.out(state[0] if isinstance(state, tuple) else state)  # type: ignore[no-any-return]


def in_cell(model: nn.Module) -> list[Structure]:
    rows: Side = [(f"cell.{part}", 0, "turns") for part in _PARTS]
    read: Side = [("cell.weight_hh", 1), ("out.weight", 1)]
    return [structure(model, "cell", "neurons", model.cell.hidden_size, producers=rows, consumers=read)]
