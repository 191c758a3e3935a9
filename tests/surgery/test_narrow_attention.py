"""NarrowAttention: the same numbers as PyTorch's own before pruning, masked equals cut afterwards."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
from conformance import OUTPUT, Network, NetworkTester
from facts import refused
from torch import Tensor, nn

from gsprune.discovery.find import find_structures
from gsprune.structures.structure import Structure
from gsprune.surgery.narrow_attention import NarrowAttention, narrow
from gsprune.surgery.shrink import mask_units, shrink

N, T, S, WIDTH, HEADS = 3, 5, 7, 12, 4


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(**options: object) -> nn.MultiheadAttention:
    torch.manual_seed(3)
    made = nn.MultiheadAttention(WIDTH, HEADS, **options).double().eval()
    for leaf, parameter in made.named_parameters():
        if "bias" in leaf:  # PyTorch's are zero
            nn.init.normal_(parameter)
    return made


def narrowed(module: nn.MultiheadAttention) -> nn.MultiheadAttention:
    other = copy.deepcopy(module)
    narrow(other)
    assert list(other.state_dict()) == list(module.state_dict())
    return other


MASKS: dict[str, dict[str, object]] = {
    "none": {},
    "padding": {"key_padding_mask": torch.arange(S) >= torch.tensor([[7], [5], [2]])},
    "float padding": {"key_padding_mask": random(N, S, seed=9)},
    "bool": {"attn_mask": torch.ones(T, S, dtype=torch.bool).triu(2)},
    "float": {"attn_mask": random(T, S, seed=8)},
    "heads": {"attn_mask": random(N * HEADS, T, S, seed=7)},
    "both": {
        "attn_mask": torch.ones(T, S, dtype=torch.bool).triu(2),
        "key_padding_mask": torch.arange(S) >= torch.tensor([[7], [5], [2]]),
    },
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 10}], ids=["bias", "no bias", "kdim"])
def test_the_same_output_before_pruning(
    options: dict[str, object], masks: str, need_weights: bool, batch_first: bool
) -> None:
    dense = attention(batch_first=batch_first, **options)
    q, k, v = random(N, T, WIDTH), random(N, S, dense.kdim, seed=2), random(N, S, dense.vdim, seed=3)
    if not batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    expected, weights = dense(q, k, v, need_weights=need_weights, **MASKS[masks])
    out, seen = narrowed(dense)(q, k, v, need_weights=need_weights, **MASKS[masks])
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen, weights, rtol=1e-12, atol=1e-12)


def test_the_same_output_for_self_attention_causal_unbatched_and_weights_of_each_head() -> None:
    dense = attention(batch_first=True)
    small, x = narrowed(dense), random(N, T, WIDTH)
    causal = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
    for options in (
        {},
        {"attn_mask": causal, "is_causal": True, "need_weights": False},
        {"attn_mask": causal, "is_causal": True},
        {"average_attn_weights": False},
    ):
        for value in (x, x[0]):
            for a, b in zip(dense(value, value, value, **options), small(value, value, value, **options), strict=True):
                torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
    with refused("is_causal", "attn_mask"):
        small(x, x, x, is_causal=True)


def test_dropout_is_applied_in_training_only() -> None:
    small, x = narrowed(attention(batch_first=True, dropout=0.5)), random(N, T, WIDTH)
    for need_weights in (True, False):
        quiet = small.eval()(x, x, x, need_weights=need_weights)[0]
        assert torch.equal(quiet, small(x, x, x, need_weights=need_weights)[0])
        assert not torch.allclose(quiet, small.train()(x, x, x, need_weights=need_weights)[0])


def test_what_cannot_lose_heads() -> None:
    odd = nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True, batch_first=True)
    x = torch.randn(N, T, WIDTH)
    with refused("heads", "add_bias_kv", "add_zero_attn"):
        narrow(odd)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd, self.a, self.b = odd, nn.Linear(WIDTH, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.odd(x, x, x, need_weights=False)[0]).relu())

    found = find_structures(Net(), x)
    assert [s.name for s in found.structures] == ["odd.out_proj", "a"]
    assert "add_bias_kv" in found.skipped["odd"]


# ---- pruning

INPUT = "combined with the model's input"


class Cross(nn.Module):
    """Self-attention, then cross-attention to a memory of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.cross = nn.MultiheadAttention(WIDTH, HEADS, kdim=6, vdim=6, bias=False)
        self.out = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.own(x, x, x)[0]
        y, m = x.transpose(0, 1), memory.transpose(0, 1)
        return self.out(x + self.cross(y, m, m, need_weights=False)[0].transpose(0, 1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 20, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.out = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        y = self.out(self.encoder(x, src_key_padding_mask=padding))
        return y if padding is None else y * ~padding[:, :, None]


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Transformer(WIDTH, HEADS, 1, 1, 20, batch_first=True, norm_first=True)
        self.out = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(y.shape[1]).to(y)
        return self.out(self.net(x, y, tgt_mask=mask, tgt_is_causal=True))


PADDING = torch.arange(T) >= torch.tensor([[5], [4], [2]])


def heads(*names: str) -> list[tuple[str, str, int]]:
    return [(name, "heads", HEADS) for name in names]


LAYERS = [
    (f"encoder.layers.{i}.{part}", kind, units)
    for i in (0, 1)
    for part, kind, units in (("self_attn", "heads", HEADS), ("linear1", "neurons", 20))
]


class TestPyTorchsAttention(NetworkTester):
    networks: ClassVar = {
        "cross": Network(Cross, (random(N, T, WIDTH), random(N, S, 6)), heads("own", "cross"), {OUTPUT, INPUT}),
        "encoder": Network(Encoder, (random(N, T, WIDTH),), LAYERS, {OUTPUT, INPUT}, again=True, onnx=True),
        "padded encoder": Network(Encoder, (random(N, T, WIDTH), PADDING), LAYERS, {OUTPUT, INPUT}),
        "translator": Network(
            Translator, (random(N, S, WIDTH), random(N, T, WIDTH)), {"heads": 3, "neurons": 2}, {OUTPUT, INPUT}
        ),
    }


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    network = TestPyTorchsAttention.networks[name]
    return network.build().eval(), network.input()


def half(structures: tuple[Structure, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(6)
    return [torch.randperm(s.units, generator=generator) < (s.units + 1) // 2 for s in structures]


def test_a_head_has_its_rows_in_one_tensor_for_queries_keys_and_values() -> None:
    found = find_structures(*build("encoder"))
    heads = found.structures[0]
    both = ["encoder.layers.0.self_attn.in_proj_weight", "encoder.layers.0.self_attn.in_proj_bias"]
    assert [m.tensor for m in heads.producers] == both
    assert sorted(m.tensor for m in heads.gates) == sorted(both)
    assert heads.producers[0].index[1].tolist() == [3, 4, 5, 15, 16, 17, 27, 28, 29]
    assert {tuple(m.index[1].tolist()) for m in heads.gates} == {(27, 28, 29)}
    assert dict(heads.attributes) == {"encoder.layers.0.self_attn.num_heads": 1}


def test_only_some_layers_of_an_encoder_are_cut() -> None:
    model, x = build("padded encoder")
    structures = find_structures(model, x, include=("encoder.layers.1.self_attn",)).structures
    masked = copy.deepcopy(model)
    mask_units(masked, structures, half(structures))
    shrink(model, structures, half(structures), example_input=x)
    with torch.no_grad():
        torch.testing.assert_close(model(*x), masked(*x), rtol=1e-9, atol=1e-11)


def test_all_attentions_of_a_cut_network_are_narrow_and_one_head_may_be_left() -> None:
    model, x = build("encoder")
    structures = find_structures(model, x, include=("*self_attn",)).structures
    shrink(model, structures, half(structures), example_input=x)
    assert {type(m) for m in model.modules() if isinstance(m, nn.MultiheadAttention)} == {NarrowAttention}
    second = find_structures(model, x, include=("*self_attn",)).structures
    assert [s.units for s in second] == [2, 2]
    shrink(model, second, [torch.tensor([False, True])] * 2, example_input=x)
    assert [layer.self_attn.num_heads for layer in model.encoder.layers] == [1, 1]
    assert model(*x).isfinite().all()


def test_masks_for_the_dense_number_of_heads_and_nested_tensors_are_refused() -> None:
    small = narrowed(attention(batch_first=True))
    x = random(N, T, WIDTH)
    with refused("attn_mask", "4 masks", "15", "batch of 3"):
        small(x, x, x, attn_mask=random(15, T, T))
    nested = torch.nested.nested_tensor([x[0], x[1, :3]])
    with refused("nested", "key_padding_mask"):
        small(nested, nested, nested)
