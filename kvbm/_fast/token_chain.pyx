# SPDX-License-Identifier: Apache-2.0
"""The chain that hashes tokens itself, for engines without block hashes that can be trusted.

Per complete block it keeps

- the *block hash* and the *sequence hash* of KVBM 1.x, bit for bit::

      block_hash[i] = XXH3_64(tokens[i] as u32 LE, seed=salt_hash)
      sequence_hash[0] = block_hash[0]
      sequence_hash[i] = XXH3_64(LE64(sequence_hash[i-1]) + LE64(block_hash[i]), seed=salt_hash)

- a 128-bit *digest* from two lanes with different seeds, each over the whole previous digest::

      digest[i][lane] = XXH3_64(digest[i-1] + tokens[i] as u32 LE + extra[i], seed=lane_seed[lane])

  where ``digest[-1]`` is the root of the chain and ``extra[i]`` is empty or 32 bytes.

Where a block has extra keys they follow its tokens in the block hash too (KVBM 1.x refuses such
requests, so there is nothing to agree with).

Collisions. Two different blocks meet in a digest with probability 2**-128 a pair if the lanes
behave like independent random functions: among n blocks about n**2 / 2**129, which is 1.5e-21 for
10**9 blocks. XXH3 is not cryptographic: somebody who knows the seeds can construct a collision.
Where tenants do not trust each other, use the engine's SHA-256 hashes or keyed BLAKE2
(``kvbm.hashing.token_chain(..., key=...)``), not the lanes.

Invariants between calls:
    block_count == _token_count // _block_size
    every complete block has been hashed, from exactly the tokens in _tokens
    len(_external) <= block_count
A call that raises leaves the chain as it was.
"""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcmp, memcpy

from kvbm._fast.hashing cimport DIGEST_BYTES, DigestChain, copy_fixed, grown, kv_xxh3_64
from kvbm._fast.tokens cimport copy_tokens, sized

from collections import namedtuple

cdef enum:
    EXTRA_BYTES = 32              # of one block's extra keys, already hashed
    BLOCK_SIZE_MAX = 1 << 16      # tokens
    TAIL_TOKENS = 64              # compared before a list is believed to have only grown

TokenBlock = namedtuple(
    "TokenBlock", ["tokens", "block_hash", "sequence_hash", "parent_sequence_hash", "digest"]
)


cdef class TokenChain(DigestChain):
    """The tokens of one request and the hashes of its complete blocks, kept up to date.

    Parameters
    ----------
    block_size
        Tokens a block, 1 to 65,536.
    salt_hash
        Seed of block and sequence hashes, unsigned 64 bits; ``kvbm.hashing.salt_hash``.
    identity
        32 bytes: the seeds of the two digest lanes and the root of the digest chain, four u64
        little-endian. None derives them from ``salt_hash``.
    extra
        Block index -> 32 bytes that enter the hashes of that block besides its tokens.
    digest_function
        Called as ``digest_function(message)`` for each block instead of the two lanes; ``message``
        is the previous digest (16 bytes), the tokens (u32 little-endian) and the extra bytes. It
        returns the 16 bytes of the digest.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    def __cinit__(
        self, block_size, uint64_t salt_hash, *, identity=None, extra=None, digest_function=None
    ):
        cdef uint64_t[4] words
        cdef int i
        if not 1 <= block_size <= BLOCK_SIZE_MAX:
            raise ValueError(f"block_size={block_size!r} is not allowed: use 1 to {BLOCK_SIZE_MAX}")
        if identity is None:
            for i in range(4):
                words[i] = kv_xxh3_64(&salt_hash, sizeof(salt_hash), <uint64_t> (i + 1))
        else:
            copy_fixed(identity, "identity", <uint8_t *> words, sizeof(words))
        self._lane_seeds[0], self._lane_seeds[1] = words[0], words[1]
        self._root[0], self._root[1] = words[2], words[3]
        self._extra = checked_extra(extra)
        self._digest_function = digest_function
        self._external = []
        self._salt_hash = salt_hash
        self._block_size = block_size
        self._message = <uint8_t *> grown(NULL, DIGEST_BYTES + 4 * block_size + EXTRA_BYTES, 1)

    def __dealloc__(self):
        free(self._tokens)
        free(self._block_hashes)
        free(self._message)

    @property
    def block_size(self):
        """Tokens a block."""
        return self._block_size

    @property
    def salt_hash(self):
        """Seed of block and sequence hashes."""
        return self._salt_hash

    @property
    def total_tokens(self):
        """Number of tokens, those of the incomplete block included."""
        return self._token_count

    def update(self, tokens):
        """Make the chain that of ``tokens``, looking only at what is new; return complete blocks.

        If ``tokens`` is the list of the previous ``update`` (the same object), nothing was appended
        to the chain since, and its last 64 known values are still there, it is taken to have grown
        only: just the values after the known ones are read. Any other input is compared with the
        known tokens from the start, and hashed from the first block that differs.

        A caller that edits a list in place further back than 64 values and lets it grow to its old
        length again must call ``truncate`` for what it changed.

        Parameters
        ----------
        tokens
            list or tuple of int; or a one-dimensional contiguous buffer of 2-, 4- or 8-byte
            integers; or any other sequence of int, which is copied to a list first.

        Raises
        ------
        TypeError, ValueError
            If a token is no integer or not in 0 to 2**32 - 1; names its index and value. The chain
            stays as it was.
        """
        cdef object source = sized(tokens)
        cdef Py_ssize_t count = len(source)
        cdef Py_ssize_t known = self._token_count
        if not (source is self._source and count >= known and self._tail_matches(source)):
            known = self._common_prefix(source, count)
        if known < count or known < self._token_count:
            self._replace_from(known, source, count)
        self._source = source if isinstance(source, (list, tuple)) else None
        return self.block_count

    def extend(self, tokens):
        """Append ``tokens``; return the range of blocks that this completed, or None."""
        cdef object source = sized(tokens)
        cdef Py_ssize_t first = self.block_count
        self._append_from(source, 0, len(source))
        self._source = None
        return range(first, self.block_count) if self.block_count > first else None

    def append(self, token):
        """Append one token; return the index of the block that this completed, or None."""
        completed = self.extend((token,))
        return None if completed is None else completed.start

    def truncate(self, Py_ssize_t count):
        """Keep the first ``count`` tokens; nothing happens if there are no more than that.

        Raises
        ------
        ValueError
            If ``count`` is negative.
        """
        if count < 0:
            raise ValueError(f"count={count} is not allowed: use 0 or more")
        if count < self._token_count:
            self._truncate(count)

    def unwind(self, Py_ssize_t count):
        """Remove the last ``count`` tokens.

        Raises
        ------
        ValueError
            If ``count`` is negative or more than ``total_tokens``.
        """
        if not 0 <= count <= self._token_count:
            raise ValueError(f"count={count} is not allowed: use 0 to {self._token_count}")
        self.truncate(self._token_count - count)

    def pop(self):
        """Remove the last token and return it; None if there is none."""
        if self._token_count == 0:
            return None
        last = self._tokens[self._token_count - 1]
        self.truncate(self._token_count - 1)
        return last

    def tokens(self, Py_ssize_t start=0, stop=None):
        """Return the tokens from ``start`` to before ``stop`` (default: all) as a list."""
        cdef Py_ssize_t end = self._token_count if stop is None else stop
        cdef Py_ssize_t i
        if not 0 <= start <= end <= self._token_count:
            raise IndexError(f"tokens {start} to {end}: the chain has {self._token_count}")
        return [self._tokens[i] for i in range(start, end)]

    def block_hash(self, Py_ssize_t index):
        """Return the block hash (tokens of this block alone) of block ``index``."""
        self._check_block(index)
        return self._block_hashes[index]

    def blocks(self):
        """Return a ``TokenBlock`` for each complete block."""
        cdef Py_ssize_t i
        size = self._block_size
        return [
            TokenBlock(
                tuple(self.tokens(i * size, (i + 1) * size)),
                self._block_hashes[i],
                self.sequence_hashes_ptr[i],
                self.sequence_hashes_ptr[i - 1] if i else None,
                self.digest(i),
            )
            for i in range(self.block_count)
        ]

    def sync_external_sequence_hashes(self, hashes):
        """Attach the engine's own hashes to the complete blocks, for events.

        Raises
        ------
        ValueError
            If there is not one hash a complete block, or one differs from what was attached before.
        """
        told = list(hashes)
        if len(told) != self.block_count:
            raise ValueError(
                f"{len(told)} external sequence hashes for {self.block_count} complete blocks"
            )
        for index, known in enumerate(self._external):
            if told[index] != known:
                raise ValueError(
                    f"external sequence hash {index} is {told[index]}, it was {known} before"
                )
        self._external = told

    def external_sequence_hashes(self):
        """Return the engine's hashes of the first blocks, as far as they were attached."""
        return list(self._external)

    cdef int _replace_from(self, Py_ssize_t known, object source, Py_ssize_t count) except -1:
        # The tokens that go away are kept until the new ones have proved to be tokens.
        removed = self.tokens(known)
        external = list(self._external)
        self._truncate(known)
        try:
            self._append_from(source, known, count)
        except BaseException:
            self._append_from(removed, 0, len(removed))
            self._external = external
            raise
        return 0

    cdef int _reserve_tokens(self, Py_ssize_t count) except -1:
        cdef Py_ssize_t capacity, blocks
        if count > self._token_capacity:
            capacity = max(count, 2 * self._token_capacity)
            self._tokens = <uint32_t *> grown(self._tokens, capacity, 4)
            self._token_capacity = capacity
        blocks = count // self._block_size
        if blocks > self._block_capacity:
            # First, since _reserve_blocks moves the capacity that both follow.
            capacity = max(blocks, 2 * self._block_capacity)
            self._block_hashes = <uint64_t *> grown(self._block_hashes, capacity, 8)
            self._reserve_blocks(blocks)
        return 0

    cdef int _append_from(self, object tokens, Py_ssize_t start, Py_ssize_t stop) except -1:
        cdef Py_ssize_t before = self._token_count
        self._reserve_tokens(before + stop - start)
        copy_tokens(tokens, start, stop, self._tokens + before)
        self._token_count = before + stop - start
        try:
            self._hash_complete_blocks()
        except BaseException:  # only a digest function can raise
            self._truncate(before)
            raise
        return 0

    cdef int _hash_complete_blocks(self) except -1:
        cdef Py_ssize_t target = self._token_count // self._block_size
        cdef Py_ssize_t i
        cdef bytes extra
        for i in range(self.block_count, target):
            extra = self._extra.get(i) if self._extra else None
            if extra is not None:
                memcpy(self._message + DIGEST_BYTES + 4 * self._block_size,
                       PyBytes_AS_STRING(extra), EXTRA_BYTES)
            self._hash_block(i, EXTRA_BYTES if extra is not None else 0)
            if self._digest_function is not None:
                self._call_digest_function(
                    i, DIGEST_BYTES + 4 * self._block_size + (EXTRA_BYTES if extra else 0))
            self.block_count = i + 1
        return 0

    cdef void _hash_block(self, Py_ssize_t index, size_t extra_bytes) noexcept nogil:
        cdef uint8_t *message = self._message
        cdef uint8_t *content = message + DIGEST_BYTES
        cdef size_t block_bytes = 4 * <size_t> self._block_size
        cdef size_t content_bytes = block_bytes + extra_bytes
        cdef uint64_t *previous = &self.digests_ptr[2 * (index - 1)] if index else self._root
        cdef uint64_t[2] pair
        memcpy(message, previous, DIGEST_BYTES)
        memcpy(content, self._tokens + index * self._block_size, block_bytes)
        if self._digest_function is None:
            self.digests_ptr[2 * index] = kv_xxh3_64(
                message, DIGEST_BYTES + content_bytes, self._lane_seeds[0])
            self.digests_ptr[2 * index + 1] = kv_xxh3_64(
                message, DIGEST_BYTES + content_bytes, self._lane_seeds[1])
        pair[1] = kv_xxh3_64(content, content_bytes, self._salt_hash)
        self._block_hashes[index] = pair[1]
        if index:
            pair[0] = self.sequence_hashes_ptr[index - 1]
            self.sequence_hashes_ptr[index] = kv_xxh3_64(pair, sizeof(pair), self._salt_hash)
        else:
            self.sequence_hashes_ptr[index] = pair[1]

    cdef int _call_digest_function(self, Py_ssize_t index, size_t message_bytes) except -1:
        message = PyBytes_FromStringAndSize(<char *> self._message, message_bytes)
        copy_fixed(self._digest_function(message), "result of digest_function",
                   <uint8_t *> &self.digests_ptr[2 * index], DIGEST_BYTES)
        return 0

    cdef Py_ssize_t _common_prefix(self, object tokens, Py_ssize_t count) except -1:
        """Return how many of the first tokens are the known ones."""
        cdef Py_ssize_t compared = min(count, self._token_count)
        cdef Py_ssize_t i = 0
        cdef uint32_t *scratch
        if compared == 0:
            return 0
        scratch = <uint32_t *> grown(NULL, compared, 4)
        try:
            copy_tokens(tokens, 0, compared, scratch)
            if memcmp(scratch, self._tokens, 4 * compared) == 0:
                return compared
            while scratch[i] == self._tokens[i]:
                i += 1
            return i
        finally:
            free(scratch)

    cdef bint _tail_matches(self, object tokens) except -1:
        """Return whether the last known tokens are still where they were; list or tuple only."""
        cdef uint32_t[TAIL_TOKENS] tail
        cdef Py_ssize_t stop = self._token_count
        cdef Py_ssize_t start = max(0, stop - TAIL_TOKENS)
        copy_tokens(tokens, start, stop, tail)
        return memcmp(tail, self._tokens + start, 4 * (stop - start)) == 0

    cdef void _truncate(self, Py_ssize_t count) noexcept:
        self._token_count = count
        self.block_count = min(self.block_count, count // self._block_size)
        del self._external[self.block_count:]


cdef dict checked_extra(object extra):
    """Return a copy of the extra keys; None if there are none."""
    if not extra:
        return None
    for index, value in extra.items():
        if not isinstance(value, bytes) or len(value) != EXTRA_BYTES:
            raise ValueError(f"extra[{index}] is {value!r}: {EXTRA_BYTES} bytes are needed")
    return dict(extra)
