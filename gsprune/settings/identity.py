"""Hashes over the parts of a configuration that a result depends on: equal hashes mean equal jobs.

Each hash leaves out the listed settings and takes everything else, so a new setting counts until it is listed. A hash
covers the content of the files in `model.weights` and `pruner.scores`, and the code of every `_target_` outside this
package and its requirements (see `sources`). The data under a data set's path are assumed to be constant.
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
from gsprune.settings.sources import code, targets, versions

__all__ = [
    "config_hash",
    "dataset_digest",
    "dense_key",
    "differences",
    "package_versions",
    "plain_config",
    "scores_key",
    "settings",
]

# Settings that change no number of a result.
NOT_HASHED = (
    "hydra",
    "plan",
    "sweep.resume",
    "sweep.check",
    "report.max_drop",
    "report.by",
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
# Settings that do not change the dense network: those of the second phase and of measurements.
NOT_DENSE = (
    "mode",
    "cut",
    "audit",
    "pruner",
    "trainer.prune_epochs",
    "trainer.prune_lr",
    "trainer.dense_scores",
    "trainer.distill",
    "trainer.distill_temperature",
    "trainer.latency_repeats",
    "trainer.latency_batch",
    "trainer.latency_seconds",
    "trainer.latency_runtime",
)
# Settings that do not change the scores on the dense network: when and how much to prune.
NOT_SCORES = ("target_sparsity", "budget", "target", "schedule", "scope", "min_kept", "min_share", "scores", "shrink")
CONTROL = "gsprune.pruner.pruner.no_pruning"  # its settings change nothing
FILES = ("model.weights", "pruner.scores")
SCORES = "checkpoint/scores.safetensors"  # in the output directory of a job


def config_hash(cfg: DictConfig) -> str:
    """sha256 of everything that determines the result, the seed too, but not paths of output, tracking and secrets.

    Two jobs with the same hash give the same result on the same kind of machine with the same package versions.
    """
    config = hashable(plain_config(cfg), cfg)
    if (config.get("pruner") or {}).get("_target_") == CONTROL:
        config["pruner"] = {"_target_": CONTROL}  # a sweep of sparsities trains one control a seed
    return sha256_of_json([_without(_with_contents(config), NOT_HASHED), _code(config)])


def dense_key(cfg: DictConfig, **surroundings: str) -> str:
    """sha256 of what the dense network depends on; `surroundings` are versions and devices.

    It is equal for jobs that differ only in their pruner or in the length of the second phase.
    """
    config = _without(_with_contents(hashable(plain_config(cfg), cfg)), (*NOT_HASHED, *NOT_DENSE))
    return sha256_of_json([config, _code(config), package_versions(config), surroundings])


def dataset_digest(cfg: DictConfig) -> str:
    """16 hexadecimal digits of sha256 of the settings of the data set, but for the folder it lies in.

    >>> one, other = ({"dataset": {"size": size, "root": root}} for size, root in ((4, "a"), (4, "b")))
    >>> dataset_digest(OmegaConf.create(one)) == dataset_digest(OmegaConf.create(other))
    True
    """
    return sha256_of_json(_without(hashable(plain_config(cfg), cfg), NOT_HASHED).get("dataset"))[:16]


def settings(cfg: DictConfig) -> dict[str, str]:
    """The settings under `config_hash`, by key, as they are written: references stay references.

    >>> settings(OmegaConf.create({"seed": 0, "dataset": {"size": 4, "seed": "${seed}"}, "plan": True}))
    {'seed': '0', 'dataset.size': '4', 'dataset.seed': '${seed}'}
    """
    written: Any = OmegaConf.to_container(cfg)
    resolved = _with_contents(plain_config(cfg))
    found = {path: inside.get(key) for path in FILES for inside, key in [_inside(resolved, path)]}
    contents = {f"content of {path}": str(value)[:12] for path, value in found.items() if value}
    codes = {f"code of {target}": mark[:12] for target, mark in _code(written).items()}
    return {**dict(_flat(_without(written, NOT_HASHED))), **contents, **codes}


def differences(before: Mapping[str, Any], now: Mapping[str, Any], *, most: int = 8) -> str:
    """The differences of two records: key, old value, new value.

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


def _inside(config: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """The mapping that holds a dotted path of at most two parts, and the key in it."""
    group, _, key = path.rpartition(".")
    inside = config.get(group) if group else config
    return (inside if isinstance(inside, dict) else {}), key  # `sweep=1` is wrong, but hashing is not the place to fail


def package_versions(config: Mapping[str, Any] | DictConfig) -> dict[str, str]:
    """Versions of this package, torch, numpy, and the installed packages that the configuration's `_target_`s need.

    They are no part of `config_hash`: a run may continue with other versions, and says so.
    """
    plain = plain_config(config) if isinstance(config, DictConfig) else config
    return {"torch": version("torch"), "numpy": version("numpy"), **versions(targets(plain)), "gsprune": __version__}


def scores_key(cfg: DictConfig) -> str:
    """sha256 of what the scores on a given dense network depend on: the pruner, but not when and how much it prunes."""
    pruner = _without(hashable(plain_config(cfg), cfg)["pruner"], NOT_SCORES)
    return sha256_of_json([pruner, _code(pruner)])


def scores_path(given: str) -> Path:
    """The file that `pruner.scores` means: a file itself, or the first scores of the run with that output directory."""
    path = Path(given)
    return path / SCORES if path.is_dir() else path


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """The configuration resolved, as plain dicts and lists.

    Raises:
        ValueError: a value is missing (`???`), or refers to a missing one.
    """
    if missing := [path for path, text in _flat(OmegaConf.to_container(cfg)) if text == "???"]:
        raise ValueError(f"{', '.join(missing)} must be given: {missing[0]}=...")
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        reason = " ".join(str(error.msg or error).split("\n")[0].split())
        raise ValueError(f"{error.full_key or 'the configuration'} cannot be resolved: {reason}") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _without(config: dict[str, Any], paths: tuple[str, ...]) -> dict[str, Any]:
    for path in paths:
        inside, key = _inside(config, path)
        inside.pop(key, None)
    return config


def _with_contents(config: dict[str, Any]) -> dict[str, Any]:
    """With the sha256 of files in place of their paths."""
    for path in FILES:
        inside, key = _inside(config, path)
        if inside.get(key) and (file := scores_path(str(inside[key]))).is_file():
            inside[key] = sha256(file)
    return config


def _code(config: Any) -> dict[str, str]:
    """`_target_` -> mark of its code, for those outside this package and its requirements."""
    marks = {target: code(target) for target in targets(config)}
    return {target: mark for target, mark in marks.items() if mark is not None}
