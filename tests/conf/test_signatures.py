"""A default is written in the class: schemas are read from its signature, and YAML files repeat or overrule it."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hydra.utils import get_object
from omegaconf import OmegaConf

from gsprune.conf import schemas
from gsprune.conf.schemas import FROM_THE_LOOP
from gsprune.conf.signatures import REQUIRED, config_type, settings

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT / "conf", ROOT / "gsprune" / "conf")
CLASSES = [
    "gsprune.Pruner",
    "gsprune.Rule",
    *(f"gsprune.schedules.{name}" for name in ("OneShot", "Ramp", "Linear", "Cubic", "Cosine", "Exponential")),
    *(
        f"gsprune.criteria.{name}"
        for name in (
            "Abs",
            "Elementwise",
            "Fisher",
            "GateGradient",
            "Magnitude",
            "Movement",
            "OBS",
            "PLATON",
            "Random",
            "SparseGPT",
            "Wanda",
            "Weighted",
        )
    ),
    "gsprune.app.cut_settings.CutSettings",
    "gsprune.training.trainer.Trainer",
]
OTHER_THAN_THE_CLASS = {  # files that overrule a default on purpose
    "dataset/imagefolder.yaml: num_workers": 4,
    "pruner/heads_and_neurons.yaml: kinds": ["neurons"],
    "pruner/heads_and_neurons.yaml: target_sparsity": 0.5,
    "pruner/none.yaml: target_sparsity": 0.0,
    "pruner/units_and_weights.yaml: target_sparsity": 0.9,
}
# what people read, and lists, whose criteria have no schema and are shown by `--cfg job` as they are written
REPEATING = {
    "cut/default.yaml",
    "trainer/default.yaml",
    "pruner/heads_and_neurons.yaml",
    "pruner/units_and_weights.yaml",
}


@pytest.mark.parametrize("target", CLASSES)
def test_the_source_says_what_the_class_says(target: str) -> None:
    """Names, defaults and types that are read from the source are those of the imported class."""
    made = get_object(target)
    parameters = [part for name, part in inspect.signature(made).parameters.items() if name not in FROM_THE_LOOP]
    hints = get_type_hints(made.__init__)
    expected = [
        (part.name, config_type(hints[part.name]), REQUIRED if part.default is part.empty else part.default)
        for part in parameters
        if part.name in hints  # others are those of `**settings`
    ]
    assert [tuple(found) for found in settings(target, without=FROM_THE_LOOP)] == expected


def test_sources_are_read_without_torch() -> None:
    code = "import sys, gsprune.conf.schemas; print({'torch', 'numpy', 'mlflow'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_schema_has_keys_for_what_a_file_can_say() -> None:
    schema = OmegaConf.structured(schemas.PrunerConfig)
    assert set(schema) - {"_target_", "_partial_", "_convert_"} == {
        name
        for name in inspect.signature(get_object("gsprune.Pruner")).parameters
        if name not in {*FROM_THE_LOOP, "rules"}
    }
    assert OmegaConf.is_missing(schema, "criterion")
    assert (schema.include, schema.keep.heads, schema.pattern) == (["*"], None, "1x1")
    assert {f.name: f.type for f in dataclasses.fields(schemas.PrunerConfig)}["kinds"] == list[str] | None


def test_a_configuration_is_pickled_with_its_schema() -> None:
    config = OmegaConf.structured(schemas.PrunerConfig)
    assert pickle.loads(pickle.dumps(config)) == config


def nodes(config: Any) -> Iterator[dict[str, Any]]:
    """The parts of a file that name what they build."""
    if isinstance(config, dict):
        if "_target_" in config:
            yield config
        config = list(config.values())
    if isinstance(config, list):
        for part in config:
            yield from nodes(part)


def from_files() -> Iterator[tuple[str, bool, str, Any, Any]]:
    """File, whether it has a schema, setting, value and the class's default, of each setting in a file of ours."""
    for folder in FOLDERS:
        for file in sorted(folder.rglob("*.yaml")):
            config = yaml.safe_load(file.read_text())
            extended = [str(part) for part in config.get("defaults", ()) if str(part).startswith("/gsprune_")]
            if "/gsprune_trainer@_here_" in extended:
                config["_target_"] = "gsprune.training.trainer.Trainer"
            if "/gsprune_cut@_here_" in extended:
                config["_target_"] = "gsprune.app.cut_settings.CutSettings"
            for node in nodes(config):
                if not node["_target_"].startswith("gsprune."):
                    continue
                parameters = inspect.signature(get_object(node["_target_"])).parameters
                for name, value in node.items():
                    if name in parameters:
                        yield str(file.relative_to(folder)), bool(extended), name, value, parameters[name].default


def test_files_repeat_the_defaults_of_the_class_or_overrule_them_on_purpose() -> None:
    found = {
        f"{file}: {name}": value
        for file, _, name, value, default in from_files()
        if default is not inspect.Parameter.empty
        and not isinstance(value, dict)
        and name != "rules"
        and "${" not in str(value)
        and value != default
    }
    assert found == OTHER_THAN_THE_CLASS


def test_other_files_do_not_repeat_what_their_schema_says() -> None:
    repeated = {file for file, extended, _, value, default in from_files() if extended and value == default}
    assert repeated == REPEATING
    whole = yaml.safe_load((ROOT / "conf/trainer/default.yaml").read_text())
    assert [name for name in whole if name != "defaults"] == [part.name for part in settings(CLASSES[-1])]
