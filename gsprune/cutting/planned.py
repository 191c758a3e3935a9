"""What a cut would do to a network, before there is any data: `gsprune.plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from gsprune.cost.budgets import BudgetSettings
from gsprune.criteria import Criterion, Elementwise, Fisher, SparseGPT
from gsprune.cutting.cut import amount, check_model, checked_rules, one_rule, refuse_of_units, refuse_of_weights
from gsprune.cutting.weights import WeightScope, check_weights
from gsprune.forecast.plan import PruningPlan
from gsprune.forecast.predict import plan as planned_by
from gsprune.pruner.pruner import Pruner
from gsprune.pruner.rule import Rule
from gsprune.pruner.targets import counting_only
from gsprune.ranking.patterns import Block, Pattern, parse_pattern
from gsprune.schedules import OneShot
from gsprune.structures.example import example_of

__all__ = ["plan"]


def plan(
    model: nn.Module,
    example_input: Any,
    *,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    budget: BudgetSettings | None = None,
    sparsity: float | None = None,
    criterion: Criterion | None = None,
    rules: Sequence[Rule] | None = None,
    kinds: Sequence[str] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    pattern: str | Pattern | None = None,
    scope: WeightScope | None = None,
) -> PruningPlan:
    """What `gsprune.cut` with the same settings, or a `Pruner` with the same rules, would prune: no data, no training.

    What goes, what that saves of parameters and MACs, what stays whole and why. Counts are exact where every structure
    gives the same share; where scores decide (budgets, one ranking over all), each structure has bounds, and the
    savings are those of an even cut.

    Args:
        model: stays as it is. It may be on the meta device, with its input, where it is too large to load.
        example_input: what it is called with: a tensor, a tuple of arguments, or a mapping of named ones. MACs are
            those of this input, so take one sample.
        macs, params, latency, budget, sparsity: how much, as of `gsprune.cut`; nothing: half of the units of every
            structure, and with a pattern half of the weights.
        criterion: what would score; it decides what can be scored, and not how much goes.
        rules, kinds, include, exclude, pattern, scope: as of `gsprune.cut`.

    Raises:
        ValueError: a setting out of its range or without effect; nothing of the model can be pruned, and why.

    Example:
        >>> import torch
        >>> found = plan(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), torch.ones(1, 8))
        >>> found.dense.params, found.pruned.params, found.rules[0].skipped
        (178, 90, {'2': "it feeds the model's output"})
        >>> print(found)
        OBS removes units: 8 of 16 in 1 structure stay (50.0 %).
        178 -> 90 parameters (1.98x), 160 -> 80 MACs for an input of 1x8 (2.00x).
        <BLANKLINE>
        structure (+ layers)  units that stay  parameters       MACs
        ------------------------------------------------------------
        0                     8 of 16 neurons   144 -> 72  128 -> 64
        ------------------------------------------------------------
        whole model             8 of 16 units   178 -> 90  160 -> 80
        <BLANKLINE>
        Left whole
          2: it feeds the model's output
        <BLANKLINE>
        Nothing was trained, the model is as it was.
    """
    check_model(model)
    given: dict[str, Any] = {"macs": macs, "params": params, "latency": latency, "budget": budget}
    given["sparsity"] = sparsity
    if pattern is not None:
        refuse_of_units(
            {"macs": macs, "params": params, "latency": latency, "budget": budget, "rules": rules, "kinds": kinds},
            pattern,
            None,
        )
        chosen = [_rule_of_weights(model, criterion, sparsity, pattern, scope, include=include, exclude=exclude)]
    elif rules is not None:
        refuse_of_weights(criterion, scope)
        chosen = checked_rules(rules, {**given, "criterion": criterion})
    else:
        refuse_of_weights(criterion, scope)
        if all(share is None for share in given.values()):
            given["sparsity"] = 0.5
        name, share = amount(given)
        chosen = [one_rule(name, share, criterion, "least_squares", kinds=kinds, include=include, exclude=exclude)]
    names = [type(rule.criterion).__name__ for rule in chosen]
    example_input = example_of(example_input)
    with counting_only():
        pruner = Pruner(model, rules=[_countable(rule) for rule in chosen], example_input=example_input)
        found = planned_by(model, pruner, example_input)
    named = tuple(replace(rule, criterion=name) for rule, name in zip(found.rules, names, strict=True))
    return replace(found, rules=named)


def _countable(rule: Rule) -> Rule:
    """With a criterion that a pruner takes: it counts the same, whatever scores."""
    if not rule.criterion.reads_inputs:
        return rule
    return replace(rule, criterion=Fisher() if rule.units else Elementwise())


def _rule_of_weights(
    model: nn.Module,
    criterion: Criterion | None,
    share: float | None,
    given: str | Pattern,
    scope: WeightScope | None,
    **names: Sequence[str],
) -> Rule:
    criterion, pattern = SparseGPT() if criterion is None else criterion, parse_pattern(given)
    if share is None and pattern.final_sparsity is None:
        share = 0.5
    scope, share = check_weights(model, criterion, share, pattern, scope)
    return Rule(
        criterion,
        structured=False,
        target_sparsity=share,
        pattern=pattern,
        per_channel=scope == "row" and not isinstance(pattern, Block),
        scope="global" if scope == "global" else "local",
        schedule=OneShot(),
        include=names["include"],
        exclude=names["exclude"],
    )
