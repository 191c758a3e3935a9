"""Repair around the mask updates of a pruner."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import pytest
import torch
from facts import refused
from torch import Tensor, nn

from gsprune import Pruner, Rule
from gsprune.criteria import Magnitude
from gsprune.repair import Repair
from gsprune.schedules import Cubic, OneShot


@pytest.fixture(autouse=True)
def seeded() -> object:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3)).double()


def data(count: int = 80) -> Tensor:
    return torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def pruner(
    model: nn.Module, repair: Repair | None, *, each_update: bool = False, copies: Sequence[nn.Module] = ()
) -> Pruner:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return Pruner(
        model,
        Magnitude(),
        structured=True,
        target_sparsity=0.5,
        scope="local",
        schedule=OneShot(),
        example_input=data(2),
        optimizer=optimizer,
        shrink="each_update" if each_update else "at_end",
        copies=list(copies),
        repair=repair,
    )


def lost(model: nn.Module, dense: nn.Module) -> float:
    return float((model(data()) - dense(data())).detach().square().mean())


@pytest.mark.parametrize("each_update", [False, True])
def test_an_update_is_made_up_for(each_update: bool) -> None:
    dense = net()
    lost_by, networks = [], []
    for repair in (None, Repair([data()], samples=10)):
        model = copy.deepcopy(dense)
        found = pruner(model, repair, each_update=each_update)
        found.on_train_begin()
        found.on_epoch_begin(0)
        found.on_step_begin(0)
        lost_by.append(lost(model, dense))
        after_update = model(data())
        found.on_train_end()
        torch.testing.assert_close(model(data()), after_update, rtol=0, atol=1e-12)  # masked equals cut
        assert model[0].out_features == 8
        networks.append(model)
        assert (found.repaired is None) == (repair is None)
    assert lost_by[1] < 0.5 * lost_by[0]
    assert [layer.name for layer in found.repaired.repaired] == ["2", "4"]


def test_masked_and_cut_repairs_agree() -> None:
    outputs = []
    for each_update in (False, True):
        torch.manual_seed(0)
        model = net()
        found = pruner(model, Repair([data()]), each_update=each_update)
        found.on_train_begin(), found.on_epoch_begin(0), found.on_step_begin(0)
        outputs.append(model(data()))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)


def test_the_last_mask_is_repaired_before_the_cut() -> None:
    dense = net()
    model = copy.deepcopy(dense)
    found = pruner(model, Repair([data()]))
    found.on_train_begin()
    with pytest.warns(UserWarning, match="before the schedule did"):
        found.on_train_end()
    bare = copy.deepcopy(dense)
    other = pruner(bare, None)
    with pytest.warns(UserWarning, match="before the schedule did"):
        other.on_train_end()
    assert lost(model, dense) < 0.5 * lost(bare, dense)


def test_updates_while_training_stay_masked() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    found = Pruner(
        model,
        Magnitude(),
        structured=True,
        target_sparsity=0.5,
        schedule=Cubic(end_epoch=2, update_frequency=0.5),
        example_input=data(2),
        optimizer=optimizer,
        steps_per_epoch=4,
        shrink="each_update",
        repair=Repair([data()]),
    )
    found.on_train_begin()
    for epoch in range(3):
        found.on_epoch_begin(epoch)
        for step in range(4):
            found.on_step_begin(step)
            model(data(8)).square().mean().backward()
            found.on_before_optimizer_step()
            optimizer.step()
            found.on_step_end()
            optimizer.zero_grad()
        found.on_epoch_end()
    found.on_train_end()
    assert found.sparsity == pytest.approx(0.5, abs=0.05)
    assert found.updates > 2
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_copies_are_repaired_to_what_they_were() -> None:
    model, average = net(), net()
    dense = copy.deepcopy(average)
    found = pruner(model, Repair([data()]), copies=[average])
    found.on_train_begin(), found.on_epoch_begin(0), found.on_step_begin(0)
    masked = copy.deepcopy(dense)
    with torch.no_grad():
        for name, mask in found.masks().items():
            masked[int(name) + 2].weight[:, ~mask] = 0
    assert lost(average, dense) < 0.5 * lost(masked, dense)


def test_what_is_refused() -> None:
    with refused("units"):
        Pruner(net(), rules=[Rule(Magnitude(), target_sparsity=0.5)], repair=Repair([data()]))
    with refused("samples of the repair"):
        pruner(net(), Repair([torch.ones(3, 5).double()]))
    with refused("no batches"):
        Repair([])
    with refused("by", "magic"):
        Repair([data()], by="magic")  # type: ignore[arg-type]
    with refused("samples", "0"):
        Repair([data()], samples=0)


def test_samples_are_read_once_and_until_there_are_enough() -> None:
    seen = []

    def batches() -> object:
        for i in range(10):
            seen.append(i)
            yield data(4), torch.zeros(4)

    repair = Repair(batches(), samples=10)
    assert seen == [0, 1, 2]
    assert repair.samples == 12
    assert torch.equal(repair.inputs[0], data(4))


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free gradient descent (Defazio et al., 2024): steps are taken from z, the network is between z and x."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "beta": 0.9, "k": 0})

    def train(self) -> None: ...

    def eval(self) -> None:
        for group in self.param_groups:
            for y in group["params"]:
                y.data.lerp_(self.state[y]["z"], 1 - 1 / group["beta"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            c = 1 / group["k"]
            for y in group["params"]:
                z = self.state[y].setdefault("z", y.detach().clone())
                y.lerp_(z, c).add_(y.grad, alpha=group["lr"] * (group["beta"] * (1 - c) - 1))
                z.sub_(y.grad, alpha=group["lr"])


@pytest.mark.parametrize("each_update", [False, True])
def test_a_schedule_free_optimizer_goes_on_from_the_repaired_weights(each_update: bool) -> None:
    model = net()
    optimizer = ScheduleFree(model.parameters())
    found = Pruner(
        model,
        Magnitude(),
        structured=True,
        target_sparsity=0.5,
        scope="local",
        schedule=OneShot(start_epoch=1),
        example_input=data(2),
        optimizer=optimizer,
        shrink="each_update" if each_update else "at_end",
        repair=Repair([data()]),
    )
    for epoch in range(2):
        found.on_epoch_begin(epoch)
        before = {id(y): y.detach().clone() for y in model.parameters()}
        zs = {id(y): optimizer.state[y]["z"].clone() for y in model.parameters() if "z" in optimizer.state[y]}
        found.on_step_begin(0)
        if epoch == 1:
            break
        model(data()).square().mean().backward()
        found.on_before_optimizer_step()
        optimizer.step()
        found.on_step_end()
        optimizer.zero_grad()
        found.on_epoch_end()
    assert found.repaired is not None
    assert found.repaired.repaired
    named = dict(model.named_parameters())
    for name, y in named.items():
        z = optimizer.state[y]["z"]
        if not each_update:  # z has moved by what the weights have moved, where units are left
            kept = y != 0
            assert torch.allclose((z - zs[id(y)])[kept], (y - before[id(y)])[kept], atol=1e-12), name
        assert float((z - y).detach().abs().max()) < 0.2  # a step of the optimizer apart, no more
    as_repaired = {name: y.detach().clone() for name, y in named.items()}
    distance = {name: (optimizer.state[y]["z"] - y).detach() for name, y in named.items()}
    for y in named.values():
        y.grad = torch.zeros_like(y)
    optimizer.step()  # without a gradient: y goes halfway to z
    for name, y in named.items():
        assert torch.allclose(y, as_repaired[name] + distance[name] / 2, atol=1e-12)
