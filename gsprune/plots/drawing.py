"""Shared by all pictures: colours, figures without pyplot, labels.

Nothing here uses pyplot's global state: figures are objects on an Agg canvas, so they need no display and may be drawn
in any thread.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from gsprune.extras import need
from gsprune.files.disk import write_atomic
from gsprune.text.display import label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PRUNED = (232, 236, 241)  # light
KEPT = (16, 60, 112)  # dark: more kept is always darker, also in grey print
ACCURACY, INK, FAINT, SPARSITY = "#103c70", "#1f2430", "#6b7280", "#d9622b"
DPI = 100


def new_figure(width_in: float, height_in: float) -> Figure:
    agg, figures = need("matplotlib.backends.backend_agg"), need("matplotlib.figure")
    figure: Figure = figures.Figure(figsize=(width_in, height_in), dpi=DPI, layout=None, facecolor="white")
    agg.FigureCanvasAgg(figure)
    return figure


def pixels_of(figure: Figure) -> np.ndarray:
    canvas: Any = figure.canvas
    with _boxes_for_missing_letters():
        canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, laid out so that no label is cut off."""
    figure.set_layout_engine("constrained")
    buffer = io.BytesIO()
    with _boxes_for_missing_letters():
        figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


class Picture:
    """A figure that a notebook shows, and that can be saved.

    Attributes:
        figure: matplotlib's, to change it.
    """

    def __init__(self, figure: Figure) -> None:
        self.figure = figure

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a PNG file."""
        write_atomic(path, self._repr_png_())

    def _repr_png_(self) -> bytes:
        return png(self.figure)


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure with set margins as a PNG; `savefig` would draw it twice."""
    figure.set_dpi(130)
    save_picture(path, pixels_of(figure))


@contextmanager
def _boxes_for_missing_letters() -> Iterator[None]:
    """Draw characters that the font lacks as boxes, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def save_picture(path: str | os.PathLike[str], picture: np.ndarray) -> None:
    """Write a picture (height, width, 3; uint8), such as `mask_image` makes, as a PNG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png", compress_level=1)  # 5x faster, 10 % larger
    write_atomic(path, file.getvalue())


def quiet(axes: Axes, *, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#e5e7eb", linewidth=0.8)  # type: ignore[arg-type,unused-ignore]
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, colors=INK)


def logarithmic(axes: Axes) -> None:
    """A logarithmic axis across; a short one has labels at 1, 2 and 5, which do not run into each other."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_minor_formatter(NullFormatter())
    if high < 100 * low:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 3 * low else (1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def elide(name: str, length: int) -> str:
    """
    >>> elide("encoder.layers.11.attention.output.dense.weight", 24)
    'encoder.lay…dense.weight'
    """
    if len(name) <= length:
        return name
    tail = length // 2
    return f"{name[: length - tail - 1]}…{name[-tail:]}"


def plain_label(text: str, length: int) -> str:
    """An untrusted text as matplotlib can draw it: printable, short, without mathematics between dollars.

    >>> plain_label("cost $x^$\\n", 20)
    'cost \\\\$x^\\\\$ '
    """
    return elide(label(text, len(text)), length).replace("$", r"\$")
