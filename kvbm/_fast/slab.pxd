# SPDX-License-Identifier: Apache-2.0
# Declarations of slab.h, and the functions on headers for other modules of _fast.
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t


cdef extern from "slab.h" nogil:
    ctypedef struct kv_piece:
        void *iov_base
        size_t iov_len

    ctypedef int64_t off_t
    ctypedef long ssize_t
    ctypedef ssize_t (*kv_transfer_call)(int, const kv_piece *, int, off_t) noexcept nogil
    ctypedef int (*kv_sync_call)(int) noexcept nogil

    enum:
        KV_SLAB_EMPTY
        KV_SLAB_VALID

    ctypedef struct kv_slab_header:
        uint64_t magic
        uint32_t state
        uint32_t generation
        uint64_t digest_lo
        uint64_t digest_hi
        uint64_t parent_lo
        uint64_t parent_hi
        uint64_t fingerprint
        uint64_t payload_bytes
        uint64_t data_checksum
        uint64_t sequence_hash
        uint64_t written_ns
        uint32_t slot
        uint32_t position
        uint32_t group
        uint32_t rank

    ctypedef struct kv_slab_calls:
        kv_transfer_call read
        kv_transfer_call write
        kv_sync_call sync

    const kv_slab_calls kv_system_calls

    void kv_slab_header_seal(kv_slab_header *header) noexcept
    bint kv_slab_header_is_whole(const kv_slab_header *header) noexcept
    bint kv_slab_header_holds(const kv_slab_header *header, uint32_t slot, uint32_t rank,
                              uint64_t fingerprint, uint64_t payload_bytes) noexcept


# What the I/O of one slab needs to know; private to the process.
cdef struct SlabFile:
    int data_fd                  # with O_DIRECT where that is on
    int table_fd                 # through the page cache: neighbouring headers share a page
    uint64_t table_offset
    uint64_t data_offset
    uint64_t stride              # bytes from one slot to the next
    uint64_t payload_bytes
    uint64_t fingerprint
    uint32_t slots
    uint32_t rank
    bint durable                 # the slab outlives the process: syncs are not left out
    kv_slab_calls calls

cdef int slab_read_header(const SlabFile *file, uint32_t slot,
                          kv_slab_header *header) noexcept nogil
cdef int slab_write_header(const SlabFile *file, uint32_t slot,
                           kv_slab_header *header) noexcept nogil
cdef int slab_empty_header(const SlabFile *file, uint32_t slot, uint32_t *generation,
                           bint *was_valid) noexcept nogil
