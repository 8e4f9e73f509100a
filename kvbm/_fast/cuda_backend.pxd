# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.atomics cimport kv_au32, kv_au64
from kvbm._fast.backend cimport CopyBackend, StopCheck
from kvbm._fast.cuda_device cimport CudaDevice, kv_cu_event, kv_cu_stream, kv_cuda
from kvbm._fast.cuda_marks cimport CudaMarks
from kvbm._fast.cuda_pieces cimport CudaPieces, Group
from kvbm._fast.cuda_staging cimport CudaStaging
from kvbm._fast.layout cimport kv_operation, kv_row

cdef enum:
    CHUNKS_MAX = 16                # chunks on a stream that have not ended


cdef struct Ticket:                # an operation under way
    kv_cu_event ended
    StopCheck should_stop
    void *context
    uint64_t step
    uint32_t group
    uint32_t count
    uint32_t end_row               # rows before it have been submitted
    int result                     # status when these have arrived
    bint is_store
    bint submitting                # there are rows left
    uint32_t errors                # of the direction when it was submitted
    kv_row rows[128]
    uint64_t digests[256]


cdef struct Direction:             # loads, or stores
    kv_cu_stream streams[4]
    kv_cu_event copied[16]         # ends of the copies of the chunks that were submitted last
    kv_cu_event chunk[16]          # ends of these chunks
    uint32_t submitted             # chunks; differences matter, they wrap around
    uint32_t ended
    uint32_t errors                # chunks that ended with one
    uint32_t queue[8]              # places whose rows are not all submitted, in order
    uint32_t head
    uint32_t tail


cdef class CudaBackend(CopyBackend):
    cdef CudaDevice device
    cdef kv_cuda *cuda
    cdef CudaPieces pieces
    cdef CudaStaging staging
    cdef list copiers              # HostCopier, one a KV-cache group; keeps the pointers valid
    cdef Group *groups
    cdef uint32_t group_count
    cdef uint32_t chunks_ahead
    cdef uint32_t stream_count     # of a direction: chunks take turns
    cdef uint32_t flags
    cdef uint64_t block_bytes
    cdef uint64_t stage_bytes      # of a staging buffer: the largest chunk that goes through it
    cdef Direction loads
    cdef Direction stores
    cdef CudaMarks bound           # what loads, and stores, of a step come after
    cdef CudaMarks filled
    cdef Ticket *tickets
    cdef bint opened
    cdef kv_au32 off               # 1 once it has given up
    cdef kv_au32 failures          # in a row; of both threads
    cdef kv_au64 blocks
    cdef kv_au64 submit_ns

    cdef void pump(self, Direction *direction) noexcept nogil
    cdef void leave_queue(self, Direction *direction, uint32_t place) noexcept nogil
    cdef bint has_room(self, Direction *direction) noexcept nogil
    cdef bint follow_last(self, Direction *direction, kv_cu_stream stream) noexcept nogil
    cdef bint submit_chunk(self, Direction *direction, Ticket *ticket) noexcept nogil
    cdef int copy_rows(self, Direction *direction, Ticket *ticket, uint32_t stop_row,
                       kv_cu_stream stream, bint staged) noexcept nogil
    cdef bint submit_pieces(self, Direction *direction, kv_cu_stream stream) noexcept nogil
    cdef bint submit_staged(self, Direction *direction, kv_cu_stream stream,
                            bint is_store) noexcept nogil
    cdef bint mark_copied(self, Direction *direction, kv_cu_stream stream) noexcept nogil
    cdef void end_submission(self, Direction *direction, Ticket *ticket, int result) noexcept nogil
    cdef bint wait_for_step(self, Ticket *ticket, kv_cu_stream stream) noexcept nogil
    cdef int arrived(self, Ticket *ticket, uint32_t *failed_row) noexcept nogil
    cdef bint good(self, int error, const char *what) noexcept nogil
    cdef void failed(self, const char *what, int error) noexcept nogil
