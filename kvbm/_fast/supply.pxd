# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint32_t

from kvbm._fast.eviction cimport Evictor
from kvbm._fast.layout cimport kv_view
from kvbm._fast.pool cimport PoolCursor

cdef struct FreeRun:             # neighbouring free indices taken from a pool but not used yet
    uint32_t first
    uint32_t count

# One leader's way to records and slots for new blocks; nothing of it is shared. All zero at first.
cdef struct Supply:
    PoolCursor record_cursor
    PoolCursor slot_cursor
    FreeRun records
    FreeRun slots
    bint pool_is_empty           # in the call in progress; a look costs a read for 4096 slots

cdef bint supply_take(kv_view *view, Supply *s, Evictor *e, uint32_t wanted, uint32_t *record,
                      uint32_t *slot) noexcept nogil
cdef void supply_give_back(kv_view *view, Supply *s, uint32_t record, uint32_t slot) noexcept nogil
cdef void supply_leave(kv_view *view, Supply *s) noexcept nogil
