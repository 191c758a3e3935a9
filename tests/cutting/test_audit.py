"""Single removals are what they claim to be, scores are judged on samples that did not score, nothing is changed."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from facts import refused
from torch import Tensor, nn

from gsprune.criteria import PLATON, Abs, Criterion, Magnitude
from gsprune.criteria.base import Read
from gsprune.cutting.audit import Audit, audit, ranks, removed, spearman
from gsprune.cutting.calibration import Calibration
from gsprune.cutting.scoring import gate_gradients, unit_scores
from gsprune.discovery.find import find_structures
from gsprune.structures.structure import Structure
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.cut_plan import plan_cut


class Told(Criterion):
    """Scores that are given."""

    scores_units = True
    cumulative = False

    def __init__(self, scores: dict[str, Tensor]) -> None:
        super().__init__()
        self.scores = scores

    def units(self, structure: Structure, read: Read) -> Tensor:
        return self.scores[structure.name]

    def __repr__(self) -> str:
        return f"Told({id(self)})"


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nets.mlp()


def samples(size: int = 40) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(size, 6, generator=torch.Generator().manual_seed(1))
    return [(x[i : i + 10], torch.arange(i, min(i + 10, size)) % 3) for i in range(0, size, 10)]


def run(model: nn.Module, **how: Any) -> Audit:
    return audit(model, samples(), F.cross_entropy, progress=False, **how)


# ---- removal


@pytest.mark.parametrize("name", ["mlp", "flat", "ResNet", "Mobile"])
def test_a_removed_unit_is_that_of_the_cut_network_and_comes_back_bit_for_bit(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(nets, name)().eval()
    x = torch.randn(2, 6) if name == "mlp" else torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    for structure in find_structures(model, x).structures:
        small = copy.deepcopy(model)
        apply_cut(small, plan_cut([structure], [torch.arange(structure.units) != 1]))
        with removed(model, structure, [1]):
            torch.testing.assert_close(model(x), small(x), atol=1e-5, rtol=1e-4)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_unit_comes_back_after_an_error() -> None:
    model = mlp()
    (first, *_) = find_structures(model, torch.zeros(1, 6)).structures
    before = model[2].weight.detach().clone()

    def fail() -> None:
        with removed(model, first, [0, 3]):
            assert model[2].weight[:, [0, 3]].abs().sum() == 0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(model[2].weight, before)


def test_the_mean_loss_is_that_of_samples_and_not_of_batches() -> None:
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    model = mlp()
    data = Calibration([(x[:4], y[:4]), (x[4:], y[4:])], F.cross_entropy)
    assert data.mean_loss(model) == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-6)


# ---- the audit


def test_changes_are_measured_on_the_second_half_and_scores_are_of_the_first() -> None:
    model = mlp().train()
    before = copy.deepcopy(model.state_dict())
    found = run(model, criteria=[Abs(), Magnitude()], units=100)
    data = Calibration(samples(), F.cross_entropy)
    first, second = data.split(20)
    structures = {s.name: s for s in find_structures(model, torch.zeros(2, 6)).structures}
    assert (found.scored, found.measured, len(found.removals)) == (20, 20, 13)
    assert found.loss == pytest.approx(second.mean_loss(model), rel=1e-6)
    gates = gate_gradients(model, list(structures.values()), first)
    for number, removal in enumerate(found.removals):
        with removed(model, structures[removal.structure], [removal.unit]):
            assert removal.change == pytest.approx(second.mean_loss(model) - found.loss, abs=1e-6)
        score = gates[removal.structure][:, removal.unit].abs().mean()
        assert found.scores["Abs"][number] == pytest.approx(float(score), rel=1e-5)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_criterion_that_knows_all_has_the_correlation_1_and_its_opposite_minus_1() -> None:
    model = mlp()
    truth = run(model, criteria=[Magnitude()], units=100)
    size = {"0": torch.zeros(8), "2": torch.zeros(5)}
    signed = copy.deepcopy(size)
    for removal in truth.removals:
        size[removal.structure][removal.unit] = abs(removal.change)
        signed[removal.structure][removal.unit] = removal.change
    told = [Told(size), Told({name: -scores for name, scores in signed.items()})]
    rows = run(model, criteria=told, units=100).rows()
    assert rows[0].size == (1.0, 1.0, 1.0)
    assert rows[1].signed == (-1.0, -1.0, -1.0)


def test_a_score_of_two_averages_is_judged_by_their_product() -> None:
    found = run(mlp(), criteria=[PLATON()], units=100)
    first, _ = Calibration(samples(), F.cross_entropy).split(20)
    model = mlp()
    scores = unit_scores(model, find_structures(model, torch.zeros(2, 6)).structures, PLATON(), first)
    for number, removal in enumerate(found.removals):
        both = [scores[name][removal.unit] for name in (removal.structure, f"{removal.structure}:spread")]
        assert found.scores["PLATON"][number] == pytest.approx(float(both[0] * both[1]), rel=1e-5)


def test_units_are_drawn_in_turns_from_all_structures_and_the_seed_says_which() -> None:
    one, same, other = (run(mlp(), criteria=[Magnitude()], units=8, seed=seed) for seed in (0, 0, 1))
    assert [r.structure for r in one.removals] == ["0"] * 4 + ["2"] * 4
    assert one.removals == same.removals
    assert [r.unit for r in one.removals] != [r.unit for r in other.removals]


def test_kinds_have_rows_of_their_own_and_one_of_all() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 7),
        nn.ReLU(),
        nn.Linear(7, 3),
    )
    x, y = torch.randn(20, 3, 6, 6), torch.arange(20) % 3
    found = audit(model, [(x, y)], F.cross_entropy, criteria=[Abs()], progress=False)
    assert [(row.kind, row.units) for row in found.rows()] == [("channels", 6), ("neurons", 7), ("all", 13)]


def test_an_audit_is_a_table_json_and_a_page() -> None:
    found = run(mlp(), units=12)
    text = repr(found)
    assert "Audit of 12 units" in text
    assert "20 samples scored, 20 others measured" in text
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["Fisher", "Abs", "Weighted", "Magnitude", "Random"]
    assert found._repr_html_().count("<tr>") == 7
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (len(data["rows"]), len(data["removals"]), len(data["scores"]["Fisher"])) == (5, 12, 12)
    assert data["rows"][0]["size"] == [*found.rows()[0].size]


def test_the_picture_has_the_correlations_of_the_table() -> None:
    found = audit(mlp(), samples(), F.cross_entropy, criteria=[Abs(), Magnitude()], units=8, progress=False)
    assert [name for name, _, _ in found.correlations] == [row.criterion for row in found.rows()]
    assert [value for _, _, (value, _, _) in found.correlations] == [row.size.value for row in found.rows()]


def test_labels_may_be_missing() -> None:
    found = audit(mlp(), [x for x, _ in samples()], criteria=[Abs()], progress=False)
    assert len(found.removals) == 13
    assert all(math.isfinite(removal.change) for removal in found.removals)


def test_what_cannot_be_audited_is_refused() -> None:
    with refused("units", 3):
        run(mlp(), units=3)
    with refused("criteria", "empty"):
        run(mlp(), criteria=[])
    with refused("criteria[0]", "str"):
        run(mlp(), criteria=["abs"])
    with refused("twice", "Abs(decay=0.95"):
        run(mlp(), criteria=[Abs(), Abs()])
    with refused("1 sample"):
        run(mlp(), calibration=1)
    with refused("confidence", 2):
        run(mlp(), confidence=2)


def test_criteria_of_one_class_are_told_apart_by_their_settings() -> None:
    found = run(mlp(), criteria=[Abs(), Abs(decay=0.5), Magnitude()], units=4)
    assert [*found.scores] == ["Abs(decay=0.95, normalize=None)", "Abs(decay=0.5, normalize=None)", "Magnitude"]


# ---- rank correlation


def test_the_correlation_is_that_of_its_formula() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.permutation(30) * 1.0, generator.permutation(30) * 1.0
    assert spearman(x, y).value == pytest.approx(1 - 6 * ((x - y) ** 2).sum() / (30 * (30**2 - 1)))
    assert ranks(np.array([2.0, 2.0, 1.0, np.inf])).tolist() == [1.5, 1.5, 0.0, 3.0]
    assert math.isnan(spearman(np.ones(5), np.arange(5.0)).value)
    assert str(spearman(np.ones(5), np.arange(5.0))) == "-"
    assert spearman(np.arange(3.0), np.array([0.0, 2.0, 1.0]))[1:] == (-1.0, 1.0)


def test_the_interval_covers_the_true_correlation() -> None:
    generator, rho = np.random.default_rng(0), 0.7
    true = 6 / math.pi * math.asin(rho / 2)  # of a normal pair
    covered = 0
    for _ in range(400):
        x, noise = generator.standard_normal((2, 40))
        _, low, high = spearman(x, rho * x + math.sqrt(1 - rho**2) * noise, 0.9)
        covered += low <= true <= high
    assert 0.86 < covered / 400 < 0.95


def test_removing_ends_with_the_time_but_not_before_four_and_they_are_of_all_structures() -> None:
    found = run(mlp(), criteria=[Magnitude()], units=12, seconds=1e-9)
    assert [r.structure for r in found.removals] == ["0"] * 2 + ["2"] * 2
    whole = {(r.structure, r.unit): r.change for r in run(mlp(), criteria=[Magnitude()], units=12).removals}
    assert all(whole[r.structure, r.unit] == r.change for r in found.removals)
    with refused("seconds", "-1"):
        run(mlp(), seconds=-1)
