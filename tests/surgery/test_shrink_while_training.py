"""Units cut out at each update: every step is the masked model's step, for optimizers, averages and resumed runs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
from facts import refused
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gsprune import Pruner
from gsprune.criteria import PLATON, Abs, Criterion, Fisher, Magnitude, Weighted
from gsprune.schedules import Linear, OneShot
from gsprune.surgery.apply import apply_cut

STEPS, EPOCHS = 4, 4
NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet": nets.ResNet,
    "mobile": nets.Mobile,
    "dense": nets.Dense,
    "cat-add": lambda: nn.Sequential(nets.CatAdd(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "vit": nets.ViT,
    "encoder": lambda: nn.Sequential(
        nn.Flatten(2),
        nn.TransformerEncoderLayer(64, 4, 16, dropout=0.0, batch_first=True),
        nn.Flatten(),
        nn.Linear(192, 3),
    ),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.05),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, eps=1e-3),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(3)
    return nets.settle(NETS[name]()).double()


def batch(epoch: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * epoch + step)
    return torch.randn(6, 3, 8, 8, generator=generator).double(), torch.randint(0, 2, (6,), generator=generator)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups of parameters with settings of their own."""
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if "bias" in n], "lr": 0.03},
        {"params": [p for n, p in named if "bias" not in n]},
    ]


class Run:
    """A model in training, with everything that holds its parameters."""

    def __init__(self, name: str, optimizer: str, shrink: str, criterion: Criterion | None = None) -> None:
        self.model = build(name)
        self.optimizer = OPTIMIZERS[optimizer](groups(self.model))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, [lambda t: 0.9**t, lambda t: 0.95**t])
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
        self.pruner = Pruner(
            self.model,
            criterion or Abs(decay=0.9),
            target_sparsity=0.6,
            structured=True,
            schedule=Linear(end_epoch=2, update_frequency=0.5),
            example_input=batch(9, 9)[0],
            optimizer=self.optimizer,
            steps_per_epoch=STEPS,
            shrink=shrink,  # type: ignore[arg-type]
            copies=[self.average.module],
        )

    def train(self, first: int = 0, last: int = EPOCHS) -> list[float]:
        losses = []
        self.pruner.on_train_begin()
        for epoch in range(first, last):
            self.pruner.on_epoch_begin(epoch)
            for step in range(STEPS):
                losses.append(self.step(epoch, step))
            self.pruner.on_epoch_end()
        return losses

    def step(self, epoch: int, step: int) -> float:
        self.pruner.on_step_begin(step)
        x, y = batch(epoch, step)
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.pruner.on_before_optimizer_step()
        self.optimizer.step()
        self.pruner.on_step_end()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.average.update_parameters(self.model)
        return loss.item()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", NETS)
def test_every_step_is_that_of_the_masked_model(name: str, optimizer: str) -> None:
    masked, cut = Run(name, optimizer, "at_end"), Run(name, optimizer, "each_update")
    dense = sum(p.numel() for p in cut.model.parameters())
    assert cut.train() == pytest.approx(masked.train(), rel=1e-9)
    assert (
        sum(p.numel() for p in cut.model.parameters())
        < 0.8 * dense
        == 0.8 * sum(p.numel() for p in masked.model.parameters())
    )
    masked.pruner.on_train_end()
    cut.pruner.on_train_end()
    assert cut.pruner.plan is not None
    assert cut.pruner.plan.to_json() == masked.pruner.plan.to_json()
    same(cut.model.state_dict(), masked.model.state_dict())
    same(cut.average.module.state_dict(), masked.average.module.state_dict())
    for mine, other in zip(cut.optimizer.param_groups, masked.optimizer.param_groups, strict=True):
        assert {k: v for k, v in mine.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}
        for p, q in zip(mine["params"], other["params"], strict=True):
            same(cut.optimizer.state[p], masked.optimizer.state[q])


def same(mine: dict[str, Any], other: dict[str, Any]) -> None:
    assert set(mine) == set(other)
    for name, value in other.items():
        assert (value is None and mine[name] is None) or mine[name].shape == value.shape, name
        if value is not None:
            torch.testing.assert_close(
                mine[name], value, rtol=1e-7, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_the_model_is_smaller_after_each_update() -> None:
    run = Run("resnet", "sgd", "each_update")
    sizes = []
    run.pruner.on_train_begin()
    for epoch in range(2):
        run.pruner.on_epoch_begin(epoch)
        for step in range(STEPS):
            run.step(epoch, step)
            sizes.append((run.model.conv1.out_channels, run.model.bn1.num_features, len(run.model.conv1.weight)))
            assert run.pruner.report()["kept/conv1"] == sizes[-1][0]
    # updates at epochs 0.5, 1, ... of Linear over 5 half epochs: 0.12, 0.24, ... of 6 channels
    assert sorted({size[0] for size in sizes}, reverse=True) == [6, 5, 4, 3]
    assert all(len(set(size)) == 1 for size in sizes)
    assert {name: mask.shape for name, mask in run.pruner.masks().items()} == {"stem": (8,), "conv1": (6,)}


@pytest.mark.parametrize("criterion", [Weighted(decay=0.9), Abs(normalize=False), PLATON(), Magnitude()])
def test_masks_are_those_of_the_masked_run(criterion: Criterion) -> None:
    masked = Run("mobile", "adam", "at_end", copy.deepcopy(criterion))
    cut = Run("mobile", "adam", "each_update", copy.deepcopy(criterion))
    masked.train()
    cut.train()
    for name, mask in masked.pruner.masks().items():
        assert torch.equal(cut.pruner.masks()[name], mask), name


@pytest.mark.parametrize("make", [Weighted, PLATON, Fisher])
def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(make: Callable[[], Criterion]) -> None:
    whole = Run("resnet", "adam", "each_update", make())
    whole.train()
    first = Run("resnet", "adam", "each_update", make())
    first.train(last=1)
    saved = copy.deepcopy(
        (first.pruner.state_dict(), first.model.state_dict(), first.optimizer.state_dict(), first.schedule.state_dict())
    )
    again = Run("resnet", "adam", "each_update", make())
    again.pruner.load_state_dict(saved[0])
    again.model.load_state_dict(saved[1])
    again.optimizer.load_state_dict(saved[2])
    again.schedule.load_state_dict(saved[3])
    again.train(first=1)
    assert again.pruner.plan is not None
    assert whole.pruner.plan is not None
    assert again.pruner.plan.to_json() == whole.pruner.plan.to_json()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_an_attached_pruner_shrinks_under_way() -> None:
    model = build("resnet")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = Pruner(
        model,
        Weighted(),
        target_sparsity=0.5,
        schedule=OneShot(start_epoch=0.5),
        example_input=batch(9, 9)[0],
        steps_per_epoch=STEPS,
        shrink="each_update",
    )
    pruner.attach(optimizer)
    widths = []
    for step in range(STEPS):
        x, y = batch(0, step)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        widths.append(model.conv1.out_channels)
    assert widths == [6, 3, 3, 3]
    assert pruner.finish() is model
    assert model.conv1.out_channels == 3


def test_without_its_optimizer_a_model_cannot_shrink_while_it_trains() -> None:
    pruner = Pruner(build("resnet"), Abs(), target_sparsity=0.5, example_input=batch(0, 0)[0], shrink="each_update")
    with refused("each_update", "optimizer"):
        pruner.on_train_begin()


def test_a_copy_of_another_architecture_is_refused() -> None:
    with refused("'stem.weight'", "copy"):
        Pruner(
            build("resnet"),
            Abs(),
            target_sparsity=0.5,
            example_input=batch(0, 0)[0],
            copies=[AveragedModel(build("resnet"))],
        )


def test_the_model_is_no_copy_of_itself() -> None:
    model = build("resnet")
    with refused("copy", "shares parameters"):
        Pruner(model, Abs(), target_sparsity=0.5, example_input=batch(0, 0)[0], copies=[model])


def test_the_time_to_shrink_has_two_values() -> None:
    with refused("'always'", "at_end", "each_update"):
        Pruner(nets.mlp(), Abs(), target_sparsity=0.5, example_input=torch.ones(1, 6), shrink="always")  # type: ignore[arg-type]


def test_a_state_is_loaded_into_a_pruner_of_the_dense_model() -> None:
    run = Run("resnet", "sgd", "each_update")
    run.train()
    with refused("cut", "dense model"):
        run.pruner.load_state_dict(run.pruner.state_dict())


def test_the_plan_of_a_run_rebuilds_its_model_from_the_dense_one() -> None:
    run = Run("vit", "adam", "each_update")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.train()
        run.pruner.on_train_end()
    fresh = build("vit")
    assert run.pruner.plan is not None
    apply_cut(fresh, run.pruner.plan)
    fresh.load_state_dict(run.model.state_dict())
    x = batch(5, 5)[0]
    assert torch.equal(fresh(x), run.model(x))
