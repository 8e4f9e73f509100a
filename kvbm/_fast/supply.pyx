# SPDX-License-Identifier: Apache-2.0
"""Records and host slots for new blocks: from the free pools while they last, else of victims.

Free ones are taken in runs of neighbours, which copies and caches like. What a leader gives back it
takes again first: the lines of those records are still in its core's cache, and leaders that fill a
table beside each other do not take turns at the same bitmap words.
"""
from libc.stdint cimport uint32_t

from kvbm._fast.atomics cimport kv_u32_load_acquire
from kvbm._fast.blocks cimport block_prefetch
from kvbm._fast.eviction cimport Evictor, evictor_advance, evictor_take
from kvbm._fast.layout cimport (
    KV_C_EVICTED_CAPACITY,
    KV_NONE,
    KV_POOL_BLOCKS,
    KV_POOL_HOST,
    kv_view,
)
from kvbm._fast.pool cimport pool_give_back, pool_take_run

cdef enum:
    RECORDS_AHEAD = 2              # whose lines are asked for while a record is handed out


cdef uint32_t usable_slots(kv_view *view) noexcept nogil:
    """Host slots whose memory every rank has reserved."""
    cdef uint32_t rank, ready, least = view.shape.host_slots
    for rank in range(view.shape.ranks):
        ready = kv_u32_load_acquire(&view.header.ready_slots[rank])
        if ready < least:
            least = ready
    return least


cdef uint32_t handed_out(FreeRun *run) noexcept nogil:
    run.first += 1
    run.count -= 1
    return run.first - 1


cdef bint supply_take(kv_view *view, Supply *s, Evictor *e, uint32_t wanted, uint32_t *record,
                      uint32_t *slot) noexcept nogil:
    """A block record and a host slot; False if nothing is free and nothing can be evicted.

    `wanted` is how many the call in progress will ask for, this one included.
    """
    cdef uint32_t first = 0
    if s.slots.count == 0 and not s.pool_is_empty:
        s.slots.count = pool_take_run(view, KV_POOL_HOST, wanted, usable_slots(view),
                                      &s.slot_cursor, &first)
        s.slots.first = first
        s.pool_is_empty = s.slots.count == 0
    if s.slots.count != 0 and s.records.count == 0:
        s.records.count = pool_take_run(view, KV_POOL_BLOCKS, s.slots.count,
                                        view.shape.block_capacity, &s.record_cursor, &first)
        s.records.first = first
    if s.slots.count != 0 and s.records.count != 0:
        if s.records.count > RECORDS_AHEAD:
            block_prefetch(view, s.records.first + RECORDS_AHEAD)
        evictor_advance(view, e, e.sweep_least)
        record[0] = handed_out(&s.records)
        slot[0] = handed_out(&s.slots)
        return True
    while evictor_take(view, e, KV_C_EVICTED_CAPACITY, record, slot):
        if slot[0] != KV_NONE:
            return True
        pool_give_back(view, KV_POOL_BLOCKS, record[0])  # it was not in the host tier
    return False


cdef void supply_give_back(kv_view *view, Supply *s, uint32_t record,
                           uint32_t slot) noexcept nogil:
    """Return a record, and a slot unless it is KV_NONE."""
    pool_give_back(view, KV_POOL_BLOCKS, record)
    s.record_cursor.word_index = record // 64
    if slot != KV_NONE:
        pool_give_back(view, KV_POOL_HOST, slot)
        s.slot_cursor.word_index = slot // 64


cdef void supply_leave(kv_view *view, Supply *s) noexcept nogil:
    """Before leaving the structure: recovery counts what no block names as free."""
    s.pool_is_empty = False
    while s.records.count != 0:
        s.records.count -= 1
        pool_give_back(view, KV_POOL_BLOCKS, s.records.first + s.records.count)
    while s.slots.count != 0:
        s.slots.count -= 1
        pool_give_back(view, KV_POOL_HOST, s.slots.first + s.slots.count)
