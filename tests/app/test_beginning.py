"""What a job says before its first epoch."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import configure

from gsprune.app.beginning import facts
from gsprune.app.stages.context import Context
from gsprune.app.stages.setup import check_pruning, set_up


def told(*overrides: str) -> dict[str, str]:
    """Name -> text; texts without a name go on."""
    job = Context(configure(*overrides), Path("nowhere"))
    setup = set_up(job)
    found: dict[str, str] = {}
    last = ""
    for name, text in facts(setup, check_pruning(job, setup)):
        last = name or last
        found[last] = f"{found[last]} {text}" if last in found else text
    return found


def test_device_data_network_and_what_goes():
    found = told("pruner=abs")
    assert list(found) == ["device", "data", "network", "pruning", "left whole", "epochs"]
    assert found["device"].startswith("cpu (")
    assert found["data"].endswith("1,257 training, 180 validation, 360 test samples, in batches of 256; 10 classes")
    assert found["network"].endswith("1,530 parameters, 24,000 MACs for an input of 1x1x8x8") or (
        "MACs for an input of 1x1x8x8" in found["network"]
    )
    assert "Abs removes units: 10 of 20 in 3 structures stay (50.0 %)" in found["pruning"]
    assert found["left whole"] == "head: it feeds the model's output"
    assert found["epochs"] == "1 dense, then 2 in which it is pruned; 5 steps each"


def test_a_control_prunes_nothing():
    found = told("pruner=none")
    assert found["pruning"].startswith("none: the control")
    assert "left whole" not in found
    assert found["epochs"].startswith("1 dense, then 2 more, without pruning")


@pytest.mark.parametrize(("override", "words"), [("pruner.budget.macs=0.5", "until 50.0 % of the")])
def test_a_budget_is_told_as_one(override, words):
    assert words in told("pruner=weighted", override)["pruning"]
