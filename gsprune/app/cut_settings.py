"""The settings of `mode=cut`, what of a pruner's configuration a cut takes, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import DictConfig

from gsprune.app.configuration import COSTS, budget_of, build, hydra_choices
from gsprune.cutting.cut import REPAIRS, Repair
from gsprune.cutting.weights import check_levels
from gsprune.ranking.patterns import parse_pattern
from gsprune.training.checks import check, check_choice

if TYPE_CHECKING:
    from gsprune.cost.budgets import CostKind
    from gsprune.criteria import Criterion
    from gsprune.pruner.rule import Rule

MODES = ("train", "cut")


@dataclass(frozen=True)
class CutSettings:
    """How `mode=cut` cuts a trained network; how much of it goes is the pruner's setting, or `max_drop`.

    `repair` and `calibration` are for the cuts of `mode=train` too, where there is no repair unless it is asked for.

    Args:
        repair: "least_squares" refits what reads the removed units to the dense network's outputs, "batchnorm"
            re-estimates the statistics of BatchNorm alone, None leaves the cut network as it is.
        calibration: samples of the training split that score the network and repair it.
        max_drop: points of accuracy (of 100) that may be lost, instead of a budget: the largest cut of MACs (the
            largest sparsity of single weights) is taken whose drop on the validation split is certified to be no larger
            (`gsprune.cutting.how_much`).
        confidence: of that, in (0, 1).
        curve: budgets of other cuts of the same network, of the same kind as the pruner's, as [0.9, 0.7, 0.3]: scored
            once, each is measured and kept beside the job's own. Of single weights, shares of them that stay.

    Raises:
        ValueError: one sentence for each setting outside its range.
    """

    repair: Repair | None = "least_squares"
    calibration: int = 512
    max_drop: float | None = None
    confidence: float = 0.95
    curve: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.repair is not None:
            check_choice("cut.repair", self.repair, REPAIRS, more=", or null")
        check(self.calibration >= 1, "cut.calibration", self.calibration, "1 or more")
        drop, sure = self.max_drop, self.confidence
        check(drop is None or 0 < drop < 100, "cut.max_drop", drop, "points of 100, above 0 and below 100, or null")
        check(0 < sure < 1, "cut.confidence", sure, "above 0 and below 1")
        shares = [*(self.curve or ())]
        right = len(set(shares)) == len(shares) and all(0 < share < 1 for share in shares)
        check(right, "cut.curve", shares, "a list of different shares, each above 0 and below 1")


def curve_shares(settings: CutSettings) -> list[float]:
    """What stays in each of the other cuts, the mildest first."""
    return sorted(settings.curve or (), reverse=True)


def is_cut(cfg: DictConfig) -> bool:
    """Whether the job cuts a trained network instead of pruning it while it trains."""
    mode = cfg.get("mode", "train")
    check_choice("mode", mode, MODES)
    return bool(mode == "cut")


def settings_of(cfg: DictConfig) -> CutSettings:
    """Those of a job; a configuration without them repairs nothing while it trains."""
    if cfg.get("cut") is None:
        return CutSettings() if is_cut(cfg) else CutSettings(repair=None)
    return build(cfg.cut)  # type: ignore[no-any-return]


def check_mode(cfg: DictConfig) -> None:
    """Refuse what has no meaning for `mode=cut`, before data or network are built.

    Raises:
        ValueError: in one sentence.
    """
    settings = settings_of(cfg)
    pruner, trainer = cfg.pruner, cfg.trainer
    if not is_cut(cfg):
        for name, given in (("max_drop", settings.max_drop), ("curve", settings.curve)):
            if given is not None:
                raise ValueError(f"cut.{name}={given} has no effect with mode=train: set mode=cut")
        return
    if str(pruner.get("_target_")).endswith(".no_pruning"):
        raise ValueError(
            "mode=cut with pruner=none cuts nothing: take pruner=fisher, abs, weighted, magnitude or random"
        )
    if cfg.get("plan"):
        raise ValueError("plan=true shows what pruning while training would leave: mode=cut is over in minutes, run it")
    for key, harmless in (("shrink", (None, "at_end")), ("scores", (None,))):
        if (given := pruner.get(key)) not in harmless:
            raise ValueError(f"pruner.{key}={given} has no effect with mode=cut, which scores once and cuts once")
    amounts = {f"budget.{kind}": share for kind, share in budget_of(pruner).items()}
    amounts |= {key: value for key in ("target_sparsity", "keep") if (value := _given(pruner.get(key))) is not None}
    if settings.max_drop is not None and amounts:
        ((key, value), *_) = amounts.items()
        raise ValueError(
            f"cut.max_drop={settings.max_drop} and pruner.{key}={value} both say how much is cut: set one of them"
        )
    for override in hydra_choices()["overrides"]:
        key = override.lstrip("+~").partition("=")[0]
        if key.startswith(("pruner/schedule", "pruner.schedule.")) and not key.endswith(".target_sparsity"):
            raise ValueError(f"{override} has no effect with mode=cut, which cuts at once and has no schedule")
    if trainer.dense_epochs == 0 and is_random(cfg):
        raise ValueError(
            "mode=cut cuts a trained network: give model.weights=<a safetensors file>, or trainer.dense_epochs to "
            "train it first"
        )


def _given(value: Any) -> Any:
    """What of a setting was given: of a mapping the values that are not null; None for nothing."""
    if isinstance(value, DictConfig):
        return {key: inner for key, inner in value.items() if inner is not None} or None
    return value


def is_random(cfg: DictConfig) -> bool:
    """Whether the configuration leaves the network with random weights; one of a user's own may load its own."""
    return (
        isinstance(cfg.model, DictConfig)
        and "weights" in cfg.model
        and cfg.model.weights is None
        and not cfg.model.get("pretrained")
    )


def _keywords(pruner: DictConfig) -> dict[str, Any]:
    """The settings that a pruner's configuration makes a `Pruner` with.

    Raises:
        ValueError: it has neither a criterion nor rules.
    """
    given: dict[str, Any] = dict(getattr(build(pruner), "keywords", {}))
    if given.get("criterion") is None and not given.get("rules"):
        raise ValueError(f"mode=cut needs a pruner with a criterion or rules, and {pruner.get('_target_')} has neither")
    return given


@dataclass(frozen=True)
class SingleWeights:
    """What of a pruner's configuration `gsprune.cutting.weights.prune_weights` takes; no sparsity: `cut.max_drop`."""

    criterion: Criterion
    sparsity: float | None
    pattern: str
    scope: Literal["row", "layer", "global"] | None
    include: Sequence[str]
    exclude: Sequence[str]


def single_weights(cfg: DictConfig) -> SingleWeights | None:
    """What a pruner of single weights prunes; None for a pruner of units.

    Raises:
        ValueError: other settings of the cut have no meaning for single weights, or for the pattern.
    """
    given = _keywords(cfg.pruner)
    criterion = given.get("criterion")
    structured = given.get("structured")
    if criterion is None or not (criterion.scores_weights if structured is None else not structured):
        return None
    settings = settings_of(cfg)
    if settings.repair == "batchnorm":
        raise ValueError(f"cut.repair=batchnorm is for units, and {type(criterion).__name__} prunes single weights")
    pattern = str(given.get("pattern", "1x1"))
    for name, value in (("max_drop", settings.max_drop), ("curve", settings.curve)):
        if value is not None:
            check_levels(pattern, f"cut.{name}", value)
    share = given.get("target_sparsity")
    if share is None and ":" not in pattern and settings.max_drop is None:
        share = getattr(given.get("schedule"), "target_sparsity", None)
    scope = {"local": "layer", "global": "global", None: None}[given.get("scope")]
    scope = "row" if given.get("per_channel") else scope
    names = {name: list(given.get(name) or default) for name, default in (("include", ["*"]), ("exclude", []))}
    return SingleWeights(criterion, share, pattern, scope, **names)  # type: ignore[arg-type]


def rules_of(pruner: DictConfig) -> list[Rule]:
    """The rules of a pruner's configuration, each with its amount: a schedule's is that of its end.

    Raises:
        ValueError: a rule among several is of single weights.
    """
    from gsprune.pruner.rule import Rule
    from gsprune.schedules import OneShot

    given = _keywords(pruner)
    names = {field.name for field in fields(Rule)} - {"scores"}
    schedule = given.get("schedule")
    rules: Sequence[Rule] = given.get("rules") or [Rule(**{k: v for k, v in given.items() if k in names})]
    found = []
    for number, rule in enumerate(rules):
        where = f"pruner.rules.{number}" if given.get("rules") else "pruner"
        if not rule.units:
            raise ValueError(
                f"{where} prunes single weights, which mode=cut does alone and not among rules: take one rule, or "
                f"mode=train"
            )
        final = getattr(rule.schedule or schedule, "target_sparsity", None)
        share = final if rule.share is None and not rule.counts else rule.target_sparsity
        found.append(replace(rule, target_sparsity=share, schedule=OneShot()))
    return found


def curve_rules(cfg: DictConfig) -> dict[float, Rule]:
    """The rule of each cut of `cut.curve`: the pruner's one, with another budget.

    Raises:
        ValueError: the pruner has several rules, or no budget.
    """
    settings = settings_of(cfg)
    shares, rules = curve_shares(settings), rules_of(cfg.pruner)
    if settings.max_drop is not None and len(rules) != 1:
        raise ValueError(f"cut.max_drop={settings.max_drop} ranks all units together: give a pruner of one rule")
    if shares and (len(rules) != 1 or (rules[0].goal is None and settings.max_drop is None)):
        raise ValueError(
            f"cut.curve={shares} are budgets of the pruner's kind: give a pruner of one rule with one, such as "
            f"pruner.budget.macs=0.5"
        )
    return {share: with_budget(rules[0], share) for share in shares}


def budget_kind(rule: Rule) -> CostKind:
    """What the budget of a rule is of; "macs" without one."""
    return rule.goal[0] if rule.goal else "macs"  # type: ignore[return-value]


def with_budget(rule: Rule, share: float) -> Rule:
    """The rule with that budget, of its own kind, instead of its own amount.

    Raises:
        ValueError: it has a scope of its own, local, which no budget has.
    """
    budget: Any = {name: value for name, value in (rule.budget or {}).items() if name not in COSTS}
    budget[budget_kind(rule)] = share
    return replace(rule, budget=budget, target_sparsity=None, keep=None)


def wanted(cfg: DictConfig) -> dict[str, Any]:
    """`target_sparsity` and `budget` of the result of a cut."""
    if (weights := single_weights(cfg)) is not None:
        fixed = parse_pattern(weights.pattern).final_sparsity
        return {"target_sparsity": weights.sparsity if fixed is None else fixed, "budget": None}
    rules, budget = rules_of(cfg.pruner), budget_of(cfg.pruner) or None
    share = rules[0].target_sparsity if len(rules) == 1 and settings_of(cfg).max_drop is None else None
    return {"target_sparsity": share, "budget": budget}
