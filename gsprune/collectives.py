"""Communication between the processes that train one network.

In a single process every function is the identity, so that callers need no branches. There are several processes as
soon as `torch.distributed` has a process group, whoever made it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gsprune.text.display import logger

if TYPE_CHECKING:
    from gsprune.files.locks import Lock


log = logger(__name__)
Result = TypeVar("Result")

_HOSTS: dict[Any, Any] = {}  # default group -> the one that speaks gloo
_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


def rank() -> int:
    """This process's number, from 0; process 0 is the one that writes and reports."""
    return dist.get_rank() if _together() else 0


def world_size() -> int:
    """How many processes train together; 1 in a process that is alone."""
    return dist.get_world_size() if _together() else 1


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and not _ALONE.get()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside the block this process asks no other: it does by itself what the others wait for, or do not take part in.

    >>> with alone():
    ...     world_size()
    1
    """
    before = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(before)


def refuse_several() -> None:
    """ValueError in one of several processes: what reads its own samples would give each another network.

    >>> refuse_several()
    """
    if (count := world_size()) > 1:
        raise ValueError(
            f"this is one of {count} processes, whose samples differ and so would their networks: do it in the first, "
            f"under `with gsprune.collectives.alone():`, and give the others its masks or its files"
        )


# --- what one process tells the others ---------------------------------------------------------------------


def broadcast(value: Result) -> Result:
    """Process 0's value, in every process. It is pickled: between our own processes only, never from a file."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=hosts())
    return box[0]


def gathered(value: Result) -> list[Result]:
    """Everybody's value, by rank, in every process; pickled as by `broadcast`."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value, group=hosts())
    return found


def agreed(number: int) -> int:
    """The largest of everybody's numbers. It waits for the other processes, but not for their devices."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=hosts())
    return int(largest)


def hosts() -> Any:
    """The group for what lies in the machines' memory, so that nothing waits for a device; None is the default one.

    The default group of an application of its own may speak NCCL alone, which knows a GPU's memory only.
    """
    if "cpu:" in dist.get_backend_config():
        return None
    if dist.group.WORLD not in _HOSTS:
        _HOSTS[dist.group.WORLD] = dist.new_group(backend="gloo")
    return _HOSTS[dist.group.WORLD]


def broadcast_buffers(model: nn.Module) -> None:
    """Process 0's buffers for all: a BatchNorm on CPU has seen other samples in each of them."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer.detach(), src=0)


def summed(values: Tensor) -> Tensor:
    """The sum of everybody's tensor; the same one in every process."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


@contextlib.contextmanager
def held(lock: Lock, *, waiting_for: str) -> Iterator[None]:
    """`lock.held` for all processes: the first one takes it, and the others do not time out while it has to wait."""
    if world_size() == 1:
        with lock.held(waiting_for=waiting_for):
            yield
        return
    mine, waited = rank() == 0, 0.0
    while not broadcast(mine and lock.acquire(seconds=waited)):
        if mine and not waited:
            log.info("waiting for another process %s", waiting_for)
        waited = 1.0
    try:
        yield
    finally:
        if mine:
            lock.release()


@contextlib.contextmanager
def one_after_the_first() -> Iterator[None]:
    """Process 0 goes first, then one on each other machine, then the rest: what these download lies there for them."""
    turns = 2 if world_size() > 1 else 0
    mine = 0 if rank() == 0 else 1 if os.environ.get("LOCAL_RANK") == "0" else turns
    for _ in range(mine):
        dist.barrier(group=hosts())
    yield
    for _ in range(turns - mine):
        dist.barrier(group=hosts())


def check_masks(masks: Mapping[str, Tensor]) -> None:
    """Compare a hash of the masks over all processes: 32 bytes from each. Every process has to call it.

    Raises:
        ValueError: they differ; names the processes whose masks are not those of process 0. In every process.
    """
    if world_size() == 1:
        return
    mine = torch.frombuffer(bytearray(_fingerprint(masks)), dtype=torch.uint8)
    all_of_them = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(all_of_them, mine, group=hosts())
    found = [bytes(one.tolist()) for one in all_of_them]
    others = [number for number, one in enumerate(found) if one != found[0]]
    if others:
        raise ValueError(
            f"the masks differ between the {world_size()} processes: process "
            f"{', '.join(map(str, others))} has others than process 0, so training was stopped"
        )


def _fingerprint(masks: Mapping[str, Tensor]) -> bytes:
    """sha256 over names, shapes and bits."""
    found = hashlib.sha256()
    for name, mask in masks.items():
        found.update(f"{name} {list(mask.shape)}\n".encode())
        found.update(np.packbits(mask.detach().cpu().numpy()).tobytes())
    return found.digest()
