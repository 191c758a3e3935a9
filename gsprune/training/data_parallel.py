"""Data-parallel training: the network and the data in several processes.

Each process trains on its part of every global batch, and `DistributedDataParallel` averages the gradients, so weights,
scores and masks are equal in all processes. The order of the data is that of one process; `DistributedSampler` would
change it, and repeat samples.

In a single process every function is the identity, so the training loop has no branches. There are several as soon as
`torch.distributed` has a process group, from `gsprune.training.launcher` or from your own application.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from gsprune.collectives import hosts, rank, world_size
from gsprune.structures.example import inputs_and_labels, map_tensors
from gsprune.text.display import logger
from gsprune.training.loading import Start, batches, fetched, from_start, is_skippable

__all__ = ["LocalBatch", "data_parallel", "local_batches"]

log = logger(__name__)
Batch = tuple[Any, Tensor]
Model = TypeVar("Model", bound=nn.Module)
NO_LABEL = -100  # what cross-entropy leaves out, in loss and gradient
_SPREAD = 1 << 32  # between the seeds of two processes' workers


# --- the network -------------------------------------------------------------------------------------------


def prepared(model: Model, device: torch.device) -> Model:
    """The network, ready for several processes: on CUDA, BatchNorm computes its statistics over all of them.

    torch has no synchronised BatchNorm on other devices, nor for a subclass with its own forward pass (which may
    include an activation). Such a layer sees the samples of its own process, with a warning.
    """
    if world_size() == 1:
        return model
    if device.type == "cuda":
        _synchronise_norms(model)
    norms = [type(m) for m in model.modules() if isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm)]
    if norms and rank() == 0:
        name = "BatchNorm" if norms[0].forward is _BatchNorm.forward else norms[0].__name__
        warnings.warn(
            f"{name} on {device.type} normalises the samples of each process separately: results of {world_size()} "
            f"processes differ slightly from those of one",
            stacklevel=3,
        )
    return model


def _synchronise_norms(model: nn.Module) -> None:
    made: dict[nn.Module, nn.Module] = {}  # a layer may be used in several places
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if isinstance(child, _BatchNorm) and type(child).forward is _BatchNorm.forward:
                if child not in made:
                    made[child] = nn.SyncBatchNorm.convert_sync_batchnorm(child)  # type: ignore[no-untyped-call]
                module._modules[name] = made[child]


def data_parallel(model: nn.Module, before: nn.Module | None = None) -> nn.Module:
    """The network in `DistributedDataParallel`, which averages gradients; in a single process, the network itself.

    Buffers are not broadcast in every step, because training does not read them: see `collectives.broadcast_buffers`.

    Args:
        before: an earlier result for the model, which is returned again while the parameters are the same.
    """
    if world_size() == 1:
        return model
    covered = [(id(parameter), parameter.shape) for parameter in model.parameters()]
    if before is not None and before.covered == covered:
        return before
    wrapper = nn.parallel.DistributedDataParallel
    settings = inspect.signature(wrapper).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in settings else "broadcast_buffers"  # until torch 2.13
    wrapped = wrapper(model, **{buffers: False})  # type: ignore[arg-type]
    wrapped.covered = covered  # type: ignore[assignment]
    return wrapped


@contextlib.contextmanager
def averaging(forward: object, *, last: bool) -> Iterator[None]:
    """Around forward and backward of one batch: gradients are averaged after the `last` batch of a group only.

    Raises:
        ValueError: a parameter is not used in the loss, and the other processes would wait for its gradient.
    """
    if not isinstance(forward, nn.parallel.DistributedDataParallel):
        yield
        return
    with contextlib.nullcontext() if last else forward.no_sync():
        try:
            yield
        except RuntimeError as error:
            if "Expected to have finished reduction" not in str(error):
                raise
            raise ValueError(
                "a parameter is not used in the loss, and the other processes would wait for its gradient: "
                "freeze it (requires_grad=False), or train in one process"
            ) from error


# --- the data ----------------------------------------------------------------------------------------------


class LocalBatch(tuple[Any, Tensor]):
    """The part of a global batch in this process: (inputs, labels).

    If a short batch has no sample for a process, the process gets one with the label `NO_LABEL`, which counts for
    nothing: every process must take part in the collective operations.

    Attributes:
        whole: number of samples in the global batch.
        own: number of them in this process.
    """

    whole: int
    own: int

    @classmethod
    def of(cls, inputs: Any, labels: Tensor, *, whole: int, own: int) -> LocalBatch:
        batch = cls((inputs, labels if own else torch.full_like(labels, NO_LABEL)))
        batch.whole, batch.own = whole, own
        return batch


def loss_divisor(group: Sequence[Batch]) -> float:
    """S / N for S samples in the group and N processes: the divisor of each process's summed loss.

    Each process's gradient is then N / S times that of its own sum, and the average over the processes is 1 / S times
    that of the whole sum: the gradient of the mean loss.

    >>> loss_divisor([(None, torch.zeros(3)), (None, torch.zeros(2))])
    5.0
    """
    return sum(batch.whole if isinstance(batch, LocalBatch) else len(batch[1]) for batch in group) / world_size()


def own_samples(batch: Batch) -> int:
    """Number of samples in the batch that count."""
    return batch.own if isinstance(batch, LocalBatch) else len(batch[1])


def own_range(n: int, number: int, world: int) -> range:
    """The samples of process `number` of `world`: consecutive runs of `n`, as even as possible, the longer ones first.

    >>> [list(own_range(5, number, 3)) for number in range(3)]
    [[0, 1], [2, 3], [4]]
    """
    size, longer = divmod(n, world)
    start = number * size + min(number, longer)
    return range(start, start + size + (number < longer))


def local_batches(loader: Any, *, training: bool, start: Start | None = None) -> Iterator[Batch]:
    """The part of each global batch in this process, in the same order and number in every process.

    A `DataLoader` fetches only that part, unless its collate function draws random numbers for whole batches
    (attribute `whole_batches`). Batches of any other loader are fetched whole and sliced.

    Args:
        training: draw different random numbers in each process (for dropout and augmentation).
        start: begin in the middle of an epoch.
    """
    if world_size() == 1:
        yield from map(inputs_and_labels, batches(loader, start) if training else loader)
        return
    _same_random_state()
    sliceable = isinstance(loader, DataLoader) and loader.batch_sampler is not None
    whole = not sliceable or getattr(loader.collate_fn, "whole_batches", False)
    if start is not None and is_skippable(loader):
        yield from _cut(batches(loader, start)) if whole else _fetched(loader, start)
        return
    found = _own_numbers(_cut(loader) if whole else _fetched(loader, None), training)
    yield from from_start(found, start)


def _own_numbers(found: Iterator[LocalBatch], training: bool) -> Iterator[LocalBatch]:
    for i, batch in enumerate(found):
        if training and i == 0 and rank():
            torch.manual_seed(int(torch.randint(2**62, ())) + rank())
        yield batch


def _same_random_state() -> None:
    """Give every process the random state of process 0, from which a sampler without a generator draws its order."""
    state = torch.get_rng_state()
    dist.broadcast(state, src=0, group=hosts())
    torch.set_rng_state(state)


def _fetched(loader: DataLoader[Any], start: Start | None) -> Iterator[LocalBatch]:
    counts: deque[tuple[int, int]] = deque()  # of the batches on their way: all samples, own samples

    def own_part(indices: list[Any]) -> list[Any]:
        own = [indices[i] for i in own_range(len(indices), rank(), world_size())]
        counts.append((len(indices), len(own)))
        return own or indices[:1]

    for batch in fetched(loader, start, share=own_part, spread=rank() * _SPREAD):
        inputs, labels = inputs_and_labels(batch)
        whole, own = counts.popleft()
        yield LocalBatch.of(inputs, labels, whole=whole, own=own)


def _cut(loader: Any) -> Iterator[LocalBatch]:
    for inputs, labels in map(inputs_and_labels, loader):
        mine = own_range(len(labels), rank(), world_size())
        here = mine or range(1)
        at = slice(here.start, here.stop)
        rows = map_tensors(lambda tensor: tensor[at] if tensor.dim() else tensor, inputs)  # noqa: B023 - called at once
        yield LocalBatch.of(rows, labels[at], whole=len(labels), own=len(mine))
