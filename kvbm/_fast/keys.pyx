# SPDX-License-Identifier: Apache-2.0
"""Where the digests of a sequence's blocks come from, without converting what is not looked at."""
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.list cimport PyList_GET_SIZE

from kvbm._fast.hashing cimport DigestChain, kv_digest_for_epoch, kv_digest_for_group


cdef extern from *:
    uint64_t bswap64 "__builtin_bswap64"(uint64_t value) nogil


cdef class Keys:
    """Digests of a sequence's blocks, read where they already are.

    Parameters
    ----------
    source : list of bytes or DigestChain
        The engine's block hashes (at least 16 bytes each, read when asked for, so the list may
        grow), or a chain of our own (kvbm._fast.token_chain). A block's digest is the first 16
        bytes of the engine's hash, its sequence hash the last 8, read big-endian: the 64-bit form
        that vLLM publishes in its own events.
    stride : int
        Engine hashes a block; the last one of a block identifies it.
    group : int
        KV-cache group, mixed into the digest.
    mix : bytes
        16 bytes, exclusive-ored with every digest; ``kvbm.hashing.identity_mix``.
    """

    def __init__(self, source: object, stride: int = 1, group: int = 0,
                 mix: bytes = bytes(16)) -> None:
        if isinstance(source, list):
            self.hashes = source
        elif isinstance(source, DigestChain):
            self.chain = source
        else:
            raise TypeError(
                f"keys come from a list of bytes or a DigestChain, not {type(source).__name__}")
        if stride < 1 or (stride != 1 and self.chain is not None):
            raise ValueError(f"stride {stride}: at least 1, and 1 for a DigestChain")
        if len(mix) != 16:
            raise ValueError(f"mix has {len(mix)} bytes: 16 are needed")
        self.stride = stride
        self.group = group
        memcpy(self.mix, PyBytes_AS_STRING(mix), 16)

    cdef void set_epoch(self, uint32_t epoch) noexcept:
        """Mix in the group and this key epoch from now on."""
        self.mask_lo = self.mix[0]
        self.mask_hi = self.mix[1]
        kv_digest_for_group(&self.mask_lo, &self.mask_hi, self.group)
        kv_digest_for_epoch(&self.mask_lo, &self.mask_hi, epoch)

    def __len__(self) -> int:
        return self.count()

    cdef Py_ssize_t count(self) noexcept:
        if self.chain is not None:
            return self.chain.block_count
        return PyList_GET_SIZE(self.hashes) // self.stride

    cdef int digest(self, Py_ssize_t i, uint64_t *lo, uint64_t *hi) except -1:
        cdef object item
        cdef uint64_t pair[2]
        if self.chain is not None:
            pair[0] = self.chain.digests_ptr[2 * i]
            pair[1] = self.chain.digests_ptr[2 * i + 1]
        else:
            item = self.hashes[(i + 1) * self.stride - 1]
            if not isinstance(item, bytes) or PyBytes_GET_SIZE(item) < 16:
                raise ValueError(f"block hash {i} is {item!r}; 16 bytes or more are needed")
            memcpy(pair, PyBytes_AS_STRING(item), 16)
        lo[0] = pair[0] ^ self.mask_lo
        hi[0] = pair[1] ^ self.mask_hi
        return 0

    cdef uint64_t sequence_hash(self, Py_ssize_t i) except? 0:
        """Sequence hash of block `i`, whose digest has been read before."""
        cdef object item
        cdef uint64_t tail
        if self.chain is not None:
            return self.chain.sequence_hashes_ptr[i]
        item = self.hashes[(i + 1) * self.stride - 1]
        memcpy(&tail, PyBytes_AS_STRING(item) + PyBytes_GET_SIZE(item) - 8, 8)
        return bswap64(tail)

    def identity(self, index: int, epoch: int = 0) -> tuple[bytes, int]:
        """Digest (16 bytes) and sequence hash of block `index` at a key epoch, as they are stored.

        Raises
        ------
        IndexError
            There are not that many complete blocks.
        ValueError
            The engine's hash is not 16 bytes or more.
        """
        cdef uint64_t pair[2]
        if not 0 <= index < self.count():
            raise IndexError(f"block {index}: there are {self.count()} complete blocks")
        self.set_epoch(epoch)
        self.digest(index, &pair[0], &pair[1])
        return PyBytes_FromStringAndSize(<char *>pair, 16), self.sequence_hash(index)

    def sequence_hashes(self, start: int, stop: int) -> bytes:
        """Sequence hashes of blocks `start` to `stop`, 8 bytes each in this machine's order.

        Raises
        ------
        IndexError
            There are not that many complete blocks.
        ValueError
            An engine's hash is not 16 bytes or more.
        """
        cdef Py_ssize_t i, first = start, last = stop
        cdef uint64_t pair[2]
        cdef uint64_t value
        if not 0 <= first <= last <= self.count():
            raise IndexError(f"blocks {first} to {last}: there are {self.count()} complete blocks")
        found = PyBytes_FromStringAndSize(NULL, 8 * (last - first))
        for i in range(first, last):
            self.digest(i, &pair[0], &pair[1])
            value = self.sequence_hash(i)
            memcpy(PyBytes_AS_STRING(found) + 8 * (i - first), &value, 8)
        return found
