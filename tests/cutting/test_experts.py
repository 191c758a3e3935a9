"""`gsprune.cut_experts`: the cut network computes what the dense one does whose router never chooses what is gone."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from facts import refused, warned
from torch import Tensor, nn

import gsprune
from gsprune import find_structures
from gsprune.cost.counting import count_macs
from gsprune.cutting import experts
from gsprune.cutting.calibration import Calibration
from gsprune.cutting.experts import _scores
from gsprune.discovery.experts import check_experts, find_experts, plan_experts
from gsprune.integrations.pretrained import from_pretrained, save_pretrained
from gsprune.pruner.rule import Rule
from gsprune.repair.shared import SharedMoments
from gsprune.structures.running import outputs
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.closed_experts import Exact
from gsprune.surgery.cut_plan import plan_cut

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))


class Mixture(nn.Module):
    """Six experts, two of them a token."""

    def __init__(self, experts: int = 6, *, taken: int = 2, odd: bool = False) -> None:
        super().__init__()
        self.taken = taken
        self.router = nn.Linear(8, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(experts)
        )
        self.odd, self.closed = odd, torch.zeros(experts, dtype=torch.bool)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 8)
        logits = self.router(rows)
        if self.closed.any():
            logits = logits.masked_fill(self.closed, -math.inf)
        best, chosen = logits.topk(self.taken, dim=-1)
        weights, out = best.softmax(-1), torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            found = expert(rows[token]) * weights[token, place, None]
            out = out.index_add(0, token, found * (number + 1) if self.odd else found)
        return x + out.reshape(x.shape)


class Turned(nn.Module):
    """Stacked matrices, a router that is multiplied from the right, as it is or turned over, a number of experts in an
    attribute, one expert a token."""

    def __init__(self, *, over: bool = False) -> None:
        super().__init__()
        self.n_experts, self.over = 5, over
        self.gate = nn.Parameter(torch.randn(5, 8) if over else torch.randn(8, 5))
        self.scale = nn.Parameter(1 + torch.rand(5))
        self.up, self.down = nn.Parameter(torch.randn(5, 8, 12) / 3), nn.Parameter(torch.randn(5, 12, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        odds = (x @ (self.gate.t() if self.over else self.gate)).softmax(-1)
        each = F.one_hot(odds.argmax(-1), self.n_experts) * odds * self.scale
        return x + torch.einsum("...d,edh,eho,...e->...o", x, self.up, self.down, each)


def net(*layers: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), *(layers or (Mixture(), Mixture())), nn.Linear(8, 3)).eval()


def batches(count: int = 64) -> list[Tensor]:
    return [torch.randn(count // 2, 4, generator=torch.Generator().manual_seed(number)) for number in range(2)]


def test_tokens_go_to_the_best_experts_that_are_left() -> None:
    model = net()
    x = torch.randn(40, 4)
    before = copy.deepcopy(model)
    cut = gsprune.cut_experts(model, batches(), sparsity=0.5, progress=False)
    assert {name: int(keep.sum()) for name, keep in cut.keeps.items()} == {"1.experts": 3, "2.experts": 3}
    small: Any = cut.model
    assert [len(small[i].experts) for i in (1, 2)] == [3, 3]
    assert small[1].router.out_features == 3
    for i in (1, 2):
        model[i].closed = ~cut.keeps[f"{i}.experts"]  # type: ignore[index, union-attr]
    torch.testing.assert_close(small(x), model(x))
    assert cut.small.params == sum(p.numel() for p in small.parameters()) < cut.dense.params
    assert "kept" in repr(cut)
    assert "6 of 12 experts" in repr(cut)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("over", [True, False])
def test_stacked_matrices_and_what_is_one_number_an_expert(over: bool) -> None:
    model, x = net(Turned(over=over)), torch.randn(30, 4)
    layer: Any = model[1]  # type: ignore[index]
    cut = gsprune.cut_experts(model, batches(), sparsity=0.4, progress=False)
    keep = cut.keeps["1"]
    small: Any = cut.model
    assert (small[1].n_experts, small[1].gate.numel(), small[1].up.shape) == (3, 24, (3, 8, 12))
    assert torch.equal(small[1].scale, layer.scale[keep])
    hidden = model[0](x)  # type: ignore[index]
    odds = (hidden @ (layer.gate.t() if over else layer.gate)).masked_fill(~keep, -math.inf).softmax(-1)
    best = odds.argmax(-1)
    rows = [hidden[i] @ layer.up[e] @ layer.down[e] * odds[i, e] * layer.scale[e] for i, e in enumerate(best.tolist())]
    torch.testing.assert_close(small[1](hidden), hidden + torch.stack(rows))


def test_scores_are_what_the_outputs_feel_of_each_removal() -> None:
    """Against the slow way: a forward and a backward pass for every sample and expert."""
    model = net()
    data = Calibration(batches(12)).of_outputs(model)
    assert data is not None
    layers = find_experts(model, torch.randn(8, 4))
    gone = {layer.structure.name: torch.arange(6) == 4 for layer in layers}
    found = _scores(model, layers, {name: ~mask for name, mask in gone.items()}, data, lambda share: None)
    for layer in layers:
        place = int(layer.structure.name[0])
        wanted = reference.expert_scores(model, place, {int(name[0]): mask for name, mask in gone.items()}, data)
        torch.testing.assert_close(found[layer.structure.name], wanted, rtol=1e-4, atol=1e-7)


def test_experts_that_replace_one_another_do_not_both_go() -> None:
    """Two pairs of equal experts: either of a pair is needless as long as the other is there."""
    model = net(Mixture(4, taken=1))
    layer: Any = model[1]  # type: ignore[index]
    with torch.no_grad():
        for i in (0, 2):
            layer.router.weight[i + 1] = layer.router.weight[i] + 1e-3 * torch.randn(8)
            layer.router.bias[i + 1] = layer.router.bias[i]
            layer.experts[i + 1].load_state_dict(layer.experts[i].state_dict())
    cut = gsprune.cut_experts(model, batches(), sparsity=0.5, progress=False)
    keep = cut.keeps["1.experts"].reshape(2, 2)
    assert keep.sum(1).tolist() == [1, 1]


def test_saved_loaded_cut_on_trained_and_pickled(tmp_path: Path) -> None:
    model, x = net(), torch.randn(16, 4)
    first = gsprune.cut_experts(model, batches(), sparsity=0.5, progress=False)
    second = gsprune.cut(first.model, batches(), sparsity=0.5, example_input=x, progress=False)
    assert all(".experts." in s.name for s in second.structures if s.units == 12)
    plan = second.plan.after(first.plan)
    gsprune.save_pruned(tmp_path, second.model, plan)
    loaded: Any = gsprune.load_pruned(tmp_path, net(seed=1))
    assert torch.equal(loaded(x), second.model(x))
    for other in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(other(x), loaded(x))
        assert other.state_dict().keys() == loaded.state_dict().keys()
    optimizer = torch.optim.SGD(loaded.parameters(), 0.1)
    loaded(x).sum().backward()
    before = [p.detach().clone() for p in loaded[1].experts.parameters()]
    optimizer.step()
    assert any(not torch.equal(p, old) for p, old in zip(loaded[1].experts.parameters(), before, strict=True))


def test_the_optimizers_state_goes_along() -> None:
    model, x = net(), torch.randn(64, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    layers = find_experts(model, x)
    keeps = {layer.structure.name: torch.tensor([True, False, True, True, False, True]) for layer in layers}
    moment = optimizer.state[model[1].router.weight]["exp_avg"][[0, 2, 3, 5]]  # type: ignore[index, union-attr]
    apply_cut(model, plan_experts(model, layers, keeps), optimizer=optimizer)
    assert torch.equal(optimizer.state[model[1].router.weight]["exp_avg"], moment)  # type: ignore[index, union-attr]
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}


DECODER = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
GROUPS = {"n_routed_experts": 6, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0, "moe_intermediate_size": 24}
NUMBERS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "MixtralForCausalLM": ("MixtralConfig", {**DECODER, "num_local_experts": 6}),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", {**DECODER, **NUMBERS, "shared_expert_intermediate_size": 16}),
    "GptOssForCausalLM": ("GptOssConfig", {**DECODER, "num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 8}),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", {**DECODER, **LATENT, **GROUPS, "num_experts_per_tok": 2}),
    "GraniteMoeForCausalLM": ("GraniteMoeConfig", {**DECODER, "num_local_experts": 6}),
    "Ernie4_5_MoeForCausalLM": (
        "Ernie4_5_MoeConfig",
        {**DECODER, "moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 24},
    ),
    "Llama4ForCausalLM": ("Llama4TextConfig", {**DECODER, "num_local_experts": 6, "head_dim": 8}),
    "JetMoeForCausalLM": ("JetMoeConfig", {**DECODER, "kv_channels": 8, "num_local_experts": 6}),
}
WHOLE = [name for name in FAMILIES if not name.startswith("JetMoe")]  # of which all mixtures can be scored


def of_transformers(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    config, settings = FAMILIES[name]
    if name.startswith("JetMoe"):
        settings = {key: value for key, value in settings.items() if key != "num_attention_heads"}
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("name", WHOLE)
def test_families_of_transformers(name: str, tmp_path: Path) -> None:
    """Cut, proven, and as files that transformers itself reads; tokens are generated."""
    model = of_transformers(name)
    cut = gsprune.cut_experts(model, [{"input_ids": IDS}], sparsity=0.34, progress=False)
    assert not cut.skipped
    assert cut.keeps
    assert all(int(keep.sum()) == 4 for keep in cut.keeps.values())
    assert all(keep.reshape(2, 3).sum(1).tolist() == [2, 2] for keep in cut.keeps.values() if "Deepseek" in name)
    small: Any = cut.model
    small.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(input_ids=IDS).logits, small(input_ids=IDS).logits)
    prompt = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    assert small.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] <= 13
    gsprune.save_pruned(tmp_path / "own", small, cut.plan)
    again = gsprune.load_pruned(tmp_path / "own", of_transformers(name))
    assert torch.equal(again(input_ids=IDS).logits, small(input_ids=IDS).logits)


def test_a_mixture_of_attentions_is_left_and_the_others_go(tmp_path: Path) -> None:
    model, batch = of_transformers("JetMoeForCausalLM"), {"input_ids": IDS}
    cut = gsprune.cut_experts(model, [batch], sparsity=0.5, progress=False)
    assert len(cut.keeps) == len(cut.skipped) == 2
    assert all("self_attention" in name and "not called" in why for name, why in cut.skipped.items())
    cut.save(tmp_path)
    loaded = gsprune.load_pruned(tmp_path, of_transformers("JetMoeForCausalLM"))
    assert torch.equal(loaded(**batch).logits, cut.model(**batch).logits)


def test_widths_that_the_kernel_of_transformers_does_not_take(tmp_path: Path) -> None:
    """Neurons of Mixtral's experts: counted alike by each kernel, computed one by one where there is no other way."""
    model = of_transformers("MixtralForCausalLM")
    batch = {"input_ids": IDS}
    macs = count_macs(model, batch)
    model.set_experts_implementation("eager")
    assert count_macs(model, batch) == macs
    model.set_experts_implementation("grouped_mm")
    fits = gsprune.cut(
        model, [batch], kinds=["neurons"], budget={"macs": 0.7, "round_to": 8}, example_input=batch, progress=False
    )
    assert fits.model.config._experts_implementation == "grouped_mm"  # type: ignore[union-attr]
    assert count_macs(fits.model, batch) / macs == pytest.approx(0.7, abs=0.08)
    layers = find_structures(model, batch).structures
    keeps = [torch.arange(s.units) != 0 if s.kind == "neurons" else torch.ones(s.units).bool() for s in layers]
    with warned("side of 94", "round_to=8"):
        apply_cut(model, plan_cut(layers, keeps))
    assert model.config._experts_implementation == "eager"
    assert model(**batch).logits.isfinite().all()
    plan = plan_cut(layers, keeps)
    with refused("side of 94", "round_to=8"):
        save_pretrained(tmp_path, model, plan, plain=True)
    assert not save_pretrained(tmp_path, model, plan)
    with warned("side of 94"):
        loaded = from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_where_some_layers_stay_whole_the_configuration_stays(tmp_path: Path) -> None:
    model, batch = of_transformers("MixtralForCausalLM"), {"input_ids": IDS}
    before = copy.deepcopy(model.state_dict())
    cut = gsprune.cut_experts(model, [batch], sparsity=0.5, include=["*.layers.1.*"], progress=False)
    small: Any = cut.model
    assert [layer.mlp.experts.num_experts for layer in small.model.layers] == [6, 3]
    assert (small.config.num_local_experts, small.num_experts) == (6, 6)
    cut.save(tmp_path)
    loaded = gsprune.load_pruned(tmp_path, of_transformers("MixtralForCausalLM"))
    assert torch.equal(loaded(**batch).logits, small(**batch).logits)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_groups_of_experts_keep_what_a_token_takes_of_each() -> None:
    settings = {
        **FAMILIES["DeepseekV3ForCausalLM"][1],
        "num_experts_per_tok": 4,
        "n_routed_experts": 8,
        "topk_group": 1,
    }
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**settings)).eval()
    (first, _) = find_experts(model, {"input_ids": IDS})
    assert (first.groups, first.least) == (2, 8)
    with refused("all of them"):
        gsprune.cut_experts(model, [{"input_ids": IDS}], sparsity=0.25, progress=False)


class Twice(nn.Module):
    """One mixture, called twice in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.mixture = Mixture()

    def forward(self, x: Tensor) -> Tensor:
        return self.mixture(2 * self.mixture(x))


class Mapping(Mixture):
    """Answers with a mapping."""

    def forward(self, x: Tensor) -> Any:
        return {"found": super().forward(x)}


class Found(nn.Module):
    def forward(self, x: Any) -> Tensor:
        found: Tensor = x["found"]
        return found


def test_a_mixture_that_is_called_twice_is_scored_for_both_and_one_that_cannot_be_is_refused() -> None:
    model = net(Twice())
    data = Calibration(batches(12)).of_outputs(model)
    assert data is not None
    layers = find_experts(model, torch.randn(8, 4))
    keeps = {"1.mixture.experts": torch.ones(6, dtype=torch.bool)}
    both = _scores(model, layers, keeps, data, lambda share: None)["1.mixture.experts"]
    wanted = torch.zeros(6)
    layer: Any = model[1].mixture  # type: ignore[index, union-attr]
    for batch in data.batches:
        for row in range(batch.size):
            one = batch.rows(row, row + 1)
            x = model[0](one.inputs)  # type: ignore[index]
            y = layer(x).detach().requires_grad_()
            z = layer(2 * y)
            slopes = torch.autograd.grad(data.loss(lambda _, z=z: model[2](z), one), [y, z])  # type: ignore[index]
            for expert in range(6):
                layer.closed = torch.arange(6) == expert
                changes = (layer(x) - y, layer(2 * y) - z)
                wanted[expert] += sum(float((s * c).detach().sum()) ** 2 for s, c in zip(slopes, changes, strict=True))
            layer.closed = torch.zeros(6, dtype=torch.bool)
    torch.testing.assert_close(both, wanted / data.size, rtol=1e-4, atol=1e-7)
    with refused("1.experts", "cannot be scored"):
        gsprune.cut_experts(net(Mapping(), Found()), batches(), sparsity=0.5, progress=False)


@pytest.mark.parametrize("name", ["DeepseekV3ForCausalLM", "Ernie4_5_MoeForCausalLM"])
def test_what_is_added_to_the_scores_does_not_choose_an_expert_that_is_gone(name: str) -> None:
    model = of_transformers(name)
    layers = find_experts(model, {"input_ids": IDS})
    keeps = {layer.structure.name: torch.tensor([True, True, False] * 2) for layer in layers}
    with torch.no_grad():
        for layer in layers:
            (bias,) = layer.biases
            dict([*model.named_parameters(), *model.named_buffers()])[bias].flatten()[2] = 3.0
    assert check_experts(model, layers, keeps, {"input_ids": IDS}) == (None, "")


def test_a_network_in_float64_stays_in_it() -> None:
    x = torch.ones(2, dtype=torch.float64)
    with Exact():
        found = [x.float(), x.to(torch.float32), x.type(torch.float32), x.softmax(0, dtype=torch.float32)]
        found += [x.to(dtype=torch.float32), F.softmax(x, 0, dtype=torch.float32)]
        assert {t.dtype for t in found} == {torch.float64}
        assert x.to(torch.float16).dtype == torch.float16
        assert x.half().float().dtype == torch.float32


def test_a_dictionary_of_experts() -> None:
    """Switch Transformers look experts up by name."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2}
    config = transformers.SwitchTransformersConfig(
        **sizes, num_decoder_layers=2, num_experts=6, num_sparse_encoder_layers=2, num_sparse_decoder_layers=2
    )
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    example = {"input_ids": IDS, "decoder_input_ids": IDS}
    layers = find_experts(model, example)
    assert len(layers) == 4
    keeps = {layer.structure.name: torch.tensor([False, True, False, True, True, False]) for layer in layers}
    assert check_experts(model, layers, keeps, example) == (None, "")
    apply_cut(model, plan_experts(model, layers, keeps))
    experts = model.encoder.block[0].layer[1].mlp.experts
    assert [*experts] == ["expert_0", "expert_1", "expert_2"]
    assert [name for name, _ in experts.named_children()] == ["expert_1", "expert_3", "expert_4"]
    assert experts["expert_1"] is experts.expert_3
    with pytest.raises(KeyError):
        experts["expert_3"]


def test_what_cannot_be_cut_is_left_by_itself_or_refused_before_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose experts' numbers mean something to it."""
    model = net(Mixture(), Mixture(odd=True), Mixture(2))
    cut = gsprune.cut_experts(model, batches(), sparsity=0.5, progress=False)
    assert [*cut.keeps] == ["1.experts"]
    assert "does not compute" in cut.skipped["2.experts"]
    assert "all of them" in cut.skipped["3.experts"]
    monkeypatch.setattr("gsprune.cutting.experts._ranked", lambda *_: pytest.fail("it scored"))
    with refused("2.experts", "does not compute"):
        gsprune.cut_experts(model, batches(), sparsity=0.5, include=["2.*"], progress=False)
    with refused("no mixture of experts"):
        gsprune.cut_experts(nn.Linear(4, 3), batches(), sparsity=0.5, progress=False)
    with refused("1.experts", "1 of the 6", "needs 2", "66.7 %"):
        gsprune.cut_experts(net(), batches(), sparsity=0.8, progress=False)
    with refused("removes none", "6 experts"):
        gsprune.cut_experts(net(), batches(), sparsity=0.05, progress=False)
    for share in (0, 1, True, "0.5", math.nan):
        with refused("sparsity", repr(share)):
            gsprune.cut_experts(net(), batches(), sparsity=share, progress=False)  # type: ignore[arg-type]
    with refused("4.experts"):
        gsprune.cut_experts(net(), batches(), sparsity=0.5, include=["4.experts"], progress=False)
    with refused("gsprune.cut_experts"):
        Rule(gsprune.criteria.Fisher(), kinds=["experts"], target_sparsity=0.5)


@pytest.mark.parametrize("loss", [None, F.cross_entropy])
def test_progress_and_losses_are_told(loss: Callable[..., Tensor] | None) -> None:
    seen: list[tuple[str, float]] = []
    data = [(x, torch.arange(len(x)) % 3) if loss else x for x in batches()]
    cut = gsprune.cut_experts(net(), data, loss, sparsity=0.5, progress=lambda *told: seen.append(told))
    assert (cut.dense.loss is None) == (loss is None)
    shares = [share for what, share in seen if what == "scoring"]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert [float(t.sum()) for t in outputs(cut.model, data[0][0] if loss else data[0])]


def test_an_attention_or_a_classifier_is_no_mixture() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert not find_experts(
        nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 3), nn.Softmax(-1)), torch.randn(2, 8, 4)
    )


class Largest(Mixture):
    """Computes with the largest number of its type, which overflows in float64."""

    def forward(self, x: Tensor) -> Tensor:
        large = torch.finfo(x.dtype).max / 1e38
        return super().forward(x) * large * large


def test_what_overflows_in_float64_is_proven_in_float32_and_it_is_said() -> None:
    with warned("float32", "not finite"):
        cut = gsprune.cut_experts(net(Largest()), batches(), sparsity=0.5, progress=False)
    assert "float32" in cut.proof
    assert "float32" in repr(cut)
    assert not gsprune.cut_experts(net(), batches(), sparsity=0.5, progress=False).proof


def test_rounds_that_take_no_expert_are_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    scored = []
    monkeypatch.setattr(experts, "_scores", lambda *args: scored.append(1) or _scores(*args))
    for sparsity, rounds in ((0.17, 1), (0.34, 2), (0.5, 3)):
        scored.clear()
        cut = gsprune.cut_experts(net(), batches(), sparsity=sparsity, progress=False)
        assert {int((~keep).sum()) for keep in cut.keeps.values()} == {rounds}
        assert len(scored) == rounds


def test_scores_that_are_no_numbers_and_examples_that_do_not_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with refused("Sequential", "does not run"):
        gsprune.cut_experts(net(), batches(), sparsity=0.5, example_input=torch.zeros(2, 7), progress=False)
    monkeypatch.setattr(experts, "_scores", lambda *args: {"1.experts": torch.full((6,), torch.nan)})
    with refused("1.experts", "not finite"):
        gsprune.cut_experts(net(Mixture()), batches(), sparsity=0.5, progress=False)


@pytest.mark.filterwarnings("ignore:all scores of", "ignore:.*of the model's matrix weights can be pruned")  # no tokens
@pytest.mark.parametrize("how", ["family", "pattern", "one by one"])
def test_an_expert_that_gets_no_token_of_a_batch_ends_no_repair(how: str) -> None:
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(3))
    pairs = [(x[i : i + 4], torch.arange(4) % 3) for i in range(0, 48, 4)]
    model = net()
    if how == "family":
        cuts = gsprune.cut_family(model, pairs, F.cross_entropy, macs=[0.7, 0.4], progress=False)
        assert [cut.small.macs / cut.dense.macs < 0.75 for cut in cuts] == [True, True]
        model[1].closed[2] = True  # type: ignore[index, union-attr, operator]
        left = SharedMoments(model, [(x, None) for x, _ in pairs], ["1.experts.2.0", "3"]).left
        assert "does not reach it" in left["1.experts.2.0"]
        assert "3" not in left
    elif how == "pattern":
        sparse = gsprune.cut(model, pairs, F.cross_entropy, pattern="2:4", progress=False)
        assert sparse.report.sparsity == pytest.approx(0.5)
        assert any("no sample reaches it" in why or "other rows" in why for why in sparse.report.skipped.values())
    else:
        cut = gsprune.cut(model, pairs, F.cross_entropy, sparsity=0.5, progress=False)
        assert cut.repaired is not None
        assert [row.name for row in cut.repaired.layers if row.name == "3" and not row.reason] == ["3"]
