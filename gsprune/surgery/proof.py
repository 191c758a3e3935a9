"""The proof of a structure: on which inputs, with which units gone, and which structures fail it.

What is compared is in `readings`.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gsprune.structures.attention import no_fast_path
from gsprune.structures.example import Example, answers_in, call, map_tensors, plain
from gsprune.structures.running import same_randomness
from gsprune.structures.structure import Member, Structure
from gsprune.structures.twin import every_tensor, to_precision
from gsprune.surgery.readings import (
    COARSER,
    Grids,
    Reading,
    Rows,
    first_difference,
    is_finite,
    is_reader,
    largest,
    moved,
    noted,
    readings,
    rows_alike,
)
from gsprune.text.display import first_line

SMALL = 0.01  # a scale whose largest entry is smaller hides what it is multiplied with
Gone = Sequence[tuple[Structure, Tensor]]  # a structure and the units that are gone, bool (units,)


class Problem(NamedTuple):
    """What is wrong with a network without units of some structures.

    `suspects` are those that may be at fault (none: any of them may); with `is_certain` each of them is.
    """

    text: str
    suspects: Sequence[Structure] = ()
    is_certain: bool = False


Test = Callable[[Sequence[Structure]], Problem | None]


# ---- on what


def wake_precisely_(
    twin: nn.Module, example_input: Example, structures: Sequence[Structure] = ()
) -> tuple[Example, list[Reading], str]:
    """Give a twin float64, or float32 where it does not run in that (a kernel has no float64) or its output is not
    finite then (masks of the smallest number of a type), and `wake_scales_`.

    Returns:
        The example in that precision; what the readers give on it; "", or what a proof in float32 shows.

    Raises:
        What the network raises in float64, where it does not run in float32 either.
    """
    failed: Exception | None = None
    for dtype in (torch.float64, torch.float32):
        to_precision(twin, dtype)
        args = map_tensors(lambda t, dtype=dtype: plain(t, dtype), example_input)  # type: ignore[misc]
        try:
            found = wake_scales_(twin, args, structures)
        except Exception as error:
            failed = failed or error
            continue
        if dtype == torch.float64 and not is_finite(found):
            failed = ValueError("its output is not finite then")
            continue
        return args, found, "" if failed is None else IN_FLOAT32.format(first_line(failed))
    assert failed is not None
    raise failed


IN_FLOAT32 = (
    f"proven in float32, to {1e-9 * COARSER:g} of a layer's largest output: the network does not run in float64 ({{}})"
)


def wake_scales_(twin: nn.Module, example_input: Example, structures: Sequence[Structure] = ()) -> list[Reading]:
    """Fill parameters that are zero, set small scales to 1: nothing hides behind them. Undone if that is not finite.

    Returns:
        What the readers give on the example then: of the rows that stay when units of the structures are gone.
    """
    gone = Round(example_input, False).gone(structures)
    rows = _untouched(every_tensor(twin, every_name=True), gone)
    before = [(p, p.detach().clone()) for p in twin.parameters() if _is_asleep(p)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter, _ in before:
            if parameter.any():
                parameter.div_(parameter.abs().max())
            else:
                fill = 0.1 + 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(fill if parameter.dim() < 2 else fill - 0.1)
        found = readings(twin, example_input, rows, scaled=False)
        if is_finite(found) or not before:
            return found
        for parameter, value in before:
            parameter.copy_(value)
    return readings(twin, example_input, rows, scaled=False)


def _is_asleep(parameter: Tensor) -> bool:
    if not parameter.numel() or not parameter.is_floating_point():
        return False
    is_scale = parameter.numel() == max(parameter.shape, default=1)  # at most one dimension is longer than 1
    if not is_scale:
        return not parameter[(0,) * parameter.dim()] and not parameter.any()
    return bool(parameter.abs().max() < SMALL)


def noise_like(example_input: Example) -> Example:
    """Another input of the example's shapes and types, which a model may not take or answer with what is not finite."""
    return map_tensors(_noise, example_input)


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
    if units < 2:
        return torch.zeros(units, dtype=torch.bool)
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

    def gone(self, structures: Sequence[Structure]) -> Gone:
        return [(s, ~self.keep(s)) for s in structures]


def rounds_on(example_input: Example) -> list[Round]:
    """Two rounds, on the example and on noise: every unit is gone in one of them."""
    return [Round(example_input, False), Round(noise_like(example_input), True)]


# ---- which structures

ENOUGH = 3  # structures that are alike and fail in the same words, before the others like them are tested as one


def sift(
    structures: Sequence[Structure], test: Test, likeness: Mapping[str, object] | None = None
) -> tuple[list[Structure], dict[str, str]]:
    """The structures that pass the test all together, and what is wrong with each of the others.

    One test where nothing is wrong. Suspects are put aside until the rest passes, then taken back one by one;
    where there are none, halves find the broken ones: some log2(n) tests for each. Where `ENOUGH` that are alike have
    failed in the same words, the others like them are tested as one: a network of many blocks that all fail in the same
    way takes as many tests as one of a few.

    Args:
        likeness: name of a structure -> what is equal for those that are alike; none is like another without.

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
    kinds = likeness or {s.name: s.name for s in structures}
    failed = Counter[tuple[object, str]]()
    while kept and (problem := test(kept)) is not None:
        suspects = list(problem.suspects or kept)
        if problem.is_certain or len(kept) == 1:
            broken |= {s.name: problem.text for s in suspects}
        else:
            aside.append(suspects)
        kept = [s for s in kept if s not in suspects]
        words = _words(problem)
        failed.update({(kinds[s.name], words) for s in suspects})
        often = {kind for (kind, text), count in failed.items() if count >= ENOUGH and text == words}
        if like := [s for s in kept if kinds[s.name] in often]:
            aside.append(like)
            kept = [s for s in kept if s not in like]
    kept, found = _taken_back(kept, aside, test, kinds)
    broken |= found
    passing = {id(s) for s in kept}
    return [s for s in structures if id(s) in passing], {s.name: broken[s.name] for s in structures if s.name in broken}


def _taken_back(
    kept: list[Structure], chunks: list[list[Structure]], test: Test, kinds: Mapping[str, object]
) -> tuple[list[Structure], dict[str, str]]:
    broken: dict[str, str] = {}
    failed = Counter[tuple[object, str]]()
    while chunks:
        chunk = chunks.pop(0)
        problem = test([*kept, *chunk])
        if problem is None:
            kept = [*kept, *chunk]
        elif len(chunk) == 1 or all(failed[kinds[s.name], _words(problem)] >= ENOUGH for s in chunk):
            broken |= {s.name: problem.text for s in chunk}
            failed.update((kinds[s.name], _words(problem)) for s in chunk)
        else:
            chunks[:0] = [chunk[: len(chunk) // 2], chunk[len(chunk) // 2 :]]
    return kept, broken


def _words(problem: Problem) -> str:
    """Its text without the numbers, which are those of one structure."""
    return re.sub(r"\d+", "", problem.text)


def owners(structure: Structure) -> set[str]:
    """Names of the modules that hold a tensor of the structure; of what an attention holds, the attention's as well."""
    names = {m.tensor.rpartition(".")[0].partition(".parametrizations.")[0] for m in structure.members}
    return names | {name.rpartition(".")[0] for name in names if name.endswith("out_proj")}


def unproven(structures: Sequence[Structure], shown: set[str]) -> Iterator[Structure]:
    """Structures none of whose readers have moved."""
    for structure in structures:
        if not owners(replace(structure, producers=(), norms=())) & shown:
            yield structure


# ---- the masked network: zero columns -> the unit contributes nothing


NOT_FINITE = "the model's output on the example input is not finite (did training diverge?)"
LEAK = "zeroing the layers that read its units does not silence them: the network uses their values elsewhere too"


class Masked:
    """A precise copy of a network, whose layers are read with units masked. Each call restores its values.

    Where it does not run on noise with units of all structures masked, both rounds are on the example.

    Args:
        whole: what the readers give on the example with nothing masked, as `wake_scales_` finds it.
    """

    def __init__(
        self, twin: nn.Module, example_input: Example, structures: Sequence[Structure], whole: list[Reading]
    ) -> None:
        self.twin, self.rounds, self._whole = twin, rounds_on(example_input), whole
        self._tensors = every_tensor(twin, every_name=True)
        self._spare: dict[str, Tensor] = {}  # memory for what is written, kept: fresh memory costs more than the copy
        self._last: dict[tuple[int, bool, frozenset[str]], list[Reading]] = {}
        if not self._takes_noise(structures):
            self.rounds[1] = Round(example_input, True)
            self._last.clear()

    def forget(self) -> None:
        """Let go of what was read last, after the rounds were changed."""
        self._last.clear()

    def _takes_noise(self, structures: Sequence[Structure]) -> bool:
        for changed in (True, False):  # that the rows are other ones may be why it does not run
            try:
                if is_finite(self.read(1, structures, changed=changed)):
                    return True
            except Exception:
                continue
        return False

    def read(
        self, number: int, structures: Sequence[Structure], *, changed: bool = False, grids: Grids | None = None
    ) -> list[Reading]:
        """What the readers give in a round; units that the structures lose are masked.

        Args:
            changed: whether what produces the units that are gone holds other rows.
            grids: what the layers' outputs are rounded by.
        """
        key = (number, changed, frozenset(s.name for s in structures))
        if key not in self._last or grids is not None:
            gone = self.rounds[number].gone(structures)
            with self._written(structures, producers=changed):
                if changed:
                    _change_rows_(self._tensors, gone)
                zero_columns_(self._tensors, gone)
                args, rows = self.rounds[number].args, _untouched(self._tensors, gone)
                if grids is not None:
                    return readings(self.twin, args, rows, grids=grids)
                self._remember(key, readings(self.twin, args, rows))
        return self._last[key]

    def leak(self, structures: Sequence[Structure]) -> Problem | None:
        """None if, with some units' columns at zero, no reader sees what produces those units change."""
        for number, _ in enumerate(self.rounds):
            before = self.read(number, structures)
            if not is_finite(before):
                if number == 0 and not is_finite(self._whole):
                    raise ValueError(NOT_FINITE)
                if number == 0:
                    return Problem("with its units at zero the network's output is not finite")
                continue
            if first_difference(before, self.read(number, structures, changed=True), tolerance=1e-11) is not None:
                leaking = self._leaking(number, self.rounds[number].gone(structures))
                return Problem(LEAK, leaking, is_certain=bool(leaking))
        return None

    def shown(self, structures: Sequence[Structure]) -> set[str]:
        """Names of the readers that give something else when units are gone, be it with other weights before them."""
        seen = moved(self._whole, self.read(0, structures, changed=True), chosen=True)
        if any(unproven(structures, seen)):
            seen |= moved(self._whole, self._nudged(structures))
        for number in range(len(self.rounds)):
            if any(unproven(structures, seen)):
                seen |= moved(self._unmasked(number), self.read(number, structures))
        for structure in [s for s in unproven(structures, seen) if not self._is_read_by_layers(s)]:
            alone = (moved(self._unmasked(n), self.read(n, [structure])) for n in range(len(self.rounds)))
            if any(alone):  # what reads it is no layer whose outputs are compared: others behind it show it
                seen |= owners(structure)
        everything = [(s, torch.ones(s.units, dtype=torch.bool)) for s in structures]
        for args, _ in self.rounds:
            if any(unproven(structures, seen)):
                with self._written(structures):
                    _change_rows_(self._tensors, everything)  # units whose ReLU let nothing through
                    before = readings(self.twin, args, scaled=False)
                    zero_columns_(self._tensors, everything)
                    seen |= moved(before, readings(self.twin, args, scaled=False))
        return seen

    def _nudged(self, structures: Sequence[Structure]) -> list[Reading]:
        """What the readers give on the example with what reads the units a little larger: a detector then finds as many
        boxes, so that layers behind these can be compared."""
        with self._written(structures, producers=False):
            for tensor in {m.tensor for s in structures for m in s.consumers}:
                if self._tensors[tensor].is_floating_point():
                    self._tensors[tensor].mul_(1 + 2**-20)
            return readings(self.twin, self.rounds[0].args, scaled=False)

    def _is_read_by_layers(self, structure: Structure) -> bool:
        modules = dict(self.twin.named_modules())
        names = owners(replace(structure, producers=(), norms=()))
        called = {reading.name for reading in self._whole}  # not a layer whose weight its parent reads
        return any(is_reader(modules[name]) for name in names & called if name in modules)

    def _unmasked(self, number: int) -> list[Reading]:
        """What the readers give with nothing masked; nothing where only the masked network takes the input."""
        if self.rounds[number].args is self.rounds[0].args:
            return self._whole
        try:
            found = readings(self.twin, self.rounds[number].args, scaled=False)
        except Exception:
            return []
        return found if is_finite(found) else []

    def _remember(self, key: tuple[int, bool, frozenset[str]], value: list[Reading]) -> None:
        """Of one set of structures at a time: a pass of a large network holds many readings."""
        self._last = {k: v for k, v in self._last.items() if k[2] == key[2]} | {key: value}

    def _leaking(self, number: int, gone: Gone) -> list[Structure]:
        """The structures whose gone units have a gradient though their columns are zero; none where that is unknown.

        What writes the units of a stream is zero itself, so that they cannot leak, though norms give them a gradient.
        """
        structures = [s for s, _ in gone]
        with self._written(structures, producers=False):
            zero_columns_(self._tensors, gone)
            rows = _untouched(self._tensors, gone)
            try:
                slopes = _slopes(self.twin, self.rounds[number].args, self._tensors, rows)
            except Exception:  # a model that cannot be trained
                return []
        open_ = [(s, units) for s, units in gone if s.masked is s.consumers]
        return [s for s, units in open_ if any(_has_slope(slopes[m.tensor], m, units) for m in s.producers)]

    @contextmanager
    def _written(self, structures: Sequence[Structure], *, producers: bool = True) -> Iterator[None]:
        """Inside the block what is masked (and the producers) hold copies, which may be written into."""
        members = (m for s in structures for m in (*s.masked, *(s.producers if producers else ())))
        saved = {name: self._tensors[name].data for name in {m.tensor for m in members}}
        try:
            for name, value in saved.items():
                if name not in self._spare:
                    self._spare[name] = torch.empty_like(value)
                self._tensors[name].data = self._spare[name].copy_(value)
            with torch.no_grad():
                yield
        finally:
            for name, value in saved.items():
                self._tensors[name].data = value


def _has_slope(slope: Tensor | None, member: Member, units: Tensor) -> bool:
    if slope is None:
        return False
    rows = slope.index_select(member.dim, member.index[units].flatten().to(slope.device))
    return largest(rows) > (1e-12 if slope.dtype == torch.float64 else 1e-12 * COARSER) * largest(slope)


def _slopes(
    model: nn.Module, example_input: Example, tensors: Mapping[str, Tensor], rows: Rows
) -> dict[str, Tensor | None]:
    """Gradients of a random sum over the chosen rows of all readers, and over the model's outputs."""
    sums: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)

    def add(tensor: Tensor) -> None:
        if tensor.requires_grad and tensor.numel() and not tensor.is_complex():
            weights = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)
            sums.append((tensor * weights).sum() / (largest(tensor.detach()) or 1.0))

    wanted = {name: tensor for name, tensor in tensors.items() if name in rows and tensor.requires_grad}
    with torch.enable_grad(), same_randomness(model), no_fast_path():
        with noted(model, rows, lambda name, module, inputs, whole, chosen: add(chosen)):
            for result in answers_in(call(model, map_tensors(Tensor.clone, example_input))):
                add(result)
        found = torch.autograd.grad(torch.stack(sums).sum(), list(wanted.values()), allow_unused=True)
    return dict.fromkeys(rows) | dict(zip(wanted, found, strict=True))


def zero_columns_(tensors: Mapping[str, Tensor], gone: Gone) -> None:
    for structure, units in gone:
        for m in structure.masked:
            tensors[m.tensor].index_fill_(m.dim, m.index[units].flatten().to(tensors[m.tensor].device), 0.0)


def _change_rows_(tensors: Mapping[str, Tensor], gone: Gone) -> None:
    """Other rows for these units. The noise is a product of one number a row and one a column: cheap, and no two
    rows are alike."""
    generator = torch.Generator().manual_seed(0)
    for structure, units in gone:
        for m in structure.producers:
            tensor = tensors[m.tensor]
            rows = m.index[units].flatten().to(tensor.device)
            if not len(rows) or not (tensor.is_floating_point() or tensor.is_complex()):  # no position; a mask
                continue
            old = tensor.index_select(m.dim, rows).movedim(m.dim, 0)
            flat = old.reshape(len(rows), -1)
            a, b = (torch.randn(n, generator=generator, dtype=torch.float64).to(old) for n in flat.shape)
            new = flat.mul_(-0.7).add_(0.05).addr_(a, b, alpha=0.05).view(old.shape)
            tensor.index_copy_(m.dim, rows, new.movedim(0, m.dim))


def _untouched(tensors: Mapping[str, Tensor], gone: Gone) -> Rows:
    """Name of a producing tensor -> dimension -> its positions that stay as they are; and of layers that compute all
    units alike the entries that do."""
    kept: dict[str, dict[int, Tensor]] = {}
    for structure, units in gone:
        for m in structure.producers:
            rows = kept.setdefault(m.tensor, {})
            rows.setdefault(m.dim, torch.ones(tensors[m.tensor].shape[m.dim], dtype=torch.bool))
            rows[m.dim][m.index[units].flatten()] = False
    found = {name: {d: rows.nonzero().flatten() for d, rows in dims.items()} for name, dims in kept.items()}
    return found | rows_alike([s for s, _ in gone], [~units for _, units in gone])
