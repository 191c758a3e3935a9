"""`gsprune.cut` and `gsprune.cut_family`: what comes out, what stays untouched, and what is refused before any work."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import nets
import pytest
import torch
import torch.nn.functional as F
from facts import refused
from torch import Tensor, nn

from gsprune import Rule, latency, load_pruned, plan
from gsprune.cost import budgets
from gsprune.cost.budgets import Budget, FloorError, make_cost
from gsprune.cost.counting import count_macs, count_parameters
from gsprune.criteria import OBS, Abs, Elementwise, Fisher, Magnitude, Random, Weighted
from gsprune.cutting import cut as cutting
from gsprune.cutting.audit import audit
from gsprune.cutting.calibration import Calibration
from gsprune.cutting.cut import Cut, cut
from gsprune.cutting.family import cut_family
from gsprune.structures.structure import Structure
from gsprune.surgery.shrink import mask_units


def taught(model: nn.Module, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network that fits labels which its inputs decide, with these."""
    torch.manual_seed(0)
    model = nets.settle(model)
    x = torch.randn(96, *shape)
    y = torch.arange(96) % classes
    x += 2 * F.one_hot(y, shape[-1]).float().reshape(96, *([1] * (len(shape) - 1)), shape[-1])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y


@pytest.fixture(scope="module")
def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 3))
    return taught(net, (8,), 3)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_a_budget_is_met_and_the_dense_network_stays(mlp, kind: str) -> None:
    model, x, y = mlp
    model.zero_grad()
    model.train()
    before = state(model)
    found = cut(model, [(x[:64], y[:64]), (x[64:], y[64:])], F.cross_entropy, progress=False, **{kind: 0.5})
    assert_untouched(model, before)
    assert model.training
    assert not any(m.training for m in found.model.modules())
    count = count_macs if kind == "macs" else lambda m, _: count_parameters(m)
    assert count(found.model, x[:1]) / count(model, x[:1]) == pytest.approx(0.5, rel=0.05)
    assert found.small.macs == count_macs(found.model, x[:1])
    assert found.small.params == count_parameters(found.model)
    assert found.small.loss == pytest.approx(float(F.cross_entropy(found.model(x), y)), rel=1e-4)
    assert found.samples == 96
    assert not any(p is q for p in model.parameters() for q in found.model.parameters())


def of_branches(model: nn.Module, structures: Sequence[Structure], data: Calibration) -> dict[str, Tensor]:
    """Scores that say that the first branch is worth nothing."""
    return {s.name: torch.tensor([10.0 ** (9 * number - 9)]) for number, s in enumerate(structures)}


@pytest.mark.parametrize("free", [True, False])
def test_branches_go_under_a_budget_where_the_loss_is_smaller_then(free: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores say that the first branch is worth nothing, which is so in one of the two networks."""
    model, x, y = taught(
        nn.Sequential(nn.Linear(8, 8), nets.Feedforward(8, 40), nets.Feedforward(8, 40), nn.Linear(8, 3)), (8,), 3
    )
    if free:
        nn.init.normal_(model[1].down.weight, std=1e-6)
        nn.init.zeros_(model[1].down.bias)

    monkeypatch.setattr(cutting, "branch_changes", of_branches)

    def found(*kinds: str) -> Cut:
        rule = Rule(OBS(), structured=True, kinds=kinds, budget={"macs": 0.47}, min_share=0.4)
        return cut(model, [(x, y)], F.cross_entropy, rules=[rule], repair=None, progress=False)

    both, wide = found("neurons", "branches"), found("neurons")
    monkeypatch.setattr(cutting.Cutter, "_with_whole", lambda *_: None)
    deep = found("neurons", "branches")
    assert any(not deep.keeps[s.name].any() for s in deep.structures if s.kind == "branches")
    assert both.small.loss == min(wide.small.loss, deep.small.loss)
    kept = all(both.keeps[s.name].all() for s in both.structures if s.kind == "branches")
    assert kept == (wide.small.loss < deep.small.loss)
    assert kept != free
    assert {s.name for s in both.structures} == {s.name for s in deep.structures}


def test_what_misses_the_budget_is_not_taken_for_its_smaller_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = taught(
        nn.Sequential(nn.Linear(8, 8), nets.Feedforward(8, 40), nets.Feedforward(8, 40), nn.Linear(8, 3)), (8,), 3
    )

    def missed(self: Budget, keeps: object) -> str | None:
        return None if any(s.kind == "branches" for s in self.structures) else "so much stays"

    monkeypatch.setattr(cutting, "branch_changes", of_branches)
    rule = Rule(OBS(), structured=True, kinds=("neurons", "branches"), budget={"macs": 0.47}, min_share=0.4)
    kept = {}
    for label, patched in (("met", lambda self, keeps: None), ("missed", missed)):
        monkeypatch.setattr(Budget, "missed", patched)
        found = cut(model, [(x, y)], F.cross_entropy, rules=[rule], repair=None, progress=False)
        kept[label] = all(found.keeps[s.name].all() for s in found.structures if s.kind == "branches")
    assert kept == {"met": True, "missed": False}


def test_streams_stay_whole_where_milliseconds_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """With narrow streams the budget may be out of reach, or the network worse than with whole ones."""
    torch.manual_seed(0)
    model, x = nets.ViT().eval(), nets.images(32)
    data, floors = [(x, torch.arange(32) % 3)], [0]
    monkeypatch.setattr(budgets, "make_cost", lambda kind, *rest: make_cost("macs", *rest))

    def found(cost: str, *kinds: str) -> Cut:
        rule = Rule(Fisher(), structured=True, kinds=kinds, budget={cost: 0.6})
        return cut(model, data, F.cross_entropy, rules=[rule], repair=None, progress=False)

    inner, every = found("latency", "heads", "neurons"), found("latency", "heads", "neurons", "residual")
    narrow = found("macs", "heads", "neurons", "residual")
    streams = [s.name for s in narrow.structures if s.kind == "residual"]
    assert any(not narrow.keeps[name].all() for name in streams)
    assert every.small.loss == min(inner.small.loss, narrow.small.loss)
    check = Budget._check_floor

    def refusing(self: Budget) -> None:
        if any(s.kind == "residual" for s in self.structures):
            floors[0] += 1
            raise FloorError("so much stays")
        check(self)

    monkeypatch.setattr(Budget, "_check_floor", refusing)
    again = found("latency", "heads", "neurons", "residual")
    assert floors[0] == 1
    assert {name: keep.tolist() for name, keep in again.keeps.items()} == {
        name: keep.tolist() for name, keep in inner.keeps.items()
    }
    for cost, kinds in (("macs", ("heads", "residual")), ("latency", ("residual",))):
        with refused("so much stays"):
            found(cost, *kinds)


def test_a_network_whose_branches_lie_side_by_side_is_repaired_without_one_of_them() -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64
    )
    model, ids = transformers.GPTNeoXForCausalLM(config).eval(), torch.randint(50, (16, 12))
    found = cut(model, [{"input_ids": ids, "labels": ids}], macs=0.5, kinds=["neurons", "branches"], progress=False)
    gone = [s.name for s in found.structures if s.kind == "branches" and not found.keeps[s.name].any()]
    assert gone
    assert found.repaired is not None
    assert found.repaired.repaired


def test_a_budget_says_how_it_is_measured_and_met(mlp, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = mlp
    found = cut(model, [(x, y)], F.cross_entropy, budget={"macs": 0.5, "round_to": 4}, progress=False)
    assert [int(keep.sum()) % 4 for keep in found.keeps.values()] == [0, 0]
    assert found.small.macs / found.dense.macs == pytest.approx(0.5, rel=0.1)
    assert "latency" not in dict(found.rows())
    measured = {"": 1.0, "dense": 1.0, "cut": 0.4}
    monkeypatch.setattr(
        latency, "latency_ms", lambda models, *_, **__: {name: measured.get(name, 0.1) for name in models}
    )
    how = {"latency": 0.4, "runtime": "onnxruntime", "batch": 2}
    found = cut(model, [(x, y)], F.cross_entropy, budget=how, progress=False)
    assert dict(found.rows())["latency"] == "40.0 % of the dense network's milliseconds in onnxruntime, batch 2"
    planned = plan(model, x[:1], budget={"macs": 0.5, "round_to": 8}).rules[0]
    assert planned.budget == {"macs": 0.5}
    assert {count % 8 for entry in planned.entries for count in (entry.least, entry.most)} == {0}


def test_masked_equals_cut_before_and_after_repair(mlp) -> None:
    model, x, y = mlp
    for repair in (None, "least_squares"):
        found = cut(model, [(x, y)], F.cross_entropy, sparsity=0.5, repair=repair, progress=False)
        masked = copy.deepcopy(model).double()
        mask_units(masked, found.structures, [found.keeps[s.name] for s in found.structures])
        small = copy.deepcopy(found.model).double()
        for name, value in small.state_dict().items():  # the repaired entries, at their places in the dense network
            here = masked.state_dict()[name]
            cuts = found.plan.kept.get(name, {})
            places = torch.meshgrid(*(cuts.get(d, torch.arange(n)) for d, n in enumerate(here.shape)), indexing="ij")
            here[places] = value
        torch.testing.assert_close(small(x.double()), masked(x.double()), rtol=1e-9, atol=1e-9)


def test_repair_brings_the_loss_back(mlp) -> None:
    model, x, y = mlp
    bare = cut(model, [(x, y)], F.cross_entropy, macs=0.4, repair=None, criterion=Fisher(), progress=False)
    same = cut(model, [(x, y)], F.cross_entropy, macs=0.4, criterion=Fisher(), progress=False)
    best = cut(model, [(x, y)], F.cross_entropy, macs=0.4, progress=False)
    assert bare.repaired is None
    assert same.repaired is not None
    assert same.small.loss < bare.small.loss
    assert best.small.loss < bare.small.loss
    assert "OBS" in best.criterion


def test_batchnorm_alone() -> None:
    model, x, y = taught(nets.ResNet(), (3, 8, 8), 3)
    bare = cut(model, [(x, y)], F.cross_entropy, macs=0.5, repair=None, progress=False)
    found = cut(model, [(x, y)], F.cross_entropy, macs=0.5, repair="batchnorm", progress=False)
    assert found.repaired is not None
    for name, value in found.model.named_parameters():
        kept = found.plan.kept.get(name, {})
        assert list(value.shape) == [
            len(kept[d]) if d in kept else n for d, n in enumerate(model.get_parameter(name).shape)
        ]
    names = [layer.name for layer in found.repaired.repaired]
    assert {*names} <= {"bn", "bn1", "bn2"}
    for name in names:
        assert not torch.equal(
            found.model.get_submodule(name).running_mean, bare.model.get_submodule(name).running_mean
        )


@pytest.mark.parametrize("criterion", [Fisher(), Abs(), Weighted(), Magnitude(), Random(), OBS()], ids=repr)
def test_every_criterion_of_units(mlp, criterion) -> None:
    model, x, y = mlp
    found = cut(model, [(x, y)], F.cross_entropy, sparsity=0.5, criterion=criterion, progress=False)
    assert [int(found.keeps[s.name].sum()) for s in found.structures] == [16, 12]
    again = cut(model, [(x, y)], F.cross_entropy, sparsity=0.5, criterion=criterion, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), again.model.parameters(), strict=True))


def test_networks_of_convolutions_and_attentions() -> None:
    for build, shape in ((nets.ResNet, (3, 8, 8)), (nets.Mobile, (3, 8, 8)), (nets.ViT, (3, 8, 8))):
        model, x, y = taught(build(), shape, 3)
        found = cut(model, [(x, y)], F.cross_entropy, macs=0.6, progress=False)
        assert found.small.macs / found.dense.macs == pytest.approx(0.6, rel=0.15)
        assert found.model(x).isfinite().all()


class ReadsLabels(nn.Module):
    """As an encoder-decoder: it does not run without labels."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        if labels is None:
            raise ValueError("specify labels")
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_a_network_that_does_not_run_without_labels(mlp) -> None:
    model, x, y = mlp
    found = cut(ReadsLabels(copy.deepcopy(model)), [{"x": x, "labels": y}], macs=0.5, progress=False)
    plain = cut(model, [(x, y)], F.cross_entropy, macs=0.5, progress=False)
    assert {n.removeprefix("net."): k.tolist() for n, k in found.keeps.items()} == {
        n: k.tolist() for n, k in plain.keeps.items()
    }
    assert found.small.macs == plain.small.macs


def test_unlabelled_data_scores_and_repairs(mlp) -> None:
    model, x, _ = mlp
    found = cut(model, [x], macs=0.5, progress=False)
    assert found.small.loss is not None
    assert float((found.model(x).argmax(1) == model(x).argmax(1)).float().mean()) > 0.9
    assert cut(model, [x], macs=0.5, criterion=Magnitude(), progress=False).small.loss is None


def test_a_network_of_numbers_needs_no_labels(mlp) -> None:
    _, x, _ = mlp
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(x.shape[1], 16), nn.ReLU(), nn.Linear(16, 1))
    found = cut(model, [x], macs=0.5, progress=False)
    assert found.small.macs <= 0.5 * found.dense.macs
    assert found.small.loss is None
    with refused("labels cannot be drawn", "1)"):
        cut(model, [x], macs=0.5, criterion=Fisher(), progress=False)


def test_rules_each_with_its_own_amount(mlp) -> None:
    model, x, y = mlp
    rules = [
        Rule(Fisher(), include=["0"], target_sparsity=0.25),
        Rule(Magnitude(), structured=True, include=["2"], target_sparsity=0.5),
    ]
    found = cut(model, [(x, y)], F.cross_entropy, rules=rules, progress=False)
    assert [int(found.keeps[name].sum()) for name in ("0", "2")] == [24, 12]
    assert found.criterion == "Fisher and Magnitude"


def test_calibration_is_a_number_of_samples(mlp) -> None:
    model, x, y = mlp
    assert cut(model, [(x, y)], F.cross_entropy, macs=0.5, calibration=40, progress=False).samples == 40


def test_what_was_cut_is_saved_and_loaded(mlp, tmp_path) -> None:
    model, x, y = mlp
    found = cut(model, [(x, y)], F.cross_entropy, macs=0.5, progress=False)
    found.save(tmp_path)
    again = load_pruned(tmp_path, copy.deepcopy(model))
    assert torch.equal(again(x), found.model(x))


def test_what_is_shown(mlp) -> None:
    model, x, y = mlp
    steps = []
    found = cut(
        model, [(x, y)], F.cross_entropy, macs=0.5, evaluate=lambda m: 0.5, progress=lambda *step: steps.append(step)
    )
    text = repr(found)
    for fact in ("MACs", "50.", "parameters", "neurons", "96 calibration samples", "OBS", "seconds"):
        assert fact in text
    assert found.dense.value == found.small.value == 0.5
    assert "<table>" in found._repr_html_()
    assert {what for what, _ in steps} >= {"scoring", "cutting", "repairing"}
    assert all(0 <= share <= 1 for _, share in steps)
    repairing = [share for what, share in steps if what == "repairing"]
    assert repairing == sorted(repairing)
    assert len(repairing) > 2
    assert repairing[-1] == 1


def test_a_family_is_what_single_cuts_are(mlp) -> None:
    model, x, y = mlp
    family = cut_family(model, [(x, y)], F.cross_entropy, macs=[0.25, 0.75, 0.5], progress=False)
    assert family.shares == (0.75, 0.5, 0.25)
    assert len(family) == 3
    for share, one in zip(family.shares, family, strict=True):
        alone = cut(model, [(x, y)], F.cross_entropy, macs=share, progress=False)
        assert {n: k.tolist() for n, k in one.keeps.items()} == {n: k.tolist() for n, k in alone.keeps.items()}
    left = [row["macs_left"] for row in family.rows()]
    assert left == sorted(left, reverse=True)
    assert "0.25" in repr(family)
    assert "<table>" in family._repr_html_()


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nets.mlp()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 2:
            raise RuntimeError("out of memory")
        return self.net(x)


def test_nothing_changes_when_it_fails() -> None:
    model = Fails().train()
    before = state(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        cut(model, [(torch.randn(8, 6), torch.arange(8) % 3)], F.cross_entropy, macs=0.5, progress=False)
    assert_untouched(model, before)
    assert all(m.training for m in model.modules())


def test_the_cut_is_proved_before_it_is_handed_over(mlp, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = mlp
    seen: list[list[int]] = []

    def disagrees(network: nn.Module, structures, keeps, *, example_input) -> None:
        assert network is model
        seen.append([int(keep.sum()) for keep in keeps])
        raise ValueError("the shrunk network does not compute what the masked one does")

    monkeypatch.setattr("gsprune.cutting.cut.check_shrink", disagrees)
    with refused("does not compute"):
        cut(model, [(x, y)], F.cross_entropy, sparsity=0.5, progress=False)
    assert seen == [[16, 12]]


PAIR = [(torch.randn(8, 6), torch.arange(8) % 3)]


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({}, ["nothing says", "macs", "sparsity"]),
        ({"macs": 0.5, "budget": {"params": 0.5}}, ["macs and budget"]),
        ({"budget": {"macs": None}}, ["budget", "no cost"]),
        ({"budget": {"macs": 0.5, "runtime": "openvino"}}, ["budget.runtime", "macs"]),
        ({"macs": 0.5, "sparsity": 0.5}, ["macs", "sparsity", "both"]),
        ({"macs": 1.5}, ["macs", "1.5"]),
        ({"macs": 0.0001}, ["MACs", "larger share"]),
        ({"sparsity": 1.0}, ["1"]),
        ({"macs": 0.5, "repair": "magic"}, ["magic", "least_squares"]),
        ({"macs": 0.5, "calibration": 0}, ["calibration", "0"]),
        ({"macs": 0.5, "kinds": ["heads"]}, ["heads", "neurons"]),
        ({"macs": 0.5, "include": ["nose"]}, ["nose"]),
        ({"macs": 0.5, "criterion": Elementwise()}, ["Elementwise", "weights"]),
        ({"macs": 0.5, "rules": [Rule(Fisher(), target_sparsity=0.5)]}, ["rules", "macs"]),
        ({"rules": []}, ["rules is empty"]),
        ({"rules": ["all"]}, ["rules[0]", "str"]),
    ],
)
def test_settings_that_make_no_sense(settings, facts) -> None:
    with refused(*facts):
        cut(nets.mlp(), PAIR, F.cross_entropy, progress=False, **settings)


@pytest.mark.parametrize(
    ("batches", "loss", "facts"),
    [
        ([], F.cross_entropy, ["batches is empty"]),
        (PAIR, None, ["no loss"]),
        ([PAIR[0][0]], F.cross_entropy, ["no targets"]),
        (PAIR[0][0], F.cross_entropy, ["Tensor", "iterable"]),
        (PAIR, lambda outputs, targets: F.cross_entropy(outputs, targets) * math.nan, ["loss", "nan"]),
        (PAIR, lambda outputs, targets: F.cross_entropy(outputs, targets) + math.inf, ["loss", "inf"]),
    ],
)
def test_batches_that_make_no_sense(batches, loss, facts) -> None:
    with refused(*facts):
        cut(nets.mlp(), batches, loss, macs=0.5, progress=False)


@torch.inference_mode()
def test_inference_mode_rules_gradients_out() -> None:
    with refused("inference_mode"):
        cut(nets.mlp(), PAIR, F.cross_entropy, macs=0.5, progress=False)
    with refused("inference_mode"):
        cut(nets.mlp(), PAIR, F.cross_entropy, sparsity=0.5, pattern="1x1", criterion=Elementwise(), progress=False)
    with refused("inference_mode"):
        audit(nets.mlp(), PAIR, F.cross_entropy, progress=False)


class Answers(nn.Module):
    """A network that returns a plain dict."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(x)}


@pytest.mark.parametrize("criterion", [OBS(), Fisher()])
def test_labels_are_drawn_from_the_logits_of_a_dict(criterion) -> None:
    net = nets.mlp()
    found = cut(Answers(net), [PAIR[0][0]], macs=0.5, criterion=criterion, progress=False)
    plain = cut(net, [PAIR[0][0]], macs=0.5, criterion=criterion, progress=False)
    assert {f"net.{name}": keep.tolist() for name, keep in plain.keeps.items()} == {
        name: keep.tolist() for name, keep in found.keeps.items()
    }
    assert found.small.loss == plain.small.loss


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({}, ["nothing says"]),
        ({"macs": []}, ["macs"]),
        ({"macs": 0.5}, ["macs", "list"]),
        ({"macs": [0.5, 0.5]}, ["twice"]),
        ({"macs": [0.5], "params": [0.5]}, ["macs", "params"]),
    ],
)
def test_families_that_make_no_sense(settings, facts) -> None:
    with refused(*facts):
        cut_family(nets.mlp(), PAIR, F.cross_entropy, progress=False, **settings)
