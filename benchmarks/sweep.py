"""What a sweep costs and saves, and that none of its values is lost. Each measurement works in a folder of its own.

    python benchmarks/sweep.py overhead      # 12 jobs of 2 epochs on digits in a row: seconds a job beyond training
    python benchmarks/sweep.py joblib        # the same with 2 workers: every metric is in MLflow
    python benchmarks/sweep.py cache         # a 9-point sweep with and without the cache of dense networks, in turns
    python benchmarks/sweep.py store         # 4 processes start on a fresh database at once, 5 times
    python benchmarks/sweep.py report        # the report over 500 finished jobs

`--keep FOLDER` works there and leaves it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gsprune.sweeps.results import JobResult, read_results
from gsprune.tracking.tracker import read_metrics

TRAIN = Path(__file__).parents[1] / "train.py"
TWO_EPOCHS = ("trainer.dense_epochs=1", "trainer.prune_epochs=1", "trainer.progress=none")
TWELVE = ("pruner=elementwise,abs,weighted", "pruner.target_sparsity=0.5,0.8", "seed=0,1", *TWO_EPOCHS)
NINE = ("pruner=elementwise,abs,weighted", "pruner.target_sparsity=0.5,0.7,0.9", "trainer.progress=none")


def sweep(folder: Path, *overrides: str) -> float:
    """Run the reference application's sweep in `folder`; the seconds it took, process start included."""
    command = [sys.executable, str(TRAIN), "--multirun", "hydra.sweep.dir=sweep", *overrides]
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return seconds


def jobs_of(folder: Path) -> list[JobResult]:
    return read_results(folder / "sweep").with_status("finished")


def overhead(folder: Path) -> None:
    """What the sweep adds to a job beyond training, and where it goes."""
    seconds = sweep(folder, *TWELVE)
    jobs = jobs_of(folder)
    parts = {name: sum(job.numbers("timings")[name] for job in jobs) for name in jobs[0].numbers("timings")}
    inside, count = sum(parts.values()), len(jobs)
    print(f"{count} jobs in {seconds:.1f} s; seconds a job:")
    for name, total in parts.items():
        each = [job.numbers("timings")[name] for job in jobs]
        print(f"  {name:<9} {total / count:6.2f}   (median {statistics.median(each):.2f}, first job {each[0]:.2f})")
    print(f"  {'around':<9} {(seconds - inside) / count:6.2f}   (process start, Hydra, parent run, report)")
    print(f"beyond training: {(seconds - parts['train']) / count:.2f} s a job")


def joblib(folder: Path) -> None:
    """Two workers: every row of metrics.jsonl is in MLflow."""
    seconds = sweep(folder, *TWELVE, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    jobs = jobs_of(folder)
    lost = {job.name: lost_values(folder / "mlflow.db", job.result["mlflow_run_id"], job.folder) for job in jobs}
    print(f"{len(jobs)} of 12 jobs have finished in {seconds:.1f} s; values lost: {sum(lost.values())} {lost}")


def lost_values(database: Path, run_id: str, folder: Path) -> int:
    """How many values of metrics.jsonl the database does not have."""
    with sqlite3.connect(database) as connection:
        query = "select key, step, value from metrics where run_uuid = ?"
        stored = {(key, step): value for key, step, value in connection.execute(query, (run_id,))}
    return sum(
        stored.get((name, int(row["step"]))) != value
        for row in read_metrics(folder / "metrics.jsonl")
        for name, value in row.items()
        if name not in ("step", "time")
    )


def cache(folder: Path) -> None:
    """The seconds of a 9-point sweep with and without the cache, and that the results are the same."""
    times: Mapping[str, list[float]] = {"true": [], "false": []}
    for turn in range(2):
        for setting, seconds in times.items():
            seconds.append(sweep(folder / f"{turn}-{setting}", *NINE, f"trainer.dense_cache={setting}"))
    kept = ("accuracy", "loss", "baseline_accuracy", "baseline_loss", "sparsity", "params", "macs")
    ours, theirs = ([[job.number(name) for name in kept] for job in jobs_of(folder / f"0-{s}")] for s in times)
    jobs = [job.result["dense"]["source"] for job in jobs_of(folder / "0-true")]
    with_cache, without = (statistics.median(seconds) for seconds in times.values())
    print(f"9 jobs, {jobs.count('trained')} dense networks trained: {with_cache:.1f} s with the cache {times['true']},")
    print(f"{without:.1f} s without {times['false']}: {without / with_cache:.2f}x, {without - with_cache:.1f} s saved")
    print(f"results are {'the same' if ours == theirs else 'DIFFERENT'}")


WRITER = """
import json, sys
from gsprune.tracking.tracker import MLflowTracker
number, uri = int(sys.argv[1]), sys.argv[2]
tracker = MLflowTracker(sys.argv[3], tracking_uri=uri, experiment="race")
tracker.start(config={"number": number}, tags={})
for step in range(20):
    tracker.log_metrics({f"m{k}": float(number * 1000 + step * 10 + k) for k in range(5)}, step=step)
tracker.finish("FINISHED")
print(json.dumps({"run_id": tracker.run_id, "stopped": tracker.stopped}))
"""


def store(folder: Path) -> None:
    """Failures and lost values when 4 processes start on a database that is not there yet."""
    failures = lost = values = 0
    for turn in range(5):
        here = folder / str(turn)
        here.mkdir(parents=True)
        uri = f"sqlite:///{here / 'mlflow.db'}"
        command = [sys.executable, "-c", WRITER]
        writers = [
            subprocess.Popen([*command, str(n), uri, str(here / str(n))], stdout=subprocess.PIPE, text=True)
            for n in range(4)
        ]
        for number, writer in enumerate(writers):
            output, _ = writer.communicate()
            told = json.loads(output) if writer.returncode == 0 else {"run_id": None, "stopped": "crashed"}
            failures += told["run_id"] is None or told["stopped"] is not None
            lost += lost_values(here / "mlflow.db", str(told["run_id"]), here / str(number))
            values += 100
    print(f"5 fresh databases, 4 processes each: {failures} failures, {lost} of {values} values lost")


def report(folder: Path) -> None:
    """Seconds of `gsprune report` over 500 jobs, made from the results of 12 real ones."""
    sweep(folder, *TWELVE, "tracking=none")
    originals = jobs_of(folder)
    for number in range(len(originals), 500):
        copy_job(originals[number % len(originals)], folder / "sweep" / str(number), seed=number // len(originals) * 2)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "gsprune", "report", str(folder / "sweep")], check=True, capture_output=True
        )
        times.append(time.perf_counter() - began)
    size = (folder / "sweep" / "report.html").stat().st_size
    each = ", ".join(f"{seconds:.1f}" for seconds in times)
    print(f"500 jobs: {statistics.median(times):.1f} s (of {each}), report.html {size / 1e6:.1f} MB")


def copy_job(job: JobResult, target: Path, *, seed: int) -> None:
    """The same job under another seed, so that it counts as one of its own."""
    shutil.copytree(job.folder, target)
    result: dict[str, Any] = dict(job.result)
    result["seed"] = job.result["seed"] + seed
    result["overrides"] = [f"seed={result['seed']}" if o.startswith("seed=") else o for o in result["overrides"]]
    result["config_hash"] = f"{result['config_hash'][:-8]}{result['seed']:08x}"
    (target / "result.json").write_text(json.dumps(result))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measurements = {"overhead": overhead, "joblib": joblib, "cache": cache, "store": store, "report": report}
    parser.add_argument("measurement", choices=measurements)
    parser.add_argument("--keep", type=Path)
    chosen = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # networks of this size gain nothing from a second thread
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.keep.absolute() if chosen.keep else Path(temporary)
        measurements[chosen.measurement](folder)


if __name__ == "__main__":
    main()
