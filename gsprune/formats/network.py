"""The pruned network on disk: its weights and what was cut. Nothing is ever unpickled.

Files are data from strangers: names, shapes and sizes are checked before anything is allocated or changed,
and every fault is a ValueError of one sentence.
"""

from __future__ import annotations

import difflib
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor, nn

from gsprune.files.disk import json_data, read_json, refusing, sha256, sha256_of_json, write_json
from gsprune.formats.compressed import bits_of, compress, expand, expanded_header
from gsprune.formats.tensors import VERSION, Header, read_header, save_tensors, state_tensors
from gsprune.structures.attention import GROUP_NAMES, HEAD_NAMES, SIZE_NAMES
from gsprune.structures.twin import every_tensor, refuse_wrapped
from gsprune.surgery.apply import SHAPE, apply_cut, home_of, with_ties
from gsprune.surgery.cut_plan import ROW_NUMBERS, CutPlan
from gsprune.surgery.narrow_forward import is_size, module_of
from gsprune.surgery.no_branch import NoBranch, inside
from gsprune.text.names import joined

MODEL_FORMAT = "gsprune-pruned-model"
WEIGHTS = "model.safetensors"
RECORD = "pruning.json"


def save_pruned(
    directory: str | os.PathLike[str],
    model: nn.Module,
    plan: CutPlan | None,
    *,
    compressed: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a pruned model as model.safetensors and pruning.json, from which `load_pruned` rebuilds it.

    Tied tensors are stored once. What transformers calls a model's configuration stays that of the dense network, so
    its own `save_pretrained` leaves files that its `from_pretrained` cannot read; where that is possible,
    `gsprune.integrations.pretrained` writes files that it reads.

    Args:
        directory: where to; made if it is not there.
        model: as the plan has left it.
        plan: what stays of the dense network (`Pruner.plan`); None where single weights are pruned and nothing is cut.
            Of a model that was pruned before, loaded and pruned again, `plan.after(read_cut_plan(first_directory))`.
        compressed: store of a tensor with many zeros what is not zero, and one bit an entry: a network of which 95 % of
            the weights are zero is about 12 times smaller. `load_pruned` gives the same tensors.
        extra: put into pruning.json as it is (it must fit into JSON).

    Raises:
        ValueError: the state holds something that is no tensor, or a quantised one.
        OSError: the files cannot be written.
    """
    tensors, ties = state_tensors(model)
    record = {
        "format": MODEL_FORMAT,
        "version": VERSION,
        "plan": plan.to_json() if plan else {"tensors": {}, "attributes": {}},
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "settings": _settings(model),
        "ties": ties,
        "versions": _versions(model),
    }
    stored = tensors
    if compressed:
        stored, record["compressed"] = compress(tensors)
    mark = _fingerprint(record)
    metadata = {"format": MODEL_FORMAT, "version": str(VERSION), "fingerprint": mark}
    weights = Path(directory) / WEIGHTS
    save_tensors(weights, stored, metadata)
    marks = {"fingerprint": mark, "sha256": sha256(weights)}
    write_json(Path(directory) / RECORD, {**record, **marks, "extra": dict(extra or {})})


@refusing()
def load_pruned(directory: str | os.PathLike[str], dense_model: nn.Module) -> nn.Module:
    """Rebuild a saved model: cut a dense one to size and load the weights. No pickle is read.

    Args:
        directory: with model.safetensors and pruning.json, as `save_pruned` or a run leaves them.
        dense_model: freshly built, as before pruning; changed in place, and only after everything was checked.

    Returns:
        `dense_model`, smaller, in eval mode.

    Raises:
        ValueError: a file is missing, damaged, edited or not what it says; the model is a wrapper, holds no values, or
            is another architecture (naming the first tensor or setting that does not fit).

    >>> import tempfile
    >>> import torch
    >>> from gsprune import Pruner
    >>> from gsprune.criteria import Magnitude
    >>> from gsprune.schedules import OneShot
    >>> build = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> model, x = build(), torch.ones(1, 4)
    >>> pruner = Pruner(
    ...     model, Magnitude(), structured=True, target_sparsity=0.5, schedule=OneShot(), example_input=x
    ... )
    >>> pruner.on_step_begin(0); pruner.on_train_end()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pruned(folder, model, pruner.plan)
    ...     again = load_pruned(folder, build())
    >>> again[0], torch.equal(again(x), model(x))
    (Linear(in_features=4, out_features=4, bias=True), True)
    """
    folder = Path(directory)
    refuse_wrapped(dense_model)
    if any(tensor.is_meta for tensor in dense_model.state_dict().values()):
        raise ValueError("the dense model is on the meta device, which holds no values: build it on another one")
    record = _read_record(folder / RECORD)
    header = read_header(folder / WEIGHTS, MODEL_FORMAT)
    if not header.metadata.get("fingerprint") == record["fingerprint"] == _fingerprint(record):
        raise ValueError(f"{folder / RECORD} was edited, or it does not belong to the {WEIGHTS} beside it")
    if record["sha256"] != sha256(header.path):
        raise ValueError(f"{header.path} was changed after it was saved")
    plan = with_ties(dense_model, CutPlan.from_json(record["plan"]))
    compressed = record.get("compressed", {})
    header = expanded_header(header, compressed)
    _check_attributes(dense_model, plan)
    _check_tensors(dense_model, plan, header, record["ties"])
    _check_settings(dense_model, plan, record["settings"])
    apply_cut(dense_model, plan)
    with safetensors.safe_open(header.path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in header.shapes}
        for name, shape in compressed.items():
            state[name] = expand(state[name], file.get_tensor(bits_of(name)), shape)
    load_state(dense_model, state, record["ties"], versions=record.get("versions"))
    return dense_model.eval()


@refusing()
def read_cut_plan(directory: str | os.PathLike[str]) -> CutPlan:
    """What was cut out of the dense network, as `save_pruned` has noted it.

    Raises:
        ValueError: pruning.json is missing, damaged or edited.
    """
    path = Path(directory) / RECORD
    record = _read_record(path)
    if record["fingerprint"] != _fingerprint(record):
        raise ValueError(f"{path} was edited")
    return CutPlan.from_json(record["plan"])


def _settings(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What shapes do not tell: heads, and how convolutions move."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        counts = {key: getattr(module, key, None) for key in (*HEAD_NAMES, *GROUP_NAMES, *SIZE_NAMES)}
        own: dict[str, Any] = {key: value for key, value in counts.items() if type(value) is int}
        if isinstance(module, nn.modules.conv._ConvNd):
            own |= {key: json_data(getattr(module, key)) for key in ("stride", "padding", "dilation", "padding_mode")}
        if own and not isinstance(module, NoBranch):
            found[name] = own
    return found


def _check_settings(model: nn.Module, plan: CutPlan, saved: Mapping[str, Any]) -> None:
    here = {name: own for name, own in _settings(model).items() if not inside(name, plan.removed)}
    for name in [*here, *saved]:
        mine, other = here.get(name, {}), saved.get(name)
        for key in {**mine, **(other if isinstance(other, dict) else {})}:
            path = joined(name, key)
            value = plan.attributes.get(path, mine.get(key))
            if not isinstance(other, dict) or value != other.get(key):
                given = str(other.get(key) if isinstance(other, dict) else None)[:80]
                raise ValueError(f"the model does not fit the file: {path} is {value} here but {given} in the file")


def load_state(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    ties: Mapping[str, str],
    *,
    versions: Mapping[str, int] | None = None,
) -> None:
    """Load what `state_tensors` gave, strictly, with the versions of the layers' formats that a bare dict has lost.

    Args:
        versions: module name -> version of its format, of the network that was saved; None: as here.
    """
    state: Any = model.state_dict()  # carries the metadata that torchvision's MNASNet and BatchNorm ask for
    metadata = {name: dict(entry) for name, entry in getattr(state, "_metadata", {}).items()}
    if versions is not None:
        for name, entry in metadata.items():
            entry["version"] = versions.get(name)
    state = OrderedDict({**tensors, **{alias: tensors[name] for alias, name in ties.items() if name in tensors}})
    state._metadata = metadata
    model.load_state_dict(state, strict=True)


def _versions(model: nn.Module) -> dict[str, int]:
    state = getattr(model, "_orig_mod", model).state_dict()
    metadata: Mapping[str, Mapping[str, Any]] = getattr(state, "_metadata", {})
    return {name: entry["version"] for name, entry in metadata.items() if type(entry.get("version")) is int}


def _fingerprint(record: Mapping[str, Any]) -> str:
    """Ties the two files together: written into both, so that an edit or a mix of two runs shows."""
    keys = ("format", "version", "plan", "shapes", "settings", "ties", "versions", "compressed")
    kept = {key: record[key] for key in keys if key in record}  # older files have not all of them
    return sha256_of_json(kept)


def _read_record(path: Path) -> dict[str, Any]:
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != MODEL_FORMAT:
        raise ValueError(f"{path} is not the record of a pruned model")
    if record.get("version") != VERSION:
        raise ValueError(f"{path} has format version {record.get('version')!r}, this gsprune reads {VERSION}")
    missing = {"plan", "shapes", "settings", "ties", "fingerprint", "sha256"} - set(record)
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}")
    ties = record["ties"]
    if not isinstance(ties, dict) or not all(isinstance(name, str) for name in ties.values()):
        raise ValueError(f"{path}: 'ties' must map names to names")
    versions = record.get("versions", {})
    if not isinstance(versions, dict) or not all(type(version) is int for version in versions.values()):
        raise ValueError(f"{path}: 'versions' must map modules to whole numbers")
    if not isinstance(record["settings"], dict):
        raise ValueError(f"{path}: 'settings' must map modules to their settings")
    return record


def _check_attributes(model: nn.Module, plan: CutPlan) -> None:
    modules = dict(model.named_modules())
    for path, value in plan.attributes.items():
        if is_size(path):
            if module_of(path) not in modules:
                raise ValueError(f"the model does not fit the file: it has no module {module_of(path)!r}")
            continue
        try:
            old = getattr(*home_of(model, path))
        except ValueError:
            old = None
        length = old[0] if isinstance(old, tuple) and len(old) == 1 and path.endswith(SHAPE) else old
        least = 0 if path.endswith(ROW_NUMBERS) else 1
        if type(length) is not int or not least <= value <= length:
            raise ValueError(
                f"the model does not fit the file: {path} should become {value}, but here it is {str(old)[:80]}"
            )


def _check_tensors(model: nn.Module, plan: CutPlan, header: Header, ties: Mapping[str, str]) -> None:
    """Every tensor of the model, cut by the plan, must have the shape that the file holds, and none be left over."""
    state = model.state_dict()
    for path in plan.removed:
        if path not in dict(model.named_modules()) or not path:
            raise ValueError(f"the model does not fit the file: it has no module {path!r}")
    state = {name: tensor for name, tensor in state.items() if not inside(name, plan.removed)}
    unsaved = every_tensor(model)  # what is no part of a state_dict
    for name in [*plan.kept, *header.shapes, *ties]:
        if name not in state and not (name in plan.kept and name in unsaved):
            near = difflib.get_close_matches(name, state, n=1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise ValueError(f"the model does not fit the file: it has no tensor {name!r}{hint}")
    for name, tensor in state.items():
        saved = header.shapes.get(ties.get(name, name))
        if saved is None:
            raise ValueError(f"the model does not fit the file: its tensor {name!r} is not in {header.path}")
        if _cut_shape(name, list(tensor.shape), plan) != saved:
            cut = " after pruning" if plan.kept.get(name) else ""
            raise ValueError(
                f"the model does not fit the file: {name!r} has shape {list(tensor.shape)} in the model "
                f"but {saved} in the file{cut}"
            )


def _cut_shape(name: str, shape: list[int], plan: CutPlan) -> list[int]:
    for dim, kept in plan.kept.get(name, {}).items():
        size = plan.sizes[name][dim]
        if shape[dim : dim + 1] != [size]:
            raise ValueError(
                f"the model does not fit the file: {name!r} has shape {shape} in the model, "
                f"but the file was made from one with {size} in dimension {dim}"
            )
        shape[dim] = len(kept)
    return shape
