"""Batches that are done are not fetched again where none depends on those before; where they may, all are."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from jobs import write_pictures
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, get_worker_info

from gsprune.training.loading import Start, batches, generators, is_skippable
from gsprune.training.loop_state import random_state, set_random_state
from gsprune.zoo import datasets
from gsprune.zoo.datasets import make_loader

CPU = torch.device("cpu")


class Noisy(Dataset[Any]):
    """Item i is i and noise of every generator; `fetched` lists what this process was asked for."""

    def __init__(self, **more: Any) -> None:
        self.fetched: list[int] = []
        self.__dict__ |= more

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> Any:
        self.fetched.append(index)
        noise = torch.rand(2) + float(np.random.rand()) + random.random()
        return noise + index, torch.tensor(self.extra if hasattr(self, "extra") else 0)


def loader(dataset: Dataset[Any] | None = None, **settings: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    return DataLoader(dataset or Noisy(), batch_size=4, shuffle=True, generator=generator, **settings)


def seed() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)


def rest_of(make: Callable[[], DataLoader[Any]], done: int) -> tuple[list[torch.Tensor], list[torch.Tensor], Any]:
    """What comes after so many batches, in an epoch left alone and in one that begins there; and that one's loader."""
    whole = make()
    seed()
    order, running = random_state(CPU, whole), batches(whole)
    for _ in range(done):
        next(running)
    between = random_state(CPU, whole)
    expected = [batch[0] for batch in running]
    again = make()
    torch.manual_seed(99)
    set_random_state(order, CPU, again)
    start = Start(done, lambda: set_random_state(between, CPU, again))
    return expected, [batch[0] for batch in batches(again, start)], again


@pytest.mark.parametrize("done", [1, 4, 6])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_anywhere_with_the_same_batches_and_fetches_only_those(done: int, workers: int) -> None:
    expected, found, again = rest_of(lambda: loader(num_workers=workers), done)
    assert len(found) == 6 - done
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert len(again.dataset.fetched) == (0 if workers else max(0, 22 - 4 * done))  # type: ignore[attr-defined]


def test_with_numbers_of_its_own_a_data_set_is_fetched_from_the_start() -> None:
    expected, found, again = rest_of(lambda: loader(Noisy(own=torch.Generator())), 3)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert len(again.dataset.fetched) == 22  # type: ignore[attr-defined]


def test_somebody_is_asked_between_two_batches_that_are_fetched_again() -> None:
    asked: list[int] = []
    again = loader(Noisy(own=iter([])))

    def stop() -> None:
        asked.append(len(again.dataset.fetched))  # type: ignore[attr-defined]
        if len(asked) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(batches(again, Start(5, lambda: None, stop)))
    assert asked == [4, 8]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(range(3))


@pytest.mark.parametrize(
    ("make", "skippable"),
    [
        (loader, True),
        (lambda: loader(num_workers=2), True),
        (lambda: loader(num_workers=2, persistent_workers=True), False),
        (lambda: loader(Subset(Noisy(transform=functools.partial(print, random.random)), range(9))), True),
        (lambda: loader(Subset(Noisy(transform=functools.partial(print, random.Random(0).random)), range(9))), False),
        (lambda: loader(Noisy(deep={"a": [np.random.default_rng(0)]})), False),
        (lambda: loader(collate_fn=(lambda rng: lambda batch: (batch, rng.random()))(np.random.default_rng(0))), False),
        (lambda: DataLoader(Stream(), batch_size=2), False),
        (lambda: DataLoader(Noisy(), batch_size=None), False),
        (lambda: [1, 2, 3], False),
        (lambda: make_loader(datasets.digits().train, batch_size=64, train=True, device="cpu"), True),
        (
            lambda: make_loader(
                datasets.random(samples=40).train.take(torch.arange(9), augment=True),
                batch_size=4,
                train=True,
                device="cpu",
            ),
            True,
        ),  # type: ignore[attr-defined]
    ],
)
def test_what_is_skipped_and_what_is_not(make: Callable[[], Any], skippable: bool) -> None:
    assert is_skippable(make()) == skippable


def test_the_reference_pictures_from_files_are_skipped(tmp_path: Any) -> None:
    splits = datasets.imagefolder(write_pictures(tmp_path), num_classes=2, image_size=16)
    assert is_skippable(make_loader(splits.train, batch_size=4, train=True, device="cpu", num_workers=2))


def test_workers_see_the_data_set_itself() -> None:
    def init(worker: int) -> None:
        get_worker_info().dataset.extra = 7  # type: ignore[union-attr]

    found = list(batches(loader(num_workers=1, worker_init_fn=init)))
    assert {int(value) for _, values in found for value in values} == {7}
    assert len({tuple(row) for rows, _ in found for row in rows.frac().tolist()}) == 22  # no two draw the same


def test_every_generator_of_an_order_is_known() -> None:
    first, second = torch.Generator(), torch.Generator()
    sampler = torch.utils.data.RandomSampler(range(4), generator=second)
    assert list(generators(DataLoader(range(4), sampler=sampler, generator=first)).values()) == [first, second]
    batch_sampler = torch.utils.data.BatchSampler(sampler, 2, False)
    assert list(generators(DataLoader(range(4), batch_sampler=batch_sampler)).values()) == [second]
    assert list(generators(DataLoader(range(4), shuffle=True, generator=first)).values()) == [first]
