"""Patterns: groups and masks by literals, padding that is refused, and N:M blocks along the input axis."""

from __future__ import annotations

import pytest
import reference
import torch
from facts import refused

from gsprune.ranking.patterns import Block, Pattern, Tile, parse_pattern

WEIGHT = torch.arange(16.0).reshape(4, 4)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [("1x1", Tile(1, 1)), ("4x1", Tile(4, 1)), ("1x16", Tile(1, 16)), ("2:4", Block(2, 4)), ("1:8", Block(1, 8))],
)
def test_notation(text: str, pattern: Pattern) -> None:
    assert parse_pattern(text) == pattern
    assert parse_pattern(pattern) is pattern


@pytest.mark.parametrize("text", ["", "4", "2x", "0x4", "2:4:8", "2-4", "axb", "144", 124])
def test_other_notations_are_refused(text: object) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole sentence is compared
        parse_pattern(text)  # type: ignore[arg-type]
    assert str(error.value) == (
        f'pattern is {text!r}: it must be a tile such as "1x1" or "4x1", or a block such as "2:4" (in quotes in YAML)'
    )


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (4, 4)])
def test_tile_groups_equal_the_slow_version(rows: int, cols: int) -> None:
    assert Tile(rows, cols).to_groups(WEIGHT).tolist() == reference.tile_sums(WEIGHT, rows, cols)


@pytest.mark.parametrize("shape", [(4, 8), (4, 4, 3, 3), (8, 2, 5)])
@pytest.mark.parametrize("text", ["1x1", "2x2", "4x1", "4x2"])
def test_masks_have_the_weights_shape_and_whole_tiles(text: str, shape: tuple[int, ...]) -> None:
    pattern = parse_pattern(text)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    groups = pattern.to_groups(weight)
    keep = pattern.to_weights(groups > 0, shape)
    assert keep.shape == weight.shape
    assert torch.equal(pattern.to_groups(keep.float()) > 0, groups > 0)


def test_a_convolution_is_seen_as_out_by_in_times_kernel() -> None:
    weight = torch.zeros(2, 2, 1, 2)
    weight[0, 1, 0, 0] = 1.0
    assert Tile(1, 2).to_groups(weight).tolist() == [[0.0, 1.0], [0.0, 0.0]]


def test_blocks_run_along_the_input_channels() -> None:
    weight = torch.zeros(1, 4, 1, 2)
    weight[0, :, 0, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    groups = Block(2, 4).to_groups(weight)
    assert groups.tolist() == [[0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0]]
    assert torch.equal(Block(2, 4).to_weights(groups, weight.shape), weight)
    assert Block(2, 4).protected(groups).int().tolist() == [[1, 1, 0, 0, 0, 0, 1, 1]]


def test_block_fixes_the_sparsity() -> None:
    assert Block(2, 4).final_sparsity == 0.5
    assert Block(1, 4).final_sparsity == 0.75
    assert Tile(2, 2).final_sparsity is None


@pytest.mark.parametrize(
    ("text", "shape", "sentence"),
    [
        ("3x1", (4, 4), "pattern 3x1 does not divide fc.weight, seen as 4 x 4: take another pattern, or exclude it"),
        (
            "1x8",
            (4, 3, 2, 2),
            "pattern 1x8 does not divide fc.weight, seen as 4 x 12: take another pattern, or exclude it",
        ),
        ("2:4", (4, 6), "pattern 2:4 does not divide the 6 inputs of fc.weight: take another pattern, or exclude it"),
    ],
)
def test_a_tile_that_does_not_divide_is_refused(text: str, shape: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole sentence is compared
        parse_pattern(text).check("fc.weight", shape)
    assert str(error.value) == sentence


def test_a_block_that_keeps_all_is_refused() -> None:
    with refused("pattern", "4:4"):
        parse_pattern("4:4")
