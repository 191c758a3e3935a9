"""Copies of a model that are pruned along with it, such as the average of an EMA."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def check_copies(model: nn.Module, copies: Iterable[nn.Module]) -> None:
    """ValueError where a copy is not a network of its own with the model's tensors."""
    if not isinstance(copies, list | tuple) or not all(isinstance(copy, nn.Module) for copy in copies):
        given = ", ".join(type(copy).__name__ for copy in copies) if isinstance(copies, list | tuple) else type(copies)
        given = given if isinstance(given, str) else f"a {given.__name__}"
        raise ValueError(f"copies is {given}: it must be a list of networks, such as [average.module]")
    for copy in copies:
        _check_copy(model, copy)


def _check_copy(model: nn.Module, copy: nn.Module) -> None:
    own = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in own for parameter in copy.parameters()):
        raise ValueError("a copy that is cut with the model shares parameters with it: it must be a network of its own")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    others = {name: tensor.shape for name, tensor in copy.state_dict().items()}
    for name in [*shapes, *others]:
        if shapes.get(name) != others.get(name):
            raise ValueError(
                f"{name!r} differs between the model and a copy that is cut with it: of an AveragedModel give .module"
            )
