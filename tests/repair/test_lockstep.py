"""Two networks side by side: what a visit sees, what it may change, and that nothing hangs or stays behind."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator

import pytest
import torch
from facts import refused
from torch import Tensor, nn

from gsprune.repair.gram import given_rows
from gsprune.repair.lockstep import CalledAgainError, Place, Visit, lockstep


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Iterator[None]:
    state = torch.get_rng_state()
    yield
    assert [t.name for t in threading.enumerate() if t.name == "gsprune.repair"] == []
    assert torch.equal(torch.get_rng_state(), state)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).double()


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    return net(), net()


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2 + i, 3, generator=generator, dtype=torch.float64) for i in range(count)]


@pytest.fixture
def networks() -> Iterator[tuple[nn.Module, nn.Module]]:
    with torch.random.fork_rng():
        yield pair()


def test_a_visit_sees_what_the_layers_read_and_gave(networks: tuple[nn.Module, nn.Module]) -> None:
    dense, small = networks
    seen: list[Visit] = []
    order = lockstep(dense, small, batches(), ["2", "0"], seen.append, held_back=[False, True, False])
    assert order == ["0", "2"]
    visit = seen[1]
    assert visit.name == "2"
    assert visit.dense is dense[2]
    assert visit.small is small[2]
    assert visit.held_back == [False, True, False]
    for x, read, dense_read, gave in zip(batches(), visit.inputs, visit.dense_inputs, visit.outputs, strict=True):
        torch.testing.assert_close(read, small[:2](x), rtol=0, atol=1e-15)
        torch.testing.assert_close(dense_read, dense[:2](x), rtol=0, atol=1e-15)
        torch.testing.assert_close(gave, dense[:3](x), rtol=0, atol=1e-15)


def test_what_is_changed_is_what_later_layers_read(networks: tuple[nn.Module, nn.Module]) -> None:
    dense, small = networks
    read: dict[str, list[Tensor]] = {}

    def visit(visit: Visit) -> None:
        read[visit.name] = visit.inputs
        visit.small.load_state_dict(visit.dense.state_dict())

    lockstep(dense, small, batches(), ["0", "2", "4"], visit, held_back=[False] * 3)
    for x, last in zip(batches(), read["4"], strict=True):
        assert torch.equal(last, dense[:4](x))
        assert torch.equal(small(x), dense(x))


def test_the_passes_end_after_the_last_layer(networks: tuple[nn.Module, nn.Module]) -> None:
    dense, small = networks
    calls: list[int] = []
    small[4].register_forward_hook(lambda *_: calls.append(1))
    assert lockstep(dense, small, batches(), ["2"], lambda visit: None, held_back=[False] * 3) == ["2"]
    assert calls == []


def test_modes_come_back_and_both_evaluate(networks: tuple[nn.Module, nn.Module]) -> None:
    dense, small = networks
    small.train(), dense.eval(), small[2].eval()
    modes: list[bool] = []

    def visit(visit: Visit) -> None:
        modes.append(any(m.training for m in (*small.modules(), *dense.modules())))

    lockstep(dense, small, batches(), ["2"], visit, held_back=[False] * 3)
    assert modes == [False]
    assert [m.training for m in small] == [True, True, False, True, True]
    assert not dense.training


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x + torch.randn_like(x))


def test_a_batch_has_the_same_random_numbers_in_both_networks() -> None:
    with torch.random.fork_rng():
        dense, small = Noisy().double(), Noisy().double()
    seen: list[Visit] = []
    lockstep(dense, small, batches(), ["fc"], seen.append, held_back=[False] * 3)
    assert all(torch.equal(a, b) for a, b in zip(seen[0].inputs, seen[0].dense_inputs, strict=True))
    assert not torch.equal(seen[0].inputs[0] - batches()[0], seen[0].inputs[1][:2] - batches()[1][:2])


def test_an_error_of_a_network_comes_out(networks: tuple[nn.Module, nn.Module]) -> None:
    dense, small = networks
    with refused("mat1", error=RuntimeError):
        lockstep(
            dense, small, [*batches(), torch.ones(1, 5).double()], ["2"], lambda visit: None, held_back=[False] * 4
        )

    def fail(visit: Visit) -> None:
        raise KeyError(visit.name)

    with refused("2", error=KeyError):
        lockstep(dense, small, batches(), ["2"], fail, held_back=[False] * 3)


class Stubborn(nn.Module):
    """Takes every exception."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.a):
            try:
                x = layer(x)
            except:  # noqa: E722
                x = x + 1
        return x


def test_a_network_that_takes_every_exception_ends_too() -> None:
    with torch.random.fork_rng():
        dense, small = Stubborn().double(), Stubborn().double()
    assert lockstep(dense, small, batches(), ["b"], lambda visit: None, held_back=[False] * 3) == ["b"]


def test_a_layer_called_again_is_told() -> None:
    with torch.random.fork_rng():
        dense, small = Stubborn().double(), Stubborn().double()
    with pytest.raises(CalledAgainError) as caught:
        lockstep(dense, small, batches(), ["a", "b"], lambda visit: None, held_back=[False] * 3)
    assert caught.value.name == "a"


class Branches(nn.Module):
    """Which layers it calls, and in what order, depends on the input."""

    def __init__(self, names: str = "abc") -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(3, 3) for _ in range(4))
        self.names = names

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names if len(x) < 4 else self.names[::-1]:
            x = getattr(self, name)(x)
        return self.d(x)


def test_another_order_leaves_layers_and_goes_on() -> None:
    with torch.random.fork_rng():
        dense, small = Branches().double(), Branches().double()
    left: dict[str, str] = {}
    names = ["a", "b", "c", "d"]
    visited = lockstep(dense, small, batches(), names, lambda visit: None, held_back=[False] * 3, left=left)
    assert visited == ["c", "d"]
    assert set(left) == {"a", "b"}


def test_a_layer_that_is_not_reached_is_left() -> None:
    with torch.random.fork_rng():
        dense, small = Branches("ab").double(), Branches("a").double()
    left: dict[str, str] = {}
    names = ["a", "b", "c", "d"]
    visited = lockstep(dense, small, batches(2), names, lambda visit: None, held_back=[False] * 2, left=left)
    assert visited == ["a", "d"]
    assert set(left) == {"b", "c"}


class Routed(nn.Module):
    """Rows above a threshold pass a layer, the others do not."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.first, self.expert, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        (chosen,) = torch.where(x[:, 0] > self.threshold)
        return self.last(x.index_add(0, chosen, self.expert(x[chosen])))


def test_a_layer_that_reads_other_rows_is_left_and_one_that_reads_none_is_visited() -> None:
    dense, left, seen = Routed(0.0).double(), dict[str, str](), list[Visit]()
    for threshold, inner in ((9.0, ["expert"]), (0.0, [])):
        small = copy.deepcopy(dense)
        small.threshold = threshold
        left.clear()
        names = ["first", "expert", "last"]
        visited = lockstep(dense, small, batches(), names, seen.append, held_back=[False] * 3, left=left)
        assert visited == [name for name in names if name not in inner]
        assert [*left] == inner
        assert all("other rows" in why for why in left.values())
    dense.threshold = small.threshold = 9.0
    lockstep(dense, small, batches(), ["expert"], seen.append, held_back=[False] * 3)
    assert [y.shape for y in seen[-1].outputs] == [(0, 4)] * 3
    assert seen[-1].filled == 0
    outputs = [torch.zeros(0, 4), torch.zeros(2, 4)]
    assert Visit("expert", dense, small, [], [], outputs, []).filled == 1
    assert given_rows(seen[-1].small, seen[-1].outputs[0], None, torch.arange(3)).shape == (0, 1, 3)


def test_tensors_at_a_watched_place(networks: tuple[nn.Module, nn.Module]) -> None:
    dense, small = networks
    seen: list[Visit] = []
    watched = {"2": Place("0", "in", 0), "4": Place("1", "out", 0)}
    lockstep(dense, small, batches(), ["2", "4"], seen.append, held_back=[False] * 3, watched=watched)
    for i, x in enumerate(batches()):
        assert all(torch.equal(stream, x) for stream in seen[0].streams[i])
        torch.testing.assert_close(seen[1].streams[i], (dense[:2](x), small[:2](x)), rtol=0, atol=1e-15)


def test_networks_that_share_parameters_are_refused(networks: tuple[nn.Module, nn.Module]) -> None:
    dense, _ = networks
    shallow = copy.copy(dense)
    with refused("share parameters"):
        lockstep(dense, shallow, batches(), ["0"], lambda visit: None, held_back=[False] * 3)
