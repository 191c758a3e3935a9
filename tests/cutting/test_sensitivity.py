"""What each structure can lose: what is cut and measured, and the rules made from it."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
from facts import refused
from torch import Tensor, nn

import gsprune
from gsprune.cost.counting import count_macs
from gsprune.criteria import Magnitude
from gsprune.cutting.calibration import Calibration
from gsprune.cutting.cut import cut
from gsprune.cutting.sensitivity import Point, Sensitivity, sensitivity
from gsprune.discovery.find import find_structures
from gsprune.schedules import OneShot
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.cut_plan import plan_cut


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nets.mlp()


def samples(size: int = 60) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(size, 6, generator=torch.Generator().manual_seed(1))
    return [(x, torch.arange(size) % 3)]


def run(model: nn.Module | None = None, **how: Any) -> Sensitivity:
    return sensitivity(model or mlp(), samples(), F.cross_entropy, progress=False, **how)


def made(drops: dict[str, list[float]]) -> Sensitivity:
    """A scan of the network with these drops at a quarter, half and three quarters."""
    model, x = mlp(), torch.zeros(2, 6)
    structures = find_structures(model, x).structures
    points = [
        Point(s.name, s.kind, s.units, 0, share, 1.0, 1.0, 0.9 - drop / 100, drop)
        for s in structures
        for share, drop in zip((0.25, 0.5, 0.75), drops[s.name], strict=True)
    ]
    return Sensitivity("value", 0.9, tuple(points), Magnitude(), model, structures, x)


def test_each_structure_is_cut_alone_and_measured_on_samples_that_did_not_score() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    found = run(model, criterion=Magnitude(), repair=None, shares=[0.5, 0.25])
    _, second = Calibration(samples(), F.cross_entropy).split(30)
    assert [(p.structure, p.share, p.kept) for p in found.points] == [
        ("0", 0.25, 6),
        ("0", 0.5, 4),
        ("2", 0.25, 4),
        ("2", 0.5, 2),
    ]
    assert found.dense == pytest.approx(second.mean_loss(model), rel=1e-6)
    for structure in find_structures(model, torch.zeros(2, 6)).structures:
        layer = model.get_submodule(structure.name)
        norms = (layer.weight.square().sum(1) + layer.bias.square()).sqrt()
        for p in (p for p in found.points if p.structure == structure.name):
            small = copy.deepcopy(model)
            keep = torch.zeros(structure.units, dtype=torch.bool)
            keep[norms.topk(p.kept).indices] = True
            apply_cut(small, plan_cut([structure], [keep]))
            assert p.value == pytest.approx(second.mean_loss(small), rel=1e-5)
            assert p.drop == pytest.approx(p.value - found.dense)
            assert p.macs == count_macs(small, torch.zeros(1, 6)) / count_macs(model, torch.zeros(1, 6))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_repair_brings_the_loss_nearer_to_the_dense_one() -> None:
    bare, repaired = (run(repair=repair, criterion=Magnitude(), shares=[0.5]) for repair in (None, "least_squares"))
    distance = [sum(abs(p.drop) for p in found.points) for found in (bare, repaired)]
    assert distance[1] < distance[0]


def test_evaluate_says_what_is_measured_in_points() -> None:
    def evaluate(network: nn.Module) -> Tensor:
        return (network(samples()[0][0]).argmax(1) == samples()[0][1]).float()

    model = mlp()
    found = run(model, evaluate=evaluate, shares=[0.75])
    assert found.metric == "value"
    assert found.dense == pytest.approx(float(evaluate(model).mean()))
    assert [p.drop for p in found.points] == pytest.approx([100 * (found.dense - p.value) for p in found.points])
    with refused("1.5", "[0, 1]"):
        run(evaluate=lambda network: 1.5)


def test_shares_are_read_off_between_the_measured_ones() -> None:
    found = made({"0": [0.0, 1.0, 3.0], "2": [4.0, 2.0, 9.0]})
    assert found.shares(2.0) == pytest.approx({"0": 0.625, "2": 0.125})  # the first drop that is too large ends it
    assert found.shares(0.0) == pytest.approx({"0": 0.25, "2": 0.0})
    assert found.shares(100) == {"0": 0.75, "2": 0.75}


def test_rules_cut_by_those_shares_and_leave_out_what_can_lose_nothing() -> None:
    rules = made({"0": [0.0, 1.0, 3.0], "2": [9.0, 9.0, 9.0]}).rules(max_drop=1.0)
    assert [(rule.include, rule.target_sparsity) for rule in rules] == [(["0"], 0.5)]
    model = mlp()
    small = cut(model, samples(), F.cross_entropy, rules=rules, repair=None, progress=False).model
    assert (small[0].out_features, small[2].out_features) == (4, 5)
    pruner = gsprune.Pruner(model, rules=rules, schedule=OneShot(), example_input=torch.zeros(2, 6))
    pruner.on_step_begin(0)
    pruner.on_train_end()
    assert (model[0].out_features, model[2].out_features) == (4, 5)


def test_rules_come_down_to_a_budget_at_one_drop_for_all() -> None:
    found = made({"0": [1.0, 2.0, 3.0], "2": [2.0, 4.0, 6.0]})
    rules = found.rules(budget={"macs": 0.5})
    shares = {rule.include[0]: rule.target_sparsity for rule in rules}
    model = mlp()
    small = cut(model, samples(), F.cross_entropy, rules=rules, repair=None, progress=False).model
    left = count_macs(small, torch.zeros(1, 6)) / count_macs(model, torch.zeros(1, 6))
    assert 0.35 < left <= 0.5
    assert shares["0"] > shares["2"] > 0  # it suffers half as much
    with refused("macs", "0.05", "stay"):
        found.rules(budget={"macs": 0.05})


def test_lines_of_the_picture_are_what_was_measured() -> None:
    found = made({"0": [0.0, 1.0, 4.0], "2": [2.0, 3.0, 5.0]})
    assert list(found.lines) == ["0", "2"]
    assert found.lines["2"] == [(0.25, pytest.approx(0.88)), (0.5, pytest.approx(0.87)), (0.75, pytest.approx(0.85))]


def test_rules_need_one_amount() -> None:
    found = made({"0": [1.0, 2.0, 3.0], "2": [2.0, 4.0, 6.0]})
    with refused("max_drop and budget"):
        found.rules(max_drop=1, budget={"macs": 0.5})
    with refused("nothing says"):
        found.rules()
    with refused("no unit", "max_drop=0"):
        found.rules(max_drop=0)
    with refused("max_drop", -1):
        found.rules(max_drop=-1)


@pytest.mark.parametrize("shares", [[], [0.0], [1], "0.5", [0.5, 0.5]])
def test_shares_that_mean_nothing_are_refused(shares: Any) -> None:
    with refused("shares"):
        run(shares=shares)


def test_a_scan_is_a_table_a_page_and_a_file(tmp_path: Path) -> None:
    found = run(shares=[0.25, 0.5])
    lines = repr(found).splitlines()
    assert "25.0 % gone" in lines[1]
    assert [line.split()[0] for line in lines[2:]] == ["0", "2"]
    assert found._repr_html_().count("<tr>") == 3
    text = found.to_csv(tmp_path / "summary.csv")
    assert (tmp_path / "summary.csv").read_text() == text
    rows = list(csv.DictReader(text.splitlines()))
    assert [(row["structure"], row["share"]) for row in rows] == [
        ("", "0"),
        ("0", "0.25"),
        ("0", "0.5"),
        ("2", "0.25"),
        ("2", "0.5"),
    ]
    assert [float(row["loss"]) for row in rows] == [found.dense, *(p.value for p in found.points)]
