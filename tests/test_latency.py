"""The clock: turns, intervals, what is not told, and one measurement for all networks of an architecture."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from facts import refused
from torch import Tensor, nn

from gsprune import latency
from gsprune.latency import NOT_HERE, SAME, architecture, compare, interval, latency_ms, shared

X = torch.ones(1, 8)


def net(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8))


def clock(noise: float = 0.0, *, busy: Callable[[], float] = lambda: 1.0) -> Any:
    """Seconds that go with the parameters; `noise` is the spread of each reading, `busy` slows a moment's readings."""
    chosen = random.Random(0)

    def read(model: nn.Module, _: object, passes: int) -> float:
        size = sum(p.numel() for p in model.parameters())
        return size * 1e-6 * busy() * (1 + noise * chosen.random())

    return read


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A clock without noise; the list holds the passes of each reading."""
    passes: list[int] = []
    read = clock()
    monkeypatch.setattr(latency, "_time", lambda model, x, count: (passes.append(count), read(model, x, count))[1])
    return passes


def test_a_ratio_comes_with_its_interval(steady: list[int]) -> None:
    found = compare(net(), net(2), X)
    assert (found.dense_ms, found.ms) == (pytest.approx(0.144), pytest.approx(0.042))
    assert found.speedup == pytest.approx(144 / 42) == found.low == found.high
    assert found.note is None
    # 5 readings of one pass to warm up, then 30 turns of 2 ms: 14 passes of 0.144 ms, 20 at most of 0.042 ms
    assert len(steady) == 2 * (5 + 30)
    assert steady[:10] == [1] * 10
    assert set(steady[10:]) == {14, 20}


@pytest.mark.parametrize("masked", [False, True])
def test_where_no_shape_changed_nothing_is_measured(steady: list[int], masked: bool) -> None:
    dense = net()
    pruned = copy.deepcopy(dense)
    if masked:
        pruned[0].weight.data.mul_(torch.rand(8, 8) > 0.9)
    found = compare(dense, pruned, X)
    assert (found.ms, found.dense_ms, found.speedup, found.low, found.high) == (None,) * 5
    assert found.note == SAME
    assert steady == []


def test_fewer_than_30_repeats_give_no_figure(steady: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    found = compare(net(), net(2), X, repeats=29)
    assert (found.speedup, found.note) == (None, f"{NOT_HERE}: 29 repeats are too few, it takes 30")
    assert steady == []
    found = compare(net(), net(2), X, max_seconds=0)
    assert (found.speedup, found.ms) == (None, None)
    assert found.note == f"{NOT_HERE}: there was time for 3 repeats, it takes 30"
    assert len(steady) == 2 * (1 + 3)


def test_an_interval_wider_than_a_tenth_gives_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "PATIENCE", 0.0)
    monkeypatch.setattr(latency, "_time", clock(noise=2.0))
    found = compare(net(), net(4), X)
    assert (found.speedup, found.low, found.high, found.ms, found.dense_ms) == (None,) * 5
    assert found.note is not None
    assert found.note.startswith(f"{NOT_HERE}: the ratio lies between ")
    assert found.note.endswith("x, wider than 10 % of it")


def test_more_repeats_narrow_an_interval_that_is_too_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    for patience, is_told in ((0.0, False), (30.0, True)):
        monkeypatch.setattr(latency, "PATIENCE", patience)
        monkeypatch.setattr(latency, "_time", clock(noise=0.8))
        found = compare(net(), net(4), X)
        assert (found.speedup is not None) is is_told
    assert found.speedup is not None
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low <= 0.1 * found.speedup
    assert found.low < 144 / 76 < found.high


@pytest.mark.slow
def test_an_interval_holds_the_ratio_about_as_often_as_it_says() -> None:
    """Of 200 pairs of samples of known ratio 2: a 95 % interval misses it in about 10."""
    chosen = random.Random(0)

    def sample(scale: float) -> list[float]:
        return [scale * chosen.lognormvariate(0, 0.2) for _ in range(40)]

    intervals = [interval(sample(2.0), sample(1.0)) for _ in range(200)]
    assert 2 <= sum(not low <= 2.0 <= high for low, high in intervals) <= 20


def test_a_busy_moment_that_slows_both_networks_widens_no_interval() -> None:
    """Repeats are drawn in pairs."""
    moments = [1.0 + 4.0 * (i % 3 == 0) for i in range(30)]
    low, high = interval([2 * moment for moment in moments], moments)
    assert (low, high) == (2.0, 2.0)


class Counting(nn.Linear):
    """A class whose code is in this file."""


def other_norm() -> nn.Module:
    model = nn.Sequential(nn.LayerNorm(8, eps=1e-5))
    model[0].eps = 1e-3
    return model


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (net, net, True),
        (net, lambda: net(4), False),
        (net, lambda: net().double(), False),
        (net, lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), False),
        (lambda: nn.Linear(8, 8), lambda: Counting(8, 8), False),
        (lambda: nn.Sequential(nn.LayerNorm(8)), other_norm, False),
        (lambda: nn.Conv2d(4, 8, 3), lambda: nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last), False),
        (lambda: nn.Conv2d(4, 8, 3), lambda: nn.Conv2d(4, 8, 3, stride=2), False),
        (lambda: nn.TransformerEncoderLayer(8, 2), lambda: nn.TransformerEncoderLayer(8, 4), False),
    ],
)
def test_an_architecture_is_all_but_the_values(
    one: Callable[[], nn.Module], other: Callable[[], nn.Module], same: bool
) -> None:
    assert (architecture(one()) == architecture(other())) is same


def test_networks_of_an_architecture_share_a_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"repeats": 30, "max_seconds": 10.0}
    monkeypatch.setattr(latency, "_time", clock(noise=0.1))
    first = shared(tmp_path, net(), net(2), X, **settings)
    again = shared(tmp_path, net(), net(2), X, **settings)  # other weights
    assert first.speedup is not None
    assert again == first
    assert shared(tmp_path, net(), net(3), X, **settings) != first
    assert len(list(tmp_path.iterdir())) == 2
    for other in ({"repeats": 40, "max_seconds": 10.0}, {"repeats": 30, "max_seconds": 9.0}):
        shared(tmp_path, net(), net(2), X, **other)
    shared(tmp_path, net(), net(2), torch.ones(2, 8), **settings)
    assert len(list(tmp_path.iterdir())) == 5
    assert shared(tmp_path, net(), net(), X, **settings).note == SAME
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize(
    "damage",
    [
        lambda told: "{",
        lambda told: json.dumps([told]),
        lambda told: json.dumps({**told, "key": "another"}),
        lambda told: json.dumps({**told, "speedup": "NaN"}),
        lambda told: json.dumps({**told, "low": -1}),
        lambda told: json.dumps({**told, "ms": None}),
        lambda told: json.dumps({**told, "high": [1]}),
    ],
)
def test_a_damaged_entry_is_measured_again(
    tmp_path: Path, steady: list[int], damage: Callable[[dict[str, Any]], str]
) -> None:
    settings: dict[str, Any] = {"repeats": 30, "max_seconds": 10.0}
    found = shared(tmp_path, net(), net(2), X, **settings)
    (path,) = tmp_path.iterdir()
    path.write_text(damage(json.loads(path.read_text())))
    readings = len(steady)
    assert shared(tmp_path, net(), net(2), X, **settings) == found
    assert len(steady) == 2 * readings


def test_comparing_changes_no_mode_and_draws_no_random_number() -> None:
    dense, pruned = net(), net(2)
    pruned[1].eval()
    state = torch.get_rng_state()
    compare(dense, pruned, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in pruned.modules()] == [True, True, False, True]


def test_latency_takes_turns_and_returns_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    times = {"dense": [9.0, 1.0, 3.0, 2.0], "small": [9.0, 0.5, 0.4, 0.6]}

    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

    def fake(model: Named, *_: object) -> float:
        order.append(model.name)
        return times[model.name].pop(0)

    monkeypatch.setattr(latency, "_time", fake)
    models = {name: Named(name) for name in times}
    result = latency_ms(models, torch.ones(1), repeats=3, warmup=1)
    assert result == {"dense": 2000.0, "small": 500.0}  # the slow warm-up round is not in it
    assert order == ["dense", "small"] * 2 + ["small", "dense"] + ["dense", "small"]


def test_latency_stops_at_its_budget_but_not_before_three_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(latency, "_time", lambda *_: calls.append(1) or 0.25)
    result = latency_ms({"a": nn.Linear(1, 1)}, torch.ones(1), repeats=50, warmup=5, max_seconds=0)
    assert len(calls) == 1 + 3
    assert result == {"a": 250.0}


def test_latency_runs_without_gradients_in_eval_mode() -> None:
    seen = []

    class Probe(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, torch.is_inference_mode_enabled()))
            return x

    assert latency_ms({"probe": Probe()}, torch.ones(1), repeats=2, warmup=0)["probe"] > 0
    assert seen == [(False, True)] * 2


def test_latency_refuses_no_repeats() -> None:
    with refused("repeats=0"):
        latency_ms({}, torch.ones(1), repeats=0)
