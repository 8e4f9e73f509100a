# SPDX-License-Identifier: Apache-2.0
"""A KV cache on a real CUDA device, for tests; they are skipped where there is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvbm.transfer.backends import Device
from tests.copy_rig import BLOCKS, CHUNK, LAYERS


def torch_with_cuda() -> Any:
    """Return torch, or skip the test."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch


class CudaMemory:
    """Tensors on device 0, and kernels that a test puts on the engine's stream.

    Parameters
    ----------
    slab
        All layers in one allocation, at one pitch.
    staged
        Copies may go through a staging buffer.
    """

    def __init__(self, *, slab: bool = False, staged: bool = False) -> None:
        self.staged = staged
        torch = self.torch = torch_with_cuda()
        if slab:
            # Larger than what the allocator would carve out of a block with other tensors.
            whole = torch.zeros((LAYERS, BLOCKS * CHUNK), dtype=torch.uint8, device="cuda")
            self.layers = [layer.view(BLOCKS, CHUNK) for layer in whole]
        else:
            size = 32 << 20  # an allocation of its own
            self.whole = [
                torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(LAYERS)
            ]
            self.layers = [w[: BLOCKS * CHUNK].view(BLOCKS, CHUNK) for w in self.whole]
        self.tensors = {f"layers.{i}": layer for i, layer in enumerate(self.layers)}
        torch.cuda.synchronize()
        self.device = Device("cuda", 0, self.stream)

    def stream(self) -> int:
        """Handle of the engine's stream."""
        return int(self.torch.cuda.current_stream().cuda_stream)

    def write(self, block: int, data: bytes) -> None:
        """Write a block, and wait until it is there."""
        parts = np.frombuffer(data, np.uint8).reshape(LAYERS, CHUNK).copy()
        for layer, part in zip(self.layers, parts, strict=True):
            layer[block] = self.torch.from_numpy(part).cuda()
        self.torch.cuda.synchronize()

    def read(self, block: int) -> bytes:
        """Return the bytes of a block."""
        self.torch.cuda.synchronize()
        return b"".join(layer[block].cpu().numpy().tobytes() for layer in self.layers)

    def launch_long_kernel(self, cycles: int = 400_000_000) -> None:
        """Put a kernel on the engine's stream that takes about 0.2 s."""
        self.torch.cuda._sleep(cycles)

    def launch_fill(self, block: int, value: int) -> None:
        """Put kernels on the engine's stream that fill a block."""
        for layer in self.layers:
            layer[block].fill_(value)

    def is_busy(self) -> bool:
        """Whether the engine's stream has work that is not done."""
        return not self.torch.cuda.current_stream().query()
