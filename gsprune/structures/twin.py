"""Copies of a network: whole, sharing its tensors, or in float64 to try things on; what cannot be copied is refused."""

from __future__ import annotations

import copy
from collections import OrderedDict
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gsprune.structures.attention import attention_kernel, set_attention_kernel
from gsprune.structures.example import Example, example_of, map_tensors, plain, tensors_in
from gsprune.structures.matrices import check_shapes
from gsprune.text.names import joined

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class _Copying(TorchFunctionMode):
    """Lets `copy.deepcopy` take tensors that have a history: activations that a module keeps, a weight that a hook
    computes. The copy has the values alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            memo = args[1]
            memo[id(args[0])] = args[0].detach().clone()
            return memo[id(args[0])]
        return func(*args, **(kwargs or {}))


def copy_of(model: nn.Module, *, sharing: bool = False) -> nn.Module:
    """A deep copy of a network; tensors with a history become values.

    Args:
        sharing: the copy holds the very same parameters and buffers, to be replaced but never written into.
    """
    tensors = [*model.parameters(), *model.buffers()] if sharing else []
    return copied(model, {id(tensor): tensor for tensor in tensors})


def copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy, given what is not copied. Ordinary modules are made here: `copy` would walk through all that they
    hold, which of a network of 50 layers takes a tenth of a second."""
    ordinary = [
        module for module in model.modules() if _is_ordinary(cast(Any, type(module))) and id(module) not in memo
    ]
    memo |= {id(module): type(module).__new__(type(module)) for module in ordinary}
    with _Copying():
        for module in reversed(ordinary):
            state = {name: _value(value, memo) for name, value in vars(module).items()}
            memo[id(module)].__setstate__(state)
        twin: nn.Module = copy.deepcopy(model, memo)
    forget_caches(twin)
    return twin


def forget_caches(model: nn.Module) -> None:
    """Empty the dictionaries of tensors that modules call a cache (position biases of LeViT and TinyViT in evaluation):
    they hold what was computed with other weights.

    >>> net = nn.Linear(2, 2)
    >>> net.bias_cache = {"cpu": torch.zeros(2)}
    >>> forget_caches(net)
    >>> net.bias_cache
    {}
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if type(value) is dict and value and "cache" in name and all(isinstance(t, Tensor) for t in value.values()):
                vars(module)[name] = {}


_ATOMS = (int, float, bool, str, type(None), type, torch.dtype, torch.device)
_EMPTY = (dict, OrderedDict, list, set)


def _value(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of a module's attribute."""
    if type(value) in _ATOMS or id(value) in memo:
        return memo.get(id(value), value)
    if type(value) in _EMPTY and not value:
        memo[id(value)] = type(value)()
        return memo[id(value)]
    return copy.deepcopy(value, memo)


@cache
def _is_ordinary(cls: type[nn.Module]) -> bool:
    """Whether modules of a class are copied attribute by attribute, as `nn.Module` is."""
    names = ("__deepcopy__", "__copy__", "__reduce__", "__reduce_ex__", "__getstate__", "__new__")
    return all(getattr(cls, name, None) is getattr(nn.Module, name, None) for name in names) and not any(
        vars(base).get("__slots__") for base in cls.__mro__
    )


def every_tensor(model: nn.Module, *, every_name: bool = False) -> dict[str, Tensor]:
    """Parameters, buffers and tensors that a module keeps as plain attributes (a table of sines), by name.

    Args:
        every_name: a shared one under each of its names.
    """
    once = not every_name
    found = dict(model.named_parameters(remove_duplicate=once)) | dict(model.named_buffers(remove_duplicate=once))
    known = {id(tensor) for tensor in found.values()}
    for path, module in model.named_modules():
        for leaf, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_leaf and id(value) not in known and not leaf.startswith("_"):
                found[joined(path, leaf)] = value
    return found


def to_precision(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Floating and complex parameters, buffers and tensors kept as plain attributes in the precision of `dtype`."""

    def convert(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(dtype.to_complex())
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    model._apply(convert)  # type: ignore[no-untyped-call]
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                vars(module)[name] = convert(value.detach())
    return model


def twin_of(
    model: nn.Module, example_input: Example, dtype: torch.dtype = torch.float64, *, needs_values: bool = True
) -> tuple[nn.Module, Example]:
    """An evaluation-mode copy of model and input in another precision (on the CPU for MPS, which has no float64).

    Attention kernels without float64 give way to the fused one that has it.

    Raises:
        ValueError: the model is a wrapper, quantised, or on another device than the example; on the meta device, where
            that has values that are needed.
    """
    refuse_wrapped(model)
    _refuse_unknown(model)
    example_input = example_of(example_input)
    _check_device(model, example_input, needs_values)
    mps = any(p.device.type == "mps" for p in model.parameters())
    made = {id(t): _converted(t, dtype, "cpu" if mps else t.device) for t in _tensors(model)}
    twin = to_precision(copied(model, made).to(device="cpu" if mps else None), dtype).eval()
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    if "flash" in attention_kernel(twin) or "flex" in attention_kernel(twin):
        set_attention_kernel(twin, "sdpa")
    if getattr(getattr(twin, "config", None), "_experts_implementation", None):  # transformers' own has no float64
        twin.set_experts_implementation("eager")  # type: ignore[operator]

    def convert(value: Tensor) -> Tensor:
        return plain(value.cpu() if mps else value, dtype)  # on the CPU first: MPS has no float64

    return twin, map_tensors(convert, example_input)


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers of PyTorch's own types, which can be converted as they are copied."""
    return [t for t in (*model.parameters(), *model.buffers()) if type(t) in (nn.Parameter, Tensor) and t.is_leaf]


def _converted(tensor: Tensor, dtype: torch.dtype, device: Any) -> Tensor:
    wanted = dtype if tensor.is_floating_point() else dtype.to_complex() if tensor.is_complex() else tensor.dtype
    value = tensor.detach().to(device=device, dtype=wanted, copy=True)
    return nn.Parameter(value, value.is_floating_point()) if isinstance(tensor, nn.Parameter) else value


def _refuse_unknown(model: nn.Module) -> None:
    """ValueError for layers whose weights cannot be read as rows and columns."""
    check_shapes(model)
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        packed = (
            isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and weight is not None and weight.dtype in _INTEGERS
        )
        homes = [type(module).__module__, type(weight.data).__module__ if weight is not None else ""]
        if packed or any(part in home for home in homes for part in (".quantized", "bitsandbytes", "torchao")):
            raise ValueError(f"{name!r} is a quantised {type(module).__name__}: prune first, quantise afterwards")


def _check_device(model: nn.Module, example_input: Example, needs_values: bool) -> None:
    """Models spread over several devices move their inputs themselves."""
    homes = {p.device for p in model.parameters()}
    if any(home.type == "meta" for home in homes) and (needs_values or len(homes) > 1):
        part = "a part of " if len(homes) > 1 else ""
        raise ValueError(f"{part}the model is on the meta device, which holds no values: build it on another one")
    for tensor in tensors_in(example_input, floating=False) if len(homes) == 1 else ():
        if tensor.dim() and tensor.device not in homes:
            home = next(iter(homes))
            raise ValueError(f"the model is on {home} and the example input on {tensor.device}: move one of them")


def refuse_wrapped(model: nn.Module) -> None:
    """ValueError for wrappers that keep parameters of their own or a compiled copy."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("the model is a program of torch.jit, pass the model that it was made from")
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        inner = "_orig_mod" if hasattr(model, "_orig_mod") else "module"
        raise ValueError(f"{type(model).__name__} is a wrapper, pass the model inside it (.{inner})")
