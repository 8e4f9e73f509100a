# SPDX-License-Identifier: Apache-2.0
"""The time that a backend takes for stores and loads at once, without a segment or a worker's loop.

For the choice between ways of copying (kvbm/transfer/calibration.py): what is timed are the chunks,
streams and submissions of real operations, both directions by one thread, as in a worker.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from kvbm._fast.atomics cimport kv_u32_store_relaxed
from kvbm._fast.backend cimport COPY_DONE, COPY_RUNNING, COPY_SUBMITTING, DEPTH_MAX
from kvbm._fast.blocks cimport monotonic_ns
from kvbm._fast.cuda_backend cimport CudaBackend
from kvbm._fast.layout cimport KV_LOAD, KV_ROWS, KV_STORE, kv_operation

from kvbm._fast.cuda_device import CudaFault

cdef enum:
    DEPTH = 4                     # operations of a direction at once; the backend has as many
    TIMEOUT_NS = 2000000000


cdef bint go_on(void *context) noexcept nogil:
    return False


cdef int fill(kv_operation *ops, uint32_t kind, uint32_t group, rows) except -1:
    """Turn (device block, slot) pairs into operations; returns how many."""
    cdef uint32_t i, block, slot
    if len(rows) > DEPTH * KV_ROWS:
        raise ValueError(f"{len(rows)} rows, allowed: up to {DEPTH * KV_ROWS}")
    for i, (block, slot) in enumerate(rows):
        ops[i // KV_ROWS].rows[i % KV_ROWS].device_block = block
        ops[i // KV_ROWS].rows[i % KV_ROWS].slot = slot
        ops[i // KV_ROWS].row_count = i % KV_ROWS + 1
        ops[i // KV_ROWS].group = group
        kv_u32_store_relaxed(&ops[i // KV_ROWS].kind, kind)
    return (len(rows) + KV_ROWS - 1) // KV_ROWS


def copy_both(CudaBackend backend not None, group: int, stores, loads) -> int:
    """Store and load at once; returns nanoseconds from the first submission to the last end.

    Parameters
    ----------
    backend : CudaBackend
        That nobody else uses.
    group : int
        KV-cache group.
    stores, loads : sequence of (device block, slot)
        Up to 512 each. What is loaded must have been stored.

    Raises
    ------
    CudaFault
        A copy fails, or does not end within two seconds.
    """
    cdef kv_operation *ops = <kv_operation *>calloc(2 * DEPTH, sizeof(kv_operation))
    cdef uint64_t digests[2 * 128]
    cdef int status[2 * DEPTH]
    cdef uint64_t began, now
    cdef uint32_t i, place, row
    cdef uint32_t count[2]
    cdef bint busy = True, failed = False
    if ops == NULL:
        raise MemoryError("no memory for a trial")
    try:
        count[0] = fill(ops, KV_STORE, group, stores)
        count[1] = fill(&ops[DEPTH], KV_LOAD, group, loads)
        for i in range(2 * 128):
            digests[i] = 1
        with nogil:
            began = now = monotonic_ns()
            for i in range(2 * DEPTH):  # a store, a load, and so on
                place = i // 2 + (i % 2) * DEPTH
                status[place] = COPY_DONE
                if i // 2 < count[i % 2]:
                    status[place] = backend.submit(i // 2 + (1 - i % 2) * DEPTH_MAX, &ops[place],
                                                   digests, go_on, NULL, &row)
            while busy and now - began < TIMEOUT_NS:
                busy = False
                for i in range(2 * DEPTH):
                    if status[i] == COPY_RUNNING or status[i] == COPY_SUBMITTING:
                        status[i] = backend.poll(i % DEPTH + (1 - i // DEPTH) * DEPTH_MAX, &row)
                        busy |= status[i] == COPY_RUNNING or status[i] == COPY_SUBMITTING
                now = monotonic_ns()
        for i in range(2 * DEPTH):
            failed |= status[i] != COPY_DONE
        if failed:
            raise CudaFault("a trial of copies did not end" if busy else "a trial of copies failed")
        return now - began
    finally:
        free(ops)
