# SPDX-License-Identifier: Apache-2.0
# Declarations of copy.h, and the native copy for other modules of _fast.
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvbm._fast.atomics cimport kv_au32, kv_au64


cdef extern from "copy.h" nogil:
    enum:
        KV_RUN_ROWS_MAX
        KV_REGIONS_MAX
        KV_CHECKSUM_PIECE
        KV_COPY_STORE
        KV_COPY_LOAD
        KV_COPY_WITH_CHECKSUM
        KV_COPY_OK
        KV_COPY_STOPPED
        KV_COPY_BAD_BLOCK
        KV_COPY_BAD_SLOT
        KV_COPY_BAD_HEADER
        KV_COPY_TORN
        KV_COPY_NO_CHECKSUM
        KV_COPY_BAD_CHECKSUM
        KV_SLOT_EMPTY
        KV_SLOT_FILLING
        KV_SLOT_VALID

    const uint64_t KV_SLOT_HAS_CHECKSUM

    ctypedef struct kv_slot_header:
        kv_au64 word
        kv_au64 digest_lo
        kv_au64 digest_hi
        kv_au64 checksum
        kv_au64 payload_bytes
        kv_au32 block
        kv_au32 group
        kv_au32 rank

    ctypedef struct kv_region:
        uint8_t *base
        uint64_t block_stride
        uint64_t chunk_bytes
        uint64_t slot_offset

    ctypedef struct kv_arena:
        uint8_t *base
        uint64_t table_offset
        uint64_t data_offset
        uint64_t group_bytes
        uint32_t slots
        uint32_t group_slots
        kv_au32 usable_slots

    ctypedef struct kv_copier:
        kv_arena arena
        kv_region *regions
        uint32_t region_count
        uint32_t device_blocks
        uint64_t block_bytes
        uint32_t run_rows_max
        uint32_t rank
        uint32_t group

    ctypedef struct kv_copy_run:
        uint32_t device_block
        uint32_t slot
        uint32_t count
        uint32_t[64] block
        uint32_t[64] generation
        uint64_t[64] checksum
        const uint64_t *digests

    ctypedef struct kv_copy_result:
        int status
        uint32_t row

    uint64_t kv_slot_word_make(uint32_t state, uint64_t flags, uint32_t generation) noexcept
    void kv_stream_copy(uint8_t *to, const uint8_t *source, size_t count,
                        const uint8_t *ahead) noexcept
    void kv_stream_end() noexcept
    uint64_t kv_checksum(const uint8_t *source, size_t count, uint64_t seed) noexcept
    uint64_t kv_stream_copy_checksum(uint8_t *to, const uint8_t *source, size_t count,
                                     uint64_t seed) noexcept

ctypedef bint (*kv_should_stop)(void *) noexcept nogil

# Copy `count` rows, in order, between the device blocks and the slots that they name.
#
# direction    KV_COPY_STORE (device -> host) or KV_COPY_LOAD (host -> device)
# rows         first row, a kv_row, the next ones row_stride bytes apart; may be shared memory
# digests      (lo, hi) of each row, in memory that nobody else changes
# flags        KV_COPY_WITH_CHECKSUM or 0
# should_stop  asked before each run with `argument`; NULL never stops
# result       the status and the row it is about. Rows before it are complete. The device blocks
#              of it and of later rows of a load may hold anything; the slots of it and of later
#              rows of a store are as they were, since a store ends early only between runs.
# Returns the status. Touches no memory outside the regions and the arena of `copier`.
cdef int copy_rows(const kv_copier *copier, int direction, const void *rows, size_t row_stride,
                   const uint64_t *digests, uint32_t count, uint32_t flags,
                   kv_should_stop should_stop, void *argument,
                   kv_copy_result *result) noexcept nogil

# The parts of copy_rows, for backends that move the bytes in another way and later.
#
# form_run     the longest run from row `first` on; its digests point into `digests`
# mark_*       a store's slot headers before the first and after the last byte
# check_*      a load's slot headers before and after; `done` counts the rows that are right
# slot_piece   address of a slot's piece of a region
cdef int form_run(const kv_copier *copier, const uint8_t *rows, size_t row_stride,
                  const uint64_t *digests, uint32_t first, uint32_t count,
                  kv_copy_run *run) noexcept nogil
cdef void mark_filling(const kv_copier *copier, const kv_copy_run *run) noexcept nogil
cdef void mark_valid(const kv_copier *copier, const kv_copy_run *run,
                     uint32_t flags) noexcept nogil
cdef int check_before(const kv_copier *copier, kv_copy_run *run, uint32_t flags) noexcept nogil
cdef int check_after(const kv_copier *copier, const kv_copy_run *run, uint32_t flags,
                     uint32_t *done) noexcept nogil
cdef uint8_t *slot_piece(const kv_arena *arena, const kv_region *region,
                         uint32_t slot) noexcept nogil


cdef class HostCopier:
    cdef kv_copier copier        # what copy_rows takes; valid as long as this object lives
    cdef kv_region *_regions     # owned; copier.regions is the same
    cdef Py_buffer _arena        # held, so that the arena cannot be unmapped under a copy
    cdef bint _arena_held
    cdef object _keep_alive      # owners of the device memory
