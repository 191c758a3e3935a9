"""Structures out of families of classes: what makes and reads the units, what they are called, how they are scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from gsprune.discovery.classes import Classes, Family
from gsprune.discovery.heads import head_attributes
from gsprune.discovery.labels import UNPAIRED, Axis, Log
from gsprune.structures.adapters import RANK, is_rank
from gsprune.structures.attention import STREAM_NAMES, reads
from gsprune.structures.structure import Kind, Member, Structure
from gsprune.structures.twin import every_tensor
from gsprune.surgery.narrow_attention import why_not_narrow
from gsprune.surgery.narrow_forward import module_of
from gsprune.surgery.no_branch import inside
from gsprune.text.names import joined

_CONV = nn.modules.conv._ConvNd
SINGLE_UNIT = "it has a single unit"


class Unprunable(Exception):
    """Why a family is not offered."""


@dataclass(frozen=True, eq=False)
class Network:
    """A model's names and places.

    tensors every parameter and buffer
    place   of each: (that of its module, that within it)
    """

    model: nn.Module
    modules: Mapping[str, nn.Module]
    tensors: Mapping[str, Tensor]
    place: Mapping[str, tuple[int, int]]

    @staticmethod
    def of(model: nn.Module) -> Network:
        modules = dict(model.named_modules())
        place: dict[str, tuple[int, int]] = {}
        for rank, (name, module) in enumerate(modules.items()):
            leaves = [*module._parameters, *module._buffers, *vars(module)]
            place |= {joined(name, leaf): (rank, number) for number, leaf in enumerate(leaves)}
        return Network(model, modules, every_tensor(model), place)

    def rank(self, name: str) -> int:
        return self.place[name][0]

    def maker(self, tensor: str) -> str:
        """The layer that computes with a tensor, of those that share it: not the table that is looked up."""
        mine = self.tensors[tensor]
        names = [name for name, other in self.model.named_parameters(remove_duplicate=False) if other is mine]
        layers = [name for name in names if not isinstance(self.modules[_layer(name)], nn.Embedding)]
        return _layer((layers or [tensor])[0])


def convert(model: nn.Module, log: Log) -> tuple[list[Structure], dict[str, str]]:
    """What can be offered, in module order, and why the rest stays."""
    network, classes = Network.of(model), Classes(log)
    families = [f for f in classes.families(log.rows | log.sources) if f.atoms]
    notes = _Notes.of(classes)
    first = {id(f): log.atoms.axes[_first(network, log, f)] for f in families}
    structures: list[Structure] = []
    roots: dict[str, Tensor] = {}
    skipped: dict[str, str] = {}
    for family in sorted(families, key=lambda f: (network.place[first[id(f)].tensor], int(f.roots.min()))):
        try:
            made = _structure(network, log, notes, family)
            if any(map(is_rank, made.modules())):
                raise Unprunable(RANK)
            structures.append(_renamed(made, {s.name for s in structures}))
            roots[structures[-1].name] = family.roots
        except Unprunable as reason:
            skipped.setdefault(network.maker(first[id(family)].tensor), str(reason))
    for name, module in network.modules.items():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Linear | _CONV) and weight is not None and weight.shape[_row(module)] == 1:
            skipped.setdefault(name, SINGLE_UNIT)
    structures = _with_sizes(structures, [roots[s.name] for s in structures], classes)
    structures = _with_layers_alike(structures, classes)
    structures = _with_unread(network, log, structures)
    offered = {name for s in structures for name in (s.name, *s.modules())}
    structures.sort(key=lambda s: network.rank(s.producers[0].tensor) if s.kind != "residual" else -1)
    return structures, {name: reason for name, reason in skipped.items() if name not in offered}


def _with_unread(network: Network, log: Log, structures: list[Structure]) -> list[Structure]:
    """Vectors that only training reads are cut along with the one stream that is as long: masked frames hold them."""
    for name in log.unread:
        shape = network.tensors[name].shape
        width = shape.numel()
        fitting = [(i, m) for i, s in enumerate(structures) for m in _whole(s, width)]
        if len({i for i, _ in fitting}) == 1:
            number, like = fitting[0]
            member = Member(name, shape.index(width), like.index, width)
            structures[number] = replace(structures[number], norms=(*structures[number].norms, member))
    return structures


def _whole(structure: Structure, width: int) -> list[Member]:
    """What holds so many entries of a stream, all of them units: norms first."""
    members = (*structure.norms, *structure.producers) if structure.kind == "residual" else ()
    return [m for m in members if m.size == m.index.numel() == width]


def _row(layer: nn.Module) -> int:
    return int(isinstance(layer, _CONV) and layer.transposed)


def _first(network: Network, log: Log, family: Family) -> int:
    """The axis that makes the units first, in module order."""
    made = [a for a in family.atoms if a in log.rows] or list(family.atoms)
    made = [a for a in made if isinstance(network.tensors[log.atoms.axes[a].tensor], nn.Parameter)] or made
    return min(made, key=lambda a: network.place[log.atoms.axes[a].tensor])


def _renamed(structure: Structure, taken: set[str]) -> Structure:
    """Two halves of a concatenated residual stream share their first producer: the second takes its own."""
    name = next((n for n in (structure.name, *structure.modules()) if n not in taken), None)
    if name is None:
        name = next(f"{structure.name}#{n}" for n in range(2, 1 << 20) if f"{structure.name}#{n}" not in taken)
    return replace(structure, name=name)


@dataclass(frozen=True, eq=False)
class _Notes:
    """Of every atom whether its class is one of these, bool; and the norms over whole streams by their first atoms."""

    is_head: Tensor
    is_stream: Tensor
    is_summed: Tensor
    is_bent: Tensor
    is_value: Tensor  # of the atom itself
    is_computed: Tensor  # of the atom itself
    roots: Tensor
    normed: Sequence[tuple[Tensor, str, str]]  # roots, kind of norm, module
    widths: Sequence[tuple[Tensor, int]]  # roots, width of a head's values

    @staticmethod
    def of(classes: Classes) -> _Notes:
        log = classes.log
        is_value = torch.zeros(log.atoms.count, dtype=torch.bool)
        for atoms, _ in log.values:
            is_value[atoms] = True
        for rows, biases in log.biases:
            is_value[biases] |= is_value[rows]
        is_value[0] = False
        is_computed = torch.zeros(log.atoms.count, dtype=torch.bool)
        for atoms in log.computed:
            is_computed[atoms] = True
        streams = [atoms for atoms, kind, _ in log.normed if kind != "GroupNorm"]
        roots = classes.roots
        return _Notes(
            classes.having(log.attention),
            classes.having(streams),
            classes.having(log.summed),
            classes.having(log.bent),
            is_value,
            is_computed,
            roots,
            [(roots[atoms].unique(), kind, name) for atoms, kind, name in log.normed],  # type: ignore[no-untyped-call]
            [(roots[atoms].unique(), width) for atoms, width in log.values],  # type: ignore[no-untyped-call]
        )


def _structure(network: Network, log: Log, notes: _Notes, family: Family) -> Structure:
    sides = _sides(network, log, family)
    _check(network, [log.atoms.axes[a].tensor for a in family.atoms])
    if family.reason is not None:
        raise Unprunable(family.reason)
    if not sides["columns"]:
        raise Unprunable("no layer reads it")
    if len(family.roots) < 2:
        raise Unprunable(SINGLE_UNIT)
    first = _first(network, log, family)
    lead = log.atoms.axes[first]
    order = torch.argsort(family.atoms[first][:, 0])
    members = {side: tuple(_member(log, family, a, order) for a in some) for side, some in sides.items()}
    root = int(family.roots[0])
    name, kind = _layer(lead.tensor), _kind(network, notes, lead, root)
    gates: tuple[Member, ...] = ()
    scales = False
    attributes: dict[str, int] = {}
    if kind == "heads":
        name, attributes = head_attributes(network.model, members["rows"], members["columns"], _width(notes, root))
        gates = _value_rows(log, notes, members["rows"]) or members["columns"]
    elif kind == "residual":
        homes = [_layer(m.tensor) for m in members["rows"]]
        name, gates = next(home for home in homes if home), members["columns"]
    else:
        gates = _gates(log, notes, sides, members)
        gates = gates if all(isinstance(network.tensors[m.tensor], nn.Parameter) for m in gates) else ()
        scales = bool(gates) and all(network.tensors[m.tensor].dim() == 1 for m in gates) and not notes.is_bent[root]
        gates = gates or members["columns"]  # what has no gradient, or one of something else, says nothing
    attributes = attributes | _norm_attributes(network, notes, root)
    if kind == "residual":
        attributes |= _widths(network, [*members["rows"], *members["columns"]])
    return Structure(
        name=name,
        kind=kind,
        units=len(family.roots),
        producers=members["rows"],
        consumers=members["columns"],
        norms=members["scales"],
        gates=gates,
        scales=scales,
        attributes=attributes,
        normed=bool(notes.is_summed[root]) or (kind == "heads" and bool(notes.is_stream[root])),
    )


def _sides(network: Network, log: Log, family: Family) -> dict[str, list[int]]:
    """Axes that make the units, that read them, that lie on the way; each in module order."""
    axes = sorted(family.atoms, key=lambda a: (network.place[log.atoms.axes[a].tensor], log.atoms.axes[a].dim))
    columns = [a for a in axes if a in log.columns]
    scales = [a for a in axes if a in log.scales - log.rows - log.columns - log.sources]
    taken = set(columns) - log.rows - log.sources | set(scales)
    return {"rows": [a for a in axes if a not in taken], "columns": columns, "scales": scales}


def _member(log: Log, family: Family, number: int, order: Tensor) -> Member:
    axis = log.atoms.axes[number]
    return Member(axis.tensor, axis.dim, family.atoms[number][order] - axis.first, axis.size)


def _kind(network: Network, notes: _Notes, lead: Axis, root: int) -> Kind:
    if notes.is_head[root]:
        return "heads"
    if notes.is_stream[root]:
        return "residual"
    owner = network.modules[_layer(lead.tensor)]
    return "channels" if isinstance(owner, _CONV) else "neurons"


def _layer(tensor: str) -> str:
    """The layer that a tensor belongs to, also where a parametrisation computes its weight."""
    return tensor.rpartition(".")[0].partition(".parametrizations.")[0]


def _check(network: Network, tensors: Iterable[str]) -> None:
    for name in dict.fromkeys(map(_layer, tensors)):
        module = network.modules[name]
        reason = why_not_narrow(module) if isinstance(module, nn.MultiheadAttention) else None
        if reason is not None:
            raise Unprunable(reason)
        for leaf in ("weight", "bias"):
            known = leaf in module._parameters or leaf in module._buffers
            if not known and isinstance(getattr(module, leaf, None), Tensor) and _is_pruned(module):
                how = "torch.nn.utils.prune: call its remove() first"
                raise Unprunable(f"the {leaf} of {name!r} is computed from other tensors ({how})")


def _is_pruned(module: nn.Module) -> bool:
    return any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values())


def _norm_attributes(network: Network, notes: _Notes, root: int) -> dict[str, int]:
    found = {}
    for roots, kind, name in notes.normed:
        if bool((roots == root).any()):
            if kind == "GroupNorm":
                found[joined(name, "num_groups")] = 1
            elif name and getattr(network.modules[name], "weight", None) is None:
                found[joined(name, "normalized_shape")] = 1
    return found


def _widths(network: Network, members: Iterable[Member]) -> dict[str, int]:
    """Of the modules around a stream's tensors, the attributes by which some reshape, split or check it."""
    found: dict[str, int] = {}
    for member in members:
        name, (units, width) = _layer(member.tensor), member.index.shape
        for home in (name, name.rpartition(".")[0]):
            module = network.modules[home]
            mine = [a for a in STREAM_NAMES if getattr(module, a, None) == units * width and reads(module, a)]
            found |= {joined(home, a): width for a in mine}
    return found


# ---- sizes that forward passes name


def _with_sizes(structures: Sequence[Structure], roots: Sequence[Tensor], classes: Classes) -> list[Structure]:
    """Each structure with the sizes of all modules that it lies in, or whose sizes it changes."""
    owner = torch.full((classes.log.atoms.count,), -1)
    for number, some in enumerate(roots):
        owner[some] = number
    amounts: dict[str, dict[str, tuple[int, dict[int, int]]]] = {}  # module -> size -> dense, structure -> amount
    for name, lines in classes.log.sizes.items():
        first, *others = (_size(line, owner, classes, structures) for line in lines)
        if first is not None and all(size == first for size in others):
            amounts.setdefault(module_of(name), {})[name] = first
    found: list[dict[str, tuple[int, int]]] = [{} for _ in structures]
    holders = [{_layer(m.tensor) for m in s.members} for s in structures]
    for module, sizes in amounts.items():
        changing = {number for _, mine in sizes.values() for number in mine}
        if changing:
            for number in range(len(structures)):
                if number in changing or any(inside(layer, [module]) or not module for layer in holders[number]):
                    found[number] |= {name: (mine.get(number, 0), dense) for name, (dense, mine) in sizes.items()}
    return [replace(s, sizes=mine) for s, mine in zip(structures, found, strict=True)]


def _size(
    line: Tensor, owner: Tensor, classes: Classes, structures: Sequence[Structure]
) -> tuple[int, dict[int, int]] | None:
    """The dense size, and of each structure how many of its positions a unit has; None where a size may be anything."""
    roots = classes.roots[line]
    owners = owner[roots]
    mine: dict[int, int] = {}
    for number in owners.unique().tolist():  # type: ignore[no-untyped-call]
        if number < 0:
            continue
        here = roots[owners == number]
        units = len(here.unique())  # type: ignore[no-untyped-call]
        if units == structures[number].units:
            mine[number] = len(here) // units
        elif units > 1:
            return None
        else:  # places inside of units
            mine.setdefault(number, 0)
    return (len(line), mine) if mine else None


def _with_layers_alike(structures: Sequence[Structure], classes: Classes) -> list[Structure]:
    """Each structure with the layers that compute all of its units alike."""
    log = classes.log
    first = {(axis.tensor, axis.dim): axis.first for axis in log.atoms.axes}
    owner, unit = (torch.full((log.atoms.count,), -1) for _ in range(2))
    for number, structure in enumerate(structures):
        for member in structure.producers[:1]:
            roots = classes.roots[member.index[:, 0] + first[member.tensor, member.dim]]
            owner[roots], unit[roots] = number, torch.arange(structure.units)
    found: list[dict[str, tuple[int, int]]] = [{} for _ in structures]
    for name, layers in log.beside.items():
        for dim in {dim for dim, _ in layers}:
            lines = [classes.roots[layer.reshape(-1)] for d, layer in layers if d == dim]
            owners = {int(number) for line in lines for number in owner[line].unique()}  # type: ignore[no-untyped-call]
            entries = {_entries(unit[line]) for line in lines}
            if len(owners) == 1 and -1 not in owners and len(entries) == 1 and None not in entries:
                found[owners.pop()][name] = (dim, entries.pop())  # type: ignore[assignment]
    return [replace(s, alike=mine) for s, mine in zip(structures, found, strict=True)]


def _entries(units: Tensor) -> int | None:
    """How many entries one unit has after another where numbers of units are 0, 0, 1, 1, ..., 0, 0, ...; None where
    they are not.

    >>> _entries(torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])), _entries(torch.tensor([0, 1, 1]))
    (2, None)
    """
    count = int(units.max()) + 1
    others = (units != 0).nonzero()
    entries = int(others[0]) if len(others) else len(units)
    right = entries > 0 and torch.equal(units, torch.arange(len(units)) // entries % count)
    return entries if right and len(units) % (count * entries) == 0 else None


# ---- gates


def _gates(
    log: Log, notes: _Notes, sides: Mapping[str, Sequence[int]], members: Mapping[str, Sequence[Member]]
) -> tuple[Member, ...]:
    """Affine pairs of the BatchNorms that read the producers first, and bare producers' own rows.

    Scaling a unit in front of a BatchNorm changes nothing, so its gate shows in that norm's weight and bias. A producer
    that is (also) read without a norm shows that part of the gate in its own rows. Empty, if a part shows nowhere.
    """
    axes = log.atoms.axes
    pairs = {n for a in sides["rows"] for n in log.norms.get(a, ())}
    if UNPAIRED in pairs:
        return ()
    norms = {_layer(axes[n].tensor) for n in pairs}
    bare = {_layer(axes[a].tensor) for a in sides["rows"] if a in log.bare}
    if any(bool(notes.is_computed[axes[a].first]) for a in sides["rows"] if _layer(axes[a].tensor) in bare):
        return ()
    affine = [m for m in members["scales"] if _layer(m.tensor) in norms]
    affine = [m for m in affine if m.tensor.rpartition(".")[2] in ("weight", "bias")]
    return (*affine, *(m for m in members["rows"] if _layer(m.tensor) in bare))


def _width(notes: _Notes, root: int) -> int | None:
    """Of a head's values."""
    return next((width for roots, width in notes.widths if bool((roots == root).any())), None)


def _value_rows(log: Log, notes: _Notes, rows: Sequence[Member]) -> tuple[Member, ...]:
    """What the producers have of the values that an attention weighs; nothing where all heads share these."""
    first = {(axis.tensor, axis.dim): axis.first for axis in log.atoms.axes}
    found: list[Member] = []
    for member in rows:
        mine = notes.is_value[member.index + first[member.tensor, member.dim]]
        if bool(mine.any()) and bool((mine.sum(1) == mine[0].sum()).all()):
            found.append(replace(member, index=member.index[mine].reshape(len(mine), -1), in_order=None))
    return tuple(found)
