"""Pictures of a sweep: what is drawn where, for one point and for many, and that nothing drops out of the picture."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from gsprune.plots.sweep_figures import STYLES, Line, Mark, Panel, draw_panels


def picture(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def count(pixels: np.ndarray, colour: str) -> int:
    return int((pixels == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).sum())


def panel(*lines: Line, dense: float | None = None) -> Panel:
    return Panel("title", "across", lines, {} if dense is None else {"dense network": dense})


def test_equal_results_of_two_variants_stand_side_by_side() -> None:
    lines = [Line(name, style, [Mark(50, 90, 1.0, False)]) for style, name in enumerate(("abs", "weighted"))]
    pixels = picture(draw_panels([panel(*lines)]))
    assert pixels.shape[1] == 1430
    upper = pixels[: pixels.shape[0] * 3 // 4]  # without the key
    assert all(count(upper, STYLES[style][0]) > 40 for style in (0, 1))


def test_accuracies_that_are_all_equal_and_a_dense_line_far_away_are_in_the_picture() -> None:
    flat = Line("abs", 0, [Mark(x, 99.0, None, True) for x in (50, 80, 90)])
    pixels = picture(draw_panels([panel(flat, dense=20.0)]))
    assert count(pixels, STYLES[0][0]) > 100
    assert count(pixels, "#6b7280") > 300  # the dashed line


def test_more_variants_than_styles_are_grey_and_named_together() -> None:
    lines = [Line(f"v{i}", i if i < len(STYLES) else None, [Mark(50 + i, 90 - i, None, False)]) for i in range(60)]
    pixels = picture(draw_panels([panel(*lines), panel(*lines), panel()]))
    assert count(pixels, "#b6bcc6") > 40
    assert pixels.shape[0] < 1400


@pytest.mark.parametrize("count_of_panels", [1, 2, 3])
def test_nothing_to_draw_is_said_not_a_fault(count_of_panels: int) -> None:
    assert picture(draw_panels([panel()] * count_of_panels)).shape[1] == 1430
