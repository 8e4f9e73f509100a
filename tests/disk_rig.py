# SPDX-License-Identifier: Apache-2.0
"""One rank's worker loop with a disk: the rig for copies, a slab behind it, calls that fail."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvbm._fast.disk_batches import DiskBatches
from kvbm._fast.keys import Keys
from kvbm.tiers.disk import Slab, SlabFiles, Superblock
from tests.copy_rig import CHUNK, LAYERS, HostMemory, Rig
from tests.fast.instances import Instance

DISK_SLOTS = 24
THREADS = 3
FINGERPRINT = b"disk rig".ljust(32, b".")

Servers = Callable[[DiskBatches, Slab], list[Callable[[], None]]]

_Transfer = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_int64,
    use_errno=True,
)
_Sync = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, use_errno=True)


class Calls:
    """The system calls of a slab, with a fault that can be put in front of each.

    A fault is called with the offset and the descriptor; it returns None to let the call through,
    or the call's result. `fail` makes one that sets an error number.
    """

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.faults: dict[str, Callable[[int, int], int | None]] = {}
        self.log: list[tuple[str, int, int]] = []
        arguments = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
        real = {"read": libc.preadv, "write": libc.pwritev}
        for function in real.values():
            function.argtypes, function.restype = arguments, ctypes.c_ssize_t

        def transfer(kind: str) -> Any:
            def call(fd: int, pieces: int, count: int, offset: int) -> int:
                self.log.append((kind, fd, offset))
                fault = self.faults.get(kind)
                result = None if fault is None else fault(offset, fd)
                if result is not None:
                    return result
                token = self.begins(kind, fd, pieces, count, offset)
                result = int(real[kind](fd, pieces, count, offset))
                self.ended(kind, token)
                return result

            return _Transfer(call)

        def sync(fd: int) -> int:
            self.log.append(("sync", fd, 0))
            fault = self.faults.get("sync")
            result = None if fault is None else fault(0, fd)
            if result is not None:
                return result
            token = self.begins("sync", fd, 0, 0, 0)
            result = int(libc.fdatasync(fd))
            self.ended("sync", token)
            return result

        self._keep = (transfer("read"), transfer("write"), _Sync(sync))

    def begins(self, kind: str, fd: int, pieces: int, count: int, offset: int) -> int:
        """Before each call that is let through; a number for `ended`."""
        return 0

    def ended(self, kind: str, token: int) -> None:
        """After it."""

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Addresses as the backend takes them."""
        read, write, sync = (ctypes.cast(f, ctypes.c_void_p).value or 0 for f in self._keep)
        return read, write, sync

    @staticmethod
    def fail(number: int) -> int:
        """Fail with a system error."""
        ctypes.set_errno(number)
        return -1


class DiskRig(Rig):
    """A rig with a slab in `folder`.

    Parameters
    ----------
    instance, folder
        Where the state and the slab are.
    name
        Name of the slab's instance; None for one without a name.
    alignment
        What the backend takes as the file's alignment; the slab's own by default.
    servers
        Makes what the threads do; plain reads and writes by default.
    memory
        The KV cache.
    calls
        The slab's system calls.
    """

    def __init__(
        self,
        instance: Instance,
        folder: Path,
        *,
        name: str | None = "rig",
        alignment: int | None = None,
        direct: bool = True,
        slots: int = DISK_SLOTS,
        servers: Servers | None = None,
        memory: HostMemory | None = None,
        calls: Calls | None = None,
    ) -> None:
        super().__init__(instance, memory or HostMemory())
        wanted = Superblock(0, 1, slots, LAYERS * CHUNK, FINGERPRINT)
        self.slab = Slab(SlabFiles(folder, direct=direct), wanted, name)
        self.calls = calls or Calls()
        self.disk = DiskBatches(
            self.loop.segment,
            self.copies.copiers,
            data_fd=self.slab.data_fd,
            table_fd=self.slab.table_fd,
            layout=self.slab.layout,
            fingerprint=wanted.short_fingerprint,
            durable=self.slab.durable,
            alignment=alignment or self.slab.alignment,
            calls=self.calls.addresses,
        )
        self.loop.use_disk(self.disk)
        serves = [self.disk.serve] * THREADS if servers is None else servers(self.disk, self.slab)
        self.threads = [
            threading.Thread(target=serve, name=f"kvbm-test-disk-{i}", daemon=True)
            for i, serve in enumerate(serves)
        ]
        for thread in self.threads:
            thread.start()
        self.start()

    def spilled(self, keys: Keys, slots: Sequence[int]) -> bool | None:
        """Write a cached chain to disk slots; returns whether it arrived."""
        count, ref = self.table.match(keys, 0, len(slots))
        assert count == len(slots)
        assert ref is not None
        handles = self.table.spill(ref, 0, list(slots))
        assert handles is not None
        results = [self.collected(handle) for handle in handles]
        self.table.unpin(ref)
        return all(results)

    def fetched(self, keys: Keys, slots: Sequence[int]) -> bool | None:
        """Read a chain that is not cached from disk slots; returns whether it arrived."""
        handles, upto, _ = self.table.fetch(keys, 0, len(slots), list(slots), None)
        assert upto == len(slots)
        results = [self.collected(handle) for handle in handles]
        return all(results)

    def data_offset(self, slot: int) -> int:
        """Where a slot's data are in the file."""
        return self.slab.layout.data_offset + slot * self.slab.layout.stride

    def header_offset(self, slot: int) -> int:
        """Where a slot's header is in the file."""
        return self.slab.layout.table_offset + slot * 128

    def flip(self, offset: int) -> None:
        """Change one bit of the file."""
        byte = os.pread(self.slab.table_fd, 1, offset)
        os.pwrite(self.slab.table_fd, bytes([byte[0] ^ 1]), offset)
        os.fsync(self.slab.table_fd)

    def close(self) -> None:
        """Stop, and give everything back."""
        self.stop()
        self.disk.stop()
        for thread in self.threads:
            thread.join(timeout=10)
            assert not thread.is_alive()
        del self.disk, self.threads  # they keep the arena mapped
        super().close()
        self.slab.close()
