# SPDX-License-Identifier: Apache-2.0
"""The disk tier's block table, and the filter that decides what is worth a write.

The disk tier is a block table of its own, in a segment of its own, in which a slot is a disk slot:
the same words, the same protocol, the same recovery as the host tier's. A chain on disk is a chain
there, so that a look-up is a bisection and one pin holds all of it while it is read.
"""
from libc.stdint cimport UINT32_MAX, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from kvbm._fast.atomics cimport (
    kv_u32_fetch_add_release,
    kv_u32_load_acquire,
    kv_u64_fetch_add_relaxed,
    kv_u64_load_acquire,
    kv_u64_load_relaxed,
)
from kvbm._fast.blocks cimport (
    ALREADY,
    PUBLISHED,
    Reservation,
    block_evict,
    block_publish,
    block_reserve,
    monotonic_ns,
    structure_enter,
    structure_exit,
)
from kvbm._fast.eviction cimport evictor_offer
from kvbm._fast.index cimport index_find
from kvbm._fast.keys cimport Keys
from kvbm._fast.layout cimport (
    KV_C_EVICTED,
    KV_C_EVICTED_UNREADABLE,
    KV_HOLDERS_MASK,
    KV_NONE,
    KV_POOL_BLOCKS,
    KV_POOL_HOST,
    kv_block,
    kv_count,
    kv_mix64,
    kv_word_children,
    kv_word_generation,
)
from kvbm._fast.pool cimport pool_give_back, pool_take_one, pool_take_run
from kvbm._fast.slab cimport kv_slab_header
from kvbm._fast.supply cimport supply_give_back, supply_leave
from kvbm._fast.table cimport BlockTable, make_ref

import os

import numpy as np

from kvbm._fast.slab import SLAB_HEADER

cdef enum:
    WAYS = 8                     # entries of the filter among which a block's is


cdef class DiskTable(BlockTable):
    """One leader's operations on the disk tier's segment.

    Parameters
    ----------
    segment : Segment
        Attached, writable, with a leader line; made with the disk slots in place of host slots.
    """

    def restore(self, headers) -> int:
        """Register the blocks that a slab holds, parents first, in the slots that they are in.

        A block whose parent is missing, whose digest is there already, or whose slot is in use, is
        left out. The order of eviction is that in which they were written.

        Parameters
        ----------
        headers : numpy.ndarray
            Of `SLAB_HEADER`, valid.

        Returns
        -------
        int
            Blocks registered.
        """
        cdef Py_ssize_t i
        cdef uint64_t base
        cdef int restored = 0
        cdef const kv_slab_header *header
        self.segment.check_open()
        order = np.argsort(headers["position"], kind="stable")
        ages = np.argsort(np.argsort(headers["written_ns"][order], kind="stable"), kind="stable")
        table = np.ascontiguousarray(headers[order])
        if table.dtype != SLAB_HEADER:
            raise ValueError(f"headers of {SLAB_HEADER} are wanted, not of {table.dtype}")
        cdef const unsigned char[::1] raw = table.view(np.uint8)
        cdef const uint64_t[::1] age = ages.astype(np.uint64)
        cdef Py_ssize_t count = len(table)
        if count == 0 or not structure_enter(self.view):
            return 0
        base = kv_u64_fetch_add_relaxed(&self.view.header.tick, count) + 1
        for i in range(count):
            header = <const kv_slab_header *>&raw[i * sizeof(kv_slab_header)]
            restored += self.restore_block(header, base + age[i])
        supply_leave(self.view, &self.supply)
        structure_exit(self.view)
        return restored

    cdef bint restore_block(self, const kv_slab_header *header, uint64_t tick) noexcept nogil:
        cdef Reservation what
        cdef uint32_t record, generation, parent
        cdef uint64_t word
        cdef int result
        memset(&what, 0, sizeof(what))
        what.tick = tick
        what.digest_lo, what.digest_hi = header.digest_lo, header.digest_hi
        what.sequence_hash, what.position = header.sequence_hash, header.position
        what.group = header.group
        what.parent = KV_NONE
        if index_find(self.view, what.digest_lo, what.digest_hi, True, &word) != KV_NONE:
            return False
        if header.position != 0:
            parent = index_find(self.view, header.parent_lo, header.parent_hi, False, &word)
            if parent == KV_NONE:
                return False
            what.parent, what.parent_generation = parent, kv_word_generation(word)
        if not pool_take_one(self.view, KV_POOL_HOST, header.slot):
            return False
        if pool_take_run(self.view, KV_POOL_BLOCKS, 1, self.view.shape.block_capacity,
                         &self.supply.record_cursor, &record) == 0:
            pool_give_back(self.view, KV_POOL_HOST, header.slot)
            return False
        if not block_reserve(self.view, record, header.slot, &what, &generation):
            pool_give_back(self.view, KV_POOL_BLOCKS, record)
            pool_give_back(self.view, KV_POOL_HOST, header.slot)
            return False
        self.pins[record] = 1
        result = block_publish(self.view, record, generation, monotonic_ns())
        if result != PUBLISHED and result != ALREADY:
            self.abandon(record, generation)
            return False
        self.let_go(make_ref(record, generation), tick)
        return True

    def reserve_run(self, keys: Keys, start: int, stop: int, parent: int | None,
                    ) -> list[tuple[int, int]]:
        """Reserve blocks `start`, `start` + 1, ... as far as none of them is here or being written.

        As `reserve`, but that the blocks are neighbours in the chain, from `start` on.
        """
        cdef Py_ssize_t i = start, end = min(stop, keys.count())
        cdef uint64_t lo, hi, word
        self.mix(keys)
        while i < end:
            keys.digest(i, &lo, &hi)
            if index_find(self.view, lo, hi, True, &word) != KV_NONE:
                break
            i += 1
        found = self.reserve(keys, start, i, parent) if i > start else []
        if not self.is_run(found, keys, start):
            self.abandon_reserved([ref for ref, _ in found])
            return []
        return found

    cdef bint is_run(self, list found, Keys keys, Py_ssize_t start) except -1:
        """False if somebody else reserved the first block, or one between, at the same moment."""
        cdef uint64_t lo, hi, ref
        cdef kv_block *b
        for i, (ref, _) in enumerate(found):
            keys.digest(start + i, &lo, &hi)
            b = &self.view.blocks[<uint32_t>ref]
            if kv_u64_load_acquire(&b.digest_lo) != lo or kv_u64_load_acquire(&b.digest_hi) != hi:
                return False
        return True

    def retire(self, keys: Keys, position: int) -> tuple[bool, int | None]:
        """Take a block that cannot be read, and what follows it in its chain, out of the table.

        Returns
        -------
        tuple
            Whether the block is not registered any more: False while somebody holds one of these
            blocks, or where another chain goes on from it. And a reservation under a name that
            nobody asks for, which keeps the slot from being used; None if there was none to keep.
        """
        cdef Py_ssize_t i, at = position, end = position
        cdef uint64_t lo, hi, word = 0
        cdef uint32_t block = KV_NONE, slot = KV_NONE, parent = KV_NONE, generation = 0
        cdef Reservation what
        name = os.urandom(16)
        self.segment.check_open()
        self.mix(keys)
        if not structure_enter(self.view):
            return False, None
        try:
            while end < keys.count():
                keys.digest(end, &lo, &hi)
                if index_find(self.view, lo, hi, False, &word) == KV_NONE:
                    break
                end += 1
            for i in range(end - 1, at - 1, -1):
                keys.digest(i, &lo, &hi)
                block = index_find(self.view, lo, hi, False, &word)
                if (block == KV_NONE or word & KV_HOLDERS_MASK or kv_word_children(word) != 0
                        or not block_evict(self.view, block, word, &slot, &parent)):
                    return False, None
                kv_count(self.view, KV_C_EVICTED, 1)
                kv_count(self.view, KV_C_EVICTED_UNREADABLE, 1)
                if i != at:
                    supply_give_back(self.view, &self.supply, block, slot)
            if end == at or slot == KV_NONE:
                return True, None
            if parent != KV_NONE:
                evictor_offer(self.view, &self.evictor, parent)
            memset(&what, 0, sizeof(what))
            what.tick = kv_u64_load_relaxed(&self.view.header.tick)
            what.digest_lo = int.from_bytes(name[:8], "little")
            what.digest_hi = int.from_bytes(name[8:], "little")
            what.parent = KV_NONE
            if not block_reserve(self.view, block, slot, &what, &generation):
                supply_give_back(self.view, &self.supply, block, slot)
                return True, None
            self.pins[block] = 1
            return True, make_ref(block, generation)
        finally:
            structure_exit(self.view)

    def hold_again(self, ref: int) -> int:
        """Hold a block that this leader holds once more; returns `ref`."""
        self.segment.check_open()
        self.check_ref(ref)
        if self.pins[<uint32_t>(ref & 0xFFFFFFFF)] == 0:
            raise ValueError(f"block {ref & 0xFFFFFFFF} is not held")
        self.pins[<uint32_t>(ref & 0xFFFFFFFF)] += 1
        return ref

    def parent_of(self, ref: int) -> int | None:
        """Block before a held block in its chain; None for the first."""
        cdef uint32_t parent
        self.check_ref(ref)
        parent = kv_u32_load_acquire(&self.view.blocks[<uint32_t>(ref & 0xFFFFFFFF)].parent)
        return None if parent == 0 else parent - 1


def raise_epoch(BlockTable table not None, epoch: int) -> None:
    """Move a table's key epoch on to at least `epoch`."""
    cdef uint32_t now
    table.segment.check_open()
    now = kv_u32_load_acquire(&table.view.header.key_epoch)
    if now < <uint32_t>epoch:
        kv_u32_fetch_add_release(&table.view.header.key_epoch, <uint32_t>epoch - now)


cdef class FrequencyFilter:
    """How often blocks are used: a block is worth a write to disk once it was used again.

    Upstream's rule: the first use counts 1, each further one doubles; with each decay all counts
    lose 1, and what is at 0 is forgotten; a block passes at `least`. Counts are kept in buckets of
    eight, in which the smallest gives way: the memory is fixed.

    Parameters
    ----------
    least : int
        Count at which a block passes.
    entries : int
        Blocks that can be counted; rounded up to a power of two.

    Attributes
    ----------
    least : int
        As given.
    """

    def __cinit__(self, *, least: int = 2, entries: int = 1_000_000):
        cdef uint64_t buckets = 1
        while buckets * WAYS < <uint64_t>entries:
            buckets *= 2
        self.least = least
        self.bucket_mask = buckets - 1
        self.entries = <Uses *>calloc(buckets * WAYS, sizeof(Uses))
        if self.entries == NULL:
            raise MemoryError("no memory for the counts of a disk tier")

    def __dealloc__(self):
        free(self.entries)

    cdef uint32_t now(self, const Uses *entry) noexcept nogil:
        """Count of an entry after the decays since it was counted."""
        cdef uint32_t lost = self.decay - entry.decay
        return 0 if entry.key == 0 or lost >= entry.count else entry.count - lost

    cdef Uses *find(self, uint64_t key) noexcept nogil:
        """Entry of a key, or the one of its bucket that counts least, which it may have."""
        cdef Uses *bucket = &self.entries[(kv_mix64(key) & self.bucket_mask) * WAYS]
        cdef Uses *least = bucket
        cdef int i
        for i in range(WAYS):
            if bucket[i].key == key:
                return &bucket[i]
            if self.now(&bucket[i]) < self.now(least):
                least = &bucket[i]
        return least

    cdef uint32_t use(self, uint64_t key) noexcept nogil:
        cdef Uses *entry = self.find(key)
        cdef uint32_t count = self.now(entry) if entry.key == key else 0
        entry.key = key
        entry.decay = self.decay
        entry.count = 1 if count == 0 else UINT32_MAX if count > UINT32_MAX // 2 else 2 * count
        return entry.count

    def passing(self, Keys keys not None, start: int, used_from: int, stop: int) -> int:
        """Count blocks `used_from` to `stop` as used; returns how many from `start` on pass.

        The keys are those of the table that they were looked up in last: its key epoch is in them.
        """
        cdef Py_ssize_t i, first = used_from, end = min(stop, keys.count()), begin = start
        cdef Py_ssize_t passed = begin
        cdef uint64_t lo, hi
        cdef uint32_t count
        cdef Uses *entry
        for i in range(min(begin, first), end):
            keys.digest(i, &lo, &hi)
            lo |= 1  # 0 marks an empty entry
            if i >= first:
                count = self.use(lo)
            else:
                entry = self.find(lo)
                count = self.now(entry) if entry.key == lo else 0
            if i == passed and count >= <uint32_t>self.least:
                passed += 1
        return passed - begin

    def age(self, decays: int = 1) -> None:
        """All counts lose this much."""
        self.decay += decays
