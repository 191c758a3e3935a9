"""The networks of a job as programs of `torch.export`, which MLflow loads without gsprune and without their code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from gsprune.app.stages.context import Context
from gsprune.export.program_file import write_program
from gsprune.text.display import logger
from gsprune.text.redact import last_line

log = logger(__name__)


def keep_program(job: Context, model: nn.Module, example: Any, path: Path) -> None:
    """Write a network as a program if the tracker logs them; one that torch.export cannot follow is a warning.

    Args:
        path: inside the job's folder.
    """
    if not (job.first and getattr(job.tracker, "log_program", False)):
        return
    name = os.path.relpath(path, job.folder)

    def write() -> None:
        try:
            write_program(path, model, example)
        except OSError:
            raise
        except Exception as error:  # torch has many
            path.unlink(missing_ok=True)
            log.warning(
                "%s is not written, so mlflow.pytorch.load_model has no network here: %s", name, last_line(error)
            )

    with job.watch.part("files"):
        job.writer.write(name, write, "mlflow.pytorch.load_model has no network here")
