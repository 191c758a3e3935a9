"""How cost grows with the work: seconds of the processor and memory, each point in a process of its own.

    python benchmarks/growth.py                    # all parts; a table each, results in growth.json
    python benchmarks/growth.py layers             # a Llama of 70 billion parameters' shape on the meta device
    python benchmarks/growth.py weights units jobs

`layers`: find_structures, plan of a budget of MACs, cut plan, of 5 to 80 layers (hidden 8,192, 28,672 neurons, 64
heads, 8 key/value groups). `weights`: one global mask update and the hooks of a step, `Elementwise`, 1 to 256 million
weights. `units`: the same of `Weighted`, 1,000 to 100,000 neurons of 64 inputs. `jobs`: the report of a sweep of 10 to
1,000 jobs. The exponent is the slope of a line through the logarithms of work and seconds: 1 is linear.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

POINTS = {
    "layers": (5, 10, 20, 40, 80),
    "weights": (1_000_000, 4_000_000, 16_000_000, 64_000_000, 256_000_000),
    "units": (1_000, 3_000, 10_000, 30_000, 100_000),
    "jobs": (10, 30, 100, 300, 1000),
}
RESULTS = Path(__file__).with_name("growth.json")


class Clock:
    """Seconds of this process' processor time, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, what: Callable[[], object], repeats: int = 1) -> object:
        times = []
        for _ in range(repeats):
            begin = time.process_time()
            result = what()
            times.append(time.process_time() - begin)
        self.seconds[name] = statistics.median(times)
        return result


def layers(count: int, clock: Clock) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import gsprune
    from gsprune.surgery.cut_plan import plan_cut

    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=count,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128_256,
    )
    with torch.device("meta"):
        net = LlamaForCausalLM(config).eval()
    example = {"input_ids": torch.zeros(1, 8, dtype=torch.long, device="meta")}
    found: object = clock("find", lambda: gsprune.find_structures(net, example))
    clock("plan", lambda: gsprune.plan(net, example, macs=0.5))
    structures = [s for s in found.structures if s.kind != "residual"]  # type: ignore[attr-defined]
    keeps = [torch.arange(s.units) < s.units // 2 for s in structures]
    clock("cut plan", lambda: plan_cut(structures, keeps))


def weights(count: int, clock: Clock) -> None:
    from gsprune.criteria import Elementwise

    width = round(math.sqrt(count / 4))
    _steps(clock, [width] * 5, Elementwise())


def units(count: int, clock: Clock) -> None:
    from gsprune.criteria import Weighted

    _steps(clock, [64, count, 64], Weighted())


def _steps(clock: Clock, widths: list[int], criterion: object) -> None:
    """The hooks of a step with active masks, and a step with a mask update."""
    import torch
    from torch import nn

    from gsprune import Pruner
    from gsprune.schedules import Linear

    torch.set_num_threads(1)
    net = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))
    x = torch.randn(2, widths[0])
    pruner = Pruner(
        net,
        criterion,  # type: ignore[arg-type]
        target_sparsity=0.5,
        scope="global",
        schedule=Linear(end_epoch=1000, update_frequency=1),
        steps_per_epoch=4,
        example_input=x,
    )
    pruner.on_train_begin()
    for epoch in range(6):
        for step in range(4):
            net(x).square().sum().backward()
            if step == 0:
                pruner.on_epoch_begin(epoch)
                clock.seconds |= {"update": _timed(partial(pruner.on_step_begin, step))}
            else:
                pruner.on_step_begin(step)
            hooks = _timed(pruner.on_before_optimizer_step) + _timed(pruner.on_step_end)
            clock.seconds |= {"hooks of a step": hooks}
            net.zero_grad()
        pruner.on_epoch_end()


def _timed(what: Callable[[], object]) -> float:
    begin = time.process_time()
    what()
    return time.process_time() - begin


def jobs(count: int, clock: Clock) -> None:
    from sweep import TWELVE, copy_job, jobs_of, sweep

    from gsprune.sweeps.report import main as report

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        short = ("pruner=elementwise,weighted", *TWELVE[1:], "tracking=none")
        sweep(folder, *short)
        originals = jobs_of(folder)
        for job in originals[count:]:
            shutil.rmtree(job.folder)
        for number in range(len(originals), count):
            copy_job(
                originals[number % len(originals)], folder / "sweep" / str(number), seed=number // len(originals) * 2
            )
        with contextlib.redirect_stdout(io.StringIO()):
            clock("report", lambda: report([str(folder / "sweep")]))


def point(part: str, work: int) -> dict[str, float]:
    """Measured in this process."""
    warnings.simplefilter("ignore")
    clock = Clock()
    globals()[part](work, clock)
    return {**clock.seconds, "MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 * 1.048576}


def exponent(work: list[int], seconds: list[float]) -> float:
    """The slope of the line through the logarithms.

    >>> round(exponent([1, 10, 100], [2.0, 20.0, 200.0]), 3)
    1.0
    """
    return statistics.linear_regression([math.log(w) for w in work], [math.log(s) for s in seconds]).slope


def table(part: str, rows: dict[int, dict[str, float]]) -> str:
    names = [*next(iter(rows.values()))]
    lines = [f"| {part} | {' | '.join(names)} |", "|---:|" + "---:|" * len(names)]
    lines += [f"| {work:,} | {' | '.join(f'{row[n]:.3g}' for n in names)} |" for work, row in rows.items()]
    slopes = [f"{exponent([*rows], [max(row[n], 1e-6) for row in rows.values()]):.2f}" for n in names]
    return "\n".join([*lines, f"| *exponent* | {' | '.join(slopes)} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(POINTS))
    parser.add_argument("--points", nargs="+", type=int, help="of one part, instead of its own")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.point:
        print(json.dumps(point(given.point[0], int(given.point[1]))))
        return
    known = json.loads(given.json.read_text()) if given.json.exists() else {}
    if unknown := set(given.parts) - set(POINTS):
        parser.error(f"there are {', '.join(POINTS)}, and not {', '.join(unknown)}")
    for part in given.parts or POINTS:
        rows = {}
        for work in given.points or POINTS[part]:
            command = [sys.executable, __file__, "--point", part, str(work)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{part} {work}: {done.stderr}")
            rows[work] = json.loads(done.stdout.splitlines()[-1])
        known[part] = rows
        print(table(part, rows), end="\n\n", flush=True)
        given.json.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
