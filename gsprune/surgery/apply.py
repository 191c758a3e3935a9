"""Apply a cut plan in place: tensors, module attributes, the optimizer's state."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gsprune.structures.matrices import is_conv1d
from gsprune.structures.norms import StreamNorm, may_be_stream_norm, stream_norm
from gsprune.structures.twin import forget_caches, refuse_wrapped
from gsprune.surgery.cut_plan import CutPlan, Cuts, cut_tensor
from gsprune.surgery.expert_kernel import fit_experts
from gsprune.surgery.narrow_attention import close_nested_path, narrow, why_not_narrow
from gsprune.surgery.narrow_forward import by_module, is_size, narrow_forward
from gsprune.surgery.narrow_norm import narrow_norm
from gsprune.surgery.no_branch import no_branch
from gsprune.surgery.optimizers import Optimizers, check_state, every_optimizer, forget, held, move_state, names_of
from gsprune.surgery.short_list import GONE, leave_out

SHAPE = ".normalized_shape"  # the attribute by which a plan shortens a norm that has no tensors


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
    plan = with_ties(model, plan.without_removed())
    homes = {name: home_of(model, name) for name in plan.kept}
    for name, cuts in plan.kept.items():
        _check_tensor(name, getattr(*homes[name]), plan.sizes[name], cuts)
    told = {_module(model, path): numbers for path, numbers in by_module(plan.attributes).items()}
    others = {name: value for name, value in plan.attributes.items() if not is_size(name)}
    for name in others:
        check_attribute(name, getattr(*home_of(model, name)))
    numbers = {name: value for name, value in others.items() if not name.endswith(SHAPE)}
    resizes = _resizers(model, plan)
    gone = {path: home_of(model, path) for path in plan.removed}
    for path, home in gone.items():
        if not path or not isinstance(getattr(*home), nn.Module):
            raise ValueError(f"the cut plan removes {path!r}, which is not a module inside the model")
        if plan.removed[path] == GONE and not isinstance(home[0], nn.ModuleList | nn.ModuleDict):
            raise ValueError(
                f"the cut plan takes {path!r} out of a {type(home[0]).__name__}, which is no list of modules"
            )
    replaced: dict[Tensor, tuple[nn.Parameter, Cuts]] = {}
    fresh = {name: cut_tensor(getattr(*homes[name]).detach(), cuts) for name, cuts in plan.kept.items()}
    optimizers = every_optimizer(optimizer)
    _check_optimizers(optimizers, [getattr(*home) for home in homes.values()], drop_state=drop_state)
    for name, (module, leaf) in homes.items():
        old = getattr(module, leaf)
        if isinstance(old, nn.Parameter) and old not in replaced:  # a shared one is cut once
            replaced[old] = (_parameter(old, fresh[name], plan.kept[name]), plan.kept[name])
        setattr(module, leaf, replaced[old][0] if old in replaced else fresh[name])
    _own_settings(model, numbers)
    for name, value in numbers.items():
        setattr(*home_of(model, name), value)
    for resize in resizes:
        resize()
    for module, mine in told.items():
        narrow_forward(module, mine)
    before = {id(parameter) for parameter in model.parameters()} if gone else set()
    for path, home in gone.items():
        if plan.removed[path] == GONE:
            leave_out(*home)
        else:
            setattr(*home, no_branch(getattr(*home), plan.removed[path]))
    close_nested_path(model)
    fit_experts(model)
    forget_caches(model)
    move_state(optimizers, replaced, drop=drop_state)
    forget(optimizers, before - {id(parameter) for parameter in model.parameters()})


# ---- checks


def home_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """What holds a tensor or an attribute, a module or (of attributes) its configuration; and its name there."""
    path, _, leaf = name.rpartition(".")
    home: Any = model
    try:
        for part in path.split(".") if path else ():
            home = getattr(home, part)
        getattr(home, leaf)
    except AttributeError:
        raise ValueError(f"the cut plan names {name!r}, which {type(model).__name__} does not have") from None
    return home, leaf


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"the cut plan names {path!r}, which {type(model).__name__} does not have") from None


def _own_settings(model: nn.Module, names: Iterable[str]) -> None:
    """Give the model configurations of its own, where attributes of these are to be set: others may share them.

    A layer whose configuration is set has it alone: the next layer may keep another number of heads.
    """
    for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
        home, leaf = home_of(model, path) if path else (model, "")
        shared = getattr(home, leaf) if path else model
        if isinstance(shared, nn.Module):
            continue
        own = copy.deepcopy(shared)
        for module in model.modules() if home is model else [home]:
            for name, value in vars(module).items():
                if value is shared:
                    setattr(module, name, own)


def check_attribute(name: str, old: object) -> None:
    """ValueError for an attribute that no plan can set: a number it must be, or the one-number shape of a norm."""
    if type(old) is not int and not (name.endswith(SHAPE) and isinstance(old, tuple) and len(old) == 1):
        raise ValueError(f"the cut plan sets {name!r}, which is not an integer")


def with_ties(model: nn.Module, plan: CutPlan) -> CutPlan:
    """The plan with each tensor that several modules share under all of its names.

    Raises:
        ValueError: the plan says two things of one tensor.

    >>> net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    >>> net[1].weight = net[0].weight
    >>> plan = CutPlan({"0.weight": {1: torch.tensor([0, 2])}}, {"0.weight": {1: 3}}, {})
    >>> with_ties(net, plan).kept["1.weight"]
    {1: tensor([0, 2])}
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = {name: every for every in names.values() if len(every) > 1 for name in every}
    if not any(name in tied for name in plan.kept):
        return plan
    kept = {name: dict(cuts) for name, cuts in plan.kept.items()}
    sizes = {name: dict(lengths) for name, lengths in plan.sizes.items()}
    for name, cuts in plan.kept.items():
        for other in tied.get(name, ()):
            for dim, positions in cuts.items():
                mine = kept.setdefault(other, {}).setdefault(dim, positions)
                sizes.setdefault(other, {})[dim] = plan.sizes[name][dim]
                if not torch.equal(mine, positions):
                    raise ValueError(f"{name!r} and {other!r} are one tensor, of which the cut plan keeps two things")
    for name, cuts in kept.items():
        bias = f"{name.rpartition('.')[0]}.bias".removeprefix(".")
        if name in tied and 0 in cuts and name.endswith("weight") and bias not in kept and _has(model, bias):
            raise ValueError(f"{tied[name][0]!r} is shared with another module as {name!r}, and {bias!r} is not cut")
    return CutPlan(kept, sizes, plan.attributes, plan.removed)


def _has(model: nn.Module, name: str) -> bool:
    home, _, leaf = name.rpartition(".")
    return model.get_submodule(home)._parameters.get(leaf) is not None


def _check_tensor(name: str, tensor: Any, sizes: Mapping[int, int], cuts: Cuts) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"the cut plan cuts {name!r}, which is not a tensor")
    for dim in cuts:
        if tensor.dim() <= dim or tensor.shape[dim] != sizes[dim]:
            expected = f"length {sizes[dim]} in dimension {dim}"
            raise ValueError(f"the cut plan expects {name!r} to have {expected}, its shape is {tuple(tensor.shape)}")
    if getattr(tensor, "_backward_hooks", None) or getattr(tensor, "_post_accumulate_grad_hooks", None):
        raise ValueError(f"{name!r} has gradient hooks, remove them before shrinking")


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


def _resizers(model: nn.Module, plan: CutPlan) -> list[Callable[[], None]]:
    """What makes the attributes of each module that is cut agree with its tensors, once these are short.

    A tensor that a module of another class holds has no attribute that is known here; a plan sets it by name.
    """
    names = dict.fromkeys(_layer_name(name) for name in plan.kept)
    names |= dict.fromkeys(name.removesuffix(SHAPE) for name in plan.attributes if name.endswith(SHAPE))
    modules = {id(module): module for module in map(model.get_submodule, names)}
    widths = {
        id(model.get_submodule(n.removesuffix(SHAPE))): v for n, v in plan.attributes.items() if n.endswith(SHAPE)
    }
    scaled: set[int] = set()
    return [_resizer(module, widths.get(key), scaled) for key, module in modules.items()]


def _layer_name(tensor: str) -> str:
    """The module whose layer a tensor is of, also where a parametrisation computes its weight."""
    return tensor.rpartition(".")[0].partition(".parametrizations.")[0]


def _resizer(module: Any, width: int | None, scaled: set[int]) -> Callable[[], None]:
    reason = why_not_narrow(module) if isinstance(module, nn.MultiheadAttention) else None
    if reason is not None:
        raise ValueError(f"the cut plan cuts an attention that cannot be shrunk: {reason}")
    for cls, resize in _RESIZE:
        if isinstance(module, cls):
            return partial(resize, module)
    if is_conv1d(module):
        return partial(_resize_conv1d, module)
    norm = stream_norm(module)
    if norm is not None:
        return partial(_resize_norm, module, norm, width, scaled)
    if may_be_stream_norm(module):
        raise ValueError(f"the cut plan cuts a {type(module).__name__}, which computes neither LayerNorm nor RMSNorm")
    return lambda: None


def _resize_norm(norm: Any, dense: StreamNorm, width: int | None, scaled: set[int]) -> None:
    weight = getattr(norm, "weight", None)
    width = len(weight) if isinstance(weight, Tensor) else width
    if width is not None and width != dense.width and id(weight) not in scaled:
        narrow_norm(norm, dense, width)
        if isinstance(weight, Tensor):
            scaled.add(id(weight))


def _resize_conv(conv: Any) -> None:
    first, second = _weight_shape(conv)[:2]
    if conv.groups == conv.in_channels > 1:  # depthwise: one filter a channel, or several
        conv.groups = first if conv.transposed else first * conv.groups // conv.out_channels
    both = (first, second * conv.groups)
    conv.out_channels, conv.in_channels = both[::-1] if conv.transposed else both


def _weight_shape(layer: Any) -> torch.Size:
    """Also where a hook of `torch.nn.utils.weight_norm` computes the weight, which is long until the next call."""
    weight: Tensor = layer.weight_v if "weight_v" in layer._parameters else layer.weight
    return weight.shape


def _resize_linear(linear: Any) -> None:
    linear.out_features, linear.in_features = _weight_shape(linear)


def _resize_conv1d(layer: Any) -> None:
    """Of transformers: a linear layer whose weight is transposed."""
    layer.nx, layer.nf = layer.weight.shape


def _resize_bilinear(layer: Any) -> None:
    layer.out_features, layer.in1_features, layer.in2_features = layer.weight.shape


def _resize_embedding(table: Any) -> None:
    table.num_embeddings, table.embedding_dim = table.weight.shape


def _resize_batchnorm(norm: Any) -> None:
    """Also of an InstanceNorm."""
    tensor = norm.weight if norm.weight is not None else norm.running_mean
    norm.num_features = norm.num_features if tensor is None else len(tensor)


def _resize_groupnorm(norm: Any) -> None:
    norm.num_channels = norm.num_channels if norm.weight is None else len(norm.weight)


def _resize_prelu(prelu: Any) -> None:
    prelu.num_parameters = len(prelu.weight)


def _resize_rnn(rnn: Any) -> None:
    rnn.hidden_size, rnn.input_size = rnn.weight_hh_l0.shape[1], rnn.weight_ih_l0.shape[1]
    if rnn.proj_size:
        rnn.proj_size, rnn.hidden_size = rnn.weight_hr_l0.shape
    rnn.flatten_parameters()


def _resize_cell(cell: Any) -> None:
    cell.hidden_size, cell.input_size = cell.weight_hh.shape[1], cell.weight_ih.shape[1]


def _resize_attention(attention: Any) -> None:
    narrow(attention)
    if attention.in_proj_weight is not None:
        attention.embed_dim = attention.kdim = attention.vdim = attention.in_proj_weight.shape[1]
    else:
        projections = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        attention.embed_dim, attention.kdim, attention.vdim = (weight.shape[1] for weight in projections)


_RESIZE: tuple[tuple[type[nn.Module], Callable[[Any], None]], ...] = (
    (nn.modules.conv._ConvNd, _resize_conv),
    (nn.Linear, _resize_linear),
    (nn.Bilinear, _resize_bilinear),
    (nn.Embedding, _resize_embedding),
    (nn.EmbeddingBag, _resize_embedding),
    (nn.modules.batchnorm._NormBase, _resize_batchnorm),
    (nn.GroupNorm, _resize_groupnorm),
    (nn.PReLU, _resize_prelu),
    (nn.RNNBase, _resize_rnn),
    (nn.RNNCellBase, _resize_cell),
    (nn.MultiheadAttention, _resize_attention),
)
