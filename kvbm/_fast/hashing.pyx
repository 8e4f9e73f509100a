# SPDX-License-Identifier: Apache-2.0
"""Native hashing: XXH3, arithmetic on digests, and the chain of digests that a match reads.

``kvbm._fast.token_chain.TokenChain`` fills the chain by hashing tokens. Block hashes that the
engine computed need no chain: ``kvbm._fast.keys.Keys`` reads either.

A chain belongs to one request and one thread at a time.
"""
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy

cdef enum:
    NOGIL_BYTES = 1 << 16         # hashing this much takes longer than handing over the GIL


cdef class DigestChain:
    """Digests and sequence hashes of the complete blocks of one request.

    The base of `TokenChain`; it has no blocks of its own. ``len(chain)`` is the number of blocks.
    """

    def __dealloc__(self):
        free(self.digests_ptr)
        free(self.sequence_hashes_ptr)

    def __len__(self):
        return self.block_count

    def digest(self, Py_ssize_t index):
        """Return the 16 bytes (lo, hi, each little-endian) of block ``index``."""
        self._check_block(index)
        return PyBytes_FromStringAndSize(<char *> &self.digests_ptr[2 * index], DIGEST_BYTES)

    def digests(self, Py_ssize_t start=0):
        """Return the digests of blocks ``start`` and up, 16 bytes each, as one copy."""
        self._check_start(start)
        return PyBytes_FromStringAndSize(
            <char *> self.digests_ptr + DIGEST_BYTES * start,
            DIGEST_BYTES * (self.block_count - start),
        )

    def sequence_hash(self, Py_ssize_t index):
        """Return the sequence hash of block ``index``."""
        self._check_block(index)
        return self.sequence_hashes_ptr[index]

    def sequence_hashes(self, Py_ssize_t start=0):
        """Return the sequence hashes of blocks ``start`` and up."""
        cdef Py_ssize_t i
        self._check_start(start)
        return [self.sequence_hashes_ptr[i] for i in range(start, self.block_count)]

    cdef int _reserve_blocks(self, Py_ssize_t blocks) except -1:
        cdef Py_ssize_t capacity
        if blocks <= self._block_capacity:
            return 0
        capacity = max(blocks, 2 * self._block_capacity)
        self.digests_ptr = <uint64_t *> grown(self.digests_ptr, capacity, DIGEST_BYTES)
        self.sequence_hashes_ptr = <uint64_t *> grown(self.sequence_hashes_ptr, capacity, 8)
        self._block_capacity = capacity
        return 0

    cdef int _check_block(self, Py_ssize_t index) except -1:
        if not 0 <= index < self.block_count:
            raise IndexError(f"block {index}: the chain has {self.block_count} complete blocks")
        return 0

    cdef int _check_start(self, Py_ssize_t start) except -1:
        if not 0 <= start <= self.block_count:
            raise IndexError(f"start {start}: the chain has {self.block_count} complete blocks")
        return 0


def xxh3_64(data, uint64_t seed=0, *, bint portable=False):
    """Return XXH3_64 of ``data``, any contiguous buffer, with ``seed`` (unsigned 64 bits).

    ``portable`` leaves out the AVX2 code, for tests and benchmarks; the result is the same.
    """
    cdef Py_buffer view
    cdef uint64_t result
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if portable:
            return kv_xxh3_64_portable(view.buf, view.len, seed)
        if view.len < NOGIL_BYTES:
            return kv_xxh3_64(view.buf, view.len, seed)
        with nogil:
            result = kv_xxh3_64(view.buf, view.len, seed)
        return result
    finally:
        PyBuffer_Release(&view)


def digest_for_group(digest, uint32_t group):
    """Return the digest of the same block in KV-cache group ``group``; group 0 changes nothing."""
    cdef uint64_t[2] words
    copy_fixed(digest, "digest", <uint8_t *> words, DIGEST_BYTES)
    kv_digest_for_group(&words[0], &words[1], group)
    return PyBytes_FromStringAndSize(<char *> words, DIGEST_BYTES)


def digest_for_epoch(digest, uint32_t epoch):
    """Return the digest of the same block at key epoch ``epoch``; epoch 0 changes nothing."""
    cdef uint64_t[2] words
    copy_fixed(digest, "digest", <uint8_t *> words, DIGEST_BYTES)
    kv_digest_for_epoch(&words[0], &words[1], epoch)
    return PyBytes_FromStringAndSize(<char *> words, DIGEST_BYTES)


cdef void *grown(void *block, Py_ssize_t count, Py_ssize_t item_bytes) except NULL:
    """Return ``block`` reallocated to hold ``count`` items."""
    cdef void *larger = realloc(block, max(1, count) * item_bytes)
    if larger is NULL:
        raise MemoryError(f"{count} items of {item_bytes} bytes")
    return larger


cdef int copy_fixed(object data, str name, uint8_t *out, Py_ssize_t size) except -1:
    """Copy the ``size`` bytes of ``data``; any other length is an error that names ``name``."""
    raw = bytes(memoryview(data))
    if len(raw) != size:
        raise ValueError(f"{name} has {len(raw)} bytes: {size} are needed")
    memcpy(out, PyBytes_AS_STRING(raw), size)
    return 0
