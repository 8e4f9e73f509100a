# SPDX-License-Identifier: Apache-2.0
"""Places in the engine's stream, by step: what copies of a step wait for.

The engine's thread records, the copy thread makes its streams wait. The events of a step are reused
MARKS steps later; a copy that is so late waits for the younger step, which is more than it must and
never less.
"""
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.atomics cimport kv_u64_load_acquire, kv_u64_store_release
from kvbm._fast.cuda_device cimport KV_CU_SUCCESS, CudaDevice, kv_cu_stream


cdef class CudaMarks:
    """Places of the last steps.

    Parameters
    ----------
    device : CudaDevice
        Where the engine works.

    Raises
    ------
    CudaFault
        Events cannot be made.
    """

    def __cinit__(self, CudaDevice device not None):
        self.device = device
        self.cuda = &device.cuda
        device.enter()
        while self.created < MARKS:
            device.make_event(&self.event[self.created])
            self.created += 1

    def close(self) -> None:
        """Destroy the events. May be called twice."""
        if self.created:
            self.device.enter()
        while self.created:
            self.created -= 1
            self.cuda.event_destroy(self.event[self.created])

    cdef int record(self, uint64_t step, kv_cu_stream engine) noexcept nogil:
        cdef uint32_t i = step % MARKS
        cdef int error = self.cuda.event_record(self.event[i], engine)
        if error == KV_CU_SUCCESS:
            kv_u64_store_release(&self.step[i], step + 1)
        return error

    cdef int make_wait(self, kv_cu_stream stream, uint64_t step) noexcept nogil:
        """Make a stream wait for the place of a step, or of the next later one that is known."""
        cdef uint32_t i, best = step % MARKS
        cdef uint64_t found = kv_u64_load_acquire(&self.step[best]), other
        if step == 0:
            return KV_CU_SUCCESS  # before the first step nothing is on the engine's stream
        if found <= step:
            found = 0
            for i in range(MARKS):
                other = kv_u64_load_acquire(&self.step[i])
                if other > step and (found == 0 or other < found):
                    best, found = i, other
            if found == 0:
                return MARK_UNKNOWN  # its place could not be recorded, which has been told
        return self.cuda.stream_wait(stream, self.event[best], 0)
