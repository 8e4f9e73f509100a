# SPDX-License-Identifier: Apache-2.0
"""What moves the bytes of an operation: one interface, one implementation a kind of memory.

A backend is given the rows of an operation, (device block, slot) pairs, and copies every region of each between the
engine's KV cache and the rank's arena. It runs on the worker's copy thread, without the GIL; it says which row
failed first, and looks between rows whether it should stop.
"""
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.layout cimport kv_operation


cdef class CopyBackend:
    """Base of all backends; copies nothing."""

    cdef int copy(self, const kv_operation *op, const uint64_t *digests, StopCheck should_stop, void *context,
                  uint32_t *failed_row) noexcept nogil:
        failed_row[0] = 0
        return COPY_FAILED

    cdef uint64_t bytes_per_block(self) noexcept nogil:
        return 0
