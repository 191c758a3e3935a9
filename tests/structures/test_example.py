"""Example inputs of any wrapping, and copies of networks that keep activations."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from facts import refused
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from gsprune import Pruner
from gsprune.cost.counting import count_macs
from gsprune.criteria import Magnitude
from gsprune.discovery.find import find_structures
from gsprune.export import to_exported_program
from gsprune.latency import latency_ms
from gsprune.schedules import OneShot
from gsprune.structures.example import call, inputs_and_labels, logits_of, map_tensors, plain, tensors_in
from gsprune.structures.running import outputs
from gsprune.structures.twin import copy_of, to_precision
from gsprune.surgery.shrink import shrink


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    rest: tuple[Any, ...] = ()


@dataclass(slots=True)
class Slotted:
    x: Tensor


Named = namedtuple("Named", ["x", "y"])


class Batch(UserDict):  # type: ignore[type-arg]
    """As transformers' BatchEncoding."""


class Reader(nn.Module):
    def __init__(self, read: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.read = nn.Linear(4, 6), nn.Linear(6, 2), read

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.b(self.a(self.read(*args, **kwargs)).relu())
        return out


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
CASES: dict[str, tuple[Callable[..., Tensor], Any]] = {
    "UserDict": (lambda x: x, Batch(x=X)),
    "OrderedDict": (lambda x: x, OrderedDict(x=X)),
    "dataclass": (lambda b: b.x, Frozen(X)),
    "named tuple": (lambda x, y: x + y, Named(X, X)),
    "(dict,)": (lambda b: b["x"], ({"x": X},)),
    "(UserDict,)": (lambda b: b["x"], (Batch(x=X),)),
    "(frozen dataclass,)": (lambda b: b.x + b.rest[0]["y"], (Frozen(X, ({"y": X},)),)),
    "(slotted dataclass,)": (lambda b: b.x, (Slotted(X),)),
    "(named tuple,)": (lambda b: b.x, [Named(X, X)]),
    "([tensors],)": (lambda b: torch.stack(b), ([X[0], X[1]],)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_wrapping_of_an_example_is_traced_cut_and_measured(name: str) -> None:
    read, example = CASES[name]
    net = Reader(read)
    before = call(net, example)
    pruner = Pruner(net, Magnitude(), structured=True, target_sparsity=0.5, schedule=OneShot(), example_input=example)
    assert [(t.name, t.total) for t in pruner.targets] == [("a", 6)]
    assert count_macs(net, example) == 2 * (4 * 6 + 6 * 2)
    assert latency_ms({"net": net}, example, repeats=2)["net"] > 0
    pruner.on_step_begin(0)
    pruner.on_train_end()
    assert net.a.out_features == 3
    assert call(net, example).shape == before.shape


@pytest.mark.parametrize("name", ["UserDict", "OrderedDict", "named tuple", "(dict,)"])
def test_wrapped_examples_are_exported(name: str) -> None:
    read, example = CASES[name]
    net = Reader(read)
    args, kwargs = ((), {"x": X}) if name in ("UserDict", "OrderedDict") else (tuple(example), {})
    program = to_exported_program(net, example).module()
    assert torch.allclose(program(*args, **kwargs), call(net, example))


def test_a_nest_keeps_its_types_and_what_is_no_tensor() -> None:
    nest = {
        "a": [torch.ones(1), "text", None],
        "b": Named(torch.ones(1), 3),
        "c": (Frozen(torch.ones(1)), torch.Size([2])),
    }
    doubled = map_tensors(lambda t: 2 * t, nest)
    assert [float(t) for t in tensors_in(doubled)] == [2.0, 2.0, 2.0]
    assert [float(t) for t in tensors_in(nest)] == [1] * 3
    assert type(doubled["b"]) is Named
    assert doubled["b"].y == 3
    assert doubled["a"][1:] == ["text", None]
    assert type(doubled["c"][0]) is Frozen
    assert doubled["c"][1] == torch.Size([2])
    packed = pack_padded_sequence(torch.ones(2, 3, 1), [3, 2], batch_first=True)
    assert map_tensors(lambda t: t * 2, packed).data.tolist() == [[2.0]] * 5


def test_a_subclass_is_a_tensor_and_integers_keep_their_type() -> None:
    class Image(Tensor):
        pass

    assert type(plain(torch.ones(1).as_subclass(Image), torch.float64)) is Tensor
    kinds = [plain(torch.ones(1, dtype=d), torch.float64).dtype for d in (torch.int64, torch.complex64, torch.half)]
    assert kinds == [torch.int64, torch.complex128, torch.float64]


class Keeping(nn.Module):
    """Keeps activations and a plain tensor, as networks do for hooks, losses and states."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.seen: list[Tensor] = []
        self.scale = torch.full((6,), 2.0)

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.a(x) * self.scale
        self.seen.append(self.last)
        out: Tensor = self.b(self.last.relu())
        return out


def test_a_network_that_keeps_activations_can_be_copied_traced_and_cut() -> None:
    net = Keeping()
    net(X).sum().backward()
    twin = copy_of(net)
    assert twin.last is twin.seen[0]
    assert twin.last.grad_fn is None
    assert torch.equal(twin.last, net.last)
    assert net.last.grad_fn is not None
    assert [s.name for s in find_structures(Reader(lambda x: x), X).structures] == ["a"]
    (structure,) = find_structures(net, X).structures  # a tensor that is no parameter is cut along
    assert [(m.tensor, m.index.shape) for m in structure.norms] == [("scale", (6, 1))]
    shrink(net, [structure], [torch.arange(6) < 2], example_input=X)
    assert net.scale.tolist() == [2.0, 2.0]
    assert net(X).shape == (len(X), 2)


def test_plain_tensors_follow_the_precision_and_sharing_copies_nothing() -> None:
    net = Keeping()
    double = to_precision(copy_of(net), torch.float64)
    assert outputs(double, X.double())[0].dtype == torch.float64
    assert net.scale.dtype == torch.float32
    shared = copy_of(net, sharing=True)
    assert shared is not net
    assert shared.a is not net.a
    assert shared.a.weight is net.a.weight


# ---- batches


class Pair(NamedTuple):
    x: Any
    target: Any


class Triple(NamedTuple):
    x: Any
    labels: Any
    mask: Any


@dataclass
class Whole:
    x: Any
    labels: Any


WHOLE = Whole(1, 3)


@pytest.mark.parametrize(
    ("batch", "inputs"),
    [
        ((1, 3), 1),
        ([1, 3], 1),
        ({"x": 1, "labels": 3}, {"x": 1}),
        (UserDict(x=1, mask=2, label=3), {"x": 1, "mask": 2}),
        (({"x": 1, "labels": 2}, 3), {"x": 1, "labels": 2}),
        (Pair(1, 3), 1),
        (Triple(1, 3, 2), (1, 2)),
        (WHOLE, WHOLE),
    ],
)
def test_a_batch_is_inputs_and_labels(batch: Any, inputs: Any) -> None:
    found, labels = inputs_and_labels(batch)
    assert (found, labels) == (inputs, 3)


@pytest.mark.parametrize(
    ("batch", "given"), [({"x": 1, "y": 2}, "a dict of x, y"), ((1, 2, 3), "a tuple"), (1, "a int"), ([1], "a list")]
)
def test_a_batch_without_labels_is_refused(batch: Any, given: str) -> None:
    with refused(given, "(inputs, labels)"):
        inputs_and_labels(batch)


def test_logits_of_what_networks_return() -> None:
    logits = torch.ones(2)
    outputs = (logits, (logits, 1), {"logits": logits, "loss": 0}, SimpleNamespace(logits=logits))
    assert all(logits_of(output) is logits for output in outputs)
