"""What the composed configuration says: objects, the objective of a sweep, names and tags."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from facts import refused
from jobs import configure
from omegaconf import OmegaConf
from torch import nn

from gsprune.app.configuration import (
    NUMBERS,
    build,
    check_fit,
    check_objective,
    complete,
    hydra_tags,
    objective,
    run_name,
)
from gsprune.training.optimization import make_optimizer
from gsprune.training.trainer import Trainer

SGD = {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.05, "momentum": 0.9}
ADAMW = {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-3, "betas": [0.9, 0.999]}
DATA = {
    "_target_": "gsprune.zoo.datasets.make_loaders",
    "builder": {"_target_": "gsprune.zoo.datasets.digits", "_partial_": True},
    "batch_size": 64,
}
PRUNER = {
    "_target_": "gsprune.Pruner",
    "_partial_": True,
    "_convert_": "all",
    "criterion": {"_target_": "gsprune.criteria.Weighted", "decay": 0.95},
    "target_sparsity": 0.5,
    "min_kept": 1,
}


def test_outside_of_hydra_there_are_no_hydra_tags():
    assert hydra_tags() == {}


def test_objective_is_one_number_or_several():
    result = {"accuracy": 0.9, "macs": 12}
    assert objective(result, "macs") == 12.0
    assert objective(result, ["accuracy", "macs"]) == (0.9, 12.0)


def test_a_wrong_objective_lists_what_there_is():
    with pytest.raises(ValueError) as error:  # noqa: PT011
        check_objective("acuracy", Trainer(device="cpu"))
    assert str(error.value) == (
        "objective=acuracy is not in the result: did you mean accuracy? There are " + ", ".join(NUMBERS)
    )
    with pytest.raises(ValueError, match=r"objective=latency_ms is not measured with trainer.latency_repeats=0"):
        check_objective(["accuracy", "latency_ms"], Trainer(device="cpu", latency_repeats=0))
    check_objective(["accuracy", "latency_ms"], Trainer(device="cpu"))


def test_a_job_outside_hydra_has_no_name_of_its_own():
    assert run_name(configure()) is None


@pytest.mark.parametrize(
    ("group", "node", "facts"),
    [
        ("optimizer", {**SGD, "lr": -1}, ("optimizer.lr=-1", "learning rate")),
        ("optimizer", {**SGD, "momentum": -0.5}, ("optimizer.momentum=-0.5",)),
        ("optimizer", {**ADAMW, "betas": [1.5, 0.9]}, ("optimizer.betas=[1.5,0.9]",)),
        ("optimizer", {**SGD, "foo": 3}, ("optimizer.foo", "is not a setting")),
        ("optimizer", {**SGD, "momentun": 0.9}, ("optimizer.momentun", "did you mean optimizer.momentum?")),
        ("dataset", {**DATA, "batch_size": 0}, ("dataset.batch_size is 0",)),
        ("dataset", {**DATA, "batch_size": "abc"}, ("dataset.batch_size=abc",)),
        ("pruner", {**PRUNER, "min_kept": 0}, ("pruner.min_kept is 0",)),
        ("pruner", {**PRUNER, "criterion": {**PRUNER["criterion"], "decay": 2}}, ("pruner.criterion.decay is 2",)),
        ("pruner", {**PRUNER, "include": ["nothing"]}, ("pruner.include", "'nothing'")),
    ],
)
def test_a_bad_value_names_its_setting(group: str, node: dict[str, Any], facts: tuple[str, ...]) -> None:
    config = OmegaConf.create({group: node})[group]
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with refused(*facts):
        made = build(config)
        if group == "optimizer":
            complete(config, make_optimizer, made, model)
        else:
            complete(config, made, model, example_input=torch.ones(1, 4))


def test_rules_are_named_by_their_number() -> None:
    rule = {"_target_": "gsprune.Rule", "criterion": PRUNER["criterion"], "target_sparsity": 3.0}
    node = {"_target_": "gsprune.Pruner", "_partial_": True, "_convert_": "all", "rules": [rule]}
    with refused("pruner.rules.0.target_sparsity is 3.0"):
        config = OmegaConf.create({"pruner": node}).pruner
        complete(config, build(config), nn.Linear(4, 4), example_input=torch.ones(1, 4))


def test_what_does_not_fit_says_what_is_lacking() -> None:
    config = OmegaConf.create(
        {"dataset": {"tokenizer": "${model.name}", "classes": 2}, "model": {"classes": "${dataset.classes}"}}
    )
    with refused("model does not fit dataset", "there is no model.name"):
        check_fit(config)
    config.model.name = "bert"
    check_fit(config)
