# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport int64_t, uint8_t, uint32_t

from kvbm._fast.layout cimport kv_shape, kv_view


cdef class Segment:
    cdef kv_view view          # private picture: pointers and the shape as it was when attached
    cdef int fd                # -1 when closed
    cdef uint8_t *base
    cdef size_t mapped_bytes
    cdef readonly str name     # with the leading slash
    cdef readonly bint writable
    cdef long forks            # of the process that mapped it; use after a fork is refused
    cdef object __weakref__

    cdef int check_open(self) except -1
    cdef int check_writable(self) except -1
    cdef int check_header(self, bytes magic, bytes page, object state) except -1
    cdef int map_file(self, int fd, size_t size, bint writable) except -1


cdef int shape_to_c(object shape, kv_shape *c) except -1
cdef int64_t line_lock(uint32_t line) noexcept nogil
cdef int64_t recovery_lock() noexcept nogil
