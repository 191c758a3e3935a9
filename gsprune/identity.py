"""What makes two jobs the same: hashes over the parts of a configuration that a result depends on.

Each hash leaves out what it names and takes everything else, so a setting that is new counts until someone says that it
does not. Of files that a setting names the content counts, not the path. Imports omegaconf alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

__all__ = ["config_hash", "dense_key", "plain_config", "scores_key", "scores_path"]

# What changes no number of a result.
NOT_HASHED = (
    "hydra",
    "sweep",
    "tracking",
    "objective",
    "trainer.progress",
    "trainer.dense_cache",
    "dataset.root",
    "dataset.num_workers",
    "dataset.device",
)
# What has no part in training the dense network: the whole second phase, and what is only measured.
NOT_DENSE = (
    "pruner",
    "trainer.prune_epochs",
    "trainer.prune_lr",
    "trainer.dense_scores",
    "trainer.latency_repeats",
    "trainer.latency_batch",
)
# What has no part in scoring the dense network: when and how many to prune.
NOT_SCORES = ("target_sparsity", "schedule", "scope", "min_kept", "scores")
FILES = ("model.weights", "pruner.scores")


def config_hash(cfg: DictConfig) -> str:
    """sha256 of everything in the configuration that determines the result: the seed too, but no output path and
    nothing of tracking.

    Two jobs with the same hash give the same result on the same kind of machine.
    """
    return _sha256(_without(_with_contents(plain_config(cfg)), NOT_HASHED))


def dense_key(cfg: DictConfig, **surroundings: str) -> str:
    """sha256 of what the network of between the two phases depends on; `surroundings` are versions and devices.

    It is equal for jobs that differ in their pruner or in the length of the second phase alone.
    """
    config = _without(_with_contents(plain_config(cfg)), (*NOT_HASHED, *NOT_DENSE))
    return _sha256([config, surroundings])


def scores_key(cfg: DictConfig) -> str:
    """sha256 of what a criterion's scores on a given dense network depend on: the pruner, but not when and how much."""
    return _sha256(_without(plain_config(cfg)["pruner"], NOT_SCORES))


def scores_path(given: str) -> Path:
    """The file that `pruner.scores` means: itself, or in the output directory of a run the scores it began with."""
    path = Path(given)
    return path / "checkpoint" / "scores.safetensors" if path.is_dir() else path


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """The configuration resolved, as plain dicts and lists.

    Raises:
        ValueError: a value is missing (`???`).
    """
    missing = list(_missing(OmegaConf.to_container(cfg)))
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given: {missing[0]}=...")
    plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _missing(values: Any, path: str = "") -> Iterator[str]:
    """Where the configuration has `???`; what only refers to such a place is not named."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _missing(value, f"{path}.{key}" if path else str(key))
    elif values == "???":
        yield path


def _without(config: dict[str, Any], paths: tuple[str, ...]) -> dict[str, Any]:
    for path in paths:
        group, _, key = path.rpartition(".")
        (config.get(group) or {} if group else config).pop(key, None)
    return config


def _with_contents(config: dict[str, Any]) -> dict[str, Any]:
    for path in FILES:
        group, _, key = path.rpartition(".")
        given = (config.get(group) or {}).get(key)
        file = scores_path(str(given)) if given else None
        if file is not None and file.is_file():
            config[group][key] = hashlib.sha256(file.read_bytes()).hexdigest()
    return config


def _sha256(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
