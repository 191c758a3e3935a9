"""Parts that an evaluation does not run are looked for in training, and nothing moves by that."""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsprune.discovery.find import find_structures
from gsprune.structures.running import counted, outputs, wake
from gsprune.surgery.shrink import shrink


class NormAct(nn.BatchNorm2d):
    """A norm that has its activation as a child, as timm's BatchNormAct2d."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class Counting(nn.Module):
    """A buffer that moves in training, in a module with children."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Identity()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        return self.inside(x)


class Router(nn.Module):
    """Chooses by products in float32, as routers of experts do."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float())


class Table(nn.Module):
    """Parameters that are read without a call, as those of relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(8, 1, 1))


class Net(nn.Module):
    def __init__(self, *, auxiliary: bool = False) -> None:
        super().__init__()
        self.stem, self.norm, self.next = nn.Conv2d(3, 6, 3), NormAct(6), nn.Conv2d(6, 8, 3)
        self.table, self.head, self.counting = Table(), nn.Conv2d(8, 2, 1), Counting()
        self.beside = nn.Conv2d(6, 2, 3) if auxiliary else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.counting(self.norm(self.stem(x)))
        z = self.head(torch.relu(self.next(y) + self.table.bias))
        return z + self.beside(y) if self.training and self.beside is not None else z


def woken(model: nn.Module, x: Tensor) -> bool:
    calls: Counter[nn.Module] = Counter()
    with counted(model, calls):
        outputs(model, x)
    return wake(model, x, calls)


def test_statistics_and_other_buffers_stay() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 9)
    for auxiliary in (False, True):
        model = Net(auxiliary=auxiliary).eval()
        assert woken(model, x) is model.training is auxiliary
        assert not model.norm.training
        assert not model.norm.running_mean.any()
        assert not model.counting.seen


def test_a_network_with_such_norms_is_cut() -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 9, 9)
    found = [s for s in find_structures(model, x).structures if s.name == "stem"]
    shrink(model, found, [torch.tensor([True, False] * 3)], example_input=x)
    assert model.next.weight.shape == (8, 3, 3, 3)


def test_products_in_float32_do_not_depend_on_the_order_of_their_sum() -> None:
    """Of a router that is masked, and of one that is cut."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 3000, generator=generator, dtype=torch.float64) for n in (50, 40))
    keep = torch.rand(3000, generator=generator) < 0.5
    masked, cut = Router(weight * keep), Router(weight[:, keep])
    assert torch.equal(*outputs(masked, x), *outputs(cut, x[:, keep]))
    assert not torch.equal(masked(x), cut(x[:, keep]))
