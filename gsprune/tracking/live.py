"""What a pruner has done, in a run of MLflow that somebody else has started: autologging, another application."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsprune.extras import need
from gsprune.tracking.mlflow_names import allowed_name

if TYPE_CHECKING:
    from gsprune.pruner.pruner import Pruner

__all__ = ["log"]


def log(pruner: Pruner, *, step: int, run_id: str | None = None) -> None:
    """Log a pruner's report, masks and a picture of them to the active run of MLflow.

    The numbers are those of `pruner.report()`, as metrics at `step`. The masks, in the dense network's shapes, are the
    artifact `masks/step_<step>.safetensors`, which `gsprune.load_masks` reads; the picture is the image `masks`.

    Args:
        step: of the loop's own count.
        run_id: of another run than the active one.

    Raises:
        ValueError: no run is active, and no `run_id` is given.
        MissingExtraError: mlflow or matplotlib is not installed.

    Example: `gsprune.tracking.log(pruner, step=epoch)` in a loop under `mlflow.autolog()`.
    """
    mlflow: Any = need("mlflow")
    active = mlflow.active_run()
    if run_id is None and active is None:
        raise ValueError("no run of MLflow is active: call this inside `with mlflow.start_run():`, or give run_id")
    run_id = run_id or active.info.run_id
    from gsprune.formats.masks import save_masks

    numbers = {allowed_name(name): value for name, value in pruner.report().items()}
    mlflow.log_metrics(numbers, step=step, run_id=run_id)
    masks = pruner.dense_masks()
    if not masks:  # a pruner without rules
        return
    from gsprune.plots.run_figures import mask_image

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"step_{step:06d}.safetensors")
        save_masks(path, masks)
        mlflow.log_artifact(str(path), "masks", run_id=run_id)
    picture = mask_image(masks, share=pruner.share)
    mlflow.MlflowClient().log_image(run_id, picture, key="masks", step=step, synchronous=True)
