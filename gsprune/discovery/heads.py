"""What an attention's module says of its heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from gsprune.structures.attention import GROUP_NAMES, HEAD_NAMES, WIDTH_NAMES, reads
from gsprune.structures.structure import Member
from gsprune.text.names import joined


def head_attributes(
    model: nn.Module, rows: Sequence[Member], columns: Sequence[Member], width: int | None
) -> tuple[str, dict[str, int]]:
    """Name of the module that holds an attention's projections, and its attributes that count heads or their width.

    Args:
        width: of a head's values; a unit whose readers have several times that is a group of heads.
    """
    homes = list(dict.fromkeys(m.tensor.rpartition(".")[0] for m in rows))
    whole = isinstance(model.get_submodule(homes[0]), nn.MultiheadAttention) and len(homes) == 1
    name = homes[0] if whole else common_module(homes)
    (groups, size), total = columns[0].index.shape, columns[0].index.numel()
    heads = total // width if width and size % width == 0 else groups
    width = total // heads
    times = heads // groups
    found: dict[str, int] = {}
    for home in dict.fromkeys(above for leaf in homes for above in _from_to(leaf, name, whole)):
        module = model.get_submodule(home)
        found |= {joined(home, a): times for a in HEAD_NAMES if getattr(module, a, None) == heads}
        found |= {joined(home, a): width * times for a in WIDTH_NAMES if getattr(module, a, None) == heads * width}
        found |= {joined(home, a): 1 for a in GROUP_NAMES if getattr(module, a, None) == groups}
        config = getattr(module, "config", None)
        for names, count, amount in ((HEAD_NAMES, heads, times), (GROUP_NAMES, groups, 1)):
            # read first: a configuration of layers that differ does not give a number that its network does not read
            asked = [a for a in names if reads(module, "config", a) and getattr(config, a, None) == count]
            found |= {joined(home, f"config.{a}"): amount for a in asked}
    return name or ("in_proj" if whole else homes[0]), found


def _from_to(leaf: str, top: str, whole: bool) -> Iterator[str]:
    """The modules around a layer, up to the one that holds all of an attention (or of several that share a bias)."""
    path = leaf if whole else leaf.rpartition(".")[0]
    while len(path) > len(top):
        yield path
        path = path.rpartition(".")[0]
    yield top


def common_module(names: Sequence[str]) -> str:
    """The innermost module that holds all of these.

    >>> common_module(["a.attn.q", "a.attn.k"]), common_module(["q", "k"])
    ('a.attn', '')
    """
    parts = [name.split(".")[:-1] for name in names]
    common = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return ".".join(common)
