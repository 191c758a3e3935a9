"""One pass over memory for the scores of single weights, by a kernel that `torch.compile` makes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from gsprune.criteria import Criterion, Elementwise
from gsprune.text.display import first_line


def check_compiled(criterion: Criterion, device: torch.device) -> None:
    """Make the kernel of a device, which takes seconds once; kept on disk by torch.

    Raises:
        ValueError: the criterion is another one than the kernel's, or torch.compile cannot make it.
    """
    if type(criterion).weights is not Elementwise.weights or criterion.spread_decay is not None or criterion.signed:
        raise ValueError(
            f"compiled=True: the kernel adds abs(weight * gradient), and {type(criterion).__name__} does not"
        )
    scores, weight, grad = (torch.ones(n, device=device) for n in (80, 64, 64))
    bits, decay = torch.ones((), dtype=torch.int32, device=device), torch.ones((), device=device)
    try:
        for start in (0, 16):  # the scores of a first tensor, and of those behind it: a kernel each
            add_product_(scores[start : start + 64], weight, grad, bits, decay, None)
    except Exception as error:
        raise ValueError(
            f"compiled=True needs torch.compile and its compiler (g++ or Triton) on {device}: {first_line(error)}"
        ) from error


def add_product_(
    score: Tensor, weight: Tensor, grad: Tensor, bits: Tensor, decay: Tensor, scale: Tensor | None
) -> None:
    """score <- decay * score + abs(weight * grad) / scale, (n,) each; nothing is added where `bits` is 0.

    Without a scale there is a kernel of its own: a division of every entry takes a quarter of the time.
    """
    with torch.no_grad():
        _kernel()(*map(_line, (score, weight, grad)), bits, decay, scale)


def _line(tensor: Tensor) -> Tensor:
    """The same memory as no view: torch.compile makes a kernel for each kind of what is viewed."""
    storage = tensor.untyped_storage()
    line = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return line.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


@functools.cache
def _kernel() -> Callable[..., None]:
    return torch.compile(_add_product_, dynamic=True)


def _add_product_(
    score: Tensor, weight: Tensor, grad: Tensor, bits: Tensor, decay: Tensor, scale: Tensor | None
) -> None:
    product = torch.where(bits != 0, (weight.float() * grad).abs(), 0.0)  # as bits, it would not be vectorised
    score.copy_((product if scale is None else product / scale) + score * decay)
