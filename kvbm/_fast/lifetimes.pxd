# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.ranks cimport RANK_AGES, Uses

cdef struct Remembered:
    uint64_t digest              # its low half
    uint32_t use                 # the last one of the block; 0 = free
    uint32_t forks               # sequences that had it as the last block they knew


cdef class Lifetimes:
    cdef Uses uses
    cdef Remembered *memory
    cdef uint64_t memory_mask
    cdef uint32_t next_use[RANK_AGES]   # by column: the first use that is not counted yet
    cdef double[:, ::1] reached_rows
    cdef double[:, ::1] used_rows
    cdef readonly object reached
    cdef readonly object used

    cdef void count_column(self, uint32_t column, uint64_t now) noexcept nogil
