"""Layers that are as they were, when what is done to them fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undone_on_error(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """An error inside the block leaves the values of these modules' own tensors as they were before it.

    >>> norm = nn.BatchNorm1d(1)
    >>> try:
    ...     with undone_on_error(norm, [""]):
    ...         _ = norm.running_mean.add_(1)
    ...         raise KeyError
    ... except KeyError:
    ...     norm.running_mean.item()
    0.0
    """
    modules = [model.get_submodule(name) for name in names]
    tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        raise
