"""Dense networks that several jobs of a sweep start from: each is trained once and scored once.

An entry is a folder of the sweep's `dense_cache/`, named by a hash of everything that its training depends on
(`identity.dense_key`). Its files are written whole, `dense.json` last, under a lock that the system frees when a job
dies. A sha256 proves that the tensors are those written. A damaged entry is set aside (`damaged-<key>`) and made again;
an entry that cannot be read at the moment stays as it is, and the job trains its own network.

    dense.safetensors              the network
    dense.json                     its sha256, accuracy, metrics of each epoch, which job trained it and for how long
    scores-<key>.safetensors       the scores of one criterion on it (`identity.scores_key`)
    scores-<key>.json              their sha256
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

from safetensors.torch import save
from torch import Tensor

from gsprune import collectives
from gsprune.files.disk import Damaged, number, put_aside, read_json, read_object, sha256, write_atomic, write_json
from gsprune.sweeps.sweep_dir import Sweep
from gsprune.text.display import logger

__all__ = ["DenseCache", "DenseRecord"]

log = logger(__name__)
BASELINE = ("accuracy", "loss", "val_accuracy")  # the measurements of a dense network


@dataclass(frozen=True)
class DenseRecord:
    """A dense network without its weights.

    Attributes:
        baseline: "accuracy" and "loss" on the test split, "val_accuracy" on the validation split.
        epochs: the metrics of each epoch of its training.
        run_id, job, config_hash: the MLflow run, the folder in the sweep (at that time) and the configuration of the
            job that trained it.
        train_seconds: the time that its training took.
    """

    baseline: Mapping[str, float]
    epochs: Sequence[Mapping[str, float]]
    run_id: str | None
    job: str
    config_hash: str
    train_seconds: float


class DenseCache:
    """The entry of one dense network in a sweep; read and write it only while it is `held`."""

    def __init__(self, sweep: Sweep, key: str) -> None:
        self.key, self._sweep = key, sweep
        self.folder = sweep.directory / "dense_cache" / key[:16]
        self.weights = self.folder / "dense.safetensors"
        self.is_readable = True  # False: the entry cannot be read, and stays

    def held(self, scores: str = "") -> AbstractContextManager[None]:
        """Keep other jobs that need this network (or these scores) waiting while one job makes it."""
        verb = "scores" if scores else "trains"
        name = f"dense {self.key[:16]} {scores[:16]}".rstrip()
        return collectives.held(self._sweep.lock(name), waiting_for=f"that {verb} the same dense network")

    def find(self) -> DenseRecord | None:
        """The entry's record, or None without a whole one; the first of several processes reads it."""
        return collectives.broadcast(None if collectives.rank() else self._find())

    def _find(self) -> DenseRecord | None:
        path = self.folder / "dense.json"
        try:
            if not path.is_file():
                return None
            found = read_json(path)
            record = _record(found, self.key)
            if sha256(self.weights) != found["sha256"]:
                raise Damaged(f"{self.weights} is damaged: its sha256 is another")
            return record
        except (OSError, MemoryError) as error:
            self.is_readable = isinstance(error, FileNotFoundError)
            log.warning("the dense network in %s cannot be read and is trained again: %s", self.folder, error)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            with suppress(OSError):
                aside = put_aside(self.folder)
                log.warning("%s is damaged, is now %s, and is trained again: %s", self.folder, aside, error)
        return None

    def store(self, tensors: Mapping[str, Tensor], record: DenseRecord) -> None:
        """Write a network, unless the entry exists and cannot be read."""
        if self.is_readable:
            write_atomic(self.weights, save(dict(tensors)))
            write_json(self.folder / "dense.json", {"key": self.key, "sha256": sha256(self.weights), **asdict(record)})

    def scores(self, key: str) -> Path:
        """The path of the scores with that key."""
        return self.folder / f"scores-{key[:16]}.safetensors"

    def has_scores(self, key: str) -> bool:
        """Whether the scores are there and undamaged; damaged ones are set aside."""
        return collectives.broadcast(collectives.rank() == 0 and self._has_scores(self.scores(key)))

    def _has_scores(self, path: Path) -> bool:
        try:
            if not path.is_file():
                return False
            mark = read_object(path.with_suffix(".json")).get("sha256")
            if mark is None or mark == sha256(path):
                return mark is not None  # a killed job may have written the scores alone
            log.warning("%s is damaged, is now %s, and the dense network is scored again", path, put_aside(path))
        except (OSError, MemoryError) as error:
            log.warning("%s cannot be read, the dense network is scored again: %s", path, error)
        return False

    def seal_scores(self, key: str) -> None:
        """Write the sha256 of the scores, after the scores themselves."""
        path = self.scores(key)
        write_json(path.with_suffix(".json"), {"sha256": sha256(path)})


def _record(found: Any, key: str) -> DenseRecord:
    if found["key"] != key:
        raise ValueError("its key is another")
    numbers = {name: float(found["baseline"][name]) for name in BASELINE}
    epochs = [{str(name): number(value) for name, value in row.items()} for row in found["epochs"]]
    costs = [row[name] for row in epochs for name in ("params", "macs")]
    if not costs or not all(type(cost) is int and cost >= 0 for cost in costs):
        raise ValueError("its epochs have no params or macs")
    run_id = found["run_id"] if isinstance(found["run_id"], str) else None
    job, config_hash = str(found["job"]), str(found["config_hash"])
    if PurePath(job).is_absolute() or ".." in PurePath(job).parts or "\0" in job or len(job) > 255:
        raise ValueError("its job is not a folder of the sweep")
    return DenseRecord(numbers, epochs, run_id, job, config_hash, float(found["train_seconds"]))
