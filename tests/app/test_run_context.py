"""Runs that `mlflow.start_run` begins in a Hydra job have what Hydra has composed as tags."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow_plugins import installed

from gsprune.settings.git import git_tags

APP = """
import json, hydra, mlflow
from hydra.core.hydra_config import HydraConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    mlflow.set_tracking_uri(cfg.uri)
    with mlflow.start_run() as run:
        tags = mlflow.get_run(run.info.run_id).data.tags
    with open(HydraConfig.get().runtime.output_dir + "/tags.json", "w") as file:
        json.dump(tags, file)


if __name__ == "__main__":
    main()
"""


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.check_output(["git", "-C", str(folder), *who, *arguments], text=True).strip()


def committed(folder: Path) -> str:
    git(folder, "init", "-q")
    git(folder, "add", "app.py")
    git(folder, "commit", "-q", "-m", "x")
    return git(folder, "rev-parse", "HEAD")


@pytest.mark.slow
def test_a_plain_run_of_mlflow_in_a_sweep_knows_its_job(tmp_path: Path) -> None:
    conf = tmp_path / "conf"
    (conf / "net").mkdir(parents=True)
    (conf / "config.yaml").write_text("defaults: [{net: small}, _self_]\nlr: 0.1\napi_token: x\nuri: ???\n")
    for name in ("small", "large"):
        (conf / "net" / f"{name}.yaml").write_text(f"size: {name}\n")
    (tmp_path / "app.py").write_text(APP)
    commit = committed(tmp_path)
    (tmp_path / "app.py").write_text(APP + "# changed\n")
    words = ["--multirun", "net=large,small", "lr=0.5", "api_token=abc", f"uri=sqlite:///{tmp_path}/m.db"]
    command = [sys.executable, "app.py", *words, "hydra.sweep.dir=sweep"]
    done = subprocess.run(command, cwd=tmp_path, env=installed(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for number, name in enumerate(["large", "small"]):
        tags = json.loads((tmp_path / "sweep" / str(number) / "tags.json").read_text())
        assert tags["group.net"] == name
        assert tags["hydra.overrides"].split()[:3] == [f"net={name}", "lr=0.5", "api_token=***"]
        assert tags["hydra.sweep.dir"] == str(tmp_path / "sweep")
        assert (tags["hydra.job"], tags["hydra.job.num"]) == ("app", str(number))
        assert (tags["mlflow.source.git.commit"], tags["git.dirty"]) == (commit, "true")


def test_the_commit_is_that_of_the_directory_and_none_outside_of_a_repository(tmp_path: Path) -> None:
    assert git_tags(tmp_path) == {}
    (tmp_path / "app.py").write_text("x = 1\n")
    commit = committed(tmp_path)
    (tmp_path / "untracked").write_text("")
    assert git_tags(tmp_path) == {"mlflow.source.git.commit": commit, "git.dirty": "false"}
    (tmp_path / "app.py").write_text("x = 2\n")
    assert git_tags(tmp_path)["git.dirty"] == "true"
    assert git_tags(tmp_path / "missing") == {}
