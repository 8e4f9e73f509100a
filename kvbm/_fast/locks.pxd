# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport int64_t

cdef int lock_take(int fd, int64_t offset, bint exclusive) noexcept nogil
cdef int lock_drop(int fd, int64_t offset) noexcept nogil
cdef int lock_held_by_other(int fd, int64_t offset) noexcept nogil
