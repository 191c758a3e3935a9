"""The training loop: `Trainer.fit`, `score` and `evaluate`, and seeds.

There is one loop, without branches for features: pruning works through the hooks (`Hooks`); progress display, logs and
checkpoints work through callbacks.

One optimizer step, in order:

    hooks.on_step_begin(step)
    forward and backward, `accumulate_steps` times
    scaler.unscale_(optimizer)
    hooks.on_before_optimizer_step()      gradients of the whole group: unscaled, not yet clipped
    clip, optimizer.step(), scaler.update()
    hooks.on_step_end()
    optimizer.zero_grad(set_to_none=True), lr_schedule.step()
    on_step(totals), on_rest(state)       between two steps: the loop's state can be saved, and training resumed from it

A step whose gradients are not finite changes neither parameters nor optimizer nor buffers (see `guard`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import random
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from gsprune import collectives
from gsprune.export.runtimes import RUNTIMES, Measure
from gsprune.repair.distill import divergence, mixed
from gsprune.structures.example import call, inputs_and_labels, logits_of, map_tensors
from gsprune.training import data_parallel
from gsprune.training.checks import check, check_choice
from gsprune.training.guard import Guard
from gsprune.training.loading import Start
from gsprune.training.loop_state import LoopState, Stateful
from gsprune.training.optimization import LRSchedule

Batch = tuple[Any, Tensor]
Model = TypeVar("Model", bound=nn.Module)
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PROGRESS = ("auto", "bar", "lines", "none")
RESUME = ("auto", "never")


class Hooks(Protocol):
    """The methods of a pruner that the loop calls (`gsprune.Pruner`, or your own)."""

    def on_train_begin(self) -> None: ...
    def on_epoch_begin(self, epoch: int) -> None: ...
    def on_step_begin(self, step: int) -> None: ...
    def on_before_optimizer_step(self) -> None: ...
    def on_step_end(self) -> None: ...
    def on_epoch_end(self) -> None: ...
    def on_train_end(self) -> None: ...


class Loader(Protocol):
    """Batches with a known number: a `DataLoader`, or a list of batches.

    A batch is (inputs, labels), or a mapping, named tuple or dataclass with a field called labels. The network is
    called as model(x), model(*tuple) or model(**mapping), the same as with `example_input`.
    """

    def __iter__(self) -> Iterator[Batch]: ...
    def __len__(self) -> int: ...


class Totals:
    """Sums of the loss and of correct predictions on the device: only `read` is a sync point.

    Averages are over samples, not over batches, so a short last batch counts by its size.
    """

    def __init__(self, device: torch.device, *, skipped: int = 0, distilled: bool = False) -> None:
        self.skipped = skipped  # steps that were skipped before these
        self._distilled = distilled
        # float64 keeps the sum exact over a long epoch; MPS has none
        wide = torch.float32 if device.type == "mps" else torch.float64
        self._loss = torch.zeros((), dtype=wide, device=device)
        self._distance = torch.zeros_like(self._loss)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._left_out = torch.zeros_like(self._correct)
        self._count = 0

    def add(
        self,
        loss_sum: Tensor,
        logits: Tensor,
        labels: Tensor,
        *,
        distance: Tensor | None = None,
        only_finite: bool = False,
    ) -> None:
        """Add a batch, with its summed `distance` to a teacher; `only_finite` leaves out one with a non-finite loss."""
        loss, correct = loss_sum.detach(), (logits.detach().argmax(dim=1) == labels).sum()
        if only_finite:
            lost = loss.isfinite().logical_not()
            loss, correct = loss.masked_fill(lost, 0), correct.masked_fill(lost, 0)
            distance = None if distance is None else distance.masked_fill(lost, 0)
            self._left_out += len(labels) * lost
        self._loss += loss
        if distance is not None:
            self._distance += distance.detach()
        self._correct += correct
        self._count += len(labels)

    def together(self) -> Totals:
        """The sums over all processes, each of which must call this; in a single process, the same sums."""
        if collectives.world_size() == 1:
            return self
        counts = (self._correct, self._left_out, torch.full_like(self._correct, self._count))
        sums = [self._loss, self._distance, *(count.to(self._loss) for count in counts)]
        loss, distance, *summed = collectives.summed(torch.stack(sums))
        found = Totals(loss.device, skipped=self.skipped, distilled=self._distilled)
        found._loss, found._distance = loss, distance
        found._correct, found._left_out = summed[0].long(), summed[1].long()
        found._count = int(summed[2])
        return found

    def read(self) -> dict[str, float]:
        """Mean loss and accuracy (0 to 1) of this process; NaN if every batch was left out. This is a sync point.

        With a teacher also `distill_loss`, the mean distance to it.
        """
        if self._count == 0:
            raise ValueError("the loader has no batch, so there is no loss or accuracy to report")
        count = self._count - int(self._left_out) or math.nan
        means = {"loss": self._loss.item() / count, "accuracy": self._correct.item() / count}
        return means | ({"distill_loss": self._distance.item() / count} if self._distilled else {})

    def state_dict(self) -> dict[str, Any]:
        """The sums on the CPU, so that a process with other devices can load them. This is a sync point."""
        sums = {"loss": self._loss.cpu(), "correct": self._correct.cpu(), "left_out": self._left_out.cpu()}
        distance = {"distance": self._distance.cpu()} if self._distilled else {}
        return {**sums, **distance, "count": self._count, "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._loss.copy_(state["loss"])
        self._correct.copy_(state["correct"])
        self._left_out.copy_(state["left_out"])
        if self._distilled:
            self._distance.copy_(state["distance"])
        self._count, self.skipped = state["count"], state["skipped"]


EpochCallback = Callable[[int, dict[str, float]], None]
StepCallback = Callable[[Totals], None]
RestCallback = Callable[[LoopState], None]


@dataclass(frozen=True)
class Trainer:
    """Settings of training, and the methods that use them: `fit`, `score` and `evaluate`.

    Args:
        dense_epochs, prune_epochs: epochs of the two phases of a job (used by the job).
        prune_lr: learning rate of the second phase; None: that of the optimizer.
        device: "auto" (CUDA, then MPS, then CPU), "cpu", "cuda", "cuda:1", "mps".
        precision: "fp32", or autocast to "bf16" or "fp16" (the latter with a gradient scaler).
        accumulate_steps: batches in one optimizer step. The gradient is that of the mean over all samples of
            the group, as for one batch of that size, also when the last batch or the last group of an epoch
            is short. (BatchNorm still normalises each batch by itself.)
        clip_norm: largest global gradient norm, None for no clipping. The pruner sees gradients before it.
        max_bad_steps: skipped steps in a row that are allowed; one more ends the run. A step with non-finite gradients
            is skipped: weights, scores and BatchNorm's statistics stay the same. With fp16 allow some, because the
            gradient scaler finds its scale by skipped steps.
        channels_last: memory format of the model and of 4-D inputs; faster convolutions on most devices.
        compile: run forward through `torch.compile`; the pruner works on the plain module.
        fused: use the optimizer's fused form if it has one (one kernel instead of one for each operation).
        deterministic: use deterministic algorithms on CUDA too (slower). Training on a CPU is deterministic anyway.
        progress: how to display progress: "auto" (a bar on a terminal, otherwise lines), "bar", "lines", "none" (used
            by the job).
        latency_repeats, latency_batch, latency_seconds: timings of a forward pass of both networks (0: none; fewer than
            30 give no figure), samples in the batch, and seconds for all timings at most (used by the job).
        latency_runtime: where: "eager", "compile", "onnxruntime", "openvino"; None: where the pruner's budget of
            milliseconds is measured, else "eager" (used by the job).
        distill: a, the weight of distillation in the pruning phase, in [0, 1): the loss is (1 - a) * task +
            a * T^2 * KL(softmax(teacher / T) || softmax(student / T)), with the dense network of the run as the teacher
            (`gsprune.repair.distill`). The pruner sees the gradient of that loss. 0: none.
        distill_temperature: T, above 0.
        devices: processes on this machine that train one network together, each on its part of every batch: a batch
            size is that of all of them. On CUDA each process uses its own GPU.
        nodes: machines that train one network together. Start the same command on each of them, with an output
            directory that all can read (otherwise an interrupted run cannot be resumed).
        rendezvous: "host:port" of one of the machines, where they connect. Required for more than one machine.
        timeout_minutes: how long a process waits for another one before the run ends with an error.
        dense_cache: jobs of a sweep with the same dense phase train it once (used by the job).
        dense_scores: score the dense network before pruning begins, so that the first mask does not depend on a few
            batches alone (used by the job).
        resume: "auto" resumes from the newest checkpoint of an unfinished run of the same configuration in the output
            directory; "never" starts from scratch (used by the job).
        checkpoint_minutes: write a checkpoint within an epoch too, when the last one is older than this; 0: after
            every step; None: only at the end of an epoch (used by the job).

    Raises:
        ValueError: one sentence for each setting outside its range, and for a device that is not here.
    """

    dense_epochs: int = 6
    prune_epochs: int = 8
    prune_lr: float | None = None
    device: str = "auto"
    precision: str = "fp32"
    accumulate_steps: int = 1
    clip_norm: float | None = None
    max_bad_steps: int = 20
    channels_last: bool = False
    compile: bool = False
    fused: bool = True
    deterministic: bool = False
    progress: str = "auto"
    latency_repeats: int = 30
    latency_batch: int = 1
    latency_seconds: float = 10.0
    latency_runtime: str | None = None
    dense_cache: bool = True
    dense_scores: bool = True
    distill: float = 0.0
    distill_temperature: float = 2.0
    devices: int = 1
    nodes: int = 1
    rendezvous: str | None = None
    timeout_minutes: float = 30.0
    resume: str = "auto"
    checkpoint_minutes: float | None = 10.0

    def __post_init__(self) -> None:
        for name in ("dense_epochs", "prune_epochs", "max_bad_steps", "latency_repeats"):
            check(getattr(self, name) >= 0, f"trainer.{name}", getattr(self, name), "0 or more")
        for name in ("accumulate_steps", "latency_batch"):
            check(getattr(self, name) >= 1, f"trainer.{name}", getattr(self, name), "1 or more")
        check(self.latency_seconds > 0, "trainer.latency_seconds", self.latency_seconds, "above 0")
        for name in ("clip_norm", "prune_lr"):
            value = getattr(self, name)
            check(value is None or value > 0, f"trainer.{name}", value, "above 0, or null")
        minutes = self.checkpoint_minutes
        check(minutes is None or minutes >= 0, "trainer.checkpoint_minutes", minutes, "0 or more, or null")
        check(0 <= self.distill < 1, "trainer.distill", self.distill, "from 0 to below 1")
        finite = 0 < self.distill_temperature < math.inf
        check(finite, "trainer.distill_temperature", self.distill_temperature, "above 0, and finite")
        for name, choices in (("precision", AUTOCAST), ("progress", PROGRESS), ("resume", RESUME)):
            check_choice(f"trainer.{name}", getattr(self, name), [*choices])
        if self.latency_runtime is not None:
            check_choice("trainer.latency_runtime", self.latency_runtime, [*RUNTIMES])
            Measure(self.latency_runtime).check()
        find_device(self.device)
        self._check_processes()

    def _check_processes(self) -> None:
        for name in ("devices", "nodes"):
            check(getattr(self, name) >= 1, f"trainer.{name}", getattr(self, name), "1 or more")
        check(self.timeout_minutes > 0, "trainer.timeout_minutes", self.timeout_minutes, "above 0")
        if self.nodes > 1 and not re.fullmatch(r".+:\d+", self.rendezvous or ""):
            given = "null" if self.rendezvous is None else self.rendezvous
            check(False, "trainer.rendezvous", given, "host:port of one of the machines for trainer.nodes above 1")
        if self.devices * self.nodes == 1:
            return
        kind = find_device(self.device).type
        alone = ":" not in self.device and kind != "mps"
        check(alone, "trainer.device", self.device, "auto, cuda or cpu where several processes train together")
        if kind == "cuda":
            count = torch.cuda.device_count()
            check(self.devices <= count, "trainer.devices", self.devices, f"at most {count}, the GPUs of this machine")

    @functools.cached_property
    def torch_device(self) -> torch.device:
        return find_device(self.device)

    def place(self, model: Model) -> Model:
        """Move a model to the device and the memory format, before making an optimizer. Returns the same module."""
        layout = torch.channels_last if self.channels_last else torch.preserve_format
        model = data_parallel.prepared(model, self.torch_device)
        return model.to(device=self.torch_device, memory_format=layout)  # type: ignore[call-overload, no-any-return]

    def steps_per_epoch(self, loader: Loader) -> int:
        """Optimizer steps of one epoch: groups of `accumulate_steps` batches, the last one possibly short."""
        return math.ceil(len(loader) / self.accumulate_steps)

    def fit(
        self,
        model: nn.Module,
        train_loader: Loader,
        val_loader: Loader | None,
        *,
        optimizer: Optimizer,
        lr_schedule: LRSchedule,
        pruner: Hooks,
        epochs: int,
        teacher: nn.Module | None = None,
        on_epoch: EpochCallback = lambda epoch, values: None,
        on_step: StepCallback = lambda totals: None,
        on_rest: RestCallback = lambda state: None,
        on_redraw: Callable[[], None] = lambda: None,
        start: Mapping[str, Any] | None = None,
    ) -> None:
        """Train `model` in place for `epochs` epochs, calling the pruner's hooks in the order above.

        Args:
            lr_schedule: stepped once per optimizer step.
            teacher: a network that `model` learns from beside the labels, with the weight `distill`; it runs in
                evaluation mode, without gradients, on the same batches, and stays as it is.
            on_epoch: called after every epoch with its number (from 0) and `train/loss` (of the task alone, with a
                teacher too), `train/accuracy`, `val/loss`, `val/accuracy` (when there is a `val_loader`), `lr` (of the
                next step), `epoch_seconds`, `train/distill_loss` (T^2 * KL) with a teacher, and `train/skipped_steps`
                if there were any.
            on_step: called after every optimizer step with the running `Totals`; reading it is a sync point.
            on_rest: called after `on_step`, after each batch of `val_loader` and after `on_epoch`, with the
                `LoopState`, which can be saved here. An exception ends training.
            on_redraw: called after each batch that is loaded again in order to resume within an epoch (see `loading`).
                An exception ends training; nothing has changed since `start`.
            start: a `LoopState.state_dict()` to resume from. The states of model, optimizer, learning-rate schedule and
                pruner at that moment must be loaded already.

        Raises:
            BadNumbers: a ValueError that names the first tensor with a non-finite gradient, after more than
                `max_bad_steps` such steps in a row. The model is that of the last good step.
        """
        check(teacher is None or self.distill > 0, "trainer.distill", self.distill, "above 0 with a teacher")
        loop = self._loop(model, optimizer, pruner, teacher)
        parts: dict[str, Stateful] = {"scaler": loop.scaler, "guard": loop.guard}
        at = LoopState(self.torch_device, parts, start, on_redraw=on_redraw)
        model.train()
        pruner.on_train_begin()
        with _first_skipped_step_is_fine(), _kept_modes(loop.teacher) if loop.teacher else contextlib.nullcontext():
            if loop.teacher:
                loop.teacher.eval()
            for epoch in range(at.epoch, epochs):
                pruner.on_epoch_begin(epoch)
                values = _named("train", loop.train_epoch(train_loader, lr_schedule, on_step, on_rest, at))
                pruner.on_epoch_end()
                if val_loader is not None:
                    batches = at.resting(data_parallel.local_batches(val_loader, training=False), on_rest)
                    values |= _named("val", self._evaluate(model, loop.plain, batches))
                values |= {"lr": _lr(optimizer), "epoch_seconds": at.seconds}
                on_epoch(epoch, values)
                at.end_epoch()
                on_rest(at)
        pruner.on_train_end()
        loop.check_masks()

    def score(
        self, model: nn.Module, loader: Loader, *, optimizer: Optimizer, pruner: Hooks, steps: int | None = None
    ) -> int:
        """Let the pruner score a network without changing it: training steps without the optimizer's update.

        Forward and backward run as in `fit`; of the hooks, only `on_before_optimizer_step` is called. Afterwards
        parameters, buffers (BatchNorm's statistics) and modes are the same as before, and gradients are None; the
        loader and dropout have drawn random numbers.

        Args:
            optimizer: of the model's parameters; it makes no step and keeps its state.
            steps: optimizer steps to score, at most one pass over the loader; None: one pass. `criterion.horizon` of
                the pruner is the number of steps that matter.

        Returns:
            The number of steps.
        """
        check(steps is None or steps >= 0, "steps", steps, "0 or more, or None")
        with _as_it_was(model):
            model.train()
            return self._loop(model, optimizer, pruner).score(loader, steps)

    def _loop(self, model: nn.Module, optimizer: Optimizer, pruner: Hooks, teacher: nn.Module | None = None) -> _Loop:
        scaler = torch.amp.GradScaler(self.torch_device.type, enabled=self.precision == "fp16")
        guard = Guard(model, optimizer, limit=self.max_bad_steps)
        plain = self._compiled(model)
        taught = teacher and self._compiled(teacher)
        return _Loop(self, plain, data_parallel.data_parallel(plain), optimizer, pruner, scaler, guard, taught)

    def _compiled(self, model: nn.Module) -> nn.Module:
        return torch.compile(model) if self.compile else model  # type: ignore[return-value]

    def evaluate(self, model: nn.Module, loader: Loader) -> dict[str, float]:
        """Mean `loss` and `accuracy` (0 to 1) over all samples of `loader`; the model stays the same."""
        return self._evaluate(model, model, data_parallel.local_batches(loader, training=False))

    def _evaluate(self, model: nn.Module, forward: Callable[..., Tensor], batches: Iterable[Batch]) -> dict[str, float]:
        totals = Totals(self.torch_device)
        with _kept_modes(model), torch.no_grad():
            model.eval()
            for batch in batches:
                sums = self.loss_sum(forward, batch)
                if data_parallel.own_samples(batch):
                    totals.add(*sums)
        return totals.together().read()  # sync point, once

    def loss_sum(self, forward: Callable[..., Tensor], batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy summed over the batch, the logits, and the labels on the device."""
        inputs, labels = map(self.to_device, inputs_and_labels(batch))
        logits = self._logits(forward, inputs)
        return F.cross_entropy(logits.float(), labels, reduction="sum"), logits, labels

    def _logits(self, forward: Callable[..., Tensor], inputs: Any) -> Tensor:
        dtype = AUTOCAST[self.precision]
        with torch.autocast(self.torch_device.type, dtype=dtype, enabled=dtype is not None):
            return logits_of(call(forward, inputs))

    def distance_sum(self, teacher: Callable[..., Tensor], batch: Batch, logits: Tensor, labels: Tensor) -> Tensor:
        """T^2 * KL of `logits` to the teacher's, summed like the loss: without labels that do not count."""
        inputs, _ = inputs_and_labels(batch)
        with torch.no_grad():
            wanted = self._logits(teacher, self.to_device(inputs))
        rows = divergence(logits, wanted, temperature=self.distill_temperature)
        return rows.masked_fill(labels == data_parallel.NO_LABEL, 0).sum()

    def to_device(self, value: Any) -> Any:
        """Copy every tensor in nested tuples, mappings and dataclasses; no sync point for pinned memory."""
        return map_tensors(self._to_device, value)

    def _to_device(self, value: Tensor) -> Tensor:
        if self.channels_last and value.dim() == 4:
            return value.to(self.torch_device, memory_format=torch.channels_last, non_blocking=True)
        return value.to(self.torch_device, non_blocking=True)


@dataclass
class _Loop:
    """One `fit` or `score`: the trainer, and the objects that it trains with."""

    trainer: Trainer
    plain: nn.Module
    forward: nn.Module  # `plain`; with several processes, in DistributedDataParallel
    optimizer: Optimizer
    pruner: Hooks
    scaler: torch.amp.GradScaler
    guard: Guard
    teacher: nn.Module | None = None
    checked: int = 0  # mask updates that were compared between processes

    def train_epoch(
        self, loader: Loader, lr_schedule: LRSchedule, on_step: StepCallback, on_rest: RestCallback, at: LoopState
    ) -> dict[str, float]:
        totals = Totals(self.trainer.torch_device, skipped=self.guard.skipped, distilled=self.teacher is not None)
        for step, group in at.steps(loader, functools.partial(self._groups, loader), totals):
            self.pruner.on_step_begin(step)
            if self.check_masks():  # a cut replaces parameters
                self.forward = data_parallel.data_parallel(self.plain, self.forward)
            self.guard.begin()
            self._show_gradients(group, totals)
            self._update()
            self.pruner.on_step_end()
            self.optimizer.zero_grad(set_to_none=True)
            lr_schedule.step()
            at.step = step + 1
            on_step(totals)
            self.guard.look()
            on_rest(at)
        self.guard.look(now=True)
        skipped = self.guard.skipped - totals.skipped
        collectives.broadcast_buffers(self.plain)
        return totals.together().read() | ({"skipped_steps": skipped} if skipped else {})  # sync point, once an epoch

    def score(self, loader: Loader, steps: int | None) -> int:
        totals, done = Totals(self.trainer.torch_device), 0
        for group in itertools.islice(self._groups(loader), steps):
            self._show_gradients(group, totals)
            self.scaler.update()  # the scale is reduced here as in training
            self.optimizer.zero_grad(set_to_none=True)
            done += 1
        return done

    def _show_gradients(self, group: Sequence[Batch], totals: Totals) -> None:
        self._accumulate(group, totals)
        self.scaler.unscale_(self.optimizer)
        self.guard.judge()
        with self.guard.shown():
            self.pruner.on_before_optimizer_step()

    def _accumulate(self, group: Sequence[Batch], totals: Totals) -> None:
        samples = data_parallel.loss_divisor(group)
        for batch in group:
            with data_parallel.averaging(self.forward, last=batch is group[-1]):
                loss, logits, labels = self.trainer.loss_sum(self.forward, batch)
                distance, wanted = None, loss
                if self.teacher is not None:
                    distance = self.trainer.distance_sum(self.teacher, batch, logits, labels)
                    wanted = mixed(loss, distance, self.trainer.distill)
                self.scaler.scale(wanted / samples).backward()  # type: ignore[no-untyped-call]
            if data_parallel.own_samples(batch):
                totals.add(loss, logits, labels, distance=distance, only_finite=True)

    def _groups(self, loader: Loader, start: Start | None = None) -> Iterator[list[Batch]]:
        """The epoch's groups of batches; `start` counts such groups."""
        size = self.trainer.accumulate_steps
        start = start and replace(start, batches=start.batches * size)
        return _groups(data_parallel.local_batches(loader, training=True, start=start), size)

    def check_masks(self) -> bool:
        """Compare changed masks between all processes; returns whether there were any."""
        updates = getattr(self.pruner, "updates", 0)
        if updates == self.checked or collectives.world_size() == 1:
            return False
        self.checked = updates
        collectives.check_masks(self.pruner.masks())  # type: ignore[attr-defined]
        return True

    def _update(self) -> None:
        self.guard.clip(self.trainer.clip_norm)
        self.guard.step()  # instead of the scaler's: it skips without a scaler too
        self.scaler.update()


def seed_everything(seed: int, *, deterministic: bool = False) -> None:
    """Seed Python, numpy and torch (all devices), and choose deterministic or fast algorithms on CUDA."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA, then MPS, then CPU."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, found in here.items() if found))
    kind, _, index = name.partition(":")
    allowed = ", ".join(["auto", *(kind for kind, found in here.items() if found)])
    known = here.get(kind, False) and (not index or index.isdecimal())
    check(known, "trainer.device", name, f"one of those on this machine: {allowed}")
    if kind == "cuda" and index:
        count = torch.cuda.device_count()
        check(int(index) < count, "trainer.device", name, f"cuda:0 to cuda:{count - 1}")
    return torch.device(name)


def _groups(loader: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of `size` batches, the last one possibly shorter; holds one group in host memory."""
    batches = iter(loader)
    while group := list(itertools.islice(batches, size)):
        yield group


@contextlib.contextmanager
def _kept_modes(model: nn.Module) -> Iterator[None]:
    """Restore the mode of each module at the end (a frozen BatchNorm stays frozen)."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Restore gradients (to None), buffers and modes at the end."""
    buffers = [(part, name, buffer) for part in model.modules() for name, buffer in part._buffers.items()]
    values = [None if buffer is None else buffer.clone() for _, _, buffer in buffers]
    model.zero_grad(set_to_none=True)
    try:
        with _kept_modes(model):
            yield
    finally:
        model.zero_grad(set_to_none=True)
        for (module, name, buffer), value in zip(buffers, values, strict=True):
            module._buffers[name] = buffer  # a forward pass may have assigned another tensor
            if buffer is not None and value is not None:
                buffer.detach().copy_(value)


@contextlib.contextmanager
def _first_skipped_step_is_fine() -> Iterator[None]:
    """Ignore torch's warning about the call order, which a scaler causes when it skips the first step."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler\.step\(\)` before")
        yield


def _named(split: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{split}/{name}": value for name, value in values.items()}


def _lr(optimizer: Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])
