"""What is found, what is left alone and why, and that looking changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import nets
import pytest
import torch
import torch.nn.functional as F
from facts import refused, warned
from torch import Tensor, nn

from gsprune import Pruner
from gsprune.criteria import Magnitude
from gsprune.discovery.find import find_structures
from gsprune.structures.running import outputs
from gsprune.structures.structure import Member, Structure
from gsprune.surgery.shrink import mask_units, shrink


def find(model: nn.Module, x: object = None, **options: object) -> dict[str, Structure]:
    found = find_structures(model, nets.images() if x is None else x, **options)
    return {s.name: s for s in found.structures}


def names(members: tuple[Member, ...]) -> list[str]:
    return [m.tensor for m in members]


def summary(model: nn.Module, x: object = None) -> list[tuple[str, str, int]]:
    return [(s.name, s.kind, s.units) for s in find(model, x).values()]


# ---- what is found


def test_neurons_of_an_mlp() -> None:
    found = find(nets.mlp(), torch.zeros(2, 6))
    assert [(s.name, s.kind, s.units) for s in found.values()] == [("0", "neurons", 8), ("2", "neurons", 5)]
    first = found["0"]
    assert names(first.producers) == names(first.gates) == ["0.weight", "0.bias"]
    assert names(first.consumers) == ["2.weight"]
    assert [(m.dim, m.size) for m in first.producers + first.consumers] == [(0, 8), (0, 8), (1, 8)]
    assert first.norms == ()
    assert dict(first.attributes) == {}
    assert first.consumers[0].index.tolist() == [[u] for u in range(8)]
    assert first.consumers[0].index.dtype == torch.int64


def test_residual_stream_has_several_producers_and_is_gated_by_their_norms() -> None:
    found = find(nets.ResNet())
    assert list(found) == ["stem", "conv1"]
    stem = found["stem"]
    assert (stem.kind, stem.units) == ("channels", 8)
    assert stem.modules() == ("stem", "conv2")
    assert names(stem.gates) == ["bn.weight", "bn.bias", "bn2.weight", "bn2.bias"]
    assert names(stem.consumers) == ["conv1.weight", "head.weight"]
    four = ["weight", "bias", "running_mean", "running_var"]
    assert names(stem.norms) == [f"{n}.{leaf}" for n in ("bn", "bn2") for leaf in four]
    assert names(found["conv1"].gates) == ["bn1.weight", "bn1.bias"]


@pytest.mark.parametrize(("pool", "width"), [(1, 64), (2, 16), (8, 1)])
def test_flatten_gives_each_channel_its_own_columns(pool: int, width: int) -> None:
    (conv,) = find(nets.flat(pool)).values()
    assert names(conv.norms) == ["1.weight"]  # one PReLU slope a channel
    assert names(conv.gates) == ["0.weight", "0.bias"]
    expected = torch.arange(4 * width).reshape(4, width)
    assert torch.equal(conv.consumers[0].index, expected)


def test_depthwise_and_squeeze_excite_rows_are_producers() -> None:
    found = find(nets.Mobile())
    assert summary(nets.Mobile()) == [("expand", "channels", 8), ("fc1", "channels", 4)]
    expand = found["expand"]
    assert names(expand.producers) == ["expand.weight", "depth.weight", "fc2.weight", "fc2.bias"]
    assert names(expand.consumers) == ["fc1.weight", "project.weight"]
    bn = ["bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"]
    assert names(expand.gates) == [*bn, "fc2.weight", "fc2.bias"]


@pytest.mark.parametrize("fused", [True, False])
def test_heads_and_neurons_of_a_vit(fused: bool) -> None:
    model = nets.ViT(fused=fused)
    found = find(model)
    kinds = {"attn": ("heads", 4), "fc1": ("neurons", 10)}
    inner = [(f"blocks.{i}.{name}", *kinds[name]) for i in (0, 1) for name in kinds]
    assert summary(model) == [("patch", "residual", 12), *inner]
    heads = found["blocks.1.attn"]
    both = ["weight", "bias"]
    assert names(heads.producers) == [f"blocks.1.attn.{p}.{leaf}" for p in "qkv" for leaf in both]
    assert names(heads.gates) == ["blocks.1.attn.v.weight", "blocks.1.attn.v.bias"]
    assert names(heads.consumers) == ["blocks.1.attn.proj.weight"]
    assert heads.gates[0].index.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert dict(heads.attributes) == {"blocks.1.attn.num_heads": 1}


class Swapped(nets.Attention):
    """The layer called q computes the values."""

    def forward(self, x: Tensor) -> Tensor:
        v, k, q = (f(x).unflatten(-1, (-1, 3)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_the_value_projection_is_read_off_the_graph_not_off_its_name() -> None:
    (heads, *_) = find(nn.Sequential(Swapped(12, 4), nn.Linear(12, 3)), torch.randn(2, 5, 12)).values()
    assert heads.name == "0"
    assert names(heads.gates) == ["0.q.weight", "0.q.bias"]


def test_hugging_face_attention_names_its_heads_and_width() -> None:
    found = find(nn.Sequential(nets.BertAttention(), nn.Linear(8, 2)), torch.randn(2, 5, 8))
    attributes = {"0.num_attention_heads": 1, "0.all_head_size": 3}
    assert {n: dict(s.attributes) for n, s in found.items()} == {"0": attributes}


def test_a_unit_of_grouped_query_attention_is_a_key_value_head_with_its_query_heads() -> None:
    found = find(nn.Sequential(Grouped(), nn.Linear(12, 3)), SEQUENCE)
    assert list(found) == ["0", "0.proj"]
    heads = found["0"]
    assert (heads.kind, heads.units) == ("heads", 2)
    both = ["weight", "bias"]
    assert names(heads.producers) == [f"0.{layer}.{leaf}" for layer in "qkv" for leaf in both]
    assert names(heads.gates) == ["0.v.weight", "0.v.bias"]
    assert heads.producers[0].index.tolist() == [list(range(6)), list(range(6, 12))]
    assert heads.producers[2].index.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert heads.consumers[0].index.tolist() == [list(range(6)), list(range(6, 12))]
    assert dict(heads.attributes) == {"0.num_heads": 2, "0.num_kv_heads": 1}


def test_concatenation_offsets_and_norms_before_the_reader() -> None:
    found = find(nets.Dense())
    assert summary(nets.Dense()) == [
        ("stem", "channels", 4),
        ("conv1", "channels", 6),
        ("conv2", "channels", 5),
    ]
    conv1 = {m.tensor: m for m in (*found["conv1"].consumers, *found["conv1"].norms)}
    assert conv1["conv2.weight"].index.flatten().tolist() == [4, 5, 6, 7, 8, 9]
    assert conv1["norm2.weight"].index.flatten().tolist() == [4, 5, 6, 7, 8, 9]
    assert conv1["norm2.weight"].size == 10
    assert conv1["head.weight"].index.flatten().tolist() == [9, 10, 11, 12, 13, 14]


def test_gate_of_a_producer_that_is_also_read_without_a_norm() -> None:
    # conv1 goes through norm2 to conv2 and bare to the head: both parts of its gate are needed
    gates = names(find(nets.Dense())["conv1"].gates)
    assert gates == ["norm2.weight", "norm2.bias", "conv1.weight"]
    assert names(find(nets.Dense())["conv2"].gates) == ["conv2.weight", "conv2.bias"]


class PreActivation(nn.Module):
    """A residual stream that only BatchNorms read: scaling it changes nothing, its rows would score zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1, self.conv1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv1(F.relu(self.norm1(x)))
        return self.conv2(F.relu(self.norm2(x)))


def test_a_stream_that_only_norms_read_is_gated_by_those_norms() -> None:
    model = nets.settle(PreActivation()).double()
    x = nets.images().double()
    stem = find(model, x)["stem"]
    assert names(stem.gates) == ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"]
    products = _gradients(model, x)
    columns = _unit_sums(stem.consumers, products)
    assert torch.allclose(_unit_sums(stem.gates, products), columns, rtol=1e-9)
    rows = _unit_sums(stem.producers, products)
    assert float(rows.abs().max()) < 1e-3 * float(columns.abs().max())  # what is left is BatchNorm's eps


def _gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.train()
    model(x).square().sum().backward()
    return {name: (p * p.grad).detach() for name, p in model.named_parameters()}


def _unit_sums(members: tuple[Member, ...], products: dict[str, Tensor]) -> Tensor:
    parts = [products[m.tensor].movedim(m.dim, 0)[m.index].flatten(1).sum(1) for m in members]
    return torch.stack(parts).sum(0)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (nets.mlp()[:1].append(nn.ReLU()).append(nn.Linear(8, 3)), ["0"]),
        (nets.ResNet(), ["conv1"]),
        (nets.ViT(), ["blocks.0.attn", "blocks.1.attn"]),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)), ["0"]),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)), ["0"]),
    ],
    ids=["relu", "batchnorm", "value", "pool-batchnorm", "depthwise-batchnorm"],
)
def test_gates_equal_the_consumers_column_sums(model: nn.Module, names: list[str]) -> None:
    # a gate on the pre-activation equals one on the output where everything between them is homogeneous
    model = nets.settle(copy.deepcopy(model)).double()
    x = torch.randn(4, 6).double() if isinstance(model, nn.Sequential) and isinstance(model[0], nn.Linear) else None
    x = nets.images().double() if x is None else x
    found = find(model, x)
    products = _gradients(model, x)
    for name in names:
        rows, columns = (_unit_sums(m, products) for m in (found[name].gates, found[name].consumers))
        assert torch.allclose(rows, columns, rtol=1e-9, atol=1e-12 * float(columns.abs().max()))


# ---- what is left alone, and why


class Normed(nn.Module):
    """conv -> `middle` -> conv -> pool."""

    def __init__(self, middle: nn.Module, *, groups: int = 1) -> None:
        super().__init__()
        self.a, self.middle = nn.Conv2d(3, 8, 1), middle
        self.b = nn.Conv2d(8, 4, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.middle(self.a(x))).mean((2, 3))


class Fn(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[operator,no-any-return]


def shuffle(x: Tensor) -> Tensor:
    return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def pad(x: Tensor) -> Tensor:
    return F.pad(x[:, 2:], (0, 0, 0, 0, 1, 1))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.b(F.relu(self.a(x)))))))


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, object]:
        hidden = F.relu(self.a(x))
        return {"logits": self.b(hidden), "hidden": [hidden]}


class SkipInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x.tanh() + self.a(x))


class FusedQKV(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads = nn.Linear(12, 36), nn.Linear(12, 12), 4

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 3)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TalkingHeads(FusedQKV):
    """Scores of all heads are mixed: heads of queries and keys are not those of values, but qkv has as many of each."""

    def __init__(self) -> None:
        super().__init__()
        self.talk = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 3)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = self.talk((q @ k.transpose(-1, -2)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class CrossCovariance(FusedQKV):
    """Channels of queries against channels of keys, in every head, with a temperature of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 3)).permute(2, 0, 3, 4, 1).unbind(0)
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2) * self.temperature).softmax(-1)
        return self.proj((weights @ v).permute(0, 3, 1, 2).flatten(2))


class Grouped(nn.Module):
    """Several query heads share one key and value head."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.q, self.proj = nn.Linear(12, 12), nn.Linear(12, 12)
        self.k, self.v = nn.Linear(12, 3 * groups), nn.Linear(12, 3 * groups)
        self.num_heads, self.num_kv_heads = 4, groups

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 3)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (self.repeat(t, self.num_heads // self.num_kv_heads) for t in (k, v))
        return self.attend(q, k, v)

    def repeat(self, x: Tensor, times: int) -> Tensor:
        return x.repeat_interleave(times, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Interleaved(Grouped):
    """Query heads 0 and 2 share a key and value head: not the order that grouped-query attention has."""

    def repeat(self, x: Tensor, times: int) -> Tensor:
        return x.repeat(1, times, 1, 1)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * self.scale)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    model[2].weight = model[0].weight
    return model


def no_heads() -> nn.Module:
    attn = nets.Attention(12, 4)
    del attn.num_heads
    return nn.Sequential(attn)


def glu() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.GLU(), nn.Linear(4, 3))


SEQUENCE = torch.randn(2, 5, 12)


@pytest.mark.parametrize("kind", [TalkingHeads, CrossCovariance])
def test_heads_that_are_mixed_or_crossed(kind: type[FusedQKV]) -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), kind(), nn.Linear(12, 2))
    heads = find(model, SEQUENCE)["2"]
    assert (heads.kind, heads.units) == ("heads", 4)
    rows = next(m for m in heads.producers if m.tensor == "2.qkv.weight")
    assert rows.index[1].tolist() == [*range(3, 6), *range(15, 18), *range(27, 30)]
    assert any(m.tensor == "2.temperature" for m in heads.members) == (kind is CrossCovariance)


@pytest.mark.parametrize(
    ("model", "x", "name", "reason"),
    [
        (nets.mlp(), torch.zeros(2, 6), "4", "feeds the model's output"),
        (nn.Sequential(nn.Linear(6, 4), nn.Softmax(-1)), torch.zeros(2, 6), "0", "softmax that is no attention"),
        (TwoOutputs(), torch.randn(2, 6), "a", "feeds the model's output"),
        (SkipInput(), torch.randn(2, 6), "a", "combined with the model's input"),
        (Normed(Fn(lambda x: x + x.logsumexp(1, keepdim=True))), None, "a", "logsumexp, which mixes units"),
        (Normed(Fn(lambda x: x.softmax(1))), None, "a", "softmax that is no attention"),
        (Normed(Fn(lambda x: x / x.amax(1, keepdim=True))), None, "a", "amax, which mixes units"),
        (Normed(Fn(lambda x: x - x.cumsum(1))), None, "a", "cumsum, which mixes units"),
        (Normed(Fn(lambda x: torch.fft.fft(x, dim=1).real)), None, "a", "_fft_r2c, which is not followed"),
        (tied(), torch.randn(2, 6), "0", "combined with the model's input"),
        (Grouped(1), SEQUENCE, "k", "a single unit"),
        (nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 3)), torch.randn(2, 6), "0", "a single unit"),
    ],
)
def test_skipped_with_a_reason(model: nn.Module, x: Tensor | None, name: str, reason: str) -> None:
    more = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))  # something to find beside it

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m, self.more = model, more

        def forward(self, x: Tensor) -> tuple[object, Tensor]:
            return self.m(x), self.more(x.new_ones(1, 4))

    found = find_structures(Beside(), nets.images() if x is None else x)
    full = f"m.{name}" if name else "m"
    assert full in found.skipped, (found.skipped, [s.name for s in found.structures])
    assert (
        reason.replace("'b'", "'m.b'").replace("'middle'", "'m.middle'").replace("'0'", "'m.0'") in found.skipped[full]
    )
    assert not any(full in s.modules() for s in found.structures)
    assert "more.0" in [s.name for s in found.structures]


# ---- couplings, each found and proven


@pytest.mark.parametrize(
    ("model", "x", "name", "units", "members"),
    [
        (Normed(nn.GroupNorm(4, 8)), None, "a", 4, {"a.weight": 2, "middle.weight": 2, "b.weight": 2}),
        (Normed(nn.BatchNorm2d(8, affine=False)), None, "a", 8, {"a.weight": 1, "b.weight": 1}),
        (Normed(nn.InstanceNorm2d(8)), None, "a", 8, {"a.weight": 1, "b.weight": 1}),
        (Normed(nn.InstanceNorm2d(8, affine=True)), None, "a", 8, {"a.weight": 1, "middle.weight": 1, "b.weight": 1}),
        (Normed(nn.ReLU(), groups=2), None, "a", 4, {"a.weight": 2, "b.weight": 1}),
        (Normed(nn.ConvTranspose2d(8, 8, 1)), None, "a", 8, {"a.weight": 1, "middle.weight": 1}),
        (Normed(nn.ConvTranspose2d(8, 8, 1)), None, "middle", 8, {"middle.weight": 1, "b.weight": 1}),
        (Normed(Fn(shuffle)), None, "a", 4, {"a.weight": 2, "b.weight": 2}),
        (Normed(nn.ChannelShuffle(2)), None, "a", 4, {"a.weight": 2, "b.weight": 2}),
        (Normed(Fn(lambda x: x.flip(1))), None, "a", 8, {"a.weight": 1, "b.weight": 1}),
        (Normed(Fn(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1))), None, "a", 4, {"a.weight": 2, "b.weight": 2}),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.PixelShuffle(2), nn.Conv2d(2, 4, 1)), None, "0", 2, {"0.weight": 4}),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.PixelUnshuffle(2), nn.Conv2d(16, 4, 1)), None, "0", 4, {"2.weight": 4}),
        (Twice(), torch.randn(2, 6), "a", 8, {"a.weight": 1, "b.weight": 1, "c.weight": 1}),
        (glu(), torch.randn(2, 6), "0", 4, {"0.weight": 2, "2.weight": 1}),
        (no_heads(), SEQUENCE, "0", 4, {"0.q.weight": 3, "0.proj.weight": 3}),
        (Interleaved(), SEQUENCE, "", 2, {"q.weight": 6, "k.weight": 3, "v.weight": 3, "proj.weight": 6}),
        (Scaled(), None, "a", 8, {"a.weight": 1, "scale": 1, "b.weight": 1}),
    ],
)
def test_found_with_every_tensor_it_lies_in(
    model: nn.Module, x: Tensor | None, name: str, units: int, members: dict[str, int]
) -> None:
    found = find(model, x)
    structure = found[name or "q"]
    assert structure.units == units
    widths = {m.tensor: m.index.shape[1] for m in structure.members}
    assert {tensor: widths[tensor] for tensor in members} == members


# ---- looking changes nothing


def test_the_model_is_left_as_it_was() -> None:
    model = nets.settle(nets.ResNet())
    model.train()
    model.bn1.eval()
    model.stem.weight.requires_grad_(False)
    model(nets.images()).sum().backward()
    before = copy.deepcopy(model.state_dict())
    objects = [id(p) for p in model.parameters()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    x = nets.images()
    state = torch.get_rng_state()
    first = find(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, nets.images())
    assert x.grad is None
    assert not x.requires_grad
    assert [id(p) for p in model.parameters()] == objects
    assert not model.stem.weight.requires_grad
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)
    assert not any(m._forward_hooks for m in model.modules())
    assert list(first) == ["stem", "conv1"]  # a frozen stem is found too


def test_found_under_no_grad_in_half_precision_and_channels_last() -> None:
    model = nets.ResNet().bfloat16().to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert list(find(model, nets.images().bfloat16())) == ["stem", "conv1"]


def test_inputs_as_tuple_and_dict() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.a, self.b = nn.Embedding(7, 6), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
            return self.b(F.relu(self.a(self.embed(ids) * scale)))

    ids, scale = torch.tensor([[1, 2]]), torch.ones(1, 2, 1)
    assert list(find(Two(), (ids, scale))) == list(find(Two(), {"scale": scale, "ids": ids})) == ["embed", "a"]


def test_a_stream_of_two_halves_is_two_structures_with_names_of_their_own() -> None:
    found = find(nets.CatAdd())
    assert [(s.name, s.units, s.modules()) for s in found.values()] == [
        ("a", 4, ("a", "c")),
        ("b", 6, ("b", "c")),
    ]
    assert found["b"].consumers[0].index.flatten().tolist() == [4, 5, 6, 7, 8, 9]
    found = find(nets.CatAdd(first="c"))  # c produces units of both
    assert [(s.name, s.units, s.modules()) for s in found.values()] == [
        ("c", 4, ("c", "a")),
        ("b", 6, ("c", "b")),
    ]


def test_order_is_module_order_and_repeatable() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(weights=None)
    order = [name for name, _ in model.named_modules()]
    first, second = find(model, torch.randn(1, 3, 32, 32)), find(model, torch.randn(1, 3, 32, 32))
    assert list(first) == list(second) == sorted(first, key=order.index)
    assert len(first) == 12
    assert first["conv1"].modules() == ("conv1", "layer1.0.conv2", "layer1.1.conv2")


@pytest.mark.slow
def test_resnet50_is_found_completely() -> None:
    torchvision = pytest.importorskip("torchvision")
    found = find_structures(torchvision.models.resnet50(weights=None), torch.randn(1, 3, 64, 64))
    assert len(found.structures) == 37  # 32 inner, 4 stage streams, the stem
    assert dict(found.skipped) == {"fc": "it feeds the model's output"}


# ---- names and errors


def test_include_and_exclude_match_structures_and_their_producers() -> None:
    x = nets.images()
    assert list(find(nets.ResNet(), x, include=("conv*",))) == ["stem", "conv1"]  # conv2 produces "stem" too
    assert list(find(nets.ResNet(), x, include=("conv1",))) == ["conv1"]
    assert list(find(nets.ResNet(), x, exclude=("conv2",))) == ["conv1"]
    assert list(find(nets.ViT(), x, include=("*.attn",), exclude=("blocks.0.*",))) == ["blocks.1.attn"]
    assert list(find(nets.ViT(), x, include=("blocks.0.attn.q",))) == ["blocks.0.attn"]
    assert list(find(nets.ResNet(), x, exclude=("head",))) == ["stem", "conv1"]  # skipped anyway


@pytest.mark.parametrize(
    ("call", "facts"),
    [
        ({"include": ("conv9",)}, ("include", "'conv9'", "nearest", "'conv")),
        ({"exclude": ("stm",)}, ("exclude", "'stm'", "nearest", "'stem'")),
        ({"include": ("head",)}, ("include", "'head'", "(head: it feeds the model's output)")),
    ],
)
def test_patterns_that_match_nothing(call: dict[str, tuple[str, ...]], facts: tuple[str, ...]) -> None:
    with refused(*facts):
        find_structures(nets.ResNet(), nets.images(), **call)


class _Only(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def test_nothing_to_prune_at_all() -> None:
    with refused("fc", "output"):
        find_structures(_Only(), torch.zeros(1, 2))


def test_wrong_example_input_and_wrappers() -> None:
    with refused("Sequential", "example input", "shape"):
        find_structures(nets.mlp(), torch.zeros(2, 7))
    with refused("DataParallel", ".module"):
        find_structures(nn.DataParallel(nets.mlp()), torch.zeros(2, 6))
    with refused("OptimizedModule", "._orig_mod"):
        find_structures(torch.compile(nets.mlp()), torch.zeros(2, 6))


class Branches(nn.Module):
    """Which layer reads the hidden one depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.a(x))
        return self.b(hidden) if x.sum() > 0 else self.c(hidden)


class Sometimes(Branches):
    """A layer in the middle that some inputs skip."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.a(x))
        return self.c(self.b(hidden) if x.sum() > 0 else hidden)


def test_models_that_one_example_cannot_show() -> None:
    with refused("Branches", "'b'", "dynamic control flow"):
        find_structures(Branches(), torch.ones(2, 6))
    for example in (torch.ones(2, 6), -torch.ones(2, 6)):  # whichever way the example goes
        with refused("Sometimes", "'b'", "dynamic control flow"):
            find_structures(Sometimes(), example)
    with refused("model", "cpu", "example input", "meta"):
        find_structures(nets.mlp(), torch.ones(2, 6, device="meta"))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_models_that_cannot_be_copied_or_run_are_refused_by_name() -> None:
    scripted = torch.jit.trace(nets.mlp(), torch.ones(2, 6))
    with refused("torch.jit"):
        find_structures(scripted, torch.ones(2, 6))
    mixed = nets.mlp()
    mixed[0].to("meta")
    with refused("a part of the model", "meta device"):
        find_structures(mixed, torch.ones(2, 6, device="meta"))
    diverged = nets.mlp()
    diverged[0].weight.data.fill_(torch.nan)
    with refused("output", "not finite"):
        find_structures(diverged, torch.ones(2, 6))


class Auxiliary(nn.Module):
    """A second head that only training runs, as GoogLeNet has."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.head, self.aux = nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> object:
        hidden = self.drop(F.relu(self.a(x)))
        return (self.head(hidden), self.aux(hidden)) if self.training else self.head(hidden)


def test_parts_that_only_training_runs_are_seen() -> None:
    model = Auxiliary().eval()
    assert names(find(model, torch.ones(2, 6))["a"].consumers) == ["head.weight", "aux.weight"]
    assert not model.training


@pytest.mark.parametrize("kind", ["dynamic", "eager"])
def test_quantised_modules_are_refused(kind: str) -> None:
    if kind == "dynamic":
        quantized = pytest.importorskip("torch.ao.nn.quantized.dynamic")
        layer = quantized.Linear(8, 3)
    else:
        layer = nn.Linear(8, 3)
        layer.weight = nn.Parameter(torch.zeros(3, 8, dtype=torch.int8), requires_grad=False)
    with refused("'1'", "quantised Linear"):
        find_structures(nn.Sequential(nn.Linear(6, 8), layer), torch.ones(2, 6))


def test_outputs_repeat_for_a_model_that_draws_and_writes() -> None:
    class Draws(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return x.add_(torch.rand(3)), {"ids": torch.zeros(1, dtype=torch.int64)}

    x = torch.zeros(3)
    (first,), (second,) = outputs(Draws(), x), outputs(Draws(), x)
    assert torch.equal(first, second)
    assert not x.any()


# ---- the proof: what one example, one even split, a small scale or an empty output hides


class Body(nn.Module):
    """a -> relu -> something -> b, with a clean pair c -> d behind it."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda h: h, width: int = 9) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(4, width), nn.Linear(width, 5), between
        self.c, self.d = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.between(torch.relu(self.a(x)))
        out: Tensor = self.d(torch.relu(self.c(self.b(hidden))))
        return out


def _gated(hidden: Tensor) -> Tensor:
    return hidden * torch.sigmoid(hidden.amax(1, keepdim=True))


@pytest.mark.parametrize(
    "between", [_gated, lambda h: h + 1e-8 * h.amax(1, keepdim=True)], ids=["gate", "small constant"]
)
@pytest.mark.parametrize("example", [torch.zeros(3, 4), torch.linspace(-1, 1, 12).view(3, 4)], ids=["zeros", "numbers"])
def test_a_coupling_that_is_hidden_costs_its_structure_alone(
    between: Callable[[Tensor], Tensor], example: Tensor
) -> None:
    torch.manual_seed(0)
    found = find_structures(Body(between), example)
    assert [s.name for s in found.structures] == ["b", "c"]
    assert "amax, which mixes units" in found.skipped["a"]


def test_units_that_are_rolled_cannot_be_cut() -> None:
    found = find_structures(Body(lambda h: h.roll(2, 1)), torch.ones(3, 4))
    assert [s.name for s in found.structures] == ["b", "c"]
    assert "does not compute what the masked one does" in found.skipped["a"]


def test_the_callers_random_numbers_are_left_alone() -> None:
    model, state = nets.mlp(), torch.get_rng_state()
    find_structures(model, torch.ones(2, 6))
    assert torch.equal(state, torch.get_rng_state())


class Scaled(Body):
    """A branch whose scale is tiny, or zero, in front of a head that starts at zero."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), scale))
        nn.init.zeros_(self.d.weight)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.a(x))
        leak = self.scale * hidden.amax(1, keepdim=True)
        out: Tensor = self.d(torch.relu(self.c(self.b(hidden) + leak)))
        return out


@pytest.mark.parametrize("scale", [1e-6, 1e-12, 0.0])
def test_a_leak_behind_a_small_scale_and_a_dead_head_is_seen(scale: float) -> None:
    found = find_structures(Scaled(scale), torch.ones(3, 4))
    assert [s.name for s in found.structures] == ["b", "c"]  # b meets a single number, which all its units take
    assert "a" in found.skipped


class Single(Body):
    """Its last layers have a kernel for float32 alone."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.b(self.between(torch.relu(self.a(x))))
        if hidden.dtype != torch.float32:
            raise RuntimeError("expected Float, got Double")
        return self.d(torch.relu(self.c(hidden)))


def test_a_kernel_without_float64_is_proven_in_float32_and_it_is_said() -> None:
    torch.manual_seed(0)
    x = torch.ones(3, 4)
    for model, names in ((Single(), ["a", "b", "c"]), (Single(_gated), ["b", "c"]), (Single(_rolled), ["b", "c"])):
        with pytest.warns(UserWarning, match="float32"):
            found = find_structures(model, x)
        assert [s.name for s in found.structures] == names
        for fact in ("float32", "0.0001", "expected Float, got Double"):
            assert fact in found.proof
            assert fact in repr(found)
    model = Single()
    dense = copy.deepcopy(model)
    keeps = [torch.arange(s.units) % 3 > 0 for s in find_structures(Body(), x).structures]
    mask_units(dense, find_structures(Body(), x).structures, keeps)
    shrink(model, find_structures(Body(), x).structures, keeps, example_input=x)
    assert model.a.out_features == 6
    torch.testing.assert_close(model(x), dense(x))
    with refused("'a'", "does not compute"):
        wrong = Single(_rolled)
        shrink(wrong, find_structures(Body(), x).structures, keeps, example_input=x)
    assert find_structures(Body(), x).proof == ""


def _rolled(hidden: Tensor) -> Tensor:
    return hidden.roll(2, 1)


class Detector(Body):
    """Returns what it is sure of: nothing."""

    def forward(self, x: Tensor) -> Tensor:
        score = super().forward(x)
        return score[score[:, 0] > 1e9]


def test_an_empty_output_hides_nothing() -> None:
    assert [s.name for s in find_structures(Detector(), torch.ones(3, 4)).structures] == ["a", "b", "c"]
    assert [s.name for s in find_structures(Detector(_gated), torch.ones(3, 4)).structures] == ["b", "c"]


class Best(Body):
    """Answers by what rounding decides, as detectors do that sort boxes of equal scores."""

    def forward(self, x: Tensor) -> Tensor:
        score = super().forward(x)
        return torch.sign(3 * score - score - score - score)


def test_answers_that_rounding_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 4)
    model, wrong = Best(width=64), Best(_rolled, width=64)
    model.d = wrong.d = nn.Linear(7, 40)
    assert [s.name for s in find_structures(model, x).structures] == ["a", "b", "c"]
    assert [s.name for s in find_structures(wrong, x).structures] == ["b", "c"]
    monkeypatch.setattr("gsprune.surgery.shrink._decide_alike", lambda *_: False)
    assert "does not compute" in " ".join(find_structures(model, x).skipped.values())


class Few(Body):
    """Its last layers get the rows that are large enough."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.b(torch.relu(self.a(x)))
        out: Tensor = self.d(torch.relu(self.c(rows[rows[:, 0] > rows[0, 0]])))
        return out


def test_layers_before_a_choice_are_proven_though_it_chooses_otherwise() -> None:
    torch.manual_seed(0)
    found = find_structures(Few(), torch.randn(50, 4))
    assert "a" in {s.name for s in found.structures}


class Empty(Body):
    """A head that gets none of the rows."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.b(torch.relu(self.a(x)))
        out: Tensor = self.d(torch.relu(self.c(rows[rows[:, 0] > 1e9])))
        return out


def test_what_the_example_does_not_reach_is_said_to_be_unproven() -> None:
    found = find_structures(Empty(), torch.ones(3, 4))
    assert [s.name for s in found.structures] == ["a"]
    assert "does not reach" in found.skipped["c"]
    with refused("Sequential", "0", "example"):
        Pruner(nets.mlp(), Magnitude(), structured=True, target_sparsity=0.5, example_input=torch.ones(0, 6))


class Pairs(nn.Module):
    """Cut to whole quarters it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.a(x))
        hidden = hidden.view(len(x), 4, -1).flatten(1)
        out: Tensor = self.d(torch.relu(self.c(torch.relu(self.b(hidden)))))
        return out


class Fixed(Pairs):
    """A width that the forward pass insists on, by a name that no module is told."""

    def forward(self, x: Tensor) -> Tensor:
        return self.d(torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x)) + x.new_ones(size=(2, 8)))))))


def test_a_width_that_only_some_cuts_leave_possible() -> None:
    found = find(Pairs(), torch.ones(2, 4))
    assert [(s.name, s.units) for s in found.values()] == [("a", 2), ("b", 6), ("c", 16)]
    assert found["a"].producers[0].index.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    fixed = find_structures(Fixed(), torch.ones(2, 4))
    assert [s.name for s in fixed.structures] == ["b", "c"]
    assert "does not run" in fixed.skipped["a"]


@pytest.mark.parametrize(
    ("wrap", "units"),
    [
        (nn.utils.parametrizations.weight_norm, 9),
        (nn.utils.weight_norm, 9),
        (nn.utils.parametrizations.spectral_norm, None),
        (nn.utils.spectral_norm, None),
        (lambda m: torch.nn.utils.prune.l1_unstructured(m, "weight", 2), None),
        (lambda m: torch.nn.utils.prune.l1_unstructured(m, "bias", 2), None),
    ],
    ids=["weight_norm", "old weight_norm", "spectral_norm", "old spectral_norm", "prune", "pruned bias"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_computed_weight_is_cut_with_what_it_is_computed_from_or_named(
    wrap: Callable[..., object], units: int | None
) -> None:
    model = Body()
    wrap(model.a)
    found = find_structures(model, torch.ones(2, 4))
    offered = {s.name: s.units for s in found.structures}
    assert {"b": 5, "c": 7}.items() <= offered.items()
    assert offered.get("a") == units
    assert units is not None or "a" in found.skipped


def test_an_operation_that_cannot_be_followed_costs_what_passes_it() -> None:
    found = find_structures(Body(lambda h: torch.fft.fft(h).real), torch.ones(2, 4))
    assert [s.name for s in found.structures] == ["b", "c"]
    assert "not followed" in found.skipped["a"]


def test_channels_that_are_shuffled_are_found_by_pairs() -> None:
    shuffle = pytest.importorskip("torchvision").models.ShuffleNetV2
    model = shuffle([2, 1, 1], [8, 16, 32, 64, 64], num_classes=4)
    found = find(model, torch.randn(1, 3, 64, 64))
    assert {"conv1.0", "stage2.1.branch2.0", "conv5.0"} <= set(found)
    assert any(s.producers[0].index.shape[1] > 1 for s in found.values())


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(4, 8, bidirectional=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(x)[0])
        return out


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_gates_of_a_recurrent_unit_go_together(kind: type[nn.RNNBase], gates: int) -> None:
    rnn = find(Recurrent(kind), torch.ones(5, 2, 4))["rnn"]
    assert (rnn.kind, rnn.units) == ("neurons", 8)
    widths = {(m.tensor, m.dim): m.index.shape[1] for m in rnn.members}
    for way in ("l0", "l0_reverse"):  # one width for both directions
        assert widths[f"rnn.weight_ih_{way}", 0] == widths[f"rnn.bias_hh_{way}", 0] == gates
        assert widths[f"rnn.weight_hh_{way}", 1] == 1
    assert rnn.consumers[-1].index.tolist() == [[u, u + 8] for u in range(8)]


def test_complex_layers_are_named() -> None:
    layers = nn.Linear(4, 6, dtype=torch.complex64), nn.Linear(6, 2, dtype=torch.complex64)
    with refused("0: ", "complex"):
        find_structures(nn.Sequential(*layers), torch.ones(2, 4, dtype=torch.complex64))


def test_what_is_found_reads_in_a_few_lines() -> None:
    found = find_structures(Body(), torch.ones(2, 4))
    assert repr(found).splitlines() == [
        "Found 3 structures (21 neurons), left out 0, skipped 1",
        "  a: 9 neurons",
        "  b: 5 neurons",
        "  c: 7 neurons",
        "  - d: it feeds the model's output",
    ]
    assert repr(found.structures[0]) == "Structure('a': 9 neurons; 2 producing, 0 norm, 1 reading tensors)"
    assert repr(found.structures[0].consumers[0]) == "Member('b.weight', dim 1: 9 units x 1 of 9 positions)"
    assert "<td>a</td><td>9</td><td>neurons</td>" in found._repr_html_()
    many = replace(found, structures=found.structures * 20)
    assert len(repr(many).splitlines()) == 11
    assert "... 52 more" in repr(many)


class Window(nn.Module):
    """As a window attention's mask: a slice of a new tensor may be empty on a small picture."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.zeros(8)
        scale[0:0] = 3.0
        return self.b(self.a(x) * (1 + scale))


def test_a_part_without_entries_is_written_into_a_new_tensor() -> None:
    assert {name: s.units for name, s in find(Window(), torch.ones(2, 4)).items()} == {"a": 8}


class Masking(nn.Module):
    """In training a token stands for every second row of a normed stream, as for masked frames of speech."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.enter, self.norm, self.leave = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.block = nets.Feedforward(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        if self.training:
            x = torch.where(torch.arange(x.shape[1])[:, None] % 2 == 0, self.token, x)
        return self.leave(self.norm(self.block(x)))


def test_a_token_that_only_training_reads_is_masked_and_cut_with_its_stream() -> None:
    torch.manual_seed(0)
    model, x = Masking(), torch.randn(2, 6, 4)
    (stream,) = [s for s in find_structures(model, x).structures if s.kind == "residual"]
    assert stream.norms[-1].tensor == "token"
    keep = torch.arange(8) % 3 != 0
    masked = copy.deepcopy(model)
    mask_units(masked, [stream], [keep])
    shrink(model, [stream], [keep], example_input=x)
    assert model.token.shape == (1, 1, 5)
    torch.testing.assert_close(model.train()(x), masked.train()(x))
    torch.testing.assert_close(model.eval()(x), masked.eval()(x))


class Changing(nn.Module):
    """Puts another layer in the place of its own when it runs, as BigBird does for short texts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer: nn.Module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        if len(self.layer) < 4:  # type: ignore[arg-type]
            self.layer = nn.Sequential(*self.layer, nn.Linear(2, 2))  # type: ignore[misc]
        return self.layer(x)


def test_a_network_that_changes_as_it_runs_has_to_have_run() -> None:
    model, x = Changing(), torch.randn(3, 4)
    with refused("Changing", "as it runs", "once"):
        find_structures(model, x)
    model(x)
    assert [s.units for s in find_structures(model, x).structures] == [6, 2]


class Largest(nn.Module):
    """Computes with the largest number of its type, which overflows in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        large = torch.finfo(x.dtype).max / 1e38
        return self.last(torch.relu(self.first(x)) * large * large)


def test_what_is_not_finite_in_float64_is_proven_in_float32() -> None:
    torch.manual_seed(0)
    model, x = Largest(), torch.randn(3, 4)
    with warned("float32", "not finite"):
        (hidden,) = find_structures(model, x).structures
    shrink(model, [hidden], [torch.arange(6) < 4], example_input=x)
    assert model.first.out_features == 4
    diverged = Largest()
    nn.init.constant_(diverged.last.bias, torch.nan)
    with refused("not finite"):
        shrink(diverged, [hidden], [torch.arange(6) < 4], example_input=x)
