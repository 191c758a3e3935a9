"""Cutting trained networks: `gsprune.cut` against its rivals, without training and after two epochs.

    python benchmarks/cut.py                                  # five sets of calibration data, the leading methods
    python benchmarks/cut.py --full                           # all methods; three sets trained for two epochs, too
    python benchmarks/cut.py --quick                          # one seed on digits, two minutes
    python benchmarks/cut.py --tasks minilm_r8 --seeds 2 --methods gsprune FLAP
    python benchmarks/cut.py --table                          # only the tables of what was measured

Each result is written to `cut.json` as soon as it is there, and a run goes on where one before was ended. The tasks run
in two processes with one thread each (`--jobs`). The data and networks come out of packages (`cut_data.py`,
`cut_tasks.py`). Every method removes units of the same structures down to
the same MACs, from the same 512 calibration samples of each seed (`cut_rivals.py`); after training: the same two epochs
for all. A rival that is over 10 points behind gsprune on `SOME` test samples is not evaluated on the others.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cut_data import CACHE
from cut_rivals import CALIBRATION_FREE, METHODS, WITH_NORMS, Bench, Cut, Method, package_methods
from cut_tasks import TASKS, Batch, Task, task
from filelock import FileLock
from torch import nn

from gsprune.cutting.cut import Cutter, Repair, one_rule

RESULTS = Path(__file__).with_name("cut.json")
SHARES = (0.5, 0.25, 0.125)  # of the MACs that stay: 2x, 4x, 8x fewer
SEEDS = 5  # of calibration data, without training
TUNED_SEEDS = 3
SOME = {"minilm_r8": 500, "convnet_mnist": 1000}  # test samples; others have few
FAR = 10.0  # points
LANGUAGE_SEEDS = 1
FAMILY_SEEDS = {"digits": 3, "convnet_mnist": 3}  # 1 of others
WEIGHT_SAMPLES = 24  # of 256 tokens, that prune single weights
PATTERNS: dict[str, dict[str, Any]] = {"50 %": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}
NEAR = 0.03  # how far from the wanted share the MACs may be, of it
LANGUAGE = "smollm2"
SMALL_VIT = "vit_mnist"  # of the part `kinds` alone
DEPTH = {SMALL_VIT: 512, "minilm_r8": 512, LANGUAGE: 16}  # tasks of the part `kinds` -> calibration samples
DEPTH_BUDGETS = (("macs", 0.5), ("macs", 0.25), ("params", 0.5), ("latency", 0.7), ("latency", 0.5))
QUARTER = 0.25  # of all neurons of smollm2's MLPs go
TIMED = ("convnet_mnist", "efficientnet_mnist")  # of the part `latency`
TIMES, BY_MACS = (0.7, 0.5, 0.35), (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2, 0.12)  # shares: of the dense time, and of MACs
# quantile 0.975 of Student's t distribution, by degrees of freedom
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


# ---- gsprune's own


def own(repair: Repair | None = "least_squares") -> Method:
    """`gsprune.cut` to several shares; as of the rivals, the same scores serve all of them."""

    def prepare(bench: Bench, batches: Sequence[Batch], seed: int) -> Cut:
        one = bench.task
        rules = {share: one_rule("macs", share, None, repair, include=one.include) for share in bench.shares}
        options: dict[str, Any] = {"samples": one.samples, "settle": [[*rules.values()]]}
        options["example_input"] = one.example  # what MACs are counted on for all methods
        cutter = Cutter(one.model, batches, one.loss, [*rules.values()][:1], **options)
        return lambda macs: cutter.cut([rules[macs]], repair=repair).model

    return prepare


OWN: dict[str, Method] = {"gsprune": own(), "gsprune, not repaired": own(repair=None)}
# trained for two epochs too: every way to choose once, since training re-estimates BatchNorm's statistics itself
TUNED = (
    "gsprune",
    "random",
    "magnitude",
    "torch-pruning Taylor, global",
    "torch-pruning Taylor, isomorphic",
    "torch-pruning Hessian, global",
    "torch-pruning Hessian, isomorphic",
    "FLAP",
    "Kwon et al.",
)

# what an hour has time for: ours, what nobody may lose to, and of each rule the variant that came nearest
LEADING = (
    "gsprune",
    "random",
    "magnitude",
    "torch-pruning Taylor, global",
    "torch-pruning Hessian, global",
    "torch-pruning Hessian, global + BN",
    "FLAP",
    "FLAP + BN",
    "Kwon et al.",
    "Kwon et al. + BN",
    "Wanda, whole units",
    "FastNAS*",
    "fasterai*",
)


def methods_of(name: str, bench: Bench, packages: Path | None) -> dict[str, Method]:
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in bench.model.modules())
    if name == LANGUAGE:
        names = ("random", "magnitude", "FLAP", "Wanda, whole units")
        return OWN | {name: METHODS[name] for name in names}
    found = METHODS | (WITH_NORMS if norms else {}) | (package_methods(packages) if norms and packages else {})
    same = sorted(map(sorted, bench.isomorphic)) == sorted(map(sorted, bench.by_kind))
    left_out = (
        ("Wanda", "isomorphic") if same else ("Wanda",)
    )  # where all layers are alike, the scopes are the global ones
    return OWN | {name: method for name, method in found.items() if not any(word in name for word in left_out)}


# ---- results


class Results:
    """What was measured: "task | share | method | stage | seed" -> metric, share of MACs, seconds; kept in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells = self.read()

    def read(self) -> dict[str, dict[str, Any]]:
        return json.loads(self.path.read_text())["cells"] if self.path.exists() else {}

    @staticmethod
    def key(*parts: Any) -> str:
        return " | ".join(map(str, parts))

    def __contains__(self, key: str) -> bool:
        return key in self.cells

    def add(self, key: str, **values: Any) -> None:
        """Written at once; what other processes have added meanwhile stays."""
        machine = {"torch": torch.__version__, "processor": platform.processor() or platform.machine()}
        part, lock = self.path.with_suffix(".part"), FileLock(self.path.with_suffix(".lock"))
        with lock:
            new = {name: round(v, 4) if isinstance(v, float) else v for name, v in values.items()}
            self.cells = {**self.read(), key: new}
            rows = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(self.cells.items()))
            part.write_text(f'{{\n  "machine": {json.dumps(machine)},\n  "cells": {{\n{rows}\n  }}\n}}\n')
            os.replace(part, self.path)

    def values(self, name: str, share: float, method: str, stage: str, what: str = "metric") -> dict[int, float]:
        """Seed -> value."""
        start = self.key(name, share, method, stage, "")
        return {int(k[len(start) :]): v[what] for k, v in self.cells.items() if k.startswith(start) and what in v}


# ---- what is run


def compare(name: str, results: Results, given: argparse.Namespace) -> None:
    """One task: all methods, shares and seeds; the seeds outermost, so that an early end leaves a whole table."""
    one = task(name, given.cache)
    bench, tests = Bench(one), one.tests(given.samples)
    if (dense := Results.key(name, "dense")) not in results:
        results.add(dense, metric=one.evaluate(one.model, tests), macs=bench.macs)
    shares = given.shares if name != LANGUAGE else (quarter(bench),)
    for seed in range(given.seeds if name != LANGUAGE else min(given.seeds, LANGUAGE_SEEDS)):
        batches = one.calibration(seed)
        for label, method in methods_of(name, bench, given.packages).items():
            if not any(fnmatch.fnmatch(label, pattern) for pattern in given.methods):
                continue
            stages = ["cut"] + ["tuned"] * (given.tuned and label in TUNED and name != LANGUAGE and seed < TUNED_SEEDS)
            missing = [s for s in shares if any(Results.key(name, s, label, g, seed) not in results for g in stages)]
            first = {s: Results.key(name, s, label, "cut", 0) for s in missing}
            if (
                seed
                and label in CALIBRATION_FREE
                and stages == ["cut"]
                and all(key in results for key in first.values())
            ):
                for share, key in first.items():
                    results.add(Results.key(name, share, label, "cut", seed), **results.cells[key])
            elif missing:
                run(bench, label, method, batches, seed, missing, stages, tests, results)


def run(
    bench: Bench,
    label: str,
    method: Method,
    batches: Sequence[Batch],
    seed: int,
    shares: Sequence[float],
    stages: Sequence[str],
    tests: Sequence[Batch],
    results: Results,
) -> None:
    one, clock = bench.task, Clock()
    bench.shares = shares
    try:
        cut = method(bench, batches, seed)
        prepared = clock()
        for share in shares:
            clock = Clock()
            small = cut(share)
            seconds, cpu = (a + b for a, b in zip(prepared, clock(), strict=True))
            for stage in stages:
                if stage == "tuned":
                    one.tune(small, seed)
                key, ours = (Results.key(one.name, share, m, stage, seed) for m in (label, "gsprune"))
                if key in results:  # the cut alone was evaluated before
                    continue
                metric = evaluated(one, small, tests, None if label in OWN else results.cells.get(ours))
                results.add(key, metric=metric, macs=bench.share(small), seconds=seconds, cpu=cpu)
                print(f"{key:70s} {metric:8.2f}  macs {bench.share(small):.4f}  {cpu:.1f} s of CPU", flush=True)
    except Exception as error:  # a rival that does not run on a network is told of, and does not end the others
        print(f"{one.name} | {label}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if label.startswith("gsprune") and not isinstance(error, AttributeError):
            raise


def evaluated(one: Task, small: nn.Module, tests: Sequence[Batch], ours: dict[str, Any] | None) -> float:
    """The metric over the test samples; of a rival that is far behind `ours` on some of them, over those."""
    if ours is not None and one.name in SOME:
        first = one.evaluate(small, one.some_tests(SOME[one.name]))
        if first < ours["metric"] - FAR:
            return first
    return one.evaluate(small, tests)


def quarter(bench: Bench) -> float:
    """The share of MACs that stays when a quarter of the units of every structure goes."""
    keeps = [torch.arange(s.units) >= round(QUARTER * s.units) for s in bench.structures]
    return round(bench.cost(keeps), 4)


def channels(results: Results, given: argparse.Namespace) -> None:
    """Of the conv net on MNIST a share of the channels of every structure, as `sparsity=` of `gsprune.cut`."""
    import gsprune

    if "convnet_mnist" not in given.tasks:
        return
    one = task("convnet_mnist", given.cache)
    for seed in range(given.seeds):
        batches = one.calibration(seed)
        for share in (0.5, 0.75):
            if (key := Results.key(one.name, "channels", share, seed)) not in results:
                small = gsprune.cut(one.model, batches, one.loss, sparsity=share, progress=False).model
                results.add(key, metric=one.evaluate(small))
                print(f"{key}: {results.cells[key]['metric']:.2f} %", flush=True)


def family(results: Results, given: argparse.Namespace) -> None:
    """Seconds of eight budgets by `cut_family` against one by `cut`, in turns."""
    import gsprune

    for name in [name for name in given.tasks if name not in (LANGUAGE, SMALL_VIT)]:
        one = task(name, given.cache)
        options: dict[str, Any] = {"include": one.include, "calibration": one.samples, "progress": False}
        for seed in range(min(given.seeds, FAMILY_SEEDS.get(name, 1))):
            if (key := Results.key(name, "family", seed)) in results:
                continue
            batches = one.calibration(seed)
            alone = timed(partial(gsprune.cut, one.model, batches, one.loss, macs=0.5, **options))
            budgets = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
            eight = timed(partial(gsprune.cut_family, one.model, batches, one.loss, macs=budgets, **options))
            results.add(key, one=alone, eight=eight, ratio=eight / alone)
            print(f"{key}: one {alone:.1f} s, eight {eight:.1f} s, {eight / alone:.2f}x", flush=True)


def guarantee(results: Results, given: argparse.Namespace) -> None:
    """100 searches for the largest cut, each with samples of its own, drawn out of all: those are the truth.

    All are those that neither trained the network nor calibrate the cut: of MNIST half of its training set, too.
    """
    import gsprune
    from gsprune.cutting.how_much import SHARES as TRIED
    from gsprune.cutting.how_much import repeated

    for name, samples, drop, least in (
        ("convnet_mnist", 20_000, 0.5, 0.28),  # of the MACs: the smallest cut that is tried
        ("digits", 300, 3.0, 0.0),
    ):
        if name not in given.tasks or (key := Results.key(name, "guarantee", drop)) in results:
            continue
        one, batches = task(name, given.cache), task(name, given.cache).calibration(0)
        options: dict[str, Any] = {"include": one.include, "calibration": one.samples, "progress": False}
        tried = [share for share in TRIED if share >= least]
        family = gsprune.cut_family(one.model, batches, one.loss, macs=tried, **options)
        unseen = [*one.tests(), *one.unseen(0)]
        cuts = np.stack([one.right(cut.model, unseen).double().numpy() for cut in family])
        found = repeated(one.right(one.model, unseen).double().numpy(), cuts, samples=samples, max_drop=drop)
        shares = [1.0, *tried]  # -1: no cut was certified
        median = shares[int(statistics.median_low(found.chosen)) + 1]
        best = shares[found.best + 1]
        results.add(key, samples=samples, out_of=cuts.shape[1], wrong=found.wrong, median=median, best=best)
        print(f"{key}: {results.cells[key]}", flush=True)


def weights(results: Results, given: argparse.Namespace) -> None:
    """Single weights of SmolLM2 at 50 % and 2:4: Wanda's and SparseGPT's rules, and ours."""
    if LANGUAGE not in given.tasks:
        return
    from gsprune.criteria.activations import SparseGPT, Wanda
    from gsprune.cutting.weights import prune_weights

    one = task(LANGUAGE, given.cache)
    tests = one.tests(given.samples)
    ways: dict[str, dict[str, Any]] = {
        "gsprune": {},
        "SparseGPT": {"criterion": SparseGPT(), "repair": False},
        "Wanda": {"criterion": Wanda(), "repair": False},
    }
    for seed in range(min(given.seeds, LANGUAGE_SEEDS)):
        batches = one.calibration(seed, WEIGHT_SAMPLES)
        for pattern in given.patterns:
            options = PATTERNS[pattern]
            for label, way in ways.items():
                if (key := Results.key(LANGUAGE, "weights", pattern, label, seed)) in results:
                    continue
                clock = Clock()
                layers = ("model.layers.*",)
                small = prune_weights(one.model, batches, include=layers, **options, **way).model
                seconds, cpu = clock()
                results.add(key, metric=one.evaluate(small, tests), seconds=seconds, cpu=cpu)
                print(f"{key}: {results.cells[key]}", flush=True)


def kinds(results: Results, given: argparse.Namespace) -> None:
    """Heads and neurons alone, and where residual streams and whole branches compete with them.

    Embeddings have no MACs and many parameters, which streams alone can save; of one sample, what lies between the
    products takes much of the time, which goes with whole branches alone.
    """
    import gsprune
    from gsprune.latency import latency_ms

    for name in [name for name in given.tasks if name in DEPTH]:
        one, samples = task(name, given.cache), DEPTH[name]
        tests = one.tests(given.samples)
        if (dense := Results.key(name, "kinds", 1.0, "dense", 0)) not in results:
            results.add(dense, metric=one.evaluate(one.model, tests), loss=mean_loss(one, one.model, tests))
        seeds = range(given.seeds if name != LANGUAGE else LANGUAGE_SEEDS)
        for seed, (cost, share) in itertools.product(seeds, DEPTH_BUDGETS):
            batches = one.calibration(seed, samples)
            for more in ((), ("branches",), ("residual",), ("branches", "residual")):
                label = " + ".join(("heads, neurons", *more))
                where = share if cost == "macs" else f"{cost} {share}"
                if (key := Results.key(name, "kinds", where, label, seed)) in results:
                    continue
                clock = Clock()
                settings: dict[str, Any] = {"kinds": ("heads", "neurons", *more), "calibration": samples, cost: share}
                try:
                    cut = gsprune.cut(
                        one.model, batches, one.loss, example_input=one.example, progress=False, **settings
                    )
                except ValueError as error:  # what may go is too little
                    print(f"{key}: {error}", flush=True)
                    results.add(key, possible=0)
                    continue
                ms = latency_ms({"dense": one.model, "cut": cut.model}, one.example, repeats=100)
                figures = {"params": cut.small.params / cut.dense.params, "time": ms["cut"] / ms["dense"]}
                if cut.small.macs and cut.dense.macs:
                    figures["macs"] = cut.small.macs / cut.dense.macs
                figures |= {"loss": mean_loss(one, cut.model, tests), "metric": one.evaluate(cut.model, tests)}
                figures |= {kind: gone_of(cut, kind) for kind in more}
                results.add(key, cpu=clock()[1], **figures)
                print(f"{key}: {results.cells[key]}", flush=True)


def latency(results: Results, given: argparse.Namespace) -> None:
    """Cut for milliseconds in onnxruntime, one sample and one thread, against cuts for MACs that are as fast there."""
    from gsprune.export.runtimes import Measure
    from gsprune.latency import latency_ms

    measure = Measure("onnxruntime", threads=1)
    for name in [name for name in given.tasks if name in TIMED]:
        one = task(name, given.cache)
        for seed in range(min(given.seeds, TUNED_SEEDS)):
            if Results.key(name, "latency", TIMES[-1], seed) in results:
                continue
            budgets: dict[str, Any] = {f"macs {share}": {"macs": share} for share in BY_MACS}
            for share in TIMES:
                where = {"runtime": measure.runtime, "threads": measure.threads}
                budgets[f"time {share}"] = {"latency": share, **where}
            rules = {
                label: one_rule("budget", budget, None, "least_squares", include=one.include)
                for label, budget in budgets.items()
            }
            options: dict[str, Any] = {"samples": one.samples, "example_input": one.example}
            cutter = Cutter(one.model, one.calibration(seed), one.loss, [*rules.values()][:1], **options)
            small = {label: cutter.cut([rule], repair="least_squares").model for label, rule in rules.items()}
            metric = {label: one.evaluate(network) for label, network in small.items()}
            ready = {label: measure.prepared(network, one.example) for label, network in small.items()}
            ready["dense"] = measure.prepared(one.model, one.example)
            ms = latency_ms(ready, (), repeats=300, max_seconds=60)
            # of cuts for MACs: accuracy at a time, and time at an accuracy, between the two cuts around it
            by_macs = [f"macs {share}" for share in sorted(BY_MACS)]
            times, metrics = np.array([ms[m] for m in by_macs]), np.array([metric[m] for m in by_macs])
            for share in TIMES:
                mine, right = ms[f"time {share}"], metric[f"time {share}"]
                figures = {
                    "metric": right,
                    "time": mine / ms["dense"],
                    "better": right - float(np.interp(mine, times, metrics)),
                    "faster": float(np.interp(right, np.maximum.accumulate(metrics), times)) / mine,
                }
                results.add(key := Results.key(name, "latency", share, seed), **figures)
                print(f"{key}: {figures}", flush=True)


def gone_of(cut: Any, kind: str) -> float:
    """The share of the units of a kind that went."""
    keeps = [cut.keeps[s.name] for s in cut.structures if s.kind == kind]
    return 1 - sum(int(keep.sum()) for keep in keeps) / sum(len(keep) for keep in keeps) if keeps else 0.0


@torch.no_grad()
def mean_loss(one: Task, model: nn.Module, tests: Sequence[Batch]) -> float:
    """Over the test samples, in evaluation mode."""
    losses = [(float(one.loss_of(model, batch)), len(batch[1] if one.loss else batch["labels"])) for batch in tests]
    return sum(loss * size for loss, size in losses) / sum(size for _, size in losses)


class Clock:
    """Seconds since it was made: of the wall, and of the processor, which other work on the machine hardly changes."""

    def __init__(self) -> None:
        self._since = time.perf_counter(), time.process_time()

    def __call__(self) -> tuple[float, float]:
        return time.perf_counter() - self._since[0], time.process_time() - self._since[1]


def timed(what: Callable[[], Any]) -> float:
    """Seconds of the processor."""
    clock = Clock()
    what()
    return clock()[1]


# ---- tables


def tables(results: Results) -> str:
    return "\n".join(line for lines in (*(table(results, name) for name in TASKS), others(results)) for line in lines)


def table(results: Results, name: str) -> Iterator[str]:
    dense = results.cells.get(Results.key(name, "dense"))
    if dense is None:
        return
    better = 1 if name != LANGUAGE else -1
    cells = [key.split(" | ") for key in results.cells if key.startswith(f"{name} | ") and key.count(" | ") == 4]
    cells = [parts for parts in cells if parts[1] not in PARTS]
    columns = sorted({(c[3], float(c[1])) for c in cells}, key=lambda c: (c[0], -c[1]))
    labels = [m for m in [*OWN, *METHODS, *WITH_NORMS] if any(c[2] == m for c in cells)]
    labels += sorted({c[2] for c in cells} - set(labels))
    unit = "%" if name != LANGUAGE else "perplexity"
    seeds = max((len(results.values(name, share, m, stage)) for stage, share in columns for m in labels), default=0)
    yield f"\n**{name}** (dense {dense['metric']:.2f} {unit}, {dense['macs'] / 1e6:.1f} million MACs, {seeds} seeds)\n"
    heads = [f"{1 / share:.3g}x{', two epochs' if stage == 'tuned' else ''}" for stage, share in columns]
    yield f"| | {' | '.join(heads)} |"
    yield "|---|" + "---:|" * len(columns)
    best = {}
    for stage, share in columns:
        means = {m: statistics.mean(v.values()) for m in labels if (v := results.values(name, share, m, stage))}
        best[stage, share] = max(means, key=lambda m: better * means[m])
    for m in labels:
        row = [_cell(results, name, s, m, g, bold=m == best[g, s]) for g, s in columns]
        yield f"| {m} | {' | '.join(row)} |"
    yield f"| *gsprune is* | {' | '.join(verdict(results, name, s, g, labels, better) for g, s in columns)} |"


def _cell(results: Results, name: str, share: float, method: str, stage: str, *, bold: bool) -> str:
    """Mean, standard deviation, and the share of MACs where it is further than `NEAR` from the wanted one."""
    values = list(results.values(name, share, method, stage).values())
    if not values:
        return ""
    text = f"**{statistics.mean(values):.1f}**" if bold else f"{statistics.mean(values):.1f}"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    macs = statistics.mean(results.values(name, share, method, stage, "macs").values())
    return text + spread + (f" (at {1 / macs:.1f}x)" if abs(macs / share - 1) > NEAR else "")


def others(results: Results) -> Iterator[str]:
    """What the parts beside `compare` found, a line each."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for key, cell in results.cells.items():
        parts = key.split(" | ")
        if parts[1] in ("channels", "family", "guarantee", "kinds", "latency", "weights"):
            last = None if parts[1] == "guarantee" else -1
            groups.setdefault(" | ".join(parts[:last]), []).append(cell)
    for key, cells in groups.items():
        names = [name for name in cells[0] if isinstance(cells[0][name], int | float)]
        means = {name: [cell[name] for cell in cells if name in cell] for name in names}
        yield f"\n{key} ({len(cells)}): " + ", ".join(
            f"{name} {statistics.mean(v):.4g}" + (f" ± {statistics.stdev(v):.2g}" if len(v) > 1 else "")
            for name, v in means.items()
        )


def verdict(results: Results, name: str, share: float, stage: str, labels: Sequence[str], better: int) -> str:
    """First, tied (no rival is better by a paired t test at 5 %), or behind whom by how much."""
    ours = results.values(name, share, "gsprune", stage)
    found = [
        (*paired(ours, theirs, better), m)
        for m in labels
        if m not in OWN
        and _near(results, name, share, m, stage)
        and len(ours.keys() & (theirs := results.values(name, share, m, stage)).keys()) > 1
    ]
    if not found:
        return ""
    mean, low, high, rival = min(found)
    text = f"{round(mean, 1) + 0.0:+.1f} ({low:+.1f} to {high:+.1f}) to {rival}"
    behind = [m for _, _, high, m in found if high < 0]
    return ("first: " if mean > 0 else "tied: " if not behind else "behind: ") + text


def _near(results: Results, name: str, share: float, method: str, stage: str) -> bool:
    """Whether a method kept no more MACs than `NEAR` above the wanted share: with more it is no rival."""
    return all(macs <= share * (1 + NEAR) for macs in results.values(name, share, method, stage, "macs").values())


def paired(ours: dict[int, float], theirs: dict[int, float], better: int) -> tuple[float, float, float]:
    """Mean of the differences over common seeds and its 95 % interval; positive: ours is better."""
    differences = [better * (ours[seed] - theirs[seed]) for seed in ours.keys() & theirs.keys()]
    mean = statistics.mean(differences)
    half = T[len(differences) - 1] * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


PARTS: dict[str, Callable[[Results, argparse.Namespace], None]] = {
    "compare": lambda results, given: [compare(name, results, given) for name in given.tasks if name != SMALL_VIT],
    "channels": channels,
    "family": family,
    "guarantee": guarantee,
    "kinds": kinds,
    "latency": latency,
    "weights": weights,
}


def each_task(given: argparse.Namespace) -> None:
    """Each task in a process of its own, of the language model each part and pattern; the long ones first."""
    units: list[tuple[str, list[str], list[str]]] = []
    for name in sorted(given.tasks, key=lambda name: LONGEST.index(name) if name in LONGEST else len(LONGEST)):
        shorter = given.parts == [*HOUR] and name in LONGEST  # of a whole run: `cut_family` is timed on the others
        parts = [part for part in given.parts if not (shorter and part == "family")]
        if name != LANGUAGE:
            units.append((name, parts, given.patterns))
        for part in parts if name == LANGUAGE else ():
            patterns = [[pattern] for pattern in given.patterns] if part == "weights" else [given.patterns]
            units += [(name, [part], chosen) for chosen in patterns if part in OF_LANGUAGE]
    ours = {"--tasks", "--parts", "--patterns", *given.tasks, *given.parts, *given.patterns}
    arguments = [argument for argument in sys.argv[1:] if argument not in ours]
    command = [sys.executable, __file__, *arguments, "--no-table", "--jobs", "1", "--threads", "1"]

    def run_unit(unit: tuple[str, list[str], list[str]]) -> int:
        name, parts, patterns = unit
        return subprocess.run([*command, "--tasks", name, "--parts", *parts, "--patterns", *patterns]).returncode

    with ThreadPoolExecutor(given.jobs) as pool:
        failed = [name for (name, *_), code in zip(units, pool.map(run_unit, units), strict=True) if code]
    if failed:
        raise SystemExit(f"not to the end: {', '.join(failed)}")


LONGEST = ("minilm_r8", "efficientnet_mnist", LANGUAGE)
OF_LANGUAGE = ("compare", "kinds", "weights")


HOUR = ("compare", "channels", "family", "guarantee", "weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(HOUR))
    parser.add_argument("--patterns", nargs="+", choices=list(PATTERNS), default=list(PATTERNS), help="of `weights`")
    parser.add_argument("--methods", nargs="+", help="patterns; the leading ones without, all with --full")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"sets of calibration data; {SEEDS} without")
    parser.add_argument("--full", action="store_true", help="all methods and parts, with --tuned: many hours")
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="of the MACs that stay")
    parser.add_argument("--samples", type=int, help="test samples; all without")
    parser.add_argument("--tuned", action="store_true", help="two epochs of training after cutting, too")
    parser.add_argument("--packages", type=Path, help="a folder with modelopt/ and fasterai/ (see cut_rivals.py)")
    parser.add_argument("--jobs", type=int, default=2, help="tasks at once, in a process with one thread each; 2")
    parser.add_argument("--threads", type=int, default=2, help="of --jobs 1")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true", help="nothing is measured")
    parser.add_argument("--no-table", action="store_true", help="the lines of the results alone")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.tuned |= given.full
    if given.full:
        given.methods, given.parts = given.methods or ["*"], list(PARTS)
    given.methods = given.methods or LEADING
    if given.quick:
        given.tasks, given.seeds, given.parts, given.methods = ["digits"], 1, ["compare"], ["*"]
        given.results = given.cache / "cut_quick.json" if given.results == RESULTS else given.results
        given.results.unlink(missing_ok=True)
    if len(given.tasks) > 1 and given.jobs > 1 and not given.table:
        clock = Clock()
        each_task(given)
        print(f"All tasks: {clock()[0] / 60:.0f} minutes", flush=True)
        given.table = True
    results = Results(given.results)
    if not given.table:
        for part in given.parts:
            PARTS[part](results, given)
    if not given.no_table:
        print(tables(results))


if __name__ == "__main__":
    main()
