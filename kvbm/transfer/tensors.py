# SPDX-License-Identifier: Apache-2.0
"""Reading one KV tensor: which axis is the blocks, and what is contiguous inside a block.

Used by `kvbm.transfer.geometry`, which knows about layers and groups. A tensor that is not
understood is refused with a `GeometryError` that has its name, shape and strides and the number of
blocks.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

from kvbm.errors import GeometryError

__all__ = [
    "KvTensor",
    "LayerFormat",
    "Piece",
    "TensorReader",
    "checked",
    "dtype_name",
    "layer_order",
]

# A tensor that falls into more pieces is not a KV cache with its innermost axes side by side.
REGIONS_PER_TENSOR_MAX = 512
# 2,048 tokens a block over kernel blocks of 16 tokens are 128.
KERNEL_BLOCKS_MAX = 1024

_INTEGER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


class KvTensor(Protocol):
    """What is needed of a tensor; ``torch.Tensor`` has it."""

    shape: Sequence[int]

    def stride(self) -> Sequence[int]:
        """Strides in elements."""

    def element_size(self) -> int:
        """Size of an element in bytes."""

    def data_ptr(self) -> int:
        """Address of the first element."""


class _Axis(NamedTuple):
    """An axis of a tensor: number of entries, bytes from one to the next."""

    size: int
    stride: int


class Piece(NamedTuple):
    """A region before neighbours are joined; `position` is its place in layer order."""

    position: int
    layer: int
    name: str
    base: int
    block_stride: int
    chunk: int


class LayerFormat(NamedTuple):
    """What decides about the meaning of the bytes in a layer's chunks.

    `axes` has the axes inside a block in the order of the tensor, each with its stride inside the
    chunk, or -1 where each entry is a region of its own: distances between regions depend on the
    number of blocks and say nothing about the bytes.
    """

    dtype: str
    element_bytes: int
    axes: tuple[tuple[int, int], ...]


class TensorReader:
    """Reads the regions of one tensor."""

    def __init__(
        self, name: str, tensor: KvTensor, num_blocks: int, block_axis: int | None
    ) -> None:
        self.name = name
        self.tensor = tensor
        self.num_blocks = num_blocks
        self.element_bytes = tensor.element_size()
        self.shape = tuple(map(int, tensor.shape))
        self.strides = tuple(int(stride) * self.element_bytes for stride in tensor.stride())
        if 0 in self.shape or len(self.shape) < 2:
            raise self.refused("a KV cache has two axes or more, none of them empty")
        axis = self._given(block_axis) if block_axis is not None else self._found()
        kernel_blocks, rest = divmod(self.shape[axis], num_blocks)
        if rest or not 0 < kernel_blocks <= KERNEL_BLOCKS_MAX:
            raise self.refused(
                f"axis {axis} is not num_blocks times 1 to {KERNEL_BLOCKS_MAX} kernel blocks"
            )
        axes = [_Axis(*pair) for pair in zip(self.shape, self.strides, strict=True)]
        self.block = _Axis(num_blocks, axes[axis].stride * kernel_blocks)
        axes[axis] = _Axis(kernel_blocks, axes[axis].stride)
        self.axes = axes  # those inside a block, in the tensor's order
        self._check_nested()
        self.chunk, self.inside = self._contiguous()

    def refused(self, reason: str) -> GeometryError:
        """Return the error that describes the tensor."""
        return GeometryError(
            f"KV cache tensor {self.name!r} is not understood: {reason} (shape={self.shape}, "
            f"strides in bytes={self.strides}, element size={self.element_bytes}, "
            f"num_blocks={self.num_blocks})"
        )

    def _given(self, block_axis: int) -> int:
        if not 0 <= block_axis < len(self.shape):
            raise self.refused(f"it has no axis block_axis={block_axis}")
        return block_axis

    def _found(self) -> int:
        """Return the axis of the blocks; refuse a shape that has two readings."""
        shape, count = self.shape, self.num_blocks
        if count == 1:
            return 0  # the whole tensor is the block, whichever axis says so
        multiple = {i for i in range(min(3, len(shape))) if shape[i] % count == 0}
        exact = {i for i in multiple if shape[i] == count}
        readings = {0} & (multiple if len(shape) > 2 else exact)
        if shape[0] == 2 and len(shape) > 2:
            readings |= {1} & multiple  # keys, then values
        if not _INTEGER.search(self.name):
            readings |= exact  # one tensor of all layers may have them on a leading axis
        elif readings == {0, 1} and shape[0] == 2:
            readings = self._two_blocks_or_keys_and_values()
        elif readings == {0} and 0 not in exact:
            readings |= exact  # kernel blocks first, but another axis is just the blocks
        if not readings:
            raise self.refused("no axis is the blocks")
        if len(readings) > 1:
            found = " and ".join(map(str, sorted(readings)))
            raise self.refused(f"axes {found} may both be the blocks: pass block_axis")
        return readings.pop()

    def _two_blocks_or_keys_and_values(self) -> set[int]:
        """Decide between (2 blocks, ...) and (keys and values, blocks, ...) where a layout does."""
        if len(self.shape) == 4:
            return {0}  # (blocks, heads, tokens, width); K/V first has three axes or five
        if self.strides[0] < self.strides[1]:
            return {1}  # a K/V-first view over memory that has the blocks outermost
        return {0, 1}

    def _check_nested(self) -> None:
        """Refuse axes that repeat or interleave bytes: each must step over all smaller ones."""
        extent = self.element_bytes
        for size, stride in sorted((*self.axes, self.block), key=lambda axis: axis.stride):
            if size > 1:
                if stride < extent:
                    raise self.refused("its axes overlap or repeat bytes")
                extent += (size - 1) * stride

    def _contiguous(self) -> tuple[int, list[bool]]:
        """Return the bytes that are contiguous in a block, and which axes are inside of them."""
        chunk = self.element_bytes
        inside = [axis.size == 1 for axis in self.axes]
        for i in sorted(range(len(self.axes)), key=lambda i: self.axes[i].stride):
            if not inside[i] and self.axes[i].stride == chunk:
                inside[i] = True
                chunk *= self.axes[i].size
        return chunk, inside

    def pieces(self, layer: int, position: int) -> list[Piece]:
        """Return a piece for each entry of the axes that are not inside a chunk."""
        outer = [axis for axis, inside in zip(self.axes, self.inside, strict=True) if not inside]
        count = 1
        for axis in outer:
            count *= axis.size
        if count > REGIONS_PER_TENSOR_MAX:
            raise self.refused(
                f"a block is {count} pieces of {self.chunk} bytes, at most "
                f"{REGIONS_PER_TENSOR_MAX} are supported"
            )
        block_stride = self.block.stride if self.num_blocks > 1 else self.chunk
        return [
            Piece(
                position + i,
                layer,
                self.name,
                self.tensor.data_ptr() + sum(offset),
                block_stride,
                self.chunk,
            )
            for i, offset in enumerate(
                itertools.product(*([n * axis.stride for n in range(axis.size)] for axis in outer))
            )
        ]

    def format(self) -> LayerFormat:
        """Return what decides about the meaning of the bytes."""
        axes = tuple(
            (axis.size, 0 if axis.size == 1 else axis.stride if inside else -1)
            for axis, inside in zip(self.axes, self.inside, strict=True)
        )
        return LayerFormat(dtype_name(self.tensor), self.element_bytes, axes)


def layer_order(name: str) -> tuple[bool, list[int], str]:
    """Return the sort key of a layer: the integers in its name, then the name."""
    numbers = [int(number) for number in _INTEGER.findall(name)]
    return not numbers, numbers, name


def dtype_name(tensor: KvTensor) -> str:
    """Return the element type as text, empty if the tensor does not say."""
    return str(getattr(tensor, "dtype", ""))


def checked(name: str, tensor: object) -> KvTensor:
    """Return the tensor if it is one; state-space layers bring a list of tensors instead."""
    if isinstance(tensor, list | tuple):
        raise GeometryError(
            f"KV cache of layer {name!r} is a {type(tensor).__name__} of {len(tensor)} tensors, as "
            "state-space layers have it: only attention layers with one tensor are supported"
        )
    needed = ("shape", "stride", "element_size", "data_ptr")
    if not all(hasattr(tensor, attribute) for attribute in needed):
        raise GeometryError(f"KV cache of layer {name!r} is {type(tensor).__name__}, not a tensor")
    return cast(KvTensor, tensor)
