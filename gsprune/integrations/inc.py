"""Converts configuration files of Intel Neural Compressor (1.x and 2.x), "the ancestor" here, into pruners.

Such a file is untrusted: the loader knows plain YAML and `!Pruner` and nothing else, and nothing in the file is run or
built. `gsprune convert head_conf.yaml > conf/pruner/mine.yaml` writes an option of the group `pruner`.

The fields of a `!Pruner` become (notes of the result name those left out, and why):

    prune_type gradient_sensitivity     criterion Elementwise with decay 1, the ancestor's plain sum
      with importance_metric            Abs (abs_gradient) or Weighted (weighted_gradient), decay 1, whole units
    prune_type basic_magnitude          criterion Magnitude
    names                               include; of units without .weight and .bias, as modules
    target                              keep: the number of heads, neurons or channels that stay in each layer
    stride, importance_inputs, names    which of the three: heads with a head mask, or with a stride in attention
                                        layers; channels in modules called conv...; neurons otherwise
    transpose true                      no pruner: the consumers of a unit are found in the model, and cut with it
    initial_sparsity, target_sparsity, start_epoch, end_epoch, update_frequency
                                        target_sparsity and schedule Linear; of units OneShot, an epoch after
                                        start_epoch
    pattern tile_pattern_4x1            pattern "4x1"
    method per_channel                  per_channel
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsprune.files.disk import refusing
from gsprune.schedules import Linear, OneShot
from gsprune.text.display import one_line, quoted
from gsprune.text.names import did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from gsprune.pruner.pruner import Pruner

__all__ = ["IncConfig", "load_inc_config"]

Fields = Mapping[str, Any]
_MAX_BYTES = 64 * 1024  # the largest of the ancestor's own examples has 5 kB
_PLAIN_TAGS = ("null", "bool", "int", "float", "str", "seq")
_PRUNER_TAG = "!Pruner"
_MOST = 1_000_000_000  # epochs or units: no real file has as many
_STEPS = "schedules here count in epochs"
_NEVER_READ = "the ancestor did not read it for this prune_type either"
# Field -> why it has no meaning here; None: it has one.
_ROOT: dict[str, str | None] = {
    "pruning": None,
    "model": "the model is given to the Pruner",
    "version": "it counts the releases of neural-compressor",
    "device": "pruning runs where the model is",
    "tuning": "nothing is tuned to an accuracy",
    "evaluation": "evaluation is the training loop's",
    "train": "training is the training loop's",
    "quantization": "nothing is quantised",
    "use_bf16": "precision is the training loop's",
    "mixed_precision": "precision is the training loop's",
    "graph_optimization": "no graph is rewritten",
    "optimization_level": "no graph is rewritten",
    "distillation": "nothing is distilled",
    "auto_distillation": "nothing is distilled",
    "nas": "no architecture is searched",
}
_PRUNING = {"approach": None, "train": "training is the training loop's"}
# The last two are refused by name.
_APPROACH = dict.fromkeys(("weight_compression", "weight_compression_pytorch", "weight_compression_v2"))
_SHARED: dict[str, str | None] = {  # fields of weight_compression and of a !Pruner
    **dict.fromkeys(("initial_sparsity", "target_sparsity", "start_epoch", "end_epoch", "update_frequency")),
    **dict.fromkeys(("prune_type", "pattern", "names")),
    "start_step": _STEPS,
    "end_step": _STEPS,
    "update_frequency_on_step": _STEPS,
    "prune_domain": _NEVER_READ,
    "sparsity_decay_type": _NEVER_READ,
    "extra_excluded_names": f"{_NEVER_READ} (the Pruner's exclude leaves names alone)",
}
_COMMON: dict[str, str | None] = {
    **_SHARED,
    "pruners": None,
    "excluded_names": f"{_NEVER_READ} (the Pruner's exclude leaves names alone)",
    "prune_layer_type": _NEVER_READ,
    "max_sparsity_ratio_per_layer": _NEVER_READ,
}
_PRUNER: dict[str, str | None] = {**_SHARED, "method": None, "parameters": None}
_PARAMETERS: dict[str, str | None] = {
    **dict.fromkeys(("target", "stride", "transpose", "normalize", "importance_inputs", "importance_metric")),
    "index": "it is a layer's row in the head mask, and there is none",
}
_DEFAULTS: dict[str, Any] = {  # the ancestor's
    "initial_sparsity": 0.0,
    "target_sparsity": 0.97,
    "start_epoch": 0,
    "end_epoch": 4,
    "update_frequency": 1.0,
    "prune_type": "basic_magnitude",
    "pattern": "tile_pattern_1x1",
    "names": None,
}
_OWN_ONLY = ("update_frequency", "prune_type", "pattern", "names")  # the ancestor read these in the !Pruner alone
_AT_ONCE = "units go all at once, after a whole epoch of scores"
_NOT_FOR_UNITS = {
    "initial_sparsity": _AT_ONCE,
    "target_sparsity": "target counts the units that are left",
    "end_epoch": _AT_ONCE,
    "update_frequency": _AT_ONCE,
    "pattern": "it is for single weights",
    "method": "it is for single weights",
}
_CRITERIA = {"gradient_sensitivity": "Elementwise", "basic_magnitude": "Magnitude"}
_METRICS = {"abs_gradient": "Abs", "weighted_gradient": "Weighted"}
_ELSEWHERE = {
    "pattern_lock": "it keeps the zeros of a model that is sparse already and prunes nothing",
    "group_lasso": "it adds a penalty to the loss",
    "snip_momentum": "it belongs to the later pruners, and is pruner=elementwise with pruner.criterion.decay=0.9",
}


@dataclass(frozen=True)
class IncConfig:
    """A converted file of the ancestor.

    Attributes:
        rules: one plain dict for each `gsprune.Rule`: `hydra.utils.instantiate` takes it.
        notes: a sentence for everything in the file that has no meaning here, or a different one.
    """

    rules: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]

    @property
    def pruners(self) -> tuple[dict[str, Any], ...]:
        """The former name of `rules`, for one release."""
        warnings.warn("IncConfig.pruners is called rules now", FutureWarning, stacklevel=2)
        return self.rules

    def build(self, model: nn.Module, **arguments: Any) -> Pruner:
        """The pruner of these rules.

        Args:
            model: what is pruned.
            arguments: the other arguments of `gsprune.Pruner` that no file knows: example_input, steps_per_epoch, ...

        Raises:
            ValueError: the model has no such names or units, or two rules prune the same.
        """
        from gsprune.pruner.pruner import Pruner

        return Pruner(model, rules=[_made(config) for config in self.rules], **arguments)

    def to_yaml(self) -> str:
        """A file for `conf/pruner/`, with the notes as comments: `python train.py pruner=<its name>` takes it."""
        import yaml

        notes = "".join(f"# {one_line(note)}\n" for note in self.notes)  # a second line would be no comment
        content = {"defaults": ["/gsprune_rules@_here_", "_self_"], "rules": [*self.rules]}
        return f"{notes}{yaml.safe_dump(content, sort_keys=False)}"


@refusing()
def load_inc_config(path: str | os.PathLike[str]) -> IncConfig:
    """Read the `!Pruner` list of a neural-compressor 1.x or 2.x YAML file as configurations of `gsprune.Pruner`.

    The file counts as written; a note says where the ancestor did something else with it.

    Args:
        path: the file, UTF-8, of 64 KiB at most; its list is pruning.approach.weight_compression.pruners.

    Raises:
        ValueError: not such a file, a tag other than `!Pruner`, an unknown field, or one without a counterpart here.

    Example:
        >>> import tempfile
        >>> text = '''
        ... pruning:
        ...   approach:
        ...     weight_compression:
        ...       pruners:
        ...         - !Pruner
        ...             prune_type: gradient_sensitivity
        ...             names: ['layer.*.attention.query.weight', 'layer.*.attention.query.bias']
        ...             parameters: {target: 8, importance_inputs: ['head_mask'], importance_metric: abs_gradient}
        ... '''
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "head_conf.yaml")
        ...     _ = file.write_text(text)
        ...     [rule] = load_inc_config(file).rules
        >>> rule["criterion"]["_target_"], rule["keep"], rule["include"]
        ('gsprune.criteria.Abs', {'heads': 8}, ['layer.*.attention.query'])
    """
    try:
        return _convert(_read(Path(path)))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None


# ---- reading


class _Tagged(dict[str, Any]):
    """The mapping under a `!Pruner`, and its first line."""

    line = 0


def _read(path: Path) -> object:
    """The content of the file: mappings, lists, strings and numbers."""
    import yaml

    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a file")  # reading a pipe would never end
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"it is larger than {_MAX_BYTES // 1024} KiB, which no such configuration is")
        loader = _loader_class()(data.decode("utf-8-sig"))
        content: object = loader.get_single_data()
        if _has_interpolation(content):
            raise ValueError("${ is refused: Hydra would resolve it, from the environment too; write the value itself")
        return content
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except yaml.reader.ReaderError as error:
        raise ValueError(f"it is not YAML ({error.reason})") from None
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"it is not valid YAML ({error.problem}{line})") from None


def _has_interpolation(content: object) -> bool:
    if isinstance(content, dict):
        return any(_has_interpolation(part) for pair in content.items() for part in pair)
    if isinstance(content, list):
        return any(map(_has_interpolation, content))
    return isinstance(content, str) and "${" in content


def _loader_class() -> Any:
    """A SafeLoader for plain YAML and `!Pruner`, independent of what is registered with SafeLoader itself."""
    import yaml

    def mapping(loader: Any, node: Any) -> dict[str, Any]:
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        keys = Counter(key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode))
        for key, times in keys.most_common(1):
            if times > 1:
                raise ValueError(f"{quoted(key)} occurs twice in the mapping of line {node.start_mark.line + 1}")
        fields: dict[str, Any] = loader.construct_mapping(node, deep=True)
        return fields

    def tagged(loader: Any, node: Any) -> _Tagged:
        fields = _Tagged(mapping(loader, node))
        fields.line = node.start_mark.line + 1
        return fields

    def refuse(_: Any, node: Any) -> None:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise ValueError(f"the tag {tag} in line {node.start_mark.line + 1} is refused: only {_PRUNER_TAG} is read")

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        yaml_constructors: dict[str | None, Callable[..., Any]] = {  # noqa: RUF012
            **{f"tag:yaml.org,2002:{tag}": getattr(yaml.SafeLoader, f"construct_yaml_{tag}") for tag in _PLAIN_TAGS},
            "tag:yaml.org,2002:timestamp": yaml.SafeLoader.construct_yaml_str,
            "tag:yaml.org,2002:map": mapping,
            _PRUNER_TAG: tagged,
            None: refuse,
        }
        yaml_multi_constructors: dict[str, Callable[..., Any]] = {}  # noqa: RUF012

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent):  # a few nested ones stand for gigabytes
                line = event.start_mark.line + 1
                raise ValueError(f"the alias in line {line} is refused: write what it stands for in its place")
            if event.tag not in (None, _PRUNER_TAG):
                refuse(self, event)
            return super().compose_node(parent, index)

    return Loader


# ---- converting


@dataclass(frozen=True)
class _Units:
    """A `!Pruner` of whole units."""

    where: str
    metric: str
    target: int
    stride: int | None
    transpose: bool
    names: tuple[str, ...]
    inputs: tuple[str, ...]
    start_epoch: float

    @property
    def units(self) -> tuple[Any, ...]:
        """Equal for `!Pruner`s that cut the same units."""
        return self.metric, self.inputs

    @property
    def same(self) -> tuple[Any, ...]:
        """Equal for those that also cut them alike."""
        return *self.units, self.target, self.stride, self.start_epoch


def _convert(content: object) -> IncConfig:
    notes: list[str] = []
    root = _section("the file", content, _ROOT, notes)
    pruning = _section("pruning", _within("the file", root, "pruning"), _PRUNING, notes)
    approach = _section("approach", _within("pruning", pruning, "approach"), _APPROACH, notes)
    for name in ("weight_compression_pytorch", "weight_compression_v2"):
        if name in approach:
            raise ValueError(f"{name} is not read: it counts in steps, and only weight_compression counts in epochs")
    common = _section("weight_compression", _within("approach", approach, "weight_compression"), _COMMON, notes)
    entries = common.get("pruners")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"weight_compression has no list of pruners, each a {_PRUNER_TAG}")
    found: list[dict[str, Any] | _Units] = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, _Tagged):
            raise ValueError(f"pruner {number} is not a {_PRUNER_TAG}")
        where = f"pruner {number} (line {entry.line})"
        found.append(_pruner(where, _section(where, entry, _PRUNER, notes), common, notes))
    return IncConfig(tuple(_merged(found, notes)), tuple(notes))


def _within(where: str, fields: Fields, field: str) -> object:
    if field not in fields:
        raise ValueError(f"{where} has no {field}: it must have pruning.approach.weight_compression.pruners")
    return fields[field]


def _section(where: str, content: object, known: Mapping[str, str | None], notes: list[str]) -> dict[str, Any]:
    """The fields of a mapping that are not null, with a note for each that has no meaning here."""
    if not isinstance(content, dict):
        what = "empty" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"{where} is {what}: it must be a mapping of fields")
    for field in content:
        if field not in known:
            raise ValueError(f"{where} has an unknown field {quoted(field)}{did_you_mean(field, known, cutoff=0)}")
    fields = {field: value for field, value in content.items() if value is not None}
    notes += [f"{where}: {field} has no meaning here: {why}" for field in fields if (why := known[field])]
    return fields


def _pruner(where: str, own: Fields, common: Fields, notes: list[str]) -> dict[str, Any] | _Units:
    prune_type = _checked(where, "prune_type", _inherited(where, "prune_type", own, common, notes), _WORD)
    if why := _ELSEWHERE.get(prune_type):
        raise ValueError(f"{where}: prune_type {prune_type!r} has no counterpart here: {why}")
    criterion = _one_of(where, "prune_type", prune_type, _CRITERIA)
    if criterion == "Elementwise" and "parameters" in own:
        return _units(where, own, common, notes)
    if "parameters" in own:
        notes.append(f"{where}: parameters have no meaning here: {prune_type} has none")
    return _weights(where, criterion, own, common, notes)


def _weights(where: str, criterion: str, own: Fields, common: Fields, notes: list[str]) -> dict[str, Any]:
    """A pruner of single weights."""
    numbers = {
        field: float(_checked(where, field, _inherited(where, field, own, common, notes), _NUMBER))
        for field in ("initial_sparsity", "target_sparsity", "start_epoch", "end_epoch", "update_frequency")
    }
    try:
        Linear(**numbers)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if numbers["update_frequency"] % 1:
        notes.append(
            f"{where}: update_frequency {numbers['update_frequency']:g} updates the masks that often here; the "
            f"ancestor did so at the beginning of epochs alone"
        )
    target_sparsity = numbers.pop("target_sparsity")
    names = _names(where, "names", _inherited(where, "names", own, common, notes))
    include = [name for name in names or ("*",) if not name.endswith(".bias")]
    if len(include) < len(names):
        notes.append(f"{where}: biases among the names are left alone, as the ancestor did")
    if not include:
        raise ValueError(f"{where}: names has nothing but biases, which are not pruned")
    if not names:
        notes.append(f"{where}: without names all linear and convolution weights are pruned, but not embeddings")
    method = _checked(where, "method", own.get("method", "per_tensor"), _WORD)
    per_channel = _one_of(where, "method", method, {"per_tensor": False, "per_channel": True})
    _note_stars(where, names, notes)
    pattern = _checked(where, "pattern", _inherited(where, "pattern", own, common, notes), _PATTERN)
    gradual = {"_target_": "gsprune.schedules.Linear", **numbers}
    score = {"decay": 1.0} if criterion == "Elementwise" else {}
    return _node(criterion, score, gradual, include) | {
        "target_sparsity": target_sparsity,
        "pattern": _TILE.sub(r"\1", pattern),
        "per_channel": per_channel,
        "structured": False,
    }


def _units(where: str, own: Fields, common: Fields, notes: list[str]) -> _Units:
    """A `!Pruner` of whole units, for `_merged`."""
    parameters = _section(f"{where}, parameters", own["parameters"], _PARAMETERS, notes)
    for field in ("target", "importance_metric", "importance_inputs"):
        if field not in parameters:
            raise ValueError(f"{where}: parameters has no {field}")
    metric = _checked(where, "importance_metric", parameters["importance_metric"], _WORD)
    criterion = _one_of(where, "importance_metric", metric, _METRICS)
    inputs = _names(where, "importance_inputs", parameters["importance_inputs"])
    if not (inputs == ("head_mask",) if criterion == "Abs" else inputs and "head_mask" not in inputs):
        wanted = "['head_mask']" if criterion == "Abs" else "names of weights and biases"
        raise ValueError(f"{where}: importance_inputs is {list(inputs)}: for {metric} it must be {wanted}")
    names = _names(where, "names", _inherited(where, "names", own, common, notes))
    if not names:
        raise ValueError(f"{where}: names is empty: whole units need the names of the tensors they live in")
    transpose = _checked(where, "transpose", parameters.get("transpose", False), _FLAG)
    normalize = _checked(where, "normalize", parameters.get("normalize", False), _FLAG)
    if not transpose:  # else it is part of another, and so are its other fields
        notes += [
            f"{where}: {field} has no meaning here: {_NOT_FOR_UNITS[field]}" for field in _NOT_FOR_UNITS if field in own
        ]
        if normalize:
            notes.append(
                f"{where}: normalize has no effect: each layer keeps the same count, whatever its scores are divided by"
            )
    start_epoch = float(_checked(where, "start_epoch", _inherited(where, "start_epoch", own, common, notes), _NUMBER))
    try:
        OneShot(start_epoch=start_epoch)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    stride = parameters.get("stride")
    return _Units(
        where,
        metric,
        target=_checked(where, "target", parameters["target"], _COUNT),
        stride=None if stride is None else _checked(where, "stride", stride, _COUNT),
        transpose=transpose,
        names=names,
        inputs=inputs,
        start_epoch=start_epoch,
    )


def _merged(found: Sequence[dict[str, Any] | _Units], notes: list[str]) -> Iterable[dict[str, Any]]:
    """One pruner for the `!Pruner`s of tensors with the same units, as the ancestor cut tensor by tensor."""
    rows = [entry for entry in found if isinstance(entry, _Units) and not entry.transpose]
    done: set[tuple[Any, ...]] = set()
    for entry in found:
        if not isinstance(entry, _Units):
            yield entry
        elif entry.transpose:
            _check_reader(entry, rows, notes)
        elif entry.same not in done:
            done.add(entry.same)
            together = [other for other in rows if other.same == entry.same]
            for other in together[1:]:
                notes.append(f"{other.where}: is part of {entry.where}, which cuts the same units")
            yield _unit_pruner(entry, [name for other in together for name in other.names], notes)


def _check_reader(reader: _Units, rows: Sequence[_Units], notes: list[str]) -> None:
    """Check that another `!Pruner` names the units whose columns this transposed one names: they are cut together."""
    partners = [other for other in rows if other.units == reader.units]
    if not partners:
        raise ValueError(
            f"{reader.where}: transpose names the readers of units, but no {_PRUNER_TAG} with transpose false, the "
            f"same importance_metric and the same importance_inputs names the units"
        )
    partner = next((other for other in partners if other.same == reader.same), None)
    if partner is None:
        other = partners[0]
        for field in ("target", "stride", "start_epoch"):
            here, there = getattr(reader, field), getattr(other, field)
            if here != there:
                raise ValueError(
                    f"{reader.where}: {field} is {here}, but {there} in {other.where}, which cuts the same units"
                )
    assert partner is not None
    notes.append(f"{reader.where}: is part of {partner.where}: columns that read a unit are cut with it")


def _unit_pruner(entry: _Units, names: Sequence[str], notes: list[str]) -> dict[str, Any]:
    modules = [name.removesuffix(".weight").removesuffix(".bias") for name in names]
    parts = [part.lower() for module in modules for part in module.split(".")]
    attention = any("attention" in part or "attn" in part for part in parts)
    stride = entry.stride or 1
    if entry.metric == "abs_gradient" or (attention and stride > 1):
        kind = "heads"
        if entry.stride is not None:
            notes.append(f"{entry.where}: stride {stride} is not needed: the size of a head is read off the model")
    else:
        kind = "channels" if any("conv" in part for part in parts) else "neurons"
        if stride != 1:
            raise ValueError(
                f"{entry.where}: stride is {stride}: {kind} are removed one by one here, set stride to 1 and target to "
                f"{entry.target * stride}"
            )
    if entry.metric == "weighted_gradient" and not set(entry.inputs) <= set(names):
        notes.append(
            f"{entry.where}: importance_inputs are not all among the names: here all rows of a unit are scored"
        )
    _note_stars(entry.where, names, notes)
    at_once = {"_target_": "gsprune.schedules.OneShot", "start_epoch": entry.start_epoch + 1}
    score = {"decay": 1.0, "normalize": False}
    return _node(_METRICS[entry.metric], score, at_once, list(dict.fromkeys(modules))) | {
        "keep": {kind: entry.target},
        "structured": True,
    }


def _node(criterion: str, score: Fields, schedule: Fields, include: Sequence[str]) -> dict[str, Any]:
    """What every pruner of the ancestor's has: each tensor or layer reaches the sparsity by itself."""
    return {
        "_target_": "gsprune.Rule",
        "criterion": {"_target_": f"gsprune.criteria.{criterion}", **score},
        "schedule": dict(schedule),
        "scope": "local",
        "include": [re.sub(r"[\[?]", r"[\g<0>]", name) for name in include],  # plain letters there, wildcards here
    }


def _made(node: Mapping[str, Any]) -> Any:
    """The rule, criterion or schedule that `_node` describes; Hydra would read what the file says."""
    module, _, name = node["_target_"].rpartition(".")
    fields = {key: value for key, value in node.items() if key != "_target_"}
    for key in ("criterion", "schedule"):
        if key in fields:
            fields[key] = _made(fields[key])
    return getattr(import_module(module), name)(**fields)


def _inherited(where: str, field: str, own: Fields, common: Fields, notes: list[str]) -> Any:
    """The field of the `!Pruner`, else that of weight_compression, else the ancestor's default."""
    if field in own:
        if own[field] == 0 and common.get(field):
            notes.append(
                f"{where}: {field} is 0 here as written; the ancestor took a 0 for none, and so the "
                f"{quoted(common[field])} of weight_compression"
            )
        return own[field]
    if field in common:
        if field in _OWN_ONLY:
            notes.append(f"{where}: {field} is that of weight_compression, which the ancestor did not read")
        return common[field]
    if field in ("target_sparsity", "end_epoch"):
        notes.append(f"{where}: {field} is {_DEFAULTS[field]}, the ancestor's default, as the file has none")
    return _DEFAULTS[field]


def _note_stars(where: str, names: Iterable[str], notes: list[str]) -> None:
    if any("*" in name for name in names):
        notes.append(f"{where}: * in names stands for any text here; the ancestor read it as the number of a layer")


# ---- single values


# What a field must be, and whether a value is that.
_Kind = tuple[str, Callable[[Any], bool]]
_NAMES: _Kind = ("a list of names", lambda x: isinstance(x, list) and all(isinstance(n, str) and n for n in x))
_NUMBER: _Kind = (f"a number, below {_MOST:,}", lambda x: type(x) in (int, float) and abs(x) < _MOST)
_COUNT: _Kind = ("a whole number, 1 or more", lambda x: type(x) is int and 1 <= x < _MOST)
_FLAG: _Kind = ("true or false", lambda x: isinstance(x, bool))
_WORD: _Kind = ("a word", lambda x: isinstance(x, str))
_TILE = re.compile(r"(?:tile_pattern_)?([1-9]\d*x[1-9]\d*)")
_PATTERN: _Kind = ("a tile such as 'tile_pattern_4x1'", lambda x: isinstance(x, str) and _TILE.fullmatch(x) is not None)


def _checked(where: str, field: str, value: Any, kind: _Kind) -> Any:
    what, fits = kind
    if not fits(value):
        raise ValueError(f"{where}: {field} is {quoted(value)}: it must be {what}")
    return value


def _names(where: str, field: str, value: Any) -> tuple[str, ...]:
    return () if value is None else tuple(_checked(where, field, value, _NAMES))


def _one_of(where: str, field: str, value: str, allowed: Mapping[str, Any]) -> Any:
    if value not in allowed:
        options = " or ".join(map(repr, allowed))
        raise ValueError(f"{where}: {field} is {quoted(value)}: it must be {options}{did_you_mean(value, allowed)}")
    return allowed[value]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gsprune convert", description="Print a file of Intel Neural Compressor as an option of the group pruner."
    )
    parser.add_argument("file", help="a neural-compressor 1.x or 2.x YAML file with a list of !Pruner")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """`gsprune convert FILE`: print the file as an option of the group `pruner`; 1 if it cannot be read."""
    try:
        print(load_inc_config(make_parser().parse_args(arguments).file).to_yaml(), end="")
    except (ValueError, OSError) as error:
        print(one_line(str(error), 4000), file=sys.stderr)
        return 1
    return 0
