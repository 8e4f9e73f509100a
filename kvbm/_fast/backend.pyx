# SPDX-License-Identifier: Apache-2.0
"""What moves the bytes of an operation: one interface, one implementation a kind of memory.

A backend is given the rows of an operation, (device block, slot) pairs, and copies every region of
each between the engine's KV cache and the rank's arena. It is called by the worker's copy thread,
without the GIL; it says which row failed first, and looks between rows whether it should stop.

A backend may copy in `submit` and return when that is done, or start the copies and let `poll` tell
how they ended. One of the second kind also learns, on the engine's thread, the moments in the
engine's stream of work that a step's copies must come after.
"""
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.layout cimport kv_operation


cdef class CopyBackend:
    """Base of all backends; copies nothing."""

    def __cinit__(self):
        self.depth = 1

    def set_usable_slots(self, count: int) -> None:
        """Let copies touch the first `count` slots of the arena."""

    def close(self) -> None:
        """Give back what the backend holds; nobody may be copying. May be called twice."""

    cdef int submit(self, uint32_t place, const kv_operation *op, const uint64_t *digests,
                    StopCheck should_stop, void *context, uint32_t *failed_row) noexcept nogil:
        failed_row[0] = 0
        return COPY_FAILED

    cdef int poll(self, uint32_t place, uint32_t *failed_row) noexcept nogil:
        failed_row[0] = 0
        return COPY_FAILED

    cdef bint is_off(self) noexcept nogil:
        return False

    cdef uint64_t bytes_per_block(self) noexcept nogil:
        return 0

    cdef void step_bound(self, uint64_t step, uint64_t stream) noexcept nogil:
        pass

    cdef void step_filled(self, uint64_t step, uint64_t stream) noexcept nogil:
        pass

    cdef bint engine_after(self, uint32_t place, uint64_t stream) noexcept nogil:
        return False
