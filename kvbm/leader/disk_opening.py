# SPDX-License-Identifier: Apache-2.0
"""Opening the disk tier's segment, in the background, once all workers have their slabs.

The segment `/kvbm-<instance>.disk` is adopted if it is there and belongs to these slabs. What the
slabs hold and the segment does not know (all of it, after a reboot) is registered from their
headers. The leader uses the tier from then on.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbm._fast.disk_table import DiskTable, raise_epoch
from kvbm._fast.operation_table import OperationTable
from kvbm._fast.participants import usable_disk_slots
from kvbm._fast.segment import Segment
from kvbm.config import Settings
from kvbm.fingerprint import Fingerprint
from kvbm.instance import disk_instance
from kvbm.leader.disk_tier import DiskTier
from kvbm.leader.disk_transfers import DiskFlow
from kvbm.shared import SegmentSpec, open_as_leader
from kvbm.tiers.disk import Superblock, raise_slab_epoch, read_slab

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

POLL_SECS = 0.01
JOIN_SECS = 10.0


@dataclass(frozen=True)
class DiskSpec:
    """What the tier is made for.

    Attributes
    ----------
    instance : str
        Name of the cache's instance.
    engine : int
        Key of the engine.
    slabs : tuple of Path
        One a rank; empty for slabs without names.
    group : int or None
        Group id whose members may use it, too.
    """

    instance: str
    engine: int
    slabs: tuple[Path, ...]
    group: int | None = None


def common_headers(tables: Sequence["NDArray[Any]"]) -> "NDArray[Any]":
    """Headers of the slots that hold the same block on every rank, as the first rank has them."""

    def both(one: "NDArray[Any]", other: "NDArray[Any]") -> "NDArray[Any]":
        _, mine, theirs = np.intersect1d(one["slot"], other["slot"], True, True)
        one, other = one[mine], other[theirs]
        same = np.ones(len(one), bool)
        for name in ("digest_lo", "digest_hi", "parent_lo", "parent_hi", "position", "group"):
            same &= one[name] == other[name]
        kept: NDArray[Any] = one[same]
        return kept

    return reduce(both, tables)


class DiskOpener:
    """The thread that opens a leader's disk tier, and the end of it.

    Parameters
    ----------
    tier : DiskTier
        What gets the table.
    main : Segment
        The host tier's, with the leader's line.
    spec : DiskSpec
        What the tier is made for.
    """

    def __init__(self, tier: DiskTier, main: Segment, spec: DiskSpec) -> None:
        self._tier = tier
        self._main = main
        self._spec = spec
        self._closing = threading.Event()
        self._segment: Segment | None = None
        self._done = threading.Event()
        tier.raise_slabs = self._raise_slabs
        self._thread = threading.Thread(target=self._run, name="kvbm-disk-open", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            slots = self._main.shape.disk_slots
            while usable_disk_slots(self._main) != slots:
                if self._closing.wait(POLL_SECS):
                    return
            self._open(slots)
        except Exception:
            logger.exception("there is no disk tier")
        finally:
            self._done.set()

    def _open(self, slots: int) -> None:
        found = [read_slab(path, self._spec.group) for path in self._spec.slabs]
        slabs = [slab for slab in found if slab is not None]
        superblocks = [block for block, _ in slabs]
        segment = self._segment = open_as_leader(
            self._segment_spec(slots, superblocks), self._spec.engine
        )
        for rank in range(self._main.shape.ranks):
            segment.set_ready_slots(rank, slots)
        table = DiskTable(segment)
        raise_epoch(table, max((block.epoch for block in superblocks), default=0))
        restored = 0
        if slabs and len(slabs) == len(found):
            restored = table.restore(common_headers([headers for _, headers in slabs]))
        logger.info("disk tier: %d blocks, %d found in the slabs", slots, restored)
        self._tier.open(table)

    def _segment_spec(self, slots: int, superblocks: Sequence[Superblock]) -> SegmentSpec:
        values = {
            "cache": self._main.fingerprint.hex(),
            "slabs": [f"{block.nonce:016x}" for block in superblocks],
        }
        return SegmentSpec(
            instance=disk_instance(self._spec.instance),
            host_slots=slots,
            ranks=self._main.shape.ranks,
            block_tokens=self._main.shape.block_tokens,
            fingerprint=Fingerprint(values),
            nonces=(),
            group=self._spec.group,
        )

    def _raise_slabs(self, epoch: int) -> None:
        for path in self._spec.slabs:
            raise_slab_epoch(path, epoch, self._spec.group)

    @property
    def opened(self) -> bool:
        """Whether the tier is open."""
        return self._done.is_set() and self._segment is not None

    def wait(self, timeout_secs: float) -> bool:
        """Wait until the tier is open, or cannot be opened; for the start alone."""
        return self._done.wait(timeout_secs)

    def close(self) -> None:
        """Return what the tier holds and detach; before the main segment is closed."""
        self._closing.set()
        self._thread.join(timeout=JOIN_SECS)
        self._tier.close()
        if self._segment is not None:
            self._segment.close()
            self._segment = None


def open_disk_tier(
    settings: Settings, table: OperationTable, place: DiskSpec, block_bytes: int
) -> tuple[DiskTier, DiskOpener] | None:
    """Begin to open the disk tier that the segment was made with; None if it has none.

    Parameters
    ----------
    settings : Settings
        Filter and write budget.
    table : OperationTable
        The host tier's blocks.
    place : DiskSpec
        What the tier is made for.
    block_bytes : int
        Bytes of a block on all ranks together.
    """
    shape = table.segment.shape
    if shape.disk_slots == 0:
        return None
    host_is_configured = bool(settings.cpu_cache_gb or settings.cpu_cache_override_num_blocks)
    flow = DiskFlow(
        block_tokens=shape.block_tokens,
        block_bytes=block_bytes,
        # As upstream: without a host tier there is no filter.
        filtered=host_is_configured and not settings.disable_disk_offload_filter,
        gb_per_day=settings.disk_write_budget_gb_per_day,
    )
    if not flow.filtered:
        logger.warning("every block is written to disk: this wears an SSD (%s)", place.instance)
    tier = DiskTier(table, flow)
    return tier, DiskOpener(tier, table.segment, place)
