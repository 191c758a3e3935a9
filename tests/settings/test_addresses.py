"""Addresses of SQLite databases, in folders of any name, as SQLAlchemy and MLflow read them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from gsprune.settings import addresses
from gsprune.settings.addresses import command_directory, database_file, database_uri, resolve_tracking_uri

NAMES = ["plain", "a b#c, é=50%", "My%20Runs", "best?", "x?y=1", "100%", "a%3Fb/c?d", "semi;colon & more", "a@b:c"]


@pytest.mark.parametrize("name", NAMES)
def test_the_database_lies_where_its_address_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.store.db import utils
    from sqlalchemy.engine import make_url

    if not addresses._decoded() and "?" in name:
        pytest.skip("SQLAlchemy before 2.1 reads no such name")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / name
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    before = sorted(tmp_path.rglob("*"))
    uri = resolve_tracking_uri(None)
    assert make_url(uri).database == str(folder / "mlflow.db")
    assert database_file(uri) == folder / "mlflow.db"
    assert resolve_tracking_uri(uri) == uri  # what is on record is read again
    assert dict(make_url(resolve_tracking_uri(f"{uri}?timeout=5")).query) == {"timeout": "5"}
    if make_parents := getattr(utils, "_make_parent_dirs_if_sqlite", None):  # of some versions
        make_parents(uri)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("sqlite:///runs/a.db", "runs/a.db"),
        ("sqlite:///My%20Runs/a.db?timeout=20", "My Runs/a.db"),  # as MLflow writes a space
        ("sqlite:///best?/a.db", "best?/a.db"),  # no option has that form
        ("sqlite:///50%/../a.db", "a.db"),
        ("sqlite:///:memory:", None),
        ("sqlite:///file:a.db?mode=ro&uri=true", None),
        ("sqlite:///", None),
        ("postgresql://host/a?b=c", None),
    ],
)
def test_an_address_is_read_as_sqlalchemy_does(
    uri: str, path: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "_decoded", lambda: True)  # as SQLAlchemy 2.1 does
    monkeypatch.chdir(tmp_path)
    assert database_file(uri) == (None if path is None else tmp_path / path)


def test_what_sqlalchemy_2_1_decodes_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_decoded", lambda: True)
    assert database_uri(Path("/data/50 % #1/mlflow.db")) == "sqlite:////data/50 %25 #1%2Fmlflow.db"


def test_sqlalchemy_before_2_1_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_decoded", lambda: False)
    assert database_uri(Path("/data/My%20Runs/a.db")) == "sqlite:////data/My%20Runs/a.db"
    assert database_file("sqlite:////data/My%20Runs/a.db") == Path("/data/My%20Runs/a.db")
    with pytest.raises(ValueError, match=r"SQLAlchemy before 2\.1 .*/data/best\?/a\.db"):
        database_uri(Path("/data/best?/a.db"))


def test_relative_paths_are_those_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under hydra.job.chdir=true a job has another working directory."""
    job = tmp_path / "multirun" / "0"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert command_directory() == job
    hydra = OmegaConf.create({"runtime": {"cwd": str(tmp_path)}})
    monkeypatch.setattr(HydraConfig, "initialized", staticmethod(lambda: True))
    monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda: hydra))
    assert command_directory() == tmp_path
    assert resolve_tracking_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"
    hydra.runtime.cwd = str(tmp_path / "on another machine")
    assert command_directory() == job
