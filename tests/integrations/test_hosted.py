"""What the adapters share: the count of steps, loops that never step, and the example that is read off a loader."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from facts import refused, warned
from partner_loops import EPOCHS, STEPS, Net, loader, settings, sgd
from torch.utils.data import DataLoader, IterableDataset

from gsprune.integrations.hosted import Hosted, example_of, updates_in


def hosted(**changes: Any) -> Hosted:
    given = {**settings("at_end"), **changes}
    return Hosted(given.pop("criterion"), given, owner="PruningCallback")


def started() -> Hosted:
    net, found = Net(), hosted()
    found.start(net, [sgd(net)], loader(), steps_per_epoch=STEPS, epochs=EPOCHS)
    return found


def test_a_step_that_the_loop_counts_and_the_optimizer_did_not_make_counts() -> None:
    found = started()
    assert found.pruner is not None
    found.follow(STEPS + 2)
    assert (found.pruner.epoch, found.pruner.step) == (1, 2)
    found.pruner.detach()
    found.follow(0)  # after the end nothing is set back
    assert found.pruner.epoch == 1


def test_a_loop_that_never_steps_is_told_at_the_end_of_the_epoch() -> None:
    found = started()
    with warned("PruningCallback", "no optimizer step"):
        found.check_stepped()
    found.follow(1)
    found.check_stepped()


def test_the_example_is_read_beside_the_loader_without_its_labels() -> None:
    net, data = Net(), loader()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    example = example_of(data, net)
    assert list(example) == ["x"]
    assert torch.equal(example["x"], data.dataset[:2]["x"])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stream_of_samples_needs_an_example() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(loader())

    assert example_of(DataLoader(Stream()), Net()) is None
    assert updates_in(Stream(), 2) is None
    assert updates_in(range(5), 2) == 3
    net = Net()
    with refused("example_input"):
        hosted().start(net, [sgd(net)], DataLoader(Stream()), steps_per_epoch=STEPS, epochs=EPOCHS)


@pytest.mark.parametrize("state", [{}, {"pruner": {}}])
def test_a_state_of_something_else_is_refused(state: dict[str, Any]) -> None:
    with refused("PruningCallback", "without it"):
        hosted().resume(Net(), state)
