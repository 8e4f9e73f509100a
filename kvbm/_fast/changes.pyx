# SPDX-License-Identifier: Apache-2.0
"""What has changed in a block table since the last look, whoever changed it.

No writer is asked to tell: the watch compares every block word with what it saw last. So it misses
nothing that another engine, a recovery, or a process that died in the middle has done, and costs
the writers nothing. It reads only, and never waits.

A look is not a picture of one moment. What it says of each block was true while it looked, and what
changes meanwhile is in the next look. A block is told of after its parent: one whose parent has not
been seen registered yet is left for the next look, as is one that moved while it was read.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, qsort

from kvbm._fast.atomics cimport (
    kv_u32_load_acquire,
    kv_u64_load_acquire,
    kv_u64_load_relaxed,
)
from kvbm._fast.layout cimport (
    KV_C_EVICTED,
    KV_C_PUBLISHED,
    KV_C_RESETS,
    KV_PARTICIPANTS,
    KV_REGISTERED,
    kv_block,
    kv_block_cold,
    kv_counters,
    kv_word_generation,
    kv_word_state,
)
from kvbm._fast.segment cimport Segment

from typing import NamedTuple

cdef uint32_t REGISTERED = 0x80000000U


class Delta(NamedTuple):
    """What two looks differ in.

    Attributes
    ----------
    added, removed : list of (sequence_hash, group)
        Blocks that are registered now, parents before children, and blocks that are not any more.
        A record that holds another block now is in both.
    """

    added: list[tuple[int, int]]
    removed: list[tuple[int, int]]


cdef uint32_t mark_of(uint64_t word) noexcept nogil:
    return REGISTERED | kv_word_generation(word) if kv_word_state(word) == KV_REGISTERED else 0


cdef int by_position(const void *a, const void *b) noexcept nogil:
    cdef uint32_t x = (<const Change *>a).position, y = (<const Change *>b).position
    return (x > y) - (x < y)


cdef class TableWatch:
    """Compares a block table with itself; used by one thread.

    Parameters
    ----------
    segment : Segment
        Attached, perhaps for reading alone. It must not be closed during a look.
    """

    def __cinit__(self, Segment segment not None):
        cdef size_t capacity
        segment.check_open()
        capacity = segment.view.shape.block_capacity
        self.segment = segment
        self.seen = <Seen *>calloc(capacity, sizeof(Seen))
        self.hidden = <uint32_t *>calloc(capacity, sizeof(uint32_t))
        self.changes = <Change *>malloc(capacity * sizeof(Change))
        if self.seen == NULL or self.hidden == NULL or self.changes == NULL:
            raise MemoryError("no memory for a watch over each block")
        self.counted = <uint64_t>-1
        self.epoch = kv_u32_load_acquire(&segment.view.header.key_epoch)

    def __dealloc__(self):
        free(self.seen)
        free(self.hidden)
        free(self.changes)

    cdef uint64_t count_changes(self) noexcept nogil:
        cdef uint64_t total = 0
        cdef uint32_t line
        cdef kv_counters *counters
        for line in range(KV_PARTICIPANTS):
            counters = &self.segment.view.counters[line]
            total += kv_u64_load_relaxed(&counters.value[<int>KV_C_PUBLISHED])
            total += kv_u64_load_relaxed(&counters.value[<int>KV_C_EVICTED])
            total += kv_u64_load_relaxed(&counters.value[<int>KV_C_RESETS])
        return total

    def moved(self) -> bool:
        """Whether somebody has counted a change since this was asked last.

        A hint that spares a look. Who changes something counts it a little later, and not at all if
        it dies before that: look now and then in any case.
        """
        cdef uint64_t total
        self.segment.check_open()
        with nogil:
            total = self.count_changes()
        if total == self.counted:
            return False
        self.counted = total
        return True

    cdef uint32_t scan(self, uint32_t *lost) noexcept nogil:
        """Collect the records whose mark moved; returns how many, `lost` had a block before."""
        cdef uint32_t i, mark, count = 0
        cdef uint64_t word
        cdef kv_block *b
        cdef kv_block_cold *cold
        cdef Change *change
        lost[0] = 0
        for i in range(self.segment.view.shape.block_capacity):
            b = &self.segment.view.blocks[i]
            cold = &self.segment.view.cold[i]
            word = kv_u64_load_acquire(&b.word)
            mark = mark_of(word)
            if mark == self.seen[i].mark or (mark != 0 and mark == self.hidden[i]):
                continue
            if self.seen[i].mark != 0:
                lost[0] += 1
            change = &self.changes[count]
            change.block = i
            change.mark = mark
            change.position = 0
            if mark != 0:
                change.sequence_hash = kv_u64_load_acquire(&cold.sequence_hash)
                change.position = kv_u32_load_acquire(&cold.position)
                change.group = kv_u32_load_acquire(&cold.group)
                change.parent = kv_u32_load_acquire(&b.parent)
                change.parent_mark = REGISTERED | kv_u32_load_acquire(&b.parent_generation)
                # The next owner writes after the word has moved [E1]: one that has not moved
                # vouches for what was read. Were it wrong about the hash, the next look would take
                # that back, since `seen` keeps what was told.
                if mark_of(kv_u64_load_acquire(&b.word)) != mark:
                    change.mark = 0
            count += 1
        return count

    cdef uint32_t accept(self, uint32_t count) noexcept nogil:
        """Note the new blocks whose parents are known; they move to the front of `changes`."""
        cdef uint32_t i, kept = 0
        cdef Change change
        qsort(self.changes, count, sizeof(Change), by_position)
        for i in range(count):
            change = self.changes[i]
            if change.mark == 0:
                continue
            if change.parent > self.segment.view.shape.block_capacity or (
                    change.parent != 0
                    and self.seen[change.parent - 1].mark != change.parent_mark):
                continue
            self.seen[change.block].mark = change.mark
            self.seen[change.block].sequence_hash = change.sequence_hash
            self.seen[change.block].group = change.group
            self.changes[kept] = change
            kept += 1
        return kept

    def delta(self) -> Delta:
        """Look at every block, and say what has changed since the last time."""
        cdef uint32_t i, block, count, lost, epoch
        added: list[tuple[int, int]] = []
        removed: list[tuple[int, int]] = []
        self.segment.check_open()
        epoch = kv_u32_load_acquire(&self.segment.view.header.key_epoch)
        if epoch != self.epoch:  # nobody can match what was there before
            self.epoch = epoch
            for i in range(self.segment.view.shape.block_capacity):
                if self.seen[i].mark != 0:
                    removed.append((self.seen[i].sequence_hash, self.seen[i].group))
                    self.hidden[i] = self.seen[i].mark
                    self.seen[i].mark = 0
        with nogil:
            count = self.scan(&lost)
        if lost:
            for i in range(count):
                block = self.changes[i].block
                if self.seen[block].mark != 0:
                    removed.append((self.seen[block].sequence_hash, self.seen[block].group))
                    self.seen[block].mark = 0
        with nogil:
            count = self.accept(count)
        for i in range(count):
            added.append((self.changes[i].sequence_hash, self.changes[i].group))
        return Delta(added, removed)
