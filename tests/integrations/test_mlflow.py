"""`mlflow.models.evaluate(..., evaluators="gsprune")`: what a network costs, in the run that MLflow evaluates it in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from facts import refused
from mlflow_plugins import installed
from torch import nn

from gsprune.integrations.mlflow import CostEvaluator, costs


def network() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    for parameter in net.parameters():
        nn.init.ones_(parameter)
    with torch.no_grad():
        net[0].weight[:3] = 0  # type: ignore[index]
    return net


def test_the_numbers_are_counted_and_zeros_are_no_saving_in_macs() -> None:
    found = costs(network(), torch.ones(5, 6))
    assert found.pop("latency_ms") > 0
    assert found == {"params": 38.0, "params_nonzero": 20.0, "sparsity": 18 / 32, "macs": 5 * 32.0}


def test_tied_weights_count_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    with torch.no_grad():
        net[0].weight[:] = 1
        net[0].weight[0] = 0  # type: ignore[index]
    assert costs(net, torch.ones(1, 4), latency=False) == {
        "params": 16.0, "params_nonzero": 12.0, "sparsity": 0.25, "macs": 32.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        (None, ["example_input"]),
        ({"example_inputs": 1}, ["example_input"]),
        ({"example_input": torch.ones(1, 6)}, ["network of torch", "pytorch"]),
        ({"example_input": torch.ones(1, 6), "model": "net"}, ["network of torch"]),
    ],
)
def test_what_is_missing_is_said(config: Any, facts: list[str]) -> None:
    with refused(*facts):
        CostEvaluator().evaluate(model_type=None, dataset=None, run_id="r", evaluator_config=config, model=object())


def test_it_takes_no_part_where_it_was_not_asked() -> None:
    """MLflow asks every evaluator there is where none is named."""
    for config, takes in ((None, False), ({"log_explainer": True}, False), ({"example_input": torch.ones(1)}, True)):
        assert CostEvaluator.can_evaluate(model_type="classifier", evaluator_config=config) is takes


SCRIPT = """
import sys, mlflow, numpy, torch
from test_mlflow import network
mlflow.set_tracking_uri("sqlite:///" + sys.argv[1])
NAMED = {"evaluators": "gsprune", "model_type": "network"}
net, x = network(), numpy.ones((5, 6), numpy.float32)
logged = mlflow.pytorch.log_model(net, name="net", serialization_format="pickle", pip_requirements=["torch"])
example = {"example_input": torch.ones(5, 6), "latency": False}
with mlflow.start_run() as run:
    found = mlflow.models.evaluate(logged.model_uri, x, **NAMED, evaluator_config=example).metrics
assert found == {"params": 38.0, "params_nonzero": 20.0, "sparsity": 18 / 32, "macs": 160.0}, found
assert found.items() <= mlflow.get_run(run.info.run_id).data.metrics.items()
model = mlflow.get_logged_model(logged.model_id)
assert {metric.key: metric.value for metric in model.metrics} == found
with mlflow.start_run():
    settings = {**example, "model": net}
    assert mlflow.models.evaluate(lambda x: x, x, **NAMED, evaluator_config=settings).metrics == found
print("all of it")
"""


@pytest.mark.slow
def test_mlflow_finds_the_evaluator_and_the_numbers_stand_at_run_and_model(tmp_path: Path) -> None:
    env = installed(tmp_path)
    env["PYTHONPATH"] += f":{Path(__file__).parent}:{Path(__file__).parents[1]}"
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "m.db")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["all of it"], done.stderr
