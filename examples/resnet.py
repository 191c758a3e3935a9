"""A ResNet on pictures of handwritten digits: train, cut to half of the MACs, fine-tune, save, load, export to ONNX.

    python examples/resnet.py

The residual blocks are torchvision's. Channels that a shortcut ties together go together.
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock

import gsprune


def build() -> nn.Module:
    shrink = nn.Sequential(nn.Conv2d(16, 32, 1, stride=2, bias=False), nn.BatchNorm2d(32))
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        BasicBlock(16, 16),
        BasicBlock(16, 32, stride=2, downsample=shrink),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def train(net: nn.Module, batches: DataLoader, epochs: int) -> None:
    net.train()
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(epochs):
        for pictures, labels in batches:
            F.cross_entropy(net(pictures), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    net.eval()


torch.manual_seed(0)
digits = load_digits()
pictures = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
training = DataLoader(TensorDataset(pictures[:1300], labels[:1300]), batch_size=50, shuffle=True)
test = DataLoader(TensorDataset(pictures[1300:], labels[1300:]), batch_size=100)

net = build()
train(net, training, epochs=4)

right = gsprune.right_or_wrong(test)
cut = gsprune.cut(net, training, F.cross_entropy, macs=0.5, evaluate=right, progress=False)
for name, text in cut.rows():
    if name != "seconds":
        print(f"{name}: {text}")
train(cut.model, training, epochs=2)
print(f"after two epochs of fine-tuning: {right(cut.model).mean():.1%}")

with tempfile.TemporaryDirectory() as folder:
    cut.save(folder)
    again = gsprune.load_pruned(folder, build())
    print("loaded, the same outputs:", torch.equal(again(pictures[:5]), cut.model(pictures[:5])))
    difference = gsprune.export.to_onnx(again, pictures[:1], Path(folder, "smaller.onnx"))
    print("ONNX agrees to 1e-4:", difference < 1e-4)
