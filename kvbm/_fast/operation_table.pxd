# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.keys cimport Keys
from kvbm._fast.layout cimport kv_operation
from kvbm._fast.table cimport BlockTable


cdef class OperationTable(BlockTable):
    cdef uint64_t anchors[128]   # by operation: the held parent of its first row
    cdef uint32_t operation_cursor
    cdef uint32_t looks          # operations that the call in progress may still look at
    cdef uint32_t room           # entries that still fit into the workers' rings

    cdef uint32_t open_operation(self, uint32_t kind, uint64_t step, uint64_t request_key,
                                 uint32_t group, uint64_t anchor) noexcept nogil
    cdef tuple fill(self, uint32_t kind, Keys keys, Py_ssize_t start, Py_ssize_t stop,
                    list sources, object parent, uint64_t step, uint64_t request_key,
                    uint32_t priority)
    cdef list read(self, uint32_t kind, uint64_t ref, Py_ssize_t skip, list targets,
                   uint64_t step, uint64_t request_key, uint32_t group)
    cdef void begin(self) noexcept nogil
    cdef void discard(self, uint32_t *indices, int count) noexcept nogil
    cdef int submit_all(self, uint32_t *indices, int count, list handles) except -1
    cdef kv_operation *checked(self, uint64_t handle) except? NULL
    cdef bint parent_is_filled(self, kv_operation *op) noexcept nogil
    cdef void collect_rows(self, kv_operation *op, bint arrived) noexcept nogil
