"""Draws the picture of several cuts of one network: accuracy against what is left."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from gsprune.files.disk import write_atomic
from gsprune.plots.sweep_figures import Line, Mark, Panel, draw_panels

LEFT = {
    "macs": "multiplications left (%)",
    "params": "parameters left (%)",
    "latency": "time left, as asked for (%)",
    "weights": "weights left (%)",
}


def save_curve(
    path: str | os.PathLike[str], rows: Sequence[Mapping[str, float]], *, kind: str, dense: Mapping[str, float]
) -> None:
    """Write a PNG: accuracy of each cut over the share of the dense network's cost that is left.

    Args:
        rows: of each cut "left" in (0, 1], "val_accuracy" and "accuracy" (on the test split), in [0, 1].
        kind: what is left: "macs", "params", "latency" or "weights".
        dense: "val_accuracy" and "accuracy" of the dense network.
    """
    lines = []
    for style, (name, label) in enumerate((("val_accuracy", "validation"), ("accuracy", "test"))):
        marks = [Mark(100 * row["left"], 100 * row[name], None, False) for row in rows]
        lines.append(Line(label, style, marks))
    levels = {
        f"dense, {label}": 100 * dense[name] for name, label in (("val_accuracy", "validation"), ("accuracy", "test"))
    }
    write_atomic(path, draw_panels([Panel("Cuts of one network, without training", LEFT[kind], lines, levels)]))
