"""What a run leaves on the disk and reads back: masks, scores, and the smaller model. Nothing is ever unpickled.

Files are data from strangers: names, shapes and sizes are checked before anything is allocated or changed,
and every fault is a ValueError of one sentence. Imports torch, numpy, safetensors,
gsprune.attention and gsprune.files; shrink.py and structures.py only to load.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import safetensors
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from gsprune.attention import GROUP_NAMES, HEAD_NAMES, SIZE_NAMES
from gsprune.files import aside, plain, read_json, refusing, sha256, write_atomic, write_json

if TYPE_CHECKING:
    from gsprune.shrink import Plan

__all__ = [
    "SavedScores",
    "load_masks",
    "load_pruned",
    "load_scores",
    "read_plan",
    "save_masks",
    "save_pruned",
    "save_scores",
    "write_atomic",
    "write_json",
]

MASK_FORMAT = "gsprune-masks"
SCORE_FORMAT = "gsprune-scores"
MODEL_FORMAT = "gsprune-pruned-model"
VERSION = 1
WEIGHTS = "model.safetensors"
RECORD = "pruning.json"
MAX_HEADER = 16_000_000  # bytes of a safetensors file's JSON, which becomes 25 times as many: some 100,000 tensors


# --- masks: 1 bit a weight ---------------------------------------------------------------------------------


def save_masks(path: str | os.PathLike[str], masks: Mapping[str, Tensor]) -> None:
    """Write bool tensors of any shape at 1 bit an element; their shapes go to the file's metadata.

    Bits are packed in row-major order, the first element in the highest bit; the last byte is filled with zeros.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> save_masks(folder.name + "/masks.safetensors", {"w": torch.tensor([[True, False], [True, True]])})
    >>> load_masks(folder.name + "/masks.safetensors")["w"].tolist()
    [[True, False], [True, True]]
    """
    packed = {}
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise ValueError(f"mask {name!r} is {mask.dtype}, but masks are torch.bool")
        packed[name] = torch.from_numpy(np.packbits(mask.detach().cpu().numpy().reshape(-1)))
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    metadata = {"format": MASK_FORMAT, "version": str(VERSION), "shapes": json.dumps(shapes)}
    _save_tensors(path, packed, metadata)


@refusing()
def load_masks(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read what `save_masks` wrote; ValueError when the file is anything else."""
    header = read_header(path, MASK_FORMAT)
    shapes = _mask_shapes(header)
    masks = {}
    with safetensors.safe_open(header.path, framework="np") as file:
        for name, shape in shapes.items():
            bits, count = file.get_tensor(name), math.prod(shape)
            if count % 8 and int(bits[-1]) & (0xFF >> count % 8):
                raise ValueError(f"{path}: mask {name!r} has bits set beyond its last element")
            kept = np.unpackbits(bits, count=count).astype(bool).reshape(shape)
            masks[name] = torch.from_numpy(kept)
    return masks


def _mask_shapes(header: _Header) -> dict[str, list[int]]:
    try:
        shapes = json.loads(header.metadata.get("shapes", ""))
    except (ValueError, RecursionError):
        shapes = None
    if not isinstance(shapes, dict) or set(shapes) != set(header.shapes):
        raise ValueError(f"{header.path}: its metadata does not list the shape of each mask in it")
    for name, shape in shapes.items():
        if not _is_shape(shape):
            raise ValueError(f"{header.path}: mask {name!r} has the impossible shape {str(shape)[:80]}")
        wanted = [(math.prod(shape) + 7) // 8]
        if header.dtypes[name] != "U8" or header.shapes[name] != wanted:
            raise ValueError(
                f"{header.path}: mask {name!r} of shape {shape} needs {wanted[0]} bytes, "
                f"but the file holds {header.dtypes[name]} of shape {header.shapes[name]}"
            )
    return shapes


def _is_shape(shape: object) -> bool:
    if not isinstance(shape, list) or len(shape) > 32:  # numpy < 2 takes 32 axes
        return False
    if not all(type(size) is int and size >= 0 for size in shape):
        return False
    return int(math.prod(max(size, 1) for size in shape)) < 2**48  # a zero must not hide an overflow


# --- scores: what a pruner starts from -----------------------------------------------------------------------


class SavedScores(NamedTuple):
    """What `load_scores` reads: the tensors, the class name of the criterion they are of, and its steps."""

    scores: dict[str, Tensor]
    criterion: str
    steps: int


def save_scores(path: str | os.PathLike[str], scores: Mapping[str, Tensor], *, criterion: str, steps: int) -> None:
    """Write the scores of `Pruner.scores()`: finite float32 tensors, 0 or more.

    Args:
        criterion: the class name of the criterion, as "Weighted"; of several "Abs+Weighted".
        steps: optimizer steps they were accumulated over.

    Raises:
        ValueError: a score of another type, or a value that no score can have.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = folder.name + "/scores.safetensors"
    >>> save_scores(path, {"w": torch.tensor([0.5, 0.0])}, criterion="Elementwise", steps=44)
    >>> load_scores(path)
    SavedScores(scores={'w': tensor([0.5000, 0.0000])}, criterion='Elementwise', steps=44)
    """
    metadata = {"format": SCORE_FORMAT, "version": str(VERSION), "criterion": criterion, "steps": str(steps)}
    _score_origin("the scores to be saved", metadata)
    for name, score in scores.items():
        if score.dtype != torch.float32:
            raise ValueError(f"score {name!r} is {score.dtype}, but scores are torch.float32")
        if not bool((score.isfinite() & (score >= 0)).all()):
            raise ValueError(f"score {name!r} holds a value that is negative or not finite")
    tensors = {
        name: score.detach().cpu().clone(memory_format=torch.contiguous_format) for name, score in scores.items()
    }
    _save_tensors(path, tensors, metadata)


@refusing()
def load_scores(path: str | os.PathLike[str]) -> SavedScores:
    """Read what `save_scores` wrote; ValueError when the file is anything else.

    The values are as the file has them: `Pruner.load_scores` refuses those that no score can have.
    """
    header = read_header(path, SCORE_FORMAT)
    criterion, steps = _score_origin(str(header.path), header.metadata)
    for name, shape in header.shapes.items():
        if header.dtypes[name] != "F32":
            raise ValueError(f"{header.path}: score {name!r} is {header.dtypes[name]}, but scores are F32")
        if not _is_shape(shape):
            raise ValueError(f"{header.path}: score {name!r} has the impossible shape {str(shape)[:80]}")
    with safetensors.safe_open(header.path, framework="pt") as file:
        scores = {name: file.get_tensor(name) for name in header.shapes}
    return SavedScores(scores, criterion, steps)


def _score_origin(where: str, metadata: Mapping[str, str]) -> tuple[str, int]:
    criterion, steps = metadata.get("criterion", ""), metadata.get("steps", "")
    if len(criterion) > 1000 or not all(name.isidentifier() for name in criterion.split("+")):
        raise ValueError(
            f"{where}: the criterion is {criterion[:80]!r}: it must be the name of a class, or some with +"
        )
    if not (steps.isascii() and steps.isdecimal() and len(steps) < 16):
        raise ValueError(f"{where}: the number of steps is {steps[:80]!r}: it must be 0 or more")
    return criterion, int(steps)


# --- the smaller model -------------------------------------------------------------------------------------


def save_pruned(
    directory: str | os.PathLike[str],
    model: nn.Module,
    plan: Plan | None,
    *,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a pruned model as model.safetensors and pruning.json, from which `load_pruned` rebuilds it.

    Tied tensors are stored once. What transformers calls a model's configuration stays that of the dense network, so
    its own `save_pretrained` leaves files that its `from_pretrained` cannot read: this is the way to save.

    Args:
        directory: where to; made if it is not there.
        model: as the plan has left it.
        plan: what stays of the dense network (`Pruner.plan`); None where single weights are pruned and nothing is cut.
            Of a model that was pruned before, loaded and pruned again, `plan.after(read_plan(first_directory))`.
        extra: put into pruning.json as it is (it must fit into JSON).

    Raises:
        ValueError: the state holds something that is no tensor.
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
    mark = _fingerprint(record)
    metadata = {"format": MODEL_FORMAT, "version": str(VERSION), "fingerprint": mark}
    weights = Path(directory) / WEIGHTS
    _save_tensors(weights, tensors, metadata)
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
    from gsprune.shrink import Plan, apply_plan
    from gsprune.structures import refuse_wrapped

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
    plan = Plan.from_json(record["plan"])
    _check_attributes(dense_model, plan)
    _check_tensors(dense_model, plan, header, record["ties"])
    _check_settings(dense_model, plan, record["settings"])
    apply_plan(dense_model, plan)
    with safetensors.safe_open(header.path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in header.shapes}
    load_state(dense_model, state, record["ties"], versions=record.get("versions"))
    return dense_model.eval()


@refusing()
def read_plan(directory: str | os.PathLike[str]) -> Plan:
    """What was cut out of the dense network, as `save_pruned` has noted it.

    Raises:
        ValueError: pruning.json is missing, damaged or edited.
    """
    from gsprune.shrink import Plan

    path = Path(directory) / RECORD
    record = _read_record(path)
    if record["fingerprint"] != _fingerprint(record):
        raise ValueError(f"{path} was edited")
    return Plan.from_json(record["plan"])


def _settings(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What shapes do not tell: heads, and how convolutions move."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        counts = {key: getattr(module, key, None) for key in (*HEAD_NAMES, *GROUP_NAMES, *SIZE_NAMES)}
        own: dict[str, Any] = {key: value for key, value in counts.items() if type(value) is int}
        if isinstance(module, nn.modules.conv._ConvNd):
            own |= {key: plain(getattr(module, key)) for key in ("stride", "padding", "dilation", "padding_mode")}
        if own:
            found[name] = own
    return found


def _check_settings(model: nn.Module, plan: Plan, saved: Mapping[str, Any]) -> None:
    here = _settings(model)
    for name in [*here, *saved]:
        mine, other = here.get(name, {}), saved.get(name)
        for key in {**mine, **(other if isinstance(other, dict) else {})}:
            path = f"{name}.{key}" if name else key
            value = plan.attributes.get(path, mine.get(key))
            if not isinstance(other, dict) or value != other.get(key):
                given = str(other.get(key) if isinstance(other, dict) else None)[:80]
                raise ValueError(f"the model does not fit the file: {path} is {value} here but {given} in the file")


def state_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of `model.state_dict()`, contiguous on the CPU, each stored once; and the names tied to them.

    >>> layer = torch.nn.Linear(2, 2, bias=False)
    >>> model = torch.nn.ModuleDict({"a": layer, "b": layer})
    >>> tensors, ties = state_tensors(model)
    >>> list(tensors), ties
    (['a.weight'], {'b.weight': 'a.weight'})
    """
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, tensor in getattr(model, "_orig_mod", model).state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name!r} in the model's state is a {type(tensor).__name__}, not a tensor")
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and first.setdefault(place, name) != name:
            ties[name] = first[place]
            continue
        own = tensor.detach().cpu().contiguous()
        shares = own.untyped_storage().nbytes() != own.nbytes  # a view: the format refuses shared memory
        tensors[name] = own.clone() if shares else own
    return tensors, ties


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
    keys = ("format", "version", "plan", "shapes", "settings", "ties", "versions")
    kept = {key: record[key] for key in keys if key in record}  # older files have no versions
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


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


def _check_attributes(model: nn.Module, plan: Plan) -> None:
    modules = dict(model.named_modules())
    for path, value in plan.attributes.items():
        owner, _, attribute = path.rpartition(".")
        old = getattr(modules.get(owner), attribute, None)
        if type(old) is not int or not 0 < value <= old:
            raise ValueError(
                f"the model does not fit the file: {path} should become {value}, but here it is {str(old)[:80]}"
            )


def _check_tensors(model: nn.Module, plan: Plan, header: _Header, ties: Mapping[str, str]) -> None:
    """Every tensor of the model, cut by the plan, must have the shape that the file holds, and none be left over."""
    state = model.state_dict()
    for name in [*plan.kept, *header.shapes, *ties]:
        if name not in state:
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


def _cut_shape(name: str, shape: list[int], plan: Plan) -> list[int]:
    for dim, kept in plan.kept.get(name, {}).items():
        size = plan.sizes[name][dim]
        if shape[dim : dim + 1] != [size]:
            raise ValueError(
                f"the model does not fit the file: {name!r} has shape {shape} in the model, "
                f"but the file was made from one with {size} in dimension {dim}"
            )
        shape[dim] = len(kept)
    return shape


# --- safetensors -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Header:
    path: Path
    metadata: Mapping[str, str]
    shapes: Mapping[str, list[int]]
    dtypes: Mapping[str, str]


def _save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    with aside(path) as temporary:
        write_tensors(temporary, tensors, metadata)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """`save_file`, whose faults of the disk come in a class of their own, with an OSError for them.

    Equal tensors are equal files to the last byte: the library writes metadata in an order that changes.
    """
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length  # it was compact already
        file.seek(8)
        file.write(text.ljust(length))


def read_header(path: str | os.PathLike[str], wanted: str) -> _Header:
    """Names, shapes and metadata, after checking that the file is whole and of the wanted format."""
    path = Path(path)
    table = _read_table(path)
    metadata = table.pop("__metadata__", {})
    try:
        with safetensors.safe_open(path, framework="np") as file:  # maps the file, allocates nothing
            names = list(file.keys())
    except Exception as error:  # SafetensorError derives from Exception only
        raise ValueError(f"{path} is a damaged safetensors file ({error})") from None
    if not isinstance(metadata, dict) or metadata.get("format") != wanted:
        raise ValueError(f"{path} is a safetensors file, but not of the format {wanted!r}")
    if metadata.get("version") != str(VERSION):
        raise ValueError(f"{path} has format version {metadata.get('version')!r}, this gsprune reads {VERSION}")
    shapes = {name: list(table[name]["shape"]) for name in names}
    return _Header(path, metadata, shapes, {name: str(table[name]["dtype"]) for name in names})


def _read_table(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if size > 8 and length <= MAX_HEADER else b""
    if not text.startswith(b"{"):
        raise ValueError(f"{path} is not a safetensors file")
    if len(text) < length:
        raise ValueError(f"{path} is truncated: its header has {length} bytes, the file {size}")
    try:
        table = json.loads(text)
        data = max((entry["data_offsets"][1] for key, entry in table.items() if key != "__metadata__"), default=0)
        short = 8 + length + data > size
    except (ValueError, RecursionError, TypeError, KeyError, IndexError, AttributeError):
        raise ValueError(f"{path} is not a safetensors file: its header cannot be read") from None
    if short:
        raise ValueError(f"{path} is truncated: {8 + length + data} bytes expected, {size} found")
    assert isinstance(table, dict)
    return table
