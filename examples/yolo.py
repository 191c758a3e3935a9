"""A detector like YOLO: branches that are split and concatenated, upsampling, outputs at two scales.

    python examples/yolo.py

Each picture has one bright square. The network scores the cells of two grids; the best one holds the square's centre.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gsprune


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()
    )


class Split(nn.Module):
    """Half of the channels pass a bottleneck, all are concatenated: a C2f block."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.inner = conv(inputs, outputs, 1), conv(outputs // 2, outputs // 2)
        self.last = conv(outputs // 2 * 3, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2, 1)
        return self.last(torch.cat([a, b, self.inner(b)], 1))


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = conv(1, 16, stride=2), conv(16, 32, stride=2)
        self.high, self.deep, self.low = Split(32, 32), conv(32, 64, stride=2), Split(64, 64)
        self.merge = Split(96, 32)
        self.fine, self.coarse = nn.Conv2d(32, 1, 1), nn.Conv2d(64, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        high = self.high(self.down(self.stem(x)))
        low = self.low(self.deep(high))
        merged = self.merge(torch.cat([high, F.interpolate(low, scale_factor=2.0)], 1))
        return self.fine(merged), self.coarse(low)


def batch() -> tuple[Tensor, Tensor]:
    """32 noisy pictures of 32 x 32, and the centre of the square in each."""
    centre = torch.randint(4, 28, (32, 2))
    pictures = torch.randn(32, 1, 32, 32) * 0.3
    for picture, (y, x) in zip(pictures, centre.tolist(), strict=True):
        picture[:, y - 2 : y + 3, x - 2 : x + 3] += 1
    return pictures, centre


def loss(outputs: tuple[Tensor, Tensor], centre: Tensor) -> Tensor:
    """Which cell of the fine grid (8 x 8) and of the coarse one (4 x 4) holds the centre."""
    fine, coarse = outputs
    cells = [(centre // size * torch.tensor([32 // size, 1])).sum(1) for size in (4, 8)]
    return F.cross_entropy(fine.flatten(1), cells[0]) + F.cross_entropy(coarse.flatten(1), cells[1])


def right(net: nn.Module) -> float:
    """Share of the pictures whose fine cell is found."""
    with torch.no_grad():
        found = [(net(x)[0].flatten(1).argmax(1), (y // 4 * torch.tensor([8, 1])).sum(1)) for x, y in test]
    return torch.cat([answer == cell for answer, cell in found]).float().mean().item()


torch.manual_seed(0)
training, test = [batch() for _ in range(16)], [batch() for _ in range(8)]
net = Detector()
optimizer = torch.optim.Adam(net.parameters(), lr=4e-3)
for _ in range(10):
    for pictures, centre in training:
        loss(net(pictures), centre).backward()
        optimizer.step()
        optimizer.zero_grad()

net.eval()
cut = gsprune.cut(net, training, loss, macs=0.5, progress=False)
print(f"MACs: {cut.dense.macs:,} -> {cut.small.macs:,}")
print(f"dense {right(net):.1%}, cut {right(cut.model):.1%} of the squares found")
print("left as they are:", ", ".join(sorted(cut.skipped)))
