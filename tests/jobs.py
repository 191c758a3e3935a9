"""Jobs for tests: tiny configurations of the reference application, and its command as a process of its own."""

from __future__ import annotations

import functools
import io
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from forks import Forks
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from gsprune.app.job import run
from gsprune.files.disk import write_atomic
from gsprune.plots import run_figures

ROOT = Path(__file__).parents[1]
SMALL = (
    "model.width=4",
    "dataset.batch_size=256",
    "trainer.device=cpu",
    "trainer.dense_epochs=1",
    "trainer.prune_epochs=2",
    "trainer.latency_repeats=3",
)
TINY = ("tracking=none", *SMALL, "trainer.progress=none")


@functools.cache
def _composed(*groups: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=[*TINY, *groups])


def configure(*overrides: str) -> DictConfig:
    """A composition costs 0.2 s, so only the choices of groups (which have no dot) are composed anew."""
    cfg = _composed(*(override for override in overrides if "." not in override.partition("=")[0])).copy()
    OmegaConf.set_struct(cfg, False)
    for override in overrides:
        key, _, value = override.partition("=")
        if "." in key:
            OmegaConf.update(cfg, key, OmegaConf.from_dotlist([f"value={value}"]).value, merge=True)
    return cfg


def finished(folder: Path, *overrides: str, drawn: bool = False) -> dict[str, Any]:
    """The result of a job in this process, which prints nothing. Unless `drawn`, files stand in for its two figures.

    Drawing takes a third of a tiny job's time.
    """
    with redirect_stdout(io.StringIO()), ExitStack() as patched:
        if not drawn:
            for name in ("save_history", "save_layer_sparsity"):
                patched.enter_context(patch.object(run_figures, name, _not_drawn))
        return run(configure(*overrides), output_dir=folder)


def _not_drawn(path: Path, *_: object, **__: object) -> None:
    write_atomic(path, b"not drawn")


_forks = Forks()


def train(
    folder: Path, *arguments: str, python: Sequence[str] = (), fresh: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `python train.py <arguments>` in the folder, without what our environment says of MLflow and launchers.

    A fork of a process that has made the imports, unless it is to be `fresh` or has options of Python.
    """
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "HYDRA_", "SLURM_", "RAY_"))}
    ours |= {"OMP_NUM_THREADS": "1", **environment}
    if not (fresh or python) and hasattr(os, "fork"):
        return _forks.run(folder, arguments, ours)
    return subprocess.run(
        [sys.executable, *python, str(ROOT / "train.py"), *arguments],
        cwd=folder,
        env=ours,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def write_pictures(root: Path, *, classes: tuple[str, ...] = ("cat", "dog"), each: int = 10) -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", (20, 12), (number * 100, i * 10, 0)).save(root / name / f"{i}.png")
    return root
