"""Distillation: a pruned network recovers by learning the dense network's outputs beside the task.

The loss is (1 - a) * task + a * T^2 * KL(softmax(teacher / T) || softmax(student / T)), after Hinton, Vinyals and Dean,
"Distilling the Knowledge in a Neural Network" (2015). The factor T^2 keeps the size of the gradient, which falls with
1 / T^2.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from gsprune.structures.example import call, inputs_and_labels, logits_of, map_tensors

__all__ = ["distill", "distillation_loss", "divergence", "mixed"]

Loss = Callable[[Any, Any], Tensor]
ZEROS = 0.2  # of a matrix: more than this is pruning, which training would fill again


class Masked(Protocol):
    """A pruner whose masks are final (`gsprune.Pruner.from_masks`)."""

    def on_step_end(self) -> None: ...


def divergence(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 2.0, dim: int = 1) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)) of each row, in nats, in float32 or wider.

    Args:
        student_logits, teacher_logits: of one shape; the teacher's get no gradient.
        temperature: T, above 0.
        dim: the dimension of the classes, two at least.

    Returns:
        A tensor of that shape without `dim`.

    Raises:
        ValueError: the shapes differ, or there are not two classes.

    >>> divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]]), temperature=1.0)
    tensor([0.1308])
    """
    _check_logits(student_logits, teacher_logits, dim)
    _check_temperature(temperature)
    student, teacher = (
        torch.log_softmax((logits if logits.dtype is torch.float64 else logits.float()) / temperature, dim)
        for logits in (student_logits, teacher_logits.detach())
    )
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim) * temperature**2


def mixed(task_loss: Tensor, divergence: Tensor, weight: float) -> Tensor:
    """(1 - weight) * task_loss + weight * divergence."""
    return (1 - weight) * task_loss + weight * divergence


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    task_loss: Tensor,
    *,
    weight: float = 0.5,
    temperature: float = 2.0,
    dim: int | None = None,
) -> Tensor:
    """(1 - a) * task + a * T^2 * KL(softmax(teacher / T) || softmax(student / T)), the mean over the rows.

    Args:
        student_logits, teacher_logits: (rows, classes), or more dimensions with `dim` given.
        task_loss: a scalar, the mean over the same rows.
        weight: a, in [0, 1].
        temperature: T, above 0: a larger one shows more of what the teacher thinks of wrong classes.
        dim: the dimension of the classes, needed for more than two dimensions: 1 for pictures of labels (n, classes,
            height, width), -1 for texts (n, tokens, classes).

    Raises:
        ValueError: a setting out of its range, shapes that differ, fewer than two classes.

    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]])
    >>> distillation_loss(student, teacher, torch.tensor(1.0), weight=0.5, temperature=1.0)
    tensor(0.5654)
    """
    _check_weight(weight)
    found = divergence(student_logits, teacher_logits, temperature=temperature, dim=_class_dim(student_logits, dim))
    return mixed(task_loss, found.mean(), weight)


def distill(
    small: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    epochs: int = 2,
    lr: float = 1e-3,
    weight: float = 0.5,
    temperature: float = 2.0,
    optimizer: Optimizer | None = None,
    pruner: Masked | None = None,
    dim: int | None = None,
) -> list[dict[str, float]]:
    """Train a pruned network for a few epochs, with the dense one as its teacher. `small` is changed in place.

    `dense` runs in evaluation mode without gradients and stays as it is. Afterwards `small` is in the mode it had, its
    gradients are None.

    Args:
        batches: (inputs, targets), or mappings for a network that returns its own `loss` (transformers). They are read
            once an epoch. Tensors are moved to the networks' device.
        loss: loss(outputs, targets) -> a scalar, the mean over the batch; None: the `loss` that the network returns.
            Of what the network returns, teacher and student are compared by the tensor itself, its `logits`, or the
            first of several tensors.
        epochs: 1 or more.
        lr: learning rate of AdamW, which falls to 0 along a cosine; not used with an `optimizer`, whose rate stays.
        weight: a of `distillation_loss`, in [0, 1].
        temperature: T of `distillation_loss`, above 0.
        optimizer: of `small`'s parameters.
        pruner: keeps its masks, as `gsprune.Pruner.from_masks(small, masks)` does; a network with single weights pruned
            needs it, one that was cut smaller does not.
        dim: the dimension of the classes, needed for logits of more than two dimensions. Where the inputs have an
            `attention_mask` of the other dimensions, padding is left out.

    Returns:
        Of each epoch the mean over its batches of `loss` (of the task) and `distill_loss` (T^2 * KL).

    Raises:
        ValueError: a setting out of its range, no batches, no logits or no loss to be had, logits of different shapes;
            a loss that is not finite, after which `small` has the weights that it came with.

    >>> dense, small = nn.Linear(4, 3), nn.Linear(4, 3)
    >>> batches = [(x, dense(x).argmax(1)) for x in torch.randn(8, 16, 4)]
    >>> rows = distill(small, dense, batches, F.cross_entropy, epochs=4, lr=0.1, weight=1.0)
    >>> len(rows), rows[-1]["distill_loss"] < rows[0]["distill_loss"]
    (4, True)
    """
    _check_run(small, dense, batches, epochs=epochs, lr=lr, weight=weight, temperature=temperature)
    if pruner is None:
        _warn_of_zeros(small)
    device = next(small.parameters()).device
    train = _Distilling(small, dense, loss, weight, temperature, dim, device)
    trained = [parameter for parameter in small.parameters() if parameter.requires_grad]
    own = optimizer or torch.optim.AdamW(trained, lr=lr)
    before = {name: value.clone() for name, value in small.state_dict().items() if isinstance(value, Tensor)}
    rows = []
    with _modes(small, dense):
        small.train()
        dense.eval()
        for epoch in range(epochs):
            sums, count = torch.zeros(2, device=device, dtype=torch.float32), 0
            steps = len(batches) if isinstance(batches, Sized) else None
            for step, batch in enumerate(batches):
                if optimizer is None:
                    done = (epoch + step / steps if steps else epoch) / epochs
                    own.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * done)) / 2
                total, parts = train.loss(batch)
                own.zero_grad(set_to_none=True)
                total.backward()  # type: ignore[no-untyped-call]
                own.step()
                if pruner is not None:
                    pruner.on_step_end()
                sums, count = sums + parts, count + 1
            if count == 0:
                raise ValueError("batches has no batch: there is nothing to learn from")
            task, distance = (sums / count).tolist()
            if not math.isfinite(task + distance):
                with torch.no_grad():
                    for name, value in small.state_dict().items():
                        if name in before:
                            value.copy_(before[name])
                raise ValueError(
                    f"the loss of epoch {epoch + 1} is {task:g}, that of distillation {distance:g}: lower lr={lr}; the "
                    f"network has the weights that it came with"
                )
            rows.append({"loss": task, "distill_loss": distance})
    own.zero_grad(set_to_none=True)
    return rows


class _Distilling:
    """The loss of one batch."""

    def __init__(
        self,
        small: nn.Module,
        dense: nn.Module,
        loss: Loss | None,
        weight: float,
        temperature: float,
        dim: int | None,
        device: torch.device,
    ) -> None:
        self._small, self._dense, self._loss, self._dim = small, dense, loss, dim
        self._weight, self._temperature, self._device = weight, temperature, device

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """What is minimised, and (loss of the task, T^2 * KL) without gradients."""
        batch = map_tensors(lambda tensor: tensor.to(self._device, non_blocking=True), batch)
        inputs, targets = (batch, None) if self._loss is None else inputs_and_labels(batch)
        outputs = call(self._small, inputs)
        with torch.no_grad():
            teacher = call(self._dense, inputs)
        student, wanted = _logits(outputs), _logits(teacher)
        dim = _class_dim(student, self._dim)
        rows = divergence(student, wanted, temperature=self._temperature, dim=dim)
        distance = _mean_of_real(rows, inputs)
        task = _own_loss(outputs) if self._loss is None else self._loss(outputs, targets)
        if not isinstance(task, Tensor) or task.numel() != 1:
            raise ValueError("loss must return a scalar tensor: the mean over the batch")
        task = task.reshape(())
        parts = torch.stack([task.detach().float(), distance.detach().float()])
        return mixed(task, distance.to(task.dtype), self._weight), parts


def _own_loss(outputs: Any) -> Any:
    found = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if found is None:
        raise ValueError("the network returns no loss for these batches: give loss, or put labels into the batches")
    return found


def _logits(outputs: Any) -> Tensor:
    found = logits_of(outputs)
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise ValueError(
            f"the network returns a {type(outputs).__name__} without logits: distillation compares scores of classes"
        )
    return found


def _mean_of_real(rows: Tensor, inputs: Any) -> Tensor:
    """The mean over the rows, without padding where an `attention_mask` says which that is."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if not isinstance(mask, Tensor) or mask.shape != rows.shape:
        return rows.mean()
    real = mask.bool()
    return rows.masked_fill(~real, 0).sum() / real.sum().clamp(min=1)


def _class_dim(logits: Tensor, given: int | None) -> int:
    if given is None and logits.dim() > 2:
        raise ValueError(
            f"logits have the shape {list(logits.shape)}: say with dim which dimension is that of the classes (-1 for "
            f"texts, 1 for pictures of labels)"
        )
    return 1 if given is None else given


def _check_logits(student: Tensor, teacher: Tensor, dim: int) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"the network has outputs of shape {list(student.shape)} and its teacher {list(teacher.shape)}: they must "
            f"be equal"
        )
    if not -student.dim() <= dim < student.dim() or student.shape[dim] < 2:
        raise ValueError(
            f"outputs of shape {list(student.shape)} have no two classes in dimension {dim}: there is no distribution "
            f"to compare"
        )


def _check_weight(weight: float) -> None:
    if not 0 <= weight <= 1:
        raise ValueError(f"weight is {weight}: it must be from 0 to 1")


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: it must be above 0, and finite")


def _check_run(
    small: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    epochs: int,
    lr: float,
    weight: float,
    temperature: float,
) -> None:
    _check_weight(weight)
    _check_temperature(temperature)
    if type(epochs) is not int or epochs < 1:
        raise ValueError(f"epochs is {epochs}: it must be a whole number, 1 or more")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr is {lr}: it must be above 0")
    if small is dense:
        raise ValueError("small and dense are the same network: the teacher must be a copy of before the cut")
    if isinstance(batches, Iterator) and epochs > 1:
        raise ValueError(f"batches is a {type(batches).__name__}, which is read once: {epochs} epochs need a list")
    if not any(parameter.requires_grad for parameter in small.parameters()):
        raise ValueError("no parameter of the network can be trained: all have requires_grad=False")
    homes = [next((str(p.device) for p in model.parameters()), "cpu") for model in (small, dense)]
    if homes[0] != homes[1]:
        raise ValueError(f"the network is on {homes[0]} and its teacher on {homes[1]}: move one of them")


def _warn_of_zeros(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and parameter.numel() and not parameter.is_meta:
            share = 1 - int(parameter.count_nonzero()) / parameter.numel()
            if share > ZEROS:
                warnings.warn(
                    f"{100 * share:.0f} % of {name} is zero and will be trained: if it was pruned, give "
                    f"pruner=gsprune.Pruner.from_masks(small, masks)",
                    stacklevel=3,
                )
                return


@contextmanager
def _modes(*models: nn.Module) -> Iterator[None]:
    """Restore the mode of each module at the end."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
