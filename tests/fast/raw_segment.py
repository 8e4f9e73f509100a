# SPDX-License-Identifier: Apache-2.0
"""A second reader of the segment's bytes: offsets and bit positions written down again, in Python.

It shares no code with kvbm/_fast, so a test that looks through it at what the compiled core did
finds a wrong offset, a wrong bit and a broken invariant alike. The numbers are those of format 5 of
kvbm/_fast/layout.h.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

SHM = Path("/dev/shm")
MAGIC = 0x314D42564B304730
PAGE = 4096
LEADERS = 16
RANKS = 16
LINES = LEADERS + LEADERS * RANKS
OPERATIONS = 128
ROWS = 128
ENTRIES = 8
NONE = 0xFFFFFFFF
RESET, PARTIAL, REGISTERED, EVICTING = range(4)
EMPTY, FILLING, READY = range(3)
FREE, SUBMITTED, CANCELLED, FINISHING, COMPLETE, FAILED = range(6)
PENDING, RUNNING, DONE, RANK_FAILED = range(4)
STORE, LOAD, SPILL, FETCH = 1, 2, 3, 4
BLOCKS, HOST, DISK = range(3)

# Bytes of one record, in the order of the sections.
PARTICIPANT_BYTES = 128
COUNTERS_BYTES = 384
HISTOGRAM_BYTES, HISTOGRAMS, BUCKETS = 200, 8, 24
RING_BYTES = 128 + 8 * OPERATIONS
OPERATION_BYTES = 192 + 32 * ROWS
BUCKET_BYTES = 64
BLOCK_BYTES = 64
COLD_BYTES = 32

# Offsets in the header.
AT_MAGIC, AT_VERSION, AT_CHECK, AT_SHAPE, AT_TOTAL, AT_NONCE = 0, 8, 12, 16, 48, 56
AT_CREATED, AT_FINGERPRINT, AT_TICK, AT_RECOVERING, AT_KEY_EPOCH = 64, 72, 128, 192, 196
AT_READY_SLOTS, AT_DESCRIPTION = 256, 384
AT_HEADER_CHECK, DESCRIPTION_BYTES = 44, 2048
MASK_64 = 2**64 - 1


@dataclass(frozen=True)
class Placement:
    """Where a block's bytes are in one tier."""

    state: int
    generation: int
    slot: int


@dataclass(frozen=True)
class Block:
    """One block record; `holders` is the set of leader numbers, `parent` a block or None."""

    state: int
    holders: frozenset[int]
    children: int
    generation: int
    digest: bytes
    priority: int
    tick: int
    parent: int | None
    parent_generation: int
    placements: tuple[Placement, Placement, Placement]


@dataclass(frozen=True)
class Row:
    """One row of an operation."""

    device_block: int
    slot: int
    block: int
    generation: int


@dataclass(frozen=True)
class Operation:
    """One operation; `ranks` are the states of all sixteen ranks."""

    state: int
    finisher: int
    generation: int
    ranks: tuple[int, ...]
    kind: int
    step: int
    request_key: int
    leader: int
    group: int
    failed_rows: tuple[int, ...]
    rows: tuple[Row, ...]


def mix64(x: int) -> int:
    """Finalizer of MurmurHash3."""
    x ^= x >> 33
    x = x * 0xFF51AFD7ED558CCD & MASK_64
    x ^= x >> 33
    x = x * 0xC4CEB9FE1A85EC53 & MASK_64
    return x ^ x >> 33


def header_check(page: bytes) -> int:
    """Checksum of what the creator writes once into the header."""
    total = 0
    for first, end in ((AT_VERSION, 104), (AT_DESCRIPTION, AT_DESCRIPTION + DESCRIPTION_BYTES)):
        for at in range(first, end, 8):
            word = int(struct.unpack_from("<Q", page, at)[0])
            if at == AT_HEADER_CHECK - 4:
                word &= NONE
            total = mix64(total ^ word) + 1 & MASK_64
    return total >> 32


def digest_hash(digest: bytes) -> int:
    """Hash of a digest, whose high half is the tag of its index entries."""
    low, high = struct.unpack("<QQ", digest)
    return mix64(low ^ mix64(high))


class RawSegment:
    """The bytes of a segment, mapped a second time.

    Parameters
    ----------
    name
        Name of the object, with its leading slash.
    writable
        Whether a test may scribble into it.
    """

    def __init__(self, name: str, writable: bool = False) -> None:
        descriptor = os.open(SHM / name.lstrip("/"), os.O_RDWR if writable else os.O_RDONLY)
        try:
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            self.bytes = mmap.mmap(descriptor, 0, access=access)
        finally:
            os.close(descriptor)
        shape = struct.unpack_from("<8I", self.bytes, AT_SHAPE)
        self.block_capacity, self.host_slots, self.disk_slots, self.ranks = shape[:4]
        self.block_tokens, self.buckets = shape[4:6]
        self.capacities = (self.block_capacity, self.host_slots, self.disk_slots)
        self.at: dict[str, int] = {}
        self._end = PAGE
        self._section("participants", LINES * PARTICIPANT_BYTES)
        self._section("counters", LINES * COUNTERS_BYTES)
        self._section("histograms", LEADERS * self.ranks * HISTOGRAMS * HISTOGRAM_BYTES)
        self._section("rings", LEADERS * self.ranks * RING_BYTES)
        self._section("operations", LEADERS * OPERATIONS * OPERATION_BYTES)
        for pool, capacity in enumerate(self.capacities):
            words = -(-capacity // 64)
            self._section(f"pool {pool}", 8 * words)
            self._section(f"summary {pool}", 8 * -(-words // 64))
        self._section("buckets", self.buckets * BUCKET_BYTES)
        self._section("blocks", self.block_capacity * BLOCK_BYTES)
        self._section("cold", self.block_capacity * COLD_BYTES)
        self.total_bytes = self._end

    def _section(self, name: str, size: int) -> None:
        self.at[name] = self._end
        self._end = -(-(self._end + size) // PAGE) * PAGE

    def __enter__(self) -> RawSegment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap."""
        self.bytes.close()

    def u64(self, at: int) -> int:
        """Read one 64-bit word."""
        return int(struct.unpack_from("<Q", self.bytes, at)[0])

    def u32(self, at: int) -> int:
        """Read one 32-bit word."""
        return int(struct.unpack_from("<I", self.bytes, at)[0])

    def put_u64(self, at: int, value: int) -> None:
        """Write one 64-bit word; the map must be writable."""
        struct.pack_into("<Q", self.bytes, at, value)

    def put_u32(self, at: int, value: int) -> None:
        """Write one 32-bit word; the map must be writable."""
        struct.pack_into("<I", self.bytes, at, value)

    def seal(self) -> None:
        """Make the header's checksum right again, so that a test gets behind it."""
        self.put_u32(AT_HEADER_CHECK, header_check(self.bytes[:PAGE]))

    @property
    def tick(self) -> int:
        """The recency clock."""
        return self.u64(AT_TICK)

    # ---- blocks -------------------------------------------------------------------------------
    def block_at(self, index: int) -> int:
        """Offset of a block record."""
        return self.at["blocks"] + index * BLOCK_BYTES

    def block(self, index: int) -> Block:
        """Decode one block record."""
        fields = struct.unpack_from("<Q16sQII3Q", self.bytes, self.block_at(index))
        word, digest, recency, parent, parent_generation = fields[:5]
        return Block(
            state=word >> 61,
            holders=frozenset(i for i in range(LEADERS) if word >> 45 + i & 1),
            children=word >> 24 & 0x1FFFFF,
            generation=word & 0xFFFFFF,
            digest=digest,
            priority=recency >> 48,
            tick=recency & (1 << 48) - 1,
            parent=None if parent == 0 else parent - 1,
            parent_generation=parent_generation,
            placements=tuple(
                Placement(word >> 60, word >> 32 & 0xFFFFFF, word & NONE) for word in fields[5:]
            ),  # type: ignore[arg-type]
        )

    def blocks(self) -> list[Block]:
        """Decode all block records."""
        return [self.block(i) for i in range(self.block_capacity)]

    def cold(self, index: int) -> tuple[int, int, int, int, int, int]:
        """Sequence hash, position, group, registration, uses and reserved word of a block."""
        at = self.at["cold"] + index * COLD_BYTES
        return struct.unpack_from("<QIIQII", self.bytes, at)  # type: ignore[return-value]

    # ---- pools and index ----------------------------------------------------------------------
    def free(self, pool: int) -> set[int]:
        """Free indices of a pool; fails if one beyond the capacity is marked as free."""
        found = set()
        for i in range(-(-self.capacities[pool] // 64)):
            word = self.u64(self.at[f"pool {pool}"] + 8 * i)
            found.update(64 * i + bit for bit in range(64) if word >> bit & 1)
        assert all(i < self.capacities[pool] for i in found), (pool, found)
        return found

    def summary(self, pool: int) -> set[int]:
        """Words of a pool that the summary says may have free bits."""
        words = -(-self.capacities[pool] // 64)
        found = set()
        for i in range(-(-words // 64)):
            word = self.u64(self.at[f"summary {pool}"] + 8 * i)
            found.update(64 * i + bit for bit in range(64) if word >> bit & 1)
        return found

    def candidates(self, digest: bytes) -> tuple[int, int, int]:
        """Tag and the two buckets of a digest."""
        value = digest_hash(digest)
        tag, first = value >> 32, value & self.buckets - 1
        return tag, first, (first ^ (mix64(tag) | 1)) & self.buckets - 1

    def entry_at(self, bucket: int, place: int) -> int:
        """Offset of an index entry."""
        return self.at["buckets"] + bucket * BUCKET_BYTES + 8 * place

    def entries(self, bucket: int) -> list[int]:
        """The eight entries of a bucket."""
        return [self.u64(self.entry_at(bucket, i)) for i in range(ENTRIES)]

    def indexed(self, index: int, digest: bytes) -> bool:
        """Return whether the index leads from a digest to a block."""
        tag, first, second = self.candidates(digest)
        return tag << 32 | index + 1 in self.entries(first) + self.entries(second)

    # ---- operations and participants ----------------------------------------------------------
    def operation_at(self, leader: int, index: int) -> int:
        """Offset of an operation."""
        return self.at["operations"] + (leader * OPERATIONS + index) * OPERATION_BYTES

    def operation_state(self, leader: int, index: int) -> int:
        """State of an operation."""
        return self.u64(self.operation_at(leader, index)) >> 60

    def operation(self, leader: int, index: int) -> Operation:
        """Decode one operation."""
        at = self.operation_at(leader, index)
        word, kind, row_count, step, request_key = struct.unpack_from("<QIIQQ", self.bytes, at)
        owner, group = struct.unpack_from("<II", self.bytes, at + 48)
        rows = (
            Row(*struct.unpack_from("<4I", self.bytes, at + 192 + 32 * i)) for i in range(row_count)
        )
        return Operation(
            state=word >> 60,
            finisher=word >> 56 & 15,
            generation=word >> 32 & 0xFFFFFF,
            ranks=tuple(word >> 2 * rank & 3 for rank in range(RANKS)),
            kind=kind,
            step=step,
            request_key=request_key,
            leader=owner,
            group=group,
            failed_rows=struct.unpack_from("<16Q", self.bytes, at + 64),
            rows=tuple(rows),
        )

    def ring(self, leader: int, rank: int) -> tuple[int, int, list[int]]:
        """Head, tail and entries of a ring."""
        at = self.at["rings"] + (leader * self.ranks + rank) * RING_BYTES
        entries = list(struct.unpack_from(f"<{OPERATIONS}Q", self.bytes, at + 128))
        return self.u32(at), self.u32(at + 64), entries

    def histogram(self, leader: int, rank: int, kind: int, copy: bool) -> tuple[list[int], int]:
        """Buckets and sum of what operations of a kind took, from submission or only the copy."""
        worker = (leader * self.ranks + rank) * HISTOGRAMS
        at = self.at["histograms"] + (worker + 2 * (kind - STORE) + copy) * HISTOGRAM_BYTES
        return [self.u64(at + 8 * i) for i in range(BUCKETS)], self.u64(at + 8 * BUCKETS)

    def line_at(self, line: int) -> int:
        """Offset of a participant's line."""
        return self.at["participants"] + line * PARTICIPANT_BYTES

    # ---- what must hold -----------------------------------------------------------------------
    def check_invariants(self, exact: bool = True) -> None:
        """Check I1, I2 and I4, the pools and the index; nobody may be working on the segment.

        Parameters
        ----------
        exact
            Also check what holds only if nobody has crashed since the last recount.
        """
        blocks = self.blocks()
        self._check_tree(blocks, exact)
        self._check_slots(blocks, exact)
        self.check_index()

    def check_index(self) -> None:
        """Check that the index leads to each block that is in the tree or on its way there."""
        for index, block in enumerate(self.blocks()):
            if block.state in (PARTIAL, REGISTERED):
                assert self.indexed(index, block.digest), f"{index} {block} is not in the index"

    def _check_tree(self, blocks: list[Block], exact: bool) -> None:
        children: Counter[int] = Counter()
        for index, block in enumerate(blocks):
            if block.state == REGISTERED and block.parent is not None:
                parent = blocks[block.parent]
                assert parent.state == REGISTERED, f"I1: {index} {block} has {parent}"
                assert parent.generation == block.parent_generation, f"I1: {index} {block} {parent}"
                children[block.parent] += 1
        for index, block in enumerate(blocks):
            if block.state == REGISTERED:
                assert block.children >= children[index], f"I2: {index} {block}"
                assert not exact or block.children == children[index], f"I2: {index} {block}"

    def _check_slots(self, blocks: list[Block], exact: bool) -> None:
        named: dict[int, Counter[int]] = {tier: Counter() for tier in (HOST, DISK)}
        for block in blocks:
            for tier in (HOST, DISK):
                placement = block.placements[tier - 1]
                if block.state != RESET and placement.state != EMPTY:
                    named[tier][placement.slot] += 1
        used = {i for i, block in enumerate(blocks) if block.state != RESET}
        for tier, slots in named.items():
            twice = [slot for slot, count in slots.items() if count > 1][:20]
            assert not twice, f"I4: slots {twice} of tier {tier} are named more than once"
        for pool, taken in ((BLOCKS, used), (HOST, set(named[HOST])), (DISK, set(named[DISK]))):
            free = self.free(pool)
            both = sorted(free & taken)[:20]
            assert not both, f"pool {pool}: {both} are free and in use"
            lost = sorted(set(range(self.capacities[pool])) - free - taken)[:20]
            assert not exact or not lost, f"pool {pool}: {lost} are lost"

    def check_idle(self, operations_too: bool = True) -> None:
        """Check that nothing is held, half done or in flight."""
        for index, block in enumerate(self.blocks()):
            assert block.state in (RESET, REGISTERED), f"block {index} is left half done: {block}"
            assert not block.holders, f"block {index} is still held: {block}"
        for line in range(LINES):
            assert self.u32(self.line_at(line)) == 0, f"line {line} is inside"
        if operations_too:
            left = [
                (leader, index)
                for leader in range(LEADERS)
                for index in range(OPERATIONS)
                if self.operation_state(leader, index) != FREE
            ]
            assert not left, f"operations left (leader, index): {left}"
