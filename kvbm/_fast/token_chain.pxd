# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvbm._fast.hashing cimport DigestChain


cdef class TokenChain(DigestChain):
    cdef uint32_t _block_size            # tokens
    cdef uint64_t _salt_hash             # seed of block hashes and sequence hashes
    cdef uint64_t[2] _lane_seeds         # seeds of the two halves of a digest
    cdef uint64_t[2] _root               # the digest "before" the first block
    cdef uint32_t *_tokens               # all tokens, those of the incomplete block included
    cdef Py_ssize_t _token_count
    cdef Py_ssize_t _token_capacity
    cdef uint64_t *_block_hashes         # one a complete block
    cdef uint8_t *_message               # scratch: previous digest, tokens, extra keys
    cdef dict _extra                     # block index -> 32 bytes of extra keys
    cdef object _digest_function         # replaces the two lanes, or None
    cdef object _source                  # the list that update() saw last, unless more came since
    cdef list _external                  # sequence hashes that the engine told

    cdef int _reserve_tokens(self, Py_ssize_t count) except -1
    cdef int _replace_from(self, Py_ssize_t known, object source, Py_ssize_t count) except -1
    cdef int _append_from(self, object tokens, Py_ssize_t start, Py_ssize_t stop) except -1
    cdef int _hash_complete_blocks(self) except -1
    cdef void _hash_block(self, Py_ssize_t index, size_t extra_bytes) noexcept nogil
    cdef int _call_digest_function(self, Py_ssize_t index, size_t message_bytes) except -1
    cdef Py_ssize_t _common_prefix(self, object tokens, Py_ssize_t count) except -1
    cdef bint _tail_matches(self, object tokens) except -1
    cdef void _truncate(self, Py_ssize_t count) noexcept
