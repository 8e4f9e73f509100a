# SPDX-License-Identifier: Apache-2.0
from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.atomics cimport kv_au64
from kvbm._fast.copy cimport kv_copier, kv_copy_run
from kvbm._fast.cuda_device cimport (
    CudaDevice,
    kv_cu_function,
    kv_cu_module,
    kv_cu_pointer,
    kv_cu_stream,
    kv_cuda,
)
from kvbm._fast.cuda_pieces cimport Group
from kvbm._fast.layout cimport kv_row


cdef extern from "cuda_staging.h" nogil:
    enum:
        KV_MOVE_REGIONS_MAX
        KV_MOVE_ROWS_MAX
        KV_MOVE_THREADS

    ctypedef struct kv_move_row:
        uint32_t block
        uint32_t first
        uint32_t pitch

    ctypedef struct kv_move:
        uint64_t staging
        uint64_t stride
        uint32_t rows
        uint32_t regions
        uint32_t vectors
        uint32_t to_staging
        uint64_t[256] base
        kv_move_row[128] row

    const char *KV_MOVE_NAME
    const char *KV_MOVE_PTX


cdef bint can_stage(const kv_copier *copier) noexcept nogil


cdef class CudaStaging:
    cdef CudaDevice device
    cdef kv_cuda *cuda
    cdef kv_cu_module module
    cdef kv_cu_function kernel
    cdef kv_cu_pointer memory      # 0: there is none, nothing is staged
    cdef size_t buffer_bytes
    cdef uint32_t streams
    cdef kv_move move              # of the chunk that is being made
    cdef uint32_t[128] slots       # of its rows
    cdef const Group *group
    cdef kv_cu_stream stream
    cdef kv_au64 calls             # submissions to the driver
    cdef kv_au64 kernels

    # Copy thread only, without the GIL. The last two return the driver's error number.
    cdef bint wanted(self, const Group *group, bint is_store, const kv_row *rows,
                     uint32_t count) noexcept nogil
    cdef void begin(self, const Group *group, bint is_store, kv_cu_stream stream,
                    uint32_t turn) noexcept nogil
    cdef void add_run(self, const kv_copy_run *run) noexcept nogil
    cdef void arrange(self) noexcept nogil
    cdef int copy(self) noexcept nogil
    cdef int launch(self) noexcept nogil
