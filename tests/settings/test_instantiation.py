"""Objects are made of this run's own configuration, and never of what a file of another run says."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import configure
from omegaconf import OmegaConf

from gsprune.app import job
from gsprune.integrations.inc import load_inc_config
from gsprune.settings import instantiation
from gsprune.settings.instantiation import main_arguments, make
from gsprune.sweeps.callback import _OpenSweep
from gsprune.sweeps.results import read_results
from gsprune.sweeps.sweep_dir import Sweep

CALLS: list[str] = []
PLANTED = {"_target_": "test_instantiation.planted", "where": "${oc.env:PATH}"}


def planted(where: str) -> str:
    CALLS.append(where)
    return where


@pytest.fixture(autouse=True)
def none_called() -> Any:
    CALLS.clear()
    yield
    assert CALLS == []


def test_a_target_in_the_configuration_is_called_and_one_in_an_argument_is_not() -> None:
    node = OmegaConf.create({"_target_": "builtins.dict", "own": PLANTED})
    assert make(node)["own"] == CALLS.pop() != "${oc.env:PATH}"
    plain = OmegaConf.create({"_target_": "builtins.dict"})
    assert make(plain, run_id=PLANTED, parent="${oc.env:PATH}") == {"run_id": PLANTED, "parent": "${oc.env:PATH}"}


def plant(folder: Path, names: tuple[str, ...], **more: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        fields = ("config_hash", "run_id", "parent_run_id", "error", "model", "job", "dense", "tracking_uri", "key")
        text = json.dumps({**PLANTED, **dict.fromkeys(fields, PLANTED), **more})
        (folder / name).write_text(text)  # as YAML too


def test_a_job_calls_nothing_that_lies_in_its_folder(tmp_path: Path) -> None:
    """Results, records, checkpoints, caches and the configuration of a run before it."""
    sweep, folder = Sweep(tmp_path), tmp_path / "0"
    files = ("result.json", "tracking.json", "config.yaml", "metrics.jsonl", "pruning.json", "plan.json")
    plant(folder, files, status="running", overrides=[PLANTED])
    plant(folder / ".hydra", ("config.yaml", "hydra.yaml", "overrides.yaml"))
    plant(folder / "checkpoint" / "epoch_0001_step_000000", ("state.json",))
    plant(tmp_path, ("sweep.json", "multirun.yaml"))
    plant(tmp_path / "dense_cache" / "0123456789abcdef", ("dense.json",))
    plant(tmp_path / "1", ("result.json", "config.yaml"), status="finished", accuracy=0.5)
    assert sweep.parent_run_id is None
    job.run(
        configure("trainer.dense_epochs=1", "trainer.prune_epochs=1", "trainer.latency_repeats=0"), output_dir=folder
    )
    assert json.loads((folder / "result.json").read_text())["status"] == "finished"
    assert [found.name for found in read_results(tmp_path).jobs] == ["0", "1"]


def test_a_sweep_that_goes_on_calls_nothing_of_its_record(tmp_path: Path) -> None:
    plant(tmp_path, ("sweep.json",))
    OmegaConf.register_new_resolver("none", lambda: None, replace=True)
    config = OmegaConf.create({"hydra": {"sweeper": {}, "overrides": {"task": []}}})
    given: dict[str, Any] = {}

    def make_tracker(**arguments: Any) -> Any:
        given.update(arguments)
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        _OpenSweep(Sweep(tmp_path), report=False).begin(config, "x", make_tracker)
    assert given["run_id"] is None


def test_the_ancestors_file_is_never_read_as_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instantiation, "instantiate", planted)
    text = "pruning:\n  approach:\n    weight_compression:\n      end_epoch: 2\n      pruners:\n        - !Pruner\n"
    (tmp_path / "conf.yaml").write_text(text + "            names: ['0.weight']\n            target_sparsity: 0.5\n")
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    made = load_inc_config(tmp_path / "conf.yaml").build(
        model, example_input=torch.ones(1, 4), steps_per_epoch=1, epochs=3
    )
    assert made.target_sparsity == 0.5


def test_the_list_of_targets_is_passed_where_hydra_takes_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both Hydras, played: ours, torch's, and what the files and the command line name; nothing on Hydra 1.3."""
    seen: dict[str, Any] = {}

    def older(config: Any, *args: Any, **kwargs: Any) -> None: ...

    def newer(config: Any, *args: Any, _execution_whitelist_: Any = None, **kwargs: Any) -> None:
        seen["allowed"] = _execution_whitelist_

    other = types.ModuleType("my_nets")
    other.Net = types.SimpleNamespace(__module__="my_nets.inner", __qualname__="Net")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_nets", other)
    config = OmegaConf.create({"model": {"_target_": "my_nets.Net"}, "x": {"y": [{"_target_": "torch.optim.SGD"}]}})
    monkeypatch.setattr(instantiation, "instantiate", older)
    assert instantiation._allowed(config.x) == {}
    monkeypatch.setattr(instantiation, "instantiate", newer)
    make(config.model)
    assert {*instantiation.ALLOWED, "my_nets.Net", "my_nets.inner.Net"} <= {*seen["allowed"]}
    assert all("*" not in name for name in {*seen["allowed"]} - {*instantiation.ALLOWED})

    (tmp_path / "a.yaml").write_text("callbacks:\n  x:\n    _target_: mine.Callback\nformatter:\n  class: my.Colours\n")
    monkeypatch.setattr(sys, "argv", ["train.py", "+hydra.callbacks.y._target_=yours.Callback", "seed=0"])
    monkeypatch.setattr(instantiation.hydra, "main", lambda config_name=None, version_base=None: None)
    assert main_arguments(tmp_path) == {"version_base": "1.3"}
    monkeypatch.setattr(instantiation.hydra, "main", lambda config_name=None, execution_whitelist=None: None)
    found = main_arguments(tmp_path)["execution_whitelist"]
    assert found == [*instantiation.ALLOWED, "mine.Callback", "my.Colours", "yours.Callback"]
