"""What faults of an MLflow server cost a run, and that nothing of it is lost. Real servers, real jobs.

    python benchmarks/faults_tracking.py                 # every scenario, healthy runs in between; about 5 minutes
    python benchmarks/faults_tracking.py slow refusing   # some

All jobs run in one process, so that imports are no part of the times. For each scenario one job with a healthy server
and one with the fault: seconds of the whole job, the seconds of it that went into tracking (`timings.tracking` of
result.json), how it ended, whether metrics.jsonl is whole, and what `gsprune sync` sends once the server is
well; then the server is asked for every metric. `full_disk` mounts a small tmpfs, for which one must be root.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the server and the proxy of the tests

from jobs import configure  # noqa: E402
from servers import Proxy, Server, fill, small_disk  # noqa: E402

from gsprune.app.job import run  # noqa: E402
from gsprune.tracking import sync  # noqa: E402
from gsprune.tracking.mlflow_names import Names  # noqa: E402
from gsprune.tracking.tracker import read_metrics  # noqa: E402

EPOCHS = 14
JOB = ("trainer.dense_epochs=6", "trainer.prune_epochs=8", "dataset.batch_size=64", "trainer.latency_repeats=5")
Scenario = Callable[[Path], contextlib.AbstractContextManager[tuple[str, str, Callable[[], None], Callable[[], None]]]]
warnings: list[str] = []


class Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warnings.append(record.getMessage())


def job(folder: Path, uri: str, *, in_the_middle: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """One job; `in_the_middle` is called when 5 of its epochs are on record."""
    warnings.clear()
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(folder / "metrics.jsonl", ended, in_the_middle))
    watcher.start()
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        result = run(configure("tracking=mlflow", *JOB, f"tracking.tracking_uri={uri}"), output_dir=folder)
    seconds = time.perf_counter() - began
    ended.set()
    watcher.join()
    rows = read_metrics(folder / "metrics.jsonl")
    whole = [row["step"] for row in rows] == [*range(1, EPOCHS + 1), EPOCHS]
    told = sum(text.startswith("tracking to MLflow") for text in warnings)
    tracking = result["timings"]["tracking"]
    return {"status": result["status"], "seconds": seconds, "tracking": tracking, "whole": whole, "warnings": told}


def _watch(metrics: Path, ended: threading.Event, act: Callable[[], None]) -> None:
    while not ended.is_set():
        if metrics.is_file() and metrics.read_bytes().count(b"\n") >= 5:
            return act()
        time.sleep(0.02)


def upload(folder: Path) -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        code = sync.main([str(folder)])
    return code, said.getvalue().strip()


def missing(folder: Path, uri: str) -> int:
    """How many values of metrics.jsonl the server does not hold exactly once, plus what else is not as it should be."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    run_id = json.loads((folder / "tracking.json").read_text())["run_id"]
    run, names, wanted = client.get_run(run_id), Names(), dict[str, list[int]]()
    for row in read_metrics(folder / "metrics.jsonl"):
        for name in row.keys() - {"step", "time"}:
            wanted.setdefault(names[name], []).append(int(row["step"]))
    there = {key: sorted(metric.step for metric in client.get_metric_history(run_id, key)) for key in wanted}
    wrong = sum(there[key] != sorted(steps) for key, steps in wanted.items())
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return wrong + (run.info.status != "FINISHED") + (len(client.search_runs(experiments)) != 1)


# --- scenarios: the address before, what happens in the middle, how it is well again, the server to ask ----------


@contextlib.contextmanager
def _server(folder: Path) -> Iterator[Server]:
    folder.mkdir(parents=True, exist_ok=True)
    server = Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def _proxied(
    folder: Path, mode: Any, *, at_once: bool
) -> Iterator[tuple[str, str, Callable[[], None], Callable[[], None]]]:
    with _server(folder) as server:
        proxy = Proxy(server.port)

        def set_mode(value: Any) -> Callable[[], None]:
            return lambda: setattr(proxy, "mode", value)

        if at_once:
            proxy.mode = mode
        yield proxy.uri, server.uri, set_mode(mode), set_mode(None)
        proxy.close()


@contextlib.contextmanager
def down_at_start(folder: Path) -> Iterator[Any]:
    folder.mkdir(parents=True)
    server = Server(folder)
    yield server.uri, server.uri, lambda: None, server.start
    server.kill()


@contextlib.contextmanager
def killed(folder: Path) -> Iterator[Any]:
    with _server(folder) as server:
        yield server.uri, server.uri, server.kill, server.start


@contextlib.contextmanager
def back_again(folder: Path) -> Iterator[Any]:
    """Killed after 5 epochs and started again at once: the run goes on without it all the same."""
    with _server(folder) as server:

        def restart() -> None:
            server.kill()
            server.start()

        yield server.uri, server.uri, restart, lambda: None


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[Any]:
    with small_disk(folder / "disk", megabytes=8) as disk, _server(disk) as server:
        yield server.uri, server.uri, lambda: fill(disk), lambda: (disk / "filler").unlink(missing_ok=True)


SCENARIOS: dict[str, Scenario] = {
    "down_at_start": down_at_start,
    "killed": killed,
    "back_again": back_again,
    "slow": lambda folder: _proxied(folder, 5.0, at_once=True),
    "slow_later": lambda folder: _proxied(folder, 5.0, at_once=False),
    "half_a_second": lambda folder: _proxied(folder, 0.5, at_once=False),
    "refusing": lambda folder: _proxied(folder, 500, at_once=True),
    "refusing_later": lambda folder: _proxied(folder, 500, at_once=False),
    "full_disk": full_disk,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", choices=[*SCENARIOS, []], help="all, if none is named")
    chosen = parser.parse_args().scenarios or list(SCENARIOS)
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    logging.getLogger("gsprune").addHandler(Warnings())
    print("| fault | job, s: healthy, with it | tracking, s | cost, s | ends | metrics.jsonl | sync | lacking then |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary, _server(Path(temporary, "healthy")) as healthy:
        job(Path(temporary, "warm"), healthy.uri)  # imports
        for name in chosen:
            folder = Path(temporary, name)
            well = job(folder / "well", healthy.uri)
            assert well["warnings"] == 0, well
            with SCENARIOS[name](folder / "server") as (uri, server, strike, mend):
                ill = job(folder / "ill", uri, in_the_middle=strike)
                mend()
                code, told = upload(folder / "ill")
                again = upload(folder / "ill")[1]
                lacking = missing(folder / "ill", server)
            assert ill["warnings"] == 1, ill
            assert code == 0, told
            assert again.startswith("Nothing to send"), again
            sent = told.partition(": sent ")[2].partition(" to http")[0]
            print(
                f"| {name} | {well['seconds']:.1f}, {ill['seconds']:.1f} | {well['tracking']:.1f}, "
                f"{ill['tracking']:.1f} | {ill['tracking'] - well['tracking']:+.1f} | {ill['status']} | "
                f"{'whole' if ill['whole'] else 'not whole'} | {sent} | {lacking} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
