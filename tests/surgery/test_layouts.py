"""Cutting layers of every layout, and residual streams: structures by hand, so that no finder has a part in it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import ClassVar

import by_hand
import nets
import pytest
import reference
import torch
from conformance import Network, NetworkTester
from torch import Tensor, nn

import gsprune
from gsprune import Pruner
from gsprune.cost.budgets import Budget
from gsprune.cost.counting import count_macs
from gsprune.criteria import Abs
from gsprune.cutting.calibration import Calibration
from gsprune.cutting.scoring import gate_gradients
from gsprune.schedules import Linear
from gsprune.structures.structure import Found, Structure
from gsprune.surgery.shrink import mask_units, shrink

IDS = torch.tensor([[1, 2, 3, 4], [5, 10, 7, 8], [0, 9, 2, 1]])
LINES = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(3))
THREE = LINES[..., :3]


def by(make, find, x: Tensor, **options) -> Network:
    network = Network(make, x, [], (), by_hand=find, **options)
    torch.manual_seed(0)
    object.__setattr__(network, "found", [(s.name, s.kind, s.units) for s in find(make())])
    return network


class TestLayouts(NetworkTester):
    """Members along any dimension, of parameters and buffers."""

    networks: ClassVar = {
        "transposed": by(by_hand.generator_net, by_hand.in_generator, nets.images()),
        "grouped": by(by_hand.grouped, by_hand.in_grouped, nets.images(), again=True),
        "whole groups": by(by_hand.whole_groups, by_hand.in_whole_groups, nets.images()),
        "norms of groups": by(by_hand.normed_groups, by_hand.in_normed_groups, nets.images()),
        "scale and buffer": by(by_hand.Scaled, by_hand.in_scaled, nets.images()),
        "words": by(by_hand.Words, by_hand.in_words, IDS, again=True),
        "weight norm": by(by_hand.weight_normed, by_hand.in_weight_normed, LINES[:, :3]),
        "experts": by(by_hand.Experts, by_hand.in_experts, torch.randn(4, 8)),
        "lstm": by(
            lambda: by_hand.Recurrent(nn.LSTM), by_hand.in_recurrent, LINES[..., :3], others=[LINES[:1, :2, :3]]
        ),
        "gru": by(lambda: by_hand.Recurrent(nn.GRU), by_hand.in_recurrent, THREE),
        "rnn": by(lambda: by_hand.Recurrent(nn.RNN), by_hand.in_recurrent, THREE),
        "gru cell": by(by_hand.Cell, by_hand.in_cell, THREE, again=True),
        "lstm cell": by(lambda: by_hand.Cell(nn.LSTMCell), by_hand.in_cell, THREE),
    }


STREAM: dict[str, object] = {"kinds": ["residual", "neurons"], "others": [IDS[:1, :2], IDS.repeat(2, 1)]}


class TestStreams(NetworkTester):
    """The width of residual streams: norms over the virtual full width."""

    optimizers = ("sgd", "adamw")
    networks: ClassVar = {
        "layer norm": by(by_hand.Stream, by_hand.in_stream, IDS, again=True, onnx=True, **STREAM),
        "no affine pair": by(
            lambda: by_hand.Stream(lambda n: nn.LayerNorm(n, elementwise_affine=False)),
            by_hand.in_stream,
            IDS,
            **STREAM,
        ),
        "rms norm": by(lambda: by_hand.Stream(nn.RMSNorm), by_hand.in_stream, IDS, again=True, onnx=True, **STREAM),
        "rms norm without weight": by(
            lambda: by_hand.Stream(lambda n: nn.RMSNorm(n, elementwise_affine=False)), by_hand.in_stream, IDS, **STREAM
        ),
        "not tied": by(lambda: by_hand.Stream(tied=False), by_hand.in_stream, IDS, **STREAM),
        "encoder": by(lambda: by_hand.encoder(norm_first=True), by_hand.in_encoder, LINES, kinds=["residual"]),
        "norms behind": by(lambda: by_hand.encoder(norm_first=False), by_hand.in_encoder, LINES, kinds=["residual"]),
        "pictures": by(by_hand.ConvNet, by_hand.in_convnet, nets.images(), kinds=["residual", "neurons"], again=True),
    }


def found_by(monkeypatch: pytest.MonkeyPatch, find: Callable[[nn.Module], list[Structure]]) -> None:
    monkeypatch.setattr("gsprune.discovery.find.find_structures", lambda model, x, **_: Found((*find(model),), (), {}))


def test_a_unit_of_a_stream_costs_what_all_its_layers_save() -> None:
    """Columns of the tied table once, positions, norms, rows and columns of both blocks."""
    net = by_hand.Stream()
    stream = by_hand.in_stream(net)[0]
    block = 2 + 24 + 8 + 1 + 1 + 2 + 10 + 10 + 1
    (price,) = Budget("params", 0.5, net, [stream], IDS).prices()
    assert price == pytest.approx((11 + 6 + 2 * block + 2) / 1164)
    (price,) = Budget("macs", 0.5, net, [stream], IDS).prices()
    assert price == pytest.approx(IDS.numel() * (2 * (24 + 8 + 10 + 10) + 11) / count_macs(net, IDS))


def test_a_stream_is_cut_at_each_update_of_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would be in the end: the masked network holds exact zeros in the stream, whatever the optimizer does."""
    found_by(monkeypatch, by_hand.in_stream)
    left = []
    for when in ("at_end", "each_update"):
        torch.manual_seed(0)
        net = by_hand.Stream(tied=False).double()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
        pruner = Pruner(
            net,
            Abs(),
            kinds=["residual", "neurons"],
            target_sparsity=0.5,
            schedule=Linear(end_epoch=2),
            example_input=IDS,
            steps_per_epoch=3,
            epochs=3,
            optimizer=optimizer,
            shrink=when,
        )
        pruner.attach(optimizer)
        for _ in range(9):
            optimizer.zero_grad()
            (net(IDS) - 0.3).square().mean().backward()
            optimizer.step()
        pruner.finish()
        left.append(net.eval()(IDS))
        assert net.norm.weight.shape == (4,)
    torch.testing.assert_close(*left, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("repair", ["least_squares", "batchnorm", None])
def test_a_trained_network_loses_positions_of_its_stream(monkeypatch: pytest.MonkeyPatch, repair: str | None) -> None:
    found_by(monkeypatch, by_hand.in_stream)
    torch.manual_seed(0)
    net = by_hand.Stream().eval()
    batches = [(torch.randint(11, (8, 6)), torch.randint(11, (8,))) for _ in range(3)]
    found = gsprune.cut(
        net,
        batches,
        lambda out, labels: nn.functional.cross_entropy(out.mean(1), labels),
        params=0.6,
        kinds=["residual", "neurons"],
        repair=repair,
        progress=False,
    )
    assert 0 < int(found.keeps["table"].sum()) < 8
    assert found.small.params == pytest.approx(0.6 * found.dense.params, rel=0.1)  # a position is a tenth of them
    assert found.model(batches[0][0]).isfinite().all()


@pytest.mark.parametrize("name", ["transposed", "grouped", "experts", "lstm", "words"])
def test_a_trained_network_of_other_layouts_is_cut(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Scores of layers that are not read as matrices are the gradients of their weights."""
    network = TestLayouts.networks[name]
    found_by(monkeypatch, network.by_hand)
    torch.manual_seed(0)
    net, x = network.make().eval(), network.example
    found = gsprune.cut(net, [(x, torch.zeros(len(x)))], lambda out, _: out.square().mean(), params=0.7, progress=False)
    assert found.small.params < 0.8 * found.dense.params
    assert found.model(x).isfinite().all()


def test_gates_of_single_samples_are_those_of_the_weights() -> None:
    """Whether a layer is seen by what it reads (grouped, transposed) or by its weight's gradient (a bilinear layer)."""
    for name in ("transposed", "grouped", "words"):
        network = TestLayouts.networks[name]
        torch.manual_seed(0)
        net = network.make().double().eval()
        x = network.input()[:1]
        structures = network.by_hand(net)
        data = Calibration([(x, torch.zeros(1))], lambda out, _: out.square().sum(), samples=1)
        found = gate_gradients(net, structures, data)
        net(x).square().sum().backward()
        for structure in structures:
            expected = reference.gate_sums(net, structure.consumers)
            torch.testing.assert_close(found[structure.name][0].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_narrow_norm_leaves_pytorch_as_a_graph() -> None:
    """torch.export and half precision; the same numbers as the norm over all positions that are zero."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)), torch.randn(3, 4)
    rows = by_hand.structure(net, "0", "residual", 6, producers=[("0.weight", 0), ("0.bias", 0)],
                             consumers=[("2.weight", 1)], norms=[("1.weight", 0), ("1.bias", 0)])  # fmt: skip
    keep = torch.tensor([True, False, True, True, False, False])
    masked = copy.deepcopy(net)
    mask_units(masked, [rows], [keep])
    shrink(net, [rows], [keep], example_input=x)
    assert (type(net[1]).__name__, net[1].normalized_shape, net[1].full_width) == ("NarrowLayerNorm", (3,), 6)
    program = torch.export.export(net.eval(), (x,)).module()
    torch.testing.assert_close(program(x), masked(x))
    half = net.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), masked(x), rtol=0.1, atol=0.1)


def test_a_mask_of_a_stream_from_elsewhere_is_applied_and_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    found_by(monkeypatch, by_hand.in_stream)
    net = by_hand.Stream().eval()
    pruner = Pruner.from_masks(net, {"table": torch.arange(8) % 2 == 0}, example_input=IDS)
    before = net(IDS)
    pruner.finish()
    assert net.table.embedding_dim == 4
    torch.testing.assert_close(net(IDS), before)
