import itertools

import torch

from gsprune.cost.lengths import Lengths
from gsprune.structures.structure import Member, Structure
from gsprune.surgery.cut_plan import plan_cut


def member(tensor: str, dim: int, index: list[list[int]], size: int) -> Member:
    return Member(tensor, dim, torch.tensor(index), size)


def structure(name: str, *members: Member, kind: str = "channels", removed: dict[str, int] | None = None) -> Structure:
    units = len(members[0].index) if members else 1
    return Structure(name, kind, units, members, (), (), (), {}, removed=removed or {})


STRUCTURES = [
    structure("a", member("a.weight", 0, [[0], [1], [2]], 3), member("b.weight", 1, [[0, 1], [2, 3], [4, 5]], 8)),
    structure("b", member("b.weight", 0, [[0], [1]], 2), member("b.weight", 1, [[6], [7]], 8)),  # a concatenation
    structure("heads", member("qkv", 0, [[0, 1], [2, 3]], 12), member("qkv", 0, [[4, 5], [6, 7]], 12)),
    structure("twice", member("q", 0, [[0], [1]], 4), member("q", 0, [[1], [2]], 4)),  # positions of two units
    structure("branch", kind="branches", removed={"b": 1}),
]


def lengths_of_plan(keeps: list[torch.Tensor]) -> dict[str, dict[int, tuple[int, int]]]:
    plan = plan_cut(STRUCTURES, keeps)
    return {name: {d: (len(k), plan.sizes[name][d]) for d, k in cuts.items()} for name, cuts in plan.kept.items()}


def test_lengths_are_those_of_the_cut_plan_for_every_choice() -> None:
    count = Lengths(STRUCTURES)
    choices = [[c for c in choices_of(s.units) if c.any() or s.kind == "branches"] for s in STRUCTURES]
    seen = 0
    for keeps in map(list, itertools.product(*choices)):
        left = count(keeps)
        assert left.lengths == lengths_of_plan(keeps)
        assert dict(left.removed) == plan_cut(STRUCTURES, keeps).removed
        seen += 1
    assert seen == 7 * 3 * 3 * 3 * 2


def choices_of(units: int) -> list[torch.Tensor]:
    return [torch.tensor(kept) for kept in itertools.product([False, True], repeat=units)]
