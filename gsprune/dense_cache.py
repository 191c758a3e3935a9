"""Dense networks that several jobs of a sweep start from: each trained once and scored once.

An entry is a folder of the sweep's `dense_cache/`, named by a hash of everything that training it depends on
(`identity.dense_key`). Its files are written whole, `dense.json` last, under a lock that the system frees when a job
dies; a damaged entry is made anew. Imports the sweep's locks and the file formats.

    dense.safetensors              the network
    dense.json                     its accuracy, the metrics of its epochs, who trained it and how long that took
    scores-<key>.safetensors       the scores of one criterion on it (`identity.scores_key`)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

from safetensors.torch import save
from torch import Tensor

from gsprune import distributed
from gsprune.files import number, read_json, write_atomic, write_json
from gsprune.shown import logger
from gsprune.sweep import Sweep

__all__ = ["DenseCache", "DenseRecord"]

log = logger(__name__)
BASELINE = ("accuracy", "loss", "val_accuracy")  # what is measured of a dense network


@dataclass(frozen=True)
class DenseRecord:
    """What is known of a dense network besides its weights.

    Attributes:
        baseline: "accuracy" and "loss" on the test split, "val_accuracy" on the validation split.
        epochs: the metrics of each epoch of its training.
        run_id, job, config_hash: the MLflow run, the folder in the sweep (at that time) and the configuration of the
            job that trained it.
        train_seconds: how long that took.
    """

    baseline: Mapping[str, float]
    epochs: Sequence[Mapping[str, float]]
    run_id: str | None
    job: str
    config_hash: str
    train_seconds: float


class DenseCache:
    """The entry of one dense network in a sweep; to be read and written while it is `held`."""

    def __init__(self, sweep: Sweep, key: str) -> None:
        self.key, self._sweep = key, sweep
        self.folder = sweep.directory / "dense_cache" / key[:16]
        self.weights = self.folder / "dense.safetensors"

    def held(self, scores: str = "") -> AbstractContextManager[None]:
        """Keep the other jobs that want this network (or these scores of it) waiting while one makes them."""
        verb = "scores" if scores else "trains"
        name = f"dense {self.key[:16]} {scores[:16]}".rstrip()
        return distributed.held(self._sweep.lock(name), waiting_for=f"that {verb} the same dense network")

    def find(self) -> DenseRecord | None:
        """The entry's record, or None if there is no whole one."""
        path = self.folder / "dense.json"
        if not path.is_file():
            return None
        try:
            return _record(read_json(path), self.key)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError) as error:
            log.warning("the dense network in %s is not used, it is trained again: %s", self.folder, error)
            return None

    def store(self, tensors: Mapping[str, Tensor], record: DenseRecord) -> None:
        write_atomic(self.weights, save(dict(tensors)))
        write_json(self.folder / "dense.json", {"key": self.key, **asdict(record)})

    def scores(self, key: str) -> Path:
        """Where the scores with that key are, or are to be put."""
        return self.folder / f"scores-{key[:16]}.safetensors"


def _record(found: Any, key: str) -> DenseRecord:
    if found["key"] != key:
        raise ValueError("its key is another")
    numbers = {name: float(found["baseline"][name]) for name in BASELINE}
    epochs = [{str(name): number(value) for name, value in row.items()} for row in found["epochs"]]
    costs = [row[name] for row in epochs for name in ("params", "macs")]
    if not costs or not all(type(cost) is int and cost >= 0 for cost in costs):
        raise ValueError("its epochs do not say what the network costs")
    run_id = found["run_id"] if isinstance(found["run_id"], str) else None
    job, config_hash = str(found["job"]), str(found["config_hash"])
    if PurePath(job).is_absolute() or ".." in PurePath(job).parts or "\0" in job or len(job) > 255:
        raise ValueError("its job is not a folder of the sweep")
    return DenseRecord(numbers, epochs, run_id, job, config_hash, float(found["train_seconds"]))
