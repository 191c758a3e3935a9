"""Several cuts of one network that share their scores: the whole curve from dense to small."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from gsprune.cost.budgets import KINDS
from gsprune.criteria import Criterion
from gsprune.cutting.bounds import check_confidence
from gsprune.cutting.calibration import Loss
from gsprune.cutting.cut import (
    REPAIRS,
    Cut,
    Cutter,
    FamilyRepair,
    check_model,
    check_repair,
    evaluated,
    one_rule,
    refuse_of_units,
    refuse_of_weights,
    shown,
)
from gsprune.cutting.how_much import Evaluate, largest_cut, number_of, value_of, values_of
from gsprune.cutting.progress import Report
from gsprune.cutting.size import Size
from gsprune.cutting.weights import PrunedWeights, WeightPruner, WeightScope, check_levels
from gsprune.ranking.patterns import Pattern
from gsprune.text.display import html_table, percent, text_table

AnyCut = Cut | PrunedWeights


@dataclass(frozen=True, eq=False)
class CutFamily:
    """The result of `gsprune.cut_family`: cuts of one network, the largest first.

    kind     what the budgets are of: "macs", "params", "latency" or "sparsity"
    shares   the budgets, as they were asked for
    cuts     a `Cut` each; of single weights `PrunedWeights`
    """

    kind: str
    shares: tuple[float, ...]
    cuts: tuple[AnyCut, ...]

    @property
    def dense(self) -> Size:
        """Cost and loss of the dense network."""
        dense = self.cuts[0].dense
        assert dense is not None
        return dense

    def __len__(self) -> int:
        return len(self.cuts)

    def __iter__(self) -> Iterator[AnyCut]:
        return iter(self.cuts)

    def __getitem__(self, number: int) -> AnyCut:
        return self.cuts[number]

    def within(self, max_drop: float, confidence: float = 0.95) -> AnyCut:
        """The largest of these cuts that is certified to lose at most `max_drop` points of what `evaluate` measures.

        They are tried from the mildest on, until one is not certified (`gsprune.cutting.how_much`).

        Raises:
            ValueError: nothing was evaluated; none of them is certified, with what could be.
        """
        if self.dense.value is None:
            raise ValueError(
                f"max_drop={max_drop:g} needs evaluate, which says what a network loses: give it to cut_family"
            )
        left = {
            (1 - share if self.kind == "sparsity" else share): cut
            for share, cut in zip(self.shares, self.cuts, strict=True)
        }
        values = {id(cut.model): _small(cut).value for cut in self.cuts}
        found, how_much = largest_cut(
            values_of(self.dense.value),
            lambda share: (left[share], left[share].model),
            lambda network: values[id(network)],
            max_drop=max_drop,
            confidence=confidence,
            shares=[*left],
            of="weights" if isinstance(self.cuts[0], PrunedWeights) else KINDS.get(self.kind, "units"),
        )
        return replace(found, how_much=how_much)

    def rows(self) -> list[dict[str, float]]:
        """Each cut as numbers: the budget, what is left of parameters and MACs in (0, 1], loss, the mean of what
        `evaluate` gave, and the points of it that are lost at most, each cut taken alone."""
        return [{"dense": 1.0, **_numbers(self.dense, self.dense)}] + [
            {self.kind: share, **_numbers(_small(cut), self.dense), **_bound(cut)}
            for share, cut in zip(self.shares, self.cuts, strict=True)
        ]

    def __repr__(self) -> str:
        head, rows = self._table()
        title = f"{len(self)} cuts of {type(self.cuts[0].model).__name__}"
        return "\n".join([title, *(f"  {line}" for line in text_table([head, *rows]))])

    def _repr_html_(self) -> str:
        return html_table(*self._table())

    def _table(self) -> tuple[list[str], list[list[str]]]:
        names = list(dict.fromkeys(name for row in self.rows()[1:] for name in row if name != self.kind))
        table = []
        for number, row in enumerate(self.rows()):
            first = "dense" if number == 0 else f"{self.shares[number - 1]:g}"
            table.append([first, *(_text(name, row.get(name)) for name in names)])
        return [self.kind, *names], table


def cut_family(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    macs: Sequence[float] | None = None,
    params: Sequence[float] | None = None,
    latency: Sequence[float] | None = None,
    sparsity: Sequence[float] | None = None,
    pattern: str | Pattern | None = None,
    scope: WeightScope | None = None,
    criterion: Criterion | None = None,
    kinds: Sequence[str] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    repair: FamilyRepair | None = "shared",
    calibration: int = 512,
    evaluate: Evaluate | None = None,
    confidence: float = 0.95,
    example_input: Any = None,
    rotate: bool = False,
    progress: bool | Report = True,
) -> CutFamily:
    """Cut a trained network at several budgets, scored once.

    Args:
        macs, params, latency, sparsity: several values of the settings of `gsprune.cut`; one of the four.
        pattern, scope: of single weights, whose one amount is the sparsity; each network is pruned and refitted by
            itself, whatever `repair` says but None. An N:M pattern has one sparsity and no family.
        repair: "shared" refits all cuts from second moments of the dense network that are computed once;
            "least_squares" refits each cut as `gsprune.cut` does: more accurate, one more pass for each cut.
        others: as of `gsprune.cut`.

    Raises:
        ValueError: as of `gsprune.cut`; a budget twice.

    >>> import torch
    >>> import torch.nn.functional as F
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> x, y = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
    >>> family = cut_family(net, [(x, y)], F.cross_entropy, macs=[0.25, 0.75])
    >>> [(share, cut.model[0].out_features) for share, cut in zip(family.shares, family)]
    [(0.75, 6), (0.25, 2)]
    """
    given = {"macs": macs, "params": params, "latency": latency, "sparsity": sparsity}
    kind, shares = _checked(given)
    check_repair(repair, ("shared", *REPAIRS))
    check_confidence(confidence)
    if pattern is not None:
        of_units = {"kinds": kinds, "example_input": example_input, "rotate": rotate or None}
        _check_weights(kind, shares, pattern, of_units, repair)
        with shown(progress) as report:
            pruner = WeightPruner(
                model,
                batches,
                loss,
                evaluate,
                confidence=confidence,
                calibration=calibration,
                report=report,
                criterion=criterion,
                pattern=pattern,
                scope=scope,
                repair=repair is not None,
                include=include,
                exclude=exclude,
            )
            return CutFamily(kind, tuple(shares), tuple(pruner.prune(share) for share in shares))
    refuse_of_weights(criterion, scope)
    rules = [
        one_rule(kind, share, criterion, repair, kinds=kinds, include=include, exclude=exclude) for share in shares
    ]
    check_model(model)
    with shown(progress) as report:
        base = None if evaluate is None else value_of(evaluate, model)
        cutter = Cutter(
            model,
            batches,
            loss,
            rules[:1],
            samples=calibration,
            settle=[[rules[0], rules[-1]]],
            example_input=example_input,
            rotate=rotate,
            report=report,
        )
        cuts = []
        for number, rule in enumerate(rules):
            report("cutting", number / len(rules))
            found = cutter.cut([rule], repair=repair)
            if evaluate is not None:
                found = evaluated(found, base, value_of(evaluate, found.model), confidence)
            cuts.append(found)
    return CutFamily(kind, tuple(shares), tuple(cuts))


def _checked(given: dict[str, Sequence[float] | None]) -> tuple[str, list[float]]:
    named = {name: shares for name, shares in given.items() if shares is not None}
    if len(named) != 1:
        said = " and ".join(named) + " both say" if named else "nothing says"
        raise ValueError(f"{said} how much to cut: set one of {', '.join(given)}")
    ((name, shares),) = named.items()
    if isinstance(shares, str) or not isinstance(shares, Sequence) or not shares:
        raise ValueError(f"{name} is {shares!r}: it must be a list of shares, as in [0.75, 0.5, 0.25]")
    if len(set(shares)) != len(shares):
        raise ValueError(f"{name} is {[*shares]}: a share is there twice")
    return name, sorted(shares, reverse=name != "sparsity")


def _check_weights(
    kind: str, shares: Sequence[float], pattern: str | Pattern, of_units: dict[str, Any], repair: FamilyRepair | None
) -> None:
    if kind != "sparsity":
        raise ValueError(f"pattern={pattern!r} prunes single weights, whose amount is sparsity, and {kind} is given")
    check_levels(pattern, "sparsity", [*shares])
    refuse_of_units(of_units, pattern, repair)


def _small(cut: AnyCut) -> Size:
    assert cut.small is not None
    return cut.small


def _bound(cut: AnyCut) -> dict[str, float]:
    bound = None if cut.how_much is None else cut.how_much.chosen.bound
    return {} if bound is None else {"drop_at_most": bound}


def _numbers(size: Size, dense: Size) -> dict[str, float]:
    found = {"params": size.params / dense.params}
    if size.macs and dense.macs:
        found["macs"] = size.macs / dense.macs
    if size.loss is not None:
        found["loss"] = size.loss
    if (value := number_of(size.value)) is not None:
        found["evaluate"] = value
    return {f"{name}_left" if name in ("params", "macs") else name: value for name, value in found.items()}


def _text(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return percent(value) if name.endswith("_left") else f"{value:.4g}"
