"""Find mixtures of experts: what holds the experts of a layer, and the router that chooses among them.

One pass shows which matrices' products a choice is made by (`closed_experts.Choices`). The smallest module around such
a matrix that holds as many experts as the matrix has rows, as tensors with a dimension for them or as a list of
modules, is the layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gsprune.structures.attention import no_fast_path
from gsprune.structures.example import Example, call, map_tensors
from gsprune.structures.running import hooked, same_randomness
from gsprune.structures.structure import Member, Structure
from gsprune.structures.twin import every_tensor, twin_of
from gsprune.surgery.closed_experts import Choices, Exact, closed_experts
from gsprune.surgery.cut_plan import CutPlan, plan_cut
from gsprune.surgery.narrow_forward import module_of
from gsprune.surgery.no_branch import inside
from gsprune.surgery.proof import IN_FLOAT32, NOT_FINITE, noise_like
from gsprune.surgery.readings import first_difference, is_finite, readings
from gsprune.surgery.short_list import GONE
from gsprune.surgery.shrink import small_of
from gsprune.text.display import first_line
from gsprune.text.names import joined

_COUNTS = re.compile(r"(?<!shared_)(experts?|exp)$")  # attributes that say how many experts there are
_GROUPS = ("n_group", "num_group", "num_expert_group", "n_groups")
_OPEN_GROUPS = ("topk_group", "n_limited_groups")  # of which a token's experts are


@dataclass(frozen=True, eq=False)
class Experts:
    """The experts of one layer.

    structure  a unit is an expert; its members are the tensors with a dimension for them, the router's included
    layer      name of the module that holds both
    routers    matrices whose products choose
    biases     what is added to their products, or to what is made of these
    lists      lists of modules, one an expert
    least      how many experts have to stay: as many as a token is given to, of each group that may be chosen
    groups     experts are chosen among in so many groups of one size
    is_called  whether the layer is called, and answers with a tensor, alone or first in a tuple
    """

    structure: Structure
    layer: str
    routers: tuple[str, ...]
    biases: tuple[str, ...]
    lists: tuple[str, ...]
    least: int
    groups: int
    is_called: bool = True


def find_experts(model: nn.Module, example_input: Example) -> list[Experts]:
    """The mixtures of experts of `model`, in module order; not proven, which `check_experts` does.

    Raises:
        ValueError: the model does not run on the example, is quantised or on another device.
    """
    twin, args = twin_of(model, example_input, torch.float32)
    watch = Choices(twin)
    called: set[str] = set()

    def note(name: str, output: Any) -> None:
        if isinstance(first_of(output), Tensor):
            called.add(name)

    hooks = (m.register_forward_hook(lambda m, i, o, name=name: note(name, o)) for name, m in twin.named_modules())
    with same_randomness(twin), torch.no_grad(), no_fast_path(), hooked(hooks), watch:
        try:
            call(twin, map_tensors(Tensor.clone, args))
        except Exception as error:
            problem = f"does not run on the example input: {first_line(error)}"
            raise ValueError(f"{type(model).__name__} {problem}") from error
    order = [name for name, _ in twin.named_parameters()]
    found: dict[str, Experts] = {}
    for router in sorted(watch.chosen, key=order.index):
        layer = _layer_of(twin, router, *watch.chosen[router])
        if layer is not None:
            found.setdefault(layer.structure.name, replace(layer, is_called=layer.layer in called))
    return [*found.values()]


def first_of(output: Any) -> Any:
    """What a layer answers with, or the first of several."""
    return output[0] if isinstance(output, tuple) and output else output


def _layer_of(twin: nn.Module, router: str, experts: int, taken: int) -> Experts | None:
    path = router.rpartition(".")[0]
    while path:
        path = path.rpartition(".")[0]
        layer = twin.get_submodule(path)
        lists = [name for name, m in _below(path, layer) if _is_list(m, experts)]
        homes = [name for name, m in _below(path, layer) if _is_home(m, experts)]
        homes = [home for home in homes if not inside(home, lists)]
        if lists or homes:
            return _experts(twin, path, router, experts, taken, homes, lists)
    return None


def _below(path: str, layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The module and all inside it, by their names in the network."""
    return ((joined(path, name) if name else path, module) for name, module in layer.named_modules())


def _is_list(module: nn.Module, experts: int) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict) and len(_first_alike(module)) == experts > 1


def _first_alike(modules: nn.Module) -> list[str]:
    """Names of the modules of a list that have the class of the first; NLLB's dictionary has a dropout behind them."""
    children = [*modules.named_children()]
    return [name for name, child in children if type(child) is type(children[0][1])]


def _is_home(module: nn.Module, experts: int) -> bool:
    """Whether it holds tensors of all experts of its own."""
    return _is_own(module) and any(
        p is not None and p.dim() > 2 and p.shape[0] == experts > 1 for p in module._parameters.values()
    )


def _is_own(module: nn.Module) -> bool:
    return not type(module).__module__.startswith("torch.nn.modules")


def _experts(
    twin: nn.Module, path: str, router: str, experts: int, taken: int, homes: Sequence[str], lists: Sequence[str]
) -> Experts:
    layer, home = twin.get_submodule(path), router.rpartition(".")[0]
    members, biases, routers = [], [], []
    for place, module in _below(path, layer):
        if inside(place, lists):
            continue
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            name = joined(place, leaf)
            if tensor is None or experts not in tensor.shape:
                continue
            is_choice = name == router or (place == home and tensor.shape == twin.get_parameter(router).shape)
            is_alone = tensor.numel() == experts and (place in (home, path) or _is_own(module))  # one number an expert
            if not (is_choice or is_alone or (place in homes and tensor.shape[0] == experts)):
                continue
            dim = tensor.shape.index(experts)
            members.append(Member(name, dim, torch.arange(experts).reshape(-1, 1), experts))
            if is_choice:
                routers.append(name)
            elif is_alone and "bias" in leaf and tensor.is_floating_point():
                biases.append(name)
    attributes = {
        joined(path, name): 1 for name in _counts(layer, experts, [n.removeprefix(f"{path}.") for n in lists])
    }
    name = (*lists, *homes)[0]
    structure = Structure(name, "experts", experts, tuple(members), (), (), (), attributes)
    groups, opened = (_most(layer, names) for names in (_GROUPS, _OPEN_GROUPS))
    groups = groups if experts % groups == 0 else 1
    least = max(taken, 1) if groups == 1 else groups * max(2, -(-taken // opened))  # two of each are weighed
    return Experts(structure, path, tuple(routers), tuple(biases), tuple(lists), least, groups)


def _most(layer: nn.Module, names: Sequence[str]) -> int:
    """The largest of the numbers that modules call so; 1 without any."""
    found = (vars(module).get(name) for module in layer.modules() for name in names)
    return max((value for value in found if type(value) is int), default=1)


def _counts(layer: nn.Module, experts: int, lists: Sequence[str]) -> Iterator[str]:
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            inner = any(path.startswith(f"{held}.") for held in lists)
            if type(value) is int and value == experts and _COUNTS.search(name.lower()) and not inner:
                yield joined(path, name)


def plan_experts(
    model: nn.Module, layers: Sequence[Experts], keeps: Mapping[str, Tensor], *, are_all: bool = True
) -> CutPlan:
    """The plan that leaves these experts of each layer.

    Where all layers keep as many, the numbers of the network and of its configuration go along.

    Args:
        are_all: whether the network has no other mixtures.
    """
    plan = plan_cut([e.structure for e in layers], [keeps[e.structure.name] for e in layers])
    removed = dict(plan.removed)
    for layer in layers:
        keep = keeps[layer.structure.name]
        for path in layer.lists:
            names = _first_alike(model.get_submodule(path))
            removed |= {joined(path, names[i]): GONE for i in (~keep).nonzero().flatten().tolist()}
    attributes = dict(plan.attributes)
    sizes = {(layer.structure.units, int(keeps[layer.structure.name].sum())) for layer in layers}
    if len(sizes) == 1 and are_all:
        ((before, after),) = sizes
        config = getattr(model, "config", None)
        holders = {"": model, "config": config, "config.text_config": getattr(config, "text_config", None)}
        for path, holder in holders.items():
            for name, value in vars(holder).items() if holder is not None else ():
                if type(value) is int and value == before and _COUNTS.search(name.lower()):
                    attributes[joined(path, name)] = after
    return CutPlan(plan.kept, plan.sizes, attributes, removed).without_removed()


def check_experts(
    model: nn.Module, layers: Sequence[Experts], keeps: Mapping[str, Tensor], example_input: Example
) -> tuple[str | None, str]:
    """What is wrong with the network that loses experts, None if nothing is; and what that shows where it is less.

    The network in which no token is given to the experts that go (their logits are minus infinity) is compared with the
    cut one, layer by layer, in float64, on the example and on noise. In float32 where it does not run in that, or its
    output is not finite then.
    """
    try:
        problem = _difference(*twin_of(model, example_input), layers, keeps)
        failed = problem if problem == NOT_FINITE else None
    except Exception as error:
        problem, failed = None, first_line(error)
    if failed is None:
        return problem, ""
    return _difference(*twin_of(model, example_input, torch.float32), layers, keeps), IN_FLOAT32.format(failed)


def _difference(twin: nn.Module, args: Example, layers: Sequence[Experts], keeps: Mapping[str, Tensor]) -> str | None:
    plan = plan_experts(twin, layers, keeps)
    small, tensors = small_of(twin, plan), every_tensor(twin)
    routers = {module_of(name) for layer in layers for name in layer.routers}  # which give as many numbers as experts
    rows = {name: cuts for name, cuts in plan.kept.items() if module_of(name) not in routers}
    with torch.no_grad(), Exact():
        for number, example in enumerate((args, noise_like(args))):
            try:
                with closed(tensors, layers, {name: ~keep for name, keep in keeps.items()}):
                    masked = readings(twin, example, rows)
            except Exception:
                if number == 0:
                    raise
                return None
            if not is_finite(masked):
                return NOT_FINITE if number == 0 else None
            try:
                cut = readings(small, example, scaled=False)
            except Exception as error:
                return f"the smaller network does not run ({first_line(error)})"
            gone = {*plan.removed, *routers}
            both = [[r for r in found if not inside(r.name, gone)] for found in (masked, cut)]
            if first_difference(*both) is not None:
                return "without them it does not compute what it does where no token is given to them"
    return None


def closed(
    tensors: Mapping[str, Tensor], layers: Sequence[Experts], gone: Mapping[str, Tensor]
) -> AbstractContextManager[None]:
    """`closed_experts` of some experts of each layer, bool (experts,), in the network with these tensors."""
    routers = {tensors[name]: gone[e.structure.name] for e in layers for name in e.routers}
    biases = {tensors[name]: gone[e.structure.name] for e in layers for name in e.biases}
    return closed_experts(routers, biases)
