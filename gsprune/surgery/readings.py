"""What two networks are compared by: samples of what their layers compute on one input.

Two networks agree when the outputs of all that reads (convolutions, linear layers, attentions, recurrent layers) and
the model's own outputs do. The model's output alone does not do: a detector may find nothing, a head may start at zero.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gsprune.structures.example import Example, tensors_in
from gsprune.structures.matrices import is_conv1d
from gsprune.structures.running import hooked, outputs
from gsprune.structures.structure import Structure
from gsprune.text.names import joined

WEIGHTS = ("weight", "parametrizations.weight.original1", "weight_v", "parametrizations.weight.original")
SAMPLE = 1 << 16  # entries of a layer's output that are compared, drawn at random: a batch of pictures has millions


_CONV = nn.modules.conv._ConvNd


_READERS = (nn.Linear, _CONV, nn.MultiheadAttention, nn.RNNBase, nn.Bilinear)
Rows = Mapping[str, Mapping[int, Tensor]]  # tensor -> dimension -> positions, as a cut plan keeps them; `rows_alike`
OUTPUT = "output"


class Reading(NamedTuple):
    """A sample of what one call of a layer gave, and how large the terms of its sums are; the model's output is "".

    `values` is of the chosen rows, `whole` of all; `size` counts the chosen entries.
    """

    name: str
    values: Tensor
    whole: Tensor
    scale: float
    size: int


class Grids:
    """Rounds what the layers of two networks compute, call by call, to the same multiples of the same steps.

    A network that sorts, or takes the best boxes, answers otherwise when two numbers change places that differ by less
    than rounding. Both networks then decide alike: the steps, 2^-20 of the largest entry that the first of them
    computes in a call, are far above rounding, and hardly a number lies that near to the middle of two multiples.
    """

    def __init__(self) -> None:
        self.steps: dict[tuple[str, int], float] = {}
        self._calls: Counter[str] = Counter()

    def hooks(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """For one forward pass of one of the networks."""
        self._calls = Counter()
        for name, module in model.named_modules():
            if is_reader(module):
                yield module.register_forward_hook(lambda m, i, output, name=name: self._rounded(name, output))

    def _rounded(self, name: str, output: Any) -> Any:
        call = (name, self._calls[name])
        self._calls[name] += 1
        if not isinstance(output, Tensor) or not output.is_floating_point() or not output.numel():
            return output
        size = self.steps.setdefault(call, largest(output.detach()))
        if not math.isfinite(size) or not size:
            return output
        step = 2.0 ** (math.frexp(size)[1] - 20)
        return torch.round(output / step) * step


def readings(
    model: nn.Module,
    example_input: Example,
    rows: Rows | None = None,
    *,
    scaled: bool = True,
    grids: Grids | None = None,
) -> list[Reading]:
    """One forward pass.

    Args:
        rows: which positions of the layers' tensors are there in both networks: the output channels that they compute
            are compared; all of the others'.
        scaled: whether to find the scales; `first_difference` needs those of its first argument.
        grids: what the layers' outputs are rounded by.
    """
    found: list[Reading] = []
    precision = precision_of(model)

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...], whole: Tensor, chosen: Tensor) -> None:
        sample = _sample(whole).to(_coarser(whole.dtype, precision))
        values = sample if chosen is whole else _sample(chosen).to(sample.dtype)
        found.append(Reading(name, values, sample, _terms(module, inputs) if scaled else 0.0, chosen.numel()))

    with hooked(grids.hooks(model) if grids else ()), noted(model, rows or {}, note):
        results = outputs(model, example_input)
    samples = [(_sample(result).to(_coarser(result.dtype, precision)), result.numel()) for result in results]
    return [*found, *(Reading("", sample, sample, 0.0, size) for sample, size in samples)]


def noted(model: nn.Module, rows: Rows, note: Callable[..., None]) -> AbstractContextManager[None]:
    """Inside the block every call of a reader is noted: name, module, inputs, output, the chosen rows of the output."""

    def hook(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        kept = _channels(name, module, rows)
        several = isinstance(output, tuple) and isinstance(module, nn.MultiheadAttention | nn.RNNBase)
        first = output[0] if several else output
        for tensor in tensors_in(first):
            chosen = tensor if kept is None else tensor.index_select(own_dim(module), kept.to(tensor.device))
            for dim, pattern in rows.get(joined(name, OUTPUT), {}).items():
                chosen = _repeated(chosen, dim, pattern)
            note(name, module, inputs, tensor, chosen)

    attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    inside = {m for a in attentions for m in a.children()}  # called by a narrow attention alone, not by PyTorch's own
    return hooked(
        module.register_forward_hook(lambda m, i, o, name=name: hook(name, m, i, o))
        for name, module in model.named_modules()
        if is_reader(module) and module not in inside
    )


def is_reader(module: nn.Module) -> bool:
    """Whether it is a layer whose outputs are compared."""
    return isinstance(module, _READERS) or is_conv1d(module)


def own_dim(module: nn.Module) -> int:
    """Along which dimension of its output a layer's own channels lie."""
    return -len(module.kernel_size) - 1 if isinstance(module, _CONV) else -1


def rows_alike(structures: Iterable[Structure], keeps: Iterable[Tensor]) -> dict[str, dict[int, Tensor]]:
    """Of the layers that compute all units alike, which entries of their outputs are of units that stay: bool, as long
    as all units have once. What it goes by is "<layer>.output" and a dimension of that.

    >>> structure = Structure("q", "heads", 2, (), (), (), (), {}, alike={"pool": (0, 2)})
    >>> rows_alike([structure], [torch.tensor([True, False])])
    {'pool.output': {0: tensor([ True,  True, False, False])}}
    """
    found: dict[str, dict[int, Tensor]] = {}
    for structure, keep in zip(structures, keeps, strict=True):
        for name, (dim, entries) in structure.alike.items():
            found.setdefault(joined(name, OUTPUT), {})[dim] = keep.repeat_interleave(entries)
    return found


def _repeated(output: Tensor, dim: int, pattern: Tensor) -> Tensor:
    """The entries along a dimension that a pattern, which is repeated (for each sample, say), has."""
    times, rest = divmod(output.shape[dim], len(pattern))
    if rest:
        return output
    return output.index_select(dim, pattern.repeat(times).nonzero().flatten().to(output.device))


def precision_of(model: nn.Module) -> torch.dtype:
    """float32 of a network whose first parameter is that, else float64."""
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.float32 if next(dtypes, None) == torch.float32 else torch.float64


def _coarser(dtype: torch.dtype, precision: torch.dtype) -> torch.dtype:
    """What a float64 output of a float32 network is compared in: it is no more exact than the network."""
    if precision == torch.float64 or dtype not in (torch.float64, torch.complex128):
        return dtype
    return precision.to_complex() if dtype.is_complex else precision


def _channels(name: str, module: nn.Module, rows: Rows) -> Tensor | None:
    """Which of a layer's output channels these rows compute; None: all."""
    if isinstance(module, nn.RNNBase):
        return _hidden_channels(name, module, rows)
    if isinstance(module, nn.MultiheadAttention):
        return rows.get(joined(name, "out_proj.weight"), {}).get(0)
    if isinstance(module, _CONV) and module.transposed and module.groups > 1:
        return _grouped_channels(name, module, rows)
    dim = 1 if is_conv1d(module) or (isinstance(module, _CONV) and module.transposed) else 0
    return _kept(name, rows, dim)


def _kept(name: str, rows: Rows, dim: int) -> Tensor | None:
    found = (rows.get(joined(name, leaf), {}).get(dim) for leaf in WEIGHTS)
    return next((kept for kept in found if kept is not None), None)


def _grouped_channels(name: str, conv: nn.modules.conv._ConvNd, rows: Rows) -> Tensor | None:
    """Of a transposed convolution in groups: the same places of each group; of a depthwise one whole groups."""
    is_depthwise = conv.groups == conv.in_channels
    kept = _kept(name, rows, 0 if is_depthwise else 1)
    if kept is None:
        return None
    width = conv.out_channels // conv.groups
    if is_depthwise:
        return (kept[:, None] * width + torch.arange(width)).flatten()
    return (torch.arange(conv.groups)[:, None] * width + kept).flatten()


def _hidden_channels(name: str, rnn: nn.RNNBase, rows: Rows) -> Tensor | None:
    """Of a recurrent layer: the hidden units of its last layer (or what it projects them to), one direction after the
    other."""
    leaf, size = ("weight_hr", rnn.proj_size) if rnn.proj_size else ("weight_hh", rnn.hidden_size)
    ends = [f"{leaf}_l{rnn.num_layers - 1}{end}" for end in ("", "_reverse")[: 1 + rnn.bidirectional]]
    found = [rows.get(joined(name, end), {}).get(0) for end in ends]  # of all gates, the first gate's first
    if all(kept is None for kept in found):
        return None
    parts = [torch.arange(size) if kept is None else kept[kept < size] for kept in found]
    return torch.cat([part + i * size for i, part in enumerate(parts)])


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    if len(flat) <= SAMPLE:
        return flat.clone()
    return flat[_places(len(flat)).to(flat.device)]


@lru_cache(maxsize=16)
def _places(length: int) -> Tensor:
    """In order, which reads the memory in order, and kept for a while: layers of one size come one after the other."""
    return torch.randint(length, (SAMPLE,), generator=torch.Generator().manual_seed(length)).sort().values


def _terms(module: nn.Module, inputs: tuple[Any, ...]) -> float:
    """The largest product of an entry read and a weight: sums are no more exact than that allows."""
    weight, read = getattr(module, "weight", None), next(tensors_in(inputs), None)
    if not isinstance(weight, Tensor) or read is None or not weight.numel() or not read.numel():
        return 0.0
    return largest(weight.detach()) * largest(read.detach())


def largest(tensor: Tensor) -> float:
    low, high = torch.aminmax(tensor.abs() if tensor.is_complex() else tensor)  # a fifth of the time of a norm
    return max(-float(low), float(high))


COARSER = 1e5  # how much larger every tolerance is in float32 than in float64: 1e-4 instead of 1e-9


def first_difference(first: Sequence[Reading], second: Sequence[Reading], *, tolerance: float = 1e-9) -> str | None:
    """Name of the reader that is the first to give something else, or to be another one; None where all agree.

    The tolerance is that of float64; of float32 it is `COARSER` times as large.
    """
    for a, b in zip(first, second, strict=False):
        is_same = (a.name, a.size) == (b.name, b.size)
        if not is_same or not close(a.values, b.values, tolerance=tolerance, scale=a.scale):
            return a.name
    return None if len(first) == len(second) else ""


def moved(first: Sequence[Reading], second: Sequence[Reading], *, chosen: bool = False) -> set[str]:
    """Names of the readers that gave something else; with `chosen`, in the chosen rows, where both chose as many.

    Of one that gave another shape (of fewer boxes) nothing is said.
    """
    if [r.name for r in first if r.name] != [r.name for r in second if r.name]:
        return set()
    pairs = [(a, b) for a, b in zip(first, second, strict=False) if a.whole.shape == b.whole.shape]
    pairs = [(a, b) for a, b in pairs if not chosen or a.size == b.size]
    values = [(a.name, a.values, b.values) if chosen else (a.name, a.whole, b.whole) for a, b in pairs]
    return {name for name, a, b in values if len(a) and not close(a, b, tolerance=1e-12)}


def is_finite(found: Sequence[Reading]) -> bool:
    """Of the model's own outputs."""
    return all(bool(r.values.isfinite().all()) for r in found if not r.name)


def close(a: Tensor, b: Tensor, *, tolerance: float = 1e-9, scale: float = 0.0) -> bool:
    """Whether two tensors differ by at most `tolerance` times the largest entry of `a` or `scale` (NaN equals NaN).

    >>> a, b = torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64) + 1e-6
    >>> close(a, b), close(a.float(), b.float())
    (False, True)
    """
    if a.shape != b.shape or torch.equal(a, b):
        return a.shape == b.shape
    if a.dtype in (torch.float32, torch.complex64):
        tolerance *= COARSER
    finite = a[a.isfinite()]
    scale = max(scale, float(finite.abs().max()) if finite.numel() else 0.0)
    return torch.allclose(a, b, rtol=0.0, atol=tolerance * scale, equal_nan=True)
