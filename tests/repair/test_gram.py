import numpy as np
import pytest
import torch

from gsprune.repair.gram import COLUMNS, Moments


@pytest.mark.parametrize(
    ("groups", "columns", "outputs"), [(2, 3, 2), (4, 1, 1), (2, 1, 2), (1, COLUMNS, 2), (1, 2 * COLUMNS + 5, 2)]
)
def test_moments_of_several_batches_are_those_of_all_rows(groups: int, columns: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 3 + torch.randn(40, groups, columns, generator=generator)
    y = torch.randn(40, groups, outputs, generator=generator)
    moments = Moments.none(groups, columns, outputs)
    for rows in torch.arange(40).split([7, 1, 32]):
        moments.add(x[rows], y[rows])
    for group in range(groups):
        mine, given = x[:, group].double().numpy(), y[:, group].double().numpy()
        apart, away = mine - mine.mean(0), given - given.mean(0)
        np.testing.assert_allclose(moments.xx[group], apart.T @ apart, atol=1e-4)
        np.testing.assert_allclose(moments.yx[group], away.T @ apart, atol=1e-4)
        np.testing.assert_allclose(moments.mean_x[group], mine.mean(0), atol=1e-6)
        np.testing.assert_allclose(moments.xx[group], moments.xx[group].T, atol=1e-5)
