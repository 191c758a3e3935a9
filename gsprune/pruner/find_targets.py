"""Which units or single weights of a model are targets, by kind, by name and by layout."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from gsprune.pruner.targets import check_values, tensor_of
from gsprune.pruner.units import UnitTarget, UnitTargets
from gsprune.pruner.weights import WeightTarget, WeightTargets
from gsprune.ranking.patterns import Pattern, Tile
from gsprune.ranking.selection import PRUNED
from gsprune.structures.matrices import Matrix, find_matrices, heaviest_first
from gsprune.structures.shards import is_sharded, is_sharded_model
from gsprune.structures.structure import INNER
from gsprune.text.names import choose, lines_by_reason

if TYPE_CHECKING:
    from gsprune.structures.structure import Found, Structure


def unit_targets(
    model: nn.Module,
    example_input: Any,
    *,
    include: Sequence[str],
    exclude: Sequence[str],
    kinds: Sequence[str] | None,
    counts: Mapping[str, int],
    found: Found | None = None,
) -> tuple[UnitTargets, Mapping[str, str], list[Structure]]:
    """A target for every structure of the kinds and names; what cannot be pruned -> why; what was not chosen.

    Args:
        counts: units to keep of a kind; these are the kinds then.
        found: what `find_structures` gave for all names, and `with_branches` if `kinds` asks for these, where known.

    Raises:
        ValueError: the model has no such units, or is one that units cannot be cut out of.
    """
    from gsprune.discovery.find import only

    _refuse_parameters(model)
    check_values(parameter.device for parameter in model.parameters())
    if example_input is None:
        raise ValueError("pruning units needs example_input, a batch to trace the model with")
    if found is None and "branches" in (kinds or ()):
        found = _with_branches(model, example_input)
    if found is None:
        offered = found_in(model, example_input, include=include, exclude=exclude)
    else:
        offered = only(found, include, exclude)
    structures, skipped, name = offered.structures, offered.skipped, type(model).__name__
    if not structures and not skipped:
        raise ValueError(f"{name} has no linear or convolution layers whose units could be pruned")
    if not structures and not offered.left_out:
        reasons = "; ".join(lines_by_reason(heaviest_first(model, skipped))[:3])
        raise ValueError(f"no units of {name} can be pruned ({reasons})")
    here = {structure.kind for structure in structures}
    usual = [kind for kind in INNER if kind in here]
    for setting, named in (("keep", counts), ("kinds", kinds or ())):
        for kind in named:
            if kind not in here:
                have = ", ".join(sorted(here)) or "no units"
                raise ValueError(f"{setting} names {kind!r}, but the model has {have}")
    wanted = counts or kinds or usual
    if not wanted and here:
        raise ValueError(f"the model has {' and '.join(sorted(here))} units alone, which kinds has to name")
    chosen = [structure for structure in structures if structure.kind in wanted]
    left_out = [*offered.left_out, *(structure for structure in structures if structure.kind not in wanted)]
    return UnitTargets([UnitTarget(_shown(structure, model), model) for structure in chosen]), skipped, left_out


def _shown(structure: Structure, model: nn.Module) -> Structure:
    """The structure with gates that get gradients: of frozen norms they show nothing."""
    if all(tensor_of(model, m.tensor).requires_grad for m in structure.gates):
        return structure
    return replace(structure, scales=False)


def found_in(
    model: nn.Module, example_input: Any, *, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> Found:
    """What of a model can be removed. One that is spread over processes is followed without values, and so not proven:
    `gsprune.cut_sharded` compares what it cuts."""
    from gsprune.discovery.find import find_structures

    if not is_sharded_model(model):
        return find_structures(model, example_input, include=include, exclude=exclude)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return find_structures(*traceable(model, example_input), include=include, exclude=exclude)


def _with_branches(model: nn.Module, example_input: Any) -> Found:
    from gsprune.discovery.branches import with_branches
    from gsprune.discovery.find import find_structures

    if is_sharded_model(model):
        raise ValueError("kinds names branches, which are found by values, and no process has those of the whole model")
    return with_branches(find_structures(model, example_input), model, example_input)


def traceable(model: nn.Module, example_input: Any) -> tuple[nn.Module, Any]:
    """The model and its example, of one that is spread over processes both in one piece on the meta device."""
    if not is_sharded_model(model):
        return model, example_input
    from gsprune.structures.one_piece import in_one_piece, on_meta

    return in_one_piece(model, meta=True), on_meta(example_input)


def _refuse_parameters(model: nn.Module) -> None:
    for name, tensor in model.named_parameters():
        if tensor.is_complex():
            raise ValueError(f"{name} is complex, and units are found and cut in networks of real weights alone")


def weight_targets(
    model: nn.Module, pattern: Pattern, *, include: Sequence[str], exclude: Sequence[str], per_channel: bool
) -> tuple[WeightTargets, dict[str, str]]:
    """A target for every matrix weight that the name patterns choose, and what is left out unasked -> why.

    Raises:
        ValueError: a name pattern matches nothing, two chosen names are one tensor, or a tile does not fit.
    """
    is_plain = pattern == Tile(1, 1) and not per_channel
    found = {matrix.name: matrix if is_plain else _by_layout(matrix) for matrix in find_matrices(model)}
    offered = {name: matrix for name, matrix in found.items() if matrix.reason is None or matrix.by_name}
    reasons = {name: matrix.reason for name, matrix in found.items() if matrix.reason is not None}
    aliases = {name: matrix.aliases for name, matrix in offered.items()}
    why = {alias: matrix.reason for matrix in found.values() for alias in matrix.aliases if alias and matrix.reason}
    chosen = [offered[name] for name in choose(aliases, include, exclude, skipped=why, by_name=reasons.keys())]
    if not is_plain:
        _refuse_transposed(chosen)
    _refuse_twice(chosen)
    pruned = {id(matrix.weight): matrix.name for matrix in chosen}
    skipped = {
        name: reason
        if id(found[name].weight) not in pruned
        else f"it is one tensor with {pruned[id(found[name].weight)]}"
        for name, reason in reasons.items()
        if name not in pruned.values()
    }
    return _weight_targets(chosen, pattern, per_channel=per_channel), skipped


def _weight_targets(chosen: Sequence[Matrix], pattern: Pattern, *, per_channel: bool) -> WeightTargets:
    pieces = [matrix.name for matrix in chosen if is_sharded(matrix.weight)]
    if not pieces:
        return WeightTargets(
            [
                WeightTarget(
                    m.name,
                    m.weight,
                    pattern,
                    per_channel=per_channel,
                    inputs_first=m.order == "columns",
                    value=m.value,
                )
                for m in chosen
            ]
        )
    from gsprune.pruner.sharded import ShardedWeight, ShardedWeights  # slow to import

    for matrix in chosen:
        if not is_sharded(matrix.weight):
            raise ValueError(f"{pieces[0]} is cut over several processes and {matrix.name} is not: exclude one of them")
    return ShardedWeights([ShardedWeight(m.name, m.weight, pattern, per_channel=per_channel) for m in chosen])


def _by_layout(matrix: Matrix) -> Matrix:
    """For patterns and `per_channel`, which have to know the axis of the inputs."""
    if matrix.order != "unknown" or (matrix.reason is not None and not matrix.by_name):
        return matrix
    reason = matrix.reason or "which of its axes are inputs is not known, so that it takes pattern 1x1 only"
    return replace(matrix, reason=reason, by_name=False)


def _refuse_transposed(matrices: Iterable[Matrix]) -> None:
    for matrix in matrices:
        if matrix.order == "transposed":
            raise ValueError(
                f"{matrix.name} has its inputs as rows (a transposed convolution): it takes pattern 1x1 only"
            )


def _refuse_twice(matrices: Iterable[Matrix]) -> None:
    seen: dict[int, str] = {}
    for matrix in matrices:
        first = seen.setdefault(id(matrix.weight), matrix.name)
        if first != matrix.name:
            raise ValueError(f"{first} and {matrix.name} are one tensor and would be pruned twice: exclude one of them")


assert math.isinf(PRUNED)  # a pruned score has to survive decay * score + change
