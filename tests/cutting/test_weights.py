"""Single weights pruned after training: which, exactly how many, with what repair, and what is left alone."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from facts import refused, warned
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gsprune import Pruner, cut, cut_family, load_masks, save_masks
from gsprune.criteria import OBS, Abs, Criterion, Elementwise, Magnitude, Random, SparseGPT, Wanda
from gsprune.cutting.how_much import right_or_wrong
from gsprune.cutting.weights import prune_weights
from gsprune.ranking.patterns import Block
from gsprune.schedules import OneShot

DOUBLE = torch.float64
CRITERIA = [Wanda(), SparseGPT(), Magnitude(), Random(seed=3), Elementwise()]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def data(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    """Inputs whose features (the second axis of images, else the last) depend on three others and a little noise."""
    axis = 1 if len(shape) == 4 else -1
    x = random(*shape, seed=seed).movedim(axis, -1)
    mix = random(3, x.shape[-1], seed=99)
    return (x[..., :3] @ mix + 0.3 * x).movedim(-1, axis).to(dtype)


def mlp(dtype: torch.dtype = DOUBLE) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 6)).to(dtype)


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).double()  # fmt: skip


def labelled(x: Tensor, classes: int, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    return [(part, torch.arange(len(part)) % classes) for part in x.split(size)]


def pruned_shares(masks: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((~mask).double().mean()) for name, mask in masks.items()}


# ---- which weights


def test_wanda_keeps_the_best_of_every_row() -> None:
    model, x = nn.Sequential(nn.Linear(10, 6)).double(), data(50, 10)
    pruned = prune_weights(model, [x], Wanda(), sparsity=0.4, repair=False, held_back=0.02)
    scores = reference.wanda(model[0].weight.detach(), x[[i for i in range(50) if i != 25]])
    kept = [reference.select([row], 4)[0] for row in scores.tolist()]
    assert pruned.masks["0.weight"].tolist() == kept
    assert torch.equal(pruned.model[0].weight, model[0].weight * torch.tensor(kept))


@pytest.mark.parametrize("pattern", ["1x1", "2:4"])
def test_sparsegpt_is_the_surgeon_and_later_layers_read_what_the_pruned_ones_give(pattern: str) -> None:
    model, x = mlp(), data(60, 12)
    model[1], model[3] = nn.Tanh(), nn.Tanh()  # no input that is always 0, whose score is 0 whatever the weight
    pruned = prune_weights(model, [x], SparseGPT(block=8), sparsity=0.5, pattern=pattern, repair=False, held_back=0.01)
    rows = x[[i for i in range(60) if i != 30]]
    n_of_m = (2, 4) if pattern == "2:4" else None
    for i in (0, 2, 4):
        new, keep = reference.surgeon(
            model[i].weight.detach(), rows, damping=0.01, block=8, sparsity=0.5, n_of_m=n_of_m
        )
        assert torch.equal(pruned.masks[f"{i}.weight"], keep)
        torch.testing.assert_close(pruned.model[i].weight.detach(), new, rtol=1e-6, atol=1e-8)
        rows = (rows @ new.T + model[i].bias.detach()).tanh()


@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_the_count_is_exact_in_every_scope(criterion: Criterion, scope: Any) -> None:
    model = mlp()
    batches = labelled(data(64, 12), 6)
    pruned = prune_weights(model, batches, criterion, loss=F.cross_entropy, sparsity=0.3, scope=scope)
    masks = pruned.masks
    if scope == "global":
        total = sum(mask.numel() for mask in masks.values())
        assert sum(int((~mask).sum()) for mask in masks.values()) == math.floor(0.3 * total + 0.5)
        assert len(set(pruned_shares(masks).values())) > 1
    for mask in masks.values() if scope != "global" else ():
        counts = (~mask).sum(1) if scope == "row" else (~mask).sum().reshape(1)
        assert set(counts.tolist()) == {math.floor(0.3 * mask.numel() / len(counts) + 0.5)}
    assert pruned.report.sparsity == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
def test_2_4_is_what_the_pruner_calls_so(criterion: Criterion) -> None:
    """Of a convolution, blocks run along its input channels, at each position of the kernel."""
    model = conv_net()
    batches = labelled(data(24, 4, 6, 6), 4)
    pruned = prune_weights(model, batches, criterion, loss=F.cross_entropy, pattern="2:4")
    assert set(pruned.masks) == {"0.weight", "3.weight", "7.weight"}
    for name, mask in pruned.masks.items():
        blocks = Block(2, 4).to_groups(mask.int()).reshape(-1, 4)
        assert bool((blocks.sum(1) == 2).all()), name
        assert torch.equal(pruned.model.get_parameter(name) != 0, mask)
    by_channel = pruned.masks["0.weight"].permute(0, 2, 3, 1).reshape(-1, 4)
    assert bool((by_channel.sum(1) == 2).all())


@pytest.mark.parametrize("pattern", ["1x1", "2:4", "4x1", "2x2"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_magnitude_chooses_what_a_pruner_chooses(pattern: str, scope: str) -> None:
    model, x = conv_net(), data(24, 4, 6, 6)
    pruned = prune_weights(model, [x], Magnitude(), sparsity=0.5, pattern=pattern, scope=scope, repair=False)  # type: ignore[arg-type]
    twin = copy.deepcopy(model)
    scope = "local" if scope == "layer" else scope
    pruner = Pruner(twin, Magnitude(), target_sparsity=0.5, pattern=pattern, scope=scope, schedule=OneShot())  # type: ignore[arg-type]
    pruner.on_step_begin(0)
    assert all(torch.equal(pruned.masks[name], mask) for name, mask in pruner.masks().items())
    assert all(torch.equal(a, b) for a, b in zip(pruned.model.parameters(), twin.parameters(), strict=True))


def test_elementwise_sums_over_the_batches() -> None:
    model, batches = mlp(), labelled(data(48, 12), 6)
    pruned = prune_weights(model, batches, Elementwise(), loss=F.cross_entropy, sparsity=0.5, repair=False)
    score = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.dim() > 1}
    for x, y in batches:
        twin = copy.deepcopy(model)
        F.cross_entropy(twin(x), y).backward()
        for name in score:
            weight = twin.get_parameter(name)
            score[name] += (weight * weight.grad).abs().detach()
    kept = reference.select([s.flatten().tolist() for s in score.values()], 504)
    assert {name: mask.flatten().tolist() for name, mask in pruned.masks.items()} == dict(zip(score, kept, strict=True))


def test_without_labels_they_are_drawn_from_the_predictions() -> None:
    one, other = (prune_weights(mlp(), [data(40, 12)], Elementwise(), sparsity=0.5) for _ in range(2))
    assert one.report.sparsity == 0.5
    assert all(torch.equal(mask, other.masks[name]) for name, mask in one.masks.items())


@pytest.mark.parametrize("pattern", ["4x1", "1x4"])
def test_wanda_takes_tiles(pattern: str) -> None:
    model, x = mlp(), data(40, 12)
    pruned = prune_weights(model, [x], Wanda(), sparsity=0.5, pattern=pattern, scope="layer", exclude=["4"])
    mask = pruned.masks["0.weight"]
    tiles = mask.reshape(6, 4, 12).transpose(1, 2) if pattern == "4x1" else mask.reshape(24, 3, 4)
    assert set(tiles.sum(-1).flatten().tolist()) == {0, 4}


def test_the_linear_layer_of_gpt2_is_pruned_along_its_inputs() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    linear = nn.Linear(8, 6).double()
    turned = Conv1D(6, 8).double()
    turned.weight.data, turned.bias.data = linear.weight.data.T.clone(), linear.bias.data.clone()
    for criterion in (Wanda(), SparseGPT()):
        one, other = (
            prune_weights(nn.Sequential(layer), [data(40, 8)], criterion, pattern="2:4") for layer in (linear, turned)
        )
        assert torch.equal(one.masks["0.weight"], other.masks["0.weight"].T)
        torch.testing.assert_close(one.model[0].weight, other.model[0].weight.T)


def test_names_choose() -> None:
    model, x = mlp(), data(40, 12)
    pruned = prune_weights(model, [x], Wanda(), sparsity=0.5, exclude=["4"], include=["*"])
    assert set(pruned.masks) == {"0.weight", "2.weight"}
    assert torch.equal(pruned.model[4].weight, model[4].weight)


# ---- repair


@pytest.mark.parametrize("criterion", [Wanda(), Magnitude(), Elementwise(), SparseGPT()], ids=repr)
def test_repair_brings_the_outputs_nearer_on_fresh_data(criterion: Criterion) -> None:
    model, batches, fresh = mlp(), labelled(data(320, 12), 6), data(300, 12, seed=7)
    lost = {}
    for repair in (False, True):
        pruned = prune_weights(model, batches, criterion, loss=F.cross_entropy, sparsity=0.5, repair=repair)
        lost[repair] = float((pruned.model(fresh) - model(fresh)).detach().square().mean())
        assert all(torch.equal(pruned.model.get_parameter(name) != 0, mask) for name, mask in pruned.masks.items())
    assert lost[True] < (0.9 if isinstance(criterion, SparseGPT) else 0.6) * lost[False]


@pytest.mark.parametrize("criterion", [Wanda(), SparseGPT(), Magnitude()], ids=repr)
def test_no_layer_is_worse_on_held_back_samples(criterion: Criterion) -> None:
    for samples in (2, 5, 12, 100):
        layers = prune_weights(mlp(), [data(samples, 12)], criterion, sparsity=0.5).report.repair.layers
        assert len(layers) == 3
        assert all(layer.after <= layer.before for layer in layers), samples


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("criterion", [Wanda(), SparseGPT(), Elementwise()], ids=repr)
def test_narrow_networks_stay_narrow_and_get_nearer(criterion: Criterion, dtype: torch.dtype) -> None:
    model, batches = mlp(dtype), labelled(data(200, 12, dtype=dtype), 6, size=40)
    pruned = prune_weights(model, batches, criterion, loss=F.cross_entropy, sparsity=0.5)
    assert {p.dtype for p in pruned.model.parameters()} == {dtype}
    assert all(layer.after < layer.before for layer in pruned.report.repair.repaired)
    assert len(pruned.report.repair.repaired) == 3


@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
def test_one_sample_prunes_and_repairs_nothing(criterion: Criterion) -> None:
    model = mlp()
    pruned = prune_weights(model, labelled(data(1, 12), 6), criterion, loss=F.cross_entropy, sparsity=0.5)
    assert pruned.report.sparsity == 0.5
    assert all("one sample" in reason for reason in pruned.report.repair.left.values())
    assert len(pruned.report.repair.left) == 3
    if not isinstance(criterion, SparseGPT):
        for name, mask in pruned.masks.items():
            assert torch.equal(pruned.model.get_parameter(name), model.get_parameter(name) * mask)


@pytest.mark.parametrize("criterion", [Wanda(), SparseGPT(), Magnitude()], ids=repr)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_inputs(criterion: Criterion, value: float) -> None:
    model, x = mlp(), torch.full((30, 12), value, dtype=DOUBLE)
    pruned = prune_weights(model, [x], criterion, sparsity=0.5)
    assert pruned.report.sparsity == pytest.approx(0.5)
    torch.testing.assert_close(pruned.model(x), model(x), rtol=0.05, atol=0.05)


# ---- what is left, with reasons


class Crossed(nn.Module):
    """Self-attention, then attention to something else."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.other = nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.own(x, x, x, need_weights=False)[0]
        y = x.flip(1)
        return self.other(x, y, y, need_weights=False)[0]


@pytest.mark.parametrize("batch_first", [True, False])
def test_packed_attention(batch_first: bool) -> None:
    torch.manual_seed(0)
    model, x = Crossed(batch_first=batch_first).double(), data(40, 5, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruned = prune_weights(model, [x], Wanda(), pattern="2:4")
    assert set(pruned.masks) == {"own.in_proj_weight", "own.out_proj.weight", "other.out_proj.weight"}
    assert "one tensor" in pruned.report.skipped["other.in_proj_weight"]
    assert len(pruned.report.repair.repaired) == 3
    scores = reference.wanda(model.own.in_proj_weight.detach(), x[[i for i in range(40) if i % 5 != 2]].flatten(0, 1))
    kept = reference.select(scores.reshape(-1, 4).tolist()[:1], 2)
    assert pruned.masks["own.in_proj_weight"][0, :4].tolist() == kept[0]
    assert type(pruned.model.own) is nn.MultiheadAttention
    assert all(torch.equal(pruned.model.get_parameter(name) != 0, mask) for name, mask in pruned.masks.items())


def test_a_transformer_of_pytorch_with_padding() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).double().eval()
    padding = torch.zeros(30, 5, dtype=torch.bool)
    padding[::3, 3:] = True
    batch = {"src": data(30, 5, 8), "src_key_padding_mask": padding}
    pruned = prune_weights(model, [batch], SparseGPT(), sparsity=0.5)
    assert len(pruned.masks) == 8
    assert len(pruned.report.repair.repaired) == 8
    assert pruned.report.sparsity == 0.5


def test_an_encoder_decoder_that_reads_its_labels() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    tokens = torch.arange(96).view(12, 8) % 20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruned = prune_weights(model, [{"input_ids": tokens, "labels": tokens}], SparseGPT(), sparsity=0.5)
    assert {name for name in pruned.masks if "EncDecAttention" in name} == {
        f"decoder.block.0.layer.1.EncDecAttention.{part}.weight" for part in "qkvo"
    }
    assert pruned.report.sparsity == 0.5


class Odd(nn.Module):
    """A recurrent layer, experts in one tensor, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 8)
        self.experts = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(self.rnn(x)[0])
        return torch.einsum("ntk,eko->nto", y, self.experts)


def test_what_wanda_cannot_see_is_left_with_a_reason_and_a_warning() -> None:
    torch.manual_seed(0)
    model, x = Odd().double(), data(30, 4, 8)
    with warned("rnn.weight_ih_l0", "GRU"):
        pruned = prune_weights(model, [x], Wanda(), sparsity=0.5)
    assert set(pruned.masks) == {"fc.weight"}
    assert set(pruned.report.skipped) == {"rnn.weight_ih_l0", "rnn.weight_hh_l0", "experts"}
    assert torch.equal(pruned.model.rnn.weight_ih_l0, model.rnn.weight_ih_l0)
    assert "GRU" in repr(pruned)


def test_magnitude_prunes_what_cannot_be_repaired_and_says_so() -> None:
    torch.manual_seed(0)
    pruned = prune_weights(Odd().double(), [data(30, 4, 8)], Magnitude(), sparsity=0.5)
    assert set(pruned.masks) == {"rnn.weight_ih_l0", "rnn.weight_hh_l0", "experts", "fc.weight"}
    assert {layer.name for layer in pruned.report.repair.repaired} == {"fc.weight"}
    assert set(pruned.report.repair.left) == {"rnn.weight_ih_l0", "rnn.weight_hh_l0", "experts"}


def test_nothing_that_can_be_seen_is_refused() -> None:
    with refused("Wanda", "GRU", "Magnitude"):
        prune_weights(nn.GRU(4, 4), [data(5, 3, 4, dtype=torch.float32)], Wanda(), sparsity=0.5)


def test_embeddings_and_heads_tied_to_them_stay() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.fc, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.words.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.fc(self.words(x)))

    torch.manual_seed(0)
    model = Tied()
    with warned("embedding"):
        pruned = prune_weights(model, [torch.arange(36).view(4, 9) % 9], SparseGPT(), sparsity=0.5)
    assert set(pruned.masks) == {"fc.weight"}
    assert set(pruned.report.skipped) == {"words.weight", "head.weight"}
    assert pruned.model.head.weight is pruned.model.words.weight


def test_a_masked_weight_keeps_its_parametrization() -> None:
    class Masked(nn.Module):
        def __init__(self, mask: Tensor) -> None:
            super().__init__()
            self.register_buffer("mask", mask)

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.mask

    model, x = mlp(), data(40, 12)
    parametrize.register_parametrization(model[2], "weight", Masked(torch.rand(24, 24) < 0.7))
    with warned("2.parametrizations.weight.original"):
        pruned = prune_weights(model, [x], Wanda(), sparsity=0.5)
    assert set(pruned.masks) == {"0.weight", "4.weight"}
    by_size = prune_weights(model, [x], Magnitude(), sparsity=0.5, scope="layer")
    assert set(by_size.masks) == {"0.weight", "2.parametrizations.weight.original", "4.weight"}
    assert by_size.report.sparsity == 0.5
    assert "computed" in by_size.report.repair.left["2.parametrizations.weight.original"]


def test_a_layer_that_runs_twice_is_left_by_wanda() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.again, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.again(self.again(x)))

    torch.manual_seed(0)
    model = Twice().double()
    with warned("again.weight", "more than once"):
        pruned = prune_weights(model, [data(30, 8)], SparseGPT(), sparsity=0.5)
    assert set(pruned.masks) == {"last.weight"}
    assert torch.equal(pruned.model.again.weight, model.again.weight)


def test_inputs_that_are_not_finite_prune_nothing() -> None:
    with refused("not finite", "0.weight"):
        prune_weights(mlp(), [torch.full((20, 12), math.inf, dtype=DOUBLE)], Wanda(), sparsity=0.5)


# ---- around it


@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
def test_the_dense_network_is_as_it_was(criterion: Criterion) -> None:
    model = conv_net().train()
    model[7].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    pruned = prune_weights(model, labelled(data(24, 4, 6, 6), 4), criterion, loss=F.cross_entropy, sparsity=0.5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in [*model.parameters(), *pruned.model.parameters()])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), *pruned.model.modules()])
    assert [p.requires_grad for p in pruned.model.parameters()] == [p.requires_grad for p in model.parameters()]
    assert all(module.training for module in pruned.model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert "7.weight" in pruned.masks


def test_the_same_twice() -> None:
    one, other = (prune_weights(mlp(), [data(50, 12)], sparsity=0.5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def test_masks_are_tuned_and_saved(tmp_path: Path) -> None:
    pruned = prune_weights(mlp(), [data(50, 12)], pattern="2:4")
    before = [p.clone() for p in pruned.model.parameters()]
    pruner = Pruner.from_masks(pruned.model, pruned.masks)
    assert all(torch.equal(a, b) for a, b in zip(before, pruned.model.parameters(), strict=True))
    assert pruner.sparsity == 0.5
    save_masks(tmp_path / "masks.safetensors", pruner.masks())
    saved = load_masks(tmp_path / "masks.safetensors")
    assert all(torch.equal(saved[name], mask) for name, mask in pruned.masks.items())


def test_the_report_tells_what_went_and_what_came_back() -> None:
    text = repr(prune_weights(mlp(), [data(50, 12)], Wanda(), pattern="2:4"))
    for fact in ("504 of 1,008 weights (50.0 %) in 3 tensors", "Wanda", "2:4", "by row", "Repaired 3 of 3"):
        assert fact in text, text


@pytest.mark.parametrize("repair", ["least_squares", None])
def test_cut_with_a_pattern_is_the_same(repair: Any) -> None:
    told: list[str] = []
    batches = [data(50, 12)]
    one = cut(mlp(), batches, pattern="2:4", repair=repair, progress=lambda what, share: told.append(what))
    other = prune_weights(mlp(), batches, SparseGPT(), pattern="2:4", repair=repair is not None)
    assert all(torch.equal(mask, other.masks[name]) for name, mask in one.masks.items())
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))
    assert told == ["pruning"] * 3
    found = cut(mlp(), batches, sparsity=0.25, pattern="1x1", criterion=Wanda(), scope="layer", exclude=["4"])
    assert found.report.sparsity == 0.25
    assert set(found.masks) == {"0.weight", "2.weight"}


def test_cut_refuses_what_says_nothing_of_single_weights() -> None:
    model, x = mlp(), data(20, 12)
    for setting in ({"macs": 0.5}, {"rules": []}, {"kinds": ["neurons"]}):
        with refused("2:4", next(iter(setting))):
            cut(model, [x], pattern="2:4", **setting)  # type: ignore[call-overload]
    with refused("Wanda", "pattern"):
        cut(model, [x], sparsity=0.5, criterion=Wanda())
    with refused("scope", "row", "pattern"):
        cut(model, [x], sparsity=0.5, scope="row")  # type: ignore[call-overload]


def test_a_layer_alone_is_a_network_too() -> None:
    layer = nn.Linear(12, 5).double()
    pruned = prune_weights(layer, [data(60, 12)], Wanda(), sparsity=0.5)
    assert set(pruned.masks) == {"weight"}
    assert pruned.report.repair.repaired[0].after < pruned.report.repair.repaired[0].before


def test_wrong_input_is_refused() -> None:
    model, x = mlp(), data(20, 12)
    pairs = labelled(x, 6)
    with refused("sparsity", "2:4"):
        prune_weights(model, [x], Wanda())
    with refused("sparsity", 0.6, 0.5):
        prune_weights(model, [x], Wanda(), sparsity=0.6, pattern="2:4")
    for sparsity in (0.0, 1.0, -0.5):
        with refused("sparsity", sparsity):
            prune_weights(model, [x], Wanda(), sparsity=sparsity)
    with refused("scope", "column"):
        prune_weights(model, [x], Wanda(), sparsity=0.5, scope="column")  # type: ignore[arg-type]
    with refused("damping", -1):
        prune_weights(model, [x], Wanda(), sparsity=0.5, damping=[-1])
    with refused("held_back", 1.5):
        prune_weights(model, [x], Wanda(), sparsity=0.5, held_back=1.5)
    for criterion in (Abs(), OBS()):
        with refused(type(criterion).__name__, "SparseGPT"):
            prune_weights(model, [x], criterion, sparsity=0.5)
    with refused("criterion", "Wanda(...)"):
        prune_weights(model, [x], Wanda, sparsity=0.5)  # type: ignore[arg-type]
    with refused("no batch"):
        prune_weights(model, [], Wanda(), sparsity=0.5)
    with refused("no loss"):
        prune_weights(model, pairs, Elementwise(), sparsity=0.5)
    with refused("4x1", "SparseGPT", "Wanda"):
        prune_weights(model, [x], SparseGPT(), sparsity=0.5, pattern="4x1")
    with refused("2:5", 12):
        prune_weights(model, [x], Wanda(), pattern="2:5")
    with refused("include", "fc9"):
        prune_weights(model, [x], Wanda(), sparsity=0.5, include=["fc9"])
    with refused("model", "int"):
        prune_weights(3, [x], Wanda(), sparsity=0.5)  # type: ignore[arg-type]
    with refused("DataParallel"):
        prune_weights(nn.DataParallel(model), [x], Wanda(), sparsity=0.5)


# ---- how much


def answers(count: int = 400, seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    x = data(count, 12, seed=seed)
    return [(x, mlp()(x).argmax(1))]  # what the dense network says is right


def test_the_largest_sparsity_that_loses_no_more_and_how_sure_that_is() -> None:
    batches, evaluate = [data(128, 12)], right_or_wrong(answers())
    found = cut(mlp(), batches, pattern="1x1", criterion=Wanda(), max_drop=8, evaluate=evaluate, progress=False)
    sure = found.how_much
    assert (sure.of, sure.max_drop, sure.samples, sure.dense) == ("weights", 8, 400, 1.0)
    assert sure.chosen.share == pytest.approx(1 - found.report.sparsity, abs=0.05)  # whole weights of rows of 12
    assert 100 * (1 - float(evaluate(found.model).mean())) < sure.chosen.bound <= 8
    assert found.report.sparsity > 0.05
    again = prune_weights(mlp(), batches, Wanda(), sparsity=1 - sure.chosen.share)
    assert all(torch.equal(mask, again.masks[name]) for name, mask in found.masks.items())
    assert "points lost at 95 % confidence" in repr(found)


def test_an_amount_that_is_given_is_bounded_and_a_number_is_shown() -> None:
    batches, evaluate = [data(128, 12)], right_or_wrong(answers())
    found = cut(mlp(), batches, pattern="2:4", evaluate=evaluate, progress=False)
    assert (found.how_much.max_drop, found.how_much.chosen.share) == (None, 0.5)
    assert found.small.params == found.dense.params - 12 * 24 // 2 - 24 * 24 // 2 - 24 * 6 // 2
    shown = cut(mlp(), batches, pattern="2:4", evaluate=lambda network: 23.0, progress=False)
    assert shown.how_much is None
    assert "evaluate: 23 -> 23" in repr(shown)


def test_a_family_of_sparsities_is_that_of_single_calls_and_finds_the_largest() -> None:
    evaluate = right_or_wrong(answers())
    settings = {"pattern": "1x1", "criterion": Wanda(), "evaluate": evaluate, "progress": False}
    family = cut_family(mlp(), [data(128, 12)], sparsity=[0.5, 0.2], **settings)
    for share, one in zip((0.2, 0.5), family, strict=True):
        alone = cut(mlp(), [data(128, 12)], sparsity=share, **settings)
        assert all(torch.equal(v, alone.model.state_dict()[k]) for k, v in one.model.state_dict().items())
    assert family.rows()[0]["params_left"] == 1.0
    assert family.rows()[1]["params_left"] > family.rows()[2]["params_left"] > 0.5
    assert family.within(99).report.sparsity == pytest.approx(0.5, abs=0.01)
    assert family.within(99).how_much.of == "weights"


def test_what_has_no_meaning_for_single_weights_is_refused_before_anything_is_read() -> None:
    def unread() -> Any:
        raise AssertionError
        yield

    enough = right_or_wrong(answers())
    with refused("max_drop=8", "2:4", "0.5"):
        cut(mlp(), unread(), pattern="2:4", max_drop=8, evaluate=enough)
    with refused("sparsity=[0.2, 0.5]", "2:4"):
        cut_family(mlp(), unread(), pattern="2:4", sparsity=[0.2, 0.5])
    with refused("macs", "single weights"):
        cut_family(mlp(), unread(), pattern="1x1", macs=[0.2, 0.5])
    with refused("max_drop=8", "evaluate"):
        cut(mlp(), unread(), pattern="1x1", max_drop=8)
    with refused("sparsity and max_drop"):
        cut(mlp(), unread(), pattern="1x1", max_drop=8, sparsity=0.5, evaluate=enough)
    with refused("400 samples", "0.1 points"):
        cut(mlp(), unread(), pattern="1x1", max_drop=0.1, evaluate=enough)
    with refused("batchnorm", "1x1"):
        cut(mlp(), unread(), pattern="1x1", sparsity=0.5, repair="batchnorm")
    with refused("scope", "pattern"):
        cut_family(mlp(), unread(), sparsity=[0.5], scope="row")


# ---- wide layers


@pytest.mark.parametrize("criterion", [Wanda(), SparseGPT(), Magnitude()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("pattern", ["1x1", "2:4"])
def test_wide_layers_are_pruned_and_refitted_block_by_block(
    criterion: Criterion, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 6)).to(DOUBLE)
    settings: dict[str, Any] = {"pattern": pattern, "include": ["2"], "damping": [1e-4]}
    settings |= {"sparsity": 0.5} if pattern == "1x1" else {}
    whole = prune_weights(model, [data(200, 12)], criterion, **settings)
    monkeypatch.setattr("gsprune.repair.support.WIDEST", 8)
    monkeypatch.setattr("gsprune.repair.support.BLOCK", 8)
    blocks = prune_weights(model, [data(200, 12)], criterion, **settings)
    assert blocks.report.sparsity == 0.5
    if not isinstance(criterion, SparseGPT):  # which looks at what the other columns of its block can make up for
        assert torch.equal(blocks.masks["2.weight"], whole.masks["2.weight"])
    assert torch.equal(blocks.model[2].weight == 0, ~blocks.masks["2.weight"])
    (one,), (other,) = whole.report.repair.layers, blocks.report.repair.layers
    assert other.reason is None
    assert other.after < other.before
    if not isinstance(criterion, SparseGPT):
        assert other.before == pytest.approx(one.before)
    assert other.after < one.after + 0.5 * (other.before - one.after)


@pytest.mark.parametrize("pattern", ["1x1", "2:4"])
def test_the_blocks_of_a_wide_convolution_are_whole_channels(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Tanh(), nn.Conv2d(8, 4, 3)).to(DOUBLE)
    settings: dict[str, Any] = {"pattern": pattern, "include": ["2"]}
    settings |= {"sparsity": 0.5} if pattern == "1x1" else {}
    monkeypatch.setattr("gsprune.repair.support.WIDEST", 16)
    monkeypatch.setattr("gsprune.repair.support.BLOCK", 40)
    pruned = prune_weights(model, [data(40, 3, 6, 6)], SparseGPT(), **settings)
    mask = pruned.masks["2.weight"]
    assert int(mask.sum()) == mask.numel() // 2
    if pattern == "2:4":
        assert torch.equal(mask.unflatten(1, (2, 4)).sum(2), torch.full((4, 2, 3, 3), 2))
    (layer,) = pruned.report.repair.layers
    assert layer.after < layer.before
