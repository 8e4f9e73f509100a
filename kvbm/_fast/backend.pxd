# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.layout cimport kv_operation

ctypedef bint (*StopCheck)(void *context) noexcept nogil

cdef enum CopyStatus:
    COPY_DONE = 0
    COPY_FAILED = 1         # failed_row says which row first
    COPY_STOPPED = 2        # the operation was cancelled; rows before failed_row are complete


cdef class CopyBackend:
    cdef readonly str name
    # Copy all rows of `op`. `digests` are (lo, hi) of each row's block. Called by one thread, without the GIL.
    cdef int copy(self, const kv_operation *op, const uint64_t *digests, StopCheck should_stop, void *context,
                  uint32_t *failed_row) noexcept nogil
    cdef uint64_t bytes_per_block(self) noexcept nogil
