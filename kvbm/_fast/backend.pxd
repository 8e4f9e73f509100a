# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.layout cimport kv_operation

ctypedef bint (*StopCheck)(void *context) noexcept nogil

cdef enum CopyStatus:
    COPY_DONE = 0
    COPY_FAILED = 1         # failed_row says which row first
    COPY_STOPPED = 2        # the operation was cancelled; rows before failed_row are complete
    COPY_RUNNING = 3        # all copies are on a stream; poll says when they have ended
    COPY_SUBMITTING = 4     # some are not yet: poll goes on with them

cdef enum:
    DEPTH_MAX = 8           # operations of one kind that a backend may have under way
    PLACES = 16             # places 0 .. DEPTH_MAX - 1 are for loads, the rest for stores


cdef class CopyBackend:
    cdef readonly str name
    cdef readonly uint32_t depth   # operations of one kind under way at once, 1 .. DEPTH_MAX

    # ---- copy thread, without the GIL ------------------------------------------------------------
    # Begin to copy all rows of `op` under a free place. `digests` are (lo, hi) of each row's block,
    # valid during the call; `context` is valid until the operation has ended. Any status;
    # COPY_RUNNING and COPY_SUBMITTING keep the place until poll gives another one.
    cdef int submit(self, uint32_t place, const kv_operation *op, const uint64_t *digests,
                    StopCheck should_stop, void *context, uint32_t *failed_row) noexcept nogil
    cdef int poll(self, uint32_t place, uint32_t *failed_row) noexcept nogil
    cdef bint is_off(self) noexcept nogil
    cdef uint64_t bytes_per_block(self) noexcept nogil

    # ---- engine thread ---------------------------------------------------------------------------
    # What the engine has put on its stream up to here comes before the loads, or the stores, of
    # `step`; called before the loop learns about the step.
    cdef void step_bound(self, uint64_t step, uint64_t stream) noexcept nogil
    cdef void step_filled(self, uint64_t step, uint64_t stream) noexcept nogil
    # Make what the engine puts on its stream from here on wait for a submitted operation. False if
    # this backend cannot: then the caller waits for the operation's end.
    cdef bint engine_after(self, uint32_t place, uint64_t stream) noexcept nogil
