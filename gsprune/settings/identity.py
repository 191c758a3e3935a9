"""What makes two jobs the same: hashes over the parts of a configuration that a result depends on.

Each hash leaves out what it names and takes everything else, so a setting that is new counts until someone says that it
does not. Part of it are the content of the files that `model.weights` and `pruner.scores` name, and the code of every
`_target_` that is not this package's or one that it requires: see `sources`. The data under a data set's path are taken
to stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gsprune import __version__
from gsprune.files.disk import sha256, sha256_of_json
from gsprune.settings.recorded import hashable
from gsprune.settings.sources import code, versions

__all__ = ["config_hash", "dense_key", "differences", "package_versions", "plain_config", "scores_key", "settings"]

# What changes no number of a result.
NOT_HASHED = (
    "hydra",
    "plan",
    "sweep.resume",
    "sweep.check",
    "tracking",
    "objective",
    "trainer.progress",
    "trainer.dense_cache",
    "trainer.rendezvous",
    "trainer.timeout_minutes",
    "trainer.resume",
    "trainer.checkpoint_minutes",
    "trainer.max_bad_steps",
    "dataset.root",
)
# What has no part in training the dense network: the whole second phase, and what is only measured.
NOT_DENSE = (
    "pruner",
    "trainer.prune_epochs",
    "trainer.prune_lr",
    "trainer.dense_scores",
    "trainer.latency_repeats",
    "trainer.latency_batch",
    "trainer.latency_seconds",
)
# What has no part in scoring the dense network: when and how many to prune.
NOT_SCORES = ("target_sparsity", "budget", "target", "schedule", "scope", "min_kept", "scores", "shrink")
CONTROL = "gsprune.pruner.pruner.no_pruning"  # which nothing of its settings changes
FILES = ("model.weights", "pruner.scores")
SCORES = "checkpoint/scores.safetensors"  # in the output directory of a job: what its pruner began with


def config_hash(cfg: DictConfig) -> str:
    """sha256 of everything in the configuration that determines the result: the seed too, but no output path and
    nothing of tracking, and no password.

    Two jobs with the same hash give the same result on the same kind of machine with the same versions of packages.
    """
    config = hashable(plain_config(cfg), cfg)
    if (config.get("pruner") or {}).get("_target_") == CONTROL:
        config["pruner"] = {"_target_": CONTROL}  # a sweep of sparsities trains one control a seed
    return sha256_of_json([_without(_with_contents(config), NOT_HASHED), _code(config)])


def dense_key(cfg: DictConfig, **surroundings: str) -> str:
    """sha256 of what the network of between the two phases depends on; `surroundings` are versions and devices.

    It is equal for jobs that differ in their pruner or in the length of the second phase alone.
    """
    config = _without(_with_contents(hashable(plain_config(cfg), cfg)), (*NOT_HASHED, *NOT_DENSE))
    return sha256_of_json([config, _code(config), package_versions(config), surroundings])


def settings(cfg: DictConfig) -> dict[str, str]:
    """What `config_hash` is of, by key, as it is written: references stay references, and where they lead is not told.

    >>> settings(OmegaConf.create({"seed": 0, "dataset": {"size": 4, "seed": "${seed}"}, "plan": True}))
    {'seed': '0', 'dataset.size': '4', 'dataset.seed': '${seed}'}
    """
    written: Any = OmegaConf.to_container(cfg)
    resolved = _with_contents(plain_config(cfg))
    contents = {f"content of {path}": str(_at(resolved, path))[:12] for path in FILES if _at(resolved, path)}
    codes = {f"code of {target}": mark[:12] for target, mark in _code(written).items()}
    return {**dict(_flat(_without(written, NOT_HASHED))), **contents, **codes}


def differences(before: Mapping[str, Any], now: Mapping[str, Any], *, most: int = 8) -> str:
    """What of two records is not the same: the key, the old value, the new one.

    >>> differences({"threads": 1, "torch": "2.5"}, {"threads": 2, "torch": "2.5", "gsprune": "0.2"})
    'threads 1 to 2, gsprune nothing to 0.2'
    """
    found = [
        f"{key} {before.get(key, 'nothing')} to {now.get(key, 'nothing')}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    ]
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inside in value.items():
            yield from _flat(inside, f"{path}.{key}" if path else str(key))
    else:
        yield path, "null" if value is None else str(value)


def _at(config: Mapping[str, Any], path: str) -> Any:
    group, _, key = path.rpartition(".")
    inside = config.get(group)
    return inside.get(key) if isinstance(inside, dict) else None


def package_versions(config: Mapping[str, Any] | DictConfig) -> dict[str, str]:
    """Of this package, torch, numpy, and whatever else is installed that the configuration's `_target_`s rest on.

    They are no part of `config_hash`: a run may go on with another version, which it then says.
    """
    plain = plain_config(config) if isinstance(config, DictConfig) else config
    return {"torch": version("torch"), "numpy": version("numpy"), **versions(_targets(plain)), "gsprune": __version__}


def scores_key(cfg: DictConfig) -> str:
    """sha256 of what a criterion's scores on a given dense network depend on: the pruner, but not when and how much."""
    pruner = _without(hashable(plain_config(cfg), cfg)["pruner"], NOT_SCORES)
    return sha256_of_json([pruner, _code(pruner)])


def scores_path(given: str) -> Path:
    """The file that `pruner.scores` means: itself, or in the output directory of a run the scores it began with."""
    path = Path(given)
    return path / SCORES if path.is_dir() else path


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """The configuration resolved, as plain dicts and lists.

    Raises:
        ValueError: a value is missing (`???`), or refers to one that is not there.
    """
    missing = list(_missing(OmegaConf.to_container(cfg)))
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given: {missing[0]}=...")
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        told = " ".join(str(error.msg or error).split("\n")[0].split())
        raise ValueError(f"{error.full_key or 'the configuration'} cannot be resolved: {told}") from error
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
        inside = config.get(group) if group else config
        if isinstance(inside, dict):  # `sweep=1` is nonsense, but no reason to fail
            inside.pop(key, None)
    return config


def _with_contents(config: dict[str, Any]) -> dict[str, Any]:
    for path in FILES:
        group, _, key = path.rpartition(".")
        given = (config.get(group) or {}).get(key)
        file = scores_path(str(given)) if given else None
        if file is not None and file.is_file():
            config[group][key] = sha256(file)
    return config


def _code(config: Any) -> dict[str, str]:
    """Of each `_target_` that has code of its own, the mark of that."""
    marks = {target: code(target) for target in _targets(config)}
    return {target: mark for target, mark in marks.items() if mark is not None}


def _targets(node: Any) -> Iterator[str]:
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _targets(value)
    if isinstance(node, dict) and isinstance(node.get("_target_"), str):
        yield node["_target_"]
        if node["_target_"].startswith("hydra.utils.get_") and isinstance(node.get("path"), str):
            yield node["path"]
