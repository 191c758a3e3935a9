"""What makes a logged model that holds a program one of MLflow's flavour "pytorch", with its signature.

The program lies in the model's own folder as `model.pt2` (`gsprune.export.program_file`), where MLflow looks for it.
"""

from __future__ import annotations

import json
import platform
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gsprune.files.disk import write_atomic
from gsprune.files.layout import SIGNATURE

__all__ = ["write_flavour"]

REQUIREMENTS, ENVIRONMENT = "requirements.txt", "python_env.yaml"


def write_flavour(folder: Path, program: Path, *, model_id: str, run_id: str | None) -> None:
    """Write `MLmodel`, and what has to be installed to serve it, into a folder.

    Where a network takes one tensor it is of MLflow's flavour "python_function" too.
    """
    import mlflow
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    found = _signature_of(program)

    def schema(which: str) -> Any:
        return Schema(
            [TensorSpec(np.dtype(spec["dtype"]), tuple(spec["shape"]), spec.get("name")) for spec in found[which]]
        )

    signature = ModelSignature(schema("inputs"), schema("outputs"))
    size = program.stat().st_size
    model = Model(run_id=run_id, model_id=model_id, signature=signature, model_size_bytes=size)
    model.add_flavor("pytorch", model_data=".", pytorch_version=found["torch"], code=None)
    if len(found["inputs"]) == 1 and "name" not in found["inputs"][0]:
        model.add_flavor(
            "python_function",
            loader_module="mlflow.pytorch",
            data=".",
            python_version=platform.python_version(),
            env={"virtualenv": ENVIRONMENT},
            model_config={"device": "cpu"},  # the program stays where it is
        )
    needed = [
        f"mlflow=={mlflow.__version__}",
        f"torch=={found['torch'].partition('+')[0]}",
        f"numpy=={version('numpy')}",
    ]
    environment = [
        f"python: {platform.python_version()}",
        "build_dependencies: [pip, setuptools, wheel]",
        f"dependencies: [-r {REQUIREMENTS}]",
    ]
    for name, lines in ((REQUIREMENTS, needed), (ENVIRONMENT, environment)):
        write_atomic(folder / name, "\n".join([*lines, ""]).encode())
    model.save(str(folder / "MLmodel"))


def _signature_of(program: Path) -> dict[str, Any]:
    """What `write_program` has noted in the file; nothing of the program is loaded."""
    with zipfile.ZipFile(program) as archive:
        (name,) = (name for name in archive.namelist() if name.rpartition("/")[2] == SIGNATURE)
        return dict(json.loads(archive.read(name)))
