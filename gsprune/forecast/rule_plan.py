"""A forecast as data: what one rule of a pruner would leave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Cost", "Entry", "RulePlan"]


@dataclass(frozen=True)
class Cost:
    """Parameters (zeros included) and MACs of the example input; MACs are None where nothing counts them."""

    params: int
    macs: int | None


@dataclass(frozen=True)
class Entry:
    """One structure or one weight tensor.

    name      as in `Pruner.masks()`
    kind      "channels", "neurons", "heads" or "weights"
    layers    modules that compute it
    total     units or weights there are
    least, most   how many stay at the schedule's end; the same number twice where that is certain
    dense, pruned   what `layers` cost now and in the end; `pruned` is None where the scores decide it
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    total: int
    least: int
    most: int
    dense: Cost
    pruned: Cost | None

    @property
    def kept(self) -> int | None:
        """How many stay, if that is certain."""
        return self.least if self.least == self.most else None


@dataclass(frozen=True)
class RulePlan:
    """What one rule would leave at the end of its schedule, without the other rules.

    criterion     its class
    structured    units are removed, or single weights are zeroed
    scope         "local": counts are exact; "global": one ranking over all entries, "isomorphic": one over each set of
                  entries that are alike, of which only bounds are known
    pattern, per_channel, min_kept   the rule's settings
    min_share     share of its units or weights that each entry keeps at least
    entries       structures or tensors, in the model's order
    total         units or weights of all entries
    kept          how many of them stay (exact in both scopes, save where `min_kept` outweighs an N:M pattern: at least;
                  under a budget as many as if every structure gave the same share)
    dense, pruned   cost of the whole model now and in the end; `pruned` is None where the scores decide it
    even          cost if every structure gave the same share of its units, where the scores decide it
    params_left   parameters that are not pruned (not masked, not cut away), in the end; None where the scores decide it
    macs_left     MACs with weights that are not pruned; None where the scores decide it
    skipped       what is left whole -> why
    collapsing    entries about to collapse -> what is left of them
    schedule      (epoch of the pruning phase, sparsity over all entries; under a budget the share of the cost gone)
    notes         whole sentences for the user
    budget        what share of which cost may stay, as {"macs": 0.5}; empty where a share or a count of units is wanted
    coverage      share of the model's matrix weights that is targeted, by this rule
    """

    criterion: str
    structured: bool
    scope: str
    pattern: str
    per_channel: bool
    min_kept: int
    min_share: float
    entries: tuple[Entry, ...]
    total: int
    kept: int
    dense: Cost
    pruned: Cost | None
    even: Cost | None
    params_left: int | None
    macs_left: int | None
    skipped: Mapping[str, str] = field(default_factory=dict)
    collapsing: Mapping[str, str] = field(default_factory=dict)
    schedule: tuple[tuple[float, float], ...] = ()
    notes: tuple[str, ...] = ()
    budget: Mapping[str, float] = field(default_factory=dict)
    coverage: float = 0.0

    @property
    def sparsity(self) -> float:
        """Share of units or weights gone in the end."""
        return 1 - self.kept / self.total if self.total else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        data = asdict(self) | {"sparsity": self.sparsity}
        data["entries"] = [asdict(entry) | {"kept": entry.kept, "layers": [*entry.layers]} for entry in self.entries]
        return data | {"schedule": [[*point] for point in self.schedule], "notes": [*self.notes]}
