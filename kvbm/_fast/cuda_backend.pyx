# SPDX-License-Identifier: Apache-2.0
"""Copies between a KV cache on a CUDA device and the host arena, by the device's copy engines.

Streams for loads and others for stores, at the lowest priority and never synchronized with. An
operation goes to those of its kind, behind a wait for the place in the engine's stream that it must
come after, and is followed by an event; it has ended when the event has. Nobody waits for it.

    engine's stream   ... forward s-1 | bind s | forward s | fill s | ...
                                         |                    |
    load stream         wait ------------+ copies of step s   |
    store stream                         wait ----------------+ copies of step s

`bind` and `fill` are events that the engine's thread records at these moments: 0.2 us each. The
events of a step are reused MARKS steps later; a copy that is so late waits for the younger step,
which is more than it must and never less.

An operation is submitted in chunks, and only a few chunks are on their way at a time, each behind
the one before it, on two streams in turn. A copy engine stays with a stream as long as that has
work: on one stream, the few bytes that the engine itself copies in each step (tokens and tables in,
samples out) would wait until all chunks are done; so they wait for one. `poll` submits the next
chunk when the oldest has ended, and looks before each whether the operation is to stop.

Slot headers are written by this thread, before the submission and when the event has ended. After
FAILURES_MAX errors in a row the backend gives up: it fails every operation from there on.
"""
import logging

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from kvbm._fast.atomics cimport (
    kv_u32_load_relaxed,
    kv_u64_load_acquire,
    kv_u64_load_relaxed,
    kv_u64_store_release,
)
from kvbm._fast.backend cimport (
    COPY_DONE,
    COPY_FAILED,
    COPY_RUNNING,
    COPY_STOPPED,
    COPY_SUBMITTING,
    DEPTH_MAX,
    PLACES,
    CopyBackend,
    StopCheck,
)
from kvbm._fast.blocks cimport monotonic_ns
from kvbm._fast.copy cimport (
    KV_COPY_OK,
    KV_COPY_WITH_CHECKSUM,
    HostCopier,
    check_after,
    check_before,
    form_run,
    kv_checksum,
    kv_copier,
    kv_copy_run,
    kv_region,
    mark_filling,
    mark_valid,
    slot_piece,
)
from kvbm._fast.cuda_device cimport (
    KV_CU_EVENT_DISABLE_TIMING,
    KV_CU_NOT_READY,
    KV_CU_STREAM_NON_BLOCKING,
    KV_CU_SUCCESS,
    CudaDevice,
    kv_cu_event,
    kv_cu_stream,
)
from kvbm._fast.cuda_pieces cimport SEGMENTS_MAX, CudaPieces, Group
from kvbm._fast.layout cimport KV_ROWS, KV_STORE, kv_operation, kv_row

logger = logging.getLogger("kvbm.cuda")

cdef enum:
    DEPTH = 4              # operations of a kind under way: the bus is busy while one is submitted
    STREAMS_MAX = 2        # of a direction
    FAILURES_MAX = 3       # in a row, then the backend gives up


cdef class CudaBackend(CopyBackend):
    """Backend for KV caches on one CUDA device.

    Parameters
    ----------
    device : CudaDevice
        With the arena's memory registered, as far as its slots are usable.
    copiers : list of HostCopier
        One a KV-cache group, in order, whose regions have addresses on the device.
    methods : sequence of CopyMethod
        One a group: (pitch_bytes, pitched_below_bytes, segments, chunk_bytes, chunks_ahead,
        streams), from `kvbm.transfer.method`.
    checksum : bool
        Write a checksum of the arena's bytes with each stored slot, and verify it with each loaded
        one.

    Raises
    ------
    CudaFault
        Streams or events cannot be made.
    """

    def __cinit__(self, CudaDevice device not None, list copiers not None, methods, *,
                  checksum: bool = False):
        cdef HostCopier copier
        cdef Py_ssize_t i
        if not copiers or len(copiers) != len(methods):
            raise ValueError(f"{len(copiers)} copiers and {len(methods)} methods: one of each is "
                             "needed for each KV-cache group")
        self.name = "cuda"
        self.depth = DEPTH
        self.device = device
        self.cuda = &device.cuda
        self.copiers = list(copiers)
        self.flags = KV_COPY_WITH_CHECKSUM if checksum else 0
        self.pieces = CudaPieces(device)
        self.group_count = <uint32_t>len(copiers)
        self.groups = <Group *>calloc(self.group_count, sizeof(Group))
        self.tickets = <Ticket *>calloc(PLACES, sizeof(Ticket))
        if self.groups == NULL or self.tickets == NULL:
            raise MemoryError("no memory for a backend's tables")
        for i, (pitch, below, segments, chunk_bytes, ahead, streams) in enumerate(methods):
            if not (0 < segments <= SEGMENTS_MAX and 0 < chunk_bytes and 0 < ahead < CHUNKS_MAX
                    and 0 < streams <= STREAMS_MAX):
                raise ValueError(
                    f"segments={segments}, chunk_bytes={chunk_bytes}, chunks_ahead={ahead}, "
                    f"streams={streams} are not allowed: 1 to {SEGMENTS_MAX}, 1 or more, "
                    f"1 to {CHUNKS_MAX - 1}, 1 to {STREAMS_MAX}")
            copier = copiers[i]
            self.groups[i].copier = &copier.copier
            self.groups[i].pitch = pitch
            self.groups[i].pitched_below = below
            self.groups[i].segments = segments
            self.groups[i].chunk_rows = max(
                1, min(KV_ROWS, chunk_bytes // copier.copier.block_bytes))
            self.chunks_ahead = ahead
            self.stream_count = streams
        self.block_bytes = self.groups[0].copier.block_bytes
        CudaBackend_open(self)

    def __dealloc__(self):
        free(self.groups)
        free(self.tickets)

    @property
    def is_switched_off(self) -> bool:
        """Whether the backend has given up after too many errors."""
        return self.off

    def set_usable_slots(self, count: int) -> None:
        """Let copies touch the first `count` slots of the arena; their memory is registered."""
        for copier in self.copiers:
            copier.usable_slots = count

    def statistics(self) -> dict[str, int]:
        """What has been submitted: calls of the driver, pieces, blocks, and time in nanoseconds."""
        return {"calls": self.pieces.calls, "pieces": self.pieces.pieces, "blocks": self.blocks,
                "submit_ns": self.submit_ns}

    def close(self) -> None:
        """Destroy streams and events; nobody may be copying. May be called twice."""
        if self.opened:
            self.opened = False
            self.off = True
            CudaBackend_close(self)

    # ---- copy thread -----------------------------------------------------------------------------
    cdef int submit(self, uint32_t place, const kv_operation *op, const uint64_t *digests,
                    StopCheck should_stop, void *context, uint32_t *failed_row) noexcept nogil:
        cdef Ticket *ticket = &self.tickets[place]
        cdef Direction *direction
        cdef int error
        failed_row[0] = 0
        if self.off or op.group >= self.group_count or op.row_count > KV_ROWS:
            return COPY_FAILED
        error = self.cuda.context_set(self.device.context)
        if error != KV_CU_SUCCESS:
            self.failed("cuCtxSetCurrent", error)
            return COPY_FAILED
        ticket.is_store = kv_u32_load_relaxed(&op.kind) == KV_STORE
        direction = &self.stores if ticket.is_store else &self.loads
        ticket.should_stop = should_stop
        ticket.context = context
        ticket.step = kv_u64_load_relaxed(&op.step)
        ticket.group = op.group
        ticket.count = op.row_count
        ticket.end_row = 0
        ticket.begun = False
        ticket.errors = direction.errors
        ticket.submitting = True
        memcpy(ticket.rows, op.rows, ticket.count * sizeof(kv_row))
        memcpy(ticket.digests, digests, 2 * ticket.count * sizeof(uint64_t))
        direction.queue[direction.tail % DEPTH_MAX] = place
        direction.tail += 1
        self.pump(direction)
        return COPY_SUBMITTING if ticket.submitting else COPY_RUNNING

    cdef void pump(self, Direction *direction) noexcept nogil:
        """Submit chunks of the oldest operations while there is room on the stream."""
        cdef Ticket *ticket
        cdef uint64_t began = monotonic_ns()
        cdef bint worked = False
        while direction.head != direction.tail:
            ticket = &self.tickets[direction.queue[direction.head % DEPTH_MAX]]
            if ticket.submitting and ticket.should_stop(ticket.context):
                self.end_submission(direction, ticket, COPY_STOPPED)
            if ticket.submitting:
                if not self.has_room(direction):
                    break
                worked = self.submit_chunk(direction, ticket)
            if not ticket.submitting:
                direction.head += 1
        if worked:
            self.submit_ns += monotonic_ns() - began

    cdef void leave_queue(self, Direction *direction, uint32_t place) noexcept nogil:
        """Take a place out of the queue: it may be used again before its turn comes."""
        cdef uint32_t at, kept = direction.head
        for at in range(direction.head, direction.tail):
            if direction.queue[at % DEPTH_MAX] != place:
                direction.queue[kept % DEPTH_MAX] = direction.queue[at % DEPTH_MAX]
                kept += 1
        direction.tail = kept

    cdef bint has_room(self, Direction *direction) noexcept nogil:
        cdef int error
        while direction.ended != direction.submitted:
            error = self.cuda.event_query(direction.chunk[direction.ended % CHUNKS_MAX])
            if error == KV_CU_NOT_READY:
                break
            if error != KV_CU_SUCCESS:
                self.failed("a copy", error)
                direction.errors += 1
            direction.ended += 1
        return direction.submitted - direction.ended < self.chunks_ahead

    cdef bint follow_last(self, Direction *direction, kv_cu_stream stream) noexcept nogil:
        """Make a stream wait for the chunk that was submitted last."""
        cdef uint32_t last = direction.submitted - 1
        cdef int error
        if self.stream_count == 1 or direction.ended == direction.submitted:
            return True
        error = self.cuda.stream_wait(stream, direction.chunk[last % CHUNKS_MAX], 0)
        if error != KV_CU_SUCCESS:
            self.failed("cuStreamWaitEvent", error)
        return error == KV_CU_SUCCESS

    cdef bint submit_chunk(self, Direction *direction, Ticket *ticket) noexcept nogil:
        """Submit the next rows of an operation; its end as well if they are the last."""
        cdef Group *group = &self.groups[ticket.group]
        cdef uint32_t stop_row = min(ticket.count, ticket.end_row + group.chunk_rows)
        cdef kv_cu_stream stream = direction.streams[direction.submitted % self.stream_count]
        cdef bint ordered = self.follow_last(direction, stream)
        cdef int result, error
        if ordered and not ticket.begun:
            ticket.begun = True
            ordered = self.wait_for_step(
                ticket.step, &self.filled if ticket.is_store else &self.bound, stream)
        if not ordered:
            self.end_submission(direction, ticket, COPY_FAILED)
            return True
        self.pieces.begin(group, ticket.is_store, stream)
        result = self.copy_rows(ticket, stop_row)
        error = self.cuda.event_record(direction.chunk[direction.submitted % CHUNKS_MAX], stream)
        if error == KV_CU_SUCCESS:
            direction.submitted += 1
        else:
            self.failed("cuEventRecord", error)
            result = COPY_FAILED
        if result != COPY_DONE or ticket.end_row == ticket.count:
            self.end_submission(direction, ticket, result)
        return True

    cdef int copy_rows(self, Ticket *ticket, uint32_t stop_row) noexcept nogil:
        """Submit the rows from `end_row` to `stop_row`; moves `end_row`."""
        cdef Group *group = &self.groups[ticket.group]
        cdef kv_copy_run run
        cdef uint32_t row = ticket.end_row
        cdef int error, status = COPY_DONE
        while row < stop_row and status == COPY_DONE:
            if form_run(group.copier, <const uint8_t *>ticket.rows, sizeof(kv_row), ticket.digests,
                        row, stop_row, &run) != KV_COPY_OK:
                status = COPY_FAILED
                break
            if ticket.is_store:
                mark_filling(group.copier, &run)
            elif check_before(group.copier, &run, self.flags) != KV_COPY_OK:
                status = COPY_FAILED  # the rows of the run before the bad one are copied
            error = self.pieces.add_run(group, &run)
            if error != KV_CU_SUCCESS:
                self.failed(self.pieces.failed_call, error)
                return COPY_FAILED
            row += run.count
        error = self.pieces.flush()
        if error != KV_CU_SUCCESS:
            self.failed(self.pieces.failed_call, error)
            return COPY_FAILED
        ticket.end_row = row
        return status

    cdef void end_submission(self, Direction *direction, Ticket *ticket, int result) noexcept nogil:
        """No more rows; the event tells when those that were submitted have ended.

        Also after an error: the memory of their slots must not be used again before.
        """
        cdef uint32_t last = direction.submitted - 1
        cdef int error = self.cuda.event_record(
            ticket.ended, direction.streams[last % self.stream_count])
        ticket.submitting = False
        ticket.result = result
        self.blocks += ticket.end_row
        if error != KV_CU_SUCCESS:
            self.failed("cuEventRecord", error)
            ticket.result = COPY_FAILED

    cdef int poll(self, uint32_t place, uint32_t *failed_row) noexcept nogil:
        cdef Ticket *ticket = &self.tickets[place]
        cdef Direction *direction = &self.stores if ticket.is_store else &self.loads
        cdef int error
        if ticket.submitting:
            if ticket.should_stop(ticket.context):
                self.end_submission(direction, ticket, COPY_STOPPED)
                self.leave_queue(direction, place)
            self.pump(direction)
            if ticket.submitting:
                return COPY_SUBMITTING
        error = self.cuda.event_query(ticket.ended)
        if error == KV_CU_NOT_READY:
            return COPY_RUNNING
        failed_row[0] = 0
        if error != KV_CU_SUCCESS:
            self.failed("a copy", error)
            return COPY_FAILED
        if ticket.errors != direction.errors:
            return COPY_FAILED  # of a chunk, maybe one of this operation
        if ticket.result == COPY_DONE:
            self.failures = 0
        return self.arrived(ticket, failed_row)

    cdef int arrived(self, Ticket *ticket, uint32_t *failed_row) noexcept nogil:
        """The bytes are there: finish the slot headers of a store, check those of a load again."""
        cdef const kv_copier *copier = self.groups[ticket.group].copier
        cdef kv_copy_run run
        cdef uint32_t row = 0, done = 0, i, r
        cdef const kv_region *region
        while row < ticket.end_row:
            failed_row[0] = row
            if form_run(copier, <const uint8_t *>ticket.rows, sizeof(kv_row), ticket.digests,
                        row, ticket.end_row, &run) != KV_COPY_OK:
                return COPY_FAILED
            if self.flags & KV_COPY_WITH_CHECKSUM:
                for i in range(run.count):
                    run.checksum[i] = 0
                    for r in range(copier.region_count):
                        region = &copier.regions[r]
                        run.checksum[i] = kv_checksum(
                            slot_piece(&copier.arena, region, run.slot + i), region.chunk_bytes,
                            run.checksum[i])
            if ticket.is_store:
                mark_valid(copier, &run, self.flags)
            elif check_after(copier, &run, self.flags, &done) != KV_COPY_OK:
                failed_row[0] = row + done
                return COPY_FAILED
            row += run.count
        failed_row[0] = ticket.end_row
        return ticket.result

    cdef void failed(self, const char *what, int error) noexcept nogil:
        """Tell about an error; give up after too many in a row."""
        self.failures += 1
        if self.failures >= FAILURES_MAX:
            self.off = True
        with gil:
            try:
                logger.error("%s%s", self.device.fault((<bytes>what).decode(), error),
                             "; the host tier of this rank is switched off" if self.off else "")
            except Exception:  # noqa: BLE001  a logger that fails must not end the copy thread
                pass

    cdef bint is_off(self) noexcept nogil:
        return self.off

    cdef uint64_t bytes_per_block(self) noexcept nogil:
        return self.block_bytes

    cdef bint wait_for_step(self, uint64_t step, Marks *marks, kv_cu_stream stream) noexcept nogil:
        """Make a stream wait for the place of a step, or of the next later one that is known."""
        cdef uint32_t i, best = step % MARKS
        cdef uint64_t found = kv_u64_load_acquire(&marks.step[best]), other
        cdef int error
        if step == 0:
            return True  # before the first step nothing has been put on the engine's stream
        if found <= step:
            found = 0
            for i in range(MARKS):
                other = kv_u64_load_acquire(&marks.step[i])
                if other > step and (found == 0 or other < found):
                    best, found = i, other
            if found == 0:
                return False  # its place could not be recorded, which has been told
        error = self.cuda.stream_wait(stream, marks.event[best], 0)
        if error != KV_CU_SUCCESS:
            self.failed("cuStreamWaitEvent", error)
        return error == KV_CU_SUCCESS

    # ---- engine thread ---------------------------------------------------------------------------
    cdef void mark(self, Marks *marks, uint64_t step, uint64_t stream) noexcept nogil:
        cdef uint32_t i = step % MARKS
        cdef int error
        if self.off:
            return
        error = self.cuda.event_record(marks.event[i], <kv_cu_stream><uintptr_t>stream)
        if error == KV_CU_SUCCESS:
            kv_u64_store_release(&marks.step[i], step + 1)
        else:
            self.failed("cuEventRecord on the engine's stream", error)

    cdef void step_bound(self, uint64_t step, uint64_t stream) noexcept nogil:
        self.mark(&self.bound, step, stream)

    cdef void step_filled(self, uint64_t step, uint64_t stream) noexcept nogil:
        self.mark(&self.filled, step, stream)

    cdef bint engine_after(self, uint32_t place, uint64_t stream) noexcept nogil:
        return self.cuda.stream_wait(<kv_cu_stream><uintptr_t>stream, self.tickets[place].ended,
                                     0) == KV_CU_SUCCESS


cdef int CudaBackend_open(CudaBackend self) except -1:
    cdef CudaDevice device = self.device
    cdef int least = 0, greatest = 0
    cdef uint32_t i
    device.enter()
    device.check("cuCtxGetStreamPriorityRange", self.cuda.priority_range(&least, &greatest))
    for i in range(2 * STREAMS_MAX):
        device.check("cuStreamCreateWithPriority", self.cuda.stream_create(
            &self.loads.streams[i // 2] if i % 2 else &self.stores.streams[i // 2],
            KV_CU_STREAM_NON_BLOCKING, least))
    self.opened = True
    for i in range(MARKS):
        CudaBackend_event(self, &self.bound.event[i])
        CudaBackend_event(self, &self.filled.event[i])
    for i in range(PLACES):
        CudaBackend_event(self, &self.tickets[i].ended)
    for i in range(CHUNKS_MAX):
        CudaBackend_event(self, &self.loads.chunk[i])
        CudaBackend_event(self, &self.stores.chunk[i])
    return 0


cdef int CudaBackend_event(CudaBackend self, kv_cu_event *event) except -1:
    return self.device.check(
        "cuEventCreate", self.cuda.event_create(event, KV_CU_EVENT_DISABLE_TIMING))


cdef int CudaBackend_close(CudaBackend self) except -1:
    cdef kv_cu_stream *streams = [self.loads.streams[0], self.loads.streams[1],
                                  self.stores.streams[0], self.stores.streams[1]]
    cdef uint32_t i
    self.device.enter()
    with nogil:
        for i in range(2 * STREAMS_MAX):
            self.cuda.stream_synchronize(streams[i])
            self.cuda.stream_destroy(streams[i])
    for i in range(MARKS):
        self.cuda.event_destroy(self.bound.event[i])
        self.cuda.event_destroy(self.filled.event[i])
    for i in range(PLACES):
        self.cuda.event_destroy(self.tickets[i].ended)
    for i in range(CHUNKS_MAX):
        self.cuda.event_destroy(self.loads.chunk[i])
        self.cuda.event_destroy(self.stores.chunk[i])
    return 0
