# SPDX-License-Identifier: Apache-2.0
"""The sample with a disk tier: its table, a slab a rank, with something of everything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kvbm._fast.disk_table import DiskTable
from kvbm._fast.keys import Keys
from kvbm._fast.participants import claim_leader
from kvbm._fast.segment import shape_for
from kvbm._fast.slab import SLAB_HEADER
from kvbm.tiers.disk import Superblock, slab_path
from tests.fast.instances import Instance, digests, instance
from tests.fast.test_disk_table import headers_of
from tests.fuzz.disk import sealed
from tests.inspect.samples import NOW_NS, Sample, fill

SLOTS, RANKS, PAYLOAD = 32, 2, 5000
TORN, LEFT_OVER, MANY = 30, 29, 16
"""Slots: of a torn header, of a block that the table has not, and how many blocks it has."""

FINGERPRINT = bytes(range(32))


@dataclass
class DiskSample:
    """The sample's host tier, its disk tier's table, and where the slabs are.

    Attributes
    ----------
    host : Sample
        The host tier.
    disk : Instance
        The disk tier's segment.
    table : DiskTable
        Its blocks: 0-11 a chain, 12-15 another one in slots 20-23, two being written.
    folder : Path
        Of the slabs.
    """

    host: Sample
    disk: Instance
    table: DiskTable
    folder: Path

    @property
    def name(self) -> str:
        """Name of the instance."""
        return self.host.name

    def slab(self, rank: int) -> Path:
        """One rank's slab."""
        return slab_path(self.folder, self.name, rank)


def slab_headers() -> np.ndarray:
    """Headers of the blocks that the table has, a left-over one, and empty ones."""
    headers = np.zeros(SLOTS, SLAB_HEADER)
    headers["slot"] = np.arange(SLOTS)
    headers[:12] = headers_of(Keys(digests(12, "on disk")), list(range(12)))
    headers[20:24] = headers_of(Keys(digests(4, "more")), list(range(20, 24)), 100)
    gone = headers_of(Keys(digests(3, "evicted")), [LEFT_OVER - 2, LEFT_OVER - 1, LEFT_OVER])
    headers[LEFT_OVER] = gone[2]  # its parents have been written over
    held = headers["digest_lo"] != 0
    headers["state"][held], headers["generation"][held] = 1, 3
    headers["sequence_hash"][held] = 0x5E0 + np.arange(held.sum())
    headers["written_ns"][held] += NOW_NS - 7200 * 10**9
    headers["payload_bytes"][held] = PAYLOAD
    headers["fingerprint"][held] = int.from_bytes(FINGERPRINT[:8], "little")
    return headers


def superblock(rank: int) -> Superblock:
    """What a rank's slab says about itself."""
    return Superblock(rank, RANKS, SLOTS, PAYLOAD, FINGERPRINT, nonce=0x51AB + rank, epoch=2)


def slab_bytes(rank: int) -> bytes:
    """A whole slab, without bytes of blocks."""
    headers = slab_headers()
    headers["rank"] = rank
    table = bytearray(sealed(headers).tobytes())
    table[12 * 128 : 20 * 128] = bytes(8 * 128)  # never written
    table[TORN * 128 : TORN * 128 + 128] = b"\x77" * 64 + bytes(64)
    head = superblock(rank).pack() + bytes(table)
    return head.ljust(superblock(rank).layout.total_bytes, b"\0")


@contextmanager
def disk_sample(folder: Path) -> Iterator[DiskSample]:
    """Make it; what it needs is removed afterwards."""
    host = instance(host_slots=64, ranks=RANKS, disk_slots=SLOTS)
    about = {"cache": "00", "slabs": [f"{superblock(rank).nonce:016x}" for rank in range(RANKS)]}
    disk = Instance(
        shape_for(SLOTS, 0, RANKS, 16, False),
        f"{host.name}.disk",
        description=json.dumps(about).encode(),
    )
    try:
        segment = disk.attach()
        claim_leader(segment, 0xE1)
        table = DiskTable(segment)
        headers = slab_headers()
        assert table.restore(headers[(headers["state"] == 1)]) == MANY
        being_written = Keys(digests(2, "being written"))
        assert len(table.reserve_run(being_written, 0, 2, None)) == 2
        made = DiskSample(fill(host), disk, table, folder)
        for rank in range(RANKS):
            made.slab(rank).write_bytes(slab_bytes(rank))
        yield made
    finally:
        disk.remove()
        host.remove()


def torn_superblock(data: bytes) -> bytes:
    """A slab's bytes with one bit of its superblock flipped."""
    return data[:20] + bytes([data[20] ^ 1]) + data[21:]


def of_another_rank(rank: int) -> bytes:
    """The superblock page of a slab of another content."""
    return replace(superblock(rank), nonce=1).pack()
