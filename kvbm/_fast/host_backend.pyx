# SPDX-License-Identifier: Apache-2.0
"""Copies between a KV cache in host memory and the arena: the reference backend.

It runs everywhere, and copies on the calling thread: an operation has ended when `submit` returns.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from kvbm._fast.atomics cimport kv_u32_load_relaxed
from kvbm._fast.backend cimport COPY_DONE, COPY_FAILED, COPY_STOPPED, CopyBackend, StopCheck
from kvbm._fast.copy cimport (
    KV_COPY_LOAD,
    KV_COPY_OK,
    KV_COPY_STOPPED,
    KV_COPY_STORE,
    KV_COPY_WITH_CHECKSUM,
    HostCopier,
    copy_rows,
    kv_copier,
    kv_copy_result,
)
from kvbm._fast.layout cimport KV_STORE, kv_operation, kv_row


cdef class HostBackend(CopyBackend):
    """Backend for KV caches that the CPU can address.

    Parameters
    ----------
    copiers : list of HostCopier
        One a KV-cache group, in order.
    checksum : bool
        Write a checksum with each stored slot and verify it with each loaded one.
    """

    def __cinit__(self, list copiers not None, *, checksum: bool = False):
        cdef HostCopier copier
        cdef Py_ssize_t i
        if not copiers:
            raise ValueError("a backend needs a copier for each KV-cache group; there is none")
        self.name = "host"
        self.copiers = list(copiers)
        self.flags = KV_COPY_WITH_CHECKSUM if checksum else 0
        self.group_count = <uint32_t>len(copiers)
        self.groups = <const kv_copier **>calloc(self.group_count, sizeof(kv_copier *))
        if self.groups == NULL:
            raise MemoryError("no memory for a backend's copiers")
        for i in range(self.group_count):
            copier = copiers[i]
            self.groups[i] = &copier.copier
        self.block_bytes = self.groups[0].block_bytes

    def __dealloc__(self):
        free(self.groups)

    def set_usable_slots(self, count: int) -> None:
        """Let copies touch the first `count` slots of the arena."""
        for copier in self.copiers:
            copier.usable_slots = count

    cdef int submit(self, uint32_t place, const kv_operation *op, const uint64_t *digests,
                    StopCheck should_stop, void *context, uint32_t *failed_row) noexcept nogil:
        cdef kv_copy_result result
        cdef int status
        cdef int direction = (KV_COPY_STORE if kv_u32_load_relaxed(&op.kind) == KV_STORE
                              else KV_COPY_LOAD)
        failed_row[0] = 0
        if op.group >= self.group_count:
            return COPY_FAILED
        status = copy_rows(self.groups[op.group], direction, op.rows, sizeof(kv_row), digests,
                           op.row_count, self.flags, should_stop, context, &result)
        failed_row[0] = result.row
        if status == KV_COPY_OK:
            return COPY_DONE
        return COPY_STOPPED if status == KV_COPY_STOPPED else COPY_FAILED

    cdef uint64_t bytes_per_block(self) noexcept nogil:
        return self.block_bytes
