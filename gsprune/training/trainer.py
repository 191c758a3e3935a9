"""The training loop: `Trainer.fit`, `score` and `evaluate`, learning-rate schedules, optimizers, seeds.

The only caller of the pruner's hooks in this repository. There is one loop and it has no feature branches:
what pruning needs comes in through the hooks (`Hooks`), what a screen, a log or a checkpoint needs through callbacks.

One optimizer step, in order:

    hooks.on_step_begin(step)
    forward and backward, `accumulate_steps` times
    scaler.unscale_(optimizer)
    hooks.on_before_optimizer_step()      gradients of the whole group: unscaled, not yet clipped
    clip, optimizer.step(), scaler.update()
    hooks.on_step_end()
    optimizer.zero_grad(set_to_none=True), lr_schedule.step()
    on_step(totals), on_rest(position)    between two steps: what can be saved, and gone on from

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
from gsprune.structures.example import call, inputs_and_labels, logits_of, map_tensors
from gsprune.training import data_parallel
from gsprune.training.checks import check
from gsprune.training.guard import Guard
from gsprune.training.loading import Start
from gsprune.training.optimization import Schedule
from gsprune.training.position import Position, Stateful

Batch = tuple[Any, Tensor]
Model = TypeVar("Model", bound=nn.Module)
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PROGRESS = ("auto", "bar", "lines", "none")
RESUME = ("auto", "never")


class Hooks(Protocol):
    """What the loop asks of a pruner (`gsprune.Pruner`, `gsprune.NoPruning`, or your own)."""

    def on_train_begin(self) -> None: ...
    def on_epoch_begin(self, epoch: int) -> None: ...
    def on_step_begin(self, step: int) -> None: ...
    def on_before_optimizer_step(self) -> None: ...
    def on_step_end(self) -> None: ...
    def on_epoch_end(self) -> None: ...
    def on_train_end(self) -> None: ...


class Loader(Protocol):
    """Batches whose number is known: a `DataLoader`, or a list of batches.

    A batch is (inputs, labels), or a mapping, named tuple or dataclass with a part called labels. The network is called
    with the inputs as `example_input` is traced: model(x), model(*tuple) or model(**mapping).
    """

    def __iter__(self) -> Iterator[Batch]: ...
    def __len__(self) -> int: ...


class Totals:
    """Loss and correct predictions summed on the device: adding never waits for it, `read` does.

    The averages are over samples, not over batches, so a short last batch weighs what it holds.
    """

    def __init__(self, device: torch.device, *, skipped: int = 0) -> None:
        self.skipped = skipped  # steps that were left out before these
        # float64 keeps the sum exact over a long epoch; MPS has none
        wide = torch.float32 if device.type == "mps" else torch.float64
        self._loss = torch.zeros((), dtype=wide, device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._left_out = torch.zeros_like(self._correct)
        self._count = 0

    def add(self, loss_sum: Tensor, logits: Tensor, labels: Tensor, *, only_finite: bool = False) -> None:
        """With `only_finite` a batch whose loss is not finite is left out."""
        loss, correct = loss_sum.detach(), (logits.detach().argmax(dim=1) == labels).sum()
        if only_finite:
            lost = loss.isfinite().logical_not()
            loss, correct = loss.masked_fill(lost, 0), correct.masked_fill(lost, 0)
            self._left_out += len(labels) * lost
        self._loss += loss
        self._correct += correct
        self._count += len(labels)

    def together(self) -> Totals:
        """Those of all processes, each of which has to ask; in a process that is alone, its own."""
        if collectives.world_size() == 1:
            return self
        counts = (self._correct, self._left_out, torch.full_like(self._correct, self._count))
        loss, *summed = collectives.summed(torch.stack([self._loss, *(count.to(self._loss) for count in counts)]))
        found = Totals(loss.device, skipped=self.skipped)
        found._loss, found._correct, found._left_out = loss, summed[0].long(), summed[1].long()
        found._count = int(summed[2])
        return found

    def read(self) -> dict[str, float]:
        """Mean loss and accuracy (0 to 1) so far, of this process alone; NaN if every batch was left out.

        This is a sync point.
        """
        if self._count == 0:
            raise ValueError("the loader gave no batch, so there is no loss or accuracy to report")
        count = self._count - int(self._left_out) or math.nan
        return {"loss": self._loss.item() / count, "accuracy": self._correct.item() / count}

    def state_dict(self) -> dict[str, Any]:
        """On the host, so that another process can take it without a GPU of this number. This is a sync point."""
        sums = {"loss": self._loss.cpu(), "correct": self._correct.cpu(), "left_out": self._left_out.cpu()}
        return {**sums, "count": self._count, "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._loss.copy_(state["loss"])
        self._correct.copy_(state["correct"])
        self._left_out.copy_(state["left_out"])
        self._count, self.skipped = state["count"], state["skipped"]


EpochCallback = Callable[[int, dict[str, float]], None]
StepCallback = Callable[[Totals], None]
RestCallback = Callable[[Position], None]


@dataclass(frozen=True)
class Trainer:
    """Settings of training, and the verbs that use them: `fit`, `score` and `evaluate`.

    Args:
        dense_epochs, prune_epochs: length of a job's two phases (read by the job).
        prune_lr: learning rate of the second phase; None takes the optimizer's own.
        device: "auto" (CUDA, then MPS, then CPU), "cpu", "cuda", "cuda:1", "mps".
        precision: "fp32", or autocast to "bf16" or "fp16" (the latter with a gradient scaler).
        accumulate_steps: batches in one optimizer step. The gradient is that of the mean over all samples of
            the group, as for one batch of that size, also when the last batch or the last group of an epoch
            is short. (BatchNorm still normalises each batch by itself.)
        clip_norm: largest global gradient norm, None for no clipping. The pruner sees gradients before it.
        max_bad_steps: a step whose gradients are not finite is skipped: neither weights nor scores nor BatchNorm's
            statistics change. So many in a row are put up with, and one more ends the run; 0: none is. With fp16 leave
            room, because the scaler finds its scale by steps like that.
        channels_last: memory format of the model and of 4-D inputs; faster convolutions on most devices.
        compile: run forward through `torch.compile`; the pruner works on the plain module.
        fused: use the optimizer's fused form where it has one (one kernel instead of one per operation).
        deterministic: ask also CUDA for the same numbers twice (slower). On CPU they are the same anyway.
        progress: read by the job: how to show it.
        latency_repeats, latency_batch, latency_seconds: read by the job: how often to time a forward pass of both
            networks (0: not at all; fewer than 30 give no figure), of how many samples, and for how long at most.
        devices: processes on this machine that train one network together, each on its part of every batch: a batch
            size is that of all of them. On CUDA each takes a GPU of its own.
        nodes: machines that do so; the same command is started on each of them, in an output directory that all see (or
            an interrupted run cannot go on).
        rendezvous: "host:port" of one of the machines, where they find each other. Needed for more than one.
        timeout_minutes: how long a process waits for another one before the run ends with an error.
        dense_cache, dense_scores: read by the job: jobs of a sweep that share their dense phase train it once;
            the dense network is scored before pruning begins, so that the first mask does not rest on a few batches.
        resume: read by the job: "auto" goes on from the newest checkpoint of an unfinished run of the same
            configuration in the output directory, "never" starts anew.
        checkpoint_minutes: read by the job: write a checkpoint also within an epoch when the last one is older
            than that; 0 after every step, None at the end of epochs alone.

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
    dense_cache: bool = True
    dense_scores: bool = True
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
        for name, choices in (("precision", AUTOCAST), ("progress", PROGRESS), ("resume", RESUME)):
            value = getattr(self, name)
            check(value in choices, f"trainer.{name}", value, f"one of {', '.join(choices)}")
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
        """The same module, moved to the device and the memory format. Do this before making an optimizer."""
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
        lr_schedule: Schedule,
        pruner: Hooks,
        epochs: int,
        on_epoch: EpochCallback = lambda epoch, values: None,
        on_step: StepCallback = lambda totals: None,
        on_rest: RestCallback = lambda position: None,
        on_redraw: Callable[[], None] = lambda: None,
        start: Mapping[str, Any] | None = None,
    ) -> None:
        """Train `model` in place for `epochs` epochs, calling the pruner's hooks in the order above.

        Args:
            lr_schedule: stepped once per optimizer step.
            on_epoch: called after every epoch with its number (from 0) and `train/loss`, `train/accuracy`,
                `val/loss`, `val/accuracy` (when there is a `val_loader`), `lr` (of the next step), `epoch_seconds`,
                and `train/skipped_steps` if there were any.
            on_step: called after every optimizer step with the running `Totals`; reading it is a sync point.
            on_rest: called after `on_step`, after each batch of `val_loader` and after `on_epoch`, with the `Position`:
                what is between two steps can be saved here. An exception ends the training.
            on_redraw: called after each batch that has to be fetched again to go on within an epoch (see `loading`).
                An exception ends the training; nothing has changed since `start`.
            start: a `Position.state_dict()` to go on from, as if never interrupted. The states of model, optimizer,
                schedule and pruner at that position are loaded already.

        Raises:
            BadNumbers: a ValueError that names the first tensor whose gradient is not finite, after more than
                `max_bad_steps` such steps in a row. The model is as the last good step left it.
        """
        loop = self._loop(model, optimizer, pruner)
        parts: dict[str, Stateful] = {"scaler": loop.scaler, "guard": loop.guard}
        at = Position(self.torch_device, parts, start, on_redraw=on_redraw)
        model.train()
        pruner.on_train_begin()
        with _first_skipped_step_is_fine():
            for epoch in range(at.epoch, epochs):
                pruner.on_epoch_begin(epoch)
                values = _named("train", loop.train_epoch(train_loader, lr_schedule, on_step, on_rest, at))
                pruner.on_epoch_end()
                if val_loader is not None:
                    batches = at.resting(data_parallel.shares(val_loader, training=False), on_rest)
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
        """Let the pruner score a network as it is: steps of training without the update of the weights.

        Forward and backward run as in `fit`, and of the hooks `on_before_optimizer_step` alone is called. Afterwards
        parameters, buffers (BatchNorm's statistics) and modes are as they were, and gradients are None; the loader
        and dropout have drawn random numbers.

        Args:
            optimizer: of the model's parameters; it makes no step and keeps its state.
            steps: optimizer steps to score, at most one pass over the loader; None: all of it. A pruner's
                `criterion.horizon` says how many matter.

        Returns:
            How many steps there were.
        """
        check(steps is None or steps >= 0, "steps", steps, "0 or more, or None")
        with _as_it_was(model):
            model.train()
            return self._loop(model, optimizer, pruner).score(loader, steps)

    def _loop(self, model: nn.Module, optimizer: Optimizer, pruner: Hooks) -> _Loop:
        scaler = torch.amp.GradScaler(self.torch_device.type, enabled=self.precision == "fp16")
        guard = Guard(model, optimizer, limit=self.max_bad_steps)
        plain: nn.Module = torch.compile(model) if self.compile else model  # type: ignore[assignment]
        return _Loop(self, plain, data_parallel.data_parallel(plain), optimizer, pruner, scaler, guard)

    def evaluate(self, model: nn.Module, loader: Loader) -> dict[str, float]:
        """Mean `loss` and `accuracy` (0 to 1) over all samples of `loader`; the model is left as it was."""
        return self._evaluate(model, model, data_parallel.shares(loader, training=False))

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
        dtype = AUTOCAST[self.precision]
        with torch.autocast(self.torch_device.type, dtype=dtype, enabled=dtype is not None):
            logits = logits_of(call(forward, inputs))
        return F.cross_entropy(logits.float(), labels, reduction="sum"), logits, labels

    def to_device(self, value: Any) -> Any:
        """Copy every tensor of a nest (tuples, mappings, dataclasses) without waiting for pinned memory."""
        return map_tensors(self._to_device, value)

    def _to_device(self, value: Tensor) -> Tensor:
        if self.channels_last and value.dim() == 4:
            return value.to(self.torch_device, memory_format=torch.channels_last, non_blocking=True)
        return value.to(self.torch_device, non_blocking=True)


@dataclass
class _Loop:
    """One `fit` or `score`: the trainer's settings and what it works on."""

    trainer: Trainer
    plain: nn.Module
    forward: nn.Module  # the same; in several processes what also averages its gradients
    optimizer: Optimizer
    pruner: Hooks
    scaler: torch.amp.GradScaler
    guard: Guard
    checked: int = 0  # mask updates that have been compared between processes

    def train_epoch(
        self, loader: Loader, lr_schedule: Schedule, on_step: StepCallback, on_rest: RestCallback, at: Position
    ) -> dict[str, float]:
        totals = Totals(self.trainer.torch_device, skipped=self.guard.skipped)
        for step, group in at.steps(loader, functools.partial(self._groups, loader), totals):
            self.pruner.on_step_begin(step)
            if self.check_masks():  # units that were cut out have left other parameters behind
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
            self.scaler.update()  # a scale too large for this network shrinks here as it does in training
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
        samples = data_parallel.weight(group)
        for batch in group:
            with data_parallel.averaging(self.forward, last=batch is group[-1]):
                loss, logits, labels = self.trainer.loss_sum(self.forward, batch)
                self.scaler.scale(loss / samples).backward()  # type: ignore[no-untyped-call]
            if data_parallel.own_samples(batch):
                totals.add(loss, logits, labels, only_finite=True)

    def _groups(self, loader: Loader, start: Start | None = None) -> Iterator[list[Batch]]:
        """The epoch's groups of batches; `start` counts such groups."""
        size = self.trainer.accumulate_steps
        start = start and replace(start, batches=start.batches * size)
        return _groups(data_parallel.shares(loader, training=True, start=start), size)

    def check_masks(self) -> bool:
        """Compare masks that have changed over all processes; whether there was something to compare."""
        updates = getattr(self.pruner, "updates", 0)
        if updates == self.checked or collectives.world_size() == 1:
            return False
        self.checked = updates
        collectives.check_masks(self.pruner.masks())  # type: ignore[attr-defined]
        return True

    def _update(self) -> None:
        self.guard.clip(self.trainer.clip_norm)
        self.guard.step()  # in the place of the scaler's: it skips also without one
        self.scaler.update()


def seed_everything(seed: int, *, deterministic: bool = False) -> None:
    """Seed Python, numpy and torch (all devices), and set how strictly CUDA must repeat itself."""
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
    """Back to each module's own mode at the end (a frozen BatchNorm stays frozen)."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Steps without an update leave no trace: neither in gradients nor in buffers nor in modes."""
    buffers = [(part, name, buffer) for part in model.modules() for name, buffer in part._buffers.items()]
    values = [None if buffer is None else buffer.clone() for _, _, buffer in buffers]
    model.zero_grad(set_to_none=True)
    try:
        with _kept_modes(model):
            yield
    finally:
        model.zero_grad(set_to_none=True)
        for (module, name, buffer), value in zip(buffers, values, strict=True):
            module._buffers[name] = buffer  # a forward pass may also have put another tensor in its place
            if buffer is not None and value is not None:
                buffer.detach().copy_(value)


@contextlib.contextmanager
def _first_skipped_step_is_fine() -> Iterator[None]:
    """A scaler that skips the very first step makes torch warn of a wrong call order: not so here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler\.step\(\)` before")
        yield


def _named(split: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{split}/{name}": value for name, value in values.items()}


def _lr(optimizer: Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])
