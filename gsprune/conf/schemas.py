"""Keys, types and defaults of the configuration: those of the classes that it builds. Hydra refuses all others.

A configuration file asks for its schema with `- /gsprune_pruner@_here_` at the top of its defaults list. The schemas
are stored at the root of Hydra's ConfigStore, where neither `--help` nor shell completion list them.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field, make_dataclass
from itertools import chain
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from gsprune.conf.signatures import REQUIRED, settings

FROM_THE_LOOP = {"model", "example_input", "optimizer", "steps_per_epoch", "epochs", "copies", "repair"}  # no settings


def schema(
    target: str,
    *others: str,
    name: str = "",
    without: Collection[str] = (),
    also: Collection[str] = (),
    overrides: Mapping[str, tuple[Any, Any]] | None = None,
) -> type:
    """A dataclass `<Class>Config` with the settings of the class `target`, for `OmegaConf.structured`.

    Args:
        target: dotted name of the class, which is `_target_`'s default.
        others: classes whose settings `target` takes as keywords.
        name: instead of the name of the class.
        without: settings that have no key.
        also: settings that have one, though their names are of those that no file gives a pruner.
        overrides: name -> type and default of keys that the signature does not have, or not in a form for files.

    >>> schema("gsprune.criteria.Abs")()
    AbsConfig(_target_='gsprune.criteria.Abs', decay=0.95, normalize=None)
    """
    keyless = {*FROM_THE_LOOP, *without} - {*also}
    parts = chain(*(settings(made, without=keyless) for made in (target, *others)))
    found = {part.name: (part.type, part.default) for part in parts}
    keys = {"_target_": (str, target), **(overrides or {}), **found, **(overrides or {})}
    return _dataclass(name or target.rpartition(".")[2], {key: _field(key, *of) for key, of in keys.items()})


def _field(name: str, kind: Any, default: Any) -> tuple[Any, Any]:
    if isinstance(kind, dict):
        nested = _nested(name.title(), tuple(kind.items()))
        return nested | None, field(default_factory=nested)
    if default is REQUIRED:
        return kind, MISSING
    if isinstance(default, Sequence) and not isinstance(default, str):
        return kind, field(default_factory=lambda: list(default))
    return kind, default


@functools.cache
def _nested(name: str, kinds: tuple[tuple[str, Any], ...]) -> type:
    """A key for each name, null unless it is set."""
    return _dataclass(name, {key: (kind, None) for key, kind in kinds})


def _dataclass(name: str, fields: dict[str, tuple[Any, Any]]) -> type:
    """A name of this module, too: a configuration that goes to another process is pickled with its schema."""
    parts = [(key, *rest) for key, rest in fields.items()]
    made = make_dataclass(f"{name}Config", parts, namespace={"__module__": __name__})
    globals()[made.__name__] = made
    return made


_DEFERRED: dict[str, tuple[Any, Any]] = {"_partial_": (bool, True), "_convert_": (str, "all")}
_BASE = {"_target_": (str, MISSING)}

PrunerConfig = schema("gsprune.Pruner", "gsprune.Rule", without={"rules"}, overrides=_DEFERRED)
RuleConfig = schema("gsprune.Rule")
RulesConfig = schema(
    "gsprune.Pruner",
    name="Rules",
    without={"criterion", "target", "rules"},
    overrides={**_DEFERRED, "rules": (list[RuleConfig], MISSING)},  # type: ignore[valid-type]
)
PrunersConfig = schema(  # the former form of `RulesConfig`, for one release
    "gsprune.Pruner",
    name="Pruners",
    without={"criterion", "target", "rules", "shrink"},
    overrides={
        "_target_": (str, "gsprune.Pruners"),
        **_DEFERRED,
        "pruners": (list[PrunerConfig], MISSING),  # type: ignore[valid-type]
    },
)
SCHEMAS = {
    "gsprune_pruner": PrunerConfig,
    "gsprune_rules": RulesConfig,
    "gsprune_pruners": PrunersConfig,
    "gsprune_one_shot": schema("gsprune.schedules.OneShot", overrides=_BASE),
    "gsprune_ramp": schema("gsprune.schedules.Ramp", overrides=_BASE),
    # files of other criteria begin with this one: `+pruner.criterion.compiled=true`, where it is wanted
    "gsprune_elementwise": schema("gsprune.criteria.Elementwise", without={"compiled"}),
    "gsprune_gate": schema("gsprune.criteria.GateGradient", overrides=_BASE),
    "gsprune_fisher": schema("gsprune.criteria.Fisher"),
    "gsprune_obs": schema("gsprune.criteria.OBS"),
    "gsprune_wanda": schema("gsprune.criteria.Wanda"),
    "gsprune_sparsegpt": schema("gsprune.criteria.SparseGPT"),
    "gsprune_movement": schema("gsprune.criteria.Movement"),
    "gsprune_platon": schema("gsprune.criteria.PLATON"),
    "gsprune_magnitude": schema("gsprune.criteria.Magnitude"),
    "gsprune_random": schema("gsprune.criteria.Random"),
    "gsprune_trainer": schema("gsprune.training.trainer.Trainer"),
    "gsprune_cut": schema("gsprune.app.cut_settings.CutSettings", also={"repair"}),
}


def register() -> None:
    """Put the schemas into Hydra's ConfigStore. Doing it again changes nothing."""
    store = ConfigStore.instance()
    for name, node in SCHEMAS.items():
        if f"{name}.yaml" not in store.repo:
            store.store(name=name, node=node, provider="gsprune")
