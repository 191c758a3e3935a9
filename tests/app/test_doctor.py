"""`gsprune doctor` says what there is, and what is missing with the command that brings it."""

from __future__ import annotations

import http.server
import sqlite3
import threading

import pytest
import torch

from gsprune.app import doctor
from gsprune.cli import main


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_versions_devices_and_a_database_that_the_first_run_makes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    main(["doctor"])
    text = told(capsys)
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    assert "hydra-core " in text
    assert "cpu (" in text
    assert "mlflow.db (the default here): made by the first run" in text


def test_what_is_missing_comes_with_its_command(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "is_installed", lambda name: name not in ("transformers", "mlflow"))
    assert main(["doctor"]) == 1
    text = told(capsys)
    assert "[hf] not installed (transformers): pip install 'gsprune[hf]'" in text
    assert "Fault: mlflow of the extra app is missing: pip install 'gsprune[app]'" in text
    assert "gsprune sync" in text  # what a run without MLflow leaves


def test_a_version_that_is_too_old_is_a_fault(monkeypatch, capsys):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "1.0" if name == "torch" else real(name))
    monkeypatch.setattr(doctor, "_wanted", lambda extra: {"torch": _AtLeast26()} if extra == "" else {})
    assert main(["doctor"]) == 1
    assert "Fault: torch 1.0" in told(capsys)


class _AtLeast26:
    def contains(self, version: str, *, prereleases: bool) -> bool:
        return version != "1.0"

    def __str__(self) -> str:
        return ">=2.6"


def test_an_extra_asks_for_versions_of_its_own(monkeypatch):
    listed = ["torch>=2.6", "hydra-core<1.5,>=1.3.2", 'hydra-core<1.4; extra == "ray"', 'rich>=13; extra == "app"']
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: listed)
    assert doctor._wanted("")["hydra-core"].contains("1.4.0")
    assert not doctor._wanted("ray")["hydra-core"].contains("1.4.0")
    assert "rich" not in doctor._wanted("")
    assert "rich" in doctor._wanted("app")


def test_databases_and_servers(tmp_path, monkeypatch, capsys):
    file = tmp_path / "mlflow.db"
    with sqlite3.connect(file) as database:
        database.execute("create table runs (run_uuid text)")
        database.execute("insert into runs values ('a')")
    assert doctor._file_state(file) == "reachable, with 1 run"
    file.write_bytes(b"this is no database at all, but some text that is long enough" * 20)
    assert doctor._file_state(file).startswith("not reachable")
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    assert doctor._server_state(f"http://127.0.0.1:{port}") == f"127.0.0.1 answers on port {port}"
    server.shutdown()
    server.server_close()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:secret@127.0.0.1:{port}")
    assert main(["doctor"]) == 1
    text = told(capsys)
    assert "not reachable" in text
    assert "secret" not in text
