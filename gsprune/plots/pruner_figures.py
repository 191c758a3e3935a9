"""The picture of a pruner or of a cut: scores and what of them goes, layer by layer, and what that saves."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from gsprune.cost.counting import count_macs, count_parameters
from gsprune.cutting.cut import Cut
from gsprune.latency import compare
from gsprune.plots.drawing import FAINT, INK, SPARSITY, Picture, elide, logarithmic, new_figure, plain_label, quiet
from gsprune.pruner.part import Part
from gsprune.pruner.pruner import Pruner
from gsprune.pruner.targets import Target
from gsprune.pruner.units import UnitTarget
from gsprune.structures.twin import copy_of
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.cut_plan import plan_cut
from gsprune.text.display import percent
from gsprune.text.table import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Bar", "Scored", "draw_pruning", "plot_cut", "plot_pruner"]

KEPT_COLOUR = "#103c70"
MOST = 40  # structures or tensors in the picture
SAMPLE = 100_000  # scores of a tensor from which its quantiles are read


@dataclass(frozen=True)
class Scored:
    """The units of a structure, or the weights of a tensor.

    name     of the structure or tensor
    scores   of what had not been pruned before, of any shape
    stays    True where it stays, of the same shape
    total    of the dense network
    """

    name: str
    scores: np.ndarray
    stays: np.ndarray
    total: int


@dataclass(frozen=True)
class Bar:
    """A cost before and after: its name, both numbers, and the text of each."""

    name: str
    before: float
    after: float
    texts: tuple[str, str]


def plot_pruner(pruner: Pruner, example_input: Any = None) -> Picture:
    """Scores of a pruner as they are now, what goes by them at the end of its schedule, and what that saves.

    Raises:
        ValueError: it has no rule, or no scores yet.
    """
    if not pruner.parts:
        raise ValueError("a pruner without a rule prunes nothing: there is nothing to draw")
    if not any(bool((target.groups() > 0).any()) for target in pruner.targets):
        raise ValueError("the pruner has no scores yet: draw it after the first steps of training")
    kept = [(target, keep) for part in pruner.parts for target, keep in _kept(part, finished=pruner.finished)]
    rows = [_scored(target, keep) for target, keep in kept]
    what = "kept" if pruner.finished else "stays at the end of the schedule"
    title = f"{pruner.criterion_name}: what {'was' if pruner.finished else 'will be'} pruned"
    return draw_pruning(rows, [*_sizes(pruner, kept, example_input)], title=title, stays=what)


def plot_cut(cut: Cut, dense: nn.Module | None = None, example_input: Any = None) -> Picture:
    """Scores of a cut and what of them went, and what that saved; with the dense network and an input milliseconds too.

    Raises:
        ValueError: of the dense network and the input only one is given.
    """
    if (dense is None) != (example_input is None):
        raise ValueError("give dense and example_input together: both networks are timed on that input")
    rows = [
        Scored(name, _array(scores), _array(cut.keeps[name]).astype(bool), scores.numel())
        for name, scores in cut.scores.items()
    ]
    bars = [_bar("parameters", cut.dense.params, cut.small.params)]
    if cut.dense.macs and cut.small.macs:
        bars.append(_bar("MACs", cut.dense.macs, cut.small.macs))
    note = ""
    if dense is not None:
        found = compare(dense, cut.model, example_input)
        if found.ms and found.dense_ms:
            bars.append(Bar("ms", found.dense_ms, found.ms, (f"{found.dense_ms:.3g} ms", f"{found.ms:.3g} ms")))
        else:
            note = f"milliseconds: {found.note}"
    return draw_pruning(rows, bars, title=f"{cut.criterion}: what was cut", stays="kept", note=note)


def draw_pruning(rows: Sequence[Scored], bars: Sequence[Bar], *, title: str, stays: str, note: str = "") -> Picture:
    """Three panels: a histogram of all scores, split by what stays; each structure's scores; costs before and after.

    Args:
        rows: in the model's order; the first 40 have a line of their own.
        bars: costs.
        title: of the whole.
        stays: what the darker part of the histogram is called.
        note: why a cost is missing.
    """
    shown = rows[:MOST]
    figure = new_figure(12, max(4.2, 1.6 + 0.22 * len(shown)))
    figure.suptitle(plain_label(title, 90), x=0.01, ha="left", fontsize=12.5, color=INK, weight="bold")
    grid = figure.add_gridspec(1, 3, width_ratios=(1.1, 1.3, 0.8))
    scores, layers, costs = (figure.add_subplot(grid[0, i]) for i in range(3))
    _draw_scores(scores, rows, stays)
    _draw_layers(layers, shown, more=len(rows) - len(shown))
    _draw_costs(costs, bars, note)
    return Picture(figure)


def _draw_scores(axes: Axes, rows: Sequence[Scored], stays: str) -> None:
    values = np.concatenate([row.scores.ravel() for row in rows])
    kept = np.concatenate([row.stays.ravel() for row in rows])
    seen = np.isfinite(values) & (values > 0)
    axes.set_title("Scores", fontsize=11, loc="left", color=INK)
    axes.set_xlabel("score (logarithmic)", color=INK)
    axes.set_ylabel("how many", color=INK)
    quiet(axes, grid="y")
    if seen.any():
        low, high = float(values[seen].min()), float(values[seen].max())
        edges = np.geomspace(low, high if high > low * 1.001 else low * 1.01, 41)
        found = [(kept, KEPT_COLOUR, stays), (~kept, SPARSITY, "goes")]
        shown = [(values[seen & which], colour, name) for which, colour, name in found if (seen & which).any()]
        parts, colours, names = zip(*shown, strict=True)
        clipped = [np.clip(part, low, None) for part in parts]
        axes.hist(clipped, bins=edges.tolist(), stacked=True, color=[*colours], label=[*names])
        logarithmic(axes)
        _draw_threshold(axes, values[seen], kept[seen])
        axes.set_ylim(top=axes.get_ylim()[1] * 1.2)  # room for the legend
        axes.legend(fontsize=8.5, frameon=False, loc="upper right", ncols=2)
    notes = []
    if zeros := int((~seen).sum()):
        notes.append(f"{zeros:,} with a score of 0")
    if gone := sum(row.total for row in rows) - len(values):
        notes.append(f"{gone:,} pruned before, which have no score")
    axes.set_title("\n".join(["Scores", *notes]) if notes else "Scores", fontsize=11, loc="left", color=INK)


def _draw_threshold(axes: Axes, values: np.ndarray, kept: np.ndarray) -> None:
    """The cut, where one threshold parts what stays from what goes."""
    if kept.all() or not kept.any():
        return
    highest, lowest = float(values[~kept].max()), float(values[kept].min())
    if highest <= lowest:
        axes.axvline((highest * lowest) ** 0.5, color=INK, linestyle="--", linewidth=1.2, label="the cut")


def _draw_layers(axes: Axes, rows: Sequence[Scored], *, more: int) -> None:
    """The spread of each structure's scores, and the share of it that goes: sensitive layers are on the right."""
    axes.set_title("Scores by layer, and the share that goes", fontsize=11, loc="left", color=INK)
    axes.set_xlabel("score: 10 % to 90 %, median (logarithmic)", color=INK)
    quiet(axes, grid="x")
    generator = np.random.default_rng(0)
    labels = []
    for place, row in enumerate(rows):
        seen = row.scores[np.isfinite(row.scores) & (row.scores > 0)].ravel()
        gone = row.total - int(row.stays.sum())
        labels.append(f"{plain_label(elide(row.name, 28), 28)}  {percent(gone / max(row.total, 1))}")
        if not seen.size:
            continue
        if seen.size > SAMPLE:
            seen = generator.choice(seen, SAMPLE, replace=False)
        low, middle, high = np.quantile(seen, (0.1, 0.5, 0.9))
        axes.hlines(place, low, high, color=KEPT_COLOUR, linewidth=2)
        axes.plot([middle], [place], "o", color=SPARSITY, markersize=5)
    if axes.lines:
        logarithmic(axes)
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    if more:
        axes.annotate(f"and {more} more", (0.99, 0.01), xycoords="axes fraction", ha="right", fontsize=8, color=FAINT)


def _draw_costs(axes: Axes, bars: Sequence[Bar], note: str) -> None:
    lines = ["Before and after", *textwrap.wrap(note, 40)]
    axes.set_title("\n".join(lines), fontsize=11, loc="left", color=INK)
    axes.set_xlabel("share of the dense network (%)", color=INK)
    quiet(axes, grid="x")
    for place, bar in enumerate(bars):
        left = 100 * bar.after / bar.before if bar.before else 0.0
        axes.barh([place - 0.18, place + 0.18], [100, left], height=0.32, color=["#cbd5e1", KEPT_COLOUR])
        for y, x, text in ((place - 0.18, 100, bar.texts[0]), (place + 0.18, left, bar.texts[1])):
            axes.text(max(x, 1) + 2, y, text, va="center", fontsize=8.5, color=INK)
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars], fontsize=9)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 145)
    axes.set_xticks(range(0, 101, 25))


# ---- what there is to draw


def _kept(part: Part, *, finished: bool) -> Iterator[tuple[Target, Tensor]]:
    """The selection groups of each target that stay, in the shape of its groups: single units or weights, unless the
    pattern is another one."""
    alive = [target.groups() > -math.inf for target in part.targets]
    chosen = alive if finished else part.choose([schedule.final for schedule in part.schedules])
    for target, here, keep in zip(part.targets, alive, chosen, strict=True):
        yield target, keep.reshape(here.shape) & here


def _scored(target: Target, keep: Tensor) -> Scored:
    groups = target.groups()
    here = groups > -math.inf
    return Scored(target.name, _array(groups[here]), _array(keep[here]).astype(bool), groups.numel())


def _array(tensor: Tensor) -> np.ndarray:
    found: np.ndarray = tensor.detach().to("cpu", torch.float32).numpy()
    return found


def _sizes(pruner: Pruner, kept: Sequence[tuple[Target, Tensor]], example_input: Any) -> Iterator[Bar]:
    model = pruner.model
    units = [(target.structure, keep.reshape(-1)) for target, keep in kept if isinstance(target, UnitTarget)]
    if pruner.plan is not None:
        dense = 0
        for name, parameter in model.named_parameters():
            shape = {**dict(enumerate(parameter.shape)), **pruner.plan.sizes.get(name, {})}
            dense += int(np.prod(list(shape.values()), dtype=np.int64))
        yield _bar("parameters", dense, count_parameters(model))
    elif units:
        twin = copy_of(model)
        apply_cut(twin, plan_cut([structure for structure, _ in units], [keep.cpu() for _, keep in units]))
        yield _bar("parameters", count_parameters(model), count_parameters(twin))
        if example_input is not None:
            before, now = count_macs(model, example_input), count_macs(twin, example_input)
            yield from [_bar("MACs", before, now)] if before and now else []
    if zeros := sum(
        target.total - target.total * int(keep.sum()) // keep.numel()
        for target, keep in kept
        if not isinstance(target, UnitTarget)
    ):
        whole = count_parameters(model)
        yield _bar("parameters not zero", whole, whole - zeros)


def _bar(name: str, before: int, after: int) -> Bar:
    return Bar(name, before, after, (count(before), f"{count(after)} ({percent(after / before)})"))
