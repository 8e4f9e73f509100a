# SPDX-License-Identifier: Apache-2.0
"""One block between a host slot and a disk slot: the copies of the disk backend.

A spill compares the host slot's header with the row before the block is written and afterwards; the
checksum is that of the bytes in the host slot. A fetch compares the slab's header with the row, and
the checksum of what has arrived in the host slot with the one in that header; a slot that does not
pass is emptied, so that it is not found again after a restart.
"""
from libc.errno cimport EIO, errno
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy

from kvbm._fast.atomics cimport kv_u32_load_relaxed, kv_u64_load_acquire, kv_u64_load_relaxed
from kvbm._fast.copy cimport (
    KV_COPY_OK,
    KV_COPY_WITH_CHECKSUM,
    check_after,
    check_before,
    kv_checksum,
    kv_copier,
    kv_copy_run,
    mark_filling,
    mark_valid,
    slot_piece,
)
from kvbm._fast.layout cimport kv_block, kv_operation, kv_view
from kvbm._fast.slab cimport (
    SlabFile,
    kv_piece,
    kv_slab_header,
    kv_slab_header_holds,
    off_t,
    slab_empty_header,
    slab_read_header,
    ssize_t,
)


cdef extern from *:
    """
    #include <stdlib.h>
    #include <string.h>
    static uint8_t *kv_aligned_zeros(size_t bytes) {
        void *at = NULL;
        if (posix_memalign(&at, 4096, bytes) != 0) return NULL;
        return (uint8_t *)memset(at, 0, bytes);
    }
    static void kv_aligned_free(uint8_t *at) { free(at); }
    """
    uint8_t *kv_aligned_zeros(size_t count) noexcept nogil
    void kv_aligned_free(uint8_t *at) noexcept nogil

cdef enum:
    PIECES_MAX = 1024            # IOV_MAX


cdef void workspace_free(Workspace *space) noexcept nogil:
    kv_aligned_free(space.bounce)
    space.bounce = NULL


cdef int spill_before(const kv_copier *copier, DiskRow *row) noexcept nogil:
    """The host slot holds the block; its checksum."""
    cdef kv_copy_run run
    run_of(row, &run)
    if check_before(copier, &run, 0) != KV_COPY_OK:
        return DISK_BAD_SOURCE
    row.checksum = arena_checksum(copier, row.slot)
    return DISK_FINE


cdef int spill_after(const kv_copier *copier, DiskRow *row) noexcept nogil:
    """The host slot still holds the block."""
    cdef kv_copy_run run
    cdef uint32_t done = 0
    run_of(row, &run)
    return DISK_FINE if check_after(copier, &run, 0, &done) == KV_COPY_OK else DISK_BAD_SOURCE


cdef int fetch_before(const SlabFile *file, const kv_copier *copier, DiskRow *row) noexcept nogil:
    """The disk slot holds the block, with this checksum; the host slot is being filled."""
    cdef kv_slab_header header
    cdef kv_copy_run run
    cdef int problem = slab_read_header(file, row.disk_slot, &header)
    if problem != 0:
        return problem
    if (not kv_slab_header_holds(&header, row.disk_slot, file.rank,
                                 file.fingerprint, file.payload_bytes)
            or header.digest_lo != row.digest[0] or header.digest_hi != row.digest[1]):
        return DISK_BAD_HEADER
    row.checksum = header.data_checksum
    run_of(row, &run)
    mark_filling(copier, &run)
    return DISK_FINE


cdef int fetch_after(const SlabFile *file, const kv_copier *copier, DiskRow *row) noexcept nogil:
    """The bytes in the host slot are those that were written."""
    cdef kv_copy_run run
    cdef uint32_t ignored = 0
    cdef bint valid = False
    run_of(row, &run)
    run.checksum[0] = arena_checksum(copier, row.slot)
    if run.checksum[0] != row.checksum:
        slab_empty_header(file, row.disk_slot, &ignored, &valid)
        return DISK_BAD_CHECKSUM
    mark_valid(copier, &run, KV_COPY_WITH_CHECKSUM)
    return DISK_FINE


cdef int spill_row(const SlabFile *file, const kv_copier *copier, DiskRow *row, Workspace *space,
                   bint bounce) noexcept nogil:
    """[B2] One block to its disk slot."""
    cdef int count, problem = spill_before(copier, row)
    if problem != DISK_FINE:
        return problem
    count = gather(file, copier, row, space, bounce)
    if count == 0:
        return EIO
    if bounce:
        copy_through(copier, row.slot, space.bounce, True)
    problem = transfer(file, row.disk_slot, space.pieces, count, True)
    return problem if problem != DISK_FINE else spill_after(copier, row)


cdef int fetch_row(const SlabFile *file, const kv_copier *copier, DiskRow *row, Workspace *space,
                   bint bounce) noexcept nogil:
    """One block from its disk slot."""
    cdef int count, problem = fetch_before(file, copier, row)
    if problem != DISK_FINE:
        return problem
    count = gather(file, copier, row, space, bounce)
    if count == 0:
        return EIO
    problem = transfer(file, row.disk_slot, space.pieces, count, False)
    if problem != DISK_FINE:
        return problem
    if bounce:
        copy_through(copier, row.slot, space.bounce, False)
    return fetch_after(file, copier, row)


cdef void copy_through(const kv_copier *copier, uint32_t slot, uint8_t *buffer,
                       bint to_buffer) noexcept nogil:
    """A host slot's pieces to one contiguous buffer, or back."""
    cdef uint32_t region
    cdef uint8_t *piece
    cdef uint8_t *at
    for region in range(copier.region_count):
        piece = slot_piece(&copier.arena, &copier.regions[region], slot)
        at = buffer + copier.regions[region].slot_offset
        if to_buffer:
            memcpy(at, piece, copier.regions[region].chunk_bytes)
        else:
            memcpy(piece, at, copier.regions[region].chunk_bytes)


cdef int gather(const SlabFile *file, const kv_copier *copier, const DiskRow *row,
                Workspace *space, bint bounce) noexcept nogil:
    """What the file moves: the slot's pieces, or the buffer; 0 if there is no memory for it."""
    cdef uint32_t region
    if bounce:
        if space.bounce == NULL:
            space.bounce = kv_aligned_zeros(file.stride)
        space.pieces[0].iov_base = space.bounce
        space.pieces[0].iov_len = file.stride
        return 0 if space.bounce == NULL else 1
    for region in range(copier.region_count):
        space.pieces[region].iov_base = slot_piece(&copier.arena, &copier.regions[region],
                                                   row.slot)
        space.pieces[region].iov_len = copier.regions[region].chunk_bytes
    return <int>copier.region_count


cdef int transfer(const SlabFile *file, uint32_t disk_slot, const kv_piece *pieces, int count,
                  bint write) noexcept nogil:
    cdef off_t offset = <off_t>(file.data_offset + disk_slot * file.stride)
    cdef size_t wanted = 0
    cdef ssize_t done
    cdef int i
    for i in range(count):
        wanted += pieces[i].iov_len
    if write:
        done = file.calls.write(file.data_fd, pieces, count, offset)
    else:
        done = file.calls.read(file.data_fd, pieces, count, offset)
    if done < 0:
        return errno if errno != 0 else EIO
    return DISK_FINE if <size_t>done == wanted else DISK_SHORT


cdef bint needs_bounce(const kv_copier *copier, uint64_t alignment) noexcept nogil:
    """True unless each piece of each slot begins and ends on a multiple of the alignment."""
    cdef uint32_t region
    if copier.region_count > PIECES_MAX or <uintptr_t>copier.arena.base % alignment != 0:
        return True
    for region in range(copier.region_count):
        if copier.regions[region].chunk_bytes % alignment != 0:
            return True
    return copier.arena.data_offset % alignment != 0 or copier.arena.group_bytes % alignment != 0


cdef uint64_t arena_checksum(const kv_copier *copier, uint32_t slot) noexcept nogil:
    """Checksum of a host slot's bytes as they are there."""
    cdef uint64_t sum = 0
    cdef uint32_t region
    for region in range(copier.region_count):
        sum = kv_checksum(slot_piece(&copier.arena, &copier.regions[region], slot),
                          copier.regions[region].chunk_bytes, sum)
    return sum


cdef void run_of(DiskRow *row, kv_copy_run *run) noexcept nogil:
    """A run of one slot, for the functions on slot headers."""
    run.device_block = 0
    run.slot = row.slot
    run.count = 1
    run.block[0] = row.block
    run.generation[0] = row.generation
    run.checksum[0] = 0
    run.digests = row.digest


cdef bint row_from_block(kv_view *view, const kv_operation *op, uint32_t number,
                         const uint64_t *digests, DiskRow *row) noexcept nogil:
    """A private copy of a row, with what the slab's header will say of its block."""
    cdef const kv_block *b
    cdef uint32_t parent
    row.disk_slot = op.rows[number].device_block
    row.slot = op.rows[number].slot
    row.block = op.rows[number].block
    row.generation = op.rows[number].generation
    row.digest[0] = digests[2 * number]
    row.digest[1] = digests[2 * number + 1]
    row.parent[0] = row.parent[1] = 0
    if row.block >= view.shape.block_capacity:
        return False
    parent = kv_u32_load_relaxed(&view.blocks[row.block].parent)
    if parent > view.shape.block_capacity:
        return False
    if parent != 0:
        b = &view.blocks[parent - 1]
        row.parent[0] = kv_u64_load_acquire(&b.digest_lo)
        row.parent[1] = kv_u64_load_acquire(&b.digest_hi)
    row.position = kv_u32_load_relaxed(&view.cold[row.block].position)
    row.sequence_hash = kv_u64_load_relaxed(&view.cold[row.block].sequence_hash)
    return True
