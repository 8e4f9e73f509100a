# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.layout cimport kv_view

cdef struct PoolCursor:      # where one process last took or gave back bits: it looks there first
    uint32_t word_index

cdef uint32_t pool_take_run(kv_view *view, int pool, uint32_t wanted, uint32_t limit,
                            PoolCursor *cursor, uint32_t *first) noexcept nogil
cdef bint pool_take_one(kv_view *view, int pool, uint32_t index) noexcept nogil
cdef void pool_give_back(kv_view *view, int pool, uint32_t index) noexcept nogil
cdef bint pool_has_bit(kv_view *view, int pool, uint32_t index) noexcept nogil
cdef void pool_fill(kv_view *view, int pool) noexcept nogil
cdef void pool_set_word(kv_view *view, int pool, uint32_t word_index, uint64_t bits) noexcept nogil
cdef uint64_t pool_free_count(kv_view *view, int pool) noexcept nogil
