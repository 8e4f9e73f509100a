# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.keys cimport Keys
from kvbm._fast.slab cimport kv_slab_header
from kvbm._fast.table cimport BlockTable


cdef class DiskTable(BlockTable):
    cdef bint is_run(self, list found, Keys keys, Py_ssize_t start) except -1
    cdef bint restore_block(self, const kv_slab_header *header, uint64_t tick) noexcept nogil


cdef struct Uses:                # of one block, by the first half of its digest
    uint64_t key
    uint32_t count
    uint32_t decay               # the filter's decay when it was counted last


cdef class FrequencyFilter:
    cdef readonly int least
    cdef Uses *entries
    cdef uint64_t bucket_mask
    cdef uint32_t decay

    cdef uint32_t now(self, const Uses *entry) noexcept nogil
    cdef Uses *find(self, uint64_t key) noexcept nogil
    cdef uint32_t use(self, uint64_t key) noexcept nogil
