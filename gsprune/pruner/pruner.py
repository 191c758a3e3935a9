"""`Pruner`: the hooks a training loop calls, and when a mask is due. The rooms below do scores, selection and masks."""

from __future__ import annotations

import difflib
import math
import os
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gsprune.cost.budgets import Budget, CostKind, read_target
from gsprune.criteria import Criterion, Magnitude
from gsprune.pruner.attaching import Attachable
from gsprune.pruner.choose import weight_targets
from gsprune.pruner.describe import amount, as_html, describe
from gsprune.pruner.targets import Share, Target, Targets, Verdict, sum_of
from gsprune.pruner.units import UnitTarget, UnitTargets
from gsprune.pruner.weights import WeightTarget
from gsprune.ranking.patterns import Pattern, parse_pattern
from gsprune.ranking.selection import pruned_count
from gsprune.schedules import Cubic, OneShot, Ramp, Schedule
from gsprune.structures.matrices import coverage, is_sharded, warn_of_little
from gsprune.structures.structure import Kind
from gsprune.surgery.copies import check_copies
from gsprune.surgery.optimizers import Optimizers, check_follows, held, names_of

if TYPE_CHECKING:
    from gsprune.structures.structure import Structure
    from gsprune.surgery.cut_plan import CutPlan
    from gsprune.surgery.shrink import Shrinker

Scope = Literal["local", "global"]
When = Literal["at_end", "each_update"]
Scores = Mapping[str, Tensor] | str | os.PathLike[str]  # as `Pruner.scores` gives them, or a file of them


class Pruner(Attachable):
    """Prune a model while it trains, by what its gradients say the loss would feel.

    Every step adds to the running score, S <- decay * S + s, with w a weight, g its gradient and u a unit:

        elementwise   s = abs(w * g)                                      for each weight
        abs           s_u = abs(sum of w[:, u] * g[:, u])                 over the columns that read unit u
        weighted      s_u = abs(sum of w[u, :] * g[u, :] + b[u] * g_b[u])  over the rows that compute it, or over the
                      affine pair of a BatchNorm behind them

    A tensor without a gradient in a step (None: a layer that was dropped, an expert that was not asked) has taken no
    part in it: nothing is added to its score, and that does not decay either, however long this lasts. The first mask
    waits, for an epoch at most, until everything has had a gradient once.

    Scores and masks have the shape of their weight, or (units,). When an update is due, of n groups the
    floor(sparsity * n + 0.5) with the lowest scores go (`gsprune.ranking.selection`).

    Call the hooks from a loop of your own (see the README), or `attach` the pruner to an optimizer:

        pruner.on_train_begin()
        for epoch in range(epochs):
            pruner.on_epoch_begin(epoch)
            for step, batch in enumerate(loader):
                pruner.on_step_begin(step)            # a due mask update happens here, from scores already seen
                loss.backward()                       # x accumulation steps, then unscale
                pruner.on_before_optimizer_step()     # gradients are read: before clipping
                optimizer.step()
                pruner.on_step_end()                  # masks are re-applied: momentum and weight decay revive weights
                optimizer.zero_grad()
            pruner.on_epoch_end()
        pruner.on_train_end()                         # final mask; units are cut out of the model

    Inside a step nothing waits for the device; a mask update (a few in an epoch) does.

    Args:
        model: pruned in place.
        criterion: how to score, from `gsprune.criteria`.
        target_sparsity: share of weights or units to prune, in [0, 1). None: the schedule's own, which `keep` and
            `target` override too.
        keep: units to keep in every structure of a kind, as {"heads": 8, "neurons": 600}, instead of a share;
            kinds not named stay whole.
        kinds: kinds of units to prune, of "channels", "neurons" and "heads"; None: all, or those that `keep` names.
        target: share of the dense network's cost that may stay, as {"macs": 0.5}, {"params": 0.3} or {"latency": 0.6}
            (of a forward pass of `example_input`, on the model's device), instead of a share of units: one ranking
            over all structures is cut where that is met. The schedule then says what share of the cost is gone. Needs
            units. A latency budget measures at once, for some seconds, and looks
            at the clock again on the way; a resumed run does that too, so it goes on bit-identically only between two
            such looks. Of several pruners each counts as if the others removed nothing.
        schedule: training progress -> sparsity, from `gsprune.schedules`.
        pattern: selection groups of single-weight pruning: "1x1", a tile "NxM", or a block "N:M".
        per_channel: every output channel (row of tiles) reaches the sparsity, not only every tensor.
        scope: "local", every tensor or structure reaches the sparsity, or "global", one ranking over all.
            None: global for weights and under a `target`, local for units.
        structured: prune units (and shrink the model in the end) or single weights. None: the criterion's own way.
        min_kept: groups kept at least in every tensor or structure.
        include, exclude: `*` patterns for names of tensors, modules or structures; exclude wins.
        example_input: a batch (tensor, tuple or dict) to trace the model with; needed for units.
        optimizer: one or several; their memory of pruned weights is zeroed, and they follow the model when it shrinks,
            with the optimizers inside them (of a wrapper, SAM, Lookahead). What cannot follow (LBFGS, 8-bit state) is
            refused under "each_update"; "at_end" it forgets what it knew of the parameters that were cut.
        steps_per_epoch: optimizer steps in an epoch; without it masks are updated between epochs only.
        epochs: length of the run, of which a schedule without `end_epoch` takes two thirds.
        scores: what the running score starts from instead of zero, as `scores()` of another pruner gave it, or the
            path of a file that `gsprune.formats.scores.save_scores` wrote: the first mask update waits for no batch.
            Without effect on a criterion that accumulates nothing. A loaded state replaces it.
        shrink: cut pruned units out of the model "at_end", or at "each_update" of the mask: training gets faster as the
            model gets smaller. The optimizer's state is cut alike, so that the next step is that of the masked model
            (clipping excepted: a masked weight's gradient still counts in the norm of a masked model). Under
            `torch.compile` every cut compiles anew, everything in the process: let `update_frequency` be a whole epoch.
        copies: networks of the same architecture that are masked and cut along with the model: the `.module` of an
            EMA's `AveragedModel`, whose average then has what the model has. An average of zeros stays zero, so that
            they are masked at each update and in the end.

    Raises:
        ValueError: a setting out of its range, or one that contradicts another or the model.

    Example:
        >>> from gsprune.criteria import Magnitude
        >>> from gsprune.schedules import OneShot
        >>> model = nn.Linear(4, 1)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.5, 2.0, 3.0]]))
        >>> pruner = Pruner(model, Magnitude(), target_sparsity=0.5, schedule=OneShot())
        >>> pruner.on_step_begin(0)
        >>> model.weight.tolist(), pruner.sparsity
        ([[0.0, 0.0, 2.0, 3.0]], 0.5)
        >>> pruner
        Pruner of 4 weights in 1 tensor, by Magnitude(decay=1.0), global
          pruned: 2 of 4 (50.0 %), as wanted: 50.0 %; the mask is final
          at epoch 0, 1 mask update
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        *,
        target_sparsity: float | None = None,
        keep: Mapping[Kind, int | None] | None = None,
        kinds: Sequence[str] | None = None,
        target: Mapping[CostKind, float | None] | None = None,
        schedule: Schedule | None = None,
        pattern: str | Pattern = "1x1",
        per_channel: bool = False,
        scope: Scope | None = None,
        structured: bool | None = None,
        min_kept: int = 1,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        example_input: Any = None,
        optimizer: Optimizers | None = None,
        steps_per_epoch: int | None = None,
        epochs: float | None = None,
        scores: Scores | None = None,
        shrink: When = "at_end",
        copies: Sequence[nn.Module] = (),
    ) -> None:
        _check_kind("criterion", criterion, Criterion)
        _check_kind("schedule", schedule or Cubic(), Schedule)
        _check_numbers(
            target_sparsity=target_sparsity, min_kept=min_kept, steps_per_epoch=steps_per_epoch, epochs=epochs
        )
        _check_types(keep=keep, kinds=kinds, structured=structured, per_channel=per_channel)
        self.model, self.criterion, self.optimizer = model, criterion, optimizer
        if isinstance(model, nn.Module):
            check_copies(model, copies)
        self.structured = not criterion.scores_weights if structured is None else structured
        counts: dict[str, int] = {kind: count for kind, count in (keep or {}).items() if count is not None}
        if (goal := read_target(target)) is not None:
            _check_goal(self, counts, scope, *goal, target_sparsity=target_sparsity)
            scope, target_sparsity = "global", round(1 - goal[1], 12)
        if counts and target_sparsity is not None:
            raise ValueError(
                f"keep={counts} and target_sparsity={target_sparsity} both say how much stays: set only one of them"
            )
        self.scope = scope or ("local" if self.structured else "global")
        self.min_kept, self.steps_per_epoch, self.shrink = min_kept, steps_per_epoch, shrink
        self._example_input, self.copies = example_input, copies
        self._shrinker: Shrinker | None = None  # of units alone
        self.skipped: Mapping[str, str] = {}  # structures or tensors that are left alone unasked -> why
        self.left_out: tuple[Structure, ...] = ()  # those that could be, but for include, exclude and keep
        parsed = parse_pattern(pattern)
        _check_settings(self, parsed, counts, kinds, per_channel=per_channel)
        schedule = _resolve(schedule or Cubic(), parsed, target_sparsity, epochs, counted=bool(counts))
        if self.structured:
            self._all: Targets = self._unit_targets(include, exclude, counts, kinds)
        else:
            self._all, self.skipped = weight_targets(
                model, parsed, include=include, exclude=exclude, per_channel=per_channel
            )
        self.targets = self._all.targets
        self._check_trainable()
        self.coverage = coverage(model, targeted(model, self.targets))
        if not self.structured:
            warn_of_little(model, self.skipped, targeted(model, self.targets), self.coverage, stacklevel=2)
        self.schedules = [_schedule_for(target, schedule, counts) for target in self.targets]
        self._applied = [0.0] * len(self.targets)  # sparsity each target's mask was last made for
        self._scored = torch.zeros((), dtype=torch.int64, device=self._all.score.device)  # batches that counted
        self._unseen = {target.name for target in self.targets} if criterion.cumulative else set()  # without a gradient
        self._reads: dict[str, list[str]] = {}  # target -> tensors that the criterion reads of it
        self._looked = 0  # steps in which gradients were looked for since the pruner was made
        self._in_step: set[str] = set()  # targets that one of several optimizers has scored in this step
        self._counted: Tensor | None = None  # whether one of them counted
        self._flat: set[str] = set()  # targets that were warned about
        self._handles: list[Any] = []
        self.epoch, self.step, self.updates = 0, 0, 0
        self._ended = False
        self.budget: Budget | None = self._budget(*goal) if goal is not None else None
        if scores is not None:
            self._start_from(scores)

    @classmethod
    def from_masks(
        cls,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        *,
        example_input: Any = None,
        optimizer: Optimizers | None = None,
        copies: Sequence[nn.Module] = (),
    ) -> Pruner:
        """A pruner whose masks are final: it keeps a sparse model sparse while that is tuned.

        Masks are applied at once, after each step (`attach`, or the hooks), to what is loaded, and in `finish`; units
        are cut out there. Nothing is scored.

        Args:
            masks: as `masks()` and `gsprune.formats.masks.load_masks` give them: of tensors, or of structures.
            example_input: needed for masks of structures.
            optimizer, copies: as of the constructor.

        Raises:
            ValueError: a mask is of nothing that can be pruned here, has another shape, or is not bool; masks of units
                and of single weights together, or of units without `example_input`.

        >>> model = nn.Linear(2, 2)
        >>> pruner = Pruner.from_masks(model, {"weight": torch.tensor([[True, False], [True, True]])})
        >>> model.weight[0, 1].item(), pruner.sparsity
        (0.0, 0.25)
        """
        units = _are_units(model, masks, example_input)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is not masked is left out on purpose
            pruner = cls(
                model,
                Magnitude(),
                structured=units,
                scope="local",
                target_sparsity=None,
                schedule=OneShot(target_sparsity=0.5),
                include=[re.sub(r"[*?[]", r"[\g<0>]", name) for name in masks],
                example_input=example_input,
                optimizer=optimizer,
                copies=copies,
                steps_per_epoch=1,
            )
        pruner._take_masks(masks)
        return pruner

    # ---- hooks, in the order a loop calls them

    def on_train_begin(self) -> None:
        """Before the first epoch. Masks of a loaded state are applied.

        Raises:
            ValueError: the model is to shrink while it trains, and its optimizer is not known, cannot follow it, or
                does not hold all that is cut; the optimizer holds nothing of what is pruned.
        """
        if self.structured and self.shrink == "each_update":
            if not self.optimizers:
                raise ValueError('shrink="each_update" needs the optimizer, which has to follow the model: give it')
            self._check_held(self.optimizers)
            check_follows(self.optimizers)
        self._check_optimizer()
        self._apply_masks()

    def on_epoch_begin(self, epoch: int) -> None:
        """Before an epoch, counted from 0 at the start of the pruning phase."""
        self.epoch, self.step = epoch, 0

    def on_step_begin(self, step: int) -> None:
        """Before the forward pass of the epoch's optimizer step `step`: a due mask update happens here.

        Raises:
            ValueError: tensors of the model were replaced, and the optimizer trains the old ones.
        """
        self.step = step
        if step == 0:
            self._follow()
        self._in_step.clear()
        self._counted = None
        wanted = [schedule(self.progress) for schedule in self.schedules]
        if any(now > before for now, before in zip(wanted, self._applied, strict=True)):
            self._update(wanted)

    def on_before_optimizer_step(self) -> None:
        """After the backward pass, with gradients unscaled and not yet clipped: scores grow by this step's change.

        A batch whose gradients (of what is pruned) are not finite adds nothing, nor does one that the optimizer's
        `found_inf` says will be skipped.

        Raises:
            ValueError: in the first step: a weight to be scored was frozen since the pruner was made.
        """
        self._score(found_inf=self._found_inf())

    def on_step_end(self) -> None:
        """After the optimizer step: what is pruned is zero again."""
        self._apply_masks()

    def on_epoch_end(self) -> None:
        """After an epoch."""
        self.epoch, self.step = self.epoch + 1, 0

    def on_train_end(self) -> None:
        """After the last epoch: the final mask, if training ended before the schedule did; units are cut out, once.

        What is pruned is zero afterwards in the tensors that the model has now, also where others were loaded.

        Raises:
            ValueError: the smaller model does not compute what the masked one does; it is left masked.
        """
        if not self._ended:
            self.finish_masks()
        self.restore_masks()
        if not self._ended and self.structured:
            self._cut()
        self._ended = True

    def restore_masks(self, copies: Sequence[nn.Module] | None = None) -> None:
        """Zero what is pruned in the tensors that the model and its copies have now, whatever was put in their place.

        So does what the optimizers remember of it: some (schedule-free ones) put the weights together from that.

        Raises:
            ValueError: a tensor has another shape than its mask.
        """
        for target in self.targets:
            target.find(self.model)
            for network in (self.model, *(self.copies if copies is None else copies)):
                target.mask(network)
        with torch.no_grad():
            self._all.mask_state_(self.optimizers)

    def finish_masks(self) -> None:
        """The final mask, if training ended before the schedule did."""
        if not self.finished:
            warnings.warn(
                f"training ended at epoch {self.progress:g}, before the schedule did: the final mask comes without any "
                f"training after it",
                stacklevel=3,
            )
            self._update([schedule.final for schedule in self.schedules], last=True)
            if not self.finished:
                raise ValueError("nothing was pruned: no batch with finite gradients was seen to score it by")
        self._check_reached()

    # ---- what there is to see

    @property
    def progress(self) -> float:
        """Epochs trained, as a float; whole epochs if `steps_per_epoch` is not known."""
        return self.epoch + (self.step / self.steps_per_epoch if self.steps_per_epoch else 0)

    @property
    def share(self) -> Share:
        """How many weights or units are pruned, of how many targeted."""
        return sum_of(self.shares().values())

    @property
    def sparsity(self) -> float:
        """Reached share of pruned weights or units, over everything targeted, in [0, 1): `share` as a number."""
        return float(self.share)

    @property
    def target_sparsity(self) -> float | None:
        """The share the schedule ends with, over everything targeted; None under a budget, where the scores decide."""
        if self.budget is not None:
            return None
        wanted = (s.final * t.total for s, t in zip(self.schedules, self.targets, strict=True))
        return round(sum(wanted) / sum(target.total for target in self.targets), 12)  # 0.7, not 0.7000000000000001

    @property
    def plan(self) -> CutPlan | None:
        """What was cut out of the dense model so far; None before the first cut."""
        return self._shrinker.plan if self._shrinker else None

    @property
    def horizon(self) -> int | None:
        """Optimizer steps that the running score remembers, as `Criterion.horizon`: 0 for none, None for all."""
        return self.criterion.horizon

    @property
    def criterion_name(self) -> str:
        """The class of the criterion, for records."""
        return type(self.criterion).__name__

    @property
    def finished(self) -> bool:
        """Whether the mask is final."""
        return all(now >= s.final for now, s in zip(self._applied, self.schedules, strict=True))

    def report(self) -> dict[str, float]:
        """`sparsity` of all that is targeted, and `coverage`, the share of the model's matrix weights that this is.

        Besides `sparsity/<tensor>` of each tensor, or `kept/<structure>` units of each structure.
        """
        if self.structured:
            each = {f"kept/{target.name}": float(target.total - target.pruned) for target in self.targets}
        else:
            each = {f"sparsity/{name}": float(share) for name, share in self.shares().items()}
        return {"sparsity": self.sparsity, "coverage": self.coverage, **each}

    def shares(self) -> dict[str, Share]:
        """How many weights of each tensor or units of each structure are pruned, of the dense network's."""
        return {target.name: target.share for target in self.targets}

    def masks(self) -> dict[str, Tensor]:
        """bool masks, True = kept: tensor name -> its weight's shape, or structure name -> (units,)."""
        return {target.name: target.outside(target.keep.clone()) for target in self.targets}

    def dense_masks(self) -> dict[str, Tensor]:
        """The masks in the shapes of the dense network, whatever was cut out since: here those of `masks`."""
        return self.masks()

    def scores(self) -> dict[str, Tensor]:
        """The running score, float32 and 0 or more, with the names and shapes of `masks`; what is pruned has 0."""
        return {t.name: t.outside(t.score.masked_fill(~t.keep, 0.0)) for t in self.targets}

    def next_plan(self) -> CutPlan | None:
        """What a cut would leave of the model if training ended now; None if there is nothing to be cut any more."""
        if not self.structured or not self.updates or self.plan is not None:
            return None
        from gsprune.surgery.cut_plan import plan_cut  # heavy: imports torch-pruning

        return plan_cut([target.structure for target in self.unit_targets], list(self.masks().values()))

    def drop(self, kept: Mapping[str, Mapping[int, Tensor]]) -> None:
        """Count single weights as pruned that another pruner's units take along.

        Args:
            kept: tensor name -> dimension -> positions that stay, as of a `CutPlan`.
        """
        with torch.no_grad():
            for target in self.targets:
                if isinstance(target, WeightTarget) and target.name in kept:
                    target.drop(kept[target.name])
            self._all.settle_()
            self._all.apply_()

    def trained(self) -> dict[str, Tensor]:
        """The tensors that are pruned or cut and not frozen, by name: what the optimizers have to hold."""
        named = {name: tensor for target in self.targets for name, tensor in target.named(self.model).items()}
        return {name: tensor for name, tensor in named.items() if tensor.requires_grad}

    def leave_cutting(self) -> None:
        """Mask units only: somebody else cuts them out."""
        self._shrinker = None

    @property
    def unit_targets(self) -> list[UnitTarget]:
        """The targets that are structures."""
        return [target for target in self.targets if isinstance(target, UnitTarget)]

    def __repr__(self) -> str:
        total, pruned = (sum(getattr(target, name) for target in self.targets) for name in ("total", "pruned"))
        few = len(self.targets) == 1
        home = ("structure" if self.structured else "tensor") + ("" if few else "s")
        what = " and ".join(dict.fromkeys(target.structure.kind for target in self.unit_targets)) or "weights"
        title = f"Pruner of {total:,} {what} in {len(self.targets)} {home}, by {self.criterion}, {self.scope}"
        wanted = (
            f"{1 - self.budget.share:.1%} of {self.budget.kind} less" if self.budget else f"{self.target_sparsity:.1%}"
        )
        return describe(self, title, [amount(pruned, total, "")], wanted.replace("%", " %"))

    def _repr_html_(self) -> str:
        return as_html(repr(self))

    def load_scores(self, scores: Scores) -> None:
        """Put saved scores in the place of the running score; masks stay. The next mask update waits for no batch.

        Scores that are 0 everywhere come from no batch that counted, and count as none.

        Args:
            scores: of a pruner with the same targets, or the path of a file of them.

        Raises:
            ValueError: the scores are of other targets, or no scores; names the first tensor that does not fit.
                The pruner stays as it was.
        """
        self._start_from(scores)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on bit-identically: scores, masks, progress."""
        measured = self.budget.state_dict() if self.budget is not None else {}
        return {
            "scores": {target.name: target.outside(target.score.clone()) for target in self.targets},
            "masks": self.masks(),
            "applied": list(self._applied),
            "scored": int(self._scored),
            "unseen": sorted(self._unseen),
            "looked": self._looked,
            "epoch": self.epoch,
            "step": self.step,
            "updates": self.updates,
            "cut": self.plan is not None,
            **({"budget": measured} if measured else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state of a pruner with the same targets.

        Where units had been cut out, the model (the dense one), its copies and the optimizer are cut here: load
        their states afterwards.

        Raises:
            ValueError: the state is of other targets, naming the first that does not fit; the model was cut already.
        """
        needed = {"scores", "masks", "applied", "scored", "epoch", "step", "updates", "cut"}
        if self.budget is not None and self.budget.state_dict():
            needed.add("budget")
        missing = sorted(needed - set(state))
        if missing:
            raise ValueError(f"this is not a pruner's state: it has no {missing[0]!r}")
        for count in ("scored", "epoch", "step", "updates", "looked"):
            if not (type(state.get(count, 0)) is int and 0 <= state.get(count, 0) < 2**63):
                raise ValueError(f"this is not a pruner's state: its {count!r} is no count")
        scores, masks = state["scores"], state["masks"]
        names = {target.name for target in self.targets}
        odd = sorted((set(scores) ^ names) | (set(masks) ^ names))
        if odd or len(state["applied"]) != len(names):
            name = odd[0] if odd else "one of them"
            raise ValueError(f"the saved state and this pruner do not have the same targets: {name} is in one only")
        if self.plan is not None:
            raise ValueError("this pruner has cut its model already: load the state into a pruner of the dense model")
        for target in self.targets:
            target.check(scores[target.name], masks[target.name])
        for target in self.targets:
            target.load(scores[target.name], masks[target.name])
        if self.budget is not None and "budget" in needed:
            self.budget.load_state_dict(state["budget"])
        self._applied = list(state["applied"])
        self._scored.fill_(state["scored"])
        self._unseen, self._looked = set(state.get("unseen", ())), state.get("looked", 0)
        self.epoch, self.step, self.updates = state["epoch"], state["step"], state["updates"]
        if state["cut"]:
            self._cut()

    # ---- inside

    def _score(
        self,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        *,
        held: Collection[int] | None = None,
    ) -> None:
        if not self.criterion.cumulative or (self.finished and self.updates):
            return  # with a target of 0 there is no update, but scores there are: another pruner may start from them
        if not self._choose_due(held):
            return
        with torch.no_grad():
            finite = self._all.probe(self.criterion)
            if found_inf is not None:
                finite = finite & (found_inf.reshape(()) == 0)
            first = held is None or self._counted is None
            self._note_present(first=first)
            verdict = Verdict(finite, self.criterion.decay, grad_scale)
            self._all.accumulate_(self.criterion, verdict)
            if any(self._all.present):
                self._count(finite, once=held is not None)

    def _note_present(self, *, first: bool) -> None:
        """Which targets have had a gradient by now: the host knows that without waiting.

        Raises:
            ValueError: in the first step: something was frozen since the pruner was made.
        """
        self._looked += first  # of several optimizers the first one counts the step
        if self._looked == 1 and first:
            self._check_trainable()
        if self._unseen:
            self._unseen -= {t.name for t, here in zip(self.targets, self._all.present, strict=True) if here}

    def _waits_for_gradients(self, *, last: bool) -> bool:
        """Whether a due mask has to wait for a first gradient: by scores that are 0 it would prune by index.

        Raises:
            ValueError: an epoch has passed, or the training, and some target never had one.
        """
        if not self._unseen or not self._looked:
            return False
        if not last and self.steps_per_epoch is not None and self._looked < self.steps_per_epoch:
            return True
        names = [target.name for target in self.targets if target.name in self._unseen]
        raise ValueError(
            f"{_first_of(names)} had no gradient in {self._looked} steps, and a mask is due that would prune it by "
            f"index: exclude what the loss does not use"
        )

    def _check_trainable(self) -> None:
        """What can never have a gradient is told now, and not in the first step."""
        if self.criterion.cumulative:
            _refuse_frozen(self._all.frozen(self.criterion), self)

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

    def _follow(self) -> None:
        """Go on with the tensors that the model has now, where others were put in place of those of before."""
        if not self._ended and any(target.replaced(self.model) for target in self.targets):
            self.restore_masks()
            if self.optimizers:
                self._check_trains()

    def _mask_gradients(self) -> None:
        with torch.no_grad():
            self._all.mask_grads_()

    def _start_from(self, scores: Scores) -> None:
        name = type(self.criterion).__name__
        if not self.criterion.cumulative:
            warnings.warn(f"scores have no effect: {name} computes its own when a mask is due", stacklevel=3)
            return
        where, source = "the scores", name
        if isinstance(scores, str | os.PathLike):
            from gsprune.formats.scores import load_scores

            where, (scores, source, _) = f"the scores of {os.fspath(scores)}", load_scores(scores)
        _check_scores(self.targets, scores, where)
        if source != name:
            warnings.warn(f"{where} are of {source}, but {name} goes on from them here", stacklevel=3)
        with torch.no_grad():
            for target in self.targets:
                target.score.copy_(target.here(scores[target.name]))
            self._scored.fill_(int(self._all.any_score()))
            self._all.settle_()
        if int(self._scored):
            self._unseen.clear()

    def _take_masks(self, masks: Mapping[str, Tensor]) -> None:
        for target in self.targets:
            keep = masks[target.name]
            target.check(keep, keep)
            target.load(torch.zeros_like(target.outside(target.score)), keep)
        self.schedules = [OneShot(target_sparsity=target.pruned / target.total) for target in self.targets]
        self._applied = [schedule.final for schedule in self.schedules]
        self.updates = 1
        with torch.no_grad():
            self._all.settle_()
        self.restore_masks()

    def _unit_targets(
        self,
        include: Sequence[str],
        exclude: Sequence[str],
        counts: Mapping[str, int],
        kinds: Sequence[str] | None,
    ) -> UnitTargets:
        from gsprune.discovery.find import find_structures
        from gsprune.surgery.shrink import Shrinker  # heavy: imports torch-pruning

        cut = next((name for name, tensor in self.model.named_parameters() if is_sharded(tensor)), None)
        if cut is not None:
            raise ValueError(
                f"{cut} is cut over several processes, and units can only be cut out of a whole model: prune single "
                f"weights, or prune units before fully_shard"
            )
        unreal = next((name for name, tensor in self.model.named_parameters() if tensor.is_complex()), None)
        if unreal is not None:
            raise ValueError(f"{unreal} is complex, and units are found and cut in networks of real weights alone")
        if self._example_input is None:
            raise ValueError("pruning units needs example_input, a batch to trace the model with")
        offered = find_structures(self.model, self._example_input, include=include, exclude=exclude)
        found, self.skipped = offered.structures, offered.skipped
        if not found and not self.skipped:
            raise ValueError(
                f"{type(self.model).__name__} has no linear or convolution layers whose units could be pruned"
            )
        if not found and not offered.left_out:
            reasons = "; ".join(f"{name}: {why}" for name, why in list(self.skipped.items())[:3])
            raise ValueError(f"no units of {type(self.model).__name__} can be pruned ({reasons})")
        here = {structure.kind for structure in found}
        for setting, named in (("keep", counts), ("kinds", kinds or ())):
            for kind in named:
                if kind not in here:
                    raise ValueError(
                        f"{setting} names {kind!r}, but the model has {', '.join(sorted(here)) or 'no units'}"
                    )
        wanted = counts or kinds or here
        chosen = [structure for structure in found if structure.kind in wanted]
        names = {structure.name for structure in chosen}
        self.left_out = (*offered.left_out, *(structure for structure in found if structure.name not in names))
        self._shrinker = Shrinker(self.model, chosen, example_input=self._example_input, copies=self.copies)
        return UnitTargets([UnitTarget(structure, self.model) for structure in chosen])

    def _budget(self, kind: str, share: float) -> Budget:
        structures = [target.structure for target in self.targets if isinstance(target, UnitTarget)]
        return Budget(kind, share, self.model, structures, self._example_input, min_kept=self.min_kept)

    def _update(self, wanted: Sequence[float], *, last: bool = False) -> None:
        """A mask update: the only place that waits for the device."""
        self._follow()
        if self._waits_for_gradients(last=last) or (self.criterion.cumulative and not int(self._scored)):
            return  # nothing was seen yet: the update stays due
        with torch.no_grad():
            if not self.criterion.cumulative:
                self._all.compute_(self.criterion)
            groups = [_checked(target) for target in self.targets]
            self._check_flat(groups)
            before = [target.pruned for target in self.targets]
            for target, keep in zip(self.targets, self._select(groups, wanted), strict=True):
                target.set_keep(keep)
            self._all.settle_()
            self._all.mask_state_(self.optimizers)
            for copy in self.copies:
                self.mask_copy(copy)
        self._applied = list(wanted)
        if before == [target.pruned for target in self.targets]:
            return  # a share that has not grown by a whole group
        self.updates += 1
        if self.structured and self.shrink == "each_update":
            self._cut()
        self._apply_masks()

    def _check_flat(self, groups: Sequence[Tensor]) -> None:
        """Warn of targets whose scores say nothing; ValueError where none says anything."""
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
        told_apart = self.scope == "global" and len(set(flat.values())) > 1  # one tensor from another
        groups_of = zip(self.targets, groups, strict=True)
        if not told_apart and len(flat) == sum(t.total - t.pruned > len(g) for t, g in groups_of):
            raise ValueError(
                f"the scores say nothing of what to prune, in {name} and everywhere they are all equal ({what}): {why}"
            )
        if fresh := [name for name in flat if name not in self._flat]:
            self._flat.update(fresh)
            more = f" and of {len(fresh) - 1} more" if len(fresh) > 1 else ""
            warnings.warn(
                f"the scores of {fresh[0]}{more} are all equal ({flat[fresh[0]]:g}), so that what goes there goes by "
                f"index: {why}",
                stacklevel=4,
            )

    def mask_copy(self, network: nn.Module) -> None:
        """Zero in a network of the same architecture what is pruned in the model."""
        for target in self.targets:
            target.mask(network)

    def _select(self, groups: Sequence[Tensor], wanted: Sequence[float]) -> list[Tensor]:
        if self.scope == "global":
            ranked = [_normalized(group) if self.criterion.normalize else group for group in groups]
            if self.budget is not None:
                return self.budget.cut([group.reshape(-1) for group in ranked], 1 - wanted[0])
            return self._select_together([group.reshape(1, -1) for group in ranked], wanted[0], self.targets)
        return [
            self._select_together([group], share, [target])[0]
            for group, share, target in zip(groups, wanted, self.targets, strict=True)
        ]

    def _select_together(self, groups: Sequence[Tensor], share: float, targets: Sequence[Target]) -> list[Tensor]:
        return self._all.select(groups, share, targets, min_kept=self.min_kept)

    def _check_reached(self) -> None:
        """Warn where `min_kept` (or a pattern) kept more than the target allows, or a budget is missed."""
        if self.budget is not None:
            if missed := self.budget.missed([target.keep.cpu() for target in self.targets]):
                warnings.warn(missed, stacklevel=3)
            return
        asked = sum(pruned_count(s.final, t.total) for s, t in zip(self.schedules, self.targets, strict=True))
        reached, slack = sum(target.pruned for target in self.targets), max(1.0, 0.01 * asked)
        if reached < asked - slack:
            warnings.warn(
                f"the sparsity reached is {self.sparsity:.3f} instead of {self.target_sparsity:.3f}: "
                f"min_kept={self.min_kept} in each of {len(self.targets)} tensors or structures allows no more",
                stacklevel=3,
            )

    def _check_optimizer(self) -> None:
        mine, trained = held(self.optimizers), self.trained()
        if self.optimizers and trained and not any(id(tensor) in mine for tensor in trained.values()):
            raise ValueError(f"{names_of(self.optimizers)} holds nothing of what is pruned: is it another model's?")

    def _apply_masks(self) -> None:
        with torch.no_grad():
            self._all.apply_()

    def _cut(self) -> None:
        """Cut what is pruned out of the model."""
        if self._shrinker is not None:
            cut_units(self._shrinker, self.unit_targets, self.optimizer, when=self.shrink)


def cut_units(shrinker: Shrinker, targets: Sequence[UnitTarget], optimizer: Optimizers | None, *, when: When) -> None:
    """Cut the model down to the units that the targets keep, and tell the targets where those lie now."""
    shrinker.cut([target.keep for target in targets], optimizer=optimizer, drop_state=when == "at_end")
    for target, structure in zip(targets, shrinker.here, strict=True):
        target.move(structure, shrinker.model)


class NoPruning:
    """The control: a pruner with every hook of `Pruner` that does nothing.

    Takes the settings of any other pruner, so that a sweep can name it beside them.

    Example:
        >>> pruner = NoPruning(nn.Linear(2, 2), target_sparsity=0.0)
        >>> pruner.sparsity, pruner.masks()
        (0.0, {})
    """

    structured = False
    finished = True
    share = Share(0, 0, "")
    sparsity = float(share)
    target_sparsity = 0.0
    updates = 0
    plan = None
    coverage = 0.0
    horizon = 0
    criterion_name = "none"
    budget = None
    skipped: Mapping[str, str] = {}

    def __init__(
        self, model: nn.Module, *, target_sparsity: float | None = None, scores: Scores | None = None, **_: Any
    ) -> None:
        if target_sparsity:
            warnings.warn(f"target_sparsity={target_sparsity} has no effect: nothing is pruned here", stacklevel=2)
        if scores is not None:
            warnings.warn("scores have no effect: nothing is pruned here", stacklevel=2)
        self.model = model

    def on_train_begin(self) -> None:
        """Nothing."""

    def on_epoch_begin(self, epoch: int) -> None:
        """Nothing."""

    def on_step_begin(self, step: int) -> None:
        """Nothing."""

    def on_before_optimizer_step(self) -> None:
        """Nothing."""

    def on_step_end(self) -> None:
        """Nothing."""

    def on_epoch_end(self) -> None:
        """Nothing."""

    def on_train_end(self) -> None:
        """Nothing."""

    def attach(self, *optimizers: Optimizer) -> None:
        """Nothing."""

    def detach(self) -> None:
        """Nothing."""

    def finish(self) -> nn.Module:
        """The model, as it is."""
        return self.model

    def report(self) -> dict[str, float]:
        """`sparsity`, which is 0."""
        return {"sparsity": 0.0}

    def shares(self) -> dict[str, Share]:
        """Nothing is pruned."""
        return {}

    def masks(self) -> dict[str, Tensor]:
        """No masks."""
        return {}

    def dense_masks(self) -> dict[str, Tensor]:
        """No masks."""
        return {}

    def scores(self) -> dict[str, Tensor]:
        """No scores."""
        return {}

    def next_plan(self) -> None:
        """Nothing to cut."""

    def load_scores(self, scores: Scores) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing."""


def targeted(model: nn.Module, targets: Sequence[Target]) -> list[Tensor]:
    """What loses entries: the targets' weights, or what their units are cut out of."""
    units = [target.structure for target in targets if isinstance(target, UnitTarget)]
    cut = {member.tensor for structure in units for member in (*structure.producers, *structure.consumers)}
    weights = [target.weight for target in targets if isinstance(target, WeightTarget)]
    return [*weights, *(model.get_parameter(name) for name in cut)]


def _refuse_frozen(names: Sequence[str], pruner: Pruner) -> None:
    if names:
        raise ValueError(
            f"{_first_of(names)} never gets a gradient (requires_grad is False), and {type(pruner.criterion).__name__} "
            f"scores by gradients: exclude it, or take a criterion without, such as Magnitude"
        )


def _first_of(names: Sequence[str]) -> str:
    """
    >>> _first_of(["a"]), _first_of(["a", "b", "c"])
    ('a', 'a (and 2 more)')
    """
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def _are_units(model: nn.Module, masks: Mapping[str, Tensor], example_input: Any) -> bool:
    """Whether masks are of structures; they have to be masks, and all of one sort."""
    if not isinstance(masks, Mapping) or not masks:
        raise ValueError("masks must map names of tensors or structures to bool tensors, and have one at least")
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"the mask of {name} is {given}: masks are bool tensors, True where a weight is kept")
        if mask.is_meta or not bool(mask.any()):
            why = "has no values (it is on the meta device)" if mask.is_meta else "keeps nothing: take the layer out"
            raise ValueError(f"the mask of {name} {why}")
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)} & set(masks)
    units = [name for name in masks if name not in weights]
    if units and (weights or example_input is None):
        way = "give those of single weights alone" if weights else "give example_input, if that is a structure"
        raise ValueError(
            f"there is a mask of {units[0]!r}, which is no tensor of the model: {way}; units that were cut "
            f"out of it already need none"
        )
    return bool(units)


def _check_kind(name: str, given: object, kind: type) -> None:
    wanted = f"{kind.__module__}.{kind.__name__}"
    if isinstance(given, type) and issubclass(given, kind):
        raise ValueError(f"{name} is the class {given.__name__}: give an instance of it, {given.__name__}(...)")
    if not isinstance(given, kind):
        raise ValueError(f"{name} is a {type(given).__name__}: it must be a {wanted}")


def _check_numbers(**given: object) -> None:
    whole = ("min_kept", "steps_per_epoch")
    for name, value in given.items():
        kind = Integral if name in whole else Real
        is_open = value is None and name != "min_kept"
        if not is_open and (isinstance(value, bool) or not isinstance(value, kind)):
            wanted = "a whole number" if name in whole else "a number"
            raise ValueError(f"{name} is {value!r}, a {type(value).__name__}: it must be {wanted}")
    epochs: Any = given["epochs"]
    if epochs is not None and not 0 <= epochs < math.inf:
        raise ValueError(f"epochs is {epochs}: it must be 0 or more, and finite")


def _check_types(*, keep: object, kinds: object, structured: object, per_channel: object) -> None:
    if keep is not None and not isinstance(keep, Mapping):
        raise ValueError(f"keep is {keep!r}: it must map kinds of units to how many stay, as in {{'neurons': 600}}")
    if kinds is not None and (isinstance(kinds, str) or not isinstance(kinds, Collection) or not kinds):
        raise ValueError(f"kinds is {kinds!r}: it must list kinds of units, as in ['neurons'], or be None for all")
    for name, value in (("structured", structured), ("per_channel", per_channel)):
        if not isinstance(value, bool) and not (value is None and name == "structured"):
            raise ValueError(f"{name} is {value!r}, a {type(value).__name__}: it must be True or False")


def _check_settings(
    pruner: Pruner, pattern: Pattern, counts: Mapping[str, int], kinds: Sequence[str] | None, *, per_channel: bool
) -> None:
    """The contradictions and the settings without effect that can be seen before the model is."""
    if not isinstance(pruner.model, nn.Module):
        raise ValueError(f"model is a {type(pruner.model).__name__}: it must be a torch.nn.Module")
    for kind, count in counts.items():
        if type(count) is not int:
            raise ValueError(f"keep.{kind} is {count!r}: it must be a whole number of units")
    criterion, units = pruner.criterion, pruner.structured
    if not (criterion.scores_units if units else criterion.scores_weights):
        kind, other = ("units", "false") if units else ("single weights", "true")
        raise ValueError(
            f"{type(criterion).__name__} cannot score {kind}: set structured={other} or take another criterion"
        )
    if pruner.scope not in ("local", "global"):
        raise ValueError(f'scope is {pruner.scope!r}: it must be "local" or "global"')
    if pruner.shrink not in ("at_end", "each_update"):
        raise ValueError(f'shrink is {pruner.shrink!r}: it must be "at_end" or "each_update"')
    if pruner.min_kept < 1:
        raise ValueError(f"min_kept is {pruner.min_kept}: it must be 1 or more")
    if counts and not units:
        raise ValueError(f"keep={dict(counts)} counts units, but {type(criterion).__name__} prunes single weights here")
    if kinds is not None and not units:
        raise ValueError(f"kinds={[*kinds]} names units, but {type(criterion).__name__} prunes single weights here")
    if kinds is not None and counts:
        raise ValueError("kinds and keep both name what to prune: give one of them")
    if counts and pruner.scope == "global":
        raise ValueError("keep counts units in each structure, which a global scope does not: set scope to local")
    if per_channel and pruner.scope == "global":
        raise ValueError("per_channel needs scope local: with one ranking over all, channels do not reach a sparsity")
    if pruner.steps_per_epoch is not None and pruner.steps_per_epoch < 1:
        raise ValueError(f"steps_per_epoch is {pruner.steps_per_epoch}: it must be 1 or more")
    if not units and pruner.shrink == "each_update":
        raise ValueError("shrink=each_update has no effect on single weights, which are masked: leave it at at_end")
    if units and (per_channel or pattern != parse_pattern("1x1")):
        raise ValueError(
            f"pattern and per_channel are for single weights, but {type(criterion).__name__} prunes units here: "
            f"leave them out"
        )
    if criterion.normalize and pruner.scope == "local":
        raise ValueError(
            "normalize has no effect under scope local, where it divides each structure by its own norm: set scope to "
            "global"
        )


def _check_goal(
    pruner: Pruner,
    counts: Mapping[str, int],
    scope: str | None,
    kind: str,
    share: float,
    *,
    target_sparsity: float | None,
) -> None:
    """What a budget cannot be together with."""
    given = f"target={{{kind}: {share:g}}}"
    if not pruner.structured:
        name = type(pruner.criterion).__name__
        raise ValueError(f"{given} needs units, but {name} zeroes single weights here: set target_sparsity instead")
    if counts:
        raise ValueError(f"{given} and keep={dict(counts)} both say how much stays: set only one of them")
    if target_sparsity is not None:
        raise ValueError(f"{given} and target_sparsity={target_sparsity} both say how much stays: set only one of them")
    if scope == "local":
        raise ValueError(f"{given} cuts one ranking over all structures: set scope to global, or leave it open")


def _resolve(
    schedule: Schedule, pattern: Pattern, target: float | None, epochs: float | None, *, counted: bool
) -> Schedule:
    """The schedule with its target and end filled in."""
    fixed = pattern.final_sparsity
    if fixed is not None and target is not None and not math.isclose(target, fixed, abs_tol=1e-9):
        raise ValueError(f"target_sparsity is {target}, but the pattern fixes it: it must be {fixed:g}")
    final = target if target is not None else fixed
    if final is not None:
        schedule = schedule.retargeted(final)
    if not counted and schedule.final == 0:
        warnings.warn("target_sparsity=0 has no effect: nothing will be pruned", stacklevel=3)
    if epochs is None:
        return schedule
    schedule = schedule.resolved(epochs)
    end = schedule.end_epoch if isinstance(schedule, Ramp) else schedule.start_epoch
    if end is not None and end >= epochs > 0:
        warnings.warn(
            f"the schedule ends at epoch {end:g} of {epochs:g}: the last of the pruning gets no training after it",
            stacklevel=3,
        )
    return schedule


def _schedule_for(target: Target, schedule: Schedule, counts: Mapping[str, int]) -> Schedule:
    """The schedule of one target: the common one, or the way to its own kept count."""
    if not counts:
        return schedule
    assert isinstance(target, UnitTarget)
    kept = counts[target.structure.kind]
    if not 1 <= kept <= target.total:
        raise ValueError(
            f"keep asks for {kept} {target.structure.kind} in {target.name}, which has {target.total}: "
            f"it must be 1 to {target.total}"
        )
    return schedule.retargeted(1 - kept / target.total)


def _check_scores(targets: Sequence[Target], scores: object, where: str) -> None:
    """Raise a ValueError that names the first tensor or structure, in the model's order, that the scores do not fit."""
    if not isinstance(scores, Mapping):
        raise ValueError(f"scores is a {type(scores).__name__}: it must map names to tensors, or be the path of a file")
    for target in targets:
        if target.name not in scores:
            near = difflib.get_close_matches(target.name, map(str, scores), n=1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise ValueError(f"{where} do not fit: they have none of {target.name!r}, which is pruned here{hint}")
        if fault := _score_fault(target, scores[target.name]):
            raise ValueError(f"{where} do not fit: {target.name!r} {fault}")
    names = {target.name for target in targets}
    extra = next((name for name in scores if name not in names), None)
    if extra is not None:
        raise ValueError(f"{where} do not fit: they have one of {extra!r}, which is not pruned here")


def _score_fault(target: Target, score: object) -> str | None:
    if not isinstance(score, Tensor):
        return f"is a {type(score).__name__}, but scores are tensors"
    if score.shape != target.shape:
        return f"has shape {list(target.shape)} here but {list(score.shape)} in the scores"
    if score.dtype != torch.float32:
        return f"is {score.dtype}, but scores are torch.float32"
    score = target.here(score)
    if not bool(score.isfinite().all()):
        return "holds a value that is not finite"
    if bool((score < 0).any()):
        return "holds a negative value"
    return None


def _checked(target: Target) -> Tensor:
    """The target's group scores, or an error if the running score holds an inf or a NaN."""
    groups = target.groups()
    if not math.isfinite(best := target.best(groups)):  # -inf is what is pruned already
        raise ValueError(f"the score of {target.name} is not finite ({best}): its gradients or weights grew too large")
    return groups


def _normalized(group: Tensor) -> Tensor:
    """Scores divided by the L2 norm of those that are not pruned."""
    norm = group.masked_fill(group.isneginf(), 0).norm()
    return group / norm if norm > 0 else group
