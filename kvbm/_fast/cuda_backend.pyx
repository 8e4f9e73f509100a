# SPDX-License-Identifier: Apache-2.0
"""Copies between a KV cache on a CUDA device and the host arena, by the device's copy engines.

Two streams, one for loads and one for stores, at the lowest priority and never synchronized with.
An operation is submitted to one of them, behind a wait for the place in the engine's stream that it
must come after, and followed by an event; it has ended when the event has. Nobody waits for it.

    engine's stream   ... forward s-1 | bind s | forward s | fill s | ...
                                         |                    |
    load stream         wait ------------+ copies of step s   |
    store stream                         wait ----------------+ copies of step s

`bind` and `fill` are events that the engine's thread records at these moments: 0.2 us each. The
events of a step are reused MARKS steps later; a copy that is so late waits for the younger step,
which is more than it must and never less.

How bytes go (kvbm/transfer/method.py has the figures and the choice): rows are coalesced into runs,
a run is one piece a region. Pieces are submitted many at a time (cuMemcpyBatchAsync), or, where the
regions lie at one pitch inside one allocation, as one 2D copy a run. A batch of loads may read its
source at once, the arena is complete; a batch of stores reads in stream order.

Slot headers are written by this thread, before the submission and when the event has ended. After
FAILURES_MAX errors in a row the backend gives up: it fails every operation from there on.
"""
import logging

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from kvbm._fast.atomics cimport kv_u64_load_acquire, kv_u64_store_release
from kvbm._fast.backend cimport (
    COPY_DONE,
    COPY_FAILED,
    COPY_RUNNING,
    COPY_STOPPED,
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
    KV_CU_INVALID_VALUE,
    KV_CU_MEMORY_DEVICE,
    KV_CU_MEMORY_HOST,
    KV_CU_NOT_READY,
    KV_CU_NOT_SUPPORTED,
    KV_CU_ORDER_ANY,
    KV_CU_ORDER_STREAM,
    KV_CU_STREAM_NON_BLOCKING,
    KV_CU_SUCCESS,
    CudaDevice,
    kv_cu_batch_attribute,
    kv_cu_copy_2d,
    kv_cu_event,
    kv_cu_stream,
)
from kvbm._fast.layout cimport KV_ROWS, KV_STORE, kv_operation, kv_row

logger = logging.getLogger("kvbm.cuda")

cdef enum:
    DEPTH = 4              # operations of a kind under way: the bus is busy while one is submitted
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
        One a group: (pitch_bytes, pitched_below_bytes, load_segments, store_segments), from
        `kvbm.transfer.method`.
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
        self.use_batches = self.cuda.copy_batch != NULL
        self.group_count = <uint32_t>len(copiers)
        self.groups = <Group *>calloc(self.group_count, sizeof(Group))
        self.tickets = <Ticket *>calloc(PLACES, sizeof(Ticket))
        self.batch = <Batch *>calloc(1, sizeof(Batch))
        if self.groups == NULL or self.tickets == NULL or self.batch == NULL:
            raise MemoryError("no memory for a backend's tables")
        for i, (pitch, below, load_segments, store_segments) in enumerate(methods):
            if not (0 < load_segments <= SEGMENTS_MAX and 0 < store_segments <= SEGMENTS_MAX):
                raise ValueError(f"load_segments={load_segments}, store_segments={store_segments} "
                                 f"are not allowed: 1 to {SEGMENTS_MAX}")
            copier = copiers[i]
            self.groups[i].copier = &copier.copier
            self.groups[i].pitch = pitch
            self.groups[i].pitched_below = below
            self.groups[i].load_segments = load_segments
            self.groups[i].store_segments = store_segments
        self.block_bytes = self.groups[0].copier.block_bytes
        CudaBackend_open(self)

    def __dealloc__(self):
        free(self.groups)
        free(self.tickets)
        free(self.batch)

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
        return {"calls": self.calls, "pieces": self.pieces, "blocks": self.blocks,
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
        cdef bint is_store = op.kind == KV_STORE
        cdef kv_cu_stream stream = self.store_stream if is_store else self.load_stream
        cdef uint64_t began = monotonic_ns()
        cdef int error
        failed_row[0] = 0
        if self.off or op.group >= self.group_count or op.row_count > KV_ROWS:
            return COPY_FAILED
        ticket.kind = op.kind
        ticket.group = op.group
        ticket.count = op.row_count
        memcpy(ticket.rows, op.rows, ticket.count * sizeof(kv_row))
        memcpy(ticket.digests, digests, 2 * ticket.count * sizeof(uint64_t))
        error = self.cuda.context_set(self.device.context)
        if error != KV_CU_SUCCESS:
            self.failed("cuCtxSetCurrent", error)
            return COPY_FAILED
        if not self.wait_for_step(op.step, &self.filled if is_store else &self.bound, stream):
            return COPY_FAILED
        ticket.result = self.copy_ticket(ticket, stream, should_stop, context)
        # Also after an error: what was submitted before it must have ended before the place, and
        # the memory of its slots, is used again.
        error = self.cuda.event_record(ticket.ended, stream)
        self.submit_ns += monotonic_ns() - began
        if error != KV_CU_SUCCESS:
            self.failed("cuEventRecord", error)
            return COPY_FAILED
        self.blocks += ticket.end_row
        return COPY_RUNNING

    cdef int copy_ticket(self, Ticket *ticket, kv_cu_stream stream, StopCheck should_stop,
                         void *context) noexcept nogil:
        """Submit a ticket's rows; `end_row` tells how far it came."""
        cdef Group *group = &self.groups[ticket.group]
        cdef Batch *batch = self.batch
        cdef kv_copy_run run
        cdef uint32_t row = 0
        cdef int status = COPY_DONE
        ticket.end_row = 0
        batch.count = 0
        batch.kind = ticket.kind
        batch.stream = stream
        batch.limit = group.store_segments if ticket.kind == KV_STORE else group.load_segments
        while row < ticket.count and status == COPY_DONE:
            if should_stop(context):
                status = COPY_STOPPED
                break
            if form_run(group.copier, <const uint8_t *>ticket.rows, sizeof(kv_row), ticket.digests,
                        row, ticket.count, &run) != KV_COPY_OK:
                status = COPY_FAILED
                break
            if ticket.kind == KV_STORE:
                mark_filling(group.copier, &run)
            elif check_before(group.copier, &run, self.flags) != KV_COPY_OK:
                status = COPY_FAILED  # the rows of the run before the bad one are copied
            if self.add_run(group, &run) != KV_CU_SUCCESS:
                return COPY_FAILED
            row += run.count
            if batch.count == 0:
                ticket.end_row = row
        if self.flush() != KV_CU_SUCCESS:
            return COPY_FAILED
        ticket.end_row = row
        return status

    cdef int add_run(self, Group *group, const kv_copy_run *run) noexcept nogil:
        cdef const kv_copier *copier = group.copier
        cdef const kv_region *region = copier.regions
        cdef uint32_t r, i
        cdef bint packed = region.block_stride == region.chunk_bytes
        cdef uint64_t piece = region.chunk_bytes * (run.count if packed else 1)
        cdef uint64_t device
        cdef uint8_t *host
        cdef int error = KV_CU_SUCCESS
        if group.pitch != 0 and piece < group.pitched_below and run.count > 0:
            error = self.add_pitched(group, run, packed)
            if error != KV_CU_INVALID_VALUE:
                return error
            group.pitch = 0  # not one allocation after all: piece by piece from here on
        for r in range(copier.region_count):
            region = &copier.regions[r]
            device = <uint64_t>region.base + run.device_block * region.block_stride
            host = slot_piece(&copier.arena, region, run.slot)
            if region.block_stride == region.chunk_bytes:
                error = self.add_piece(device, host, run.count * region.chunk_bytes)
            else:
                for i in range(run.count):
                    if error == KV_CU_SUCCESS:
                        error = self.add_piece(device + i * region.block_stride,
                                               host + i * region.chunk_bytes, region.chunk_bytes)
            if error != KV_CU_SUCCESS:
                return error
        return KV_CU_SUCCESS

    cdef int add_pitched(self, Group *group, const kv_copy_run *run, bint packed) noexcept nogil:
        """Regions at one pitch: one 2D copy for a run of packed blocks, else one a block."""
        cdef const kv_copier *copier = group.copier
        cdef const kv_region *first = copier.regions
        cdef uint8_t *host = slot_piece(&copier.arena, first, run.slot)
        cdef uint64_t device = <uint64_t>first.base + run.device_block * first.block_stride
        cdef uint64_t host_pitch = first.chunk_bytes * min(
            copier.arena.group_slots,
            copier.arena.slots - run.slot // copier.arena.group_slots * copier.arena.group_slots)
        cdef uint32_t _call, calls = 1 if packed else run.count
        cdef kv_cu_copy_2d copy
        cdef int error
        memset(&copy, 0, sizeof(copy))
        copy.width = first.chunk_bytes * (run.count if packed else 1)
        copy.height = copier.region_count
        for _call in range(calls):
            if self.batch.kind == KV_STORE:
                copy.source_kind, copy.to_kind = KV_CU_MEMORY_DEVICE, KV_CU_MEMORY_HOST
                copy.source_device, copy.source_pitch = device, group.pitch
                copy.to_host, copy.to_pitch = host, host_pitch
            else:
                copy.source_kind, copy.to_kind = KV_CU_MEMORY_HOST, KV_CU_MEMORY_DEVICE
                copy.source_host, copy.source_pitch = host, host_pitch
                copy.to_device, copy.to_pitch = device, group.pitch
            error = self.cuda.copy_2d(&copy, self.batch.stream)
            if error == KV_CU_INVALID_VALUE:
                return error
            if error != KV_CU_SUCCESS:
                self.failed("cuMemcpy2DAsync", error)
                return error
            self.calls += 1
            self.pieces += copier.region_count
            device += first.block_stride
            host += first.chunk_bytes
        return KV_CU_SUCCESS

    cdef int add_piece(self, uint64_t device, void *host, size_t count) noexcept nogil:
        cdef Batch *batch = self.batch
        cdef bint is_store = batch.kind == KV_STORE
        if count == 0:
            return KV_CU_SUCCESS
        batch.to[batch.count] = <uintptr_t>host if is_store else device
        batch.source[batch.count] = device if is_store else <uintptr_t>host
        batch.bytes[batch.count] = count
        batch.count += 1
        if batch.count == batch.limit:
            return self.flush()
        return KV_CU_SUCCESS

    cdef int flush(self) noexcept nogil:
        """Submit the pieces that have come together."""
        cdef Batch *batch = self.batch
        cdef kv_cu_batch_attribute attribute
        cdef size_t first = 0, failed = 0
        cdef int error
        if batch.count == 0:
            return KV_CU_SUCCESS
        if not self.use_batches or batch.count == 1:
            return self.flush_singly()
        memset(&attribute, 0, sizeof(attribute))
        attribute.source_order = KV_CU_ORDER_STREAM if batch.kind == KV_STORE else KV_CU_ORDER_ANY
        error = self.cuda.copy_batch(batch.to, batch.source, batch.bytes, batch.count, &attribute,
                                     &first, 1, &failed, batch.stream)
        if error == KV_CU_NOT_SUPPORTED:
            self.use_batches = False
            return self.flush_singly()
        if error != KV_CU_SUCCESS:
            self.failed("cuMemcpyBatchAsync", error)
            return error
        self.calls += 1
        self.pieces += batch.count
        batch.count = 0
        return KV_CU_SUCCESS

    cdef int flush_singly(self) noexcept nogil:
        cdef Batch *batch = self.batch
        cdef uint32_t i
        cdef int error
        for i in range(batch.count):
            if batch.kind == KV_STORE:
                error = self.cuda.copy_to_host(<void *><uintptr_t>batch.to[i], batch.source[i],
                                               batch.bytes[i], batch.stream)
            else:
                error = self.cuda.copy_to_device(batch.to[i], <void *><uintptr_t>batch.source[i],
                                                 batch.bytes[i], batch.stream)
            if error != KV_CU_SUCCESS:
                self.failed("cuMemcpyAsync", error)
                return error
        self.calls += batch.count
        self.pieces += batch.count
        batch.count = 0
        return KV_CU_SUCCESS

    cdef int poll(self, uint32_t place, uint32_t *failed_row) noexcept nogil:
        cdef Ticket *ticket = &self.tickets[place]
        cdef int error = self.cuda.event_query(ticket.ended)
        if error == KV_CU_NOT_READY:
            return COPY_RUNNING
        failed_row[0] = 0
        if error != KV_CU_SUCCESS:
            self.failed("a copy", error)
            return COPY_FAILED
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
            if ticket.kind == KV_STORE:
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
    for stream in range(2):
        device.check("cuStreamCreateWithPriority", self.cuda.stream_create(
            &self.store_stream if stream else &self.load_stream, KV_CU_STREAM_NON_BLOCKING, least))
    self.opened = True
    for i in range(MARKS):
        CudaBackend_event(self, &self.bound.event[i])
        CudaBackend_event(self, &self.filled.event[i])
    for i in range(PLACES):
        CudaBackend_event(self, &self.tickets[i].ended)
    return 0


cdef int CudaBackend_event(CudaBackend self, kv_cu_event *event) except -1:
    return self.device.check(
        "cuEventCreate", self.cuda.event_create(event, KV_CU_EVENT_DISABLE_TIMING))


cdef int CudaBackend_close(CudaBackend self) except -1:
    cdef kv_cu_stream load_stream = self.load_stream, store_stream = self.store_stream
    cdef uint32_t i
    self.device.enter()
    with nogil:
        self.cuda.stream_synchronize(load_stream)
        self.cuda.stream_synchronize(store_stream)
    for i in range(MARKS):
        self.cuda.event_destroy(self.bound.event[i])
        self.cuda.event_destroy(self.filled.event[i])
    for i in range(PLACES):
        self.cuda.event_destroy(self.tickets[i].ended)
    self.cuda.stream_destroy(load_stream)
    self.cuda.stream_destroy(store_stream)
    return 0
