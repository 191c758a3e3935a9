"""What the composed configuration says: objects, the objective of a sweep, names and tags."""

from __future__ import annotations

import pytest
from jobs import configure

from gsprune.app.configuration import NUMBERS, check_objective, hydra_tags, objective, run_name
from gsprune.training.trainer import Trainer


def test_outside_of_hydra_there_are_no_hydra_tags():
    assert hydra_tags() == {}


def test_objective_is_one_number_or_several():
    result = {"accuracy": 0.9, "macs": 12}
    assert objective(result, "macs") == 12.0
    assert objective(result, ["accuracy", "macs"]) == (0.9, 12.0)


def test_a_wrong_objective_lists_what_there_is():
    with pytest.raises(ValueError) as error:  # noqa: PT011
        check_objective("acuracy", Trainer(device="cpu"))
    assert str(error.value) == (
        "objective=acuracy is not in the result: did you mean accuracy? There are " + ", ".join(NUMBERS)
    )
    with pytest.raises(ValueError, match=r"objective=latency_ms is not measured with trainer.latency_repeats=0"):
        check_objective(["accuracy", "latency_ms"], Trainer(device="cpu", latency_repeats=0))
    check_objective(["accuracy", "latency_ms"], Trainer(device="cpu"))


def test_a_job_outside_hydra_has_no_name_of_its_own():
    assert run_name(configure()) is None
