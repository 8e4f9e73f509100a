# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint64_t

from kvbm._fast.atomics cimport kv_au64
from kvbm._fast.cuda_device cimport CudaDevice, kv_cu_event, kv_cu_stream, kv_cuda

cdef enum:
    MARKS = 64                     # steps whose place is remembered
    MARK_UNKNOWN = -1


cdef class CudaMarks:
    cdef CudaDevice device
    cdef kv_cuda *cuda
    cdef uint64_t created
    cdef kv_cu_event event[64]
    cdef kv_au64 step[64]          # step + 1 of the place that was recorded last, 0 = none

    # Both return the driver's error number. Engine's thread; copy thread.
    cdef int record(self, uint64_t step, kv_cu_stream engine) noexcept nogil
    cdef int make_wait(self, kv_cu_stream stream, uint64_t step) noexcept nogil
