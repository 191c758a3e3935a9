"""transformers: `Trainer(..., callbacks=[PruningCallback(Abs(), target_sparsity=0.5)])`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gsprune.criteria.base import Criterion
from gsprune.extras import need
from gsprune.integrations.hosted import Hosted, updates_in
from gsprune.integrations.pretrained import save_pretrained
from gsprune.pruner.pruner import Pruner
from gsprune.surgery.cut_plan import CutPlan

__all__ = ["FILE", "PruningCallback"]

FILE = "pruner.pt"  # in each of the Trainer's checkpoints

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback
else:
    PreTrainedModel, TrainerCallback = need("transformers").PreTrainedModel, need("transformers").TrainerCallback


class PruningCallback(TrainerCallback):
    """Prunes the network that a `transformers.Trainer` trains; at the end of training units are cut out of it.

    Scores are taken from the gradients that the optimizer sees: accumulated, unscaled, and clipped where
    `max_grad_norm` is above 0, so that a clipped step counts less. Each checkpoint of the Trainer holds the pruner's
    state, and `train(resume_from_checkpoint=...)` goes on to the bit, from the middle of an epoch too.
    `load_best_model_at_end` loads the best weights before the final mask is applied. Of a network that was cut
    `Trainer.save_model`, `push_to_hub` and `model.save_pretrained` write what
    `gsprune.integrations.pretrained.save_pretrained` does.

    Args:
        criterion, settings: as of `gsprune.Pruner`. `example_input` may be left out: two samples of the data set.
        resume_from_checkpoint: what `train` is given, under `shrink="each_update"` (the network is cut before its
            weights are loaded), or where the checkpoint lies in another folder than the Trainer's `output_dir`.

    Attributes:
        pruner: the `gsprune.Pruner`, once training has begun.

    Raises:
        ValueError: `load_best_model_at_end` with `shrink="each_update"`; `hyperparameter_search`; a checkpoint without
            a pruner's state; what `Pruner` refuses. All before the first step.

    Example:
        >>> from gsprune.criteria import Abs
        >>> PruningCallback(Abs(), target_sparsity=0.5, kinds=["heads"]).pruner is None
        True
    """

    def __init__(
        self, criterion: Criterion | None = None, *, resume_from_checkpoint: str | None = None, **settings: Any
    ) -> None:
        self._hosted = Hosted(criterion, settings, owner="PruningCallback")
        self._checkpoint = resume_from_checkpoint

    @property
    def pruner(self) -> Pruner | None:
        return self._hosted.pruner

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._hosted.each_update and args.load_best_model_at_end:
            raise ValueError(
                'load_best_model_at_end loads weights of another size than shrink="each_update" leaves: take one'
            )
        if self._hosted.each_update and self._checkpoint is not None:
            self._resume(kwargs["model"], Path(self._checkpoint))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_hyper_param_search:
            raise ValueError("hyperparameter_search trains many networks, and PruningCallback prunes one: search first")
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        if state.global_step and self.pruner is None:
            self._resume(model, Path(self._checkpoint or f"{args.output_dir}/checkpoint-{state.global_step}"))
        steps = min(updates_in(loader, args.gradient_accumulation_steps) or state.max_steps, state.max_steps)
        run = {"steps_per_epoch": steps, "epochs": state.max_steps / steps}
        self._hosted.start(model, [kwargs["optimizer"]], loader, **run)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hosted.follow(state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hosted.check_stepped()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is not None and self.pruner is not None:
            logs["sparsity"] = self.pruner.sparsity

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            torch.save(self._hosted.state_dict(), Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hosted.finish()
        model = kwargs["model"]
        if self.pruner is not None and self.pruner.plan is not None and isinstance(model, PreTrainedModel):
            model.save_pretrained = partial(_save, model, self.pruner.plan)  # type: ignore[method-assign]

    def _resume(self, model: Any, checkpoint: Path) -> None:
        if not (checkpoint / FILE).is_file():
            raise ValueError(
                f"{checkpoint} has no {FILE}: it was written without this callback, or lies elsewhere (then give "
                f"PruningCallback its path as resume_from_checkpoint)"
            )
        self._hosted.resume(model, torch.load(checkpoint / FILE, map_location="cpu", weights_only=True))


def _save(
    model: Any, plan: CutPlan, save_directory: str, *, is_main_process: bool = True, **of_the_trainer: Any
) -> None:
    """In place of the network's own `save_pretrained`, whose config.json is that of the dense network."""
    if of_the_trainer.get("push_to_hub"):
        raise ValueError("save_pretrained(push_to_hub=True) is not there for a pruned network: call push_to_hub")
    if is_main_process:
        save_pretrained(save_directory, model, plan)
