"""A trained network becomes smaller: scored on calibration data, cut, repaired. One call: `gsprune.cut`."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gsprune.collectives import refuse_several
from gsprune.cost.budgets import KINDS, BudgetSettings, FloorError, read_budget
from gsprune.criteria import OBS, Criterion, Fisher
from gsprune.cutting.bounds import check_confidence
from gsprune.cutting.calibration import Calibration, Loss
from gsprune.cutting.how_much import (
    SHARES,
    Evaluate,
    HowMuch,
    check_enough,
    check_max_drop,
    compared,
    is_of_samples,
    largest_cut,
    number_of,
    value_of,
    values_of,
)
from gsprune.cutting.progress import Line, Report, silent
from gsprune.cutting.scoring import branch_changes, gate_gradients, readers, sharing_copy, unit_scores
from gsprune.cutting.settled import Settled
from gsprune.cutting.size import Size, size_of
from gsprune.cutting.weights import PrunedWeights, WeightPruner, WeightScope
from gsprune.extras import need
from gsprune.formats.network import save_pruned
from gsprune.pruner.part import Part
from gsprune.pruner.rule import Rule, check_kind
from gsprune.pruner.targets import check_values
from gsprune.ranking.exchange import exchange
from gsprune.ranking.patterns import Pattern
from gsprune.repair.batchnorm import batchnorm
from gsprune.repair.least_squares import least_squares
from gsprune.repair.shared import SharedMoments
from gsprune.schedules import OneShot
from gsprune.structures.running import refuse_inference_mode, to_device_of
from gsprune.structures.structure import Found, Structure, called
from gsprune.structures.twin import copy_of, refuse_wrapped
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.cut_plan import CutPlan, plan_cut
from gsprune.surgery.rotation import rotated
from gsprune.surgery.shrink import check_shrink
from gsprune.text.display import html_table, percent
from gsprune.text.table import count

if TYPE_CHECKING:
    from gsprune.repair.report import RepairReport

Repair = Literal["least_squares", "batchnorm"]
FamilyRepair = Literal["shared", "least_squares", "batchnorm"]
REPAIRS = ("least_squares", "batchnorm")


@dataclass(frozen=True, eq=False)
class Cut:
    """The result of `gsprune.cut`: the smaller network and what was measured.

    model       the smaller network, in evaluation mode; the dense one is not changed
    plan        the cut plan, for `save_pruned`
    keeps       structure name -> bool (units,), True = kept
    structures  the structures that were cut
    skipped     what cannot be cut -> why
    dense, small   cost and loss of both networks
    how_much    the drop of what `evaluate` measures, its bound, and the cuts that were tried; None without `evaluate`,
                or if it returned one number and there was no search
    criterion   name of the criterion
    repaired    error of each layer before and after the repair; None without one
    samples     calibration samples
    scored      how many of them were used for scores: fewer if the kept set was settled earlier
    settled     batches after which it was settled; None: all were used
    seconds     duration of the call
    scores      structure name -> (units,), what its units were ranked by
    timed       what a clock has found of a latency budget; "" without one
    proof       what the proof that masked equals cut shows, where that is less than equality in float64
    rotated     names of the streams that were rotated before: `keeps` and `plan` are of the rotated network
    """

    model: nn.Module
    plan: CutPlan
    keeps: Mapping[str, Tensor]
    structures: Sequence[Structure]
    skipped: Mapping[str, str]
    dense: Size
    small: Size
    criterion: str
    repaired: RepairReport | None
    samples: int
    scored: int
    settled: int | None
    seconds: float
    scores: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    how_much: HowMuch | None = None
    timed: str = ""
    proof: str = ""
    rotated: Sequence[str] = ()

    def save(self, directory: str | os.PathLike[str], *, compressed: bool = False) -> None:
        """Write the network as `gsprune.save_pruned` does; `gsprune.load_pruned` reads it.

        Args:
            compressed: of single weights that are zero the file holds one bit each.
        """
        save_pruned(directory, self.model, self.plan, compressed=compressed)

    def plot(self, dense: nn.Module | None = None, example_input: Any = None) -> Any:
        """A picture, for a notebook or `.save("cut.png")`: scores and what went, layer by layer, size before and after.

        Args:
            dense, example_input: to time both networks on that input, too; some seconds.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return need("gsprune.plots.pruner_figures").plot_cut(self, dense, example_input)

    def rows(self) -> list[tuple[str, str]]:
        """The lines of `print(cut)`, as pairs of a name and a text."""
        kept, units = Counter[str](), Counter[str]()
        for structure in self.structures:
            units[structure.kind] += structure.units
            kept[structure.kind] += int(self.keeps[structure.name].sum())
        rows = [
            ("parameters", _change(self.dense.params, self.small.params)),
            ("kept", ", ".join(f"{kept[kind]:,} of {units[kind]:,} {called(kind, units[kind])}" for kind in units)),
        ]
        if self.dense.macs and self.small.macs:
            rows.insert(0, ("MACs", _change(self.dense.macs, self.small.macs)))
        if self.timed:
            rows.append(("latency", self.timed))
        if self.dense.loss is not None and self.small.loss is not None:
            rows.append(
                ("loss", f"{self.dense.loss:.4g} -> {self.small.loss:.4g} on the {self.samples} calibration samples")
            )
        if self.how_much is not None:
            rows.append(("evaluate", str(self.how_much)))
        elif (before := number_of(self.dense.value)) is not None and (after := number_of(self.small.value)) is not None:
            rows.append(("evaluate", f"{before:.4g} -> {after:.4g}"))
        if self.scored < self.samples:
            done = f"by {self.scored:,} of {self.samples:,} samples"
            rows.append(("scored", f"{done}: what is kept was settled after {self.settled} batches"))
        if self.repaired is not None:
            rows.append(("repaired", f"{str(self.repaired).splitlines()[0]} (see .repaired)"))
        if self.skipped:
            rows.append(("left out", f"{len(self.skipped)}, such as {next(iter(self.skipped))!r} (see .skipped)"))
        if self.rotated:
            rows.append(("rotated", ", ".join(self.rotated)))
        if self.proof:
            rows.append(("proof", self.proof))
        return [*rows, ("seconds", f"{self.seconds:.1f}")]

    def __repr__(self) -> str:
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        lines = [f"  {name.ljust(width)}  {text}" for name, text in rows]
        return "\n".join([f"Cut of {type(self.model).__name__} by {self.criterion}", *lines])

    def _repr_html_(self) -> str:
        return html_table((f"Cut of {type(self.model).__name__}", f"by {self.criterion}"), self.rows())


@overload
def cut(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    budget: BudgetSettings | None = None,
    sparsity: float | None = None,
    max_drop: float | None = None,
    evaluate: Evaluate | None = None,
    confidence: float = 0.95,
    pattern: None = None,
    criterion: Criterion | None = None,
    rules: Sequence[Rule] | None = None,
    kinds: Sequence[str] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    repair: Repair | None = "least_squares",
    calibration: int = 512,
    example_input: Any = None,
    rotate: bool = False,
    progress: bool | Report = True,
) -> Cut: ...
@overload
def cut(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    sparsity: float | None = None,
    max_drop: float | None = None,
    evaluate: Evaluate | None = None,
    confidence: float = 0.95,
    pattern: str | Pattern,
    scope: WeightScope | None = None,
    criterion: Criterion | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    repair: Repair | None = "least_squares",
    calibration: int = 512,
    progress: bool | Report = True,
) -> PrunedWeights: ...
def cut(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    budget: BudgetSettings | None = None,
    sparsity: float | None = None,
    max_drop: float | None = None,
    evaluate: Evaluate | None = None,
    confidence: float = 0.95,
    pattern: str | Pattern | None = None,
    scope: WeightScope | None = None,
    criterion: Criterion | None = None,
    rules: Sequence[Rule] | None = None,
    kinds: Sequence[str] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    repair: Repair | None = "least_squares",
    calibration: int = 512,
    example_input: Any = None,
    rotate: bool = False,
    progress: bool | Report = True,
) -> Cut | PrunedWeights:
    """Make a trained network smaller: score its units, choose, cut, repair. No training.

    A unit's score is how much the network's outputs change if it is removed and the layers that read it are refitted
    (`gsprune.criteria.OBS`); under a budget it is divided by the unit's cost. The smaller network is a copy. The layers
    that read removed units are refitted to the dense network's outputs (`gsprune.repair.least_squares`).

    With a `pattern` single weights are set to zero instead (`gsprune.cutting.weights.prune_weights`), and the other
    weights of each row are refitted.

    With `max_drop` cuts to 94, 88, 83, ... % of the MACs (with a pattern, of the weights) are made and evaluated, the
    mildest first, until one is not certified to lose at most that (`gsprune.cutting.how_much`); the last certified one
    is returned. Samples that `evaluate` reads must not be in `batches`: a repaired network is better on the samples of
    its repair.

    Args:
        model: not changed.
        batches: pairs (inputs, targets); or mappings, for networks that return their own loss; or inputs alone:
            `OBS` reads no labels, for other criteria and the loss they are drawn from the network's own predictions.
        loss: loss(outputs, targets) -> scalar.
        macs, params, latency: share of the dense network's cost that stays, in (0, 1).
        budget: such a share with how it is measured and met, as of `gsprune.Rule`: {"latency": 0.5, "runtime":
            "onnxruntime", "batch": 8}, {"macs": 0.5, "round_to": 8, "uniform": True}.
        sparsity: share of units removed from every structure; with a pattern, of weights set to zero.
        max_drop: largest drop of `evaluate` in points of 100, instead of a share.
        evaluate: network -> one value for each sample in [0, 1], higher is better, always of the same samples, as
            `gsprune.cutting.how_much.right_or_wrong(batches)` gives: then the drop is bounded with the confidence. Or
            one number, which is shown for both networks; it certifies nothing, and `max_drop` compares it as it is.
        confidence: of the bound of the drop, in [0.5, 1).
        pattern: "1x1" (single weights), a tile "NxM", or a block "N:M", whose sparsity is fixed; None: whole units.
        scope: of a pattern: "row", "layer" or "global"; None: the criterion's own.
        criterion: how to score; None: `OBS` where the repair is least squares, else `Fisher`; `SparseGPT` with a
            pattern.
        rules: what to cut, each with its own amount, instead of the other settings from `macs` to `exclude`.
        kinds, include, exclude: as of `gsprune.Rule`.
        repair: "least_squares" (weights, and norms where that helps), "batchnorm" (statistics alone) or None.
        calibration: samples that are read. Scoring stops earlier once the kept set is settled: at least 99 % the same
            over three doublings of the batches.
        example_input: input to trace the network with, or a function that makes it; None: two samples of the
            calibration data.
        rotate: whether residual streams that are cut (`kinds`) are first rotated to their principal axes, which changes
            no output; RMSNorm alone (`gsprune.surgery.rotation`). Units are then positions of the rotated stream.
        progress: a line on the terminal, nothing, or a function of (stage, share done).

    Raises:
        ValueError: a setting out of its range or without effect; a stream that cannot be rotated; no batches, or
            batches without what the loss needs; nothing can be cut; the budget is below what can stay; `max_drop`
            cannot be certified even of the smallest cut, with the drop that can and the samples it takes.

    Source: Kwon et al., "A fast post-training pruning framework for transformers", 2022, for the masks and their
    rearrangement; Hassibi and Stork, "Optimal brain surgeon", 1993, for removal with repair.

    Example:
        >>> import torch.nn.functional as F
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x, y = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
        >>> found = cut(net, [(x, y)], F.cross_entropy, macs=0.5)
        >>> found.model[0], net[0]
        (Linear(in_features=4, out_features=4, bias=True), Linear(in_features=4, out_features=8, bias=True))
        >>> sparse = cut(net, [x], pattern="2:4")
        >>> sparse.report.sparsity, int(sparse.model[0].weight.count_nonzero())
        (0.5, 16)
    """
    given: dict[str, Any] = {"macs": macs, "params": params, "latency": latency, "budget": budget}
    given |= {"sparsity": sparsity, "max_drop": max_drop}
    check_repair(repair)
    check_confidence(confidence)
    if pattern is not None:
        units = {"macs": macs, "params": params, "latency": latency, "budget": budget, "rules": rules, "kinds": kinds}
        units["rotate"] = rotate or None
        refuse_of_units({**units, "example_input": example_input}, pattern, repair)
        if sparsity is not None and max_drop is not None:
            raise ValueError("sparsity and max_drop both say how much to prune: set one of them")
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
            return pruner.prune(sparsity) if max_drop is None else pruner.within(max_drop)
    refuse_of_weights(criterion, scope)
    if rules is None:
        name, share = amount(given)
        if name == "max_drop":
            check_max_drop(share)
            name, share = "macs", SHARES[0]
        chosen = [one_rule(name, share, criterion, repair, kinds=kinds, include=include, exclude=exclude)]
    else:
        chosen = checked_rules(rules, {**given, "criterion": criterion})
    if max_drop is not None and evaluate is None:
        raise ValueError(f"max_drop={max_drop:g} needs evaluate, which says what a network loses")
    check_model(model)
    with shown(progress) as report:
        report("evaluating the dense network", 0.0)
        base = None if evaluate is None else value_of(evaluate, model)
        if max_drop is not None:
            check_enough(values_of(base), max_drop, confidence)
        settle = [] if max_drop is not None else [[rule] for rule in chosen]
        cutter = Cutter(
            model,
            batches,
            loss,
            chosen,
            samples=calibration,
            settle=settle,
            example_input=example_input,
            rotate=rotate,
            report=report,
        )
        if max_drop is not None:
            assert evaluate is not None
            return _within(cutter, chosen[0], base, evaluate, max_drop, confidence, repair=repair)
        found = cutter.cut(chosen, repair=repair)
        if evaluate is None:
            return found
        report("evaluating the cut network", 0.0)
        return evaluated(found, base, value_of(evaluate, found.model), confidence)


def _within(
    cutter: Cutter,
    rule: Rule,
    base: Any,
    evaluate: Evaluate,
    max_drop: float,
    confidence: float,
    *,
    repair: Repair | None,
) -> Cut:
    """The largest cut by a rule that loses at most `max_drop` points."""
    latest: list[Cut] = []  # the last one that was made
    given: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()

    def cut_to(share: float) -> tuple[Cut, nn.Module]:
        rules = [replace(rule, budget={"macs": share})]
        if not latest or not all(map(torch.equal, cutter.chosen(rules)[1], latest[0].keeps.values())):
            latest[:] = [cutter.cut(rules, repair=repair)]  # of coarse units two budgets may be one network
        return latest[0], latest[0].model

    def measure(network: nn.Module) -> Any:
        if network not in given:
            given[network] = value_of(evaluate, network)
        return given[network]

    found, how_much = largest_cut(
        values_of(base), cut_to, measure, max_drop=max_drop, confidence=confidence, note=cutter.report
    )
    return replace(
        found,
        dense=replace(found.dense, value=base),
        small=replace(found.small, value=given[found.model]),
        how_much=how_much,
        seconds=cutter.seconds,
    )


def evaluated(found: Cut, base: Any, value: Any, confidence: float) -> Cut:
    """The same cut with what `evaluate` gave of the dense network and of the small one; a bound, of values of samples.

    Raises:
        ValueError: they are of different samples.
    """
    found = replace(found, dense=replace(found.dense, value=base), small=replace(found.small, value=value))
    if not is_of_samples(base):
        return found
    of, share = "params", found.small.params / found.dense.params
    if found.dense.macs and found.small.macs:
        of, share = "macs", found.small.macs / found.dense.macs
    return replace(found, how_much=compared(values_of(base), values_of(value), share, confidence, of=KINDS[of]))


class Chosen(NamedTuple):
    """What rules cut.

    keeps    bool (units,) of each structure, True = kept
    scores   what the units of each structure were ranked by
    timed    what a clock has said of a latency budget
    missed   whether a budget is missed by more than 2 %
    """

    structures: list[Structure]
    keeps: list[Tensor]
    scores: dict[str, Tensor]
    timed: str
    missed: bool


class Cutter:
    """A network scored once, to be cut at one or several budgets.

    Args:
        rules: whose criteria score; `cut` takes rules with the same criteria and other amounts.
        settle: for each of these, rules whose kept sets end its scoring once they are settled; empty: all samples
            score.
        rotate: whether the streams that the rules cut are rotated first.

    Attributes:
        model: what is cut: the network, or a rotated copy of it.
        rotated: names of the streams that were rotated.
        scores: of each rule: structure name -> (units,).
        scored, settled: samples that scored, and batches.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any] | Calibration,
        loss: Loss | None,
        rules: Sequence[Rule],
        *,
        samples: int,
        settle: Sequence[Sequence[Rule]] = (),
        example_input: Any = None,
        rotate: bool = False,
        report: Report = silent,
    ) -> None:
        check_model(model)
        check_values(parameter.device for parameter in model.parameters())
        from gsprune.discovery.branches import with_branches
        from gsprune.discovery.find import find_structures

        self._since = time.perf_counter()
        self.model, self.report = model, report
        self.data = batches if isinstance(batches, Calibration) else Calibration(batches, loss, samples=samples)
        if any(_needs_loss(rule.criterion) for rule in rules) or loss is not None:
            self.data.check_loss()
        example = self.data.example_for(model) if example_input is None else example_input
        self.example = to_device_of(model, example)
        report("finding what can be cut", 0.0)
        self.found: Found = find_structures(model, self.example)
        if any("branches" in (rule.kinds or ()) for rule in rules):
            self.found = with_branches(self.found, model, self.example)
        self.rotated: tuple[str, ...] = ()
        self._whole_streams: set[object] = set()  # goals and kinds that are not reached with narrow ones
        if rotate:
            self._rotate(rules)
        if not self.data.labelled and any(_needs_loss(rule.criterion) for rule in rules):
            try:
                self.data = self.data.drawn_from(model)
            except ValueError:  # no classes: `OBS` goes by the outputs alone
                if any(rule.criterion.cumulative for rule in rules) or self.data.of_outputs(model) is None:
                    raise
        self.dense = size_of(model, self.data, self.data.dense_loss)
        self.gates: dict[str, Tensor] = {}  # gate gradients of single samples, of criteria that are read off them
        self._felt: dict[str, Tensor] = {}  # those of the outputs instead of the loss, of criteria that read inputs
        self._changes: dict[str, Tensor] = {}  # scores of branches of such criteria
        self._twin = sharing_copy(self.model, requires_grad=True)
        self.scored, self.settled = 0, 0
        settled = [*settle, *[()] * (len(rules) - len(settle))]
        self.scores = [self._scored(self._part(rule), stop) for rule, stop in zip(rules, settled, strict=True)]
        self._shared: SharedMoments | None = None

    def _rotate(self, rules: Sequence[Rule]) -> None:
        """Turn the streams that rules cut to their principal axes, in a copy.

        Raises:
            ValueError: no rule cuts a stream; as of `gsprune.surgery.rotation.rotated`.
        """
        self._twin = sharing_copy(self.model, requires_grad=True)
        chosen = {s.name: s for rule in rules for s in self.structures(rule) if s.kind == "residual"}
        if not chosen:
            raise ValueError(
                "rotate=True turns residual streams, and none of those is cut: give kinds=['residual'] or more"
            )
        self.report("rotating", 0.0)
        self.model = rotated(self.model, [*chosen.values()], self.example, self.data.calls())
        self.rotated = (*chosen,)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self._since

    def cut(self, rules: Sequence[Rule], *, repair: FamilyRepair | None = "least_squares") -> Cut:
        """The network that these rules leave; "shared" repairs by moments that all cuts have in common.

        Where branches go under a budget that can be met with all of them in place, too, both networks are made, and
        the one with the smaller loss on the calibration data is taken: what several branches do together no score of
        each says. So it is with positions of streams under a budget of milliseconds: norms over fewer positions may
        take longer.

        Raises:
            ValueError: as of `gsprune.cut`.
        """
        choices = [self._chosen(rules)]
        for whole in ({"branches"}, {"residual"}, {"branches", "residual"}):
            if (other := self._with_whole(whole, rules, choices)) is not None:
                choices.append(other)
        met = [choice for choice in choices if not choice.missed]
        return min((self._cut(rules, choice, repair) for choice in met or choices), key=_finite_loss)

    def _cut(self, rules: Sequence[Rule], chosen: Chosen, repair: FamilyRepair | None) -> Cut:
        structures, keeps, scores, timed, _ = chosen
        self.report("cutting", 0.0)
        check_shrink(self.model, structures, keeps, example_input=self.example)
        plan = plan_cut(structures, keeps)
        small = copy_of(self.model)
        apply_cut(small, plan)
        small.eval()
        repaired = self._repair(small, plan, repair)
        names = " and ".join(dict.fromkeys(type(rule.criterion).__name__ for rule in rules))
        return Cut(
            model=small,
            plan=plan,
            keeps={s.name: keep for s, keep in zip(structures, keeps, strict=True)},
            structures=structures,
            skipped=self.found.skipped,
            dense=self.dense,
            small=size_of(small, self.data, self.data.mean_loss),
            criterion=names,
            repaired=repaired,
            samples=self.data.size,
            scored=self.scored or self.data.size,
            settled=self.settled if self.scored < self.data.size else None,
            seconds=self.seconds,
            scores=scores,
            timed=timed,
            proof=self.found.proof,
            rotated=self.rotated,
        )

    def chosen(self, rules: Sequence[Rule]) -> tuple[list[Structure], list[Tensor]]:
        """What rules cut, and what they keep of each: bool (units,)."""
        found = self._chosen(rules)
        return found.structures, found.keeps

    def _with_whole(self, whole: Set[str], rules: Sequence[Rule], choices: Sequence[Chosen]) -> Chosen | None:
        """The same budgets met with nothing gone of these kinds; None where the first choice has all of one of them,
        where that cannot be, or is one of the choices."""
        first = choices[0]
        gone = {s.kind for s, keep in zip(first.structures, first.keeps, strict=True) if not keep.all()}
        goals = {rule.goal[0] for rule in rules if rule.goal is not None and whole & {*(rule.kinds or ())}}
        if not whole <= gone or not goals or ("residual" in whole and goals != {"latency"}):
            return None
        others = [rule if rule.goal is None else without_kinds(rule, whole) for rule in rules]
        try:
            found = self._chosen([rule for rule in others if rule is not None]) if None not in others else None
        except ValueError:  # more than the budget stays
            return None
        if found is None:
            return None
        keep_of = {s.name: torch.ones(s.units, dtype=torch.bool) for s in first.structures}
        keep_of |= {s.name: keep for s, keep in zip(found.structures, found.keeps, strict=True)}
        keeps = [keep_of[s.name] for s in first.structures]
        if any(all(map(torch.equal, keeps, choice.keeps)) for choice in choices):
            return None
        return first._replace(keeps=keeps, timed=found.timed, missed=found.missed)

    def _chosen(self, rules: Sequence[Rule]) -> Chosen:
        structures: list[Structure] = []
        keeps: list[Tensor] = []
        scores: dict[str, Tensor] = {}
        timed, missed = "", False
        for number, rule in enumerate(rules):
            part = self._part(rule)
            part.take_scores(self.scores[number])
            masks = part.choose([schedule.final for schedule in part.schedules])
            for target, keep in zip(part.unit_targets, masks, strict=True):
                structures.append(target.structure)
                scores[target.name] = target.ranked.cpu()
                keeps.append(self._exchanged(rule.criterion, target.name, keep.reshape(-1).cpu()))
            missed |= part.budget is not None and part.budget.missed([mask.cpu() for mask in masks]) is not None
            if part.budget is not None and part.budget.reached is not None:
                timed = f"{percent(part.budget.reached)} of the dense network's milliseconds{part.budget.measure}"
        return Chosen(structures, keeps, scores, timed, missed)

    def structures(self, rule: Rule) -> list[Structure]:
        """What a rule can cut, in the model's order."""
        return [target.structure for target in self._part(rule).unit_targets]

    def ranked(self, number: int, rule: Rule) -> dict[str, Tensor]:
        """What the units of each structure are ranked by, (units,), from the scores of that number."""
        part = self._part(rule)
        part.take_scores(self.scores[number])
        return {target.name: target.ranked.cpu() for target in part.unit_targets}

    def _part(self, rule: Rule) -> Part:
        """Milliseconds that cannot be reached with narrow streams, whose norms take longer, may be with whole ones."""
        whole, key = without_kinds(rule, {"residual"}), (rule.goal, *(rule.kinds or ()))
        tried = whole if whole is not None and key in self._whole_streams else rule
        try:
            return Part(tried, self._twin, example_input=self.example, epochs=None, found=self.found)
        except FloorError:
            is_latency = rule.goal is not None and rule.goal[0] == "latency"
            if tried is whole or whole is None or not is_latency or "residual" not in (rule.kinds or ()):
                raise
            self._whole_streams.add(key)
            return self._part(rule)

    def _scored(self, part: Part, settle: Sequence[Rule]) -> dict[str, Tensor]:
        structures = [target.structure for target in part.unit_targets]
        size = self.data.size

        def note(done: int) -> None:
            self.report("scoring", done / size)

        criterion = part.criterion
        counted = [rule for rule in settle if rule.goal is None or rule.goal[0] != "latency"]  # a clock takes seconds
        settled = Settled(partial(self._kept, [self._part(rule) for rule in counted])) if counted else None
        if not criterion.reads_inputs and criterion.of_gates(torch.zeros(1, 1)) is None:
            found = unit_scores(self.model, structures, criterion, self.data, progress=note, stop=settled)
            self._note_scored(settled)
            return found
        data, gates = self.data, self.gates
        of_outputs = self.data.of_outputs(self.model) if criterion.reads_inputs else None
        if of_outputs is not None:
            data, gates = of_outputs, self._felt
        new = [s for s in structures if s.name not in gates]
        by_gates = Fisher() if criterion.reads_inputs else criterion  # which the same gradients settle
        if new:

            def so_far(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
                return {name: _of_gates(by_gates, gates_bu) for name, gates_bu in {**gates, **rows}.items()}

            stop = None if settled is None else lambda n, rows: settled(n, lambda: so_far(rows()))
            gates |= gate_gradients(self.model, new, data, progress=note, stop=stop)
            self._note_scored(settled)
        if not criterion.reads_inputs:
            return {s.name: _of_gates(criterion, gates[s.name]) for s in structures}
        branches = [s for s in structures if s.kind == "branches" and s.name not in self._changes]
        if branches and of_outputs is not None:
            self._changes |= branch_changes(self.model, branches, of_outputs)
        reading = readers(self.model, structures, self.data)

        def score(name: str) -> Tensor:
            if name in self._changes:
                return self._changes[name]
            if reading[name]:
                return criterion.of_readers(reading[name], gates[name]).cpu()
            return _of_gates(by_gates, gates[name])

        return {s.name: score(s.name) for s in structures}

    def _kept(self, parts: Sequence[Part], scores: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """What parts keep by running scores; None where these say nothing yet."""
        found: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            try:
                part.take_scores(scores)
                masks = part.choose([schedule.final for schedule in part.schedules])
            except ValueError:
                return None
            found |= {f"{number} {t.name}": keep for t, keep in zip(part.unit_targets, masks, strict=True)}
        return found

    def _note_scored(self, settled: Settled | None) -> None:
        batches = self.data.batches[: settled.after if settled is not None else None]
        self.scored = max(self.scored, sum(batch.size for batch in batches))
        self.settled = max(self.settled, len(batches))

    def _exchanged(self, criterion: Criterion, name: str, keep: Tensor) -> Tensor:
        """The set-aware choice of as many units, where scores are second moments of gates."""
        removed = int((~keep).sum())
        return exchange(self.gates[name], removed) if isinstance(criterion, Fisher) and removed else keep

    def _repair(self, small: nn.Module, plan: CutPlan, repair: FamilyRepair | None) -> RepairReport | None:
        inputs = [(example, None) for example in self.data.calls()]  # pairs: labels that are read are inputs
        self.report("repairing", 0.0)
        if repair == "shared":
            if self._shared is None:
                chosen = {name for scores in self.scores for name in scores}
                tensors = [m.tensor for s in self.found.structures if s.name in chosen for m in s.consumers]
                names = dict.fromkeys(tensor.rpartition(".")[0] for tensor in tensors)
                self._shared = SharedMoments(self.model, inputs, list(names))
            return self._shared.refit(small, plan)
        if repair == "least_squares":
            return least_squares(small, self.model, inputs, plan, progress=partial(self.report, "repairing"))
        return batchnorm(small, inputs, dense=self.model, plan=plan) if repair == "batchnorm" else None


def check_model(model: nn.Module) -> None:
    """ValueError for what is no network, a wrapper around one, one of several processes, or without gradients."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}: it must be a torch.nn.Module")
    refuse_wrapped(model)
    refuse_several()
    refuse_inference_mode()


def check_repair(repair: str | None, allowed: Sequence[str] = REPAIRS) -> None:
    """ValueError for what is no repair."""
    if repair is not None and repair not in allowed:
        raise ValueError(f"repair is {repair!r}: it must be {', '.join(map(repr, allowed))} or None")


def one_rule(name: str, share: Any, criterion: Criterion | None, repair: FamilyRepair | None, **settings: Any) -> Rule:
    """The rule that the settings of `cut` describe; without a criterion the one that fits the repair."""
    if name == "budget" and read_budget(share) is None:
        raise ValueError(f"budget={share} names no cost: give one, as in {{'latency': 0.5, 'runtime': 'onnxruntime'}}")
    if criterion is None:
        criterion = OBS() if repair in ("least_squares", "shared") else Fisher()
    how: dict[str, Any] = {"target_sparsity": share} if name == "sparsity" else {"budget": {name: share}}
    if name == "budget":
        how = {"budget": share}
    return Rule(criterion, schedule=OneShot(), structured=True, **how, **settings)


def refuse_of_units(given: Mapping[str, Any], pattern: str | Pattern, repair: str | None) -> None:
    """ValueError for settings that have no meaning for single weights."""
    if repair == "batchnorm":
        raise ValueError(f"repair='batchnorm' is of units, and pattern={pattern!r} prunes single weights")
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"pattern={pattern!r} prunes single weights, where {name} has no effect: leave it out")


def refuse_of_weights(criterion: Criterion | None, scope: WeightScope | None) -> None:
    """ValueError for settings of single weights without a pattern."""
    if scope is not None:
        raise ValueError(f"scope={scope!r} is of single weights: give a pattern too, such as '1x1', or leave it out")
    if isinstance(criterion, Criterion) and not criterion.scores_units:
        name = type(criterion).__name__
        raise ValueError(f"{name} scores single weights: say which with a pattern, '1x1' or '2:4'")


def amount(given: Mapping[str, Any]) -> tuple[str, Any]:
    """The one setting that says how much to cut, and its value; ValueError for none or several."""
    named = {name: share for name, share in given.items() if share is not None}
    if len(named) != 1:
        said = f"{' and '.join(named)} both say" if named else "nothing says"
        raise ValueError(f"{said} how much to cut: set one of {', '.join(given)}")
    return next(iter(named.items()))


def checked_rules(rules: Sequence[Rule], others: Mapping[str, Any]) -> list[Rule]:
    """The rules, to be met at once; ValueError where another setting says what to cut, too."""
    named = [name for name, value in others.items() if value is not None]
    if "max_drop" in named:
        raise ValueError("rules and max_drop both say how much to cut: set one of them")
    if named:
        raise ValueError(f"rules and {named[0]} both say what to cut: set {named[0]} in a rule")
    if not rules:
        raise ValueError("rules is empty: there is nothing to cut")
    for number, rule in enumerate(rules):
        check_kind(f"rules[{number}]", rule, Rule)
    return [replace(rule, schedule=OneShot()) for rule in rules]


@contextmanager
def shown(progress: bool | Report) -> Iterator[Report]:
    """What takes the progress: a line on the terminal, nothing, or the caller's own."""
    if progress is not True:
        yield progress or silent
        return
    line = Line()
    try:
        yield line
    finally:
        line.close()


def without_kinds(rule: Rule, whole: Set[str]) -> Rule | None:
    """The rule without these kinds; None if it has no others."""
    kinds = None if rule.kinds is None else tuple(kind for kind in rule.kinds if kind not in whole)
    return None if kinds == () else replace(rule, kinds=kinds)


def _finite_loss(cut: Cut) -> float:
    """To compare by: without one, or where it is no number, nothing is smaller than the other."""
    loss = cut.small.loss
    return loss if loss is not None and math.isfinite(loss) else math.inf


def _needs_loss(criterion: Criterion) -> bool:
    return criterion.cumulative or criterion.reads_inputs


def _of_gates(criterion: Criterion, gates_bu: Tensor) -> Tensor:
    score = criterion.of_gates(gates_bu)
    assert score is not None
    return score


def _change(before: int, after: int) -> str:
    """
    >>> _change(2_000_000, 1_000_000)
    '2.00M -> 1.00M (50.0 %)'
    """
    return f"{count(before)} -> {count(after)} ({percent(after / before)})"
