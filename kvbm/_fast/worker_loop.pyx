# SPDX-License-Identifier: Apache-2.0
"""A worker's copy thread: operations from its ring, in order, after the forward pass they depend on.

Ordering against the engine. The engine thread of the worker publishes two step numbers in its participant line:
`step_bound`, the last step whose metadata it has received, and `step_filled`, the last step whose forward pass
has written its KV blocks. The metadata of step s arrives after all forward passes before s, so binding s also means
that s - 1 is filled.

    a load of step s runs once step_bound >= s      (its target blocks belonged to nobody else since s was made)
    a store of step s runs once step_filled >= s    (its source blocks are complete)

Loads go first: a request waits for them. The engine's thread never waits for this one, with one exception:
`cancel_and_wait`, for device blocks that are about to be overwritten (preemption), which lasts as long as the copy
of one block at most.

Each row is checked against the block table before and after the copy: the block must be in the state and of the
generation that the row names (PARTIAL for a store, REGISTERED for a load). A row that does not pass fails the
operation, so wrong bytes are neither published nor used.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memmove
from posix.unistd cimport usleep

from kvbm._fast.atomics cimport (
    kv_u32_load_acquire,
    kv_u32_store_release,
    kv_u64_load_acquire,
    kv_u64_load_relaxed,
    kv_u64_store_relaxed,
    kv_u64_store_release,
)
from kvbm._fast.backend cimport COPY_DONE, CopyBackend
from kvbm._fast.blocks cimport monotonic_ns
from kvbm._fast.layout cimport (
    KV_C_BYTES_LOADED,
    KV_C_BYTES_STORED,
    KV_C_CHECK_FAILURES,
    KV_C_LOAD_NS,
    KV_C_STORE_NS,
    KV_LEADERS,
    KV_LOAD,
    KV_NONE,
    KV_OP_CANCELLED,
    KV_OPERATIONS_PER_LEADER,
    KV_PARTIAL,
    KV_RANK_DONE,
    KV_RANK_FAILED,
    KV_RANK_RUNNING,
    KV_RANKS,
    KV_REGISTERED,
    KV_ROWS,
    KV_STORE,
    kv_block,
    kv_count,
    kv_op_generation,
    kv_op_rank,
    kv_op_state,
    kv_operation,
    kv_operation_at,
    kv_view,
    kv_word_generation,
    kv_word_state,
)
from kvbm._fast.operations cimport (
    MUST_PUBLISH,
    doorbell_read,
    doorbell_ring,
    doorbell_wait,
    operation_cancel,
    operation_claim,
    operation_end,
    operation_finished,
    operation_publish,
    ring_pop,
)
from kvbm._fast.segment cimport Segment

cdef enum:
    IDLE_WAIT_NS = 100000000   # the loop looks at its stop flag at least ten times a second


cdef struct StopContext:
    const kv_operation *op
    uint32_t generation


cdef bint operation_is_cancelled(void *context) noexcept nogil:
    cdef StopContext *c = <StopContext *>context
    cdef uint64_t word = kv_u64_load_acquire(&c.op.word)
    return kv_op_state(word) == KV_OP_CANCELLED or kv_op_generation(word) != c.generation


cdef class WorkerLoop:
    """The copy thread's work, and what the engine thread of the same worker tells it.

    Parameters
    ----------
    segment : Segment
        Attached, writable, with a worker line.
    backend : CopyBackend
        Moves the bytes.
    """

    def __cinit__(self, Segment segment not None, CopyBackend backend not None):
        segment.check_open()
        if segment.view.self == KV_NONE or segment.view.self < KV_LEADERS:
            raise ValueError("the segment has no worker line yet; call claim_worker first")
        self.segment = segment
        self.backend = backend
        self.view = &segment.view
        self.line = segment.view.self
        self.rank = (self.line - KV_LEADERS) % KV_RANKS

    # ---- copy thread ----------------------------------------------------------------------------------------
    def run(self) -> None:
        """Copy until `stop`; releases the GIL. Called by one thread."""
        cdef uint64_t entry
        cdef uint32_t seen
        self.segment.check_open()
        with nogil:
            while not kv_u32_load_acquire(&self.stopping):
                # The doorbell is read first: whoever rings after this makes the wait below return at once.
                seen = doorbell_read(self.view, self.view.leader, self.rank)
                self.drain_ring()
                if (self.next_runnable(&self.loads,
                                       kv_u64_load_acquire(&self.view.participants[self.line].step_bound), &entry)
                        or self.next_runnable(
                            &self.stores,
                            kv_u64_load_acquire(&self.view.participants[self.line].step_filled), &entry)):
                    self.run_operation(entry)
                    continue
                doorbell_wait(self.view, self.view.leader, self.rank, seen, IDLE_WAIT_NS)

    cdef void drain_ring(self) noexcept nogil:
        cdef uint64_t entry
        cdef kv_operation *op
        cdef Waiting *waiting
        while self.loads.count < KV_OPERATIONS_PER_LEADER and self.stores.count < KV_OPERATIONS_PER_LEADER:
            if not ring_pop(self.view, self.rank, &entry):
                return
            if <uint32_t>entry >= KV_OPERATIONS_PER_LEADER:
                continue
            op = kv_operation_at(self.view, self.view.leader, <uint32_t>entry)
            waiting = &self.loads if op.kind == KV_LOAD else &self.stores
            waiting.entries[waiting.count] = entry
            waiting.count += 1

    cdef bint next_runnable(self, Waiting *waiting, uint64_t step, uint64_t *entry) noexcept nogil:
        """Take the oldest waiting operation if its step has come, or if it is not to be run any more."""
        cdef kv_operation *op
        if waiting.count == 0:
            return False
        op = kv_operation_at(self.view, self.view.leader, <uint32_t>waiting.entries[0])
        if (op.step > step
                and kv_op_generation(kv_u64_load_acquire(&op.word)) == <uint32_t>(waiting.entries[0] >> 32)
                and kv_op_rank(kv_u64_load_acquire(&op.word), self.rank) < KV_RANK_DONE):
            return False
        entry[0] = waiting.entries[0]
        waiting.count -= 1
        memmove(waiting.entries, waiting.entries + 1, waiting.count * sizeof(uint64_t))
        return True

    cdef bint rows_are_valid(self, const kv_operation *op, uint32_t *bad_row) noexcept nogil:
        cdef uint32_t i, wanted = KV_PARTIAL if op.kind == KV_STORE else KV_REGISTERED
        cdef kv_block *b
        cdef uint64_t word
        for i in range(op.row_count):
            bad_row[0] = i
            if op.rows[i].block >= self.view.shape.block_capacity or op.rows[i].slot >= self.view.shape.host_slots:
                return False
            b = &self.view.blocks[op.rows[i].block]
            word = kv_u64_load_acquire(&b.word)
            if kv_word_state(word) != wanted or kv_word_generation(word) != op.rows[i].generation:
                return False
            self.digests[2 * i] = kv_u64_load_acquire(&b.digest_lo)
            self.digests[2 * i + 1] = kv_u64_load_acquire(&b.digest_hi)
        return True

    cdef void run_operation(self, uint64_t entry) noexcept nogil:
        cdef kv_operation *op = kv_operation_at(self.view, self.view.leader, <uint32_t>entry)
        cdef StopContext context
        cdef uint32_t failed_row = 0, after_row = 0
        cdef uint64_t began
        cdef bint done = False
        if not operation_claim(self.view, op, <uint32_t>(entry >> 32), self.rank):
            return
        context.op = op
        context.generation = <uint32_t>(entry >> 32)
        if op.row_count <= KV_ROWS and self.rows_are_valid(op, &failed_row):
            began = monotonic_ns()
            done = self.backend.copy(op, self.digests, operation_is_cancelled, &context, &failed_row) == COPY_DONE
            if done and not self.rows_are_valid(op, &after_row):
                done = False
                failed_row = after_row
            self.count_copy(op, done, began)
        if not done:
            kv_count(self.view, KV_C_CHECK_FAILURES, 1 if not operation_is_cancelled(&context) else 0)
            kv_u64_store_relaxed(&op.failed_rows[self.rank], failed_row + 1)
        if operation_end(self.view, op, self.rank, done) == MUST_PUBLISH:
            operation_publish(self.view, op)
            operation_finished(self.view, op)

    cdef void count_copy(self, const kv_operation *op, bint done, uint64_t began) noexcept nogil:
        cdef uint64_t moved = op.row_count * self.backend.bytes_per_block() if done else 0
        cdef uint64_t spent = monotonic_ns() - began
        if op.kind == KV_STORE:
            kv_count(self.view, KV_C_BYTES_STORED, moved)
            kv_count(self.view, KV_C_STORE_NS, spent)
        else:
            kv_count(self.view, KV_C_BYTES_LOADED, moved)
            kv_count(self.view, KV_C_LOAD_NS, spent)

    def stop(self) -> None:
        """Make `run` return after the copy in progress."""
        kv_u32_store_release(&self.stopping, 1)
        self.segment.check_open()
        doorbell_ring(self.view, self.view.leader, self.rank)

    # ---- engine thread --------------------------------------------------------------------------------------
    def bind_step(self, step: int) -> None:
        """The metadata of `step` has arrived: its loads may run, and the step before is filled."""
        self.segment.check_open()
        if kv_u64_load_relaxed(&self.view.participants[self.line].step_bound) < <uint64_t>step:
            kv_u64_store_release(&self.view.participants[self.line].step_bound, step)
        if step > 0 and kv_u64_load_relaxed(&self.view.participants[self.line].step_filled) < <uint64_t>step - 1:
            kv_u64_store_release(&self.view.participants[self.line].step_filled, step - 1)
        doorbell_ring(self.view, self.view.leader, self.rank)

    def fill_step(self, step: int) -> None:
        """The forward pass of `step` has written its blocks: its stores may run."""
        self.segment.check_open()
        kv_u64_store_release(&self.view.participants[self.line].step_filled, step)
        doorbell_ring(self.view, self.view.leader, self.rank)

    cdef kv_operation *operation_of(self, uint64_t handle, uint64_t *word) except? NULL:
        cdef kv_operation *op
        self.segment.check_open()
        if <uint32_t>handle >= KV_OPERATIONS_PER_LEADER:
            raise IndexError(f"operation {handle & 0xFFFFFFFF} is outside 0..{KV_OPERATIONS_PER_LEADER - 1}")
        op = kv_operation_at(self.view, self.view.leader, <uint32_t>handle)
        word[0] = kv_u64_load_acquire(&op.word)
        return op

    def rank_ended(self, handle: int) -> bool:
        """True once this rank has nothing to do with the operation any more (done, failed, or collected)."""
        cdef uint64_t word = 0
        self.operation_of(handle, &word)
        return kv_op_generation(word) != <uint32_t>(handle >> 32) or kv_op_rank(word, self.rank) >= KV_RANK_DONE

    def failed_device_blocks(self, handle: int) -> list[int]:
        """Device blocks that this rank did not load, from the first failed row on; empty if all arrived."""
        cdef uint64_t word = 0
        cdef kv_operation *op = self.operation_of(handle, &word)
        cdef uint32_t i, first
        if (kv_op_generation(word) != <uint32_t>(handle >> 32)
                or kv_op_rank(word, self.rank) != KV_RANK_FAILED):
            return []
        first = <uint32_t>kv_u64_load_relaxed(&op.failed_rows[self.rank])
        return [op.rows[i].device_block for i in range(first - 1 if first else 0, op.row_count)]

    def cancel_and_wait(self, handle: int, timeout_ms: int) -> bool:
        """Stop an operation whose device blocks are about to be overwritten; True once this rank is out of it.

        Lasts as long as the copy of one block; a backend that does not come back within `timeout_ms` makes this
        return False.
        """
        cdef uint64_t word = 0
        cdef kv_operation *op = self.operation_of(handle, &word)
        cdef uint64_t deadline = monotonic_ns() + <uint64_t>timeout_ms * 1000000
        cdef uint32_t generation = <uint32_t>(handle >> 32)
        cdef bint ended = False
        operation_cancel(self.view, op, generation)
        with nogil:
            while True:
                word = kv_u64_load_acquire(&op.word)
                ended = kv_op_generation(word) != generation or kv_op_rank(word, self.rank) >= KV_RANK_DONE
                if ended or monotonic_ns() > deadline:
                    break
                usleep(20)
        return ended
