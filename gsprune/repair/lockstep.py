"""Two networks run side by side over all batches and stopped at each layer, so that one of them can be changed there.

Every batch of either network runs in a thread of its own, one thread at a time (a baton). A hook stops the thread at
the next wanted layer. When all of them have arrived at the same one, it is visited, and all go on. What is changed at
one layer is thereby what later layers read, in one forward pass of each network, and the activations that are alive are
those of one pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gsprune.structures.attention import no_fast_path
from gsprune.structures.example import Example, call, map_tensors, tensors_in
from gsprune.structures.running import evaluating, hooked, same_randomness, to_device_of
from gsprune.structures.twin import refuse_wrapped
from gsprune.surgery.narrow_attention import NarrowAttention

POOLED = 512  # threads of PyTorch's own in all: every thread that computes has a pool of them


class Place(NamedTuple):
    """A tensor of a forward pass: the one of that number among what a module takes ("in") or gives ("out")."""

    module: str
    side: str
    number: int


@dataclass(frozen=True, eq=False)
class Visit:
    """One layer of both networks, seen on all batches; the lists have one entry a batch.

    name           of the module in either network
    dense, small   the modules; the dense one is an `nn.MultiheadAttention` where `name` is its output projection
    inputs         what the small layer is about to read
    dense_inputs   what the dense layer has read
    outputs        what the dense layer gave; of an attention's packed projections what they read
    held_back      whether the batch is of the held-back part
    tokens         bool (samples, tokens), False where the batch says that one is padding; None where it says nothing
    streams        (dense, small) tensors at the place that was watched for this layer; empty without one
    """

    name: str
    dense: nn.Module | None
    small: nn.Module
    inputs: list[Tensor]
    dense_inputs: list[Tensor]
    outputs: list[Tensor]
    held_back: list[bool]
    tokens: list[Tensor | None] = field(default_factory=list)
    streams: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def filled(self) -> int:
        """The first batch of which the layer reads anything: an expert may get no token."""
        return next((i for i, y in enumerate(self.outputs) if y.numel()), 0)


class CalledAgainError(RuntimeError):
    """A layer that had been visited is called once more in the same pass: `name`."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is called more than once in a pass")
        self.name = name


def lockstep(
    dense: nn.Module | None,
    small: nn.Module,
    batches: Sequence[Example],
    names: Sequence[str],
    visit: Callable[[Visit], None],
    *,
    held_back: Sequence[bool],
    watched: Mapping[str, Place] | None = None,
    left: dict[str, str] | None = None,
) -> list[str]:
    """Run both networks over all batches; `visit` may change the small layer before it runs there.

    Both run in evaluation mode, without gradients, with the same random numbers for the same batch. Modes and random
    state are restored. After the last of the layers the passes are ended early, all but one of the dense
    network's.

    Args:
        dense: None: the small one runs alone.
        batches: what the networks are called with, on any device.
        names: modules of both networks, each called once in a pass; of two that passes reach in another order the
            first is left.
        held_back: of each batch.
        watched: layer -> a place that the pass reaches before it, whose tensors its visit shall have.
        left: takes the layers that were not visited -> why.

    Returns:
        The names in the order visited.

    Raises:
        ValueError: the networks share parameters, or are wrapped.
        CalledAgainError: a layer is called again after it was visited.

    What either network or `visit` raises comes out; no thread stays behind.

    >>> dense = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> small = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> def copy(visit):
    ...     visit.small.weight.copy_(visit.dense.weight)
    >>> lockstep(dense, small, [torch.ones(3, 2)], ["1", "0"], copy, held_back=[False])
    ['0', '1']
    >>> torch.equal(small[0].weight, dense[0].weight)
    True
    """
    models = [model for model in (dense, small) if model is not None]
    for model in models:
        refuse_wrapped(model)
    own = {id(parameter) for parameter in small.parameters()}
    if dense is not None and any(id(parameter) in own for parameter in dense.parameters()):
        raise ValueError("the dense network and the small one share parameters: they must be networks of their own")
    run = _Lockstep(dense, small, names, visit, list(held_back), watched or {}, {} if left is None else left)
    with evaluating(models), same_randomness(small), no_fast_path(), torch.no_grad():
        return run(batches)


# ---- one thread


class _End(BaseException):
    """Ends a pass early; no `except Exception` of a network takes it."""


class _Runner:
    """One batch of one network, in a thread that runs only inside `resume`, with random numbers of its own.

    at, read, gave   the layer where it is stopped, what that reads, and what it gave
    noted            tensors at the watched places it has passed
    """

    def __init__(self, model: nn.Module, example: Example, seed: int, threads: int) -> None:
        self.at: str | None = None
        self.read: Tensor | None = None
        self.gave: Tensor | None = None
        self.noted: dict[Place, Tensor] = {}
        self.error: BaseException | None = None
        self.done = self._ending = False
        self._example, self._model, self._threads = example, model, threads
        self._devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
        self._surroundings = _surroundings(self._devices)
        self._random: list[Tensor] | None = None
        self._seed = seed
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name="gsprune.repair", daemon=True)
        self._thread.start()

    @property
    def ident(self) -> int | None:
        return self._thread.ident

    def resume(self) -> None:
        """Let it run to its next stop or its end; nothing where it has ended."""
        if self.done:
            return
        self.at = self.read = self.gave = None
        outside = _random_states(self._devices)
        if self._random is None:
            torch.manual_seed(self._seed)
        else:
            _set_random_states(self._random, self._devices)
        self._go.release()
        self._back.acquire()
        self._random = _random_states(self._devices)
        _set_random_states(outside, self._devices)

    def stop(self, name: str, read: Tensor, gave: Tensor | None) -> None:
        """Called by the thread itself: wait here."""
        self.at, self.read, self.gave = name, read, gave
        self._back.release()
        self._wait()

    def end(self) -> None:
        """Make it end where it is."""
        self._ending = True
        while not self.done:
            self._go.release()
            self._back.acquire()
        self._thread.join()

    def _wait(self) -> None:
        self._go.acquire()
        if self._ending:
            raise _End
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)

    def _run(self) -> None:
        try:
            self._wait()
            with self._surroundings(), torch.no_grad():
                call(self._model, self._example)
        except _End:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.done = True
            self._back.release()


def _surroundings(devices: Sequence[int]) -> Callable[[], AbstractContextManager[None]]:
    """What PyTorch keeps for each thread, as it is in this one: default device, CUDA device and stream."""
    default = torch.get_default_device()
    current, stream = (torch.cuda.current_device(), torch.cuda.current_stream()) if devices else (None, None)

    @contextmanager
    def inside() -> Iterator[None]:
        with ExitStack() as stack:
            if default.type != "cpu":
                stack.enter_context(default)
            if current is not None:
                stack.enter_context(torch.cuda.device(current))
                stack.enter_context(torch.cuda.stream(stream))
            yield

    return inside


def _random_states(devices: Sequence[int]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _set_random_states(states: Sequence[Tensor], devices: Sequence[int]) -> None:
    torch.set_rng_state(states[0])
    for state, device in zip(states[1:], devices, strict=True):
        torch.cuda.set_rng_state(state, device)


# ---- all of them


def _are_same_rows(visit: Visit) -> bool:
    """Whether both read as many rows: once layers before a router are cut, it may give an expert other tokens."""
    if not isinstance(visit.small, nn.Linear):
        return True
    return all(_rows(x) == _rows(y) for x, y in zip(visit.inputs, visit.outputs, strict=False))


def _rows(tensor: Tensor) -> int:
    return tensor.shape[:-1].numel()


class _Lockstep:
    """Resumes the threads one after the other, and visits the layers where all of them stop."""

    def __init__(
        self,
        dense: nn.Module | None,
        small: nn.Module,
        names: Sequence[str],
        visit: Callable[[Visit], None],
        held_back: list[bool],
        watched: Mapping[str, Place],
        left: dict[str, str],
    ) -> None:
        self._dense, self._small, self._visit, self._held_back = dense, small, visit, held_back
        self._names, self._wanted = [*names], set(names)
        self._watched, self._left = dict(watched), left
        self._visited: list[str] = []
        self._tokens: list[Tensor | None] = []
        self._runners: dict[int, _Runner] = {}  # by the number of their thread
        self._again: str | None = None

    def __call__(self, batches: Sequence[Example]) -> list[str]:
        self._tokens = [_tokens_of(batch) for batch in batches]
        before = torch.get_num_threads()
        threads = max(1, min(before, POOLED // max(1, 2 * len(batches))))
        dense: list[_Runner] = []
        small: list[_Runner] = []
        try:
            with ExitStack() as stack:
                stack.enter_context(hooked(self._hooks()))
                for seed, batch in enumerate(batches):
                    if self._dense is not None:
                        dense.append(self._runner(self._dense, batch, seed, threads, stack))
                    small.append(self._runner(self._small, batch, seed, threads, stack))
                self._run(dense, small, before)
        finally:
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)
        return self._visited

    def _runner(self, model: nn.Module, batch: Example, seed: int, threads: int, stack: ExitStack) -> _Runner:
        runner = _Runner(model, map_tensors(Tensor.clone, to_device_of(model, batch)), seed, threads)
        stack.callback(runner.end)
        assert runner.ident is not None
        self._runners[runner.ident] = runner
        return runner

    def _run(self, dense: Sequence[_Runner], small: Sequence[_Runner], threads: int) -> None:
        runners = [*dense, *small]
        while self._wanted and runners:
            for runner in runners:
                if runner.at not in self._wanted:
                    self._resume(runner)
            places = {runner.at for runner in runners}
            here = min((place for place in places if place is not None), key=self._names.index, default=None)
            if here is None:
                self._leave(self._wanted, "a pass does not reach it")
            elif len(places) > 1:
                self._leave({here}, "the passes of the two networks, or of the batches, differ there")
            else:
                torch.set_num_threads(threads)
                seen = self._seen(here, dense, small)
                if _are_same_rows(seen):
                    self._visit(seen)
                    self._visited.append(here)
                    self._wanted.discard(here)
                else:
                    self._leave({here}, "the two networks choose other rows for it")
        if self._visited:  # one batch goes on to its end: no visited layer may be called again
            self._resume(runners[0])

    def _resume(self, runner: _Runner) -> None:
        runner.resume()
        if runner.error is not None:
            raise runner.error
        if self._again is not None:
            raise CalledAgainError(self._again)

    def _leave(self, names: set[str], why: str) -> None:
        for name in [*names]:
            self._left[name] = why
            self._wanted.discard(name)

    def _seen(self, name: str, dense: Sequence[_Runner], small: Sequence[_Runner]) -> Visit:
        place = self._watched.pop(name, None)
        streams = [
            (_as_projected(self._small, name, a.noted[place]), _as_projected(self._small, name, b.noted[place]))
            for a, b in zip(dense, small, strict=False)
            if place is not None and place in a.noted and place in b.noted
        ]
        self._forget(place, (*dense, *small))
        return Visit(
            name,
            self._dense and home_of_layer(self._dense, name)[0],
            self._small.get_submodule(name),
            [runner.read for runner in small if runner.read is not None],
            [runner.read for runner in dense if runner.read is not None],
            [runner.gave for runner in dense if runner.gave is not None],
            self._held_back,
            self._tokens,
            streams if len(streams) == len(small) else [],
        )

    def _forget(self, place: Place | None, runners: Sequence[_Runner]) -> None:
        if place is not None and place not in self._watched.values():
            for runner in runners:
                runner.noted.pop(place, None)

    # ---- hooks

    def _hooks(self) -> Iterator[RemovableHandle]:
        for place in dict.fromkeys(self._watched.values()):
            for model in (self._dense, self._small):
                assert model is not None
                yield from self._watch(model.get_submodule(place.module), place)
        for name in sorted(self._wanted):
            if self._dense is not None:
                home, is_attention = home_of_layer(self._dense, name)
                if isinstance(home, nn.MultiheadAttention) and not is_attention:  # its projections, of what it reads
                    yield home.register_forward_pre_hook(partial(self._before_both, name), with_kwargs=True)
                else:
                    yield home.register_forward_hook(partial(self._after, name, is_attention), with_kwargs=True)
            yield self._small.get_submodule(name).register_forward_pre_hook(
                partial(self._before, name), with_kwargs=True
            )

    def _watch(self, module: nn.Module, place: Place) -> Iterator[RemovableHandle]:
        def note(value: Any) -> None:
            runner = self._runners.get(threading.get_ident())
            found = [*tensors_in(value)]
            if runner is not None and place.number < len(found) and place in self._watched.values():
                runner.noted[place] = found[place.number]

        if place.side == "in":
            yield module.register_forward_pre_hook(lambda m, args, kwargs: note((args, kwargs)), with_kwargs=True)
        else:
            yield module.register_forward_hook(lambda m, args, output: note(output))

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._stop(name, next(tensors_in((args, kwargs)), None), None)

    def _before_both(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        read = next(tensors_in((args, kwargs)), None)
        self._stop(name, read, read)

    def _after(self, name: str, is_attention: bool, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        gave = next(tensors_in(output), None)
        if is_attention and gave is not None:
            gave = _as_projected(self._small, name, gave)
        self._stop(name, next(tensors_in((args, kwargs)), None), gave)

    def _stop(self, name: str, read: Tensor | None, gave: Tensor | None) -> None:
        runner = self._runners.get(threading.get_ident())
        if runner is None:  # a thread of the network's own
            return
        if name in self._visited:
            self._again = name
        elif name in self._wanted and read is not None:
            runner.stop(name, read, gave)


def _tokens_of(batch: Example) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _as_projected(model: nn.Module, name: str, outside: Tensor) -> Tensor:
    """A tensor beside an `nn.MultiheadAttention` in the order of its output projection: batch, token, feature."""
    path, _, leaf = name.rpartition(".")
    parent = model.get_submodule(path)
    is_turned = leaf == "out_proj" and isinstance(parent, nn.MultiheadAttention) and not parent.batch_first
    return outside.transpose(0, 1) if is_turned and outside.dim() == 3 else outside


def home_of_layer(dense: nn.Module, name: str) -> tuple[nn.Module, bool]:
    """The module whose output is that of the layer, and whether that is an attention that does not call the layer."""
    path, _, leaf = name.rpartition(".")
    parent = dense.get_submodule(path)
    if leaf == "out_proj" and isinstance(parent, nn.MultiheadAttention) and not isinstance(parent, NarrowAttention):
        return parent, True
    return dense.get_submodule(name), False
