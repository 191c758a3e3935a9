"""How a structure is put to the proof: on which inputs, with which units gone, and what is compared.

Two networks agree when the outputs of all that reads (convolutions, linear layers, attentions, recurrent layers) and
the model's own outputs do. The model's output alone does not do: a detector may find nothing, a head may start at zero.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from gsprune.structures.attention import no_fast_path
from gsprune.structures.example import Example, call, map_tensors, outputs, same_randomness, tensors_in

if TYPE_CHECKING:
    from gsprune.structures.structure import Member, Structure

SAMPLE = 1 << 16  # entries of a layer's output that are compared, drawn at random: a batch of pictures has millions
SMALL = 0.01  # a scale whose largest entry is smaller hides what it is multiplied with
_CONV = nn.modules.conv._ConvNd
_READERS = (nn.Linear, _CONV, nn.MultiheadAttention, nn.RNNBase)
Gone = Sequence[tuple["Structure", Tensor]]  # a structure and the units that are gone, bool (units,)


class Problem(NamedTuple):
    """What is wrong with a network without units of some structures.

    `suspects` are those that may be at fault (none: any of them may); with `is_certain` each of them is.
    """

    text: str
    suspects: Sequence[Structure] = ()
    is_certain: bool = False


Test = Callable[[Sequence["Structure"]], Problem | None]


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


class Round(NamedTuple):
    """One input, and which of the units are gone on it: those of the draw, or all of the others."""

    args: Example
    is_other_half: bool

    def keep(self, structure: Structure) -> Tensor:
        kept = draw(structure, 0)
        return ~kept if self.is_other_half else kept


def rounds_on(inputs: Sequence[Example]) -> list[Round]:
    """Two rounds, on the first and the last input: every unit is gone in one of them."""
    return [Round(inputs[0], False), Round(inputs[-1], True)]


# ---- what is compared


class Reading(NamedTuple):
    """A sample of what one call of a layer gave, and how large the terms of its sums are; the model's output is "".

    `values` is of the chosen rows, `whole` of all; `size` counts the chosen entries.
    """

    name: str
    values: Tensor
    whole: Tensor
    scale: float
    size: int


def readings(
    model: nn.Module, example_input: Example, rows: Mapping[str, Tensor] | None = None, *, scaled: bool = True
) -> list[Reading]:
    """One forward pass.

    Args:
        rows: name of a weight -> which of its layer's output channels are compared; all of the others'.
        scaled: whether to find the scales; `agree` needs those of its first argument.
    """
    found: list[Reading] = []

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...], whole: Tensor, chosen: Tensor) -> None:
        sample = _sample(whole)
        values = sample if chosen is whole else _sample(chosen)
        found.append(Reading(name, values, sample, _terms(module, inputs) if scaled else 0.0, chosen.numel()))

    with _noted(model, rows or {}, note):
        results = outputs(model, example_input)
    samples = [(_sample(result), result.numel()) for result in results]
    return [*found, *(Reading("", sample, sample, 0.0, size) for sample, size in samples)]


@contextmanager
def _noted(model: nn.Module, rows: Mapping[str, Tensor], note: Callable[..., None]) -> Iterator[None]:
    """Inside the block every call of a reader is noted: name, module, inputs, output, the chosen rows of the output."""

    def hook(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        kept = rows.get(_weight(name, module))
        first = output[0] if isinstance(output, tuple) and isinstance(module, nn.MultiheadAttention) else output
        for tensor in tensors_in(first):
            dim = -len(module.kernel_size) - 1 if isinstance(module, _CONV) else -1
            chosen = tensor if kept is None else tensor.index_select(dim, kept.to(tensor.device))
            note(name, module, inputs, tensor, chosen)

    attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    inside = {m for a in attentions for m in a.children()}  # called by a narrow attention alone, not by PyTorch's own
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, _READERS) and module not in inside:
                handle = module.register_forward_hook(lambda m, i, o, name=name: hook(name, m, i, o))
                stack.callback(handle.remove)
        yield


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
    return _largest(weight.detach()) * _largest(read.detach())


def _largest(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, float("inf")))


def agree(first: Sequence[Reading], second: Sequence[Reading], *, tolerance: float = 1e-9) -> bool:
    """Whether two passes of one network, or of two, gave the same at every reader."""
    return first_difference(first, second, tolerance=tolerance) is None


def first_difference(first: Sequence[Reading], second: Sequence[Reading], *, tolerance: float = 1e-9) -> str | None:
    """Name of the reader that is the first to give something else, or to be another one; None where all agree."""
    for a, b in zip(first, second, strict=False):
        is_same = (a.name, a.size) == (b.name, b.size)
        if not is_same or not close(a.values, b.values, tolerance=tolerance, scale=a.scale):
            return a.name
    return None if len(first) == len(second) else ""


def moved(first: Sequence[Reading], second: Sequence[Reading]) -> set[str]:
    """Names of the readers that gave something else."""
    if [(r.name, r.whole.shape) for r in first] != [(r.name, r.whole.shape) for r in second]:
        return set()
    pairs = zip(first, second, strict=True)
    return {a.name for a, b in pairs if len(a.whole) and not close(a.whole, b.whole, tolerance=1e-12)}


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

    One test where nothing is wrong. Suspects are put aside until the rest passes, then taken back one by one;
    where there are none, halves find the broken ones: some log2(n) tests for each.

    >>> from types import SimpleNamespace
    >>> of = [SimpleNamespace(name=n) for n in "abcde"]
    >>> def test(some):
    ...     return next((Problem(f"{s.name} breaks") for s in some if s.name in "bd"), None)
    >>> kept, broken = sift(of, test)
    >>> [s.name for s in kept], broken
    (['a', 'c', 'e'], {'b': 'b breaks', 'd': 'd breaks'})
    """
    kept, aside = list(structures), []
    broken: dict[str, str] = {}
    while kept and (problem := test(kept)) is not None:
        suspects = list(problem.suspects or kept)
        if problem.is_certain or len(kept) == 1:
            broken |= {s.name: problem.text for s in suspects}
        else:
            aside.append(suspects)
        kept = [s for s in kept if s not in suspects]
    kept, found = _taken_back(kept, aside, test)
    broken |= found
    passing = {id(s) for s in kept}
    return [s for s in structures if id(s) in passing], {s.name: broken[s.name] for s in structures if s.name in broken}


def _taken_back(
    kept: list[Structure], chunks: list[list[Structure]], test: Test
) -> tuple[list[Structure], dict[str, str]]:
    broken: dict[str, str] = {}
    while chunks:
        chunk = chunks.pop(0)
        problem = test([*kept, *chunk])
        if problem is None:
            kept = [*kept, *chunk]
        elif len(chunk) == 1:
            broken[chunk[0].name] = problem.text
        else:
            chunks[:0] = [chunk[: len(chunk) // 2], chunk[len(chunk) // 2 :]]
    return kept, broken


def owners(structure: Structure) -> set[str]:
    """Names of the modules that hold a tensor of the structure; of what an attention holds, the attention's as well."""
    members = (*structure.producers, *structure.consumers, *structure.norms)
    names = {m.tensor.rpartition(".")[0] for m in members}
    return names | {name.rpartition(".")[0] for name in names if name.endswith("out_proj")}


def unproven(structures: Sequence[Structure], shown: set[str]) -> Iterator[Structure]:
    """Structures none of whose readers have moved."""
    for structure in structures:
        if not owners(replace(structure, producers=(), norms=())) & shown:
            yield structure


# ---- the masked network: zero columns -> the unit contributes nothing


LEAK = "its units reach the output by a path that is not a layer's columns"


class Masked:
    """A float64 copy whose readers are read with units masked. It has its values again after each call."""

    def __init__(self, twin: nn.Module, rounds: Sequence[Round]) -> None:
        self.twin, self.rounds = twin, rounds
        self.tensors = dict(twin.named_parameters()) | dict(twin.named_buffers())
        self._last: dict[tuple[int, frozenset[str]], list[Reading]] = {}

    def read(self, number: int, structures: Sequence[Structure]) -> list[Reading]:
        """What the readers give in a round; units that the structures lose are masked."""
        key = (number, frozenset(s.name for s in structures))
        if key not in self._last:
            gone = self._gone(number, structures)
            with _written(self.tensors, _names(structures, producers=False)):
                _zero_columns(self.tensors, gone)
                self._remember(key, readings(self.twin, self.rounds[number].args, _untouched(self.tensors, gone)))
        return self._last[key]

    def leak(self, structures: Sequence[Structure]) -> Problem | None:
        """None if, with some units' columns at zero, no reader sees what produces those units change."""
        for number, (args, _) in enumerate(self.rounds):
            before = self.read(number, structures)
            if not is_finite(before):
                if number == 0:
                    raise ValueError("the model's output on the example input is not finite (did training diverge?)")
                continue
            gone = self._gone(number, structures)
            with _written(self.tensors, _names(structures)):
                _change_rows(self.tensors, gone)
                _zero_columns(self.tensors, gone)
                after = readings(self.twin, args, _untouched(self.tensors, gone), scaled=False)
            if not agree(before, after, tolerance=1e-11):
                leaking = self._leaking(number, gone)
                return Problem(LEAK, leaking, is_certain=bool(leaking))
        return None

    def shown(self, structures: Sequence[Structure]) -> set[str]:
        """Names of the readers that give something else when units are gone, be it with other weights before them."""
        seen: set[str] = set()
        for number, (args, _) in enumerate(self.rounds):
            if any(unproven(structures, seen)):
                seen |= moved(readings(self.twin, args, scaled=False), self.read(number, structures))
        everything = [(s, torch.ones(s.units, dtype=torch.bool)) for s in structures]
        for args, _ in self.rounds:
            if any(unproven(structures, seen)):
                with _written(self.tensors, _names(structures)):
                    _change_rows(self.tensors, everything)  # units whose ReLU let nothing through
                    before = readings(self.twin, args, scaled=False)
                    _zero_columns(self.tensors, everything)
                    seen |= moved(before, readings(self.twin, args, scaled=False))
        return seen

    def _gone(self, number: int, structures: Sequence[Structure]) -> Gone:
        return [(s, ~self.rounds[number].keep(s)) for s in structures]

    def _remember(self, key: tuple[int, frozenset[str]], value: list[Reading]) -> None:
        """Of one set of structures at a time: a pass of a large network holds many readings."""
        self._last = {k: v for k, v in self._last.items() if k[1] == key[1]} | {key: value}

    def _leaking(self, number: int, gone: Gone) -> list[Structure]:
        """The structures whose gone units have a gradient though their columns are zero; none where that is unknown."""
        structures = [s for s, _ in gone]
        with _written(self.tensors, _names(structures, producers=False)):
            _zero_columns(self.tensors, gone)
            rows = _untouched(self.tensors, gone)
            try:
                slopes = _slopes(self.twin, self.rounds[number].args, self.tensors, rows)
            except Exception:  # a model that cannot be trained
                return []
        return [s for s, units in gone if any(_has_slope(slopes[m.tensor], m, units) for m in s.producers)]


def _has_slope(slope: Tensor | None, member: Member, units: Tensor) -> bool:
    if slope is None:
        return False
    rows = slope.index_select(member.dim, member.index[units].flatten().to(slope.device))
    return _largest(rows) > 1e-12 * _largest(slope)


def _slopes(
    model: nn.Module, example_input: Example, tensors: Mapping[str, Tensor], rows: Mapping[str, Tensor]
) -> dict[str, Tensor | None]:
    """Gradients of a random sum over the chosen rows of all readers, and over the model's outputs."""
    sums: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)

    def add(tensor: Tensor) -> None:
        if tensor.requires_grad and tensor.numel() and not tensor.is_complex():
            weights = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)
            sums.append((tensor * weights).sum() / (_largest(tensor.detach()) or 1.0))

    wanted = {name: tensor for name, tensor in tensors.items() if name in rows and tensor.requires_grad}
    with torch.enable_grad(), same_randomness(model), no_fast_path():
        with _noted(model, rows, lambda name, module, inputs, whole, chosen: add(chosen)):
            for result in tensors_in(call(model, map_tensors(Tensor.clone, example_input))):
                add(result)
        found = torch.autograd.grad(torch.stack(sums).sum(), list(wanted.values()), allow_unused=True)
    return dict.fromkeys(rows) | dict(zip(wanted, found, strict=True))


def _names(structures: Sequence[Structure], *, producers: bool = True) -> set[str]:
    return {m.tensor for s in structures for m in (*(s.producers if producers else ()), *s.consumers)}


@contextmanager
def _written(tensors: Mapping[str, Tensor], names: set[str]) -> Iterator[None]:
    """Inside the block the named tensors hold copies, which may be written into."""
    saved = {name: tensors[name].data for name in names}
    try:
        for name, value in saved.items():
            tensors[name].data = value.clone()
        with torch.no_grad():
            yield
    finally:
        for name, value in saved.items():
            tensors[name].data = value


def _zero_columns(tensors: Mapping[str, Tensor], gone: Gone) -> None:
    for structure, units in gone:
        for m in structure.consumers:
            tensors[m.tensor].index_fill_(m.dim, m.index[units].flatten().to(tensors[m.tensor].device), 0.0)


def _change_rows(tensors: Mapping[str, Tensor], gone: Gone) -> None:
    """Other rows for these units. The noise is a product of one number a row and one a column: cheap, and no two
    rows are alike."""
    generator = torch.Generator().manual_seed(0)
    for structure, units in gone:
        for m in structure.producers:
            tensor = tensors[m.tensor]
            rows = m.index[units].flatten().to(tensor.device)
            old = tensor.index_select(m.dim, rows)
            flat = old.view(len(rows), -1)
            a, b = (torch.randn(n, generator=generator, dtype=torch.float64).to(old) for n in flat.shape)
            tensor.index_copy_(m.dim, rows, flat.mul_(-0.7).add_(0.05).addr_(a, b, alpha=0.05).view(old.shape))


def _untouched(tensors: Mapping[str, Tensor], gone: Gone) -> dict[str, Tensor]:
    """Name of a producing weight -> its rows that stay as they are."""
    kept: dict[str, Tensor] = {}
    for structure, units in gone:
        for m in structure.producers:
            kept.setdefault(m.tensor, torch.ones(tensors[m.tensor].shape[0], dtype=torch.bool))
            kept[m.tensor][m.index[units].flatten()] = False
    return {name: rows.nonzero().flatten() for name, rows in kept.items()}
