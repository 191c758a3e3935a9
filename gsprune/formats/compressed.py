"""Sparse tensors in a file as what is not zero, and one bit an entry that says where."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gsprune.formats.masks import is_shape
from gsprune.formats.tensors import Header

__all__ = ["bits_of", "compress", "expand", "expanded_header"]

_BITS = ".bits"  # behind the name of a tensor: its mask, packed as in `gsprune.formats.masks`


def compress(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """What is stored in place of tensors, and the shapes of those that are stored as values and bits.

    A tensor is, where that is smaller: its entries that are not zero, in row-major order, and ceil(n / 8) bytes of mask
    for n entries. A negative zero, as masks leave behind, comes back as zero.

    >>> stored, shapes = compress({"w": torch.tensor([[0.0, 2.0], [0.0, 0.0]] * 9)})
    >>> stored["w"].tolist(), stored["w.bits"].tolist(), shapes
    ([2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0], [68, 68, 68, 68, 64], {'w': [18, 2]})
    """
    stored: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        kept = _not_zero(tensor)
        count = tensor.numel()
        if kept is None or int(kept.sum()) * tensor.element_size() + (count + 7) // 8 >= tensor.nbytes:
            stored[name] = tensor
            continue
        if name + _BITS in tensors:
            raise ValueError(
                f"the model has a tensor {name + _BITS!r}, whose name the compressed form of {name!r} needs"
            )
        stored[name] = tensor.flatten()[kept]
        stored[name + _BITS] = torch.from_numpy(np.packbits(kept.numpy()))
        shapes[name] = list(tensor.shape)
    return stored, shapes


def expand(values: Tensor, bits: Tensor, shape: list[int]) -> Tensor:
    """The tensor that `compress` took apart.

    Raises:
        ValueError: there are other numbers of values than of bits that are set.
    """
    count = math.prod(shape)
    kept = torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool))
    if int(kept.sum()) != len(values):
        raise ValueError(f"a compressed tensor of shape {shape} has {len(values)} values for {int(kept.sum())} bits")
    whole = values.new_zeros(count)
    whole[kept] = values
    return whole.reshape(shape)


def expanded_header(header: Header, compressed: Any) -> Header:
    """The header of the file with whole tensors in place of compressed ones.

    Raises:
        ValueError: what is said to be compressed is not in the file, or cannot have that shape.
    """
    if not isinstance(compressed, dict):
        raise ValueError(f"{header.path}: 'compressed' must map tensors to shapes")
    shapes = dict(header.shapes)
    for name, shape in compressed.items():
        bits, values = shapes.pop(name + _BITS, None), shapes.get(name)
        fits = is_shape(shape) and bits == [(math.prod(shape) + 7) // 8] and header.dtypes[name + _BITS] == "U8"
        if not fits or values is None or len(values) != 1 or values[0] > math.prod(shape):
            raise ValueError(f"{header.path}: {name!r} is no compressed tensor of shape {str(shape)[:80]}")
        shapes[name] = shape
    return replace(header, shapes=shapes)


def bits_of(name: str) -> str:
    """The name of a compressed tensor's mask in the file."""
    return name + _BITS


def _not_zero(tensor: Tensor) -> Tensor | None:
    """(n,) bool; None where a tensor has no entries that could be left out."""
    if tensor.dim() < 2 or not tensor.is_floating_point() or not tensor.numel():
        return None
    return tensor.flatten() != 0
