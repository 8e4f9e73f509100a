# SPDX-License-Identifier: Apache-2.0
"""One rank's disk tier without an engine: table, worker loop, arena, slab, and its I/O."""

from __future__ import annotations

import itertools
import mmap
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import posix_ipc

from bench.segments import hashes
from kvbm._fast.copy import HostCopier
from kvbm._fast.disk_batches import DiskBatches
from kvbm._fast.host_backend import HostBackend
from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable
from kvbm._fast.participants import claim_leader, claim_worker
from kvbm._fast.segment import Segment, shape_for
from kvbm._fast.worker_loop import WorkerLoop
from kvbm.tiers.disk import Slab, SlabFiles, Superblock
from kvbm.transfer.arena_layout import ArenaLayout
from kvbm.transfer.nixl import NixlMover, nixl_library
from kvbm.worker.disk import NIXL_THREADS

__all__ = ["BATCH_BLOCKS", "DiskRig"]

BATCH_BLOCKS = 32  # of one operation, as kvbm.leader.disk_tier has it
DEVICE_BLOCKS = 8
UNDER_WAY = 16  # operations
POLL_SECS = 0.0002

_numbers = itertools.count()


def shared_memory(name: str, size: int) -> mmap.mmap:
    """Memory as a host tier has it, under no name."""
    shared = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=size)
    shared.unlink()
    os.posix_fallocate(shared.fd, 0, size)
    memory = mmap.mmap(shared.fd, size)
    shared.close_fd()
    return memory


class DiskRig:
    """A host tier that holds one of two chains, both of which are on disk.

    To fetch one evicts the other, so that each fetch reads all of its blocks. As many disk slots,
    among theirs, are for plain I/O, from and to the same memory: where a file lies on a disk and
    how memory is scattered make more of a difference than anything else.

    Attributes
    ----------
    slab : Slab
        The file.
    plain_slots : list of list of int
        Disk slots that are not the tier's, in two halves.
    memory : memoryview
        The slots of the host tier, one block after the other. Plain reads may go there before a
        `fetch`, which overwrites all of it.

    Parameters
    ----------
    folder : Path
        Where the slab is.
    blocks, block_bytes, pieces : int
        Blocks of a chain, the size of a block, and in how many pieces it lies in the host tier.
    threads : int
        Threads that read and write.
    named : bool
        The slab outlives its process: it is synced.
    nixl : mapping of str to str, or None
        Move with NIXL's POSIX backend, with these parameters of it.
    """

    def __init__(
        self,
        folder: Path,
        blocks: int,
        block_bytes: int,
        pieces: int,
        *,
        threads: int = 8,
        named: bool = False,
        nixl: Mapping[str, str] | None = None,
    ) -> None:
        self.name = f"/kvbm-bench-disk-{os.getpid()}-{next(_numbers)}"
        self.blocks = blocks
        self._made = Segment.create(self.name, shape_for(blocks, 0, 1, 16, True), bytes(32), b"{}")
        self._made.set_ready_slots(0, blocks)
        leader = Segment.attach(self.name)
        claim_leader(leader, 1)
        self._table = OperationTable(leader)
        self._worker = Segment.attach(self.name)
        claim_worker(self._worker, 0, 0)
        chunk = block_bytes // pieces
        self._device = np.random.default_rng(1).integers(
            0, 256, (pieces, DEVICE_BLOCKS, chunk), np.uint8
        )
        self._open_host(chunk)
        superblock = Superblock(0, 1, 4 * blocks, block_bytes, bytes(32))
        name = self.name.removeprefix("/kvbm-") if named else None
        self.slab = Slab(SlabFiles(folder), superblock, name)
        self._backend = DiskBatches(
            self._worker,
            [self._copier],
            data_fd=self.slab.data_fd,
            table_fd=self.slab.table_fd,
            layout=self.slab.layout,
            fingerprint=superblock.short_fingerprint,
            durable=named,
            alignment=self.slab.alignment,
        )
        self._loop.use_disk(self._backend)
        servers = [self._backend.serve] * threads
        self._movers: list[NixlMover] = []
        if nixl is not None:
            library = nixl_library()
            self._movers = [
                NixlMover(library, "POSIX", self._backend, self.slab, nixl)
                for _ in range(NIXL_THREADS)
            ]
            servers = [mover.serve for mover in self._movers]
        self._threads = [threading.Thread(target=serve, daemon=True) for serve in servers]
        self._threads.append(threading.Thread(target=self._loop.run, daemon=True))
        for thread in self._threads:
            thread.start()
        order = np.random.default_rng(2).permutation(4 * blocks).reshape(4, blocks).tolist()
        self._chains = [Keys(hashes(blocks)) for _ in range(2)]
        self._slots, self.plain_slots = order[:2], order[2:]
        for number in range(2):
            self._store(number)
            self.spill()

    def _open_host(self, chunk: int) -> None:
        pieces = len(self._device)
        layout = ArenaLayout(self.blocks, [chunk] * pieces)
        self._arena = shared_memory(f"{self.name}.host", layout.total_bytes)
        self.memory = memoryview(self._arena)[layout.data_offset :]
        base, stride = self._device.ctypes.data, DEVICE_BLOCKS * chunk
        regions = [(base + i * stride, chunk, chunk) for i in range(pieces)]
        self._copier = HostCopier(regions, layout, self._arena, device_blocks=DEVICE_BLOCKS)
        backend = HostBackend([self._copier])
        backend.set_usable_slots(self.blocks)
        self._loop = WorkerLoop(self._worker, backend)

    def _store(self, number: int) -> None:
        keys, parent, at = self._chains[number], None, 0
        self._loop.fill_step(1)
        while at < self.blocks:
            stop = min(self.blocks, at + BATCH_BLOCKS)
            sources = [i % DEVICE_BLOCKS for i in range(stop)]
            handles, at, parent = self._table.store(keys, at, stop, sources, parent, 1)
            self._finish(handles)
        self._cached = number

    def _collected(self, handles: list[int]) -> list[int]:
        """Those that still run; in order, as a block is published after its parent."""
        for done, handle in enumerate(handles):
            result = self._table.collect(handle)
            if result is None:
                return handles[done:]
            if not result:
                raise RuntimeError(f"an operation failed: {self._backend.problems()}")
        return []

    def _finish(self, handles: list[int], most: int = 0) -> list[int]:
        """Wait until no more than `most` run."""
        while len(handles := self._collected(handles)) > most:
            time.sleep(POLL_SECS)
        return handles

    def fetch(self) -> None:
        """Read the chain that is not in the host tier."""
        number = 1 - self._cached
        keys, sources, parent, at = self._chains[number], self._slots[number], None, 0
        running: list[int] = []
        while at < self.blocks:
            stop = min(self.blocks, at + BATCH_BLOCKS)
            handles, upto, parent = self._table.fetch(keys, at, stop, sources, parent)
            if upto != stop:
                raise RuntimeError(f"only {upto} of {stop} blocks could be reserved")
            running = self._finish(running + handles, UNDER_WAY)
            at = upto
        self._finish(running)
        self._cached = number

    def spill(self) -> None:
        """Write the chain that is in the host tier."""
        keys, slots = self._chains[self._cached], self._slots[self._cached]
        running: list[int] = []
        refs = []
        for at in range(0, self.blocks, BATCH_BLOCKS):
            stop = min(self.blocks, at + BATCH_BLOCKS)
            ref = self._table.hold(keys, stop - 1)
            if ref is None:
                raise RuntimeError("the chain is not in the host tier")
            refs.append(ref)
            handles = self._table.spill(ref, 0, slots[at:stop])
            running = self._finish(running + (handles or []), UNDER_WAY)
        self._finish(running)
        for ref in refs:
            self._table.unpin(ref)

    def close(self) -> None:
        """Stop, and remove everything."""
        self._loop.stop()
        self._backend.stop()
        for thread in self._threads:
            thread.join(timeout=30)
        while self._movers:
            self._movers.pop().close()
        del self._loop, self._backend, self._copier
        self.memory.release()
        self._arena.close()
        for segment in (self._worker, self._table.segment, self._made):
            segment.close()
        posix_ipc.unlink_shared_memory(self.name)
        if self.slab.path is not None:
            self.slab.path.unlink()
        self.slab.close()
