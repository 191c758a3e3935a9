"""`gsprune.tracking.log`: a pruner's report, masks and picture in a run that somebody else has started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from facts import refused
from torch import nn

import gsprune
from gsprune import Pruner, load_masks
from gsprune.criteria import Magnitude
from gsprune.schedules import OneShot


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One for the module: creating it takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/m.db"


@pytest.fixture
def mlflow(tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """With an experiment of the test's own."""
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    experiment = mlflow.create_experiment(tmp_path.name, (tmp_path / "artifacts").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    return mlflow


def pruned() -> Pruner:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    pruner = Pruner(net, Magnitude(), target_sparsity=0.5, schedule=OneShot())
    pruner.on_step_begin(0)
    return pruner


@pytest.mark.slow
def test_a_run_of_somebody_else_gets_numbers_masks_and_a_picture(mlflow: Any, tmp_path: Path) -> None:
    pruner = pruned()
    with mlflow.start_run() as run:
        mlflow.log_metric("loss", 1.0)
        gsprune.tracking.log(pruner, step=3)
    found = mlflow.get_run(run.info.run_id)
    assert found.data.metrics == {"loss": 1.0, **pruner.report()}
    client = mlflow.MlflowClient()
    assert [m.step for m in client.get_metric_history(run.info.run_id, "sparsity")] == [3]
    path = client.download_artifacts(run.info.run_id, "masks/step_000003.safetensors", str(tmp_path))
    masks = load_masks(path)
    assert all(torch.equal(mask, masks[name]) for name, mask in pruner.dense_masks().items())
    images = [Path(file.path).name for file in client.list_artifacts(run.info.run_id, "images")]
    assert sum(name.startswith("masks+step+3+") and name.endswith(".png") for name in images) == 1
    gsprune.tracking.log(Pruner(pruner.model, rules=[]), step=4, run_id=run.info.run_id)  # none is active
    assert [m.step for m in client.get_metric_history(run.info.run_id, "sparsity")] == [3, 4]


def test_without_a_run_none_is_begun(mlflow: Any) -> None:
    with refused("no run", "start_run", "run_id"):
        gsprune.tracking.log(pruned(), step=0)
    assert mlflow.search_runs(output_format="list") == []
