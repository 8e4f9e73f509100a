# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of a pool's blocks are, and how they are shown to other libraries.

A block is ``[num_layers, outer_dim, page_size, inner_dim]`` elements in one piece, as upstream's
`BlockManager` lays it out (``outer_dim`` is 2 for keys and values, 1 for MLA; ``inner_dim`` is
heads times head size). Nothing here copies.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from kvbm._fast.dlpack import DEVICE_CPU, DEVICE_CUDA, DEVICE_CUDA_HOST
from kvbm._fast.objects import open_object
from kvbm.errors import ConfigError
from kvbm.transfer.arena_layout import ArenaLayout

__all__ = ["BlockMemory", "BlockShape", "ElementType", "device_memory", "element_type", "map_arena"]

DEFAULT_DTYPE = "fp16"


class ElementType(NamedTuple):
    """An element type: upstream's name, bytes, and DLPack's type code.

    FP8 is shown as unsigned bytes: DLPack had no code for it when upstream decided so.
    """

    name: str
    bytes: int
    dlpack_code: int

    @property
    def dlpack(self) -> tuple[int, int]:
        """DLPack's type code and bits."""
        return self.dlpack_code, 8 * self.bytes


_SIGNED, _UNSIGNED, _FLOAT, _BFLOAT = 0, 1, 2, 4
_TYPES = {
    kind.name: kind
    for kind in (
        ElementType("fp8", 1, _UNSIGNED),
        ElementType("fp16", 2, _FLOAT),
        ElementType("bf16", 2, _BFLOAT),
        ElementType("fp32", 4, _FLOAT),
        ElementType("fp64", 8, _FLOAT),
        ElementType("u8", 1, _UNSIGNED),
        ElementType("u16", 2, _UNSIGNED),
        ElementType("u32", 4, _UNSIGNED),
        ElementType("u64", 8, _UNSIGNED),
        ElementType("i8", 1, _SIGNED),
        ElementType("i16", 2, _SIGNED),
        ElementType("i32", 4, _SIGNED),
        ElementType("i64", 8, _SIGNED),
    )
}


def element_type(dtype: str | None) -> ElementType:
    """Return the element type of a name, in any case; None is ``fp16``.

    Raises
    ------
    ConfigError
        There is no such type.
    """
    name = DEFAULT_DTYPE if dtype is None else dtype
    found = _TYPES.get(name.lower())
    if found is None:
        raise ConfigError(f"dtype={dtype!r} is not valid (allowed: {', '.join(_TYPES)})")
    return found


@dataclass(frozen=True)
class BlockShape:
    """Shape of a block.

    Attributes
    ----------
    num_layer, outer_dim, page_size, inner_dim : int
        Sizes of the axes, each 1 or more.
    element : ElementType
        What the elements are.

    Raises
    ------
    ConfigError
        A size is not allowed.
    """

    num_layer: int
    outer_dim: int
    page_size: int
    inner_dim: int
    element: ElementType

    def __post_init__(self) -> None:
        for name in ("num_layer", "outer_dim", "page_size", "inner_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not valid (allowed: 1 or more)")

    @property
    def axes(self) -> tuple[int, int, int, int]:
        """Layers, outer dimension, tokens, inner dimension."""
        return self.num_layer, self.outer_dim, self.page_size, self.inner_dim

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer of a block."""
        return self.outer_dim * self.page_size * self.inner_dim * self.element.bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.num_layer * self.layer_bytes


@dataclass(frozen=True)
class BlockMemory:
    """Memory of a pool: block after block, wherever `offset` says.

    Attributes
    ----------
    shape : BlockShape
        Of each block.
    address : int
        Of the first byte.
    owner : object
        Keeps the memory alive.
    dlpack_device : tuple of int
        What `__dlpack_device__` of a block says: pinned host memory (3, 0), or CUDA (2, number).
    capsule_device : tuple of int
        What the capsule itself says; consumers know host memory as CPU (1, 0).
    layout : ArenaLayout or None
        Of a host arena; None for blocks one after the other.
    """

    shape: BlockShape
    address: int
    owner: object
    dlpack_device: tuple[int, int]
    capsule_device: tuple[int, int]
    layout: ArenaLayout | None = None

    def block_address(self, block_id: int) -> int:
        """Address of the first byte of a block."""
        if self.layout is None:
            return self.address + block_id * self.shape.block_bytes
        return self.address + self.layout.offset(block_id, 0)

    def layer_address(self, block_id: int, layer: int) -> int:
        """Address of the first byte of a layer of a block."""
        return self.block_address(block_id) + layer * self.shape.layer_bytes


def map_arena(name: str, layout: ArenaLayout, shape: BlockShape) -> BlockMemory:
    """Map a host arena whose slots are whole blocks; it stays mapped while somebody shows it."""
    fd = open_object(name, trusted=False)  # the caller has it open: it has been checked
    try:
        view = np.frombuffer(mmap.mmap(fd, layout.total_bytes), dtype=np.uint8)
    finally:
        os.close(fd)
    return BlockMemory(
        shape, view.ctypes.data, view, (DEVICE_CUDA_HOST, 0), (DEVICE_CPU, 0), layout
    )


def device_memory(tensor: Any, shape: BlockShape, device_id: int) -> BlockMemory:
    """Show a tensor ``[blocks, layers, outer, tokens, inner]`` as the blocks of a device pool."""
    on_gpu = tensor.device.type == "cuda"
    device = (DEVICE_CUDA, device_id) if on_gpu else (DEVICE_CPU, 0)
    return BlockMemory(shape, tensor.data_ptr(), tensor, device, device)
