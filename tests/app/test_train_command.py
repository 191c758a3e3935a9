"""`python train.py` as a user types it: what it prints, what it leaves, how a mistake ends. Real processes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from jobs import ROOT, SMALL, train

from gsprune import load_pruned
from gsprune.zoo.models import convnet

HINT = "\nSet the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace.\n"


@pytest.mark.slow
def test_a_run_from_another_directory_leaves_everything_and_says_how_to_look_at_it(tmp_path):
    done = train(tmp_path, "pruner=elementwise", *SMALL, "hydra.run.dir=out", fresh=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    names = [line.partition("  ")[0] for line in lines[: lines.index("")] if not line.startswith(" ")]
    assert names == ["device", "data", "network", "pruning", "epochs", "dense", "prune", "prune"]
    epochs = [line for line in lines if "epoch   " in line]
    assert [line[:20] for line in epochs] == [f"{phase}    epoch   {n}/3" for n, phase in enumerate(names[5:], 1)]
    rule = next(i for i, line in enumerate(lines) if line.startswith("-----"))
    labels = [re.split(" {2,}", line.strip())[0] for line in lines[rule + 1 : lines.index("", rule)]]
    accuracies = ["epochs trained", "validation accuracy", "test accuracy"]
    costs = ["weights it may prune", "parameters", "not zero", "MACs", "latency (ms)", "file size"]
    assert labels == [*accuracies, "sparsity of weights", *costs]
    store = f"sqlite:///{tmp_path.resolve()}/mlflow.db"
    assert lines[-3:-1] == [
        f"Outputs: {tmp_path.resolve()}/out",
        f"MLflow:  mlflow ui --backend-store-uri {store} --host 127.0.0.1",
    ]
    page = r"http://127\.0\.0\.1:5000/#/experiments/1/runs/[0-9a-f]{32}\?workflowType=machine_learning$"
    assert re.search(page, lines[-1])
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["status"] == "finished"
    assert (tmp_path / "out" / ".hydra" / "config.yaml").is_file()
    log = (tmp_path / "out" / "train.log").read_text()
    assert all(line in log for line in [*epochs, *lines[rule:]])  # the epochs with their phase, and the table
    assert "network: convnet: " in log
    check_mlflow(store, result, tmp_path / "out")


def check_mlflow(store, result, folder):
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=store)
    run = client.get_run(result["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["pruner.criterion._target_"] == "gsprune.criteria.Elementwise"
    assert run.data.tags["group.pruner"] == "elementwise"
    assert run.data.tags["hydra.overrides"].startswith("pruner=elementwise model.width=4")
    assert run.data.params["sparsity_of"] == result["sparsity_of"] == "weights"
    for name in ("accuracy", "val_accuracy", "baseline_val_accuracy"):
        assert run.data.metrics[name] == pytest.approx(result[name], rel=1e-5)  # six digits are logged
    assert [m.step for m in client.get_metric_history(run.info.run_id, "val/accuracy")] == [1, 2, 3]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "sparsity")] == [1, 2, 3]
    top = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "figures", "images", "masks", "result.json"} <= top
    logged = client.search_logged_models([run.info.experiment_id])
    models = {model.name.partition("-seed")[0]: client.get_logged_model(model.model_id) for model in logged}
    assert set(models) == {"dense", "elementwise-0-9"}
    dense, pruned = models["dense"], models["elementwise-0-9"]
    numbers = [{metric.key: metric.value for metric in model.metrics} for model in (dense, pruned)]
    for found, prefix in zip(numbers, ("baseline_", ""), strict=True):
        assert found["model_accuracy"] == result[f"{prefix}accuracy"]
        assert found["model_val_accuracy"] == result[f"{prefix}val_accuracy"]
    assert numbers[0]["model_params"] == result["params_dense"]
    assert numbers[1]["model_params_nonzero"] == result["params_nonzero"]
    assert {metric.dataset_name for metric in pruned.metrics} == {"digits"}
    assert {"pruner": "elementwise", "dataset": "digits", "seed": "0"}.items() <= pruned.params.items()
    place = Path(unquote(pruned.artifact_location.removeprefix("file://")))
    flavour = {"MLmodel", "model.pt2", "python_env.yaml", "requirements.txt"}
    names = {path.name for path in place.iterdir()}
    assert names == flavour | {"model.safetensors", "pruning.json", "masks.safetensors"}
    small = load_pruned(folder, convnet(image_size=8, in_channels=1, num_classes=10, width=4))
    given = outputs(store, pruned.model_uri, dense.model_uri)
    assert given.shape == (2, 5, 10)
    assert (given[0] - small(X)).abs().max() < 1e-5
    assert (given[1] - given[0]).abs().max() > 0.01


X = torch.linspace(0, 1, 5 * 64).reshape(5, 1, 8, 8)
LOAD = """
import json, sys
sys.modules["gsprune"] = None  # nothing of it, and no class of the network, is needed
import mlflow, torch
mlflow.set_tracking_uri(sys.argv[1])
x = torch.linspace(0, 1, 5 * 64).reshape(5, 1, 8, 8)
for uri in sys.argv[2:]:
    found = mlflow.pytorch.load_model(uri)(x)
    served = torch.from_numpy(mlflow.pyfunc.load_model(uri).predict(x.numpy()))
    assert torch.equal(found, served)
    print(json.dumps(found.tolist()))
"""


def outputs(store, *uris):
    """What MLflow's models give for X, in a process that cannot import gsprune."""
    command = [sys.executable, "-W", "ignore", "-c", LOAD, store, *uris]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.tensor([json.loads(line) for line in done.stdout.splitlines()])


@pytest.mark.slow
def test_a_sweep_returns_the_objective_and_one_bad_job_does_not_stop_the_others(tmp_path):
    sweep = ("--multirun", "tracking=none", "pruner.min_kept=0,1", "hydra.sweep.dir=sweep")
    refused = train(tmp_path, *sweep, *SMALL)
    assert refused.returncode == 1
    lines = refused.stderr.splitlines()
    assert lines[0].startswith("job 0 would be: tracking=none pruner.min_kept=0 model.width=4")
    assert "sweep.check=false" in lines[1]
    assert lines[2:] == ["1 of 2 failed: 0: pruner.min_kept is 0: it must be 1 or more"]
    assert list(tmp_path.iterdir()) == []  # nothing was begun
    done = train(tmp_path, *sweep, *SMALL, "sweep.check=false")
    assert done.returncode == 1
    assert done.stderr.splitlines()[1:] == [
        "pruner.min_kept is 0: it must be 1 or more",
        *HINT.splitlines(),
        *lines[2:],
    ]
    status = [json.loads((tmp_path / "sweep" / job / "result.json").read_text())["status"] for job in "01"]
    assert status == ["failed", "finished"]


MISTAKES = {
    "trainer.precision=fp8": "trainer.precision=fp8 is not allowed: it must be one of fp32, bf16, fp16",
    "plan=maybe": "plan=maybe is not allowed: it must be true or false",
}


@pytest.mark.slow
@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_ends_as_one_sentence_and_exit_code_1(tmp_path, override):
    done = train(tmp_path, "tracking=none", "hydra.run.dir=out", override)
    assert done.returncode == 1
    assert done.stdout == ""
    overrides = ["tracking=none", override]
    assert done.stderr == f"Error executing job with overrides: {overrides}\n{MISTAKES[override]}\n{HINT}"


@pytest.mark.slow
def test_an_unknown_objective_lists_what_there_is(tmp_path):
    done = train(tmp_path, "tracking=none", "hydra.run.dir=out", "objective=acuracy")
    assert done.returncode == 1
    sentence = done.stderr.splitlines()[1]
    assert sentence.startswith("objective=acuracy is not in the result: did you mean accuracy? There are accuracy, ")
    assert sentence.endswith("seconds, updates, epochs, baseline_epochs")


@pytest.mark.slow
def test_the_full_error_is_there_when_asked_for(tmp_path):
    done = train(tmp_path, "tracking=none", "hydra.run.dir=out", "trainer.precision=fp8", HYDRA_FULL_ERROR="1")
    assert done.returncode == 1
    assert "ValueError: trainer.precision=fp8 is not allowed" in done.stderr
    assert 'gsprune/training/trainer.py", line' in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("override", ["pruner=weightd", "pruner.sparsityy=0.9"])
def test_unknown_names_are_hydras_own_error_without_importing_torch(tmp_path, override):
    done = train(tmp_path, override, python=("-X", "importtime"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert override.split("=")[0].split(".")[-1] in done.stderr
    assert imported(done.stderr).isdisjoint(HEAVY)


HEAVY = {"torch", "mlflow", "matplotlib", "sklearn", "torchvision", "rich"}


def imported(stderr):
    lines = [line for line in stderr.splitlines() if line.startswith("import time:")]
    return {line.split("|")[-1].strip() for line in lines}


@pytest.mark.slow
def test_help_lists_the_groups_and_imports_nothing_heavy(tmp_path):
    done = train(tmp_path, "--help", python=("-X", "importtime"))
    assert done.returncode == 0
    options = sorted(file.stem for file in (ROOT / "gsprune" / "conf" / "pruner").glob("*.yaml"))
    assert {"abs", "none", "units_and_weights"} < set(options)
    assert f"pruner: {', '.join(options)}\n" in done.stdout
    assert "hydra" in imported(done.stderr)
    assert imported(done.stderr).isdisjoint(HEAVY)
    assert list(tmp_path.iterdir()) == []
