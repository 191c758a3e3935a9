"""Running a network on an example: in evaluation mode, with repeatable random numbers, noting which modules run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from gsprune.structures.attention import no_fast_path
from gsprune.structures.example import Example, answers_in, call, example_of, map_tensors
from gsprune.structures.norms import may_be_stream_norm
from gsprune.structures.twin import forget_caches


def outputs(model: nn.Module, example_input: Example) -> list[Tensor]:
    """The floating-point answers, without gradients; the example is cloned, the model may write into it.

    Encoders of PyTorch run as they do in training: their fast path puts zeros at padded positions, the other does not.
    Norms that compute in float32 compute in float64 on tensors of that type, so that rounding hides nothing. Products
    in float32 (routers of experts) are summed in float64: the order of the sum must not choose the expert.
    """
    forget_caches(model)
    with torch.no_grad(), same_randomness(model), no_fast_path(), _precise_norms(model):
        return list(answers_in(call(model, map_tensors(Tensor.clone, example_input))))


class _Precise(TorchFunctionMode):
    """Linear layers sum in float64; while `inside` is not 0, tensors of float64 are not made float32."""

    inside = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside and narrows(func, args, kwargs):
            return args[0]
        if func is F.linear and args and args[0].dtype == torch.float32:
            args, kwargs = map_tensors(Tensor.double, (args, kwargs))
            return func(*args, **kwargs).float()
        return func(*args, **kwargs)


def narrows(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call makes a tensor of float64 one of float32.

    >>> x = torch.zeros(2, dtype=torch.float64)
    >>> narrows(Tensor.float, (x,), {}), narrows(Tensor.to, (x, torch.float16), {})
    (True, False)
    """
    if not args or not isinstance(args[0], Tensor) or args[0].dtype != torch.float64:
        return False
    return func is Tensor.float or (func in (Tensor.to, Tensor.type) and torch.float32 in (*args[1:], *kwargs.values()))


@contextmanager
def _precise_norms(model: nn.Module) -> Iterator[None]:
    norms = [m for m in model.modules() if may_be_stream_norm(m) and not isinstance(m, nn.LayerNorm | nn.RMSNorm)]
    others = (m for m in model.modules() if not type(m).__module__.startswith("torch.nn."))
    if not norms and not any(p is not None for m in others for p in m._parameters.values()):
        yield
        return
    mode = _Precise()

    def step(amount: int) -> Any:
        return lambda *_: setattr(mode, "inside", mode.inside + amount)

    hooks = [m.register_forward_pre_hook(step(1)) for m in norms] + [m.register_forward_hook(step(-1)) for m in norms]
    with hooked(hooks), mode:
        yield


@contextmanager
def same_randomness(model: nn.Module) -> Iterator[None]:
    """Random numbers start from a fixed seed; the caller's generators are left as they were."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield


@contextmanager
def evaluating(models: Any) -> Iterator[None]:
    """Eval mode for every module inside the block; each module's own mode afterwards."""
    before = [(module, module.training) for model in models for module in model.modules()]
    try:
        for module, _ in before:
            module.training = False
        yield
    finally:
        for module, training in before:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Where its first parameter lies."""
    tensor = next(model.parameters(), None)
    return torch.device("cpu") if tensor is None else tensor.device


def to_device_of(model: nn.Module, example_input: Example) -> Example:
    """The same example, where the model is."""
    device = device_of(model)
    return map_tensors(lambda tensor: tensor.to(device), example_of(example_input))


def wake(twin: nn.Module, args: Example, calls: Mapping[nn.Module, int]) -> bool:
    """Switch to training what has children, if that runs parts with parameters that are not in `calls`; whether it did.

    Auxiliary heads are such parts. Modules without children (BatchNorm, Dropout) stay in evaluation, and so do norms
    with children (timm's BatchNormAct2d), whose statistics would move. Buffers that moved are put back.
    """
    whole = [m for m in twin.modules() if isinstance(m, nn.MultiheadAttention)]  # it does not call what it holds
    inside = {m for attention in whole for m in attention.modules()}
    owners = [m for m in twin.modules() if any(p is not None for p in m._parameters.values())]
    asleep = [m for m in owners if m not in calls and m not in inside]
    if not asleep:
        return False
    for module in twin.modules():
        is_whole = any(True for _ in module.children()) and "running_mean" not in module._buffers
        module.training = is_whole and module not in inside
    before = [(buffer, buffer.detach().clone()) for buffer in twin.buffers()]
    awake = called_modules(twin, args)
    with torch.no_grad():
        for buffer, values in before:
            buffer.copy_(values)
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


def counted(model: nn.Module, calls: Counter[nn.Module]) -> AbstractContextManager[None]:
    """Inside the block, `calls` counts how often each module is called."""
    return hooked(module.register_forward_hook(lambda m, *_: calls.update([m])) for module in model.modules())


@contextmanager
def hooked(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Inside the block these hooks are there; they are registered as they are taken."""
    with ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(hook)
        yield


def refuse_inference_mode() -> None:
    """ValueError where no gradient can be computed."""
    if torch.is_inference_mode_enabled():
        raise ValueError("scores are made of gradients, which torch.inference_mode rules out: call it outside of that")
