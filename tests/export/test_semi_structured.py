"""Which 2:4 layers are compressed: the gate, with a conversion that runs on a CPU in the place of the GPU's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gsprune
from gsprune.export import semi_structured
from gsprune.export.semi_structured import is_two_of_four
from gsprune.latency import Latency

FASTER = Latency(ms=1.0, dense_ms=1.6, speedup=1.6, low=1.5, high=1.7)


def half(layer: nn.Linear) -> nn.Linear:
    with torch.no_grad():
        layer.weight.view(-1, 4)[:, 1::2] = 0
    return layer


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[int, Latency]:
    """A machine whose compressed tensor is a clone; width of a layer's output -> what the clock says."""
    clock: dict[int, Latency] = {}
    monkeypatch.setattr(semi_structured, "_check_device", lambda device: None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", torch.clone)
    monkeypatch.setattr(semi_structured, "in_turns", lambda dense, *_, **__: clock.get(len(dense.weight), FASTER))
    return clock


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(half(nn.Linear(64, 32)), nn.ReLU(), half(nn.Linear(32, 64)), nn.ReLU(), nn.Linear(64, 4))


def test_what_is_faster_is_converted_and_the_network_stays_as_it_was(gpu: dict[int, Latency]) -> None:
    gpu[64] = Latency(ms=1.0, dense_ms=1.02, speedup=1.02, low=0.97, high=1.07)
    net, x = network(), torch.randn(8, 64)
    before = list(net.parameters())
    found = gsprune.export.to_semi_structured(net, x)
    assert found.converted == ["0"]
    assert [(layer.name, layer.reason) for layer in found.layers] == [("0", None), ("2", "it is not faster")]
    assert found.model[0].weight is not net[0].weight
    assert not found.model[0].weight.requires_grad
    assert torch.equal(found.model(x), net(x))
    assert all(a is b for a, b in zip(before, net.parameters(), strict=True))
    assert "1 of 2 2:4 layers are compressed" in repr(found)
    assert "1.60x" in repr(found)
    assert "it is not faster" in found._repr_html_()


def test_a_clock_that_cannot_tell_leaves_a_layer_dense(gpu: dict[int, Latency]) -> None:
    gpu |= {32: Latency(note="not measurable here"), 64: FASTER}
    found = gsprune.export.to_semi_structured(network(), torch.randn(8, 64))
    assert [layer.reason for layer in found.layers] == ["not measurable here", None]


def test_a_layer_that_computes_something_else_or_is_refused_stays_dense(
    gpu: dict[int, Latency], monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(weight: torch.Tensor) -> torch.Tensor:
        if len(weight) == 64:
            raise RuntimeError("the shape does not fit\nmore of it")
        return 1.1 * weight

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", convert)
    found = gsprune.export.to_semi_structured(network(), torch.randn(8, 64))
    assert [layer.reason for layer in found.layers] == ["its outputs differ", "the shape does not fit"]
    assert found.layers[0].error == pytest.approx(0.1, rel=0.5)
    loose = gsprune.export.to_semi_structured(network(), torch.randn(8, 64), tolerance=0.5)
    assert loose.converted == ["0"]


def test_a_layer_that_the_example_does_not_reach_stays_dense(gpu: dict[int, Latency]) -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.apart = half(nn.Linear(8, 4)), half(nn.Linear(8, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    found = gsprune.export.to_semi_structured(Apart(), torch.randn(2, 8))
    assert [(layer.name, layer.reason) for layer in found.layers][1] == ("apart", "the example does not reach it")


def test_what_cannot_be_is_refused(gpu: dict[int, Latency], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no 2:4 linear layer"):
        gsprune.export.to_semi_structured(nn.Linear(8, 8), torch.ones(1, 8))
    with pytest.raises(ValueError, match=r"repeats is 3: .* 30"):
        gsprune.export.to_semi_structured(network(), torch.ones(1, 64), repeats=3)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"8\.0 .* cpu"):
        gsprune.export.to_semi_structured(network(), torch.ones(1, 64))


def test_the_pattern_that_pruning_leaves_is_known() -> None:
    pruned = gsprune.cut(
        nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)),
        [torch.randn(64, 16)],
        pattern="2:4",
        progress=False,
    )
    assert [is_two_of_four(layer.weight) for layer in (pruned.model[0], pruned.model[2])] == [True, True]
    assert not is_two_of_four(torch.ones(4, 6))
    assert not is_two_of_four(torch.ones(4, 8))
