"""What a network does around its layers, seen in one pass: their order, and the residual stream that each adds into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from gsprune.repair.gram import why_no_matrix
from gsprune.repair.lockstep import Place
from gsprune.structures.attention import no_fast_path
from gsprune.structures.example import Example, call, map_tensors, tensors_in
from gsprune.structures.running import evaluating, hooked, same_randomness, to_device_of
from gsprune.text.names import joined

_ADDS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
_NORMS = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Stream:
    """Where a layer's output is added to another tensor: a place that holds that one, and the BatchNorm on the way."""

    place: Place
    norm: str | None = None


@dataclass(frozen=True)
class Observed:
    """What one pass shows.

    order     modules as they are called first
    calls     how often
    streams   of the layers that add into one
    mixed     attentions whose query, key and value are not one tensor
    """

    order: list[str]
    calls: Counter[str]
    streams: dict[str, Stream] = field(default_factory=dict)
    mixed: frozenset[str] = frozenset()


def observe(model: nn.Module, example: Example) -> Observed:
    """One pass in evaluation mode; the model's modes and the random state are left as they were.

    >>> class Residual(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 2)
    ...     def forward(self, x):
    ...         return x + self.b(self.a(x).relu())
    >>> observe(Residual(), torch.ones(1, 2)).streams
    {'b': Stream(place=Place(module='', side='in', number=0), norm=None)}
    """
    watching = _Watching(model)
    inside = ExitStack()
    for context in (evaluating([model]), same_randomness(model), no_fast_path(), torch.no_grad()):
        inside.enter_context(context)
    with inside, hooked(watching.hooks()), watching:
        call(model, map_tensors(Tensor.clone, to_device_of(model, example)))
    streams = {name: stream for name, stream in watching.streams.items() if watching.calls[stream.place.module] == 1}
    return Observed([*watching.calls], watching.calls, streams, frozenset(watching.mixed))


def reads_one_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an attention's query, key and value are the same object.

    >>> x = torch.ones(1)
    >>> reads_one_tensor((x, x), {"value": x}), reads_one_tensor((x, x, x.clone()), {})
    (True, False)
    """
    given = [*args[:3], *(kwargs[key] for key in ("query", "key", "value") if key in kwargs)]
    return all(other is given[0] for other in given)


class _Watching(TorchFunctionMode):
    """Follows layers' outputs to the additions that take them. Tensors are kept, so that no number is given twice."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.streams: dict[str, Stream] = {}
        self.mixed: set[str] = set()
        self._model = model
        self._places: dict[int, tuple[Tensor, Place, int]] = {}  # of each tensor the first, and when
        self._gave: dict[int, tuple[str, str | None]] = {}  # tensor -> the layer that gave it, the norm between
        self._began: dict[str, int] = {}

    def hooks(self) -> Iterator[RemovableHandle]:
        for name, module in self._model.named_modules():
            yield module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True)
            yield module.register_forward_hook(partial(self._after, name))

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.calls[name] += 1
        self._began[name] = len(self._began)
        self._place((args, kwargs), name, "in")
        if isinstance(module, nn.MultiheadAttention) and not reads_one_tensor(args, kwargs):
            self.mixed.add(name)

    def _after(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self._place(output, name, "out")
        gave, read = next(tensors_in(output), None), self._gave.get(id(next(tensors_in(args), None)))
        if isinstance(module, _NORMS) and read is not None and read[1] is None:
            self._gave[id(gave)] = (read[0], name)
        elif isinstance(module, nn.MultiheadAttention):
            self._began[joined(name, "out_proj")] = self._began[name]
            self._gave[id(gave)] = (joined(name, "out_proj"), None)
        elif why_no_matrix(module) is None:
            self._gave[id(gave)] = (name, None)

    def _place(self, value: Any, name: str, side: str) -> None:
        for number, tensor in enumerate(tensors_in(value)):
            self._places.setdefault(id(tensor), (tensor, Place(name, side, number), len(self._began)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ADDS:
            self._note([value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)][:2])
        return func(*args, **(kwargs or {}))

    def _note(self, pair: list[Tensor]) -> None:
        for mine, other in (pair, pair[::-1]) if len(pair) == 2 and pair[0].shape == pair[1].shape else ():
            layer, norm = self._gave.get(id(mine), ("", None))
            _, place, when = self._places.get(id(other), (other, None, 0))
            if layer and place is not None and when <= self._began[layer] and other is not mine:
                self.streams.setdefault(layer, Stream(place, norm))
