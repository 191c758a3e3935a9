"""Turn kept units into a smaller dense network: modules, their attributes and the optimizer's state.

`plan_cut` says which positions of which tensors stay, and `apply_cut` cuts the others out in place. `shrink` does both,
after it has compared the masked and the shrunk network in float64 on copies. A `Shrinker` does so repeatedly while the
model trains; its masks are those of the dense network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gsprune.structures.alike import alike
from gsprune.structures.example import Example
from gsprune.structures.running import called_modules, counted, hooked, outputs, wake
from gsprune.structures.structure import Member, Structure
from gsprune.structures.twin import copy_of, every_tensor, twin_of
from gsprune.surgery.apply import apply_cut, forget_compiled
from gsprune.surgery.copies import check_copies
from gsprune.surgery.cut_plan import CutPlan, checked, plan_cut
from gsprune.surgery.narrow_forward import is_mean, is_shape, module_of, noting_changes, partner
from gsprune.surgery.no_branch import inside
from gsprune.surgery.optimizers import Optimizers
from gsprune.surgery.proof import NOT_FINITE, Masked, Problem, noise_like, owners, sift, zero_columns_
from gsprune.surgery.readings import Grids, Reading, Rows, first_difference, is_finite, readings, rows_alike
from gsprune.text.display import first_line


def shrink(
    model: nn.Module,
    structures: Sequence[Structure],
    keeps: Sequence[Tensor],
    *,
    example_input: Example,
    optimizer: Optimizers | None = None,
    drop_state: bool = False,
) -> CutPlan:
    """Remove the units that are not kept, in place, after proving on copies that nothing else changes.

    Args:
        keeps: of each structure bool (units,), True = kept.
        example_input: what the masked and the shrunk network are compared on, and noise beside it.
        optimizer: one or several whose parameters and state are cut along.
        drop_state: as of `apply_cut`.

    Raises:
        ValueError: the outputs of a layer differ by more than 1e-9 of the largest in float64 (1e-4 in float32, of a
            network that does not run in float64), or as `apply_cut`; the model and the optimizer are then untouched.

    >>> from gsprune.discovery.find import find_structures
    >>> net, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.ones(1, 4)
    >>> keep = torch.tensor([True, False, True])
    >>> plan = shrink(net, find_structures(net, x).structures, [keep], example_input=x)
    >>> net[0], net[2]
    (Linear(in_features=4, out_features=2, bias=True), Linear(in_features=2, out_features=2, bias=True))
    """
    check_shrink(model, structures, keeps, example_input=example_input)
    plan = plan_cut(structures, keeps)
    apply_cut(model, plan, optimizer=optimizer, drop_state=drop_state)
    return plan


class Shrinker:
    """Cuts units out of a model, once or repeatedly.

    Attributes:
        structures: those of the dense network, whose units the masks are of.
        here: the same structures in the model as it is now.
        plan: what stays of the dense network; None before the first cut.
        step: what the last cut left of the network before it.

    Args:
        copies: networks of the same architecture that are cut along, as the average of an EMA.

    Raises:
        ValueError: a copy has other tensors than the model.

    >>> from gsprune.discovery.find import find_structures
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
        self.plan: CutPlan | None = None
        self.step: CutPlan | None = None
        self._kept = [torch.ones(structure.units, dtype=torch.bool) for structure in structures]

    def cut(self, keeps: Sequence[Tensor], *, optimizer: Optimizers | None = None, drop_state: bool = False) -> None:
        """Cut the model, its copies and the optimizer's state down to `keeps[i]`, bool (units,) of the dense network.

        What is cut stays cut. `drop_state` as of `apply_cut`. ValueError as of `shrink`; all is then as it was.
        """
        kept = [keep & before for keep, before in zip(checked(self.structures, keeps), self._kept, strict=True)]
        news = [keep[before] for keep, before in zip(kept, self._kept, strict=True)]
        plan = plan_cut(self.structures, kept)
        if not all(new.all() for new in news):
            options: dict[str, Any] = {"optimizer": optimizer, "drop_state": drop_state}
            self.step = shrink(self.model, self.here, news, example_input=self.example_input, **options)
            for copy in self.copies:
                apply_cut(copy, self.step)
            forget_compiled()
        self.here = [_narrowed(s, keep, plan) for s, keep in zip(self.structures, kept, strict=True)]
        self._kept, self.plan = kept, plan


def _narrowed(structure: Structure, keep: Tensor, plan: CutPlan) -> Structure:
    """A dense network's structure as it lies in the network that the plan leaves; what branches took is not there."""

    def here(member: Member) -> Member:
        kept = plan.kept.get(member.tensor, {}).get(member.dim)
        if kept is None:
            return member
        index = torch.searchsorted(kept, member.index[keep])
        assert torch.equal(kept[index], member.index[keep])
        return Member(member.tensor, member.dim, index, len(kept))

    sides = (structure.producers, structure.consumers, structure.norms, structure.gates)
    producers, consumers, norms, gates = (
        tuple(here(m) for m in side if not inside(m.tensor, plan.removed)) for side in sides
    )
    attributes = {name: n for name, n in structure.attributes.items() if not inside(name, plan.removed)}

    def now(name: str, dense: int) -> int:
        return plan.attributes.get(partner(name) if is_shape(name) else name, dense)

    sizes = {name: (n, now(name, dense)) for name, (n, dense) in structure.sizes.items()}
    return replace(
        structure,
        units=int(keep.sum()),
        producers=producers,
        consumers=consumers,
        norms=norms,
        gates=gates,
        attributes=attributes,
        sizes={name: size for name, size in sizes.items() if not inside(name, plan.removed)},
    )


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
    """What is wrong with the shrunk network, or None. A twin is masked; a copy of it that shares tensors is cut.

    In float64; in float32 where the network does not run in that, or its output is not finite then.
    """
    plan = plan_cut(structures, keeps)
    rows = {**plan.kept, **rows_alike(structures, keeps)}
    failed: Exception | None = None
    for dtype in (torch.float64, torch.float32):
        try:
            twin, args, first = _masked_twin(model, structures, keeps, rows, example_input, dtype)
        except Exception as error:
            failed = failed or error
            continue
        if is_finite(first):
            break
    else:
        raise failed or ValueError(NOT_FINITE)
    small = small_of(twin, plan)

    def read(x: Example, grids: Grids | None) -> Sequence[Reading]:
        return first if x is args and grids is None else readings(twin, x, rows, grids=grids)

    problem = _mismatch(small, args, partial(read, args), structures, plan, 0)
    if problem is None:
        noise = noise_like(args)
        problem = _mismatch(small, noise, partial(read, noise), structures, plan, 1)
    return None if problem is None else problem.text


def _masked_twin(
    model: nn.Module,
    structures: Sequence[Structure],
    keeps: Sequence[Tensor],
    rows: Rows,
    example_input: Example,
    dtype: torch.dtype,
) -> tuple[nn.Module, Example, list[Reading]]:
    """A masked copy in a precision, the example in it, and what its layers give on that."""
    twin, args = twin_of(model, example_input, dtype)
    mask_units(twin, structures, keeps)
    calls: Counter[nn.Module] = Counter()
    with counted(twin, calls):
        found = readings(twin, args, rows)
    return twin, args, readings(twin, args, rows) if wake(twin, args, calls) else found


def sift_cuts(masked: Masked, structures: Sequence[Structure]) -> tuple[list[Structure], dict[str, str]]:
    """The structures that can be cut exactly, each to another random number of units, and why the others cannot.

    One comparison serves both things to show: with other rows for the units that are gone, the masked network computes
    what the cut one does, which has no such rows. A leak of the units would differ with their rows.

    Modules that insist on sizes are told those of the structures (`Structure.sizes`); structures keep these alone.
    """

    def test(some: Sequence[Structure]) -> Problem | None:
        problem = _first_wrong(masked, some)
        return None if problem is None else masked.leak(some) or problem

    plain = [_with_sizes_of(s, (), ()) for s in structures]
    if not plain or _first_wrong(masked, plain) is None:
        return plain, {}
    likeness = _likeness(masked.twin, structures)
    if not any(s.sizes for s in structures):
        return sift(plain, test, likeness)
    modules = {module_of(name) for s in structures for name in s.sizes}
    calls: Mapping[nn.Module, int] = called_modules(masked.twin, masked.rounds[0].args) or {}
    called = {name for name, module in masked.twin.named_modules() if module in calls}
    kept, broken = sift([_with_sizes_of(s, modules, called) for s in structures], test, likeness)
    names = {s.name for s in kept}
    needed = _insisting(masked, [s for s in structures if s.name in names])
    fewer = [_with_sizes_of(s, needed, called) for s in kept]
    return (kept if _first_wrong(masked, fewer) else fewer), broken


def _likeness(model: nn.Module, structures: Sequence[Structure]) -> dict[str, object]:
    """Those that `alike` puts together and classes of the same names hold: name -> what these have in common."""
    found: dict[str, object] = {}
    for number, numbers in enumerate(alike(model, structures)):
        for structure in (structures[i] for i in numbers):
            homes = (model.get_submodule(module_of(name)) for name in structure.modules())
            found[structure.name] = (number, *(type(home).__qualname__ for home in homes))
    return found


def _with_sizes_of(structure: Structure, modules: Collection[str], called: Collection[str]) -> Structure:
    """Of other modules it keeps no sizes but those of averages over its units; attributes of these are left to them.

    Whose forward pass reads the attributes of a module that is not called, nor is a module: that of the one around it.
    """
    if not structure.sizes:
        return structure
    sizes = {
        name: (amount, dense)
        for name, (amount, dense) in structure.sizes.items()
        if (amount if is_mean(name) else module_of(name) in modules)
    }
    told = {module_of(name) for name in sizes if not is_mean(name)}
    attributes = {name: n for name, n in structure.attributes.items() if _reader(name, called) not in told}
    return replace(structure, sizes=sizes, attributes=attributes)


def _reader(attribute: str, called: Collection[str]) -> str:
    """The module whose forward pass reads an attribute: the innermost around it that is called.

    >>> _reader("attn.position.num_heads", {"", "attn", "attn.q"})
    'attn'
    """
    path = module_of(attribute)
    while path and path not in called:
        path = module_of(path)
    return path


def _first_wrong(masked: Masked, some: Sequence[Structure]) -> Problem | None:
    return next(filter(None, (_wrong_cut(masked, number, some) for number in range(len(masked.rounds)))), None)


def _insisting(masked: Masked, structures: Sequence[Structure]) -> set[str]:
    """The modules that ask for other sizes than there are when streams, all else or both are cut, told nothing else."""
    found: set[str] = set()
    structures = [replace(s, sizes={n: size for n, size in s.sizes.items() if not is_shape(n)}) for s in structures]
    streams = [s for s in structures if s.kind == "residual"]
    others = [s for s in structures if s.kind != "residual"]
    round_ = masked.rounds[0]  # who asks for sizes asks on any input; `sift_cuts` tries what is found on both
    for some in (structures, streams, others) if streams and others else (structures,):
        small = small_of(masked.twin, plan_cut(some, [round_.keep(s) for s in some]))
        with noting_changes() as modules, suppress(Exception):
            outputs(small, round_.args)
        found |= {name for name, module in small.named_modules() if module in modules}
    return found


def _wrong_cut(masked: Masked, number: int, some: Sequence[Structure]) -> Problem | None:
    """What is wrong with the network that one round leaves."""
    plan = plan_cut(some, [masked.rounds[number].keep(s) for s in some])
    try:
        small = small_of(masked.twin, plan)
    except ValueError as error:  # it costs the structures that cannot be cut, not the others
        return Problem(str(error))

    def read(grids: Grids | None) -> Sequence[Reading]:
        return masked.read(number, some, changed=True, grids=grids)

    return _mismatch(small, masked.rounds[number].args, read, some, plan, number)


def small_of(twin: nn.Module, plan: CutPlan) -> nn.Module:
    small = copy_of(twin, sharing=True)
    apply_cut(small, plan)
    return small


def _mismatch(
    small: nn.Module,
    args: Example,
    read_masked: Callable[[Grids | None], Sequence[Reading]],
    structures: Sequence[Structure],
    plan: CutPlan,
    number: int,
) -> Problem | None:
    """What is wrong with a shrunk network on one input; None where the masked one does not take that (`number` > 0)."""
    try:
        masked = [reading for reading in read_masked(None) if not inside(reading.name, plan.removed)]
    except Exception:
        if number == 0:
            raise
        return None
    if not is_finite(masked):
        return Problem(NOT_FINITE) if number == 0 else None
    started: list[str] = []
    try:
        with hooked(_noting_starts(small, started)):
            shrunk = readings(small, args, scaled=False)
    except Exception as error:
        return Problem(f"the shrunk network does not run ({first_line(error)})", _last_touched(structures, started))
    differing = first_difference(masked, shrunk)
    if differing is None or (differing == "" and _decide_alike(small, args, read_masked, plan)):
        return None
    before = started[: started.index(differing) + 1] if differing in started else started
    return Problem("the shrunk network does not compute what the masked one does", _last_touched(structures, before))


def _decide_alike(
    small: nn.Module, args: Example, read_masked: Callable[[Grids | None], Sequence[Reading]], plan: CutPlan
) -> bool:
    """Of networks whose layers agree whether their answers do once these are rounded: some sort, or take the best."""
    grids = Grids()
    masked = [reading for reading in read_masked(grids) if not inside(reading.name, plan.removed)]
    return first_difference(masked, readings(small, args, scaled=False, grids=grids)) is None


def _noting_starts(model: nn.Module, started: list[str]) -> Iterator[RemovableHandle]:
    """`started` takes the names of modules as they are called."""
    for name, module in model.named_modules():
        yield module.register_forward_pre_hook(lambda m, i, name=name: started.append(name))


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
    """Zero, in place, what a mask zeroes (`Structure.masked`) of the units that are not kept."""
    gone = [(s, ~keep) for s, keep in zip(structures, checked(structures, keeps), strict=True)]
    zero_columns_(every_tensor(model, every_name=True), gone)
