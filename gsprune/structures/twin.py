"""A float64 copy of a network in evaluation mode, to try things on; what cannot be copied is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from gsprune.structures.example import (
    Example,
    copy_of,
    map_tensors,
    outputs,
    plain,
    tensors_in,
    to_precision,
)
from gsprune.structures.matrices import check_shapes

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def float64_copy(model: nn.Module, example_input: Example) -> tuple[nn.Module, Example]:
    """An evaluation-mode float64 copy of model and input (on the CPU for MPS, which has no float64).

    Attention kernels without float64 give way to the fused one that has it.
    """
    return twin_of(model, example_input, torch.float64)


def twin_of(model: nn.Module, example_input: Example, dtype: torch.dtype) -> tuple[nn.Module, Example]:
    refuse_wrapped(model)
    _refuse_unknown(model)
    _check_device(model, example_input)
    mps = any(p.device.type == "mps" for p in model.parameters())
    twin = to_precision(copy_of(model).to(device="cpu" if mps else None), dtype).eval()
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    if "flash" in attention_kernel(twin) or "flex" in attention_kernel(twin):
        set_attention_kernel(twin, "sdpa")

    def convert(value: Tensor) -> Tensor:
        return plain(value.cpu() if mps else value, dtype)  # on the CPU first: MPS has no float64

    return twin, map_tensors(convert, example_input)


def attention_kernel(model: nn.Module) -> str:
    """The name of transformers' attention function; "" for other models."""
    return str(getattr(getattr(model, "config", None), "_attn_implementation", None) or "")


def set_attention_kernel(model: nn.Module, name: str) -> None:
    model.set_attn_implementation(name)  # type: ignore[operator]


def wake(twin: nn.Module, args: Example, calls: Mapping[nn.Module, int]) -> bool:
    """Switch to training what has children, if that runs parts with parameters that are not in `calls`; whether it did.

    Auxiliary heads are such parts. Modules without children (BatchNorm, Dropout) stay in evaluation.
    """
    whole = [m for m in twin.modules() if isinstance(m, nn.MultiheadAttention)]  # it does not call what it holds
    inside = {m for attention in whole for m in attention.modules()}
    owners = [m for m in twin.modules() if any(p is not None for p in m._parameters.values())]
    asleep = [m for m in owners if m not in calls and m not in inside]
    if not asleep:
        return False
    for module in twin.modules():
        module.training = any(True for _ in module.children()) and module not in inside
    awake = called_modules(twin, args)
    if awake is not None and any(m in awake for m in asleep):
        return True
    twin.eval()
    return False


def called_modules(twin: nn.Module, args: Example) -> Counter[nn.Module] | None:
    """How often each module is called; None where the model does not run."""
    calls: Counter[nn.Module] = Counter()
    with counted(twin, calls):
        try:
            outputs(twin, args)
        except Exception:
            return None
    return calls


@contextmanager
def counted(model: nn.Module, calls: Counter[nn.Module]) -> Iterator[None]:
    """Inside the block, `calls` counts how often each module is called."""
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_hook(lambda m, *_: calls.update([m])).remove)
        yield


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


def _check_device(model: nn.Module, example_input: Example) -> None:
    """Models spread over several devices move their inputs themselves."""
    homes = {p.device for p in model.parameters()}
    if any(home.type == "meta" for home in homes):
        raise ValueError("the model is on the meta device, which holds no values: build it on another one")
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
