"""`gsprune.plan`: what a cut with the same settings would do."""

from __future__ import annotations

import nets
import pytest
import torch
from facts import refused
from torch import nn

import gsprune
from gsprune import Rule
from gsprune.cost.counting import count_parameters
from gsprune.criteria import Magnitude, Wanda

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def test_it_foretells_the_size_that_a_cut_leaves():
    model = mlp()
    planned = gsprune.plan(model, X[:1], sparsity=0.25)
    cut = gsprune.cut(model, [X], sparsity=0.25, progress=False)
    assert (planned.dense.params, planned.pruned.params) == (count_parameters(model), count_parameters(cut.model))
    assert planned.pruned.macs == cut.small.macs
    [rule] = planned.rules
    assert {entry.name: entry.kept for entry in rule.entries} == {n: int(k.sum()) for n, k in cut.keeps.items()}
    assert rule.skipped == cut.skipped == {"4": "it feeds the model's output"}
    assert rule.criterion == cut.criterion == "OBS"


def test_half_unless_told_and_bounds_under_a_budget():
    model = mlp()
    assert gsprune.plan(model, X[:1]).rules[0].sparsity == 0.5
    [rule] = gsprune.plan(model, X[:1], macs=0.5).rules
    assert rule.budget == {"macs": 0.5}
    assert all(entry.least < entry.most for entry in rule.entries)


def test_single_weights_by_pattern_and_scope():
    model = mlp()
    for settings, kept in (({}, 224), ({"sparsity": 0.75}, 112), ({"pattern": "2:4"}, 224)):
        [rule] = gsprune.plan(model, X[:1], **{"pattern": "1x1", "scope": "layer", **settings}).rules
        assert (rule.structured, rule.total) == (False, 448)
        assert rule.kept == kept, settings
    [rule] = gsprune.plan(model, X[:1], pattern="1x1", criterion=Wanda()).rules
    assert (rule.criterion, rule.per_channel) == ("Wanda", True)  # by rows, as Wanda does


def test_rules_and_kinds():
    model, x = nets.ViT(), torch.ones(1, 3, 8, 8)
    planned = gsprune.plan(model, x, kinds=["heads"], sparsity=0.5)
    assert {entry.kind for entry in planned.rules[0].entries} == {"heads"}
    rules = [Rule(Magnitude(), structured=True, kinds=[kind], target_sparsity=0.5) for kind in ("heads", "neurons")]
    assert len(gsprune.plan(model, x, rules=rules).rules) == 2


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"macs": 0.5, "sparsity": 0.5}, ("macs and sparsity",)),
        ({"macs": 0.0}, ("macs",)),
        ({"pattern": "2:4", "macs": 0.5}, ("2:4", "macs")),
        ({"scope": "row"}, ("scope", "pattern")),
        ({"include": ["nothing"]}, ("'nothing'",)),
        ({"rules": [], "macs": 0.5}, ("macs",)),
    ],
)
def test_what_it_refuses(settings, facts):
    with refused(*facts):
        gsprune.plan(mlp(), X[:1], **settings)


def test_the_model_stays_as_it_is():
    model = mlp().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text = repr(gsprune.plan(model, X[:1]))
    assert "for an input of 1x8" in text
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
