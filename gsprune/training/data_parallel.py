"""Several processes that train one network: who they are, what they tell each other, what each of them works on.

Every function is the identity in a process that is alone, so that the training loop has no branches for it. A process
is one of several as soon as `torch.distributed` has a process group, whoever made it: `launcher.py`, or an application
of your own.

Data parallel: each process works through its part of every global batch, `DistributedDataParallel` averages the
gradients, and so weights, scores and masks stay the same everywhere. The order of the data is that of one process.
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

__all__ = ["Share", "data_parallel", "shares"]

log = logger(__name__)
Batch = tuple[Any, Tensor]
Model = TypeVar("Model", bound=nn.Module)
NO_LABEL = -100  # what cross-entropy leaves out, in loss and gradient
_SPREAD = 1 << 32  # between the seeds of two processes' workers


# --- the network -------------------------------------------------------------------------------------------


def prepared(model: Model, device: torch.device) -> Model:
    """The network as several processes can train it: on CUDA, BatchNorm takes its statistics over all of them.

    Elsewhere torch has no such BatchNorm, nor of a class with a forward pass of its own (which may hold an activation
    too): it sees each process's own samples, which a warning says.
    """
    if world_size() == 1:
        return model
    if device.type == "cuda":
        _synchronise_norms(model)
    norms = [type(m) for m in model.modules() if isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm)]
    if norms and rank() == 0:
        name = "BatchNorm" if norms[0].forward is _BatchNorm.forward else norms[0].__name__
        warnings.warn(
            f"{name} on {device.type} normalises each process's samples by themselves: with {world_size()} "
            f"processes results are a little different from those of one",
            stacklevel=3,
        )
    return model


def _synchronise_norms(model: nn.Module) -> None:
    made: dict[nn.Module, nn.Module] = {}  # a norm may have several places
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if isinstance(child, _BatchNorm) and type(child).forward is _BatchNorm.forward:
                if child not in made:
                    made[child] = nn.SyncBatchNorm.convert_sync_batchnorm(child)  # type: ignore[no-untyped-call]
                module._modules[name] = made[child]


def data_parallel(model: nn.Module, before: nn.Module | None = None) -> nn.Module:
    """The network behind `DistributedDataParallel`, which averages gradients; in a process that is alone, itself.

    Buffers are not sent at every step, as training does not read them: see `broadcast_buffers`.

    Args:
        before: what this returned for the model earlier; it is returned again if the parameters are still the same.
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
    """Around forward and backward of one batch: gradients are averaged after the `last` one of a group only.

    Raises:
        ValueError: some parameter takes no part in the loss, for whose gradient the other processes would wait.
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
                "a parameter takes no part in the loss, so several processes would wait for its gradient for ever: "
                "freeze it (requires_grad=False), or train in one process"
            ) from error


# --- the data ----------------------------------------------------------------------------------------------


class Share(tuple[Any, Tensor]):
    """This process's part of a global batch: (inputs, labels).

    A process that a short batch leaves without a sample gets one that counts for nothing, so that it takes part in
    what all do together; its label is `NO_LABEL`.

    Attributes:
        whole: samples in the global batch.
        own: those of them that are here.
    """

    whole: int
    own: int

    @classmethod
    def of(cls, inputs: Any, labels: Tensor, *, whole: int, own: int) -> Share:
        share = cls((inputs, labels if own else torch.full_like(labels, NO_LABEL)))
        share.whole, share.own = whole, own
        return share


def weight(group: Sequence[Batch]) -> float:
    """What to divide summed losses by, so that the average of everybody's gradients is that of the mean loss.

    With S samples in a group over all N processes it is S / N: each process's gradient is then N / S times that of its
    own sum, and their average 1 / S times that of the whole.

    >>> weight([(None, torch.zeros(3)), (None, torch.zeros(2))])
    5.0
    """
    return sum(batch.whole if isinstance(batch, Share) else len(batch[1]) for batch in group) / world_size()


def own_samples(batch: Batch) -> int:
    """How many samples of the batch count."""
    return batch.own if isinstance(batch, Share) else len(batch[1])


def part(n: int, number: int, world: int) -> range:
    """Which of `n` samples process `number` of `world` takes: runs as even as can be, the longer ones first.

    >>> [list(part(5, number, 3)) for number in range(3)]
    [[0, 1], [2, 3], [4]]
    """
    size, longer = divmod(n, world)
    start = number * size + min(number, longer)
    return range(start, start + size + (number < longer))


def shares(loader: Any, *, training: bool, start: Start | None = None) -> Iterator[Batch]:
    """This process's part of every batch of a loader that gives global ones, in the same order everywhere.

    A `DataLoader` fetches that part only, unless its collate function draws random numbers for whole batches
    (`whole_batches`); of any other loader the batches are cut. Every process gets equally many.

    Args:
        training: with random numbers of each process's own (for dropout, and for data that is drawn on the fly).
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


def _own_numbers(found: Iterator[Share], training: bool) -> Iterator[Share]:
    for i, share in enumerate(found):
        if training and i == 0 and rank():
            torch.manual_seed(int(torch.randint(2**62, ())) + rank())
        yield share


def _same_random_state() -> None:
    """Process 0's random numbers for all: a sampler without a generator of its own draws its order from them."""
    state = torch.get_rng_state()
    dist.broadcast(state, src=0, group=hosts())
    torch.set_rng_state(state)


def _fetched(loader: DataLoader[Any], start: Start | None) -> Iterator[Share]:
    counts: deque[tuple[int, int]] = deque()  # samples in the batches on their way, and how many of them are ours

    def own_part(indices: list[Any]) -> list[Any]:
        own = [indices[i] for i in part(len(indices), rank(), world_size())]
        counts.append((len(indices), len(own)))
        return own or indices[:1]

    for batch in fetched(loader, start, share=own_part, spread=rank() * _SPREAD):
        inputs, labels = inputs_and_labels(batch)
        whole, own = counts.popleft()
        yield Share.of(inputs, labels, whole=whole, own=own)


def _cut(loader: Any) -> Iterator[Share]:
    for inputs, labels in map(inputs_and_labels, loader):
        mine = part(len(labels), rank(), world_size())
        here = mine or range(1)
        at = slice(here.start, here.stop)
        rows = map_tensors(lambda tensor: tensor[at] if tensor.dim() else tensor, inputs)  # noqa: B023 - called at once
        yield Share.of(rows, labels[at], whole=len(labels), own=len(mine))
