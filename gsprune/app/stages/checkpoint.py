"""What a checkpoint of a job holds: writing it, finding the one to resume from, and restoring its state."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from gsprune import collectives
from gsprune.app.output_dir import SETTINGS, other_configuration
from gsprune.app.stages.context import PARTS, Context
from gsprune.app.stages.history import History
from gsprune.app.stages.setup import Setup
from gsprune.files.disk import sha256, write_atomic
from gsprune.files.layout import PROGRAM
from gsprune.formats.network import load_state
from gsprune.formats.tensors import state_tensors
from gsprune.settings.identity import differences, package_versions
from gsprune.sweeps.dense_cache import BASELINE, DenseCache
from gsprune.text.display import logger
from gsprune.text.redact import last_line
from gsprune.training.checkpoints import Checkpoints, Saved, read_state
from gsprune.training.guard import not_finite
from gsprune.training.loop_state import LoopState

log = logger(__name__)
DENSE = Path("checkpoint", "dense.safetensors")  # the dense network, which checkpoints of the pruning phase need
DENSE_PROGRAM = Path("checkpoint", "dense", PROGRAM)
RETRIED = "until then checkpoints hold it, and each tries to write it again"
# Keys and types of a checkpoint.
STATE: Mapping[str, Any] = {
    **dict.fromkeys(("config_hash", "phase"), str),
    "made_on": (str, dict),
    **dict.fromkeys(("model", "optimizer", "lr_schedule", "pruner", "loop", "job"), dict),
    "dense": (str, NoneType),  # sha256 of DENSE; None: it could not be written, and is `dense_model`
    "others": list,  # loop states of the processes after the first
}
JOB: Mapping[str, Any] = {
    **dict.fromkeys(("rows", "overrides"), list),
    **dict.fromkeys(("costed", "recorded"), int),
    **dict.fromkeys(("baseline", "seconds"), dict),
    "cost": tuple,
    "dense_note": (dict, NoneType),
    "dense_val": (float, int, NoneType),
}
LOOP: Mapping[str, Any] = {
    **dict.fromkeys(("epoch", "step"), int),
    **dict.fromkeys(("parts", "order", "random"), dict),
    "seconds": float,
    "totals": (dict, NoneType),
}


@dataclass(frozen=True)
class Phase:
    """What one phase trains with.

    Attributes:
        name: "dense" or "prune".
        offset: epochs of the phases before it.
        teacher: the dense network, where `trainer.distill` asks for it.
    """

    name: str
    epochs: int
    offset: int
    optimizer: Optimizer
    lr_schedule: Any  # an `LRSchedule` with a state, as torch's have
    pruner: Any
    teacher: nn.Module | None = None


@dataclass
class Dense:
    """The dense network.

    Attributes:
        model: a copy on the CPU.
        val_accuracy: its accuracy on the validation split, 0 to 1.
        cache: where jobs of a sweep share it; None outside a sweep.
        sha256: of the file `checkpoint/dense.safetensors`; None: it could not be written.
    """

    model: nn.Module
    val_accuracy: float | None
    cache: DenseCache | None = None
    sha256: str | None = None

    def save(self, job: Context) -> None:
        """Write what `model.weights` takes."""
        path, self.sha256 = job.folder / DENSE, None

        def write() -> None:
            write_atomic(path, save(state_tensors(self.model)[0]))
            self.sha256 = sha256(path)

        job.writer.write_or_retry(DENSE.as_posix(), write, RETRIED)


class JobCheckpoints:
    """The checkpoints of a job, and the one that it resumes from.

    Attributes:
        saved: read and not restored yet; None: there is nothing to resume from.
        dense: the dense network, once there is one.
    """

    def __init__(self, job: Context, setup: Setup, history: History) -> None:
        self._job, self._setup, self._history = job, setup, history
        self.folder = Checkpoints(job.folder / "checkpoint")
        self.saved: Saved | None = None
        self.dense: Dense | None = None
        self._surroundings = surroundings(job, setup)

    def resumes(self, phase: str) -> bool:
        """Whether the job resumes within that phase."""
        return self.saved is not None and self.saved.state["phase"] == phase

    def find(self, *, resume: bool) -> None:
        """Read the newest checkpoint; all processes read the one that the first has chosen.

        Raises:
            ValueError: it is of another configuration, and must not be lost by mistake.
        """
        if self._job.first:
            self.saved = self.folder.newest(self._check) if resume else None
            if self.saved:
                self._resume_record(self.saved)
        path = collectives.broadcast(self.saved and self.saved.path)
        if path is not None and not self._job.first:
            if not path.is_dir():
                raise ValueError(f"{path} is not on every machine: a run resumes in a directory that they share")
            self.saved = Saved(path, read_state(path))
        if self.saved:
            self._history.load(self.saved.state["job"])

    def _resume_record(self, saved: Saved) -> None:
        job, state = self._job, saved.state
        if state["config_hash"] != job.result["config_hash"]:
            raise ValueError(other_configuration(job.folder, job.cfg, unfinished=True))
        log.info("resuming from the checkpoint %s", saved.path)
        job.watch.add(state["job"]["seconds"])
        made_on = state["made_on"]
        before = made_on if isinstance(made_on, dict) else {"made on": made_on}  # the form of the first versions
        if changed := differences(before, self._surroundings):
            log.warning("resuming, but not bit for bit: %s", changed)

    def _check(self, state: Mapping[str, Any]) -> None:
        """Raise a ValueError if a checkpoint, which is whole, is not one of a job or lacks its dense network."""
        if not _is_of_a_job(state):
            raise ValueError("it was not written by a run of train.py: its entries differ")
        if state["phase"] == "dense" or state.get("dense_model"):
            return
        dense = self._job.folder / DENSE
        if not dense.is_file():
            raise ValueError(f"{dense}, the dense network of the checkpoint, is not there")
        if sha256(dense) != state["dense"]:
            raise ValueError(f"{dense} has changed since the checkpoint was written: its sha256 differs")

    def restore(self, phase: Phase) -> Mapping[str, Any]:
        """Load the state into what was built anew; returns the loop state of the phase.

        Raises:
            ValueError: it does not fit.
        """
        assert self.saved is not None
        (path, state), model = self.saved, self._setup.model
        try:
            loop: Mapping[str, Any] = [state["loop"], *state["others"]][collectives.rank()]
            phase.pruner.load_state_dict(state["pruner"])  # cuts model and optimizer where the saved pruner had
            load_state(model, state["model"], state_tensors(model)[1])
            phase.optimizer.load_state_dict(state["optimizer"])
            phase.lr_schedule.load_state_dict(state["lr_schedule"])
            _like_parameters(phase.optimizer)
            if self._job.first:
                self._history.redraw(phase.pruner)
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"the checkpoint {path} does not fit this job ({last_line(error)}): trainer.resume=never starts anew"
            ) from error
        self.saved = None  # its tensors are no longer needed
        return loop

    def write(self, phase: Phase, at: LoopState) -> None:
        """Write a checkpoint between two steps; a fault of the disk is a warning."""
        loop, *others = collectives.gathered(at.state_dict())
        if not self._job.first:
            return
        job, model, dense = self._job, self._setup.model, self.dense
        if dense and not (job.folder / DENSE).is_file():  # somebody has removed it
            dense.save(job)
        self._retry_files()
        state = {
            "config_hash": job.result["config_hash"],
            "made_on": self._surroundings,
            "phase": phase.name,
            "dense": dense and dense.sha256,
            "dense_model": None if not dense or dense.sha256 else state_tensors(dense.model)[0],
            "model": state_tensors(model)[0],
            "optimizer": phase.optimizer.state_dict(),
            "lr_schedule": phase.lr_schedule.state_dict(),
            "pruner": phase.pruner.state_dict(),
            "loop": loop,
            "others": others,
            "job": self._job_state(),
        }
        if lost := list(not_finite(model, but_for=self._setup.unbounded)):
            log.warning("no checkpoint was written, those before it stay: %s holds nan or inf", lost[0])
            return
        epoch = phase.offset + at.epoch

        def write() -> None:
            self.folder.write(state, epoch=epoch, step=at.step)

        try:
            job.writer.write("checkpoint", write, self._without_checkpoint())
        except ValueError as error:
            log.warning("no checkpoint was written, the run continues: %s", error)

    def _retry_files(self) -> None:
        for name in self._job.writer.retry():
            if name not in (DENSE.as_posix(), SETTINGS.as_posix()):  # which are not tracked
                with self._job.watch.part("tracking"):
                    self._job.track_file(name, folder=Path(name).parent.as_posix())

    def _without_checkpoint(self) -> str:
        with contextlib.suppress(OSError):
            before = self.folder.paths()
            then = f"resume from {before[-1].name}" if before else "start anew"
            return f"the next one is tried when it is due; if the run ends before that, it will {then}"
        return "the next one is tried when it is due"

    def _job_state(self) -> dict[str, Any]:
        result = self._job.result
        return {
            **self._history.state(),
            "baseline": {f"baseline_{name}": result[f"baseline_{name}"] for name in BASELINE},
            "dense_note": result["dense"],
            "dense_val": self.dense and self.dense.val_accuracy,
            "seconds": self._job.watch.read(),
            "overrides": result["overrides"],
        }


def surroundings(job: Context, setup: Setup) -> dict[str, str | int]:
    """What the last bits of a result depend on, besides the configuration."""
    device = setup.trainer.torch_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    cpu = torch.backends.cpu.get_cpu_capability()
    return {"device": name, "cpu": cpu, "threads": torch.get_num_threads(), **package_versions(job.cfg)}


def _is_of_a_job(state: Mapping[str, Any]) -> bool:
    if not _has(state, STATE) or not _has(state["job"], JOB):
        return False
    if not all(_has(loop, LOOP) for loop in (state["loop"], *state["others"])):
        return False
    seconds, rows = state["job"]["seconds"], state["job"]["rows"]
    numbers = set(seconds) == set(PARTS) and all(_are_numbers(values) for values in (seconds, *rows))
    return numbers and isinstance(state.get("dense_model"), (dict, NoneType))


def _has(found: Any, kinds: Mapping[str, Any]) -> bool:
    """Whether it is a dict that has all these keys, with values of these types."""
    return isinstance(found, dict) and all(name in found and isinstance(found[name], kinds[name]) for name in kinds)


def _are_numbers(found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(value, (int, float)) for value in found.values())


def _like_parameters(optimizer: Optimizer) -> None:
    """Give a loaded state the memory format of the parameters, as a state that grew with them has."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
