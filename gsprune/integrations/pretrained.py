"""transformers' own files of a pruned network: `save_pretrained`, `from_pretrained`."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from gsprune.extras import need
from gsprune.formats.network import RECORD, load_pruned, save_pruned
from gsprune.structures.attention import GROUP_NAMES, HEAD_NAMES, SIZE_NAMES
from gsprune.structures.example import Example, call, tensors_in
from gsprune.structures.running import device_of, evaluating, same_randomness
from gsprune.surgery.cut_plan import CutPlan
from gsprune.surgery.expert_kernel import odd_expert_side

__all__ = ["from_pretrained", "narrow_config", "save_pretrained"]

_Number = int | Mapping[int, int]  # of all layers, or layer -> number
_Change = TypeVar("_Change")
_COUNTS = (*HEAD_NAMES, *GROUP_NAMES, *SIZE_NAMES)


def save_pretrained(
    directory: str | os.PathLike[str],
    model: nn.Module,
    plan: CutPlan | None,
    *,
    example_input: Example | None = None,
    plain: bool = False,
) -> bool:
    """Write a pruned network of transformers, where it can be so that its own `from_pretrained` reads it.

    That is possible where `config.json` can say what is left: each layer has as many heads and neurons as the others
    (a share of each does so, or a budget with `"uniform": True`), and the configuration has a number for them, which
    transformers takes. Layers that differ are said by `per_layer_config` (transformers 5.15 and newer), where the
    network builds its layers from it. The files are then plain ones, and gsprune is not needed to load them. Elsewhere
    `config.json` is the dense network's, with the files of `gsprune.save_pruned` beside it: `from_pretrained` of this
    module reads both kinds.

    Args:
        directory: where to; made if it is not there.
        model: a `PreTrainedModel`, as the plan has left it.
        plan: what stays of the dense network (`Pruner.plan`, `Cut.plan`); None if nothing was cut.
        example_input: what the two networks are compared on; None: the model's `dummy_inputs`.
        plain: write files that transformers' own `from_pretrained` reads, or none.

    Returns:
        Whether transformers' own `from_pretrained` reads it.

    Raises:
        ValueError: the model is none of transformers; `plain`, and `config.json` cannot say what is left; `cut_rows` or
            `cut_experts` has changed its configuration, which cannot say what else was cut.
        OSError: the files cannot be written.
    """
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise ValueError(f"{type(model).__name__} is no network of transformers: use gsprune.save_pruned")
    folder = Path(directory)
    network: Any = model
    config = network.config if plan is None else narrow_config(model, plan)
    same = None if config is None else _plain(model, config, example_input)
    if same is None and plain and config is not None and (odd := odd_expert_side(model)) is not None:
        raise ValueError(
            f"{type(model).__name__} has experts with a side of {odd}, which the kernel that transformers loads does "
            "not take: cut with a budget and round_to=8"
        )
    if same is None and plain:
        raise ValueError(f"config.json of {type(model).__name__} cannot say what is left: {_unsaid(plan)}")
    folder.mkdir(parents=True, exist_ok=True)
    if same is not None:
        (folder / RECORD).unlink(missing_ok=True)
        same.save_pretrained(folder)
        return True
    if plan is not None and any(name.startswith("config.") for name in plan.attributes):
        raise ValueError(
            "the cut has changed numbers of the configuration (cut_rows, cut_experts), and what else was cut it has no "
            "numbers for: use gsprune.save_pruned"
        )
    dense = copy.deepcopy(network.config)
    dense.architectures = [type(model).__name__]
    dense.save_pretrained(folder)
    save_pruned(folder, model, plan)
    return False


def from_pretrained(directory: str | os.PathLike[str]) -> nn.Module:
    """The network that `save_pretrained` of this module wrote, in eval mode; of a folder alone, nothing is fetched.

    Raises:
        ValueError: there is no config.json, its class is none of transformers, or the files do not fit each other.
    """
    folder = Path(directory)
    network = network_class(folder)
    if not (folder / RECORD).is_file():
        loaded: nn.Module = network.from_pretrained(folder, local_files_only=True)
        return loaded
    config = network.config_class.from_pretrained(folder, local_files_only=True)
    dense: Any = network(config)
    dtype = getattr(config, "dtype", None)
    return load_pruned(folder, dense.to(dtype) if isinstance(dtype, torch.dtype) else dense)


def network_class(folder: Path) -> Any:
    """The class of transformers that a folder's config.json names."""
    try:
        architectures = json.loads((folder / "config.json").read_text(encoding="utf8")).get("architectures")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder} has no config.json that can be read: {type(error).__name__}") from error
    transformers = need("transformers")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    network: Any = getattr(transformers, str(name), None)
    is_known = isinstance(network, type) and issubclass(network, transformers.PreTrainedModel)
    if not is_known:
        raise ValueError(f"{folder / 'config.json'} says the network is {name}, which transformers does not have")
    return network


def narrow_config(model: nn.Module, plan: CutPlan) -> Any:
    """The configuration that a network of transformers would be built from to have the shapes it has after the cut.

    Numbers of the configuration that are the dense length of something that was cut become what is left of it, where
    that is the same everywhere, else what is left of it in each layer (`per_layer_config`); numbers of heads likewise.
    Of such changes those are made without which a tensor, a number of heads or a class of module would not be as in the
    model. Of a network of several parts it is the part `text_config` that changes.

    Returns:
        None, if there is none.
    """
    network: Any = model
    for changes in _changes(_text(network.config), plan):
        found = needed(changes, lambda chosen: _has_shapes(model, _changed(network.config, chosen)))
        if found is not None:
            return _with_eps(model, _changed(network.config, found))
    return None


def needed(
    changes: Mapping[str, _Change], fits_with: Callable[[dict[str, _Change]], bool]
) -> dict[str, _Change] | None:
    """Of the changes with which a network fits the largest set, without those that it fits without: a number that only
    happens to be equal, such as a sliding window of the dense width, stays. None, if there is none."""
    for size in range(len(changes), -1, -1):
        for some in combinations(changes, size):
            if fits_with({name: changes[name] for name in some}):
                found = {name: changes[name] for name in some}
                for name in some:
                    fewer = {other: value for other, value in found.items() if other != name}
                    found = fewer if fits_with(fewer) else found
                return found
    return None


def _text(config: Any) -> Any:
    """The part of a configuration that layers of text are built from."""
    part = getattr(config, "text_config", None)
    return config if part is None else part


def _changed(config: Any, changes: Mapping[str, _Number]) -> Any:
    """A configuration with other numbers; None where transformers refuses them."""
    changed = copy.deepcopy(config)
    text = _text(changed)
    layers = {int(layer): numbers for layer, numbers in text.to_dict().get("per_layer_config", {}).items()}
    try:
        for name, value in changes.items():
            each = {} if isinstance(value, int) else value
            setattr(text, name, value if isinstance(value, int) else max(value.values()))
            for layer, number in each.items():
                layers.setdefault(layer, {})[name] = number
        if layers:
            text.per_layer_config = layers
    except Exception:  # such as numbers that do not divide each other
        return None
    return changed


def _with_eps(model: nn.Module, config: Any) -> Any:
    """The configuration with the eps of RMSNorms over fewer positions; None where it has none for all of them."""
    norms: list[Any] = [module for module in model.modules() if hasattr(module, "dense_norm")]
    if not norms:
        return config
    names = {name for norm in norms for name in ("eps", "variance_epsilon") if hasattr(norm, name)}
    others = [m for m in model.modules() if isinstance(m, type(norms[0])) and m not in norms]
    before, now = {norm.dense_norm[1] for norm in norms}, {getattr(norm, n) for norm in norms for n in names}
    settings = [n for n, value in _text(config).to_dict().items() if isinstance(value, float) and {value} == before]
    if others or len(now) != 1 or not settings:
        return None
    for name in settings:
        setattr(_text(config), name, next(iter(now)))
    return config


def _unsaid(plan: CutPlan | None) -> str:
    """What was cut, as far as a configuration has trouble with it."""
    if plan is None:
        return "a network of its numbers computes something else"
    cuts = [(plan.sizes[name][dim], len(kept), name) for name in plan.kept for dim, kept in plan.kept[name].items()]
    for size, left, name in cuts:
        other = next((other for other in cuts if other[0] == size and other[1] != left), None)
        if other is not None:
            return f"{name} keeps {left} of {size} and {other[2]} {other[1]}, and it has one number for both"
    what = f"{cuts[0][2]}, which keeps {cuts[0][1]} of {cuts[0][0]}" if cuts else next(iter(plan.removed))
    return f"it has no number for {what}, or for another that was cut"


def even_lengths(plan: CutPlan, layer: int | None = None) -> dict[int, int]:
    """Dense length -> what is left of it, where that is the same everywhere, or everywhere in one layer."""
    left: dict[int, set[int]] = {}
    for name, cuts in plan.kept.items():
        for dim, kept in cuts.items():
            if layer is None or _layer_of(name) == layer:
                left.setdefault(plan.sizes[name][dim], set()).add(len(kept))
    return {length: next(iter(some)) for length, some in left.items() if len(some) == 1}


def _layer_of(name: str) -> int | None:
    """
    >>> _layer_of("model.layers.3.mlp.experts.0.up_proj.weight")
    3
    """
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _changes(config: Any, plan: CutPlan) -> Iterator[dict[str, _Number]]:
    """Numbers of a configuration -> what they may have become: first the same in all layers, then in each its own."""
    own = getattr(config, "per_layer_attributes", None) or set()
    plain = copy.deepcopy(config)
    if own:
        plain.per_layer_config = None  # numbers in which the layers differ cannot be read otherwise
    even = {name: n for name, n in _numbers(plain, even_lengths(plan)).items() if name not in own}
    yield {**even}
    layers = list(getattr(config, "per_layer_config", []))  # transformers before 5.15 has none
    left = [_numbers(layer, even_lengths(plan, k)) for k, layer in enumerate(layers)]
    names = dict.fromkeys(name for numbers in left for name in numbers)
    if names:
        each = {name: {k: left[k].get(name, getattr(layer, name)) for k, layer in enumerate(layers)} for name in names}
        yield {**even, **each}


def _numbers(config: Any, even: Mapping[int, int]) -> dict[str, int]:
    """Numbers of a configuration -> what they may have become, from dense lengths and what is left of them."""
    found = {name: even[value] for name, value in config.to_dict().items() if type(value) is int and value in even}
    heads = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    head_dim: Any = getattr(config, "head_dim", None) or (hidden // heads if heads and hidden else None)
    for name in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(config, name, None)
        width = even.get(count * head_dim, 0) if head_dim and count else 0
        if width and width % head_dim == 0:
            found[name] = width // head_dim
    if "num_attention_heads" in found and hasattr(config, "head_dim"):
        found["head_dim"] = head_dim  # else it would be worked out anew from fewer heads
    return found


def _has_shapes(model: nn.Module, config: Any) -> bool:
    """Whether a network of this configuration has the model's tensors, head counts and kinds of modules."""
    if config is None:
        return False
    try:
        if hasattr(config, "validate"):  # as on saving and loading: some ask for a whole number of heads in hidden_size
            config.validate()
        written = type(config).from_dict(json.loads(config.to_json_string()))  # what config.json will say
        with torch.device("meta"):
            other = type(model)(written)
    except Exception:  # a configuration may refuse numbers that do not divide each other
        return False
    return fits(model, other)


def fits(model: nn.Module, other: nn.Module) -> bool:
    """Whether two networks have the same tensors, head counts and kinds of modules."""
    here, there = model.state_dict(), other.state_dict()
    if here.keys() != there.keys() or any(here[name].shape != there[name].shape for name in here):
        return False
    return list(_kinds(model)) == list(_kinds(other))


def _kinds(model: nn.Module) -> Iterator[tuple[str, type, Mapping[str, int]]]:
    for name, module in model.named_modules():
        yield name, type(module), {key: n for key in _COUNTS if type(n := getattr(module, key, None)) is int}


def _plain(model: nn.Module, config: Any, example_input: Example | None) -> Any:
    """A network of that configuration with the model's weights; None if it does not compute the same."""
    network: Any = model
    other: Any = type(model)(config).to(device_of(model), next(model.parameters()).dtype)
    other.load_state_dict(model.state_dict())
    if odd_expert_side(other) is not None:  # transformers would read it, and its kernel would stop
        return None
    same = computes_same(model, other, network.dummy_inputs if example_input is None else example_input)
    if getattr(model, "generation_config", None) is not None:
        other.generation_config = copy.deepcopy(network.generation_config)
    return other.eval() if same else None


def computes_same(model: nn.Module, other: nn.Module, example_input: Example) -> bool:
    """Whether two networks in evaluation mode give the same outputs, to 1e-4."""
    with torch.no_grad(), evaluating([model, other]), same_randomness(model):
        found, wanted = (tensors_in(call(one, example_input)) for one in (other, model))
        return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, wanted, strict=True))
