"""`Pruner`: the hooks that a training loop calls, over a list of rules.

Each rule becomes a `Part` on the model; `together` holds what several rules settle between them.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from gsprune.cost.budgets import Budget, BudgetSettings, read_budget
from gsprune.criteria import Criterion, Magnitude
from gsprune.extras import need
from gsprune.pruner.attaching import Attachable
from gsprune.pruner.describe import as_html, describe
from gsprune.pruner.part import Part, check_counts, targeted
from gsprune.pruner.repairing import Repairs
from gsprune.pruner.rule import Rule, Scores, Settings, check_number, takes_settings
from gsprune.pruner.starting_scores import load_scores, names_of_criteria
from gsprune.pruner.targets import Share, Target, sum_of
from gsprune.pruner.together import (
    check_together,
    check_whole,
    dense_sizes,
    left_of,
    make_shrinker,
    mixed_share,
    next_cut,
)
from gsprune.pruner.units import UnitTarget
from gsprune.repair.calibrated import Repair
from gsprune.schedules import OneShot, Schedule
from gsprune.structures.example import example_of
from gsprune.structures.matrices import coverage
from gsprune.structures.one_piece import reshard
from gsprune.surgery.copies import check_copies
from gsprune.surgery.optimizers import Optimizers, check_follows, held, leaves, names_of

if TYPE_CHECKING:
    from gsprune.repair.report import RepairReport
    from gsprune.surgery.cut_plan import CutPlan

When = Literal["at_end", "each_update"]


class Pruner(Attachable):
    """Prune a model while it trains, by scores from its gradients.

    Every step adds a change s to the running score, S <- decay * S + s, with w a weight, g its gradient and u a unit:

        elementwise   s = abs(w * g)                                      for each weight
        abs           s_u = abs(sum of w[:, u] * g[:, u])                 over the columns that read unit u
        weighted      s_u = abs(sum of w[u, :] * g[u, :] + b[u] * g_b[u])  over the rows that compute it, or over the
                      affine pair of a BatchNorm behind them
        movement      S <- decay * S - w * g, with its sign               for each weight
        fisher        s_u = (sum of w[:, u] * g[:, u])^2                  over the columns that read unit u

    A tensor whose gradient is None in a step (a dropped layer, an unused expert) keeps its score: nothing is added, and
    it does not decay. The first mask update waits until every target has had a gradient, for one epoch at most.

    Scores and masks have the shape of their weight, or (units,). A mask update prunes the floor(sparsity * n + 0.5)
    selection groups with the lowest scores, of n (`gsprune.ranking.selection`).

    Call the hooks from your own training loop, or `attach` the pruner to an optimizer:

        pruner.on_train_begin()
        for epoch in range(epochs):
            pruner.on_epoch_begin(epoch)
            for step, batch in enumerate(loader):
                pruner.on_step_begin(step)            # a due mask update happens here, from scores already seen
                loss.backward()                       # x accumulation steps, then unscale
                pruner.on_before_optimizer_step()     # reads gradients: before clipping
                optimizer.step()
                pruner.on_step_end()                  # applies the masks: momentum and weight decay revive weights
                optimizer.zero_grad()
            pruner.on_epoch_end()
        pruner.on_train_end()                         # final mask; units are cut out of the model

    A step does not wait for the device; a mask update (a few in an epoch) does.

    A pruner has one rule or several (`gsprune.Rule`): heads by one criterion and neurons by another, or single weights
    on top of units. `Pruner(model, Abs(), target_sparsity=0.5)` is short for
    `Pruner(model, rules=[Rule(Abs(), target_sparsity=0.5)])`. Weights of a removed unit count as pruned: the
    `target_sparsity` of single weights is a share of the dense tensors. Without a rule nothing is pruned.

    Args:
        model: pruned in place.
        criterion, target_sparsity, budget, keep, kinds, structured, pattern, per_channel, scope, min_kept, include,
            exclude: of the one rule, as of `gsprune.Rule`; not together with `rules`.
        rules: what to prune; two rules cannot prune the same tensor or structure.
        schedule: training progress -> sparsity, of rules that have none; None: `gsprune.schedules.Cubic()`.
        scores: initial running scores of all rules, as `scores()` of another pruner returns them, or the path of a
            file that `gsprune.formats.scores.save_scores` wrote: the first mask update needs no batch. No effect on a
            criterion that accumulates nothing. `load_state_dict` replaces them.
        example_input: a batch (tensor, tuple or dict) to trace the model with, or a function that makes it; needed for
            units.
        optimizer: one or several. Their state of pruned weights is zeroed and cut with the model, also in optimizers
            inside them (of a wrapper, SAM, Lookahead). State that cannot be cut (LBFGS, 8-bit) is an error under
            "each_update"; "at_end" the state of the parameters that were cut is dropped.
        steps_per_epoch: optimizer steps in an epoch; without it masks are updated between epochs only.
        epochs: length of the run; a schedule without `end_epoch` ends after two thirds of it.
        shrink: cut pruned units out of the model "at_end", or at "each_update" of the mask, which speeds training up.
            The optimizer's state is cut too, so the next step equals that of the masked model (except for clipping: the
            gradient of a masked weight counts in the norm of a masked model). Under `torch.compile` every cut compiles
            the whole process again: set `update_frequency` to a whole epoch.
        copies: networks of the same architecture that are masked and cut with the model, such as the `.module` of an
            EMA's `AveragedModel`. They are masked at each update and in the end: an average of zeros stays zero.
        repair: `gsprune.repair.Repair(batches)`: after each mask update of units the layers left are refitted to the
            network as it was before the update, the copies' to theirs. The optimizer's state stays.
        target: the former name of `budget`, for one release.

    Attributes:
        parts: each rule on the model (`gsprune.pruner.part.Part`).
        structured: whether units are pruned.
        skipped: structures or tensors that cannot be pruned -> why.
        left_out: structures that could be, but that no rule chooses (include, exclude, kinds, keep).
        coverage: share of the model's matrix weights that is targeted, in [0, 1].
        epoch, step, updates: where the run stands, and how many mask updates there were.

    Raises:
        ValueError: a setting out of its range, or one that contradicts another or the model; with several rules the
            error names the rule's number.

    Example:
        >>> from gsprune.criteria import Magnitude
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

        Half of the units, and then single weights until three quarters of the dense network's are gone:

        >>> model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.ones(1, 4)
        >>> rules = [Rule(Magnitude(), structured=True, target_sparsity=0.5), Rule(Magnitude(), target_sparsity=0.75)]
        >>> pruner = Pruner(model, rules=rules, schedule=OneShot(), example_input=x)
        >>> pruner.on_train_begin(); pruner.on_step_begin(0); pruner.on_train_end()
        >>> pruner.sparsity, model[0], sum(int(p.count_nonzero()) for p in (model[0].weight, model[2].weight))
        (0.75, Linear(in_features=4, out_features=2, bias=True), 6)
    """

    @takes_settings
    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion | None = None,
        *,
        rules: Sequence[Rule] | None = None,
        schedule: Schedule | None = None,
        scores: Scores | None = None,
        example_input: Any = None,
        optimizer: Optimizers | None = None,
        steps_per_epoch: int | None = None,
        epochs: float | None = None,
        shrink: When = "at_end",
        copies: Sequence[nn.Module] = (),
        repair: Repair | None = None,
        target: BudgetSettings | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model is a {type(model).__name__}: it must be a torch.nn.Module")
        _check_run(steps_per_epoch=steps_per_epoch, epochs=epochs, shrink=shrink)
        check_copies(model, copies)
        reshard(model)
        example_input = example_of(example_input)
        self.model, self.optimizer, self.copies = model, optimizer, copies
        self.steps_per_epoch, self.shrink = steps_per_epoch, shrink
        self.rules = _rules(criterion, rules, _renamed(target, settings))
        self.parts: list[Part] = []
        for number, rule in enumerate(self.rules):
            if rule.criterion.reads_inputs:
                name = type(rule.criterion).__name__
                other = "Elementwise" if rule.criterion.scores_weights else "Fisher"
                raise ValueError(
                    f"{name} scores by what layers read, which a training loop does not collect: take gsprune.cut "
                    f"(mode=cut), or a criterion of gradients such as {other}"
                )
            own = rule if schedule is None or rule.schedule is not None else replace(rule, schedule=schedule)
            with self._numbered(number):
                self.parts.append(Part(own, model, example_input=example_input, epochs=epochs))
        self._units = [part for part in self.parts if part.units]
        self._weights = [part for part in self.parts if not part.units]
        self.structured = bool(self._units)
        self.skipped: Mapping[str, str] = {name: why for part in self.parts for name, why in part.skipped.items()}
        unchosen = {structure.name: structure for part in self._units for structure in part.left_out}
        names = {target.name for part in self._units for target in part.targets}
        self.left_out = tuple(structure for name, structure in unchosen.items() if name not in names)
        check_together(self.parts, shrink)
        check_whole(model, self.parts, shrink, repair)
        self._shrinker = make_shrinker(model, self.parts, example_input=example_input, copies=copies)
        self._sizes = dense_sizes(model, self.parts)
        self._repairs = Repairs(repair, model, copies, self.parts) if repair is not None else None
        self.coverage = coverage(model, targeted(model, self.targets)) if self.parts else 0.0
        self.epoch, self.step, self.updates = 0, 0, 0
        self._handles: list[Any] = []
        self._asked = False  # whether a step has asked for scores
        self._ended = False
        for number, part in enumerate(self.parts):
            if part.rule.scores is not None:
                with self._numbered(number):
                    load_scores([part], part.rule.scores, stacklevel=3)
        if scores is not None:
            load_scores(self.parts, scores, stacklevel=3)

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
        """A pruner whose masks are final, to tune a sparse model.

        Masks are applied at once, after each step (`attach`, or the hooks), after `load_state_dict` of the model, and
        in `finish`, which cuts out units. Nothing is scored.

        Args:
            masks: as `dense_masks()` and `gsprune.formats.masks.load_masks` give them: of tensors, of structures, or of
                both.
            example_input: needed for masks of structures.
            optimizer, copies: as of the constructor.

        Raises:
            ValueError: a mask is of nothing that can be pruned here, has another shape, or is not bool; masks of units
                without `example_input`.

        >>> model = nn.Linear(2, 2)
        >>> pruner = Pruner.from_masks(model, {"weight": torch.tensor([[True, False], [True, True]])})
        >>> model.weight[0, 1].item(), pruner.sparsity
        (0.0, 0.25)
        """
        schedule = OneShot(target_sparsity=0.5)
        units, weights = _units_and_weights(model, masks, example_input)
        branches = [name for name in units if masks[name].shape == (1,)]
        others = [name for name in units if name not in branches]
        streams = _streams(model, others, example_input)
        groups: list[tuple[bool, list[str] | None, list[str]]] = [
            (True, None, [name for name in others if name not in streams]),
            (True, ["residual"], streams),
            (True, ["branches"], branches),
            (False, None, weights),
        ]
        rules = [
            Rule(
                Magnitude(),
                structured=of_units,
                kinds=kinds,
                scope="local",
                schedule=schedule,
                include=[_literally(n) for n in names],
            )
            for of_units, kinds, names in groups
            if names
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is not masked is left out on purpose
            pruner = cls(
                model, rules=rules, example_input=example_input, optimizer=optimizer, copies=copies, steps_per_epoch=1
            )
        for part in pruner.parts:
            part.take_masks(masks)
        if pruner._units:
            pruner._drop_along()
        pruner.updates = 1
        pruner.restore_masks()
        return pruner

    # ---- hooks, in the order a loop calls them

    def on_train_begin(self) -> None:
        """Before the first epoch. Masks of a loaded state are applied.

        Raises:
            ValueError: under shrink="each_update", the optimizer is not known, its state cannot be cut, or it does not
                hold all that is pruned; the optimizer holds nothing of what is pruned.
        """
        if self.structured and self.shrink == "each_update":
            if not self.optimizers:
                raise ValueError('shrink="each_update" needs the optimizer, which has to follow the model: give it')
            self._check_held(self.optimizers)
            check_follows(self.optimizers)
        trained = self.trained()
        mine = held(self.optimizers)
        if self.optimizers and trained and not any(id(tensor) in mine for tensor in trained.values()):
            raise ValueError(f"{names_of(self.optimizers)} holds nothing of what is pruned: is it another model's?")
        self.on_step_end()

    def on_epoch_begin(self, epoch: int) -> None:
        """Before an epoch, counted from 0 at the start of the pruning phase."""
        self.epoch, self.step = epoch, 0

    def on_step_begin(self, step: int) -> None:
        """Before the forward pass of the epoch's optimizer step `step`: a due mask update happens here.

        Raises:
            ValueError: tensors of the model were replaced, and the optimizer trains the old ones.
        """
        self.step = step
        for part in self.parts:
            part.begin_step()
        if self._ended:
            return
        if step == 0:
            self._follow()
        self._update(self.progress)

    def on_before_optimizer_step(self) -> None:
        """After the backward pass, with gradients unscaled and not yet clipped: adds this step's change to the scores.

        A batch adds nothing if gradients of what is pruned are not finite, or if the optimizer's `found_inf` says that
        the step will be skipped.

        Raises:
            ValueError: in the first step: a weight to be scored was frozen since the pruner was made.
        """
        found_inf = self._found_inf()
        ends = leaves(self.optimizers)
        self._score(found_inf=found_inf, judged=held(ends).keys() if found_inf is not None and len(ends) == 1 else ())

    def on_step_end(self) -> None:
        """After the optimizer step: what is pruned is zero again."""
        for part in self.parts:
            part.apply()

    def on_epoch_end(self) -> None:
        """After an epoch."""
        self.epoch, self.step = self.epoch + 1, 0

    def on_train_end(self) -> None:
        """After the last epoch: the final mask, if training ended before a schedule did; units are cut out, once.

        Of a model that is spread over processes they are not: `gsprune.cut_sharded` makes the smaller one.

        Masks are applied to the tensors that the model has now, also if others were loaded since the last step.

        Raises:
            ValueError: the smaller model does not compute what the masked one does; it is left masked.
        """
        if not self._ended:
            self._finish_masks()
        self.restore_masks()
        if not self._ended:
            self._cut()
        self._ended = True

    def restore_masks(self) -> None:
        """Apply the masks to the tensors that the model and its copies have now, also if they were replaced.

        And to the optimizers' state: some optimizers (schedule-free ones) compute the weights from it.

        Raises:
            ValueError: a tensor has another shape than its mask.
        """
        reshard(self.model)
        for part in self.parts:
            if self.plan is None or part.units or self.shrink == "each_update":  # else tensors shorter than masks
                part.restore(self.model, copies=self.copies, optimizers=self.optimizers)

    # ---- what there is to see

    @property
    def progress(self) -> float:
        """Epochs trained, as a float; whole epochs if `steps_per_epoch` is not known."""
        return self.epoch + (self.step / self.steps_per_epoch if self.steps_per_epoch else 0)

    @property
    def targets(self) -> list[Target]:
        """What is pruned, tensor by tensor and structure by structure."""
        return [target for part in self.parts for target in part.targets]

    @property
    def unit_targets(self) -> list[UnitTarget]:
        """The targets that are structures."""
        return [target for part in self._units for target in part.unit_targets]

    @property
    def plan(self) -> CutPlan | None:
        """What was cut out of the dense model so far; None before the first cut."""
        return self._shrinker.plan if self._shrinker else None

    @property
    def repaired(self) -> RepairReport | None:
        """What the last repair did, layer by layer; None without one."""
        return self._repairs.report if self._repairs is not None else None

    @property
    def budget(self) -> Budget | None:
        """The budget of a pruner of one rule that has one."""
        return self.parts[0].budget if len(self.parts) == 1 else None

    @property
    def share(self) -> Share:
        """How many weights or units are pruned, of how many targeted.

        Where some rules prune units and others single weights: of the weights in all their tensors (biases and norms
        aside) how many are zero or cut out.
        """
        return mixed_share(self.parts, self._sizes) if self._units and self._weights else sum_of(self.shares().values())

    @property
    def sparsity(self) -> float:
        """Reached share of pruned weights or units, over everything targeted, in [0, 1): `share` as a number."""
        return float(self.share)

    @property
    def target_sparsity(self) -> float | None:
        """The share the schedules end with, over everything targeted.

        None where units and single weights are mixed, and under a budget, where the scores decide.
        """
        shares = [part.target_sparsity for part in self.parts]
        if (self._units and self._weights) or None in shares:
            return None
        totals = [part.share.total for part in self.parts]
        wanted = sum(share * total for share, total in zip(shares, totals, strict=True) if share is not None)
        return round(wanted / sum(totals), 12) if totals else 0.0

    @property
    def finished(self) -> bool:
        """Whether all masks are final."""
        return all(part.finished for part in self.parts)

    @property
    def horizon(self) -> int | None:
        """Optimizer steps that the longest memory of the running scores holds, as `Criterion.horizon`.

        0 for none, None for all.
        """
        horizons = [part.criterion.horizon for part in self.parts]
        return None if None in horizons else max((h for h in horizons if h is not None), default=0)

    @property
    def criterion_name(self) -> str:
        """The classes of the criteria, for records: "Abs+Weighted"; "none" without a rule."""
        return names_of_criteria(self.parts)

    def report(self) -> dict[str, float]:
        """`sparsity` of all that is targeted, and `coverage`, the share of the model's matrix weights that this is.

        Besides `sparsity/<tensor>` of each tensor, and `kept/<structure>` units of each structure. Without a rule
        `sparsity` alone.
        """
        found = {"sparsity": self.sparsity, "coverage": self.coverage} if self.parts else {"sparsity": 0.0}
        for target in self.targets:
            if isinstance(target, UnitTarget):
                found[f"kept/{target.name}"] = float(target.total - target.pruned)
            else:
                found[f"sparsity/{target.name}"] = float(target.share)
        return found

    def shares(self) -> dict[str, Share]:
        """How many weights of each tensor or units of each structure are pruned, of the dense network's."""
        return {target.name: target.share for target in self.targets}

    def dense_masks(self) -> dict[str, Tensor]:
        """The masks in the shapes of the dense network, whatever was cut out since."""
        return {name: mask for part in self.parts for name, mask in part.masks().items()}

    def masks(self) -> dict[str, Tensor]:
        """bool masks, True = kept: tensor name -> its weight's shape, or structure name -> (units,) of the dense one.

        Masks of single weights have the shapes that the model has now.
        """
        masks = self.dense_masks()
        kept = self.plan.kept if self.plan else {}
        for name in [target.name for part in self._weights for target in part.targets]:
            for dim, positions in kept.get(name, {}).items():
                masks[name] = masks[name].index_select(dim, positions.to(masks[name].device))
        return masks

    def scores(self) -> dict[str, Tensor]:
        """The running scores, float32, with the names and shapes of `dense_masks`; 0 for what is pruned.

        0 or more, but for a criterion that keeps the sign (`Movement`). A second running average (`PLATON`'s) is there
        beside the score, as "<name>:spread".
        """
        return {name: score for part in self.parts for name, score in part.scores().items()}

    def load_scores(self, scores: Scores) -> None:
        """Replace the running scores by saved ones; masks stay. The next mask update needs no batch.

        Scores that are 0 everywhere count as no scores.

        Args:
            scores: of a pruner with the same targets, or the path of a file of them.

        Raises:
            ValueError: the scores are of other targets, or no scores; names the first tensor that does not fit.
                The pruner stays as it was.
        """
        load_scores(self.parts, scores, stacklevel=3)

    def next_plan(self) -> CutPlan | None:
        """What a cut would leave of the model if training ended now; None if there is nothing to be cut any more."""
        return next_cut(self.parts) if self.structured and self.updates and self.plan is None else None

    def trained(self) -> dict[str, Tensor]:
        """The tensors that are pruned or cut and not frozen, by name: what the optimizers have to hold."""
        named = {name: tensor for target in self.targets for name, tensor in target.named(self.model).items()}
        return {name: tensor for name, tensor in named.items() if tensor.requires_grad}

    def __repr__(self) -> str:
        return describe(self)

    def _repr_html_(self) -> str:
        return as_html(repr(self))

    def plot(self, example_input: Any = None) -> Any:
        """A picture, for a notebook or `.save("pruner.png")`: scores and what goes by them, layer by layer, and size.

        Args:
            example_input: to count MACs before and after, too.

        Raises:
            ValueError: there are no scores yet.
            MissingExtraError: matplotlib is not installed.
        """
        return need("gsprune.plots.pruner_figures").plot_pruner(self, example_input)

    # ---- a resumed run

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to continue bit-identically: scores and masks of each rule, progress."""
        counts = {"epoch": self.epoch, "step": self.step, "updates": self.updates}
        return {"rules": [part.state_dict() for part in self.parts], "cut": self.plan is not None, **counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state of a pruner with the same rules and targets; to a higher sparsity, if wished.

        If units had been cut out, this cuts the (dense) model, its copies and the optimizer: load their states
        afterwards.

        Raises:
            ValueError: the state is of other rules or targets, naming the first that does not fit; more is pruned in
                it than this pruner is to prune; the model was cut already. The pruner stays as it was.
        """
        missing = sorted({"rules", "cut", "epoch", "step", "updates"} - set(state))
        if missing:
            raise ValueError(f"this is not a pruner's state: it has no {missing[0]!r}")
        check_counts(state, "epoch", "step", "updates")
        if len(state["rules"]) != len(self.parts):
            raise ValueError(f"the saved state is of {len(state['rules'])} rules, this pruner has {len(self.parts)}")
        if self.plan is not None:
            raise ValueError("this pruner has cut its model already: load the state into a pruner of the dense model")
        if state["cut"] and self.structured and self._shrinker is None:
            raise ValueError("the saved state is of a model that was cut, and this one is cut over several processes")
        for number, (part, saved) in enumerate(zip(self.parts, state["rules"], strict=True)):
            with self._numbered(number):
                part.check_state(saved)
        for part, saved in zip(self.parts, state["rules"], strict=True):
            part.load_state(saved)
        self.epoch, self.step, self.updates = state["epoch"], state["step"], state["updates"]
        if state["cut"]:
            self._cut()

    # ---- inside: scores

    def _score(
        self,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        *,
        held: Collection[int] | None = None,
        judged: Collection[int] = (),
    ) -> None:
        self._asked = True
        for part in self.parts:
            part.score(grad_scale, found_inf, held=held, judged=judged)

    def _mask_gradients(self) -> None:
        with torch.no_grad():
            for part in self.parts:
                part.all.mask_grads_()

    # ---- inside: masks

    def _update(self, progress: float | None) -> None:
        """Mask updates that are due at this progress (None: the last ones): units, what they take along, weights."""
        due = [(part, wanted) for part in self.parts if (wanted := part.due(progress)) is not None]
        if not due:
            return
        self._follow()
        patience = 0 if progress is None else self.steps_per_epoch or 0
        units = [(part, wanted) for part, wanted in due if part.units]
        if units and self._repairs is not None:
            self._repairs.keep()
        fewer_units = self._update_parts(units, patience)
        if fewer_units and self.shrink == "each_update":
            self._cut()
        elif fewer_units:
            self._drop_along()
        if self._repairs is not None:
            self._mend(self._repairs, fewer_units)
        if self._update_parts([(part, wanted) for part, wanted in due if not part.units], patience) or fewer_units:
            self.updates += 1

    def _update_parts(self, due: Sequence[tuple[Part, list[float]]], patience: int) -> bool:
        """Whether something more was pruned."""
        changed = False
        for part, wanted in due:
            changed |= part.update(wanted, optimizers=self.optimizers, copies=self.copies, patience=patience)
        return changed

    def _drop_along(self) -> None:
        """After units were pruned: their weights count as pruned single weights."""
        names = [target.name for part in self._weights for target in part.targets]
        kept = left_of(next_cut(self.parts), names) if names else {}
        for part in self._weights:
            part.drop(kept)
            for copy in self.copies:
                part.mask(copy)

    def _mend(self, repairs: Repairs, fewer_units: bool) -> None:
        """Repair what the last mask update took, if it took anything."""
        is_cut = self.shrink == "each_update"
        plan = self._shrinker.step if is_cut and self._shrinker else next_cut(self.parts)
        if fewer_units and plan is not None:
            repairs.mend(plan, is_cut=is_cut, optimizers=self.optimizers)
        repairs.forget()

    def _finish_masks(self) -> None:
        if not self.finished:
            warnings.warn(
                f"training ended at epoch {self.progress:g}, before the schedule did: the final mask comes without any "
                f"training after it",
                stacklevel=3,
            )
            self._update(None)
            if not self.finished and not self.progress and not self._asked:
                whose = f" of {names_of(self.optimizers)}" if self.optimizers else ""
                raise ValueError(
                    f"nothing was pruned: no training step{whose} was seen; attach() the optimizers that train the "
                    f"model before training, or call the hooks from the loop"
                )
            if not self.finished:
                raise ValueError(
                    "nothing was pruned: no batch with finite gradients was seen to score it by; lower the learning "
                    "rate (optimizer.lr of train.py) and look at the data"
                )
        for part in self.parts:
            part.check_reached()

    def _follow(self) -> None:
        """Use the tensors that the model has now, if they were replaced."""
        reshard(self.model)
        if not self._ended and any(target.replaced(self.model) for target in self.targets):
            self.restore_masks()
            if self.optimizers:
                self._check_trains()

    # ---- inside: cutting

    def _cut(self) -> None:
        """Cut what is pruned out of the model, and tell the targets where their units lie now."""
        if self._shrinker is None:
            return
        self._count_no_more()
        keeps = [target.keep for target in self.unit_targets]
        self._shrinker.cut(keeps, optimizer=self.optimizer, drop_state=self.shrink == "at_end")
        for target, structure in zip(self.unit_targets, self._shrinker.here, strict=True):
            target.move(structure, self.model)

    # ---- inside: several rules

    @contextmanager
    def _numbered(self, number: int) -> Iterator[None]:
        """With several rules, errors inside name one."""
        try:
            yield
        except ValueError as error:
            if len(self.rules) == 1:
                raise
            raise ValueError(f"rules[{number}]: {error}") from error


def no_pruning(
    model: nn.Module, *, target_sparsity: float | None = None, scores: Scores | None = None, **_: Any
) -> Pruner:
    """The control, `pruner=none`: a pruner without a rule.

    Settings of other pruners are accepted, so that a sweep can set them; they have no effect.

    >>> no_pruning(nn.Linear(2, 2), scope="global")
    Pruner without a rule: nothing is pruned
    """
    if target_sparsity:
        warnings.warn(f"target_sparsity={target_sparsity} has no effect: nothing is pruned here", stacklevel=2)
    if scores is not None:
        warnings.warn("scores have no effect: nothing is pruned here", stacklevel=2)
    return Pruner(model, rules=[])


def _rules(criterion: Criterion | None, rules: Sequence[Rule] | None, settings: Mapping[str, Any]) -> list[Rule]:
    """The rules as given, or the one that the settings are."""
    unknown = next((name for name in settings if name not in Settings.__annotations__), None)
    if unknown is not None:
        raise TypeError(f"Pruner() got an unexpected keyword argument {unknown!r}")
    if rules is None:
        if criterion is None:
            raise ValueError("there is neither a criterion nor rules: give one of them (rules=[] prunes nothing)")
        return [Rule(criterion, **settings)]
    if not isinstance(rules, Sequence) or not all(isinstance(rule, Rule) for rule in rules):
        odd = (
            next((rule for rule in rules if not isinstance(rule, Rule)), None) if isinstance(rules, Sequence) else rules
        )
        raise ValueError(f"rules has a {type(odd).__name__}: it must be a list of gsprune.Rule")
    given = [*(["criterion"] if criterion is not None else []), *settings]
    if given:
        raise ValueError(
            f"rules and {given[0]} are both given: {given[0]} is a setting of one rule, put it into a Rule"
        )
    return list(rules)


def _renamed(target: BudgetSettings | None, settings: Settings) -> Mapping[str, Any]:
    """The settings, with the budget that is given by its former name."""
    if target is None or (isinstance(target, Mapping) and all(share is None for share in target.values())):
        return settings
    if read_budget(settings.get("budget")) is not None:
        raise ValueError(
            f"budget={settings['budget']} and target={target} both say how much stays: budget is the new name"
        )
    warnings.warn("target is called budget now: use budget={...}, in YAML pruner.budget", FutureWarning, stacklevel=3)
    return {**settings, "budget": target}


def _check_run(*, steps_per_epoch: object, epochs: Any, shrink: object) -> None:
    check_number("steps_per_epoch", steps_per_epoch, whole=True)
    check_number("epochs", epochs)
    if epochs is not None and not 0 <= epochs < math.inf:
        raise ValueError(f"epochs is {epochs}: it must be 0 or more, and finite")
    if isinstance(steps_per_epoch, int) and steps_per_epoch < 1:
        raise ValueError(f"steps_per_epoch is {steps_per_epoch}: it must be 1 or more")
    if shrink not in ("at_end", "each_update"):
        raise ValueError(f'shrink is {shrink!r}: it must be "at_end" or "each_update"')


def _literally(name: str) -> str:
    """A name as a pattern that matches it alone."""
    return re.sub(r"[*?[]", r"[\g<0>]", name)


def _streams(model: nn.Module, names: Sequence[str], example_input: Any) -> list[str]:
    """Those that are residual streams."""
    if not names:
        return []
    from gsprune.pruner.find_targets import found_in

    found = found_in(model, example_input)
    return [s.name for s in found.structures if s.kind == "residual" and s.name in names]


def _units_and_weights(
    model: nn.Module, masks: Mapping[str, Tensor], example_input: Any
) -> tuple[list[str], list[str]]:
    """The names of the masks of structures and of tensors."""
    if not isinstance(masks, Mapping) or not masks:
        raise ValueError("masks must map names of tensors or structures to bool tensors, and have one at least")
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"the mask of {name} is {given}: masks are bool tensors, True where a weight is kept")
        if mask.is_meta or not (bool(mask.any()) or mask.shape == (1,)):  # a branch has one unit, which may go
            why = "has no values (it is on the meta device)" if mask.is_meta else "keeps nothing: take the layer out"
            raise ValueError(f"the mask of {name} {why}")
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)} & set(masks)
    units = [name for name in masks if name not in weights]
    if units and example_input is None:
        raise ValueError(
            f"there is a mask of {units[0]!r}, which is no tensor of the model: give example_input, if that is a "
            f"structure; units that were cut out of it already need none"
        )
    return units, [name for name in masks if name in weights]
