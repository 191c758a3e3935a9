"""Which tensors are matrix weights: kinds of layers, what is left alone and why, and what weights are computed from."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from facts import refused
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune

from gsprune import Pruner
from gsprune.criteria import Criterion, Elementwise, Magnitude
from gsprune.schedules import OneShot
from gsprune.structures.matrices import coverage, find_matrices

TINY: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


class Raw(nn.Module):
    """One parameter of its own, under a name."""

    def __init__(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_parameter(
            name, nn.Parameter(torch.ones(shape, dtype=dtype), requires_grad=dtype.is_floating_point)
        )


class LoRA(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 4)
        self.A, self.B = nn.Parameter(torch.ones(2, 6)), nn.Parameter(torch.zeros(4, 2))


def causal(kind: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=40, **settings)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model


def gpt2() -> nn.Module:
    return causal("gpt2", n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)


def mixtral() -> nn.Module:
    return causal("mixtral", **TINY, num_key_value_heads=1, num_local_experts=3)


def llama(*, tied: bool) -> nn.Module:
    return causal("llama", **TINY, num_key_value_heads=1, tie_word_embeddings=tied)


def chosen(model: nn.Module, **settings: Any) -> tuple[list[str], dict[str, str]]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\d+ % of the model's matrix weights")
        settings = {"target_sparsity": None if settings.get("pattern") == "2:4" else 0.5, **settings}
        pruner = Pruner(model, Magnitude(), schedule=OneShot(), **settings)
    return [target.name for target in pruner.targets], dict(pruner.skipped)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: nn.LSTM(3, 4, proj_size=2), ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]),
        (
            lambda: nn.GRU(3, 4, bidirectional=True),
            [f"weight_{kind}_l0{end}" for end in ("", "_reverse") for kind in ("ih", "hh")],
        ),
        (lambda: nn.GRUCell(3, 4), ["weight_ih", "weight_hh"]),
        (lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True), ["in_proj_weight", "out_proj.weight"]),
        (
            lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
        ),
        (lambda: nn.Bilinear(3, 4, 5), ["weight"]),
        (lambda: nn.ConvTranspose2d(3, 4, 2), ["weight"]),
        (lambda: nn.Linear(5, 1), ["weight"]),
        (lambda: nn.Conv2d(4, 4, 3, groups=4), ["weight"]),
        (LoRA, ["weight", "A", "B"]),
        (lambda: Raw("gate_up_proj", 3, 4, 5), ["gate_up_proj"]),
        (lambda: nn.ParameterList([torch.ones(3, 4), torch.ones(4, 3)]), ["0", "1"]),
    ],
)
def test_matrix_weights_of_every_kind_of_layer(make: Callable[[], nn.Module], names: list[str]) -> None:
    found, skipped = chosen(model := make())
    assert found == names
    assert set(skipped) == {name for name, p in model.named_parameters() if p.dim() > 1} - set(names)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Embedding(5, 4), "it is an embedding"),
        (lambda: nn.LayerNorm([3, 4]), "it belongs to a LayerNorm, which scales by it"),
        (lambda: Raw("pos", 1, 7, 4), "its shape [1, 7, 4] is not that of a matrix"),
        (lambda: Raw("layer_scale", 4, 1, 1), "its shape [4, 1, 1] is not that of a matrix"),
        (lambda: Raw("relative_position_bias_table", 7, 2), "its name says 'position', so it is taken for no matrix"),
        (lambda: Raw("gate_up_proj_bias", 3, 8), "its name says 'bias', so it is taken for no matrix"),
        (lambda: Raw("A_log", 4, 8), "its name says 'log', so it is taken for no matrix"),
        (lambda: Raw("clsTokens", 4, 8), "its name says 'cls', so it is taken for no matrix"),
        (lambda: nn.ModuleDict({"prompts": nn.ParameterList([torch.ones(3, 4)])}), "its name says 'prompt'"),
        (
            lambda: nn.Linear(3, 4, dtype=torch.complex64),
            "its entries are complex (torch.complex64), and scores and masks are of real ones",
        ),
        (lambda: Raw("weight", 4, 8, dtype=torch.uint8), "its entries are torch.uint8, and only floating-point ones"),
        (lambda: nn.Linear(0, 4), "it has no entries (its shape is [4, 0])"),
        (lambda: parametrizations.weight_norm(nn.Linear(3, 4)), "weight is computed from it by WeightNorm"),
        (lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 2)), "weight is computed from it by SpectralNorm"),
        (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), "weight is computed from it by Orthogonal"),
        (lambda: nn.utils.spectral_norm(nn.Linear(3, 4)), "weight is computed from it by SpectralNorm"),
        (
            lambda: parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0"),
            "weight_hh_l0 is computed from it by WeightNorm, so that a zero here is none there: remove that first",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning")
def test_what_is_left_alone_is_named_with_its_reason(make: Callable[[], nn.Module], reason: str) -> None:
    odd = make()
    names, skipped = chosen(nn.ModuleDict({"odd": odd, "fc": nn.Linear(3, 4)}))
    left = [name for name, p in odd.named_parameters() if p.dim() > 1]
    assert names == [f"odd.{n}" for n in ("weight_ih_l0",) if isinstance(odd, nn.LSTM)] + ["fc.weight"]
    assert set(skipped) == {f"odd.{name}" for name in left} - set(names)
    for name in skipped:
        assert reason.replace("weight", "odd.weight", reason.startswith("weight")) in skipped[name]
    if not isinstance(odd, nn.LSTM):
        with pytest.raises(ValueError, match="nothing") as error:
            chosen(odd)
        assert reason in str(error.value)


def test_of_the_old_weight_norm_too() -> None:
    with pytest.warns(FutureWarning, match="deprecated"):
        layer = nn.utils.weight_norm(nn.Linear(3, 4))
    _, skipped = chosen(nn.Sequential(layer, nn.Linear(4, 4)))
    sentence = "0.weight is computed from it by WeightNorm, so that a zero here is none there: remove that first"
    assert skipped == {"0.weight_g": sentence, "0.weight_v": sentence}


def test_language_models() -> None:
    names, skipped = chosen(gpt2())
    assert names == [f"transformer.h.0.{n}.weight" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert skipped == {
        "transformer.wte.weight": "it is an embedding",
        "transformer.wpe.weight": "it is an embedding",
        "lm_head.weight": "it is one tensor with the embedding transformer.wte.weight",
    }
    names, skipped = chosen(mixtral())
    assert {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"} < set(names)
    assert list(skipped) == ["model.embed_tokens.weight"]


HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("include", "tied", "targeted"),
    [
        (["*"], True, set()),
        (["*"], False, {HEAD}),
        (["model.*", "*.weight"], True, set()),
        (["*", "lm_head"], True, {HEAD}),
        (["*_proj*", "*embed*"], True, {TABLE}),
        (["*_proj*", "*embed_tokens*"], False, {TABLE}),
        (["lm_head.weight"], True, {HEAD}),
    ],
)
def test_an_embedding_is_pruned_only_if_a_pattern_means_it(include: list[str], tied: bool, targeted: set[str]) -> None:
    names, skipped = chosen(llama(tied=tied), include=include)
    assert {HEAD, TABLE} & set(names) == targeted
    if targeted and tied:
        other = ({HEAD, TABLE} - targeted).pop()
        assert skipped[other] == f"it is one tensor with {next(iter(targeted))}"


def test_one_tensor_under_two_names_is_not_pruned_twice() -> None:
    with refused("model.embed_tokens.weight", "lm_head.weight", "one tensor"):
        chosen(llama(tied=True), include=["*embed*", "lm_head"])


def test_a_lazy_layer_is_refused() -> None:
    with refused("0.weight", "no shape"):
        chosen(nn.Sequential(nn.LazyLinear(3)))


# ---- weights that are computed


class Halved(nn.Module):
    """A mask, as other tools and people of their own put on a weight."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def masked_by_torch(net: nn.Sequential, mask: Tensor) -> str:
    torch_prune.custom_from_mask(net[0], "weight", mask)
    return "0.weight_orig"


def masked_by_parametrization(net: nn.Sequential, mask: Tensor) -> str:
    parametrize.register_parametrization(net[0], "weight", Halved(mask))
    return "0.parametrizations.weight.original"


@pytest.mark.parametrize("criterion", [Elementwise(), Magnitude()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("apply", [masked_by_torch, masked_by_parametrization])
def test_a_masked_weight_is_scored_as_the_weight_that_it_computes(
    apply: Callable[[nn.Sequential, Tensor], str], criterion: Criterion
) -> None:
    torch.manual_seed(0)
    mask = (torch.rand(5, 4) < 0.7).float()
    nets = [nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    name = apply(nets[0], mask)
    nets[1][0].weight.data.mul_(mask)
    pruners = [Pruner(net, criterion, target_sparsity=0.5, schedule=OneShot(), steps_per_epoch=1) for net in nets]
    x = torch.randn(8, 4)
    for net, pruner in zip(nets, pruners, strict=True):
        net(x).square().sum().backward()
        pruner.on_before_optimizer_step()
        pruner.on_step_begin(0)
    masks = [pruner.masks() for pruner in pruners]
    assert [t.name for t in pruners[0].targets] == [name, "2.weight"]
    assert torch.equal(masks[0][name], masks[1]["0.weight"])
    assert torch.equal(masks[0]["2.weight"], masks[1]["2.weight"])
    assert not (masks[0][name] & (mask == 0)).any()  # what is zero already goes first
    assert torch.equal(nets[0](x), nets[1](x))


def test_trying_a_parametrization_leaves_it_as_it_was() -> None:
    layer = parametrizations.spectral_norm(nn.Linear(3, 4))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    find_matrices(layer)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
    assert layer.training


# ---- masks of other layouts


@pytest.mark.parametrize(
    "settings",
    [{"pattern": "2:4"}, {"pattern": "4x1"}, {"pattern": "1x8"}, {"pattern": "1x1", "per_channel": True}],
    ids=lambda s: " ".join(map(str, s.values())),
)
def test_a_weight_with_its_inputs_first_is_cut_as_its_transpose(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    conv1d, linear = transformers.pytorch_utils.Conv1D(12, 8), nn.Linear(8, 12)
    linear.weight.data.copy_(conv1d.weight.t())
    masks = []
    for net in (nn.Sequential(conv1d), nn.Sequential(linear)):
        share = None if settings["pattern"] == "2:4" else 0.5
        pruner = Pruner(net, Magnitude(), target_sparsity=share, schedule=OneShot(), scope="local", **settings)
        pruner.on_step_begin(0)
        masks.append(pruner.masks()["0.weight"])
        assert pruner.sparsity == 0.5
    assert masks[0].shape == (8, 12)
    assert torch.equal(masks[0].t(), masks[1])
    assert torch.equal(conv1d.weight.t(), linear.weight)


@pytest.mark.parametrize("settings", [{"pattern": "2:4"}, {"pattern": "2x2"}, {"per_channel": True, "scope": "local"}])
def test_a_pattern_leaves_alone_what_has_no_known_layout(settings: dict[str, Any]) -> None:
    model = nn.ModuleDict({"experts": Raw("down_proj", 2, 4, 4), "fc": nn.Linear(4, 4)})
    targets, skipped = chosen(model, **settings)
    assert (targets, list(skipped)) == (["fc.weight"], ["experts.down_proj"])
    assert "1x1" in skipped["experts.down_proj"]
    with refused("include", "'experts'", "1x1"):
        chosen(model, include=["experts"], **settings)


def test_a_recurrent_network_stays_sparse_while_it_trains() -> None:
    torch.manual_seed(0)
    model = nn.LSTM(3, 8)
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    pruner = Pruner(model, Elementwise(), target_sparsity=0.75, steps_per_epoch=2, epochs=3)
    pruner.attach(optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(5, 2, 3))[0].square().sum().backward()
        optimizer.step()
    pruner.finish()
    zeros = sum(int((model.get_parameter(n) == 0).sum()) for n in ("weight_ih_l0", "weight_hh_l0"))
    assert zeros == 264 == 0.75 * (32 * 3 + 32 * 8)
    assert all(a is b for a, b in zip(model._flat_weights, model.parameters(), strict=True))


# ---- how much of a model that is


def test_coverage_is_the_share_of_all_matrices_tied_ones_once() -> None:
    model = llama(tied=True)
    table, rest = 40 * 16, 16 * 16 + 2 * 8 * 16 + 16 * 16 + 3 * 16 * 24
    with pytest.warns(UserWarning, match="matrix weights") as said:
        pruner = Pruner(model, Magnitude(), target_sparsity=0.5)
    assert pruner.coverage == pytest.approx(rest / (rest + table))
    assert pruner.report()["coverage"] == pruner.coverage
    left, gone = (f"{100 * size / (rest + table):.0f} %" for size in (rest, table))
    assert str(said[0].message) == (
        f"{left} of the model's matrix weights can be pruned, and sparsity is that of these alone; "
        f"left out are {TABLE} ({gone}): it is an embedding"
    )
    assert said[0].filename == __file__


@pytest.mark.parametrize("size", [10, 12])
def test_a_warning_names_the_largest_that_are_left_out_where_that_is_over_a_tenth(size: int) -> None:
    model = nn.ModuleDict({**{f"t{i}": nn.Embedding(i, size) for i in (1, 2, 3, 4)}, "fc": nn.Linear(100, 10)})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pruner = Pruner(model, Magnitude(), target_sparsity=0.5)
    assert pruner.coverage == 1000 / (1000 + 10 * size)
    told = ["t4", "t3", "t2", "and 1 more"] if size == 12 else []
    text = " ".join(str(w.message) for w in said)
    assert [text.find(name) for name in told] == sorted(text.find(name) for name in told)
    assert len(said) == bool(told)
    assert all(name in text for name in told)


@pytest.mark.parametrize("name", [HEAD, TABLE])
def test_a_tied_tensor_that_is_pruned_by_one_name_is_not_left_out_by_the_other(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner = Pruner(llama(tied=True), Magnitude(), target_sparsity=0.5, include=["*", name])
    assert pruner.coverage == 1.0


def test_a_table_with_sparse_gradients_is_pruned_by_name() -> None:
    model = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Linear(4, 2))
    pruner = Pruner(model, Elementwise(decay=1.0), target_sparsity=0.5, include=["0", "1"])
    model(torch.tensor([0, 2, 2])).sum().backward()
    expected = (model[0].weight * model[0].weight.grad.to_dense()).abs()
    pruner.on_before_optimizer_step()
    torch.testing.assert_close(pruner.scores()["0.weight"], expected.detach())
    assert int(expected.count_nonzero()) == 8


def test_what_the_user_leaves_out_is_no_surprise() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Pruner(model, Magnitude(), target_sparsity=0.5, exclude=["1"]).coverage == 0.5
    assert functools.partial(coverage, model)([]) == 0.0
    assert coverage(nn.ReLU(), []) == 0.0


def test_coverage_of_units_is_that_of_what_they_are_cut_out_of() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.LayerNorm(2), nn.Linear(2, 6))
    pruner = Pruner(model, Magnitude(), structured=True, target_sparsity=0.5, example_input=torch.ones(1, 4))
    assert pruner.coverage == (32 + 16) / (32 + 16 + 12)
