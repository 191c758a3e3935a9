"""Pictures: their sizes, the shades at known places, and that nothing global is touched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.text import Text
from PIL import Image

from gsprune.plots.drawing import KEPT, PRUNED, SPARSITY, elide, plain_label
from gsprune.plots.run_figures import _fit, mask_image, save_history, save_layer_sparsity
from gsprune.pruner.targets import Share
from gsprune.text.display import percent


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are drawn."""
    texts: list[str] = []
    draw = Text.draw
    monkeypatch.setattr(Text, "draw", lambda text, *args: (texts.append(text.get_text()), draw(text, *args))[1])
    return texts


@pytest.fixture
def line_at(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Where lines are drawn across a picture."""
    found: list[float] = []
    draw = Axes.axvline
    monkeypatch.setattr(Axes, "axvline", lambda axes, x, **style: (found.append(x), draw(axes, x, **style))[1])
    return found


def colours(picture: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(int(part) for part in pixel) for pixel in picture.reshape(-1, 3)}


def test_a_small_mask_is_enlarged_cell_by_cell() -> None:
    pixels, pooled = _fit(torch.tensor([[True, False], [False, True]]), 50, 60)
    assert not pooled
    assert pixels.shape == (48, 48)
    assert pixels[:24, :24].all()
    assert pixels[24:, 24:].all()
    assert not pixels[:24, 24:].any()
    assert not pixels[24:, :24].any()


def test_a_large_mask_is_averaged_and_keeps_its_share() -> None:
    mask = torch.zeros(400, 8, dtype=torch.bool)
    mask[:100] = True
    mask[100:200, ::2] = True
    pixels, pooled = _fit(mask, 4, 8)
    assert pooled
    assert pixels.shape == (4, 8)
    assert pixels[0].tolist() == [1.0] * 8
    assert pixels[2:].sum() == 0
    assert pixels[1].tolist() == [1.0, 0.0] * 4
    assert pixels.mean() == mask.float().mean()


def test_mask_image_shades_kept_dark_and_pruned_light() -> None:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:4] = True
    picture = mask_image({"fc.weight": mask})
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    assert picture.shape[1] == 1200
    panel = picture[94 : 94 + 8 * 24, 16 : 16 + 8 * 24]
    assert colours(panel[: 4 * 24]) == {KEPT}
    assert colours(panel[4 * 24 :]) == {PRUNED}


def test_a_unit_mask_is_a_strip_with_one_cell_a_unit() -> None:
    picture = mask_image({"blocks.0.attn": torch.tensor([True, False, True, True])})
    line = picture[100, 16 : 16 + 4 * 24 : 24]
    assert [tuple(int(part) for part in pixel) for pixel in line] == [KEPT, PRUNED, KEPT, KEPT]
    assert colours(picture[94:116, 16 + 23]) == {(255, 255, 255)}  # the hairline between two units


@pytest.mark.parametrize("count", [0, 1, 4, 9, 40, pytest.param(150, marks=pytest.mark.slow)])
def test_pictures_stay_readable_whatever_the_number_of_masks(count: int) -> None:
    masks = {f"layer{index}.weight": torch.rand(20, 30) < 0.5 for index in range(count)}
    height, width, _ = mask_image(masks).shape
    assert width <= 1600
    assert height < 9000
    units = {name: mask[0] for name, mask in masks.items()}
    assert mask_image(units).shape[1] <= 1600


def test_empty_and_scalar_masks_do_not_break_the_picture() -> None:
    masks = {"none": torch.zeros(0, 4, dtype=torch.bool), "one": torch.tensor(True)}
    assert mask_image(masks).shape[1] == 1200


def test_layer_sparsity_is_a_png_with_bars(tmp_path: Path) -> None:
    shares = {"a.weight": Share(3, 4, "weights"), "b.weight": Share(0, 12, "weights")}
    save_layer_sparsity(tmp_path / "figures" / "sparsity.png", shares, Share(3, 16, "weights"))
    picture = np.array(Image.open(tmp_path / "figures" / "sparsity.png").convert("RGB"))
    bar = (picture == [int(SPARSITY[i : i + 2], 16) for i in (1, 3, 5)]).all(-1)
    assert bar.any()
    assert bar[: picture.shape[0] // 2].sum() == bar.sum()  # the lower layer is not pruned: no bar
    save_layer_sparsity(tmp_path / "empty.png", {}, Share(0, 0, "weights"))


def test_the_dashed_line_and_the_head_line_say_the_share_they_are_given(
    tmp_path: Path, written: list[str], line_at: list[float]
) -> None:
    """Of strips and matrices side by side: their entries are not all of one kind, so nothing is added up here."""
    share = Share(90, 100, "weights")
    masks = {"a": torch.tensor([True, False]), "a.weight": torch.ones(4, 5, dtype=torch.bool)}
    save_layer_sparsity(tmp_path / "a.png", {"a": Share(1, 2, "channels"), "a.weight": Share(0, 20, "weights")}, share)
    mask_image(masks, share=share)
    assert "Pruned: 90.0 % of the weights (dashed)" in written
    assert line_at == [90.0]
    assert "2 masks: 10 of 100 weights kept, 90.0 % pruned" in written


def test_the_head_line_counts_the_masks_that_are_not_shown(written: list[str]) -> None:
    mask_image({f"layer{index}": torch.arange(2) < (2 if index < 120 else 0) for index in range(150)})
    assert "150 masks (the first 120 are shown): 240 of 300 kept, 20.0 % pruned" in written


def test_history_draws_what_there_is(tmp_path: Path) -> None:
    rows = [
        {"step": 0, "train/accuracy": 0.5, "val/accuracy": 0.6, "sparsity": 0.0},
        {"step": 1, "val/accuracy": float("nan"), "sparsity": 0.4},
        {"step": 2, "val/accuracy": 0.9, "sparsity": 0.8},
        {"step": 2, "latency_ms": 1.0},
    ]
    save_history(tmp_path / "history.png", rows, baseline=0.95)
    save_history(tmp_path / "empty.png", [])
    sizes = {Image.open(tmp_path / name).size for name in ("history.png", "empty.png")}
    assert sizes == {(1430, 650)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.png", "history.png"]


@pytest.mark.parametrize(("of", "told"), [("channels", "sparsity of channels (%)"), (None, "sparsity (%)")])
def test_history_says_what_its_sparsity_is_of(written: list[str], tmp_path: Path, of: str | None, told: str) -> None:
    save_history(tmp_path / "history.png", [{"step": 0, "val/accuracy": 0.6, "sparsity": 0.0}], of=of)
    assert {told, "Sparsity by epoch", "Validation accuracy against sparsity"} <= set(written)


def test_percentages_do_not_round_to_all_or_nothing() -> None:
    assert [percent(share) for share in (0, 0.0001, 0.5, 0.9999, 1)] == [
        "0.0 %", "<0.1 %", "50.0 %", ">99.9 %", "100.0 %",
    ]  # fmt: skip


def test_long_names_lose_their_middle() -> None:
    assert elide("abcdefghij", 7) == "abc…hij"
    assert elide("abc", 7) == "abc"


@pytest.mark.slow
def test_drawing_never_imports_pyplot() -> None:
    code = (
        "import sys, torch; import gsprune.plots.run_figures as f; assert 'matplotlib' not in sys.modules;"
        "f.mask_image({'a': torch.ones(3, 3, dtype=torch.bool)}); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_strangers_name_is_drawn_as_it_is() -> None:
    assert plain_label("a $x^$\nb\ud800", 20) == r"a \$x^\$ b "
    assert plain_label("abcdefghij", 7) == "abc…hij"
