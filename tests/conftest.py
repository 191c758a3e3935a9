"""What many tests share: the reference application's configuration, composed without running a job, and jobs."""

from __future__ import annotations

import os
import signal
import sys

# Tests run side by side, and networks this small gain nothing from a second thread, which only gets in the way.
# Before torch is imported, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Behind a shell's `&` Ctrl-C is ignored, here and in the processes that tests start; tests send it as a terminal does.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

if TYPE_CHECKING:
    from interrupted import AtStep

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", help="of the tests marked cuda: cuda, or cpu to try them without one")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests first: what comes last is short, and no worker waits long for another."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True)
def job_of_hydra() -> Iterator[None]:
    """Hydra keeps the configuration of a process's last job, which the next test must not take for its own."""
    HydraConfig.instance().cfg = None  # a fixture of a whole module may have run a job, too
    yield
    HydraConfig.instance().cfg = None


@pytest.fixture(autouse=True)
def clock_of_its_own() -> Iterator[None]:
    """What one test's clock has shown is nothing to another's."""
    yield
    if tables := sys.modules.get("gsprune.cost.latency_tables"):
        tables._KNOWN.clear()


@pytest.fixture
def compose_config() -> Iterator[Callable[..., DictConfig]]:
    """`compose_config("pruner=abs", "seed=1")` is what `python train.py pruner=abs seed=1` would run with."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield lambda *overrides: compose("config", overrides=list(overrides))


# --- jobs that end early; what they import is heavy ----------------------------------------------------------


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that nothing has disturbed."""
    from interrupted import go

    folder = tmp_path_factory.mktemp("whole")
    go(folder)
    return folder


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> AtStep:
    from interrupted import AtStep

    return AtStep(monkeypatch)


@pytest.fixture
def crashed(tmp_path: Path, at_step: AtStep) -> Path:
    """The folder of a job that has crashed in its third epoch, with the checkpoints of the first two."""
    from interrupted import Crash, crash, go, names

    folder = tmp_path / "run"
    at_step.do(12, crash)
    with pytest.raises(Crash):
        go(folder)
    assert names(folder) == ["epoch_0001_step_000000", "epoch_0002_step_000000"]
    at_step.do(0, crash)
    return folder
