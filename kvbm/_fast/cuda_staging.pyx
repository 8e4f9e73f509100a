# SPDX-License-Identifier: Apache-2.0
"""Copies of many short pieces through a buffer on the device.

A piece costs the driver about 0.7 us, in which the bus moves 40 KiB. Where a block's pieces are
shorter, and the device blocks of a chunk are not neighbours, the chunk takes two steps:

    load    slots --2D copies--> staging buffer --kernel--> device blocks
    store   device blocks --kernel--> staging buffer --2D copies--> slots

The copies are the copy engine's as ever, one for each run of neighbouring slots, whatever device
blocks they belong to. The kernel works in device memory alone, on a few CTAs (cuda_staging.h), and
so takes a fraction of the time that the bus needs; it does not store over the bus, which would slow
all other kernels. Each stream of each direction has a buffer of its own: what reuses it comes later
in the same stream.
"""
import logging

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memset

from kvbm._fast.atomics cimport kv_u64_tally
from kvbm._fast.copy cimport kv_copier, kv_copy_run, kv_region, slot_piece
from kvbm._fast.cuda_device cimport (
    KV_CU_MEMORY_DEVICE,
    KV_CU_MEMORY_HOST,
    KV_CU_SUCCESS,
    CudaDevice,
    kv_cu_copy_2d,
    kv_cu_stream,
)
from kvbm._fast.layout cimport kv_row

from kvbm._fast.cuda_device import CudaFault

logger = logging.getLogger("kvbm.cuda")

cdef enum:
    VECTOR_BYTES = 16


cdef bint can_stage(const kv_copier *copier) noexcept nogil:
    """Whether the kernel can address a group: equal regions, and all on whole vectors."""
    cdef const kv_region *first = copier.regions
    cdef const kv_region *region
    cdef uint32_t r
    if copier.region_count > KV_MOVE_REGIONS_MAX:
        return False
    for r in range(copier.region_count):
        region = &copier.regions[r]
        if (region.chunk_bytes != first.chunk_bytes or region.block_stride != first.block_stride
                or (<uintptr_t>region.base | region.chunk_bytes | region.block_stride)
                % VECTOR_BYTES):
            return False
    return True


cdef class CudaStaging:
    """Buffers and kernel of one device; none if it has no room for them or refuses the kernel.

    Parameters
    ----------
    device : CudaDevice
        Where the buffers are.
    buffer_bytes : int
        Of each of them; 0 for none.
    streams : int
        Streams of each of the two directions; each has a buffer.
    """

    def __cinit__(self, CudaDevice device not None, buffer_bytes: int, uint32_t streams):
        self.device = device
        self.cuda = &device.cuda
        self.buffer_bytes = buffer_bytes
        self.streams = streams
        if buffer_bytes == 0:
            return
        device.enter()
        try:
            device.check(f"cuMemAlloc of {2 * streams * buffer_bytes} bytes",
                         self.cuda.memory_allocate(&self.memory, 2 * streams * self.buffer_bytes))
            device.check("cuModuleLoadData", self.cuda.module_load(&self.module, KV_MOVE_PTX))
            device.check("cuModuleGetFunction", self.cuda.module_function(
                &self.kernel, self.module, KV_MOVE_NAME))
        except CudaFault as fault:
            logger.warning("no staging buffer, short pieces are copied one by one: %s", str(fault))
            self.close()

    @property
    def total_bytes(self) -> int:
        """Device memory of all buffers; 0 if nothing is staged."""
        return 2 * self.streams * self.buffer_bytes if self.memory != 0 else 0

    def close(self) -> None:
        """Give the buffers back; nothing may be under way. May be called twice."""
        if self.memory != 0:
            self.device.enter()
            self.cuda.memory_free(self.memory)
            self.memory = 0
        if self.module != NULL:
            self.cuda.module_unload(self.module)
            self.module = NULL

    cdef bint wanted(self, const Group *group, bint is_store, const kv_row *rows,
                     uint32_t count) noexcept nogil:
        """Whether a chunk's pieces would be short on the average."""
        cdef uint64_t below = group.staged_stores_below if is_store else group.staged_loads_below
        cdef const kv_copier *copier = group.copier
        cdef uint32_t i, runs = 1
        if (self.memory == 0 or below == 0 or group.pitch != 0 or count > KV_MOVE_ROWS_MAX
                or count * copier.block_bytes > self.buffer_bytes):
            return False
        for i in range(1, count):
            runs += (rows[i].device_block != rows[i - 1].device_block + 1
                     or rows[i].slot != rows[i - 1].slot + 1
                     or rows[i].slot % copier.arena.group_slots == 0)
        return count * copier.regions.chunk_bytes // runs < below

    cdef void begin(self, const Group *group, bint is_store, kv_cu_stream stream,
                    uint32_t turn) noexcept nogil:
        """Start a chunk on stream number `turn` of its direction."""
        cdef const kv_copier *copier = group.copier
        cdef kv_move *move = &self.move
        cdef uint32_t r
        self.group = group
        self.stream = stream
        move.staging = self.memory + (is_store * self.streams + turn) * self.buffer_bytes
        move.stride = copier.regions.block_stride
        move.rows = 0
        move.regions = copier.region_count
        move.vectors = copier.regions.chunk_bytes // VECTOR_BYTES
        move.to_staging = is_store
        for r in range(copier.region_count):
            move.base[r] = <uintptr_t>copier.regions[r].base

    cdef void add_run(self, const kv_copy_run *run) noexcept nogil:
        cdef uint32_t i, row
        for i in range(run.count):
            row = self.move.rows
            self.move.row[row].block = run.device_block + i
            self.slots[row] = run.slot + i
            self.move.rows += 1

    cdef void arrange(self) noexcept nogil:
        """Give each run of neighbouring slots its place in the buffer, in the arena's order.

        Rows are in the order of their blocks in the prompt, and slots come back from eviction last
        block first: sorted, they are runs again. The kernel does not mind the order.
        """
        cdef kv_move *move = &self.move
        cdef uint32_t group_slots = self.group.copier.arena.group_slots
        cdef uint32_t row = 0, n, i, slot, block, chunks = 0
        for n in range(1, move.rows):
            i, slot, block = n, self.slots[n], move.row[n].block
            while i > 0 and self.slots[i - 1] > slot:
                self.slots[i], move.row[i].block = self.slots[i - 1], move.row[i - 1].block
                i -= 1
            self.slots[i], move.row[i].block = slot, block
        while row < move.rows:
            n = 1
            while (row + n < move.rows and self.slots[row + n] == self.slots[row] + n
                    and self.slots[row + n] % group_slots != 0):
                n += 1
            for i in range(n):
                move.row[row + i].first = chunks + i
                move.row[row + i].pitch = n
            chunks += n * move.regions
            row += n

    cdef int copy(self) noexcept nogil:
        """Submit the copies between the buffer and the slots, after `arrange`."""
        cdef const kv_copier *copier = self.group.copier
        cdef const kv_region *region = copier.regions
        cdef kv_move *move = &self.move
        cdef uint64_t chunk = region.chunk_bytes, staged, pitch
        cdef uint32_t row = 0, slot, n
        cdef kv_cu_copy_2d copy
        cdef uint8_t *host
        cdef int error
        memset(&copy, 0, sizeof(copy))
        while row < move.rows:
            n, slot = move.row[row].pitch, self.slots[row]
            host = slot_piece(&copier.arena, region, slot)
            pitch = chunk * min(
                copier.arena.group_slots,
                copier.arena.slots - slot // copier.arena.group_slots * copier.arena.group_slots)
            staged = move.staging + move.row[row].first * chunk
            copy.width, copy.height = n * chunk, move.regions
            if copy.width == pitch:  # a whole group of slots: one long piece
                copy.width, copy.height = n * chunk * move.regions, 1
                pitch = copy.width
            if move.to_staging:
                copy.source_kind, copy.to_kind = KV_CU_MEMORY_DEVICE, KV_CU_MEMORY_HOST
                copy.source_device, copy.source_pitch = staged, copy.width
                copy.to_host, copy.to_pitch = host, pitch
            else:
                copy.source_kind, copy.to_kind = KV_CU_MEMORY_HOST, KV_CU_MEMORY_DEVICE
                copy.source_host, copy.source_pitch = host, pitch
                copy.to_device, copy.to_pitch = staged, copy.width
            error = self.cuda.copy_2d(&copy, self.stream)
            if error != KV_CU_SUCCESS:
                return error
            kv_u64_tally(&self.calls, 1)
            row += n
        return KV_CU_SUCCESS

    cdef int launch(self) noexcept nogil:
        """Submit the kernel, after `arrange`."""
        cdef void *parameters = &self.move
        cdef int error
        if self.move.rows == 0:
            return KV_CU_SUCCESS
        error = self.cuda.launch(self.kernel, self.group.ctas, 1, 1, KV_MOVE_THREADS, 1, 1, 0,
                                 self.stream, &parameters, NULL)
        kv_u64_tally(&self.calls, 1)
        kv_u64_tally(&self.kernels, 1)
        return error
