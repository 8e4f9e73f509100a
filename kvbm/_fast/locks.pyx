# SPDX-License-Identifier: Apache-2.0
"""Locks that the kernel drops when their holder dies: liveness without heartbeats.

Open file description locks (`F_OFD_SETLK`, Linux 3.15) on bytes far behind the end of a
shared-memory object. They belong to the open file, not to the process, so two participants in one
process do not disturb each other (POSIX record locks would), they hold across pid namespaces that
share the file system, and process ids, which are reused, play no part. A forked child shares the
open file and so keeps the lock: segments and arenas close their files in the child
(`os.register_at_fork` in kvbm/_fast/segment.pyx and kvbm/tiers/host.py).
"""
from libc.errno cimport EACCES, EAGAIN, errno
from libc.stdint cimport int64_t


cdef extern from *:
    """
    #include <fcntl.h>
    #include <string.h>
    #include <unistd.h>
    static int kv_ofd_lock(int fd, int command, short type, long long offset, short *found) {
        struct flock lock;
        int result;
        memset(&lock, 0, sizeof lock);
        lock.l_type = type;
        lock.l_whence = SEEK_SET;
        lock.l_start = (off_t)offset;
        lock.l_len = 1;
        result = fcntl(fd, command, &lock);
        *found = lock.l_type;
        return result;
    }
    """
    int kv_ofd_lock(int fd, int command, short type, long long offset, short *found) noexcept nogil
    int F_OFD_SETLK
    int F_OFD_GETLK
    short F_RDLCK
    short F_WRLCK
    short F_UNLCK


cdef int lock_take(int fd, int64_t offset, bint exclusive) noexcept nogil:
    """Try to lock one byte, without waiting.

    1 taken, 0 held by another open file, -1 error (errno).
    """
    cdef short found
    if kv_ofd_lock(fd, F_OFD_SETLK, F_WRLCK if exclusive else F_RDLCK, offset, &found) == 0:
        return 1
    return 0 if errno == EAGAIN or errno == EACCES else -1


cdef int lock_drop(int fd, int64_t offset) noexcept nogil:
    cdef short found
    return kv_ofd_lock(fd, F_OFD_SETLK, F_UNLCK, offset, &found)


cdef int lock_held_by_other(int fd, int64_t offset) noexcept nogil:
    """1 if another open file holds any lock on the byte, 0 if none does, -1 error (errno)."""
    cdef short found
    if kv_ofd_lock(fd, F_OFD_GETLK, F_WRLCK, offset, &found) != 0:
        return -1
    return 0 if found == F_UNLCK else 1


def try_lock(fd: int, offset: int, exclusive: bool) -> bool:
    """Try to lock byte `offset` of the open file `fd`; False if another open file holds it.

    Taking a shared lock where this file holds an exclusive one (or the other way round) converts
    it.

    Raises
    ------
    OSError
        The file system has no such locks, or `fd` is not open for what the lock needs.
    """
    cdef int result = lock_take(fd, offset, exclusive)
    if result < 0:
        raise OSError(errno, "cannot lock a shared-memory object")
    return result == 1


def unlock(fd: int, offset: int) -> None:
    """Drop the lock on byte `offset`; nothing happens when there is none."""
    lock_drop(fd, offset)


def held_by_other(fd: int, offset: int) -> bool:
    """True if another open file holds a lock on byte `offset`."""
    cdef int result = lock_held_by_other(fd, offset)
    if result < 0:
        raise OSError(errno, "cannot query a lock of a shared-memory object")
    return result == 1
