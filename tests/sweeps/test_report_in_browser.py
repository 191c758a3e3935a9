"""The report as a browser shows it: three widths, dark and printed. Needs Chromium, its driver and selenium.

With SCREENSHOTS=<folder> the pictures of what was tested are kept there, to look at.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gsprune.sweeps.report import build_report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install 'gsprune[test]')")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)",
    ),
]
WIDTHS = (400, 800, 1280)
LONG = "a_criterion_of_ones_own_with_a_name_that_does_not_end"
# What is wider than the window: the right edge of every element that is shown.
OUTSIDE = """
return [...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width && box.height && (box.right > innerWidth + 1 || box.left < -1);
}).map(e => e.tagName + ' ' + (e.textContent || '').trim().slice(0, 40))
"""


def job(folder: Path, pruner: str, target: float, seed: int, accuracy: float) -> None:
    folder.mkdir(parents=True)
    units = pruner != "elementwise" and target > 0
    left = (1 - target) ** 2 if units else 1 - target
    told: dict[str, Any] = {
        **{"status": "finished", "seed": seed, "accuracy": accuracy, "val_accuracy": accuracy, "shrunk": units},
        **{"baseline_accuracy": 0.98, "baseline_val_accuracy": 0.98, "epochs": 14, "baseline_epochs": 6},
        **{
            "params": round(93546 * (left if units else 1)),
            "params_nonzero": round(93546 * left),
            "params_dense": 93546,
        },
        **{"macs": 1e6 * (left if units else 1), "macs_dense": 1e6, "file_bytes": 97904, "target_sparsity": target},
        **{"sparsity": target, "sparsity_of": "channels" if units else "weights", "latency_dense_ms": 2.0},
        **({"speedup": 1.6, "speedup_low": 1.5, "speedup_high": 1.7} if units else {}),
        "layers": {f"{place}.{LONG}.conv{i}": [round(100 * target), 100] for place in "ab" for i in range(9)},
        "overrides": [f"pruner={pruner}", f"pruner.target_sparsity={target}", f"seed={seed}", "data.root=/" + 90 * "x"],
        "timings": {"train": 3.0, "files": 1.0},
    }
    (folder / "result.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sweep with both kinds of pruning, a collapsed network, a failed job and long names."""
    root, number = tmp_path_factory.mktemp("sweep"), 0
    cases = [("none", 0.0, 0.985), (LONG, 0.5, 0.982), (LONG, 0.7, 0.97), (LONG, 0.9, 0.21), ("random", 0.5, 0.95)]
    for pruner, target, accuracy in [*cases, ("elementwise", 0.9, 0.984)]:
        for seed in range(3):
            job(root / str(number), pruner, target, seed, accuracy + 0.001 * seed)
            number += 1
    (root / "failed").mkdir()
    (root / "failed" / "result.json").write_text(json.dumps({"status": "failed", "error": "ValueError: " + 80 * "y"}))
    note = {"tracking_uri": f"sqlite:////{80 * 'z'}/mlflow.db", "experiment_id": "1", "run_id": 32 * "a"}
    for folder in root.iterdir():
        (folder / "tracking.json").write_text(json.dumps(note))
    (root / "sweep.json").write_text(json.dumps({"command": "python train.py --multirun " + 150 * "w"}))
    assert build_report(root).verdicts[0].taken is not None
    return (root / "report.html").as_uri()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    profile = tmp_path_factory.mktemp("profile")
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"):
        options.add_argument(flag)
    found = webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
    yield found
    found.quit()


def show(driver: Any, page: str, width: int, *, dark: bool = False, media: str = "", height: int = 800) -> None:
    theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [theme]})
    view = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", view)
    driver.get(page)


def keep(driver: Any, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        driver.save_screenshot(str(Path(folder, f"{name}.png")))


def brightness(driver: Any, css: str, what: str) -> float:
    """Of a computed colour, from 0 to 1."""
    script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    colour = driver.execute_script(script, css, what)
    red, green, blue = (float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])
    return (0.3 * red + 0.59 * green + 0.11 * blue) / 255


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_off_and_the_verdict_is_on_the_first_screen(
    driver: Any, page: str, width: int, dark: bool
) -> None:
    show(driver, page, width, dark=dark)
    keep(driver, f"report_{width}_{'dark' if dark else 'light'}")
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert driver.execute_script(OUTSIDE) == []
    verdict, command = "return document.querySelector('h1').getBoundingClientRect().bottom", ".verdict dd.code"
    assert driver.execute_script(verdict) < 500
    assert driver.execute_script("return document.querySelector(arguments[0]).innerText", command).startswith(
        "gsprune take"
    )
    paper, ink = brightness(driver, "body", "backgroundColor"), brightness(driver, "svg.front text", "fill")
    assert (paper < 0.3) == dark
    assert abs(paper - ink) > 0.5  # the picture follows the theme


def test_on_paper_nothing_is_cut_off_and_all_pictures_are_there(driver: Any, page: str) -> None:
    show(driver, page, 718, media="print", dark=True)  # A4 with margins of 1 cm
    keep(driver, "report_print")
    assert driver.execute_script(OUTSIDE) == []
    shown = "return [...document.querySelectorAll('.plot')].map(e => getComputedStyle(e).display)"
    assert driver.execute_script(shown) == ["block", "block", "block"]
    assert brightness(driver, "body", "backgroundColor") > 0.9
    rows = """return [...document.querySelectorAll('.cards tbody tr:not(.group)')].map(e => {
      const style = getComputedStyle(e); return style.breakInside + ' ' + style.breakAfter })"""
    assert set(driver.execute_script(rows)) == {"avoid auto"}  # a row is on one page, and may be the last of it


def test_the_switch_works_without_a_script(driver: Any, page: str) -> None:
    show(driver, page, 1280)
    shown = "return [...document.querySelectorAll('.plot')].map(e => getComputedStyle(e).display)"
    assert driver.execute_script(shown) == ["block", "none", "none"]
    driver.find_element("css selector", "label[for=axis-2]").click()
    assert driver.execute_script(shown) == ["none", "block", "none"]
    assert driver.execute_script("return document.querySelectorAll('script').length") == 0


def test_every_row_of_networks_leads_to_its_runs(driver: Any, page: str) -> None:
    show(driver, page, 1280)
    rows = driver.execute_script(
        "const links = r => [...r.querySelectorAll('a')].map(a => a.getAttribute('href'));"
        "return [...document.querySelectorAll('tr[id]')].map(links)"
    )
    assert rows
    root = Path(page.removeprefix("file://")).parent
    assert all(len(row) == 3 and all((root / link).is_dir() for link in row) for row in rows)
