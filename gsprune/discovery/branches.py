"""Find whole residual branches: what is added to a stream of the same shape, and may be left out.

One forward pass watches where the outputs of layers go. What comes out of a layer, and after it passes only steps that
keep zeros zero (reshapes, a scale, dropout), is a branch's last step if it is then added to another activation of the
same shape. With that layer at zero the branch adds nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from gsprune.structures.attention import no_fast_path
from gsprune.structures.example import Example, answers_in, call, map_tensors, tensors_in
from gsprune.structures.matrices import is_conv1d
from gsprune.structures.running import counted, hooked, outputs, same_randomness
from gsprune.structures.structure import Found, Member, Structure
from gsprune.structures.twin import twin_of
from gsprune.surgery.proof import Masked, wake_precisely_
from gsprune.surgery.readings import moved
from gsprune.surgery.shrink import sift_cuts
from gsprune.text.names import joined

_LAST = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.MultiheadAttention)
# Functions by which a tensor of zeros stays one, whatever else they are given.
_SHAPES = (
    *(
        "view",
        "reshape",
        "transpose",
        "permute",
        "contiguous",
        "flatten",
        "unflatten",
        "movedim",
        "moveaxis",
        "swapaxes",
    ),
    *(
        "squeeze",
        "unsqueeze",
        "expand",
        "roll",
        "clone",
        "detach",
        "to",
        "type_as",
        "float",
        "double",
        "half",
        "bfloat16",
    ),
)
_FACTORS = ("mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply", "div", "__truediv__")
_KEEPS_ZERO = {*_SHAPES, *_FACTORS, "dropout", "dropout_", "alpha_dropout", "feature_dropout", "stochastic_depth"}
_ADDS = {"add", "add_", "__add__", "__radd__", "__iadd__"}


def find_branches(model: nn.Module, example_input: Example) -> Found:
    """The residual branches of `model` that can be left out, as structures of kind "branches" with one unit each.

    Proven on a float64 copy: with its last layer at zero the network computes what it does with the branch replaced by
    `gsprune.surgery.no_branch.NoBranch`, and it still depends on its input. `model` is not touched.

    Returns:
        In module order; what cannot be left out -> why.

    Raises:
        ValueError: the model does not run on the example, is quantised or on another device.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.norm, self.fc1, self.fc2 = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)
    ...     def forward(self, x):
    ...         return x + self.fc2(torch.relu(self.fc1(self.norm(x))))
    >>> net = nn.Sequential(nn.Linear(3, 4), Block(), Block(), nn.Linear(4, 2))
    >>> found = find_branches(net, torch.randn(2, 3))
    >>> [(s.name, dict(s.removed)) for s in found.structures]
    [('1.fc2', {'1.norm': 0, '1.fc1': 0, '1.fc2': 0}), ('2.fc2', {'2.norm': 0, '2.fc1': 0, '2.fc2': 0})]
    """
    twin, args = twin_of(model, example_input)
    with same_randomness(twin), torch.enable_grad():
        args, whole, proof = wake_precisely_(twin, args)
        structures = _structures(twin, args)
        if not structures:
            return Found((), (), {}, proof)
        masked = Masked(twin, args, structures, whole)
        kept, skipped = sift_cuts(masked, structures)
        if skipped:  # some ask a layer that the branch alone calls for its type
            smaller = [replace(s, removed={s.name: s.removed[s.name]}) for s in structures if len(s.removed) > 1]
            more, _ = sift_cuts(masked, [s for s in smaller if s.name in skipped])
            names = [s.name for s in structures]
            kept = sorted([*kept, *more], key=lambda s: names.index(s.name))
            skipped = {name: why for name, why in skipped.items() if name not in {s.name for s in more}}
        alone = {s.name: _DEAD for s in kept if not _depends(masked, s)}
    skipped |= alone
    return Found(tuple(s for s in kept if s.name not in alone), (), skipped, proof)


def with_branches(found: Found, model: nn.Module, example_input: Example) -> Found:
    """What was found, and branches; one that is called as another structure is (its heads) has "branch " before."""
    branches = find_branches(model, example_input)
    taken = {s.name for s in found.structures}
    named = (replace(s, name=f"branch {s.name}") if s.name in taken else s for s in branches.structures)
    skipped = {f"branch {name}" if name in found.skipped else name: why for name, why in branches.skipped.items()}
    return replace(found, structures=(*found.structures, *named), skipped={**found.skipped, **skipped})


_DEAD = "without it the network's output does not depend on the input any more"


def _depends(masked: Masked, structure: Structure) -> bool:
    """Whether the output still tells one input from another; where there is only one, it is taken to."""
    if masked.rounds[0].args is masked.rounds[1].args:
        return True
    keep_first = [r._replace(is_other_half=False) for r in masked.rounds]
    before, masked.rounds = masked.rounds, keep_first
    try:
        found = [[r for r in masked.read(number, [structure]) if not r.name] for number in (0, 1)]
    finally:
        masked.rounds = before
        masked.forget()
    return bool(moved(*found)) or [r.whole.shape for r in found[0]] != [r.whole.shape for r in found[1]]


# ---- one pass


@dataclass(eq=False)
class _Note:
    """What is known of a tensor: the layers it is a branch of, whether it comes from the input, and by which layers."""

    branches: frozenset[str] = frozenset()
    is_live: bool = False
    passed: frozenset[str] = frozenset()


@dataclass(eq=False)
class _Seen:
    """What one pass has shown: the last layers of branches, in the order of their sums."""

    lasts: dict[str, None] = field(default_factory=dict)


class _Watch(TorchFunctionMode):
    """Carries notes from the arguments of every function to its results."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: dict[int, tuple[Tensor, _Note]] = {}  # the tensor is kept, so that its id stays its own
        self.seen = _Seen()

    def note_of(self, tensor: Tensor) -> _Note:
        entry = self.notes.get(id(tensor))
        return entry[1] if entry is not None else _Note()

    def set_note(self, tensor: Tensor, note: _Note) -> None:
        self.notes[id(tensor)] = (tensor, note)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [*tensors_in((args, kwargs), floating=False)]
        shapes = [tuple(t.shape) for t in given]
        notes = [self.note_of(t) for t in given]
        result = func(*args, **kwargs)
        if not any(note.is_live for note in notes):
            return result
        name = getattr(func, "__name__", "")
        branches: frozenset[str] = frozenset()
        if name in _ADDS and len(given) == 2 and shapes[0] == shapes[1]:
            branches = self._added(notes)
        elif name in _KEEPS_ZERO and notes:
            counted_notes = notes[:1] if name in _SHAPES else notes  # x.type_as(y) has the entries of x
            carried = [*{note.branches for note in counted_notes if note.branches}]
            branches = carried[0] if len(carried) == 1 else frozenset()
        passed = frozenset[str]().union(*(note.passed for note in notes))
        for tensor in tensors_in(result, floating=False):
            self.set_note(tensor, _Note(branches, True, passed))
        return result

    def _added(self, notes: list[_Note]) -> frozenset[str]:
        first, second = notes
        if (
            first.branches
            and second.branches
            and not (first.branches <= second.passed or second.branches <= first.passed)
        ):
            return first.branches | second.branches  # attention and MLP side by side, added to the stream afterwards
        if first.is_live and second.is_live:  # an activation such as x + x ** 3 adds a layer's output to itself
            found = (first.branches - second.passed) | (second.branches - first.passed)
            self.seen.lasts |= dict.fromkeys(sorted(found))
        return frozenset()


def _lasts(twin: nn.Module, args: Example) -> list[str]:
    """Names of the last layers of all branches, in module order."""
    watch = _Watch()
    names = {module: name for name, module in twin.named_modules()}
    calls: Counter[nn.Module] = Counter()

    def live(value: Tensor) -> Tensor:
        copy = value.clone()
        watch.set_note(copy, _Note(is_live=True))
        return copy

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and watch.note_of(first).is_live:
            name = frozenset([names[module]])
            watch.set_note(first, _Note(name, True, watch.note_of(first).passed | name))

    inside = {m for a in twin.modules() if isinstance(a, nn.MultiheadAttention) for m in a.children()}
    layers = [m for m in names if (isinstance(m, _LAST) or is_conv1d(m)) and m not in inside and _tensors(m, "")]
    with (
        counted(twin, calls),
        hooked(m.register_forward_hook(after) for m in layers),
        torch.no_grad(),
        no_fast_path(),
        watch,
    ):
        call(twin, map_tensors(live, args))
    found = watch.seen.lasts
    return [name for module, name in names.items() if name in found and calls[module] == 1]


def _tensors(module: nn.Module, name: str) -> list[str]:
    """The parameters that are zero where a layer gives zeros."""
    if isinstance(module, nn.MultiheadAttention):
        module, name = module.out_proj, joined(name, "out_proj")
    if not isinstance(module._parameters.get("weight"), Tensor):
        return []
    return [joined(name, leaf) for leaf in ("weight", "bias") if module._parameters.get(leaf) is not None]


def _structures(twin: nn.Module, args: Example) -> list[Structure]:
    lasts = _lasts(twin, args)
    if not lasts:
        return []
    modules = dict(twin.named_modules())
    form = _forms(twin, args, [t for name in lasts for t in _tensors(modules[name], name)])
    homes = {name: _outermost(name, lasts, lambda path: form.get(path, (False, 0))[0]) for name in lasts}
    dead = _dead(twin, args, set(homes.values()))
    found = []
    for name, home in homes.items():
        removed = {path: n for path, (_, n) in form.items() if path == home or path in dead[home]}
        order = [path for path in modules if path in removed]
        removed = {p: removed[p] for p in order if not any(p.startswith(f"{q}.") for q in order)}
        members = tuple(_member(twin, tensor) for tensor in _tensors(modules[name], name))
        found.append(Structure(home, "branches", 1, members, members, (), members, {}, removed))
    return found


def _member(twin: nn.Module, tensor: str) -> Member:
    length = twin.get_parameter(tensor).shape[0]
    return Member(tensor, 0, torch.arange(length).reshape(1, -1), length)


def _outermost(name: str, lasts: Iterable[str], is_zero: Callable[[str], bool]) -> str:
    """The largest module around a layer that gives zeros with it, and holds no other branch."""
    home, path = name, name
    while "." in path:
        path = path.rpartition(".")[0]
        others = [other for other in lasts if other != name and (other == path or other.startswith(f"{path}."))]
        if others or not is_zero(path):
            break
        home = path
    return home


def _forms(twin: nn.Module, args: Example, zero: Iterable[str]) -> dict[str, tuple[bool, int]]:
    """Module -> whether its first output is all zeros with these tensors at zero, and how many outputs it has."""
    found: dict[str, tuple[bool, int]] = {}

    def note(name: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        is_zero = isinstance(first, Tensor) and first.numel() > 0 and not bool(first.any())
        found[name] = (is_zero, len(output) if isinstance(output, tuple) else 0)

    saved = {name: twin.get_parameter(name).data for name in zero}
    try:
        for name, value in saved.items():
            twin.get_parameter(name).data = torch.zeros_like(value)
        hooks = (m.register_forward_hook(lambda m, i, o, name=n: note(name, o)) for n, m in twin.named_modules() if n)
        with hooked(hooks):
            outputs(twin, args)
    finally:
        for name, value in saved.items():
            twin.get_parameter(name).data = value
    return found


def _dead(twin: nn.Module, args: Example, homes: set[str]) -> dict[str, set[str]]:
    """Each of these modules -> the modules with parameters whose outputs nothing but its own output depends on."""
    ends: dict[str, list[Any]] = {}

    def note(name: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and name in homes else output
        ends.setdefault(name, []).extend(t.grad_fn for t in tensors_in(first) if t.grad_fn is not None)

    def hooks() -> Iterator[RemovableHandle]:
        for name, module in twin.named_modules():
            if name and any(True for _ in module.parameters()):
                yield module.register_forward_hook(lambda m, i, o, name=name: note(name, o))

    with hooked(hooks()), torch.enable_grad(), no_fast_path():
        starts = [t.grad_fn for t in answers_in(call(twin, map_tensors(Tensor.clone, args))) if t.grad_fn is not None]
    dead = {}
    for home in homes:
        live = _reached(starts, ends.get(home, ()))
        dead[home] = {name for name, nodes in ends.items() if nodes and not live.intersection(nodes)}
    return dead


def _reached(starts: Iterable[Any], without: Iterable[Any]) -> set[Any]:
    """The nodes that these depend on by ways that do not pass `without`."""
    closed = {*without, None}
    seen: set[Any] = set()
    stack = list(starts)
    while stack:
        node = stack.pop()
        if node in closed or node in seen:
            continue
        seen.add(node)
        stack.extend(parent for parent, _ in node.next_functions)
    return seen
