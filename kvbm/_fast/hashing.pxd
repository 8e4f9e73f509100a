# SPDX-License-Identifier: Apache-2.0
# What a Cython match function needs: digests without conversion, the mixes, and the checksum.
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "xxh3.h" nogil:
    uint64_t kv_xxh3_64(const void *data, size_t bytes, uint64_t seed) noexcept
    uint64_t kv_xxh3_64_portable(const void *data, size_t bytes, uint64_t seed) noexcept

cdef extern from "digest.h" nogil:
    void kv_digest_for_group(uint64_t *lo, uint64_t *hi, uint32_t group) noexcept
    void kv_digest_for_epoch(uint64_t *lo, uint64_t *hi, uint32_t epoch) noexcept

cdef enum:
    DIGEST_BYTES = 16


cdef class DigestChain:
    # Block i has digest (digests[2 * i], digests[2 * i + 1]) = (lo, hi) and sequence hash
    # sequence_hashes[i], for i < block_count. Both pointers move when the chain grows: read them
    # anew after each call that may change it, and never keep them. Null while nothing was hashed.
    cdef uint64_t *digests_ptr
    cdef uint64_t *sequence_hashes_ptr
    cdef Py_ssize_t block_count
    cdef Py_ssize_t _block_capacity

    cdef int _reserve_blocks(self, Py_ssize_t blocks) except -1
    cdef int _check_block(self, Py_ssize_t index) except -1
    cdef int _check_start(self, Py_ssize_t start) except -1


cdef void *grown(void *block, Py_ssize_t count, Py_ssize_t item_bytes) except NULL
cdef int copy_fixed(object data, str name, uint8_t *out, Py_ssize_t size) except -1
