# SPDX-License-Identifier: Apache-2.0
"""Runs of blocks -> pieces -> submissions to the copy engines of a CUDA device.

A run is one piece a region where its blocks touch in device memory, else one a block. Pieces go out
many at a time (cuMemcpyBatchAsync), or, where the regions lie at one pitch inside one allocation
and the pieces are short, as one 2D copy a run. kvbm/transfer/method.py has the choice and why.

A batch of loads may read its source at once, since the arena is complete; a batch of stores reads
in stream order. A submission holds the driver's lock, which the engine's own launches need, so it
is kept short.
"""
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from kvbm._fast.atomics cimport kv_u64_tally
from kvbm._fast.copy cimport kv_copier, kv_copy_run, kv_region, slot_piece
from kvbm._fast.cuda_device cimport (
    KV_CU_INVALID_VALUE,
    KV_CU_MEMORY_DEVICE,
    KV_CU_MEMORY_HOST,
    KV_CU_NOT_SUPPORTED,
    KV_CU_ORDER_ANY,
    KV_CU_ORDER_STREAM,
    KV_CU_SUCCESS,
    CudaDevice,
    kv_cu_batch_attribute,
    kv_cu_copy_2d,
    kv_cu_stream,
)


cdef class CudaPieces:
    """Pieces on their way to a stream of one device.

    Parameters
    ----------
    device : CudaDevice
        Where they go to or come from.
    """

    def __cinit__(self, CudaDevice device not None):
        self.device = device
        self.cuda = &device.cuda
        self.use_batches = self.cuda.copy_batch != NULL
        self.failed_call = ""
        self.batch = <Batch *>calloc(1, sizeof(Batch))
        if self.batch == NULL:
            raise MemoryError("no memory for a batch of copies")

    def __dealloc__(self):
        free(self.batch)

    cdef void begin(self, const Group *group, bint is_store, kv_cu_stream stream) noexcept nogil:
        self.batch.count = 0
        self.batch.limit = group.segments
        self.batch.is_store = is_store
        self.batch.stream = stream

    cdef int add_run(self, Group *group, const kv_copy_run *run) noexcept nogil:
        cdef const kv_copier *copier = group.copier
        cdef const kv_region *region = copier.regions
        cdef uint32_t r, i
        cdef bint packed = region.block_stride == region.chunk_bytes
        cdef uint64_t piece = region.chunk_bytes * (run.count if packed else 1)
        cdef uint64_t device
        cdef uint8_t *host
        cdef int error = KV_CU_SUCCESS
        if group.pitch != 0 and piece < group.pitched_below and run.count > 0:
            error = self.add_pitched(group, run, packed)
            if error != KV_CU_INVALID_VALUE:
                return error
            group.pitch = 0  # not one allocation after all: piece by piece from here on
        for r in range(copier.region_count):
            region = &copier.regions[r]
            device = <uint64_t>region.base + run.device_block * region.block_stride
            host = slot_piece(&copier.arena, region, run.slot)
            if region.block_stride == region.chunk_bytes:
                error = self.add_piece(device, host, run.count * region.chunk_bytes)
            else:
                for i in range(run.count):
                    if error == KV_CU_SUCCESS:
                        error = self.add_piece(device + i * region.block_stride,
                                               host + i * region.chunk_bytes, region.chunk_bytes)
            if error != KV_CU_SUCCESS:
                return error
        return KV_CU_SUCCESS

    cdef int add_pitched(self, Group *group, const kv_copy_run *run, bint packed) noexcept nogil:
        """Regions at one pitch: one 2D copy for a run of packed blocks, else one a block."""
        cdef const kv_copier *copier = group.copier
        cdef const kv_region *first = copier.regions
        cdef uint8_t *host = slot_piece(&copier.arena, first, run.slot)
        cdef uint64_t device = <uint64_t>first.base + run.device_block * first.block_stride
        cdef uint64_t host_pitch = first.chunk_bytes * min(
            copier.arena.group_slots,
            copier.arena.slots - run.slot // copier.arena.group_slots * copier.arena.group_slots)
        cdef uint32_t _call, calls = 1 if packed else run.count
        cdef kv_cu_copy_2d copy
        cdef int error
        memset(&copy, 0, sizeof(copy))
        copy.width = first.chunk_bytes * (run.count if packed else 1)
        copy.height = copier.region_count
        for _call in range(calls):
            if self.batch.is_store:
                copy.source_kind, copy.to_kind = KV_CU_MEMORY_DEVICE, KV_CU_MEMORY_HOST
                copy.source_device, copy.source_pitch = device, group.pitch
                copy.to_host, copy.to_pitch = host, host_pitch
            else:
                copy.source_kind, copy.to_kind = KV_CU_MEMORY_HOST, KV_CU_MEMORY_DEVICE
                copy.source_host, copy.source_pitch = host, host_pitch
                copy.to_device, copy.to_pitch = device, group.pitch
            error = self.cuda.copy_2d(&copy, self.batch.stream)
            if error == KV_CU_INVALID_VALUE:
                return error
            if error != KV_CU_SUCCESS:
                self.failed_call = "cuMemcpy2DAsync"
                return error
            kv_u64_tally(&self.calls, 1)
            kv_u64_tally(&self.pieces, copier.region_count)
            device += first.block_stride
            host += first.chunk_bytes
        return KV_CU_SUCCESS

    cdef int add_piece(self, uint64_t device, void *host, size_t count) noexcept nogil:
        cdef Batch *batch = self.batch
        if count == 0:
            return KV_CU_SUCCESS
        batch.to[batch.count] = <uintptr_t>host if batch.is_store else device
        batch.source[batch.count] = device if batch.is_store else <uintptr_t>host
        batch.bytes[batch.count] = count
        batch.count += 1
        if batch.count == batch.limit:
            return self.flush()
        return KV_CU_SUCCESS

    cdef int flush(self) noexcept nogil:
        """Submit the pieces that have come together."""
        cdef Batch *batch = self.batch
        cdef kv_cu_batch_attribute attribute
        cdef size_t first = 0, failed = 0
        cdef int error
        if batch.count == 0:
            return KV_CU_SUCCESS
        if not self.use_batches or batch.count == 1:
            return self.flush_singly()
        memset(&attribute, 0, sizeof(attribute))
        attribute.source_order = KV_CU_ORDER_STREAM if batch.is_store else KV_CU_ORDER_ANY
        error = self.cuda.copy_batch(batch.to, batch.source, batch.bytes, batch.count, &attribute,
                                     &first, 1, &failed, batch.stream)
        if error == KV_CU_NOT_SUPPORTED:
            self.use_batches = False
            return self.flush_singly()
        if error != KV_CU_SUCCESS:
            self.failed_call = "cuMemcpyBatchAsync"
            return error
        kv_u64_tally(&self.calls, 1)
        kv_u64_tally(&self.pieces, batch.count)
        batch.count = 0
        return KV_CU_SUCCESS

    cdef int flush_singly(self) noexcept nogil:
        cdef Batch *batch = self.batch
        cdef uint32_t i
        cdef int error
        for i in range(batch.count):
            if batch.is_store:
                error = self.cuda.copy_to_host(<void *><uintptr_t>batch.to[i], batch.source[i],
                                               batch.bytes[i], batch.stream)
            else:
                error = self.cuda.copy_to_device(batch.to[i], <void *><uintptr_t>batch.source[i],
                                                 batch.bytes[i], batch.stream)
            if error != KV_CU_SUCCESS:
                self.failed_call = "cuMemcpyAsync"
                return error
        kv_u64_tally(&self.calls, batch.count)
        kv_u64_tally(&self.pieces, batch.count)
        batch.count = 0
        return KV_CU_SUCCESS
