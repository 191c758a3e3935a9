"""The picture of a sweep as SVG: what is drawn where, what a collapsed network does to it, and that it is valid XML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

import pytest

from gsprune.plots.front_figure import NARROW, WIDE, Dot, Front, Series, Size, document, draw, visible


def front(*series: Series, **settings: float) -> Front:
    return Front("title", "parameters left", "(% of 1,000)", "accuracy (%)", series, **settings)


def series(*dots: Dot, name: str = "abs", style: int | None = 0, **more: bool) -> Series:
    return Series(name, style, dots, **more)


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg).iter("text")]


def places(svg: str) -> list[tuple[float, float]]:
    """Where the marks stand, without those of the key."""
    marks = re.findall(r'transform="translate\(([\d.]+) ([\d.]+)\) scale\(6\)"', svg)
    return [(float(x), float(y)) for x, y in marks]


def test_up_and_right_is_better_and_equal_results_stand_side_by_side() -> None:
    svg = draw(front(series(Dot(50, 99.0), Dot(10, 98.0)), series(Dot(50, 99.0), name="b", style=1), control=99.0))
    (x, y), (smaller, worse), (beside, same) = places(svg)
    assert smaller > x + 300
    assert worse > y + 50
    assert same == y
    assert 4 < abs(beside - x) < 12


def test_a_collapsed_network_does_not_press_the_others_together_and_that_is_said() -> None:
    dots = [Dot(50, 99.0), Dot(20, 98.5), Dot(10, 97.0)]
    whole, broken = (
        draw(front(series(*found), control=99.0, max_drop=1.0))
        for found in (dots, [*dots, Dot(5, 12.0, up=(2.0, 22.0))])
    )
    heights = [[y for _, y in places(svg)][:3] for svg in (whole, broken)]
    span = [low - high for high, _, low in heights]
    assert span[1] > 0.75 * span[0]
    assert "below 96.8 %, not to scale" in texts(broken)
    assert "12.0" in texts(broken)  # what it really has
    assert not any("not to scale" in text for text in texts(whole))
    assert places(broken)[3][1] > heights[1][2]


def test_the_network_that_is_taken_is_to_scale_wherever_it_is() -> None:
    dots = [Dot(50, 99.0), Dot(20, 98.9), Dot(18, 98.9), Dot(10, 80.0, taken=True), Dot(5, 12.0)]
    low, high, is_broken = visible(front(series(*dots), max_drop=20.0))
    assert (low < 80, high > 99, is_broken) == (True, True, False)
    svg = draw(front(series(*dots), max_drop=1.0))
    assert "take" in texts(svg)
    assert visible(front(series(*dots), max_drop=1.0))[0] < 80


def test_zeros_in_the_old_size_are_hollow_references_dashed_and_bars_on_both_axes() -> None:
    units = series(Dot(50, 99.0, across=(45, 55), up=(98, 99.5)))
    weights = series(Dot(50, 98.5, smaller=False), Dot(10, 98.0, smaller=False), name="random", style=1, reference=True)
    svg = draw(front(units, weights, control=99.2, dense=98.8, max_drop=1.0))
    assert svg.count('class="bar"') == 2
    assert 'fill="var(--paper)"' in svg
    assert re.search(r'<path class="s1" [^>]*stroke-dasharray', svg)
    told = texts(svg)
    for text in ("abs", "random", "control: 99.20 %", "within 1 point of it", "dense network: 98.80 %"):
        assert text in told
    assert any("hollow" in text for text in told)
    assert 'class="band"' in svg


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_nothing_is_drawn_outside_of_the_picture(size: Size) -> None:
    many: Sequence[Series] = [
        series(
            Dot(60 - i, 99 - i, (50 - i, 70), (90, 105)), name=f"variant of a long name {i}", style=i if i < 8 else None
        )
        for i in range(12)
    ]
    svg = draw(front(*many, control=99.9, dense=98.0, max_drop=1.0), size)
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())  # type: ignore[union-attr]
    assert width == size.width
    for x, y in re.findall(
        r"translate\((?!0 0\))([\d.-]+) ([\d.-]+)\)", svg
    ):  # signs of the key have places of their own
        assert 0 < float(x) < width
        assert 0 < float(y) < height
    assert "4 more variants" in texts(svg)


def test_without_a_network_it_says_so() -> None:
    assert texts(draw(front()))[0] == "no pruned network yet"
    assert texts(draw(front(series(Dot(100, 50))), NARROW))  # a single point that saves nothing


def test_names_of_anybody_are_text_and_the_file_stands_alone() -> None:
    evil = "<script>alert(1)</script>\"'&\ud800\x00"
    found = front(series(Dot(50, 99.0, note=evil, link='#"><b>'), name=evil), control=99.0)
    root = ElementTree.fromstring(document(found))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert not [node for node in root.iter() if node.tag.endswith("script")]
    assert "prefers-color-scheme: dark" in "".join(root.itertext())
    assert "<script" not in draw(found)
