"""`Rule`: the settings of one part of a pruner, and what they cannot be. Nothing here looks at a model."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, TypedDict, TypeVar, get_args

from torch import Tensor

from gsprune.cost.budgets import BudgetSettings, read_budget
from gsprune.criteria import Criterion
from gsprune.ranking.patterns import Pattern, parse_pattern
from gsprune.schedules import Cubic, Schedule
from gsprune.structures.structure import Counted, Kind
from gsprune.text.names import did_you_mean

Scope = Literal["local", "global", "isomorphic"]
FLOOR = 0.1  # the share of each structure that stays at least where structures are ranked together
Scores = Mapping[str, Tensor] | str | os.PathLike[str]  # as `Pruner.scores` gives them, or a file of them
Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass(frozen=True)
class Rule:
    """What to prune, by which scores, how much of it and when: one part of a `gsprune.Pruner`.

    Args:
        criterion: how to score, from `gsprune.criteria`.
        target_sparsity: share of weights or units to prune, in [0, 1). None: the schedule's own, which `keep` and
            `budget` override too.
        schedule: training progress -> sparsity, from `gsprune.schedules`. None: the pruner's, or `Cubic()`.
        budget: share of the dense network's cost that may stay, as {"macs": 0.5}, {"params": 0.3} or {"latency": 0.6}
            (of a forward pass of `example_input`, on the model's device), instead of a share of units. All structures
            are ranked together (unless `scope` says otherwise; scores that estimate the loss change, `Fisher`'s, are
            divided by what a unit costs), and the ranking is cut where the budget is met. The schedule then says what
            share of the cost is gone. Needs units. A latency budget takes some seconds to measure, and measures again
            during training; a resumed run does that too, so it continues bit-identically only between two measurements.
            With several rules each budget counts as if the other rules removed nothing. Beside the cost it may say
            where milliseconds are those of: "runtime" ("eager", "compile", "onnxruntime", "openvino"; a network that
            ships is measured where it runs), "batch" (samples; the example's) and "threads"; and "round_to", of which
            the channels and neurons that stay in a structure are a multiple (8 for latency, else 1); and "uniform":
            True lets structures of one kind and size keep the same count, so that a `config.json` can say it.
        keep: units to keep in every structure of a kind, as {"heads": 8, "neurons": 600}, instead of a share;
            kinds not named stay whole.
        kinds: kinds of units to prune, of "channels", "neurons", "heads", "residual" (positions of a residual stream
            behind LayerNorm or RMSNorm: the hidden width) and "branches" (whole attentions and MLPs: the depth). None:
            the first three, or those that `keep` names.
        structured: prune units, which are cut out in the end, or single weights. None: the criterion's own way.
        pattern: selection groups of single weights: "1x1", a tile "NxM", or a block "N:M".
        per_channel: every output channel (row of tiles) reaches the sparsity, not only every tensor.
        scope: "local", every tensor or structure reaches the sparsity; "global", one ranking over all; "isomorphic",
            for units, one ranking over each set of structures that are alike (`gsprune.structures.alike`), and each
            set reaches the sparsity. None: global for weights and under a `budget`, local for units.
        min_kept: groups kept at least in every tensor or structure.
        min_share: share of the groups kept at least in every tensor or structure, in [0, 1), where several are ranked
            together. None: a tenth for units (half of what stays of all, if that is less), 0 for single weights.
        include, exclude: `*` patterns for names of tensors, modules or structures; exclude wins.
        scores: initial running scores, as `Pruner.scores()` gives them, or the path of a file of them. The first mask
            update then needs no batch. No effect on a criterion that accumulates nothing.

    Raises:
        ValueError: a setting is out of its range, or contradicts another.

    >>> from gsprune.criteria import Abs
    >>> rule = Rule(Abs(), kinds=["heads"], target_sparsity=0.25)
    >>> rule.units, rule.ranking
    (True, 'local')
    """

    criterion: Criterion
    _: KW_ONLY
    target_sparsity: float | None = None
    schedule: Schedule | None = None
    budget: BudgetSettings | None = None
    keep: Mapping[Counted, int | None] | None = None
    kinds: Sequence[str] | None = None
    structured: bool | None = None
    pattern: str | Pattern = "1x1"
    per_channel: bool = False
    scope: Scope | None = None
    min_kept: int = 1
    min_share: float | None = None
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    scores: Scores | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_kind("criterion", self.criterion, Criterion)
        check_kind("schedule", self.schedule or Cubic(), Schedule)
        check_number("target_sparsity", self.target_sparsity)
        check_number("min_kept", self.min_kept, whole=True, is_open=False)
        check_number("min_share", self.min_share)
        _check_types(self)
        _check_amount(self)
        _check_settings(self)

    @property
    def units(self) -> bool:
        """Whether units are pruned, and not single weights."""
        return not self.criterion.scores_weights if self.structured is None else self.structured

    @property
    def ranking(self) -> Scope:
        """`scope`, with what None means filled in."""
        return self.scope or ("local" if self.units and self.goal is None else "global")

    @property
    def goal(self) -> tuple[str, float] | None:
        """The kind of cost and the share of it that `budget` names."""
        return read_budget(self.budget)

    @property
    def counts(self) -> dict[str, int]:
        """What `keep` counts: kind of units -> how many stay."""
        return {kind: count for kind, count in (self.keep or {}).items() if count is not None}

    @property
    def normalizes(self) -> bool:
        """Whether scores are divided by their structure's mean: the criterion's `normalize`, with None filled in."""
        if self.criterion.normalize is None:
            return self.ranking != "local" and not self.criterion.calibrated
        return self.criterion.normalize

    def floor(self, final: float | None) -> float:
        """`min_share`, with what None means filled in; `final` is the sparsity wanted in the end, None under a budget.

        Raises:
            ValueError: `min_share` leaves less to prune than that.
        """
        if self.min_share is None:
            return 0.0 if not self.units or self.ranking == "local" else min(FLOOR, (1 - (final or 0)) / 2)
        if final is not None and self.min_share > 1 - final:
            raise ValueError(
                f"min_share is {self.min_share:g}, but {final:g} of all is to go: it must be at most {1 - final:g}"
            )
        return self.min_share

    @property
    def share(self) -> float | None:
        """The sparsity that the rule asks for; None: the schedule's own."""
        return self.target_sparsity if self.goal is None else round(1 - self.goal[1], 12)


class Settings(TypedDict, total=False):
    """The settings of a `Rule` that `Pruner` takes as keywords; `schedule` and `scores` are parameters of its own."""

    target_sparsity: float | None
    budget: BudgetSettings | None
    keep: Mapping[Counted, int | None] | None
    kinds: Sequence[str] | None
    structured: bool | None
    pattern: str | Pattern
    per_channel: bool
    scope: Scope | None
    min_kept: int
    min_share: float | None
    include: Sequence[str]
    exclude: Sequence[str]


def takes_settings(method: Method) -> Method:
    """Write the settings of a rule, with their defaults, into the signature of a method that has `**settings`."""
    own = inspect.signature(method)
    *parameters, _ = own.parameters.values()
    rule = inspect.signature(Rule).parameters
    settings = [rule[name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in Settings.__annotations__]
    vars(method)["__signature__"] = own.replace(parameters=[*parameters[:3], *settings, *parameters[3:]])
    return method


# ---- what the settings cannot be


def check_kind(name: str, given: object, kind: type) -> None:
    """ValueError where something is not an instance of the class."""
    if isinstance(given, type) and issubclass(given, kind):
        raise ValueError(f"{name} is the class {given.__name__}: give an instance of it, {given.__name__}(...)")
    if not isinstance(given, kind):
        raise ValueError(f"{name} is a {type(given).__name__}: it must be a {kind.__module__}.{kind.__name__}")


def check_number(name: str, value: object, *, whole: bool = False, is_open: bool = True) -> None:
    """ValueError where something is no number, or None where that is not allowed."""
    if value is None and is_open:
        return
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        wanted = "a whole number" if whole else "a number"
        raise ValueError(f"{name} is {value!r}, a {type(value).__name__}: it must be {wanted}")


def _check_types(rule: Rule) -> None:
    keep, kinds = rule.keep, rule.kinds
    if keep is not None and not isinstance(keep, Mapping):
        raise ValueError(f"keep is {keep!r}: it must map kinds of units to how many stay, as in {{'neurons': 600}}")
    if kinds is not None and (isinstance(kinds, str) or not isinstance(kinds, Collection) or not kinds):
        raise ValueError(f"kinds is {kinds!r}: it must list kinds of units, as in ['neurons'], or be None for all")
    known = tuple(kind for kind in get_args(Kind) if kind != "experts")
    for kind in kinds or ():
        if kind == "experts":
            raise ValueError("kinds names 'experts': whole experts are removed by gsprune.cut_experts, once")
        if kind not in known:
            raise ValueError(
                f"kinds names {kind!r}, which is no kind of units: there are {', '.join(known)}"
                f"{did_you_mean(kind, known)}"
            )
    for name in ("structured", "per_channel"):
        value = getattr(rule, name)
        if not isinstance(value, bool) and not (value is None and name == "structured"):
            raise ValueError(f"{name} is {value!r}, a {type(value).__name__}: it must be True or False")


def _check_amount(rule: Rule) -> None:
    """`budget`, `keep` and `target_sparsity` say the same thing in three ways."""
    counts, share = rule.counts, rule.target_sparsity
    both = "both say how much stays: set only one of them"
    if rule.goal is not None:
        kind, left = rule.goal
        given = f"budget={{{kind}: {left:g}}}"
        if not rule.units:
            name = type(rule.criterion).__name__
            raise ValueError(f"{given} needs units, but {name} zeroes single weights here: set target_sparsity instead")
        if counts:
            raise ValueError(f"{given} and keep={counts} {both}")
        if share is not None:
            raise ValueError(f"{given} and target_sparsity={share} {both}")
    if counts and share is not None:
        raise ValueError(f"keep={counts} and target_sparsity={share} {both}")
    fixed = parse_pattern(rule.pattern).final_sparsity
    if fixed is not None and share is not None and not math.isclose(share, fixed, abs_tol=1e-9):
        raise ValueError(f"target_sparsity is {share}, but the pattern fixes it: it must be {fixed:g}")


def _check_settings(rule: Rule) -> None:
    """Contradictions, and settings without effect."""
    criterion, units, counts = rule.criterion, rule.units, rule.counts
    name = type(criterion).__name__
    for kind, count in counts.items():
        if type(count) is not int:
            raise ValueError(f"keep.{kind} is {count!r}: it must be a whole number of units")
    if not (criterion.scores_units if units else criterion.scores_weights):
        what, other = ("units", "false") if units else ("single weights", "true")
        raise ValueError(f"{name} cannot score {what}: set structured={other} or take another criterion")
    if rule.ranking not in get_args(Scope):
        near = did_you_mean(rule.scope, get_args(Scope))
        raise ValueError(f'scope is {rule.scope!r}: it must be "local", "global" or "isomorphic"{near}')
    if rule.ranking == "isomorphic" and not units:
        raise ValueError(
            f"scope isomorphic ranks like structures, but {name} prunes single weights here: set it to local"
        )
    if rule.min_kept < 1:
        raise ValueError(f"min_kept is {rule.min_kept}: it must be 1 or more")
    if rule.min_share is not None and not 0 <= rule.min_share < 1:
        raise ValueError(f"min_share is {rule.min_share}: it must be in [0, 1)")
    if rule.min_share and rule.ranking == "local" and rule.goal is None:
        raise ValueError(
            f"min_share={rule.min_share:g} has no effect under scope local, where all keep the same share: set scope "
            f"to global or isomorphic"
        )
    if counts and not units:
        raise ValueError(f"keep={counts} counts units, but {name} prunes single weights here")
    if rule.kinds is not None and not units:
        raise ValueError(f"kinds={[*rule.kinds]} names units, but {name} prunes single weights here")
    if rule.kinds is not None and counts:
        raise ValueError("kinds and keep both name what to prune: give one of them")
    if counts and rule.ranking != "local":
        raise ValueError(
            f"keep counts units in each structure, which a scope of {rule.ranking} does not: set scope to local"
        )
    if rule.per_channel and rule.ranking != "local":
        raise ValueError("per_channel needs scope local: with one ranking over all, channels do not reach a sparsity")
    if units and (rule.per_channel or parse_pattern(rule.pattern) != parse_pattern("1x1")):
        raise ValueError(
            f"pattern and per_channel are for single weights, but {name} prunes units here: leave them out"
        )
    if criterion.normalize and rule.ranking == "local":
        raise ValueError(
            "normalize has no effect under scope local, where it divides each structure by its own mean: set scope to "
            "global or isomorphic"
        )
