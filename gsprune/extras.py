"""The packages that come with an extra, as in `pip install 'gsprune[app]'`, imported where they are used.

The library itself takes torch, safetensors and numpy; its Hydra groups take hydra-core and omegaconf.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

__all__ = ["EXTRAS", "MissingExtraError", "check_command", "distribution", "is_installed", "need"]

EXTRAS = {
    "accelerate": ("accelerate",),
    "app": ("filelock", "jinja2", "matplotlib", "mlflow", "pandas", "rich", "shtab", "sklearn", "torchvision"),
    "executorch": ("executorch",),
    "hf": ("transformers",),
    "hub": ("huggingface_hub",),
    "lightning": ("lightning",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "openvino": ("openvino",),
    "optuna": ("optuna",),
    "peft": ("peft",),
    "joblib": ("hydra_plugins.hydra_joblib_launcher",),
    "timm": ("timm",),
    "slurm": ("hydra_plugins.hydra_submitit_launcher",),
    "ray": ("hydra_plugins.hydra_ray_launcher",),
}
# The oldest releases that `gsprune.integrations` work with, as in pyproject.toml.
OLDEST = {
    "accelerate": "1.3",
    "huggingface_hub": "1.0",
    "lightning": "2.5.5",
    "peft": "0.19",
    "timm": "1.0.31",
    "transformers": "5",
}
_LAUNCHERS = {
    "joblib": "joblib",
    "slurm": "slurm",
    "submitit_slurm": "slurm",
    "submitit_local": "slurm",
    "ray": "ray",
    "ray_cluster": "ray",
}
_EVERY_RUN = ("filelock", "matplotlib", "rich")  # of train.py, whatever its data, model and tracking


class MissingExtraError(ImportError, ValueError):
    """A package is not installed, or is too old; the message names it and the extra that brings it."""


def need(module: str) -> Any:
    """Import a module that comes with an extra.

    Raises:
        MissingExtraError: the package is not installed, or is too old.

    >>> need("rich.table").__name__
    'rich.table'
    """
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or module).partition(".")[0] != module.partition(".")[0]:
            raise  # it is installed, and lacks something itself
        raise _missing(module) from None
    _check_version(module.partition(".")[0])
    return found


def _check_version(package: str) -> None:
    version, oldest = str(getattr(import_module(package), "__version__", "")), OLDEST.get(package, "0")
    if version and _numbers(version) < _numbers(oldest):
        raise MissingExtraError(
            f"{distribution(package)} {version} is too old: gsprune works with {oldest} and newer "
            f"(pip install --upgrade {distribution(package)})"
        )


def _numbers(version: str) -> list[int]:
    """
    >>> _numbers("5.0.0rc1"), _numbers("1.10") > _numbers("1.9.2")
    ([5, 0, 0], True)
    """
    return [int(part) for part in re.match(r"[\d.]*", version)[0].rstrip(".").split(".") if part]  # type: ignore[index]


def check_command(arguments: Sequence[str]) -> None:
    """Check what `train.py <arguments>` needs in any case, before Hydra reads the arguments: of a launcher that is not
    installed it would say only that there is no such choice.

    Raises:
        MissingExtraError: a package of these is not installed.
    """
    launchers = [found[1] for text in arguments if (found := re.fullmatch(r"\+{0,2}hydra/launcher=(\w+)", text))]
    extras = [_LAUNCHERS[name] for name in launchers if name in _LAUNCHERS]
    for module in (*_EVERY_RUN, *(name for extra in extras for name in EXTRAS[extra])):
        if not is_installed(module):
            raise _missing(module)


def is_installed(module: str) -> bool:
    """Whether a module can be found; it is not imported."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # nor is what it lies in
        return False


def _missing(module: str) -> MissingExtraError:
    extra = next(name for name, modules in EXTRAS.items() if module.startswith(modules))
    return MissingExtraError(f"{distribution(module)} is not installed: pip install 'gsprune[{extra}]'")


def distribution(module: str) -> str:
    """The name that pip knows a module by.

    >>> distribution("sklearn.tree"), distribution("hydra_plugins.hydra_joblib_launcher"), distribution("torch")
    ('scikit-learn', 'hydra-joblib-launcher', 'torch')
    """
    names = {"sklearn": "scikit-learn", "hydra": "hydra-core"}
    names["hydra_plugins"] = module.rpartition(".")[2].replace("_", "-")
    top = module.partition(".")[0]
    return names.get(top, top)
