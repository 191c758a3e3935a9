"""Training that is interrupted between any two steps goes on as if it had not been."""

from __future__ import annotations

import copy
import functools
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from gsprune import Pruner
from gsprune.training.loading import from_start
from gsprune.training.loop_state import LoopState, random_state, set_random_state
from gsprune.training.optimization import warmup_cosine
from gsprune.training.trainer import Trainer, seed_everything

CPU = torch.device("cpu")


class Noisy(Dataset):
    """Samples that change each time they are fetched, by the generators of torch, numpy and Python."""

    def __len__(self):
        return 22

    def __getitem__(self, index):
        noise = torch.rand(4) + float(np.random.rand()) + random.random()
        return noise + index, index % 3


def own_generator(**more):
    return DataLoader(Noisy(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5), **more)


class Own(Noisy):
    """One that keeps a generator of its own, of which nobody else knows the state."""

    def __init__(self):
        self.transforms = [functools.partial(torch.rand, 4, generator=torch.Generator().manual_seed(1))]


def with_replacement():
    sampler = RandomSampler(Noisy(), replacement=True, num_samples=22, generator=torch.Generator().manual_seed(6))
    return DataLoader(Noisy(), batch_size=4, sampler=sampler)


LOADERS = {
    "its own generator": own_generator,
    "its sampler's generator": with_replacement,
    "workers, its sampler's order": lambda: DataLoader(Noisy(), batch_size=4, num_workers=2, prefetch_factor=3),
    "torch's generator": lambda: DataLoader(Noisy(), batch_size=4, shuffle=True),
    "workers": lambda: own_generator(num_workers=2),
}


class Training:
    """A network with dropout, its optimizer and schedule, as two processes build them alike."""

    def __init__(self, loader, **settings):
        seed_everything(3)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.schedule = warmup_cosine(self.optimizer, total_steps=12)
        self.teacher = copy.deepcopy(self.model) if settings.get("distill") else None
        self.loader, self.trainer = loader, Trainer(device="cpu", progress="none", **settings)
        self.rows = []

    def state(self, at):
        parts = (self.model, self.optimizer, self.schedule, at)
        return copy.deepcopy([part.state_dict() for part in parts]), list(self.rows)

    def load(self, saved):
        (model, optimizer, schedule, position), self.rows = saved[0], list(saved[1])
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        self.schedule.load_state_dict(schedule)
        return position

    def fit(self, start=None, on_rest=lambda at: None):
        def on_epoch(epoch, values):
            self.rows.append({name: value for name, value in values.items() if name != "epoch_seconds"})

        self.trainer.fit(
            self.model,
            self.loader,
            DataLoader(Noisy(), batch_size=11),
            optimizer=self.optimizer,
            lr_schedule=self.schedule,
            pruner=Pruner(self.model, rules=[]),
            epochs=2,
            teacher=self.teacher,
            on_epoch=on_epoch,
            on_rest=on_rest,
            start=start,
        )
        return self


@pytest.mark.parametrize("kind", LOADERS)
def test_from_any_position_training_ends_with_the_same_bits(kind):
    saved = []
    whole = Training(LOADERS[kind](), accumulate_steps=2)
    whole.fit(on_rest=lambda at: saved.append(((at.epoch, at.step), whole.state(at))))
    validating = [(0, 3), (0, 3)]  # after each of its batches
    assert [place for place, _ in saved[:6]] == [(0, 1), (0, 2), (0, 3), *validating, (1, 0)]
    assert [place for place, _ in saved[6:]] == [(1, 1), (1, 2), (1, 3), (1, 3), (1, 3), (2, 0)]
    for place, state in saved[:: 3 if "workers" in kind else 1]:
        again = Training(LOADERS[kind](), accumulate_steps=2)
        seed_everything(99)  # another process has drawn something else by now
        again.fit(start=again.load(state))
        for ours, theirs in zip(again.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs), place
        assert again.rows == whole.rows, place


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_with_a_teacher_training_resumes_with_the_same_bits(precision):
    saved, settings = [], {"distill": 0.5, "precision": precision}
    whole = Training(own_generator(), **settings)
    whole.fit(on_rest=lambda at: saved.append(whole.state(at)))
    again = Training(own_generator(), **settings)
    again.fit(start=again.load(saved[len(saved) // 2 + 1]))
    assert whole.rows[-1]["train/distill_loss"] > 0
    assert again.rows == whole.rows
    for ours, theirs in zip(again.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_exception_between_two_steps_ends_the_training_there():
    training, places = Training(own_generator()), []

    def stop(at):
        places.append((at.epoch, at.step))
        if at.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.fit(on_rest=stop)
    assert places == [(0, 1), (0, 2)]


def test_a_gradient_scaler_goes_on_with_its_scale():
    saved, scales = [], []
    whole = Training(own_generator(), precision="fp16")
    whole.fit(on_rest=lambda at: saved.append(whole.state(at)))
    again = Training(own_generator(), precision="fp16")
    again.fit(start=again.load(saved[4]), on_rest=lambda at: scales.append(at.state_dict()["parts"]["scaler"]))
    assert scales == [state[3]["parts"]["scaler"] for state, _ in saved[5:]]
    assert scales[-1]["scale"] > 0
    assert scales[-1]["_growth_tracker"] != saved[0][0][3]["parts"]["scaler"]["_growth_tracker"]


def test_steps_that_were_left_out_are_counted_over_both_processes():
    class Bad(Noisy):
        def __getitem__(self, index):
            inputs, label = super().__getitem__(index)
            return (inputs * math.nan if index == 3 else inputs), label

    def loader():
        return DataLoader(Bad(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5))

    saved = []
    whole = Training(loader(), max_bad_steps=5)
    whole.fit(on_rest=lambda at: saved.append(whole.state(at)))
    assert [row["train/skipped_steps"] for row in whole.rows] == [1, 1]
    for state in saved:
        again = Training(loader(), max_bad_steps=5)
        again.fit(start=again.load(state))
        assert repr(again.rows) == repr(whole.rows)


def test_random_state_holds_every_generator_as_data():
    loader = own_generator()
    seed_everything(7)
    state = random_state(CPU, loader)

    def draw():
        return (
            random.random(),
            random.gauss(0, 1),
            np.random.rand(),
            np.random.randn(),
            torch.rand(()).item(),
            list(loader.sampler),
        )

    drawn = draw()
    assert drawn != draw()
    set_random_state(state, CPU, loader)
    assert drawn == draw()
    assert set(state) == {"python", "numpy", "torch", "loader"}


def test_the_seconds_of_an_epoch_count_in_all_processes():
    at = LoopState(CPU, {})
    at.steps([1, 2, 3], lambda start: from_start([1, 2, 3], start), _Nothing())
    assert at.state_dict()["seconds"] == 0.0
    at.step = 1
    assert 0.0 < at.state_dict()["seconds"] < 10.0
    later = LoopState(CPU, {}, {**at.state_dict(), "seconds": 100.0})
    assert list(later.steps([1, 2, 3], lambda start: from_start([1, 2, 3], start), _Nothing())) == [(1, 2), (2, 3)]
    assert 100.0 <= later.seconds < 110.0


class _Nothing:
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass
