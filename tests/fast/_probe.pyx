# SPDX-License-Identifier: Apache-2.0
"""Python names for functions of kvbm/_fast that only other compiled modules call. For tests."""
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memset

from kvbm._fast.atomics cimport kv_u64_load_acquire
from kvbm._fast.blocks cimport (
    ALREADY,
    NO_PARENT,
    PUBLISHED,
    Reservation,
    block_abandon,
    block_evict,
    block_pin,
    block_publish,
    block_reserve,
    block_unpin,
    structure_enter,
    structure_exit,
)
from kvbm._fast.eviction cimport (
    Evictor,
    evictor_advance,
    evictor_free,
    evictor_init,
    evictor_offer,
    evictor_take,
)
from kvbm._fast.index cimport INSERTED, index_delete, index_find, index_insert, index_purge
from kvbm._fast.layout cimport (
    KV_C_EVICTED_CAPACITY,
    KV_NONE,
    KV_OPERATIONS_PER_LEADER,
    kv_entry_handle,
    kv_latency_bucket,
    kv_operation,
    kv_operation_at,
    kv_word_generation,
    kv_word_state,
)
from kvbm._fast.operations cimport (
    ENDED,
    MUST_PUBLISH,
    doorbell_read,
    doorbell_ring,
    doorbell_wait,
    operation_cancel,
    operation_claim,
    operation_end,
    operation_finished,
    operation_publish,
    operation_recycle,
    ring_pop,
)
from kvbm._fast.pool cimport (
    PoolCursor,
    pool_fill,
    pool_free_count,
    pool_give_back,
    pool_has_bit,
    pool_set_word,
    pool_take_run,
)
from kvbm._fast.segment cimport Segment


cdef int halves(bytes digest, uint64_t *lo, uint64_t *hi) except -1:
    cdef uint64_t pair[2]
    if len(digest) != 16:
        raise ValueError("a digest has 16 bytes")
    memcpy(pair, <const char *>digest, 16)
    lo[0] = pair[0]
    hi[0] = pair[1]
    return 0


# ---- pools ---------------------------------------------------------------------------------------
def take_run(Segment s, int pool, uint32_t wanted, uint32_t limit=KV_NONE, uint32_t cursor=0):
    """First index, count and the cursor afterwards."""
    cdef PoolCursor c
    cdef uint32_t first = 0
    c.word_index = 64 * cursor
    count = pool_take_run(&s.view, pool, wanted, limit, &c, &first)
    return first, count, c.word_index // 64


def give_back(Segment s, int pool, uint32_t index):
    pool_give_back(&s.view, pool, index)


def has_bit(Segment s, int pool, uint32_t index):
    return bool(pool_has_bit(&s.view, pool, index))


def set_word(Segment s, int pool, uint32_t word, uint64_t bits):
    pool_set_word(&s.view, pool, word, bits)


def fill(Segment s, int pool):
    pool_fill(&s.view, pool)


def free_count(Segment s, int pool):
    return pool_free_count(&s.view, pool)


def take_and_give_back(Segment s, int pool, int turns, uint32_t wanted):
    """Take and return runs without the GIL; the sum of what was taken."""
    cdef PoolCursor c
    cdef uint32_t first, count, i
    cdef uint64_t total = 0
    cdef int turn
    c.word_index = 0
    with nogil:
        for turn in range(turns):
            count = pool_take_run(&s.view, pool, wanted, KV_NONE, &c, &first)
            total += count
            for i in range(count):
                pool_give_back(&s.view, pool, first + i)
    return total


# ---- index ---------------------------------------------------------------------------------------
def find(Segment s, bytes digest, bint partial_too=False):
    """(block, generation, state) of what the index finds, None if nothing."""
    cdef uint64_t lo, hi, word = 0
    halves(digest, &lo, &hi)
    block = index_find(&s.view, lo, hi, partial_too, &word)
    return None if block == KV_NONE else (block, kv_word_generation(word), kv_word_state(word))


def insert(Segment s, bytes digest, uint32_t block):
    cdef uint64_t lo, hi
    halves(digest, &lo, &hi)
    return index_insert(&s.view, lo, hi, block, False) == INSERTED


def delete(Segment s, bytes digest, uint32_t block):
    cdef uint64_t lo, hi
    halves(digest, &lo, &hi)
    index_delete(&s.view, lo, hi, block)


def purge(Segment s):
    return index_purge(&s.view)


# ---- blocks --------------------------------------------------------------------------------------
def enter(Segment s):
    return bool(structure_enter(&s.view))


def leave(Segment s):
    structure_exit(&s.view)


def pin(Segment s, uint32_t block, bytes digest):
    cdef uint64_t lo, hi
    halves(digest, &lo, &hi)
    return bool(block_pin(&s.view, block, lo, hi))


def unpin(Segment s, uint32_t block, uint64_t tick):
    block_unpin(&s.view, block, tick)


def reserve(Segment s, uint32_t block, uint32_t slot, bytes digest, parent=None,
            uint32_t parent_generation=0, uint32_t priority=0, uint32_t position=0,
            uint32_t group=0, uint64_t sequence_hash=0, uint64_t tick=0):
    """The generation, None if it could not be reserved."""
    cdef Reservation what
    cdef uint32_t generation = 0
    memset(&what, 0, sizeof(what))
    halves(digest, &what.digest_lo, &what.digest_hi)
    what.parent = KV_NONE if parent is None else <uint32_t>parent
    what.parent_generation = parent_generation
    what.priority = priority
    what.position = position
    what.group = group
    what.sequence_hash = sequence_hash
    what.tick = tick
    return generation if block_reserve(&s.view, block, slot, &what, &generation) else None


def publish(Segment s, uint32_t block, uint32_t generation, uint64_t now_ns=1):
    """What became of it: published, already, no parent, gone."""
    result = block_publish(&s.view, block, generation, now_ns)
    if result == PUBLISHED:
        return "published"
    if result == ALREADY:
        return "already"
    return "no parent" if result == NO_PARENT else "gone"


def evict(Segment s, uint32_t block, expected=None):
    """(slot, parent), None if the word was not `expected` (by default: what it is now)."""
    cdef uint32_t slot = KV_NONE, parent = KV_NONE
    word = kv_u64_load_acquire(&s.view.blocks[block].word) if expected is None else expected
    return (slot, parent) if block_evict(&s.view, block, word, &slot, &parent) else None


def abandon(Segment s, uint32_t block, uint32_t generation):
    """The slot, None if the block is not reserved under this generation."""
    cdef uint32_t slot = KV_NONE
    return slot if block_abandon(&s.view, block, generation, &slot) else None


# ---- eviction ------------------------------------------------------------------------------------
cdef class Order:
    """One leader's order of eviction."""

    cdef Segment segment
    cdef Evictor evictor

    def __cinit__(self, Segment segment not None):
        self.segment = segment
        if not evictor_init(&self.evictor, segment.view.shape.block_capacity):
            raise MemoryError("no memory for the heaps")

    def __dealloc__(self):
        evictor_free(&self.evictor)

    def offer(self, uint32_t block):
        evictor_offer(&self.segment.view, &self.evictor, block)

    def advance(self):
        evictor_advance(&self.segment.view, &self.evictor, self.evictor.sweep_step)

    def take(self):
        """(block, slot) of the next victim, None if nothing is evictable."""
        cdef uint32_t block = KV_NONE, slot = KV_NONE
        return (block, slot) if evictor_take(
            &self.segment.view, &self.evictor, KV_C_EVICTED_CAPACITY, &block, &slot) else None


# ---- operations ----------------------------------------------------------------------------------
cdef kv_operation *operation_of(Segment s, uint64_t handle) except NULL:
    if <uint32_t>handle >= KV_OPERATIONS_PER_LEADER:
        raise IndexError(handle)
    return kv_operation_at(&s.view, s.view.leader, <uint32_t>handle)


def pop(Segment s, uint32_t rank):
    """Next handle in this worker's ring, None if it is empty."""
    cdef uint64_t entry = 0
    return kv_entry_handle(entry) if ring_pop(&s.view, rank, &entry) else None


def claim(Segment s, uint64_t handle, uint32_t rank):
    return bool(operation_claim(&s.view, operation_of(s, handle), <uint32_t>(handle >> 32), rank))


def end(Segment s, uint64_t handle, uint32_t rank, bint done):
    """Running, publish or ended."""
    result = operation_end(&s.view, operation_of(s, handle), rank, done)
    if result == MUST_PUBLISH:
        return "publish"
    return "ended" if result == ENDED else "running"


def publish_operation(Segment s, uint64_t handle):
    operation_publish(&s.view, operation_of(s, handle))


def finish_operation(Segment s, uint64_t handle):
    operation_finished(&s.view, operation_of(s, handle))


def cancel(Segment s, uint64_t handle):
    operation_cancel(&s.view, operation_of(s, handle), <uint32_t>(handle >> 32))


def recycle(Segment s, uint64_t handle):
    operation_recycle(&s.view, operation_of(s, handle))


def bell(Segment s, uint32_t leader, uint32_t rank):
    return doorbell_read(&s.view, leader, rank)


def ring(Segment s, uint32_t leader, uint32_t rank):
    doorbell_ring(&s.view, leader, rank)


def wait(Segment s, uint32_t leader, uint32_t rank, uint32_t seen, uint64_t timeout_ns):
    with nogil:
        doorbell_wait(&s.view, leader, rank, seen, timeout_ns)


def latency_bucket(uint64_t ns):
    return kv_latency_bucket(ns)
