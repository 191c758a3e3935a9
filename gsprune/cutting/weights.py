"""Single weights of a trained network, pruned without training: by criterion, scope and pattern, and repaired.

Layer by layer, in the order of a forward pass: each layer is scored, masked and refitted on what it reads in the
network that is pruned up to there. Legend: g = groups, o = outputs, k = columns of a layer seen as a matrix
(`gsprune.repair.gram`).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gsprune.collectives import refuse_several
from gsprune.cost.counting import count_parameters
from gsprune.criteria import Activations, Criterion, SparseGPT, Wanda
from gsprune.cutting.calibration import Calibration, Loss
from gsprune.cutting.how_much import (
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
from gsprune.cutting.size import Size
from gsprune.pruner.find_targets import weight_targets
from gsprune.pruner.part import Part
from gsprune.pruner.rule import Rule, check_kind, check_number
from gsprune.pruner.targets import Share, sum_of
from gsprune.pruner.weights import WeightTarget
from gsprune.ranking.patterns import Block, Pattern, Tile, parse_pattern
from gsprune.ranking.selection import pruned_count, select
from gsprune.repair.calibrating import held_back_split
from gsprune.repair.gram import Moments, as_matrix, as_weight, matrix_of
from gsprune.repair.least_squares import checked_damping
from gsprune.repair.report import LayerRepair, RepairReport
from gsprune.repair.support import DAMPING, Blocks, Choose, Site, Walked, find_sites, walk
from gsprune.schedules import OneShot
from gsprune.structures.attention import no_fast_path
from gsprune.structures.matrices import coverage, warn_of_little
from gsprune.structures.running import device_of, evaluating, refuse_inference_mode, same_randomness
from gsprune.structures.shards import is_sharded
from gsprune.structures.twin import copy_of, refuse_wrapped
from gsprune.surgery.narrow_attention import close_nested_path, narrow, why_not_narrow
from gsprune.text.names import lines_by_reason

WeightScope = Literal["row", "layer", "global"]
OF = "weights"  # what the shares of a search are of
Progress = Callable[[str, float], None]  # what is being done; the share of it that is done, in [0, 1]


@dataclass(frozen=True)
class WeightReport:
    """What was pruned, what was repaired, and what was left, with reasons.

    shares   tensor -> how many of its weights are pruned
    skipped  tensor -> why it was left dense
    repair   of each pruned tensor, the error of its layer's output with the mask alone, and in the end
    by       criterion, pattern and scope
    """

    shares: dict[str, Share]
    skipped: dict[str, str]
    repair: RepairReport
    by: str
    coverage: float = 1.0

    @property
    def sparsity(self) -> float:
        """Pruned of all weights that were chosen."""
        return float(sum_of(self.shares.values()))

    def __repr__(self) -> str:
        total = sum_of(self.shares.values())
        tensors = f"{len(self.shares)} tensor{'s' if len(self.shares) != 1 else ''}"
        first = f"Pruned {total.pruned:,} of {total.total:,} weights ({self.sparsity:.1%}) in {tensors}, by {self.by}"
        left = ["Left dense:", *(f"  {line}" for line in lines_by_reason(self.skipped))] if self.skipped else []
        return "\n".join([first.replace("%)", " %)"), *left, repr(self.repair)])


@dataclass(frozen=True, eq=False)
class PrunedWeights:
    """A network with pruned weights.

    model      a copy of the network; pruned weights are 0
    masks      tensor name -> bool, True = kept: for `Pruner.from_masks` and `save_masks`
    report     what happened
    dense, small   parameters, loss and what `evaluate` gave of both networks; None of `prune_weights`, which asks none
    how_much   what it costs of what `evaluate` measures, and what was tried; None where that is not known
    """

    model: nn.Module = field(repr=False)
    masks: dict[str, Tensor] = field(repr=False)
    report: WeightReport
    dense: Size | None = field(default=None, repr=False)
    small: Size | None = field(default=None, repr=False)
    how_much: HowMuch | None = None

    def __repr__(self) -> str:
        lines = []
        if self.dense and self.small and self.dense.loss is not None and self.small.loss is not None:
            lines.append(f"loss: {self.dense.loss:.4g} -> {self.small.loss:.4g} on the calibration samples")
        if self.how_much is not None:
            lines.append(f"evaluate: {self.how_much}")
        elif self.dense and self.small and self.dense.value is not None:
            before, after = number_of(self.dense.value), number_of(self.small.value)
            lines.append(f"evaluate: {before:.4g} -> {after:.4g}")
        return "\n".join([repr(self.report), *lines])


def prune_weights(
    model: nn.Module,
    batches: Iterable[Any] | Calibration,
    criterion: Criterion | None = None,
    *,
    loss: Loss | None = None,
    sparsity: float | None = None,
    pattern: str | Pattern = "1x1",
    scope: WeightScope | None = None,
    repair: bool = True,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    calibration: int = 512,
    held_back: float = 0.2,
    damping: Sequence[float] = DAMPING,
    progress: Progress | None = None,
) -> PrunedWeights:
    """Prune single weights of a trained network, and refit what is left to the dense network's outputs.

    `Wanda` and `SparseGPT` score layers one after the other, each by its inputs in the network pruned so far. Any other
    criterion of single weights scores the dense network: `Elementwise` sums abs(w * g) over the batches, `Magnitude`
    and `Random` look at no batch. Then, whichever it was, the weights that are left are refitted
    (`gsprune.repair.support.masked_least_squares`): to what the dense layer gave, kept where the error on held-back
    samples fell.

    Args:
        model: not changed.
        batches: inputs, pairs (inputs, targets), or mappings for networks that return their own loss; targets are
            used by criteria of gradients alone.
        criterion: default `SparseGPT()`.
        loss: loss(outputs, targets), for criteria of gradients.
        sparsity: share of the weights that goes, in (0, 1): exactly floor(sparsity * n + 0.5) of n groups in the scope.
            An N:M pattern has its own.
        pattern: "1x1", a tile such as "4x1", or "N:M" along a layer's inputs (of a convolution its channels).
        scope: "row", every output reaches the sparsity; "layer", every tensor does; "global", one ranking over all, of
            Wanda's and SparseGPT's scores divided by each tensor's mean. Default: row for Wanda, layer for SparseGPT,
            global for others, as a `Rule` has it. An N:M pattern prunes the same under each.
        repair: whether weights are refitted.
        include, exclude: `*` patterns for names of tensors or layers; exclude wins.
        calibration: how many samples are read.
        held_back: share of the samples that judges each refit.
        damping: of the refit, to choose from, as shares of the mean square of what a layer reads.
        progress: lines_by_reason what is being done, and the share of it that is.

    Raises:
        ValueError: a setting is out of its range or contradicts another; the network has nothing to prune, or it is cut
            over several processes; there are no batches, or no labels and no predictions to draw them from.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> pruned = prune_weights(model, [torch.randn(64, 8)], Wanda(), pattern="2:4")
        >>> pruned.report.sparsity, sorted(pruned.masks), int(pruned.model[0].weight.count_nonzero())
        (0.5, ['0.weight', '2.weight'], 64)
    """
    criterion = SparseGPT() if criterion is None else criterion
    pattern = parse_pattern(pattern)
    scope, share = check_weights(model, criterion, sparsity, pattern, scope)
    damping = checked_damping(damping)
    settings = _Settings(pattern, scope, share, [*include], [*exclude], damping if repair else None)
    data = batches if isinstance(batches, Calibration) else Calibration(batches, loss, samples=calibration)
    inputs, is_held_back = held_back_split([(example, None) for example in data.calls()], held_back)
    seen = _Seen(model, _working_copy(model), inputs, is_held_back, progress or _silent)
    if isinstance(criterion, Activations):
        found = _by_inputs(seen, criterion, settings)
    else:
        found = _by_gradients(seen, criterion, settings, data)
    tensors = [seen.small.get_parameter(name) for name in found.masks]
    share_targeted = coverage(seen.small, tensors)
    warn_of_little(seen.small, found.skipped, tensors, share_targeted, stacklevel=2)
    shares = {name: Share(int((~mask).sum()), mask.numel(), "weights") for name, mask in found.masks.items()}
    by = f"{criterion}, pattern {_notation(pattern)}, by {scope}"
    report = WeightReport(shares, found.skipped, RepairReport(tuple(found.layers)), by, share_targeted)
    return PrunedWeights(_with_values_of(model, seen.small), found.masks, report)


class WeightPruner:
    """Prunes single weights of one network to one or several sparsities, and evaluates each.

    Args:
        model, batches, loss, evaluate, confidence, calibration: as of `gsprune.cut`; batches are read when all settings
            are found to be right.
        settings: others of `prune_weights`.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss: Loss | None,
        evaluate: Evaluate | None,
        *,
        confidence: float,
        calibration: int,
        report: Progress,
        **settings: Any,
    ) -> None:
        self._model, self._report, self._settings = model, report, settings
        self._evaluate, self._confidence = evaluate, confidence
        self._read = partial(Calibration, batches, loss, samples=calibration)
        self._dense: Size | None = None

    def prune(self, sparsity: float | None) -> PrunedWeights:
        """To a sparsity (None: that of the pattern); with what `evaluate` gives, and a bound of values of samples."""
        dense = self.dense(sparsity)
        found = self._sized(prune_weights(self._model, self._data, sparsity=sparsity, **self._all), dense)
        if self._evaluate is None:
            return found
        self._report("evaluating the pruned network", 0.0)
        value = value_of(self._evaluate, found.model)
        found = _valued(found, value)
        if not is_of_samples(dense.value):
            return found
        values = values_of(dense.value), values_of(value)
        return replace(found, how_much=compared(*values, 1 - found.report.sparsity, self._confidence, of=OF))

    def within(self, max_drop: float) -> PrunedWeights:
        """The sparsest that loses at most `max_drop` points of what `evaluate` gives.

        Sparsities are tried from the mildest on: 6 %, 12 %, 17 %, ... (`gsprune.cutting.how_much`).
        """
        check_max_drop(max_drop)
        check_levels(self._settings["pattern"], "max_drop", max_drop)
        if (evaluate := self._evaluate) is None:
            raise ValueError(f"max_drop={max_drop:g} needs evaluate, which says what a network loses")
        dense = self.dense(0.5, max_drop)
        given: list[Any] = []

        def cut_to(share: float) -> tuple[PrunedWeights, nn.Module]:
            made = prune_weights(self._model, self._data, sparsity=1 - share, **self._all)
            return made, made.model

        def measure(network: nn.Module) -> Any:
            given.append((network, value_of(evaluate, network)))
            return given[-1][1]

        found, how_much = largest_cut(
            values_of(dense.value),
            cut_to,
            measure,
            max_drop=max_drop,
            confidence=self._confidence,
            of=OF,
            note=self._report,
        )
        (value,) = [value for network, value in given if network is found.model]
        return replace(_valued(self._sized(found, dense), value), how_much=how_much)

    def dense(self, sparsity: float | None, max_drop: float | None = None) -> Size:
        """What the dense network costs and loses; ValueError, before any of that, for settings that contradict."""
        if self._dense is None:
            settings = self._settings
            criterion, pattern = settings.get("criterion") or SparseGPT(), parse_pattern(settings["pattern"])
            check_weights(self._model, criterion, sparsity, pattern, settings.get("scope"))
            value = None if self._evaluate is None else value_of(self._evaluate, self._model)
            if max_drop is not None:
                check_enough(values_of(value), max_drop, self._confidence)
            self._dense = Size(count_parameters(self._model), None, self._loss(self._model, dense=True), value)
        return self._dense

    @property
    def _all(self) -> dict[str, Any]:
        return {**self._settings, "progress": self._report}

    def _sized(self, found: PrunedWeights, dense: Size) -> PrunedWeights:
        pruned = sum_of(found.report.shares.values()).pruned
        return replace(found, dense=dense, small=Size(dense.params - pruned, None, self._loss(found.model)))

    @cached_property
    def _data(self) -> Calibration:
        return self._read()

    def _loss(self, model: nn.Module, *, dense: bool = False) -> float | None:
        data = self._data
        mean_loss = data.dense_loss if dense else data.mean_loss
        return mean_loss(model) if data.labelled and data.has_loss else None


def _valued(found: PrunedWeights, value: Any) -> PrunedWeights:
    assert found.small is not None
    return replace(found, small=replace(found.small, value=value))


# ---- settings


@dataclass(frozen=True)
class _Settings:
    pattern: Pattern
    scope: WeightScope
    share: float
    include: list[str]
    exclude: list[str]
    damping: Sequence[float] | None  # None: no refit

    @property
    def by_row(self) -> bool:
        """Blocks of N:M are chosen one by one, whatever the scope."""
        return self.scope == "row" and not isinstance(self.pattern, Block)


def check_weights(
    model: nn.Module, criterion: Criterion, sparsity: float | None, pattern: Pattern, scope: WeightScope | None
) -> tuple[WeightScope, float]:
    """The scope, and the share that goes; ValueError for settings that contradict each other or the network."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}: it must be a torch.nn.Module")
    refuse_wrapped(model)
    refuse_several()
    for name, tensor in model.named_parameters():
        if is_sharded(tensor):
            raise ValueError(f"{name} is cut over several processes: prune before fully_shard")
    check_kind("criterion", criterion, Criterion)
    if not criterion.scores_weights or (criterion.reads_inputs and not isinstance(criterion, Activations)):
        raise ValueError(
            f"{type(criterion).__name__} cannot score single weights: take SparseGPT, Wanda or Elementwise"
        )
    if isinstance(criterion, SparseGPT):
        criterion.check_pattern(pattern)
    check_number("sparsity", sparsity)
    fixed = pattern.final_sparsity
    if sparsity is None and fixed is None:
        raise ValueError(
            'sparsity is None: it must say how much goes, such as 0.5; a pattern such as "2:4" says it too'
        )
    if sparsity is not None and fixed is not None and abs(sparsity - fixed) > 1e-9:
        raise ValueError(f"sparsity is {sparsity}, but the pattern fixes it: it must be {fixed:g}")
    share = fixed if sparsity is None else sparsity
    assert share is not None
    if not 0 < share < 1:
        raise ValueError(f"sparsity is {share}: it must be above 0 and below 1")
    if scope not in (None, "row", "layer", "global"):
        raise ValueError(f'scope is {scope!r}: it must be "row", "layer" or "global"')
    usual: WeightScope = (
        "row" if isinstance(criterion, Wanda) else "layer" if isinstance(criterion, Activations) else "global"
    )
    return scope or usual, share


def check_levels(pattern: str | Pattern, name: str, given: object) -> None:
    """ValueError where a setting asks for several sparsities of a pattern that has one."""
    parsed = parse_pattern(pattern)
    if (fixed := parsed.final_sparsity) is not None:
        raise ValueError(
            f"{name}={given} takes several sparsities, and pattern {_notation(parsed)} has one, {fixed:g}: take 1x1"
        )


def _notation(pattern: Pattern) -> str:
    """
    >>> _notation(parse_pattern("2:4")), _notation(parse_pattern("4x1"))
    ('2:4', '4x1')
    """
    if isinstance(pattern, Block):
        return f"{pattern.n}:{pattern.m}"
    return f"{pattern.rows}x{pattern.cols}" if isinstance(pattern, Tile) else str(pattern)


# ---- networks


@dataclass(frozen=True)
class _Seen:
    """The dense network, the one that is pruned, and the samples they are run on."""

    dense: nn.Module
    small: nn.Module
    inputs: Sequence[Any]
    held_back: Sequence[bool]
    progress: Progress

    def walk(
        self, sites: Sequence[Site], choose: Choose, damping: Sequence[float] | None, what: str, *, multiple: int = 1
    ) -> Walked:
        return walk(
            self.dense,
            self.small,
            self.inputs,
            self.held_back,
            sites,
            choose,
            damping=damping,
            multiple=multiple,
            progress=lambda share: self.progress(what, share),
        )


@dataclass(frozen=True)
class _Found:
    masks: dict[str, Tensor]
    skipped: dict[str, str]
    layers: list[LayerRepair]


def _silent(what: str, share: float) -> None:
    """Shows nothing."""


def _working_copy(model: nn.Module) -> nn.Module:
    """A copy with gradients, whose attentions call their output projection as a module, so that its inputs are seen."""
    twin = copy_of(model)
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for module in twin.modules():
        if isinstance(module, nn.MultiheadAttention) and why_not_narrow(module) is None:
            narrow(module)
    close_nested_path(twin)
    return twin


@torch.no_grad()
def _with_values_of(model: nn.Module, small: nn.Module) -> nn.Module:
    twin = copy_of(model)
    for name, parameter in twin.named_parameters():
        parameter.copy_(small.get_parameter(name))
    return twin


# ---- criteria that look at weights and gradients


def _by_gradients(seen: _Seen, criterion: Criterion, settings: _Settings, data: Calibration) -> _Found:
    """Masks from scores of the dense network; then the refit, layer by layer."""
    summed = copy.copy(criterion)
    if criterion.spread_decay is None:
        summed.decay = 1.0  # the network does not change meanwhile: every batch counts alike
    rule = Rule(
        summed,
        structured=False,
        target_sparsity=settings.share,
        pattern=settings.pattern,
        per_channel=settings.by_row,
        scope="global" if settings.scope == "global" else "local",
        schedule=OneShot(),
        include=settings.include,
        exclude=settings.exclude,
    )
    small = seen.small
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*of the model's matrix weights")  # said of the result
        part = Part(rule, small, example_input=None, epochs=None)
    if criterion.cumulative:
        refuse_inference_mode()
        data.check_loss()
        data = data if data.labelled else data.drawn_from(small)
        with evaluating([small]), no_fast_path(), same_randomness(small), torch.enable_grad():
            for number, batch in enumerate(data.batches, start=1):
                small.zero_grad(set_to_none=True)
                data.loss(small, batch.to(device_of(small))).backward()  # type: ignore[no-untyped-call]
                part.begin_step()
                part.score(None, None, held=None)
                seen.progress("scoring", number / len(data.batches))
        small.zero_grad(set_to_none=True)
    wanted = part.due(None)
    if wanted is not None and not part.update(wanted, optimizers=(), copies=(), patience=0) and criterion.cumulative:
        raise ValueError("nothing was pruned: no batch had finite gradients to score by, or the sparsity is too small")
    part.check_reached()
    masks = part.masks()
    if settings.damping is None:
        return _Found(masks, dict(part.skipped), [])
    sites, left = find_sites(small, masks)

    def choose(site: Site, layer: Any, blocks: Blocks) -> tuple[Tensor, None]:
        return as_matrix(layer, masks[site.tensor]), None

    walked = seen.walk(sites, choose, settings.damping, "repairing")
    return _Found(masks, dict(part.skipped), [*walked.layers, *_left(left)])


# ---- criteria that look at what layers read


def _by_inputs(seen: _Seen, criterion: Activations, settings: _Settings) -> _Found:
    """Each layer is scored, masked and refitted when the pass reaches it."""
    offered, skipped = weight_targets(
        seen.small,
        settings.pattern,
        include=settings.include,
        exclude=settings.exclude,
        per_channel=settings.by_row,
    )
    sites, left = find_sites(seen.small, [target.name for target in offered.targets])
    if not sites:
        name, reason = next(iter(left.items()))
        raise ValueError(
            f"{type(criterion).__name__} scores by what layers read, and that is seen of none of the tensors chosen "
            f"({name}: {reason}): take Elementwise or Magnitude"
        )
    chooser = _Chooser(criterion, settings, offered.targets)
    layers: list[LayerRepair] = []
    if settings.scope == "global" and not isinstance(settings.pattern, Block):
        ranked = seen.walk(sites, chooser.note_scores, None, "scoring")
        layers = [layer for layer in ranked.layers if layer.name not in ranked.keeps]
        sites = [site for site in sites if site.tensor in ranked.keeps]
        chooser.rank(sites)
    multiple = settings.pattern.m if isinstance(settings.pattern, Block) else 1
    walked = seen.walk(sites, chooser, settings.damping, "pruning", multiple=multiple)
    layers += [layer for layer in walked.layers if layer.name not in walked.keeps]
    why = {layer.name: layer.reason or "" for layer in layers}
    if not walked.keeps:
        name, reason = next(iter(why.items()))
        raise ValueError(f"nothing could be pruned ({name}: {reason})")
    order = [target.name for target in offered.targets if target.name in walked.keeps]
    masks = {name: walked.keeps[name] for name in order}
    pruned = [layer for layer in walked.layers if layer.name in walked.keeps]
    return _Found(masks, {**skipped, **left, **why}, pruned)


class _Chooser:
    """What stays of each layer, by the moments of what it reads."""

    def __init__(self, criterion: Activations, settings: _Settings, targets: Sequence[WeightTarget]) -> None:
        self._criterion, self._settings = criterion, settings
        self._targets = {target.name: target for target in targets}
        self._shares: dict[str, float] = {}
        self._is_ranked = False

    def note_scores(self, site: Site, layer: Any, blocks: Blocks) -> tuple[Tensor, None]:
        """Of the dense network, before one ranking over all; nothing is pruned."""
        score = self._score(layer, blocks)
        mean = score.mean()
        target = self._targets[site.tensor]
        target.score.copy_(as_weight(layer, score / mean if mean > 0 else score))
        return torch.ones_like(score, dtype=torch.bool), None

    def rank(self, sites: Sequence[Site]) -> None:
        """One ranking over these: SparseGPT takes each tensor's share from it, others the masks."""
        targets = [self._targets[site.tensor] for site in sites]
        for target, keep_rn in zip(targets, _select(targets, self._settings.share), strict=True):
            target.set_keep(keep_rn)
        self._shares = {target.name: float(target.share) for target in targets}
        self._is_ranked = True

    def __call__(self, site: Site, layer: Any, blocks: Blocks) -> tuple[Tensor, Tensor | None]:
        target = self._targets[site.tensor]
        if isinstance(self._criterion, SparseGPT):
            return self._swept(self._criterion, layer, blocks, self._shares.get(site.tensor, self._settings.share))
        if not self._is_ranked:
            target.load({target.name: as_weight(layer, self._score(layer, blocks))}, torch.ones_like(target.keep))
            (keep_rn,) = _select([target], self._settings.share)
            target.set_keep(keep_rn)
        return as_matrix(layer, target.keep), None

    def _score(self, layer: Any, blocks: Blocks) -> Tensor:
        weight = matrix_of(layer)
        scores = [
            self._criterion.from_inputs(_of_block(weight, block).to(fit.xx.device), _second_moments(fit))
            for block, fit in blocks
        ]
        return torch.cat(scores, 2).to(device=weight.device, dtype=torch.float32)

    def _swept(self, criterion: SparseGPT, layer: Any, blocks: Blocks, share: float) -> tuple[Tensor, Tensor]:
        """By block of columns, each as if the others were not there; all of them together reach the share."""
        weight, pattern = matrix_of(layer), self._settings.pattern
        keeps, news = list[Tensor](), list[Tensor]()
        entries = gone = 0
        for block, fit in blocks:
            part = _of_block(weight, block).to(fit.xx.device)
            order = _order(layer, pattern, part.shape[2]).to(part.device)
            mine = share
            if block is not None:
                count = part.shape[2] if self._settings.by_row else part.numel()
                due = pruned_count(share, entries + count) - gone
                entries, gone, mine = entries + count, gone + due, due / count
            new, keep = criterion.prune(
                part[..., order],
                _second_moments(fit)[:, order][:, :, order],
                sparsity=mine,
                pattern=pattern,
                by_row=self._settings.by_row,
            )
            back = order.argsort()
            keeps.append(keep[..., back].to(weight.device))
            news.append(new[..., back])
        return torch.cat(keeps, 2), torch.cat(news, 2)


def _of_block(weight_gok: Tensor, block: Tensor | None) -> Tensor:
    return weight_gok if block is None else weight_gok[..., block.to(weight_gok.device)]


def _select(targets: Sequence[WeightTarget], share: float) -> list[Tensor]:
    """What stays of these, ranked together."""
    groups = [target.groups() for target in targets]
    if len(targets) > 1:
        groups = [group.reshape(1, -1) for group in groups]
    n = sum(group.shape[1] for group in groups)
    protected = [target.protected(group) for target, group in zip(targets, groups, strict=True)]
    known = [safe for safe in protected if safe is not None]
    return select(groups, pruned_count(share, n), protected=known or None, min_kept=1)


def _second_moments(fit: Moments) -> Tensor:
    """Mean of x x^T, (g, k, k)."""
    return fit.xx / fit.n + fit.mean_x[:, :, None] * fit.mean_x[:, None]


def _order(layer: Any, pattern: Pattern, width: int) -> Tensor:
    """So many columns as the pattern's blocks take them: a convolution's channels run fastest."""
    columns = torch.arange(width)
    kernel = getattr(layer, "kernel_size", ())
    if not isinstance(pattern, Block) or not isinstance(kernel, tuple):
        return columns
    return columns.view(-1, torch.Size(kernel).numel()).T.flatten()


def _left(reasons: Mapping[str, str]) -> list[LayerRepair]:
    return [LayerRepair(name, reason=why) for name, why in reasons.items()]
