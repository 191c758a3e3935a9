"""One job: train a dense network, prune it, shrink it, measure both, write down everything.

`run` is what `train.py` calls with the composed configuration. This is the edge of the package: it may import
every other room, and hydra and omegaconf to build things from the configuration. No other room imports it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.optim import Optimizer

from gsprune import figures, metrics
from gsprune.checkpoint import save_masks, save_pruned, state_tensors
from gsprune.console import Progress, make_progress, print_summary
from gsprune.files import write_atomic, write_json
from gsprune.pruner import NoPruning
from gsprune.shrink import Plan, apply_plan, plan_shrink
from gsprune.tracking import Tracker, read_metrics
from gsprune.trainer import Schedule, Trainer, make_optimizer, seed_everything

log = logging.getLogger(__name__)

# The numbers of result.json; a sweep may optimise any of them.
NUMBERS = (
    "accuracy",
    "baseline_accuracy",
    "val_accuracy",
    "loss",
    "baseline_loss",
    "sparsity",
    "target_sparsity",
    "params",
    "params_dense",
    "params_nonzero",
    "macs",
    "macs_dense",
    "latency_ms",
    "latency_dense_ms",
    "file_bytes",
    "file_bytes_dense",
    "seconds",
    "updates",
    "epochs",
)
# What changes no number of a result, and so is left out of its config_hash.
NOT_HASHED = (
    "hydra",
    "tracking",
    "objective",
    "trainer.progress",
    "dataset.root",
    "dataset.num_workers",
    "dataset.device",
)


def run(cfg: DictConfig, *, output_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Run the job that `cfg` describes; return what it also writes to `result.json`.

    On any exception `result.json` says `failed` with the error's last line, tracking is told, and the
    exception goes on.

    Raises:
        ValueError: a mistake in the configuration, in one sentence.
    """
    job = _Job(cfg, Path(output_dir).absolute())
    try:
        job.prepare()
        job.dense_phase()
        job.prune_phase()
        job.measure()
        job.write_files()
        return job.finish()
    except BaseException as error:
        job.fail(error)
        raise


def objective(result: Mapping[str, Any], wanted: str | Sequence[str]) -> float | tuple[float, ...]:
    """The number (or numbers) of the result that a sweep optimises.

    >>> objective({"accuracy": 0.9, "sparsity": 0.5}, ["accuracy", "sparsity"])
    (0.9, 0.5)
    """
    if isinstance(wanted, str):
        return float(result[wanted])
    return tuple(float(result[name]) for name in wanted)


def config_hash(cfg: DictConfig) -> str:
    """sha256 of everything in the configuration that determines the result: the seed too, but no output path,
    nothing of tracking, and of `model.weights` the content instead of the path.

    Two jobs with the same hash give the same result on the same kind of machine.
    """
    config = _plain(cfg)
    for path in NOT_HASHED:
        group, _, key = path.rpartition(".")
        (config.get(group) or {} if group else config).pop(key, None)
    weights = (config.get("model") or {}).get("weights")
    if weights and Path(weights).is_file():
        config["model"]["weights"] = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def build(node: Any, **arguments: Any) -> Any:
    """Hydra's `instantiate`, but what is wrong with the arguments comes out as one sentence in a ValueError."""
    try:
        return instantiate(node, _convert_="all", **arguments)
    except InstantiationException as error:
        cause: BaseException | None = error
        while isinstance(cause, InstantiationException):
            cause = cause.__cause__
        if isinstance(cause, ValueError):
            raise cause from None
        if isinstance(cause, TypeError):
            raise ValueError(f"{node.get('_target_')} cannot be made: {cause}") from error
        raise


def complete(group: str, partial: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call a partial that `build` returned; an argument of a wrong name or type is a mistake in its group."""
    try:
        return partial(*arguments, **named)
    except TypeError as error:
        raise ValueError(f"{group} cannot be made: {error}") from error


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a safetensors file that holds every tensor of the model, in shape and by name. No pickle is read.

    Raises:
        ValueError: no such file, another kind of file, or the first tensor that does not fit.
    """
    if not Path(path).is_file():
        raise ValueError(f"model.weights={path} does not exist")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"model.weights={path} is not a safetensors file ({error})") from None
    state = model.state_dict()
    needed, ties = state_tensors(model)  # of tied tensors one name is enough
    for name in [*needed, *found]:
        if name not in found or name not in state:
            where = "the model" if name not in state else "the file"
            raise ValueError(f"model.weights={path} does not fit the model: {where} has no tensor {name!r}")
        if found[name].shape != state[name].shape:
            shapes = f"{list(found[name].shape)} in the file but {list(state[name].shape)} in the model"
            raise ValueError(f"model.weights={path} does not fit the model: {name!r} has shape {shapes}")
    model.load_state_dict({**{alias: found[name] for alias, name in ties.items()}, **found})


class _Job:
    """The steps of a job in their order, and what they hand on to each other."""

    trainer: Trainer
    model: nn.Module
    tracker: Tracker
    progress: Progress
    data: Any
    pruner: Any
    dense: nn.Module
    last: Mapping[str, float] = {}
    cost: tuple[int, int] = (0, 0)  # parameters and MACs of the network as pruned so far
    costed = recorded = 0  # mask updates that `cost` and the mask files have seen

    def __init__(self, cfg: DictConfig, output_dir: Path) -> None:
        self.cfg, self.output_dir, self.started = cfg, output_dir, time.perf_counter()
        self.result: dict[str, Any] = {"status": "running", **dict.fromkeys(NUMBERS)}
        self.result |= {"mlflow_run_id": None, "config_hash": None, "device": None, "shrunk": False}
        write_json(output_dir / "result.json", self.result)  # a job that gets killed leaves this

    # --- the steps ---

    def prepare(self) -> None:
        """Settings, data, model, display, tracking; a mistake in the configuration ends here, before any work."""
        self.result["config_hash"] = config_hash(self.cfg)
        if type(self.cfg.seed) is not int:
            raise ValueError(f"seed={self.cfg.seed} is not allowed: it must be a whole number")
        self.trainer = build(self.cfg.trainer)
        check_objective(self.cfg.objective, self.trainer)
        self.progress = make_progress(self.trainer.progress, epochs=self.epochs)
        self.result["device"] = str(self.trainer.torch_device)
        self._seed(phase=0)
        self.data = build(self.cfg.dataset)
        inputs = next(iter(self.data.val))[0]
        self.example = self.trainer.to_device(_first(inputs, 1))
        self.latency_example = self.trainer.to_device(_first(inputs, self.trainer.latency_batch))
        self._seed(phase=0)  # the model starts the same whatever the data drew
        self.model = self.trainer.place(self._build_model())
        self._rehearse()
        for old in ("masks", "figures"):  # of an earlier job in the same directory
            shutil.rmtree(self.output_dir / old, ignore_errors=True)
        self._open_tracker()

    def dense_phase(self) -> None:
        """Ordinary training, then the dense network's accuracy on the test split, and a copy of it to compare."""
        self._fit("dense", epochs=self.trainer.dense_epochs)
        baseline = self.trainer.evaluate(self.model, self.data.test)
        self.result |= {"baseline_accuracy": baseline["accuracy"], "baseline_loss": baseline["loss"]}
        self.dense, self.dense_val = copy.deepcopy(self.model), self.last.get("val/accuracy")
        path = self.output_dir / "checkpoint" / "dense.safetensors"  # what `model.weights` takes
        write_atomic(path, save(state_tensors(self.model)[0]))

    def prune_phase(self) -> None:
        """Training with the pruner's hooks; at its end the final mask is set and a structured model is smaller."""
        self._seed(phase=1)  # so that a dense network from a file goes on exactly like one trained here
        trainer = self.trainer
        self._fit("prune", epochs=trainer.prune_epochs, lr=trainer.prune_lr, offset=trainer.dense_epochs)
        self._record_masks(self.epochs)

    def measure(self) -> None:
        """Both networks on the test split, and what they cost; latencies are taken in turns."""
        test = self.trainer.evaluate(self.model, self.data.test)
        self.result |= {
            "accuracy": test["accuracy"],
            "loss": test["loss"],
            "val_accuracy": self.last.get("val/accuracy"),
            "sparsity": self.pruner.sparsity,
            "target_sparsity": self.pruner.target_sparsity,
            "updates": self.pruner.updates,
            "epochs": self.epochs,
            "shrunk": self.pruner.plan is not None,
            "skipped": dict(self.pruner.skipped),
            "params_nonzero": sum(int(p.count_nonzero()) for p in self.model.parameters()),
        }
        for suffix, model in (("", self.model), ("_dense", self.dense)):
            self.result[f"params{suffix}"] = metrics.count_parameters(model)
            self.result[f"macs{suffix}"] = metrics.count_macs(model, self.example)
            self.result[f"file_bytes{suffix}"] = metrics.file_bytes(model)
        if self.trainer.latency_repeats:
            models = {"latency_dense_ms": self.dense, "latency_ms": self.model}
            repeats = self.trainer.latency_repeats
            self.result |= metrics.latency_ms(models, self.latency_example, repeats=repeats)

    def write_files(self) -> None:
        """Masks, model and figures; `result.json` and `metrics.jsonl` are written elsewhere."""
        masks = self._save_model()
        folder = self.output_dir / "figures"
        figures.save_layer_sparsity(folder / "sparsity_by_layer.png", masks)
        rows = read_metrics(self.output_dir / "metrics.jsonl")
        figures.save_history(folder / "history.png", rows, baseline=self.dense_val)

    def finish(self) -> dict[str, Any]:
        self._write_result("finished")
        known = {**dict.fromkeys(NUMBERS), **self.last}  # a number that the last epoch has logged is not repeated
        final = {name: self.result[name] for name in NUMBERS if self.result[name] != known[name]}
        self.tracker.log_metrics(final, step=self.result["epochs"])
        for name in ("result.json", "masks.safetensors", "model.safetensors", "pruning.json"):
            self.tracker.log_artifact(self.output_dir / name)
        for path in sorted((self.output_dir / "figures").glob("*.png")):
            self.tracker.log_artifact(path, folder="figures")
        self.tracker.finish("FINISHED")
        self.progress.close()
        print_summary(self.result, self.output_dir, tracking_uri=getattr(self.tracker, "tracking_uri", None))
        return self.result

    def fail(self, error: BaseException) -> None:
        """Leave the record closed; what goes wrong here must not hide the error itself."""
        lines = str(error).strip().splitlines()
        self.result["error"] = f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
        try:
            if hasattr(self, "progress"):
                self.progress.close()
            self._write_result("failed")
            if self.result["baseline_accuracy"] is not None:  # what was trained is not thrown away
                self._save_model()
            if hasattr(self, "tracker"):
                self.tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        except Exception:
            log.exception("the failure could not be recorded in %s", self.output_dir)

    # --- their parts ---

    @property
    def epochs(self) -> int:
        return self.trainer.dense_epochs + self.trainer.prune_epochs

    @property
    def steps_per_epoch(self) -> int:
        return self.trainer.steps_per_epoch(self.data.train)

    def _save_model(self) -> Mapping[str, Tensor]:
        masks: Mapping[str, Tensor] = self.pruner.masks()
        save_masks(self.output_dir / "masks.safetensors", masks)
        plan = self.pruner.plan or Plan(kept={}, sizes={}, attributes={})
        save_pruned(self.output_dir, self.model, plan, extra={"config_hash": self.result["config_hash"]})
        return masks

    def _seed(self, *, phase: int) -> None:
        """Seed everything for a phase, the order of the training data included."""
        seed_everything(self.cfg.seed + phase, deterministic=self.trainer.deterministic)
        generator = getattr(self.data.train, "generator", None) if hasattr(self, "data") else None
        if generator is not None:
            generator.manual_seed(self.cfg.seed + phase)

    def _build_model(self) -> nn.Module:
        node = self.cfg.model.copy()
        OmegaConf.set_struct(node, False)
        weights = node.pop("weights", None)
        model: nn.Module = build(node)
        if weights is not None:
            load_weights(model, weights)
        return model

    def _open_tracker(self) -> None:
        name = self.cfg.tracking.get("run_name") or run_name(self.cfg)
        self.tracker = build(self.cfg.tracking, output_dir=str(self.output_dir), run_name=name)
        tags = {"config_hash": self.result["config_hash"], **hydra_tags()}
        self.tracker.start(config=_plain(self.cfg), tags=tags)
        self.result["mlflow_run_id"] = self.tracker.run_id

    def _rehearse(self) -> None:
        """Build the second phase once and drop it: a mistake in it must not wait for the first one to end."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come when it is built for good
            optimizer, _ = self._build_optimizer(self.trainer.prune_epochs, self.trainer.prune_lr)
            pruner = self._build_pruner(optimizer)
        criterion = getattr(pruner, "criterion", None)
        if self.trainer.prune_epochs == 0 and criterion is not None and criterion.cumulative:
            raise ValueError(
                "trainer.prune_epochs=0 leaves no gradient to score by: it must be 1 or more, "
                "or pruner=none or magnitude"
            )

    def _build_optimizer(self, epochs: int, lr: float | None) -> tuple[Optimizer, Schedule]:
        factory, steps = build(self.cfg.optimizer), epochs * self.steps_per_epoch
        optimizer = complete("optimizer", make_optimizer, factory, self.model, lr=lr, fused=self.trainer.fused)
        return optimizer, complete("lr_schedule", build(self.cfg.lr_schedule), optimizer, total_steps=steps)

    def _build_pruner(self, optimizer: Optimizer) -> Any:
        return complete(
            "pruner",
            build(self.cfg.pruner),
            self.model,
            optimizer=optimizer,
            example_input=self.example,
            steps_per_epoch=self.steps_per_epoch,
            epochs=self.trainer.prune_epochs,
        )

    def _fit(self, name: str, *, epochs: int, lr: float | None = None, offset: int = 0) -> None:
        optimizer, lr_schedule = self._build_optimizer(epochs, lr)
        self.pruner = NoPruning(self.model) if name == "dense" else self._build_pruner(optimizer)
        self.progress.phase(name, epochs=epochs, steps_per_epoch=self.steps_per_epoch)
        self.trainer.fit(
            self.model,
            self.data.train,
            self.data.val,
            optimizer=optimizer,
            lr_schedule=lr_schedule,
            pruner=self.pruner,
            epochs=epochs,
            on_epoch=lambda epoch, values: self._record(epoch + offset + 1, values),
            on_step=self.progress.on_step,
        )

    def _record(self, trained: int, values: dict[str, float]) -> None:
        """Metrics after so many epochs, counted over both phases, and the masks if they changed."""
        values |= self.pruner.report()
        if trained == 1 or self.costed != self.pruner.updates:
            twin, self.costed = smaller(self.model, self.pruner), self.pruner.updates
            self.cost = metrics.count_parameters(twin), metrics.count_macs(twin, self.example)
        self.last = {**values, "params": self.cost[0], "macs": self.cost[1]}
        self.tracker.log_metrics(self.last, step=trained)
        self._record_masks(trained)
        self.progress.on_epoch(trained, self.last)

    def _record_masks(self, trained: int) -> None:
        """The masks, if they changed since the last time."""
        if self.recorded == self.pruner.updates:
            return
        self.recorded, masks = self.pruner.updates, self.pruner.masks()
        path = self.output_dir / "masks" / f"epoch_{trained:04d}.safetensors"
        save_masks(path, masks)
        self.tracker.log_artifact(path, folder="masks")
        self.tracker.log_image(figures.mask_image(masks), key="masks", step=trained)

    def _write_result(self, status: str) -> None:
        self.result["status"] = status
        self.result["seconds"] = time.perf_counter() - self.started
        write_json(self.output_dir / "result.json", self.result)


def smaller(model: nn.Module, pruner: Any) -> nn.Module:
    """The network a structured pruner would leave if training ended now, as a copy; any other: the model itself."""
    if not pruner.structured or not pruner.updates or pruner.plan is not None:
        return model
    masks, structures = pruner.masks(), [target.structure for target in pruner.targets]
    twin = copy.deepcopy(model)
    apply_plan(twin, plan_shrink(structures, [masks[structure.name] for structure in structures]))
    return twin


def check_objective(wanted: str | Sequence[str], trainer: Trainer) -> None:
    """Refuse a wrong name before the training, not after it."""
    several = isinstance(wanted, Sequence) and not isinstance(wanted, str)
    for name in wanted if several else [str(wanted)]:
        if name not in NUMBERS:
            near = get_close_matches(str(name), NUMBERS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"objective={name} is not in the result: {hint}There are {', '.join(NUMBERS)}")
        if name.startswith("latency") and not trainer.latency_repeats:
            raise ValueError(f"objective={name} is not measured with trainer.latency_repeats=0")


def hydra_tags() -> dict[str, str]:
    """Hydra's overrides and the option chosen in each group, when this runs inside a Hydra job."""
    if not HydraConfig.initialized():
        return {}
    hydra = HydraConfig.get()
    choices = {f"group.{name}": str(option) for name, option in hydra.runtime.choices.items()}
    ours = {name: option for name, option in choices.items() if not name.startswith("group.hydra/")}
    return {"hydra.overrides": " ".join(hydra.overrides.task), **ours}


def run_name(cfg: DictConfig) -> str | None:
    """What a person calls this job in a list of runs: "weighted 0.5, convnet, digits, seed 0"; None outside Hydra."""
    if not HydraConfig.initialized():
        return None
    chosen = HydraConfig.get().runtime.choices
    share = cfg.pruner.get("target_sparsity")
    pruner = f"{chosen['pruner']} {share:g}" if share else chosen["pruner"]
    return f"{pruner}, {chosen['model']}, {chosen['dataset']}, seed {cfg.seed}"


def _plain(cfg: DictConfig) -> dict[str, Any]:
    missing = list(_missing(OmegaConf.to_container(cfg)))
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given: {missing[0]}=...")
    plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _missing(values: Any, path: str = "") -> Iterator[str]:
    """Where the configuration has `???`; what only refers to such a place is not named."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _missing(value, f"{path}.{key}" if path else str(key))
    elif values == "???":
        yield path


def _first(inputs: Any, count: int) -> Any:
    """The first samples of a batch: a tensor, or a tuple or mapping of tensors."""
    if isinstance(inputs, Tensor):
        return inputs[:count]
    if isinstance(inputs, Mapping):
        return {name: value[:count] for name, value in inputs.items()}
    return tuple(value[:count] for value in inputs)
