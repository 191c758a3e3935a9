"""What a calibration set takes of the user's batches, and what it refuses."""

from __future__ import annotations

import nets
import pytest
import torch
import torch.nn.functional as F
from facts import refused
from torch.utils.data import DataLoader, TensorDataset

from gsprune.cutting.calibration import Calibration

X, Y = torch.arange(60.0).reshape(10, 6), torch.arange(10) % 3


@pytest.mark.parametrize("samples", [1, 3, 4, 7, 10, 99])
def test_the_first_samples_are_taken(samples: int) -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=4)
    data = Calibration(loader, F.cross_entropy, samples=samples)
    assert data.size == min(samples, 10)
    assert torch.equal(torch.cat(data.inputs()), X[:samples])
    assert torch.equal(torch.cat([b.targets for b in data.batches]), Y[:samples])
    assert [b.size for b in data.cut_into(3)] == [b.size for b in Calibration(_threes(data), None).batches]


def _threes(data: Calibration):
    for batch in data.batches:
        yield from torch.split(batch.inputs, 3)


def test_a_generator_is_read_once_and_no_further() -> None:
    read = []

    def batches():
        for i in range(10):
            read.append(i)
            yield X[i : i + 1], Y[i : i + 1]

    assert Calibration(batches(), F.cross_entropy, samples=4).size == 4
    assert read == [0, 1, 2, 3]


def test_split_keeps_every_sample_once() -> None:
    data = Calibration([(X[:4], Y[:4]), (X[4:], Y[4:])], F.cross_entropy)
    first, rest = data.split(6)
    assert (first.size, rest.size) == (6, 4)
    assert torch.equal(torch.cat([*first.inputs(), *rest.inputs()]), X)
    with refused("10", "split"):
        data.split(10)


def test_mappings_are_cut_in_every_part() -> None:
    data = Calibration([{"a": X, "b": {"mask": X > 3}, "labels": Y, "scale": torch.tensor(2.0)}], samples=3)
    batch = data.batches[0]
    assert batch.inputs["a"].shape == (3, 6)
    assert batch.inputs["b"]["mask"].shape == (3, 6)
    assert batch.inputs["scale"].dim() == 0
    assert batch.targets["labels"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("batches", "facts"),
    [
        ([], ["batches is empty"]),
        (X, ["Tensor", "iterable"]),
        ({"x": X}, ["dict", "iterable"]),
        (5, ["int", "iterable"]),
        ([(X, Y[:3])], ["10", "3"]),
        ([("text", Y)], ["tuple", "tensor"]),
        ([(X, Y, Y)], ["tuple"]),
    ],
)
def test_what_is_no_batch_is_refused(batches, facts) -> None:
    with refused(*facts):
        Calibration(batches, F.cross_entropy)


@pytest.mark.parametrize("samples", [0, -1, 2.5, True, "64"])
def test_samples_are_a_whole_number(samples) -> None:
    with refused("calibration", repr(samples)):
        Calibration([(X, Y)], F.cross_entropy, samples=samples)


def test_a_loss_and_targets_belong_together() -> None:
    with refused("no loss"):
        Calibration([(X, Y)]).check_loss()
    with refused("no targets"):
        Calibration([X], F.cross_entropy).check_loss()
    with refused("str"):
        Calibration([(X, Y)], "cross_entropy")  # type: ignore[arg-type]
    each = Calibration([(X, Y)], lambda o, t: F.cross_entropy(o, t, reduction="none"))
    with refused("(10,)"):
        each.loss(nets.mlp(), each.batches[0])
