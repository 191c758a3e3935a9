"""`gsprune take`: which network it takes, what lies in the folder, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from facts import assert_tells

from gsprune import load_pruned, save_pruned
from gsprune.export.program_file import write_program
from gsprune.files.disk import read_object, sha256
from gsprune.formats.masks import load_masks, save_masks
from gsprune.sweeps.take import main


def network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))


def job(folder: Path, pruner: str, accuracy: float, seed: int, *words: str) -> None:
    folder.mkdir(parents=True)
    target = 0.0 if pruner == "none" else 0.5
    told = {
        **{"status": "finished", "accuracy": accuracy, "val_accuracy": accuracy, "seed": seed, "epochs": 2},
        **{"params": 500 if target else 1000, "params_dense": 1000, "target_sparsity": target},
        **{"sparsity_of": "channels", "config_hash": f"hash{folder.name}", "overrides": [f"pruner={pruner}", *words]},
    }
    (folder / "result.json").write_text(json.dumps(told))
    model = "model: {_target_: torch.nn.Linear, in_features: 4, out_features: 2, bias: true, weights: w.safetensors}"
    (folder / "config.yaml").write_text(f"seed: {seed}\n{model}\n")
    torch.manual_seed(seed)
    save_pruned(folder, network(), None)
    save_masks(folder / "masks.safetensors", {"0.weight": torch.arange(12).reshape(3, 4) % 2 == 0})


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    root = tmp_path / "multirun" / "day" / "time"
    for seed in range(3):
        job(root / f"{seed}", "none", 0.95, seed)
        job(root / f"{seed + 3}", "abs", 0.945 + 0.001 * (seed == 1), seed)
    return root


def test_it_takes_what_the_verdict_says_and_notes_where_it_comes_from(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(sweep)]) == 0
    taken = Path("taken/day_time")
    files = ["config.yaml", "masks.safetensors", "model.safetensors", "origin.json", "pruning.json", "result.json"]
    assert sorted(path.name for path in taken.iterdir()) == files
    torch.manual_seed(1)  # of the best seed, in folder 4
    expected = network().state_dict()
    loaded = load_pruned(taken, network()).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert load_masks(taken / "masks.safetensors")["0.weight"].sum() == 6
    origin = read_object(taken / "origin.json")
    assert (origin["job"], origin["config_hash"], origin["sweep"]) == ("4", "hash4", str(sweep))
    assert origin["sha256"]["model.safetensors"] == sha256(sweep / "4" / "model.safetensors")
    assert_tells(origin["why"], "ake abs at 50 % of channels", "2.0x fewer parameters", "0.5 ± 0.1 points below")
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == f"{origin['why']}."
    made = "Linear(in_features=4, out_features=2, bias=True)"
    assert last == f"Load it: from torch.nn import Linear; gsprune.load_pruned('taken/day_time', {made})"


def test_a_job_is_taken_by_name_whatever_the_verdict(sweep: Path, tmp_path: Path) -> None:
    assert main([str(sweep), "--job", "0", "--to", str(tmp_path / "mine")]) == 0
    origin = read_object(tmp_path / "mine" / "origin.json")
    assert origin["job"] == "0"
    assert_tells(origin["why"], "Job 0", "by name")


def test_what_it_refuses_is_one_sentence_and_no_folder(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "mine"

    def refuses(*facts: object, options: tuple[str, ...] = ()) -> None:
        assert main([str(sweep), "--to", str(target), *options]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert_tells(line, "Error", *facts)
        assert not target.exists()

    refuses("--job 9", "0, 1, 2", options=("--job", "9"))
    refuses("Take none", "0.2 points", "abs", options=("--max-drop", "0.2"))
    refuses("report.max_drop=-1", options=("--max-drop", "-1"))
    with (sweep / "4" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    refuses("4/model.safetensors", "changed")
    (sweep / "4" / "pruning.json").unlink()
    refuses("4", "pruning.json")
    job(sweep / "6", "abs", 0.9, 0, "model=other")
    refuses("several models or data sets", "--job 4")


def test_a_folder_that_exists_is_never_written_over(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    assert main([str(sweep), "--to", str(tmp_path / "mine")]) == 1
    assert_tells(capsys.readouterr().err.strip(), str(tmp_path / "mine"), "exists", "--to")
    assert list((tmp_path / "mine").iterdir()) == []


def test_registering_takes_a_run_and_a_password_goes_to_no_server_that_only_a_record_names(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(sweep), "--to", str(tmp_path / "a"), "--register", "digits"]) == 1
    assert_tells(capsys.readouterr().err.strip(), sweep / "4", "no run in MLflow")
    (sweep / "4" / "tracking.json").write_text('{"tracking_uri": "http://127.0.0.1:9", "run_id": "abc"}')
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    assert main([str(sweep), "--to", str(tmp_path / "b"), "--register", "digits"]) == 1
    assert_tells(capsys.readouterr().err.strip(), "http://127.0.0.1:9", "password", "--tracking-uri")


@pytest.mark.slow
def test_a_registered_model_holds_the_files_and_counts_its_versions(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    run = client.create_run(client.create_experiment("e", (tmp_path / "artifacts").as_uri()))
    note = {"tracking_uri": uri, "run_id": run.info.run_id}
    (sweep / "4" / "tracking.json").write_text(json.dumps(note))
    write_program(sweep / "4" / "model.pt2", network(), torch.ones(1, 4))
    for version in (1, 2):
        assert main([str(sweep), "--to", str(tmp_path / "mine"), "--register", "digits"]) == 0
        assert f"Registered: digits, version {version}, champion" in capsys.readouterr().out
        assert client.get_model_version_by_alias("digits", "champion").version == version
        found = client.get_model_version("digits", str(version))
        assert found.run_id == run.info.run_id
        folder = Path(download_artifacts(artifact_uri=found.source, dst_path=str(tmp_path / f"back{version}")))
        assert sha256(folder / "model.safetensors") == sha256(sweep / "4" / "model.safetensors")
        shutil.rmtree(tmp_path / "mine")
    previous = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    try:
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        loaded = mlflow.pytorch.load_model("models:/digits@champion")
    finally:
        mlflow.set_tracking_uri(previous[0])
        mlflow.set_registry_uri(previous[1])
    x = torch.rand(3, 4)
    assert torch.equal(loaded(x), torch.export.load(sweep / "4" / "model.pt2").module()(x))
    (sweep / "0" / "tracking.json").write_text(json.dumps(note))
    assert main([str(sweep), "--to", str(tmp_path / "mine"), "--job", "0", "--register", "digits"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Registered: digits, version 3"  # not the report's choice
    assert client.get_model_version_by_alias("digits", "champion").version == 2
