"""Schedules: literal values, both ends, before and after, and the ranges they refuse."""

from __future__ import annotations

import pytest
from facts import refused

from gsprune.schedules import Cosine, Cubic, Exponential, Linear, OneShot, Ramp

RAMPS = [Cubic, Cosine, Exponential]


@pytest.mark.parametrize("ramp", RAMPS)
def test_ends_are_exact(ramp: type[Ramp]) -> None:
    schedule = ramp(target_sparsity=0.9, initial_sparsity=0.2, start_epoch=1, end_epoch=5)
    assert [schedule(p) for p in (0, 0.99)] == [0.0, 0.0]
    assert schedule(1) == pytest.approx(0.2, abs=1e-15)
    assert [schedule(p) for p in (5, 5.5, 100)] == [0.9, 0.9, 0.9]


@pytest.mark.parametrize("ramp", [*RAMPS, Linear])
def test_never_falls_and_stays_in_range(ramp: type[Ramp]) -> None:
    schedule = ramp(target_sparsity=0.97, initial_sparsity=0.1, start_epoch=0.5, end_epoch=7, update_frequency=0.3)
    values = [schedule(i / 50) for i in range(500)]
    assert values == sorted(values)
    assert min(values) == 0.0
    assert max(values) == 0.97


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [
        (Cubic, [0.0, 0.4625, 0.7, 0.7875, 0.8]),
        (Cosine, [0.0, 0.117157, 0.4, 0.682843, 0.8]),
        (Exponential, [0.0, 0.331260, 0.552786, 0.700930, 0.8]),
        (Linear, [0.16, 0.32, 0.48, 0.64, 0.8]),
    ],
)
def test_literal_values(ramp: type[Ramp], expected: list[float]) -> None:
    schedule = ramp(target_sparsity=0.8, end_epoch=4)
    assert [schedule(e) for e in range(5)] == pytest.approx(expected, abs=1e-6)


def test_value_stands_still_between_updates() -> None:
    schedule = Cubic(target_sparsity=0.8, end_epoch=4, update_frequency=0.5)
    assert schedule(1.49) == schedule(1.0) != schedule(1.5)


@pytest.mark.parametrize("frequency", [0.1, 0.2, 0.3, 0.7])
def test_fractions_of_an_epoch_add_up(frequency: float) -> None:
    """0.1 + 0.1 + 0.1 is not 0.3 in binary: the third update must come at the third step all the same."""
    schedule = Cubic(target_sparsity=0.8, end_epoch=10, update_frequency=frequency)
    for i in range(1, 10):
        step = sum([frequency] * i)
        assert schedule(step) == pytest.approx(0.8 - 0.8 * (1 - i * frequency / 10) ** 3, abs=1e-12)


def test_one_shot() -> None:
    schedule = OneShot(target_sparsity=0.5, start_epoch=2)
    assert [schedule(p) for p in (0, 1.999, 2, 9)] == [0.0, 0.0, 0.5, 0.5]


def test_open_end_takes_two_thirds_of_the_run() -> None:
    schedule = Cubic(target_sparsity=0.5)
    assert schedule.resolved(9).end_epoch == 6
    assert Cubic(target_sparsity=0.5, end_epoch=2).resolved(9).end_epoch == 2
    with refused("end_epoch", "epochs"):
        schedule(1)


def test_open_target_is_the_pruners() -> None:
    schedule = Cubic(initial_sparsity=0.95, end_epoch=3)
    assert schedule.retargeted(0.99)(3) == 0.99
    with refused("target_sparsity"):
        schedule(1)
    with refused("initial_sparsity 0.95", "target_sparsity 0.5"):
        schedule.retargeted(0.5)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"target_sparsity": 1.0}, "target_sparsity is 1.0: it must be in [0, 1)"),
        ({"target_sparsity": -0.1}, "target_sparsity is -0.1: it must be in [0, 1)"),
        ({"target_sparsity": float("nan")}, "target_sparsity is nan: it must be in [0, 1)"),
        ({"initial_sparsity": 1.5}, "initial_sparsity is 1.5: it must be in [0, 1)"),
        (
            {"initial_sparsity": 0.6, "target_sparsity": 0.5},
            "initial_sparsity 0.6 is above target_sparsity 0.5: what is pruned stays pruned",
        ),
        ({"start_epoch": 3, "end_epoch": 2}, "end_epoch 2 is before start_epoch 3"),
        ({"start_epoch": -1}, "start_epoch is -1: it must be 0 or more"),
        ({"update_frequency": 0}, "update_frequency is 0: it must be above 0 (epochs between updates)"),
    ],
)
def test_refused_settings(settings: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole sentence is compared
        Cubic(**settings)  # type: ignore[arg-type]
    assert str(error.value) == sentence
