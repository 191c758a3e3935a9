"""Which ranking of units costs least accuracy: scope, normalisation, price and floor, on four kinds of networks.

    python benchmarks/rankings.py             # every ranking at the same MACs, digits, 3 seeds
    python benchmarks/rankings.py decay       # the decay of Fisher's scores while training

Each seed trains one dense network of each kind. Its scores are summed over one pass through the training pictures in
small batches. Every ranking cuts a copy of it until 30 % and 15 % are left of the MACs that can go; accuracy is
measured at once, and after one epoch of training, on the 540 pictures that neither training nor scores have seen.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsprune import Pruner
from gsprune.cost.budgets import Budget
from gsprune.cost.costs import make_cost
from gsprune.criteria import Abs, Criterion, Fisher, Weighted
from gsprune.discovery.find import find_structures
from gsprune.schedules import Cubic
from gsprune.structures.alike import alike
from gsprune.structures.structure import INNER, Structure
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.cut_plan import plan_cut
from gsprune.zoo.datasets import digits
from gsprune.zoo.models import ResidualBlock, vit_tiny

EXAMPLE = torch.zeros(1, 1, 8, 8)
SHARES = (0.3, 0.15)  # of the MACs that pruning can reach
DECAYS = (0.9, 0.95, 0.99, 1.0)


def conv(
    inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Module:
    layer = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), *([nn.ReLU()] if act else []))


class Inverted(nn.Module):
    """Expand, depthwise, project; added to what came in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inside = nn.Sequential(
            conv(width, 3 * width, kernel=1),
            conv(3 * width, 3 * width, groups=3 * width),
            conv(3 * width, width, kernel=1, act=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(x)  # type: ignore[no-any-return]


def headed(*layers: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and the epochs that train it
    "plain": (lambda: headed(conv(1, 16), conv(16, 32, stride=2), conv(32, 32), conv(32, 48, stride=2), width=48), 6),
    "residual": (
        lambda: headed(
            conv(1, 16), ResidualBlock(16), conv(16, 32, stride=2), ResidualBlock(32), ResidualBlock(32), width=32
        ),
        6,
    ),
    "depthwise": (
        lambda: headed(conv(1, 16), Inverted(16), conv(16, 24, stride=2), Inverted(24), Inverted(24), width=24),
        8,
    ),
    "attention": (
        lambda: vit_tiny(
            image_size=8, in_channels=1, num_classes=10, patch_size=2, dim=32, depth=3, num_heads=4, mlp_ratio=2
        ),
        16,
    ),
}


@dataclass(frozen=True)
class Ranking:
    criterion: str
    scope: str
    normalize: bool = False
    by_cost: bool = False
    floor: float = 0.1

    def __str__(self) -> str:
        parts = ["mean"] * self.normalize + ["by cost"] * self.by_cost + ["no floor"] * (not self.floor)
        return ", ".join([f"{self.criterion} {self.scope}", *(parts if self.scope != "local" else [])])


CRITERIA: dict[str, Criterion] = {"abs": Abs(decay=1.0), "weighted": Weighted(decay=1.0), "fisher": Fisher(decay=1.0)}
SETTINGS = {  # scope, normalize, by cost, floor
    "local": ("local", False, False, 0.0),
    "like": ("isomorphic", False, False, 0.1),
    "like, mean": ("isomorphic", True, False, 0.1),
    "all": ("global", False, False, 0.1),
    "all, mean": ("global", True, False, 0.1),
    "all, no floor": ("global", False, False, 0.0),
    "all, mean, no floor": ("global", True, False, 0.0),
    "all, by cost": ("global", False, True, 0.1),
    "all, by cost, no floor": ("global", False, True, 0.0),
    "like, by cost": ("isomorphic", False, True, 0.1),
}
OF_EACH = {
    "abs": [*SETTINGS][:8],
    "weighted": ["local", "like, mean", "all", "all, mean"],  # under ReLU the same scores as those of abs
    "fisher": [*SETTINGS],
}
RANKINGS = [Ranking(criterion, *SETTINGS[name]) for criterion, names in OF_EACH.items() for name in names]


def whole(pictures: Any) -> tuple[Tensor, Tensor]:
    images, labels = pictures.__getitems__(range(len(pictures)))
    return images, labels


class Data:
    def __init__(self) -> None:
        splits = digits()
        self.x, self.y = whole(splits.train)
        self.test_x, self.test_y = map(torch.cat, zip(whole(splits.val), whole(splits.test), strict=True))

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed))
        return ((self.x[rows], self.y[rows]) for rows in order.split(size))

    def accuracy(self, model: nn.Module) -> float:
        model.eval()
        with torch.inference_mode():
            return 100 * float((model(self.test_x).argmax(1) == self.test_y).float().mean())

    def train(self, model: nn.Module, *, epochs: int, lr: float, seed: int) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
        steps = epochs * math.ceil(len(self.x) / 64)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
        model.train()
        for epoch in range(epochs):
            for x, y in self.batches(64, 100 * seed + epoch):
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()


def dense(name: str, seed: int, data: Data) -> nn.Module:
    torch.manual_seed(seed)
    build, epochs = NETWORKS[name]
    model = build()
    data.train(model, epochs=epochs, lr=5e-3, seed=seed)
    return model


def scores(model: nn.Module, criterion: Criterion, data: Data, seed: int) -> list[Tensor]:
    """Summed over batches of 8, in evaluation mode; the weights stay."""
    pruner = Pruner(model, criterion, target_sparsity=0.5, example_input=EXAMPLE)
    model.eval()
    for x, y in data.batches(8, seed):
        F.cross_entropy(model(x), y).backward()
        pruner.on_before_optimizer_step()
        model.zero_grad()
    return [*pruner.scores().values()]


def inner(model: nn.Module) -> tuple[Structure, ...]:
    """What a pruner of units scores that is told no kinds."""
    return tuple(s for s in find_structures(model, EXAMPLE).structures if s.kind in INNER)


def reach(model: nn.Module, structures: tuple[Structure, ...]) -> float:
    """Share of the MACs that goes with all units but one of each structure."""
    return 1 - make_cost("macs", model, structures, EXAMPLE)([torch.arange(s.units) < 1 for s in structures])


def cut(
    model: nn.Module, structures: tuple[Structure, ...], ranked: list[Tensor], how: Ranking, share: float
) -> nn.Module:
    sets = {
        "local": [[i] for i in range(len(structures))],
        "global": [[*range(len(structures))]],
        "isomorphic": alike(model, structures),
    }
    left = 1 - (1 - share) * reach(model, structures)
    budget = Budget("macs", left, model, structures, EXAMPLE, min_share=how.floor, together=sets[how.scope])
    if how.normalize:
        ranked = [score / score.mean() for score in ranked]
    smaller = copy.deepcopy(model)
    apply_cut(smaller, plan_cut(structures, budget.cut(ranked, left, by_cost=how.by_cost)))
    return smaller


def rankings(seeds: Sequence[int]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Ranking -> network -> accuracy at once and after an epoch, of each seed and share."""
    data = Data()
    found: dict[str, dict[str, list[tuple[float, float]]]] = {str(how): {} for how in ["dense", *RANKINGS]}
    for name, seed in itertools.product(NETWORKS, seeds):
        model = dense(name, seed, data)
        structures = inner(model)
        found["dense"].setdefault(name, []).append((data.accuracy(model),) * 2)
        of = {criterion: scores(model, made, data, seed) for criterion, made in CRITERIA.items()}
        for how, share in itertools.product(RANKINGS, SHARES):
            smaller = cut(model, structures, of[how.criterion], how, share)
            before = data.accuracy(smaller)
            data.train(smaller, epochs=1, lr=2e-3, seed=seed)
            found[str(how)].setdefault(name, []).append((before, data.accuracy(smaller)))
    return found


def decays(seeds: Sequence[int]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Fisher's decay, by cost, beside other rankings: 4 epochs of training, in which units go; accuracy in the end."""
    data = Data()
    settings: dict[str, tuple[Criterion, dict[str, object]]] = {
        "abs d=0.95 local": (Abs(), {"scope": "local"}),
        "abs d=0.95 global": (Abs(), {}),
        "fisher d=0.95 local": (Fisher(), {"scope": "local"}),
        **{f"fisher d={d:g} global, by cost": (Fisher(decay=d), {}) for d in DECAYS},
    }
    found: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in settings}
    for network, seed in itertools.product(NETWORKS, seeds):
        start = dense(network, seed, data)
        left = 1 - (1 - SHARES[-1]) * reach(start, inner(start))
        for name, (criterion, scope) in settings.items():
            model = copy.deepcopy(start)
            steps = math.ceil(len(data.x) / 64)
            optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
            pruner = Pruner(
                model, criterion, budget={"macs": left}, schedule=Cubic(end_epoch=3, update_frequency=0.25),
                example_input=EXAMPLE, steps_per_epoch=steps, epochs=4, optimizer=optimizer, **scope,
            )  # fmt: skip
            pruner.attach(optimizer)
            model.train()
            for epoch in range(4):
                for x, y in data.batches(64, 100 * seed + epoch):
                    F.cross_entropy(model(x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
            pruner.finish()
            found[name].setdefault(network, []).append((math.nan, data.accuracy(model)))
    return found


def markdown(found: dict[str, dict[str, list[tuple[float, float]]]]) -> str:
    """Mean over seeds and shares: at once / after training; the last column is the mean of the four after training."""
    lines = ["| |" + "".join(f" {name} |" for name in NETWORKS) + " mean |", "|---|" + "---|" * (len(NETWORKS) + 1)]
    for how, by_network in found.items():
        means = {name: [statistics.mean(values) for values in zip(*by_network[name], strict=True)] for name in NETWORKS}
        cells = [" / ".join(f"{mean:.1f}" for mean in pair if not math.isnan(mean)) for pair in means.values()]
        overall = " / ".join(
            f"{mean:.1f}" for mean in map(statistics.mean, zip(*means.values(), strict=True)) if not math.isnan(mean)
        )
        lines.append(f"| {how} | {' | '.join(cells)} | {overall} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rankings", "decay"), nargs="?", default="rankings")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # budgets missed by more than 2 % by coarse units
        found = (rankings if args.what == "rankings" else decays)(args.seeds)
    print(markdown(found))
    print(f"{time.process_time() - begun:.0f} seconds of one core")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
