"""Latency: milliseconds of a forward pass, and the speedup of one network over another with its confidence interval.

Networks take turns, so that a busy machine slows all of them alike. There is no speedup where no shape has changed, or
where its 95 % confidence interval is too wide. Networks of the same architecture share one measurement (`shared`).
Modes and random numbers are left as they were.
"""

from __future__ import annotations

import inspect
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gsprune.files.disk import number, read_object, sha256, sha256_of_json, spared, write_json
from gsprune.structures.example import call, tensors_in
from gsprune.structures.running import device_of, evaluating, to_device_of

LEAST = 30  # repeats that an interval can rest on
WIDEST = 0.10  # interval / ratio above which a ratio is not told
SAME, NOT_HERE = "no change: the same shapes", "not measurable here"  # up to the colon in a table
TURN = 0.002  # seconds that a turn fills at least: what is quicker runs several times in it,
PASSES = 20  # this often at most
PATIENCE = 1.0  # seconds of more repeats where the interval is too wide
RESAMPLES = 1000


@dataclass(frozen=True)
class Latency:
    """A pruned network's latency beside its dense one's. Without a figure all is None but the note, which says why.

    Attributes:
        ms, dense_ms: median milliseconds of a forward pass.
        speedup: dense_ms / ms.
        low, high: the 95 % confidence interval of that.
        note: why there is no figure.
    """

    ms: float | None = None
    dense_ms: float | None = None
    speedup: float | None = None
    low: float | None = None
    high: float | None = None
    note: str | None = None


# --- two networks ------------------------------------------------------------------------------------------


Prepare = Callable[[nn.Module, Any], nn.Module]  # network, input -> a module that runs without arguments


def compare(
    dense: nn.Module,
    pruned: nn.Module,
    example_input: Any,
    *,
    repeats: int = LEAST,
    max_seconds: float = 10.0,
    prepare: Prepare | None = None,
) -> Latency:
    """Time a network in turns with its dense one, in eval mode and `torch.inference_mode`.

    A repeat is one turn of each. A turn is one forward pass, or as many as fill 2 ms after an untimed one. Where the
    interval is too wide after `repeats` of them, they go on for a second. The interval is that of the ratio of the
    medians, by a bootstrap over the repeats.

    There is no figure where no tensor has another shape, with fewer than 30 repeats (asked for, or that fit into
    `max_seconds`), and where the interval is wider than a tenth of the ratio. `prepare` makes both ready for another
    runtime; where it cannot, there is no figure, either.

    >>> compare(nn.Linear(2, 2), nn.Linear(2, 2), torch.ones(1, 2)).note
    'no change: the same shapes'
    >>> compare(nn.Linear(2, 4), nn.Linear(2, 2), torch.ones(1, 2), repeats=5).note
    'not measurable here: 5 repeats are too few, it takes 30'
    """
    if _shapes(dense) == _shapes(pruned):
        return Latency(note=SAME)
    if prepare is not None:
        try:
            dense, pruned, example_input = prepare(dense, example_input), prepare(pruned, example_input), ()
        except ValueError as error:
            return Latency(note=f"{NOT_HERE}: {error}")
    return in_turns(dense, pruned, example_input, repeats=repeats, max_seconds=max_seconds)


def in_turns(
    dense: nn.Module, pruned: nn.Module, example_input: Any, *, repeats: int = LEAST, max_seconds: float = 10.0
) -> Latency:
    """`compare`, whatever the shapes of the two networks."""
    if repeats < LEAST:
        return Latency(note=f"{NOT_HERE}: {repeats} repeats are too few, it takes {LEAST}")
    models = {"dense": dense, "pruned": pruned}
    with _inference(models, example_input) as inputs:
        one = _rounds(models, inputs, 5, least=1, seconds=max_seconds / 4)
        passes = {name: min(max(math.ceil(TURN / statistics.median(times)), 1), PASSES) for name, times in one.items()}
        times = _rounds(models, inputs, repeats, least=3, seconds=max_seconds, passes=passes)
        found, end = _judged(times), time.perf_counter() + PATIENCE
        while found.speedup is None and len(times["dense"]) >= LEAST and time.perf_counter() < end:
            more = _rounds(models, inputs, LEAST, least=1, seconds=end - time.perf_counter(), passes=passes)
            times = {name: times[name] + more[name] for name in times}
            found = _judged(times)
    return found


def interval(dense: Sequence[float], pruned: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of median(dense) / median(pruned).

    A percentile bootstrap: repeats are drawn with replacement, both networks of one together, because a busy moment
    slows both. Equal times give an equal interval.

    >>> interval([4.0] * 30, [2.0] * 30)
    (2.0, 2.0)
    """
    pairs = torch.tensor([dense, pruned], dtype=torch.float64)
    drawn = torch.randint(pairs.shape[1], (RESAMPLES, pairs.shape[1]), generator=torch.Generator().manual_seed(0))
    over, under = pairs[:, drawn].quantile(0.5, dim=-1)
    low, high = (over / under).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _judged(times: Mapping[str, Sequence[float]]) -> Latency:
    dense, pruned = times["dense"], times["pruned"]
    if len(dense) < LEAST:
        return Latency(note=f"{NOT_HERE}: there was time for {len(dense)} repeats, it takes {LEAST}")
    dense_ms, ms = (1000 * statistics.median(values) for values in (dense, pruned))
    low, high = interval(dense, pruned)
    if high - low > WIDEST * dense_ms / ms:
        wide = f"wider than {100 * WIDEST:g} % of it"
        return Latency(note=f"{NOT_HERE}: the ratio lies between {low:.2f}x and {high:.2f}x, {wide}")
    return Latency(ms, dense_ms, dense_ms / ms, low, high)


# --- any number of networks --------------------------------------------------------------------------------


def latency_ms(
    models: Mapping[str, nn.Module],
    example_input: Any,
    *,
    repeats: int = 50,
    warmup: int = 5,
    max_seconds: float = 10.0,
) -> dict[str, float]:
    """Median milliseconds of a forward pass of each model, in eval mode and `torch.inference_mode`.

    The models take turns (the order reversed every round), so that a busy machine slows all of them alike; CUDA
    is synchronised before each clock reading. `warmup` untimed rounds come first (fewer when they take over a
    quarter of `max_seconds`); then `repeats` timed ones, or as many, three at least, as fit into `max_seconds`.
    Units: ms for the whole `example_input`.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"latency needs repeats >= 1 and warmup >= 0, got repeats={repeats}, warmup={warmup}")
    with _inference(models, example_input) as inputs:
        _rounds(models, inputs, warmup, least=1, seconds=max_seconds / 4)
        times = _rounds(models, inputs, repeats, least=3, seconds=max_seconds)
    return {name: statistics.median(values) * 1000 for name, values in times.items()}


@contextmanager
def _inference(models: Mapping[str, nn.Module], example_input: Any) -> Iterator[dict[str, Any]]:
    """The input for each model, on its device; meanwhile they are in eval mode and keep no gradients."""
    with evaluating(models.values()), torch.inference_mode():
        yield {name: to_device_of(model, example_input) for name, model in models.items()}


def _rounds(
    models: Mapping[str, nn.Module],
    inputs: Mapping[str, Any],
    count: int,
    *,
    least: int,
    seconds: float,
    passes: Mapping[str, int] | None = None,
) -> dict[str, list[float]]:
    """Seconds of a pass in each of `count` rounds, or in as many as fit into `seconds`, `least` at least."""
    order, end = list(models), time.perf_counter() + seconds
    times: dict[str, list[float]] = {name: [] for name in order}
    for turn in range(count):
        for name in order[::-1] if turn % 2 else order:
            times[name].append(_time(models[name], inputs[name], passes[name] if passes else 1))
        if turn + 1 >= least and time.perf_counter() > end:
            break
    return times


def _time(model: nn.Module, example_input: Any, passes: int) -> float:
    """Seconds of a pass, the mean of several; these come after an untimed one, which clears the other network away."""
    wait = _waiter(model)
    if passes > 1:
        call(model, example_input)
    wait()
    begin = time.perf_counter()
    for _ in range(passes):
        call(model, example_input)
    wait()
    return (time.perf_counter() - begin) / passes


def _waiter(model: nn.Module) -> Callable[[], None]:
    device = device_of(model)
    return (lambda: None) if device.type == "cpu" else (lambda: torch.accelerator.synchronize(device))


# --- one measurement for all networks of an architecture ---------------------------------------------------


def shared(
    folder: Path,
    dense: nn.Module,
    pruned: nn.Module,
    example_input: Any,
    *,
    repeats: int,
    max_seconds: float,
    prepare: Prepare | None = None,
    where: str = "",
) -> Latency:
    """`compare`, done once: what a file in `folder` says of two networks like these on this machine is taken.

    `where` names what `prepare` prepares for.

    The caller holds a lock on the folder, which also keeps two measurements from disturbing each other.
    """
    if repeats < LEAST or _shapes(dense) == _shapes(pruned):
        return compare(dense, pruned, example_input, repeats=repeats)
    key = sha256_of_json([measurement_key(dense, pruned, example_input, repeats, max_seconds), where])
    path = folder / f"{key[:16]}.json"
    found = _read(path, key)
    if found is None:
        found = compare(dense, pruned, example_input, repeats=repeats, max_seconds=max_seconds, prepare=prepare)
        with spared(path.name, []):  # the next one measures again
            write_json(path, {"key": key, **asdict(found)})
    return found


def architecture(model: nn.Module) -> str:
    """sha256 of all that the time of a forward pass hangs on but the values of the weights.

    The modules by name, class (and its code, where that is not torch's) and settings; the tensors by name, shape, type
    and place in memory.

    >>> a, b, c = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    >>> architecture(a) == architecture(b), architecture(a) == architecture(c)
    (True, False)
    """
    modules = [
        (name, _class(type(module)), module.extra_repr(), sorted(_settings(module).items()))
        for name, module in model.named_modules()
    ]
    code = {_class(kind): _code(kind) for kind in {type(module) for module in model.modules()}}
    return sha256_of_json(
        [modules, sorted(code.items()), _shapes(model), [_strides(tensor) for _, tensor in _named(model)]]
    )


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))


def _shapes(model: nn.Module) -> list[tuple[str, ...]]:
    return [(name, *_shape(tensor)) for name, tensor in _named(model)]


def _shape(tensor: Tensor) -> tuple[str, ...]:
    return tuple(map(str, (tuple(tensor.shape), tensor.dtype, tensor.layout)))


def _strides(tensor: Tensor) -> list[int] | None:
    return list(tensor.stride()) if tensor.layout == torch.strided else None


def _class(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _settings(module: nn.Module) -> dict[str, str]:
    """Plain attributes, such as `num_heads`."""
    plain = (bool, int, float, str, type(None), tuple, torch.dtype)
    own = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
    return {name: repr(value) for name, value in own.items() if isinstance(value, plain)}


def _code(kind: type) -> str | None:
    """sha256 of the file of a class; None of torch's, whose version is in the key, and where there is no file."""
    if kind.__module__.partition(".")[0] == "torch":
        return None
    try:
        return sha256(inspect.getsourcefile(kind) or "")
    except (OSError, TypeError):
        return None


def measurement_key(
    dense: nn.Module, pruned: nn.Module, example_input: Any, repeats: int = 0, max_seconds: float = 0.0
) -> str:
    """sha256 of what a measurement hangs on: both architectures, the input's shapes, the machine and its settings."""
    device = device_of(pruned)
    inputs = [(_shape(tensor), _strides(tensor)) for tensor in tensors_in(example_input, floating=False)]
    surroundings = {
        "torch": torch.__version__,
        "machine": platform.node(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": [torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32],
        "settings": [repeats, max_seconds],
    }
    return sha256_of_json([architecture(dense), architecture(pruned), inputs, surroundings])


def _read(path: Path, key: str) -> Latency | None:
    """What was measured; None of a file that is not there, damaged or of another key."""
    told = read_object(path)
    if told.get("key") != key:
        return None
    values = [told.get(name) for name in ("ms", "dense_ms", "speedup", "low", "high")]
    if isinstance(told.get("note"), str) and values == [None] * 5:
        return Latency(note=told["note"])
    try:
        figures = [number(value) for value in values]
    except (ValueError, TypeError, OverflowError):
        return None
    ms, dense_ms, speedup, low, high = figures
    return Latency(ms, dense_ms, speedup, low, high) if all(0 < figure < math.inf for figure in figures) else None
