# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.segment cimport Segment


cdef struct Seen:               # what the watch knows of one block record
    uint64_t sequence_hash
    uint32_t mark               # 1 << 31 | generation of a registered block; 0: none
    uint32_t group


cdef struct Change:             # a block that is registered now and was not, as it was read
    uint64_t sequence_hash
    uint32_t block
    uint32_t mark
    uint32_t parent             # block + 1, 0 = root
    uint32_t parent_mark
    uint32_t position
    uint32_t group


cdef class TableWatch:
    cdef Segment segment
    cdef Seen *seen             # one a record
    cdef uint32_t *hidden       # marks of blocks from before a reset: never told of again
    cdef Change *changes        # room for one a record
    cdef uint64_t counted
    cdef uint32_t epoch

    cdef uint32_t scan(self, uint32_t *lost) noexcept nogil
    cdef uint32_t accept(self, uint32_t count) noexcept nogil
    cdef uint64_t count_changes(self) noexcept nogil
