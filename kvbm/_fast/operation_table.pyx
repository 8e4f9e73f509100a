# SPDX-License-Identifier: Apache-2.0
"""Stores and loads of a leader.

Blocks and slots become rows of operations, results become registered blocks.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from kvbm._fast.atomics cimport (
    kv_u32_load_relaxed,
    kv_u32_store_relaxed,
    kv_u64_fetch_add_relaxed,
    kv_u64_load_acquire,
    kv_u64_load_relaxed,
    kv_u64_store_relaxed,
)
from kvbm._fast.blocks cimport (
    GONE,
    NO_PARENT,
    PUBLISHED,
    Reservation,
    block_pin,
    block_publish,
    chain_step,
    monotonic_ns,
    structure_enter,
    structure_exit,
)
from kvbm._fast.index cimport index_find
from kvbm._fast.keys cimport Keys
from kvbm._fast.layout cimport (
    KV_C_DEDUPLICATED,
    KV_C_PUBLISHED,
    KV_C_SKIPPED_NO_OPERATION,
    KV_FETCH,
    KV_LEADERS,
    KV_LOAD,
    KV_NONE,
    KV_OPERATIONS_PER_LEADER,
    KV_OP_COMPLETE,
    KV_OP_FAILED,
    KV_PARTIAL,
    KV_ROWS,
    KV_SPILL,
    KV_STORE,
    kv_count,
    kv_fills_blocks,
    kv_holder_bit,
    kv_op_generation,
    kv_op_rows,
    kv_op_state,
    kv_operation,
    kv_operation_at,
    kv_row,
    kv_word_generation,
    kv_word_state,
)
from kvbm._fast.operations cimport (
    operation_allocate,
    operation_cancel,
    operation_recycle,
    operation_submit,
    rings_room,
)
from kvbm._fast.ranks cimport ranks_stamp
from kvbm._fast.segment cimport Segment
from kvbm._fast.supply cimport supply_leave
from kvbm._fast.table cimport KEYS_AHEAD, BlockTable, make_ref, set_parent

PARENT_SECS = 5.0
"""Longest wait of copied blocks for the parent that another engine is still filling."""

cdef uint64_t PARENT_NS = <uint64_t>(PARENT_SECS * 1e9)
cdef uint64_t NO_REF = 0xFFFFFFFFFFFFFFFFULL


cdef inline void fill_row(kv_row *row, uint32_t device_block, uint32_t slot, uint32_t block,
                          uint32_t generation) noexcept nogil:
    memset(row, 0, sizeof(kv_row))
    row.device_block = device_block
    row.slot = slot
    row.block = block
    row.generation = generation


cdef class OperationTable(BlockTable):
    """A leader's block table with the operations that move blocks to and from its device."""

    def __cinit__(self, Segment segment not None):
        memset(self.anchors, 0xFF, sizeof(self.anchors))

    # ---- operations ------------------------------------------------------------------------------
    def store(self, Keys keys not None, start: int, stop: int, device_blocks: list[int],
              parent: int | None, step: int, request_key: int = 0,
              priority: int = 0) -> tuple[list[int], int, int | None]:
        """Reserve the blocks `start` to `stop` that are not in the table and submit their copies.

        Parameters
        ----------
        keys : Keys
            Digests of the sequence.
        start, stop : int
            Blocks that are complete on the device.
        device_blocks : list of int
            Device block of each block of the sequence, from block 0.
        parent : int or None
            Reference to block `start - 1`, None for a root.
        step : int
            Step whose forward pass fills the last of them.
        request_key, priority : int
            For the viewer; for the order of eviction.

        Returns
        -------
        handles : list of int
            Operations submitted; each must be collected.
        upto : int
            First block that was neither found nor reserved (no slot, no operation, or `stop`).
        parent : int or None
            Reference to block `upto - 1`.

        Raises
        ------
        ValueError, IndexError, OverflowError
            A block hash, the range, the parent or a device block is impossible; nothing is stored.
        """
        return self.fill(KV_STORE, keys, start, stop, device_blocks, parent, step, request_key,
                         priority)

    def fetch(self, keys: Keys, start: int, stop: int, disk_slots: list[int],
              parent: int | None, request_key: int = 0) -> tuple[list[int], int, int | None]:
        """Reserve the blocks `start` to `stop` that are not in the table and read them from disk.

        As `store`, but that the bytes come from disk slots, which the caller holds until the
        operations have been collected. `disk_slots` is counted from block 0, as device blocks are.
        """
        return self.fill(KV_FETCH, keys, start, stop, disk_slots, parent, 0, request_key, 0)

    cdef tuple fill(self, uint32_t kind, Keys keys, Py_ssize_t start, Py_ssize_t stop,
                    list sources, object parent, uint64_t step, uint64_t request_key,
                    uint32_t priority):
        """Reserve blocks and submit the operations that fill them from `sources`."""
        cdef Reservation what
        cdef Py_ssize_t i = start, end = min(stop, keys.count(), len(sources))
        cdef uint32_t source, block, generation, slot, index
        cdef uint64_t word, ref, there = NO_REF
        cdef kv_operation *op = NULL
        cdef uint32_t pending[128]
        cdef uint32_t rows = 0
        cdef int pending_count = 0
        handles = []
        self.mix(keys)
        ref = self.parent_ref(parent, start)
        self.begin()
        memset(&what, 0, sizeof(what))
        what.tick = kv_u64_load_relaxed(&self.view.header.tick)
        what.priority = priority
        what.group = keys.group
        if not structure_enter(self.view):
            return handles, start, parent
        try:
            while i < end:
                source = sources[i]
                keys.digest(i, &what.digest_lo, &what.digest_hi)
                self.prefetch(keys, i + KEYS_AHEAD, end)
                block = index_find(self.view, what.digest_lo, what.digest_hi, True, &word)
                if block == KV_NONE:
                    if op == NULL or rows == KV_ROWS:
                        index = self.open_operation(kind, step, request_key, keys.group, ref)
                        if index == KV_NONE:
                            break
                        op = kv_operation_at(self.view, self.view.leader, index)
                        pending[pending_count] = index
                        pending_count += 1
                        rows = 0
                    set_parent(&what, ref)
                    what.sequence_hash = keys.sequence_hash(i)
                    what.position = <uint32_t>i
                    if self.reserve_block(&what, <uint32_t>(end - i), &block, &generation, &slot):
                        fill_row(&op.rows[rows], source, slot, block, generation)
                        rows += 1
                        op.row_count = rows
                        ref = make_ref(block, generation)
                        there = NO_REF  # its ancestors will inherit this one's recency
                        i += 1
                        continue
                    # No slot; or another engine was faster, by an instant.
                    block = index_find(self.view, what.digest_lo, what.digest_hi, True, &word)
                    if block == KV_NONE:
                        break
                kv_count(self.view, KV_C_DEDUPLICATED, 1)
                ref = there = make_ref(block, kv_word_generation(word))
                op = NULL  # the next row has another parent than the one before: a new anchor
                i += 1
        except BaseException:
            self.discard(pending, pending_count)
            raise
        finally:
            supply_leave(self.view, &self.supply)
            structure_exit(self.view)
        # What is computed again is as recent as what is stored: upstream's look-up before a store
        # returns it, too.
        if there != NO_REF and self.hold_parent(there):
            if self.evictor.ranks != NULL:
                ranks_stamp(self.view, self.evictor.ranks, <uint32_t>there, self.use)
            self.let_go(there, 0)
        self.submit_all(pending, pending_count, handles)
        return handles, i, None if ref == NO_REF else ref

    cdef void begin(self) noexcept nogil:
        """Before the first `open_operation` of a call."""
        self.looks = KV_OPERATIONS_PER_LEADER
        self.room = rings_room(self.view)

    cdef void discard(self, uint32_t *indices, int count) noexcept nogil:
        """Undo a store that was not submitted."""
        cdef kv_operation *op
        cdef uint32_t i
        cdef int k
        for k in range(count):
            op = kv_operation_at(self.view, self.view.leader, indices[k])
            for i in range(kv_op_rows(op)):
                self.abandon(op.rows[i].block, op.rows[i].generation)
            self.let_go(self.anchors[indices[k]], 0)

    cdef uint32_t open_operation(self, uint32_t kind, uint64_t step, uint64_t request_key,
                                 uint32_t group, uint64_t anchor) noexcept nogil:
        """A free operation with no rows yet, whose first row's parent is held.

        KV_NONE if there is no free one.
        """
        cdef kv_operation *op
        cdef uint32_t index = KV_NONE
        if self.room != 0:
            index = operation_allocate(self.view, &self.operation_cursor, &self.looks)
        if index == KV_NONE:
            kv_count(self.view, KV_C_SKIPPED_NO_OPERATION, 1)
            return KV_NONE
        self.room -= 1
        op = kv_operation_at(self.view, self.view.leader, index)
        kv_u32_store_relaxed(&op.kind, kind)
        op.row_count = 0
        kv_u64_store_relaxed(&op.step, step)
        op.request_key = request_key
        op.group = group
        # A parent that cannot be held is another leader's reservation, or is being evicted: the
        # first row is then published if the parent is registered in time, and abandoned otherwise.
        self.anchors[index] = anchor if anchor != NO_REF and self.hold_parent(anchor) else NO_REF
        return index

    cdef int submit_all(self, uint32_t *indices, int count, list handles) except -1:
        cdef int k
        cdef kv_operation *op
        for k in range(count):
            op = kv_operation_at(self.view, self.view.leader, indices[k])
            if op.row_count == 0:
                self.let_go(self.anchors[indices[k]], 0)
                continue  # still free: nothing could be reserved for it
            handles.append(make_ref(indices[k], kv_op_generation(kv_u64_load_acquire(&op.word))))
            operation_submit(self.view, indices[k])
        return 0

    def load(self, ref: int, skip: int, device_blocks: list[int], step: int,
             request_key: int = 0, group: int = 0) -> list[int] | None:
        """Submit the copies of a held chain to the device.

        Parameters
        ----------
        ref : int
            Reference to the deepest matched block; stays held until the operations have been
            collected.
        skip : int
            Matched blocks at the deep end that are not to be loaded.
        device_blocks : list of int
            Targets, shallowest first; as many blocks are loaded.
        step : int
            Step whose metadata tells the workers about the load.

        Returns
        -------
        list of int or None
            Handles of the operations; None, with nothing submitted, if there are not enough free
            ones or the chain is not complete in the host tier.
        """
        return self.read(KV_LOAD, ref, skip, device_blocks, step, request_key, group)

    def spill(self, ref: int, skip: int, disk_slots: list[int], group: int = 0) -> list[int] | None:
        """Submit the copies of a held chain to disk slots; as `load`.

        The caller has reserved the disk slots, and publishes them when the operations have been
        collected.
        """
        return self.read(KV_SPILL, ref, skip, disk_slots, 0, 0, group)

    cdef list read(self, uint32_t kind, uint64_t ref, Py_ssize_t skip, list targets, uint64_t step,
                   uint64_t request_key, uint32_t group):
        """Submit the operations that copy a held chain to `targets`."""
        cdef Py_ssize_t n = len(targets), i
        cdef uint32_t pending[128]
        cdef int count = <int>((n + KV_ROWS - 1) // KV_ROWS), k
        cdef uint32_t block = <uint32_t>ref
        cdef uint32_t generation = <uint32_t>(ref >> 32), slot = 0
        cdef kv_operation *op
        cdef kv_row *row
        self.segment.check_open()
        self.check_ref(ref)
        handles = []
        if count > KV_OPERATIONS_PER_LEADER:
            return None
        self.begin()
        for k in range(count):
            pending[k] = self.open_operation(kind, step, request_key, group, NO_REF)
            if pending[k] == KV_NONE:
                return None
            op = kv_operation_at(self.view, self.view.leader, pending[k])
            op.row_count = KV_ROWS if (k + 1) * KV_ROWS <= n else <uint32_t>(n - k * KV_ROWS)
        for _ in range(skip):
            if not chain_step(self.view, &block, &generation, &slot):
                return None
        for i in range(n - 1, -1, -1):
            row = &kv_operation_at(self.view, self.view.leader,
                                   pending[i // KV_ROWS]).rows[i % KV_ROWS]
            fill_row(row, targets[i], KV_NONE, block, generation)
            if not chain_step(self.view, &block, &generation, &slot):
                return None
            row.slot = slot
        self.submit_all(pending, count, handles)
        return handles

    cdef kv_operation *checked(self, uint64_t handle) except? NULL:
        cdef kv_operation *op
        self.segment.check_open()
        if <uint32_t>handle >= KV_OPERATIONS_PER_LEADER:
            raise IndexError(
                f"operation {handle & 0xFFFFFFFF} is outside 0..{KV_OPERATIONS_PER_LEADER - 1}")
        op = kv_operation_at(self.view, self.view.leader, <uint32_t>handle)
        if kv_op_generation(kv_u64_load_acquire(&op.word)) != <uint32_t>(handle >> 32):
            raise LookupError(f"operation {handle:#x} has been collected already")
        return op

    def collect(self, handle: int) -> bool | None:
        """Result of an operation: True, False (failed), or None while it runs.

        A result is given once.

        Blocks of a completed store are registered and returned; those of a failed one, and those
        whose parent did not make it, are given back. A store below a block that another engine is
        still filling runs on until that is decided, for `PARENT_SECS` at most.
        """
        cdef kv_operation *op = self.checked(handle)
        cdef uint32_t state = kv_op_state(kv_u64_load_acquire(&op.word))
        cdef uint32_t index = <uint32_t>(handle & 0xFFFFFFFF)
        if state != KV_OP_COMPLETE and state != KV_OP_FAILED:
            return None
        if kv_fills_blocks(kv_u32_load_relaxed(&op.kind)):
            if state == KV_OP_COMPLETE and self.parent_is_filled(op):
                return None
            if not structure_enter(self.view):
                return None
            self.collect_rows(op, state == KV_OP_COMPLETE)
            structure_exit(self.view)
            self.let_go(self.anchors[index], 0)
        operation_recycle(self.view, op)
        return state == KV_OP_COMPLETE

    cdef bint parent_is_filled(self, kv_operation *op) noexcept nogil:
        """True while rows of a completed store wait for a parent that somebody still fills."""
        cdef uint32_t i, parent
        cdef uint64_t word
        cdef kv_row row
        if monotonic_ns() - kv_u64_load_relaxed(&op.completed_ns) > PARENT_NS:
            return False
        for i in range(kv_op_rows(op)):
            row = op.rows[i]
            if row.block >= self.view.shape.block_capacity:
                return False
            word = kv_u64_load_acquire(&self.view.blocks[row.block].word)
            if kv_word_state(word) != KV_PARTIAL or kv_word_generation(word) != row.generation:
                continue
            parent = kv_u32_load_relaxed(&self.view.blocks[row.block].parent)
            if parent == 0 or parent > self.view.shape.block_capacity:
                return False
            word = kv_u64_load_acquire(&self.view.blocks[parent - 1].word)
            # The first row that is not published decides: the others stand below it.
            return (kv_word_state(word) == KV_PARTIAL
                    and word & kv_holder_bit(self.view.leader) == 0
                    and kv_word_generation(word) == kv_u32_load_relaxed(
                        &self.view.blocks[row.block].parent_generation))
        return False

    cdef void collect_rows(self, kv_operation *op, bint arrived) noexcept nogil:
        cdef uint32_t rows = kv_op_rows(op)
        cdef uint64_t tick = kv_u64_fetch_add_relaxed(&self.view.header.tick, rows)
        cdef uint64_t now = monotonic_ns()
        cdef uint32_t i
        cdef kv_row row
        cdef int result
        for i in range(rows):
            row = op.rows[i]
            result = block_publish(self.view, row.block, row.generation, now) if arrived else GONE
            if result == GONE or result == NO_PARENT:
                self.abandon(row.block, row.generation)
                continue
            if result == PUBLISHED:
                kv_count(self.view, KV_C_PUBLISHED, 1)
            # Leaves first: a child was returned before its parent.
            self.let_go(make_ref(row.block, row.generation), tick + rows - i)

    def cancel(self, handle: int) -> None:
        """Stop an operation as soon as possible; it still has to be collected."""
        cdef kv_operation *op = self.checked(handle)
        operation_cancel(self.view, op, <uint32_t>(handle >> 32))

    def hold(self, Keys keys not None, index: int) -> int | None:
        """Reference to block `index` of a sequence, held until `unpin`; None if it is not cached.

        Not counted as a look-up: for the cache's own purposes.
        """
        cdef uint64_t lo, hi, word
        cdef uint32_t block
        self.mix(keys)
        if not 0 <= index < keys.count():
            raise IndexError(f"block {index}: there are {keys.count()} complete blocks")
        block = self.probe(keys, index, &word)
        keys.digest(index, &lo, &hi)
        if block == KV_NONE or not block_pin(self.view, block, lo, hi):
            return None
        self.pins[block] += 1
        return make_ref(block, kv_word_generation(kv_u64_load_acquire(
            &self.view.blocks[block].word)))

    def filling(self, Keys keys not None, start: int, stop: int) -> tuple[int, int | None]:
        """Which blocks of a sequence are being filled now, from block `start` on, and by whom.

        Returns
        -------
        count : int
            Blocks from `start` to the last one that is in the table; 0 if the first is registered,
            or not there. Found by bisection, so a hint: a chain is reserved from its begin.
        leader : int or None
            Leader slot of whoever fills the first of them.
        """
        cdef uint64_t lo, hi, word
        cdef Py_ssize_t low = start, high = min(stop, keys.count()), middle
        cdef uint32_t block, leader = 0
        self.mix(keys)
        if start < 0:
            raise ValueError(f"start {start} is negative")
        if low >= high:
            return 0, None
        keys.digest(low, &lo, &hi)
        block = index_find(self.view, lo, hi, True, &word)
        if block == KV_NONE or kv_word_state(word) != KV_PARTIAL:
            return 0, None
        while leader < KV_LEADERS and word & kv_holder_bit(leader) == 0:
            leader += 1
        while high - low > 1:
            middle = (low + high) // 2
            keys.digest(middle, &lo, &hi)
            if index_find(self.view, lo, hi, True, &word) == KV_NONE:
                high = middle
            else:
                low = middle
        return low - start + 1, leader if leader < KV_LEADERS else None

    def first_failed_row(self, handle: int) -> int:
        """Row of an ended operation from which on some rank has failed; 0 if none says so."""
        cdef kv_operation *op = self.checked(handle)
        cdef uint64_t row, least = 0
        cdef uint32_t rank
        for rank in range(self.view.shape.ranks):
            row = kv_u64_load_relaxed(&op.failed_rows[rank])
            if row != 0 and (least == 0 or row < least):
                least = row
        return 0 if least == 0 else least - 1

    def free_operations(self) -> int:
        """Operations that this leader can still submit."""
        cdef uint32_t i
        cdef int count = 0
        cdef kv_operation *op
        self.segment.check_open()
        for i in range(KV_OPERATIONS_PER_LEADER):
            op = kv_operation_at(self.view, self.view.leader, i)
            count += kv_op_state(kv_u64_load_acquire(&op.word)) == 0
        return min(count, rings_room(self.view))
