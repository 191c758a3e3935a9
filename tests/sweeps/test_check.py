"""All jobs of a sweep are composed and checked before the first one trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict, read_write

from gsprune.app.job import rehearse
from gsprune.sweeps.check import check_jobs

ROOT = Path(__file__).parents[2]
TINY = ["tracking=none", "model.width=4", "dataset.batch_size=256", "trainer.device=cpu", "trainer.latency_repeats=0"]


@pytest.fixture
def swept() -> Iterator[object]:
    """`swept("seed=0,1")` is what a callback is given at the start of that sweep."""

    def config(*overrides: str, sweeper: str = "basic", launcher: str = "basic") -> DictConfig:
        groups = [f"hydra/sweeper={sweeper}", f"hydra/launcher={launcher}"]
        made = compose("config", overrides=groups, return_hydra_config=True)
        with read_write(made.hydra), open_dict(made.hydra):
            made.hydra.mode = "MULTIRUN"
            made.hydra.overrides.task = [*overrides, *TINY]
        return made

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield config


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        (["pruner=weighted,weightd"], {1: "weightd"}),
        (["pruner=elementwise", "pruner.pattern=1x1,2:3:4"], {1: "2:3:4"}),
        (["pruner.target_sparsity=0.5,1.5", "seed=0,1"], {2: "1.5", 3: "1.5"}),
        (["pruner.min_kept=1,0"], {1: "min_kept"}),
        (["trainer.precision=fp32,fp8"], {1: "precision=fp8"}),
        (["trainer.dense_epochs=1,-1"], {1: "dense_epochs=-1"}),
        (["seed=0,x,1"], {1: "seed=x"}),
        (["objective=accuracy,acuracy"], {1: "acuracy"}),
        (["pruner.criterion._target_=gsprune.criteria.Weighted,gsprune.criteria.Weightd"], {1: "Weightd"}),
        (["pruner.exclude=[],[nothing_of_that_name]"], {1: "nothing_of_that_name"}),
        (["model.num_classes=10,3"], {1: "num_classes"}),
        (["optimizer.lr=0.1,-1"], {1: "learning rate: -1"}),
        (["pruner.scores=null,nowhere.safetensors"], {}),  # may be an id: the job looks
        (["plan=true,maybe"], {1: "plan=maybe"}),
        (["pruner.sparsityy=0.5,0.6"], {0: "sparsityy", 1: "sparsityy"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_job_that_cannot_run_is_known_before(overrides: list[str], refused: dict[int, str], swept) -> None:
    checked = check_jobs(swept(*overrides), rehearse)
    assert checked.refused.keys() == refused.keys(), checked.refused
    for number, word in refused.items():
        assert word in checked.refused[number]
        assert "\n" not in checked.refused[number]
    assert not HydraConfig.initialized()


def test_jobs_that_run_elsewhere_are_checked_without_device_and_data(swept) -> None:
    data = ("dataset=imagefolder", "dataset.path=/only/there", "dataset.num_classes=10")
    jobs = (*data, "pruner.min_kept=0,1", "trainer.device=cuda:77")
    assert set(check_jobs(swept(*jobs), rehearse).refused) == {0, 1}  # here there is no such device
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    config = swept(*jobs, launcher="submitit_slurm")
    assert check_jobs(config, rehearse).refused == {}
    config.hydra.overrides.task.append("trainer.precision=fp8")
    assert set(check_jobs(config, rehearse).refused) == {0, 1}


def test_jobs_that_differ_in_their_seed_are_checked_once_and_only_that_way(swept) -> None:
    seen = []
    checked = check_jobs(swept("seed=0,1,2", "pruner=abs,none"), lambda cfg, here: seen.append((cfg.seed, here)))
    assert (len(checked.jobs or ()), checked.refused) == (6, {})
    assert seen == [(0, True), (0, True)]


def test_an_error_that_is_no_mistake_of_the_user_is_left_to_the_job(swept) -> None:
    def broken(cfg: DictConfig, here: bool) -> None:
        raise RuntimeError("no network just now")

    assert check_jobs(swept("seed=0,1"), broken).refused == {}
