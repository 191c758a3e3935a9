"""Masks on disk: 1 bit a weight."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping

import numpy as np
import safetensors
import torch
from torch import Tensor

from gsprune.files.disk import refusing
from gsprune.formats.tensors import VERSION, Header, read_header, save_tensors

MASK_FORMAT = "gsprune-masks"


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
    save_tensors(path, packed, metadata)


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


def _mask_shapes(header: Header) -> dict[str, list[int]]:
    try:
        shapes = json.loads(header.metadata.get("shapes", ""))
    except (ValueError, RecursionError):
        shapes = None
    if not isinstance(shapes, dict) or set(shapes) != set(header.shapes):
        raise ValueError(f"{header.path}: its metadata does not list the shape of each mask in it")
    for name, shape in shapes.items():
        if not is_shape(shape):
            raise ValueError(f"{header.path}: mask {name!r} has the impossible shape {str(shape)[:80]}")
        wanted = [(math.prod(shape) + 7) // 8]
        if header.dtypes[name] != "U8" or header.shapes[name] != wanted:
            raise ValueError(
                f"{header.path}: mask {name!r} of shape {shape} needs {wanted[0]} bytes, "
                f"but the file holds {header.dtypes[name]} of shape {header.shapes[name]}"
            )
    return shapes


def is_shape(shape: object) -> bool:
    if not isinstance(shape, list) or len(shape) > 32:  # numpy < 2 takes 32 axes
        return False
    if not all(type(size) is int and size >= 0 for size in shape):
        return False
    return int(math.prod(max(size, 1) for size in shape)) < 2**48  # a zero must not hide an overflow
