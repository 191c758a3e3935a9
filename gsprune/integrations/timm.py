"""timm's own files of a pruned network: `save_pretrained`, `from_pretrained`."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gsprune.extras import need
from gsprune.formats.network import RECORD, load_pruned, save_pruned
from gsprune.integrations.pretrained import computes_same, even_lengths, fits, needed
from gsprune.structures.example import Example
from gsprune.structures.running import device_of
from gsprune.surgery.cut_plan import CutPlan

__all__ = ["from_pretrained", "narrow_arguments", "save_pretrained"]


def save_pretrained(
    directory: str | os.PathLike[str],
    model: nn.Module,
    plan: CutPlan | None,
    *,
    example_input: Example,
    model_args: Mapping[str, Any] | None = None,
) -> bool:
    """Write a pruned network of timm, where it can be so that timm alone reads it.

    That is where arguments of the constructor say what is left, such as `mlp_ratio` of a vision transformer all of
    whose blocks keep as many neurons (`scope="local"` prunes so): `timm.create_model("local-dir:<directory>",
    pretrained=True)` loads it then, without gsprune. Elsewhere the arguments are the dense network's, with the files of
    `gsprune.save_pruned` beside them: `from_pretrained` of this module reads both kinds.

    Args:
        directory: where to; made if it is not there.
        model: from `timm.create_model`, as the plan has left it.
        plan: what stays of the dense network (`Pruner.plan`, `Cut.plan`); None if nothing was cut.
        example_input: what the two networks are compared on.
        model_args: arguments that `timm.create_model` was given and that timm has not recorded itself.

    Returns:
        Whether timm's own `create_model` reads it.

    Raises:
        ValueError: the model is none of timm, or timm cannot write its arguments.
        OSError: the files cannot be written.
    """
    hub: Any = need("timm.models")
    network: Any = model
    if not (isinstance(getattr(model, "pretrained_cfg", None), dict) and network.pretrained_cfg.get("architecture")):
        raise ValueError(f"{type(model).__name__} was not made by timm.create_model: use gsprune.save_pruned")
    folder, given = Path(directory), dict(model_args or {})
    folder.mkdir(parents=True, exist_ok=True)
    narrow = {} if plan is None else narrow_arguments(model, plan, given)
    other = None if narrow is None else _with_weights(model, {**given, **narrow})
    if narrow is not None and other is not None and computes_same(model, other, example_input):
        (folder / RECORD).unlink(missing_ok=True)
        hub.save_for_hf(other, folder, model_args={**given, **narrow}, safe_serialization=True)
        return True
    hub.save_for_hf(model, folder, model_args=given, safe_serialization=True)
    save_pruned(folder, model, plan)
    return False


def from_pretrained(directory: str | os.PathLike[str]) -> nn.Module:
    """The network that `save_pretrained` of this module wrote, in eval mode; of a folder alone, nothing is fetched.

    Raises:
        ValueError: there is no config.json of timm, or the files do not fit each other.
    """
    folder = Path(directory)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf8"))
        name = config["architecture"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} has no config.json of timm that can be read: {type(error).__name__}") from error
    timm: Any = need("timm")
    if not timm.is_model(name):
        raise ValueError(f"{folder / 'config.json'} says the network is {name}, which timm does not have")
    if not (folder / RECORD).is_file():
        loaded: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
        return loaded.eval()
    settings = {key: config[key] for key in ("num_classes", "global_pool") if key in config}
    return load_pruned(folder, timm.create_model(name, **{**settings, **config.get("model_args", {})}))


def narrow_arguments(model: nn.Module, plan: CutPlan, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Arguments with which `timm.create_model` makes a network of the shapes that the model has after the cut.

    Whole numbers that are the dense length of what was cut become what is left of it, `mlp_ratio` the ratio that is
    left. Of such changes those are made without which a tensor or a number of heads would not be as in the model.

    Returns:
        None, if there is none.
    """

    def fits_with(changes: dict[str, Any]) -> bool:
        try:
            with torch.device("meta"):
                return fits(model, _make(model, {**given, **changes}))
        except Exception:  # a constructor may refuse numbers that do not divide each other
            return False

    return needed(_changes(model, plan), fits_with)


def _changes(model: nn.Module, plan: CutPlan) -> dict[str, Any]:
    network: Any = model
    even = even_lengths(plan)
    known = inspect.signature(type(model).__init__).parameters
    found: dict[str, Any] = {}
    width = getattr(network, "embed_dim", None)
    for name, parameter in known.items():
        now = getattr(network, "_model_args", {}).get(name, getattr(network, name, parameter.default))
        if type(now) is int and now in even:
            found[name] = even[now]
    if "mlp_ratio" in known and type(width) is int:
        inner = {plan.sizes[name][0]: cuts[0] for name, cuts in plan.kept.items() if ".mlp." in name and 0 in cuts}
        left = {len(kept) for kept in inner.values()}
        if len(left) == 1:
            found["mlp_ratio"] = left.pop() / even.get(width, width)
    return found


def _make(model: nn.Module, arguments: Mapping[str, Any]) -> nn.Module:
    """The network as timm makes it of a folder with these arguments."""
    network: Any = model
    recorded = need("timm.models._input").get_model_args(model, {})
    made: nn.Module = need("timm").create_model(network.pretrained_cfg["architecture"], **{**recorded, **arguments})
    return made


def _with_weights(model: nn.Module, arguments: Mapping[str, Any]) -> nn.Module:
    other = _make(model, arguments).to(device_of(model), next(model.parameters()).dtype)
    other.load_state_dict(model.state_dict())
    return other.eval()
