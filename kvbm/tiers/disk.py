# SPDX-License-Identifier: Apache-2.0
"""The disk tier's files: one slab a rank, of fixed size, reserved before it is used.

A named instance has files `kvbm-<instance>.disk.<rank>` in `DYN_KVBM_DISK_CACHE_DIR` that outlive
it, also a reboot: who opens one finds in its header table which slots hold a block. A private
instance has a file without a name, which the system removes with the process, however it ends.

The layout and the order of writes are described in ``kvbm/_fast/slab.h``. Superblock page (little
endian, the rest zero), written when everything behind it is in place::

    0   8s   magic      b"kvbmslb1"     24  u64  bytes of a block on this rank
    8   u32  version                    32  u64  bytes from one slot to the next
    12  u32  rank                       40  u64  nonce: another one, other content
    16  u32  ranks                      48  u32  key epoch
    20  u32  slots                      52  32s  fingerprint of the cache
    84  u64  checksum   first 8 bytes of BLAKE2b over bytes 0 to 83
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import mmap
import os
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbm._fast.locks import try_lock
from kvbm._fast.objects import open_file
from kvbm._fast.segment import LOCK_USERS_OFFSET
from kvbm._fast.slab import SLAB_HEADER, allocate_file, valid_headers
from kvbm.errors import SlabError
from kvbm.tiers.disk_problems import cannot_reserve, no_direct, no_room, not_writable

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Slab",
    "SlabFiles",
    "SlabLayout",
    "Superblock",
    "raise_slab_epoch",
    "read_slab",
    "slab_path",
]

logger = logging.getLogger(__name__)

MAGIC = b"kvbmslb1"
VERSION = 1
PAGE_BYTES = 4096
ZERO_BYTES = 16 << 20
SCAN_BYTES = 16 << 20
BUSY_POLL_SECS = 0.02

_SUPERBLOCK = struct.Struct("<8sIIIIQQQI32s")


def slab_path(folder: Path, instance: str, rank: int) -> Path:
    """Path of a named instance's slab."""
    return folder / f"kvbm-{instance}.disk.{rank}"


@dataclass(frozen=True)
class SlabLayout:
    """Where the parts of a slab lie: arithmetic only.

    Attributes
    ----------
    slots : int
        Number of slots.
    payload_bytes : int
        Bytes of one block on this rank.
    """

    slots: int
    payload_bytes: int

    @property
    def stride(self) -> int:
        """Bytes from one slot to the next: whole pages."""
        return _whole_pages(self.payload_bytes)

    @property
    def table_offset(self) -> int:
        """Where the first slot's header begins."""
        return PAGE_BYTES

    @property
    def data_offset(self) -> int:
        """Where the first slot's data begin."""
        return PAGE_BYTES + _whole_pages(self.slots * SLAB_HEADER.itemsize)

    @property
    def total_bytes(self) -> int:
        """Size of the file."""
        return self.data_offset + self.slots * self.stride


@dataclass(frozen=True)
class Superblock:
    """What a slab says about itself; see the module.

    Attributes
    ----------
    rank, ranks, slots, payload_bytes : int
        Whose it is, and its sizes.
    nonce : int
        Of this content.
    epoch : int
        Key epoch: what was written under an earlier one has been reset.
    fingerprint : bytes
        32 bytes, as the segment's.
    """

    rank: int
    ranks: int
    slots: int
    payload_bytes: int
    fingerprint: bytes
    nonce: int = 0
    epoch: int = 0

    @property
    def layout(self) -> SlabLayout:
        """Layout of the file."""
        return SlabLayout(self.slots, self.payload_bytes)

    @property
    def short_fingerprint(self) -> int:
        """The fingerprint as slot headers carry it."""
        return int.from_bytes(self.fingerprint[:8], "little")

    def fits(self, other: Superblock) -> bool:
        """Return whether content described by `other` can be used as this."""
        return replace(other, nonce=self.nonce, epoch=self.epoch) == self

    def pack(self) -> bytes:
        """Return the page."""
        fields = _SUPERBLOCK.pack(
            MAGIC,
            VERSION,
            self.rank,
            self.ranks,
            self.slots,
            self.payload_bytes,
            self.layout.stride,
            self.nonce,
            self.epoch,
            self.fingerprint,
        )
        return (fields + hashlib.blake2b(fields, digest_size=8).digest()).ljust(PAGE_BYTES, b"\0")

    @classmethod
    def unpack(cls, page: bytes) -> Superblock | None:
        """Read a page; None if it is not a superblock of this version."""
        fields = page[: _SUPERBLOCK.size]
        if len(fields) < _SUPERBLOCK.size:
            return None
        magic, version, rank, ranks, slots, payload, stride, nonce, epoch, fingerprint = (
            _SUPERBLOCK.unpack(fields)
        )
        checksum = hashlib.blake2b(fields, digest_size=8).digest()
        if page[_SUPERBLOCK.size : _SUPERBLOCK.size + 8] != checksum or magic != MAGIC:
            return None
        found = cls(rank, ranks, slots, payload, fingerprint, nonce, epoch)
        return found if version == VERSION and stride == found.layout.stride else None


@dataclass(frozen=True)
class SlabFiles:
    """How slabs are made; the settings of the disk tier.

    Attributes
    ----------
    folder : Path
        Where they lie; made if it is missing.
    direct : bool
        Read and write data past the page cache.
    open_direct : bool
        Open the file so, for file systems that ignore the later change.
    zerofill : bool
        Write zeros where the file system cannot reserve.
    group : int or None
        Group id whose members may use it, too.
    """

    folder: Path
    direct: bool = True
    open_direct: bool = False
    zerofill: bool = False
    group: int | None = None


def _never() -> bool:
    return False


class Slab:
    """One rank's open slab.

    Parameters
    ----------
    files : SlabFiles
        Where and how.
    wanted : Superblock
        What it is to be; its nonce and epoch are ignored.
    instance : str or None
        Name of the instance; None for a file without a name.
    stopping : callable
        Asked while the file is reserved; True ends it with an error.

    Attributes
    ----------
    superblock : Superblock
        What it is, with the nonce and the epoch of its content.
    adopted : bool
        It was there, with content that fits.
    data_fd, table_fd : int
        The file for data, with O_DIRECT where that is on, and for headers.
    alignment : int
        What addresses, offsets and lengths of data must be multiples of; 1 without O_DIRECT.

    Raises
    ------
    SlabError
        The file cannot be made or used; the message says what to change.
    """

    def __init__(
        self,
        files: SlabFiles,
        wanted: Superblock,
        instance: str | None = None,
        stopping: Callable[[], bool] = _never,
    ) -> None:
        self._files = files
        self._stopping = stopping
        self.path = None if instance is None else slab_path(files.folder, instance, wanted.rank)
        self.superblock = wanted
        self.adopted = False
        self.table_fd = self.data_fd = -1
        self.alignment = 1
        try:
            self._open(wanted)
        except BaseException as error:
            problem = self._problem(error, wanted.layout.total_bytes)
            self._remove_if_empty()
            self.close()
            if problem is None:
                raise
            raise problem from error

    def _open(self, wanted: Superblock) -> None:
        self._files.folder.mkdir(parents=True, exist_ok=True)
        self.table_fd = self._open_nameless() if self.path is None else self._open_named()
        self._open_data()  # before space is reserved, which may take long, and in vain
        self._settle(wanted)
        if self._files.direct:
            self.alignment = self._find_alignment()

    def _problem(self, error: BaseException, wanted: int) -> SlabError | None:
        """Return the error for what the system refused; None for any other."""
        if not isinstance(error, OSError):
            return None
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and self.table_fd >= 0:
            room = os.fstatvfs(self.table_fd)
            bytes_free = room.f_bavail * room.f_frsize
            return no_room(self.where, self._files.folder, wanted, bytes_free)
        return not_writable(self.where, self._files.folder, error)

    def _remove_if_empty(self) -> None:
        """Leave no file behind that holds nothing and that nobody else uses."""
        if self.path is None or self.table_fd < 0 or os.fstat(self.table_fd).st_size > 0:
            return
        if try_lock(self.table_fd, LOCK_USERS_OFFSET, exclusive=True):
            self.path.unlink(missing_ok=True)

    @property
    def where(self) -> str:
        """Its path, or its folder, for messages."""
        return f"a file in {self._files.folder}" if self.path is None else str(self.path)

    # ---- opening ---------------------------------------------------------------------------------
    def _open_nameless(self) -> int:
        """Open a file that is gone when its last user is, also after a kill."""
        folder = self._files.folder
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
                raise
        fd, name = tempfile.mkstemp(prefix="kvbm-", suffix=".disk", dir=folder)
        os.unlink(name)
        return fd

    def _open_named(self) -> int:
        """Open or make the file, and take a user's lock; wait while somebody reserves it."""
        assert self.path is not None
        while True:
            fd = _open(self.path, os.O_RDWR | os.O_CREAT, self._files.group)
            if try_lock(fd, LOCK_USERS_OFFSET, exclusive=False) and os.fstat(fd).st_nlink > 0:
                return fd
            os.close(fd)
            if self._stopping():
                raise SlabError(self.where, "another process is making it")
            time.sleep(BUSY_POLL_SECS)

    def _settle(self, wanted: Superblock) -> None:
        """Adopt the content if it fits, else begin anew, unless somebody uses it."""
        found = Superblock.unpack(os.pread(self.table_fd, PAGE_BYTES, 0))
        size = os.fstat(self.table_fd).st_size
        if found is not None and wanted.fits(found) and size == wanted.layout.total_bytes:
            self.superblock, self.adopted = found, True
            return
        if not try_lock(self.table_fd, LOCK_USERS_OFFSET, exclusive=True):
            raise SlabError(self.where, "another engine uses it, for another model or size")
        if size > 0:
            logger.warning("%s holds something else and starts clean", self.where)
            os.ftruncate(self.table_fd, 0)
        try:
            self._reserve(wanted.layout.total_bytes)
        except BaseException:
            os.ftruncate(self.table_fd, 0)  # and then it is removed
            raise
        nonce = int.from_bytes(os.urandom(8), "little")
        self.superblock = replace(wanted, nonce=nonce, epoch=0)
        self._write_superblock()
        try_lock(self.table_fd, LOCK_USERS_OFFSET, exclusive=False)

    def _write_superblock(self) -> None:
        os.pwrite(self.table_fd, self.superblock.pack(), 0)
        if self.path is not None:
            os.fdatasync(self.table_fd)

    def _reserve(self, total: int) -> None:
        """Give the file its size, and blocks of the file system for all of it."""
        problem = allocate_file(self.table_fd, total)
        if problem == 0:
            return
        if problem != errno.EOPNOTSUPP:
            raise OSError(problem, os.strerror(problem))
        if not self._files.zerofill:
            raise cannot_reserve(self.where, self._files.folder)
        self._fill_with_zeros(total)

    def _fill_with_zeros(self, total: int) -> None:
        zeros = memoryview(bytes(min(ZERO_BYTES, total)))
        at = 0
        while at < total:
            if self._stopping():
                raise SlabError(self.where, "stopped while zeros were written")
            at += os.pwrite(self.table_fd, zeros[: total - at], at)

    # ---- O_DIRECT --------------------------------------------------------------------------------
    def _open_data(self) -> None:
        """Open the file for data, with O_DIRECT where that is on."""
        direct, early = self._files.direct, self._files.open_direct
        flags = os.O_RDWR | os.O_CLOEXEC
        path = f"/proc/self/fd/{self.table_fd}"
        try:
            self.data_fd = os.open(path, flags | os.O_DIRECT if direct and early else flags)
            if direct:
                flags = fcntl.fcntl(self.data_fd, fcntl.F_GETFL)
                fcntl.fcntl(self.data_fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        except OSError as error:
            detail = error.strerror or str(error)
            raise no_direct(self.where, self._files.folder, detail) from error

    def _find_alignment(self) -> int:
        """What O_DIRECT needs."""
        with mmap.mmap(-1, 2 * PAGE_BYTES) as memory, memoryview(memory) as view:
            for alignment in (512, PAGE_BYTES):
                if self._can_read(view, alignment):
                    return alignment
        raise no_direct(self.where, self._files.folder, "not with whole pages")

    def _can_read(self, memory: memoryview, alignment: int) -> bool:
        with memory[alignment : 2 * alignment] as piece, contextlib.suppress(OSError):
            return os.preadv(self.data_fd, [piece], self.layout.data_offset + alignment) > 0
        return False

    # ---- use -------------------------------------------------------------------------------------
    @property
    def layout(self) -> SlabLayout:
        """Layout of the file."""
        return self.superblock.layout

    @property
    def durable(self) -> bool:
        """Whether the content outlives this process."""
        return self.path is not None

    def close(self) -> None:
        """Close the file; may be called twice. One without a name is gone then."""
        for fd in (self.data_fd, self.table_fd):
            if fd >= 0:
                os.close(fd)
        self.data_fd = self.table_fd = -1


def _open(path: Path, flags: int, group: int | None) -> int:
    """Open a named slab: only what is ours (kvbm/_fast/objects.py)."""
    return open_file(path, str(path), flags, group=group)


def read_slab(path: Path, group: int | None = None) -> tuple[Superblock, NDArray[Any]] | None:
    """Superblock of a slab and the headers of the slots that hold a block; None if it is not one.

    The headers are an array of `kvbm._fast.slab.SLAB_HEADER`, in slot order. What they say was true
    at some moment of the read: a worker checks a slot's header again when it reads the slot.

    Raises
    ------
    SlabError
        The file cannot be read, or it is not ours.
    """
    try:
        with os.fdopen(_open(path, os.O_RDONLY, group), "rb", buffering=0) as file:
            found = Superblock.unpack(file.read(PAGE_BYTES) or b"")
            if found is None or os.fstat(file.fileno()).st_size != found.layout.total_bytes:
                return None
            return found, _scan(file.fileno(), found)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SlabError(str(path), error.strerror or str(error)) from error


def _scan(fd: int, superblock: Superblock) -> NDArray[Any]:
    size = SLAB_HEADER.itemsize
    step = SCAN_BYTES // size
    pieces = [np.empty(0, SLAB_HEADER)]
    for first in range(0, superblock.slots, step):
        count = min(step, superblock.slots - first)
        table = os.pread(fd, count * size, superblock.layout.table_offset + first * size)
        pieces.append(
            valid_headers(
                table[: len(table) // size * size],
                first=first,
                rank=superblock.rank,
                fingerprint=superblock.short_fingerprint,
                payload_bytes=superblock.payload_bytes,
            )
        )
    return np.concatenate(pieces)


def raise_slab_epoch(path: Path, epoch: int, group: int | None = None) -> None:
    """Move a slab's key epoch on: what was written before is not found after a restart either."""
    fd = _open(path, os.O_RDWR, group)
    try:
        found = Superblock.unpack(os.pread(fd, PAGE_BYTES, 0))
        if found is not None and found.epoch < epoch:
            os.pwrite(fd, replace(found, epoch=epoch).pack(), 0)
            os.fdatasync(fd)
    finally:
        os.close(fd)


def _whole_pages(count: int) -> int:
    return -(-count // PAGE_BYTES) * PAGE_BYTES
