# SPDX-License-Identifier: Apache-2.0
"""The host tier's memory: one arena a rank, in shared memory.

An arena `/kvbm-<instance>.host.<rank>` begins with a page of its own, which is also how a worker
announces itself: as soon as a worker knows its KV cache, it makes the arena with this page alone,
and the leader, which sizes the tier from what all ranks say, finds it there. The worker then
reserves the memory piece by piece in the background and publishes how many slots are usable, so
that the engine serves at once and a full `/dev/shm` is an error message and never a fault at the
first access.

Header page (little endian, the rest zero), written in one go::

    0   8s   magic           b"kvbmarn1"
    8   u32  rank            16  u64  bytes per block of this rank
    12  u32  ranks           24  u64  device blocks
    32  u64  nonce of the segment that its content belongs to, 0 = none yet
    40  32s  geometry        what must be equal for the bytes to be reusable
    72  u64  checksum        first 8 bytes of BLAKE2b over bytes 0 to 71
"""

import contextlib
import errno
import hashlib
import logging
import mmap
import os
import struct
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kvbm._fast.locks import try_lock
from kvbm._fast.memory import populate
from kvbm._fast.objects import open_object
from kvbm._fast.segment import LOCK_USERS_OFFSET
from kvbm.config.sizes import how_to_make_room
from kvbm.errors import LeaderTimeout, SegmentAccessDenied, SegmentInUse
from kvbm.instance import SHARED_MEMORY, arena_name, cannot_make

logger = logging.getLogger(__name__)

MAGIC = b"kvbmarn1"
PAGE_BYTES = 4096
RESERVE_BYTES = 64 << 20
"""Memory reserved in one go, in bytes: about 30 ms of zeroing."""

RESERVE_THREADS_MAX = 4
"""More make it no faster: 0.66 s a GiB with one, 0.20 with four, 0.22 with eight (16 cores)."""

TELL_SECS = 10.0
"""How long workers are waited for in silence."""

_HEADER = struct.Struct("<8sIIQQQ32s")
_POLL_SECS = 0.01
_open_arenas: "weakref.WeakSet[HostArena]" = weakref.WeakSet()
OPEN_SECS = 10.0
"""Longest wait for a process that removes the object, or begins it anew, at this moment."""


@dataclass(frozen=True)
class ArenaHeader:
    """What a rank's worker says about itself.

    Attributes
    ----------
    rank, ranks : int
        This rank, and how many there are.
    bytes_per_block : int
        Bytes of one block on this rank, all layers.
    device_blocks : int
        Blocks of the engine's own KV cache.
    nonce : int
        Of the segment that the content belongs to; 0 for a new arena.
    geometry : bytes
        32 bytes; hash of the shape of a block.
    """

    rank: int
    ranks: int
    bytes_per_block: int
    device_blocks: int
    nonce: int
    geometry: bytes

    def pack(self) -> bytes:
        """Return the header page."""
        fields = _HEADER.pack(
            MAGIC,
            self.rank,
            self.ranks,
            self.bytes_per_block,
            self.device_blocks,
            self.nonce,
            self.geometry,
        )
        return (fields + hashlib.blake2b(fields, digest_size=8).digest()).ljust(PAGE_BYTES, b"\0")

    @classmethod
    def unpack(cls, page: bytes) -> "ArenaHeader | None":
        """Read a header page; None if it is not one: not written yet, or damaged."""
        fields = page[: _HEADER.size]
        if len(fields) < _HEADER.size or fields[:8] != MAGIC:
            return None
        if page[_HEADER.size : _HEADER.size + 8] != hashlib.blake2b(fields, digest_size=8).digest():
            return None
        return cls(*_HEADER.unpack(fields)[1:])


def reserve_threads() -> int:
    """Threads that reserve an arena: half of the processors that this process may use."""
    return max(1, min(RESERVE_THREADS_MAX, len(os.sched_getaffinity(0)) // 2))


def _move_thread(cpus: frozenset[int]) -> None:
    """Keep the calling thread on these processors; anywhere if there are none, or none allowed."""
    if cpus:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cpus)


def _open_locked(name: str, group: int | None) -> int:
    """Open or make an arena object and take a user's lock on it.

    A process that removes an unused object, or begins it anew, holds the exclusive lock meanwhile;
    then, and when the object that was opened has lost its name, the next turn makes a new one.
    """
    deadline = time.monotonic() + OPEN_SECS
    while True:
        try:
            fd = open_object(name, os.O_RDWR | os.O_CREAT, group=group)
        except PermissionError as error:
            raise SegmentAccessDenied(name, error.strerror or "") from None
        except OSError as error:
            raise cannot_make(name, PAGE_BYTES, error) from error
        if try_lock(fd, LOCK_USERS_OFFSET, exclusive=False) and os.fstat(fd).st_nlink > 0:
            return fd
        os.close(fd)
        if time.monotonic() > deadline:
            raise SegmentInUse(name, "another process is removing it, and does not end")
        time.sleep(0.001)


class HostArena:
    """One rank's arena.

    Parameters
    ----------
    instance : str
        Name of the instance.
    header : ArenaHeader
        What this rank announces; its nonce is ignored.
    exclusive : bool
        The instance is private: another live user is an error.
    group : int or None
        Group id whose members may use it, too.

    Raises
    ------
    SegmentInUse
        Another process uses the arena and it must not, or describes another block.
    SegmentAccessDenied
        The object belongs to another user, or others may write it.
    SegmentError
        There is no room for its first page, or shared memory is read-only.
    """

    def __init__(
        self,
        instance: str,
        header: ArenaHeader,
        *,
        exclusive: bool,
        group: int | None = None,
    ) -> None:
        self.name = arena_name(instance, header.rank)
        self._fd = _open_locked(self.name, group)
        self._map: mmap.mmap | None = None
        try:
            self.header = self._settle(header, exclusive)
        except OSError as error:
            os.close(self._fd)
            raise cannot_make(self.name, PAGE_BYTES, error) from error
        except BaseException:
            os.close(self._fd)
            raise
        _open_arenas.add(self)

    def _settle(self, header: ArenaHeader, exclusive: bool) -> ArenaHeader:
        """Adopt the object's content if it is for the same block, else begin anew."""
        found = ArenaHeader.unpack(os.pread(self._fd, PAGE_BYTES, 0))
        same = found is not None and (
            (found.rank, found.ranks, found.bytes_per_block, found.geometry)
            == (header.rank, header.ranks, header.bytes_per_block, header.geometry)
        )
        alone = try_lock(self._fd, LOCK_USERS_OFFSET, exclusive=True)
        if not alone and (exclusive or (found is not None and not same)):
            raise SegmentInUse(
                self.name, "another engine uses it, for another model or layout, or privately"
            )
        nonce = found.nonce if found is not None and same else 0
        settled = ArenaHeader(
            header.rank,
            header.ranks,
            header.bytes_per_block,
            header.device_blocks,
            nonce,
            header.geometry,
        )
        if alone and not same:
            os.ftruncate(self._fd, 0)
        if alone or found is None:  # two that start at once both write, and both write the same
            os.pwrite(self._fd, settled.pack(), 0)
        try_lock(self._fd, LOCK_USERS_OFFSET, exclusive=False)
        return settled

    def belong_to(self, nonce: int) -> None:
        """Mark the content as belonging to a segment."""
        self.header = ArenaHeader(
            self.header.rank,
            self.header.ranks,
            self.header.bytes_per_block,
            self.header.device_blocks,
            nonce,
            self.header.geometry,
        )
        os.pwrite(self._fd, self.header.pack(), 0)

    def map(self, total_bytes: int) -> mmap.mmap:
        """Size the object and map all of it; memory is reserved by `reserve`, not here."""
        if os.fstat(self._fd).st_size != total_bytes:
            os.ftruncate(self._fd, total_bytes)
        # A mapping keeps its open file, and with it the file's locks, until it is unmapped, which a
        # forked child cannot do while something refers to the memory. So it gets a file of its own,
        # without a lock.
        unlocked = os.open(f"/proc/self/fd/{self._fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(unlocked, total_bytes)
        finally:
            os.close(unlocked)
        # Only where /dev/shm is mounted with huge=advise; with huge=always they come by themselves.
        with contextlib.suppress(OSError):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        return self._map

    def reserve(
        self,
        reserved: Callable[[int], None],
        stopping: Callable[[], bool],
        cpus: frozenset[int] = frozenset(),
    ) -> bool:
        """Reserve the arena's memory from the front, piece by piece.

        Parameters
        ----------
        reserved : callable
            Called with the number of bytes reserved so far.
        stopping : callable
            Asked between pieces; True ends it early.
        cpus : frozenset of int
            Processors on which threads touch the memory, and near which it comes to lie; any if
            there are none.

        Returns
        -------
        bool
            True if all of it is reserved.
        """
        state = os.fstat(self._fd)
        total = state.st_size
        if state.st_blocks * 512 >= total:  # a restart, or another engine: it is all there
            reserved(total)
            return True
        threads = reserve_threads()
        done = problem = 0
        with ThreadPoolExecutor(threads, "kvbm-reserve", _move_thread, (cpus,)) as pool:
            while done < total and not problem and not stopping():
                starts = range(done, min(total, done + threads * RESERVE_BYTES), RESERVE_BYTES)
                for problem in pool.map(lambda at: self._touch(at, total), starts):
                    if problem:
                        break
                    done = min(total, done + RESERVE_BYTES)
                    reserved(done)
        if problem:  # no thread reserves any more
            self._give_back(done, total)
            self._tell_full(problem, done, total)
        return done >= total

    def _give_back(self, done: int, total: int) -> None:
        """Free what was reserved beyond `done`, unless another engine has the arena.

        Others who find shared memory full to its last page (the engine's own queues, collectives)
        end by a signal.
        """
        if self._map is None or not try_lock(self._fd, LOCK_USERS_OFFSET, exclusive=True):
            return
        with contextlib.suppress(OSError):
            self._map.madvise(mmap.MADV_REMOVE, done, total - done)
        try_lock(self._fd, LOCK_USERS_OFFSET, exclusive=False)

    def _touch(self, at: int, total: int) -> int:
        """Reserve one piece; returns 0 or the system's error number."""
        size = min(RESERVE_BYTES, total - at)
        problem = errno.EINVAL if self._map is None else populate(self._map, at, size)
        if problem == errno.EINVAL:  # Linux before 5.14
            try:
                os.posix_fallocate(self._fd, at, size)
            except OSError as error:
                return error.errno or errno.EIO
            return 0
        return problem

    def _tell_full(self, problem: int, done: int, total: int) -> None:
        logger.error(
            "%s: no more memory in %s after %d of %d bytes (%s); the host tier stays at this size. "
            "%s",
            self.name,
            SHARED_MEMORY,
            done,
            total,
            # What a page fault that finds no room is called (madvise).
            os.strerror(errno.ENOSPC if problem == errno.EFAULT else problem),
            how_to_make_room(total - done),
        )

    def close(self) -> None:
        """Unmap and drop the user's lock; may be called twice. The object stays.

        Where something still refers to the memory (a traceback that somebody keeps), the mapping
        goes with that.
        """
        if self._map is not None:
            with contextlib.suppress(BufferError):
                self._map.close()
            self._map = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_header(instance: str, rank: int, group: int | None = None) -> ArenaHeader | None:
    """Header of a rank's arena; None while there is none.

    Raises
    ------
    SegmentAccessDenied
        The object belongs to another user, or others may write it.
    """
    name = arena_name(instance, rank)
    try:
        fd = open_object(name, os.O_RDONLY, group=group)
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise SegmentAccessDenied(name, error.strerror or "") from None
    try:
        return ArenaHeader.unpack(os.pread(fd, PAGE_BYTES, 0))
    finally:
        os.close(fd)


def wait_for_headers(
    instance: str, ranks: int, timeout_secs: float, group: int | None = None
) -> list[ArenaHeader]:
    """Headers of all ranks' arenas, as soon as all workers have announced themselves.

    Raises
    ------
    SegmentAccessDenied
        An arena belongs to another user, or others may write it.
    LeaderTimeout
        Some rank has not after `timeout_secs`; it names the ranks.
    """
    began = time.monotonic()
    told = False
    while True:
        headers = [read_header(instance, rank, group) for rank in range(ranks)]
        found = [header for header in headers if header is not None]
        if len(found) == ranks:
            return found
        waited = time.monotonic() - began
        missing = [rank for rank, header in enumerate(headers) if header is None]
        if waited > timeout_secs:
            raise LeaderTimeout(timeout_secs, missing, ranks)
        if waited > TELL_SECS and not told:
            told = True
            logger.warning(
                "%d of %d workers have not announced themselves in %s (ranks %s); they must share "
                "it with this process, and are waited for until "
                "DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS=%s",
                len(missing),
                ranks,
                SHARED_MEMORY,
                ", ".join(map(str, missing)),
                timeout_secs,
            )
        time.sleep(_POLL_SECS)


def _forget_after_fork() -> None:
    """In a forked child: drop the copies, which would keep the parent's locks alive."""
    for arena in list(_open_arenas):
        arena.close()


os.register_at_fork(after_in_child=_forget_after_fork)
