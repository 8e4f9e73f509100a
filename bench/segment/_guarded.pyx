# SPDX-License-Identifier: Apache-2.0
"""The baseline: a table in shared memory behind one mutex.

A hash table of the digests, a list in the order of return, a list of free slots, and a process-
shared mutex that is taken for each step. It has no tree, no children, no generations and nothing to
recover by: a process that dies inside leaves it broken. What it does is what the block table's
steps do of the same chains, compiled with the same flags and timed by the same clock.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset
from posix.time cimport CLOCK_THREAD_CPUTIME_ID, clock_gettime, timespec

from kvbm._fast.blocks cimport monotonic_ns
from kvbm._fast.layout cimport kv_digest_hash


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_mutexattr_t:
        pass
    int PTHREAD_PROCESS_SHARED
    int pthread_mutexattr_init(pthread_mutexattr_t *attributes)
    int pthread_mutexattr_setpshared(pthread_mutexattr_t *attributes, int shared)
    int pthread_mutex_init(pthread_mutex_t *mutex, const pthread_mutexattr_t *attributes)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)

cdef enum:
    NOTHING = 0xFFFFFFFF
    FREE = 0
    RESERVED = 1
    REGISTERED = 2

cdef struct Item:                # a slot
    uint64_t lo, hi
    uint32_t chain               # next in its hash chain, or of the free list
    uint32_t older, newer        # in the order of return; only while nobody holds it
    uint32_t holders
    uint32_t state
    uint32_t pad

cdef struct Head:
    pthread_mutex_t mutex
    uint32_t capacity, mask
    uint32_t free, oldest, newest


cdef uint64_t cpu_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now)
    return <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec


cdef uint32_t buckets_for(uint32_t capacity) noexcept nogil:
    cdef uint32_t buckets = 1
    while buckets < capacity:
        buckets *= 2
    return buckets


def table_bytes(capacity: int) -> int:
    """Size of a table of that many slots."""
    return 4096 + buckets_for(capacity) * sizeof(uint32_t) + <uint64_t>capacity * sizeof(Item)


cdef class Guarded:
    """A process's handle on the table.

    Parameters
    ----------
    memory : buffer
        Shared by all processes, `table_bytes` long.
    capacity : int
        Slots.
    create : bool
        Whether this process makes the table.
    refs : array of uint64
        Where the steps keep what they reserved; as long as the longest call.
    """
    cdef unsigned char[::1] memory
    cdef Head *head
    cdef uint32_t *buckets
    cdef Item *items
    cdef uint64_t[::1] refs
    cdef readonly uint64_t cpu   # processor time of the last call, in nanoseconds

    def __init__(self, unsigned char[::1] memory, uint32_t capacity, bint create,
                 uint64_t[::1] refs):
        cdef pthread_mutexattr_t attributes
        cdef uint32_t i, count = buckets_for(capacity)
        self.memory = memory
        self.refs = refs
        self.head = <Head *>&memory[0]
        self.buckets = <uint32_t *>&memory[4096]
        self.items = <Item *>&memory[4096 + <uint64_t>count * sizeof(uint32_t)]
        if not create:
            return
        pthread_mutexattr_init(&attributes)
        pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED)
        pthread_mutex_init(&self.head.mutex, &attributes)
        self.head.capacity, self.head.mask = capacity, count - 1
        self.head.oldest = self.head.newest = NOTHING
        memset(self.buckets, 0xff, count * sizeof(uint32_t))
        for i in range(capacity):
            self.items[i].chain = i + 1 if i + 1 < capacity else NOTHING
        self.head.free = 0

    # ---- what is done under the mutex ------------------------------------------------------------
    cdef uint32_t find(self, uint64_t lo, uint64_t hi) noexcept nogil:
        cdef uint32_t i = self.buckets[<uint32_t>kv_digest_hash(lo, hi) & self.head.mask]
        while i != NOTHING and (self.items[i].lo != lo or self.items[i].hi != hi):
            i = self.items[i].chain
        return i

    cdef uint32_t drop_oldest(self) noexcept nogil:
        """Take the least recently returned slot out of the table."""
        cdef uint32_t i = self.head.oldest
        cdef uint32_t *at
        cdef Item *item = &self.items[i]
        if i == NOTHING:
            return NOTHING
        self.head.oldest = item.newer
        if item.newer == NOTHING:
            self.head.newest = NOTHING
        else:
            self.items[item.newer].older = NOTHING
        at = &self.buckets[<uint32_t>kv_digest_hash(item.lo, item.hi) & self.head.mask]
        while at[0] != i:
            at = &self.items[at[0]].chain
        at[0] = item.chain
        item.state = FREE
        return i

    cdef bint evict_one(self) noexcept nogil:
        cdef uint32_t i = self.drop_oldest()
        if i == NOTHING:
            return False
        self.items[i].chain = self.head.free
        self.head.free = i
        return True

    cdef uint32_t reserve_one(self, uint64_t lo, uint64_t hi) noexcept nogil:
        cdef uint32_t i, bucket = <uint32_t>kv_digest_hash(lo, hi) & self.head.mask
        if self.find(lo, hi) != NOTHING:
            return NOTHING
        i = self.head.free
        if i != NOTHING:
            self.head.free = self.items[i].chain
        else:
            i = self.drop_oldest()
            if i == NOTHING:
                return NOTHING
        self.items[i].lo, self.items[i].hi = lo, hi
        self.items[i].state, self.items[i].holders = RESERVED, 1
        self.items[i].chain = self.buckets[bucket]
        self.buckets[bucket] = i
        return i

    cdef void unpin_one(self, uint32_t i) noexcept nogil:
        cdef Item *item = &self.items[i]
        item.holders -= 1
        if item.holders != 0:
            return
        item.newer, item.older = NOTHING, self.head.newest
        if self.head.newest == NOTHING:
            self.head.oldest = i
        else:
            self.items[self.head.newest].newer = i
        self.head.newest = i

    # ---- steps, each timed -----------------------------------------------------------------------
    def evict(self, uint32_t[::1] spent) -> None:
        """Put the slots that were returned first on the free list."""
        cdef Py_ssize_t i
        cdef uint64_t now, cpu = cpu_ns(), last = monotonic_ns()
        cdef bint done = True
        for i in range(spent.shape[0]):
            pthread_mutex_lock(&self.head.mutex)
            done &= self.evict_one()
            pthread_mutex_unlock(&self.head.mutex)
            now = monotonic_ns()
            spent[i] = <uint32_t>min(now - last, 0xFFFFFFFF)
            last = now
        self.cpu = cpu_ns() - cpu
        if not done:
            raise RuntimeError("nothing can be evicted")

    def reserve(self, const uint64_t[:, ::1] keys, uint32_t[::1] spent) -> None:
        """Reserve a new chain, from the free list or with an eviction for each block."""
        cdef Py_ssize_t i
        cdef uint64_t now, cpu = cpu_ns(), last = monotonic_ns()
        cdef bint done = True
        for i in range(spent.shape[0]):
            pthread_mutex_lock(&self.head.mutex)
            self.refs[i] = self.reserve_one(keys[i, 0], keys[i, 1])
            pthread_mutex_unlock(&self.head.mutex)
            done &= self.refs[i] != NOTHING
            now = monotonic_ns()
            spent[i] = <uint32_t>min(now - last, 0xFFFFFFFF)
            last = now
        self.cpu = cpu_ns() - cpu
        if not done:
            raise RuntimeError("a block cannot be reserved")

    def publish(self, uint32_t[::1] spent) -> None:
        """Register what the last `reserve` has reserved."""
        cdef Py_ssize_t i
        cdef uint64_t now, cpu = cpu_ns(), last = monotonic_ns()
        for i in range(spent.shape[0]):
            pthread_mutex_lock(&self.head.mutex)
            self.items[self.refs[i]].state = REGISTERED
            pthread_mutex_unlock(&self.head.mutex)
            now = monotonic_ns()
            spent[i] = <uint32_t>min(now - last, 0xFFFFFFFF)
            last = now
        self.cpu = cpu_ns() - cpu

    def unpin(self, uint32_t[::1] spent) -> None:
        """Return the chain, its end first; it can be evicted from now on."""
        cdef Py_ssize_t i, count = spent.shape[0]
        cdef uint64_t now, cpu = cpu_ns(), last = monotonic_ns()
        for i in range(count):
            pthread_mutex_lock(&self.head.mutex)
            self.unpin_one(<uint32_t>self.refs[count - 1 - i])
            pthread_mutex_unlock(&self.head.mutex)
            now = monotonic_ns()
            spent[i] = <uint32_t>min(now - last, 0xFFFFFFFF)
            last = now
        self.cpu = cpu_ns() - cpu

    def match(self, const uint64_t[:, ::1] keys, uint32_t[::1] spent) -> int:
        """Walk a chain until the first block that is missing, without holding any. One sample."""
        cdef Py_ssize_t i, count = 0
        cdef uint32_t found
        cdef uint64_t cpu = cpu_ns(), last = monotonic_ns()
        pthread_mutex_lock(&self.head.mutex)
        for i in range(keys.shape[0]):
            found = self.find(keys[i, 0], keys[i, 1])
            if found == NOTHING or self.items[found].state != REGISTERED:
                break
            count += 1
        pthread_mutex_unlock(&self.head.mutex)
        spent[0] = <uint32_t>min(monotonic_ns() - last, 0xFFFFFFFF)
        self.cpu = cpu_ns() - cpu
        return count
