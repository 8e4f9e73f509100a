# SPDX-License-Identifier: Apache-2.0
from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.atomics cimport kv_au64
from kvbm._fast.backend cimport CopyBackend, StopCheck
from kvbm._fast.copy cimport kv_copier, kv_copy_run
from kvbm._fast.cuda_device cimport CudaDevice, kv_cu_event, kv_cu_pointer, kv_cu_stream, kv_cuda
from kvbm._fast.layout cimport kv_operation, kv_row

cdef enum:
    MARKS = 64                     # steps whose place in the engine's stream is remembered
    SEGMENTS_MAX = 4096            # copies in one submission


cdef struct Marks:                 # places in the engine's stream, by step % MARKS
    kv_cu_event event[64]
    kv_au64 step[64]               # step + 1 of the place that was recorded last, 0 = none


cdef struct Group:                 # a KV-cache group and how to copy it: kvbm/transfer/method.py
    const kv_copier *copier
    uint64_t pitch                 # bytes between regions that one 2D copy can take, else 0
    uint64_t pitched_below         # 2D copies for pieces smaller than this
    uint32_t load_segments         # pieces in one submission
    uint32_t store_segments


cdef struct Ticket:                # an operation under way
    kv_cu_event ended
    uint32_t kind
    uint32_t group
    uint32_t count
    uint32_t end_row               # rows before it have been submitted
    int result                     # status when these have arrived
    kv_row rows[128]
    uint64_t digests[256]


cdef struct Batch:                 # pieces that have not been submitted yet; copy thread only
    kv_cu_pointer to[4096]
    kv_cu_pointer source[4096]
    size_t bytes[4096]
    uint32_t count
    uint32_t limit
    uint32_t kind
    kv_cu_stream stream


cdef class CudaBackend(CopyBackend):
    cdef CudaDevice device
    cdef kv_cuda *cuda
    cdef list copiers              # HostCopier, one a KV-cache group; keeps the pointers valid
    cdef Group *groups
    cdef uint32_t group_count
    cdef uint32_t flags
    cdef uint64_t block_bytes
    cdef kv_cu_stream load_stream
    cdef kv_cu_stream store_stream
    cdef Marks bound
    cdef Marks filled
    cdef Ticket *tickets
    cdef Batch *batch
    cdef bint opened
    cdef bint use_batches
    cdef bint off
    cdef uint32_t failures         # in a row
    cdef uint64_t calls            # submissions to the driver
    cdef uint64_t pieces
    cdef uint64_t blocks
    cdef uint64_t submit_ns

    cdef bint wait_for_step(self, uint64_t step, Marks *marks, kv_cu_stream stream) noexcept nogil
    cdef int copy_ticket(self, Ticket *ticket, kv_cu_stream stream, StopCheck should_stop,
                         void *context) noexcept nogil
    cdef int add_run(self, Group *group, const kv_copy_run *run) noexcept nogil
    cdef int add_pitched(self, Group *group, const kv_copy_run *run, bint packed) noexcept nogil
    cdef int add_piece(self, uint64_t device, void *host, size_t count) noexcept nogil
    cdef int flush(self) noexcept nogil
    cdef int flush_singly(self) noexcept nogil
    cdef int arrived(self, Ticket *ticket, uint32_t *failed_row) noexcept nogil
    cdef void failed(self, const char *what, int error) noexcept nogil
    cdef void mark(self, Marks *marks, uint64_t step, uint64_t stream) noexcept nogil
