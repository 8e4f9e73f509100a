# SPDX-License-Identifier: Apache-2.0
"""A leader's work in a loop without the interpreter, for threads that share one mapping.

ThreadSanitizer knows memory by its address: it sees two participants race only if both reach the
segment through the same mapping. `share_mapping` gives an attachment, which keeps its own lines and
locks, the mapping of another one.

What a race detector needs to see are the plain bytes that the protocol hands from one to the other:
the payloads of slots and of device blocks, the rows and fields of operations. They are written and
read here, and by the worker's copy, as ordinary memory, so that a missing release or acquire
anywhere between writer and reader is a report. Wrong payloads are counted as well.

Chains have DEPTH blocks; chains whose numbers are equal modulo 4 share their first SHARED blocks.
Odd chains are filled by the leader itself, even ones by operations, which leave a header in the
arena that a load requires.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memset
from posix.unistd cimport usleep

from kvbm._fast.atomics cimport (
    kv_au64,
    kv_u64_fetch_or_acq_rel,
    kv_u64_load_acquire,
    kv_u64_load_relaxed,
    kv_u64_store_relaxed,
)
from kvbm._fast.blocks cimport (
    GONE,
    NO_PARENT,
    Reservation,
    block_pin,
    block_publish,
    chain_step,
    structure_enter,
    structure_exit,
)
from kvbm._fast.eviction cimport evictor_take
from kvbm._fast.index cimport index_find
from kvbm._fast.layout cimport (
    KV_C_EVICTED_CAPACITY,
    KV_LOAD,
    KV_NONE,
    KV_OP_COMPLETE,
    KV_OP_FAILED,
    KV_POOL_BLOCKS,
    KV_POOL_HOST,
    KV_STORE,
    kv_mix64,
    kv_op_generation,
    kv_op_state,
    kv_operation,
    kv_operation_at,
    kv_row,
    kv_view,
    kv_view_init,
    kv_word_generation,
)
from kvbm._fast.locks cimport lock_drop
from kvbm._fast.operation_table cimport OperationTable
from kvbm._fast.operations cimport operation_cancel, operation_recycle, operation_submit
from kvbm._fast.pool cimport pool_give_back
from kvbm._fast.recovery cimport recover_view
from kvbm._fast.segment cimport Segment, line_lock
from kvbm._fast.supply cimport supply_leave, supply_take
from kvbm._fast.table cimport make_ref, set_parent

cdef uint64_t NO_REF = 0xFFFFFFFFFFFFFFFFULL

cdef enum:
    DEPTH = 6                 # blocks of a chain
    SHARED = 2
    CHAINS = 12
    WORDS = 8                 # of a payload
    FLIGHTS = 12              # operations of a leader that are not collected yet

CHUNK_BYTES = WORDS * 8
DEVICE_BLOCKS = 128 * DEPTH   # each operation has its own


cdef struct Flight:
    uint64_t handle           # of the operation
    uint64_t ref              # the held chain of a load, else NO_REF
    uint32_t chain
    uint32_t count
    bint busy


cdef struct Memory:           # what copies move
    uint8_t *arena            # slot 0
    uint64_t group_bytes
    uint32_t group_slots
    uint64_t *device          # block 0


cdef class Work:
    """What a leader did, and what it has under way.

    Parameters
    ----------
    table : OperationTable
        Of an attachment that shares its mapping.
    arena, group_bytes, group_slots : int
        Address of slot 0, and where the next groups of slots are.
    device : int
        Address of the device blocks of this leader.
    seed : int
        Of all decisions.
    """

    cdef OperationTable table
    cdef Memory memory
    cdef uint64_t random
    cdef Flight flights[FLIGHTS]
    cdef kv_au64 shown[FLIGHTS]   # their handles; the engine's thread of a worker looks at them
    cdef readonly uint64_t turns, read, wrong, stored, loaded, failed, abandoned, evicted

    def __cinit__(self, OperationTable table not None, uintptr_t arena, uint64_t group_bytes,
                  uint32_t group_slots, uintptr_t device, uint64_t seed):
        self.table = table
        self.memory.arena = <uint8_t *>arena
        self.memory.group_bytes = group_bytes
        self.memory.group_slots = group_slots
        self.memory.device = <uint64_t *>device
        self.random = kv_mix64(seed + 1) | 1

    def run(self, turns: int, until_loads_ended: bool = False) -> None:
        """Do random operations; at the end, if asked, wait for the loads that are under way.

        A copy that outlives the hold of its leader may read a slot while it is filled again, and
        notices it afterwards: that is a race by design, so a leader dies without loads here.
        """
        cdef int i, count = turns
        cdef bint wait = until_loads_ended
        with nogil:
            for i in range(count):
                self.step()
            while wait and self.loads() != 0:
                self.collect()
                usleep(100)

    def finish(self) -> None:
        """Collect everything; a worker must be running."""
        with nogil:
            while self.busy() != 0:
                self.collect()
                usleep(100)

    def handles(self) -> list[int]:
        """Operations under way or collected already; for another thread, and without any order."""
        return [kv_u64_load_relaxed(&self.shown[i]) for i in range(FLIGHTS)]

    # ---- decisions -------------------------------------------------------------------------------
    cdef uint32_t draw(self, uint32_t below) noexcept nogil:
        self.random ^= self.random << 13
        self.random ^= self.random >> 7
        self.random ^= self.random << 17
        return <uint32_t>((self.random >> 16) % below)

    cdef void step(self) noexcept nogil:
        cdef uint32_t what = self.draw(16), chain = self.draw(CHAINS), count = 1 + self.draw(DEPTH)
        self.turns += 1
        if what < 5:
            self.read_chain(chain, count)
        elif what < 8:
            self.store_by_hand(chain | 1, count, what == 5)
        elif what < 11:
            self.store(chain & ~<uint32_t>1, count)
        elif what < 13:
            self.load(chain & ~<uint32_t>1, count)
        elif what == 13:
            self.evict(1 + self.draw(3))
        elif what == 14:
            self.cancel()
        self.collect()

    # ---- digests and payloads --------------------------------------------------------------------
    cdef void digest(self, uint32_t chain, uint32_t depth, uint64_t *lo,
                     uint64_t *hi) noexcept nogil:
        cdef uint32_t which = chain % 4 * 100 if depth < SHARED else 1000 + chain * 100
        lo[0] = kv_mix64(which + depth + 1)
        hi[0] = kv_mix64(lo[0])

    cdef uint64_t *slot_bytes(self, uint32_t slot) noexcept nogil:
        return <uint64_t *>(self.memory.arena + slot // self.memory.group_slots
                            * self.memory.group_bytes
                            + slot % self.memory.group_slots * WORDS * sizeof(uint64_t))

    cdef uint64_t *device_bytes(self, uint32_t block) noexcept nogil:
        return self.memory.device + <uint64_t>block * WORDS

    cdef void fill(self, uint64_t *bytes, uint32_t chain, uint32_t depth) noexcept nogil:
        cdef uint64_t lo, hi
        cdef int i
        self.digest(chain, depth, &lo, &hi)
        for i in range(WORDS):
            bytes[i] = lo + i

    cdef void check(self, const uint64_t *bytes, uint32_t chain, uint32_t depth) noexcept nogil:
        cdef uint64_t lo, hi
        cdef int i
        self.digest(chain, depth, &lo, &hi)
        for i in range(WORDS):
            if bytes[i] != lo + i:
                self.wrong += 1
                return

    # ---- what a leader does ----------------------------------------------------------------------
    cdef uint64_t hold(self, uint32_t chain, uint32_t *count) noexcept nogil:
        """Pin the deepest of the first `count` blocks that is registered; their number."""
        cdef kv_view *view = self.table.view
        cdef uint64_t lo, hi, word = 0
        cdef uint32_t block
        cdef uint32_t *pins = self.table.pins
        while count[0] != 0:
            self.digest(chain, count[0] - 1, &lo, &hi)
            block = index_find(view, lo, hi, False, &word)
            if block != KV_NONE and block_pin(view, block, lo, hi):
                pins[block] += 1
                return make_ref(block, kv_word_generation(
                    kv_u64_load_acquire(&view.blocks[block].word)))
            count[0] -= 1
        return NO_REF

    cdef void read_chain(self, uint32_t chain, uint32_t count) noexcept nogil:
        """Match a chain and read what its slots hold."""
        cdef uint64_t ref = self.hold(chain, &count)
        cdef uint32_t block = <uint32_t>ref, generation = <uint32_t>(ref >> 32), slot = 0
        cdef int depth
        if ref == NO_REF:
            return
        for depth in range(<int>count - 1, -1, -1):
            if not chain_step(self.table.view, &block, &generation, &slot):
                self.wrong += 1
                break
            self.read += 1
            self.check(self.slot_bytes(slot), chain, depth)
        self.table.let_go(ref, 0)

    cdef void store_by_hand(self, uint32_t chain, uint32_t count, bint give_up) noexcept nogil:
        """Reserve what is missing of a chain, fill it and publish it, or give it back."""
        cdef uint64_t refs[DEPTH]
        cdef uint32_t slots[DEPTH]
        cdef uint32_t depths[DEPTH]
        cdef int i, found = 0
        cdef bint inside
        found = self.reserve(chain, count, refs, slots, depths)
        for i in range(found):
            self.fill(self.slot_bytes(slots[i]), chain, depths[i])
        inside = structure_enter(self.table.view)
        while not inside:  # a recovery, which ends
            usleep(50)
            inside = structure_enter(self.table.view)
        for i in range(found):
            if not give_up and block_publish(
                    self.table.view, <uint32_t>refs[i], <uint32_t>(refs[i] >> 32),
                    1) not in (GONE, NO_PARENT):
                self.stored += 1
                continue
            self.table.abandon(<uint32_t>refs[i], <uint32_t>(refs[i] >> 32))
            self.abandoned += 1
        structure_exit(self.table.view)
        for i in range(found):
            self.table.let_go(refs[i], 0)

    cdef int reserve(self, uint32_t chain, uint32_t count, uint64_t *refs, uint32_t *slots,
                     uint32_t *depths) noexcept nogil:
        cdef Reservation what
        cdef uint64_t ref = NO_REF, word = 0
        cdef uint32_t depth, block, generation = 0
        cdef int found = 0
        memset(&what, 0, sizeof(what))
        if not structure_enter(self.table.view):
            return 0
        for depth in range(count):
            self.digest(chain, depth, &what.digest_lo, &what.digest_hi)
            block = index_find(self.table.view, what.digest_lo, what.digest_hi, True, &word)
            if block != KV_NONE:
                ref = make_ref(block, kv_word_generation(word))
                continue
            set_parent(&what, ref)
            what.position = depth
            if not self.table.reserve_block(&what, count - depth, &block, &generation,
                                            &slots[found]):
                break
            ref = refs[found] = make_ref(block, generation)
            depths[found] = depth
            found += 1
        supply_leave(self.table.view, &self.table.supply)
        structure_exit(self.table.view)
        return found

    cdef Flight *free_flight(self) noexcept nogil:
        cdef int i
        for i in range(FLIGHTS):
            if not self.flights[i].busy:
                return &self.flights[i]
        return NULL

    cdef void submit(self, Flight *flight, uint32_t index, uint64_t ref, uint32_t chain,
                     uint32_t count) noexcept nogil:
        cdef kv_operation *op = kv_operation_at(self.table.view, self.table.view.leader, index)
        flight.handle = make_ref(index, kv_op_generation(kv_u64_load_acquire(&op.word)))
        kv_u64_store_relaxed(&self.shown[flight - self.flights], flight.handle)
        flight.ref = ref
        flight.chain = chain
        flight.count = count
        flight.busy = True
        operation_submit(self.table.view, index)

    cdef void store(self, uint32_t chain, uint32_t count) noexcept nogil:
        """Reserve what is missing of a chain and submit its copy."""
        cdef uint64_t refs[DEPTH]
        cdef uint32_t slots[DEPTH]
        cdef uint32_t depths[DEPTH]
        cdef uint32_t index, i
        cdef int found
        cdef kv_operation *op
        cdef Flight *flight = self.free_flight()
        if flight == NULL:
            return
        self.table.begin()
        index = self.table.open_operation(KV_STORE, 0, 0, 0, NO_REF)
        if index == KV_NONE:
            return
        found = self.reserve(chain, count, refs, slots, depths)
        if found == 0:
            return
        op = kv_operation_at(self.table.view, self.table.view.leader, index)
        for i in range(<uint32_t>found):
            self.fill_row(&op.rows[i], index * DEPTH + i, slots[i], refs[i])
            self.fill(self.device_bytes(index * DEPTH + i), chain, depths[i])
        op.row_count = found
        self.submit(flight, index, NO_REF, chain, found)

    cdef void fill_row(self, kv_row *row, uint32_t device_block, uint32_t slot,
                       uint64_t ref) noexcept nogil:
        memset(row, 0, sizeof(kv_row))
        row.device_block = device_block
        row.slot = slot
        row.block = <uint32_t>ref
        row.generation = <uint32_t>(ref >> 32)

    cdef void load(self, uint32_t chain, uint32_t count) noexcept nogil:
        """Match a chain and submit its copy to the device."""
        cdef uint64_t ref
        cdef uint32_t index, block, generation, slot = 0
        cdef int depth
        cdef bint whole = True
        cdef kv_operation *op
        cdef Flight *flight = self.free_flight()
        if flight == NULL:
            return
        self.table.begin()
        index = self.table.open_operation(KV_LOAD, 0, 0, 0, NO_REF)
        if index == KV_NONE:
            return
        ref = self.hold(chain, &count)
        if ref == NO_REF:
            return
        op = kv_operation_at(self.table.view, self.table.view.leader, index)
        op.row_count = count
        block, generation = <uint32_t>ref, <uint32_t>(ref >> 32)
        for depth in range(<int>count - 1, -1, -1):
            self.fill_row(&op.rows[depth], index * DEPTH + depth, 0, make_ref(block, generation))
            whole = whole and chain_step(self.table.view, &block, &generation, &slot)
            op.rows[depth].slot = slot
        if whole:
            self.submit(flight, index, ref, chain, count)
        else:
            self.wrong += 1
            self.table.let_go(ref, 0)

    cdef void evict(self, uint32_t count) noexcept nogil:
        cdef uint32_t i, block = 0, slot = 0
        if not structure_enter(self.table.view):
            return
        for i in range(count):
            if not evictor_take(self.table.view, &self.table.evictor,
                                KV_C_EVICTED_CAPACITY, &block, &slot):
                break
            self.evicted += 1
            pool_give_back(self.table.view, KV_POOL_BLOCKS, block)
            if slot != KV_NONE:
                pool_give_back(self.table.view, KV_POOL_HOST, slot)
        structure_exit(self.table.view)

    cdef void cancel(self) noexcept nogil:
        cdef Flight *flight = &self.flights[self.draw(FLIGHTS)]
        if flight.busy:
            operation_cancel(self.table.view, kv_operation_at(
                self.table.view, self.table.view.leader, <uint32_t>flight.handle),
                <uint32_t>(flight.handle >> 32))

    # ---- the end of operations -------------------------------------------------------------------
    cdef int busy(self) noexcept nogil:
        cdef int i, count = 0
        for i in range(FLIGHTS):
            count += self.flights[i].busy
        return count

    cdef int loads(self) noexcept nogil:
        cdef int i, count = 0
        for i in range(FLIGHTS):
            count += self.flights[i].busy and self.flights[i].ref != NO_REF
        return count

    cdef void collect(self) noexcept nogil:
        """Collect what has ended, as OperationTable.collect does."""
        cdef Flight *flight
        cdef kv_operation *op
        cdef uint32_t state, row
        cdef int i
        for i in range(FLIGHTS):
            flight = &self.flights[i]
            if not flight.busy:
                continue
            op = kv_operation_at(self.table.view, self.table.view.leader, <uint32_t>flight.handle)
            state = kv_op_state(kv_u64_load_acquire(&op.word))
            if state != KV_OP_COMPLETE and state != KV_OP_FAILED:
                continue
            if flight.ref == NO_REF:
                if not structure_enter(self.table.view):
                    continue
                self.table.collect_rows(op, state == KV_OP_COMPLETE)
                structure_exit(self.table.view)
            else:
                for row in range(flight.count if state == KV_OP_COMPLETE else 0):
                    self.check(self.device_bytes(<uint32_t>flight.handle * DEPTH + row),
                               flight.chain, row)
                self.table.let_go(flight.ref, 0)
            self.loaded += flight.ref != NO_REF and state == KV_OP_COMPLETE
            self.stored += flight.count if flight.ref == NO_REF and state == KV_OP_COMPLETE else 0
            self.failed += state == KV_OP_FAILED
            operation_recycle(self.table.view, op)
            flight.busy = False


# ---- one mapping for all, and deaths -------------------------------------------------------------
def share_mapping(Segment one not None, Segment base not None) -> None:
    """Let an attachment that has no line yet reach the segment through the mapping of `base`."""
    kv_view_init(&one.view, base.base, &base.view.shape)


cdef kv_au64 deaths  # stands for the kernel, which orders a death before the next owner's lock


def die(Segment one not None) -> None:
    """Drop the lock of the own line and leave everything as it is, as the kernel does at death."""
    kv_u64_fetch_or_acq_rel(&deaths, 0)
    lock_drop(one.fd, line_lock(one.view.self))
    one.view.self = one.view.leader = KV_NONE


def born() -> None:
    """After a line has been claimed."""
    kv_u64_fetch_or_acq_rel(&deaths, 0)


def leave_half_done(Work work not None, inside: bool) -> None:
    """A pin, reservations, records that are in no pool; if asked, inside the structure."""
    cdef uint64_t refs[DEPTH]
    cdef uint32_t slots[DEPTH]
    cdef uint32_t depths[DEPTH]
    cdef uint32_t count = DEPTH, record = 0, slot = 0
    work.hold(0, &count)
    work.reserve(1, 3, refs, slots, depths)
    if inside and structure_enter(work.table.view):
        supply_take(work.table.view, &work.table.supply, &work.table.evictor, 4, &record, &slot)


def recover_often(Segment segment not None, turns: int, pause_us: int) -> int:
    """Recover and rebuild, again and again, without the interpreter; lines that were returned."""
    cdef int i, released = 0, count = turns, pause = pause_us
    with nogil:
        for i in range(count):
            released += recover_view(&segment.view, segment.fd, i % 4 == 0)
            usleep(pause)
    return released


