# SPDX-License-Identifier: Apache-2.0
"""What operations take, and what their copies cost: counted by the threads that make them.

Histograms are a worker's, in the segment, with fixed buckets (counters.h): an operation that has
been done on a rank is in two of them, one for the time since it was submitted, which is what a
request waits for, and one for the copy alone. What failed or was cancelled is in neither. They are
counted before the operation's end is shown, so whoever sees it ended sees it counted.

CPU time is that of the thread that asks: a system call of a few hundred nanoseconds. A copy thread
asks once an operation or a disk row, and before it sleeps, and counts what it took since it asked
last; a leader asks at the begin and at the end of each of its engine's calls.
"""
from libc.stdint cimport uint32_t, uint64_t
from posix.time cimport clock_gettime, timespec

from typing import NamedTuple

from kvbm._fast.atomics cimport kv_u32_load_relaxed, kv_u64_load_relaxed
from kvbm._fast.blocks cimport monotonic_ns
from kvbm._fast.layout cimport (
    KV_C_BYTES_LOADED,
    KV_C_BYTES_STORED,
    KV_C_CPU_NS,
    KV_C_LOAD_NS,
    KV_C_STORE_NS,
    KV_FETCH,
    KV_LATENCY_BUCKETS,
    KV_LATENCY_COPY,
    KV_LATENCY_TOTAL,
    KV_LEADERS,
    KV_STORE,
    kv_count,
    kv_histogram,
    kv_histogram_add,
    kv_histogram_of,
    kv_is_disk_kind,
    kv_operation,
    kv_view,
)
from kvbm._fast.segment cimport Segment

from kvbm._fast.contract import OPERATION_KINDS

cdef extern from *:
    """
    #include <time.h>
    static _Thread_local uint64_t kv_cpu_counted; /* of this thread; 0: it has not begun */
    """
    int CLOCK_THREAD_CPUTIME_ID
    uint64_t kv_cpu_counted


class Histogram(NamedTuple):
    """Times by length.

    Attributes
    ----------
    buckets : tuple of int
        How many there are up to each of `contract.LATENCY_BOUNDS_NS` and above the one before, and
        in the last place those above all of them.
    sum_ns : int
        Of all of them.
    """

    buckets: tuple[int, ...]
    sum_ns: int


class Latencies(NamedTuple):
    """What the operations of one kind took on a rank.

    Attributes
    ----------
    total : Histogram
        From the submission on.
    copy : Histogram
        The copy alone.
    """

    total: Histogram
    copy: Histogram


cdef uint64_t thread_cpu_ns() noexcept nogil:
    """CPU time of the calling thread."""
    cdef timespec now
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now)
    return <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec


cdef void begin_cpu() noexcept nogil:
    """From here on the calling thread works for the segment that it counts in."""
    global kv_cpu_counted
    kv_cpu_counted = thread_cpu_ns()


cdef void count_cpu(kv_view *view) noexcept nogil:
    """Count the CPU time of the calling thread since it was counted last, or began."""
    global kv_cpu_counted
    cdef uint64_t now = thread_cpu_ns()
    if kv_cpu_counted != 0:
        kv_count(view, KV_C_CPU_NS, now - kv_cpu_counted)
    kv_cpu_counted = now


cdef void count_copy(kv_view *view, uint32_t rank, const kv_operation *op, uint64_t bytes_per_block,
                     uint64_t began_ns, bint done) noexcept nogil:
    """Count one rank's copy that has ended just now.

    Bytes and times of disk copies are counted by the leader, in the disk tier's own segment.
    """
    cdef uint32_t kind = kv_u32_load_relaxed(&op.kind)
    cdef uint64_t now = monotonic_ns()
    cdef uint64_t moved = op.row_count * bytes_per_block if done else 0
    if not kv_is_disk_kind(kind):
        kv_count(view, KV_C_BYTES_STORED if kind == KV_STORE else KV_C_BYTES_LOADED, moved)
        kv_count(view, KV_C_STORE_NS if kind == KV_STORE else KV_C_LOAD_NS, now - began_ns)
    if not done or kind < KV_STORE or kind > KV_FETCH:
        return
    kv_histogram_add(kv_histogram_of(view, view.leader, rank, kind, KV_LATENCY_COPY),
                     now - began_ns)
    # It was submitted before it began; only a segment that somebody scribbled on says otherwise.
    kv_histogram_add(kv_histogram_of(view, view.leader, rank, kind, KV_LATENCY_TOTAL),
                     now - min(began_ns, op.submitted_ns))


cdef object read_histogram(const kv_histogram *h):
    cdef uint32_t i
    buckets = tuple([kv_u64_load_relaxed(&h.bucket[i]) for i in range(KV_LATENCY_BUCKETS)])
    return Histogram(buckets, kv_u64_load_relaxed(&h.sum_ns))


def worker_latencies(Segment segment not None, leader: int, rank: int) -> dict[str, Latencies]:
    """Histograms of one worker's line, over all processes that ever had it, by kind."""
    cdef uint32_t line, column, kind
    segment.check_open()
    if not 0 <= leader < KV_LEADERS or not 0 <= rank < segment.view.shape.ranks:
        raise IndexError(
            f"leader {leader} rank {rank} is outside {KV_LEADERS} x {segment.view.shape.ranks}")
    line, column = leader, rank
    found = {}
    for kind, name in OPERATION_KINDS.items():
        found[name] = Latencies(
            read_histogram(kv_histogram_of(&segment.view, line, column, kind, KV_LATENCY_TOTAL)),
            read_histogram(kv_histogram_of(&segment.view, line, column, kind, KV_LATENCY_COPY)))
    return found


cdef class CallTime:
    """CPU time of an engine's calls, counted on the line of the leader that they go to.

    A context around each call, of one thread and one at a time.

    Parameters
    ----------
    segment : Segment
        Attached; with a leader's line, or nothing is counted.
    """
    cdef Segment segment
    cdef uint64_t began_ns

    def __cinit__(self, Segment segment not None) -> None:
        self.segment = segment

    def __enter__(self) -> None:
        self.began_ns = thread_cpu_ns()

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        cdef uint64_t spent = thread_cpu_ns() - self.began_ns
        self.segment.check_open()
        kv_count(&self.segment.view, KV_C_CPU_NS, spent)


def thread_cpu_time_ns() -> int:
    """CPU time of the calling thread, by the clock that is counted with."""
    return thread_cpu_ns()
