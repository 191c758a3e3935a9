"""What the rules of a pruner settle between them.

No two rules prune the same target; the units of all rules are cut out together; weights of removed units count as
pruned single weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gsprune.pruner.part import Part
from gsprune.pruner.targets import Share, tensor_of
from gsprune.pruner.weights import WeightTarget
from gsprune.ranking.patterns import Tile
from gsprune.structures.shards import is_sharded_model
from gsprune.surgery.no_branch import inside

if TYPE_CHECKING:
    from gsprune.surgery.cut_plan import CutPlan
    from gsprune.surgery.shrink import Shrinker


def check_together(parts: Sequence[Part], shrink: str) -> None:
    """ValueError where two rules prune the same, or where one masks what another cuts away and that cannot be."""
    if parts and not _structures(parts) and shrink == "each_update":
        raise ValueError("shrink=each_update has no effect on single weights, which are masked: leave it at at_end")
    owners: dict[str, int] = {}
    cut = set(_cut_tensors(parts))
    for number, part in enumerate(parts):
        for target in part.targets:
            first = owners.setdefault(target.name, number)
            if first != number:
                raise ValueError(
                    f"rules[{first}] and rules[{number}] both prune {target.name}: "
                    f"set kinds, include or exclude so that one rule alone covers it"
                )
            if isinstance(target, WeightTarget) and target.name in cut:
                _check_on_top(number, target, shrink)


def _check_on_top(number: int, target: WeightTarget, shrink: str) -> None:
    if target.pattern != Tile(1, 1) or target.per_channel:
        raise ValueError(
            f"rules[{number}] prunes {target.name} by a pattern or per channel, and another cuts units out of it: "
            f"what is left would not line up; take pattern 1x1, or exclude it"
        )
    if shrink == "each_update":
        raise ValueError(
            f"rules[{number}] masks {target.name}, which shrink=each_update keeps cutting: set shrink=at_end, or "
            f"exclude it"
        )


def check_whole(model: nn.Module, parts: Sequence[Part], shrink: str, repair: object) -> None:
    """ValueError where units of a model that is spread over processes are to be cut out, or repaired, in training."""
    if not _structures(parts) or not is_sharded_model(model):
        return
    if shrink == "each_update":
        raise ValueError(
            "shrink=each_update cuts the model in place, which is cut over several processes: leave it at at_end, and "
            "make the smaller one with gsprune.cut_sharded"
        )
    if repair is not None:
        raise ValueError("repair refits the layers of a whole model, and this one is cut over several processes")


def make_shrinker(
    model: nn.Module, parts: Sequence[Part], *, example_input: Any, copies: Sequence[nn.Module]
) -> Shrinker | None:
    """One for the units of all rules, whose structures may lie in the same tensors; None without units, and for a model
    that is spread over processes."""
    structures = _structures(parts)
    if not structures or is_sharded_model(model):
        return None
    from gsprune.surgery.proof import draw
    from gsprune.surgery.shrink import Shrinker, check_shrink

    if sum(part.units for part in parts) > 1:  # the structures of each rule were proved without the others
        keeps = [draw(structure, 3) for structure in structures]
        check_shrink(model, structures, keeps, example_input=example_input)
    return Shrinker(model, structures, example_input=example_input, copies=copies)


def next_cut(parts: Sequence[Part]) -> CutPlan:
    """What a cut would leave of the dense model now."""
    from gsprune.surgery.cut_plan import plan_cut

    return plan_cut(_structures(parts), [target.keep for part in parts for target in part.unit_targets])


def left_of(plan: CutPlan, tensors: Iterable[str]) -> dict[str, Mapping[int, Tensor]]:
    """Tensor -> dimension -> positions that stay; of tensors in modules that are gone none."""
    nothing = {0: torch.zeros(0, dtype=torch.int64)}
    return {**plan.kept, **{name: nothing for name in tensors if inside(name, plan.removed)}}


def dense_sizes(model: nn.Module, parts: Sequence[Part]) -> dict[str, int]:
    """Entries of every matrix or kernel that loses units or weights, by its name."""
    weights = [target.name for part in parts for target in part.weight_targets]
    tensors = {name: tensor_of(model, name) for name in [*_cut_tensors(parts), *weights]}
    return {name: tensor.numel() for name, tensor in tensors.items() if tensor.dim() > 1}


def mixed_share(parts: Sequence[Part], sizes: Mapping[str, int]) -> Share:
    """Weights that are zero or cut out, of all in the tensors that lose any."""
    gone = {target.name: target.pruned for part in parts for target in part.weight_targets}
    plan = next_cut(parts)
    for name, size in sizes.items():
        if name in gone:
            continue
        left = 0 if inside(name, plan.removed) else size
        for dim, kept in plan.kept.get(name, {}).items():
            left = left // plan.sizes[name][dim] * len(kept)
        gone[name] = size - left
    return Share(sum(gone.values()), sum(sizes.values()), "weights")


def _structures(parts: Sequence[Part]) -> list[Any]:
    return [target.structure for part in parts for target in part.unit_targets]


def _cut_tensors(parts: Sequence[Part]) -> list[str]:
    return [m.tensor for s in _structures(parts) for m in (*s.producers, *s.consumers)]
