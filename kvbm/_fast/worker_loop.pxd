# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.atomics cimport kv_au32, kv_au64
from kvbm._fast.backend cimport CopyBackend
from kvbm._fast.layout cimport kv_operation, kv_participant, kv_view
from kvbm._fast.segment cimport Segment


cdef struct Waiting:              # popped from the ring, may not run yet; oldest first
    uint64_t entries[128]
    uint32_t count


cdef struct StopContext:
    const kv_operation *op
    uint32_t generation


cdef struct Flight:               # an operation under way; its number is the backend's place
    kv_au64 submitted             # entry + 1 from the end of its submission to its end, else 0
    uint64_t entry
    uint64_t began_ns
    StopContext context           # of its stop check
    kv_operation own              # private copy of what it says: checked once, used from then on
    bint busy


cdef struct Lane:                 # what one backend has to do
    Waiting loads                 # into the faster memory: a request waits for them
    Waiting stores
    Flight flights[16]
    uint32_t busy                 # flights under way


cdef class WorkerLoop:
    cdef readonly Segment segment
    cdef readonly CopyBackend backend      # between device and host
    cdef readonly CopyBackend disk         # between host and disk; set before `has_disk`
    cdef readonly int rank
    cdef readonly bint disk_hangs          # `run` has returned while disk copies were under way
    cdef kv_view *view
    cdef uint32_t line
    cdef kv_au32 stopping         # process-private
    cdef kv_au32 has_disk         # process-private
    cdef Lane copies              # of `backend`
    cdef Lane disk_copies         # of `disk`
    cdef bint left                # the backend has given up, and so has this worker
    cdef uint64_t digests[256]    # of the rows of the operation that is being submitted

    cdef void drain_ring(self) noexcept nogil
    cdef bint next_runnable(self, Waiting *waiting, uint64_t step, uint64_t *entry) noexcept nogil
    cdef bint start_next(self, CopyBackend backend, Lane *lane, Waiting *waiting, uint32_t first,
                         uint64_t step) noexcept nogil
    cdef bint start_copies(self, kv_participant *me) noexcept nogil
    cdef void start(self, CopyBackend backend, Lane *lane, uint64_t entry,
                    uint32_t place) noexcept nogil
    cdef bint end_flights(self, CopyBackend backend, Lane *lane) noexcept nogil
    cdef bint may_return(self, uint64_t asked_ns) noexcept nogil
    cdef void leave(self) noexcept nogil
    cdef void finish(self, Flight *flight, int status, uint32_t failed_row) noexcept nogil
    cdef bint rows_are_valid(self, const kv_operation *op, bint with_digests,
                             uint32_t *bad_row) noexcept nogil
    cdef kv_operation *operation_of(self, uint64_t handle, uint64_t *word) except? NULL
    cdef bint engine_follows(self, uint64_t handle, uint64_t stream) noexcept nogil
