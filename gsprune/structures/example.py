"""What a network is called with, however it is wrapped: arguments, labels, nests of tensors."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Example = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any] | Any


def example_of(example_input: Example) -> Example:
    """The example itself; of a function, what it returns.

    Raises:
        ValueError: the function needs arguments.

    >>> example_of(lambda: 1), example_of(1)
    (1, 1)
    """
    if not (inspect.isroutine(example_input) or isinstance(example_input, partial)):
        return example_input
    try:
        inspect.signature(example_input).bind()
    except TypeError as error:
        raise ValueError(
            f"example_input is a function that needs arguments ({error}): it must take no arguments and return what "
            "the network is called with"
        ) from None
    return example_input()


def arguments(example_input: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: a mapping (a dict, a `BatchEncoding`) is keywords, a tuple or list positions.

    Anything else, a dataclass included, is the one argument.

    >>> arguments((1, 2)), arguments({"x": 1}), arguments("x")
    (((1, 2), {}), ((), {'x': 1}), (('x',), {}))
    """
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    return (tuple(example_input) if isinstance(example_input, tuple | list) else (example_input,)), {}


def call(model: Callable[..., Any], example_input: Example) -> Any:
    """model(x), model(*tuple) or model(**mapping)."""
    args, kwargs = arguments(example_input)
    return model(*args, **kwargs)


LABELS = ("labels", "label", "targets", "target")  # what a batch of named parts calls them


def inputs_and_labels(batch: Any) -> tuple[Any, Any]:
    """What a network is called with, and what its answer is compared with.

    A pair is that already. Of a mapping, a named tuple or a dataclass, labels are the part called so (or one of
    `LABELS`); a mapping or named tuple without it is the rest, a dataclass is left whole.

    Raises:
        ValueError: there is neither.

    >>> inputs_and_labels({"x": 1, "mask": 2, "labels": 3}), inputs_and_labels((1, 2))
    (({'x': 1, 'mask': 2}, 3), (1, 2))
    """
    names = _parts_of(batch)
    label = next((name for name in LABELS if name in names), None)
    if label is None:
        if isinstance(batch, tuple | list) and len(batch) == 2:
            return batch  # type: ignore[return-value]
        given = f"a {type(batch).__name__}" + (f" of {', '.join(map(str, names))}" if names else "")
        raise ValueError(
            f"a batch is {given}: it must be (inputs, labels), or have a part called {' or '.join(LABELS)}"
        )
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name != label}, batch[label]
    if isinstance(batch, tuple):
        rest = tuple(value for name, value in zip(names, batch, strict=True) if name != label)
        return rest[0] if len(rest) == 1 else rest, getattr(batch, label)
    return batch, getattr(batch, label)


def _parts_of(batch: Any) -> list[str]:
    if isinstance(batch, Mapping):
        return list(batch)
    if is_dataclass(batch):
        return [field.name for field in fields(batch)]
    return list(getattr(batch, "_fields", ()))


def logits_of(output: Any) -> Tensor:
    """The scores of the classes in what a network returns: a tensor, its `logits`, or the first of several tensors."""
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]  # type: ignore[no-any-return]
    output = getattr(output, "logits", output)
    return output[0] if isinstance(output, tuple | list) else output  # type: ignore[no-any-return]


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The same nest of tuples, lists, mappings and dataclasses with `function` of every tensor.

    >>> from collections import UserDict
    >>> nest = map_tensors(lambda t: t + 1, UserDict(x=[torch.tensor(1), "a"]))
    >>> type(nest).__name__, nest["x"]
    ('UserDict', [tensor(2), 'a'])
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return _refilled(value, {key: map_tensors(function, item) for key, item in value.items()})
    if isinstance(value, list):
        return [map_tensors(function, item) for item in value]
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if is_dataclass(value) and not isinstance(value, type):
        twin = copy.copy(value)
        for field in fields(value):
            if hasattr(value, field.name):
                object.__setattr__(twin, field.name, map_tensors(function, getattr(value, field.name)))
        return twin
    return value


def _refilled(old: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    """A mapping of the old one's type (`UserDict`, `BatchEncoding`, ...) where that can be written to."""
    if type(old) is dict or not hasattr(old, "__setitem__"):
        return items
    twin: Any = copy.copy(old)
    for key, item in items.items():
        twin[key] = item
    return twin  # type: ignore[no-any-return]


def shape_text(example_input: Example) -> str:
    """The shapes of the tensors that a network is called with.

    >>> shape_text(torch.ones(1, 3, 8, 8)), shape_text({"input_ids": torch.ones(1, 7), "mask": torch.ones(1, 7)})
    ('1x3x8x8', 'input_ids 1x7, mask 1x7')
    """

    def shapes(value: Any) -> str:
        return " and ".join("x".join(map(str, t.shape)) or "a number" for t in tensors_in(value, floating=False))

    args, kwargs = arguments(example_input)
    named = [f"{name} {text}" for name, value in kwargs.items() if (text := shapes(value))]
    return ", ".join([*filter(None, map(shapes, args)), *named])


def tensors_in(value: Any, *, floating: bool = True) -> Iterator[Tensor]:
    """Every floating-point or complex tensor (or every tensor at all) of such a nest, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, value)
    return (t for t in found if not floating or t.is_floating_point() or t.is_complex())


_BY_PRODUCTS = re.compile(r"(last_hidden_state|intermediate_hidden_states|model_output|cache|past_key_values|mems)$")


def answers_in(output: Any, *, floating: bool = True) -> Iterator[Tensor]:
    """Every tensor that a network is asked for.

    Of a mapping with logits these are all but what it has of its inside unasked: the last hidden states, a cache, the
    outputs of the networks it is made of. Those are there for later stages of the same network, and get narrower with
    it. Where there are no logits, hidden states are what is asked for.

    >>> output = {"logits": torch.ones(1), "boxes": torch.ones(2), "encoder_last_hidden_state": torch.ones(3)}
    >>> [len(t) for t in answers_in(output)], [len(t) for t in answers_in({"last_hidden_state": torch.ones(3)})]
    ([1, 2], [3])
    """
    if isinstance(output, Mapping) and any("logits" in str(name) for name in output):
        output = {name: part for name, part in output.items() if not _BY_PRODUCTS.search(str(name))}
    return tensors_in(output, floating=floating)


def plain(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Without history and subclass (fastai's TensorImage); floating and complex numbers in the precision of `dtype`."""
    if type(tensor) is not Tensor and not is_traceable_wrapper_subclass(tensor):
        tensor = tensor.as_subclass(Tensor)
    tensor = tensor.detach()
    if dtype is None or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return tensor.to(dtype.to_complex() if tensor.is_complex() else dtype)
