# SPDX-License-Identifier: Apache-2.0
"""The shared segment: create, attach, detach.

Life of the object `/kvbm-<instance>`:

* `O_EXCL` elects the creator. It reserves all memory first (so that no later access can fault),
  fills in the header and stores the magic last, with release; who attaches loads it first, with
  acquire.
* Every user holds a shared lock on the byte LOCK_USERS. Who can take it exclusively knows that
  nobody else uses the object, and may remove it. The kernel drops the lock at death, so this holds
  after kill -9.
* Lines of participants: kvbm/_fast/participants.pyx.

This module raises OSError and `SegmentFault`; kvbm/shared.py turns them into the package's errors.
"""
import os
import time
import weakref
from typing import NamedTuple

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.mman cimport (
    MAP_FAILED,
    MAP_POPULATE,
    MAP_SHARED,
    PROT_READ,
    PROT_WRITE,
    mmap,
    munmap,
)

from kvbm._fast.atomics cimport (
    kv_u32_load_acquire,
    kv_u32_store_release,
    kv_u64_load_relaxed,
    kv_u64_store_relaxed,
    kv_u64_store_release,
)
from kvbm._fast.layout cimport (
    KV_COUNTERS,
    KV_DESCRIPTION_BYTES,
    KV_FINGERPRINT_BYTES,
    KV_FORMAT_VERSION,
    KV_LAYOUT_CHECK,
    KV_LEADERS,
    KV_MAGIC,
    KV_NONE,
    KV_PAGE,
    KV_PARTICIPANTS,
    KV_POOL_BLOCKS,
    KV_POOLS,
    KV_RANKS,
    KV_ROLE_NONE,
    kv_header,
    kv_header_check,
    kv_shape,
    kv_view,
    kv_view_init,
)
from kvbm._fast.locks cimport lock_drop, lock_take
from kvbm._fast.operations cimport leader_holds_nothing
from kvbm._fast.pool cimport pool_fill, pool_free_count

from kvbm._fast.objects import SegmentFault, object_path, open_object

cdef extern from *:
    """
    #include <pthread.h>
    static long kv_forks = 0; /* how many forks this process descends from, since the import */
    static void kv_count_fork(void) { kv_forks++; }
    static int kv_watch_forks(void) { return pthread_atfork(NULL, NULL, kv_count_fork); }
    """
    long kv_forks
    int kv_watch_forks() noexcept

# Bytes locked, far behind the end of any object.
cdef int64_t LOCK_USERS = <int64_t>1 << 40

LOCK_USERS_OFFSET = LOCK_USERS
MAX_LEADERS, MAX_RANKS = KV_LEADERS, KV_RANKS
FORMAT_VERSION = KV_FORMAT_VERSION
FORMAT = f"{KV_FORMAT_VERSION}/{KV_LAYOUT_CHECK:#x}"

COUNTER_NAMES = (
    "lookups", "lookup_blocks", "matched_blocks", "reserved", "published", "evicted", "abandoned",
    "deduplicated", "stores", "loads", "stores_failed", "loads_failed", "blocks_stored",
    "blocks_loaded", "bytes_stored", "bytes_loaded", "store_ns", "load_ns", "skipped_no_slot",
    "skipped_no_operation", "declined", "index_full", "stale_entries", "check_failures",
    "recoveries", "matched_tokens", "errors", "resets", "lookup_probes", "stores_cancelled",
    "loads_cancelled", "evicted_capacity", "evicted_cleared", "evicted_unreadable", "recovered",
    "cpu_ns",
)

cdef int64_t line_lock(uint32_t line) noexcept nogil:
    """Offset of the lock that is a participant's liveness."""
    return LOCK_USERS + 4096 + line


cdef int64_t recovery_lock() noexcept nogil:
    """Offset of the lock that makes its holder the one who recovers."""
    return LOCK_USERS + 1


_open_segments = weakref.WeakSet()


class Shape(NamedTuple):
    """Sizes that fix a segment's layout; counts, not bytes."""

    block_capacity: int
    host_slots: int
    disk_slots: int
    ranks: int
    block_tokens: int
    index_buckets: int
    private_instance: bool


def shape_for(host_slots: int, disk_slots: int, ranks: int, block_tokens: int,
              private_instance: bool) -> Shape:
    """Sizes of a segment for these tiers.

    A block record exists for every slot of every tier. The index has four times as many entries as
    records, rounded up to a power of two buckets of eight, so it stays at most a quarter to a half
    full.
    """
    records = host_slots + disk_slots
    buckets = 1
    while buckets * 8 < records * 2:
        buckets *= 2
    return Shape(records, host_slots, disk_slots, ranks, block_tokens, buckets, private_instance)


cdef int shape_to_c(object shape, kv_shape *c) except -1:
    memset(c, 0, sizeof(kv_shape))
    c.block_capacity = shape.block_capacity
    c.host_slots = shape.host_slots
    c.disk_slots = shape.disk_slots
    c.ranks = shape.ranks
    c.block_tokens = shape.block_tokens
    c.index_buckets = shape.index_buckets
    c.private_instance = shape.private_instance
    return 0


def segment_bytes(shape: Shape) -> int:
    """Size in bytes of a segment of this shape.

    Raises
    ------
    ValueError
        A size is out of bounds.
    """
    cdef kv_shape c
    cdef kv_view view
    shape_to_c(shape, &c)
    cdef uint64_t total = kv_view_init(&view, NULL, &c)
    if total == 0:
        raise ValueError(f"segment sizes are out of bounds: {shape}")
    return total


cdef class Segment:
    """A mapped segment. Made by `Segment.create` or `Segment.attach`."""

    def __cinit__(self):
        self.fd = -1
        self.base = NULL
        self.view.self = self.view.leader = KV_NONE
        self.forks = kv_forks

    cdef int map_file(self, int fd, size_t size, bint writable) except -1:
        # All pages are mapped now: a page fault in the scheduler costs more than a look-up.
        cdef int flags = MAP_SHARED | MAP_POPULATE if writable else MAP_SHARED
        cdef void *p = mmap(NULL, size, PROT_READ | PROT_WRITE if writable else PROT_READ,
                            flags, fd, 0)
        if p == MAP_FAILED:
            raise OSError(f"cannot map {size} bytes of {self.name}")
        self.base = <uint8_t *>p
        self.mapped_bytes = size
        self.fd = fd
        self.writable = writable
        return 0

    @staticmethod
    def create(name: str, shape: Shape, fingerprint: bytes, description: bytes,
               group: int | None = None) -> Segment:
        """Create the segment; its memory is reserved before this returns.

        Parameters
        ----------
        name : str
            Name of the shared-memory object, with the leading slash.
        shape : Shape
            Sizes, in blocks, slots, ranks and tokens.
        fingerprint : bytes
            32 bytes; hash of all that must be equal for bytes to be reusable.
        description : bytes
            What the fingerprint was made of, for error messages and the viewer; at most 2,047
            bytes.
        group : int, optional
            Group id that is to own the object, and whose members may attach.

        Raises
        ------
        FileExistsError
            The object exists.
        OSError
            Not enough room (ENOSPC) or no permission.
        """
        cdef Segment self = Segment.__new__(Segment)
        cdef kv_shape c
        cdef kv_header *h
        cdef int pool
        cdef bytes nonce = os.urandom(8)
        cdef bytes text = bytes(description[:KV_DESCRIPTION_BYTES - 1])
        cdef bytes print_bytes = bytes(fingerprint)
        if len(print_bytes) != KV_FINGERPRINT_BYTES:
            raise ValueError(
                f"a fingerprint has {KV_FINGERPRINT_BYTES} bytes, not {len(print_bytes)}")
        size = segment_bytes(shape)
        shape_to_c(shape, &c)
        self.name = name
        fd = open_object(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, group=group)
        try:
            if lock_take(fd, LOCK_USERS, False) != 1 or os.fstat(fd).st_nlink == 0:
                raise FileExistsError(f"shared memory {name} is just being removed")
            os.posix_fallocate(fd, 0, size)
            self.map_file(fd, size, True)
        except FileExistsError:
            os.close(fd)
            raise
        except BaseException:
            os.close(fd)
            os.unlink(object_path(name))
            raise
        kv_view_init(&self.view, self.base, &c)
        h = self.view.header
        h.format_version = KV_FORMAT_VERSION
        h.layout_check = KV_LAYOUT_CHECK
        h.shape = c
        h.total_bytes = size
        memcpy(&h.nonce, <const char *>nonce, 8)
        h.created_ns = time.time_ns()
        memcpy(h.fingerprint, <const char *>print_bytes, KV_FINGERPRINT_BYTES)
        memcpy(h.description, <const char *>text, len(text))
        h.shape.check = kv_header_check(h)
        kv_u64_store_relaxed(&h.tick, 1)
        for pool in range(KV_POOLS):
            pool_fill(&self.view, pool)
        kv_u64_store_release(&h.magic, KV_MAGIC)
        _open_segments.add(self)
        return self

    @staticmethod
    def attach(name: str, writable: bool = True, group: int | None = None) -> Segment:
        """Map an existing segment after checking that it is one and that this build understands it.

        Parameters
        ----------
        name : str
            Name of the shared-memory object, with the leading slash.
        writable : bool
            False: for reading alone, whoever owns it.
        group : int, optional
            Group id whose members are trusted beside this process's user.

        Raises
        ------
        FileNotFoundError
            There is no such object.
        PermissionError
            It is not ours (kvbm/_fast/objects.py).
        SegmentFault
            Its creator has not finished ("not ready"), its format is another one ("version"), or
            its contents contradict each other ("corrupt").
        """
        cdef Segment self = Segment.__new__(Segment)
        cdef kv_shape shape
        self.name = name
        fd = open_object(name, os.O_RDWR if writable else os.O_RDONLY, group=group,
                         trusted=writable)
        try:
            if lock_take(fd, LOCK_USERS, False) != 1:
                raise SegmentFault("not ready", f"{name} is being removed or created")
            state = os.fstat(fd)
            if state.st_nlink == 0:
                raise FileNotFoundError(f"shared memory {name} has been removed")
            if state.st_size < KV_PAGE:
                raise SegmentFault(
                    "not ready",
                    f"{name} has {state.st_size} bytes; its creator has not sized it yet")
            # Read twice: the first look at the magic comes before the look at what it vouches for.
            self.check_header(os.pread(fd, 8, 0), os.pread(fd, KV_PAGE, 0), state)
            shape = self.view.shape
            self.map_file(fd, state.st_size, writable)
        except BaseException:
            os.close(fd)
            raise
        kv_view_init(&self.view, self.base, &shape)
        _open_segments.add(self)
        return self

    cdef int check_header(self, bytes magic, bytes page, object state) except -1:
        """Check a private copy of the header before anything is mapped; keeps its sizes."""
        cdef kv_header h
        cdef kv_shape shape
        cdef uint64_t size = state.st_size
        memcpy(&h, <const char *>page, sizeof(h))
        if int.from_bytes(magic, "little") != KV_MAGIC:
            raise SegmentFault(
                "not ready", f"{self.name} carries no magic; its creator has not finished, or died")
        if h.format_version != KV_FORMAT_VERSION or h.layout_check != KV_LAYOUT_CHECK:
            found = f"{h.format_version}/{h.layout_check:#x}"
            raise SegmentFault("version", f"{self.name} has format {found}, this build needs "
                               f"{FORMAT}", found)
        if h.shape.check != kv_header_check(&h):
            raise SegmentFault("corrupt", f"the header of {self.name} fails its checksum")
        shape = h.shape
        if kv_view_init(&self.view, NULL, &shape) != size or h.total_bytes != size:
            raise SegmentFault("corrupt",
                               f"{self.name} has {size} bytes, its header describes another size")
        if state.st_blocks * 512 < size:  # or mapping it would fill the machine's memory
            raise SegmentFault("corrupt", f"{self.name} has holes; its creator leaves none")
        return 0

    cdef int check_open(self) except -1:
        if self.base == NULL:
            raise SegmentFault("closed", f"segment {self.name} is closed")
        if self.forks != kv_forks:
            raise SegmentFault("closed",
                               f"segment {self.name} was mapped before a fork; attach again")
        return 0

    cdef int check_writable(self) except -1:
        self.check_open()
        if not self.writable:
            raise PermissionError(f"segment {self.name} is attached for reading only")
        return 0

    # ---- identity --------------------------------------------------------------------------------
    @property
    def shape(self) -> Shape:
        """Sizes, as they were when this process attached."""
        cdef kv_shape *s = &self.view.shape
        return Shape(s.block_capacity, s.host_slots, s.disk_slots, s.ranks, s.block_tokens,
                     s.index_buckets, bool(s.private_instance))

    @property
    def fingerprint(self) -> bytes:
        """32 bytes; what must be equal for the cached bytes to be reusable."""
        self.check_open()
        return self.view.header.fingerprint[:KV_FINGERPRINT_BYTES]

    @property
    def description(self) -> bytes:
        """What the fingerprint was made of (JSON), up to the first zero byte."""
        self.check_open()
        return (<bytes>self.view.header.description[:KV_DESCRIPTION_BYTES]).split(b"\0", 1)[0]

    @property
    def nonce(self) -> int:
        """Random number of this content; arenas that belong to it carry it too."""
        self.check_open()
        return self.view.header.nonce

    @property
    def created_ns(self) -> int:
        """Creation time, nanoseconds since the epoch."""
        self.check_open()
        return self.view.header.created_ns

    @property
    def total_bytes(self) -> int:
        """Size of the object in bytes."""
        return self.view.total_bytes

    @property
    def leader(self) -> int | None:
        """Leader slot whose bit and operations this process uses, None before a claim."""
        return None if self.view.leader == KV_NONE else self.view.leader

    @property
    def recovering(self) -> bool:
        """True while somebody recovers, or after a recoverer died: call `recovery.recover`."""
        self.check_open()
        return kv_u32_load_acquire(&self.view.header.recovering) != 0

    @property
    def key_epoch(self) -> int:
        """Mixed into digests; grows by one at each reset."""
        self.check_open()
        return kv_u32_load_acquire(&self.view.header.key_epoch)

    def has_other_users(self) -> bool:
        """True if another open file has this segment attached."""
        self.check_open()
        if lock_take(self.fd, LOCK_USERS, True) != 1:
            return True
        lock_take(self.fd, LOCK_USERS, False)  # back to shared; nobody can have come in between
        return False

    # ---- numbers ---------------------------------------------------------------------------------
    def counters(self) -> dict[str, int]:
        """Counters, summed over all participants that ever used a line."""
        cdef uint32_t line
        cdef int i
        cdef uint64_t total[KV_COUNTERS]
        self.check_open()
        memset(total, 0, sizeof(total))
        for line in range(KV_PARTICIPANTS):
            for i in range(KV_COUNTERS):
                total[i] += kv_u64_load_relaxed(&self.view.counters[line].value[i])
        return {name: total[i] for i, name in enumerate(COUNTER_NAMES)}

    def free_blocks(self) -> int:
        """Free block records, counted; a moving target while others work."""
        self.check_open()
        return pool_free_count(&self.view, KV_POOL_BLOCKS)

    def ready_slots(self, rank: int) -> int:
        """Host slots whose memory is usable on a rank."""
        self.check_open()
        if not 0 <= rank < self.view.shape.ranks:
            raise IndexError(f"rank {rank} is outside 0..{self.view.shape.ranks - 1}")
        return kv_u32_load_acquire(&self.view.header.ready_slots[rank])

    def set_ready_slots(self, rank: int, count: int) -> None:
        """Publish that the first `count` host slots of a rank's arena are usable.

        Never fewer than before: another engine's worker of the same rank may have reserved more of
        the same arena already.
        """
        self.check_writable()
        if not 0 <= rank < self.view.shape.ranks or not 0 <= count <= self.view.shape.host_slots:
            raise IndexError(f"rank {rank}, count {count} is out of bounds")
        if <uint32_t>count > kv_u32_load_acquire(&self.view.header.ready_slots[rank]):
            kv_u32_store_release(&self.view.header.ready_slots[rank], count)

    # ---- end -------------------------------------------------------------------------------------
    def release_line(self) -> None:
        """Give the own line back.

        The line of a leader that still holds blocks, or whose operations are not all collected,
        stays marked as used: without its lock it counts as dead, and the next recovery returns what
        it holds.
        """
        self.check_open()
        if self.view.self == KV_NONE:
            return
        if self.view.self != self.view.leader or leader_holds_nothing(&self.view):
            kv_u32_store_release(&self.view.participants[self.view.self].role, KV_ROLE_NONE)
        lock_drop(self.fd, line_lock(self.view.self))
        self.view.self = self.view.leader = KV_NONE

    def close(self) -> None:
        """Detach; may be called twice. The object stays until it is unlinked."""
        if self.base != NULL:
            if self.forks == kv_forks and self.view.self != KV_NONE:
                self.release_line()
            munmap(self.base, self.mapped_bytes)
            self.base = NULL
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __dealloc__(self):
        if self.base != NULL:
            munmap(self.base, self.mapped_bytes)
            self.base = NULL
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _forget_after_fork() -> None:
    """In a forked child: drop the copies.

    Otherwise the child would keep the parent's locks alive.
    """
    cdef Segment segment
    for segment in list(_open_segments):
        segment.close()


if kv_watch_forks() != 0:
    raise MemoryError("no memory for a handler of forks")
os.register_at_fork(after_in_child=_forget_after_fork)
