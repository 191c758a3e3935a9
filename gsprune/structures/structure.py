"""The words of structured pruning as data: a `Structure` of units, its `Member` tensors, what was `Found`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gsprune.text.display import html_table

Kind = Literal["channels", "neurons", "heads", "residual", "branches", "experts"]
Counted = Literal["channels", "neurons", "heads", "residual"]  # kinds of which a structure has several units
INNER: tuple[Kind, ...] = ("channels", "neurons", "heads")  # what a rule prunes that names no kinds


@dataclass(frozen=True, eq=False)
class Member:
    """One dimension of one tensor that a structure cuts.

    `index` is int64 (units, width) on the CPU: row u lists unit u's positions along `dim` of `tensor`, the name of a
    parameter or buffer; `size` is the dense length of that dimension. Of most weights dimension 0 is rows (outputs)
    and 1 columns (inputs); of transposed convolutions and Conv1D it is the other way round, and tokens, positions and
    expert weights have the dimension that they have. `in_order`: whether the positions are 0, 1, 2, ... `size` - 1,
    one unit after the other.
    """

    tensor: str
    dim: int
    index: Tensor
    size: int
    in_order: bool | None = None

    def __repr__(self) -> str:
        units, width = self.index.shape
        return f"Member({self.tensor!r}, dim {self.dim}: {units} units x {width} of {self.size} positions)"

    def __post_init__(self) -> None:
        if self.in_order is None:  # read off once, on the CPU: a copy on another device takes it over
            flat = self.index.flatten()
            ordered = len(flat) == self.size and torch.equal(flat, torch.arange(self.size))
            object.__setattr__(self, "in_order", ordered)


@dataclass(frozen=True, eq=False)
class Structure:
    """Units that live in the same tensors; removing unit u removes its positions from every member.

    name        module name of the first producer in module order; for heads that of the attention module
    units       how many there are; of grouped-query attention a unit is a key/value head with its query heads
    producers   weights and biases whose rows compute the unit (depthwise convolutions and gates included)
    consumers   weights whose columns read it: with these at zero the unit contributes exactly nothing
    norms       per-unit tensors on the way that are cut along: affine pairs and statistics of norms, PReLU's slopes
    gates       the tensors whose sum of w * g over unit u is the gradient of a gate on its pre-activation; consumers
                where none of the producers shows that (in a stream, behind a norm without weight)
    scales      whether what consumers read scales along with the gates, as through ReLU, poolings and sums alone: then
                the gates' sum is the gradient of a gate on the unit's output as well
    attributes  module attribute -> amount per unit; its new value is amount * kept units. A `normalized_shape` is the
                norm itself, which has no tensors
    sizes       size that a module's forward pass has to be told -> (amount per unit, dense size), as of
                `gsprune.surgery.narrow_forward`
    alike       layer that computes all units alike, each in rows of its own -> (dimension of its output, entries of it
                that one unit has in a row): queries that are pooled head by head, products along the tokens
    normed      they are summed or averaged over (a global response norm), or, of heads, queries and keys of all pass
                one norm (OLMo 2): a mask holds them at zero before that

    A unit of kind "residual" is a position of a residual stream that passes norms over all its positions (LayerNorm,
    RMSNorm). Its mask holds the position at zero in the stream itself, as the norms of the cut network count it: what
    writes it is zeroed too. One of kind "branches" is a whole residual branch, the only one of its structure; its
    members are the branch's last layer, and with it the modules of `removed` go: name -> 0 where the module returns a
    tensor, n where a tuple of n. Other structures may lose tensors with it, and this structure its only unit.
    """

    name: str
    kind: Kind
    units: int
    producers: tuple[Member, ...]
    consumers: tuple[Member, ...]
    norms: tuple[Member, ...]
    gates: tuple[Member, ...]
    attributes: Mapping[str, int]
    removed: Mapping[str, int] = field(default_factory=dict)
    normed: bool = False
    scales: bool = False
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    alike: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def output_gates(self) -> tuple[Member, ...]:
        """The tensors whose sum of w * g over unit u is the gradient of a gate on its output."""
        return self.gates if self.scales else self.consumers

    @property
    def masked(self) -> tuple[Member, ...]:
        """What a mask zeroes: the consumers; of what passes a norm with others also what writes it, and the norm."""
        if self.kind != "residual" and not self.normed:
            return self.consumers
        affine = (m for m in self.norms if not m.tensor.rpartition(".")[2].startswith("running_"))
        return (*self.consumers, *self.producers, *affine)

    @property
    def members(self) -> tuple[Member, ...]:
        """What a cut shortens; of a branch nothing."""
        return () if self.kind == "branches" else (*self.producers, *self.consumers, *self.norms)

    def __repr__(self) -> str:
        parts = [f"{len(self.producers)} producing", f"{len(self.norms)} norm", f"{len(self.consumers)} reading"]
        return f"Structure({self.name!r}: {self.units} {self.kind}; {', '.join(parts)} tensors)"

    def modules(self) -> tuple[str, ...]:
        """Names of the modules that produce the units."""
        return tuple(dict.fromkeys(member.tensor.rpartition(".")[0] for member in self.producers))


@dataclass(frozen=True)
class Found:
    """What `find_structures` offers, in module order, what `include` and `exclude` left out of it, and why the rest is
    left alone (name -> reason). `proof` says what the proof shows where that is less than equality in float64."""

    structures: tuple[Structure, ...]
    left_out: tuple[Structure, ...]
    skipped: Mapping[str, str]
    proof: str = ""

    def __repr__(self) -> str:
        kinds = Counter[str]()
        for structure in self.structures:
            kinds[structure.kind] += structure.units
        units = ", ".join(counted(count, kind) for kind, count in kinds.items())
        first = f"Found {len(self.structures)} structures ({units})" if kinds else "Found no structures"
        lines = [f"{first}, left out {len(self.left_out)}, skipped {len(self.skipped)}"]
        lines += [f"  {self.proof}"] if self.proof else []
        lines += _few([f"  {s.name}: {counted(s.units, s.kind)}" for s in self.structures])
        return "\n".join([*lines, *_few([f"  - {name}: {why}" for name, why in self.skipped.items()])])

    def _repr_html_(self) -> str:
        rows = [(s.name, str(s.units), str(s.kind)) for s in self.structures]
        rows += [(s.name, str(s.units), f"{s.kind}, left out") for s in self.left_out]
        return html_table(("name", "units", "what"), [*rows, *((name, "", why) for name, why in self.skipped.items())])


def counted(units: int, kind: str) -> str:
    """A number of units, for readers.

    >>> counted(12, "heads"), counted(8, "residual"), counted(1, "branches")
    ('12 heads', '8 residual positions', '1 branch')
    """
    return f"{units} {called(kind, units)}"


def called(kind: str, units: int) -> str:
    """So many units of a kind without the number."""
    return {"residual": "residual positions", "branches": "branch" if units == 1 else "branches"}.get(kind, kind)


def _few(lines: list[str], count: int = 8) -> list[str]:
    return lines if len(lines) <= count + 1 else [*lines[:count], f"  ... {len(lines) - count} more"]
