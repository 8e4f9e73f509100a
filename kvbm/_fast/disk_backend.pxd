# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.backend cimport CopyBackend, StopCheck
from kvbm._fast.copy cimport kv_copier
from kvbm._fast.disk_rows cimport DiskRow, Workspace
from kvbm._fast.layout cimport kv_view
from kvbm._fast.segment cimport Segment
from kvbm._fast.slab cimport SlabFile


cdef extern from "slab.h" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *lock, void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *lock)
    int pthread_mutex_lock(pthread_mutex_t *lock)
    int pthread_mutex_unlock(pthread_mutex_t *lock)
    int pthread_cond_init(pthread_cond_t *condition, void *attributes)
    int pthread_cond_destroy(pthread_cond_t *condition)
    int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *lock)
    int pthread_cond_broadcast(pthread_cond_t *condition)


cdef enum JobPhase:
    JOB_FREE = 0
    JOB_BEGIN = 1                # spill: its headers are to be emptied
    JOB_PREPARING = 2            # a thread is at it
    JOB_ROWS = 3                 # rows may be taken
    JOB_ENDED = 4                # its end has not been told yet


cdef struct Job:
    DiskRow rows[128]
    StopCheck should_stop
    void *context
    int phase
    bint reading                 # a fetch; else a spill
    uint64_t number              # in the order of submission
    uint32_t count
    uint32_t group
    uint32_t next_row            # first one that no thread has taken
    uint32_t running             # rows that threads are at
    uint32_t failed_row          # first one that failed
    int problem                  # of that row, an error number or a DiskProblem


cdef class DiskBackend(CopyBackend):
    cdef Segment segment
    cdef kv_view *view
    cdef SlabFile file
    cdef list copiers            # keep what `groups` points to
    cdef const kv_copier **groups
    cdef uint32_t group_count
    cdef bint by_bounce          # pieces cannot be handed to the file as they are
    cdef uint32_t line
    # Everything below is under the lock.
    cdef pthread_mutex_t lock
    cdef pthread_cond_t work     # rows, or a phase, are to be done; or stopping
    cdef Job *jobs
    cdef uint64_t submitted      # jobs so far
    cdef bint stopping
    cdef uint32_t threads        # inside `serve`
    cdef uint64_t failures       # rows
    cdef int last_problem
    cdef uint32_t last_slot

    cdef void serve_jobs(self) noexcept nogil
    cdef bint do_something(self, Workspace *space) noexcept nogil
    cdef void begin(self, Job *job) noexcept nogil
    cdef Job *next_job(self) noexcept nogil
    cdef Job *oldest(self, uint32_t first, uint32_t end) noexcept nogil
    cdef void settle(self, Job *job) noexcept nogil
    cdef void note_problem(self, Job *job, uint32_t row, int problem) noexcept nogil
    cdef int prepare(self, Job *job) noexcept nogil
    cdef int conclude(self, Job *job) noexcept nogil
    cdef int may_move(self, Job *job, uint32_t number) noexcept nogil
    cdef int move_row(self, Job *job, uint32_t row, Workspace *space) noexcept nogil
