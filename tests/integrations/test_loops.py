"""The same network, data order and rules in six loops: masks and weights are the same to the last bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import partner_loops
import pytest
import torch
from facts import refused
from partner_loops import (
    CASES,
    EPOCHS,
    STEPS,
    Result,
    accelerated,
    attached,
    by_hooks,
    by_lightning,
    by_trainer,
    settings,
)

SHRINKS = pytest.mark.parametrize("shrink", ["at_end", "each_update"])
expected = cache(by_hooks)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Partners' own warnings are theirs."""
    before = torch.get_rng_state()
    yield
    torch.set_rng_state(before)


def assert_same(found: Result | None, wanted: Result) -> None:
    assert found is not None
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@SHRINKS
def test_a_plain_loop(shrink: str) -> None:
    assert_same(attached(shrink), expected(shrink))
    assert expected(shrink)["first.weight"].shape == (6, 6)


@SHRINKS
def test_accelerate_also_after_a_kill(shrink: str, tmp_path: Path) -> None:
    assert_same(accelerated(shrink, tmp_path / "whole"), expected(shrink))
    assert accelerated(shrink, tmp_path / "killed", stop=2) is None
    assert_same(accelerated(shrink, tmp_path / "killed", resume=True), expected(shrink))


@SHRINKS
def test_transformers_also_after_a_kill_in_the_middle_of_an_epoch(shrink: str, tmp_path: Path) -> None:
    found, _ = by_trainer(shrink, tmp_path)
    assert_same(found, expected(shrink))
    for step in (2 * STEPS, STEPS + 2):
        found, _ = by_trainer(shrink, tmp_path, resume=str(tmp_path / f"checkpoint-{step}"))
        assert_same(found, expected(shrink))


@SHRINKS
def test_lightning_also_after_a_kill(shrink: str, tmp_path: Path) -> None:
    found, trainer = by_lightning(shrink, tmp_path)
    assert_same(found, expected(shrink))
    assert trainer.callback_metrics["sparsity"] == 0.5
    for epoch in range(EPOCHS - 1):
        found, _ = by_lightning(shrink, tmp_path / "again", resume=tmp_path / f"epoch={epoch}.ckpt")
        assert_same(found, expected(shrink))


@pytest.mark.long
def test_two_processes_of_torchrun_also_after_a_kill(tmp_path: Path) -> None:
    """With the whole batch in both, the mean of two equal gradients is that gradient; with halves, they agree."""

    def torchrun(*words: str) -> int:
        script = Path(partner_loops.__file__)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        path = os.pathsep.join(filter(None, [str(script.parents[1]), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, str(script), str(tmp_path), *words], env=env, capture_output=True, check=False)
        return done.returncode

    assert torchrun() != 0  # killed
    assert torchrun("resume") == 0
    found = {
        (name, rank): torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
        for name in ("whole", "resumed")
        for rank in (0, 1)
    }
    for case in CASES:
        shrink, split = case
        whole, resumed = ([found[name, rank][case] for rank in (0, 1)] for name in ("whole", "resumed"))
        assert_same(resumed[0], whole[0])
        if not split:
            for one in (*whole, resumed[1]):
                assert_same(one, expected(shrink))
        # a BatchNorm sees the samples of its process, and DistributedDataParallel takes over those of the first
        both = [{k: v for k, v in one.items() if "running" not in k} for one in (whole[0], whole[1], resumed[1])]
        assert_same(both[1], both[0])
        assert_same(both[2], both[0])
        assert both[0]["first.weight"].shape == (6, 6)


@SHRINKS
def test_lightning_by_hand_with_two_optimizers(shrink: str, tmp_path: Path) -> None:
    found, _ = by_lightning(shrink, tmp_path, manual=True)
    assert_same(found, expected(shrink))


@SHRINKS
def test_lightning_averages_are_cut_along(shrink: str, tmp_path: Path) -> None:
    if not hasattr(pytest.importorskip("lightning.pytorch.callbacks"), "WeightAveraging"):
        pytest.skip("Lightning has it from 2.6 on")
    found, trainer = by_lightning(shrink, tmp_path, averages=True)
    average = trainer.callbacks[0]._average_model.module.net
    assert average.first.weight.shape == found["first.weight"].shape == (6, 6)
    assert torch.equal(average.first.weight, found["first.weight"])  # Lightning copies the average into the model
    again, _ = by_lightning(shrink, tmp_path / "again", averages=True, resume=tmp_path / "epoch=1.ckpt")
    assert_same(again, found)


def test_accumulation_clipping_and_bf16_of_lightning(tmp_path: Path) -> None:
    other = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "precision": "bf16-mixed"}
    found, _ = by_lightning("each_update", tmp_path, **other)
    again, _ = by_lightning("each_update", tmp_path / "again", resume=tmp_path / "epoch=1.ckpt", **other)
    assert_same(again, found)
    assert found["first.weight"].shape == (6, 6)


def test_accumulation_clipping_adafactor_and_bf16_of_transformers(tmp_path: Path) -> None:
    other = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "bf16": True, "optim": "adafactor"}
    found, trainer = by_trainer("at_end", tmp_path, **other)
    assert trainer.state.global_step == EPOCHS * STEPS // 2
    again, _ = by_trainer("at_end", tmp_path, resume=str(tmp_path / "checkpoint-4"), **other)
    assert_same(again, found)


def test_the_best_model_of_transformers_is_masked_again(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    with refused("load_best_model_at_end", "each_update"):
        by_trainer("each_update", tmp_path, **best)
    found, trainer = by_trainer("at_end", tmp_path, **best)
    assert trainer.state.best_model_checkpoint is not None
    assert found["first.weight"].shape == (6, 6)


def test_checkpoints_without_a_pruner_are_refused(tmp_path: Path) -> None:
    by_trainer("at_end", tmp_path)
    (tmp_path / "checkpoint-4" / "pruner.pt").unlink()
    with refused("checkpoint-4", "pruner.pt"):
        by_trainer("at_end", tmp_path, resume=str(tmp_path / "checkpoint-4"))


def test_what_the_loop_knows_is_not_given() -> None:
    from gsprune.integrations.lightning import PruningCallback

    with refused("steps_per_epoch", "PruningCallback"):
        PruningCallback(steps_per_epoch=3)


def test_a_search_over_hyperparameters_is_refused() -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from gsprune.integrations.transformers import PruningCallback

    with refused("hyperparameter_search", "PruningCallback"):
        callback = PruningCallback(**settings("at_end"))
        callback.on_train_begin(
            TrainingArguments(use_cpu=True), TrainerState(is_hyper_param_search=True), TrainerControl()
        )


def test_a_callback_prunes_one_network(tmp_path: Path) -> None:
    _, trainer = by_trainer("at_end", tmp_path)
    with refused("has pruned a network already"):
        trainer.train()
