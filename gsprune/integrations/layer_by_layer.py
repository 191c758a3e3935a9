"""transformers' networks that are larger than memory: cut layer by layer, from files to files."""

from __future__ import annotations

import inspect
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gsprune.criteria import Criterion
from gsprune.cutting.cut import Cut, Repair, cut
from gsprune.files.disk import folder_aside
from gsprune.formats.safetensors_files import Checkpoint, Writer
from gsprune.integrations.pretrained import narrow_config, network_class
from gsprune.repair.report import RepairReport
from gsprune.structures.example import tensors_in
from gsprune.structures.twin import copy_of
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.cut_plan import CutPlan

__all__ = ["LayerCuts", "cut_pretrained"]

_BESIDE = (".json", ".txt", ".model", ".jinja")  # files that are copied: of the tokenizer, of generation


@dataclass(frozen=True, eq=False)
class LayerCuts:
    """The result of `cut_pretrained`.

    plan           what stays of the dense network
    dense, small   parameters of both networks, in the files
    layers         layer -> error of its parts before and after the repair; None without one
    samples        sequences of tokens that were read
    seconds        duration of the call
    """

    plan: CutPlan
    dense: int
    small: int
    layers: Mapping[str, RepairReport | None]
    samples: int
    seconds: float

    def __repr__(self) -> str:
        less = f"{self.dense:,} -> {self.small:,} parameters ({self.dense / self.small:.2f}x)"
        return f"{len(self.layers)} layers cut by {self.samples} samples: {less}, {self.seconds:.0f} s"


def cut_pretrained(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    batches: Iterable[Tensor],
    *,
    sparsity: float = 0.5,
    kinds: Sequence[str] | None = None,
    criterion: Criterion | None = None,
    repair: Repair | None = "least_squares",
    calibration: int = 128,
) -> LayerCuts:
    """Remove that share of the heads and neurons of each layer of a network that does not fit into memory.

    Layer after layer is read from the files, cut as a network of its own by `gsprune.cut` (scored by the activations
    that reach it, proved, repaired) and written; its outputs are what the next one is calibrated with. In memory are
    one layer (about 45 bytes a parameter, at its proof in float64), the calibration data at one depth (4 bytes x
    samples x length x width), and one other tensor at a time. Every layer keeps as many heads and neurons as the
    others, so that transformers' own `from_pretrained` reads the result.

    Args:
        source: a folder with config.json and safetensors files, as `save_pretrained` writes it.
        target: where the smaller network goes; it is there once all is written.
        batches: token ids (samples, length), whole sequences of one length, without padding.
        sparsity, kinds, criterion, repair: as of `gsprune.cut`, for each layer.
        calibration: sequences that are read of the batches.

    Raises:
        ValueError: the network is none of transformers with a list of equal layers, its layers attend in different
            ways, batches differ in length, a tensor is not in the files, or config.json cannot say what is left.
    """
    began, folder = time.perf_counter(), Path(source)
    kind, checkpoint = network_class(folder), Checkpoint(folder)
    with _parameters_on_meta():
        model = kind(kind.config_class.from_pretrained(folder, local_files_only=True)).eval()
    path, layers = _layers_of(model)
    names = [name for name, _ in model.named_parameters()]
    if (missing := next((name for name in names if name not in checkpoint.shapes), None)) is not None:
        raise ValueError(f"the files of {folder} have no {missing}, which {kind.__name__} has: convert them first")
    hidden, settings = _reaching(model, layers, checkpoint, _sequences(batches, calibration))
    rest = [name for name in checkpoint.shapes if not name.startswith(f"{path}.")]
    odd = {name for name in checkpoint.shapes if name.startswith(f"{path}.")} - set(names)
    if odd:
        raise ValueError(f"the files of {folder} have {min(odd)}, which {kind.__name__} does not have")
    plans: list[CutPlan] = []
    reports: dict[str, RepairReport | None] = {}
    small = sum(torch.Size(checkpoint.shapes[name]).numel() for name in rest)
    with folder_aside(target) as there:
        writer = Writer(there, len(layers) + len(rest))
        for number, layer in enumerate(layers):
            at = f"{path}.{number}"
            _fill(layer, at, checkpoint)
            found = _cut_layer(_Layer(layer, settings), hidden, sparsity, kinds, criterion, repair)
            hidden = _outputs(found.model, hidden)
            plans.append(_renamed(found.plan, "layer", at))
            if number == 0:  # what cannot be written is said before hours of work
                _config_of(model, [_renamed(found.plan, "layer", f"{path}.{n}") for n in range(len(layers))])
            reports[at] = found.repaired
            tensors = {f"{at}.{n.removeprefix('layer.')}": p.detach() for n, p in found.model.named_parameters()}
            small += sum(tensor.numel() for tensor in tensors.values())
            writer.write({name: t.to(checkpoint.dtype(name)).contiguous() for name, t in tensors.items()})
            _empty(layer)
        for name in rest:
            writer.write({name: checkpoint.read(name)})
        for file in folder.iterdir():
            if file.is_file() and file.suffix in _BESIDE and not file.name.endswith(".index.json"):
                shutil.copyfile(file, there / file.name)
        config = _config_of(model, plans)
        config.save_pretrained(there)
    dense = sum(torch.Size(shape).numel() for shape in checkpoint.shapes.values())
    samples = sum(len(batch) for batch in hidden)
    return LayerCuts(_together(plans), dense, small, reports, samples, time.perf_counter() - began)


class _Layer(nn.Module):
    """A layer as a network of its own, from hidden states to hidden states."""

    def __init__(self, layer: nn.Module, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.layer, self.settings = layer, dict(settings)

    def forward(self, hidden_btd: Tensor) -> Tensor:
        found = self.layer(hidden_btd, **self.settings)
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out


class _Reached(Exception):
    """The first layer was called."""


def _cut_layer(
    layer: nn.Module,
    hidden: Sequence[Tensor],
    sparsity: float,
    kinds: Sequence[str] | None,
    criterion: Criterion | None,
    repair: Repair | None,
) -> Cut:
    samples = sum(len(batch) for batch in hidden)
    common: dict[str, Any] = {"sparsity": sparsity, "kinds": kinds, "criterion": criterion, "repair": repair}
    found: Cut = cut(layer, hidden, calibration=samples, progress=False, **common)
    return found


@torch.no_grad()
def _outputs(layer: nn.Module, hidden: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat([layer(batch[i : i + 1]) for i in range(len(batch))]) for batch in hidden]


def _sequences(batches: Iterable[Tensor], calibration: int) -> list[Tensor]:
    """As many of the sequences as are asked for."""
    found: list[Tensor] = []
    for batch in batches:
        if not isinstance(batch, Tensor) or batch.dim() != 2 or batch.is_floating_point():
            raise ValueError("batches must be tensors of token ids, (samples, length): whole sequences without padding")
        if found and batch.shape[1] != found[0].shape[1]:
            lengths = f"{found[0].shape[1]} and of {batch.shape[1]}"
            raise ValueError(f"batches have sequences of {lengths} tokens: they must be of one length")
        room = calibration - sum(map(len, found))
        if room <= 0:
            break
        found.append(batch[:room])
    if not found:
        raise ValueError("there is no batch to calibrate with: batches is empty")
    return found


def _layers_of(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of layers that has most of the parameters."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in lists}
    tables = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m for p in m.parameters()}
    if not lists or 2 * max(sizes.values()) < sum(p.numel() for p in model.parameters() if id(p) not in tables):
        raise ValueError(f"{type(model).__name__} is no list of layers: cut it with gsprune.cut")
    name, layers = max(lists, key=lambda pair: sizes[pair[0]])
    types = set(getattr(model.config, "layer_types", None) or ())
    if len({type(layer) for layer in layers}) > 1 or len(types) > 1:
        what = " and ".join(sorted(types)) or "classes"
        raise ValueError(f"the layers of {type(model).__name__} are of several kinds ({what}): cut it with gsprune.cut")
    return name, layers


def _reaching(
    model: Any, layers: nn.ModuleList, checkpoint: Checkpoint, batches: Sequence[Tensor]
) -> tuple[list[Tensor], dict[str, Any]]:
    """What the first layer is given: the hidden states of each batch, and its other arguments, the same for all."""
    head = model.get_output_embeddings()
    inside = {id(p) for p in layers.parameters()}
    outside = {id(p) for p in head.parameters()} if head is not None else set()
    outside -= {id(p) for p in model.get_input_embeddings().parameters()}  # unless they are tied
    before = [n for n, p in model.named_parameters() if id(p) not in inside | outside]
    for name in before:
        _set(model, name, checkpoint.read(name).float())
    found: list[Tensor] = []
    settings: dict[str, Any] = {}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        signature = inspect.signature(layer.forward)
        bound = signature.bind(*args, **kwargs).arguments
        more = [n for n, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD and n in bound]
        settings.update({**bound, **{k: v for n in more for k, v in bound[n].items()}})
        for name in more:
            del settings[name]
        found.append(settings.pop("hidden_states"))
        raise _Reached

    handle = layers[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        for batch in batches:
            try:
                with torch.no_grad():
                    model(batch, use_cache=False)
            except _Reached:
                continue
            raise ValueError(f"{type(model).__name__} does not call its layers")
    finally:
        handle.remove()
        for name in before:
            _set(model, name, model.get_parameter(name).to("meta"))
    if any(len(tensor) > 1 for tensor in tensors_in(settings, floating=False) if tensor.dim()):
        raise ValueError(f"the layers of {type(model).__name__} are given more of each sample than its hidden states")
    return found, settings


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, modules are made with parameters on the meta device, and buffers that have their values."""
    real = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        made = param if param is None or param.is_meta else nn.Parameter(param.to("meta"), param.requires_grad)
        real(self, name, made)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = real  # type: ignore[method-assign]


def _fill(layer: nn.Module, at: str, checkpoint: Checkpoint) -> None:
    for name, _ in [*layer.named_parameters()]:
        _set(layer, name, checkpoint.read(f"{at}.{name}").float())


def _empty(layer: nn.Module) -> None:
    for name, parameter in [*layer.named_parameters()]:
        _set(layer, name, parameter.detach().to("meta"))


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    old = module.get_parameter(name)
    if old.shape != value.shape:
        raise ValueError(f"{name} is {list(value.shape)} in the files, and {list(old.shape)} by config.json")
    new = nn.Parameter(value.detach(), requires_grad=value.is_floating_point())
    for _, home in module.named_modules():  # a tied one under all of its names
        for key, parameter in home._parameters.items():
            if parameter is old:
                home._parameters[key] = new


def _renamed(plan: CutPlan, before: str, after: str) -> CutPlan:
    def named(name: str) -> str:
        return f"{after}{name.removeprefix(before)}" if name.startswith(f"{before}.") else name

    return CutPlan(
        {named(name): cuts for name, cuts in plan.kept.items()},
        {named(name): sizes for name, sizes in plan.sizes.items()},
        {named(name): value for name, value in plan.attributes.items()},
        {named(name): outputs for name, outputs in plan.removed.items()},
    )


def _together(plans: Sequence[CutPlan]) -> CutPlan:
    kept, sizes, attributes, removed = (
        {name: value for plan in plans for name, value in getattr(plan, part).items()}
        for part in ("kept", "sizes", "attributes", "removed")
    )
    return CutPlan(kept, sizes, attributes, removed)


def _config_of(model: nn.Module, plans: Sequence[CutPlan]) -> Any:
    """The configuration of the network that the plans leave of one that has no values."""
    small, plan = copy_of(model), _together(plans)
    apply_cut(small, plan)
    config = narrow_config(small, plan)
    if config is None:
        raise ValueError(f"config.json of {type(model).__name__} has no numbers for what this cut leaves of a layer")
    config.architectures = [type(model).__name__]
    return config
