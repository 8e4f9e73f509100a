# SPDX-License-Identifier: Apache-2.0
"""Single steps of a block table, timed one by one in C.

One clock reading a step (the end of one is the beginning of the next), so that a sample has the
cost of one reading in it; `clock_cost` measures that. The steps are those that
`BlockTable.reserve`, `publish` and `unpin` make of each block.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from kvbm._fast.atomics cimport kv_u64_load_relaxed
from kvbm._fast.blocks cimport (
    PUBLISHED,
    Reservation,
    block_publish,
    monotonic_ns,
    structure_enter,
    structure_exit,
)
from kvbm._fast.eviction cimport evictor_take
from kvbm._fast.index cimport index_find
from kvbm._fast.keys cimport Keys
from kvbm._fast.layout cimport KV_C_EVICTED_CAPACITY, KV_NONE
from kvbm._fast.supply cimport supply_give_back, supply_leave
from kvbm._fast.table cimport KEYS_AHEAD, BlockTable, make_ref, set_parent
from kvbm._fast.timing cimport thread_cpu_ns

cdef uint64_t ROOT = 0xFFFFFFFFFFFFFFFFULL


def clock_cost(rounds: int) -> float:
    """Nanoseconds of one clock reading."""
    cdef int _i, count = rounds
    cdef uint64_t began = monotonic_ns(), last = began
    for _i in range(count):
        last = monotonic_ns()
    return (last - began) / count


cdef class Steps:
    """One leader's steps.

    Parameters
    ----------
    table : BlockTable
        The leader's table.
    refs : array of uint64
        Where the steps keep what they reserved; as long as the longest call.
    """
    cdef BlockTable table
    cdef uint64_t[::1] refs
    cdef readonly uint64_t cpu   # processor time of the last call, in nanoseconds

    def __init__(self, BlockTable table not None, uint64_t[::1] refs):
        self.table = table
        self.refs = refs

    def evict(self, uint32_t[::1] spent) -> None:
        """Take the next victims and give their records and slots to the pools."""
        cdef Py_ssize_t i
        cdef uint32_t block, slot
        cdef uint64_t last, now, cpu = thread_cpu_ns()
        cdef BlockTable t = self.table
        if not structure_enter(t.view):
            raise RuntimeError("a recovery is under way")
        last = monotonic_ns()
        for i in range(spent.shape[0]):
            if not evictor_take(t.view, &t.evictor, KV_C_EVICTED_CAPACITY, &block, &slot):
                structure_exit(t.view)
                raise RuntimeError("nothing can be evicted")
            supply_give_back(t.view, &t.supply, block, slot)
            now = monotonic_ns()
            spent[i] = <uint32_t>min(now - last, 0xFFFFFFFF)
            last = now
        structure_exit(t.view)
        self.cpu = thread_cpu_ns() - cpu

    def reserve(self, Keys keys not None, uint32_t[::1] spent) -> None:
        """Reserve a new chain, from the pools or with an eviction for each block."""
        cdef Py_ssize_t i, count = spent.shape[0]
        cdef uint32_t block, generation, slot
        cdef uint64_t last, now, word, ref = ROOT, cpu = thread_cpu_ns()
        cdef Reservation what
        cdef BlockTable t = self.table
        cdef bint done = True
        memset(&what, 0, sizeof(what))
        what.tick = kv_u64_load_relaxed(&t.view.header.tick)
        t.mix(keys)
        if not structure_enter(t.view):
            raise RuntimeError("a recovery is under way")
        last = monotonic_ns()
        for i in range(count):
            keys.digest(i, &what.digest_lo, &what.digest_hi)
            t.prefetch(keys, i + KEYS_AHEAD, count)
            what.sequence_hash = keys.sequence_hash(i)
            what.position = <uint32_t>i
            block = index_find(t.view, what.digest_lo, what.digest_hi, True, &word)
            set_parent(&what, ref)
            if block != KV_NONE or not t.reserve_block(&what, <uint32_t>(count - i), &block,
                                                       &generation, &slot):
                done = False
                break
            ref = self.refs[i] = make_ref(block, generation)
            now = monotonic_ns()
            spent[i] = <uint32_t>min(now - last, 0xFFFFFFFF)
            last = now
        supply_leave(t.view, &t.supply)
        structure_exit(t.view)
        self.cpu = thread_cpu_ns() - cpu
        if not done:
            raise RuntimeError("a block cannot be reserved")

    def publish(self, uint32_t[::1] spent) -> None:
        """Register what the last `reserve` has reserved."""
        cdef Py_ssize_t i
        cdef uint64_t last, now, cpu = thread_cpu_ns()
        cdef BlockTable t = self.table
        cdef bint done = True
        if not structure_enter(t.view):
            raise RuntimeError("a recovery is under way")
        last = monotonic_ns()
        for i in range(spent.shape[0]):
            done &= block_publish(t.view, <uint32_t>self.refs[i], <uint32_t>(self.refs[i] >> 32),
                                  last) == PUBLISHED
            now = monotonic_ns()
            spent[i] = <uint32_t>min(now - last, 0xFFFFFFFF)
            last = now
        structure_exit(t.view)
        self.cpu = thread_cpu_ns() - cpu
        if not done:
            raise RuntimeError("a block cannot be published")

    def unpin(self, uint32_t[::1] spent) -> None:
        """Return the chain, its end first; it can be evicted from now on."""
        cdef Py_ssize_t i, count = spent.shape[0]
        cdef uint64_t last, now, cpu = thread_cpu_ns()
        last = monotonic_ns()
        for i in range(count):
            self.table.let_go(self.refs[count - 1 - i], 0)
            now = monotonic_ns()
            spent[i] = <uint32_t>min(now - last, 0xFFFFFFFF)
            last = now
        self.cpu = thread_cpu_ns() - cpu

    def match(self, Keys keys not None, uint32_t[::1] spent) -> int:
        """Match a whole chain, as the connector calls it; its length. One sample."""
        cdef uint64_t cpu = thread_cpu_ns(), last = monotonic_ns(), now
        count, ref = self.table.match(keys, 0, keys.count())
        now = monotonic_ns()
        spent[0] = <uint32_t>min(now - last, 0xFFFFFFFF)
        self.cpu = thread_cpu_ns() - cpu
        if ref is not None:
            self.table.let_go(ref, 0)
        return count
