"""How much each structure can lose: the network cut in one structure at a time, repaired and measured."""

from __future__ import annotations

import csv
import glob
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from gsprune.cost.budgets import BudgetSettings, read_budget, read_measure
from gsprune.cost.costs import make_cost
from gsprune.criteria import Criterion
from gsprune.cutting.calibration import Calibration, Loss
from gsprune.cutting.cut import Cutter, Repair, check_repair, one_rule, shown
from gsprune.cutting.how_much import Evaluate, values_of
from gsprune.cutting.progress import Report
from gsprune.export.runtimes import Measure
from gsprune.extras import need
from gsprune.files.disk import write_atomic
from gsprune.pruner.rule import Rule
from gsprune.ranking.selection import pruned_count
from gsprune.structures.structure import Structure
from gsprune.text.display import cell, html_table, percent, text_table

__all__ = ["Point", "Sensitivity", "sensitivity"]


@dataclass(frozen=True)
class Point:
    """A network that was cut in one structure.

    structure, kind   what was cut, and of what
    units, kept       how many there are, and stay
    share    of the units that went
    params   share of the network's parameters that stays
    macs     the same of its MACs; None where they cannot be counted
    value    what was measured
    drop     by how much it is worse than the dense network: points of 100, or the increase of the loss
    """

    structure: str
    kind: str
    units: int
    kept: int
    share: float
    params: float
    macs: float | None
    value: float
    drop: float


@dataclass(frozen=True)
class Sensitivity:
    """What `sensitivity` found.

    metric   what was measured: "value" of `evaluate`, in [0, 1], or "loss"
    dense    that of the dense network
    points   structure by structure, share by share
    """

    metric: str
    dense: float
    points: tuple[Point, ...]
    _criterion: Criterion = field(repr=False)
    _model: nn.Module = field(repr=False)
    _structures: tuple[Structure, ...] = field(repr=False)
    _example: Any = field(repr=False)

    @property
    def lines(self) -> dict[str, list[tuple[float, float]]]:
        """What `gsprune.plots.sensitivity_figures.plot_sensitivity` draws: structure -> (share removed, value)."""
        found: dict[str, list[tuple[float, float]]] = {}
        for point in self.points:
            found.setdefault(point.structure, []).append((point.share, point.value))
        return found

    def plot(self) -> Any:
        """A picture of the scan, for a notebook or `.save("scan.png")`: a line for each structure.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        draw = need("gsprune.plots.sensitivity_figures").plot_sensitivity
        return draw(self.lines, dense=self.dense, metric=self.metric, falls=self.metric != "loss")

    def shares(self, max_drop: float) -> dict[str, float]:
        """Structure -> the largest share of its units that can go, alone, while the drop is at most `max_drop`.

        Between two shares that were measured, and from (0, 0) to the first one, the drop is taken for linear. Nothing
        is taken from beyond the last one.

        Args:
            max_drop: points of 100, or the rise of the loss, as `Point.drop` is; 0 or more.
        """
        if isinstance(max_drop, bool) or not isinstance(max_drop, int | float) or not max_drop >= 0:
            raise ValueError(f"max_drop is {max_drop!r}: it must be a number, 0 or more")
        found = {}
        for structure in self._structures:
            mine = [(p.share, p.drop) for p in self.points if p.structure == structure.name]
            found[structure.name] = _reach([(0.0, 0.0), *sorted(mine)], max_drop)
        return found

    def rules(self, *, max_drop: float | None = None, budget: BudgetSettings | None = None) -> list[Rule]:
        """A rule for each structure that can lose units, for `gsprune.cut(rules=...)` or `gsprune.Pruner(rules=...)`.

        Args:
            max_drop: of each structure alone, as of `shares`; together they lose more.
            budget: share of the dense network's cost that may stay, as of `gsprune.Rule`: the drop at which the shares
                of all structures come down to it.

        Raises:
            ValueError: both or neither; no unit can go; the budget is below what the largest shares leave.
        """
        goal = read_budget(budget)
        if (max_drop is None) == (goal is None):
            said = "nothing says" if goal is None else "max_drop and budget both say"
            raise ValueError(f"{said} how much may go: set one of max_drop and budget")
        shares = self._within(*goal, read_measure(budget)) if goal is not None else self.shares(max_drop or 0.0)
        counts = {s.name: pruned_count(shares[s.name], s.units) for s in self._structures}
        if not any(counts.values()):
            raise ValueError(
                f"no unit can go with max_drop={max_drop:g}: ask for more, or for smaller shares to measure"
            )
        return [
            Rule(
                self._criterion,
                structured=True,
                include=[glob.escape(s.name)],
                target_sparsity=min(counts[s.name], s.units - 1) / s.units,
                scope="local",
            )
            for s in self._structures
            if counts[s.name]
        ]

    def _within(self, kind: str, wanted: float, measure: Measure) -> dict[str, float]:
        """The shares at the least drop that leaves at most that cost."""
        cost = make_cost(kind, self._model, self._structures, self._example, measure)

        def left(shares: Mapping[str, float]) -> float:
            return cost(
                [
                    torch.arange(s.units) >= min(pruned_count(shares[s.name], s.units), s.units - 1)
                    for s in self._structures
                ]
            )

        low, high = 0.0, max(0.0, *(p.drop for p in self.points))
        if (least := left(self.shares(high))) > wanted:
            raise ValueError(
                f"budget.{kind} is {wanted:g}, but {percent(least)} stay with the largest shares that were measured: "
                f"measure larger ones, or ask for a larger budget"
            )
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if left(self.shares(middle)) <= wanted else (middle, high)
        return self.shares(high)

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """A row for each point, the dense network first; also written to `path`."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["structure", "kind", "units", "kept", "share", "params", "macs", self.metric, "drop"])
        writer.writerow(["", "", "", "", 0, 1, 1, self.dense, 0])
        for p in self.points:
            macs = "" if p.macs is None else p.macs
            writer.writerow([cell(p.structure), p.kind, p.units, p.kept, p.share, p.params, macs, p.value, p.drop])
        if path is not None:
            write_atomic(path, text.getvalue().encode())
        return text.getvalue()

    def __repr__(self) -> str:
        title = f"Sensitivity: {self.metric} {self.dense:.4g} of the dense network"
        return "\n".join([title, *text_table(self._table())])

    def _repr_html_(self) -> str:
        head, *rows = self._table()
        return html_table(head, rows)

    def _table(self) -> list[list[str]]:
        """A row for each structure, a column for each share."""
        shares = sorted({p.share for p in self.points})
        at = {(p.structure, p.share): p for p in self.points}
        head = ["structure", "units", *(f"{percent(share)} gone" for share in shares)]
        rows = []
        for s in self._structures:
            found = [at.get((s.name, share)) for share in shares]
            rows.append([s.name, f"{s.units} {s.kind}", *("" if p is None else f"{p.value:.4g}" for p in found)])
        return [head, *rows]


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    shares: Sequence[float] = (0.25, 0.5, 0.75),
    evaluate: Evaluate | None = None,
    criterion: Criterion | None = None,
    kinds: Sequence[str] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    repair: Repair | None = "least_squares",
    calibration: int = 512,
    example_input: Any = None,
    progress: bool | Report = True,
) -> Sensitivity:
    """Accuracy, or loss, against the share of units removed, structure by structure, after repair.

    The network is scored once. Then, for each structure and share, only that structure is cut, repaired and measured:
    structures x shares repairs and measurements.

    Args:
        model, batches, loss, criterion, kinds, include, exclude, repair, example_input, progress: as of `gsprune.cut`.
        shares: of the units of a structure to remove, in (0, 1).
        evaluate: network -> a number in [0, 1], or one a sample, higher is better. None: the mean loss is measured.
        calibration: samples that are read. Without `evaluate` the second half of them measures and does not score.

    Raises:
        ValueError: as of `gsprune.cut`; a share outside (0, 1).

    Example:
        >>> import torch.nn.functional as F
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x, y = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
        >>> found = sensitivity(net, [(x, y)], F.cross_entropy, shares=[0.5], progress=False)
        >>> [(p.structure, p.share, p.kept) for p in found.points]
        [('0', 0.5, 4)]
    """
    _check_shares(shares)
    check_repair(repair)
    data = Calibration(batches, loss, samples=calibration)
    scoring = measuring = data
    if evaluate is None:
        if data.size < 2:
            raise ValueError("there is 1 sample: without evaluate some score and others measure the loss")
        data.check_loss()
        scoring, measuring = data.split(data.size // 2)
        measuring = measuring if measuring.labelled else measuring.drawn_from(model)

    def measure(network: nn.Module) -> float:
        return measuring.mean_loss(network) if evaluate is None else float(np.mean(values_of(evaluate(network))))

    settings: dict[str, Any] = {"kinds": kinds, "include": include, "exclude": exclude}
    first = one_rule("sparsity", shares[0], criterion, repair, **settings)
    with shown(progress) as report:
        example = data.example_for(model) if example_input is None else example_input
        cutter = Cutter(model, scoring, loss, [first], samples=scoring.size, example_input=example, report=report)
        structures, dense = cutter.structures(first), measure(model)
        points = []
        for number, (structure, share) in enumerate((s, share) for s in structures for share in sorted(shares)):
            report("measuring", number / (len(structures) * len(shares)))
            rule = one_rule("sparsity", share, first.criterion, repair, include=[glob.escape(structure.name)])
            found = cutter.cut([rule], repair=repair)
            value = measure(found.model)
            drop = value - dense if evaluate is None else 100 * (dense - value)
            macs = found.small.macs / found.dense.macs if found.small.macs and found.dense.macs else None
            kept = int(found.keeps[structure.name].sum())
            sizes = found.small.params / found.dense.params, macs
            points.append(Point(structure.name, structure.kind, structure.units, kept, share, *sizes, value, drop))
    metric = "loss" if evaluate is None else "value"
    return Sensitivity(metric, dense, tuple(points), first.criterion, model, tuple(structures), cutter.example)


def _check_shares(shares: Sequence[float]) -> None:
    is_list = isinstance(shares, Sequence) and not isinstance(shares, str) and len(shares) > 0
    if not is_list or not all(isinstance(share, int | float) and 0 < share < 1 for share in shares):
        raise ValueError(f"shares is {shares!r}: it must list shares of units to remove, above 0 and below 1")
    if len(set(shares)) < len(shares):
        raise ValueError(f"shares is {[*shares]}: a share is there twice")


def _reach(line: Sequence[tuple[float, float]], most: float) -> float:
    """How far along a line of (share, drop) the drop stays at most that.

    >>> _reach([(0, 0), (0.5, 1.0), (0.75, 3.0)], 2.0), _reach([(0, 0), (0.5, 1.0), (0.75, 3.0)], 0.5)
    (0.625, 0.25)
    """
    for (share, drop), (next_share, next_drop) in pairwise(line):
        if next_drop > most:
            return share + (next_share - share) * max(most - drop, 0.0) / (next_drop - drop)
    return line[-1][0]
