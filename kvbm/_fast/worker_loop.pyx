# SPDX-License-Identifier: Apache-2.0
"""A worker's copy thread: operations from its ring, each after the forward pass it depends on.

Ordering against the engine. The engine thread of the worker publishes two step numbers in its
participant line: `step_bound`, the last step whose metadata it has received, and `step_filled`, the
last step whose forward pass has written its KV blocks. The metadata of step s arrives after all
forward passes before s, so binding s also means that s - 1 is filled.

    a load of step s runs once step_bound >= s    (its targets belonged to nobody else since then)
    a store of step s runs once step_filled >= s  (its source blocks are complete)

Where the engine's forward pass is work on a stream that has only been enqueued at these moments,
the backend marks the place in the stream, and the copies wait for it there (`step_bound` and
`step_filled` of the backend, called first).

Loads and stores are two queues, each in order; loads go first, a request waits for them. A backend
may have several operations of each under way; they end in any order. The engine's thread never
waits for this one, with one exception: `cancel_and_wait`, for device blocks that are about to be
overwritten (preemption). It lasts as long as the copy of one run of blocks at most, or, if the
engine's stream can be made to wait for the copies instead, as long as their submission.

Each row is checked against the block table before and after the copy: the block must be in the
state and of the generation that the row names (PARTIAL for a store, REGISTERED for a load). A row
that does not pass fails the operation, so wrong bytes are neither published nor used.

Copies between host and disk have a backend, queues and places of their own, so that a slow disk
holds up nothing else; their operations name no step. A disk copy that hangs does not keep `run`
from returning.

A backend that has given up (`is_off`) fails all operations; the loop then drops the lock on its
line, so that the leader takes this worker for dead.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memmove
from posix.unistd cimport usleep

from kvbm._fast.atomics cimport (
    kv_u32_load_acquire,
    kv_u32_load_relaxed,
    kv_u32_store_relaxed,
    kv_u32_store_release,
    kv_u64_load_acquire,
    kv_u64_load_relaxed,
    kv_u64_store_relaxed,
    kv_u64_store_release,
)
from kvbm._fast.backend cimport (
    COPY_DONE,
    COPY_FAILED,
    COPY_RUNNING,
    COPY_SUBMITTING,
    DEPTH_MAX,
    PLACES,
    CopyBackend,
)
from kvbm._fast.blocks cimport monotonic_ns
from kvbm._fast.layout cimport (
    KV_C_CHECK_FAILURES,
    KV_FETCH,
    KV_LEADERS,
    KV_LOAD,
    KV_NONE,
    KV_OP_CANCELLED,
    KV_OPERATIONS_PER_LEADER,
    KV_PARTIAL,
    KV_RANK_DONE,
    KV_RANK_FAILED,
    KV_RANKS,
    KV_REGISTERED,
    KV_ROWS,
    kv_block,
    kv_count,
    kv_entry_handle,
    kv_entry_kind,
    kv_fills_blocks,
    kv_is_disk_kind,
    kv_op_generation,
    kv_op_rank,
    kv_op_rows,
    kv_op_state,
    kv_operation,
    kv_operation_at,
    kv_participant,
    kv_row,
    kv_word_generation,
    kv_word_state,
)
from kvbm._fast.locks cimport lock_drop
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
from kvbm._fast.segment cimport Segment, line_lock
from kvbm._fast.timing cimport begin_cpu, count_copy, count_cpu

cdef enum:
    IDLE_WAIT_NS = 100000000   # the loop looks at its stop flag at least ten times a second
    POLL_NS = 20000            # between two looks at copies under way: 1 MiB on the bus
    DISK_END_NS = 2000000000   # how long disk copies may take to end once the loop is to stop


cdef bint operation_is_cancelled(void *context) noexcept nogil:
    cdef StopContext *c = <StopContext *>context
    cdef uint64_t word = kv_u64_load_acquire(&c.op.word)
    return kv_op_state(word) == KV_OP_CANCELLED or kv_op_generation(word) != c.generation


cdef bint copy_claimed(kv_operation *own, const kv_operation *op) noexcept nogil:
    """Copy what a claimed operation says; False, with no rows, if it has too many."""
    kv_u32_store_relaxed(&own.kind, kv_u32_load_relaxed(&op.kind))
    own.row_count = op.row_count
    kv_u64_store_relaxed(&own.step, kv_u64_load_relaxed(&op.step))
    own.group = op.group
    own.submitted_ns = op.submitted_ns
    if own.row_count > KV_ROWS:
        own.row_count = 0
        return False
    memcpy(own.rows, op.rows, own.row_count * sizeof(kv_row))
    return True


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

    # ---- copy thread -----------------------------------------------------------------------------
    def run(self) -> None:
        """Copy until `stop`; releases the GIL. Called by one thread.

        Returns when the copies under way at `stop` have ended, so that memory can be unmapped.
        """
        cdef kv_participant *me = &self.view.participants[self.line]
        cdef uint32_t seen
        cdef uint64_t asked_ns = 0
        cdef bint worked, stopping
        self.segment.check_open()
        with nogil:
            begin_cpu()
            while True:
                stopping = kv_u32_load_acquire(&self.stopping) != 0
                # The doorbell is read first: whoever rings after this makes the wait below return
                # at once.
                seen = doorbell_read(self.view, self.view.leader, self.rank)
                self.drain_ring()
                worked = self.end_flights(self.backend, &self.copies)
                if self.disk_copies.busy != 0:
                    worked |= self.end_flights(self.disk, &self.disk_copies)
                if stopping:
                    if asked_ns == 0:
                        asked_ns = monotonic_ns()
                    if self.may_return(asked_ns):
                        break
                if self.backend.is_off() and self.copies.busy == 0 and not self.left:
                    self.leave()
                if not stopping:
                    worked |= self.start_copies(me)
                if not worked:  # the threads of a disk ring when they are done
                    if self.copies.busy == 0:
                        count_cpu(self.view)
                    doorbell_wait(self.view, self.view.leader, self.rank, seen,
                                  POLL_NS if self.copies.busy else IDLE_WAIT_NS)

    cdef bint may_return(self, uint64_t asked_ns) noexcept nogil:
        """True when nothing is under way any more, or only disk copies that do not end."""
        if self.copies.busy != 0:
            return False
        if self.disk_copies.busy != 0 and monotonic_ns() - asked_ns < DISK_END_NS:
            return False
        self.disk_hangs = self.disk_copies.busy != 0
        return True

    cdef bint start_copies(self, kv_participant *me) noexcept nogil:
        """Start one operation, of each backend, if one may run; True if there was one."""
        cdef bint worked
        worked = (self.start_next(self.backend, &self.copies, &self.copies.loads, 0,
                                  kv_u64_load_acquire(&me.step_bound))
                  or self.start_next(self.backend, &self.copies, &self.copies.stores, DEPTH_MAX,
                                     kv_u64_load_acquire(&me.step_filled)))
        if kv_u32_load_acquire(&self.has_disk) != 0:
            worked |= (self.start_next(self.disk, &self.disk_copies, &self.disk_copies.loads, 0, 0)
                       or self.start_next(self.disk, &self.disk_copies, &self.disk_copies.stores,
                                          DEPTH_MAX, 0))
        return worked

    cdef bint start_next(self, CopyBackend backend, Lane *lane, Waiting *waiting, uint32_t first,
                         uint64_t step) noexcept nogil:
        """Start the oldest operation of a queue if it may run and the backend has a place."""
        cdef uint64_t entry
        cdef uint32_t place
        for place in range(first, first + backend.depth):
            if not lane.flights[place].busy:
                if not self.next_runnable(waiting, step, &entry):
                    return False
                self.start(backend, lane, entry, place)
                return True
        return False

    cdef void drain_ring(self) noexcept nogil:
        cdef uint64_t entry
        cdef uint32_t kind
        cdef Lane *lane
        cdef Waiting *waiting
        while (self.copies.loads.count < KV_OPERATIONS_PER_LEADER
                and self.copies.stores.count < KV_OPERATIONS_PER_LEADER
                and self.disk_copies.loads.count < KV_OPERATIONS_PER_LEADER
                and self.disk_copies.stores.count < KV_OPERATIONS_PER_LEADER):
            if not ring_pop(self.view, self.rank, &entry):
                return
            if <uint32_t>kv_entry_handle(entry) >= KV_OPERATIONS_PER_LEADER:
                continue
            kind = kv_entry_kind(entry)
            lane = &self.disk_copies if kv_is_disk_kind(kind) else &self.copies
            waiting = (&lane.loads if kind == KV_LOAD or kind == KV_FETCH else &lane.stores)
            waiting.entries[waiting.count] = kv_entry_handle(entry)
            waiting.count += 1

    cdef bint next_runnable(self, Waiting *waiting, uint64_t step, uint64_t *entry) noexcept nogil:
        """Take the oldest waiting operation if its step has come or it is not to run any more."""
        cdef kv_operation *op
        cdef uint64_t word
        if waiting.count == 0:
            return False
        op = kv_operation_at(self.view, self.view.leader, <uint32_t>waiting.entries[0])
        word = kv_u64_load_acquire(&op.word)
        if (kv_u64_load_relaxed(&op.step) > step
                and kv_op_generation(word) == <uint32_t>(waiting.entries[0] >> 32)
                and kv_op_rank(word, self.rank) < KV_RANK_DONE):
            return False
        entry[0] = waiting.entries[0]
        waiting.count -= 1
        memmove(waiting.entries, waiting.entries + 1, waiting.count * sizeof(uint64_t))
        return True

    cdef bint rows_are_valid(self, const kv_operation *op, bint with_digests,
                             uint32_t *bad_row) noexcept nogil:
        cdef uint32_t i
        cdef uint32_t wanted = (KV_PARTIAL if kv_fills_blocks(kv_u32_load_relaxed(&op.kind))
                                else KV_REGISTERED)
        cdef const kv_row *row
        cdef kv_block *b
        cdef uint64_t word
        for i in range(op.row_count):
            bad_row[0] = i
            row = &op.rows[i]
            if (row.block >= self.view.shape.block_capacity
                    or row.slot >= self.view.shape.host_slots):
                return False
            b = &self.view.blocks[row.block]
            word = kv_u64_load_acquire(&b.word)
            if kv_word_state(word) != wanted or kv_word_generation(word) != row.generation:
                return False
            if with_digests:
                self.digests[2 * i] = kv_u64_load_acquire(&b.digest_lo)
                self.digests[2 * i + 1] = kv_u64_load_acquire(&b.digest_hi)
        return True

    cdef void start(self, CopyBackend backend, Lane *lane, uint64_t entry,
                    uint32_t place) noexcept nogil:
        cdef kv_operation *op = kv_operation_at(self.view, self.view.leader, <uint32_t>entry)
        cdef Flight *flight = &lane.flights[place]
        cdef uint32_t failed_row = 0
        cdef int status = COPY_FAILED
        if not operation_claim(self.view, op, <uint32_t>(entry >> 32), self.rank):
            return
        flight.context.op = op
        flight.context.generation = <uint32_t>(entry >> 32)
        flight.entry = entry
        flight.began_ns = monotonic_ns()
        if (copy_claimed(&flight.own, op)
                and self.rows_are_valid(&flight.own, True, &failed_row)):
            status = backend.submit(place, &flight.own, self.digests, operation_is_cancelled,
                                    &flight.context, &failed_row)
        if status == COPY_RUNNING or status == COPY_SUBMITTING:
            flight.busy = True
            lane.busy += 1
            if status == COPY_RUNNING:
                kv_u64_store_release(&flight.submitted, entry + 1)
        else:
            self.finish(flight, status, failed_row)

    cdef bint end_flights(self, CopyBackend backend, Lane *lane) noexcept nogil:
        """Finish the operations whose copies have ended; True if there was one."""
        cdef Flight *flight
        cdef uint32_t place, failed_row
        cdef int status
        cdef bint ended = False
        if lane.busy == 0:
            return False
        for place in range(PLACES):
            flight = &lane.flights[place]
            if not flight.busy:
                continue
            failed_row = 0
            status = backend.poll(place, &failed_row)
            if status == COPY_RUNNING:
                kv_u64_store_release(&flight.submitted, flight.entry + 1)
            if status == COPY_RUNNING or status == COPY_SUBMITTING:
                continue
            self.finish(flight, status, failed_row)
            kv_u64_store_release(&flight.submitted, 0)
            flight.busy = False
            lane.busy -= 1
            ended = True
        return ended

    cdef void finish(self, Flight *flight, int status, uint32_t failed_row) noexcept nogil:
        """This rank's copies have ended: check the rows again and say how it went."""
        cdef kv_operation *op = kv_operation_at(self.view, self.view.leader,
                                                <uint32_t>flight.entry)
        cdef uint32_t bad_row = 0
        cdef bint done = status == COPY_DONE
        if kv_op_generation(kv_u64_load_acquire(&op.word)) != flight.context.generation:
            return  # taken for dead and given to somebody else meanwhile
        if done and not self.rows_are_valid(&flight.own, False, &bad_row):
            done = False
            failed_row = bad_row
        count_copy(self.view, self.rank, &flight.own, self.backend.bytes_per_block(),
                   flight.began_ns, done)
        count_cpu(self.view)
        if not done:
            if not operation_is_cancelled(&flight.context):
                kv_count(self.view, KV_C_CHECK_FAILURES, 1)
            kv_u64_store_relaxed(&op.failed_rows[self.rank], failed_row + 1)
        if operation_end(self.view, op, self.rank, done) == MUST_PUBLISH:
            operation_publish(self.view, op)
            operation_finished(self.view, op)

    cdef void leave(self) noexcept nogil:
        """Count as dead from here on: the leader switches the cache off and recovers the rest.

        Nothing of this rank may be under way. What still comes through the ring fails at once, so
        that nobody waits for it.
        """
        self.left = True
        lock_drop(self.segment.fd, line_lock(self.line))

    def use_disk(self, CopyBackend disk not None) -> None:
        """From now on, once, this backend copies between host and disk; `run` may be running."""
        if kv_u32_load_acquire(&self.has_disk) != 0:
            raise ValueError("the loop has a disk already")
        self.segment.check_open()
        self.disk = disk
        kv_u32_store_release(&self.has_disk, 1)
        doorbell_ring(self.view, self.view.leader, self.rank)

    def stop(self) -> None:
        """Make `run` return after the copy in progress."""
        kv_u32_store_release(&self.stopping, 1)
        self.segment.check_open()
        doorbell_ring(self.view, self.view.leader, self.rank)

    # ---- engine thread ---------------------------------------------------------------------------
    def bind_step(self, step: int, stream: int = 0) -> None:
        """The metadata of `step` has arrived: its loads may run, and the step before is filled.

        Parameters
        ----------
        step : int
            Number of the step.
        stream : int
            Handle of the stream on which the engine works, for backends that have streams.
        """
        cdef kv_participant *me = &self.view.participants[self.line]
        self.segment.check_open()
        if kv_u64_load_relaxed(&me.step_bound) < <uint64_t>step:
            self.backend.step_bound(step, stream)
            kv_u64_store_release(&me.step_bound, step)
        if step > 0 and kv_u64_load_relaxed(&me.step_filled) < <uint64_t>step - 1:
            self.backend.step_filled(step - 1, stream)
            kv_u64_store_release(&me.step_filled, step - 1)
        doorbell_ring(self.view, self.view.leader, self.rank)

    def fill_step(self, step: int, stream: int = 0) -> None:
        """The forward pass of `step` has written its blocks, or will have here on `stream`."""
        cdef kv_participant *me = &self.view.participants[self.line]
        self.segment.check_open()
        self.backend.step_filled(step, stream)
        kv_u64_store_release(&me.step_filled, step)
        doorbell_ring(self.view, self.view.leader, self.rank)

    cdef kv_operation *operation_of(self, uint64_t handle, uint64_t *word) except? NULL:
        cdef kv_operation *op
        self.segment.check_open()
        if <uint32_t>handle >= KV_OPERATIONS_PER_LEADER:
            raise IndexError(
                f"operation {handle & 0xFFFFFFFF} is outside 0..{KV_OPERATIONS_PER_LEADER - 1}")
        op = kv_operation_at(self.view, self.view.leader, <uint32_t>handle)
        word[0] = kv_u64_load_acquire(&op.word)
        return op

    def rank_ended(self, handle: int) -> bool:
        """Return whether this rank has nothing to do with the operation any more.

        It is done, failed, or collected.
        """
        cdef uint64_t word = 0
        self.operation_of(handle, &word)
        return (kv_op_generation(word) != <uint32_t>(handle >> 32)
                or kv_op_rank(word, self.rank) >= KV_RANK_DONE)

    def fail(self, handle: int) -> None:
        """Fail this rank's part of an operation if it has not begun: no thread is left to begin it.

        Unlike a cancel this is counted as a failure, and other ranks go on.
        """
        cdef uint64_t word = 0
        cdef kv_operation *op = self.operation_of(handle, &word)
        if operation_claim(self.view, op, <uint32_t>(handle >> 32), self.rank):
            operation_end(self.view, op, self.rank, False)

    def failed_device_blocks(self, handle: int) -> list[int]:
        """Device blocks that this rank did not load, from the first failed row on.

        Empty if all arrived.
        """
        cdef uint64_t word = 0
        cdef kv_operation *op = self.operation_of(handle, &word)
        cdef uint32_t i, first
        if (kv_op_generation(word) != <uint32_t>(handle >> 32)
                or kv_op_rank(word, self.rank) != KV_RANK_FAILED):
            return []
        first = <uint32_t>kv_u64_load_relaxed(&op.failed_rows[self.rank])
        return [op.rows[i].device_block for i in range(first - 1 if first else 0, kv_op_rows(op))]

    cdef bint engine_follows(self, uint64_t handle, uint64_t stream) noexcept nogil:
        """Make the engine's stream wait for an operation whose copies are all submitted."""
        cdef uint32_t place
        for place in range(PLACES):
            # If the place goes to another operation right now, this one has ended, and the engine
            # waits for a younger copy: more than it must, never less.
            if kv_u64_load_acquire(&self.copies.flights[place].submitted) == handle + 1:
                return self.backend.engine_after(place, stream)
        return False

    def cancel_and_wait(self, handle: int, timeout_ms: int, stream: int = 0) -> bool:
        """Stop an operation whose device blocks are about to be overwritten.

        Lasts until this rank's copies have ended, at most as long as the copy of one run of blocks;
        on a backend with streams until they are submitted: then `stream`, where the engine
        overwrites the blocks, waits for them.

        Returns
        -------
        bool
            False if neither came to pass within `timeout_ms`.
        """
        cdef uint64_t word = 0
        cdef kv_operation *op = self.operation_of(handle, &word)
        cdef uint64_t deadline = monotonic_ns() + <uint64_t>timeout_ms * 1000000
        cdef uint64_t entry = handle, engine = stream
        cdef uint32_t generation = <uint32_t>(entry >> 32)
        cdef bint safe = False
        operation_cancel(self.view, op, generation)
        with nogil:
            while True:
                word = kv_u64_load_acquire(&op.word)
                safe = (kv_op_generation(word) != generation
                        or kv_op_rank(word, self.rank) >= KV_RANK_DONE
                        or self.engine_follows(entry, engine))
                if safe or monotonic_ns() > deadline:
                    break
                usleep(20)
        return safe
