"""The sweeper on Optuna: real studies, of jobs that cost nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from jobs import ROOT, train
from omegaconf import OmegaConf

from hydra_plugins.gsprune.optuna_sweeper import distribution, values_of

optuna = pytest.importorskip("optuna")

APP = """
import hydra

@hydra.main(config_path=CONF, config_name="config", **VERSION)
def main(cfg):
    if cfg.x < cfg.fails_below:
        raise ValueError("too small")
    return (cfg.x - 3) ** 2, cfg.x

main()
"""


def search(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """An application of its own that has the sweeper's files in its search path."""
    (folder / "conf").mkdir(exist_ok=True)
    (folder / "conf" / "config.yaml").write_text(
        f"hydra:\n  searchpath: ['file://{ROOT}/conf']\nx: 0.0\nkind: a\nfails_below: -1.0\n"
    )
    version = "{'version_base': '1.3'}" if _hydra().startswith("1.3") else "{}"
    (folder / "app.py").write_text(APP.replace("CONF", repr(str(folder / "conf"))).replace("VERSION", version))
    command = [sys.executable, "app.py", "--multirun", "hydra/sweeper=optuna", "hydra.sweep.dir=sweep", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HYDRA_")}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def _hydra() -> str:
    import hydra

    return str(hydra.__version__)


def of(text: str) -> object:
    (override,) = OverridesParser.create().parse_overrides([text])
    return distribution(override)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x=a,1,null", optuna.distributions.CategoricalDistribution(["a", 1, "null"])),
        ("x=abs,weighted", optuna.distributions.CategoricalDistribution(["abs", "weighted"])),
        ("x=interval(0.5,1)", optuna.distributions.FloatDistribution(0.5, 1)),
        ("x=interval(1,8)", optuna.distributions.FloatDistribution(1, 8)),
        ("x=int(interval(1,8))", optuna.distributions.IntDistribution(1, 8)),
        ("x=tag(log,interval(0.001,1.0))", optuna.distributions.FloatDistribution(0.001, 1, log=True)),
        ("x=range(2,9,3)", optuna.distributions.IntDistribution(2, 8, step=3)),
        ("x=range(9,2,-3)", optuna.distributions.IntDistribution(3, 9, step=3)),
        ("x=range(0.0,1.0,0.25)", optuna.distributions.FloatDistribution(0.0, 0.75, step=0.25)),
    ],
)
def test_what_a_line_may_choose_from(text: str, expected: object) -> None:
    assert of(text) == expected


@pytest.mark.parametrize("returned", [None, "abc", (1.0,), (1.0, 2.0, 3.0), (1.0, float("nan")), 1.0])
def test_a_job_that_returns_something_else_has_failed(returned: object) -> None:
    with pytest.raises(ValueError, match="must return 2 numbers"):
        values_of(returned, 2)


@pytest.mark.slow
def test_a_study_goes_on_in_its_file(tmp_path: Path) -> None:
    study = ("hydra.sweeper.storage=sqlite:///study.db", "hydra.sweeper.study_name=one", "hydra.sweeper.n_jobs=2")
    aims = ("hydra.sweeper.direction=[minimize,maximize]", "hydra/sweeper/sampler=nsgaii")
    line = "x=interval(0.0,10.0)"
    for count in (3, 6):
        done = search(tmp_path, *study, *aims, "hydra.sweeper.n_trials=3", line, "kind=b", "fails_below=0.0")
        assert done.returncode == 0, done.stderr
        trials = optuna.load_study(study_name="one", storage=f"sqlite:///{tmp_path}/study.db").trials
        assert len(trials) == count
    assert all(trial.values == [(trial.params["x"] - 3) ** 2, trial.params["x"]] for trial in trials)
    found = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    best = optuna.load_study(study_name="one", storage=f"sqlite:///{tmp_path}/study.db").best_trials
    assert found.name == "optuna"
    assert sorted(list(one["values"]) for one in found.solutions) == sorted(trial.values for trial in best)
    job = OmegaConf.load(tmp_path / "sweep" / "2" / ".hydra" / "config.yaml")
    assert (job.kind, job.x) == ("b", trials[5].params["x"])


@pytest.mark.slow
def test_failed_trials_are_told_and_end_the_search_beyond_the_rate(tmp_path: Path) -> None:
    study = ("hydra.sweeper.storage=sqlite:///study.db", "hydra.sweeper.study_name=one", "hydra.sweeper.n_trials=4")
    aims = ("hydra.sweeper.direction=[minimize,maximize]", "hydra.sweeper.n_jobs=1", "hydra/sweeper/sampler=random")
    done = search(tmp_path, *study, *aims, "x=choice(1,2)", "fails_below=5")
    assert done.returncode == 1
    assert "too small" in done.stderr
    done = search(tmp_path, *study, *aims, "x=choice(1,2)", "fails_below=5", "hydra.sweeper.max_failure_rate=1.0")
    assert done.returncode == 0, done.stderr
    trials = optuna.load_study(study_name="one", storage=f"sqlite:///{tmp_path}/study.db").trials
    assert [trial.state.name for trial in trials] == ["FAIL"] * 5  # the first search ended at its first


@pytest.mark.slow
def test_a_search_for_small_accurate_networks(tmp_path: Path) -> None:
    done = train(
        tmp_path,
        "--multirun",
        "hydra/sweeper=pareto",
        "hydra.sweeper.n_trials=2",
        "hydra.sweep.dir=sweep",
        "tracking=none",
        "model.width=4",
        "dataset.batch_size=256",
        "trainer.device=cpu",
        "trainer.dense_epochs=1",
        "trainer.prune_epochs=1",
        "trainer.latency_repeats=0",
        "pruner=choice(abs,weighted)",
    )
    assert done.returncode == 0, done.stderr
    found = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    for one in found.solutions:
        assert set(one.params) == {"pruner", "pruner.target_sparsity", "pruner/schedule"}
        assert 0 < one["values"][0] <= 1 < one["values"][1]
    assert (tmp_path / "sweep" / "report.html").is_file()
