"""Bad numbers: a step whose gradients are not finite leaves no trace, is counted, and ends the run if it goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from facts import refused
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gsprune import Pruner
from gsprune.criteria import Elementwise
from gsprune.training.guard import LOOK, BadNumbers, Guard
from gsprune.training.optimization import constant
from gsprune.training.trainer import Trainer

Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, fused=True),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def batches(count: int, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 5, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def spoiled(data: list[tuple[Tensor, Tensor]], *where: int, value: float = math.nan) -> list[tuple[Tensor, Tensor]]:
    """The same batches, with one value of some replaced."""
    data = [(inputs.clone(), labels) for inputs, labels in data]
    for i in where:
        data[i][0][0, 0] = value
    return data


class Quiet:
    """A pruner that prunes nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def fit(
    model: nn.Module,
    data: Any,
    *,
    make: Make = OPTIMIZERS["fused sgd"],
    epochs: int = 1,
    pruner: Any = None,
    **settings: Any,
) -> tuple[torch.optim.Optimizer, list[dict[str, float]]]:
    optimizer, rows = make(model.parameters()), []
    Trainer(device="cpu", **settings).fit(
        model, data, None, optimizer=optimizer, lr_schedule=constant(optimizer, total_steps=99), epochs=epochs,
        pruner=pruner(model, optimizer) if pruner else Quiet(), on_epoch=lambda epoch, values: rows.append(values),
    )  # fmt: skip
    return optimizer, rows


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything a step changes, by name."""
    found = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        found |= {f"{name}/{key}": value for key, value in optimizer.state[parameter].items() if value is not None}
    return found


def assert_equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


# ---- one step


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 2, 3], ids=["first", "middle", "last"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_with_a_bad_batch_is_bit_for_bit_the_run_without_it(name: str, where: int, value: float) -> None:
    data, model, plain = batches(4), net(), net()
    optimizer, rows = fit(model, spoiled(data, where, value=value), make=OPTIMIZERS[name])
    expected, without = fit(plain, [*data[:where], *data[where + 1 :]], make=OPTIMIZERS[name])
    assert_equal_states(state(model, optimizer), state(plain, expected))
    assert rows[0]["train/skipped_steps"] == 1
    assert "train/skipped_steps" not in without[0]
    # what the epoch reports is the mean over the batches that had a loss
    assert rows[0]["train/loss"] == without[0]["train/loss"]
    assert rows[0]["train/accuracy"] == without[0]["train/accuracy"]


def test_one_bad_batch_of_a_group_makes_the_whole_group_bad() -> None:
    data, model, plain = batches(6), net(), net()
    optimizer, rows = fit(model, spoiled(data, 3), accumulate_steps=2)
    expected, _ = fit(plain, [*data[:2], *data[4:]], accumulate_steps=2)
    assert_equal_states(state(model, optimizer), state(plain, expected))
    assert rows[0]["train/skipped_steps"] == 1


def test_a_gradient_that_is_bad_in_one_layer_only_skips_the_step_of_all() -> None:
    data, model, plain = batches(3), net(), net()
    seen = iter([1.0, math.inf, 1.0])
    model[3].bias.register_hook(lambda grad: grad * next(seen))
    optimizer, rows = fit(model, data)
    expected, _ = fit(plain, [data[0], data[2]])
    assert_equal_states(state(model, optimizer), state(plain, expected))
    assert rows[0]["train/skipped_steps"] == 1
    assert math.isfinite(rows[0]["train/loss"])


def test_clipping_counts_a_bad_step_too_and_clips_the_others() -> None:
    data, model, plain = batches(4), net(), net()
    optimizer, _ = fit(model, spoiled(data, 1), clip_norm=0.01)
    expected, _ = fit(plain, [data[0], *data[2:]], clip_norm=0.01)
    assert_equal_states(state(model, optimizer), state(plain, expected))


def test_the_pruner_takes_no_score_from_a_step_that_is_bad_elsewhere() -> None:
    def pruner(model: nn.Module, optimizer: torch.optim.Optimizer) -> Pruner:
        made.append(Pruner(model, Elementwise(), target_sparsity=0.5, epochs=9, optimizer=optimizer))
        return made[-1]

    made: list[Pruner] = []
    data, model, plain = batches(3), net(), net()
    seen = iter([1.0, math.nan, 1.0])
    model[1].bias.register_hook(lambda grad: grad * next(seen))  # of the BatchNorm: nothing that is pruned
    with pytest.warns(UserWarning, match="training ended"):
        fit(model, data, pruner=pruner)
    with pytest.warns(UserWarning, match="training ended"):
        fit(plain, [data[0], data[2]], pruner=pruner)
    assert [one.state_dict()["rules"][0]["scored"] for one in made] == [2, 2]
    assert_equal_states(made[0].scores(), made[1].scores())


def test_buffers_that_cannot_be_spoiled_are_left_alone_and_others_put_back() -> None:
    class Buffers(nn.Linear):
        def __init__(self) -> None:
            super().__init__(5, 3)
            self.register_buffer("positions", torch.arange(4).expand(2, 4))  # cannot be written to
            self.register_buffer("mean", torch.zeros(5))
            self.register_buffer("largest", torch.zeros((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.5 * self.mean + x.detach().mean(0)  # another tensor in its place
            self.largest.copy_(x.detach().max())
            return super().forward(x)

    data, model, plain = batches(3), Buffers(), Buffers()
    plain.weight, plain.bias = nn.Parameter(model.weight.detach().clone()), nn.Parameter(model.bias.detach().clone())
    fit(model, spoiled(data, 1))
    fit(plain, [data[0], data[2]])
    assert_equal_states(model.state_dict(), plain.state_dict())


def test_sparse_and_wide_gradients_are_seen() -> None:
    table = nn.Embedding(4, 2, sparse=True).double()
    guard = Guard(table, torch.optim.SGD(table.parameters(), lr=0.1), limit=0)
    for factor, skipped in ((1.0, 0), (1e100, 0), (math.inf, 1)):
        table.zero_grad()
        (table(torch.tensor([1, 1])).sum() * factor).backward()
        guard.judge()
        assert guard.skipped == skipped


# ---- nothing waits


class NoSync(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a host sync inside a step"
        return func(*args, **(kwargs or {}))


class Watched(list):
    """Batches under the watch of NoSync: on while a step runs, off where the epoch ends."""

    def __iter__(self):
        with NoSync():
            yield from super().__iter__()


@pytest.mark.parametrize("name", ["fused sgd", "fused adamw"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nothing_waits_for_the_device_to_skip_a_step_or_to_count_it(name: str, precision: str) -> None:
    model = net()
    data = Watched(spoiled(batches(3 * LOOK), 0, 1, 5, 6))
    _, rows = fit(model, data, make=OPTIMIZERS[name], clip_norm=1.0, precision=precision)
    assert rows[0]["train/skipped_steps"] == 4
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


def test_an_optimizer_without_a_fused_form_waits_once_a_step() -> None:
    with pytest.raises(AssertionError, match="a host sync inside a step"):
        fit(net(), Watched(batches(1)), make=OPTIMIZERS["sgd"])


# ---- the end


def test_bad_for_ever_stops_the_run_with_the_last_good_state() -> None:
    data, model, plain = batches(2 + 3 * LOOK), net(), net()
    kept: list[torch.optim.Optimizer] = []
    with pytest.raises(BadNumbers) as error:
        fit(
            model,
            spoiled(data, *range(2, len(data))),
            make=lambda p: (kept.append(OPTIMIZERS["fused sgd"](p)), kept[0])[1],
            max_bad_steps=3,
        )
    # noticed at the second look after the fourth bad step, so after 16 steps
    assert str(error.value) == (
        "6 steps in a row had gradients that are not finite, first that of '0.weight' (nan), 6 of 6: lower "
        "optimizer.lr (or trainer.prune_lr), set trainer.clip_norm, look at the data, or raise trainer.max_bad_steps=3"
    )
    expected, _ = fit(plain, data[:2])
    assert_equal_states(state(model, kept[0]), state(plain, expected))


def test_the_end_names_the_only_layer_that_is_bad_and_comes_at_the_end_of_a_short_epoch() -> None:
    model = net()
    model[3].weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(BadNumbers) as error:
        fit(model, batches(3), max_bad_steps=0)
    assert str(error.value) == (
        "3 steps in a row had gradients that are not finite, first that of '3.weight' (inf), 1 of 6: lower "
        "optimizer.lr (or trainer.prune_lr), set trainer.clip_norm, look at the data, or raise trainer.max_bad_steps=0"
    )


def test_a_streak_is_counted_over_epochs_and_good_steps_end_it() -> None:
    data = batches(4)
    fit(net(), spoiled(data, 0, 1, 3), epochs=2, max_bad_steps=3)  # bad: 0, 1, 3, 4, 5, 7
    with refused("3 steps", "'0.weight'", "nan", "6 of 6", error=BadNumbers):
        fit(net(), spoiled(data, 0, 1, 3), epochs=2, max_bad_steps=2)


def test_a_streak_too_long_is_seen_also_when_it_is_over_and_its_own_tensor_is_named() -> None:
    model = net()
    factors = iter([1.0, math.nan, math.nan, 1.0, 1.0])
    model[0].bias.register_hook(lambda grad: grad * next(factors))
    with refused("2 steps", "'0.bias'", "nan", "1 of 6", error=BadNumbers):
        fit(model, spoiled(batches(5), 4), max_bad_steps=1)


def test_a_mask_that_holds_inf_on_purpose_is_not_blamed() -> None:
    model = net()
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    with refused("3 steps", "'0.weight'", "nan", "6 of 6", error=BadNumbers):
        fit(model, spoiled(batches(3), 0, 1, 2), max_bad_steps=0)


def test_a_weight_that_is_not_finite_itself_is_named() -> None:
    model = net()
    with torch.no_grad():
        model[3].bias[1] = math.inf
    with refused("4 steps", "'3.bias'", "inf", error=BadNumbers):
        fit(model, batches(4), max_bad_steps=0)


def test_an_epoch_without_any_good_batch_has_no_loss() -> None:
    _, rows = fit(net(), spoiled(batches(2), 0, 1))
    assert math.isnan(rows[0]["train/loss"])
    assert math.isnan(rows[0]["train/accuracy"])
    assert rows[0]["train/skipped_steps"] == 2


def test_a_loss_that_is_not_finite_is_no_secret_in_an_evaluation() -> None:
    assert math.isnan(Trainer(device="cpu").evaluate(net(), spoiled(batches(2), 1))["loss"])


def test_the_streak_tells_whether_the_last_step_was_good() -> None:
    model = net()
    optimizer = OPTIMIZERS["fused sgd"](model.parameters())
    guard, found = Guard(model, optimizer, limit=9), []
    for inputs, labels in spoiled(batches(4), 1, 2):
        guard.begin()
        F.cross_entropy(model(inputs), labels).backward()
        guard.judge()
        guard.step()
        optimizer.zero_grad()
        found.append((guard.streak, guard.skipped))
    assert found == [(0, 0), (1, 1), (2, 2), (0, 2)]
    assert not hasattr(optimizer, "found_inf")


def test_the_setting_is_checked() -> None:
    with refused("trainer.max_bad_steps=-1", "0 or more"):
        Trainer(device="cpu", max_bad_steps=-1)
