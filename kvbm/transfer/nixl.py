# SPDX-License-Identifier: Apache-2.0
"""NIXL as what moves the blocks of a disk tier: agent, pools, and operations of two index lists.

Each thread has an agent of its own, registers the two pools with it once, and prepares a descriptor
list over each: host slots and disk slots, one descriptor a block. An operation is then two lists of
indices. Where a block is several pieces in the host tier, or not aligned as the file wants it, the
first pool is a buffer, so that there is still one descriptor a block.

What NIXL cannot move is moved by plain reads and writes, which tell which block is bad. The agent
is given back before that, and made anew: NIXL 1.5.1 raises once all that it has submitted has
ended, older versions at the first error, and what the agent's queues hold afterwards is not
specified. The end of an agent waits for libaio, POSIX's default; other backends move to and from a
buffer of our own, so that what arrives too late reaches no host slot. After `FAILURES_MAX` failures
in a row a thread goes on without NIXL.

Nothing here relies on a transfer that is called done: a block's checksum is compared in the host
slot after a fetch, whatever moved it (kvbm/_fast/disk_rows.pyx).
"""

from __future__ import annotations

import importlib
import itertools
import logging
import mmap
import os
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbm.errors import ConfigError, TransferError
from kvbm.tiers.disk import PAGE_BYTES, Superblock

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvbm._fast.disk_batches import DiskBatches
    from kvbm.tiers.disk import Slab

__all__ = ["NIXL_BACKENDS", "NixlMover", "nixl_library", "usable_backend"]

logger = logging.getLogger(__name__)

NIXL_BACKENDS = ("GDS_MT", "GDS", "POSIX")
"""What a slab can be moved with, in the order in which they are tried."""

MODULES = ("nixl_cu13", "nixl_cu12", "nixl")
"""The wheels that have the library; the last one only finds one of the others, slowly."""

FAILURES_MAX = 3
BUFFER_BYTES = 64 << 20
POLL_SECS = 0.0001

_numbers = itertools.count()


def nixl_library() -> ModuleType:
    """NIXL's Python interface.

    Raises
    ------
    ConfigError
        It is not installed.
    """
    problems = []
    for name in MODULES:
        try:
            return importlib.import_module(f"{name}._api")
        except ImportError as error:
            problems.append(f"{name}: {error}")
    raise ConfigError(
        "NIXL is asked for (DYN_KVBM_NIXL_BACKEND_*), but cannot be imported: install it with "
        f"`pip install 'kvbm[nixl]'`, or unset the variable ({'; '.join(problems)})"
    )


class _Pools:
    """An agent with its registered memory, and what is prepared for its pools."""

    def __init__(
        self,
        library: ModuleType,
        kind: str,
        slab: Slab,
        host: NDArray[np.uint64],
        disk: NDArray[np.uint64],
        size: int,
        parameters: Mapping[str, str],
    ) -> None:
        # No progress thread: each check of a transfer makes progress.
        config = library.nixl_agent_config(enable_prog_thread=False, backends=[])
        self.name = f"kvbm-{os.getpid()}-{next(_numbers)}"
        self._kinds = [kind]
        self._agent = library.nixl_agent(self.name, config)
        self._agent.create_backend(kind, dict(parameters))
        low = int(host.min())
        self._register("DRAM", (low, int(host.max()) + size - low, 0, ""))
        self._register("FILE", (0, slab.layout.total_bytes, slab.data_fd, ""))
        self._host = self._prepare("NIXL_INIT_AGENT", "DRAM", host, size, 0)
        self._disk = self._prepare(self.name, "FILE", disk, size, slab.data_fd)

    def _register(self, memory: str, what: tuple[int, int, int, str]) -> None:
        self._agent.register_memory([what], memory, backends=self._kinds)

    def _prepare(
        self, whose: str, memory: str, begins: NDArray[np.uint64], size: int, device: int
    ) -> Any:
        table = np.empty((len(begins), 3), np.uint64)
        table[:, 0], table[:, 1], table[:, 2] = begins, size, device
        return self._agent.prep_xfer_dlist(whose, table, memory, backends=self._kinds)

    def move(self, reading: bool, host: NDArray[np.int32], disk: NDArray[np.int32]) -> None:
        """Move blocks between two lists of indices; returns when all have arrived."""
        handle = self._agent.make_prepped_xfer(
            "READ" if reading else "WRITE", self._host, host, self._disk, disk, backends=self._kinds
        )
        state = self._agent.transfer(handle)
        while state == "PROC":
            time.sleep(POLL_SECS)
            state = self._agent.check_xfer_state(handle)
        if state != "DONE":
            raise TransferError(f"a transfer ended as {state}")
        self._agent.release_xfer_handle(handle)


class NixlMover:
    """One thread's way to move operations with NIXL.

    Parameters
    ----------
    library : module
        From `nixl_library`.
    kind : str
        One of `NIXL_BACKENDS`.
    batches : DiskBatches
        Where operations come from.
    slab : Slab
        The rank's file.
    parameters : mapping of str to str
        NIXL's own, of the backend.

    Attributes
    ----------
    blocks : int
        Blocks moved with NIXL.
    """

    def __init__(
        self,
        library: ModuleType,
        kind: str,
        batches: DiskBatches,
        slab: Slab,
        parameters: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._parameters = parameters
        self._library, self._kind = library, kind
        self._batches, self._slab = batches, slab
        self._memory: mmap.mmap | None = None
        self._buffers: NDArray[np.uint8] | None = None
        self.blocks = 0
        if not (batches.is_contiguous and kind == "POSIX"):
            stride = slab.layout.stride
            rows = max(1, min(128, BUFFER_BYTES // stride))
            self._memory = mmap.mmap(-1, rows * stride)
            self._buffers = np.frombuffer(self._memory, np.uint8).reshape(rows, stride)
        self._pools: _Pools | None = self._open()

    def _open(self) -> _Pools:
        layout, buffers = self._slab.layout, self._buffers
        size = layout.payload_bytes if buffers is None else layout.stride
        disk = layout.data_offset + layout.stride * np.arange(layout.slots, dtype=np.uint64)
        if buffers is None:
            addresses = self._batches.slot_addresses()
        else:
            rows = np.arange(len(buffers), dtype=np.uint64)
            addresses = np.uint64(buffers.ctypes.data) + np.uint64(size) * rows
        return _Pools(
            self._library, self._kind, self._slab, addresses, disk, size, self._parameters
        )

    def serve(self) -> None:
        """Move operations until the backend is stopped."""
        failures = 0
        while (job := self._batches.take()) is not None:
            place, reading, host, disk = job
            problem = self._problem_of_move(place, reading, host, disk)
            if problem is None:
                failures = 0
                self.blocks += len(host)
            else:
                failures += 1
                logger.warning(
                    "NIXL %s could not move %d blocks: %s", self._kind, len(host), problem
                )
                self._pools = None  # before the rows are moved in another way
            self._batches.give(place, problem is None)
            if self._pools is None and not self._reopened(failures):
                self._batches.serve()

    def _problem_of_move(
        self, place: int, reading: bool, host: NDArray[np.int32], disk: NDArray[np.int32]
    ) -> str | None:
        """Move an operation; what went wrong as text, since an error's frames keep the agent."""
        try:
            self._move(place, reading, host, disk)
        except Exception as error:  # noqa: BLE001  NIXL raises its own, of no common class
            return str(error)
        return None

    def _reopened(self, failures: int) -> bool:
        try:
            if failures < FAILURES_MAX:
                self._pools = self._open()
        except Exception as error:  # noqa: BLE001  as above
            logger.warning("NIXL %s cannot be opened again: %s", self._kind, str(error))
        if self._pools is None:
            logger.error("a thread of the disk tier goes on without NIXL %s", self._kind)
        return self._pools is not None

    def _move(
        self, place: int, reading: bool, host: NDArray[np.int32], disk: NDArray[np.int32]
    ) -> None:
        assert self._pools is not None
        buffers = self._buffers
        if buffers is None:
            self._pools.move(reading, host, disk)
            return
        for first in range(0, len(disk), len(buffers)):
            some = disk[first : first + len(buffers)]
            rows = buffers[: len(some)]
            if not reading:
                self._batches.copy_rows(place, first, rows)
            self._pools.move(reading, np.arange(len(some), dtype=np.int32), some)
            if reading:
                self._batches.copy_rows(place, first, rows)

    def close(self) -> None:
        """Give the agent and the buffer back; `serve` has returned. May be called twice."""
        self._pools = self._buffers = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None


def usable_backend(library: ModuleType, wanted: Sequence[str], slab: Slab) -> str | None:
    """First of the wanted backends that reads this slab here; why others do not is logged.

    Each is tried on the slab's first page, whose content is known.
    """
    for kind in NIXL_BACKENDS:
        if kind not in wanted:
            continue
        problem = _problem_of(library, kind, slab)
        if problem is None:
            return kind
        logger.warning("NIXL %s cannot be used for %s: %s", kind, slab.where, problem)
    return None


def _problem_of(library: ModuleType, kind: str, slab: Slab) -> str | None:
    """Read the superblock; what is wrong with that, None if nothing is."""
    with mmap.mmap(-1, PAGE_BYTES) as memory:
        page = np.frombuffer(memory, np.uint8)
        try:
            begins = np.array([page.ctypes.data], np.uint64), np.zeros(1, np.uint64)
            pools = _Pools(library, kind, slab, *begins, PAGE_BYTES, {})
            pools.move(True, np.zeros(1, np.int32), np.zeros(1, np.int32))
            del pools
            found = Superblock.unpack(page.tobytes())
            return None if found == slab.superblock else "other bytes were read than are there"
        except Exception as error:  # noqa: BLE001  as above
            return f"{type(error).__name__}: {error}"
        finally:
            del page
