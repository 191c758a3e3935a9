"""Repair after cuts of layers of every layout, of residual streams too: masked equals cut, no held-back error rises."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import by_hand
import nets
import pytest
import torch
from torch import Tensor, nn

from gsprune.pruner.repairing import _write
from gsprune.repair import least_squares
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.cut_plan import plan_cut
from gsprune.surgery.shrink import mask_units


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


IDS = torch.randint(11, (40, 4), generator=torch.Generator().manual_seed(3))
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any], Tensor]] = {
    "transposed": (by_hand.generator_net, by_hand.in_generator, nets.images(20).double()),
    "grouped": (by_hand.grouped, by_hand.in_grouped, nets.images(20).double()),
    "whole groups": (by_hand.whole_groups, by_hand.in_whole_groups, nets.images(20).double()),
    "norms of groups": (by_hand.normed_groups, by_hand.in_normed_groups, nets.images(20).double()),
    "scale and buffer": (by_hand.Scaled, by_hand.in_scaled, nets.images(20).double()),
    "words": (by_hand.Words, by_hand.in_words, IDS),
    "layer norm": (lambda: by_hand.Stream(tied=False), by_hand.in_stream, IDS),
    "tied": (by_hand.Stream, by_hand.in_stream, IDS),
    "rms norm": (lambda: by_hand.Stream(nn.RMSNorm, tied=False), by_hand.in_stream, IDS),
    "encoder": (lambda: by_hand.encoder(norm_first=True), by_hand.in_encoder, drawn(40, 4, 5)),
    "norms behind": (lambda: by_hand.encoder(norm_first=False), by_hand.in_encoder, drawn(40, 4, 5)),
    "pictures": (by_hand.ConvNet, by_hand.in_convnet, nets.images(20).double()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_masked_equals_cut_after_repair_and_nothing_is_worse(name: str) -> None:
    make, find, x = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = nets.settle(make()).double().eval()
    structures = find(dense)
    keeps = [torch.arange(s.units) >= max(1, s.units // 3) for s in structures]
    small, masked = copy.deepcopy(dense), copy.deepcopy(dense)
    plan = plan_cut(structures, keeps)
    apply_cut(small, plan)
    mask_units(masked, structures, keeps)
    torch.testing.assert_close(masked(x), small(x), rtol=0, atol=1e-9)
    report = least_squares(small, dense, [x], plan)
    assert report.repaired or name == "words"  # whose neurons have nothing in common
    assert all(layer.after <= layer.before for layer in report.layers if not math.isnan(layer.before))
    _write(masked, small, plan, [layer.name for layer in report.repaired])
    torch.testing.assert_close(masked(x), small(x), rtol=0, atol=1e-9)
