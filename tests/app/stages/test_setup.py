"""The first stage of a job: weights from a file, a network that fits the data, what the pruner is built with."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch
from jobs import configure, finished
from safetensors.torch import save_file
from torch import nn

from gsprune.app.configuration import build
from gsprune.app.job import load_weights
from gsprune.app.stages import setup
from gsprune.app.stages.context import Context
from gsprune.sweeps.sweep_dir import Sweep


@pytest.mark.slow
def test_steps_per_epoch_given_to_the_pruner_are_optimizer_steps(tmp_path, monkeypatch):
    given = {}
    real = setup.build

    def recorded(node, **kwargs):
        made = real(node, **kwargs)
        if "criterion" not in node:
            return made
        return lambda *args, **settings: (given.update(settings), made(*args, **settings))[1]

    monkeypatch.setattr(setup, "build", recorded)
    finished(tmp_path, "dataset.batch_size=128", "trainer.accumulate_steps=4")
    samples = len(build(configure().dataset).train.dataset)
    assert given["steps_per_epoch"] == math.ceil(math.ceil(samples / 128) / 4)
    assert given["epochs"] == 2
    assert given["example_input"].shape == (1, 1, 8, 8)


def test_weights_of_a_file_are_loaded_and_ties_need_one_name(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    model, path = Tied(), tmp_path / "w.safetensors"
    save_file({"a.weight": torch.arange(9.0).reshape(3, 3)}, path)
    load_weights(model, path)
    assert model.b.weight[2].tolist() == [6, 7, 8]
    assert model.b.weight is model.a.weight


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.ones(2, 3)}, "the file has no tensor 'bias'"),
        (
            {"weight": torch.ones(2, 3), "bias": torch.ones(2), "extra": torch.ones(1)},
            "the model has no tensor 'extra'",
        ),
        (
            {"weight": torch.ones(3, 3), "bias": torch.ones(2)},
            "'weight' has shape [3, 3] in the file but [2, 3] in the model",
        ),
    ],
)
def test_weights_that_do_not_fit_name_the_first_tensor(tmp_path, tensors, message):
    path = tmp_path / "w.safetensors"
    save_file(tensors, path)
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_weights(model, path)
    assert str(error.value) == f"model.weights={path} does not fit the model: {message}"
    assert torch.equal(model.weight, before)


def test_weights_from_nowhere_or_of_another_kind(tmp_path):
    path = tmp_path / "w.pt"
    with pytest.raises(ValueError, match="does not exist"):
        load_weights(nn.Linear(1, 1), path)
    torch.save({}, path)
    with pytest.raises(ValueError, match=r"w.pt is not a safetensors file"):
        load_weights(nn.Linear(1, 1), path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_classes=7", "the model has 7 outputs, and the data has 10 classes: set model.num_classes=10"),
        ("model.in_channels=3", "the model does not run on the data: RuntimeError: "),
    ],
)
def test_a_model_that_does_not_fit_the_data_ends_before_any_work(override, message, tmp_path):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        finished(tmp_path, override, "pruner=elementwise")


def test_the_control_of_a_sweep_takes_what_others_are_swept_over_without_a_word(tmp_path, monkeypatch):
    given = setup.set_up(Context(configure("pruner=none", "pruner.target_sparsity=0.5"), tmp_path))
    with pytest.warns(UserWarning, match="target_sparsity=0.5 has no effect"):
        given.build_pruning()
    monkeypatch.setattr(setup, "current_sweep", lambda: Sweep(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert given.build_pruning()[2].parts == []
