"""`--help` says what each value means, as its file or the docstring behind it does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from gsprune.conf.help_text import values

CONF = Path(__file__).parents[2] / "conf"


def told(*overrides: str) -> dict[str, str]:
    """key -> what is said of it, in one line."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        text = values(config, CONF)
    found: dict[str, str] = {}
    for line in text.splitlines():
        if key := re.match(r"([a-z_.0-9]+)=(\S*)\s*(.*)", line):
            found[last := key[1]] = key[3]
        elif line.strip():
            found[last] = f"{found[last]} {line.strip()}".strip()
    return found


@pytest.fixture(scope="module")
def usual() -> dict[str, str]:
    return told()


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("trainer.dense_epochs", "first phase"),  # a comment
        ("model.width", "channels of the first stage"),
        ("cut.calibration", "samples of the training split"),
        ("seed", "initial weights"),
        ("mode", "cut a trained network"),
        ("pruner.target_sparsity", "share of weights or units"),  # a docstring
        ("pruner.schedule.end_epoch", "epoch of the last update"),
        ("pruner.criterion.decay", "d in (0, 1]"),
        ("pruner.criterion.normalize", "divide each structure's scores"),
        ("pruner.budget.macs", "share of the dense network's cost"),  # of the setting that it is a part of
        ("tracking.experiment", "created when missing"),
    ],
)
def test_a_value_says_what_it_means(usual, key, words):
    assert words in usual[key]


def test_values_stand_there_as_a_command_writes_them(usual):
    assert "null takes `MLFLOW_TRACKING_URI`" in usual["tracking.tracking_uri"]
    assert "weighted 0.5, seed 0" in usual["tracking.run_name"]  # not what MLflow does by itself
    assert not [key for key, text in usual.items() if re.search(r"\b(None|True|False)\b", text)]


def test_hardly_any_value_is_without_a_meaning(usual):
    own = {key for key in usual if not usual[key] and "keep." not in key and "budget." not in key}
    assert own <= {"dataset.device", "model.image_size", "model.in_channels", "model.num_classes"}


def test_it_is_of_the_choices_that_were_made():
    found = told("model=vit_tiny", "optimizer=adamw", "pruner=platon")
    assert "running averages" in found["optimizer.betas"]
    assert "optimizer.momentum" not in found
    assert "patch_size" in " ".join(found)
