"""Budgets: the share of the dense network's cost that may stay, and the point of a unit ranking that reaches it.

A cost is the share of the dense network's own, in (0, 1].
"""

from __future__ import annotations

import difflib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from gsprune.cost.costs import first_names, make_cost
from gsprune.cost.latency_tables import MULTIPLE, WIDE
from gsprune.export.runtimes import EAGER, RUNTIMES, Measure, RuntimeName
from gsprune.ranking.selection import PRUNED, least_kept, select
from gsprune.structures.structure import Structure
from gsprune.surgery.no_branch import inside

CostKind = Literal["macs", "params", "latency"]
KINDS = {"macs": "MACs", "params": "parameters", "latency": "milliseconds"}
SETTINGS = ("runtime", "batch", "threads", "round_to", "uniform")
TOLERANCE = 0.02  # of the wanted cost: what is farther off is worth a warning
CLEAR = 0.005  # of the wanted cost: what is nearer is not made better
CORRECTIONS = 3  # how often a cut that was measured is made again
RECHECK = 0.05  # share of the dense cost by which the wanted one has to fall for another look at the clock
GUARD = 0.03  # share of the dense cost above the budget that stays until the clock has seen the last cut: it is final
Keeps = Sequence[Tensor]  # bool (units,) of each structure


class BudgetSettings(TypedDict, total=False):
    """The keys of a rule's `budget`: one kind of cost, and how it is measured and met."""

    macs: float | None
    params: float | None
    latency: float | None
    runtime: RuntimeName | None
    batch: int | None
    threads: int | None
    round_to: int | None
    uniform: bool | None


def read_budget(budget: BudgetSettings | None) -> tuple[str, float] | None:
    """The kind and the share of the one budget that `budget` names; None if it names none.

    >>> read_budget({"macs": 0.5, "latency": None}), read_budget({"macs": None})
    (('macs', 0.5), None)
    """
    if budget is None:
        return None
    if not isinstance(budget, Mapping):
        raise ValueError(f"budget is {budget!r}: it must map macs, params or latency to a share, as in {{macs: 0.5}}")
    for kind in budget:
        if kind not in BudgetSettings.__annotations__:
            near = difflib.get_close_matches(str(kind), BudgetSettings.__annotations__, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"budget names {kind!r}, which is no cost: {hint}There are {', '.join(KINDS)}, and the settings "
                f"{', '.join(SETTINGS)}"
            )
    given: dict[str, Any] = {kind: share for kind, share in budget.items() if kind in KINDS and share is not None}
    settings = {name: value for name, value in budget.items() if name in SETTINGS and value is not None}
    if not given:
        if settings:
            raise ValueError(f"budget sets {', '.join(settings)}, but no cost: set one of {', '.join(KINDS)}, too")
        return None
    if len(given) > 1:
        raise ValueError(
            f"budget sets {' and '.join(given)}: one network is cut by one budget, so set only one of them"
        )
    ((kind, share),) = given.items()
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise ValueError(
            f"budget.{kind} is {share!r}: it is the share of the dense network's {KINDS[kind]} that may stay, "
            f"above 0 and below 1"
        )
    _check_settings(kind, settings)
    return str(kind), float(share)


def _check_settings(kind: str, settings: Mapping[str, Any]) -> None:
    clocked = [name for name in settings if name not in ("round_to", "uniform")]
    if clocked and kind != "latency":
        raise ValueError(f"budget.{clocked[0]} says how a latency is measured: budget.{kind} has none, leave it out")
    runtime = settings.get("runtime", "eager")
    if runtime not in RUNTIMES:
        raise ValueError(f"budget.runtime is {runtime!r}: there are {', '.join(RUNTIMES)}")
    if not isinstance(uniform := settings.get("uniform", False), bool):
        raise ValueError(f"budget.uniform is {uniform!r}: it must be true or false")
    for name in ("batch", "threads", "round_to"):
        value = settings.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"budget.{name} is {value!r}: it must be a whole number, 1 or more")


def read_measure(budget: BudgetSettings | None) -> Measure:
    """How the cost that `budget` names is measured.

    >>> read_measure({"latency": 0.5, "runtime": "onnxruntime", "batch": 8})
    Measure(runtime='onnxruntime', batch=8, threads=None)
    """
    given = budget or {}
    return Measure(given.get("runtime") or "eager", given.get("batch"), given.get("threads"))


class FloorError(ValueError):
    """Even with all that can be removed gone, more than the budget stays."""


class Budget:
    """The share of one kind of cost that may stay of a dense network.

    Args:
        kind: "macs", "params" or "latency".
        share: of the dense network's, in (0, 1).
        model: the dense network; it stays as it is.
        structures: what can be removed from it.
        example_input: what MACs and milliseconds are those of.
        min_kept: units kept at least in each structure.
        min_share: share of its units kept at least in each structure, in [0, 1).
        measure: where and how milliseconds are measured.
        round_to: channels and neurons of a structure that stay are a multiple of it, or all; None: under a latency
            budget of 8, or of the 16 that the runtime computes at once where a clock says so and there are 64 or more;
            else of 1.
        uniform: structures of the same kind and size keep the same number of units, as in layers of transformers that
            one number of a `config.json` describes. Their n-th lowest scores are summed, and go together.
        together: numbers of the structures that are ranked together, each in one of these lists, which all lose about
            the same share of their units; None: all of them.

    Raises:
        FloorError: even with all that can be removed gone, more than the share stays.

    >>> from gsprune.discovery.find import find_structures
    >>> net, x = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 6)), torch.ones(1, 4)
    >>> budget = Budget("macs", 0.3, net, find_structures(net, x).structures, x)
    >>> [keep.sum().item() for keep in budget.cut([torch.arange(10.0)], 0.3)]
    [3]
    """

    def __init__(
        self,
        kind: str,
        share: float,
        model: nn.Module,
        structures: Sequence[Structure],
        example_input: Any,
        *,
        min_kept: int = 1,
        min_share: float = 0.0,
        measure: Measure = EAGER,
        round_to: int | None = None,
        uniform: bool = False,
        together: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.kind, self.share, self.structures = kind, share, structures
        self.measure = measure
        units = [0 if structure.kind == "branches" else structure.units for structure in structures]  # which may all go
        self._least = [least_kept(count, min_kept, min_share) for count in units]
        self._by_share = self._least != [least_kept(count, min_kept) for count in units]
        self._floor_text = floor_text(min_kept, min_share if self._by_share else 0.0)
        self._together = [range(len(structures))] if together is None else together
        self._alike = _alike(structures) if uniform else [[i] for i in range(len(structures))]
        self._checked = 1.0  # the wanted share at the last look at the clock, and what was found
        self._reached: float | None = None
        self._prices: list[float] = []  # once they were asked for
        self._evens: dict[tuple[float, float], list[Tensor]] = {}
        self._near = _near(structures, first_names(model))
        self._cost = make_cost(kind, model, structures, example_input, measure)
        self._round_to = round_to
        self._settled(self.even, share)
        self._cost.forget()
        self._check_floor()

    def __str__(self) -> str:
        """As in "50 % of the MACs"."""
        return f"{_percent(self.share)} of the {KINDS[self.kind]}{self.measure}"

    def cut(self, scores: Sequence[Tensor], wanted: float, *, by_cost: bool = False) -> list[Tensor]:
        """What stays of a ranking of the structures so that the cost is `wanted`, or a little more on the way.

        The lowest scores go, as many as needed, at least those that are -inf already. What is gone stays gone, so only
        the cut to the budget itself may fall below what is wanted: it is the nearest, and where the next unit of the
        ranking is too large a step, those after it go that still fit. Each structure's count is then rounded to a
        multiple of `round_to`. Under a latency budget the cut network is now and then timed beside the dense one and,
        where it misses, the table corrected and the ranking cut again.

        Args:
            scores: of each structure's units, (units,).
            wanted: share of the dense network's cost, in (0, 1].
            by_cost: rank by the score divided by what a unit costs (`prices`), for scores that are 0 or more and
                estimate the change of the loss.

        Returns:
            bool (units,) of each structure, True = kept.
        """
        device, scores = scores[0].device, [score.cpu() for score in scores]
        if by_cost:
            self._prices = self._prices or self.prices()
            scores = self._by_cost(scores, wanted)
        is_final = self._is_final(wanted)
        if not self._cost.clocked:
            keeps = self._ranked(scores, wanted)
        elif self._checked - wanted >= RECHECK or (is_final and not self._is_final(self._checked)):
            self._checked = wanted
            keeps, self._reached = self._settled(lambda share: self._ranked(scores, share), wanted)
        else:
            keeps = self._ranked(scores, wanted if is_final else max(wanted, self.share + GUARD))
        return [keep.to(device) for keep in keeps]

    @property
    def reached(self) -> float | None:
        """The share that a clock has last found of a latency budget; None of a budget that is counted."""
        return self._reached

    def prices(self) -> list[float]:
        """What a unit of each structure costs of the dense network, as a share of its cost: the mean over its units.

        What saves nothing is priced at a thousandth of the mean price: it goes last.

        >>> from gsprune.discovery.find import find_structures
        >>> net, x = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 6)), torch.ones(1, 4)
        >>> budget = Budget("macs", 0.3, net, find_structures(net, x).structures, x)
        >>> [round(price, 9) for price in budget.prices()]  # of 100 MACs a unit has 4 + 6
        [0.1]
        """
        whole, floors = [torch.ones(s.units, dtype=torch.bool) for s in self.structures], self._floor()
        saved = [1 - self._cost([*whole[:i], floor, *whole[i + 1 :]]) for i, floor in enumerate(floors)]
        gone = [max(1, int((~floor).sum())) for floor in floors]
        prices = [max(0.0, share) / count for share, count in zip(saved, gone, strict=True)]
        least = 1e-3 * sum(prices) / len(prices)
        return [max(price, least) or 1.0 for price in prices]

    def _by_cost(self, scores: Sequence[Tensor], wanted: float) -> list[Tensor]:
        """Scores divided by prices; those of branches by what they cost with the units inside, or once these have gone.

        The price of a whole branch promises a saving that the units inside it, where they go too, have made already;
        where branches go instead of them, it is right. Of both rankings it is the one that loses less score.
        """
        shares = [score / price for score, price in zip(scores, self._prices, strict=True)]
        branches = [i for i, structure in enumerate(self.structures) if structure.kind == "branches"]
        if len(branches) in (0, len(scores)):
            return shares
        kept = [*shares]
        for i in branches:
            kept[i] = torch.where(scores[i] == PRUNED, scores[i], math.inf)
        least, rankings = 1e-3 * min(self._prices), []
        for keeps in (self._ranked(kept, wanted), [score != PRUNED for score in scores]):
            cost, ranking = self._cost(keeps), [*shares]
            for i in branches:
                saved = cost - self._cost([*keeps[:i], torch.zeros_like(keeps[i]), *keeps[i + 1 :]])
                ranking[i] = scores[i] / max(saved, least)
            rankings.append(ranking)
        return min(rankings, key=lambda ranking: self._lost(scores, self._ranked(ranking, wanted)))

    def _lost(self, scores: Sequence[Tensor], keeps: Keeps) -> float:
        """The scores of the units that go, but for those that go with a branch, whose own score counts."""
        removed: dict[str, int] = {}
        for structure, keep in zip(self.structures, keeps, strict=True):
            removed |= structure.removed if not keep.any() else {}
        return sum(
            float(score[~keep & (score != PRUNED)].double().sum())
            for structure, score, keep in zip(self.structures, scores, keeps, strict=True)
            if structure.removed or not all(inside(member.tensor, removed) for member in structure.members)
        )

    def even(self, wanted: float | None = None) -> list[Tensor]:
        """The first units of each structure, about the same share of all: what stays if nobody knows the scores."""
        total = sum(structure.units for structure in self.structures)
        goal = self.share if wanted is None else wanted
        known = (goal, self._cost.factor)
        if known in self._evens:
            return [*self._evens[known]]

        def keeps(gone: int) -> list[Tensor]:  # structures of equal size take turns, so that the steps are small
            turns = {i: (turn + 0.5) / len(self._alike) for turn, alike in enumerate(self._alike) for i in alike}
            lost = (math.floor(gone / total * s.units + turns[i]) for i, s in enumerate(self.structures))
            return [self._first(i, self.structures[i].units - n) for i, n in enumerate(lost)]

        self._evens = {known: self._around(keeps, 0, total, goal)[1]}
        return [*self._evens[known]]

    def missed(self, keeps: Keeps) -> str | None:
        """A sentence if the final cut is farther than 2 % from the budget."""
        reached = self._reached if self._reached is not None else self._cost(keeps)
        if abs(reached - self.share) <= TOLERANCE * self.share:
            return None
        unsteady = "the machine is too busy to time it, " if self._cost.clocked else ""
        return (
            f"{_percent(reached)} of the network's {KINDS[self.kind]} stay instead of {_percent(self.share)}: "
            f"{unsteady}its units are too coarse, or {self._floor_text} allows no more"
        )

    def bounds(self) -> list[tuple[int, int]]:
        """(least, most) units that can stay of each structure when the budget is met within 2 %."""
        floor = self._floor()
        return [self._bounds(i, floor, self._cost(floor)) for i in range(len(self.structures))]

    def state_dict(self) -> dict[str, Any]:
        """What was measured; empty for a budget that is counted."""
        if not self._cost.clocked:
            return {}
        return {"checked": self._checked, "reached": self._reached, "cost": self._cost.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what another process has measured."""
        self._cost.load_state_dict(state["cost"])
        self._checked, self._reached, self._prices = state["checked"], state["reached"], []

    # ---- inside

    def _ranked(self, scores: Sequence[Tensor], wanted: float) -> list[Tensor]:
        rows = self._pooled([score.reshape(1, -1) for score in scores])
        gone = sum(int((row == PRUNED).sum()) for row in rows)

        def keeps(k: int) -> list[Tensor]:
            return self._rounded(rows, self._selected(rows, k))

        dearer, best = self._around(keeps, gone, sum(row.numel() for row in rows), wanted)
        if not self._is_final(wanted):
            return dearer
        return best if self._off(best, wanted) <= CLEAR * wanted else self._refined(rows, dearer, best, wanted)

    def _selected(self, rows: Sequence[Tensor], k: int) -> list[Tensor]:
        """The k lowest scores go, of several rankings the same share of each; what is gone already stays gone."""
        found, total = [*rows], sum(row.numel() for row in rows)
        for turn, ranking in enumerate(self._together):
            part = [rows[i] for i in ranking]
            gone, units = sum(int((row == PRUNED).sum()) for row in part), sum(row.numel() for row in part)
            lost = math.floor(k * units / total + (turn + 0.5) / len(self._together))  # rankings of one size take turns
            keeps = select(part, min(units, max(gone, lost)), min_kept=[self._least[i] for i in ranking])
            for i, keep in zip(ranking, keeps, strict=True):
                found[i] = keep
        return found

    def _is_final(self, wanted: float) -> bool:
        return wanted <= self.share + 1e-9

    def _around(
        self, keeps: Callable[[int], list[Tensor]], low: int, high: int, wanted: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """`keeps(k)`, whose cost does not grow with k, with the last cost above `wanted`, and with the nearest."""
        while high - low > 1:
            middle = (low + high) // 2
            if self._cost(keeps(middle)) <= wanted:
                high = middle
            else:
                low = middle
        dearer = keeps(low)
        if self._cost(dearer) <= wanted:  # what is gone already is enough
            return dearer, dearer
        return dearer, min((dearer, keeps(high)), key=lambda found: self._off(found, wanted))

    def _off(self, keeps: Keeps, wanted: float) -> float:
        return round(abs(self._cost(keeps) - wanted), 12)  # two that are equally near can differ in the last bit

    def _refined(self, rows: Sequence[Tensor], keeps: list[Tensor], best: list[Tensor], wanted: float) -> list[Tensor]:
        """Where the next unit of the ranking is too large a step, those after it that still fit, lowest first.

        Returns:
            The nearest of all cuts on the way, `best` included.
        """
        before = None
        while before is not keeps:
            before = keeps
            for _, alike, width in sorted(self._steps(rows, keeps)):
                fewer = [*keeps]
                for i in alike:
                    fewer[i] = _best(rows[i], width)
                best = min((best, fewer), key=lambda found: self._off(found, wanted))
                if self._cost(fewer) >= wanted * (1 - CLEAR):
                    keeps = fewer
        return best

    def _steps(self, rows: Sequence[Tensor], keeps: Keeps) -> Iterator[tuple[float, Sequence[int], int]]:
        """(the best score lost, structures, their next smaller width)."""
        for alike in self._alike:
            count = int(keeps[alike[0]].sum())
            smaller = [width for width in self._widths(alike[0], count) if width < count]
            if smaller:
                yield float(rows[alike[0]].flatten().topk(smaller[-1] + 1).values[-1]), alike, smaller[-1]

    def _settled(self, search: Callable[[float], list[Tensor]], wanted: float) -> tuple[list[Tensor], float]:
        """A cut and its true cost: compared with the truth, and made again where the estimate is off.

        Of all cuts tried it is the one nearest to `wanted`.
        """
        keeps = search(wanted)
        tries: list[tuple[list[Tensor], float]] = []
        while True:
            truth = self._cost.truth(keeps)
            tries.append((keeps, truth))
            is_right = abs(truth - wanted) <= CLEAR * wanted or abs(self._cost(keeps) - truth) <= CLEAR * wanted
            if is_right or len(tries) > CORRECTIONS or not self._cost.correct(keeps, truth):
                break
            before, keeps = keeps, search(wanted)
            if all(map(torch.equal, before, keeps)):
                break
        return min(tries, key=lambda tried: abs(tried[1] - wanted))

    def _rounded(self, rows: Sequence[Tensor], keeps: Keeps) -> list[Tensor]:
        """The best of each structure, as many as its device likes, and as many as of those that are alike."""
        found = [keep.reshape(-1) for keep in keeps]
        for alike in self._alike:
            count = sum(int(found[i].sum()) for i in alike) // len(alike)
            alive = min(int((rows[i] != PRUNED).sum()) for i in alike)
            width = _nearest_to(count, self._widths(alike[0], alive))
            for i in alike:
                if int(found[i].sum()) != width:
                    found[i] = _best(rows[i], width)
        return found

    def _pooled(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Scores by which structures that are alike lose their lowest units together."""
        found = [*rows]
        for alike in self._alike:
            if len(alike) == 1:
                continue
            ordered = [rows[i].flatten().sort(stable=True, descending=True) for i in alike]
            summed = torch.stack([one.values for one in ordered]).sum(0)
            for i, one in zip(alike, ordered, strict=True):
                found[i] = torch.empty_like(summed).scatter(0, one.indices, summed).reshape(1, -1)
        return found

    def _widths(self, i: int, alive: int) -> Sequence[int]:
        """The counts that structure i can have, rising: multiples of the step, or all there is."""
        structure, least, step = self.structures[i], self._least[i], self._step(i)
        if step == 1 or structure.kind in ("heads", "branches"):
            return range(min(least, alive), alive + 1)
        multiples = range(step * math.ceil(least / step), min(alive, structure.units - 1) + 1, step)
        return [*multiples, *([] if alive in multiples else [alive])]

    def _step(self, i: int) -> int:
        """What the count of structure i is a multiple of: where the device's own blocks are few, of half of them."""
        if self._round_to is not None:
            return self._round_to
        multiple = self._cost.multiple
        return multiple if self.structures[i].units >= WIDE * multiple else min(multiple, MULTIPLE)

    def _first(self, i: int, count: int) -> Tensor:
        units = self.structures[i].units
        return torch.arange(units) < _nearest_to(count, self._widths(i, units))

    def _floor(self) -> list[Tensor]:
        return [self._first(i, least) for i, least in enumerate(self._least)]

    def _check_floor(self) -> None:
        keeps, most = self._floor(), self.share * (1 + TOLERANCE)
        floor = self._cost(keeps)
        if floor > most and self._cost.clocked:
            # a table says little of so small a network: the clock has to say it too
            floor = min(floor, self._cost.truth(keeps))
        if floor > most:
            raise FloorError(
                f"budget asks for {self}, but {_percent(floor)} stay with everything gone that can be removed "
                f"({self._floor_text} in each of {len(self.structures)} structures): ask for a larger share"
                + (" or a smaller min_share" if self._by_share else "")
            )

    def _bounds(self, i: int, floor: Keeps, least: float) -> tuple[int, int]:
        """The fewest units of structure i while nothing else goes, and the most while everything else does.

        `least` is the cost of the floor. What structure i changes of it does not hang on structures in other tensors,
        which stay whole here: that is the same, and quick in a network of many.
        """
        whole = [torch.ones(s.units, dtype=torch.bool) for s in self.structures]
        near = [floor[j] if j in self._near[i] else whole[j] for j in range(len(whole))]
        widths, units = self._widths(i, self.structures[i].units), torch.arange(self.structures[i].units)

        def cost(others: Sequence[Tensor], width: int) -> float:
            found = self._cost([*others[:i], units < width, *others[i + 1 :]])
            return found if others is whole else round(least + found - start, 12)

        start = self._cost(near)
        enough, most = self.share * (1 - TOLERANCE), self.share * (1 + TOLERANCE)
        first, last = 0, len(widths) - 1
        if cost(whole, widths[first]) < enough:  # the ends come first: most structures reach them
            first = bisect_left(widths, enough, lo=1, hi=last, key=lambda width: cost(whole, width))
        if cost(near, widths[last]) > most:
            last = bisect_right(widths, most, lo=1, hi=last, key=lambda width: cost(near, width)) - 1
        return widths[first], widths[last]


def _alike(structures: Sequence[Structure]) -> list[list[int]]:
    """Numbers of the structures, those of one kind and size together; a branch goes by itself."""
    found: dict[Any, list[int]] = {}
    for i, structure in enumerate(structures):
        key = (structure.kind, structure.units) if structure.kind != "branches" else i
        found.setdefault(key, []).append(i)
    return [*found.values()]


def _best(row: Tensor, width: int) -> Tensor:
    """The `width` highest scores of a structure."""
    return select([row], row.numel() - width)[0].reshape(-1)


def _near(structures: Sequence[Structure], first: Mapping[str, str]) -> list[set[int]]:
    """Of each structure those that lie in a tensor with it, itself too; where modules are removed all of them."""
    if any(structure.removed for structure in structures):
        return [set(range(len(structures)))] * len(structures)
    tensors = [{first.get(m.tensor, m.tensor) for m in structure.members} for structure in structures]
    inside: dict[str, set[int]] = {}
    for i, names in enumerate(tensors):
        for name in names:
            inside.setdefault(name, set()).add(i)
    return [{i}.union(*(inside[name] for name in names)) for i, names in enumerate(tensors)]


def _nearest_to(count: int, widths: Sequence[int]) -> int:
    """Of two equally near the larger."""
    at = bisect_left(widths, count)
    near = widths[max(0, at - 1) : at + 1]
    return min(near, key=lambda width: (abs(width - count), -width))


def floor_text(min_kept: int, min_share: float) -> str:
    """What stays at least in each tensor or structure, for messages.

    >>> floor_text(1, 0.0), floor_text(2, 0.1)
    ('min_kept=1', 'min_kept=2 and min_share=0.1')
    """
    return f"min_kept={min_kept}" + (f" and min_share={min_share:g}" if min_share else "")


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
