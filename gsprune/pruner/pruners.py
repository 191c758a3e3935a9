"""`Pruners`: several pruners in one run, each with its own criterion, schedule and targets.

Heads by one criterion and neurons by another, or single weights on top of units. Each part is a `Pruner`; what they
have to settle between them is here: that no target has two masters, that all units are cut in one go, and that what
the units take along is gone for the single weights too.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gsprune.pruner.attaching import Attachable
from gsprune.pruner.describe import amount, as_html, describe
from gsprune.pruner.pruner import Pruner, Scores, cut_units, targeted
from gsprune.pruner.targets import Share, Target, sum_of
from gsprune.pruner.units import UnitTarget
from gsprune.pruner.weights import WeightTarget
from gsprune.ranking.patterns import Tile
from gsprune.schedules import Schedule
from gsprune.structures.matrices import coverage
from gsprune.surgery.copies import check_copies
from gsprune.surgery.optimizers import Optimizers, every_optimizer

if TYPE_CHECKING:
    from gsprune.surgery.cut_plan import CutPlan
    from gsprune.surgery.shrink import Shrinker


class Pruners(Attachable):
    """Several pruners of one model, with the hooks of one (see `gsprune.Pruner`).

    Single weights may be pruned on top of units: weights of a removed unit count as pruned, so the share asked for
    single weights is the share of the dense tensors that is gone in the end; when the units are cut out, the masks of
    single weights are cut alike.

    Args:
        model: pruned in place.
        pruners: what makes each part, called with the model and the arguments below:
            `functools.partial(Pruner, criterion=..., ...)`. Their targets must be disjoint.
        schedule: of the parts that have none of their own.
        example_input, optimizer, steps_per_epoch, epochs: as of `Pruner`, for all parts.
        copies: networks that are masked and cut along, as of `Pruner`; not of a part.
        scores: what the running scores start from, as `scores()` gives them, or the path of a file of them.

    Raises:
        ValueError: a part's own error, with its number; two parts prune the same; parts differ in `shrink`; patterns
            other than 1x1 on tensors that lose units.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from gsprune.criteria import Elementwise, Magnitude
        >>> from gsprune.schedules import OneShot
        >>> model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.ones(1, 4)
        >>> units = partial(Pruner, criterion=Magnitude(), structured=True, target_sparsity=0.5, schedule=OneShot())
        >>> weights = partial(Pruner, criterion=Magnitude(), target_sparsity=0.75, schedule=OneShot())
        >>> pruner = Pruners(model, [units, weights], example_input=x)
        >>> pruner.on_train_begin(); pruner.on_step_begin(0); pruner.on_train_end()
        >>> pruner.sparsity, model[0], sum(int(p.count_nonzero()) for p in (model[0].weight, model[2].weight))
        (0.75, Linear(in_features=4, out_features=2, bias=True), 6)
    """

    def __init__(
        self,
        model: nn.Module,
        pruners: Sequence[Callable[..., Pruner]],
        *,
        schedule: Schedule | None = None,
        example_input: Any = None,
        optimizer: Optimizers | None = None,
        steps_per_epoch: int | None = None,
        epochs: float | None = None,
        copies: Sequence[nn.Module] = (),
        scores: Scores | None = None,
    ) -> None:
        if not isinstance(pruners, Sequence) or not pruners:
            given = "empty" if isinstance(pruners, Sequence) else f"a {type(pruners).__name__}"
            raise ValueError(f"pruners is {given}: it must list what makes one pruner or more")
        self.parts: list[Pruner] = []  # the optimizer is handed on to them
        self.model, self.optimizer, self.steps_per_epoch = model, optimizer, steps_per_epoch
        check_copies(model, copies)
        self.copies = copies
        common = {"optimizer": optimizer, "steps_per_epoch": steps_per_epoch, "epochs": epochs}
        self.parts = [
            _part(number, _scheduled(make, schedule), model, example_input=example_input, **common)
            for number, make in enumerate(pruners)
        ]
        self.structured = any(part.structured for part in self.parts)
        self.skipped: Mapping[str, str] = {name: why for part in self.parts for name, why in part.skipped.items()}
        self.epoch, self.step, self.updates = 0, 0, 0
        self._units = [part for part in self.parts if part.structured]
        self._weights = [part for part in self.parts if not part.structured]
        self._handles, self._ended = [], False
        self._check_disjoint()
        self._shrinker = self._one_shrinker(example_input, copies) if self._units else None
        self._sizes = self._dense_sizes()
        self.coverage = coverage(model, targeted(model, self.targets))
        if scores is not None:
            self.load_scores(scores)

    # ---- hooks, in the order a loop calls them

    def on_train_begin(self) -> None:
        """Before the first epoch. Masks of a loaded state are applied.

        Raises:
            ValueError: as of `Pruner`.
        """
        for part in self.parts:
            part.on_train_begin()

    def on_epoch_begin(self, epoch: int) -> None:
        """Before an epoch, counted from 0 at the start of the pruning phase."""
        self.epoch, self.step = epoch, 0
        for part in self.parts:
            part.on_epoch_begin(epoch)

    def on_step_begin(self, step: int) -> None:
        """Before the forward pass of the epoch's optimizer step `step`: a due mask update happens here."""
        self.step = step
        if self._ended:
            return
        done = self._done()
        for part in self._units:
            part.epoch = self.epoch  # an attached pruner counts epochs here
            part.on_step_begin(step)
        if self._done() != done:
            self._settle_units(cut=self._units[0].shrink == "each_update")
        for part in self._weights:
            part.epoch = self.epoch
            part.on_step_begin(step)
        if self._done() != done:
            self.updates += 1
            self._mask_copies()

    def on_before_optimizer_step(self) -> None:
        """After the backward pass, with gradients unscaled and not yet clipped: scores grow by this step's change.

        Raises:
            ValueError: as of `Pruner`.
        """
        self._score(found_inf=self._found_inf())

    def on_step_end(self) -> None:
        """After the optimizer step: what is pruned is zero again."""
        for part in self.parts:
            part.on_step_end()

    def on_epoch_end(self) -> None:
        """After an epoch."""
        self.epoch, self.step = self.epoch + 1, 0
        for part in self.parts:
            part.on_epoch_end()

    def on_train_end(self) -> None:
        """After the last epoch: final masks where training ended before a schedule did; units are cut out, once.

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
        """Zero what is pruned in the tensors that the model has now, as of `Pruner`; not of a model that was cut."""
        for part in self.parts:
            if self.plan is None or part.structured:  # masks of single weights are as long as the dense tensors
                part.restore_masks(self.copies)

    def _finish_masks(self) -> None:
        done = self._done()
        for part in self._units:
            part.finish_masks()
        if self._units:
            self._settle_units(cut=False)
        for part in self._weights:
            part.finish_masks()
        self.updates += self._done() != done

    def _mask_copies(self) -> None:
        for part in self.parts if self.plan is None else self._units:
            for copy in self.copies:
                part.mask_copy(copy)

    # ---- what there is to see

    @property
    def targets(self) -> list[Target]:
        """The targets of all parts."""
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
    def share(self) -> Share:
        """How many weights or units are pruned, of how many targeted.

        Where parts prune units and others single weights: of the weights in all their tensors (biases and norms aside)
        how many are zero or cut out.
        """
        return self._mixed() if self._units and self._weights else sum_of(self.shares().values())

    @property
    def sparsity(self) -> float:
        """Reached share of what is pruned over everything targeted, in [0, 1): `share` as a number."""
        return float(self.share)

    @property
    def target_sparsity(self) -> float | None:
        """The share the schedules end with; None where units and single weights are mixed, or a part does not know."""
        shares = [part.target_sparsity for part in self.parts]
        if (self._units and self._weights) or any(share is None for share in shares):
            return None
        totals = [part.share.total for part in self.parts]
        return round(sum(s * n for s, n in zip(shares, totals, strict=True) if s is not None) / sum(totals), 12)

    @property
    def finished(self) -> bool:
        """Whether all masks are final."""
        return all(part.finished for part in self.parts)

    @property
    def horizon(self) -> int | None:
        """Optimizer steps that the longest memory of the running scores holds; None: all of them."""
        horizons = [part.horizon for part in self.parts]
        return None if None in horizons else max(h for h in horizons if h is not None)

    @property
    def criterion_name(self) -> str:
        """The classes of the criteria, for records: "Abs+Weighted"."""
        return "+".join(part.criterion_name for part in self.parts)

    def report(self) -> dict[str, float]:
        """`sparsity` and `coverage` of all, and the parts' `sparsity/<tensor>` and `kept/<structure>`."""
        each = {key: value for part in self.parts for key, value in part.report().items()}
        return {**each, "sparsity": self.sparsity, "coverage": self.coverage}

    def shares(self) -> dict[str, Share]:
        """How many weights of each tensor or units of each structure are pruned, of the dense network's."""
        return {name: share for part in self.parts for name, share in part.shares().items()}

    def dense_masks(self) -> dict[str, Tensor]:
        """The masks in the shapes of the dense network, whatever was cut out since."""
        return {name: mask for part in self.parts for name, mask in part.masks().items()}

    def masks(self) -> dict[str, Tensor]:
        """bool masks, True = kept, as of `Pruner`; of single weights in the shapes that the model has now."""
        masks = self.dense_masks()
        for name, cuts in self.plan.kept.items() if self.plan else ():
            for dim, kept in cuts.items() if name in masks else ():
                masks[name] = masks[name].index_select(dim, kept.to(masks[name].device))
        return masks

    def scores(self) -> dict[str, Tensor]:
        """The running scores of all parts, as of `Pruner`."""
        return {name: score for part in self.parts for name, score in part.scores().items()}

    def __repr__(self) -> str:
        sides = [sum_of(part.share for part in parts) for parts in (self._units, self._weights) if parts]
        amounts = [amount(side.pruned, side.total, side.of) for side in sides]
        title = f"Pruners of {len(self.parts)} parts, by {self.criterion_name}"
        wanted = f"{self.target_sparsity:.1%}".replace("%", " %") if self.target_sparsity is not None else None
        return describe(self, title, amounts, wanted)

    def _repr_html_(self) -> str:
        return as_html(repr(self))

    def load_scores(self, scores: Scores) -> None:
        """Put saved scores in the place of the running ones, as of `Pruner`.

        Raises:
            ValueError: the scores are of other targets, or no scores.
        """
        if isinstance(scores, str | os.PathLike):
            from gsprune.formats.scores import load_scores

            where, (scores, source, _) = f"the scores of {os.fspath(scores)}", load_scores(scores)
            if source != self.criterion_name:
                name = self.criterion_name
                warnings.warn(f"{where} are of {source}, but {name} goes on from them here", stacklevel=2)
        counting = [part for part in self.parts if part.horizon != 0]
        names = {target.name for part in self.parts for target in part.targets}
        extra = next((name for name in scores if name not in names), None)
        if extra is not None:
            raise ValueError(f"the scores do not fit: they have one of {extra!r}, which is not pruned here")
        for part in counting:
            mine = {target.name for target in part.targets}
            part.load_scores({name: score for name, score in scores.items() if name in mine})

    def next_plan(self) -> CutPlan | None:
        """What a cut would leave of the model if training ended now; None if there is nothing to be cut any more."""
        return None if self._shrinker is None or not self.updates or self.plan else self._plan()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on bit-identically: the state of each part, progress."""
        counters = {"epoch": self.epoch, "step": self.step, "updates": self.updates}
        return {"parts": [part.state_dict() for part in self.parts], "cut": self.plan is not None, **counters}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state of the same pruners; where units had been cut out, the model is cut here.

        Raises:
            ValueError: the state is of other pruners or targets; the model was cut already.
        """
        missing = sorted({"parts", "cut", "epoch", "step", "updates"} - set(state))
        if missing:
            raise ValueError(f"this is not the state of several pruners: it has no {missing[0]!r}")
        if len(state["parts"]) != len(self.parts):
            raise ValueError(f"the saved state is of {len(state['parts'])} pruners, here are {len(self.parts)}")
        if self.plan is not None:
            raise ValueError("these pruners have cut their model already: load the state into those of the dense model")
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        self.epoch, self.step, self.updates = state["epoch"], state["step"], state["updates"]
        if state["cut"]:
            self._cut()

    # ---- inside

    def trained(self) -> dict[str, Tensor]:
        """What the parts prune and is not frozen, by name."""
        return {name: tensor for part in self.parts for name, tensor in part.trained().items()}

    @property
    def optimizer(self) -> Optimizers | None:
        """The optimizer, or several, as given."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, given: Optimizers | None) -> None:
        self.optimizers = every_optimizer(given)
        self._optimizer = given
        for part in self.parts:
            part.optimizer = given

    def _score(
        self,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        *,
        held: Collection[int] | None = None,
    ) -> None:
        for part in self.parts:
            part._score(grad_scale, found_inf, held=held)

    def _mask_gradients(self) -> None:
        for part in self.parts:
            part._mask_gradients()

    def _done(self) -> list[int]:
        return [part.updates for part in self.parts]

    def _settle_units(self, *, cut: bool) -> None:
        """After units went: the single weights they take along are gone too, and maybe the units are cut out."""
        if cut:
            self._cut()
            return
        plan = self._plan()
        for part in self._weights:
            part.drop(plan.kept)

    def _plan(self) -> CutPlan:
        from gsprune.surgery.cut_plan import plan_cut  # heavy: imports torch-pruning

        return plan_cut([target.structure for target in self.unit_targets], [t.keep for t in self.unit_targets])

    def _cut(self) -> None:
        if self._shrinker is not None:
            cut_units(self._shrinker, self.unit_targets, self.optimizer, when=self._units[0].shrink)

    def _one_shrinker(self, example_input: Any, copies: Sequence[nn.Module]) -> Shrinker:
        """In the place of the parts' own: structures of two parts may lie in one tensor."""
        from gsprune.surgery.proof import draw
        from gsprune.surgery.shrink import Shrinker, check_shrink  # heavy: imports torch-pruning

        structures = [target.structure for target in self.unit_targets]
        if len(self._units) > 1:
            keeps = [draw(structure, 3) for structure in structures]
            check_shrink(self.model, structures, keeps, example_input=example_input)
        for part in self._units:
            part.leave_cutting()
        return Shrinker(self.model, structures, example_input=example_input, copies=copies)

    def _check_disjoint(self) -> None:
        owners: dict[str, int] = {}
        for number, part in enumerate(self.parts):
            for target in part.targets:
                first = owners.setdefault(target.name, number)
                if first != number:
                    raise ValueError(
                        f"pruners[{first}] and pruners[{number}] both prune {target.name}: "
                        f"give them kinds, include or exclude that do not meet"
                    )
        times = sorted({part.shrink for part in self._units})
        if len(times) > 1:
            raise ValueError(f"shrink is {' and '.join(times)}: all pruners of units have to shrink at the same time")
        cut = {m.tensor for t in self.unit_targets for m in (*t.structure.producers, *t.structure.consumers)}
        for number, part in enumerate(self.parts):
            for target in part.targets:
                if isinstance(target, WeightTarget) and target.name in cut:
                    _check_on_top(number, target, times[0])

    def _dense_sizes(self) -> dict[str, int]:
        """Entries of every matrix or kernel that loses units or weights, by its name."""
        structures = [target.structure for target in self.unit_targets]
        named = [m.tensor for s in structures for m in (*s.producers, *s.consumers)]
        named += [target.name for part in self._weights for target in part.targets]
        tensors = {name: self.model.get_parameter(name) for name in named}
        return {name: tensor.numel() for name, tensor in tensors.items() if tensor.dim() > 1}

    def _mixed(self) -> Share:
        """Weights that are zero or cut out, of all in the tensors that lose any."""
        gone = {target.name: target.pruned for part in self._weights for target in part.targets}
        plan = self._plan()
        for name, cuts in plan.kept.items():
            if name in self._sizes and name not in gone:
                left = self._sizes[name]
                for dim, kept in cuts.items():
                    left = left // plan.sizes[name][dim] * len(kept)
                gone[name] = self._sizes[name] - left
        return Share(sum(gone.values()), sum(self._sizes.values()), "weights")


def _scheduled(make: Callable[..., Pruner], schedule: Schedule | None) -> Callable[..., Pruner]:
    own = getattr(make, "keywords", {}).get("schedule")
    return make if schedule is None or own is not None else functools.partial(make, schedule=schedule)


def _part(number: int, make: Callable[..., Pruner], model: nn.Module, **arguments: Any) -> Pruner:
    if isinstance(make, Pruner):
        raise ValueError(f"pruners[{number}] is a Pruner: give what makes it, functools.partial(Pruner, ...)")
    try:
        part = make(model, **arguments)
    except ValueError as error:
        raise ValueError(f"pruners[{number}]: {error}") from error
    if not isinstance(part, Pruner):
        raise ValueError(f"pruners[{number}] makes a {type(part).__name__}: it must make a Pruner")
    if part.model is not model:
        raise ValueError(f"pruners[{number}] prunes another model: it must prune the one it is given")
    if part.copies:
        raise ValueError(f"pruners[{number}] has copies of its own: give them to Pruners, which cuts for all")
    return part


def _check_on_top(number: int, target: WeightTarget, when: str) -> None:
    if target.pattern != Tile(1, 1) or target.per_channel:
        raise ValueError(
            f"pruners[{number}] prunes {target.name} by a pattern or per channel, and another cuts units out of it: "
            f"what is left would not line up; take pattern 1x1, or exclude it"
        )
    if when == "each_update":
        raise ValueError(
            f"pruners[{number}] masks {target.name}, which shrink=each_update of another keeps cutting: "
            f"set shrink=at_end, or exclude it"
        )
