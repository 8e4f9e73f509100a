# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.layout cimport kv_operation, kv_view

cdef enum EndResult:
    STILL_RUNNING   # other ranks have not ended
    MUST_PUBLISH    # a store, all ranks done: the caller publishes, then calls operation_finished
    ENDED           # complete or failed

cdef uint32_t rings_room(kv_view *view) noexcept nogil
cdef uint32_t operation_allocate(kv_view *view, uint32_t *cursor, uint32_t *looks) noexcept nogil
cdef void operation_submit(kv_view *view, uint32_t index) noexcept nogil
cdef bint operation_claim(kv_view *view, kv_operation *op, uint32_t generation,
                          uint32_t rank) noexcept nogil
cdef EndResult operation_end(kv_view *view, kv_operation *op, uint32_t rank,
                             bint done) noexcept nogil
cdef void operation_finished(kv_view *view, kv_operation *op) noexcept nogil
cdef void operation_publish(kv_view *view, kv_operation *op) noexcept nogil
cdef void operation_cancel(kv_view *view, kv_operation *op, uint32_t generation) noexcept nogil
cdef void operation_recycle(kv_view *view, kv_operation *op) noexcept nogil
cdef bint leader_holds_nothing(kv_view *view) noexcept nogil
cdef bint ring_pop(kv_view *view, uint32_t rank, uint64_t *entry) noexcept nogil
cdef void doorbell_ring(kv_view *view, uint32_t leader, uint32_t rank) noexcept nogil
cdef uint32_t doorbell_read(kv_view *view, uint32_t leader, uint32_t rank) noexcept nogil
cdef void doorbell_wait(kv_view *view, uint32_t leader, uint32_t rank, uint32_t seen,
                        uint64_t timeout_ns) noexcept nogil
