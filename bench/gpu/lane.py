# SPDX-License-Identifier: Apache-2.0
"""One worker's loop with its CUDA backend on a real segment, for measurements.

What is timed is everything between the moment at which a step is bound or filled and the end of its
operations: the loop, the checks of the rows, the slot headers, the submissions and the copies. The
leader's part has been done before.
"""

from __future__ import annotations

import itertools
import mmap
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import posix_ipc
import torch

from kvbm._fast.copy import HostCopier
from kvbm._fast.cuda_backend import CudaBackend
from kvbm._fast.cuda_device import CudaDevice
from kvbm._fast.keys import Keys
from kvbm._fast.memory import populate
from kvbm._fast.operation_table import OperationTable
from kvbm._fast.participants import claim_leader, claim_worker
from kvbm._fast.segment import Segment, shape_for
from kvbm._fast.worker_loop import WorkerLoop
from kvbm.transfer.arena_layout import ArenaLayout
from kvbm.transfer.backends import register_pieces
from kvbm.transfer.geometry import geometry_of
from kvbm.transfer.method import CopyMethod, copy_method

TIMEOUT_S = 60.0
LANES = itertools.count()


@dataclass(frozen=True)
class CacheShape:
    """What one rank's KV cache looks like.

    Attributes
    ----------
    name
        For the tables.
    layers
        Number of tensors.
    chunk_bytes
        Bytes of one block in one tensor.
    slab
        All tensors in one allocation, at one pitch; else each has its own.
    """

    name: str
    layers: int
    chunk_bytes: int
    slab: bool = False

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.layers * self.chunk_bytes


def make_tensors(shape: CacheShape, blocks: int, device: str = "cuda") -> dict[str, Any]:
    """Allocate a KV cache with random bytes."""
    size = (blocks, shape.chunk_bytes)
    if shape.slab:
        whole = torch.randint(0, 256, (shape.layers, *size), dtype=torch.uint8, device=device)
        layers = list(whole)
    else:
        layers = [
            torch.randint(0, 256, size, dtype=torch.uint8, device=device)
            for _ in range(shape.layers)
        ]
    return {f"layers.{i}": layer for i, layer in enumerate(layers)}


def shared_memory(size: int, threads: int = 8, piece: int = 64 << 20) -> mmap.mmap:
    """Map anonymous shared memory and touch all of it."""
    descriptor = os.memfd_create("kvbm-bench")
    try:
        os.ftruncate(descriptor, size)
        memory = mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)
    with ThreadPoolExecutor(threads) as pool:
        starts = range(0, size, piece)
        problems = list(pool.map(lambda at: populate(memory, at, min(piece, size - at)), starts))
    if any(problems):
        raise MemoryError(f"shared memory of {size} bytes: {os.strerror(max(problems))}")
    return memory


class Lane:
    """A leader, a worker's loop and a CUDA backend.

    Parameters
    ----------
    shape
        Of the KV cache.
    blocks, slots
        On the device; in the arena.
    method
        How pieces are submitted; what the library chooses by default.
    """

    def __init__(
        self, shape: CacheShape, blocks: int, slots: int, method: CopyMethod | None = None
    ) -> None:
        self.shape = shape
        self.tensors = make_tensors(shape, blocks)
        geometry = geometry_of(self.tensors, blocks)
        layout = ArenaLayout(slots, geometry.chunk_bytes)
        self.arena = shared_memory(layout.total_bytes)
        self.device = CudaDevice(0)
        for offset, count in register_pieces(layout, 0, layout.total_bytes, 1 << 30):
            self.device.register(self.arena, offset, count)
        chosen = copy_method(
            geometry, self.device.allocation_of, has_batches=self.device.has_batches
        )
        self.method = method or chosen
        if method is not None and method.pitch_bytes:
            self.method = method._replace(pitch_bytes=chosen.pitch_bytes)
        copier = HostCopier(
            geometry.address_table, layout, self.arena, device_blocks=blocks, rank=0, group=0
        )
        self.backend = CudaBackend(self.device, [copier], [self.method])
        self.name = f"/kvbm-bench-{os.getpid()}-{next(LANES)}"
        self.segment = Segment.create(self.name, shape_for(slots, 0, 1, 16, True), bytes(32), b"{}")
        self.segment.set_ready_slots(0, slots)
        self.leader_segment = Segment.attach(self.name)
        claim_leader(self.leader_segment, 1)
        self.worker_segment = Segment.attach(self.name)
        claim_worker(self.worker_segment, 0, 0)
        self.table = OperationTable(self.leader_segment)
        self.loop = WorkerLoop(self.worker_segment, self.backend)
        self.step = 0
        self._chain = 0
        self._thread = threading.Thread(target=self.loop.run, name="kvbm-bench-copy", daemon=True)
        self._thread.start()

    @staticmethod
    def stream() -> int:
        """Handle of the stream on which kernels are launched."""
        return int(torch.cuda.current_stream().cuda_stream)

    def plan_store(self, device_blocks: Sequence[int]) -> tuple[Keys, list[int]]:
        """Submit the store of a new chain in the next step; it does not run yet."""
        self._chain += 1
        hashes = [b"%08d%08d" % (self._chain, i) for i in range(len(device_blocks))]
        keys = Keys([head.ljust(32, b"-") for head in hashes])
        handles, upto, _ = self.table.store(
            keys, 0, len(device_blocks), list(device_blocks), None, self.step + 1
        )
        if upto != len(device_blocks):
            raise RuntimeError(f"only {upto} of {len(device_blocks)} blocks could be reserved")
        return keys, handles

    def plan_load(self, keys: Keys, device_blocks: Sequence[int]) -> tuple[int, list[int]]:
        """Submit the load of a chain in the next step; it does not run yet."""
        count, ref = self.table.match(keys, 0, len(device_blocks))
        if ref is None or count != len(device_blocks):
            raise RuntimeError(f"only {count} of {len(device_blocks)} blocks are in the cache")
        handles = self.table.load(ref, 0, list(device_blocks), self.step + 1)
        if handles is None:
            raise RuntimeError("no free operations")
        return ref, handles

    def release(self) -> None:
        """Let the next step begin and be filled."""
        self.step += 1
        stream = self.stream()
        self.loop.bind_step(self.step, stream)
        self.loop.fill_step(self.step, stream)

    def wait(self, handles: Sequence[int]) -> None:
        """Poll until this rank is done with all operations."""
        deadline = time.monotonic() + TIMEOUT_S
        for handle in handles:
            while not self.loop.rank_ended(handle):
                if time.monotonic() > deadline:
                    raise TimeoutError("an operation did not end")

    def timed(self, handles: Sequence[int]) -> float:
        """Release and wait; returns seconds."""
        begin = time.perf_counter()
        self.release()
        self.wait(handles)
        return time.perf_counter() - begin

    def collect(self, handles: Sequence[int]) -> None:
        """Collect operations that this rank is done with, all of which must have succeeded.

        The rank's end comes before the operation's, by as long as its blocks take to be published.
        """
        deadline = time.monotonic() + TIMEOUT_S
        for handle in handles:
            result = self.table.collect(handle)
            while result is None and time.monotonic() < deadline:
                result = self.table.collect(handle)
            if result is not True:
                raise RuntimeError("a copy failed")

    def snapshot(self, blocks: Sequence[int]) -> torch.Tensor:
        """Bytes of device blocks, on the device."""
        index = torch.tensor(list(blocks), device="cuda")
        return torch.cat([layer[index] for layer in self.tensors.values()], dim=1)

    def poison(self, blocks: Sequence[int]) -> None:
        """Overwrite device blocks."""
        index = torch.tensor(list(blocks), device="cuda")
        for layer in self.tensors.values():
            layer[index] = 0xEE
        torch.cuda.synchronize()

    def close(self) -> None:
        """Stop and give everything back."""
        self.loop.stop()
        self._thread.join(timeout=30)
        self.backend.close()
        self.device.close()
        for segment in (self.worker_segment, self.leader_segment, self.segment):
            segment.close()
        posix_ipc.unlink_shared_memory(self.name)
        self.tensors = {}
        torch.cuda.empty_cache()
