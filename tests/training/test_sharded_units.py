"""Units of a network that `fully_shard` spreads over processes: the scores, choices and weights of one process.

What the processes do is in `ranks_units.py`.
"""

from __future__ import annotations

import pytest
import ranks
import ranks_units
import torch
from torch.testing import assert_close

from gsprune.training.launcher import Processes, launch


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.long), 4])
def several(request):
    """What every part returned in each process."""
    return launch(Processes(request.param, timeout_minutes=4), "cpu", ranks.everything, *ranks_units.PARTS)


def equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*units are too coarse")
@pytest.mark.parametrize("case", ranks_units.CASES)
def test_scores_masks_and_the_network_after_the_cut_are_those_of_one_process_to_the_last_bit(several, case):
    alone = ranks_units.pruned(case, sharded=False)
    assert len({row["report"]["sparsity"] for row in alone["seen"]}) > 3  # the schedule ran
    for process in several:
        mine = process["every_case"][case]
        for found, expected in zip(mine["seen"], alone["seen"], strict=True):
            assert found["report"] == expected["report"]
            for what in ("masks", "scores", "weights", "momenta"):
                equal(found[what], expected[what])
        equal(mine["cut"], alone["cut"])
        assert mine["sizes"] == alone["sizes"] != [7, 7, 5, 9]
        assert_close(mine["answer"], alone["answer"], rtol=1e-6, atol=1e-5)
        assert mine["trains"]
    whole = sum(tensor.numel() for name, tensor in alone["cut"].items() if "running" not in name and "num" not in name)
    assert sum(process["every_case"][case]["local"] for process in several) == whole  # each has a part


@pytest.mark.slow
def test_a_loop_of_ones_own_prunes_units_as_on_one_process(several):
    alone = ranks_units.trained_units(sharded=False)
    for found in (process["trained_units"] for process in several):
        equal(found["masks"], alone["masks"])
        assert_close(found["cut"], alone["cut"], rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_a_step_sums_four_bytes_a_unit_and_an_update_sends_nothing(several):
    for found in (process["communicated"] for process in several):
        assert found == {"step": 4 * 21, "update": 0, "units": 21, "updates": 1}


@pytest.mark.slow
def test_what_units_in_parts_cannot_have_is_said_in_one_sentence(several):
    facts = {
        "each_update": ("shrink=each_update", "gsprune.cut_sharded"),
        "repair": ("repair", "several processes"),
        "latency": ("budget.latency", "macs or params"),
        "branches": ("branches", "no process"),
        "mixed": ("first.weight is cut over several processes", "exclude"),
        "whole": ("in one piece", "apply_cut"),
        "unspread": ("first.weight in one piece", "shard"),
        "wrong": ("does not compute what the masked one does", "left as it was"),
    }
    for said in (process["refused"] for process in several):
        assert said.keys() == facts.keys()
        for name, words in facts.items():
            assert all(word in said[name] for word in words), said[name]
