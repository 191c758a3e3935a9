"""Every option of every group composes and builds what it says; mistakes are refused with Hydra's own sentence."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, MissingConfigException
from hydra.types import RunMode
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

import gsprune
from gsprune.app.configuration import NUMBERS, wanted_sparsity
from gsprune.conf import schemas
from gsprune.criteria import Abs
from gsprune.schedules import OneShot
from gsprune.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
Compose = Callable[..., DictConfig]


def options(group: str, base: Path = ROOT / "conf") -> list[str]:
    return sorted(file.stem for file in (base / group).glob("*.yaml"))


PRUNERS = options("pruner", ROOT / "gsprune/conf")
SEVERAL = ("heads_and_neurons", "units_and_weights")
SINGLE = [option for option in PRUNERS if option not in SEVERAL]
SCHEDULES = options("pruner/schedule", ROOT / "gsprune/conf")
GROUPS = ("dataset", "model", "optimizer", "lr_schedule", "trainer", "tracking", "mode", "cut")
CHOICES = [
    *((group, option) for group in GROUPS for option in options(group)),
    *(("pruner", option) for option in PRUNERS),
    *(("pruner/schedule", option) for option in SCHEDULES),
]


def targets(config: Any) -> list[str]:
    """All `_target_`s, however deep."""
    if not isinstance(config, dict):
        return []
    return [*([config["_target_"]] if "_target_" in config else []), *(t for v in config.values() for t in targets(v))]


def test_nothing_is_missing_from_the_groups() -> None:
    own = ["abs", "elementwise", "fisher", "magnitude", "movement", "none", "obs", "platon", "random", "weighted"]
    assert sorted([*own, "sparsegpt", "wanda", *SEVERAL]) == PRUNERS
    assert SCHEDULES == ["cosine", "cubic", "exponential", "linear", "one_shot"]
    assert options("model") == [
        "convnet",
        "hf_sequence_classification",
        "lenet_300_100",
        "mobilenet_v3_small",
        "resnet18",
        "resnet50",
        "vit_tiny",
    ]
    assert options("dataset") == [
        "cifar10",
        "cifar100",
        "digits",
        "fashion_mnist",
        "imagefolder",
        "mnist",
        "random",
        "text_classification",
    ]


TEXT = ["dataset=text_classification", "model=hf_sequence_classification", "model.name=bert", "dataset.train=a.csv"]
FILLED = {
    "imagefolder": ["dataset.path=pictures", "dataset.num_classes=5"],
    "text_classification": TEXT[1:],
    "hf_sequence_classification": [TEXT[0], *TEXT[2:]],
}


@pytest.mark.parametrize(("group", "option"), CHOICES)
def test_every_option_composes_and_its_targets_exist(group: str, option: str, compose_config: Compose) -> None:
    filled = FILLED.get(option, [])
    config = OmegaConf.to_container(compose_config(f"{group}={option}", *filled), resolve=True, throw_on_missing=True)
    found = targets(config)
    assert len(found) >= 9
    for target in found:
        assert callable(get_method(target)), target


EXPERIMENTS = ("cifar10_resnet18_weighted", "digits_sweep", "imagenet_resnet50_elementwise", "smoke")


def test_every_experiment_begins_with_what_it_takes_and_gives() -> None:
    assert options("experiment") == list(EXPERIMENTS)
    for name in EXPERIMENTS:
        package, *comment = (ROOT / f"conf/experiment/{name}.yaml").read_text().partition("\ndefaults:")[0].splitlines()
        assert package == "# @package _global_"
        assert all(line.startswith("# ") for line in comment)
        text = " ".join(line.removeprefix("# ") for line in comment)
        assert " Takes: " in text
        assert " Gives: " in text


@pytest.mark.parametrize(
    ("experiment", "model", "dataset", "criterion", "sparsity", "epochs"),
    [
        ("cifar10_resnet18_weighted", "resnet18", "cifar10", "Weighted", 0.5, (60, 60)),
        ("digits_sweep", "convnet", "digits", "Weighted", 0.5, (6, 8)),
        ("imagenet_resnet50_elementwise", "resnet50", "imagefolder", "Elementwise", 0.9, (90, 30)),
        ("smoke", "convnet", "digits", "Weighted", 0.5, (1, 1)),
    ],
)
def test_every_experiment_composes_and_builds(
    experiment: str,
    model: str,
    dataset: str,
    criterion: str,
    sparsity: float,
    epochs: tuple[int, int],
    compose_config: Compose,
) -> None:
    filled = ["dataset.path=pictures"] if dataset == "imagefolder" else []
    config = compose_config(f"+experiment={experiment}", *filled)
    assert config.dataset.builder._target_ == f"gsprune.zoo.datasets.{dataset}"
    assert config.model._target_ == f"gsprune.zoo.models.{model}"
    assert config.pruner.criterion._target_ == f"gsprune.criteria.{criterion}"
    assert wanted_sparsity(config.pruner) == sparsity
    assert (config.trainer.dense_epochs, config.trainer.prune_epochs) == epochs
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    for target in targets(plain):
        assert callable(get_method(target)), target
    assert isinstance(instantiate(config.trainer), Trainer)
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = instantiate(config.optimizer)([weight])
    assert optimizer.defaults["lr"] == config.optimizer.lr
    schedule = instantiate(config.lr_schedule)(optimizer, total_steps=100)
    assert 0 < schedule.get_last_lr()[0] < config.optimizer.lr  # warming up
    assert type(instantiate(config.pruner).keywords["criterion"]).__name__ == criterion


def test_an_experiment_gives_way_to_the_command_line(compose_config: Compose) -> None:
    config = compose_config(
        "+experiment=cifar10_resnet18_weighted", "model=resnet50", "optimizer.lr=0.05", "pruner=abs"
    )
    assert config.model._target_ == "gsprune.zoo.models.resnet50"
    assert (config.optimizer.lr, config.optimizer.momentum) == (0.05, 0.9)
    assert config.pruner.criterion._target_ == "gsprune.criteria.Abs"


def with_hydra(*overrides: str) -> DictConfig:
    """As `compose_config`, inside of it, with Hydra's own settings."""
    return compose("config", overrides=list(overrides), return_hydra_config=True)


def test_the_digits_sweep_has_three_variants_and_their_control(compose_config: Compose) -> None:
    hydra = with_hydra("+experiment=digits_sweep").hydra
    assert hydra.mode == RunMode.MULTIRUN
    lines = [f"{key}={value}" for key, value in hydra.sweeper.params.items()]
    axes = [list(axis.sweep_string_iterator()) for axis in OverridesParser.create().parse_overrides(lines)]
    assert axes == [["elementwise", "abs", "weighted", "none"], ["0.5", "0.7", "0.9"], ["0", "1", "2"]]


def test_every_sweep_has_a_parent_run_and_a_report(compose_config: Compose) -> None:
    callback = with_hydra().hydra.callbacks.gsprune
    assert type(instantiate(callback)).__name__ == "SweepCallback"


def test_no_preset_is_without_a_test() -> None:
    assert options("hydra/launcher") == ["ray_cluster", "slurm"]
    assert options("hydra/sweeper") == ["optuna", "pareto", "pareto_macs"]
    assert options("hydra/sweeper/sampler") == ["cmaes", "gp", "nsgaii", "qmc", "random", "tpe"]


def test_the_slurm_preset_is_what_sbatch_gets(compose_config: Compose) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    config = with_hydra("hydra/launcher=slurm", "hydra.launcher.partition=gpu", "hydra.launcher.timeout_min=600")
    found = config.hydra.launcher
    assert found._target_ == "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
    resources = ("partition", "timeout_min", "nodes", "gpus_per_node", "cpus_per_task", "mem_gb", "array_parallelism")
    assert [found[name] for name in resources] == ["gpu", 600, 1, 1, 8, 32, 16]


def test_the_ray_preset_joins_a_cluster(compose_config: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    found = with_hydra("hydra/launcher=ray_cluster", "hydra.launcher.ray.remote.num_gpus=0").hydra.launcher
    assert found._target_ == "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"
    assert OmegaConf.to_container(found.ray, resolve=True) == {
        "init": {
            "address": "auto",
            "object_store_memory": None,
            "runtime_env": {"env_vars": {"MLFLOW_TRACKING_URI": "http://tracking:5000"}},
        },
        "remote": {"num_cpus": 4, "num_gpus": 0},
    }


@pytest.mark.parametrize(
    ("preset", "objective", "directions", "pruners"),
    [
        ("pareto", "[val_accuracy,params_nonzero]", ["maximize", "minimize"], "choice(elementwise,abs,weighted)"),
        ("pareto_macs", "[val_accuracy,macs]", ["maximize", "minimize"], "choice(abs,weighted)"),
    ],
)
@pytest.mark.parametrize("sampler", ["tpe", "nsgaii"])
def test_a_search_has_one_direction_for_each_number(
    preset: str, objective: str, directions: list[str], pruners: str, sampler: str, compose_config: Compose
) -> None:
    found = with_hydra(f"hydra/sweeper={preset}", f"hydra/sweeper/sampler={sampler}").hydra.sweeper
    assert (found.params.objective, found.params.pruner) == (objective, pruners)
    assert list(found.direction) == directions
    assert set(objective.strip("[]").split(",")) <= set(NUMBERS)
    assert (found.max_failure_rate, found.sampler.seed) == (1.0, None)  # a study that goes on would repeat itself
    assert found.sampler._target_.lower().endswith(f"{sampler}sampler")


def test_the_defaults(compose_config: Compose) -> None:
    config = compose_config()
    assert (config.seed, config.objective) == (0, "val_accuracy")
    assert config.model._target_ == "gsprune.zoo.models.convnet"
    assert config.dataset.builder._target_ == "gsprune.zoo.datasets.digits"
    assert config.pruner.criterion._target_ == "gsprune.criteria.Weighted"
    assert config.pruner.schedule._target_ == "gsprune.schedules.Cubic"
    assert config.tracking._target_ == "gsprune.tracking.tracker.MLflowTracker"


@pytest.mark.parametrize(
    ("option", "target", "criterion", "sparsity", "decay"),
    [
        ("elementwise", "gsprune.Pruner", "Elementwise", 0.9, 0.9),
        ("abs", "gsprune.Pruner", "Abs", 0.5, 0.95),
        ("weighted", "gsprune.Pruner", "Weighted", 0.5, 0.95),
        ("fisher", "gsprune.Pruner", "Fisher", 0.5, 0.95),
        ("movement", "gsprune.Pruner", "Movement", 0.9, 1.0),
        ("obs", "gsprune.Pruner", "OBS", 0.5, None),
        ("platon", "gsprune.Pruner", "PLATON", 0.9, 0.85),
        ("sparsegpt", "gsprune.Pruner", "SparseGPT", 0.5, None),
        ("wanda", "gsprune.Pruner", "Wanda", 0.5, None),
        ("magnitude", "gsprune.Pruner", "Magnitude", 0.9, None),
        ("random", "gsprune.Pruner", "Random", 0.9, None),
        ("none", "gsprune.pruner.pruner.no_pruning", "Weighted", 0.0, 0.95),
    ],
)
def test_defaults_of_each_pruner(
    option: str, target: str, criterion: str, sparsity: float, decay: float | None, compose_config: Compose
) -> None:
    pruner = compose_config(f"pruner={option}").pruner
    assert pruner._target_ == target
    assert pruner.criterion._target_ == f"gsprune.criteria.{criterion}"
    assert wanted_sparsity(pruner) == sparsity
    assert pruner.criterion.get("decay") == decay


@pytest.mark.parametrize("option", SINGLE)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_criterion_and_schedule_are_built(option: str, schedule: str, compose_config: Compose) -> None:
    config = compose_config(f"pruner={option}", f"pruner/schedule={schedule}")
    partial = instantiate(config.pruner)
    name = "".join(word.capitalize() for word in schedule.split("_"))
    assert type(partial.keywords["schedule"]).__name__ == name
    assert type(partial.keywords["criterion"]).__name__ == config.pruner.criterion._target_.split(".")[-1]
    assert partial.keywords["include"] == ["*"]  # plain containers: nothing of OmegaConf in the library
    assert type(partial.keywords["include"]) is list
    assert type(partial.keywords["keep"]) is dict


@pytest.mark.parametrize("option", SEVERAL)
def test_a_list_of_rules_is_built(option: str, compose_config: Compose) -> None:
    """Entries are changed by their number, checked like a pruner of one rule, and share a schedule."""
    changed = ("pruner.rules.0.target_sparsity=0.25", "pruner.rules.1.scope=local", "pruner/schedule=cosine")
    partial = instantiate(compose_config(f"pruner={option}", *changed).pruner)
    first, second = partial.keywords["rules"]
    assert partial.func is gsprune.Pruner
    assert (type(first), type(second)) == (gsprune.Rule, gsprune.Rule)
    assert (first.target_sparsity, second.scope) == (0.25, "local")
    assert type(partial.keywords["schedule"]).__name__ == "Cosine"
    assert (first.schedule, second.schedule) == (None, None)
    assert type(first.kinds if option == "heads_and_neurons" else first.include) is list


def test_a_list_of_rules_is_written_in_full_elsewhere(compose_config: Compose) -> None:
    entry = "{criterion:{_target_:gsprune.criteria.Abs},keep:{heads:8},schedule:{_target_:gsprune.schedules.OneShot}}"
    partial = instantiate(compose_config("pruner=heads_and_neurons", f"pruner.rules=[{entry}]").pruner)
    [rule] = partial.keywords["rules"]
    assert (type(rule.criterion), type(rule.schedule)) == (Abs, OneShot)
    assert rule.counts == {"heads": 8}


def test_files_and_settings_of_before_work_with_a_warning(compose_config: Compose) -> None:
    """`pruners` in a file that `gsprune convert` wrote, and `target` instead of `budget`."""
    entry = {"criterion": {"_target_": "gsprune.criteria.Magnitude"}, "target_sparsity": 0.5, "scope": "local"}
    node = OmegaConf.merge(OmegaConf.structured(schemas.PrunersConfig), {"pruners": [entry]})
    with pytest.warns(FutureWarning, match="rules="):
        pruner = instantiate(node)(nn.Linear(2, 2), epochs=3)
    assert [(rule.target_sparsity, rule.scope) for rule in pruner.rules] == [(0.5, "local")]
    made = instantiate(compose_config("pruner=weighted", "pruner.target.params=0.9").pruner)
    with pytest.warns(FutureWarning, match=r"pruner\.budget"):
        pruner = made(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), example_input=torch.ones(1, 8))
    assert pruner.budget.share == 0.9


def test_every_pruner_has_the_same_keys(compose_config: Compose) -> None:
    """A sweep over `pruner=none,abs` with any other override has to compose."""
    keys = {option: set(compose_config(f"pruner={option}").pruner) for option in SINGLE}
    assert len({frozenset(names) for names in keys.values()}) == 1
    assert compose_config("pruner=none", "pruner.target_sparsity=0.5").pruner.target_sparsity == 0.5


@pytest.mark.parametrize("pattern", ["2:4", "1x1", "4x1", "1x16", "10:20"])
def test_patterns_arrive_as_text(pattern: str, compose_config: Compose) -> None:
    """In YAML 1.1, 2:4 without quotes is the number 124 (base 60); on the command line it is not."""
    assert compose_config(f"pruner.pattern={pattern}").pruner.pattern == pattern


@pytest.mark.parametrize(
    ("override", "keep"),
    [
        ("pruner.keep.heads=8", {"channels": None, "neurons": None, "heads": 8, "residual": None}),
        ("pruner.keep={heads:8,neurons:600}", {"channels": None, "neurons": 600, "heads": 8, "residual": None}),
        ("pruner.keep=null", None),
    ],
)
def test_counts_to_keep(override: str, keep: dict[str, int | None] | None, compose_config: Compose) -> None:
    assert compose_config(override).pruner.keep == keep


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("pruner.sparsityy=0.9", "Key 'sparsityy' not in 'PrunerConfig'"),
        ("pruner.keep.head=8", "Key 'head' not in 'KeepConfig'"),
        ("pruner.budget.maccs=0.5", "Key 'maccs' not in 'BudgetConfig'"),
        ("pruner.budget.macs=half", "Value 'half' of type 'str' could not be converted to Float"),
        ("pruner.criterion.decayy=0.9", "Key 'decayy' not in 'GateGradientConfig'"),
        ("pruner.schedule.end=3", "Key 'end' not in 'RampConfig'"),
        ("trainer.epochs=3", "Key 'epochs' not in 'TrainerConfig'"),
        ("model.widht=8", "Key 'widht' is not in struct"),
        ("pruner.target_sparsity=abc", "Value 'abc' of type 'str' could not be converted to Float"),
        ("pruner.min_kept=1.5", "Value '1.5' of type 'float' could not be converted to Integer"),
        ("pruner.keep.heads=few", "Value 'few' of type 'str' could not be converted to Integer"),
        ("pruner.structured=perhaps", "Value 'perhaps' is not a valid bool (type str)"),
        ("trainer.dense_epochs=abc", "Value 'abc' of type 'str' could not be converted to Integer"),
    ],
)
def test_wrong_keys_and_types_are_refused(override: str, sentence: str, compose_config: Compose) -> None:
    with pytest.raises(ConfigCompositionException) as caught:
        compose_config(override)
    assert sentence in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("pruner=weigted", "Could not find 'pruner/weigted'"),
        ("pruner/schedule=cubik", "Could not find 'pruner/schedule/cubik'"),
        ("model=convnett", "Could not find 'model/convnett'"),
    ],
)
def test_unknown_options_are_refused_with_the_known_ones(override: str, sentence: str, compose_config: Compose) -> None:
    with pytest.raises(MissingConfigException) as caught:
        compose_config(override)
    assert sentence in str(caught.value)
    assert "Available options" in str(caught.value)


def test_the_files_of_trainer_and_cut_are_their_schemas(compose_config: Compose) -> None:
    assert compose_config().trainer == OmegaConf.structured(schemas.TrainerConfig)
    assert compose_config("mode=cut").cut == OmegaConf.structured(schemas.SCHEMAS["gsprune_cut"])


def test_modes_differ_in_training_and_in_repair(compose_config: Compose) -> None:
    found = {mode: compose_config(f"mode={mode}") for mode in options("mode")}
    assert {
        mode: (cfg.mode, cfg.trainer.dense_epochs, cfg.trainer.prune_epochs, cfg.cut.repair)
        for mode, cfg in found.items()
    } == {
        "train": ("train", 6, 8, None),
        "cut": ("cut", 0, 0, "least_squares"),
    }
    assert compose_config() == found["train"]


def test_registering_again_changes_nothing(compose_config: Compose) -> None:
    before = compose_config()
    schemas.register()
    assert compose_config() == before


@pytest.mark.parametrize("model", [model for model in options("model") if not model.startswith("hf_")])
@pytest.mark.parametrize(
    ("dataset", "shape"), [("digits", (1, 8, 8)), ("mnist", (1, 28, 28)), ("cifar100", (3, 32, 32))]
)
def test_picture_size_flows_from_data_to_model(
    model: str, dataset: str, shape: tuple[int, int, int], compose_config: Compose
) -> None:
    config = compose_config(f"model={model}", f"dataset={dataset}")
    config = OmegaConf.to_container(config, resolve=True)["model"]
    assert (config["in_channels"], config["image_size"], config["image_size"]) == shape
    assert config.pop("weights") is None  # the job's, not the network's
    with torch.device("meta"):  # shapes alone: no weights are made
        network: nn.Module = instantiate(config)
        out = network.eval()(torch.empty(2, *shape))
    assert out.shape == (2, 100 if dataset == "cifar100" else 10)


def test_changing_the_picture_size_once_is_enough(compose_config: Compose) -> None:
    config = compose_config("dataset.image_size=16", "dataset.channels=3", "model=vit_tiny")
    assert (config.model.image_size, config.model.in_channels) == (16, 3)


@pytest.mark.slow
def test_help_lists_the_groups_without_torch() -> None:
    code = (
        "import runpy, sys; sys.argv = ['train.py', '--help']\n"
        "try: runpy.run_path('train.py', run_name='__main__')\n"
        "finally: print(sorted({'torch', 'mlflow', 'sklearn'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1] == "[]"
    for line in (
        "dataset: cifar10, cifar100, digits, fashion_mnist, imagefolder, mnist, random, text_classification",
        "model: convnet, hf_sequence_classification, lenet_300_100, mobilenet_v3_small, resnet18, resnet50, vit_tiny",
        f"pruner: {', '.join(PRUNERS)}",
        "pruner/schedule: cosine, cubic, exponential, linear, one_shot",
        "tracking: mlflow, none",
    ):
        assert line in done.stdout.splitlines()
