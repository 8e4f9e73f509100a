# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint32_t

from kvbm._fast.disk_backend cimport DiskBackend, Job


cdef class DiskBatches(DiskBackend):
    cdef uint32_t writing         # spills that were taken and not given back; under the lock
    cdef uint32_t writing_max
    cdef Job *next_whole(self) noexcept nogil
    cdef Job *take_job(self) noexcept nogil
    cdef int rows_before(self, Job *job, uint32_t *row) noexcept nogil
    cdef int rows_after(self, Job *job, bint moved, uint32_t *row) noexcept nogil
