"""A sweep of real jobs under each launcher, as a user types it: all land, none loses a value, one parent run."""

from __future__ import annotations

import json

import pytest
from jobs import train

TINY = (
    "model.width=4",
    "dataset.batch_size=256",
    "trainer.device=cpu",
    "trainer.dense_epochs=1",
    "trainer.prune_epochs=1",
    "trainer.latency_repeats=0",
    "trainer.progress=none",
    "hydra.sweep.dir=sweep",
)


def sweep(folder, *arguments):
    return train(folder, "--multirun", *TINY, *arguments, fresh=True)


def check_jobs(folder, count):
    """Every job has finished, in its own folder, and MLflow has every value of it, under the sweep's run."""
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder.resolve()}/mlflow.db")
    record = json.loads((folder / "sweep/sweep.json").read_text())
    assert record["status"] == "finished"
    parent = client.get_run(record["parent_run_id"])
    assert parent.info.status == "FINISHED"
    runs = client.search_runs([parent.info.experiment_id])
    assert len(runs) == count + 1
    for number in range(count):
        job = folder / "sweep" / str(number)
        result = json.loads((job / "result.json").read_text())
        assert result["status"] == "finished"
        run = client.get_run(result["mlflow_run_id"])
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        tracked = {name: history(client, run, name) for name in run.data.metrics}
        assert tracked == local_history(job / "metrics.jsonl")
        assert "accuracy" in tracked


def history(client, run, name):
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name))


def local_history(file):
    found = {}
    for line in file.read_text().splitlines():
        event = json.loads(line)
        step = event.pop("step")
        for name in event.keys() - {"time"}:
            found.setdefault(name, []).append((step, event[name]))
    return {name: sorted(values) for name, values in found.items()}


@pytest.mark.long
def test_joblib_with_two_workers_on_a_fresh_store(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    done = sweep(tmp_path, *launcher, "pruner=elementwise,weighted", "seed=0,1")
    assert (done.returncode, done.stderr) == (0, "")
    check_jobs(tmp_path, 4)


@pytest.mark.long
def test_submitit_on_this_machine(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    done = sweep(tmp_path, "hydra/launcher=submitit_local", "pruner=elementwise,weighted")
    assert (done.returncode, done.stderr) == (0, "")
    check_jobs(tmp_path, 2)


@pytest.mark.slow
def test_ray_on_this_machine(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    launcher = ("hydra/launcher=ray", "hydra.launcher.ray.init.address=local")  # and not a cluster that is there
    done = sweep(tmp_path, *launcher, "pruner=elementwise,weighted")
    assert done.returncode == 0, done.stderr
    check_jobs(tmp_path, 2)
