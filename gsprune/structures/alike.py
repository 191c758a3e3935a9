"""Which structures are alike, and may be ranked together without one kind of layer starving another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from gsprune.structures.structure import Structure
from gsprune.structures.twin import every_tensor


def alike(model: nn.Module, structures: Sequence[Structure]) -> list[list[int]]:
    """Sets of structures whose units have the same kind, and are made and read by layers of the same kinds.

    Widths do not matter: what counts are the tensors of a structure, each by its side (made by, read by, norm), the
    dimension that is cut, how many dimensions it has and the size of its kernel. So in a ResNet the inner channels of
    all blocks are one set, each stage's residual stream is another, and a depthwise structure is not like a plain one.

    Returns:
        Numbers of the structures of each set, in their order.

    Source: Fang et al., "Isomorphic pruning for vision models", 2024.

    Example:
        >>> import torch
        >>> from gsprune.discovery.find import find_structures
        >>> layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU()]
        >>> net = nn.Sequential(*layers, nn.Conv2d(4, 2, 1))
        >>> alike(net, find_structures(net, torch.zeros(1, 3, 8, 8)).structures)
        [[0, 1], [2]]
    """
    tensors = every_tensor(model, every_name=True)

    def parts(structure: Structure) -> Iterator[tuple[object, ...]]:
        for side in ("producers", "consumers", "norms"):
            for member in getattr(structure, side):
                shape = tensors[member.tensor].shape
                yield side, member.dim, len(shape), *shape[2:]

    found: dict[object, list[int]] = {}
    for number, structure in enumerate(structures):
        found.setdefault((structure.kind, *sorted(parts(structure))), []).append(number)
    return [*found.values()]
