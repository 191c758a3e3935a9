"""Lightning: `Trainer(callbacks=[PruningCallback(Weighted(), target_sparsity=0.5)])`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from gsprune.criteria.base import Criterion
from gsprune.extras import need
from gsprune.integrations.hosted import Hosted
from gsprune.pruner.pruner import Pruner

__all__ = ["PruningCallback"]

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    Callback = need("lightning.pytorch").Callback


class PruningCallback(Callback):
    """Prunes the network that a Lightning `Trainer` fits; at the end of training units are cut out of it.

    Automatic and manual optimisation, several optimizers, accumulation, clipping and mixed precision are the Trainer's
    own: scores are taken from the gradients that the optimizers see, so after clipping. The averaged network of a
    `WeightAveraging` callback is masked and cut along. Checkpoints hold the pruner's state: `fit(ckpt_path=...)` goes
    on to the bit, under `shrink="each_update"` too. `sparsity` is logged at the end of each epoch.

    Args:
        criterion, settings: as of `gsprune.Pruner`. `example_input` may be left out: the module's
            `example_input_array`, or two samples of the data set.
        module: the name of the network in the `LightningModule`; None: the LightningModule itself, by its `forward`.

    Attributes:
        pruner: the `gsprune.Pruner`, once training has begun.

    Raises:
        ValueError: a checkpoint without the pruner's state; what `Pruner` refuses. Before the first step.
    """

    def __init__(self, criterion: Criterion | None = None, *, module: str | None = None, **settings: Any) -> None:
        self._hosted = Hosted(criterion, settings, owner="PruningCallback")
        self._has_example = "example_input" in settings
        self._module = module

    @property
    def pruner(self) -> Pruner | None:
        return self._hosted.pruner

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        on_load_checkpoint = pl_module.on_load_checkpoint

        def resume(checkpoint: dict[str, Any]) -> None:
            """Called before the weights are loaded, unlike the callbacks' own hooks."""
            state = checkpoint.get("callbacks", {}).get(self.state_key, {})
            self._hosted.resume(self._network(pl_module), state, copies=self._copies(trainer))
            on_load_checkpoint(checkpoint)

        pl_module.on_load_checkpoint = resume

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        del pl_module.on_load_checkpoint
        if not self._has_example and getattr(pl_module, "example_input_array", None) is not None:
            self._hosted.example = pl_module.example_input_array
        total = trainer.estimated_stepping_batches
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else 1
        run = {"steps_per_epoch": max(round(total / epochs), 1), "epochs": epochs, "copies": self._copies(trainer)}
        self._hosted.start(self._network(pl_module), trainer.optimizers, trainer.train_dataloader, **run)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._hosted.check_stepped()
        assert self.pruner is not None
        pl_module.log("sparsity", self.pruner.sparsity, rank_zero_only=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._hosted.finish()

    def state_dict(self) -> dict[str, Any]:
        return self._hosted.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Nothing: `resume` in `setup` has read it, before the network's weights were loaded."""

    def _network(self, pl_module: Any) -> nn.Module:
        network: nn.Module = pl_module if self._module is None else pl_module.get_submodule(self._module)
        return network

    def _copies(self, trainer: Any) -> list[nn.Module]:
        averages = (getattr(callback, "_average_model", None) for callback in trainer.callbacks)
        return [self._network(average.module) for average in averages if average is not None]
