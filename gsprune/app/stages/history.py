"""The epochs of a job so far: their metrics, and the masks whenever they have changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from gsprune.app.stages.context import Context
from gsprune.app.stages.setup import Setup
from gsprune.cost import counting
from gsprune.formats.masks import save_masks
from gsprune.plots import run_figures
from gsprune.structures.twin import copy_of
from gsprune.surgery.apply import apply_cut
from gsprune.text.display import logger

Row = Mapping[str, float]
DIVERGED = 100  # times the loss of guessing
log = logger(__name__)


class History:
    """The metrics of each epoch, on screen, on disk and in the tracker; empty in all processes but the first.

    Attributes:
        rows: the metrics of each epoch, over both phases.
        last: those of the last epoch.
        picture: of the last masks; None before there are any.
    """

    def __init__(self, job: Context, setup: Setup) -> None:
        self._job, self._setup = job, setup
        self.rows: list[Row] = []
        self.last: Row = {}
        self.picture: Any = None
        self._diverged = False
        self._cost = (0, 0)  # parameters and MACs of the network as pruned so far
        self._costed = self._recorded = 0  # mask updates that `_cost` and the files of masks have seen

    def record_epoch(self, trained: int, values: dict[str, float], pruner: Any) -> None:
        """The metrics after so many epochs, counted over both phases, and the masks if they have changed."""
        if not self._job.first:
            return
        values |= pruner.report()
        if trained == 1 or self._costed != pruner.updates:
            with self._job.watch.part("measure"):
                twin, self._costed = pruned_copy(self._setup.model, pruner), pruner.updates
                self._cost = counting.count_parameters(twin), counting.count_macs(twin, self._setup.example)
        self.last = {**values, "params": self._cost[0], "macs": self._cost[1]}
        self.rows.append(self.last)
        self._track(self.last, trained)
        self.record_masks(trained, pruner)
        self._job.progress.on_epoch(trained, self.last)
        self._warn_of_divergence(trained, self.last["train/loss"])

    def _warn_of_divergence(self, trained: int, loss: float) -> None:
        """Once, where the loss is far above that of guessing."""
        far = DIVERGED * math.log(max(self._setup.classes, 2))
        if not self._diverged and not loss <= far:
            self._diverged = True
            log.warning(
                "training diverges: the loss of epoch %d is %.3g, more than %d times that of guessing; "
                "lower optimizer.lr (or trainer.prune_lr)",
                trained,
                loss,
                DIVERGED,
            )

    def record_masks(self, trained: int, pruner: Any) -> None:
        """The masks, if they have changed since the last time."""
        if not self._job.first or self._recorded == pruner.updates:
            return
        self._recorded, masks = pruner.updates, pruner.masks()
        name = f"masks/epoch_{trained:04d}.safetensors"
        with self._job.watch.part("files"):
            self._draw(pruner)
        self._job.writer.write_or_retry(name, lambda: save_masks(self._job.folder / name, masks))
        with self._job.watch.part("tracking"):
            self._job.track_file(name, folder="masks")
            self._job.tracker.log_image(self.picture, key="masks", step=trained)

    def replay(self, rows: Sequence[Row]) -> None:
        """The epochs of a dense network that another job has trained, as if they had been trained here."""
        logged, self.rows, self.last = len(self.rows), list(rows), rows[-1]
        for trained, row in enumerate(self.rows[logged:], logged + 1):
            self._track(row, trained)
        self._cost = int(self.last["params"]), int(self.last["macs"])

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"rows": self.rows, "cost": self._cost, "costed": self._costed, "recorded": self._recorded}

    def load(self, state: Mapping[str, Any]) -> None:
        self.rows, self._cost = list(state["rows"]), tuple(state["cost"])
        self._costed, self._recorded = state["costed"], state["recorded"]
        self.last = self.rows[-1] if self.rows else {}

    def redraw(self, pruner: Any) -> None:
        """The picture of the masks that the pruner has restored."""
        if self._job.first and self._recorded and self._recorded == pruner.updates:
            self._draw(pruner)

    def _draw(self, pruner: Any) -> None:
        self.picture = run_figures.mask_image(pruner.dense_masks(), share=pruner.share)

    def _track(self, row: Row, trained: int) -> None:
        with self._job.watch.part("tracking"):
            self._job.tracker.log_metrics(row, step=trained)


def counts(pruner: Any) -> str | None:
    """What the pruner's sparsity is a share of, as "channels"; None for weights."""
    of: str = pruner.share.of
    return of or None


def pruned_copy(model: nn.Module, pruner: Any) -> nn.Module:
    """The network a structured pruner would leave if training ended now, as a copy; any other: the model itself."""
    plan = pruner.next_plan()
    if plan is None:
        return model
    twin = copy_of(model)
    apply_cut(twin, plan)
    return twin
