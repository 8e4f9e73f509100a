# SPDX-License-Identifier: Apache-2.0
"""Opening the cache of one engine: its segment, its leader, its disk tier and its metrics.

What an engine's connector does at its start and at its end, whatever the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvbm._fast.operation_table import OperationTable
from kvbm._fast.segment import Segment
from kvbm.config import Settings
from kvbm.eviction.policy import evict_by, policy_of
from kvbm.fingerprint import Fingerprint
from kvbm.instance import engine_key, is_private, remove, remove_dead_private_instances
from kvbm.leader.disk_opening import DiskSpec, open_disk_tier
from kvbm.leader.leader import Leader
from kvbm.leader.recorder import make_leader, open_recorder
from kvbm.metrics.cache_stats import CacheStats
from kvbm.metrics.exporter import start_exporter
from kvbm.shared import SegmentSpec, close_and_remove, open_as_leader
from kvbm.tiers.disk import slab_path
from kvbm.tiers.host import ArenaHeader, wait_for_headers

__all__ = ["EngineCache", "EnginePlace"]

logger = logging.getLogger(__name__)

WARM_START_SECS = 2.0
"""Longest wait of an engine's start for its workers to open arenas that hold content."""


@dataclass(frozen=True)
class EnginePlace:
    """Which engine it is, and of what its cache is made.

    Attributes
    ----------
    instance, engine_id : str
        The instance, and the engine's name in it.
    ranks, block_tokens : int
        Workers, and tokens in a block.
    """

    instance: str
    engine_id: str
    ranks: int
    block_tokens: int

    @property
    def is_private(self) -> bool:
        """Whether the instance ends with the engine."""
        return is_private(self.instance)


class EngineCache:
    """One engine's cache, opened by its scheduler side.

    Parameters
    ----------
    place : EnginePlace
        The engine.
    settings : Settings
        Sizes, time-outs, what is served.
    values : mapping
        What decides, beside the geometry of the workers, whether bytes can be reused: the
        fingerprint's.

    Attributes
    ----------
    segment : Segment
        The instance's.
    leader : Leader
        This engine's.
    hits : CacheStats
        Its hit rates.
    exporter : Exporter or None
        What serves metrics, if this process does.

    Raises
    ------
    ConfigError
        The tier does not fit, or cannot be made.
    LeaderTimeout
        Not all workers announced themselves in time.
    """

    def __init__(
        self,
        place: EnginePlace,
        settings: Settings,
        values: Mapping[str, str | int | Sequence[str | int] | None],
    ) -> None:
        self.place = place
        self._settings = settings
        remove_dead_private_instances()
        policy = policy_of(settings.eviction_policy)  # it may be refused, and so may the next:
        recorder = open_recorder(settings)  # before anything is made
        headers = wait_for_headers(
            place.instance,
            place.ranks,
            settings.leader_worker_init_timeout_secs,
            settings.shm_group,
        )
        per_block = sum(header.bytes_per_block for header in headers)
        self.segment = self._open_segment(headers, per_block, values)
        table = OperationTable(self.segment)
        evict_by(table, policy)
        disk = open_disk_tier(settings, table, self._disk_spec(), per_block)
        self._disk = disk[1] if disk else None
        self.leader: Leader | None = make_leader(
            table, place.block_tokens, disk[0] if disk else None, recorder
        )
        self._wait_for_content(self.leader)
        self.hits = CacheStats(
            place.engine_id,
            settings.cache_stats_max_requests,
            settings.cache_stats_log_interval_secs,
        )
        self.exporter = (
            start_exporter(
                place.instance, settings.metrics_port, self.hits.rates, settings.disk_cache_dir
            )
            if settings.metrics
            else None
        )

    def _open_segment(
        self,
        headers: Sequence[ArenaHeader],
        per_block: int,
        values: Mapping[str, str | int | Sequence[str | int] | None],
    ) -> Segment:
        place, settings = self.place, self._settings
        slots = settings.host_slots(per_block) or settings.staging_slots(per_block)
        geometry = [header.geometry.hex() for header in headers]
        spec = SegmentSpec(
            instance=place.instance,
            host_slots=slots,
            ranks=place.ranks,
            block_tokens=place.block_tokens,
            fingerprint=Fingerprint({**values, "geometry": geometry}),
            nonces=tuple(header.nonce for header in headers),
            group=settings.shm_group,
            disk_slots=settings.disk_slots(per_block),
        )
        settings.check_shm_room(spec.missing_bytes(per_block))
        segment = open_as_leader(spec, engine_key(place.engine_id))
        logger.info(
            "host tier: %d blocks of %d tokens, %d bytes over %d ranks, evicted by %s, instance %s",
            slots,
            place.block_tokens,
            slots * per_block,
            place.ranks,
            settings.eviction_policy,
            place.instance,
        )
        return segment

    def _disk_spec(self) -> DiskSpec:
        place, settings = self.place, self._settings
        ranks = 0 if place.is_private else place.ranks  # private slabs have no names
        folder = settings.disk_cache_dir
        return DiskSpec(
            place.instance,
            engine_key(place.engine_id),
            tuple(slab_path(folder, place.instance, rank) for rank in range(ranks)),
            group=settings.shm_group,
        )

    def _wait_for_content(self, leader: Leader) -> None:
        """Where arenas or slabs hold content, the first request finds it."""
        if all(self.segment.ready_slots(rank) for rank in range(self.place.ranks)):
            leader.liveness.wait_for_workers(WARM_START_SECS)
        slabs = self._disk_spec().slabs
        if self._disk is not None and slabs and all(path.exists() for path in slabs):
            self._disk.wait(WARM_START_SECS)
            leader.liveness.wait_for_workers(WARM_START_SECS)

    def disk_is_open(self) -> bool:
        """Whether the disk tier has been opened."""
        return self._disk is not None and self._disk.opened

    def close(self) -> None:
        """Return everything and detach; may be called twice."""
        if self.leader is None:
            return
        if self.exporter is not None:
            self.exporter.close()
        self.leader.close()
        if self._disk is not None:
            self._disk.close()
        close_and_remove(self.segment, self.place.instance)
        if self.place.is_private:
            # An engine may end its workers after this, without asking them to close: the names go
            # now, the memory goes with the last worker.
            remove(self.place.instance)
        self.leader = None
