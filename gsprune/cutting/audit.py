"""Whether scores are right: single units are removed, and what that does to the loss is compared with their scores."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gsprune.criteria import Abs, Criterion, Fisher, Magnitude, Random, Weighted
from gsprune.cutting.bounds import check_confidence
from gsprune.cutting.calibration import Calibration, Loss
from gsprune.cutting.cut import Cutter, shown
from gsprune.cutting.progress import Report
from gsprune.extras import need
from gsprune.pruner.rule import Rule, check_kind
from gsprune.schedules import OneShot
from gsprune.structures.structure import Structure
from gsprune.structures.twin import copy_of, every_tensor
from gsprune.text.display import html_table, text_table

FEWEST = 4  # units whose ranks have an interval
__all__ = ["Audit", "Correlation", "Removal", "Row", "audit", "removed", "spearman"]


class Correlation(NamedTuple):
    """A rank correlation and its interval; NaN where it is not defined (all equal, fewer than two)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return "-" if math.isnan(self.value) else f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Removal:
    """A unit that was removed alone, and the change of the loss."""

    structure: str
    kind: str
    unit: int
    change: float


@dataclass(frozen=True)
class Row:
    """How a criterion ranks the units of a kind ("all": of all kinds).

    units    how many were removed
    size     correlation of score and abs(change of the loss): whether it knows how much a unit matters
    signed   correlation of score and change: whether it knows in which direction, too
    """

    criterion: str
    kind: str
    units: int
    size: Correlation
    signed: Correlation


@dataclass(frozen=True)
class Audit:
    """What `audit` found.

    removals   the units, in the model's order
    scores     criterion -> a score for each of them
    loss       of the dense network, on the samples that measured
    scored, measured   samples that scored, and others that measured
    confidence   of the intervals
    """

    removals: tuple[Removal, ...]
    scores: Mapping[str, tuple[float, ...]]
    loss: float
    scored: int
    measured: int
    confidence: float = 0.95

    def rows(self) -> list[Row]:
        """Each criterion on each kind of unit, and on all where there are several kinds."""
        kinds = list(dict.fromkeys(removal.kind for removal in self.removals))
        changes = np.array([removal.change for removal in self.removals])
        found = []
        for criterion, scores in self.scores.items():
            for kind in [*kinds, *(["all"] if len(kinds) > 1 else [])]:
                mine = np.array([kind in (removal.kind, "all") for removal in self.removals])
                score, change = np.array(scores)[mine], changes[mine]
                size = spearman(score, np.abs(change), self.confidence)
                found.append(Row(criterion, kind, int(mine.sum()), size, spearman(score, change, self.confidence)))
        return found

    @property
    def correlations(self) -> list[tuple[str, str, tuple[float, float, float]]]:
        """What `gsprune.plots.audit_figures.plot_audit` draws: criterion, kind, correlation with its interval."""
        return [(row.criterion, row.kind, (*row.size,)) for row in self.rows()]

    def plot(self) -> Any:
        """A picture of the correlations, for a notebook or `.save("audit.png")`: a row for each criterion.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return need("gsprune.plots.audit_figures").plot_audit(self.correlations)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; a correlation that is not defined is None."""

        def plain(correlation: Correlation) -> list[float] | None:
            return None if math.isnan(correlation.value) else [*correlation]

        rows = [asdict(row) | {"size": plain(row.size), "signed": plain(row.signed)} for row in self.rows()]
        counts = {"loss": self.loss, "scored": self.scored, "measured": self.measured, "confidence": self.confidence}
        scores = {name: [*values] for name, values in self.scores.items()}
        return {"rows": rows, "removals": [asdict(r) for r in self.removals], "scores": scores, **counts}

    def __repr__(self) -> str:
        return "\n".join([self._summary(), *text_table(self._table())])

    def _repr_html_(self) -> str:
        head, *rows = self._table()
        return html_table(head, [*rows, [self._summary(), *[""] * (len(head) - 1)]])

    def _summary(self) -> str:
        lowered = sum(removal.change < 0 for removal in self.removals)
        return (
            f"Audit of {len(self.removals)} units, removed one by one: {lowered} removals lower the loss of "
            f"{self.loss:.4g} ({self.scored} samples scored, {self.measured} others measured)"
        )

    def _table(self) -> list[list[str]]:
        head = ["criterion", "kind", "units", "Spearman with abs(change)", "with change"]
        return [head, *([r.criterion, r.kind, str(r.units), str(r.size), str(r.signed)] for r in self.rows())]


def audit(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    criteria: Sequence[Criterion] | None = None,
    units: int = 100,
    seed: int = 0,
    kinds: Sequence[str] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    calibration: int = 512,
    seconds: float | None = None,
    confidence: float = 0.95,
    example_input: Any = None,
    progress: bool | Report = True,
) -> Audit:
    """Correlate the scores of criteria with the change of the loss when single units are removed.

    Units are drawn in turns from all structures. Each is removed alone (the columns that read it are zero) and the mean
    loss is measured, with one forward pass over samples that did not score. A score that knows how much a unit matters
    is correlated with abs(change). First-order scores do not know in which direction: in a trained network about half
    of all single removals lower the loss. Removals do not add up, so that a criterion is judged by the loss of the cut
    network, too.

    Args:
        model, batches, loss, kinds, include, exclude, example_input, progress: as of `gsprune.cut`. The network is not
            changed.
        criteria: None: `Fisher`, `Abs`, `Weighted`, `Magnitude` and `Random`.
        units: how many are removed; all, where there are no more.
        seed: of the draw.
        calibration: samples that are read: the first half scores, the second half measures.
        seconds: after which no other unit is removed, once there are 4; scoring is not counted. None: no limit.
        confidence: of the intervals.

    Raises:
        ValueError: as of `gsprune.cut`; fewer than 4 units, a single sample, or no seconds.

    Example:
        >>> import torch.nn.functional as F
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> x, y = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
        >>> found = audit(net, [(x, y)], F.cross_entropy, criteria=[Fisher(), Random()], progress=False)
        >>> [(row.criterion, row.kind, row.units) for row in found.rows()]
        [('Fisher', 'neurons', 16), ('Random', 'neurons', 16)]
    """
    check_confidence(confidence)
    if isinstance(units, bool) or not isinstance(units, int) or units < FEWEST:
        raise ValueError(f"units is {units!r}: it must be a whole number of units to remove, {FEWEST} or more")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds is {seconds!r}: it must be a number above 0, or None")
    named = _named([Fisher(), Abs(), Weighted(), Magnitude(), Random()] if criteria is None else criteria)
    data = Calibration(batches, loss, samples=calibration)
    if data.size < 2:
        raise ValueError("there is 1 sample: an audit scores on some and measures on others")
    data.check_loss()
    scoring, measuring = data.split(data.size // 2)
    settings: dict[str, Any] = {"kinds": kinds, "include": include, "exclude": exclude}
    rules = [
        Rule(c, structured=True, target_sparsity=0.5, scope="global", schedule=OneShot(), **settings)
        for c in named.values()
    ]
    with shown(progress) as report:
        example = data.example_for(model) if example_input is None else example_input
        cutter = Cutter(model, scoring, loss, rules, samples=scoring.size, example_input=example, report=report)
        if not measuring.labelled:
            measuring = measuring.drawn_from(model)
        ranked = [cutter.ranked(number, rule) for number, rule in enumerate(rules)]
        structures = cutter.structures(rules[0])
        drawn = _drawn(structures, units, seed)
        dense, changes = _changes(model, structures, drawn, measuring, report, seconds=seconds)
    done = [(structures[i], unit, changes[i, unit]) for i, unit in sorted(changes)]
    scores = {
        name: tuple(float(found[structure.name][unit]) for structure, unit, _ in done)
        for name, found in zip(named, ranked, strict=True)
    }
    removals = tuple(Removal(structure.name, structure.kind, unit, change) for structure, unit, change in done)
    return Audit(removals, scores, dense, scoring.size, measuring.size, confidence)


def _named(criteria: Sequence[Criterion]) -> dict[str, Criterion]:
    """By their class; by all their settings where two have the same class."""
    if not criteria:
        raise ValueError("criteria is empty: there is nothing to audit")
    for number, criterion in enumerate(criteria):
        check_kind(f"criteria[{number}]", criterion, Criterion)
    classes = [type(criterion).__name__ for criterion in criteria]
    names = [repr(c) if classes.count(name) > 1 else name for c, name in zip(criteria, classes, strict=True)]
    if len(set(names)) < len(names):
        raise ValueError(f"criteria has {next(n for n in names if names.count(n) > 1)} twice")
    return dict(zip(names, criteria, strict=True))


def _drawn(structures: Sequence[Structure], units: int, seed: int) -> list[tuple[int, int]]:
    """(number of the structure, unit): of all structures in turns, in random order."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(structure.units, generator=generator).tolist() for structure in structures]
    longest = max(structure.units for structure in structures)
    turns = [(i, order[turn]) for turn in range(longest) for i, order in enumerate(orders) if turn < len(order)]
    return turns[:units]


def _changes(
    model: nn.Module,
    structures: Sequence[Structure],
    drawn: Sequence[tuple[int, int]],
    data: Calibration,
    report: Report,
    *,
    seconds: float | None,
) -> tuple[float, dict[tuple[int, int], float]]:
    """The loss of the network, and what it gains by each removal that there was time for."""
    twin = copy_of(model)
    began, dense = time.monotonic(), data.dense_loss(twin)
    changes: dict[tuple[int, int], float] = {}
    for number, (i, unit) in enumerate(drawn):
        if seconds is not None and number >= FEWEST and time.monotonic() - began > seconds:
            break
        report("removing units", number / len(drawn))
        with removed(twin, structures[i], [unit]):
            change = data.mean_loss(twin) - dense
        changes[i, unit] = math.inf if math.isnan(change) else change
    return dense, changes


@contextmanager
def removed(model: nn.Module, structure: Structure, units: Sequence[int]) -> Iterator[None]:
    """Inside the block what a mask of these units zeroes is zero; then it is what it was, bit for bit."""
    before: list[tuple[Tensor, int, Tensor, Tensor]] = []
    tensors = every_tensor(model, every_name=True)
    for member in structure.masked:
        tensor = tensors[member.tensor].detach()
        where = member.index[[*units]].flatten().to(tensor.device)
        before.append((tensor, member.dim, where, tensor.index_select(member.dim, where)))
    try:
        for tensor, dim, where, _ in before:
            tensor.index_fill_(dim, where, 0)
        yield
    finally:
        for tensor, dim, where, values in before:
            tensor.index_copy_(dim, where, values)


# ---- rank correlation


def spearman(x: np.ndarray, y: np.ndarray, confidence: float = 0.95) -> Correlation:
    """Spearman's rank correlation; equal values have the mean of their ranks.

    Its interval is tanh(atanh(r) +- z sqrt((1 + r^2 / 2) / (n - 3))), z the normal quantile; [-1, 1] for n < 4.

    Source: Bonett and Wright, "Sample size requirements for estimating Pearson, Kendall and Spearman correlations",
    2000.

    >>> print(spearman(np.array([1.0, 2, 3, 4, 5, 6]), np.array([1.0, 2, 3, 4, 6, 5])))
    0.94 [0.38, 1.00]
    """
    n = len(x)
    if n < 2 or np.ptp(ranks(x)) == 0 or np.ptp(ranks(y)) == 0:
        return Correlation(math.nan, math.nan, math.nan)
    r = float(np.corrcoef(ranks(x), ranks(y))[0, 1].clip(-1, 1))
    if n < 4 or abs(r) > 1 - 1e-12:
        return Correlation(r, -1.0 if n < 4 else r, 1.0 if n < 4 else r)
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt((1 + r * r / 2) / (n - 3))
    return Correlation(r, math.tanh(math.atanh(r) - reach), math.tanh(math.atanh(r) + reach))


def ranks(x: np.ndarray) -> np.ndarray:
    """
    >>> ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist()
    [2.5, 0.0, 2.5, 1.0]
    """
    _, which, count = np.unique(x, return_inverse=True, return_counts=True)
    found: np.ndarray = (np.cumsum(count) - (count + 1) / 2)[which]
    return found
