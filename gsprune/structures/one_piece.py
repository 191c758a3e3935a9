"""Networks that `torch.distributed.fsdp.fully_shard` has cut over several processes, in one piece as before it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from gsprune.structures.example import Example, map_tensors
from gsprune.structures.twin import copied

_LIBRARY = "torch.distributed."  # where the classes and hooks are defined that fully_shard gives a module


def reshard(model: nn.Module) -> None:
    """Let `fully_shard` free what its last forward pass has left in one piece: an evaluation leaves the root so."""
    for module in model.modules():
        if callable(getattr(type(module), "reshard", None)) and _is_sharding(type(module)):
            cast(Any, module).reshard()


def in_one_piece(model: nn.Module, *, meta: bool = False) -> nn.Module:
    """The network as it was before `fully_shard`, its parameters on the meta device: what can be traced and counted.

    Args:
        meta: so are buffers and tensors that are plain attributes, which are copied otherwise.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        blank = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(blank, requires_grad=parameter.requires_grad)
    if meta:
        for buffer in model.buffers():
            memo[id(buffer)] = buffer.detach().to("meta")
    with _as_they_were(model.modules()):
        twin = copied(model, memo)
    for module in twin.modules() if meta else ():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                vars(module)[name] = value.detach().to("meta")
    return twin


def on_meta(example: Example) -> Example:
    """An example without values."""
    return map_tensors(lambda tensor: tensor.to("meta"), example)


def _is_sharding(cls: type) -> bool:
    """Whether a class is one that `fully_shard` makes."""
    return any(base.__name__ == "FSDPModule" and base.__module__.startswith(_LIBRARY) for base in cls.__mro__)


@contextlib.contextmanager
def _as_they_were(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, modules have the class and the attributes of before `fully_shard`."""
    before = [(module, type(module), dict(vars(module))) for module in [*modules]]
    for module, cls, state in before:
        module.__class__ = next(base for base in cls.__mro__ if not _is_sharding(base))
        vars(module).clear()
        vars(module).update(
            {
                name: _without_library(value) if "hook" in str(name) else value
                for name, value in state.items()
                if not _is_of_library(name)
            }
        )
    try:
        yield
    finally:
        for module, cls, state in before:
            vars(module).clear()
            vars(module).update(state)
            module.__class__ = cls


def _is_of_library(attribute: Any) -> bool:
    """Whether `fully_shard` put an attribute into a module."""
    return str(attribute).startswith(("__composable_api", "_is_fsdp", "_fsdp"))


def _without_library(value: Any) -> Any:
    """A module's dictionary of hooks without those of `fully_shard`."""
    if not isinstance(value, dict) or not any(map(_is_hook, value.values())):
        return value
    return type(value)((key, hook) for key, hook in value.items() if not _is_hook(hook))


def _is_hook(value: Any) -> bool:
    hook = getattr(value, "hook", value)  # torch wraps hooks that are handed the module
    owner = getattr(hook, "__self__", hook)
    home = getattr(type(owner) if owner is not hook else hook, "__module__", None) or ""
    return callable(hook) and home.startswith(f"{_LIBRARY}fsdp")
