"""Mixtures of experts: which matrices choose the expert of a token, and passes in which some are never chosen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gsprune.structures.example import tensors_in
from gsprune.structures.running import narrows

_PRODUCTS = {"linear", "matmul", "rmatmul", "mm", "addmm", "einsum"}
_SAME = {"to", "type", "float", "double", "half", "bfloat16", "type_as", "t", "transpose", "contiguous", "detach"}
_CHOICES = {"topk", "argmax", "max", "sort", "argsort", "softmax", "sigmoid"}


class _Products(TorchFunctionMode):
    """Knows which products are with one of the network's matrices, also where a pass converts or turns that first."""

    def __init__(self, matrices: Mapping[int, str]) -> None:
        super().__init__()
        self._names = dict(matrices)  # id of a tensor -> name of the matrix
        self._kept: list[Tensor] = []  # so that ids stay their own

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [*tensors_in((args, kwargs), floating=False)]
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "").strip("_")
        known = [self._names[id(t)] for t in given if id(t) in self._names]
        if known and isinstance(result, Tensor) and result.dim():
            if name in _PRODUCTS:
                return self.product(known[-1], result)
            if name in _SAME or (name == "get" and result.numel() == given[0].numel()):  # x.T
                self._names[id(result)] = known[0]
                self._kept.append(result)
                return result
        return self.other(name, given, args, kwargs, result)

    def product(self, name: str, result: Tensor) -> Tensor:
        return result

    def other(self, name: str, given: list[Tensor], args: Any, kwargs: Any, result: Any) -> Any:
        return result


class Choices(_Products):
    """Watches one pass.

    Attributes:
        chosen: matrix -> (how many entries a row of its products has, how many of these are taken; 0: all are weighed).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__({id(p): name for name, p in model.named_parameters() if p.dim() == 2})
        self.chosen: dict[str, tuple[int, int]] = {}
        self._marks: dict[int, tuple[Tensor, frozenset[tuple[str, int]]]] = {}

    def product(self, name: str, result: Tensor) -> Tensor:
        self._marks[id(result)] = (result, frozenset([(name, result.shape[-1])]))
        return result

    def other(self, name: str, given: list[Tensor], args: Any, kwargs: Any, result: Any) -> Any:
        if name in _PRODUCTS:  # of two activations
            return result
        marks = frozenset[tuple[str, int]]().union(*(self._marks[id(t)][1] for t in given if id(t) in self._marks))
        if marks:
            if name in _CHOICES and given:
                self._choose(name, given[0].shape[-1] if given[0].dim() else 0, marks, args, kwargs)
            for tensor in tensors_in(result, floating=False):
                self._marks[id(tensor)] = (tensor, marks)
        return result

    def _choose(self, name: str, length: int, marks: frozenset[tuple[str, int]], args: Any, kwargs: Any) -> None:
        taken = {"argmax": 1, "max": 1}.get(name, 0)
        if name == "topk":
            taken = kwargs.get("k", args[1] if len(args) > 1 else 0)
        for matrix, entries in marks:
            if entries == length:
                self.chosen[matrix] = (entries, max(int(taken), self.chosen.get(matrix, (0, 0))[1]))


class Exact(TorchFunctionMode):
    """A network in float64 stays in it where it would compute in float32: rounding must not choose the expert."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if narrows(func, args, kwargs):
            return args[0]
        is_wide = bool(args) and isinstance(args[0], Tensor) and args[0].dtype == torch.float64
        if is_wide and kwargs.get("dtype") == torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


class _Closed(_Products):
    def __init__(self, gone: Mapping[Tensor, Tensor]) -> None:
        super().__init__({id(matrix): str(number) for number, matrix in enumerate(gone)})
        self._gone = [*gone.values()]

    def product(self, name: str, result: Tensor) -> Tensor:
        gone = self._gone[int(name)]
        if result.shape[-1] != len(gone):
            return result
        return result.masked_fill(gone.to(result.device), -math.inf)


@contextmanager
def closed_experts(gone: Mapping[Tensor, Tensor], biases: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Inside the block no token is given to some experts: their logits are minus infinity.

    Args:
        gone: matrix of a router -> which of its experts get nothing, bool (experts,).
        biases: what is added to the scores afterwards, (experts,) -> the same.

    >>> router = nn.Linear(2, 3)
    >>> with closed_experts({router.weight: torch.tensor([False, True, False])}, {}):
    ...     router(torch.ones(1, 2)).softmax(-1)[0, 1]
    tensor(0., grad_fn=<SelectBackward0>)
    """
    before = [(bias, bias.detach().clone()) for bias in biases]
    try:
        with torch.no_grad():
            for bias, mask in biases.items():
                bias.masked_fill_(mask.to(bias.device), -math.inf)
        with _Closed(gone):
            yield
    finally:
        with torch.no_grad():
            for bias, values in before:
                bias.copy_(values)
