"""Which tensors of a model are matrix weights, whose single entries can be pruned, and why the others are not.

The rule is general: every floating-point parameter with two axes or more, unless it is an embedding (a table that is
looked up), is added to or multiplied with activations element by element (positions, tokens, biases, norms, scales), or
is only what a weight is computed from.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gsprune.structures.adapters import ADAPTER, adapted_weights
from gsprune.structures.shards import is_sharded
from gsprune.text.names import joined

ENOUGH = 0.9  # where less of a model's matrix weights can be pruned, a warning says so
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
BY_ROWS = (*LAYERS, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear)  # outputs are the first axis
TABLES = (nn.Embedding, nn.EmbeddingBag)
# Words in a parameter's name that say what it is, where its module is none of those above.
NOT_MULTIPLIED = re.compile(
    "anchor|bias|buffer|cls|codebook|decay|emb|embed|embedding|gain|gamma|beta|latent|log|mask|mean|norm|pe|pos|position|"
    "positional|prompt|prototype|queries|scale|shift|sigma|std|table|temperature|time|token|var|variance"
)


@dataclass(frozen=True)
class Matrix:
    """One tensor of two axes or more.

    name      of the parameter
    aliases   all that a name pattern may call it by: the parameter, its weight, its layer
    weight    the parameter
    order     of its axes: "rows" (outputs first), "columns" (inputs first), "transposed" (so, of a convolution), or
              "unknown"
    reason    why it is left alone; None: it is pruned unless excluded
    by_name   whether an `include` pattern that means it brings it in all the same
    value     what its layer computes with, if that is not the parameter itself
    """

    name: str
    aliases: tuple[str, ...]
    weight: nn.Parameter
    order: str = "unknown"
    reason: str | None = None
    by_name: bool = False
    value: Callable[[], Tensor] | None = None


def find_matrices(model: nn.Module) -> list[Matrix]:
    """Every parameter of two axes or more, in the model's order; of a tied one each place.

    Raises:
        ValueError: a parameter has no shape yet, as those of lazy layers before their first batch.

    Example:
        >>> model = nn.ModuleDict({"words": nn.Embedding(9, 4), "rnn": nn.GRU(4, 2), "fc": nn.Linear(2, 9)})
        >>> [(m.name, m.reason) for m in find_matrices(model)]
        [('words.weight', 'it is an embedding'), ('rnn.weight_ih_l0', None), ('rnn.weight_hh_l0', None), \
('fc.weight', None)]
    """
    check_shapes(model)
    found = [
        _matrix(model, path, module, local, weight)
        for path, module in model.named_modules()
        for local, weight in module._parameters.items()
        if weight is not None and weight.dim() > 1
    ]
    adapted = adapted_weights(model)
    found = [_adapted(matrix, adapted[matrix.name]) if matrix.name in adapted else matrix for matrix in found]
    tables = {id(matrix.weight): matrix.name for matrix in found if matrix.reason == EMBEDDING}
    return [_tied(matrix, tables.get(id(matrix.weight))) for matrix in found]


def tensors(model: nn.Module) -> dict[int, int]:
    """id -> entries of every parameter of two axes or more, tied ones once: what coverage is a share of."""
    return {id(parameter): parameter.numel() for parameter in model.parameters() if parameter.dim() > 1}


def coverage(model: nn.Module, targeted: Sequence[Tensor]) -> float:
    """The share of the entries of all parameters of two axes or more that lies in some of them, in [0, 1].

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 3), nn.Linear(3, 10))
        >>> coverage(model, [model[1].weight])
        0.5
    """
    sizes, mine = tensors(model), {id(tensor) for tensor in targeted}
    total = sum(sizes.values())
    return sum(size for key, size in sizes.items() if key in mine) / total if total else 0.0


def warn_of_little(
    model: nn.Module, skipped: Mapping[str, str], targeted: Sequence[Tensor], share: float, *, stacklevel: int
) -> None:
    """Warn if what is left out unasked is more than a tenth of the model's matrix weights; names the largest.

    Args:
        targeted: what is pruned, maybe by another name than one that is left out.
        share: what `coverage` says of that.
    """
    mine = {id(tensor) for tensor in targeted}
    sizes = tensors(model)
    names: dict[int, tuple[str, str]] = {}
    for name, reason in skipped.items():
        if id(parameter := model.get_parameter(name)) not in mine:
            names.setdefault(id(parameter), (name, reason))
    lost = sorted(((sizes.get(key, 0), *text) for key, text in names.items()), reverse=True, key=lambda item: item[0])
    total = sum(sizes.values())
    if not total or sum(size for size, *_ in lost) <= (1 - ENOUGH) * total:
        return
    told = "; ".join(f"{name} ({size / total:.0%}): {reason}" for size, name, reason in lost[:3])
    more = f"; and {len(lost) - 3} more, see skipped" if len(lost) > 3 else ""
    text = (
        f"{share:.0%} of the model's matrix weights can be pruned, and sparsity is that of these alone; left out are "
    )
    warnings.warn(f"{text}{told}{more}".replace("%", " %"), stacklevel=stacklevel + 1)


def heaviest_first(model: nn.Module, skipped: Mapping[str, str]) -> dict[str, str]:
    """The same, the reason of most parameters first.

    >>> net = nn.ModuleDict({"head": nn.Linear(2, 3), "h": nn.Linear(8, 8)})
    >>> [*heaviest_first(net, {"head": "it is the output", "h": "it is odd"})]
    ['h', 'head']
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    heavy: dict[str, int] = {}
    for name, why in skipped.items():
        mine = sum(size for other, size in sizes.items() if other == name or other.startswith(f"{name}."))
        heavy[why] = heavy.get(why, 0) + mine
    return dict(sorted(skipped.items(), key=lambda item: -heavy[item[1]]))


# ---- one tensor

EMBEDDING = "it is an embedding"


def check_shapes(model: nn.Module) -> None:
    """ValueError that names a parameter without a shape, as those of lazy layers before their first batch."""
    for name, weight in model.named_parameters():
        if isinstance(weight, UninitializedParameter):
            raise ValueError(f"{name} has no shape yet: run the model on a batch before you make the Pruner")


def _matrix(model: nn.Module, path: str, module: nn.Module, local: str, weight: nn.Parameter) -> Matrix:
    name = joined(path, local)
    if isinstance(module, ParametrizationList):
        return _parametrized(model, path, module, local, weight)
    if (computed := _computed_by_hook(module, local)) is not None:
        return _hooked(path, module, local, weight, computed)
    reason, by_name = _reason(path, module, local, weight)
    return Matrix(name, (name, path), weight, _order(module), reason, by_name and reason is not None)


def _reason(path: str, module: nn.Module, local: str, weight: nn.Parameter) -> tuple[str | None, bool]:
    """Why a parameter is left alone (None: it is not), and whether its name may overrule that."""
    if fault := _fault(weight):
        return fault, False
    kind = type(module).__name__
    if isinstance(module, LAYERS) and local == "weight":
        return None, True
    if isinstance(module, TABLES) or (local == "weight" and "embedding" in kind.lower()):
        return EMBEDDING, True
    if "norm" in kind.lower():
        return f"it belongs to a {kind}, which scales by it", True
    if sum(size > 1 for size in weight.shape) < 2 or (weight.shape[0] == 1 and weight.dim() > 2):
        return f"its shape {[*weight.shape]} is not that of a matrix", True
    if (word := next(filter(NOT_MULTIPLIED.fullmatch, _words(path, local)), None)) is not None:
        return f"its name says {word!r}, so it is taken for no matrix", True
    if weight.stride() != torch.empty_like(weight).stride():
        return f"it shares or skips memory (its strides are {weight.stride()})", False
    return None, True


def _fault(weight: nn.Parameter) -> str | None:
    """What keeps a tensor of any module from being pruned."""
    if is_traceable_wrapper_subclass(weight) and not is_sharded(weight):
        return f"it is a {type(weight).__name__}, whose entries cannot be set to zero one by one"
    if weight.is_complex():
        return f"its entries are complex ({weight.dtype}), and scores and masks are of real ones"
    if not weight.is_floating_point():
        return f"its entries are {weight.dtype}, and only floating-point ones are scored"
    if weight.numel() == 0:
        return f"it has no entries (its shape is {[*weight.shape]})"
    return None


def _order(module: nn.Module) -> str:
    if getattr(module, "transposed", False) and isinstance(module, nn.modules.conv._ConvNd):
        return "transposed"
    if isinstance(module, BY_ROWS):
        return "rows"
    return "columns" if is_conv1d(module) else "unknown"


def is_conv1d(module: nn.Module) -> bool:
    """Of transformers (GPT-2): a linear layer whose weight is transposed."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def _tied(matrix: Matrix, table: str | None) -> Matrix:
    if table is None or table == matrix.name or matrix.reason is not None:
        return matrix
    reason = f"it is one tensor with the embedding {table}"
    return Matrix(matrix.name, matrix.aliases, matrix.weight, matrix.order, reason, by_name=True, value=matrix.value)


def _adapted(matrix: Matrix, reason: str) -> Matrix:
    return replace(matrix, reason=matrix.reason or reason, by_name=matrix.by_name and reason == ADAPTER)


def _words(path: str, local: str) -> Iterator[str]:
    """The words of a parameter's own name; in a list of parameters, which have numbers, those of the list's name."""
    named = local if not local.isdecimal() else path.rpartition(".")[2]
    for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", named):
        yield word.lower()
        yield word.lower().removesuffix("s")


# ---- weights that are computed from others


def _computed_by_hook(module: nn.Module, local: str) -> str | None:
    """The tensor that a hook of `torch.nn.utils` computes from this parameter before each forward pass, if one does."""
    base, _, suffix = local.rpartition("_")
    is_computed = suffix in ("orig", "g", "v") and base not in module._parameters
    return base if is_computed and isinstance(module.__dict__.get(base), Tensor) else None


def _hooked(path: str, module: nn.Module, local: str, weight: nn.Parameter, base: str) -> Matrix:
    name = joined(path, local)
    aliases = (name, joined(path, base), path)
    if local == f"{base}_orig" and f"{base}_mask" in module._buffers and isinstance(module, BY_ROWS):
        reason = _fault(weight)
        return Matrix(name, aliases, weight, _order(module), reason, value=partial(_masked, module, base))
    hooks = {type(hook).__name__ for hook in module._forward_pre_hooks.values() if getattr(hook, "name", None) == base}
    return Matrix(name, aliases, weight, reason=_computed(path, base, sorted(hooks)))


def _parametrized(model: nn.Module, path: str, module: ParametrizationList, local: str, weight: nn.Parameter) -> Matrix:
    owner, _, base = path.rpartition(".")
    owner = owner.rpartition(".")[0]  # past the ModuleDict "parametrizations"
    layer = model.get_submodule(owner)
    name, aliases = joined(path, local), (joined(path, local), joined(owner, base), owner)
    if _zeros_go_through(module) and not is_sharded(weight):
        reason, by_name = _reason(owner, layer, base, weight)
        value = partial(_attribute, layer, base)
        return Matrix(name, aliases, weight, _order(layer), reason, by_name and reason is not None, value)
    return Matrix(name, aliases, weight, reason=_computed(owner, base, [type(part).__name__ for part in module]))


def _computed(path: str, base: str, by: Sequence[str]) -> str:
    how = f" by {', '.join(by).strip('_')}" if by else ""
    return f"{joined(path, base)} is computed from it{how}, so that a zero here is none there: remove that first"


def _zeros_go_through(parametrization: ParametrizationList) -> bool:
    """Whether the weight is its original but for zeros, and more zeros there are zeros here and change nothing else.

    Tried on a copy, with half of the entries set to zero.
    """
    if not parametrization.is_tensor or parametrization.original.numel() == 0:
        return False
    try:
        twin: Any = copy.deepcopy(parametrization).eval()
        with torch.no_grad():
            original, whole = twin.original, twin()
            if whole.shape != original.shape or not bool(((whole == original) | (whole == 0)).all()):
                return False
            generator = torch.Generator().manual_seed(0)
            keep = (torch.rand(original.shape, generator=generator) < 0.5).to(original.device)
            original.mul_(keep)
            return torch.equal(twin(), whole * keep)
    except RuntimeError:  # it cannot be copied, or does not run like this
        return False


def _masked(module: nn.Module, base: str) -> Tensor:
    masked: Tensor = module._parameters[f"{base}_orig"] * module._buffers[f"{base}_mask"]  # type: ignore[operator]
    return masked.detach()


def _attribute(module: nn.Module, name: str) -> Tensor:
    value: Tensor = getattr(module, name)
    return value.detach()
