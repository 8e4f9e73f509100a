# SPDX-License-Identifier: Apache-2.0
"""Worker side: own the KV cache and the arena of one rank, run the copies, report what has ended.

Threads. The engine's thread calls `bind`, `filled`, `stop_copies`, `ended_loads` and
`ended_stores`; none of them waits, but for `stop_copies`, which lasts as long as the copy of one
run of blocks, or, on a device with streams, as long as its submission. Behind it are two threads:
one reserves the arena's memory and ends, the other runs the copies without the GIL
(kvbm/_fast/worker_loop.pyx). Whatever becomes of them, each load is reported as ended once, with
the device blocks that did not arrive, so that the engine recomputes instead of waiting.
"""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvbm._fast.backend import CopyBackend
from kvbm._fast.participants import claim_worker, find_leader, set_attached
from kvbm._fast.segment import Segment, SegmentFault
from kvbm._fast.worker_loop import WorkerLoop
from kvbm.config import Settings
from kvbm.errors import ConfigError, GeometryError
from kvbm.instance import (
    arena_names,
    engine_key,
    is_private,
    remove_dead_private_instances,
    remove_if_unused,
    reserved_bytes,
    segment_name,
)
from kvbm.step import LoadOrder, StepMetadata
from kvbm.tiers.host import PAGE_BYTES, ArenaHeader, HostArena
from kvbm.transfer.arena_layout import ArenaLayout
from kvbm.transfer.backends import Device, RankCopies
from kvbm.transfer.geometry import KvGeometry
from kvbm.worker.disk import DiskPlace, WorkerDisk, nixl_backends, slab_files

logger = logging.getLogger(__name__)

STOP_TIMEOUT_MS = 1000
"""Longest wait for one block's copy to end before its device block is overwritten."""

JOIN_SECS = 10.0
"""Longest wait for a thread to end."""

_POLL_SECS = 0.005


@dataclass(frozen=True)
class WorkerPlace:
    """Which worker of which engine this is.

    Attributes
    ----------
    instance, engine_id : str
        The instance, and the engine that the worker belongs to.
    rank, ranks : int
        This rank and how many there are.
    """

    instance: str
    engine_id: str
    rank: int
    ranks: int


class Worker:
    """One rank's worker.

    Parameters
    ----------
    place : WorkerPlace
        Instance, engine and rank.
    settings : Settings
        Time-outs, verification, permissions.
    geometries : sequence of KvGeometry
        The rank's KV cache, one a KV-cache group.
    keep_alive : object
        Owner of the KV cache's memory.
    device : Device
        Where the KV cache is.

    Raises
    ------
    GeometryError
        The groups have blocks of different shapes.
    ConfigError
        Shared memory has no room for the host tier, or may not be written; NIXL is wanted, but not
        installed.
    SegmentInUse
        Another engine uses the same arena.
    """

    def __init__(
        self,
        place: WorkerPlace,
        settings: Settings,
        geometries: Sequence[KvGeometry],
        keep_alive: object = None,
        device: Device | None = None,
    ) -> None:
        if any(g.chunk_bytes != geometries[0].chunk_bytes for g in geometries):
            raise GeometryError(
                "KV-cache groups with blocks of different shapes are not supported: "
                + ", ".join(str(g.bytes_per_block) for g in geometries)
                + " bytes"
            )
        self.place = place
        self.settings = settings
        self.geometries = list(geometries)
        self._keep_alive = keep_alive
        self._device = device or Device()
        self._nixl_backends = nixl_backends(settings)
        self._check_room()
        self.arena = HostArena(
            place.instance,
            ArenaHeader(
                rank=place.rank,
                ranks=place.ranks,
                bytes_per_block=geometries[0].bytes_per_block,
                device_blocks=geometries[0].num_blocks,
                nonce=0,
                geometry=bytes.fromhex(geometries[0].fingerprint())[:32].ljust(32, b"\0"),
            ),
            exclusive=is_private(place.instance),
            group=settings.shm_group,
        )
        self.segment: Segment | None = None
        self.loop: WorkerLoop | None = None
        self._closing = threading.Event()
        self._steps = threading.Lock()  # of the two steps below, until the loop is there
        self._bound = self._filled = 0
        self._stream = 0  # the engine's, when it told about the last step
        self._rank_copies: RankCopies | None = None
        self._disk: WorkerDisk | None = None
        self._loads: dict[str, LoadOrder] = {}
        self._held: dict[str, list[int]] = {}
        self._copies = threading.Thread(
            target=self._run, name=f"kvbm-copy-{place.rank}", daemon=True
        )
        self._reserving: threading.Thread | None = None
        self._copies.start()

    def _check_room(self) -> None:
        """Look for room before anything is made; what dead engines left is no reason to fail."""
        wanted = max(self.settings.host_bytes, PAGE_BYTES)
        missing = wanted - reserved_bytes(arena_names(self.place.instance))
        try:
            self.settings.check_shm_room(missing)
        except ConfigError:
            remove_dead_private_instances()
            self.settings.check_shm_room(missing)

    # ---- background ------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            self.segment = self._join()
            if self.segment is None:
                return
            loop = WorkerLoop(self.segment, self._backend(self.segment))
            with self._steps:
                self.loop = loop
                self._tell_loop()
            self._open_disk(self.segment, loop)
            if not self._closing.is_set():
                loop.run()
        except Exception:
            logger.exception("rank %d: the copy thread failed", self.place.rank)
        if not self._closing.is_set():
            logger.error("rank %d: no copies any more; the engine recomputes", self.place.rank)

    def _join(self) -> Segment | None:
        """Attach to the leader's segment once it is there, and take this rank's line."""
        deadline = time.monotonic() + self.settings.leader_worker_init_timeout_secs
        name = segment_name(self.place.instance)
        problem = "there is none"
        key = engine_key(self.place.engine_id)
        while not self._closing.is_set():
            segment: Segment | None = None
            try:
                segment = Segment.attach(name, group=self.settings.shm_group)
                leader = find_leader(segment, key)
                if leader is not None:
                    claim_worker(segment, leader, self.place.rank, key)
                    return segment
                problem = "none of its leaders is this engine's"
            except (OSError, SegmentFault) as error:  # not there yet, or about to be replaced
                problem = str(error)
            if segment is not None:
                segment.close()
            if time.monotonic() > deadline:
                logger.error(
                    "rank %d: no leader in %s after DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS=%s: "
                    "%s",
                    self.place.rank,
                    name,
                    self.settings.leader_worker_init_timeout_secs,
                    problem,
                )
                return None
            self._closing.wait(_POLL_SECS)
        return None

    def _backend(self, segment: Segment) -> CopyBackend:
        """Backend for this KV cache; if its arena cannot be opened, one that fails all copies."""
        try:
            return self._open_arena(segment)
        except Exception:
            logger.exception(
                "rank %d: the arena cannot be used; every copy of this rank fails", self.place.rank
            )
            return CopyBackend()

    def _open_arena(self, segment: Segment) -> CopyBackend:
        layout = ArenaLayout(segment.shape.host_slots, self.geometries[0].chunk_bytes)
        self.arena.belong_to(segment.nonce)
        memory = self.arena.map(layout.total_bytes)
        copies = RankCopies(
            self._device,
            self.geometries,
            layout,
            memory,
            rank=self.place.rank,
            checksum=self.settings.verify_host,
            staged=self.settings.device_staging,
            calibrated=self.settings.device_calibration,
            keep_alive=self._keep_alive,
        )
        self._rank_copies = copies

        def reserved(count: int) -> None:
            usable = copies.grow(count)
            segment.set_ready_slots(self.place.rank, usable)
            # Slots that were usable before this worker came (a restart, another engine) hold
            # blocks: the leader must not match them until this worker can read them.
            if usable >= segment.ready_slots(self.place.rank):
                set_attached(segment)

        near = frozenset() if self.settings.memory_disable_numa else copies.cpus_near
        self._reserving = threading.Thread(
            target=self.arena.reserve,
            args=(reserved, self._closing.is_set, near),
            name=f"kvbm-reserve-{self.place.rank}",
            daemon=True,
        )
        self._reserving.start()
        return copies.backend

    def _open_disk(self, segment: Segment, loop: WorkerLoop) -> None:
        """Begin to open this rank's slab, if the leader has a disk tier."""
        if segment.shape.disk_slots == 0 or self._rank_copies is None:
            return
        place = DiskPlace(
            None if is_private(self.place.instance) else self.place.instance,
            self.place.rank,
            self.place.ranks,
            self.geometries[0].bytes_per_block,
        )
        copiers = self._rank_copies.copiers
        self._disk = WorkerDisk(
            slab_files(self.settings), place, segment, copiers, loop, self._nixl_backends
        )

    def _tell_loop(self) -> None:
        """Pass on the steps that arrived before the loop was there; under the lock."""
        assert self.loop is not None
        if self._bound:
            self.loop.bind_step(self._bound, self._stream)
        if self._filled:
            self.loop.fill_step(self._filled, self._stream)

    # ---- engine thread ---------------------------------------------------------------------------
    def stop_copies(self, metadata: StepMetadata) -> None:
        """Wait for copies from device blocks that this step overwrites; may be called twice.

        The leader has cancelled these stores: what has not begun does not begin.
        """
        if self.loop is None:
            return
        for handle in metadata.stop:
            if not self.loop.cancel_and_wait(handle, STOP_TIMEOUT_MS, self._device.stream()):
                logger.error(
                    "rank %d: a copy did not stop; its blocks are not published", self.place.rank
                )

    def bind(self, metadata: StepMetadata) -> None:
        """Begin a step."""
        self._loads.update(metadata.loads)
        self._held.update(metadata.held)
        if not metadata.step:
            return
        with self._steps:
            self._bound = metadata.step
            self._stream = self._device.stream()
            if self.loop is not None:
                self.loop.bind_step(metadata.step, self._stream)

    def filled(self) -> None:
        """The forward pass of the bound step has written its blocks."""
        with self._steps:
            self._filled = self._bound
            self._stream = self._device.stream()
            if self.loop is not None and self._filled:
                self.loop.fill_step(self._filled, self._stream)

    @property
    def copying(self) -> bool:
        """Whether operations are, or will soon be, worked on."""
        return self._copies.is_alive() and not self._closing.is_set()

    def _ended(self, handles: Sequence[int]) -> bool:
        """Return whether this rank has nothing to do with these operations any more."""
        loop = self.loop
        if loop is None:
            return not handles or not self.copying
        try:
            if not self.copying:  # nobody works on them: they fail at once
                for handle in handles:
                    loop.fail(handle)
            return all(loop.rank_ended(handle) for handle in handles)
        except Exception:
            logger.exception("rank %d: operations cannot be looked at", self.place.rank)
            return True

    def wait_until_ended(self, handles: Sequence[int], secs: float = JOIN_SECS) -> bool:
        """Wait until these operations have ended on this rank; False if they do not in time."""
        deadline = time.monotonic() + secs
        while not self._ended(handles):
            if time.monotonic() >= deadline:
                return False
            self._closing.wait(_POLL_SECS)
        return True

    def ended_stores(self) -> set[str]:
        """Finished requests whose device blocks are no longer needed, each told once."""
        if self._disk is not None:
            self._disk.report()
        done = {request for request, handles in self._held.items() if self._ended(handles)}
        for request in done:
            del self._held[request]
        return done

    def ended_loads(self) -> dict[str, Sequence[int]]:
        """Requests whose loads have ended, each told once, with the blocks that did not arrive."""
        done = [request for request, order in self._loads.items() if self._ended(order.handles)]
        return {request: self._not_loaded(self._loads.pop(request)) for request in done}

    def _not_loaded(self, order: LoadOrder) -> Sequence[int]:
        """Device blocks of an ended load that did not arrive on this rank."""
        loop = self.loop
        if order.failed or loop is None:
            return order.device_blocks
        try:
            return [block for h in order.handles for block in loop.failed_device_blocks(h)]
        except Exception:
            logger.exception("rank %d: a load cannot be looked at", self.place.rank)
            return order.device_blocks

    @staticmethod
    def _has_ended(thread: threading.Thread | None) -> bool:
        """Wait for a thread; False if it does not end, so that what it uses must stay mapped."""
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(timeout=JOIN_SECS)
        if thread.is_alive():
            logger.error("%s does not end; its memory stays mapped", thread.name)
        return not thread.is_alive()

    def close(self) -> None:
        """Stop the threads and detach; the last user of a private instance removes it.

        May be called twice.
        """
        self._closing.set()
        if self.loop is not None:
            self.loop.stop()
        # In this order: the first makes the second, perhaps at this moment.
        if not (self._has_ended(self._copies) and self._has_ended(self._reserving)):
            return
        if self._disk is not None:
            if not self._disk.close():
                return
            self._disk = None
        self.loop = None
        if self.segment is not None:
            self.segment.close()
            self.segment = None
        if self._rank_copies is not None:
            self._rank_copies.close()
            self._rank_copies = None
        self._keep_alive = None
        self.arena.close()
        if is_private(self.place.instance):
            remove_if_unused(self.place.instance)
