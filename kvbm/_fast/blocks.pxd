# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.layout cimport kv_view

cdef enum PublishResult:
    PUBLISHED       # now registered by this call
    ALREADY         # registered before, by another publisher of the same reservation
    NO_PARENT       # the parent is not registered (yet, or any more)
    GONE            # no longer reserved under this generation

cdef struct Reservation:     # what a new block is made of
    uint64_t digest_lo
    uint64_t digest_hi
    uint64_t sequence_hash
    uint64_t tick            # of the call; the clock's line is everybody's, so it is read once
    uint32_t parent          # block or KV_NONE
    uint32_t parent_generation
    uint32_t priority
    uint32_t position
    uint32_t group

cdef void block_prefetch(kv_view *view, uint32_t block) noexcept nogil
cdef bint structure_enter(kv_view *view) noexcept nogil
cdef void structure_exit(kv_view *view) noexcept nogil
cdef bint block_pin(kv_view *view, uint32_t block, uint64_t lo, uint64_t hi) noexcept nogil
cdef void block_unpin(kv_view *view, uint32_t block, uint64_t tick) noexcept nogil
cdef void block_used(kv_view *view, uint32_t block) noexcept nogil
cdef bint block_reserve(kv_view *view, uint32_t block, uint32_t slot, const Reservation *what,
                        uint32_t *generation) noexcept nogil
cdef PublishResult block_publish(kv_view *view, uint32_t block, uint32_t generation,
                                 uint64_t now_ns) noexcept nogil
cdef bint block_evict(kv_view *view, uint32_t block, uint64_t expected, uint32_t *host_slot,
                      uint32_t *parent) noexcept nogil
cdef bint block_abandon(kv_view *view, uint32_t block, uint32_t generation,
                        uint32_t *host_slot) noexcept nogil
cdef void block_leave(kv_view *view, uint32_t block, bint uncount_parent,
                      uint32_t *host_slot) noexcept nogil
cdef bint chain_step(kv_view *view, uint32_t *block, uint32_t *generation,
                     uint32_t *slot) noexcept nogil
cdef uint64_t monotonic_ns() noexcept nogil
