"""The dense stage: ordinary training, and the accuracy of the network before it is pruned.

It is skipped where the network is on disk: beside a checkpoint of the pruning phase, or in the sweep's dense cache.
"""

from __future__ import annotations

import os
import time

from torch import __version__ as torch_version

from gsprune.app.stages.checkpoint import DENSE, Dense, JobCheckpoints, Phase
from gsprune.app.stages.context import load_or_compute
from gsprune.app.stages.lifecycle import save_model
from gsprune.app.stages.setup import load_tensors, load_weights
from gsprune.app.stages.training import Training
from gsprune.formats.tensors import state_tensors
from gsprune.pruner.pruner import Pruner
from gsprune.settings.identity import dense_key
from gsprune.structures.twin import copy_of
from gsprune.sweeps.dense_cache import DenseCache, DenseRecord
from gsprune.text.display import logger

log = logger(__name__)


def train_dense(training: Training) -> Dense:
    """The dense network, trained here unless it is on disk; the job's model has its weights."""
    stage = _DenseStage(training)
    dense = stage.restore() if training.checkpoints.resumes("prune") else stage.load_or_train()
    training.checkpoints.dense = dense
    pruner = Pruner(training.setup.model, rules=[])
    training.job.save_model = lambda: save_model(training.job, training.setup.model, pruner)
    return dense


class _DenseStage:
    def __init__(self, training: Training) -> None:
        self._training, self._job, self._setup = training, training.job, training.setup
        self._checkpoints: JobCheckpoints = training.checkpoints

    def restore(self) -> Dense:
        """The dense network that belongs to the checkpoint."""
        assert self._checkpoints.saved is not None
        path, state = self._checkpoints.saved
        saved, weights, model = state["job"], state.get("dense_model"), self._setup.model
        if weights is None:
            load_weights(model, path.parents[1] / DENSE)  # in the first process's directory
        else:
            load_tensors(model, weights, f"the dense network in {path}")
        dense = Dense(copy_of(model).cpu(), saved["dense_val"], sha256=state["dense"])
        if weights is not None:
            dense.save(self._job)
        self._job.result |= {**saved["baseline"], "dense": saved["dense_note"]}
        return dense

    def load_or_train(self) -> Dense:
        """Jobs of a sweep that want the same network train it once."""
        began, cache = time.perf_counter(), self._cache()
        record, found = load_or_compute(
            lambda: self._load(cache) if cache else None,
            self._train,
            lambda record: self._store(cache, record) if cache else None,
            lock=cache.held() if cache else None,
        )
        if found:
            self._training.history.replay(record.epochs)
        if cache:
            own = record.config_hash == self._job.result["config_hash"]  # killed right after it had trained it
            source = "cache" if found and not own else "trained"
            self._record_source(record, key=cache.key, source=source, seconds=time.perf_counter() - began)
        self._job.result |= {f"baseline_{name}": value for name, value in record.baseline.items()}
        dense = Dense(copy_of(self._setup.model).cpu(), record.baseline["val_accuracy"], cache)
        dense.save(self._job)
        return dense

    def _cache(self) -> DenseCache | None:
        """Of this job's dense network; None outside a sweep, or if nothing is to be trained."""
        trainer = self._setup.trainer
        if self._job.sweep is None or not trainer.dense_cache or trainer.dense_epochs == 0:
            return None
        key = dense_key(self._job.cfg, torch=torch_version, device=trainer.torch_device.type)
        return DenseCache(self._job.sweep, key)

    def _load(self, cache: DenseCache) -> DenseRecord | None:
        """The record of a network that another job has trained, with its weights in the model; None: none usable."""
        record = cache.find()
        if record is None:
            return None
        try:
            load_weights(self._setup.model, cache.weights)
        except ValueError as error:
            cache.is_readable = False  # though it is whole
            log.warning("the dense network is trained again: %s", error)
            return None
        log.info("the dense network is that of job %s, trained there in %.1f s", record.job, record.train_seconds)
        return record

    def _train(self) -> DenseRecord:
        began, setup, job = time.perf_counter(), self._setup, self._job
        setup.seed(0)  # whatever the check of the pruning phase has drawn
        epochs = setup.trainer.dense_epochs
        self._training.run(
            Phase("dense", epochs, 0, *setup.build_optimizer(epochs=epochs), pruner=Pruner(setup.model, rules=[]))
        )
        with job.watch.part("measure"):
            baseline = setup.trainer.evaluate(setup.model, setup.data.test)
            baseline["val_accuracy"] = setup.trainer.evaluate(setup.model, setup.data.val)["accuracy"]
        name = job.sweep.name_of(job.folder) if job.sweep else ""
        mine, seconds = job.result["config_hash"], time.perf_counter() - began
        return DenseRecord(baseline, self._training.history.rows, job.tracker.run_id, name, mine, seconds)

    def _store(self, cache: DenseCache, record: DenseRecord) -> None:
        tensors = state_tensors(self._setup.model)[0]
        self._job.writer.write(os.path.relpath(cache.folder, self._job.folder), lambda: cache.store(tensors, record))

    def _record_source(self, record: DenseRecord, *, key: str, source: str, seconds: float) -> None:
        """Who has trained the network, in the result and the tracker."""
        assert self._job.sweep is not None
        job = record.job if source == "trained" else self._job.sweep.folder_of(record.job, record.config_hash)
        origin = {"key": key, "source": source, "run_id": record.run_id, "job": job}
        self._job.result["dense"] = {**origin, "train_seconds": record.train_seconds, "seconds": seconds}
        noted = {f"dense.{name}": value for name, value in origin.items() if value is not None}
        with self._job.watch.part("tracking"):
            self._job.tracker.log_params(noted)
            self._job.tracker.log_tags(noted)
