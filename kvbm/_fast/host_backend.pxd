# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.backend cimport CopyBackend
from kvbm._fast.copy cimport kv_copier


cdef class HostBackend(CopyBackend):
    cdef list copiers             # HostCopier, one a KV-cache group; keeps the pointers below valid
    cdef const kv_copier **groups
    cdef uint32_t group_count
    cdef uint32_t flags
    cdef uint64_t block_bytes
