# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.layout cimport (
    KV_HOLDERS_MASK,
    KV_REGISTERED,
    kv_counter,
    kv_view,
    kv_word_children,
    kv_word_state,
)
from kvbm._fast.ranks cimport Ranks

cdef enum:
    SWEEP_STEP_SMALL = 16          # blocks looked at a call, at least, in a small table
    SWEEP_STEP_LARGE = 2           # and in a large one, whose lines come from memory
    SMALL_TABLE = 65536            # blocks whose lines stay in a core's cache
    RETRY_EMPTY_NS = 1000000       # after a sweep that found nothing, do not sweep again for 1 ms

cdef struct Candidate:
    uint64_t recency
    uint32_t block
    uint32_t generation

cdef struct CandidateHeap:      # binary min-heap by recency, then by block; each block once at most
    Candidate *items
    uint64_t *present           # by block, a bit each
    uint32_t count
    uint64_t recency_max        # the latest that was ever pushed

# One leader's private picture of what to evict next; nothing of it is shared.
cdef struct Evictor:
    CandidateHeap ready         # victims in order
    CandidateHeap gathering     # what the sweep in progress has found
    uint64_t sweep_start_tick   # later ticks are left to the next sweep
    uint64_t ready_start_tick   # the same of the sweep that `ready` came from
    uint32_t sweep_seen         # registered blocks that nobody held, in the sweep so far
    uint32_t taken              # evictions since `ready` was filled
    uint32_t cursor             # next block that the sweep looks at
    uint32_t sweep_least        # blocks looked at a call, at least
    uint32_t sweep_step         # blocks looked at an eviction
    uint64_t found_nothing_ns   # when a sweep over everything found nothing, 0 = it did not
    Ranks *ranks                # NULL: upstream's order; else all but found_nothing_ns is there

cdef bint evictor_init(Evictor *e, uint32_t capacity) noexcept nogil
cdef void evictor_order_by(Evictor *e, uint32_t capacity, Ranks *ranks) noexcept nogil
cdef void evictor_free(Evictor *e) noexcept nogil
cdef void evictor_offer(kv_view *view, Evictor *e, uint32_t block) noexcept nogil
cdef void evictor_advance(kv_view *view, Evictor *e, uint32_t step) noexcept nogil
cdef bint evictor_take(kv_view *view, Evictor *e, kv_counter reason, uint32_t *block,
                       uint32_t *host_slot) noexcept nogil


cdef inline bint unheld(uint64_t word) noexcept nogil:
    return kv_word_state(word) == KV_REGISTERED and word & KV_HOLDERS_MASK == 0


cdef inline bint evictable(uint64_t word) noexcept nogil:
    return unheld(word) and kv_word_children(word) == 0
