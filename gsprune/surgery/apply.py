"""Apply a cut plan in place: tensors, module attributes, the optimizer's state."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gsprune.structures.twin import refuse_wrapped
from gsprune.surgery.cut_plan import CutPlan, Cuts, cut_tensor
from gsprune.surgery.narrow_attention import close_nested_path, narrow, why_not_narrow
from gsprune.surgery.optimizers import Optimizers, check_state, every_optimizer, held, move_state, names_of


def apply_cut(
    model: nn.Module, plan: CutPlan, *, optimizer: Optimizers | None = None, drop_state: bool = False
) -> None:
    """Cut `model` in place: new Parameters in the same modules, attributes and optimizer state to match.

    Dtype, device, memory format, `requires_grad` and `.grad` (cut along) are kept. In the optimizer (or several, and
    all inside them) the new parameters take the old ones' places. State that runs along its parameter is cut too:
    moments, and the rows and columns of factored ones. Everything is checked before anything changes.

    Args:
        drop_state: an optimizer with other state forgets it, with a warning, instead of an error.

    Raises:
        ValueError: the plan does not fit the model, or the optimizer's state holds a tensor that is none of these.
    """
    refuse_wrapped(model)
    homes = {name: home_of(model, name) for name in plan.kept}
    for name, cuts in plan.kept.items():
        _check_tensor(name, getattr(*homes[name]), plan.sizes[name], cuts)
    for name in plan.attributes:
        if type(getattr(*home_of(model, name))) is not int:
            raise ValueError(f"the cut plan sets {name!r}, which is not an integer")
    _check_shared(model, homes)
    modules = {id(module): module for module, _ in homes.values()}.values()
    resizes = [(module, _resizer(module)) for module in modules]
    replaced: dict[Tensor, tuple[nn.Parameter, Cuts]] = {}
    fresh = {name: cut_tensor(getattr(*homes[name]).detach(), cuts) for name, cuts in plan.kept.items()}
    optimizers = every_optimizer(optimizer)
    _check_optimizers(optimizers, [getattr(*home) for home in homes.values()], drop_state=drop_state)
    for name, (module, leaf) in homes.items():
        old = getattr(module, leaf)
        if isinstance(old, nn.Parameter):
            replaced[old] = (_parameter(old, fresh[name], plan.kept[name]), plan.kept[name])
        setattr(module, leaf, replaced[old][0] if old in replaced else fresh[name])
    for module, resize in resizes:
        resize(module)
    for name, value in plan.attributes.items():
        setattr(*home_of(model, name), value)
    close_nested_path(model)
    move_state(optimizers, replaced, drop=drop_state)


# ---- checks


def home_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
        getattr(module, leaf)
    except AttributeError:
        raise ValueError(f"the cut plan names {name!r}, which {type(model).__name__} does not have") from None
    return module, leaf


def _check_tensor(name: str, tensor: Any, sizes: Mapping[int, int], cuts: Cuts) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"the cut plan cuts {name!r}, which is not a tensor")
    for dim in cuts:
        if tensor.dim() <= dim or tensor.shape[dim] != sizes[dim]:
            expected = f"length {sizes[dim]} in dimension {dim}"
            raise ValueError(f"the cut plan expects {name!r} to have {expected}, its shape is {tuple(tensor.shape)}")
    if getattr(tensor, "_backward_hooks", None) or getattr(tensor, "_post_accumulate_grad_hooks", None):
        raise ValueError(f"{name!r} has gradient hooks, remove them before shrinking")


def _check_shared(model: nn.Module, homes: Mapping[str, tuple[nn.Module, str]]) -> None:
    cut = {id(getattr(*home)): name for name, home in homes.items()}
    seen: set[int] = set()
    for parameter in (p for m in model.modules() for p in m._parameters.values() if p is not None):
        if id(parameter) in cut and id(parameter) in seen:
            raise ValueError(f"{cut[id(parameter)]!r} is shared with another module and cannot be cut")
        seen.add(id(parameter))


def _check_optimizers(optimizers: Sequence[Any], tensors: Sequence[Tensor], *, drop_state: bool) -> None:
    """A foreign optimizer would go on training parameters that no longer exist; unknown state could not follow."""
    if drop_state:
        return
    mine, trained = held(optimizers), [t for t in tensors if t.requires_grad]
    if optimizers and trained and not any(id(t) in mine for t in trained):
        raise ValueError(f"{names_of(optimizers)} holds none of the parameters to be cut")
    check_state(optimizers, tensors)


# ---- cutting


def _parameter(old: nn.Parameter, data: Tensor, cuts: Cuts) -> nn.Parameter:
    new = nn.Parameter(data, requires_grad=old.requires_grad)
    if old.grad is not None:
        new.grad = cut_tensor(old.grad, cuts)
    return new


def forget_compiled() -> None:
    """Let `torch.compile` start anew, as for a new network: after 8 changes dynamo would stay with eager for good."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.convert_frame.input_codes.seen:
        torch.compiler.reset()


# ---- module attributes, read off the new shapes


def _resize_conv(conv: Any) -> None:
    rows, columns = conv.weight.shape[:2]
    is_depthwise = conv.groups == conv.in_channels == conv.out_channels and conv.groups > 1
    conv.groups = rows if is_depthwise else conv.groups
    conv.out_channels, conv.in_channels = rows, columns * conv.groups


def _resize_linear(linear: Any) -> None:
    linear.out_features, linear.in_features = linear.weight.shape


def _resize_batchnorm(norm: Any) -> None:
    norm.num_features = len(norm.weight if norm.weight is not None else norm.running_mean)


def _resize_prelu(prelu: Any) -> None:
    prelu.num_parameters = len(prelu.weight)


_RESIZE: tuple[tuple[type[nn.Module], Callable[[Any], None]], ...] = (
    (nn.modules.conv._ConvNd, _resize_conv),
    (nn.Linear, _resize_linear),
    (nn.modules.batchnorm._BatchNorm, _resize_batchnorm),
    (nn.PReLU, _resize_prelu),
    (nn.MultiheadAttention, narrow),
)


def _resizer(module: nn.Module) -> Callable[[Any], None]:
    reason = why_not_narrow(module) if isinstance(module, nn.MultiheadAttention) else None
    if reason is not None:
        raise ValueError(f"the cut plan cuts an attention that cannot be shrunk: {reason}")
    for cls, resize in _RESIZE:
        if isinstance(module, cls):
            return resize
    raise ValueError(f"the cut plan cuts a {type(module).__name__}, which cannot be shrunk")
