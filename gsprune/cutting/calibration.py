"""Calibration data: a few hundred samples of the user's batches, read once and kept on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsprune.structures.attention import no_fast_path
from gsprune.structures.example import Example, call, inputs_and_labels, logits_of, map_tensors, plain, tensors_in
from gsprune.structures.running import device_of, evaluating, outputs, same_randomness

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Batch:
    """Some samples: what the network is called with, and what its outputs are compared with (None: nothing)."""

    inputs: Example
    targets: Any
    size: int

    def to(self, device: torch.device) -> Batch:
        """The same samples on a device."""
        inputs, targets = map_tensors(lambda tensor: tensor.to(device), (self.inputs, self.targets))
        return Batch(inputs, targets, self.size)

    def rows(self, start: int, stop: int) -> Batch:
        """Samples start to stop - 1."""

        def cut(tensor: Tensor) -> Tensor:
            return tensor[start:stop] if tensor.dim() and len(tensor) == self.size else tensor

        inputs, targets = map_tensors(cut, (self.inputs, self.targets))
        return Batch(inputs, targets, min(stop, self.size) - start)


class Calibration:
    """The first samples of an iterable of batches.

    A batch is a pair (inputs, targets) or a mapping with a part called labels; without targets it is inputs alone: a
    tensor, a mapping, or a list of tensors. With a mapping and no `loss` the network is called with all of it and
    returns its own loss, as networks of transformers do. Where there are no targets, `drawn_from` draws labels from
    the network's own predictions, whose loss is their cross-entropy.

    Args:
        batches: what is read, at most until `samples` are there.
        loss: loss(outputs, targets) -> scalar; of outputs with `logits` it is given these.
        samples: how many are taken.
        seed: of labels that are drawn.

    Attributes:
        batches: what was read, on the CPU.
        size: how many samples that is.

    Raises:
        ValueError: there is no batch, a batch holds no tensor, or its parts differ in length.

    >>> data = Calibration([(torch.zeros(3, 4), torch.zeros(3).long())] * 2, F.cross_entropy, samples=5)
    >>> data.size, [batch.size for batch in data.batches]
    (5, [3, 2])
    >>> round(float(data.loss(nn.Identity(), data.batches[0])), 4)
    1.3863
    """

    def __init__(
        self,
        batches: Iterable[Any],
        loss: Loss | None = None,
        *,
        samples: int = 512,
        seed: int = 0,
    ) -> None:
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ValueError(f"calibration is {samples!r}: it must be a whole number of samples, 1 or more")
        if loss is not None and not callable(loss):
            raise ValueError(f"loss is a {type(loss).__name__}: it must be a function of (outputs, targets), or None")
        self._loss, self.seed = loss, seed
        self.batches = list(_first(_read(batches, loss), samples))
        if not self.batches:
            raise ValueError("there is no batch to calibrate with: batches is empty")
        self.size = sum(batch.size for batch in self.batches)

    @property
    def labelled(self) -> bool:
        """Whether every batch has targets."""
        return all(batch.targets is not None for batch in self.batches)

    @property
    def has_loss(self) -> bool:
        """Whether something says how outputs are compared with the targets."""
        return self._loss is not None or all(isinstance(batch.targets, Mapping) for batch in self.batches)

    def example_for(self, model: nn.Module, samples: int = 2) -> Example:
        """Two samples (fewer, where there are fewer) to trace a network with: inputs alone where it runs on them, and
        with labels where it does not, as encoder-decoders."""
        batch = self.batches[0].rows(0, samples)
        if self._loss is None and isinstance(batch.targets, Mapping):
            try:
                with evaluating([model]):
                    outputs(model, batch.to(device_of(model)).inputs)
            except Exception:
                return batch.targets
        return batch.inputs

    def inputs(self) -> list[Example]:
        """What the network is called with, batch by batch, on the CPU."""
        return [batch.inputs for batch in self.batches]

    def calls(self) -> list[Example]:
        """The same with labels, of networks that return their own loss: encoder-decoders read their labels."""
        return [
            batch.targets if self._loss is None and isinstance(batch.targets, Mapping) else batch.inputs
            for batch in self.batches
        ]

    def cut_into(self, size: int) -> Iterator[Batch]:
        """The same samples in batches of at most `size`."""
        for batch in self.batches:
            for start in range(0, batch.size, size):
                yield batch.rows(start, min(start + size, batch.size))

    def split(self, count: int) -> tuple[Calibration, Calibration]:
        """The first `count` samples, and the others."""
        first = list(_first(iter(self.batches), count))
        rest, seen = [], 0
        for batch in self.batches:
            if seen + batch.size > count:
                rest.append(batch.rows(max(count - seen, 0), batch.size))
            seen += batch.size
        return self._of(first), self._of(rest)

    def _of(self, batches: list[Batch]) -> Calibration:
        if not batches:
            raise ValueError(f"{self.size} samples of calibration data cannot be split in two")
        part = object.__new__(Calibration)
        part._loss, part.seed, part.batches = self._loss, self.seed, batches
        part.size = sum(batch.size for batch in batches)
        return part

    def check_loss(self) -> None:
        """ValueError where there are targets and no way to compare outputs with them, or a loss and no targets."""
        for batch in self.batches:
            if batch.targets is not None and self._loss is None and not isinstance(batch.targets, Mapping):
                raise ValueError(
                    "the batches are pairs (inputs, targets), but no loss was given: give loss(outputs, targets), such "
                    "as torch.nn.functional.cross_entropy"
                )
            if batch.targets is None and self._loss is not None:
                raise ValueError(
                    "a loss was given, but the batches have no targets: give pairs (inputs, targets), or leave the "
                    "loss out, and labels are drawn from the network's own predictions"
                )

    def drawn_from(self, model: nn.Module) -> Calibration:
        """The same inputs with labels drawn from the predictions of a network in evaluation mode."""
        generator = torch.Generator().manual_seed(self.seed)
        device, found = device_of(model), []
        with torch.no_grad(), evaluating([model]):
            for batch in self.batches:
                labels = _draw(logits_of(call(model, batch.to(device).inputs)), generator)
                found.append(Batch(batch.inputs, labels, batch.size))
        other = self._of(found)
        other._loss = _cross_entropy
        return other

    def of_outputs(self, model: nn.Module) -> Calibration | None:
        """The same samples with a random sum of a sample's outputs z_b in the place of the loss; None: there are none.

            l_b = r_b . z_b,    so that for a gate a    E (dl_b / da)^2 = |dz_b / da|^2

        with signs r_b of each sample's own. How much the outputs feel a gate needs no label, and a sample of which the
        network is sure counts as much as another (its gradient of a loss is nearly 0). Outputs are the logits where
        there are some, else all floating-point tensors with one entry a sample, each divided by its root mean square
        where there are several. Tokens that an `attention_mask` leaves out do not count.
        """
        batches = []
        start = 0
        for batch in self.batches:
            whole = self._loss is None and isinstance(batch.targets, Mapping)
            inputs = batch.targets if whole else batch.inputs
            mask = batch.inputs.get("attention_mask") if isinstance(batch.inputs, Mapping) else None
            numbers = torch.arange(start, start + batch.size)
            batches.append(Batch(inputs, (numbers, mask), batch.size))
            start += batch.size
        with torch.no_grad(), evaluating([model]), no_fast_path(), same_randomness(model):
            for part in (batches[0].rows(0, 1), batches[0]):  # a length may be that of one batch by chance
                if not _of_samples(call(model, part.to(device_of(model)).inputs), part.size):
                    return None
        other = self._of(batches)
        other._loss = _signed_sum
        return other

    def output_change(self, dense: Any, other: Any, batch: Batch) -> Tensor:
        """How much the outputs of each sample differ between two networks: |z_b - z'_b|^2, (b,).

        Of what `of_outputs` returned, whose batches these are; the outputs are those, and as large as it says there.
        """
        numbers, mask = batch.targets
        pair = [_of_samples(outputs, len(numbers)) for outputs in (dense, other)]
        total = torch.zeros(len(numbers), device=pair[0][0].device)
        for a, b, size in zip(*pair, _sizes(pair[0]), strict=True):
            total = total + _inside(a.float() - b.float(), mask).reshape(len(a), -1).square().sum(1) / size**2
        return total

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of a network on a batch that lies on its device, a scalar.

        Raises:
            ValueError: it is no scalar, or a network returns none.
        """
        if batch.targets is None:
            raise ValueError("these batches have no targets: label them by `drawn_from` first")
        if self._loss is not None:
            outputs = call(model, batch.inputs)
            logits = logits_of(outputs) if hasattr(outputs, "logits") else outputs
            value: Any = self._loss(logits, batch.targets)
        else:
            outputs = call(model, batch.targets)  # the whole mapping, labels included
            value = outputs["loss"] if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if not isinstance(value, Tensor) or value.numel() != 1:
            given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the loss of a batch is {given}: it must be a tensor with one number")
        return value.reshape(())

    def mean_loss(self, model: nn.Module) -> float:
        """The mean over samples of a network's loss, in evaluation mode; it may lie on another device."""
        device, losses = device_of(model), list[Tensor]()
        with torch.no_grad(), evaluating([model]), no_fast_path(), same_randomness(model):
            for batch in self.batches:
                losses.append(self.loss(model, batch.to(device)))
        values = torch.stack(losses).tolist()  # one wait for the device
        return float(sum(value * batch.size for value, batch in zip(values, self.batches, strict=True))) / self.size

    def dense_loss(self, model: nn.Module) -> float:
        """The mean loss of the network that is to be pruned.

        Raises:
            ValueError: it is not finite.
        """
        loss = self.mean_loss(model)
        if not math.isfinite(loss):
            raise ValueError(f"the network's loss on the calibration data is {loss}: it must be finite")
        return loss


def _read(batches: Iterable[Any], loss: Loss | None) -> Iterator[Batch]:
    if isinstance(batches, Tensor | Mapping) or not isinstance(batches, Iterable):
        raise ValueError(
            f"batches is a {type(batches).__name__}: it must be an iterable of batches, such as a DataLoader or a list"
        )
    for batch in batches:
        batch = map_tensors(lambda tensor: plain(tensor).cpu(), batch)
        inputs, targets = _parts(batch, loss)
        found = next((t for t in tensors_in(inputs, floating=False) if t.dim()), None)
        if found is None:
            raise ValueError(f"a batch is a {type(batch).__name__} without a tensor that has samples in it")
        lengths = {len(t) for t in tensors_in(targets, floating=False) if t.dim()}
        if lengths and lengths != {len(found)} and not isinstance(targets, Mapping):
            raise ValueError(f"a batch has {len(found)} inputs and {min(lengths)} targets")
        if len(found):
            yield Batch(inputs, targets, len(found))


def _parts(batch: Any, loss: Loss | None) -> tuple[Any, Any]:
    """Inputs and targets; a mapping for a network with a loss of its own is both."""
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping) or is_dataclass(batch):
        try:
            inputs, labels = inputs_and_labels(batch)
        except ValueError:
            return batch, None
        return (inputs, labels) if loss is not None else (inputs, batch)
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return batch[0], None
    return inputs_and_labels(batch)


def _first(batches: Iterator[Batch], samples: int) -> Iterator[Batch]:
    left = samples
    for batch in batches:
        yield batch if batch.size <= left else batch.rows(0, left)
        left -= batch.size
        if left <= 0:
            return


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Classes drawn from predictions (n, c), those of tokens (n, l, c) or of pixels (n, c, ...); (n, ...)."""
    if not isinstance(logits, Tensor):
        raise ValueError(f"labels cannot be drawn from a {type(logits).__name__} of outputs: give targets")
    if logits.dim() < 2 or logits.shape[-1 if logits.dim() == 3 else 1] < 2:
        shape = tuple(logits.shape)
        raise ValueError(f"labels cannot be drawn from outputs of shape {shape}, which are no classes: give targets")
    odds = (logits if logits.dim() == 3 else logits.movedim(1, -1)).float().softmax(-1).cpu()
    return torch.multinomial(odds.flatten(0, -2), 1, generator=generator).reshape(odds.shape[:-1])


def _of_samples(outputs: Any, size: int) -> list[Tensor]:
    """The outputs that have one entry a sample."""
    if hasattr(outputs, "logits") or (isinstance(outputs, Mapping) and "logits" in outputs):
        outputs = logits_of(outputs)
    return [tensor for tensor in tensors_in(outputs) if tensor.dim() and len(tensor) == size]


def _signed_sum(outputs: Any, targets: tuple[Tensor, Tensor | None]) -> Tensor:
    """The mean over samples of `Calibration.of_outputs`'s l_b."""
    numbers, mask = targets
    found = _of_samples(outputs, len(numbers))
    total = torch.zeros(len(numbers), device=found[0].device)
    for place, (tensor, size) in enumerate(zip(found, _sizes(found), strict=True)):
        signs = torch.stack([_signs(tensor.shape[1:], int(n), place) for n in numbers.tolist()]).to(tensor.device)
        summed = _inside(tensor.float() * signs, mask).flatten(1).sum(1) if tensor.dim() > 1 else tensor * signs
        total = total + summed / size
    return total.mean()


def _inside(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """Zero where the tokens of a sample are left out."""
    if mask is None or tensor.dim() <= mask.dim() or tensor.shape[: mask.dim()] != mask.shape:
        return tensor
    return tensor * mask.to(tensor).reshape(mask.shape + (1,) * (tensor.dim() - mask.dim()))


def _sizes(found: Sequence[Tensor]) -> list[Tensor | float]:
    """What each output is divided by, (b,): its root mean square where there are several."""
    if len(found) == 1:
        return [1.0]
    values = [tensor.detach().float().reshape(len(tensor), -1) for tensor in found]
    return [value.square().mean(1).sqrt().clamp(min=1e-30) for value in values]


def _signs(shape: torch.Size, number: int, place: int) -> Tensor:
    """1 or -1, of one sample."""
    generator = torch.Generator().manual_seed(2**20 * place + number)
    return torch.randint(0, 2, tuple(shape), generator=generator, dtype=torch.int8).float().mul_(2).sub_(1)


def _cross_entropy(outputs: Any, labels: Tensor) -> Tensor:
    """Of labels as `_draw` gives them."""
    logits = logits_of(outputs)
    rows = (logits if logits.dim() == 3 else logits.movedim(1, -1)).flatten(0, -2)
    return F.cross_entropy(rows.float(), labels.flatten())
