# SPDX-License-Identifier: Apache-2.0
"""Copies between host slots and a slab: spills and fetches, by threads of their own.

A *spill* writes host slots of registered blocks to disk slots, a *fetch* reads disk slots into host
slots that are being filled. Rows are (disk slot, host slot, block, generation). The worker's loop
submits an operation and polls it, as it does with any backend; the threads take its rows one by one
and make blocking system calls, which is as fast as the device where several are under way.

What is checked is in kvbm/_fast/disk_rows.pyx.

A thread that hangs in a system call holds its row: the operation does not end, and nothing else
waits for it. `close` says so, and then the memory must stay mapped.
"""
from libc.errno cimport EIO, errno
from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.time cimport CLOCK_REALTIME, clock_gettime, timespec

from kvbm._fast.atomics cimport kv_u32_load_acquire, kv_u32_load_relaxed
from kvbm._fast.backend cimport (
    COPY_DONE,
    COPY_FAILED,
    COPY_RUNNING,
    COPY_STOPPED,
    DEPTH_MAX,
    PLACES,
    CopyBackend,
    StopCheck,
)
from kvbm._fast.copy cimport HostCopier, kv_copier
from kvbm._fast.disk_rows cimport (
    DISK_BAD_CHECKSUM,
    DISK_BAD_HEADER,
    DISK_BAD_SOURCE,
    DISK_FINE,
    DISK_SHORT,
    DISK_STOPPED,
    DiskRow,
    Workspace,
    fetch_row,
    needs_bounce,
    row_from_block,
    spill_row,
    workspace_free,
)
from kvbm._fast.layout cimport KV_FETCH, KV_ROWS, kv_operation
from kvbm._fast.operations cimport doorbell_ring
from kvbm._fast.segment cimport Segment
from kvbm._fast.slab cimport (
    KV_SLAB_VALID,
    kv_slab_header,
    kv_sync_call,
    kv_system_calls,
    kv_transfer_call,
    slab_empty_header,
    slab_write_header,
)
from kvbm._fast.timing cimport begin_cpu, count_cpu


cdef enum:
    PAGE = 4096
    DEPTH = 4                    # operations of one kind under way

PROBLEMS = {
    DISK_STOPPED: "cancelled",
    DISK_BAD_SOURCE: "the host slot does not hold the block",
    DISK_BAD_HEADER: "the disk slot does not hold the block",
    DISK_BAD_CHECKSUM: "other bytes came back than were written",
    DISK_SHORT: "fewer bytes were moved than asked for",
}


cdef class DiskBackend(CopyBackend):
    """Backend of one rank's disk tier.

    Parameters
    ----------
    segment : Segment
        Attached, with a worker line.
    copiers : list of HostCopier
        One a KV-cache group: where the host slots are.
    data_fd, table_fd : int
        The slab, for data and for headers.
    layout : object
        ``slots``, ``table_offset``, ``data_offset``, ``stride``, ``payload_bytes`` of the slab.
    fingerprint : int
        First 8 bytes of the cache's fingerprint.
    durable : bool
        The slab outlives this process.
    alignment : int
        What address, offset and length of a piece must be multiples of; 1 through the page cache.
    calls : tuple of int, optional
        Addresses of functions in place of ``preadv``, ``pwritev`` and ``fdatasync``.
    """

    def __cinit__(self, Segment segment not None, list copiers not None, *, data_fd: int,
                  table_fd: int, layout, fingerprint: int, durable: bool, alignment: int = PAGE,
                  calls: tuple[int, int, int] | None = None):
        cdef HostCopier copier
        cdef Py_ssize_t i
        segment.check_open()
        self.name = "disk"
        self.depth = DEPTH
        self.segment = segment
        self.view = &segment.view
        self.copiers = list(copiers)
        self.group_count = <uint32_t>len(copiers)
        self.groups = <const kv_copier **>calloc(self.group_count, sizeof(kv_copier *))
        self.jobs = <Job *>calloc(PLACES, sizeof(Job))
        if self.groups == NULL or self.jobs == NULL:
            raise MemoryError("no memory for a disk backend")
        for i in range(self.group_count):
            copier = copiers[i]
            self.groups[i] = &copier.copier
            self.by_bounce |= needs_bounce(&copier.copier, alignment)
            if copier.copier.block_bytes != layout.payload_bytes:
                raise ValueError(f"blocks of {copier.copier.block_bytes} bytes do not fit slots "
                                 f"of {layout.payload_bytes}")
        self.file.data_fd = data_fd
        self.file.table_fd = table_fd
        self.file.slots = layout.slots
        self.file.table_offset = layout.table_offset
        self.file.data_offset = layout.data_offset
        self.file.stride = layout.stride
        self.file.payload_bytes = layout.payload_bytes
        self.file.fingerprint = fingerprint
        self.file.rank = self.groups[0].rank
        self.file.durable = durable
        self.file.calls = kv_system_calls
        if calls is not None:
            read, write, sync = calls
            self.file.calls.read = <kv_transfer_call><uintptr_t>read
            self.file.calls.write = <kv_transfer_call><uintptr_t>write
            self.file.calls.sync = <kv_sync_call><uintptr_t>sync
        pthread_mutex_init(&self.lock, NULL)
        pthread_cond_init(&self.work, NULL)

    def __dealloc__(self):
        # No thread is inside `serve`: each holds a reference to this object.
        free(self.groups)
        free(self.jobs)
        pthread_cond_destroy(&self.work)
        pthread_mutex_destroy(&self.lock)

    # ---- from Python -----------------------------------------------------------------------------
    def serve(self) -> None:
        """Do the work until `stop`; releases the GIL. For as many threads as wanted."""
        with nogil:
            self.serve_jobs()

    def stop(self) -> None:
        """Make `serve` return in all threads, each after the row that it is at."""
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.stopping = True
            pthread_cond_broadcast(&self.work)
            pthread_mutex_unlock(&self.lock)

    @property
    def serving(self) -> int:
        """Threads inside `serve`."""
        cdef int count
        with nogil:
            pthread_mutex_lock(&self.lock)
            count = self.threads
            pthread_mutex_unlock(&self.lock)
        return count

    @property
    def bounces(self) -> bool:
        """Whether blocks go through a buffer, because their pieces are not aligned."""
        return bool(self.by_bounce)

    def problems(self) -> tuple[int, int, int]:
        """Rows that failed so far, and of the last one the disk slot and what went wrong.

        The latter is an error number, or a key of `PROBLEMS`.
        """
        cdef uint64_t count
        cdef int problem
        cdef uint32_t slot
        with nogil:
            pthread_mutex_lock(&self.lock)
            count, slot, problem = self.failures, self.last_slot, self.last_problem
            pthread_mutex_unlock(&self.lock)
        return count, slot, problem

    # ---- the worker's loop -----------------------------------------------------------------------
    cdef int submit(self, uint32_t place, const kv_operation *op, const uint64_t *digests,
                    StopCheck should_stop, void *context, uint32_t *failed_row) noexcept nogil:
        cdef Job *job = &self.jobs[place]
        cdef uint32_t i
        failed_row[0] = 0
        if op.group >= self.group_count or op.row_count > KV_ROWS:
            return COPY_FAILED
        for i in range(op.row_count):
            failed_row[0] = i
            if not row_from_block(self.view, op, i, digests, &job.rows[i]):
                return COPY_FAILED
            if job.rows[i].disk_slot >= self.file.slots:
                return COPY_FAILED
        pthread_mutex_lock(&self.lock)
        job.should_stop = should_stop
        job.context = context
        job.reading = kv_u32_load_relaxed(&op.kind) == KV_FETCH
        job.count = op.row_count
        job.group = op.group
        job.next_row = job.running = job.failed_row = 0
        job.problem = DISK_FINE
        self.submitted += 1
        job.number = self.submitted
        job.phase = JOB_ROWS if job.reading else JOB_BEGIN
        pthread_cond_broadcast(&self.work)
        pthread_mutex_unlock(&self.lock)
        return COPY_RUNNING

    cdef int poll(self, uint32_t place, uint32_t *failed_row) noexcept nogil:
        cdef Job *job = &self.jobs[place]
        cdef int status = COPY_RUNNING
        pthread_mutex_lock(&self.lock)
        if job.phase == JOB_ENDED:
            job.phase = JOB_FREE
            failed_row[0] = job.failed_row
            status = COPY_DONE
            if job.problem != DISK_FINE:
                status = COPY_STOPPED if job.problem == DISK_STOPPED else COPY_FAILED
        pthread_mutex_unlock(&self.lock)
        return status

    cdef uint64_t bytes_per_block(self) noexcept nogil:
        return self.file.payload_bytes

    # ---- the threads -----------------------------------------------------------------------------
    cdef void serve_jobs(self) noexcept nogil:
        cdef Workspace space
        space.bounce = NULL
        begin_cpu()
        pthread_mutex_lock(&self.lock)
        self.threads += 1
        while not self.stopping:
            if not self.do_something(&space):
                pthread_cond_wait(&self.work, &self.lock)
        self.threads -= 1
        pthread_mutex_unlock(&self.lock)
        workspace_free(&space)

    cdef Job *next_job(self) noexcept nogil:
        """A job with something to do, fetches first: requests wait for them. Under the lock."""
        cdef Job *job = self.oldest(0, DEPTH_MAX)
        return job if job != NULL else self.oldest(DEPTH_MAX, PLACES)

    cdef Job *oldest(self, uint32_t first, uint32_t end) noexcept nogil:
        """Of the jobs with something to do the oldest: a chain's blocks arrive from its begin."""
        cdef Job *job
        cdef Job *found = NULL
        cdef uint32_t place
        for place in range(first, end):
            job = &self.jobs[place]
            if (job.phase == JOB_BEGIN or (job.phase == JOB_ROWS and job.next_row < job.count)) \
                    and (found == NULL or job.number < found.number):
                found = job
        return found

    cdef bint do_something(self, Workspace *space) noexcept nogil:
        """One row, or the preparation of a job; False if there is none.

        The lock is held at both ends, not between.
        """
        cdef Job *job = self.next_job()
        cdef uint32_t row = 0
        cdef int problem
        if job == NULL:
            return False
        if job.phase == JOB_BEGIN:
            self.begin(job)
        else:
            row = job.next_row
            job.next_row += 1
            job.running += 1
            pthread_mutex_unlock(&self.lock)
            problem = self.move_row(job, row, space)
            count_cpu(self.view)
            pthread_mutex_lock(&self.lock)
            job.running -= 1
            if problem != DISK_FINE:
                self.note_problem(job, row, problem)
        self.settle(job)
        return True

    cdef void begin(self, Job *job) noexcept nogil:
        """Prepare a job's slots; the lock is held at both ends."""
        cdef int problem
        job.phase = JOB_PREPARING
        pthread_mutex_unlock(&self.lock)
        problem = self.prepare(job)
        pthread_mutex_lock(&self.lock)
        job.phase = JOB_ROWS
        if problem != DISK_FINE:
            self.note_problem(job, 0, problem)
        pthread_cond_broadcast(&self.work)

    cdef void note_problem(self, Job *job, uint32_t row, int problem) noexcept nogil:
        if job.problem == DISK_FINE or row < job.failed_row:
            job.problem = problem
            job.failed_row = row
        job.next_row = job.count  # the rest would be of no use
        if problem != DISK_STOPPED:
            self.failures += 1
            self.last_problem = problem
            self.last_slot = job.rows[row].disk_slot

    cdef void settle(self, Job *job) noexcept nogil:
        """Conclude a job whose last row has ended; the lock is held at both ends."""
        cdef int problem = DISK_FINE
        if job.phase != JOB_ROWS or job.next_row < job.count or job.running != 0:
            return
        job.phase = JOB_PREPARING
        if job.problem == DISK_FINE and not job.reading:
            pthread_mutex_unlock(&self.lock)
            problem = self.conclude(job)
            pthread_mutex_lock(&self.lock)
            if problem != DISK_FINE:
                self.note_problem(job, 0, problem)
        job.phase = JOB_ENDED
        doorbell_ring(self.view, self.view.leader, self.file.rank)

    cdef int prepare(self, Job *job) noexcept nogil:
        """[B0], [B1]: no header of a slot that is about to be written says that it is valid."""
        cdef uint32_t i
        cdef bint was_valid = False, any_valid = False
        cdef int problem
        for i in range(job.count):
            problem = slab_empty_header(&self.file, job.rows[i].disk_slot,
                                        &job.rows[i].slab_generation, &was_valid)
            if problem != 0:
                return problem
            any_valid |= was_valid
        if any_valid and self.file.durable and self.file.calls.sync(self.file.table_fd) != 0:
            return errno if errno != 0 else EIO
        return DISK_FINE

    cdef int conclude(self, Job *job) noexcept nogil:
        """[B3], [B4]: the data are on the medium, so the headers may say so."""
        cdef kv_slab_header header
        cdef timespec now
        cdef DiskRow *row
        cdef uint32_t i
        cdef int problem
        if self.file.durable and self.file.calls.sync(self.file.table_fd) != 0:
            return errno if errno != 0 else EIO
        clock_gettime(CLOCK_REALTIME, &now)
        for i in range(job.count):
            row = &job.rows[i]
            memset(&header, 0, sizeof(header))
            header.state = KV_SLAB_VALID
            header.generation = row.slab_generation
            header.digest_lo, header.digest_hi = row.digest[0], row.digest[1]
            header.parent_lo, header.parent_hi = row.parent[0], row.parent[1]
            header.fingerprint = self.file.fingerprint
            header.payload_bytes = self.file.payload_bytes
            header.data_checksum = row.checksum
            header.sequence_hash = row.sequence_hash
            header.written_ns = <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec + i
            header.slot = row.disk_slot
            header.position = row.position
            header.group = job.group
            header.rank = self.file.rank
            problem = slab_write_header(&self.file, row.disk_slot, &header)
            if problem != 0:
                return problem
        return DISK_FINE

    cdef int may_move(self, Job *job, uint32_t number) noexcept nogil:
        if job.should_stop != NULL and job.should_stop(job.context):
            return DISK_STOPPED
        if (job.rows[number].slot
                >= kv_u32_load_acquire(&self.groups[job.group].arena.usable_slots)):
            return DISK_BAD_SOURCE
        return DISK_FINE

    cdef int move_row(self, Job *job, uint32_t number, Workspace *space) noexcept nogil:
        cdef const kv_copier *copier = self.groups[job.group]
        cdef DiskRow *row = &job.rows[number]
        cdef int problem = self.may_move(job, number)
        if problem != DISK_FINE:
            return problem
        if job.reading:
            return fetch_row(&self.file, copier, row, space, self.by_bounce)
        return spill_row(&self.file, copier, row, space, self.by_bounce)
