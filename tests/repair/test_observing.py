"""Residual streams: which layers add into one, and that a repair makes up for what the stream has lost."""

from __future__ import annotations

import copy

import nets
import pytest
import torch
from torch import Tensor, nn

from gsprune.discovery.find import find_structures
from gsprune.repair import least_squares
from gsprune.repair.lockstep import Place, Visit, lockstep
from gsprune.repair.observing import Stream, observe
from gsprune.surgery.shrink import shrink


@pytest.fixture(autouse=True)
def seeded() -> object:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_a_residual_block_with_a_batchnorm_between() -> None:
    streams = observe(nets.ResNet(), nets.images()).streams
    assert streams == {"conv2": Stream(Place("conv1", "in", 0), "bn2")}


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder_layers_of_pytorch(norm_first: bool, batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=norm_first, batch_first=batch_first)
    streams = observe(layer, torch.randn(3, 5, 8)).streams
    assert set(streams) == {"self_attn.out_proj", "linear2"}
    assert streams["self_attn.out_proj"].place == Place("", "in", 0)
    assert streams["linear2"].place == (Place("norm2", "in", 0) if norm_first else Place("norm1", "out", 0))


class Shortcut(nn.Module):
    """The convolution on the way around runs last: it is the one that can make up for the other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.around, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        y += self.around(x)
        return self.head(y)


def test_of_two_summands_the_later_one_has_the_stream() -> None:
    assert observe(Shortcut(), torch.randn(3, 4)).streams == {"around": Stream(Place("inner", "out", 0))}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_the_sum_comes_nearer_than_without_the_stream(norm_first: bool, batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(
        8, 4, 32, dropout=0.0, norm_first=norm_first, batch_first=batch_first, activation="gelu"
    )
    dense = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    for p in dense.parameters():
        nn.init.normal_(p, std=0.5) if p.dim() > 1 else None
    x = torch.randn(64, 6, 8, dtype=torch.float64)
    structures = find_structures(dense, x[:2]).structures
    small = copy.deepcopy(dense)
    keeps = [torch.arange(s.units) >= s.units // 2 for s in structures]
    plan = shrink(small, structures, keeps, example_input=x[:2])
    seen: list[Visit] = []
    place = observe(dense, x[:2]).streams["layers.0.self_attn.out_proj"].place
    names = ["layers.0.self_attn.out_proj"]
    lockstep(dense, small, [x], names, seen.append, held_back=[False], watched={names[0]: place})
    attention = seen[0].streams[0][0] + seen[0].outputs[0]
    assert attention.shape == (x if batch_first else x.transpose(0, 1)).shape
    errors = []
    for streams in (False, True):
        repaired = copy.deepcopy(small)
        report = least_squares(repaired, dense, [x], plan, layers="consumers", norms=None, streams=streams)
        assert len(report.repaired) == 4, report
        errors.append(float((repaired(x) - dense(x)).detach().square().mean()))
    assert errors[1] < errors[0] < float((small(x) - dense(x)).detach().square().mean())
