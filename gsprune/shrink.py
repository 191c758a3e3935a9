"""Turn kept units into a smaller dense network: modules, their attributes and the optimizer's state.

Two steps: `plan_shrink` says which positions of which tensors stay, `apply_plan` cuts them out in place.
`shrink` does both, after comparing the masked and the shrunk network in float64 on copies. A `Shrinker` does it again
and again while the model trains, and counts from the dense network.
May import: torch, gsprune.attention, gsprune.structures, gsprune.optimizers, gsprune.copies.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gsprune.attention import close_nested_path, narrow, why_not_narrow
from gsprune.copies import check_copies
from gsprune.examples import Example, copy_of, outputs
from gsprune.files import refusing
from gsprune.optimizers import Optimizers, check_state, every_optimizer, held, move_state, names_of
from gsprune.proof import Masked, Problem, Reading, first_difference, inputs_like, is_finite, owners, readings, sift
from gsprune.structures import Member, Structure, counted, float64_copy, html_table, refuse_wrapped, wake

Cuts = Mapping[int, Tensor]  # dimension -> kept positions


@dataclass(frozen=True, eq=False)
class Plan:
    """What stays of a dense network.

    kept        tensor name -> dimension -> kept positions (int64, CPU, ascending); only what is really cut
    sizes       tensor name -> dimension -> dense length, so that a plan cannot be applied twice
    attributes  module attribute -> new value ("blocks.0.attn.num_heads" -> 3)

    >>> plan = Plan({"0.weight": {0: torch.tensor([0, 2])}}, {"0.weight": {0: 3}}, {})
    >>> plan.to_json()["tensors"]
    {'0.weight': {'0': {'size': 3, 'kept': [0, 2]}}}
    >>> Plan.from_json(plan.to_json()).kept["0.weight"][0]
    tensor([0, 2])
    """

    kept: Mapping[str, Mapping[int, Tensor]]
    sizes: Mapping[str, Mapping[int, int]]
    attributes: Mapping[str, int]

    def __repr__(self) -> str:
        lines = [f"  {name} {self._change(name)}" for name in self.kept][:8]
        more = [f"  ... {len(self.kept) - len(lines)} more"] if len(self.kept) > len(lines) else []
        return "\n".join(
            [f"Plan that cuts {len(self.kept)} tensors, sets {len(self.attributes)} attributes", *lines, *more]
        )

    def _repr_html_(self) -> str:
        rows = [(name, self._change(name)) for name in self.kept]
        rows += [(name, f"= {value}") for name, value in self.attributes.items()]
        return html_table(("tensor or attribute", "what stays"), rows)

    def _change(self, name: str) -> str:
        cuts = self.kept[name].items()
        return ", ".join(
            f"dim {d}: {len(kept)} of {self.sizes[name][d]}" for d, kept in sorted(cuts, key=lambda c: c[0])
        )

    def after(self, first: Plan) -> Plan:
        """This plan, made of a network that `first` had left, counted from that one's dense network.

        Raises:
            ValueError: the two do not follow each other.

        >>> first = Plan({"w": {0: torch.tensor([0, 2, 3])}}, {"w": {0: 5}}, {"heads": 3})
        >>> both = Plan({"w": {0: torch.tensor([1, 2])}}, {"w": {0: 3}}, {"heads": 2}).after(first)
        >>> both.kept["w"][0].tolist(), both.sizes["w"][0], both.attributes
        ([2, 3], 5, {'heads': 2})
        """
        kept = {name: dict(cuts) for name, cuts in first.kept.items()}
        sizes = {name: dict(lengths) for name, lengths in first.sizes.items()}
        for name, cuts in self.kept.items():
            for dim, positions in cuts.items():
                before = kept.setdefault(name, {}).get(dim)
                if before is not None and len(before) != self.sizes[name][dim]:
                    raise ValueError(
                        f"the first plan leaves {len(before)} in dimension {dim} of {name!r}, not "
                        f"{self.sizes[name][dim]}: the second plan is of another network"
                    )
                kept[name][dim] = positions if before is None else before[positions]
                sizes.setdefault(name, {}).setdefault(dim, self.sizes[name][dim])
        return Plan(kept, sizes, {**first.attributes, **self.attributes})

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and ints."""
        tensors = {
            name: {str(d): {"size": self.sizes[name][d], "kept": kept.tolist()} for d, kept in cuts.items()}
            for name, cuts in self.kept.items()
        }
        return {"tensors": tensors, "attributes": dict(self.attributes)}

    @classmethod
    @refusing()
    def from_json(cls, data: Any) -> Plan:
        """The inverse of `to_json`; ValueError in one sentence for anything else."""
        _expect(isinstance(data, dict) and set(data) == {"tensors", "attributes"}, "it has no plan's two keys")
        _expect(isinstance(data["tensors"], dict), "'tensors' is not a mapping")
        _expect(isinstance(data["attributes"], dict), "'attributes' is not a mapping")
        for name, value in data["attributes"].items():
            _expect(type(value) is int and 0 < value < 2**63, f"{name} = {value!r} is not a positive integer")
        cuts = {name: _read_cuts(name, entry) for name, entry in data["tensors"].items()}
        kept = {name: {d: kept for d, (_, kept) in entry.items()} for name, entry in cuts.items()}
        sizes = {name: {d: size for d, (size, _) in entry.items()} for name, entry in cuts.items()}
        return cls(kept, sizes, dict(data["attributes"]))


def _expect(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(f"not a pruning plan: {problem}")


def _read_cuts(name: str, entry: Any) -> dict[int, tuple[int, Tensor]]:
    _expect(isinstance(entry, dict) and set(entry) <= {"0", "1"}, f"{name} has dimensions other than 0 and 1")
    return {int(d): _read_cut(f"{name} dimension {d}", cut) for d, cut in entry.items()}


def _read_cut(where: str, cut: Any) -> tuple[int, Tensor]:
    _expect(isinstance(cut, dict) and set(cut) == {"size", "kept"}, f"{where} has no size and kept")
    size, kept = cut["size"], cut["kept"]
    _expect(type(size) is int and 0 < size < 2**63, f"the size of {where} is not a positive integer")
    whole = isinstance(kept, list) and len(kept) > 0 and all(type(k) is int for k in kept)
    _expect(whole, f"{where} keeps {'nothing' if kept == [] else 'something that is not a list of integers'}")
    _expect(min(kept) >= 0 and max(kept) < size, f"{where} keeps positions outside 0..{size - 1}")
    ascending = all(a < b for a, b in pairwise(kept))
    _expect(ascending, f"the kept positions of {where} are not ascending and unique")
    return size, torch.tensor(kept)


def plan_shrink(structures: Sequence[Structure], keeps: Sequence[Tensor]) -> Plan:
    """The plan that removes every unit u of `structures[i]` with `keeps[i][u]` False.

    A dimension that several structures cut (a concatenation) keeps what all of them keep.
    Raises ValueError when a keep is not a bool vector of its structure's units, or keeps nothing.
    """
    alive: dict[tuple[str, int], Tensor] = {}
    attributes: dict[str, int] = {}
    for structure, keep in zip(structures, _checked(structures, keeps), strict=True):
        members = (*structure.producers, *structure.consumers, *structure.norms)
        for m in members if not keep.all() else ():
            mask = alive.setdefault((m.tensor, m.dim), torch.ones(m.size, dtype=torch.bool))
            mask[m.index[~keep].flatten()] = False
        if not keep.all():
            attributes |= {name: amount * int(keep.sum()) for name, amount in structure.attributes.items()}
    kept: dict[str, dict[int, Tensor]] = {}
    sizes: dict[str, dict[int, int]] = {}
    for (name, dim), mask in alive.items():
        kept.setdefault(name, {})[dim] = mask.nonzero().flatten()
        sizes.setdefault(name, {})[dim] = len(mask)
    return Plan(kept, sizes, attributes)


def _checked(structures: Sequence[Structure], keeps: Sequence[Tensor]) -> list[Tensor]:
    if len(structures) != len(keeps):
        raise ValueError(f"{len(keeps)} keep vectors were given for {len(structures)} structures")
    for structure, keep in zip(structures, keeps, strict=True):
        if keep.dtype != torch.bool or keep.shape != (structure.units,):
            given = f"{keep.dtype} {tuple(keep.shape)}"
            raise ValueError(f"the keep of {structure.name!r} must be bool ({structure.units},), not {given}")
        if not keep.any():
            raise ValueError(f"the keep of {structure.name!r} removes all {structure.units} units")
    return [keep.detach().cpu() for keep in keeps]


def apply_plan(model: nn.Module, plan: Plan, *, optimizer: Optimizers | None = None, drop_state: bool = False) -> None:
    """Cut `model` in place: new Parameters in the same modules, attributes and optimizer state to match.

    Dtype, device, memory format, `requires_grad` and `.grad` (cut along) are kept. In the optimizer (or several, and
    all inside them) the new parameters take the old ones' places, and state that runs along its parameter is cut alike:
    moments, and the rows and columns of a factored one.
    Everything is checked before anything changes. Raises ValueError when the plan does not fit the model, or the
    optimizer's state holds a tensor that is none of these; with `drop_state` that optimizer forgets it, with a warning.
    """
    refuse_wrapped(model)
    homes = {name: _home(model, name) for name in plan.kept}
    for name, cuts in plan.kept.items():
        _check_tensor(name, getattr(*homes[name]), plan.sizes[name], cuts)
    for name in plan.attributes:
        _check_attribute(model, name)
    _check_shared(model, homes)
    modules = {id(module): module for module, _ in homes.values()}.values()
    resizes = [(module, _resizer(module)) for module in modules]
    replaced: dict[Tensor, tuple[nn.Parameter, Cuts]] = {}
    fresh = {name: _cut(getattr(*homes[name]).detach(), cuts) for name, cuts in plan.kept.items()}
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
        setattr(*_home(model, name), value)
    close_nested_path(model)
    move_state(optimizers, replaced, drop=drop_state)


def shrink(
    model: nn.Module,
    structures: Sequence[Structure],
    keeps: Sequence[Tensor],
    *,
    example_input: Example,
    optimizer: Optimizers | None = None,
    drop_state: bool = False,
) -> Plan:
    """Remove the units that are not kept, in place, after proving on copies that nothing else changes.

    `keeps[i]` is bool (units,), True = kept. Raises ValueError when the masked and the shrunk network differ
    by more than 1e-9 of the largest output in float64; the model and the optimizer are then untouched.

    >>> from gsprune.structures import find_structures
    >>> net, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.ones(1, 4)
    >>> keep = torch.tensor([True, False, True])
    >>> plan = shrink(net, find_structures(net, x).structures, [keep], example_input=x)
    >>> net[0], net[2]
    (Linear(in_features=4, out_features=2, bias=True), Linear(in_features=2, out_features=2, bias=True))
    """
    check_shrink(model, structures, keeps, example_input=example_input)
    plan = plan_shrink(structures, keeps)
    apply_plan(model, plan, optimizer=optimizer, drop_state=drop_state)
    return plan


class Shrinker:
    """Cuts units out of a model, all at once or a few more each time.

    Attributes:
        structures: those of the dense network, by which keeps are counted.
        here: the same structures as they lie in the model now.
        plan: what stays of the dense network; None before the first cut.

    Args:
        copies: networks of the same architecture that are cut along, as the average of an EMA.

    Raises:
        ValueError: a copy has other tensors than the model.

    >>> from gsprune.structures import find_structures
    >>> net, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.ones(1, 4)
    >>> shrinker = Shrinker(net, find_structures(net, x).structures, example_input=x)
    >>> shrinker.cut([torch.tensor([True, False, True])])
    >>> shrinker.cut([torch.tensor([False, False, True])])
    >>> net[0], shrinker.plan.kept["0.weight"], shrinker.here[0].units
    (Linear(in_features=4, out_features=1, bias=True), {0: tensor([2])}, 1)
    """

    def __init__(
        self,
        model: nn.Module,
        structures: Sequence[Structure],
        *,
        example_input: Example,
        copies: Sequence[nn.Module] = (),
    ) -> None:
        check_copies(model, copies)
        self.model, self.structures, self.copies, self.example_input = model, structures, copies, example_input
        self.here: Sequence[Structure] = structures
        self.plan: Plan | None = None
        self._kept = [torch.ones(structure.units, dtype=torch.bool) for structure in structures]

    def cut(self, keeps: Sequence[Tensor], *, optimizer: Optimizers | None = None, drop_state: bool = False) -> None:
        """Cut the model, its copies and the optimizer's state down to `keeps[i]`, bool (units,) of the dense network.

        What is cut stays cut. `drop_state` as of `apply_plan`. ValueError as of `shrink`; all is then as it was.
        """
        kept = [keep & before for keep, before in zip(_checked(self.structures, keeps), self._kept, strict=True)]
        news = [keep[before] for keep, before in zip(kept, self._kept, strict=True)]
        plan = plan_shrink(self.structures, kept)
        if not all(new.all() for new in news):
            options: dict[str, Any] = {"optimizer": optimizer, "drop_state": drop_state}
            step = shrink(self.model, self.here, news, example_input=self.example_input, **options)
            for copy in self.copies:
                apply_plan(copy, step)
            _forget_compiled()
        self.here = [_narrowed(s, keep, plan) for s, keep in zip(self.structures, kept, strict=True)]
        self._kept, self.plan = kept, plan


def _narrowed(structure: Structure, keep: Tensor, plan: Plan) -> Structure:
    """A dense network's structure as it lies in the network that the plan leaves."""

    def here(member: Member) -> Member:
        kept = plan.kept.get(member.tensor, {}).get(member.dim)
        if kept is None:
            return member
        index = torch.searchsorted(kept, member.index[keep])
        assert torch.equal(kept[index], member.index[keep])
        return Member(member.tensor, member.dim, index, len(kept))

    sides = (structure.producers, structure.consumers, structure.norms, structure.gates)
    producers, consumers, norms, gates = (tuple(map(here, side)) for side in sides)
    units = int(keep.sum())
    return replace(structure, units=units, producers=producers, consumers=consumers, norms=norms, gates=gates)


def check_shrink(
    model: nn.Module, structures: Sequence[Structure], keeps: Sequence[Tensor], *, example_input: Example
) -> None:
    """Compare masked and shrunk float64 copies; ValueError names the structures that do not agree."""
    problem = _difference(model, structures, keeps, example_input)
    if problem is None:
        return
    pairs = list(zip(structures, keeps, strict=True))
    alone = [s.name for s, keep in pairs if _difference(model, [s], [keep], example_input)]
    names = ", ".join(repr(name) for name in alone or [s.name for s in structures])
    raise ValueError(f"{problem}; the model was left as it was, exclude {names}")


def _difference(
    model: nn.Module, structures: Sequence[Structure], keeps: Sequence[Tensor], example_input: Example
) -> str | None:
    twin, args = float64_copy(model, example_input)
    calls: Counter[nn.Module] = Counter()
    with counted(twin, calls):
        outputs(twin, args)
    wake(twin, args, calls)
    return _disagreement(twin, inputs_like(twin, args), structures, keeps)


def sift_cuts(masked: Masked, structures: Sequence[Structure]) -> tuple[list[Structure], dict[str, str]]:
    """The structures that can be cut, each to another random number of units, and why the others cannot."""

    def test(some: Sequence[Structure]) -> Problem | None:
        for number, (args, _) in enumerate(masked.rounds):
            keeps = [masked.rounds[number].keep(s) for s in some]
            small = _small(masked.twin, plan_shrink(some, keeps))
            problem = _mismatch(small, args, partial(masked.read, number, some), some, number)
            if problem is not None:
                return problem
        return None

    return sift(structures, test)


def _disagreement(
    twin: nn.Module, inputs: Sequence[Example], structures: Sequence[Structure], keeps: Sequence[Tensor]
) -> str | None:
    """What is wrong with the shrunk network, or None. The twin is masked; a copy of it that shares tensors is cut."""
    plan = plan_shrink(structures, keeps)
    mask_units(twin, structures, keeps)
    small = _small(twin, plan)
    rows = {name: cuts[0] for name, cuts in plan.kept.items() if 0 in cuts}
    for number, args in enumerate(inputs):
        problem = _mismatch(small, args, partial(readings, twin, args, rows), structures, number)
        if problem is not None:
            return problem.text
    return None


def _small(twin: nn.Module, plan: Plan) -> nn.Module:
    small = copy_of(twin, sharing=True)
    apply_plan(small, plan)
    return small


def _mismatch(
    small: nn.Module,
    args: Example,
    read_masked: Callable[[], Sequence[Reading]],
    structures: Sequence[Structure],
    number: int,
) -> Problem | None:
    """What is wrong with a shrunk network on one input."""
    started: list[str] = []
    try:
        with _order(small, started):
            shrunk = readings(small, args, scaled=False)
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Problem(f"the shrunk network does not run ({line})", _last_touched(structures, started))
    masked = read_masked()
    if not is_finite(masked):
        text = "the model's output on the example input is not finite (did training diverge?)"
        return Problem(text) if number == 0 else None
    differing = first_difference(masked, shrunk)
    if differing is None:
        return None
    before = started[: started.index(differing) + 1] if differing in started else started
    return Problem("the shrunk network does not compute what the masked one does", _last_touched(structures, before))


@contextmanager
def _order(model: nn.Module, started: list[str]) -> Iterator[None]:
    """Inside the block, `started` takes the names of modules as they are called."""
    with ExitStack() as stack:
        for name, module in model.named_modules():
            hook = module.register_forward_pre_hook(lambda m, i, name=name: started.append(name))
            stack.callback(hook.remove)
        yield


def _last_touched(structures: Sequence[Structure], started: Sequence[str]) -> list[Structure]:
    """The structures that hold a tensor of the last of these modules that any of them does."""
    held_by = [(s, owners(s)) for s in structures]
    for name in reversed(started):
        touching = [s for s, names in held_by if name in names]
        if touching:
            return touching
    return []


@torch.no_grad()
def mask_units(model: nn.Module, structures: Sequence[Structure], keeps: Sequence[Tensor]) -> None:
    """Zero, in place, the consumers' columns of the units that are not kept."""
    for structure, keep in zip(structures, _checked(structures, keeps), strict=True):
        for m in structure.consumers:
            tensor = getattr(*_home(model, m.tensor))
            tensor.index_fill_(m.dim, m.index[~keep].flatten().to(tensor.device), 0.0)


# ---- checks


def _home(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
        getattr(module, leaf)
    except AttributeError:
        raise ValueError(f"the pruning plan names {name!r}, which {type(model).__name__} does not have") from None
    return module, leaf


def _check_tensor(name: str, tensor: Any, sizes: Mapping[int, int], cuts: Cuts) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"the pruning plan cuts {name!r}, which is not a tensor")
    for dim in cuts:
        if tensor.dim() <= dim or tensor.shape[dim] != sizes[dim]:
            expected = f"length {sizes[dim]} in dimension {dim}"
            raise ValueError(
                f"the pruning plan expects {name!r} to have {expected}, its shape is {tuple(tensor.shape)}"
            )
    if getattr(tensor, "_backward_hooks", None) or getattr(tensor, "_post_accumulate_grad_hooks", None):
        raise ValueError(f"{name!r} has gradient hooks, remove them before shrinking")


def _check_attribute(model: nn.Module, name: str) -> None:
    value = getattr(*_home(model, name))
    if type(value) is not int:
        raise ValueError(f"the pruning plan sets {name!r}, which is not an integer")


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


def _cut(tensor: Tensor, cuts: Cuts) -> Tensor:
    """A new tensor with the kept positions, in the same memory format."""
    out = tensor
    for dim, kept in cuts.items():
        out = out.index_select(dim, kept.to(tensor.device))
    return out.contiguous(memory_format=_memory_format(tensor))


def _memory_format(tensor: Tensor) -> torch.memory_format:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(tensor.dim(), torch.contiguous_format)
    is_last = not tensor.is_contiguous() and tensor.is_contiguous(memory_format=wanted)
    return wanted if is_last else torch.contiguous_format


def _parameter(old: nn.Parameter, data: Tensor, cuts: Cuts) -> nn.Parameter:
    new = nn.Parameter(data, requires_grad=old.requires_grad)
    if old.grad is not None:
        new.grad = _cut(old.grad, cuts)
    return new


def _forget_compiled() -> None:
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
        raise ValueError(f"the pruning plan cuts an attention that cannot be shrunk: {reason}")
    for cls, resize in _RESIZE:
        if isinstance(module, cls):
            return resize
    raise ValueError(f"the pruning plan cuts a {type(module).__name__}, which cannot be shrunk")
