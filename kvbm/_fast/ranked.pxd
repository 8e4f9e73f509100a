# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint32_t

from kvbm._fast.eviction cimport Evictor
from kvbm._fast.layout cimport kv_counter, kv_view

cdef void ranked_clear(Evictor *e) noexcept nogil
cdef void ranked_offer(kv_view *view, Evictor *e, uint32_t block) noexcept nogil
cdef void ranked_advance(kv_view *view, Evictor *e, uint32_t step) noexcept nogil
cdef bint ranked_take(kv_view *view, Evictor *e, kv_counter reason, uint32_t *block,
                      uint32_t *host_slot) noexcept nogil
