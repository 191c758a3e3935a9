"""What a repair did, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gsprune.text.display import html_table, text_table
from gsprune.text.names import lines_by_reason

_HEAD = ("layer", "error before", "after", "damping")


@dataclass(frozen=True)
class LayerRepair:
    """One layer.

    before, after   mean square of what its output lacks of the dense network's, on the held-back part, as a share of
                    the dense output's variance there; NaN where it was not measured
    damping         of the fit that was kept (the median of a grouped convolution's); None where none was
    reason          why it was left as it was; None where it was repaired
    """

    name: str
    before: float = math.nan
    after: float = math.nan
    damping: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class RepairReport:
    """What was repaired, in the order of the pass, what was left and why.

    >>> print(RepairReport((LayerRepair("fc", 0.2, 0.05, 0.01), LayerRepair("up", reason="it is transposed"))))
    Repaired 1 of 2 layers: their output's relative error on held-back samples is 0.05, before 0.2 (median)
      layer  error before  after   damping
      fc     0.2000        0.0500  0.01
    Left as they were:
      up: it is transposed
    """

    layers: tuple[LayerRepair, ...]

    @property
    def repaired(self) -> tuple[LayerRepair, ...]:
        """Those that were changed."""
        return tuple(layer for layer in self.layers if layer.reason is None)

    @property
    def left(self) -> dict[str, str]:
        """Layer -> why it was left as it was."""
        return {layer.name: layer.reason for layer in self.layers if layer.reason is not None}

    def __repr__(self) -> str:
        rows = self._rows()
        lines = [self._summary(), *(f"  {line}" for line in text_table([_HEAD, *rows]) if rows)]
        left = ["Left as they were:", *(f"  {text}" for text in lines_by_reason(self.left))] if self.left else []
        return "\n".join([*lines, *left])

    def _repr_html_(self) -> str:
        rows = [*self._rows(), *((name, why, "", "") for name, why in self.left.items())]
        return html_table(_HEAD, rows)

    def _summary(self) -> str:
        first = f"Repaired {len(self.repaired)} of {len(self.layers)} layer{'s' if len(self.layers) != 1 else ''}"
        done = [layer for layer in self.repaired if not math.isnan(layer.after)]
        if not done:
            return first
        before, after = (_median([getattr(layer, side) for layer in done]) for side in ("before", "after"))
        return (
            f"{first}: their output's relative error on held-back samples is {after:.2g}, before {before:.2g} (median)"
        )

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                layer.name,
                f"{layer.before:.4f}",
                f"{layer.after:.4f}",
                "" if layer.damping is None else f"{layer.damping:g}",
            )
            for layer in self.repaired
            if not math.isnan(layer.after)
        ]


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
