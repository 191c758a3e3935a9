"""What Hydra refuses of a command, told as what was meant."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from facts import assert_tells
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode

from gsprune.settings import refusals
from gsprune.settings.instantiation import main_arguments

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def told() -> Iterator[Callable[..., str | None]]:
    """What is said of a command that Hydra refuses."""
    conf = ROOT / "conf"
    version = {name: value for name, value in main_arguments(conf).items() if name == "version_base"}
    with initialize_config_dir(str(conf), **version):
        loader = GlobalHydra.instance().config_loader()

        def of(*overrides: str) -> str | None:
            with pytest.raises(HydraException) as caught:
                loader.load_configuration("config", list(overrides), RunMode.RUN)
            return refusals.explained(caught.value, overrides, loader)

        yield of


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("pruner.target_sparsty=0.5", "pruner.target_sparsity?"),
        ("prunner=abs", "pruner?"),
        ("prunner.keep.heads=2", "pruner.keep.heads?"),
        ("pruner.keep.head=2", "pruner.keep.heads?"),
        ("trainer.dense_epoch=1", "trainer.dense_epochs?"),
        ("pruner/schedul=cubic", "pruner/schedule?"),
        ("lr=0.1", "optimizer.lr"),
        ("~seeed", "seed?"),
        ("pruner=weigthed", "pruner=weighted?"),
        ("pruner/schedule=cubicc", "pruner/schedule=cubic?"),
    ],
)
def test_a_misspelt_name_leads_to_what_it_meant(told, override, meant):
    found = told(override, "tracking=none")
    assert_tells(found, override.lstrip("~").partition("=")[0], f"did you mean {meant}")
    assert "+" not in found  # Hydra's advice, which would make a setting that nothing reads


def test_a_name_is_looked_for_in_the_choices_that_were_made(told):
    assert_tells(told("model=vit_tiny", "model.deph=3"), "did you mean model.depth?")
    assert_tells(told("model.deph=3"), "model has", "width")  # a convnet has no depth


def test_a_name_that_is_like_no_other_gets_what_there_is(told):
    assert_tells(told("trainer.xyz=1"), "trainer.xyz", "trainer has dense_epochs, prune_epochs")
    assert_tells(told("dataset.xyz=1"), "dataset has builder, image_size", "+dataset.xyz=")


def test_values_of_another_type_and_forgotten_multirun(told):
    assert_tells(told("trainer.dense_epochs=abc"), "trainer.dense_epochs=abc", "Integer")
    assert_tells(told("seed=1,2"), "seed=1,2", "--multirun", "seed=[1,2]")


def test_settings_of_hydra_are_left_to_hydra(told):
    assert told("hydra.run.dirr=x") is None  # Hydra's own words


def test_a_directory_that_cannot_be_made_is_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")

    def main() -> None:
        (tmp_path / "file" / "run").mkdir()

    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    assert refusals.run_command(main, ROOT / "conf") == 1
    assert_tells(capsys.readouterr().err.splitlines()[0], tmp_path / "file" / "run", "not a directory", "hydra.run.dir")


@pytest.mark.parametrize("full", ["0", "1"])
def test_multirun_may_stand_between_overrides(monkeypatch, full):
    seen = []
    monkeypatch.setenv("HYDRA_FULL_ERROR", full)
    monkeypatch.setattr(sys, "argv", ["train.py", "pruner=abs", "--multirun", "seed=0,1"])
    assert refusals.run_command(lambda: seen.extend(sys.argv), ROOT / "conf") == 0
    assert seen == ["train.py", "--multirun", "pruner=abs", "seed=0,1"]


def test_an_error_of_ours_keeps_its_traceback(monkeypatch, capsys):
    def main() -> None:
        raise KeyError("a fault")

    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    assert refusals.run_command(main, ROOT / "conf") == 1
    text = capsys.readouterr().err
    assert text.startswith("Traceback")
    assert "KeyError: 'a fault'" in text
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(KeyError):
        refusals.run_command(main, ROOT / "conf")
