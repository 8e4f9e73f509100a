# SPDX-License-Identifier: Apache-2.0
"""Copies between a KV cache on a CUDA device and the host arena, by the device's copy engines.

Streams for loads and others for stores, at the lowest priority and never synchronized with. An
operation goes to those of its kind, behind a wait for the place in the engine's stream that it must
come after, and is followed by an event; it has ended when the event has. Nobody waits for it.

    engine's stream   ... forward s-1 | bind s | forward s | fill s | ...
                                         |                    |
    load stream         wait ------------+ copies of step s   |
    store stream                         wait ----------------+ copies of step s

`bind` and `fill` are events that the engine's thread records then, 0.2 us each (cuda_marks.pyx).

An operation is submitted in chunks, and only a few chunks are on their way at a time, the copies of
each behind those of the one before it, on several streams in turn. A copy engine stays with a
stream as long as that has work: on one stream, the few bytes that the engine itself copies in each
step (tokens and tables in, samples out) would wait until all chunks are done; so they wait for one.
`poll` submits the next chunk when the oldest has ended, and looks before each whether to stop.

Slot headers are written by this thread, before the submission and when the event has ended. After
FAILURES_MAX errors in a row the backend gives up: it fails every operation from there on.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from kvbm._fast.atomics cimport (
    kv_u32_fetch_add_release,
    kv_u32_load_relaxed,
    kv_u32_store_relaxed,
    kv_u64_load_relaxed,
    kv_u64_tally,
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
    KV_CU_NOT_READY,
    KV_CU_STREAM_NON_BLOCKING,
    KV_CU_SUCCESS,
    CudaDevice,
    kv_cu_stream,
)
from kvbm._fast.cuda_marks cimport MARK_UNKNOWN, CudaMarks
from kvbm._fast.cuda_pieces cimport SEGMENTS_MAX, CudaPieces, Group
from kvbm._fast.cuda_staging cimport CudaStaging, can_stage
from kvbm._fast.layout cimport KV_ROWS, KV_STORE, kv_operation, kv_row

cdef enum:
    DEPTH = 4              # operations of a kind under way: the bus is busy while one is submitted
    STREAMS_MAX = 4        # of a direction
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
        One a group, from `kvbm.transfer.method`.
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
        self.bound = CudaMarks(device)
        self.filled = CudaMarks(device)
        self.group_count = <uint32_t>len(copiers)
        self.groups = <Group *>calloc(self.group_count, sizeof(Group))
        self.tickets = <Ticket *>calloc(PLACES, sizeof(Ticket))
        if self.groups == NULL or self.tickets == NULL:
            raise MemoryError("no memory for a backend's tables")
        for i, method in enumerate(methods):
            copier = copiers[i]
            self.groups[i].copier = &copier.copier
            CudaBackend_method(self, &self.groups[i], method)
        self.staging = CudaStaging(device, self.stage_bytes, self.stream_count)
        self.block_bytes = self.groups[0].copier.block_bytes
        CudaBackend_open(self)

    def __dealloc__(self):
        free(self.groups)
        free(self.tickets)

    @property
    def is_switched_off(self) -> bool:
        """Whether the backend has given up after too many errors."""
        return self.is_off()

    @property
    def staging_bytes(self) -> int:
        """Device memory that copies go through."""
        return self.staging.total_bytes

    def set_usable_slots(self, count: int) -> None:
        """Let copies touch the first `count` slots of the arena; their memory is registered."""
        for copier in self.copiers:
            copier.usable_slots = count

    def statistics(self) -> dict[str, int]:
        """What has been submitted: calls of the driver, pieces, blocks, and time in nanoseconds."""
        cdef uint64_t calls = kv_u64_load_relaxed(&self.pieces.calls)
        return {"calls": calls + kv_u64_load_relaxed(&self.staging.calls),
                "pieces": kv_u64_load_relaxed(&self.pieces.pieces),
                "kernels": kv_u64_load_relaxed(&self.staging.kernels),
                "blocks": kv_u64_load_relaxed(&self.blocks),
                "submit_ns": kv_u64_load_relaxed(&self.submit_ns)}

    def close(self) -> None:
        """Destroy streams and events; nobody may be copying. May be called twice."""
        if self.opened:
            self.opened = False
            kv_u32_store_relaxed(&self.off, 1)
            CudaBackend_close(self)

    # ---- copy thread -----------------------------------------------------------------------------
    cdef int submit(self, uint32_t place, const kv_operation *op, const uint64_t *digests,
                    StopCheck should_stop, void *context, uint32_t *failed_row) noexcept nogil:
        cdef Ticket *ticket = &self.tickets[place]
        cdef Direction *direction
        failed_row[0] = 0
        if self.is_off() or op.group >= self.group_count or op.row_count > KV_ROWS:
            return COPY_FAILED
        if not self.good(self.cuda.context_set(self.device.context), "cuCtxSetCurrent"):
            return COPY_FAILED
        ticket.is_store = kv_u32_load_relaxed(&op.kind) == KV_STORE
        direction = &self.stores if ticket.is_store else &self.loads
        ticket.should_stop = should_stop
        ticket.context = context
        ticket.step = kv_u64_load_relaxed(&op.step)
        ticket.group = op.group
        ticket.count = op.row_count
        ticket.end_row = 0
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
            kv_u64_tally(&self.submit_ns, monotonic_ns() - began)

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
        """Make a stream wait for the copies of the chunk that was submitted last."""
        cdef uint32_t last = direction.submitted - 1
        if self.stream_count == 1 or direction.ended == direction.submitted:
            return True
        return self.good(self.cuda.stream_wait(stream, direction.copied[last % CHUNKS_MAX], 0),
                         "cuStreamWaitEvent")

    cdef bint submit_chunk(self, Direction *direction, Ticket *ticket) noexcept nogil:
        """Submit the next rows of an operation, and its end if they are the last."""
        cdef Group *group = &self.groups[ticket.group]
        cdef uint32_t stop_row = min(ticket.count, ticket.end_row + group.chunk_rows)
        cdef uint32_t turn = direction.submitted % self.stream_count
        cdef kv_cu_stream stream = direction.streams[turn]
        cdef bint staged = self.staging.wanted(group, ticket.is_store, &ticket.rows[ticket.end_row],
                                               stop_row - ticket.end_row)
        cdef int result
        # For each chunk: the kernel of a staged store does not follow the chunk before.
        if not self.wait_for_step(ticket, stream):
            self.end_submission(direction, ticket, COPY_FAILED)
            return True
        if staged:
            self.staging.begin(group, ticket.is_store, stream, turn)
        else:
            self.pieces.begin(group, ticket.is_store, stream)
        result = self.copy_rows(direction, ticket, stop_row, stream, staged)
        if self.good(self.cuda.event_record(direction.chunk[direction.submitted % CHUNKS_MAX],
                                            stream), "cuEventRecord"):
            direction.submitted += 1
        else:
            result = COPY_FAILED
        if result != COPY_DONE or ticket.end_row == ticket.count:
            self.end_submission(direction, ticket, result)
        return True

    cdef int copy_rows(self, Direction *direction, Ticket *ticket, uint32_t stop_row,
                       kv_cu_stream stream, bint staged) noexcept nogil:
        """Submit the rows from `end_row` to `stop_row`; moves `end_row`."""
        cdef Group *group = &self.groups[ticket.group]
        cdef kv_copy_run run
        cdef uint32_t row = ticket.end_row
        cdef int error, status = COPY_DONE
        if not staged and not self.follow_last(direction, stream):
            return COPY_FAILED
        while row < stop_row and status == COPY_DONE:
            if form_run(group.copier, <const uint8_t *>ticket.rows, sizeof(kv_row), ticket.digests,
                        row, stop_row, &run) != KV_COPY_OK:
                status = COPY_FAILED
                break
            if ticket.is_store:
                mark_filling(group.copier, &run)
            elif check_before(group.copier, &run, self.flags) != KV_COPY_OK:
                status = COPY_FAILED  # the rows of the run before the bad one are copied
            if staged:
                self.staging.add_run(&run)
            else:
                error = self.pieces.add_run(group, &run)
                if error != KV_CU_SUCCESS:
                    self.failed(self.pieces.failed_call, error)
                    return COPY_FAILED
            row += run.count
        if not (self.submit_staged(direction, stream, ticket.is_store) if staged
                else self.submit_pieces(direction, stream)):
            return COPY_FAILED
        ticket.end_row = row
        return status

    cdef bint submit_pieces(self, Direction *direction, kv_cu_stream stream) noexcept nogil:
        """Submit what is left of a chunk."""
        cdef int error = self.pieces.flush()
        return self.good(error, self.pieces.failed_call) and self.mark_copied(direction, stream)

    cdef bint submit_staged(self, Direction *direction, kv_cu_stream stream,
                            bint is_store) noexcept nogil:
        """Submit a chunk that goes through the staging buffer.

        Its copies come behind those of the chunk before, its kernel runs beside them.
        """
        self.staging.arrange()
        return ((not is_store or self.good(self.staging.launch(), "cuLaunchKernel"))
                and self.follow_last(direction, stream)
                and self.good(self.staging.copy(), "cuMemcpy2DAsync")
                and self.mark_copied(direction, stream)
                and (is_store or self.good(self.staging.launch(), "cuLaunchKernel")))

    cdef bint mark_copied(self, Direction *direction, kv_cu_stream stream) noexcept nogil:
        """The next chunk's copies may begin."""
        return self.good(self.cuda.event_record(
            direction.copied[direction.submitted % CHUNKS_MAX], stream), "cuEventRecord")

    cdef void end_submission(self, Direction *direction, Ticket *ticket, int result) noexcept nogil:
        """No more rows; the event tells when those that were submitted have ended.

        Also after an error: the memory of their slots must not be used again before. The last chunk
        is behind those of its own stream; those before it on the others may end later.
        """
        cdef uint32_t last = direction.submitted - 1
        cdef kv_cu_stream stream = direction.streams[last % self.stream_count]
        cdef int error = KV_CU_SUCCESS
        cdef uint32_t i
        for i in range(1, self.stream_count):
            if error == KV_CU_SUCCESS:
                error = self.cuda.stream_wait(stream, direction.chunk[(last - i) % CHUNKS_MAX], 0)
        if error == KV_CU_SUCCESS:
            error = self.cuda.event_record(ticket.ended, stream)
        ticket.submitting = False
        ticket.result = result if self.good(error, "the end of an operation") else COPY_FAILED
        kv_u64_tally(&self.blocks, ticket.end_row)

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
            kv_u32_store_relaxed(&self.failures, 0)
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

    cdef bint good(self, int error, const char *what) noexcept nogil:
        if error != KV_CU_SUCCESS:
            self.failed(what, error)
        return error == KV_CU_SUCCESS

    cdef void failed(self, const char *what, int error) noexcept nogil:
        """Tell about an error; give up after too many in a row."""
        if kv_u32_fetch_add_release(&self.failures, 1) + 1 >= FAILURES_MAX:
            kv_u32_store_relaxed(&self.off, 1)
        self.device.tell(what, error, self.is_off())

    cdef bint is_off(self) noexcept nogil:
        return kv_u32_load_relaxed(&self.off) != 0

    cdef uint64_t bytes_per_block(self) noexcept nogil:
        return self.block_bytes

    cdef bint wait_for_step(self, Ticket *ticket, kv_cu_stream stream) noexcept nogil:
        cdef int error
        if ticket.is_store:
            error = self.filled.make_wait(stream, ticket.step)
        else:
            error = self.bound.make_wait(stream, ticket.step)
        return error != MARK_UNKNOWN and self.good(error, "cuStreamWaitEvent")

    # ---- engine thread ---------------------------------------------------------------------------
    cdef void step_bound(self, uint64_t step, uint64_t stream) noexcept nogil:
        if not self.is_off():
            self.good(self.bound.record(step, <kv_cu_stream><uintptr_t>stream), "cuEventRecord")

    cdef void step_filled(self, uint64_t step, uint64_t stream) noexcept nogil:
        if not self.is_off():
            self.good(self.filled.record(step, <kv_cu_stream><uintptr_t>stream), "cuEventRecord")

    cdef bint engine_after(self, uint32_t place, uint64_t stream) noexcept nogil:
        return self.cuda.stream_wait(<kv_cu_stream><uintptr_t>stream, self.tickets[place].ended,
                                     0) == KV_CU_SUCCESS


cdef int CudaBackend_method(CudaBackend self, Group *group, method) except -1:
    if not (0 < method.segments <= SEGMENTS_MAX and 0 < method.chunk_bytes
            and 0 < method.chunks_ahead < CHUNKS_MAX and 0 < method.streams <= STREAMS_MAX
            and method.ctas > 0):
        raise ValueError(
            f"{method} is not allowed: segments 1 to {SEGMENTS_MAX}, chunks_ahead 1 to "
            f"{CHUNKS_MAX - 1}, streams 1 to {STREAMS_MAX}, chunk_bytes and ctas 1 or more")
    group.pitch = method.pitch_bytes
    group.pitched_below = method.pitched_below_bytes
    group.segments = method.segments
    group.chunk_rows = max(1, min(KV_ROWS, method.chunk_bytes // group.copier.block_bytes))
    if can_stage(group.copier) and group.copier.block_bytes <= method.chunk_bytes:
        group.staged_loads_below = method.staged_loads_below_bytes
        group.staged_stores_below = method.staged_stores_below_bytes
        if group.copier.regions.chunk_bytes < max(group.staged_loads_below,
                                                  group.staged_stores_below):
            self.stage_bytes = max(self.stage_bytes, group.chunk_rows * group.copier.block_bytes)
    group.ctas = method.ctas
    self.chunks_ahead = method.chunks_ahead
    self.stream_count = method.streams
    return 0


cdef int CudaBackend_open(CudaBackend self) except -1:
    cdef CudaDevice device = self.device
    cdef Direction **directions = [&self.loads, &self.stores]
    cdef Direction *direction
    cdef int least = 0, greatest = 0
    cdef uint32_t i
    device.enter()
    device.check("cuCtxGetStreamPriorityRange", self.cuda.priority_range(&least, &greatest))
    for direction in directions[:2]:
        for i in range(STREAMS_MAX):
            device.check("cuStreamCreateWithPriority", self.cuda.stream_create(
                &direction.streams[i], KV_CU_STREAM_NON_BLOCKING, least))
        for i in range(CHUNKS_MAX):
            device.make_event(&direction.copied[i])
            device.make_event(&direction.chunk[i])
    for i in range(PLACES):
        device.make_event(&self.tickets[i].ended)
    self.opened = True
    return 0


cdef int CudaBackend_close(CudaBackend self) except -1:
    cdef Direction **directions = [&self.loads, &self.stores]
    cdef Direction *direction
    cdef uint32_t i
    self.device.enter()
    for direction in directions[:2]:
        for i in range(STREAMS_MAX):
            with nogil:
                self.cuda.stream_synchronize(direction.streams[i])
                self.cuda.stream_destroy(direction.streams[i])
        for i in range(CHUNKS_MAX):
            self.cuda.event_destroy(direction.copied[i])
            self.cuda.event_destroy(direction.chunk[i])
    for i in range(PLACES):
        self.cuda.event_destroy(self.tickets[i].ended)
    self.bound.close()
    self.filled.close()
    self.staging.close()
    return 0
