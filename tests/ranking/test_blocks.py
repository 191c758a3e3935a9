from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gsprune.ranking.blocks import BLOCK, dot_along

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "columns first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda x: x.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize("shape", [(7, 3), (1, 5), (5, BLOCK // 2), (2, BLOCK + 1), (64, 8, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dim", [0, 1])
def test_products_are_added_up_over_all_other_axes(shape: tuple[int, ...], dtype: torch.dtype, dim: int) -> None:
    assert_is_the_plain_sum(shape, dtype, ("channels last", "plain"), dim)


@pytest.mark.parametrize("shape", [(7, 3), (6, 5, 3, 3), (6, 5, 4)])
@pytest.mark.parametrize("layouts", [(one, other) for one in LAYOUTS for other in LAYOUTS])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_tensors_may_lie_in_memory_in_any_order(shape: tuple[int, ...], layouts: tuple[str, str], dim: int) -> None:
    assert_is_the_plain_sum(shape, torch.float32, layouts, dim % len(shape))


def assert_is_the_plain_sum(shape: tuple[int, ...], dtype: torch.dtype, layouts: tuple[str, str], dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (
        LAYOUTS[layout](torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for layout in layouts
    )
    found, exact = dot_along(a, b, dim), (a.double() * b.double()).movedim(dim, 0).flatten(1).sum(1)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("dim", [0, 1])
def test_what_is_not_finite_shows(bad: float, dim: int) -> None:
    weight, grad = torch.randn(4, 6), torch.randn(4, 6)
    grad[2, 3] = bad
    finite = dot_along(weight, grad, dim).isfinite()
    assert (~finite).nonzero().flatten().tolist() == [(2, 3)[dim]]


def test_no_entries_are_no_sums() -> None:
    empty = torch.zeros(3, 0)
    assert dot_along(empty, empty, 0).tolist() == [0, 0, 0]
    assert dot_along(empty, empty, 1).tolist() == []
