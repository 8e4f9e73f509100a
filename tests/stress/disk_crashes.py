# SPDX-License-Identifier: Apache-2.0
"""What a slab may hold after a crash at any moment, and what it should hold: the oracle.

A log of all writes and syncs of some spills is recorded. A loss of power leaves, of each write that
no sync has made durable, any of its sectors and not the others; a killed process leaves what the
system had taken.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvbm._fast.keys import Keys
from kvbm._fast.slab import valid_headers
from kvbm.tiers.disk import Slab, Superblock
from tests.copy_rig import CHUNK, LAYERS
from tests.disk_rig import DISK_SLOTS, FINGERPRINT, Calls, DiskRig
from tests.fast.instances import digests

SECTOR = 512
BLOCKS = 5  # of a chain
PAIRS = 8  # of chains that are written at the same time
WANTED = Superblock(0, 1, DISK_SLOTS, LAYERS * CHUNK, FINGERPRINT)
LAYOUT = WANTED.layout


class _Piece(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("count", ctypes.c_size_t))


@dataclass(eq=False)
class Write:
    """One write: where, what, and when it began and ended in the log."""

    offset: int
    data: bytes
    done: bool = False


Event = tuple[str, Write | int]


class RecordedCalls(Calls):
    """System calls that are written down."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._writes: dict[int, Write] = {}
        self._numbers = itertools.count(1)

    def begins(self, kind: str, fd: int, pieces: int, count: int, offset: int) -> int:
        number = next(self._numbers)
        if kind == "write":
            vector = (_Piece * count).from_address(pieces)
            data = b"".join(ctypes.string_at(p.base, p.count) for p in vector)
            self._writes[number] = Write(offset, data)
            self.events.append(("write", self._writes[number]))
        elif kind == "sync":
            self.events.append(("sync", number))
        return number

    def ended(self, kind: str, token: int) -> None:
        if kind == "write":
            self.events.append(("wrote", self._writes[token]))
        elif kind == "sync":
            self.events.append(("synced", token))


class KillingCalls(Calls):
    """System calls of a process that ends itself at one of them, perhaps in the middle of it."""

    def __init__(self, at: int, half: bool) -> None:
        super().__init__()
        self._left, self._half = at, half

    def begins(self, kind: str, fd: int, pieces: int, count: int, offset: int) -> int:
        if kind == "read":
            return 0
        self._left -= 1
        if self._left == 0:
            if self._half and kind == "write":
                first = (_Piece * 1).from_address(pieces)[0]
                plain = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)  # without O_DIRECT
                data = ctypes.string_at(first.base, first.count)
                os.pwrite(plain, data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return 0


def content(chain: int, block: int) -> bytes:
    """Bytes of a block."""
    return np.random.default_rng((chain, block)).bytes(LAYERS * CHUNK)


def keys_of(chain: int) -> Keys:
    """Keys of a chain."""
    return Keys(digests(BLOCKS, f"chain {chain}"))


def digest_of(chain: int, block: int) -> tuple[int, int]:
    """Digest of a block, as slab headers have it."""
    digest, _ = keys_of(chain).identity(block)
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def oracle() -> dict[tuple[int, int], bytes]:
    """Bytes of every block of the workload, by digest."""
    return {
        digest_of(chain, block): content(chain, block)
        for chain in range(2 * PAIRS)
        for block in range(BLOCKS)
    }


def slots_of(pair: int) -> list[list[int]]:
    """Disk slots of a pair's two chains; the pairs write over each other."""
    slots = random.Random(pair).sample(range(DISK_SLOTS), 2 * BLOCKS)
    return [slots[:BLOCKS], slots[BLOCKS:]]


def work(rig: DiskRig) -> None:
    """Write all chains to disk, two at a time, over what was there."""
    for pair in range(PAIRS):
        handles, refs = [], []
        for which, slots in enumerate(slots_of(pair)):
            chain = 2 * pair + which
            keys = keys_of(chain)
            for block in range(BLOCKS):
                rig.memory.write(block, content(chain, block))
            stored = rig.store(keys, range(BLOCKS), 1)
            rig.loop.fill_step(1)
            assert rig.collected(stored) is True
            ref = rig.table.hold(keys, BLOCKS - 1)
            assert ref is not None
            refs.append(ref)
            handles += rig.table.spill(ref, 0, slots) or []
        for handle in handles:
            assert rig.collected(handle) is True
        for ref in refs:
            rig.table.unpin(ref)


@dataclass(frozen=True)
class Crash:
    """A moment at which the power is lost."""

    durable: bytearray
    pending: list[Write]

    def image(self, choose: random.Random) -> bytes:
        """One of the slabs that may be left."""
        image = bytearray(self.durable)
        for write in self.pending:
            share = choose.choice((0.0, 0.5, 1.0, choose.random()))
            at, end = write.offset, write.offset + len(write.data)
            while at < end:
                stop = min(end, (at // SECTOR + 1) * SECTOR)
                if choose.random() < share:
                    image[at:stop] = write.data[at - write.offset : stop - write.offset]
                at = stop
        return bytes(image)


def crashes(image: bytes, events: list[Event], syncs_hold: bool) -> Iterator[Crash]:
    """Every moment of the log, with what is certainly on the medium and what may be.

    Each is good until the next one is taken.
    """
    durable = bytearray(image)
    pending: list[Write] = []
    covered: dict[int, list[Write]] = {}
    yield Crash(durable, pending)
    for kind, what in events:
        if isinstance(what, Write):
            if kind == "write":
                pending.append(what)
            what.done = kind == "wrote"
        elif kind == "sync":
            covered[what] = [write for write in pending if write.done]
        elif syncs_hold:
            for write in covered[what]:
                if write in pending:
                    durable[write.offset : write.offset + len(write.data)] = write.data
                    pending.remove(write)
        yield Crash(durable, pending)


@dataclass(frozen=True)
class Found:
    """A slot whose header is valid."""

    slot: int
    checksum: int
    data: bytes
    wanted: bytes


def blocks_in(image: bytes, blocks: dict[tuple[int, int], bytes]) -> list[Found]:
    """Slots of a slab that an engine would find after a start."""
    table = image[LAYOUT.table_offset : LAYOUT.data_offset][: 128 * DISK_SLOTS]
    headers = valid_headers(
        table,
        rank=0,
        fingerprint=WANTED.short_fingerprint,
        payload_bytes=WANTED.payload_bytes,
    )
    found = []
    for header in headers:
        at = LAYOUT.data_offset + int(header["slot"]) * LAYOUT.stride
        found.append(
            Found(
                int(header["slot"]),
                int(header["data_checksum"]),
                image[at : at + WANTED.payload_bytes],
                blocks[int(header["digest_lo"]), int(header["digest_hi"])],
            )
        )
    return found


def image_of(slab: Slab) -> bytes:
    """All bytes of a slab."""
    return os.pread(slab.table_fd, LAYOUT.total_bytes, 0)
