"""`Part`: one rule on one model: its targets, their running scores, and the masks computed from them.

A part has no epochs, no steps and no other parts: `Pruner` calls it when something is due.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gsprune.cost.budgets import Budget, floor_text, read_measure
from gsprune.pruner.compiled import check_compiled
from gsprune.pruner.find_targets import traceable, unit_targets, weight_targets
from gsprune.pruner.rule import Rule
from gsprune.pruner.targets import Share, Target, Targets, Verdict, sum_of, tensor_of
from gsprune.pruner.units import UnitTarget
from gsprune.pruner.weights import WeightTarget
from gsprune.ranking.patterns import parse_pattern
from gsprune.ranking.selection import least_kept, pruned_count
from gsprune.schedules import Cubic, OneShot, Ramp, Schedule
from gsprune.structures.alike import alike
from gsprune.structures.matrices import coverage, warn_of_little
from gsprune.structures.shards import is_sharded_model

if TYPE_CHECKING:
    from gsprune.structures.structure import Found, Structure

_STATE = ("criterion", "scores", "masks", "applied", "scored", "unseen", "looked", "updates")


class Part:
    """A rule applied to a model.

    Attributes:
        rule: the settings.
        all, targets: what is pruned, together and one by one.
        schedules: of each target.
        together: numbers of the targets of each ranking.
        min_share: share of each target's groups that stays at least.
        skipped: structures or tensors that cannot be pruned -> why.
        left_out: structures that could be, but for include, exclude, kinds and keep.
        coverage: share of the model's matrix weights that is targeted.
        budget: how a budget is met, if the rule has one.
        updates: mask updates that pruned something.
    """

    def __init__(
        self, rule: Rule, model: nn.Module, *, example_input: Any, epochs: float | None, found: Found | None = None
    ) -> None:
        self.rule, self.criterion = rule, rule.criterion
        schedule = _resolved(rule, epochs)
        self.all: Targets
        self.skipped: Mapping[str, str] = {}
        self.left_out: Sequence[Structure] = ()
        if rule.units:
            self.all, self.skipped, self.left_out = unit_targets(
                model,
                example_input,
                include=rule.include,
                exclude=rule.exclude,
                kinds=rule.kinds,
                counts=rule.counts,
                found=found,
            )
        else:
            pattern = parse_pattern(rule.pattern)
            self.all, self.skipped = weight_targets(
                model, pattern, include=rule.include, exclude=rule.exclude, per_channel=rule.per_channel
            )
        self.targets: Sequence[Target] = self.all.targets
        if rule.criterion.spread_decay is not None:
            self.all.keep_spread()
        if rule.criterion.compiled:
            check_compiled(rule.criterion, self.all.score.device)
        self._check_trainable()
        tensors = targeted(model, self.targets)
        network, example = traceable(model, example_input) if rule.units else (model, example_input)
        self.coverage = coverage(model, tensors)
        if not rule.units:
            warn_of_little(model, self.skipped, tensors, self.coverage, stacklevel=3)
        self.schedules = [_schedule_for(target, schedule, rule.counts) for target in self.targets]
        self.together = self._rankings(network)
        self.min_share = rule.floor(None if rule.goal is not None or rule.counts else schedule.final)
        self.updates = 0
        self._applied = [0.0] * len(self.targets)  # sparsity each target's mask was last made for
        self._scored = torch.zeros((), dtype=torch.int64, device=self.all.score.device)  # batches that counted
        self._unseen = {t.name for t in self.targets} if self.criterion.cumulative else set()  # without a gradient
        self._reads: dict[str, list[str]] = {}  # target -> tensors that the criterion reads of it
        self._looked = 0  # steps in which gradients were looked for since the pruner was made
        self._in_step: set[str] = set()  # targets that one of several optimizers has scored in this step
        self._counted: Tensor | None = None  # whether one of them counted
        self._flat: set[str] = set()  # targets that were warned about
        self.budget: Budget | None = None
        if rule.goal is not None:
            if rule.goal[0] == "latency" and is_sharded_model(model):
                raise ValueError("budget.latency times the network, which no process has whole: set macs or params")
            structures = [target.structure for target in self.unit_targets]
            self.budget = Budget(
                *rule.goal,
                network,
                structures,
                example,
                min_kept=rule.min_kept,
                min_share=self.min_share,
                measure=read_measure(rule.budget),
                round_to=(rule.budget or {}).get("round_to"),
                uniform=(rule.budget or {}).get("uniform") or False,
                together=self.together,
            )

    # ---- what there is to see

    @property
    def units(self) -> bool:
        """Whether units are pruned, and not single weights."""
        return self.rule.units

    @property
    def unit_targets(self) -> list[UnitTarget]:
        """The targets that are structures."""
        return [target for target in self.targets if isinstance(target, UnitTarget)]

    @property
    def weight_targets(self) -> list[WeightTarget]:
        """The targets that are tensors."""
        return [target for target in self.targets if isinstance(target, WeightTarget)]

    @property
    def share(self) -> Share:
        """How many weights or units are pruned, of how many targeted."""
        return sum_of(target.share for target in self.targets)

    @property
    def target_sparsity(self) -> float | None:
        """The share the schedule ends with, over all targets; None under a budget, where the scores decide."""
        if self.budget is not None:
            return None
        wanted = (s.final * t.total for s, t in zip(self.schedules, self.targets, strict=True))
        return round(sum(wanted) / sum(target.total for target in self.targets), 12)  # 0.7, not 0.7000000000000001

    @property
    def criterion_name(self) -> str:
        """The class of the criterion."""
        return type(self.criterion).__name__

    @property
    def asked(self) -> int:
        """How many weights or units are to go in the end, each target by itself; of branches, all of them together."""
        pairs = [*zip(self.schedules, self.targets, strict=True)]
        branches = [schedule for schedule, target in pairs if target.of == "branches"]
        together = pruned_count(branches[0].final, len(branches)) if branches else 0
        return together + sum(pruned_count(s.final, t.total) for s, t in pairs if t.of != "branches")

    @property
    def finished(self) -> bool:
        """Whether the mask is final."""
        return all(now >= s.final for now, s in zip(self._applied, self.schedules, strict=True))

    @property
    def wanted(self) -> str:
        """The share to be reached, for `repr`."""
        if self.budget is not None:
            return f"{1 - self.budget.share:.1%} of {self.budget.kind} less"
        return f"{self.target_sparsity:.1%}"

    def __str__(self) -> str:
        """
        >>> from gsprune.criteria import Magnitude
        >>> str(Part(Rule(Magnitude(), target_sparsity=0.5), nn.Linear(2, 2), example_input=None, epochs=None))
        '4 weights in 1 tensor, by Magnitude(decay=1.0), global'
        """
        kinds = " and ".join(dict.fromkeys(target.of for target in self.targets))
        homes = ("structure" if self.units else "tensor") + ("" if len(self.targets) == 1 else "s")
        total = sum(target.total for target in self.targets)
        return f"{total:,} {kinds} in {len(self.targets)} {homes}, by {self.criterion}, {self.rule.ranking}"

    # ---- scores

    def begin_step(self) -> None:
        """Begin a training step, in which each target is scored once."""
        self._in_step.clear()
        self._counted = None

    def score(
        self,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        *,
        held: Collection[int] | None,
        judged: Collection[int] = (),
    ) -> None:
        """Add this step's changes to the running scores, of what these tensors (by id; None: all) are part of.

        Args:
            judged: tensors (by id) that `found_inf` speaks for.
        """
        if not self.criterion.cumulative or (self.finished and self.updates):
            return  # with a target of 0 there is no update, but scores there are: another pruner may start from them
        if not self._choose_due(held):
            return
        with torch.no_grad():
            finite = self.all.probe(self.criterion, judged)
            if found_inf is not None:
                finite = finite & (found_inf.reshape(()) == 0)
            self._note_present(first=held is None or self._counted is None)
            self.all.accumulate_(self.criterion, Verdict(finite, self.criterion, grad_scale))
            if any(self.all.present):
                self._count(finite, once=held is not None)

    def scores(self) -> dict[str, Tensor]:
        """The running scores; what is pruned has 0."""
        return {
            name: t.outside(running.masked_fill(~t.keep, 0.0))
            for t in self.targets
            for name, running in t.running.items()
        }

    def take_scores(self, scores: Mapping[str, Tensor]) -> None:
        """Replace the running scores by checked ones; zeros everywhere count as no scores."""
        with torch.no_grad():
            for target in self.targets:
                for name, running in target.running.items():
                    running.copy_(target.here(scores[name]))
            self._scored.fill_(int(self.all.any_score()))
            self.all.settle_()
        if int(self._scored):
            self._unseen.clear()

    def _note_present(self, *, first: bool) -> None:
        """Note which targets have had a gradient by now: the host knows that without waiting.

        Raises:
            ValueError: in the first step: something was frozen since the pruner was made.
        """
        self._looked += first  # of several optimizers the first one counts the step
        if self._looked == 1 and first:
            self._check_trainable()
        if self._unseen:
            self._unseen -= {t.name for t, here in zip(self.targets, self.all.present, strict=True) if here}

    def _check_trainable(self) -> None:
        """ValueError for a target that never gets a gradient."""
        names = self.all.frozen(self.criterion) if self.criterion.cumulative else []
        if names:
            raise ValueError(
                f"{_first_of(names)} never gets a gradient (requires_grad is False), and {self.criterion_name} "
                f"scores by gradients: exclude it, or take a criterion without, such as Magnitude"
            )

    def _choose_due(self, held: Collection[int] | None) -> bool:
        """Whether there is something to score: what the optimizer holds that steps, and was not scored in this step."""
        for target in self.targets:
            target.due = held is None or (target.name not in self._in_step and self._is_read_of(target, held))
        due = [target.name for target in self.targets if target.due]
        self._in_step.update(due)
        return bool(due)

    def _is_read_of(self, target: Target, held: Collection[int]) -> bool:
        """Whether the criterion reads a gradient of one of these tensors for the target."""
        if target.name not in self._reads:
            self._reads[target.name] = [*target.scored(self.criterion)]
        own = target.own()
        return any(id(own[name]) in held for name in self._reads[target.name])

    def _count(self, finite: Tensor, *, once: bool) -> None:
        """Count the batch, or with `once` the step that several optimizers make."""
        before = self._counted if once else None
        self._scored += finite if before is None else finite & ~before
        self._counted = finite if before is None else finite | before

    # ---- masks

    def due(self, progress: float | None) -> list[float] | None:
        """The sparsity of each target at this progress (None: the last), if a mask update is due."""
        wanted = [s.final if progress is None else s(progress) for s in self.schedules]
        return wanted if any(now > before for now, before in zip(wanted, self._applied, strict=True)) else None

    def update(
        self, wanted: Sequence[float], *, optimizers: Sequence[Optimizer], copies: Sequence[nn.Module], patience: int
    ) -> bool:
        """A mask update, the only place that waits for the device: whether something more was pruned.

        Args:
            patience: steps in which a target may have had no gradient yet; the update stays due until then.

        Raises:
            ValueError: a target still had no gradient; scores are not finite, or say nothing.
        """
        if self._waits_for_gradients(patience) or (self.criterion.cumulative and not int(self._scored)):
            return False
        with torch.no_grad():
            if not self.criterion.cumulative:
                self.all.compute_(self.criterion)
            before = [target.pruned for target in self.targets]
            for target, keep in zip(self.targets, self.choose(wanted), strict=True):
                target.set_keep(keep)
            self.all.settle_()
            self.all.mask_state_(optimizers)
        for copy in copies:
            self.mask(copy)
        self._applied = list(wanted)
        if before == [target.pruned for target in self.targets]:
            return False  # a share that has not grown by a whole group
        self.updates += 1
        self.apply()
        return True

    def choose(self, wanted: Sequence[float]) -> list[Tensor]:
        """The masks of the selection groups that the scores ask for at these sparsities; none is set.

        Raises:
            ValueError: scores are not finite, or say nothing.
        """
        groups = [_checked(target) for target in self.targets]
        self._check_flat(groups)
        return self._select(groups, wanted)

    def apply(self) -> None:
        """Zero what is pruned."""
        with torch.no_grad():
            self.all.apply_()

    def mask(self, network: nn.Module) -> None:
        """Zero in a network of the same architecture what is pruned in the model."""
        for target in self.targets:
            target.mask(network)

    def restore(self, model: nn.Module, *, copies: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> None:
        """Use the tensors that the model has now; zero what is pruned in them, the copies and optimizer states."""
        for target in self.targets:
            target.find(model)
        for network in (model, *copies):
            self.mask(network)
        with torch.no_grad():
            self.all.mask_state_(optimizers)

    def drop(self, kept: Mapping[str, Mapping[int, Tensor]]) -> None:
        """Count single weights as pruned that units of another rule take along.

        Args:
            kept: tensor name -> dimension -> positions that stay, as of a `CutPlan`.
        """
        with torch.no_grad():
            for target in self.weight_targets:
                if target.name in kept:
                    target.drop(kept[target.name])
            self.all.settle_()
            self.all.apply_()

    def masks(self) -> dict[str, Tensor]:
        """The masks, in the shapes of the dense network."""
        return {target.name: target.outside(target.keep.clone()) for target in self.targets}

    def take_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Take over masks, as final."""
        for target in self.targets:
            keep = masks[target.name]
            target.check(keep, keep)
            zeros = torch.zeros_like(target.outside(target.score))
            target.load(dict.fromkeys(target.running, zeros), keep)
        branches = [target for target in self.targets if target.of == "branches"]  # one unit each, which may be gone
        gone = sum(target.pruned for target in branches) / max(1, len(branches))
        shares = [gone if target.of == "branches" else target.pruned / target.total for target in self.targets]
        self.schedules = [OneShot(target_sparsity=min(share, 1 - 1e-9)) for share in shares]
        self._applied = [schedule.final for schedule in self.schedules]
        self.updates = 1
        with torch.no_grad():
            self.all.settle_()

    def check_reached(self) -> None:
        """Warn where `min_kept` (or a pattern) kept more than the target allows, or a budget is missed."""
        if self.budget is not None:
            if missed := self.budget.missed([target.keep.cpu() for target in self.targets]):
                warnings.warn(missed, stacklevel=4)
            return
        asked = self.asked
        reached, slack = sum(target.pruned for target in self.targets), max(1.0, 0.01 * asked)
        if reached < asked - slack:
            warnings.warn(
                f"the sparsity reached is {float(self.share):.3f} instead of {self.target_sparsity:.3f}: "
                f"{floor_text(self.rule.min_kept, self.min_share)} in each of {len(self.targets)} tensors or "
                f"structures, or the pattern, allows no more",
                stacklevel=4,
            )

    def _waits_for_gradients(self, patience: int) -> bool:
        """Whether an update has to wait for a first gradient: scores that are all 0 would prune by index."""
        if not self._unseen or not self._looked:
            return False
        if self._looked < patience:
            return True
        names = [target.name for target in self.targets if target.name in self._unseen]
        raise ValueError(
            f"{_first_of(names)} had no gradient in {self._looked} steps, so its scores are all 0 and pruning it would "
            f"be arbitrary: exclude it if the loss does not use it"
        )

    def _check_flat(self, groups: Sequence[Tensor]) -> None:
        """Warn of targets whose scores are all equal; ValueError if that is so in every target."""
        flat: dict[str, float] = {}
        for target, group in zip(self.targets, groups, strict=True):
            low, high = target.range(group)
            if low == high and target.total - target.pruned > group.shape[0]:
                flat[target.name] = high
        if not flat:
            return
        name, value = next(iter(flat.items()))
        what = f"{value:g}" if len(set(flat.values())) == 1 else "one number in each"
        why = "the loss does not depend on it, or its gradients are too small for their type"
        why = why if self.criterion.cumulative else "its weights are all equal"
        numbers = [[flat.get(self.targets[i].name) for i in ranking] for ranking in self.together]
        told_apart = any(len({*values} - {None}) > 1 for values in numbers)  # one tensor from another
        groups_of = zip(self.targets, groups, strict=True)
        if not told_apart and len(flat) == sum(t.total - t.pruned > len(g) for t, g in groups_of):
            raise ValueError(
                f"all scores are equal ({what}) in {name} and in every other target, which leaves no choice: {why}"
            )
        if fresh := [name for name in flat if name not in self._flat]:
            self._flat.update(fresh)
            more = f" and of {len(fresh) - 1} more" if len(fresh) > 1 else ""
            warnings.warn(
                f"all scores of {fresh[0]}{more} are equal ({flat[fresh[0]]:g}), so which of them are pruned is "
                f"arbitrary: {why}",
                stacklevel=7,
            )

    def _select(self, groups: Sequence[Tensor], wanted: Sequence[float]) -> list[Tensor]:
        if self.rule.normalizes:
            branches = [group for target, group in zip(self.targets, groups, strict=True) if target.of == "branches"]
            whole = torch.cat([group.reshape(-1) for group in branches]) if branches else None  # each has one unit
            groups = [
                _normalized(group, whole if target.of == "branches" else None)
                for target, group in zip(self.targets, groups, strict=True)
            ]
        if self.budget is not None:
            scores = [group.reshape(-1) for group in groups]
            by_cost = self.criterion.calibrated and not self.rule.normalizes
            return self.budget.cut(scores, 1 - wanted[0], by_cost=by_cost)
        if self.rule.ranking != "local":
            groups = [group.reshape(1, -1) for group in groups]
        keeps = [*groups]
        for ranking in self.together:
            ranked, targets = [groups[i] for i in ranking], [self.targets[i] for i in ranking]
            found = self.all.select(ranked, wanted[ranking[0]], targets, least=self.least)
            for i, keep in zip(ranking, found, strict=True):
                keeps[i] = keep
        return keeps

    def least(self, groups: int, of: str = "") -> int:
        """How many of the groups that a target has in a ranking stay in any case; of branches each may go."""
        return 0 if of == "branches" else least_kept(groups, self.rule.min_kept, self.min_share)

    def _rankings(self, model: nn.Module) -> list[list[int]]:
        if self.rule.ranking == "local":  # but for branches, which are structures of one unit each
            branches = [i for i, target in enumerate(self.targets) if target.of == "branches"]
            return [[i] for i in range(len(self.targets)) if i not in branches] + ([branches] if branches else [])
        if self.rule.ranking == "global":
            return [[*range(len(self.targets))]]
        return alike(model, [target.structure for target in self.unit_targets])

    # ---- a resumed run

    def state_dict(self) -> dict[str, Any]:
        """Scores, masks and counts."""
        measured = self.budget.state_dict() if self.budget is not None else {}
        return {
            "criterion": self.criterion_name,
            "scores": {name: t.outside(running.clone()) for t in self.targets for name, running in t.running.items()},
            "masks": self.masks(),
            "applied": list(self._applied),
            "scored": int(self._scored),
            "unseen": sorted(self._unseen),
            "looked": self._looked,
            "updates": self.updates,
            **({"budget": measured} if measured else {}),
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """ValueError that names the first thing in which a saved state is not of this rule and these targets."""
        measured = ("budget",) if self.budget is not None and self.budget.state_dict() else ()
        missing = sorted({*_STATE, *measured} - set(state))
        if missing:
            raise ValueError(f"this is not a pruner's state: it has no {missing[0]!r}")
        check_counts(state, "scored", "looked", "updates")
        if state["criterion"] != self.criterion_name:
            raise ValueError(
                f"the saved scores are of {state['criterion']}, and this rule's are of {self.criterion_name}"
            )
        scores, masks = state["scores"], state["masks"]
        names = {target.name for target in self.targets}
        running = {name for target in self.targets for name in target.running}
        odd = sorted((set(scores) ^ running) | (set(masks) ^ names))
        if odd or len(state["applied"]) != len(names):
            name = odd[0] if odd else "one of them"
            raise ValueError(f"the saved state and this pruner do not have the same targets: {name} is in one only")
        for target in self.targets:
            target.check(*(scores[name] for name in target.running), masks[target.name])
        for target, now, schedule in zip(self.targets, state["applied"], self.schedules, strict=True):
            if not (isinstance(now, int | float) and 0 <= now <= 1):
                raise ValueError("this is not a pruner's state: its 'applied' is no list of shares")
            if now > schedule.final + 1e-9:
                what = target.of if self.budget is None else self.budget.kind
                raise ValueError(
                    f"the saved state has pruned {now:.1%} of the {what}, and this pruner is to prune "
                    f"{schedule.final:.1%}: what is pruned does not come back"
                )

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state that was checked."""
        for target in self.targets:
            target.load(state["scores"], state["masks"][target.name])
        if self.budget is not None and "budget" in state:
            self.budget.load_state_dict(state["budget"])
        self._applied = list(state["applied"])
        self._scored.fill_(state["scored"])
        self._unseen, self._looked = set(state["unseen"]), state["looked"]
        self.updates = state["updates"]


def targeted(model: nn.Module, targets: Sequence[Target]) -> list[Tensor]:
    """What loses entries: the targets' weights, or what their units are cut out of."""
    units = [target.structure for target in targets if isinstance(target, UnitTarget)]
    cut = dict.fromkeys(m.tensor for structure in units for m in (*structure.producers, *structure.consumers))
    weights = [target.weight for target in targets if isinstance(target, WeightTarget)]
    return [*weights, *(tensor_of(model, name) for name in cut)]


def check_counts(state: Mapping[str, Any], *names: str) -> None:
    """ValueError where one of these is no count."""
    for name in names:
        if not (type(state[name]) is int and 0 <= state[name] < 2**63):
            raise ValueError(f"this is not a pruner's state: its {name!r} is no count")


def _resolved(rule: Rule, epochs: float | None) -> Schedule:
    """The rule's schedule with its target and end filled in."""
    schedule = rule.schedule or Cubic()
    final = rule.share if rule.share is not None else parse_pattern(rule.pattern).final_sparsity
    if final is not None:
        schedule = schedule.retargeted(final)
    if not rule.counts and schedule.final == 0:
        warnings.warn("target_sparsity=0 has no effect: nothing will be pruned", stacklevel=4)
    if epochs is None:
        return schedule
    schedule = schedule.resolved(epochs)
    end = schedule.end_epoch if isinstance(schedule, Ramp) else schedule.start_epoch
    if end is not None and end >= epochs > 0:
        warnings.warn(
            f"the schedule ends at epoch {end:g} of {epochs:g}: the last of the pruning gets no training after it",
            stacklevel=4,
        )
    return schedule


def _schedule_for(target: Target, schedule: Schedule, counts: Mapping[str, int]) -> Schedule:
    """The schedule of one target: the common one, or the way to its own kept count."""
    if not counts:
        return schedule
    kept = counts[target.of]
    if not 1 <= kept <= target.total:
        raise ValueError(
            f"keep asks for {kept} {target.of} in {target.name}, which has {target.total}: "
            f"it must be 1 to {target.total}"
        )
    return schedule.retargeted(1 - kept / target.total)


def _first_of(names: Sequence[str]) -> str:
    """
    >>> _first_of(["a"]), _first_of(["a", "b", "c"])
    ('a', 'a (and 2 more)')
    """
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def _checked(target: Target) -> Tensor:
    """The target's group scores, or an error if the running score holds an inf or a NaN."""
    groups = target.groups()
    if (
        not math.isfinite(best := target.best(groups)) and target.pruned < target.total
    ):  # -inf is what is pruned already
        raise ValueError(f"the score of {target.name} is not finite ({best}): its gradients or weights grew too large")
    return groups


def _normalized(group: Tensor, whole: Tensor | None = None) -> Tensor:
    """Scores divided by the mean of those that are not pruned: their L2 norm would starve structures of many units.

    `whole` is what the mean is taken of, if not the scores themselves.
    """
    whole = group if whole is None else whole
    gone = whole.isneginf()
    mean = whole.masked_fill(gone, 0).sum() / (~gone).sum()
    return group / mean if mean > 0 else group
