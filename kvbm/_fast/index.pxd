# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.layout cimport kv_view

ctypedef enum InsertResult:
    FULL = 0
    INSERTED = 1
    TAKEN = 2

cdef uint32_t index_find(kv_view *view, uint64_t lo, uint64_t hi, bint partial_too,
                         uint64_t *word) noexcept nogil
cdef InsertResult index_insert(kv_view *view, uint64_t lo, uint64_t hi, uint32_t block,
                               bint alone) noexcept nogil
cdef void index_prefetch(kv_view *view, uint64_t lo, uint64_t hi) noexcept nogil
cdef void index_delete(kv_view *view, uint64_t lo, uint64_t hi, uint32_t block) noexcept nogil
cdef uint64_t index_purge(kv_view *view) noexcept nogil
