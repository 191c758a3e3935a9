"""Random overrides of the reference application, from a seed: good values, bad values, wrong types, unknown names.

`combination` draws overrides as a command line would have them; `attempt` composes them and, where that passes, runs
the job on a handful of samples. Used by test_fuzz_conf.py and by benchmarks/faults_config.py.
"""

from __future__ import annotations

import os
import random
import warnings
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import CompactHydraException

from gsprune.app.configuration import objective
from gsprune.app.job import run, show_plan

ROOT = Path(__file__).parents[1]
LONGEST = 1000  # characters of a sentence

GROUPS = {
    "dataset": ("random", "random", "random", "random", "digits"),
    "model": ("convnet", "convnet", "convnet", "lenet_300_100", "lenet_300_100", "vit_tiny", "vit_tiny"),
    "optimizer": ("sgd", "adamw"),
    "lr_schedule": ("cosine", "constant"),
    "pruner": (
        "weighted",
        "abs",
        "fisher",
        "elementwise",
        "movement",
        "platon",
        "magnitude",
        "random",
        "none",
        "units_and_weights",
    ),
    "pruner/schedule": ("cubic", "linear", "cosine", "exponential", "one_shot"),
    "trainer": ("default",),
    "tracking": ("none",),
    "mode": ("train", "train", "cut"),
    "cut": ("default",),
}
RARE = {  # expensive, in need of files, or unknown
    "dataset": ("cifar10", "cifar100", "mnist", "fashion_mnist", "imagefolder", "text_classification", "digit"),
    "model": ("resnet18", "mobilenet_v3_small", "hf_sequence_classification", "resnet_18"),
    "optimizer": ("adam",),
    "lr_schedule": ("step",),
    "pruner": ("moovement", "heads_and_neurons", "obs", "sparsegpt", "wanda"),
    "pruner/schedule": ("log",),
    "trainer": ("fast",),
    "tracking": ("wandb",),
    "mode": ("prune",),
    "cut": ("fast",),
    "+experiment": ("smoke", "digits", "nothing"),
}
OWN = {  # keys that not every option of their group has
    "dataset": {"random": ("samples",), "imagefolder": ("path",), "text_classification": ("train",)},
    "model": {"convnet": ("width",), "vit_tiny": ("patch_size", "dim", "depth", "num_heads", "mlp_ratio")},
    "optimizer": {"sgd": ("momentum", "nesterov"), "adamw": ("betas",)},
    "lr_schedule": {"cosine": ("final_ratio",)},
}
ANY = (
    *("null", "true", "false", "0", "1", "-1", "0.5", "1.5", "-0.1", "1e9", "nan", "inf", "-inf", "abc", "''", "'a b'"),
    *("[]", "[1, 2]", "[a, b]", "{}", "{a: 1}", "???", str(2**31), str(2**64), str(10**30), "../x", "'${seed}'"),
    *("'${nothing.here}'", "2:4", "1e-30"),
)
# Values that size something are not drawn at random: a width of a billion is no mistake, only too much for us.
SIZES = ("null", "true", "0", "-1", "0.5", "1.5", "abc", "''", "[]", "[1, 2]", "{a: 1}", "nan", "???", "1", "2", "5")
VALUES: dict[str, tuple[str, ...]] = {
    "seed": ("0", "1", "12345", "-1"),
    "plan": ("true", "false"),
    "audit": ("true", "false"),
    "objective": ("val_accuracy", "[accuracy, sparsity]", "latency_ms", "accuracyy", "[]"),
    "dataset.batch_size": ("8", "32", "1"),
    "dataset.num_classes": ("10", "2", "3"),
    "dataset.image_size": ("8", "12", "16"),
    "dataset.channels": ("1", "3"),
    "dataset.split_seed": ("0", "1"),
    "dataset.samples": ("16", "40"),
    "dataset.seed": ("0", "7"),
    "dataset.device": ("cpu", "auto", "tpu"),
    "dataset.num_workers": ("0",),
    "dataset.path": ("nowhere", "/dev/null"),
    "dataset.train": ("nowhere.csv", "/dev/null"),
    "dataset.max_train": ("10", "null"),
    "model.width": ("2", "4"),
    "model.weights": ("null", "nowhere.safetensors", "/dev/null"),
    "model.num_classes": ("10", "3"),
    "model.image_size": ("8", "16"),
    "model.in_channels": ("1", "3"),
    "model.patch_size": ("2", "4", "3", "null"),
    "model.dim": ("8", "12"),
    "model.depth": ("1", "2"),
    "model.num_heads": ("2", "4", "3"),
    "model.mlp_ratio": ("1", "2"),
    "optimizer.lr": ("0.1", "0.001", "1e9", "-1"),
    "optimizer.momentum": ("0.9", "0", "2"),
    "optimizer.nesterov": ("true", "false"),
    "optimizer.weight_decay": ("0", "0.01"),
    "optimizer.betas": ("[0.9, 0.99]", "[0.9]", "[2, 2]"),
    "lr_schedule.warmup": ("0", "0.5", "1"),
    "lr_schedule.final_ratio": ("0", "0.1"),
    "pruner.target_sparsity": ("0.5", "0.9", "0", "0.97", "1"),
    "pruner.scope": ("local", "global", "isomorphic", "both"),
    "pruner.pattern": ("1x1", "4x1", "2x2", "2:4", "4x", "0x0", "3:2"),
    "pruner.per_channel": ("true", "false"),
    "pruner.structured": ("true", "false", "null"),
    "pruner.min_kept": ("1", "2", "9999"),
    "pruner.min_share": ("null", "0", "0.2", "1"),
    "pruner.include": ("['*']", "['*conv*']", "[nothing]", "[0]"),
    "pruner.exclude": ("[]", "['*']", "['*head*']", "[null]"),
    "pruner.keep.channels": ("1", "2", "99"),
    "pruner.keep.neurons": ("1", "4"),
    "pruner.keep.heads": ("1", "2"),
    "pruner.keep": ("null", "{channels: 2}"),
    "pruner.scores": ("null", "nowhere", "/dev/null", "a" * 32),
    "pruner.criterion.decay": ("0.9", "1", "0", "2"),
    "pruner.criterion.normalize": ("true", "false"),
    "pruner.criterion.seed": ("0", "3"),
    "pruner.criterion._target_": ("gsprune.criteria.Abs", "gsprune.criteria.Nothing", "os.getcwd", "nowhere"),
    "pruner.schedule.start_epoch": ("0", "0.5", "9"),
    "pruner.schedule.end_epoch": ("1", "0.5", "null", "-1"),
    "pruner.schedule.initial_sparsity": ("0", "0.1", "0.99"),
    "pruner.schedule.update_frequency": ("0.5", "1", "0"),
    "trainer.prune_lr": ("0.01", "null"),
    "trainer.device": ("cpu", "auto", "cuda:99", "tpu"),
    "trainer.precision": ("fp32", "bf16", "fp16", "fp8"),
    "trainer.accumulate_steps": ("1", "2"),
    "trainer.clip_norm": ("1", "null", "0"),
    "trainer.max_bad_steps": ("0", "3"),
    "trainer.channels_last": ("true", "false"),
    "trainer.fused": ("true", "false"),
    "trainer.deterministic": ("true", "false"),
    "trainer.progress": ("none", "lines", "loud"),
    "trainer.latency_repeats": ("0", "1"),
    "trainer.latency_batch": ("1", "2"),
    "trainer.latency_runtime": ("eager", "null", "onnx"),
    "trainer.dense_cache": ("true", "false"),
    "trainer.dense_scores": ("true", "false"),
    "trainer.dense_epochs": ("0", "1"),
    "trainer.prune_epochs": ("0", "1", "2"),
    "trainer.distill": ("0", "0.5", "1"),
    "trainer.distill_temperature": ("2", "0"),
    "cut.repair": ("least_squares", "null", "magic"),
    "cut.calibration": ("8", "100000", "0"),
    "cut.max_drop": ("40", "0.5", "0"),
    "cut.confidence": ("0.9", "1"),
    "cut.curve": ("[0.9, 0.5]", "[]", "[2]"),
    "sweep.resume": ("true", "false"),
    "sweep": ("null", "1"),
}
GROUP_KEYS = ("model", "dataset", "optimizer", "trainer", "pruner.criterion", "pruner.schedule")
SIZED = (
    *("dataset.batch_size", "dataset.samples", "dataset.image_size", "dataset.channels", "dataset.num_classes"),
    *("model.width", "model.dim", "model.depth", "model.num_heads", "model.mlp_ratio", "model.image_size"),
    *("model.in_channels", "model.num_classes", "model.patch_size", "trainer.dense_epochs", "trainer.prune_epochs"),
    *("trainer.latency_repeats", "trainer.latency_batch", "dataset.num_workers"),
)
SMALL = {
    "dataset": {"random": ("dataset.samples=24", "dataset.image_size=8"), "digits": ("dataset.batch_size=1500",)},
    "model": {"convnet": ("model.width=4",), "vit_tiny": ("model.dim=8", "model.depth=1", "model.num_heads=2")},
}


def combination(seed: int) -> list[str]:
    """An option of most groups, the sizes that make it quick, and up to four values, of which two in three are good."""
    draw = random.Random(seed)
    options = {}
    for group, rare in RARE.items():
        if draw.random() < 0.03:
            options[group] = draw.choice(rare)
        elif group in GROUPS:
            options[group] = draw.choice(GROUPS[group])
    small = [value for group, table in SMALL.items() for value in table.get(options[group], ())]
    quick = ["trainer.device=cpu", "trainer.dense_epochs=1", "trainer.prune_epochs=1", "trainer.progress=none"]
    quick += ["trainer.latency_repeats=0"]
    if options["dataset"] in ("cifar10", "cifar100", "mnist", "fashion_mnist"):
        quick.append("dataset.root=/dev/null/x")  # nothing is downloaded
    keys = [key for key in VALUES if _belongs(key, options)] if draw.random() < 0.9 else list(VALUES)
    values = [_value(draw, key) for key in draw.sample(keys, draw.randint(0, 4))]
    return [*(f"{group}={option}" for group, option in options.items()), *small, *quick, *values]


def _belongs(key: str, options: dict[str, str]) -> bool:
    group, _, name = key.partition(".")
    table = OWN.get(group, {})
    if any(name in names for names in table.values()):
        return name in table.get(options[group], ())
    if name == "max_train":
        return options[group] in ("cifar10", "cifar100", "mnist", "fashion_mnist")
    if key == "pruner.criterion.decay":
        return options["pruner"] in ("weighted", "abs", "fisher", "elementwise", "movement", "platon", "none")
    if key == "pruner.criterion.normalize":
        return options["pruner"] in ("weighted", "abs", "fisher", "none")
    if key == "pruner.criterion.seed":
        return options["pruner"] == "random"
    one_shot = options.get("pruner/schedule") == "one_shot"
    return not (one_shot and key.startswith("pruner.schedule.") and not key.endswith("start_epoch"))


def _value(draw: random.Random, key: str) -> str:
    if draw.random() < 0.65:
        return f"{key}={draw.choice(VALUES[key])}"
    odd = draw.random()
    if odd < 0.1:
        return f"{key}x={draw.choice(VALUES[key])}"  # no such key
    if odd < 0.2:
        return f"+{draw.choice(GROUP_KEYS)}.something={draw.choice(ANY)}"
    if odd < 0.25:
        return f"~{key}"
    if odd < 0.3:
        return f"{key}"  # no value
    return f"{key}={draw.choice(SIZES if key in SIZED else ANY)}"


def attempt(overrides: list[str], folder: Path) -> tuple[str, str]:
    """("composed", sentence) where Hydra refuses, ("refused", sentence) where gsprune does, ("run", "") where it runs.

    Anything else that can happen is raised; train.py would show it with a traceback.
    """
    if not GlobalHydra.instance().is_initialized():  # it takes longer than a run
        initialize_config_dir(str(ROOT / "conf"), version_base="1.3")
    try:
        cfg = compose("config", overrides=overrides)
    except CompactHydraException as error:
        return "composed", str(error)
    before = Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if cfg.get("plan"):
                show_plan(cfg, output_dir=folder / "out")
            else:
                objective(run(cfg, output_dir=folder / "out"), cfg.objective)
    except ValueError as error:
        check_sentence(str(error))
        return "refused", str(error)
    finally:
        os.chdir(before)
    return "run", ""


def check_sentence(text: str) -> None:
    assert text.strip(), "an error without a word"
    assert text.isprintable(), f"not one printable line: {text[:300]!r}"
    assert len(text) <= LONGEST, f"a wall of {len(text)} characters: {text[:300]!r}"
