# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.hashing cimport DigestChain


cdef class Keys:
    cdef list hashes             # the engine's block hashes, or None
    cdef DigestChain chain       # or a chain of our own
    cdef Py_ssize_t stride       # engine hashes a block
    cdef uint32_t group
    cdef uint64_t mix[2]         # of what else identifies the request
    cdef uint64_t mask_lo        # of the group and the key epoch
    cdef uint64_t mask_hi
    cdef readonly uint32_t use   # number of the request, see ranks.pyx; 0 = it has none

    cdef void set_epoch(self, uint32_t epoch) noexcept
    cdef Py_ssize_t count(self) noexcept
    cdef int digest(self, Py_ssize_t i, uint64_t *lo, uint64_t *hi) except -1
    cdef uint64_t sequence_hash(self, Py_ssize_t i) except? 0
