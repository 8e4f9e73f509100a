# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.blocks cimport Reservation
from kvbm._fast.eviction cimport Evictor
from kvbm._fast.keys cimport Keys
from kvbm._fast.layout cimport kv_view
from kvbm._fast.ranks cimport Uses
from kvbm._fast.segment cimport Segment
from kvbm._fast.supply cimport Supply


cdef enum:
    KEYS_AHEAD = 2                 # whose index lines are asked for while a block is reserved


cdef class BlockTable:
    cdef readonly Segment segment
    cdef kv_view *view
    cdef uint32_t *pins          # how often this leader holds each block
    cdef Evictor evictor
    cdef Supply supply
    cdef readonly Uses uses      # None: upstream's order, or a policy that failed
    cdef uint32_t use            # of the sequence in the call in progress

    cdef tuple noted(self, Keys keys, Py_ssize_t start, Py_ssize_t stop, bint is_lookup)
    cdef tuple longest(self, Keys keys, Py_ssize_t first, Py_ssize_t stop, bint is_lookup)
    cdef int mix(self, Keys keys) except -1
    cdef uint32_t probe(self, Keys keys, Py_ssize_t i, uint64_t *word) except? 0
    cdef int prefetch(self, Keys keys, Py_ssize_t i, Py_ssize_t end) except -1
    cdef bint hold_parent(self, uint64_t ref) noexcept nogil
    cdef void let_go(self, uint64_t ref, uint64_t tick) noexcept nogil
    cdef int check_ref(self, uint64_t ref) except -1
    cdef uint64_t parent_ref(self, object parent, Py_ssize_t start) except? 0xFFFFFFFFFFFFFFFF
    cdef bint reserve_block(self, const Reservation *what, uint32_t wanted, uint32_t *block,
                            uint32_t *generation, uint32_t *slot) noexcept nogil
    cdef void abandon(self, uint32_t block, uint32_t generation) noexcept nogil

cdef void set_parent(Reservation *what, uint64_t ref) noexcept nogil


cdef inline uint64_t make_ref(uint32_t block, uint32_t generation) noexcept nogil:
    return (<uint64_t>generation << 32) | block
