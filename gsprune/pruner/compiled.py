"""One pass over memory for the scores of single weights, by a kernel that `torch.compile` makes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from gsprune.text.display import first_line


def check_compiler(device: torch.device) -> None:
    """Make the kernel of a device, which takes seconds once; kept on disk by torch.

    Raises:
        ValueError: torch.compile cannot make it.
    """
    one, line = torch.ones((), device=device), torch.ones(64, device=device)
    try:
        add_product_(line, line, line, torch.ones((), dtype=torch.int32, device=device), one, one)
    except Exception as error:
        raise ValueError(
            f"compiled=True needs torch.compile and its compiler (g++ or Triton) on {device}: {first_line(error)}"
        ) from error


def add_product_(score: Tensor, weight: Tensor, grad: Tensor, bits: Tensor, decay: Tensor, scale: Tensor) -> None:
    """score <- decay * score + abs(weight * grad) / scale, (n,) each; `bits` masks the product's bits."""
    _kernel()(score, weight, grad, bits, decay, scale)


@functools.cache
def _kernel() -> Callable[..., None]:
    return torch.compile(_add_product_, dynamic=True, fullgraph=True)


def _add_product_(score: Tensor, weight: Tensor, grad: Tensor, bits: Tensor, decay: Tensor, scale: Tensor) -> None:
    product = (weight.float() * grad).view(torch.int32) & bits
    score.copy_(product.view(torch.float32) / scale + score * decay)
