import pytest
import torch

from gsprune.ranking.blocks import SUMS, dot_along


@pytest.mark.parametrize("shape", [(7, 3), (5, SUMS // 2), (2, SUMS + 1), (64, 8, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dim", [0, 1])
def test_products_are_added_up_over_all_other_axes(shape: tuple[int, ...], dtype: torch.dtype, dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    if len(shape) == 4:
        a = a.contiguous(memory_format=torch.channels_last)
    found, exact = dot_along(a, b, dim), (a.double() * b.double()).movedim(dim, 0).flatten(1).sum(1)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-3)
