"""A residual stream in another basis: rotated, so that its first positions carry most of what its norms read.

An RMSNorm does not see a rotation: with an orthogonal Q (d x d), |x Q| = |x|, and so, with the gain g of the norm moved
into the layers that read it,

    rms(x) diag(g) W^T = rms(x Q) (W diag(g) Q)^T.

All that writes the stream gives x Q instead of x (rows of weights, biases, embeddings), and all that reads it has W Q.
Q holds the principal axes of the norms' inputs on calibration data, the largest first. A LayerNorm subtracts the mean,
which a rotation changes.

Source: Ashkboos et al., "SliceGPT", 2024, section 3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gsprune.structures.attention import no_fast_path
from gsprune.structures.example import Example, call, map_tensors, tensors_in
from gsprune.structures.norms import StreamNorm, stream_norm
from gsprune.structures.running import evaluating, hooked, outputs, same_randomness, to_device_of
from gsprune.structures.structure import Member, Structure
from gsprune.structures.twin import copy_of, twin_of
from gsprune.surgery.apply import SHAPE, home_of
from gsprune.surgery.proof import noise_like

CLOSE = 1e-9  # of the largest output, in float64
Norms = dict[str, tuple[StreamNorm, Member | None]]  # module name -> what it computes, and its gain


def rotated(model: nn.Module, streams: Sequence[Structure], example: Example, calls: Iterable[Example]) -> nn.Module:
    """A copy that computes what the network does, with its streams in the basis of their principal axes.

    The copy is rotated in float64, compared there with the network on the example and on noise, and rounded to the
    network's types. Gains of the streams' norms are then 1.

    Args:
        streams: structures of kind "residual".
        calls: what the network is called with, to find the axes.

    Raises:
        ValueError: a stream passes another norm than an RMSNorm; a gain cannot be moved into what reads it, because
            that is tied to what writes; the outputs differ by more than 1e-9 of the largest; the network does not run
            in float64.

    >>> from gsprune.discovery.find import find_structures
    >>> net = nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), nn.Linear(6, 2))
    >>> x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    >>> other = rotated(net, find_structures(net, x).structures, x, [x])
    >>> torch.allclose(other(x), net(x), atol=1e-6), torch.allclose(other[0](x), net[0](x))
    (True, False)
    >>> power = other[0](x).square().mean(0)
    >>> bool(power[0] > 2 * power[4])
    True
    """
    twin, args = twin_of(model, example)
    norms = [norms_of(twin, stream) for stream in streams]
    inputs = [args, noise_like(args)]
    before = [_outputs(twin, x) for x in inputs]
    if before[0] is None:
        raise ValueError("rotate=True is proven in float64, in which this network gives no finite output: leave it out")
    axes = [principal_axes(model, stream, mine, calls) for stream, mine in zip(streams, norms, strict=True)]
    with torch.no_grad():
        for stream, mine, basis in zip(streams, norms, axes, strict=True):
            _fold_(twin, stream, mine, _readers(twin, stream, mine, args))
            _rotate_(twin, stream, basis)
    for x, expected in zip(inputs, before, strict=True):
        difference = None if expected is None else _difference(expected, _outputs(twin, x))
        if difference is not None and not difference <= CLOSE:
            names = ", ".join(repr(stream.name) for stream in streams)
            raise ValueError(
                f"the network with a rotated stream ({names}) differs by {difference:.1e} of its largest output: "
                "something reads the positions of the stream one by one; leave out rotate=True"
            )
    copy = copy_of(model)
    with torch.no_grad():
        for name in dict.fromkeys(member.tensor for stream in streams for member in stream.members):
            getattr(*home_of(copy, name)).copy_(getattr(*home_of(twin, name)))
    return copy


def principal_axes(model: nn.Module, stream: Structure, norms: Norms, calls: Iterable[Example]) -> Tensor:
    """The eigenvectors of the mean of x^T x / mean(x^2) over all rows x that the stream's norms read, as columns.

    Returns:
        Orthogonal, float64 (units, units), the largest eigenvalue first.
    """
    places = {name: torch.arange(stream.units)[:, None] if m is None else m.index for name, (_, m) in norms.items()}
    moments: list[Tensor] = []

    def note(name: str) -> Callable[..., None]:
        axis, index = norms[name][0].axis, places[name]

        def see(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = next(tensors_in((args, kwargs))).detach().movedim(axis, -1).flatten(0, -2).float()
            x = x / x.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)
            for positions in index.to(x.device).T:
                moment = (x[:, positions].T @ x[:, positions]).double()
                moments[:] = [moments[0].to(moment.device) + moment] if moments else [moment]

        return see

    hooks = (model.get_submodule(n).register_forward_pre_hook(note(n), with_kwargs=True) for n in norms)
    with torch.no_grad(), evaluating([model]), no_fast_path(), same_randomness(model), hooked(hooks):
        for inputs in calls:
            call(model, map_tensors(Tensor.clone, to_device_of(model, inputs)))
    if not moments:
        raise ValueError(f"no norm of the stream {stream.name!r} is a module that runs: leave out rotate=True")
    basis: Tensor = torch.linalg.eigh(moments[0].cpu()).eigenvectors
    return basis.flip(1)


def norms_of(model: nn.Module, stream: Structure) -> Norms:
    """The norms of a stream; ValueError where one of them is no RMSNorm, or something else is multiplied with it."""
    members = {member.tensor.rpartition(".")[0]: member for member in stream.norms}
    found: Norms = {}
    for name in (*members, *(n.removesuffix(SHAPE) for n in stream.attributes if n.endswith(SHAPE))):
        module = model.get_submodule(name)
        norm, kind = stream_norm(module), type(module).__name__
        if norm is None or norm.kind != "rms" or getattr(module, "bias", None) is not None:
            raise ValueError(
                f"rotate=True needs a stream whose norms are all RMSNorms without a bias, and {name!r} is a {kind}: a "
                "mean, and what is added or multiplied position by position, change with the basis"
            )
        found[name] = (norm, members.get(name))
    return found


def _readers(model: nn.Module, stream: Structure, norms: Norms, args: Example) -> dict[str, list[nn.Module]]:
    """Of each norm the modules that hold consumers and read what it gives, also a part of that or a multiple."""
    consumers = {id(getattr(*home_of(model, member.tensor))) for member in stream.consumers}
    marking = _Marking(norms)
    hooks = [model.get_submodule(name).register_forward_hook(partial(marking.leave, name)) for name in norms]
    for module in model.modules():
        if any(id(p) in consumers for p in module._parameters.values()):
            hooks.append(module.register_forward_pre_hook(marking.enter, with_kwargs=True))
    with hooked(hooks):
        outputs(model, args)
        marking.begin_again()
        outputs(model, args)
    return marking.found


class _Marking:
    """Two passes. In the second each norm gives what it gave in the first, times random numbers of its own for each
    position: what reads it then sees its inputs of the first pass times the same numbers."""

    def __init__(self, norms: Norms) -> None:
        generator = torch.Generator().manual_seed(0)
        self._axes = {name: norm.axis for name, (norm, _) in norms.items()}
        self._marks = {
            name: torch.rand(norm.width, generator=generator, dtype=torch.float64) + 0.5
            for name, (norm, _) in norms.items()
        }
        self._gave: dict[tuple[str, int], Tensor] = {}
        self._read: dict[tuple[nn.Module, int], list[Tensor]] = {}
        self._calls: Counter[Any] = Counter()
        self._is_second = False
        self.found: dict[str, list[nn.Module]] = {name: [] for name in norms}

    def begin_again(self) -> None:
        self._is_second = True
        self._calls.clear()

    def leave(self, name: str, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """After a norm."""
        self._calls[name] += 1
        place = name, self._calls[name]
        if not self._is_second:
            self._gave[place] = output.clone()
            return None
        axis = self._axes[name]
        return (self._gave[place].movedim(axis, -1) * self._marks[name].to(output)).movedim(-1, axis)

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before what holds a consumer."""
        self._calls[module] += 1
        inputs, place = list(tensors_in((args, kwargs))), (module, self._calls[module])
        if not self._is_second:
            self._read[place] = inputs
            return
        for before, now in zip(self._read.get(place, ()), inputs, strict=False):
            name = _marked(before, now, self._marks)
            if name is not None and not any(module is other for other in self.found[name]):
                self.found[name].append(module)


def _marked(before: Tensor, now: Tensor, marks: dict[str, Tensor]) -> str | None:
    """The norm by whose marks a reader's input is larger than it was, along its last axis or its second."""
    if before.shape != now.shape or not before.numel() or before.dim() < 2:
        return None
    for axis in (-1, 1):
        a, b = (tensor.movedim(axis, -1).flatten(0, -2).double() for tensor in (before, now))
        size = float(b.abs().max())
        for name, mark in marks.items():
            if len(mark) == a.shape[1] and float((a[0] * mark.to(a) - b[0]).abs().max()) <= 1e-6 * size:
                return name if float((a * mark.to(a) - b).abs().max()) <= 1e-6 * size and size > 0 else None
    return None


def _fold_(model: nn.Module, stream: Structure, norms: Norms, readers: dict[str, list[nn.Module]]) -> None:
    """Move the gain of each norm into what reads it."""
    writers = {id(getattr(*home_of(model, member.tensor))): member.tensor for member in stream.producers}
    by: dict[int, str] = {}
    for name, (norm, member) in norms.items():
        if member is None:
            continue
        weight_of_norm = getattr(*home_of(model, member.tensor))
        gain, places = weight_of_norm + norm.offset, member.index
        held = {id(p) for reader in readers[name] for p in reader._parameters.values() if p is not None}
        done: set[int] = set()
        for consumer in stream.consumers:
            weight = getattr(*home_of(model, consumer.tensor))
            if id(weight) not in held or id(weight) in done:
                continue
            done.add(id(weight))
            if id(weight) in writers:
                raise ValueError(
                    f"{writers[id(weight)]!r} both writes the stream and reads it behind {name!r}, whose gain "
                    "rotate=True moves into it: untie it (the head gets a copy of the embedding as a weight of its "
                    "own, and config.tie_word_embeddings=False)"
                )
            if by.setdefault(id(weight), name) != name:
                raise ValueError(f"{consumer.tensor!r} reads {by[id(weight)]!r} and {name!r}, whose gains may differ")
            _along(weight, consumer, partial(_scaled, gain=gain, places=places))
        weight_of_norm.fill_(1 - norm.offset)


def _scaled(part: Tensor, number: int, *, gain: Tensor, places: Tensor) -> Tensor:
    """The number-th positions of all units, by the gain there; a gain of one position a unit is that of all."""
    return part * gain[places[:, min(number, places.shape[1] - 1)].to(gain.device)]


def _rotate_(model: nn.Module, stream: Structure, basis: Tensor) -> None:
    """Rows of what writes and columns of what reads; a tensor of several names once."""
    done: set[tuple[int, int]] = set()
    for member in (*stream.producers, *stream.consumers):
        tensor = getattr(*home_of(model, member.tensor))
        if (id(tensor), member.dim) not in done:
            done.add((id(tensor), member.dim))
            _along(tensor, member, lambda part, _: part @ basis.to(part))


def _along(tensor: Tensor, member: Member, change: Callable[[Tensor, int], Tensor]) -> None:
    """Change a tensor in place along a member's dimension, each of the n-th positions of all units at once."""
    moved = tensor.data.movedim(member.dim, -1)
    for number, positions in enumerate(member.index.to(tensor.device).T):
        moved[..., positions] = change(moved[..., positions], number)


def _outputs(model: nn.Module, x: Example) -> list[Tensor] | None:
    """None where the network does not take that, or answers with what is not finite."""
    try:
        found = outputs(model, x)
    except Exception:
        return None
    return found if all(bool(tensor.isfinite().all()) for tensor in found) else None


def _difference(expected: Sequence[Tensor], given: Sequence[Tensor] | None) -> float:
    if given is None or len(given) != len(expected):
        return float("inf")
    pairs = [(a, b) for a, b in zip(expected, given, strict=True) if a.numel()]
    return max((float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs), default=0.0)
