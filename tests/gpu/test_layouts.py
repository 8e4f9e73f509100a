# SPDX-License-Identifier: Apache-2.0
"""Blocks of every layout of an engine come back to other blocks of a real device byte by byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvbm.transfer.backends import Device
from tests.copy_rig import BLOCKS, CHUNK, LAYERS, SLOTS, Rig, content
from tests.fast.instances import Instance
from tests.gpu.memory import torch_with_cuda

pytestmark = pytest.mark.gpu

# Shape of a layer, order of its axes in memory, axis of the blocks, type: 4,096 bytes a block.
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, str]] = {
    "K and V packed, bf16": ((BLOCKS, 4, 16, 32), (0, 1, 2, 3), 0, "bfloat16"),
    "tokens first in memory": ((BLOCKS, 4, 16, 32), (0, 2, 1, 3), 0, "bfloat16"),
    "block first": ((BLOCKS, 2, 16, 4, 16), (0, 1, 2, 3, 4), 0, "bfloat16"),
    "K/V first": ((2, BLOCKS, 16, 4, 16), (0, 1, 2, 3, 4), 1, "bfloat16"),
    "K/V first, fp8": ((2, BLOCKS, 16, 4, 32), (0, 1, 2, 3, 4), 1, "float8_e4m3fn"),
    "heads outermost": ((BLOCKS, 4, 16, 32), (1, 0, 2, 3), 0, "bfloat16"),
    "MLA": ((BLOCKS, 16, 128), (0, 1, 2), 0, "bfloat16"),
    "MLA, fp8 with scales": ((BLOCKS, 16, 256), (0, 1, 2), 0, "uint8"),
}
SOURCES = [5, 6, 7, 30, 2, 9, 10, 47, 0, 20]
TARGETS = [40, 41, 42, 11, 12, 33, 34, 19, 18, 1]


class LayoutMemory:
    """A KV cache of one layout on device 0; its blocks as bytes in the tensors' logical order."""

    def __init__(self, layout: str, *, staged: bool) -> None:
        torch = self.torch = torch_with_cuda()
        shape, order, self.axis, dtype = LAYOUTS[layout]
        self.staged = staged
        self.tensors: dict[str, Any] = {}
        self._gaps: list[Any] = []
        for layer in range(LAYERS):
            physical = torch.zeros(
                [shape[axis] for axis in order], dtype=getattr(torch, dtype), device="cuda"
            )
            # Between them, gaps of different sizes: at one distance, pieces go as 2D copies.
            self._gaps.append(torch.zeros(2048 * layer + 1, dtype=torch.uint8, device="cuda"))
            inverse = [order.index(axis) for axis in range(len(order))]
            self.tensors[f"layers.{layer}"] = physical.permute(inverse)
        torch.cuda.synchronize()
        self.device = Device("cuda", 0, lambda: int(torch.cuda.current_stream().cuda_stream))

    def _block(self, tensor: Any, block: int) -> Any:
        return tensor.select(self.axis, block)

    def write(self, block: int, data: bytes) -> None:
        """Write a block, and wait until it is there."""
        parts = np.frombuffer(data, np.uint8).reshape(LAYERS, CHUNK).copy()
        for tensor, part in zip(self.tensors.values(), parts, strict=True):
            view = self._block(tensor, block)
            values = self.torch.from_numpy(part).cuda().view(view.dtype).view(view.shape)
            view.view(self.torch.uint8).copy_(values.view(self.torch.uint8))
        self.torch.cuda.synchronize()

    def read(self, block: int) -> bytes:
        """Return the bytes of a block."""
        self.torch.cuda.synchronize()
        return b"".join(
            self._block(t, block).contiguous().view(self.torch.uint8).cpu().numpy().tobytes()
            for t in self.tensors.values()
        )


@pytest.mark.parametrize("staged", [False, True], ids=["straight", "staged"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_come_back_in_each_layout(
    make_instance: Callable[..., Instance], layout: str, staged: bool
) -> None:
    memory = LayoutMemory(layout, staged=staged)
    rig = Rig(make_instance(host_slots=SLOTS), memory)
    rig.start()
    try:
        keys = rig.stored("a", SOURCES)
        assert rig.loaded(keys, TARGETS) is True
        assert [memory.read(b) for b in TARGETS] == [content(i) for i in range(len(TARGETS))]
        untouched = set(range(BLOCKS)) - {*SOURCES, *TARGETS}
        assert all(not any(memory.read(b)) for b in untouched)
        kernels = rig.copies.backend.statistics()["kernels"]  # type: ignore[attr-defined]
        assert (kernels > 0) is staged
    finally:
        rig.close()
