# SPDX-License-Identifier: Apache-2.0
"""Worker side of the disk tier: open this rank's slab and run the threads that move its bytes.

They move them with plain reads and writes, or with NIXL where the settings name one of its backends
and that works on this slab.

The slab is opened by a thread of its own, because reserving it may take long (zeros that have to be
written). Until it is there the worker's loop has no disk, and the leader uses none.
"""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

from kvbm._fast.copy import HostCopier
from kvbm._fast.disk_backend import PROBLEMS
from kvbm._fast.disk_batches import DiskBatches
from kvbm._fast.participants import set_disk_slots
from kvbm._fast.segment import Segment
from kvbm._fast.worker_loop import WorkerLoop
from kvbm.config import Settings
from kvbm.errors import SlabError
from kvbm.tiers.disk import Slab, SlabFiles, Superblock
from kvbm.transfer.nixl import NixlMover, nixl_library, usable_backend

logger = logging.getLogger(__name__)

IO_THREADS = 8
"""Reads or writes under way; enough for one fast device, whatever the size of a block."""

NIXL_THREADS = 4
"""Operations under way with NIXL: as many as the backend takes."""

END_SECS = 3.0
"""How long reads and writes under way may take to end when the worker closes."""

LOG_SECS = 10.0
"""Least time between two log lines about failed reads and writes."""


def slab_files(settings: Settings) -> SlabFiles:
    """How the settings want slabs to be made."""
    return SlabFiles(
        folder=settings.disk_cache_dir,
        direct=not settings.disk_disable_o_direct,
        open_direct=settings.disk_allocator_type == "open-direct",
        zerofill=settings.disk_zerofill_fallback,
        group=settings.shm_group,
    )


def nixl_backends(settings: Settings) -> tuple[str, ...]:
    """NIXL's backends that a disk tier is to try; none without a disk tier.

    Raises
    ------
    ConfigError
        One is wanted, but NIXL is not installed.
    """
    wanted = {
        "POSIX": settings.nixl_backend_posix,
        "GDS": settings.nixl_backend_gds,
        "GDS_MT": settings.nixl_backend_gds_mt,
    }
    names = tuple(name for name, on in wanted.items() if on)
    if not names or not (settings.disk_cache_gb or settings.disk_cache_override_num_blocks):
        return ()
    nixl_library()
    return names


@dataclass(frozen=True)
class DiskPlace:
    """Whose slab it is.

    Attributes
    ----------
    instance : str or None
        Name of the instance; None for a slab without a name.
    rank, ranks, block_bytes : int
        Rank of the worker, how many there are, bytes of a block on this rank.
    """

    instance: str | None
    rank: int
    ranks: int
    block_bytes: int


class WorkerDisk:
    """One rank's slab and its threads.

    Parameters
    ----------
    files : SlabFiles
        Where and how slabs are made.
    place : DiskPlace
        Whose it is.
    segment : Segment
        With the worker's line.
    copiers : sequence of HostCopier
        Where the host slots are.
    loop : WorkerLoop
        What gets the disk once it is there.
    backends : sequence of str
        NIXL's backends to try, see `nixl_backends`.
    """

    def __init__(
        self,
        files: SlabFiles,
        place: DiskPlace,
        segment: Segment,
        copiers: Sequence[HostCopier],
        loop: WorkerLoop,
        backends: Sequence[str] = (),
    ) -> None:
        self._backends = backends
        self._files = files
        self._place = place
        self._segment = segment
        self._copiers = list(copiers)
        self._loop = loop
        self._closing = threading.Event()
        self._slab: Slab | None = None
        self._backend: DiskBatches | None = None
        self._movers: list[NixlMover] = []
        self._problems = 0
        self._told_at = 0.0
        self._threads = [
            threading.Thread(target=self._open, name=f"kvbm-slab-{place.rank}", daemon=True)
        ]
        self._threads[0].start()

    def _open(self) -> None:
        try:
            self._open_slab()
        except SlabError as error:
            if not self._closing.is_set():
                # As text: whoever keeps the record keeps no frame of this.
                logger.error("rank %d: there is no disk tier: %s", self._place.rank, str(error))
        except Exception:
            logger.exception("rank %d: there is no disk tier", self._place.rank)

    def _open_slab(self) -> None:
        place, slots = self._place, self._segment.shape.disk_slots
        wanted = Superblock(
            place.rank, place.ranks, slots, place.block_bytes, self._segment.fingerprint
        )
        self._slab = Slab(self._files, wanted, place.instance, self._closing.is_set)
        self._backend = DiskBatches(
            self._segment,
            self._copiers,
            data_fd=self._slab.data_fd,
            table_fd=self._slab.table_fd,
            layout=self._slab.layout,
            fingerprint=wanted.short_fingerprint,
            durable=self._slab.durable,
            alignment=self._slab.alignment,
        )
        for number, serve in enumerate(self._servers(self._backend, self._slab)):
            name = f"kvbm-disk-{place.rank}-{number}"
            thread = threading.Thread(target=serve, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        logger.info(
            "rank %d: disk tier of %d blocks, %d bytes in %s%s%s",
            place.rank,
            slots,
            self._slab.layout.total_bytes,
            self._slab.path or f"a file without a name in {self._files.folder}",
            ", with its content" if self._slab.adopted else "",
            "; blocks go through a buffer, their pieces are not aligned"
            if self._backend.bounces
            else "",
        )
        if not self._closing.is_set():
            self._loop.use_disk(self._backend)
            set_disk_slots(self._segment, slots)

    def _servers(self, batches: DiskBatches, slab: Slab) -> list[Callable[[], None]]:
        """What the threads do: with NIXL if that is wanted and works, else plainly."""
        if self._backends:
            library = nixl_library()
            kind = usable_backend(library, self._backends, slab)
            if kind is not None:
                self._movers = self._nixl_movers(library, kind, batches, slab)
            if self._movers:
                logger.info("rank %d: the disk tier uses NIXL %s", self._place.rank, kind)
                batches.keep_for_reads(len(self._movers))
                return [mover.serve for mover in self._movers]
            logger.error("rank %d: the disk tier goes on without NIXL", self._place.rank)
        return [batches.serve] * IO_THREADS

    @staticmethod
    def _nixl_movers(
        library: ModuleType, kind: str, batches: DiskBatches, slab: Slab
    ) -> list[NixlMover]:
        """One mover a thread; none if NIXL refuses all of the pools, of which it took one page."""
        movers: list[NixlMover] = []
        try:
            for _ in range(NIXL_THREADS):
                movers.append(NixlMover(library, kind, batches, slab))
        except Exception as error:  # noqa: BLE001  NIXL raises its own, of no common class
            logger.warning("NIXL %s cannot be opened for %s: %s", kind, slab.where, str(error))
            while movers:
                movers.pop().close()
        return movers

    def report(self) -> None:
        """Log what has failed since the last time; called now and then."""
        if self._backend is None:
            return
        count, slot, problem = self._backend.problems()
        now = time.monotonic()
        if count == self._problems or now < self._told_at + LOG_SECS:
            return
        logger.warning(
            "rank %d: %d blocks could not be moved from or to disk; the last one, slot %d: %s",
            self._place.rank,
            count - self._problems,
            slot,
            PROBLEMS.get(problem) or f"{os.strerror(problem)} ({errno.errorcode.get(problem)})",
        )
        self._problems, self._told_at = count, now

    def close(self) -> bool:
        """Stop the threads and close the slab; after the loop has returned. May be called twice.

        Returns
        -------
        bool
            False if a thread hangs in a read or write: what it may still touch must stay mapped.
        """
        self._closing.set()
        deadline = time.monotonic() + END_SECS
        self._threads[0].join(timeout=END_SECS)
        if self._backend is not None:
            self._backend.stop()
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        hanging = [thread.name for thread in self._threads if thread.is_alive()]
        if hanging:
            logger.error("%s hang on the disk; their memory stays mapped", ", ".join(hanging))
            return False
        while self._movers:
            self._movers.pop().close()
        self._backend = None
        self._copiers = []
        if self._slab is not None:
            self._slab.close()
            self._slab = None
        return True
