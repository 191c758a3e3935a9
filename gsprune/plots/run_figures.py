"""Pictures of a run: its masks, the sparsity of its layers, its history."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gsprune.plots.drawing import (
    ACCURACY,
    DPI,
    FAINT,
    INK,
    KEPT,
    PRUNED,
    SPARSITY,
    elide,
    new_figure,
    pixels_of,
    quiet,
    save,
)
from gsprune.text.display import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

from gsprune.pruner.targets import Share

__all__ = ["mask_image", "save_history", "save_layer_sparsity"]

# Axis legend: h, w = pixels of a picture; r, c = rows and columns of a mask
_GAP, _TITLE, _MARGIN, _HEAD = 20, 40, 16, 54  # pixels
_MAX_CELL = 24
_MAX_PANELS = 120


# --- masks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Panel:
    name: str
    shape: tuple[int, ...]
    kept: int
    total: int
    pixels: np.ndarray  # (h, w) share kept, 0 to 1
    pooled: bool

    @property
    def caption(self) -> str:
        size = " \u00d7 ".join(str(length) for length in self.shape)
        if len(self.shape) == 1:
            return f"{self.kept:,} of {size} kept ({percent(self.kept / max(self.total, 1))})"
        return f"{size}, {percent(self.kept / max(self.total, 1))} kept"


def mask_image(masks: Mapping[str, Tensor], *, share: Share | None = None) -> np.ndarray:
    """A picture (H, W, 3; uint8) of all masks: a labelled panel for each, kept dark, pruned light.

    A weight's panel has one row per output and one column per input (times kernel position); a unit mask is a strip
    with one cell per unit. Larger masks are averaged, and the shade is the share kept, on a square-root scale (with a
    key in the head line), so that 5 % differs from 0 %. At most 1,600 pixels wide; the first 120 masks.

    Args:
        masks: name -> mask, such as a pruner's `dense_masks()`.
        share: the total for the head line, such as a pruner's `share`; None: the entries of all masks.
    """
    shown = dict(list(masks.items())[:_MAX_PANELS])
    strips = all(mask.dim() <= 1 for mask in shown.values())
    columns = _columns(len(shown), strips)
    width = 1600 if columns == 4 else 1200
    box_w = (width - 2 * _MARGIN - (columns - 1) * _GAP) // columns
    box_h = 22 if strips else 420 if columns == 1 else 240 if columns == 2 else 160
    panels = [_panel(name, mask, box_h, box_w) for name, mask in shown.items()]
    places, height = _place(panels, columns, box_w)
    canvas = np.full((height, width, 3), 255, np.uint8)
    for panel, (top, left) in zip(panels, places, strict=True):
        h, w = panel.pixels.shape
        canvas[top + _TITLE - 1 : top + _TITLE + h + 1, left - 1 : left + w + 1] = 150  # a frame of one pixel
        canvas[top + _TITLE : top + _TITLE + h, left : left + w] = _shade(panel.pixels)
    return _label(canvas, panels, places, box_w, head=_head(masks, share))


def _head(masks: Mapping[str, Tensor], share: Share | None) -> str:
    """
    >>> _head({"a": torch.tensor([True, False, False, False])}, None)
    '1 mask: 1 of 4 kept, 75.0 % pruned'
    """
    noun = "mask" if len(masks) == 1 else "masks"
    more = f" (the first {_MAX_PANELS} are shown)" if len(masks) > _MAX_PANELS else ""
    if share is not None:
        kept, total, of = share.total - share.pruned, share.total, f" {share.of}"
    else:
        kept, total, of = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values()), ""
    return f"{len(masks)} {noun}{more}: {kept:,} of {total:,}{of} kept, {percent(1 - kept / max(total, 1))} pruned"


def _columns(count: int, strips: bool) -> int:
    if strips:
        return 1 if count <= 12 else 2
    return 1 if count <= 1 else 2 if count <= 4 else 3 if count <= 9 else 4


def _panel(name: str, mask: Tensor, box_h: int, box_w: int) -> _Panel:
    flat_rc = mask.detach().cpu().bool()
    flat_rc = flat_rc.reshape(1, -1) if mask.dim() <= 1 else flat_rc.flatten(1)
    pixels, pooled = _fit(flat_rc, box_h, box_w)
    return _Panel(name, tuple(mask.shape) or (1,), int(flat_rc.sum()), flat_rc.numel(), pixels, pooled)


def _fit(mask_rc: Tensor, box_h: int, box_w: int) -> tuple[np.ndarray, bool]:
    """Average a larger mask to the box, enlarge a smaller one by whole factors, each axis by itself."""
    rows, cols = mask_rc.shape
    if rows * cols == 0:
        return np.zeros((1, 1), np.float32), False
    target = (min(rows, box_h), min(cols, box_w))
    pooled = target != (rows, cols)
    # Averaging costs 4 bytes an element for a moment: 9 MB for ResNet-50's largest tensor.
    share = F.adaptive_avg_pool2d(mask_rc[None].float(), target)[0] if pooled else mask_rc.float()
    cell_h, cell_w = (min(box // size, _MAX_CELL) for box, size in zip((box_h, box_w), target, strict=True))
    pixels = share.repeat_interleave(cell_h, 0).repeat_interleave(cell_w, 1)
    if rows == 1 and cell_w >= 4:  # hairlines between the units of a strip
        pixels[:, cell_w - 1 :: cell_w] = torch.nan
    return pixels.numpy(), pooled


def _shade(share_hw: np.ndarray) -> np.ndarray:
    light, dark = np.array(PRUNED, np.float32), np.array(KEPT, np.float32)
    rgb = light + (dark - light) * np.sqrt(np.nan_to_num(share_hw))[..., None]
    rgb[np.isnan(share_hw)] = 255
    shaded: np.ndarray = np.rint(rgb).astype(np.uint8)
    return shaded


def _place(panels: Sequence[_Panel], columns: int, box_w: int) -> tuple[list[tuple[int, int]], int]:
    """Top left corners, row by row, each row as high as its highest panel; and the total height."""
    places: list[tuple[int, int]] = []
    top = _HEAD
    for start in range(0, len(panels), columns):
        row = panels[start : start + columns]
        places += [(top, _MARGIN + index * (box_w + _GAP)) for index in range(len(row))]
        top += _TITLE + max(panel.pixels.shape[0] for panel in row) + _GAP
    return places, top + _MARGIN - _GAP


def _label(
    canvas: np.ndarray,
    panels: Sequence[_Panel],
    places: Sequence[tuple[int, int]],
    box_w: int,
    *,
    head: str,
) -> np.ndarray:
    height, width = canvas.shape[:2]
    _draw_key(canvas)
    figure = new_figure(width / DPI, height / DPI)

    def write(left: float, top: float, text: str, **style: Any) -> None:
        figure.text(left / width, 1 - top / height, text, va="top", **style)

    write(_MARGIN, 14, head, fontsize=12, color=INK, weight="bold")
    write(width - _MARGIN - 222, 8, "share kept", fontsize=9, color=FAINT, ha="right")
    for share in (0, 0.25, 0.5, 1):
        write(_key_left(width) + 200 * share, 25, f"{100 * share:g} %", fontsize=8, color=FAINT, ha="center")
    for panel, (top, left) in zip(panels, places, strict=True):
        write(left, top, elide(panel.name, box_w // 8), fontsize=10.5, color=INK)
        caption = panel.caption + (", averaged" if panel.pooled else "")
        write(left, top + 19, caption, fontsize=9, color=FAINT)
    labelled: np.ndarray = np.minimum(canvas, pixels_of(figure))  # text stands on white; 20x faster than `figimage`
    return labelled


def _key_left(width: int) -> int:
    return width - _MARGIN - 212


def _draw_key(canvas: np.ndarray) -> None:
    left = _key_left(canvas.shape[1])
    canvas[9:21, left : left + 200] = _shade(np.linspace(0, 1, 200, dtype=np.float32)[None])


# --- sparsity by layer -------------------------------------------------------------------------------------


def save_layer_sparsity(path: str | os.PathLike[str], shares: Mapping[str, Share], overall: Share) -> None:
    """Write a PNG with a horizontal bar for each tensor or structure: its share pruned, with the counts.

    `shares` and `overall` are a pruner's `shares()` and `share`; the dashed line is `overall`.
    """
    names = list(shares)
    figure = new_figure(9, 1.5 + 0.27 * max(len(names), 1))
    axes = figure.add_subplot()
    longest = max((len(name) for name in names), default=0)
    height = figure.get_figheight()
    figure.subplots_adjust(
        left=(0.3 + 0.07 * min(longest, 44)) / 9, right=0.99, top=1 - 0.45 / height, bottom=0.6 / height
    )
    axes.barh(range(len(names)), [100 * float(share) for share in shares.values()], color=SPARSITY, height=0.72)
    for row, share in enumerate(shares.values()):
        text = f"{percent(float(share))}  ({share.pruned:,} of {share.total:,})"
        axes.text(102, row, text, va="center", fontsize=8, color=INK)
    axes.axvline(100 * float(overall), color=INK, linewidth=1.2, linestyle="--")
    axes.set_title(_title(overall), fontsize=11, loc="left", color=INK)
    axes.set_yticks(range(len(names)), [elide(name, 44) for name in names], fontsize=8.5)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 142)  # the counts stand right of 100 %
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("share pruned (%)")
    quiet(axes, grid="x")
    save(figure, path)


def _title(overall: Share) -> str:
    of = f" of the {overall.of}" if overall.of else ""
    return f"Pruned: {percent(float(overall))}{of} (dashed)"


# --- history -----------------------------------------------------------------------------------------------


def save_history(
    path: str | os.PathLike[str],
    rows: Iterable[Mapping[str, float]],
    *,
    baseline: float | None = None,
    of: str | None = None,
) -> None:
    """Write a PNG of a run: accuracy and sparsity over the epochs, and accuracy against sparsity.

    Args:
        rows: those of metrics.jsonl, with "step", "train/accuracy", "val/accuracy" and "sparsity"; accuracies from 0 to
            1. Missing values are left out.
        baseline: accuracy of the dense network, a dashed line.
        of: what the sparsity counts, as "channels".
    """
    rows = list(rows)
    figure = new_figure(11, 5)
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 2), width_ratios=(1.1, 1), hspace=0.17, wspace=0.16)
    figure.subplots_adjust(left=0.06, right=0.985, top=0.94, bottom=0.095)
    over_epochs, below, against = (figure.add_subplot(grid[place]) for place in ((0, 0), (1, 0), (slice(None), 1)))
    below.sharex(over_epochs)
    for name, colour, label in (("train/accuracy", "#94a3b8", "train"), ("val/accuracy", ACCURACY, "validation")):
        _line(over_epochs, *_series(rows, "step", name), color=colour, label=label)
    _line(below, *_series(rows, "step", "sparsity"), color=SPARSITY, label="sparsity")
    x, y = _from_first_change(*_series(rows, "sparsity", "val/accuracy"))
    _line(against, x, y, color=ACCURACY, label="validation")
    _mark_end(against, x, y)
    if baseline is not None:
        for axes in (over_epochs, against):
            axes.axhline(100 * baseline, color=FAINT, linestyle="--", linewidth=1, label="dense")
    _dress(over_epochs, below, against, sparsity=f"sparsity of {of} (%)" if of else "sparsity (%)")
    save(figure, path)


def _series(rows: Sequence[Mapping[str, float]], across: str, up: str) -> tuple[list[float], list[float]]:
    """The rows with finite numbers of both; all but steps in per cent."""
    pairs = [(row[across], row[up]) for row in rows if across in row and up in row]
    pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
    factor = 1 if across == "step" else 100
    return [factor * x for x, _ in pairs], [100 * y for _, y in pairs]


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], *, color: str, label: str) -> None:
    if x:
        axes.plot(x, y, color=color, label=label, marker="o", markersize=3.5, linewidth=1.6)


def _from_first_change(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    """The series without the epochs of dense training, all at the first sparsity; the last of them stays."""
    begin = next((index for index in range(1, len(x)) if x[index] != x[0]), 1) - 1
    return x[begin:], y[begin:]


def _mark_end(axes: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    """A ring, and a text on the side where the line does not come from."""
    from matplotlib.patheffects import withStroke

    if x:
        before = next((value for value in reversed(y) if value != y[-1]), y[-1])
        axes.plot(x[-1:], y[-1:], marker="o", markersize=9, markerfacecolor="none", color=SPARSITY)
        text = f"end: {y[-1]:.1f} % at {percent(x[-1] / 100)}"
        place: Any = {"xytext": (0, 12 if before < y[-1] else -18), "textcoords": "offset points", "ha": "right"}
        place |= {"fontsize": 8.5, "path_effects": [withStroke(linewidth=3, foreground="white")]}
        axes.annotate(text, (x[-1], y[-1]), color=INK, **place)


def _dress(over_epochs: Axes, below: Axes, against: Axes, *, sparsity: str) -> None:
    over_epochs.set_title("Accuracy by epoch", fontsize=11, loc="left", color=INK)
    over_epochs.set_ylabel("accuracy (%)", color=INK)
    over_epochs.tick_params(labelbottom=False)
    below.set_title("Sparsity by epoch", fontsize=11, loc="left", color=INK)
    below.set_ylabel(sparsity, color=INK)
    below.set_ylim(-3, 103)
    below.set_xlabel("epoch")
    below.locator_params(axis="x", integer=True)
    against.set_title("Validation accuracy against sparsity", fontsize=11, loc="left", color=INK)
    against.set_ylabel("validation accuracy (%)", color=INK)
    against.set_xlabel(sparsity)
    against.margins(x=0.1, y=0.2)
    for axes in (over_epochs, below, against):
        quiet(axes, grid="both")
        if not axes.lines:
            axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, ha="center", color=FAINT)
    for axes in (over_epochs, against):
        if axes.lines:
            axes.legend(fontsize=8.5, frameon=False, loc="best")
