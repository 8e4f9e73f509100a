# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvbm._fast.keys cimport Keys
from kvbm._fast.layout cimport kv_view

cdef enum:
    RANK_AGES = 64                 # columns of the table: half octaves of a block's age in ticks
    RANK_CLASSES = 256             # rows of the table; row 0: nothing is known
    USES_SHIFT = 16
    USES = 1 << USES_SHIFT         # requests whose class is remembered
    ORDER_TICK_BITS = 40           # of an order: priority 63..48 | rank 47..40 | tick

# By block: its last use by this leader. Others have used it since if its tick is another one now.
cdef struct Stamp:
    uint32_t use                   # number of the request, 0 = not known
    uint32_t tick                  # low bits of the block's tick then

cdef struct Use:                   # of a request
    uint64_t returned              # tick of its last return; of its arrival before that
    uint8_t rank_class             # row of the table
    uint8_t cohort                 # row of the statistics, kvbm/_fast/lifetimes.pyx
    uint8_t ended                  # age at which its chain was used again + 1, 0 = it was not

cdef struct Ranked:                # a block in the order
    uint64_t order                 # see ranks_order
    uint32_t block
    uint32_t generation

cdef struct RankedHeap:            # min-heap by order, then by block; each block once at most
    Ranked *items
    uint32_t *place                # by block: its item + 1, 0 = it has none
    uint32_t count

cdef struct Ranks:
    RankedHeap ready               # kvbm/_fast/ranked.pyx, which has the next fields as well
    RankedHeap gathering           # what the sweep in progress has found
    uint32_t cursor                # next block that the sweep looks at
    uint32_t returned              # the block that was offered last, KV_NONE = none
    bint swept                     # everything has been looked at once
    Stamp *stamps                  # by block
    Use *uses                      # by number modulo USES
    uint32_t last                  # number of the latest request
    uint32_t blocks
    uint8_t table[RANK_CLASSES * RANK_AGES]

cdef class Uses:
    cdef Ranks ranks
    cdef kv_view *view
    cdef object segment            # keeps the view alive
    cdef object policy

    cdef uint32_t begin(self) noexcept
    cdef int arrived(self, Keys keys, Py_ssize_t stop, Py_ssize_t hits) except -1

cdef void ranks_stamp(kv_view *view, Ranks *r, uint32_t block, uint32_t use) noexcept nogil
cdef void ranks_returned(kv_view *view, Ranks *r, uint32_t block, uint64_t tick) noexcept nogil
cdef void ranks_check(kv_view *view, Ranks *r, uint32_t block) noexcept nogil
cdef void ranks_inherit(kv_view *view, Ranks *r, uint32_t child, uint32_t parent) noexcept nogil
cdef uint64_t ranks_order(const Ranks *r, uint32_t block, uint64_t recency,
                          uint64_t now) noexcept nogil


cdef extern from *:
    int clz64 "__builtin_clzll"(unsigned long long value) nogil


cdef inline uint32_t age_column(uint64_t age) noexcept nogil:
    """Column of an age: two an octave, 0, 1, 2, 3, 4-5, 6-7, 8-11, 12-15, ..."""
    cdef uint32_t top
    if age < 4:
        return <uint32_t>age
    top = 63 - clz64(age)
    top = 2 * top + <uint32_t>((age >> (top - 1)) & 1)
    return top if top < RANK_AGES else RANK_AGES - 1


cdef inline Use *use_of(const Ranks *r, uint32_t number) noexcept nogil:
    """A request by its number; NULL if it is not known any more."""
    if number == 0 or r.last - number >= USES:
        return NULL
    return &r.uses[number % USES]


cdef inline bint same_use(uint64_t order, uint64_t other) noexcept nogil:
    """True if two orders of a block differ in its rank at most."""
    return ((order ^ other) & ~((<uint64_t>0xFF) << ORDER_TICK_BITS)) == 0
