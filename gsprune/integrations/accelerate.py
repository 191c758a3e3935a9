"""accelerate: `prepare(accelerator, pruner)` behind `accelerator.prepare(model, optimizer, ...)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gsprune.extras import need
from gsprune.pruner.pruner import Pruner

__all__ = ["FILE", "prepare"]

FILE = "pruner.pt"  # in each state of the accelerator


def prepare(accelerator: Any, pruner: Pruner, *optimizers: Any) -> Pruner:
    """Attach a pruner to the prepared optimizers; `save_state` and `load_state` of the accelerator take it along.

    The state is loaded before the network's weights: where units had been cut out, the network is cut first. (What
    `register_for_checkpointing` takes is loaded last.)

    Args:
        accelerator: an `accelerate.Accelerator`.
        pruner: made with the network as it was before `accelerator.prepare`, and with its `steps_per_epoch`.
        optimizers: the default is those that the pruner was made with, then those that the accelerator prepared.

    Raises:
        MissingExtraError: accelerate is too old.
        ValueError: there is no optimizer; `attach` refuses them.
        FileNotFoundError: when a state without a pruner is loaded.
    """
    need("accelerate")
    pruner.attach(*(optimizers or ([] if pruner.optimizers else accelerator._optimizers)))

    def save(models: Any, weights: Any, folder: str) -> None:
        if accelerator.is_main_process:
            Path(folder).mkdir(parents=True, exist_ok=True)
            torch.save(pruner.state_dict(), Path(folder) / FILE)

    def load(models: Any, folder: str) -> None:
        pruner.load_state_dict(torch.load(Path(folder) / FILE, map_location="cpu", weights_only=True))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    return pruner
