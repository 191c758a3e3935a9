"""Lists of modules that lose some: those that stay keep their names, and are counted from 0 without gaps."""

from __future__ import annotations

import operator
from functools import cache
from typing import Any, cast

from torch import nn

GONE = -1  # in `CutPlan.removed`: the module leaves the list that holds it


class ShortList:
    """Of a class derived from `nn.ModuleList` or `nn.ModuleDict`: place (or key) i is that of the i-th that is left.

    So names of tensors stay those of the dense network. Nothing can be put in.
    """

    dense_names: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (type(self).__mro__[2],), self.__dict__

    def __getitem__(self, idx: Any) -> Any:
        modules = cast(Any, self)._modules
        return nn.ModuleList([*modules.values()][idx]) if isinstance(idx, slice) else modules[self._name_at(idx)]

    def __setitem__(self, idx: Any, module: nn.Module) -> None:
        setattr(self, self._name_at(idx), module)

    def _name_at(self, idx: Any) -> str:
        names = list(cast(Any, self)._modules)
        number = operator.index(idx)
        if not -len(names) <= number < len(names):
            raise IndexError(f"index {number} is out of range")
        return str(names[number])

    def add_module(self, name: str, module: nn.Module | None) -> None:
        raise TypeError("modules were cut out of this list: it takes no others")


class ShortDict(ShortList):
    """The same of `nn.ModuleDict`."""

    def keys(self) -> Any:
        return self.dense_names[: len(cast(Any, self)._modules)]

    def items(self) -> Any:
        return zip(self.keys(), cast(Any, self)._modules.values(), strict=True)

    def __iter__(self) -> Any:
        return iter(self.keys())

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def _name_at(self, idx: Any) -> str:
        if idx not in self:
            raise KeyError(idx)
        return str([*cast(Any, self)._modules][self.dense_names.index(idx)])


@cache
def _short_class(cls: Any) -> Any:
    base = ShortDict if issubclass(cls, nn.ModuleDict) else ShortList
    return type(cls.__name__, (base, cls), {"__module__": cls.__module__})


def _empty(cls: type[nn.Module]) -> nn.Module:
    short = _short_class(cast(Any, cls))
    made: nn.Module = short.__new__(short)
    return made


def leave_out(modules: nn.Module, name: str) -> None:
    """Take one module out of a list or dictionary of modules.

    >>> layers = nn.ModuleList([nn.Linear(1, n) for n in (1, 2, 3)])
    >>> leave_out(layers, "0")
    >>> len(layers), layers[0].out_features, [name for name, _ in layers.named_children()]
    (2, 2, ['1', '2'])
    """
    if not isinstance(modules, ShortList):
        names = (*modules._modules,)
        modules.__class__ = _short_class(cast(Any, type(modules)))
        cast(Any, modules).dense_names = names
    del modules._modules[name]
