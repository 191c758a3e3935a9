"""How a structure is put to the proof: on which inputs, with which units gone, and what is compared.

Two networks agree when the outputs of all that reads (convolutions, linear layers, attentions, recurrent layers) and
the model's own outputs do. The model's output alone does not do: a detector may find nothing, a head may start at zero.
May import: torch, gsprune.attention, gsprune.examples. Used by structures and shrink.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from gsprune.examples import Example, map_tensors, outputs, tensors_in

if TYPE_CHECKING:
    from gsprune.structures import Structure

SAMPLE = 1 << 16  # entries of a layer's output that are compared, drawn at random: a batch of pictures has millions
SMALL = 0.01  # a scale whose largest entry is smaller hides what it is multiplied with
_CONV = nn.modules.conv._ConvNd
_READERS = (nn.Linear, _CONV, nn.MultiheadAttention, nn.RNNBase)
Test = Callable[[Sequence["Structure"]], str | None]  # what is wrong with a network without units of these, or None


# ---- on what


def wake_scales_(twin: nn.Module, example_input: Example) -> None:
    """Fill parameters that are zero, set small scales to 1: nothing hides behind them. Undone if that is not finite."""
    before = [(p, p.detach().clone()) for p in twin.parameters() if _is_asleep(p)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter, _ in before:
            if parameter.any():
                parameter.div_(parameter.abs().max())
            else:
                fill = 0.1 + 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(fill if parameter.dim() < 2 else fill - 0.1)
        if not all(bool(output.isfinite().all()) for output in outputs(twin, example_input)):
            for parameter, value in before:
                parameter.copy_(value)


def _is_asleep(parameter: Tensor) -> bool:
    if not parameter.numel() or not parameter.is_floating_point():
        return False
    is_scale = parameter.numel() == max(parameter.shape, default=1)  # at most one dimension is longer than 1
    return not parameter.any() or (is_scale and bool(parameter.abs().max() < SMALL))


def inputs_like(model: nn.Module, example_input: Example) -> list[Example]:
    """The example, and noise beside it where the model takes that and stays finite."""
    noise = map_tensors(_noise, example_input)
    try:
        is_finite = all(bool(output.isfinite().all()) for output in outputs(model, noise))
    except Exception:
        return [example_input]
    return [example_input, noise] if is_finite else [example_input]


def _noise(value: Tensor) -> Tensor:
    """Normal numbers with the mean and spread of the tensor's own; integers in another order; the rest as it is."""
    generator = torch.Generator().manual_seed(value.numel())
    if not value.dim() or not value.numel() or value.dtype == torch.bool:
        return value
    if not value.is_floating_point():
        order = torch.randperm(value.shape[-1], generator=generator).to(value.device)
        return value.index_select(-1, order) if not value.is_complex() else value
    if not bool(value.isfinite().all()):
        return value  # a mask of -inf
    spread = float(value.std()) if value.numel() > 1 else 0.0
    drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
    return (float(value.mean()) + (spread or float(value.abs().max()) or 1.0) * drawn).to(value.dtype)


def draw(structure: Structure, round_: int) -> Tensor:
    """Which units stay, bool (units,): between a quarter and three quarters of them, another draw for each structure.

    Of the caller's random numbers none is used.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(structure.name.encode()) + round_)
    units = structure.units
    low, high = max(1, units // 4), min(units - 1, units - units // 4)
    count = int(torch.randint(low, high + 1, (1,), generator=generator))
    keep = torch.zeros(units, dtype=torch.bool)
    keep[torch.randperm(units, generator=generator)[:count]] = True
    return keep


# ---- what is compared


class Reading(NamedTuple):
    """A sample of what one call of a layer gave, and how large the terms of its sums are; the model's output is ""."""

    name: str
    values: Tensor
    scale: float
    size: int


def readings(model: nn.Module, example_input: Example, rows: Mapping[str, Tensor] | None = None) -> list[Reading]:
    """One forward pass.

    Args:
        rows: name of a weight -> which of its layer's output channels are compared; all of the others'.
    """
    found: list[Reading] = []
    chosen = rows or {}

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        kept = chosen.get(_weight(name, module))
        first = output[0] if isinstance(output, tuple) and isinstance(module, nn.MultiheadAttention) else output
        for tensor in tensors_in(first):
            if kept is not None:
                dim = -len(module.kernel_size) - 1 if isinstance(module, _CONV) else -1
                tensor = tensor.index_select(dim, kept.to(tensor.device))
            found.append(Reading(name, _sample(tensor), _terms(module, inputs), tensor.numel()))

    attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    inside = {m for a in attentions for m in a.children()}  # called by a narrow attention alone, not by PyTorch's own
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, _READERS) and module not in inside:
                hook = module.register_forward_hook(lambda m, i, o, name=name: note(name, m, i, o))
                stack.callback(hook.remove)
        results = outputs(model, example_input)
    return [*found, *(Reading("", _sample(result), 0.0, result.numel()) for result in results)]


def _weight(name: str, module: nn.Module) -> str:
    leaf = "out_proj.weight" if isinstance(module, nn.MultiheadAttention) else "weight"
    return f"{name}.{leaf}" if name else leaf


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    if len(flat) <= SAMPLE:
        return flat.clone()
    generator = torch.Generator().manual_seed(len(flat))
    return flat[torch.randint(len(flat), (SAMPLE,), generator=generator).to(flat.device)]


def _terms(module: nn.Module, inputs: tuple[Any, ...]) -> float:
    """The largest product of an entry read and a weight: sums are no more exact than that allows."""
    weight, read = getattr(module, "weight", None), next(tensors_in(inputs), None)
    if not isinstance(weight, Tensor) or read is None or not weight.numel() or not read.numel():
        return 0.0
    return float(weight.abs().max()) * float(read.abs().max())


def agree(first: Sequence[Reading], second: Sequence[Reading], *, tolerance: float = 1e-9) -> bool:
    """Whether two passes of one network, or of two, gave the same at every reader."""
    if [(r.name, r.size) for r in first] != [(r.name, r.size) for r in second]:
        return False
    return all(
        close(a.values, b.values, tolerance=tolerance, scale=a.scale) for a, b in zip(first, second, strict=True)
    )


def moved(first: Sequence[Reading], second: Sequence[Reading]) -> set[str]:
    """Names of the readers that gave something else."""
    pairs = zip(first, second, strict=True)
    return {a.name for a, b in pairs if a.size and not close(a.values, b.values, tolerance=1e-12)}


def is_finite(found: Sequence[Reading]) -> bool:
    """Of the model's own outputs."""
    return all(bool(r.values.isfinite().all()) for r in found if not r.name)


def close(a: Tensor, b: Tensor, *, tolerance: float = 1e-9, scale: float = 0.0) -> bool:
    """Whether two tensors differ by at most `tolerance` times the largest entry of `a` or `scale` (NaN equals NaN)."""
    finite = a[a.isfinite()] if a.numel() else a
    scale = max(scale, float(finite.abs().max()) if finite.numel() else 0.0)
    return a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=tolerance * scale, equal_nan=True)


# ---- which structures


def sift(structures: Sequence[Structure], test: Test) -> tuple[list[Structure], dict[str, str]]:
    """The structures that pass the test all together, and what is wrong with each of the others.

    One test where nothing is wrong; some log2(n) tests more for each that is.

    >>> from types import SimpleNamespace
    >>> of = [SimpleNamespace(name=n) for n in "abcde"]
    >>> kept, broken = sift(of, lambda some: next((f"{s.name} breaks" for s in some if s.name in "bd"), None))
    >>> [s.name for s in kept], broken
    (['a', 'c', 'e'], {'b': 'b breaks', 'd': 'd breaks'})
    """
    kept: list[Structure] = []
    broken: dict[str, str] = {}
    chunks = [list(structures)] if structures else []
    while chunks:
        chunk = chunks.pop(0)
        problem = test([*kept, *chunk])
        if problem is None:
            kept += chunk
        elif len(chunk) == 1:
            broken[chunk[0].name] = problem
        else:
            chunks[:0] = [chunk[: len(chunk) // 2], chunk[len(chunk) // 2 :]]
    return kept, broken


def unproven(structures: Sequence[Structure], shown: set[str]) -> Iterator[Structure]:
    """Structures none of whose readers have moved."""
    for structure in structures:
        owners = {m.tensor.rpartition(".")[0] for m in structure.consumers}
        if not (owners | {owner.rpartition(".")[0] for owner in owners if owner.endswith("out_proj")}) & shown:
            yield structure
