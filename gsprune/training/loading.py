"""The batches of an epoch, starting at any of them.

If no batch depends on those before it, finished batches are skipped in the sampler, without loading them:

- in the main process, a data set draws from the generators of Python, numpy and torch, whose state is restored;
- in worker processes, these generators are seeded for each batch, with the epoch's seed and the batch's number.

Otherwise the finished batches are loaded again and dropped: for a data set with random numbers of its own (a generator,
an iterator), for a stream, and for a loader that is no `DataLoader`.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

__all__ = ["Start", "batches", "fetched", "from_start", "generators", "is_skippable"]

_MOST = 10_000  # objects that are searched for random numbers of their own
_FEW = 100  # items of a list that are searched; the others are assumed to be alike
_PLAIN = (str, bytes, int, float, complex, type(None), type, ModuleType, torch.Tensor, np.ndarray, np.generic)
# restored, and seeded in workers
_GLOBAL = (random._inst, np.random.mtrand._rand, torch.default_generator)
_OWN = (torch.Generator, np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random, Iterator)


@dataclass(frozen=True)
class Start:
    """Where in an epoch to start.

    Args:
        batches: number of finished batches.
        then: called after they are skipped, before the next batch is loaded.
        between: called after each finished batch that has to be loaded again.
    """

    batches: int
    then: Callable[[], None]
    between: Callable[[], None] = lambda: None


def batches(loader: Any, start: Start | None = None) -> Iterator[Any]:
    """The batches of the loader, from `start` on."""
    if is_skippable(loader) and (start or loader.num_workers):
        return fetched(loader, start)
    return from_start(loader, start)


def from_start(found: Iterable[Any], start: Start | None) -> Iterator[Any]:
    """The batches of `found` after `start`: those before it are loaded and dropped."""
    waiting = iter(found)
    if start is not None:
        for _ in islice(waiting, start.batches):
            start.between()
        start.then()
    yield from waiting


def fetched(
    loader: DataLoader[Any],
    start: Start | None = None,
    *,
    share: Callable[[list[Any]], list[Any]] = lambda indices: indices,
    spread: int = 0,
) -> Iterator[Any]:
    """The batches of a loader in its own order.

    Args:
        share: indices of a batch -> those to load.
        spread: added to the seed of the worker processes.
    """
    # In the order in which an epoch draws them: the seed of the workers, then the batches.
    seed = int(torch.empty((), dtype=torch.int64).random_(generator=loader.generator))
    assert loader.batch_sampler is not None
    order = enumerate(map(list, loader.batch_sampler))
    if start is not None:
        deque(islice(order, start.batches), maxlen=0)
    more: dict[str, Any] = {"prefetch_factor": loader.prefetch_factor} if loader.num_workers else {}
    local = DataLoader(
        _Seeded(loader.dataset) if loader.num_workers else loader.dataset,
        batch_sampler=_Once(_Numbered(share(indices), number) for number, indices in order),
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator().manual_seed((seed + spread) % 2**63),
        **more,
    )
    waiting = iter(local)
    if start is not None:
        start.then()
    yield from waiting


def is_skippable(loader: Any) -> bool:
    """Whether no batch of the loader depends on the batches before it."""
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return False
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None or loader.persistent_workers:
        return False
    return not _keeps_random_numbers([loader.dataset, loader.collate_fn], known=generators(loader).values())


def generators(loader: Any) -> dict[str, torch.Generator]:
    """The generators that a loader's order comes from, by the object that holds them."""
    sampler = getattr(loader, "sampler", None)
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = {"loader": loader, "sampler": sampler, "batch_sampler": batch_sampler}
    owners["batches_of"] = getattr(batch_sampler, "sampler", None)
    found: dict[str, torch.Generator] = {}
    for name, owner in owners.items():
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and not any(generator is other for other in found.values()):
            found[name] = generator
    return found


def _keeps_random_numbers(roots: list[Any], known: Iterable[torch.Generator]) -> bool:
    """Whether one of the objects, or one reachable from it, has a state that later items depend on.

    >>> _keeps_random_numbers([{"transforms": [random.Random(0)]}], known=())
    True
    >>> _keeps_random_numbers([[("a.png", 1)] * 10**6, torch.zeros(3)], known=())
    False
    """
    seen, waiting = {id(generator) for generator in (*known, *_GLOBAL)}, list(roots)
    while waiting:
        value = waiting.pop()
        if isinstance(value, _PLAIN) or id(value) in seen:
            continue
        if isinstance(value, _OWN) or len(seen) > _MOST:
            return True
        seen.add(id(value))
        waiting += _inside(value)
    return False


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from islice(value.values(), _FEW)
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from islice(value, _FEW)
    if hasattr(value, "__dict__") and type(value).__module__ != "builtins":
        yield from list(vars(value).values())
    for name in ("func", "args", "keywords", "__self__", "__wrapped__"):  # of partials and bound methods
        if hasattr(type(value), name):
            yield getattr(value, name)
    for cell in getattr(value, "__closure__", None) or ():
        yield cell.cell_contents


class _Numbered(list[Any]):
    """The indices of a batch, and its number in the epoch."""

    def __init__(self, indices: Iterable[Any], number: int) -> None:
        super().__init__(indices)
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _Numbered, (list(self), self.number)


@dataclass(frozen=True)
class _Once(Sampler[list[Any]]):
    """Index lists as a batch sampler, for one epoch."""

    batches: Iterator[list[Any]]

    def __iter__(self) -> Iterator[list[Any]]:
        return self.batches


class _Seeded(Dataset[Any]):
    """A data set in a worker process that seeds random numbers for each batch; otherwise it acts as the one inside."""

    def __init__(self, inside: Dataset[Any]) -> None:
        object.__setattr__(self, "_inside", inside)

    def __getitems__(self, batch: _Numbered) -> Any:
        worker = get_worker_info()
        assert worker is not None
        _seed(worker.seed - worker.id, batch.number)
        inside = self._inside
        return inside.__getitems__(list(batch)) if hasattr(inside, "__getitems__") else [inside[i] for i in batch]

    def __len__(self) -> int:
        return len(self._inside)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_inside"), name)

    def __setattr__(self, name: str, value: Any) -> None:  # as a worker_init_fn may do
        setattr(self._inside, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Seeded, (self._inside,)


def _seed(epoch: int, batch: int) -> None:
    first, second, third = np.random.SeedSequence([epoch % 2**64, batch]).generate_state(3, np.uint64).tolist()
    random.seed(first)
    np.random.seed(second % 2**32)
    torch.default_generator.manual_seed(third % 2**63)
