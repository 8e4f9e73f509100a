# SPDX-License-Identifier: Apache-2.0
"""How long a large slab takes to open after a reboot: its headers are real, its data a hole."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from kvbm._fast.operation_table import OperationTable
from kvbm._fast.participants import claim_leader, claim_worker, set_disk_slots
from kvbm._fast.segment import Segment, shape_for
from kvbm._fast.slab import SLAB_HEADER
from kvbm.instance import remove, segment_name
from kvbm.leader.disk_opening import DiskOpener, DiskSpec
from kvbm.leader.disk_tier import DiskTier
from kvbm.leader.disk_transfers import DiskFlow
from kvbm.tiers.disk import Slab, SlabFiles, Superblock, slab_path

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Reopened", "reopen"]

MAGIC = 0x31746C73626D766B  # slab.h
VALID = 1
CHAIN = 2000
NONCE = 7


@dataclass(frozen=True)
class Reopened:
    """Seconds that opening took.

    Attributes
    ----------
    slots, restored
        Slots of the slab, and the blocks found in it.
    slab_secs
        The worker's part: open and adopt the file.
    tree_secs
        The leader's: read the headers, make the segment, register the blocks.
    """

    slots: int
    restored: int
    slab_secs: float
    tree_secs: float


def headers(superblock: Superblock) -> NDArray[Any]:
    """Headers of a full slab: chains of `CHAIN` blocks."""
    slots = superblock.slots
    table = np.zeros(slots, SLAB_HEADER)
    random = np.random.default_rng(5)
    number = np.arange(slots)
    table["magic"], table["state"], table["generation"] = MAGIC, VALID, 1
    table["digest_lo"] = random.integers(1, 2**63, slots, np.uint64)
    table["digest_hi"] = random.integers(1, 2**63, slots, np.uint64)
    table["position"] = number % CHAIN
    inner = table["position"] > 0
    for word in ("lo", "hi"):
        table[f"parent_{word}"][1:] = table[f"digest_{word}"][:-1]
        table[f"parent_{word}"][~inner] = 0
    table["fingerprint"] = superblock.short_fingerprint
    table["payload_bytes"] = superblock.payload_bytes
    table["written_ns"] = number
    table["slot"] = number
    body = table.view(np.uint8).reshape(slots, SLAB_HEADER.itemsize)[:, :-8].tobytes()
    size = SLAB_HEADER.itemsize - 8
    table["header_checksum"] = [
        xxhash.xxh3_64_intdigest(body[at : at + size], MAGIC) for at in range(0, len(body), size)
    ]
    return table


def write_slab(folder: Path, instance: str, superblock: Superblock) -> None:
    """Write a slab that is full, less its data, and push it out of the page cache."""
    with slab_path(folder, instance, superblock.rank).open("wb") as file:
        file.write(superblock.pack())
        file.seek(superblock.layout.table_offset)
        file.write(headers(superblock).tobytes())
        file.truncate(superblock.layout.total_bytes)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reopen(folder: Path, total_bytes: int, block_bytes: int) -> Reopened:
    """Write a slab of `total_bytes` of data and open it as an engine does after a reboot."""
    slots = total_bytes // block_bytes
    instance = f"bench-disk-{os.getpid()}"
    wanted = Superblock(0, 1, slots, block_bytes, bytes(32), NONCE)
    write_slab(folder, instance, wanted)
    path = slab_path(folder, instance, 0)
    main = Segment.create(segment_name(instance), shape_for(8, slots, 1, 16, False), bytes(32), b"")
    try:
        claim_leader(main, 1)
        worker = Segment.attach(main.name)
        claim_worker(worker, 0, 0)
        began = time.perf_counter()
        slab = Slab(SlabFiles(folder), wanted, instance)
        adopted = time.perf_counter()
        if not slab.adopted:
            raise RuntimeError("the slab was not adopted")
        set_disk_slots(worker, slots)
        tier = DiskTier(OperationTable(main), DiskFlow(16, block_bytes))
        opener = DiskOpener(tier, main, DiskSpec(instance, 1, (path,)))
        opener.wait(600)
        ended = time.perf_counter()
        if tier.disk is None:
            raise RuntimeError("the tier did not open")
        restored = slots - tier.disk.segment.free_blocks()
        opener.close()
        slab.close()
        worker.close()
    finally:
        main.close()
        remove(instance)
        path.unlink()
    return Reopened(slots, restored, adopted - began, ended - adopted)
