"""2:4 sparse linear layers in the compressed form that sparse tensor cores multiply by, where that is faster."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gsprune.latency import LEAST, in_turns
from gsprune.structures.example import Example, call, tensors_in
from gsprune.structures.running import device_of, evaluating, hooked, same_randomness, to_device_of
from gsprune.text.display import html_table, text_table

__all__ = ["ConvertedLayer", "SemiStructured", "to_semi_structured"]

CAPABILITY = (8, 0)  # of the first GPU with sparse tensor cores, Ampere


@dataclass(frozen=True)
class ConvertedLayer:
    """What was found of one linear layer whose weight is 2:4.

    speedup   milliseconds of the dense layer over those of the compressed one, on the inputs of the example; None
              where it was not timed
    low       lower end of the 95 % confidence interval of that
    error     largest difference of the outputs, of the largest value
    reason    why the layer stays dense; None where it is compressed
    """

    name: str
    speedup: float | None = None
    low: float | None = None
    error: float | None = None
    reason: str | None = None


@dataclass(frozen=True, eq=False)
class SemiStructured:
    """The result of `to_semi_structured`: the network, and what was found of each 2:4 layer."""

    model: nn.Module
    layers: tuple[ConvertedLayer, ...]

    @property
    def converted(self) -> list[str]:
        """Names of the layers that are compressed."""
        return [layer.name for layer in self.layers if layer.reason is None]

    def __repr__(self) -> str:
        head, rows = self._table()
        title = f"{type(self.model).__name__}: {len(self.converted)} of {len(self.layers)} 2:4 layers are compressed"
        return "\n".join([title, *(f"  {line}" for line in text_table([head, *rows]))])

    def _repr_html_(self) -> str:
        return html_table(*self._table())

    def _table(self) -> tuple[list[str], list[list[str]]]:
        rows = [
            [
                layer.name,
                "" if layer.speedup is None else f"{layer.speedup:.2f}x",
                "" if layer.error is None else f"{layer.error:.2g}",
                layer.reason or "",
            ]
            for layer in self.layers
        ]
        return ["layer", "faster", "error", "stays dense"], rows


def to_semi_structured(
    model: nn.Module,
    example_input: Example,
    *,
    tolerance: float | None = None,
    repeats: int = LEAST,
    max_seconds: float = 5.0,
) -> SemiStructured:
    """A copy of a network for inference whose 2:4 linear layers are compressed, each where that is faster.

    A weight with at most two values other than 0 in each four of a row takes 9/16 of its memory (float16) and half of
    its multiplications (`torch.sparse.to_sparse_semi_structured`). Whether it is faster depends on the GPU, the type
    and the number of rows: each layer is timed in turns with its dense form, on the inputs that it gets here, and is
    converted where the 95 % confidence interval of the speedup lies above 1 and the outputs agree.

    Args:
        model: on a CUDA device, in float16 or bfloat16 (what the layers take depends on the GPU).
        example_input: a batch of the size that will be served.
        tolerance: the largest difference of a layer's output, relative to its largest value; None: 4 eps of its type.
        repeats, max_seconds: turns of each layer, and the time they may take.

    Returns:
        The copy, in eval mode, with the table; `model` stays as it is.

    Raises:
        ValueError: the device has no sparse tensor cores; no linear layer of the network is 2:4; the copy computes
            something else.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021.

    >>> to_semi_structured(nn.Linear(64, 64), torch.ones(1, 64))
    Traceback (most recent call last):
    ValueError: 2:4 layers are fast on CUDA GPUs of compute capability 8.0 or above, and this network is on cpu
    """
    _check_device(device_of(model))
    if repeats < LEAST:
        raise ValueError(f"repeats is {repeats}: an interval takes at least {LEAST}")
    found = [name for name, layer in model.named_modules() if type(layer) is nn.Linear and is_two_of_four(layer.weight)]
    if not found:
        raise ValueError(
            f'{type(model).__name__} has no 2:4 linear layer: prune it with pattern="2:4" first, and save no mask apart'
        )
    twin = copy.deepcopy(model).eval()
    example = to_device_of(model, example_input)
    inputs = _inputs_of(twin, found, example)
    layers = tuple(_layer(twin, name, inputs.get(name), tolerance, repeats, max_seconds) for name in found)
    _check(model, twin, example, tolerance)
    return SemiStructured(twin, layers)


def is_two_of_four(weight: Tensor) -> bool:
    """Whether each four neighbours of a row hold at most two values other than 0.

    >>> is_two_of_four(torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 3]])), is_two_of_four(torch.tensor([[1.0, 1, 1, 0]]))
    (True, False)
    """
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight.reshape(-1, 4) != 0).sum(1) <= 2).all())


def _check_device(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY:
        return
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    raise ValueError(
        f"2:4 layers are fast on CUDA GPUs of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or above, and this "
        f"network is on {what}"
    )


def _inputs_of(twin: nn.Module, names: list[str], example: Example) -> dict[str, Tensor]:
    """Name of a layer -> its first input, where one pass reaches it."""
    inputs: dict[str, Tensor] = {}

    def note(name: str, args: tuple[Any, ...]) -> None:
        inputs.setdefault(name, args[0].detach().clone())

    hooks = (
        twin.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: note(name, args))
        for name in names
    )
    with hooked(hooks), torch.no_grad(), same_randomness(twin):
        call(twin, example)
    return inputs


def _layer(
    twin: nn.Module, name: str, x: Tensor | None, tolerance: float | None, repeats: int, max_seconds: float
) -> ConvertedLayer:
    """Compress one layer of the copy, in place, if it stands the test."""
    dense: Any = twin.get_submodule(name)
    if x is None:
        return ConvertedLayer(name, reason="the example does not reach it")
    try:
        sparse = _compressed(dense)
        with torch.inference_mode():
            error = _difference(dense(x), sparse(x))
    except Exception as refusal:  # of a shape or a type that the GPU's library does not take
        return ConvertedLayer(name, reason=str(refusal).strip().partition("\n")[0])
    if not error <= _tolerance(tolerance, dense.weight.dtype):
        return ConvertedLayer(name, error=error, reason="its outputs differ")
    timed = in_turns(dense, sparse, x, repeats=repeats, max_seconds=max_seconds)
    if timed.speedup is None or timed.low is None or timed.low <= 1:
        reason = timed.note or "it is not faster"
        return ConvertedLayer(name, timed.speedup, timed.low, error, reason)
    dense.weight = sparse.weight
    return ConvertedLayer(name, timed.speedup, timed.low, error)


def _compressed(dense: nn.Linear) -> nn.Linear:
    from torch.sparse import to_sparse_semi_structured

    sparse = copy.copy(dense)
    sparse._parameters = dict(dense._parameters)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*prototype.*")
        compressed = to_sparse_semi_structured(dense.weight.detach())
    sparse._parameters["weight"] = nn.Parameter(compressed, requires_grad=False)
    return sparse


def _tolerance(tolerance: float | None, dtype: torch.dtype) -> float:
    return 4 * torch.finfo(dtype).eps if tolerance is None else tolerance


def _difference(wanted: Tensor, found: Tensor) -> float:
    wanted, found = wanted.double(), found.double()
    return float((wanted - found).abs().max() / wanted.abs().max().clamp(min=1e-30))


def _check(model: nn.Module, twin: nn.Module, example: Example, tolerance: float | None) -> None:
    """The whole: rounding adds up over the layers, so ten times the tolerance of one of them is allowed."""
    with torch.no_grad(), evaluating([model]), same_randomness(model):
        wanted, found = (list(tensors_in(call(network, example))) for network in (model, twin))
    for a, b in zip(wanted, found, strict=True):
        if not (worst := _difference(a, b)) <= 10 * _tolerance(tolerance, a.dtype):
            raise ValueError(
                f"{type(model).__name__} computes something else once its layers are compressed: {worst:.3g} of the "
                f"largest value"
            )
