"""Units under a budget chosen as a multiple-choice knapsack, against the ranking by score and cost.

    python benchmarks/knapsack.py --seeds 0 1            # the networks and the data of rankings.py

Dynamic programming chooses a width of every structure. A width keeps the highest scores (the precedence of HALP); the
others are its loss. It costs what the network costs with it, all other structures as they were in the round before.
Costs of layers that lie in a row are products, so eight rounds are made, and the room in the knapsack is corrected
until the network costs what is wanted. The cut of least loss is taken, the ranking's own among them. Scores: Fisher.

Source: Shen et al., "Structural pruning via latency-saliency knapsack", 2022 (HALP).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import warnings
from collections.abc import Sequence

import rankings
import torch
from torch import Tensor, nn

from gsprune.cost.budgets import Budget
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.cut_plan import plan_cut

GRID = 2000  # steps of the cost
ROUNDS = 8


def choose(budget: Budget, scores: Sequence[Tensor], wanted: float) -> list[Tensor]:
    """The masks of the best cut tried whose cost is at most `wanted` of the dense network's (or 0.5 % of it more)."""
    rows = [score.reshape(1, -1).double() for score in scores]
    order = [row.flatten().argsort(descending=True, stable=True) for row in rows]
    widths = [[*budget._widths(i, row.numel())] for i, row in enumerate(rows)]
    # the lowest scores go first: lost[i][w] is what structure i loses with w of its units
    lost = [torch.cat([row.flatten().sort().values.cumsum(0).flip(0), torch.zeros(1)]).double() for row in rows]
    greedy = budget.cut(scores, wanted, by_cost=True)
    now = [int(keep.sum()) for keep in greedy]
    best, least = now, _loss(lost, now)
    room = wanted
    for _ in range(ROUNDS):
        now = _solved(budget, order, widths, lost, now, room)
        cost = budget._cost(_masks(order, now))
        if cost <= wanted * 1.005 and (loss := _loss(lost, now)) < least:
            best, least = now, loss
        room += 0.7 * (wanted - cost)
    return _masks(order, best)


def _loss(lost: Sequence[Tensor], counts: Sequence[int]) -> float:
    return sum(float(part[count]) for part, count in zip(lost, counts, strict=True))


def _masks(order: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    return [
        torch.zeros(len(o), dtype=torch.bool).index_fill_(0, o[:n], True) for o, n in zip(order, counts, strict=True)
    ]


def _solved(
    budget: Budget,
    order: Sequence[Tensor],
    widths: Sequence[Sequence[int]],
    lost: Sequence[Tensor],
    now: Sequence[int],
    room: float,
) -> list[int]:
    """Widths of the least loss whose costs add up to the room."""
    masks = _masks(order, now)
    start = budget._cost(masks)
    costs = []
    for i, mine in enumerate(widths):
        floor = budget._cost([*masks[:i], _masks([order[i]], [mine[0]])[0], *masks[i + 1 :]])
        costs.append(
            [budget._cost([*masks[:i], _masks([order[i]], [w])[0], *masks[i + 1 :]]) - floor for w in mine] + [floor]
        )
    base = start + sum(own[-1] - start for own in costs)  # every structure at its floor
    step = max(room - base, 1e-9) / GRID
    table = torch.full((GRID + 1,), torch.inf, dtype=torch.float64)
    table[0] = 0.0
    picks = []
    for own, mine, part in zip(costs, widths, lost, strict=True):
        found = torch.full_like(table, torch.inf)
        pick = torch.zeros(GRID + 1, dtype=torch.int64)
        for number, width in enumerate(mine):
            shift = round(own[number] / step)
            if not 0 <= shift <= GRID:
                continue
            moved = torch.full_like(table, torch.inf)
            moved[shift:] = table[: GRID + 1 - shift] + part[width]
            better = moved < found
            found[better], pick[better] = moved[better], number
        picks.append((pick, own))
        table = found
    at = int(table.argmin())
    chosen = [0] * len(widths)
    for i in reversed(range(len(widths))):
        pick, own = picks[i]
        number = int(pick[at])
        chosen[i] = widths[i][number]
        at -= round(own[number] / step)
    return chosen


def compared(name: str, seed: int, data: rankings.Data) -> list[tuple[str, float, float, float]]:
    """(how, share of the scores lost, accuracy at once, after an epoch) of each share of the MACs that can go."""
    model: nn.Module = rankings.dense(name, seed, data)
    structures = rankings.inner(model)
    scores = rankings.scores(model, rankings.CRITERIA["fisher"], data, seed)
    total, found = sum(float(score.sum()) for score in scores), []
    for share in rankings.SHARES:
        left = 1 - (1 - share) * rankings.reach(model, structures)
        budget = Budget("macs", left, model, structures, rankings.EXAMPLE, min_share=0.1)
        for how, keeps in (
            ("ranking", budget.cut(scores, left, by_cost=True)),
            ("knapsack", choose(budget, scores, left)),
        ):
            small = copy.deepcopy(model)
            apply_cut(small, plan_cut(structures, keeps))
            lost = sum(float(score[~keep].sum()) for score, keep in zip(scores, keeps, strict=True)) / total
            before = data.accuracy(small)
            data.train(small, epochs=1, lr=2e-3, seed=seed)
            found.append((how, lost, before, data.accuracy(small)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1))
    parser.add_argument("--networks", nargs="+", choices=[*rankings.NETWORKS], default=[*rankings.NETWORKS])
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # budgets missed by more than 2 % by coarse units
    data = rankings.Data()
    print("| network | choice | scores lost, % | accuracy at once / after an epoch |\n|---|---|---:|---:|", flush=True)
    rows: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for name, seed in itertools.product(args.networks, args.seeds):
        for how, *figures in compared(name, seed, data):
            rows.setdefault(name, {}).setdefault(how, []).append((figures[0], figures[1], figures[2]))
        if seed == args.seeds[-1]:
            for how, values in rows[name].items():
                lost, before, after = (statistics.mean(column) for column in zip(*values, strict=True))
                print(f"| {name} | {how} | {100 * lost:.1f} | {before:.1f} / {after:.1f} |", flush=True)


if __name__ == "__main__":
    main()
