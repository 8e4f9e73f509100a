# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.atomics cimport kv_au32
from kvbm._fast.backend cimport CopyBackend
from kvbm._fast.layout cimport kv_operation, kv_view
from kvbm._fast.segment cimport Segment


cdef struct Waiting:              # operations popped from the ring that may not run yet, oldest first
    uint64_t entries[128]
    uint32_t count


cdef class WorkerLoop:
    cdef readonly Segment segment
    cdef readonly CopyBackend backend
    cdef readonly int rank
    cdef kv_view *view
    cdef uint32_t line
    cdef kv_au32 stopping         # process-private
    cdef Waiting loads
    cdef Waiting stores
    cdef uint64_t digests[256]    # of the rows of the operation that is being copied

    cdef void drain_ring(self) noexcept nogil
    cdef bint next_runnable(self, Waiting *waiting, uint64_t step, uint64_t *entry) noexcept nogil
    cdef void run_operation(self, uint64_t entry) noexcept nogil
    cdef bint rows_are_valid(self, const kv_operation *op, uint32_t *bad_row) noexcept nogil
    cdef void count_copy(self, const kv_operation *op, bint done, uint64_t began) noexcept nogil
    cdef kv_operation *operation_of(self, uint64_t handle, uint64_t *word) except? NULL
