"""The cut plan: which positions of which tensors stay; as data, and from kept units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gsprune.files.disk import refusing
from gsprune.structures.structure import Structure
from gsprune.surgery.narrow_forward import is_mean, is_shape, partner
from gsprune.surgery.no_branch import inside
from gsprune.surgery.short_list import GONE
from gsprune.text.display import html_table

Cuts = Mapping[int, Tensor]  # dimension -> kept positions
ROW_NUMBERS = ("_id", "_idx")  # attributes that are the number of a row, which may be 0
DIMENSIONS = tuple("01234567")  # of a tensor, as a file names them


@dataclass(frozen=True, eq=False)
class CutPlan:
    """What stays of a dense network.

    kept        tensor name -> dimension -> kept positions (int64, CPU, ascending); only what is really cut
    sizes       tensor name -> dimension -> dense length, so that a plan cannot be applied twice
    attributes  module attribute -> new value ("blocks.0.attn.num_heads" -> 3)
    removed     module that is gone -> 0 where it returns a tensor, n where a tuple of n (`NoBranch` stands there), -1
                where the list that held it has one less

    >>> plan = CutPlan({"0.weight": {0: torch.tensor([0, 2])}}, {"0.weight": {0: 3}}, {})
    >>> plan.to_json()["tensors"]
    {'0.weight': {'0': {'size': 3, 'kept': [0, 2]}}}
    >>> CutPlan.from_json(plan.to_json()).kept["0.weight"][0]
    tensor([0, 2])
    """

    kept: Mapping[str, Mapping[int, Tensor]]
    sizes: Mapping[str, Mapping[int, int]]
    attributes: Mapping[str, int]
    removed: Mapping[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        lines = [f"  {name} {self._change(name)}" for name in self.kept][:8]
        more = [f"  ... {len(self.kept) - len(lines)} more"] if len(self.kept) > len(lines) else []
        gone = f", removes {len(self.removed)} modules" if self.removed else ""
        first = f"CutPlan that cuts {len(self.kept)} tensors, sets {len(self.attributes)} attributes{gone}"
        return "\n".join([first, *lines, *more])

    def _repr_html_(self) -> str:
        rows = [(name, self._change(name)) for name in self.kept]
        rows += [(name, f"= {value}") for name, value in self.attributes.items()]
        rows += [(name, "nothing") for name in self.removed]
        return html_table(("tensor or attribute", "what stays"), rows)

    def _change(self, name: str) -> str:
        cuts = self.kept[name].items()
        return ", ".join(
            f"dim {d}: {len(kept)} of {self.sizes[name][d]}" for d, kept in sorted(cuts, key=lambda c: c[0])
        )

    def after(self, first: CutPlan) -> CutPlan:
        """This plan, made of a network that `first` had left, counted from that one's dense network.

        Raises:
            ValueError: the two do not follow each other.

        >>> first = CutPlan({"w": {0: torch.tensor([0, 2, 3])}}, {"w": {0: 5}}, {"heads": 3})
        >>> both = CutPlan({"w": {0: torch.tensor([1, 2])}}, {"w": {0: 3}}, {"heads": 2}).after(first)
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
        attributes = {**first.attributes, **self.attributes}
        attributes |= {name: value for name, value in first.attributes.items() if is_shape(name)}
        return CutPlan(kept, sizes, attributes, {**first.removed, **self.removed}).without_removed()

    def without_removed(self) -> CutPlan:
        """The same plan, which says nothing of tensors and attributes of modules that are gone.

        >>> plan = CutPlan({"a.w": {0: torch.tensor([0])}}, {"a.w": {0: 2}}, {"a.heads": 1}, {"a": 0})
        >>> plan.without_removed().kept, plan.without_removed().attributes
        ({}, {})
        """
        if not self.removed:
            return self
        kept = {name: cuts for name, cuts in self.kept.items() if not inside(name, self.removed)}
        attributes = {name: value for name, value in self.attributes.items() if not inside(name, self.removed)}
        return CutPlan(kept, {name: self.sizes[name] for name in kept}, attributes, self.removed)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and ints."""
        tensors = {
            name: {str(d): {"size": self.sizes[name][d], "kept": kept.tolist()} for d, kept in cuts.items()}
            for name, cuts in self.kept.items()
        }
        removed = {"removed": dict(self.removed)} if self.removed else {}
        return {"tensors": tensors, "attributes": dict(self.attributes), **removed}

    @classmethod
    @refusing()
    def from_json(cls, data: Any) -> CutPlan:
        """The inverse of `to_json`; ValueError in one sentence for anything else."""
        known = isinstance(data, dict) and set(data) - {"removed"} == {"tensors", "attributes"}
        _expect(known, "it has no plan's two keys")
        _expect(isinstance(data["tensors"], dict), "'tensors' is not a mapping")
        _expect(isinstance(data["attributes"], dict), "'attributes' is not a mapping")
        for name, value in data["attributes"].items():
            least = 0 if str(name).endswith(ROW_NUMBERS) else 1
            _expect(type(value) is int and least <= value < 2**63, f"{name} = {value!r} is not a positive integer")
        cuts = {name: _read_cuts(name, entry) for name, entry in data["tensors"].items()}
        kept = {name: {d: kept for d, (_, kept) in entry.items()} for name, entry in cuts.items()}
        sizes = {name: {d: size for d, (size, _) in entry.items()} for name, entry in cuts.items()}
        removed = data.get("removed", {})
        _expect(isinstance(removed, dict), "'removed' is not a mapping")
        for name, outputs in removed.items():
            _expect(
                type(outputs) is int and GONE <= outputs < 100, f"{name} removed = {outputs!r} is no number of outputs"
            )
        return cls(kept, sizes, dict(data["attributes"]), dict(removed))


def cut_tensor(tensor: Tensor, cuts: Cuts, *, like: Tensor | None = None) -> Tensor:
    """A new tensor with the kept positions, in the memory format of `like`, or in its own.

    >>> cut_tensor(torch.arange(6).reshape(2, 3), {1: torch.tensor([0, 2])}).tolist()
    [[0, 2], [3, 5]]
    """
    out, like = tensor, tensor if like is None else like
    for dim, kept in sorted(cuts.items()):  # rows first: they lie in one piece
        out = out.index_select(dim, kept.to(tensor.device))
    wanted = {4: torch.channels_last, 5: torch.channels_last_3d}.get(like.dim(), torch.contiguous_format)
    is_last = not like.is_contiguous() and like.is_contiguous(memory_format=wanted)
    return out.contiguous(memory_format=wanted if is_last else torch.contiguous_format)


def _expect(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(f"not a cut plan: {problem}")


def _read_cuts(name: str, entry: Any) -> dict[int, tuple[int, Tensor]]:
    known = isinstance(entry, dict) and all(isinstance(d, str) and d in DIMENSIONS for d in entry)
    _expect(known, f"{name} has dimensions other than 0 to {len(DIMENSIONS) - 1}")
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


def plan_cut(structures: Sequence[Structure], keeps: Sequence[Tensor]) -> CutPlan:
    """The plan that removes every unit u of `structures[i]` with `keeps[i][u]` False.

    A dimension that several structures cut (a concatenation) keeps what all of them keep.
    Raises ValueError when a mask is not a bool vector of its structure's units, or keeps nothing (a branch may go).
    """
    alive: dict[tuple[str, int], Tensor] = {}
    attributes: dict[str, int] = {}
    removed: dict[str, int] = {}
    lost: dict[str, int] = {}
    for structure, keep in zip(structures, checked(structures, keeps), strict=True):
        for m in structure.members if not keep.all() else ():
            mask = alive.setdefault((m.tensor, m.dim), torch.ones(m.size, dtype=torch.bool))
            mask[m.index[~keep].flatten()] = False
        if not keep.all():
            removed |= structure.removed
            attributes |= {name: amount * int(keep.sum()) for name, amount in structure.attributes.items()}
            for name, (amount, dense) in structure.sizes.items():
                if is_mean(name):
                    attributes[name] = dense
                    continue
                lost[name] = lost.get(name, 0) + amount * int((~keep).sum())
                both = (dense, dense - lost[name]) if is_shape(name) else (dense - lost[name], dense)
                attributes[name], attributes[partner(name)] = both
    kept: dict[str, dict[int, Tensor]] = {}
    sizes: dict[str, dict[int, int]] = {}
    for (name, dim), mask in alive.items():
        kept.setdefault(name, {})[dim] = mask.nonzero().flatten()
        sizes.setdefault(name, {})[dim] = len(mask)
    return CutPlan(kept, sizes, attributes, removed).without_removed()


def checked(structures: Sequence[Structure], keeps: Sequence[Tensor]) -> list[Tensor]:
    if len(structures) != len(keeps):
        raise ValueError(f"{len(keeps)} masks were given for {len(structures)} structures")
    for structure, keep in zip(structures, keeps, strict=True):
        if keep.dtype != torch.bool or keep.shape != (structure.units,):
            given = f"{keep.dtype} {tuple(keep.shape)}"
            raise ValueError(f"the mask of {structure.name!r} must be bool ({structure.units},), not {given}")
        if not keep.any() and structure.kind != "branches":
            raise ValueError(f"the mask of {structure.name!r} removes all {structure.units} units")
    return [keep.detach().cpu() for keep in keeps]
