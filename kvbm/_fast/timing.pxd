# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.layout cimport kv_operation, kv_view

cdef uint64_t thread_cpu_ns() noexcept nogil
cdef void begin_cpu() noexcept nogil
cdef void count_cpu(kv_view *view) noexcept nogil
cdef void count_copy(kv_view *view, uint32_t rank, const kv_operation *op, uint64_t bytes_per_block,
                     uint64_t began_ns, bint done) noexcept nogil
