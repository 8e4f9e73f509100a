# SPDX-License-Identifier: Apache-2.0
from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.atomics cimport kv_au64
from kvbm._fast.copy cimport kv_copier, kv_copy_run
from kvbm._fast.cuda_device cimport CudaDevice, kv_cu_pointer, kv_cu_stream, kv_cuda

cdef enum:
    SEGMENTS_MAX = 4096            # pieces in one submission


cdef struct Group:                 # a KV-cache group and how to copy it: kvbm/transfer/method.py
    const kv_copier *copier
    uint64_t pitch                 # bytes between regions that one 2D copy can take, else 0
    uint64_t pitched_below         # 2D copies for pieces smaller than this
    uint32_t segments              # pieces in one submission
    uint32_t chunk_rows            # rows between two events
    uint64_t staged_loads_below    # chunks of shorter pieces go through the staging buffer
    uint64_t staged_stores_below
    uint32_t ctas                  # of the kernel that works on it


cdef struct Batch:                 # pieces that have not been submitted yet
    kv_cu_pointer to[4096]
    kv_cu_pointer source[4096]
    size_t bytes[4096]
    uint32_t count
    uint32_t limit
    bint is_store
    kv_cu_stream stream


cdef class CudaPieces:
    cdef CudaDevice device
    cdef kv_cuda *cuda
    cdef Batch *batch
    cdef bint use_batches
    cdef const char *failed_call   # what the last error came from
    cdef kv_au64 calls             # submissions to the driver
    cdef kv_au64 pieces

    # All of these return the driver's error number. Copy thread only, without the GIL.
    cdef void begin(self, const Group *group, bint is_store, kv_cu_stream stream) noexcept nogil
    cdef int add_run(self, Group *group, const kv_copy_run *run) noexcept nogil
    cdef int add_pitched(self, Group *group, const kv_copy_run *run, bint packed) noexcept nogil
    cdef int add_piece(self, uint64_t device, void *host, size_t count) noexcept nogil
    cdef int flush(self) noexcept nogil
    cdef int flush_singly(self) noexcept nogil
