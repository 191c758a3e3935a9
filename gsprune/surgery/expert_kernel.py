"""The kernel by which transformers computes experts in one call, and the widths that it takes."""

from __future__ import annotations

import warnings

from torch import nn

BYTES = 16  # of which rows of every expert's matrix must be a multiple


def fit_experts(model: nn.Module) -> None:
    """Let transformers compute experts one by one, with a warning, where its one kernel does not take their widths.

    >>> fit_experts(nn.Linear(2, 2))
    """
    kernel = getattr(getattr(model, "config", None), "_experts_implementation", None)
    odd = odd_expert_side(model) if kernel == "grouped_mm" else None
    if odd is not None:
        model.set_experts_implementation("eager")  # type: ignore[operator]
        warnings.warn(
            f"{type(model).__name__}: its experts have a side of {odd}, and the grouped_mm kernel of transformers "
            f"takes multiples of {BYTES} bytes: they are computed one by one (set_experts_implementation('eager')). A "
            "budget with round_to=8 keeps the kernel",
            stacklevel=3,
        )


def odd_expert_side(model: nn.Module) -> int | None:
    """A side of an expert's matrix that the kernel does not take; None: it takes all, or there are no such experts."""
    for module in model.modules():
        for tensor in module._parameters.values() if hasattr(module, "is_concatenated") else ():
            if tensor is not None and tensor.dim() == 3:
                for side in tensor.shape[1:]:
                    if side * tensor.element_size() % BYTES:
                        return side
    return None
