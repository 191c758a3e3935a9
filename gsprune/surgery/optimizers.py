"""Optimizers of a pruned network: which are inside another, what they hold, and which of their state can be cut.

A *leaf* is an optimizer with none inside. *State* is what one remembers of a parameter.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from gsprune.surgery.cut_plan import Cuts, cut_tensor

Optimizers = Optimizer | Sequence[Optimizer]
_INNER = ("optimizer", "base_optimizer", "base", "inner_optimizer", "_optimizer")  # also where a property hides it
_FLAT = "keeps the parameters as one flat vector"
_CODES = "keeps its state as codes of few bits"


def every_optimizer(given: Optimizers | None) -> list[Any]:
    """The optimizers given and all inside them, the outer before the inner: of a wrapper, SAM, Lookahead, a container.

    Raises:
        ValueError: something else was given.

    >>> sgd = torch.optim.SGD([torch.zeros(1)])
    >>> every_optimizer([sgd]) == every_optimizer(sgd) == [sgd], every_optimizer(None)
    (True, [])
    """
    found: dict[int, Any] = {}
    waiting = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
    for optimizer in waiting:
        if not _is_optimizer(optimizer):
            raise ValueError(
                f"optimizer is a {type(optimizer).__name__}: it must be a torch.optim.Optimizer, or some in a list"
            )
    while waiting:
        optimizer = waiting.pop(0)
        if id(optimizer) not in found:
            found[id(optimizer)] = optimizer
            waiting += inside(optimizer)
    return list(found.values())


def inside(optimizer: Any) -> list[Any]:
    """The optimizers that an optimizer keeps in its attributes, alone or in a list or dict."""
    named = (getattr(optimizer, name, None) for name in _INNER)
    values = [value for name, value in vars(optimizer).items() if name not in ("state", "param_groups", "defaults")]
    found = {id(inner): inner for value in (*named, *values) for inner in _unpacked(value) if _is_optimizer(inner)}
    found.pop(id(optimizer), None)
    return list(found.values())


def leaves(optimizers: Iterable[Any]) -> list[Any]:
    """Those with no other inside: the ones that change the weights."""
    return [optimizer for optimizer in optimizers if not inside(optimizer)]


def held(optimizers: Iterable[Any]) -> dict[int, Tensor]:
    """All parameters in their groups, by id."""
    return {id(p): p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def names_of(optimizers: Sequence[Any]) -> str:
    """For sentences.

    >>> names_of([torch.optim.SGD([torch.zeros(1)])])
    'the SGD optimizer'
    """
    names = list(dict.fromkeys(type(optimizer).__name__ for optimizer in optimizers))
    return f"the {' and '.join(names)} optimizer{'s' if len(names) > 1 else ''}"


def moments(optimizers: Iterable[Any], parameter: Tensor) -> list[Tensor]:
    """The tensors of their state that have one number for each of the parameter's: momentum, moments, averages.

    Codes of few bits are none: a code of 0 need not mean 0.
    """
    return [
        value
        for optimizer in optimizers
        for value in _state_of(optimizer, parameter).values()
        if _is_plain(value) and value.is_floating_point() and value.shape == parameter.shape
    ]


def check_follows(optimizers: Iterable[Any]) -> None:
    """Before training: ValueError naming an optimizer that cannot follow a model whose tensors get smaller."""
    for optimizer in optimizers:
        if why := _why_not(optimizer):
            raise ValueError(
                f'shrink="each_update" cuts the optimizer\'s state too, but {type(optimizer).__name__} {why}: use '
                f'shrink="at_end" or another optimizer'
            )


def check_state(optimizers: Iterable[Any], parameters: Iterable[Tensor]) -> None:
    """Before a cut: ValueError where the state of a parameter has a tensor that nothing here knows how to cut."""
    cut = {id(parameter) for parameter in parameters}
    for optimizer in optimizers:
        if any(number in cut for number in held([optimizer])) and (fault := _unknown(optimizer)):
            raise ValueError(f'{fault}, which cannot be cut with it: use shrink="at_end"')


def move_state(
    optimizers: Iterable[Any], replaced: Mapping[Tensor, tuple[nn.Parameter, Cuts]], *, drop: bool = False
) -> None:
    """New parameters take the old ones' places, with what of their state runs along the parameter cut alike.

    `check_state` came before; or with `drop` an optimizer whose state cannot be cut forgets it, with a warning.
    """
    done: set[int] = set()  # a wrapper often shares its groups and state with what is inside
    for optimizer in optimizers:
        fault = (_unknown(optimizer) or _why_not(optimizer)) if drop else None
        for group in optimizer.param_groups:
            if id(group["params"]) not in done:  # in place: others may hold the same list
                group["params"][:] = [replaced[p][0] if p in replaced else p for p in group["params"]]
                done.add(id(group["params"]))
        state = getattr(optimizer, "state", {})
        for old, (new, cuts) in replaced.items():
            if old in state:
                mine = state.pop(old)
                if fault is None:
                    state[new] = {key: _cut_state(str(key), value, old, cuts) for key, value in mine.items()}
        if fault is not None:
            warnings.warn(
                f"{type(optimizer).__name__} cannot follow the smaller model and has dropped the state of the tensors "
                f"that were cut: make a new optimizer to continue training",
                stacklevel=2,
            )


def forget(optimizers: Iterable[Any], gone: Collection[int]) -> None:
    """Parameters (by id) that the model has no more leave the groups and the state."""
    done: set[int] = set()
    for optimizer in optimizers if gone else ():
        state = getattr(optimizer, "state", {})
        for parameter in [p for p in state if id(p) in gone]:
            del state[parameter]
        for group in optimizer.param_groups:
            if id(group["params"]) not in done:
                group["params"][:] = [p for p in group["params"] if id(p) not in gone]
                done.add(id(group["params"]))


def _unknown(optimizer: Any) -> str | None:
    """What of its state does not run along its parameter."""
    # all parameters: a square matrix that fits by chance shows in the state of the others
    for parameter in held([optimizer]).values():
        for key, value in _state_of(optimizer, parameter).items():
            if not _known(str(key), value, parameter.shape):
                shape = f"of shape {tuple(value.shape)} " if isinstance(value, Tensor) else ""
                of = tuple(parameter.shape)
                return f"{type(optimizer).__name__} keeps a {key!r} {shape}for a parameter of shape {of}"
    return None


def _is_optimizer(value: object) -> bool:
    return isinstance(value, Optimizer) or (
        hasattr(value, "param_groups") and callable(getattr(value, "step", None)) and not isinstance(value, nn.Module)
    )


def _unpacked(value: object) -> Iterator[object]:
    if isinstance(value, list | tuple):
        yield from value
    elif isinstance(value, dict):
        yield from value.values()
    else:
        yield value


def _state_of(optimizer: Any, parameter: Tensor) -> Mapping[Any, Any]:
    state = getattr(optimizer, "state", None)
    found = state.get(parameter) if isinstance(state, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _is_plain(value: object) -> bool:
    """A tensor without a layout of its own; a `DTensor` is one in parts."""
    return isinstance(value, Tensor) and (type(value) in (Tensor, nn.Parameter) or hasattr(value, "placements"))


def _why_not(optimizer: Any) -> str | None:
    kinds = type(optimizer).__mro__
    if any("lbfgs" in kind.__name__.lower() for kind in kinds):
        return _FLAT
    packages = {kind.__module__.partition(".")[0] for kind in kinds}
    names = [kind.__name__.lower() for kind in kinds]
    bits = getattr(getattr(optimizer, "args", None), "optim_bits", 8)
    if "torchao" in packages or ("bitsandbytes" in packages and bits == 8):
        return _CODES
    if any(mark in name for name in names for mark in ("8bit", "4bit", "fp8")):
        return _CODES
    mine, lists = held([optimizer]), [group["params"] for group in optimizer.param_groups]
    for name, value in vars(optimizer).items():
        if name in ("state", "param_groups", "defaults") or any(value is own for own in lists):
            continue
        if any(isinstance(leaf, Tensor) and (id(leaf) in mine or leaf.numel() > 1) for leaf in tree_leaves(value)):
            return f"keeps tensors of its own in .{name}"
    return None


def _known(key: str, value: object, shape: torch.Size) -> bool:
    """Whether a value of the state is a number, like the parameter, or a factor of it."""
    if not isinstance(value, Tensor):
        return all(leaf.numel() <= 1 for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    if value.numel() <= 1:
        return True
    return _is_plain(value) and (_along(key, value.shape, shape) is not None)


def _along(key: str, value: torch.Size, shape: torch.Size) -> list[int] | None:
    """The parameter's dimension of each of a state tensor's; None: it does not run along the parameter.

    Moments have all of them, torch's Adafactor keeps 1 in place of one, transformers' and timm's leave one out.

    >>> _along("row", torch.Size([8, 1]), torch.Size([8, 4])), _along("row", torch.Size([8]), torch.Size([8, 4]))
    ([0, 1], [0])
    >>> _along("col", torch.Size([4, 3]), torch.Size([4, 4, 3])), _along("Q", torch.Size([8]), torch.Size([4]))
    ([0, 2], None)
    """
    every = list(range(len(shape)))
    if len(value) == len(shape):
        return every if all(a in (1, b) for a, b in zip(value, shape, strict=True)) else None
    if len(value) != len(shape) - 1:
        return None
    without = [every[:d] + every[d + 1 :] for d in every]
    fits = [dims for dims in without if tuple(shape[d] for d in dims) == tuple(value)]
    if len(fits) <= 1:
        return fits[0] if fits else None
    named = {"row": every[:-1], "col": every[:-2] + every[-1:]}
    return next((dims for word, dims in named.items() if word in key.lower() and dims in fits), None)


def _cut_state(key: str, value: Any, old: Tensor, cuts: Cuts) -> Any:
    if not isinstance(value, Tensor) or value.numel() <= 1:
        return value
    dims = _along(key, value.shape, old.shape)
    assert dims is not None  # check_state
    own = {at: cuts[dim] for at, dim in enumerate(dims) if dim in cuts and value.shape[at] == old.shape[dim]}
    return cut_tensor(value, own, like=old if value.dim() == old.dim() else value)
