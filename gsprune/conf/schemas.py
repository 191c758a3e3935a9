"""What keys and types the configuration has: plain dataclasses, so that Hydra refuses a misspelt key or a wrong type.

A configuration file asks for its schema with `- /gsprune_pruner@_here_` at the top of its defaults list. The schemas
are stored at the root of Hydra's ConfigStore, where neither `--help` nor shell completion list them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class KeepConfig:
    """Units to keep in every structure of a kind, instead of a share of them; null: no count for that kind."""

    channels: int | None = None
    neurons: int | None = None
    heads: int | None = None


@dataclass
class BudgetConfig:
    """Share of the dense network's cost that may stay, instead of a share of units: one of these, the others null."""

    macs: float | None = None
    params: float | None = None
    latency: float | None = None


@dataclass
class PrunerConfig:
    """Arguments of `gsprune.Pruner` and `gsprune.NoPruning`; criterion and schedule have schemas of their own."""

    _target_: str = "gsprune.Pruner"
    _partial_: bool = True
    _convert_: str = "all"
    criterion: Any = MISSING
    schedule: Any = MISSING
    target_sparsity: float | None = None
    keep: KeepConfig | None = field(default_factory=KeepConfig)
    kinds: list[str] | None = None
    target: BudgetConfig | None = field(default_factory=BudgetConfig)
    pattern: str = "1x1"
    per_channel: bool = False
    scope: str | None = None
    structured: bool | None = None
    min_kept: int = 1
    include: list[str] = field(default_factory=lambda: ["*"])
    exclude: list[str] = field(default_factory=list)
    scores: str | None = None
    shrink: str = "at_end"


@dataclass
class PartConfig(PrunerConfig):
    """One of several pruners, in a list that no defaults list reaches: without a schedule it has the common one."""

    schedule: Any = None


@dataclass
class PrunersConfig:
    """Arguments of `gsprune.Pruners`."""

    _target_: str = "gsprune.Pruners"
    _partial_: bool = True
    _convert_: str = "all"
    pruners: list[PartConfig] = MISSING
    schedule: Any = None
    scores: str | None = None


@dataclass
class OneShotConfig:
    """Arguments of `gsprune.schedules.OneShot`."""

    _target_: str = MISSING
    target_sparsity: float | None = None  # what the pruner's own, its keep or its target win over
    start_epoch: float = 0.0


@dataclass
class RampConfig(OneShotConfig):
    """Arguments of the gradual schedules: `Linear`, `Cubic`, `Cosine`, `Exponential`."""

    initial_sparsity: float = 0.0
    end_epoch: float | None = None
    update_frequency: float = 0.25


@dataclass
class ElementwiseConfig:
    """Arguments of `gsprune.criteria.Elementwise`."""

    _target_: str = "gsprune.criteria.Elementwise"
    decay: float = 0.9


@dataclass
class GateConfig:
    """Arguments of `gsprune.criteria.Abs` and `gsprune.criteria.Weighted`."""

    _target_: str = MISSING
    decay: float = 0.95
    normalize: bool = False


@dataclass
class MagnitudeConfig:
    """`gsprune.criteria.Magnitude` has no arguments."""

    _target_: str = "gsprune.criteria.Magnitude"


@dataclass
class RandomConfig:
    """Arguments of `gsprune.criteria.Random`."""

    _target_: str = "gsprune.criteria.Random"
    seed: int = 0


@dataclass
class TrainerConfig:
    """Arguments of `gsprune.training.trainer.Trainer`, described there; used by the reference application alone."""

    _target_: str = "gsprune.training.trainer.Trainer"
    dense_epochs: int = 6
    prune_epochs: int = 8
    prune_lr: float | None = None
    device: str = "auto"
    precision: str = "fp32"
    accumulate_steps: int = 1
    clip_norm: float | None = None
    max_bad_steps: int = 20
    channels_last: bool = False
    compile: bool = False
    fused: bool = True
    deterministic: bool = False
    progress: str = "auto"
    latency_repeats: int = 30
    latency_batch: int = 1
    latency_seconds: float = 10.0
    dense_cache: bool = True
    dense_scores: bool = True
    devices: int = 1
    nodes: int = 1
    rendezvous: str | None = None
    timeout_minutes: float = 30.0
    resume: str = "auto"
    checkpoint_minutes: float | None = 10.0


SCHEMAS: dict[str, type] = {
    "gsprune_pruner": PrunerConfig,
    "gsprune_pruners": PrunersConfig,
    "gsprune_one_shot": OneShotConfig,
    "gsprune_ramp": RampConfig,
    "gsprune_elementwise": ElementwiseConfig,
    "gsprune_gate": GateConfig,
    "gsprune_magnitude": MagnitudeConfig,
    "gsprune_random": RandomConfig,
    "gsprune_trainer": TrainerConfig,
}


def register() -> None:
    """Put the schemas into Hydra's ConfigStore. Doing it again changes nothing."""
    store = ConfigStore.instance()
    for name, node in SCHEMAS.items():
        store.store(name=name, node=node, provider="gsprune")
