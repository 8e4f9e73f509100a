# SPDX-License-Identifier: Apache-2.0
"""KV tensors of every layout, over numpy memory, and what a geometry says about them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvbm.transfer.geometry import KvGeometry


class ArrayTensor:
    """The few methods of a tensor that a geometry looks at, over a numpy array."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array
        self.shape = array.shape
        self.dtype = array.dtype

    def stride(self) -> tuple[int, ...]:
        return tuple(stride // self.array.itemsize for stride in self.array.strides)

    def element_size(self) -> int:
        return self.array.itemsize

    def data_ptr(self) -> int:
        return self.array.ctypes.data


def numbered(
    shape: Sequence[int], order: Sequence[int] | None = None, start: int = 0
) -> ArrayTensor:
    """Return a tensor whose elements are numbered, its axes in memory in this order.

    ``order[0]`` is the outermost axis in memory; by default the tensor is contiguous.
    """
    order = tuple(order if order is not None else range(len(shape)))
    memory = np.arange(start, start + int(np.prod(shape)), dtype=np.int32)
    physical = memory.reshape([shape[axis] for axis in order])
    return ArrayTensor(physical.transpose(np.argsort(order)))


def block_bytes(geometry: KvGeometry, block: int) -> list[bytes]:
    """Return the bytes at a device block's address in each region."""
    return [
        ctypes.string_at(
            region.base_address + block * region.block_stride_bytes, region.chunk_bytes
        )
        for region in geometry.regions
    ]


def block_numbers(geometry: KvGeometry, block: int) -> list[int]:
    """Return the elements of a block, in the order of its bytes."""
    return np.frombuffer(b"".join(block_bytes(geometry, block)), np.int32).tolist()


def expected_numbers(tensor: ArrayTensor, axis: int, block: int, num_blocks: int) -> list[int]:
    """Return the sorted elements that belong to a block."""
    kernel_blocks = tensor.shape[axis] // num_blocks
    index = range(block * kernel_blocks, (block + 1) * kernel_blocks)
    return sorted(tensor.array.take(index, axis=axis).ravel().tolist())
