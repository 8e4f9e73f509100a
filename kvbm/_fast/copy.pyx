# SPDX-License-Identifier: Apache-2.0
"""Copies of KV blocks between host-addressable device memory and the host arena, without the GIL.

Rows are taken in order and grouped into runs: rows whose device blocks and slots both step by one
inside one group of slots. A run is one contiguous piece of the arena a region, and where the device
blocks are packed one ``memcpy`` a region. Every index is compared with its limit on a private copy
of the row before it is used, so no row, however it came about, makes a copy leave its memory.

A store of a run:  mark the headers FILLING, copy, write the headers, mark them VALID.
A load of a run:   check the headers, copy, check the headers again and, if asked, the checksums.

With checksums the copy goes chunk by chunk and each chunk is hashed where it arrived, while it is
still in the cache: what is recorded or verified is the copy, not a second read of the source.

The arithmetic and the header are described in ``copy.h``.
"""
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stddef cimport size_t
from libc.stdint cimport UINT32_MAX, int32_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from kvbm._fast.atomics cimport (
    kv_au32,
    kv_u32_load_acquire,
    kv_u32_load_relaxed,
    kv_u32_store_relaxed,
    kv_u32_store_release,
    kv_u64_fetch_or_acq_rel,
    kv_u64_load_acquire,
    kv_u64_load_relaxed,
    kv_u64_store_relaxed,
    kv_u64_store_release,
)
from kvbm._fast.layout cimport kv_row

from enum import IntEnum
from typing import NamedTuple

# More bytes than this in one run gain nothing and delay a stop.
RUN_BYTES = 8 << 20


class CopyStatus(IntEnum):
    """How a copy ended; the values of ``kv_copy_status`` in ``copy.h``."""

    OK = KV_COPY_OK
    STOPPED = KV_COPY_STOPPED
    BAD_BLOCK = KV_COPY_BAD_BLOCK
    BAD_SLOT = KV_COPY_BAD_SLOT
    BAD_HEADER = KV_COPY_BAD_HEADER
    TORN = KV_COPY_TORN
    NO_CHECKSUM = KV_COPY_NO_CHECKSUM
    BAD_CHECKSUM = KV_COPY_BAD_CHECKSUM


class CopyResult(NamedTuple):
    """Status of a copy and the row it is about; rows before ``row`` are complete."""

    status: CopyStatus
    row: int


cdef class HostCopier:
    """Copies between one rank's KV cache in host-addressable memory and its host arena.

    Parameters
    ----------
    regions : sequence of (base_address, block_stride_bytes, chunk_bytes)
        The KV cache: device block ``b`` of a region lies at ``base_address + b *
        block_stride_bytes``. The memory must stay valid as long as this object; see `keep_alive`.
    layout : ArenaLayout
        Where slots lie in the arena: ``slots``, ``group_slots``, ``table_offset``,
        ``data_offset``, ``group_bytes``, ``total_bytes`` and ``chunk_bytes``, which must be the
        chunks of `regions`, in order.
    arena : buffer
        Writable and contiguous, at least ``layout.total_bytes`` long, 8-byte aligned.
    device_blocks : int
        Number of blocks in the KV cache.
    rank, group : int
        Written to slot headers and compared by a load.
    run_bytes : int
        Upper bound of a run, in bytes (at least one block): what is copied between two looks at
        `stop`.
    keep_alive : object
        Held as long as this object, for instance the tensors.

    Raises
    ------
    ValueError
        If the arguments do not fit each other.
    """

    def __cinit__(self, regions, layout, arena, *, device_blocks, rank=0, group=0,
                  run_bytes=RUN_BYTES, keep_alive=None):
        self._regions = NULL
        self._arena_held = False
        self._keep_alive = keep_alive
        regions = list(regions)
        chunks = [int(chunk) for _, _, chunk in regions]
        if not 0 < len(chunks) <= KV_REGIONS_MAX:
            raise ValueError(f"regions={len(chunks)} is not allowed: 1 to {KV_REGIONS_MAX}")
        if chunks != list(layout.chunk_bytes):
            raise ValueError(f"chunks of the regions {chunks} differ from those of the layout "
                             f"{list(layout.chunk_bytes)}")
        if not 0 < device_blocks < UINT32_MAX:
            raise ValueError(f"device_blocks={device_blocks} is not allowed: 1 to 2**32 - 2")
        if run_bytes < 1:
            raise ValueError(f"run_bytes={run_bytes} is not allowed: 1 or more")
        self._regions = <kv_region *>calloc(len(chunks), sizeof(kv_region))
        if self._regions == NULL:
            raise MemoryError()
        HostCopier_set_regions(self, regions)
        HostCopier_set_arena(self, layout, arena)
        self.copier.device_blocks = device_blocks
        self.copier.rank = rank
        self.copier.group = group
        self.copier.run_rows_max = min(
            KV_RUN_ROWS_MAX, max(1, run_bytes // self.copier.block_bytes))

    def __dealloc__(self):
        # Nothing runs here any more: a copy holds a reference to this object.
        if self._arena_held:
            PyBuffer_Release(&self._arena)
        free(self._regions)

    @property
    def usable_slots(self) -> int:
        """Slots whose memory may be touched, all at first; rows with others are refused."""
        return kv_u32_load_acquire(&self.copier.arena.usable_slots)

    @usable_slots.setter
    def usable_slots(self, count: int) -> None:
        if not 0 <= count <= self.copier.arena.slots:
            raise ValueError(f"usable_slots={count} is not allowed: 0 to {self.copier.arena.slots}")
        kv_u32_store_release(&self.copier.arena.usable_slots, count)

    def store(self, rows, digests, *, checksum=False, stop=None):
        """Copy device blocks to slots and write the slots' headers.

        Parameters
        ----------
        rows : uint32[n, 8]
            Device block, slot, block, generation, and four words that are not looked at: kv_row in
            ``layout.h``.
        digests : uint64[n, 2]
            Digest of each row, low and high half.
        checksum : bool
            Write the checksum of each slot's bytes.
        stop : int32[1], optional
            Looked at before each run; the copy stops when it is not 0. Another thread may set it.

        Returns
        -------
        CopyResult
        """
        return HostCopier_run(self, KV_COPY_STORE, rows, digests, checksum, stop)

    def load(self, rows, digests, *, checksum=False, stop=None):
        """Copy slots to device blocks, refusing slots that do not hold what the rows say.

        Parameters and result as in `store`. With `checksum`, the bytes that arrived are compared
        with the checksum in the slot's header. After a failure the device blocks of the row named
        and of later ones may hold anything.
        """
        return HostCopier_run(self, KV_COPY_LOAD, rows, digests, checksum, stop)


cdef int copy_rows(const kv_copier *copier, int direction, const void *rows, size_t row_stride,
                   const uint64_t *digests, uint32_t count, uint32_t flags,
                   kv_should_stop should_stop, void *argument,
                   kv_copy_result *result) noexcept nogil:
    cdef kv_copy_run run
    cdef uint32_t row = 0
    cdef uint32_t done
    cdef int status = KV_COPY_OK
    while row < count:
        if should_stop != NULL and should_stop(argument):
            status = KV_COPY_STOPPED
            break
        status = form_run(copier, <const uint8_t *>rows, row_stride, digests, row, count, &run)
        if status != KV_COPY_OK:
            break
        if direction == KV_COPY_STORE:
            store_run(copier, &run, flags)
            done = run.count
        else:
            status = load_run(copier, &run, flags, &done)
        row += done
        if status != KV_COPY_OK:
            break
    result.status = status
    result.row = row
    return status


cdef int form_run(const kv_copier *copier, const uint8_t *rows, size_t row_stride,
                  const uint64_t *digests, uint32_t first, uint32_t count,
                  kv_copy_run *run) noexcept nogil:
    """Gather the longest run that begins at row `first`; a row that is bad ends it.

    Returns the status of row `first`.
    """
    cdef kv_row row
    cdef uint32_t n = 0
    cdef uint32_t group_slots = copier.arena.group_slots
    cdef uint32_t usable = kv_u32_load_acquire(&copier.arena.usable_slots)
    cdef int status = KV_COPY_OK
    while n < copier.run_rows_max and first + n < count:
        memcpy(&row, rows + (first + n) * row_stride, sizeof(kv_row))
        if row.device_block >= copier.device_blocks:
            status = KV_COPY_BAD_BLOCK
        elif row.slot >= usable:
            status = KV_COPY_BAD_SLOT
        if status != KV_COPY_OK:
            break
        if n == 0:
            run.device_block = row.device_block
            run.slot = row.slot
        elif (row.device_block != run.device_block + n or row.slot != run.slot + n
                or row.slot % group_slots == 0):
            break
        run.block[n] = row.block
        run.generation[n] = row.generation
        n += 1
    run.count = n
    run.digests = digests + 2 * <size_t>first
    return KV_COPY_OK if n > 0 else status


cdef void store_run(const kv_copier *copier, kv_copy_run *run, uint32_t flags) noexcept nogil:
    mark_filling(copier, run)
    copy_run(copier, run, KV_COPY_STORE, flags)
    mark_valid(copier, run, flags)


cdef void mark_filling(const kv_copier *copier, const kv_copy_run *run) noexcept nogil:
    """Before the first byte of the run's slots changes."""
    cdef kv_slot_header *header = slot_header(&copier.arena, run.slot)
    cdef uint32_t i
    for i in range(run.count):
        kv_u64_store_relaxed(&header[i].word,
                             kv_slot_word_make(KV_SLOT_FILLING, 0, run.generation[i]))
    # [H0] A read-modify-write that changes nothing, for its order: the marks above stay above it
    # (release) and the bytes below stay below it (acquire).
    kv_u64_fetch_or_acq_rel(&header[0].word, 0)


cdef void mark_valid(const kv_copier *copier, const kv_copy_run *run,
                     uint32_t flags) noexcept nogil:
    """After the last byte of the run's slots has been written; ``run.checksum`` with checksums."""
    cdef kv_slot_header *header = slot_header(&copier.arena, run.slot)
    cdef uint64_t has_checksum = KV_SLOT_HAS_CHECKSUM if flags & KV_COPY_WITH_CHECKSUM else 0
    cdef uint32_t i
    for i in range(run.count):
        kv_u64_store_relaxed(&header[i].digest_lo, run.digests[2 * i])
        kv_u64_store_relaxed(&header[i].digest_hi, run.digests[2 * i + 1])
        kv_u64_store_relaxed(&header[i].checksum, run.checksum[i] if has_checksum else 0)
        kv_u64_store_relaxed(&header[i].payload_bytes, copier.block_bytes)
        kv_u32_store_relaxed(&header[i].block, run.block[i])
        kv_u32_store_relaxed(&header[i].group, copier.group)
        kv_u32_store_relaxed(&header[i].rank, copier.rank)
        kv_u64_store_release(&header[i].word,  # [H1]
                             kv_slot_word_make(KV_SLOT_VALID, has_checksum, run.generation[i]))


cdef int load_run(const kv_copier *copier, kv_copy_run *run, uint32_t flags,
                  uint32_t *done) noexcept nogil:
    """Load a run; `done` is the number of its rows that are complete and verified."""
    cdef int status = check_before(copier, run, flags)
    cdef int after
    copy_run(copier, run, KV_COPY_LOAD, flags)
    after = check_after(copier, run, flags, done)
    return after if after != KV_COPY_OK else status


cdef int check_before(const kv_copier *copier, kv_copy_run *run, uint32_t flags) noexcept nogil:
    """Cut a run to be loaded to the rows whose slots hold what they say; the status says why."""
    cdef kv_slot_header *header = slot_header(&copier.arena, run.slot)
    cdef int status = KV_COPY_OK
    cdef uint64_t word
    cdef uint32_t i
    for i in range(run.count):
        word = kv_u64_load_acquire(&header[i].word)  # [H2]
        status = check_header(copier, &header[i], word, run, i, flags)
        if status != KV_COPY_OK:
            run.count = i  # the rows before are good: copy them, then say which one is not
            break
    return status


cdef int check_after(const kv_copier *copier, const kv_copy_run *run, uint32_t flags,
                     uint32_t *done) noexcept nogil:
    """Check a loaded run once more, with checksums those of what was copied (``run.checksum``)."""
    cdef kv_slot_header *header = slot_header(&copier.arena, run.slot)
    cdef uint64_t word
    cdef uint32_t i
    # [H3] The same again: no load can keep the reads of the bytes above from moving below it
    # (H. Boehm, "Can seqlocks get along with programming language memory models?", 2012).
    kv_u64_fetch_or_acq_rel(&header[0].word, 0)
    for i in range(run.count):
        done[0] = i
        word = kv_u64_load_acquire(&header[i].word)
        if check_header(copier, &header[i], word, run, i, flags) != KV_COPY_OK:
            return KV_COPY_TORN
        if (flags & KV_COPY_WITH_CHECKSUM
                and run.checksum[i] != kv_u64_load_relaxed(&header[i].checksum)):
            return KV_COPY_BAD_CHECKSUM
    done[0] = run.count
    return KV_COPY_OK


cdef int check_header(const kv_copier *copier, const kv_slot_header *header, uint64_t word,
                      const kv_copy_run *run, uint32_t i, uint32_t flags) noexcept nogil:
    cdef uint64_t valid = kv_slot_word_make(KV_SLOT_VALID, 0, run.generation[i])
    if (word & ~KV_SLOT_HAS_CHECKSUM) != valid:
        return KV_COPY_BAD_HEADER
    if (kv_u64_load_relaxed(&header.digest_lo) != run.digests[2 * i]
            or kv_u64_load_relaxed(&header.digest_hi) != run.digests[2 * i + 1]
            or kv_u64_load_relaxed(&header.payload_bytes) != copier.block_bytes
            or kv_u32_load_relaxed(&header.group) != copier.group
            or kv_u32_load_relaxed(&header.rank) != copier.rank):
        return KV_COPY_BAD_HEADER
    if flags & KV_COPY_WITH_CHECKSUM and not word & KV_SLOT_HAS_CHECKSUM:
        return KV_COPY_NO_CHECKSUM
    return KV_COPY_OK


cdef void copy_run(const kv_copier *copier, kv_copy_run *run, int direction,
                   uint32_t flags) noexcept nogil:
    """Copy the bytes of a run, region by region; with checksums, leave them in ``run.checksum``."""
    cdef const kv_region *region
    cdef uint8_t *host
    cdef uint8_t *device
    cdef uint32_t r
    cdef uint32_t i
    for i in range(run.count):
        run.checksum[i] = 0
    for r in range(copier.region_count):
        region = &copier.regions[r]
        host = slot_piece(&copier.arena, region, run.slot)
        device = region.base + run.device_block * region.block_stride
        if flags & KV_COPY_WITH_CHECKSUM:
            for i in range(run.count):
                run.checksum[i] = copy_and_hash(
                    device + i * region.block_stride, host + i * region.chunk_bytes,
                    region.chunk_bytes, direction, run.checksum[i])
        elif region.block_stride == region.chunk_bytes:
            copy_bytes(device, host, run.count * region.chunk_bytes, direction)
        else:
            for i in range(run.count):
                copy_bytes(device + i * region.block_stride, host + i * region.chunk_bytes,
                           region.chunk_bytes, direction)
    kv_stream_end()


cdef uint8_t *slot_piece(const kv_arena *arena, const kv_region *region,
                         uint32_t slot) noexcept nogil:
    """Where a slot's piece of a region begins; the next slots of its group follow it."""
    cdef uint32_t group = slot // arena.group_slots
    cdef uint32_t first = group * arena.group_slots
    cdef uint64_t group_slots = min(arena.group_slots, arena.slots - first)
    return (arena.base + arena.data_offset + group * arena.group_bytes
            + group_slots * region.slot_offset + (slot - first) * region.chunk_bytes)


cdef inline void copy_bytes(uint8_t *device, uint8_t *host, size_t count,
                            int direction) noexcept nogil:
    if direction == KV_COPY_STORE:
        kv_stream_copy(host, device, count, NULL)
    else:
        kv_stream_copy(device, host, count, NULL)


cdef inline uint64_t copy_and_hash(uint8_t *device, uint8_t *host, size_t count, int direction,
                                   uint64_t seed) noexcept nogil:
    if direction == KV_COPY_STORE:
        return kv_stream_copy_checksum(host, device, count, seed)
    return kv_stream_copy_checksum(device, host, count, seed)


cdef inline kv_slot_header *slot_header(const kv_arena *arena, uint32_t slot) noexcept nogil:
    return <kv_slot_header *>(arena.base + arena.table_offset) + slot


cdef bint flag_is_set(void *flag) noexcept nogil:
    return flag != NULL and kv_u32_load_relaxed(<kv_au32 *>flag) != 0


cdef int HostCopier_set_regions(HostCopier self, regions) except -1:
    cdef uint64_t slot_offset = 0
    cdef uint64_t base, stride, chunk
    cdef uint32_t r = 0
    for base, stride, chunk in regions:
        if base == 0 or chunk == 0 or stride < chunk:
            raise ValueError(f"region {r} is not allowed: base_address={base:#x}, "
                             f"block_stride_bytes={stride}, chunk_bytes={chunk}; the address and "
                             "the chunk must not be 0, the stride must be at least the chunk")
        self._regions[r].base = <uint8_t *><uintptr_t>base
        self._regions[r].block_stride = stride
        self._regions[r].chunk_bytes = chunk
        self._regions[r].slot_offset = slot_offset
        slot_offset += chunk
        r += 1
    self.copier.regions = self._regions
    self.copier.region_count = r
    self.copier.block_bytes = slot_offset
    return 0


cdef int HostCopier_set_arena(HostCopier self, layout, buffer) except -1:
    cdef kv_arena *arena = &self.copier.arena
    PyObject_GetBuffer(buffer, &self._arena, PyBUF_WRITABLE)
    self._arena_held = True
    arena.base = <uint8_t *>self._arena.buf
    arena.slots = layout.slots
    arena.group_slots = layout.group_slots
    arena.table_offset = layout.table_offset
    arena.data_offset = layout.data_offset
    arena.group_bytes = layout.group_bytes
    if <uint64_t>self._arena.len < <uint64_t>layout.total_bytes:
        raise ValueError(f"the arena has {self._arena.len} bytes, the layout needs "
                         f"{layout.total_bytes}")
    if <uintptr_t>arena.base % 8 != 0:
        raise ValueError(f"the arena lies at {<uintptr_t>arena.base:#x}, which is no multiple of 8")
    HostCopier_check_layout(self)
    kv_u32_store_release(&arena.usable_slots, arena.slots)
    return 0


cdef int HostCopier_check_layout(HostCopier self) except -1:
    """Refuse a layout with which copy_rows would leave the arena, wherever it came from."""
    cdef kv_arena *arena = &self.copier.arena
    cdef uint64_t table_end = arena.table_offset + arena.slots * <uint64_t>sizeof(kv_slot_header)
    cdef uint64_t groups, last
    if arena.slots == 0 or arena.slots == UINT32_MAX or arena.group_slots == 0:
        raise ValueError(f"slots={arena.slots}, group_slots={arena.group_slots} are not allowed: "
                         "1 to 2**32 - 2")
    groups = (arena.slots - 1) // arena.group_slots
    last = arena.slots - groups * arena.group_slots
    if (arena.table_offset % sizeof(kv_slot_header) != 0 or arena.data_offset < table_end
            or arena.group_bytes // arena.group_slots < self.copier.block_bytes
            or <uint64_t>self._arena.len < arena.data_offset
            or (<uint64_t>self._arena.len - arena.data_offset) // arena.group_bytes < groups
            or (<uint64_t>self._arena.len - arena.data_offset - groups * arena.group_bytes)
            // self.copier.block_bytes < last):
        raise ValueError(f"the layout contradicts itself: table_offset={arena.table_offset}, "
                         f"data_offset={arena.data_offset}, group_bytes={arena.group_bytes}, "
                         f"slots={arena.slots}, group_slots={arena.group_slots}, bytes of a "
                         f"block={self.copier.block_bytes}, bytes of the arena={self._arena.len}")
    return 0


cdef object HostCopier_run(HostCopier self, int direction, rows, digests, checksum, stop):
    cdef const uint32_t[:, ::1] row_view = rows
    cdef const uint64_t[:, ::1] digest_view = digests
    cdef int32_t[::1] stop_view = stop
    cdef uint32_t flags = KV_COPY_WITH_CHECKSUM if checksum else 0
    cdef kv_copy_result result
    cdef const void *first_row = NULL
    cdef const uint64_t *first_digest = NULL
    cdef void *flag = NULL
    cdef size_t row_stride
    cdef uint32_t count
    if row_view.shape[1] * sizeof(uint32_t) != sizeof(kv_row) or digest_view.shape[1] != 2:
        raise ValueError(f"rows of {row_view.shape[1]} and digests of {digest_view.shape[1]} words "
                         "are not allowed: 8 and 2")
    if row_view.shape[0] != digest_view.shape[0] or row_view.shape[0] >= UINT32_MAX:
        raise ValueError(f"{row_view.shape[0]} rows need as many digests, not "
                         f"{digest_view.shape[0]}")
    count = <uint32_t>row_view.shape[0]
    row_stride = sizeof(kv_row)
    if count > 0:
        first_row = &row_view[0, 0]
        first_digest = &digest_view[0, 0]
    if stop_view is not None:
        if stop_view.shape[0] != 1:
            raise ValueError(f"stop has {stop_view.shape[0]} items: 1 is needed")
        flag = &stop_view[0]
    with nogil:
        copy_rows(&self.copier, direction, first_row, row_stride, first_digest, count, flags,
                  flag_is_set, flag, &result)
    return CopyResult(CopyStatus(result.status), result.row)
