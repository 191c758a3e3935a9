"""Make the pictures that the pages show: of runs of today's code, those of web pages in a real browser.

    pip install -e '.[app]' 'selenium>=4.20,<5'
    python docs/make_screenshots.py                      # trains a sweep first: minutes
    python docs/make_screenshots.py --work /tmp/work     # keeps it there, and takes it from there the next time
    python docs/make_screenshots.py --tracking-uri http://127.0.0.1:5000 --output /tmp  # MLflow's page of another sweep

Needs Chromium and its driver (Debian: `apt-get install chromium chromium-driver`), and no network: everything happens
on the loopback address, on a free port. Writes into the output folder (default: this one)

    pareto.png            the figure of the sweep's report
    history.png           accuracy and sparsity of its first job
    mlflow_runs.png       the run table of the experiment, with the sweep's jobs under their parent
    mlflow_compare.png    all jobs of the sweep: validation accuracy against parameters
    mlflow_masks.png      the masks of one job

The sweep is the README's. It is stored through a server, so that no path of this machine is in the pictures. What is
clicked was written for the page of MLflow 3.17; a step that no longer finds what it looks for names it in its error.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.expected_conditions import visibility_of_element_located
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT = 1500, 900
SWEEP = (
    *("pruner=weighted,magnitude,random,elementwise,none", "pruner.target_sparsity=0.5,0.75,0.9", "seed=0,1,2"),
    *("trainer.dense_epochs=3", "trainer.prune_epochs=4"),
)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
)
# What the page keeps in the browser about itself: training instead of language models, and no assistant.
SETTINGS = {
    "mlflow.workflowType_v1": '"machine_learning"',
    "mlflow.assistant.panelOpen_v1": "false",
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
}
# The round button of the assistant covers a corner of what is shown.
STYLE = "button[data-assistant-ui] { display: none !important }"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the pictures that the pages of docs/ show.")
    parser.add_argument(
        "--tracking-uri", help="only MLflow's page, of the newest sweep of this database (sqlite:///...) or server"
    )
    parser.add_argument("--experiment", default="gsprune", help="default: gsprune")
    parser.add_argument("--work", type=Path, help="folder of the sweep; default: a temporary one")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of the pictures; default: docs")
    parser.add_argument("--chromium", default=_which("chromium", "chromium-browser", "google-chrome"))
    parser.add_argument("--chromedriver", default=_which("chromedriver"))
    args = parser.parse_args()
    for program in ("chromium", "chromedriver"):
        if getattr(args, program) is None:
            parser.error(f"{program} was not found: give its path with --{program}")
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gsprune-") as temporary:
        folder = (args.work or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        with _server(args.tracking_uri, folder) as address:
            if args.tracking_uri is None:
                make_sweep(address, folder / "sweep")
            sweep = newest_sweep(address, args.experiment)
            with _browser(args.chromium, args.chromedriver) as driver:
                page = Page(driver, address)
                for name, take in (("runs", take_runs), ("compare", take_compare), ("masks", take_masks)):
                    take(page, sweep)
                    _write(args.output / f"mlflow_{name}.png", _small(page.driver.get_screenshot_as_png()))
                if args.tracking_uri is None:
                    _write(args.output / "pareto.png", _small(take_front(driver, folder / "sweep" / "pareto.svg")))
                    _write(args.output / "history.png", _small((folder / "sweep/0/figures/history.png").read_bytes()))


# --- what is shown -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepRuns:
    """The parent run of a sweep, and its jobs from the best accuracy down."""

    parent: Run
    jobs: list[Run]
    client: MlflowClient
    views: dict[str, str]  # the experiment's saved views: last part of the key to key

    @property
    def table(self) -> str:
        return f"/experiments/{self.parent.info.experiment_id}/runs"


def make_sweep(address: str, folder: Path) -> None:
    """The README's sweep of 39 networks, tracked by the server at that address; one from an earlier time stays."""
    if not (folder / "report.html").exists():
        settings = [f"tracking.tracking_uri={address}", "tracking.timeout_s=60", f"hydra.sweep.dir={folder}"]
        command = [sys.executable, "train.py", "--multirun", *SWEEP, *settings, "trainer.progress=none"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def newest_sweep(address: str, experiment: str) -> SweepRuns:
    """
    Raises:
        SystemExit: there is no such experiment, or no finished sweep in it.
    """
    client = MlflowClient(tracking_uri=address)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise SystemExit(f"there is no experiment {experiment!r} at {address}")
    ids = [found.experiment_id]
    for parent in client.search_runs(ids, "tags.`sweep.directory` != ''", order_by=["attributes.start_time DESC"]):
        mine = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}' and attributes.status = 'FINISHED'"
        jobs = client.search_runs(ids, mine, order_by=["metrics.val_accuracy DESC"])
        if jobs:
            keys = [key.removeprefix("mlflow.sharedViewState.") for key in found.tags if "sharedViewState" in key]
            return SweepRuns(parent, list(jobs), client, {key.rpartition("-")[2]: key for key in keys})
    raise SystemExit(f"the experiment {experiment!r} at {address} has no sweep with a finished job")


def take_runs(page: Page, sweep: SweepRuns) -> None:
    """The run table in the view "Sweeps and their jobs", the newest sweep opened."""
    page.open_view(sweep, "sweeps")
    page.click("the sign that opens the first sweep", ".ag-row[row-index='0'] button")
    page.find("the sweep's first job", ".ag-row[row-index='1']")


def take_compare(page: Page, sweep: SweepRuns) -> None:
    """All jobs, accuracy against parameters: the first chart of the view "Jobs, best validation accuracy first".

    An experiment without that view has its runs compared on the page behind the button "Compare".
    """
    if "best" not in sweep.views:
        runs = json.dumps([job.info.run_id for job in sweep.jobs], separators=(",", ":"))
        page.open(
            f"/compare-runs?runs={quote(runs)}&experiments={quote(json.dumps([sweep.parent.info.experiment_id]))}"
        )
        return page.find("the parallel coordinates", ".js-plotly-plot svg")
    page.open_view(sweep, "best", mode="CHART")
    page.find("the jobs' colours", "[data-testid='experiment-view-table-run-color']")
    page.click("the first chart's full-screen button", "[data-component-id='fullscreen_button_chartcard']")
    page.find("the chart's points", "[role=dialog] svg path, [role=dialog] canvas")


def take_masks(page: Page, sweep: SweepRuns) -> None:
    """The masks of the sparsest job of single weights (any other sweep: of its best job)."""
    single = [job for job in sweep.jobs if any(name.startswith("where/sparsity/") for name in job.data.metrics)]
    job = max(single or sweep.jobs, key=lambda job: job.data.metrics.get("sparsity", 0.0))
    page.open(f"/experiments/{job.info.experiment_id}/runs/{job.info.run_id}/artifacts/{_picture(sweep.client, job)}")
    page.find("the picture of the masks", "img[src^='blob:'], img[src*='get-artifact']")


def _picture(client: MlflowClient, job: Run) -> str:
    """The job's picture of its final masks, or else the last one it has logged."""
    run_id = job.info.run_id
    paths = [file.path for folder in ("figures", "images") for file in client.list_artifacts(run_id, folder)]
    if "figures/masks.png" in paths:
        return "figures/masks.png"
    steps = {int(path.split("+step+")[1].split("+")[0]): path for path in paths if "+step+" in path and ".png" in path}
    if not steps:
        raise SystemExit(f"the run {job.info.run_name!r} has no picture of its masks")
    return steps[max(steps)]


def take_front(driver: Any, svg: Path) -> bytes:
    """The figure of a report, as wide as it is there; 1.5 pixels for each of its units."""
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg.read_text(encoding="utf8"))
    assert box is not None
    width, height = (math.ceil(float(length)) for length in box.groups())
    view = {"width": width, "height": height, "deviceScaleFactor": 1.5, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", view)
    driver.get(svg.as_uri())
    png: bytes = driver.get_screenshot_as_png()
    return png


# --- the browser -------------------------------------------------------------------------------------------


class Page:
    """MLflow's page in a browser; every look-up waits until the thing is there."""

    def __init__(self, driver: Any, address: str) -> None:
        self.driver, self.address = driver, address
        driver.get(f"{address}/health")  # same origin, but not the page itself, which would write over the settings
        for key, value in SETTINGS.items():
            driver.execute_script("localStorage.setItem(arguments[0], arguments[1])", key, value)

    def open(self, route: str) -> None:
        self.driver.get("about:blank")  # a change behind the # alone would not load the page anew
        self.driver.get(f"{self.address}/#{route}")

    def open_view(self, sweep: SweepRuns, view: str, *, mode: str = "TABLE") -> None:
        """The run table in one of the experiment's views; as MLflow shows it by itself if there is none."""
        key = f"&viewStateShareKey={sweep.views[view]}" if view in sweep.views else ""
        self.open(f"{sweep.table}?compareRunsMode={mode}{key}")
        self.find("the run table", ".ag-row[row-index='0']")
        if key:
            self.click(
                "the notice of a shared view", "[data-component-id='mlflow.experiment_page.shared_view.dismiss']"
            )

    def find(self, what: str, css: str) -> None:
        """Wait until there is an element for that selector, and the page is at rest."""
        try:
            WebDriverWait(self.driver, 60).until(visibility_of_element_located((By.CSS_SELECTOR, css)))
        except TimeoutException:
            raise SystemExit(f"{what} did not appear at {self.driver.current_url} ({css})") from None
        self._settle()

    def click(self, what: str, css: str) -> None:
        self.find(what, css)
        self.driver.execute_script("document.querySelector(arguments[0]).click()", css)
        self._settle()

    def _settle(self, *, quiet_s: float = 1.5, at_most_s: float = 20.0) -> None:
        """Wait until the picture has not changed for a while: charts are drawn late, and panels slide in."""
        self.driver.execute_script(
            f"document.head.appendChild(document.createElement('style')).textContent = {STYLE!r}"
        )
        last, since, until = b"", time.monotonic(), time.monotonic() + at_most_s
        while time.monotonic() < until and time.monotonic() - since < quiet_s:
            now = self.driver.get_screenshot_as_png()
            if now != last:
                last, since = now, time.monotonic()
            time.sleep(0.2)


@contextmanager
def _browser(chromium: str, chromedriver: str) -> Iterator[Any]:
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(chromedriver))
        try:
            view = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", view)
            yield driver
        finally:
            driver.quit()


def _write(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    print(f"{file}: {len(content) / 1000:.0f} kB")


def _small(png: bytes) -> bytes:
    """The same picture in 256 colours: a third of the bytes, and text stays sharp."""
    file = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        palette = picture.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        palette.save(file, "png", optimize=True)
    return file.getvalue()


# --- the server --------------------------------------------------------------------------------------------


@contextmanager
def _server(uri: str | None, folder: Path) -> Iterator[str]:
    """The address of a server over that store; one that was started here is stopped in the end."""
    if uri is not None and uri.startswith(("http://", "https://")):
        yield uri.rstrip("/")
        return
    port = _free_port()
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", uri or f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for(f"http://127.0.0.1:{port}", process, folder / "server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # it has workers
        process.wait()


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise SystemExit(f"mlflow ui did not start:\n{log.read_text(errors='replace')[-2000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _which(*names: str) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


if __name__ == "__main__":
    main()
