"""Pictures of an audit and of a sensitivity scan: every mark and line is in them."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image

from gsprune.plots.audit_figures import plot_audit
from gsprune.plots.drawing import Picture
from gsprune.plots.sensitivity_figures import plot_sensitivity
from gsprune.plots.sweep_figures import OTHERS, STYLES


def count(picture: Picture, colour: str) -> int:
    pixels = np.array(Image.open(io.BytesIO(picture._repr_png_())).convert("RGB"))
    return int((pixels == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).sum())


def test_an_audit_has_a_mark_and_an_interval_for_each_kind() -> None:
    ranks = [("Fisher", "heads", (0.3, 0.0, 0.6)), ("Fisher", "neurons", (0.8, 0.7, 0.9))]
    ranks += [("Abs", "heads", (0.2, -0.1, 0.5)), ("Abs", "neurons", (math.nan, math.nan, math.nan))]
    picture = plot_audit(ranks)
    heads, neurons = (count(picture, STYLES[kind][0]) for kind in (0, 1))
    assert heads > 1.5 * neurons > 100  # one of the neurons' is not defined
    assert count(plot_audit([]), STYLES[0][0]) == 0


def test_a_scan_names_the_structures_that_suffer_most_and_greys_the_others() -> None:
    lines = {f"layer{i}": [(0.25, 0.9 - 0.01 * i), (0.5, 0.9 - 0.02 * i)] for i in range(len(STYLES) + 3)}
    picture = plot_sensitivity(lines, dense=0.9, metric="accuracy")
    assert all(count(picture, colour) > 200 for colour, _ in STYLES)
    assert count(picture, OTHERS) > 200
    few = plot_sensitivity({"a": [(0.5, 2.0)], "b": [(0.5, 1.0)]}, dense=1.0, metric="loss", falls=False)
    assert count(few, OTHERS) == 0
    assert count(few, STYLES[0][0]) > count(few, STYLES[2][0]) == 0
