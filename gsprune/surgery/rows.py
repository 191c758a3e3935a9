"""Keeping some tokens of a vocabulary, or some classes of a classifier: rows of embeddings and heads, by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gsprune.structures.matrices import TABLES, is_conv1d
from gsprune.structures.twin import refuse_wrapped
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.cut_plan import CutPlan
from gsprune.surgery.optimizers import Optimizers

_COUNTS = ("vocab_size", "n_vocab", "num_labels", "num_classes")  # attributes that say how many rows there are
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "mask_token_id", "unk_token_id")


def cut_rows(
    model: nn.Module,
    names: str | Sequence[str],
    keep: Tensor | Sequence[int] | Sequence[bool],
    *,
    optimizer: Optimizers | None = None,
    drop_state: bool = False,
) -> CutPlan:
    """Keep some tokens of an embedding and its head, or some classes of a classifier; in place.

    Token (or class) number i of the smaller network is number kept[i] of the dense one, kept being `keep` in rising
    order: the caller translates ids (or labels) with `plan.kept`. A head that shares its weight with an embedding is
    cut with it, whichever is named; a pair that does not is named as two. What counts the rows goes along:
    `num_embeddings`, `out_features`, `vocab_size`, `num_labels`, and numbers of special tokens in the configuration,
    which is copied first.

    Args:
        model: its layers of these names must be what reads the tokens, or the last layer: nothing may read the rows.
        names: of layers (Linear, Embedding, EmbeddingBag, convolution of kernel size 1, transformers' Conv1D).
        keep: numbers of rows that stay, in any order, or a bool for each row.
        optimizer, drop_state: as of `gsprune.surgery.apply.apply_cut`.

    Returns:
        What stays of the dense network, for `gsprune.save_pruned`; of one that was cut before, `plan.after(first)`.

    Raises:
        ValueError: there is no such layer, or it is another kind; `keep` is empty, has another length or numbers
            outside 0 to rows - 1, or one twice; a special token or padding row does not stay.

    Example:
        >>> import gsprune
        >>> net = nn.Sequential(nn.Embedding(6, 2), nn.Linear(2, 6, bias=False))
        >>> net[1].weight = net[0].weight
        >>> with torch.no_grad():
        ...     before = net(torch.tensor([4]))[:, [1, 4]]
        >>> plan = gsprune.cut_rows(net, "1", keep=[4, 1])
        >>> net[0], plan.kept["1.weight"][0].tolist(), torch.allclose(net(torch.tensor([1])), before)
        (Embedding(2, 2), [1, 4], True)
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}: it must be a torch.nn.Module")
    refuse_wrapped(model)
    layers = {name: _layer(model, name) for name in ([names] if isinstance(names, str) else names)}
    if not layers:
        raise ValueError("names is empty: it must name the layers whose rows are kept")
    lengths = {name: int(layer.weight.shape[_rows(layer)]) for name, layer in layers.items()}
    length = next(iter(lengths.values()))
    for name, other in lengths.items():
        if other != length:
            raise ValueError(f"{next(iter(layers))!r} has {length} rows and {name!r} {other}: cut them one by one")
    kept = _checked(keep, length)
    cuts: dict[str, dict[int, Tensor]] = {}
    for name in dict.fromkeys([*layers, *_tied(model, [*layers.values()])]):
        layer: Any = model.get_submodule(name)
        cuts[f"{name}.weight".removeprefix(".")] = {_rows(layer): kept}
        if isinstance(getattr(layer, "bias", None), Tensor):
            cuts[f"{name}.bias".removeprefix(".")] = {0: kept}
    for name, buffer in model.named_buffers():
        if name.endswith("logits_bias") and buffer.shape[-1] == length:  # BART's
            cuts[name] = {buffer.dim() - 1: kept}
    sizes = {name: dict.fromkeys(mine, length) for name, mine in cuts.items()}
    plan = CutPlan(cuts, sizes, dict(_attributes(model, length, kept)))
    labels = _label_names(model, kept) if "config.num_labels" in plan.attributes else None
    apply_cut(model, plan, optimizer=optimizer, drop_state=drop_state)
    if labels is not None:
        config: Any = model.config
        config.id2label, config.label2id = labels, {label: i for i, label in labels.items()}
    return plan


def _layer(model: nn.Module, name: str) -> Any:
    found = dict(model.named_modules()).get(name)
    if found is None:
        raise ValueError(f"{type(model).__name__} has no layer {name!r}")
    kernel = getattr(found, "kernel_size", ())
    point = isinstance(found, nn.modules.conv._ConvNd) and not found.transposed and found.groups == 1
    if not (isinstance(found, (nn.Linear, *TABLES)) or is_conv1d(found) or (point and set(kernel) == {1})):
        raise ValueError(
            f"{name!r} is a {type(found).__name__}: rows are those of a Linear, an Embedding or a convolution of "
            f"kernel size 1"
        )
    if not isinstance(found._parameters.get("weight"), Tensor):
        raise ValueError(f"the weight of {name!r} is computed from other tensors: remove the parametrisation first")
    return found


def _rows(layer: nn.Module) -> int:
    """The dimension of its weight that has a place for each token or class."""
    return 1 if is_conv1d(layer) else 0


def _checked(keep: Tensor | Sequence[int] | Sequence[bool], length: int) -> Tensor:
    given = torch.as_tensor(keep).detach().cpu()
    if given.dtype == torch.bool:
        if given.shape != (length,):
            raise ValueError(f"keep has shape {tuple(given.shape)}: a bool for each of the {length} rows is needed")
        given = given.nonzero().flatten()
    if given.dim() != 1 or not len(given) or given.is_floating_point() or given.is_complex():
        raise ValueError("keep must list the numbers of the rows that stay, or have a bool for each row, and keep one")
    kept = given.long().sort().values
    if int(kept[0]) < 0 or int(kept[-1]) >= length:
        raise ValueError(f"keep has numbers from {int(kept[0])} to {int(kept[-1])}: the rows are 0 to {length - 1}")
    if len(kept.unique()) != len(kept):  # type: ignore[no-untyped-call]
        raise ValueError("keep names a row twice")
    return kept


def _tied(model: nn.Module, layers: Sequence[Any]) -> Iterator[str]:
    """Layers that hold the same weights."""
    weights = {id(layer.weight) for layer in layers}
    for name, module in model.named_modules():
        if id(module._parameters.get("weight")) in weights:
            yield name


def _attributes(model: nn.Module, length: int, kept: Tensor) -> Iterator[tuple[str, int]]:
    """What counts the rows, and numbers of rows that mean something."""
    place = {old: new for new, old in enumerate(kept.tolist())}

    def moved(name: str, row: int) -> tuple[str, int]:
        if row not in place:
            raise ValueError(f"{name} is {row}, which keep leaves out: keep it, or set {name} to None first")
        return name, place[row]

    counted = False
    for path, module in model.named_modules():
        start = f"{path}." if path else ""
        for name in _COUNTS:
            if vars(module).get(name) == length and type(vars(module)[name]) is int:
                counted |= name == "vocab_size"
                yield f"{start}{name}", len(kept)
        if isinstance(module, TABLES) and module.padding_idx is not None and len(module.weight) == length:
            yield moved(f"{start}padding_idx", module.padding_idx)
    for home in ("config", "generation_config"):
        config = getattr(model, home, None)
        for name in _COUNTS if config is not None else ():
            if getattr(config, name, None) == length and type(getattr(config, name)) is int:
                counted |= name == "vocab_size"
                yield f"{home}.{name}", len(kept)
    for home in ("config", "generation_config") if counted else ():
        for name in _TOKENS:
            value = getattr(getattr(model, home, None), name, None)
            if isinstance(value, list | tuple):
                raise ValueError(f"{home}.{name} is {value!r}: set it to one number first, which is then kept")
            if type(value) is int and 0 <= value < length:
                yield moved(f"{home}.{name}", value)


def _label_names(model: Any, kept: Tensor) -> dict[int, str]:
    before = model.config.id2label
    return {new: before.get(old, f"LABEL_{old}") for new, old in enumerate(kept.tolist())}
