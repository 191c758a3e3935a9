"""The share pruned of each layer in the best runs of a sweep, for the report's heatmaps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TypeGuard

from gsprune.sweeps.results import JobResult
from gsprune.sweeps.variants import Point

__all__ = ["heatmaps"]

Runs = dict[str, dict[str, float]]  # label of the row -> layer -> share pruned, 0 to 1
_MAX_RUNS, _MAX_HEATMAPS = 20, 4
_MAX_MASK_BYTES = 200_000_000  # at 1 bit a weight; eight times as much in memory


def heatmaps(points: Mapping[str, Point]) -> tuple[list[Runs], int]:
    """A heatmap for all points with about the same layers, in the points' order, and how many points are left out.

    Points on a front come first, then the best at each target sparsity. A point shows its best job.

    Args:
        points: label of the row -> point.
    """
    seen: Counter[float | None] = Counter()
    place = {}  # label -> rank among the points of its target sparsity
    for label, point in points.items():
        place[label] = seen[point.target_sparsity]
        seen[point.target_sparsity] += 1
    shares: dict[str, dict[str, float]] = {}
    for label in sorted(points, key=lambda label: (not points[label].fronts, place[label])):
        if len(shares) < _MAX_RUNS and (layers := _layer_shares(points[label].best)):
            shares[label] = layers
    found: list[Runs] = []
    for label in filter(shares.__contains__, points):
        fitting = next((runs for runs in found if _fits(runs, shares[label])), None)
        if fitting is None:
            found.append(fitting := {})
        fitting[label] = shares[label]
    return found[:_MAX_HEATMAPS], len(points) - len(shares) if len(shares) == _MAX_RUNS else 0


def _fits(runs: Runs, layers: Mapping[str, float]) -> bool:
    """Whether the first run shares at least half of all layers with these."""
    first = next(iter(runs.values())).keys()
    return 2 * len(first & layers.keys()) >= len(first | layers.keys())


def _layer_shares(job: JobResult) -> dict[str, float]:
    """Tensor or structure -> share pruned: of `layers` in the result, else of the job's masks; empty without both."""
    found = job.result.get("layers")
    counts = {name: pair for name, pair in found.items() if _is_count(pair)} if isinstance(found, dict) else {}
    return {name: pruned / total for name, (pruned, total) in counts.items()} or _mask_shares(job)


def _is_count(pair: object) -> TypeGuard[list[int]]:
    """Whether it is [pruned, total] of a layer."""
    if not (isinstance(pair, list) and len(pair) == 2 and all(type(number) is int for number in pair)):
        return False
    pruned, total = pair
    return bool(0 <= pruned <= total > 0)


def _mask_shares(job: JobResult) -> dict[str, float]:
    path = job.folder / "masks.safetensors"
    if not path.is_file() or path.stat().st_size > _MAX_MASK_BYTES:
        return {}
    from gsprune.formats.masks import load_masks  # imports torch, which a report without masks does not need

    try:
        masks = load_masks(path)
    except (ValueError, OSError):
        return {}
    return {name: 1 - int(mask.sum()) / mask.numel() for name, mask in masks.items() if mask.numel()}
