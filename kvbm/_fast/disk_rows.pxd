# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvbm._fast.copy cimport kv_copier
from kvbm._fast.layout cimport kv_operation, kv_view
from kvbm._fast.slab cimport SlabFile, kv_piece


cdef enum DiskProblem:           # besides the system's error numbers, which are positive
    DISK_FINE = 0
    DISK_STOPPED = -1            # the operation was cancelled
    DISK_BAD_SOURCE = -2         # spill: the host slot does not hold what the row says
    DISK_BAD_HEADER = -3         # fetch: the slab's slot does not
    DISK_BAD_CHECKSUM = -4       # fetch: other bytes arrived than were written
    DISK_SHORT = -5              # fewer bytes were moved than asked for


cdef struct DiskRow:
    uint32_t disk_slot
    uint32_t slot                # of the host tier
    uint32_t block
    uint32_t generation          # of the block
    uint32_t position
    uint32_t slab_generation     # of the slot's new content
    uint64_t digest[2]
    uint64_t parent[2]
    uint64_t sequence_hash
    uint64_t checksum


cdef struct Workspace:           # a thread's own
    uint8_t *bounce              # one slot; NULL until it is needed
    kv_piece pieces[1024]


# Each returns DISK_FINE, an error number or a DiskProblem; `bounce`: through the workspace
cdef int spill_row(const SlabFile *file, const kv_copier *copier, DiskRow *row, Workspace *space,
                   bint bounce) noexcept nogil
cdef int fetch_row(const SlabFile *file, const kv_copier *copier, DiskRow *row, Workspace *space,
                   bint bounce) noexcept nogil

# The same in three steps, for who moves the bytes in another way. A fetch's expected checksum is in
# the row between the first and the last.
cdef int spill_before(const kv_copier *copier, DiskRow *row) noexcept nogil
cdef int spill_after(const kv_copier *copier, DiskRow *row) noexcept nogil
cdef int fetch_before(const SlabFile *file, const kv_copier *copier, DiskRow *row) noexcept nogil
cdef int fetch_after(const SlabFile *file, const kv_copier *copier, DiskRow *row) noexcept nogil
cdef void copy_through(const kv_copier *copier, uint32_t slot, uint8_t *buffer,
                       bint to_buffer) noexcept nogil
cdef void workspace_free(Workspace *space) noexcept nogil
cdef bint needs_bounce(const kv_copier *copier, uint64_t alignment) noexcept nogil
cdef bint row_from_block(kv_view *view, const kv_operation *op, uint32_t number,
                         const uint64_t *digests, DiskRow *row) noexcept nogil
