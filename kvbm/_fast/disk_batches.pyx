# SPDX-License-Identifier: Apache-2.0
"""The disk backend for a library that moves whole operations instead of threads that move rows.

What is checked, and the order in which a slot is written, stay here: a library is only told where
the bytes are. What it cannot move is moved row by row.
"""
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t, uintptr_t

from kvbm._fast.backend cimport DEPTH_MAX, PLACES
from kvbm._fast.copy cimport kv_copier, slot_piece
from kvbm._fast.disk_backend cimport (
    JOB_BEGIN,
    DiskBackend,
    Job,
    pthread_cond_broadcast,
    pthread_cond_wait,
    pthread_mutex_lock,
    pthread_mutex_unlock,
)
from kvbm._fast.disk_rows cimport (
    DISK_FINE,
    Workspace,
    copy_through,
    fetch_after,
    fetch_before,
    spill_after,
    spill_before,
    workspace_free,
)
from kvbm._fast.timing cimport count_cpu

import numpy as np


cdef class DiskBatches(DiskBackend):
    """A disk backend whose operations can be taken whole; `serve` moves them as its base does."""

    def __cinit__(self):
        self.writing_max = PLACES

    def keep_for_reads(self, takers: int) -> None:
        """Keep one of so many threads that take operations for fetches, if there are two or more.

        A fetch that comes while each of them writes a whole operation would wait for seconds, and
        a request waits for it.
        """
        pthread_mutex_lock(&self.lock)
        self.writing_max = max(1, takers - 1)
        pthread_mutex_unlock(&self.lock)

    def take(self) -> tuple[int, bool, np.ndarray, np.ndarray] | None:
        """Wait for an operation whose rows are all still to be moved; None once `stop` was called.

        Its rows have passed their checks. Whoever has it moves each block between its host slot and
        its disk slot, and calls `give`.

        Returns
        -------
        tuple
            A number for the other calls, whether it is a fetch, the host slots, the disk slots.
        """
        cdef Job *job
        cdef uint32_t i
        with nogil:
            job = self.take_job()
        if job == NULL:
            return None
        host = np.empty(job.count, np.int32)
        disk = np.empty(job.count, np.int32)
        cdef int32_t[::1] host_slots = host
        cdef int32_t[::1] disk_slots = disk
        for i in range(job.count):
            host_slots[i], disk_slots[i] = job.rows[i].slot, job.rows[i].disk_slot
        return job - self.jobs, bool(job.reading), host, disk

    def give(self, place: int, moved: bool) -> None:
        """End an operation that was taken.

        Where it could not be moved as a whole, its rows are moved here, one by one, so that each
        that is good arrives and each that is not is known.
        """
        cdef Job *job = &self.jobs[<uint32_t>place % PLACES]
        cdef bint whole = moved
        cdef uint32_t row = 0
        cdef int problem
        with nogil:
            problem = self.rows_after(job, whole, &row)
            count_cpu(self.view)
            pthread_mutex_lock(&self.lock)
            job.running = 0
            self.writing -= not job.reading
            if problem != DISK_FINE:
                self.note_problem(job, row, problem)
            self.settle(job)
            pthread_cond_broadcast(&self.work)
            pthread_mutex_unlock(&self.lock)

    def copy_rows(self, place: int, first: int, buffers: np.ndarray) -> None:
        """Copy rows of an operation that was taken to or from buffers, as its direction wants.

        Parameters
        ----------
        place, first : int
            The operation, and its first row.
        buffers : numpy.ndarray
            Of uint8, a row each.
        """
        cdef Job *job = &self.jobs[<uint32_t>place % PLACES]
        cdef uint8_t[:, ::1] rows = buffers
        cdef uint32_t i, begin = first
        cdef uint32_t count = <uint32_t>min(rows.shape[0], <Py_ssize_t>job.count - first)
        if rows.shape[1] < <Py_ssize_t>self.file.payload_bytes:
            raise ValueError(f"buffers of {rows.shape[1]} bytes are too small")
        with nogil:
            for i in range(count):
                copy_through(self.groups[job.group], job.rows[begin + i].slot, &rows[i, 0],
                             not job.reading)

    def slot_addresses(self) -> np.ndarray:
        """Address of each host slot's first piece."""
        cdef const kv_copier *copier = self.groups[0]
        cdef uint32_t slot
        found = np.empty(copier.arena.slots, np.uint64)
        cdef uint64_t[::1] addresses = found
        for slot in range(copier.arena.slots):
            addresses[slot] = <uintptr_t>slot_piece(&copier.arena, &copier.regions[0], slot)
        return found

    @property
    def is_contiguous(self) -> bool:
        """Whether a block is one piece in the host tier that the file takes as it is."""
        return not self.by_bounce and all(
            [self.groups[i].region_count == 1 for i in range(self.group_count)])

    # ---- without the GIL ----------------------------------------------------------------------
    cdef Job *next_whole(self) noexcept nogil:
        """A job with something to do; a spill only while a thread is left. Under the lock."""
        cdef Job *job = self.oldest(0, DEPTH_MAX)
        if job == NULL and self.writing < self.writing_max:
            job = self.oldest(DEPTH_MAX, PLACES)
        return job

    cdef Job *take_job(self) noexcept nogil:
        """A job none of whose rows has been taken, checked; NULL when stopping."""
        cdef Job *job
        cdef Job *found = NULL
        cdef uint32_t row = 0
        cdef int problem
        count_cpu(self.view)
        pthread_mutex_lock(&self.lock)
        self.threads += 1
        while found == NULL and not self.stopping:
            job = self.next_whole()
            if job == NULL:
                pthread_cond_wait(&self.work, &self.lock)
            elif job.phase == JOB_BEGIN:
                self.begin(job)
                self.settle(job)
            else:
                job.next_row = job.count
                job.running = 1
                self.writing += not job.reading
                pthread_mutex_unlock(&self.lock)
                problem = self.rows_before(job, &row)
                pthread_mutex_lock(&self.lock)
                if problem == DISK_FINE:
                    found = job
                else:
                    job.running = 0
                    self.writing -= not job.reading
                    self.note_problem(job, row, problem)
                    self.settle(job)
        self.threads -= 1
        pthread_mutex_unlock(&self.lock)
        return found

    cdef int rows_before(self, Job *job, uint32_t *row) noexcept nogil:
        cdef const kv_copier *copier = self.groups[job.group]
        cdef uint32_t i
        cdef int problem
        for i in range(job.count):
            row[0] = i
            problem = self.may_move(job, i)
            if problem == DISK_FINE:
                problem = (fetch_before(&self.file, copier, &job.rows[i]) if job.reading
                           else spill_before(copier, &job.rows[i]))
            if problem != DISK_FINE:
                return problem
        return DISK_FINE

    cdef int rows_after(self, Job *job, bint moved, uint32_t *row) noexcept nogil:
        cdef const kv_copier *copier = self.groups[job.group]
        cdef Workspace space
        cdef uint32_t i
        cdef int problem = DISK_FINE
        space.bounce = NULL
        for i in range(job.count):
            row[0] = i
            if not moved:
                problem = self.move_row(job, i, &space)
            elif job.reading:
                problem = fetch_after(&self.file, copier, &job.rows[i])
            else:
                problem = spill_after(copier, &job.rows[i])
            if problem != DISK_FINE:
                break
        workspace_free(&space)
        return problem
