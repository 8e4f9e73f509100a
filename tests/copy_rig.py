# SPDX-License-Identifier: Apache-2.0
"""One rank's worker loop on a real segment, over device memory of any kind, for tests.

`Rig` is the same for all backends; what differs is the memory that it is given.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from kvbm._fast.keys import Keys
from kvbm._fast.worker_loop import WorkerLoop
from kvbm.transfer.arena_layout import ArenaLayout, slot_headers
from kvbm.transfer.backends import Device, RankCopies
from kvbm.transfer.geometry import geometry_of
from tests.fast.fake_cuda import FakeCuda
from tests.fast.instances import Instance, digests
from tests.leaks import wait_until
from tests.transfer.kv_tensors import ArrayTensor

LAYERS = 3
CHUNK = 4096
BLOCKS = 48
SLOTS = 40
GROUP_SLOTS = 8


class DeviceMemory(Protocol):
    """A KV cache of `LAYERS` tensors of `BLOCKS` blocks of `CHUNK` bytes."""

    device: Device
    staged: bool
    tensors: dict[str, Any]

    def write(self, block: int, data: bytes) -> None: ...
    def read(self, block: int) -> bytes: ...


class HostMemory:
    """A KV cache in the host's memory.

    Parameters
    ----------
    slab
        All layers in one allocation, at one pitch.
    """

    device = Device()
    staged = False

    def __init__(self, *, slab: bool = False) -> None:
        if slab:
            self.allocations = [np.zeros((LAYERS, BLOCKS, CHUNK), np.uint8)]
            self.layers = list(self.allocations[0])
        else:
            self.allocations = [np.zeros((BLOCKS, CHUNK), np.uint8) for _ in range(LAYERS)]
            self.layers = self.allocations
        self.tensors = {f"layers.{i}": ArrayTensor(layer) for i, layer in enumerate(self.layers)}

    def write(self, block: int, data: bytes) -> None:
        """Write a block, as many bytes a layer."""
        parts = np.frombuffer(data, np.uint8).reshape(LAYERS, CHUNK)
        for layer, part in zip(self.layers, parts, strict=True):
            layer[block] = part

    def read(self, block: int) -> bytes:
        """Return the bytes of a block."""
        return b"".join(layer[block].tobytes() for layer in self.layers)


class FakeMemory(HostMemory):
    """The same on the simulated CUDA device."""

    def __init__(
        self,
        *,
        slab: bool = False,
        batches: bool = True,
        known: bool = True,
        staged: bool = False,
    ) -> None:
        super().__init__(slab=slab)
        self.staged = staged
        self.cuda = FakeCuda(batches=batches)
        for array in self.allocations if known else self.layers:
            self.cuda.allocation(array.ctypes.data, array.nbytes)
        self.device = Device("cuda", library=self.cuda.path)

    def launch_fill(self, block: int, value: int) -> None:
        """Put kernels on the engine's stream that fill a block."""
        for layer in self.layers:
            self.cuda.kernel(layer[block].ctypes.data, CHUNK, value)


def content(seed: int) -> bytes:
    """Return the bytes of a block, random but for its seed."""
    return np.random.default_rng(seed).bytes(LAYERS * CHUNK)


class Rig:
    """A leader's table, a worker's loop, and the bytes between them."""

    def __init__(self, instance: Instance, memory: DeviceMemory, *, checksum: bool = False) -> None:
        self.memory = memory
        self.table = instance.leader()
        self.raw = instance.raw
        self.name = instance.name
        self.segment = instance.worker()
        geometry = geometry_of(memory.tensors, BLOCKS)
        self.layout = ArenaLayout(SLOTS, geometry.chunk_bytes, GROUP_SLOTS)
        self.arena = mmap.mmap(-1, self.layout.total_bytes)
        self.copies = RankCopies(
            memory.device,
            [geometry],
            self.layout,
            self.arena,
            rank=0,
            checksum=checksum,
            staged=memory.staged,
        )
        self.copies.grow(self.layout.total_bytes)
        self.loop = WorkerLoop(self.segment, self.copies.backend)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the copy thread."""
        self._thread = threading.Thread(target=self.loop.run, name="kvbm-test-copy", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the copy thread."""
        if self._thread is not None:
            self.loop.stop()
            self._thread.join(timeout=30)
            assert not self._thread.is_alive()
            self._thread = None

    def store(self, keys: Keys, blocks: Sequence[int], step: int) -> int:
        """Submit one store of a new chain; returns its handle."""
        handles, upto, _ = self.table.store(keys, 0, len(blocks), list(blocks), None, step)
        assert upto == len(blocks)
        return int(handles[0])

    def stored(self, seed: object, blocks: Sequence[int]) -> Keys:
        """Store a chain in step 1 and publish it; its device blocks have seeds as content."""
        keys = Keys(digests(len(blocks), seed))
        for i, block in enumerate(blocks):
            self.memory.write(block, content(i))
        handle = self.store(keys, blocks, 1)
        self.loop.fill_step(1)
        assert self.collected(handle) is True
        return keys

    def load(self, keys: Keys, blocks: Sequence[int], step: int) -> tuple[int, int]:
        """Match a chain and submit its load; returns the held reference and the handle."""
        count, ref = self.table.match(keys, 0, len(blocks))
        assert count == len(blocks)
        assert ref is not None
        handles = self.table.load(ref, 0, list(blocks), step)
        assert handles is not None
        return ref, int(handles[0])

    def collected(self, handle: int) -> bool | None:
        """Wait for the end of an operation and collect it."""
        result: list[bool | None] = [None]

        def ended() -> bool:
            result[0] = self.table.collect(handle)
            return result[0] is not None

        wait_until(ended)
        return result[0]

    def loaded(self, keys: Keys, blocks: Sequence[int], step: int = 1) -> bool | None:
        """Load a chain to device blocks; returns whether it arrived."""
        ref, handle = self.load(keys, blocks, step)
        self.loop.bind_step(step)
        result = self.collected(handle)
        self.table.unpin(ref)
        return result

    @property
    def headers(self) -> np.ndarray[Any, Any]:
        """Headers of the arena's slots."""
        return slot_headers(self.arena, self.layout)

    def close(self) -> None:
        """Stop, and give everything back."""
        self.stop()
        del self.loop
        self.copies.close()
        del self.copies
        self.arena.close()
