"""The scoring and the pruning stage.

Scoring is skipped where a file of scores is given or in the sweep's dense cache, and where pruning has begun already.
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from gsprune.app.stages.checkpoint import Dense, Phase
from gsprune.app.stages.context import load_or_compute
from gsprune.app.stages.lifecycle import save_model
from gsprune.app.stages.measuring import is_guessing
from gsprune.app.stages.setup import Setup
from gsprune.app.stages.training import Training
from gsprune.formats.scores import save_scores
from gsprune.settings.identity import SCORES, scores_key
from gsprune.sweeps.dense_cache import DenseCache
from gsprune.text.display import logger, percent

log = logger(__name__)


def build_pruning_phase(training: Training, dense: Dense) -> Phase:
    """Optimizer, learning-rate schedule and pruner of the second phase, on the dense network, and its teacher."""
    job, setup = training.job, training.setup
    optimizer, lr_schedule, pruner = setup.build_pruning()
    job.save_model = lambda: save_model(job, setup.model, pruner)
    epochs, offset = setup.trainer.prune_epochs, setup.trainer.dense_epochs
    return Phase("prune", epochs, offset, optimizer, lr_schedule, pruner, teacher_of(setup, dense))


def teacher_of(setup: Setup, dense: Dense) -> nn.Module | None:
    """The dense network on the device, where `trainer.distill` asks for it; as of `check_trained`."""
    if not setup.trainer.distill:
        return None
    check_trained(setup, dense, why=f"the teacher of trainer.distill={setup.trainer.distill}")
    return dense.model.to(setup.trainer.torch_device)


def check_trained(setup: Setup, dense: Dense, *, why: str) -> None:
    """Refuse a dense network that was not trained here and is no better than guessing; warn of one that was.

    Args:
        why: what it is needed as.
    """
    samples, accuracy = len(getattr(setup.data.val, "dataset", ())), dense.val_accuracy or 0.0
    if is_guessing(accuracy, samples=samples, classes=setup.classes):
        what = (
            f"the dense network, {why}, has a validation accuracy of {percent(accuracy)}, no better than guessing "
            f"among {setup.classes} classes"
        )
        if setup.trainer.dense_epochs == 0:
            raise ValueError(f"{what}: give a trained one with model.weights, or trainer.dense_epochs")
        log.warning("%s", what)


def score(training: Training, phase: Phase, dense: Dense) -> None:
    """Give the pruner the scores that it begins with: given ones, or those of the dense network."""
    pruner, job, trainer = phase.pruner, training.job, training.setup.trainer
    given = job.cfg.pruner.get("scores")
    wanted = trainer.dense_scores and trainer.prune_epochs > 0
    if training.checkpoints.resumes("prune") or pruner.horizon == 0 or not (given or wanted):
        return
    steps = _steps(training, pruner)
    if not given:
        _score_dense(training, phase, dense.cache, steps)
    scores, criterion = pruner.scores(), pruner.criterion_name  # of now, also when they are written later
    job.writer.write_or_retry(
        SCORES, lambda: save_scores(job.folder / SCORES, scores, criterion=criterion, steps=steps)
    )
    with job.watch.part("tracking"):
        job.track_file(SCORES, folder="checkpoint")


def _score_dense(training: Training, phase: Phase, cache: DenseCache | None, steps: int) -> None:
    """Score the dense network; jobs of a sweep with the same network and criterion do it once."""
    job, setup, pruner = training.job, training.setup, phase.pruner
    key = scores_key(job.cfg)

    def load() -> bool | None:
        if cache is None or not cache.has_scores(key):
            return None
        try:
            pruner.load_scores(cache.scores(key))
        except ValueError as error:
            log.warning("the dense network is scored again: %s", error)
            return None
        return True

    def compute() -> bool:
        setup.seed(2)
        with job.watch.part("train"):
            setup.trainer.score(setup.model, setup.data.train, optimizer=phase.optimizer, pruner=pruner, steps=steps)
        return True

    def store(_: bool) -> None:
        if cache is not None:
            path = cache.scores(key)
            job.writer.write(os.path.relpath(path, job.folder), lambda: _save_in_cache(cache, key, pruner, steps))

    load_or_compute(load, compute, store, lock=cache.held(key) if cache else None)


def _save_in_cache(cache: DenseCache, key: str, pruner: Any, steps: int) -> None:
    save_scores(cache.scores(key), pruner.scores(), criterion=pruner.criterion_name, steps=steps)
    cache.seal_scores(key)


def _steps(training: Training, pruner: Any) -> int:
    """As many as a running score remembers, one epoch at most."""
    per_epoch = training.setup.steps_per_epoch
    return min(per_epoch, pruner.horizon or per_epoch)


def prune(training: Training, phase: Phase) -> None:
    """Train with the pruner's hooks; at the end the final masks are set, and a structured model is smaller."""
    training.setup.seed(1)  # a dense network from a file continues exactly like one trained here
    training.run(phase)
    training.history.record_masks(training.setup.epochs, phase.pruner)
