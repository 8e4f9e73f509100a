# SPDX-License-Identifier: Apache-2.0
"""Rows (device block, slot) -> runs -> copies. Pure functions on arrays; no bytes are touched.

The native host copy does the same on the fly; backends that submit copies to a device take them
from here. For ``n`` rows, ``m`` runs and ``R`` regions, runs cost O(n) and segments O(m * R) where
the regions are packed, O(n * R) where they are not. All steps are array operations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvbm.errors import GeometryError, TransferError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from kvbm.transfer.arena_layout import ArenaLayout
    from kvbm.transfer.geometry import KvGeometry

__all__ = ["RUN", "SEGMENT", "coalesce", "plan_copy", "segments_of"]

# `count` neighbouring device blocks to or from as many neighbouring slots of one group.
RUN = np.dtype([("device_block", "<u4"), ("slot", "<u4"), ("count", "<u4")])

# `bytes` bytes between device_offset, from the region's base address, and arena_offset, from the
# begin of the arena.
SEGMENT = np.dtype(
    [("region", "<u4"), ("device_offset", "<u8"), ("arena_offset", "<u8"), ("bytes", "<u8")]
)


def coalesce(
    device_blocks: ArrayLike, slots: ArrayLike, group_slots: int, *, run_rows_max: int = 2**31 - 1
) -> NDArray[np.void]:
    """Join rows that follow each other into runs, in order.

    Rows join while device block and slot both step by one and the slot does not begin a group.

    Parameters
    ----------
    device_blocks, slots
        uint32[n] each.
    group_slots
        Slots of a group of the arena.
    run_rows_max
        Longest run in rows, 1 or more; a longer one is cut.

    Returns
    -------
    RUN[m]
        With the rows, in the order of the rows.
    """
    blocks = np.asarray(device_blocks, dtype=np.int64)
    places = np.asarray(slots, dtype=np.int64)
    if blocks.ndim != 1 or blocks.shape != places.shape:
        raise TransferError(
            f"rows need as many device blocks as slots, in one axis: {blocks.shape}, {places.shape}"
        )
    row = np.arange(len(blocks))
    begins = np.ones(len(blocks), dtype=bool)
    begins[1:] = (np.diff(blocks) != 1) | (np.diff(places) != 1) | (places[1:] % group_slots == 0)
    # Distance of each row from the begin of its run, to cut runs that are too long.
    since = row - np.maximum.accumulate(np.where(begins, row, 0))
    first = np.flatnonzero(since % run_rows_max == 0)
    runs = np.empty(len(first), dtype=RUN)
    runs["device_block"] = blocks[first]
    runs["slot"] = places[first]
    runs["count"] = np.diff(first, append=len(blocks))
    return runs


def segments_of(
    runs: NDArray[np.void], geometry: KvGeometry, layout: ArenaLayout, *, by_region: bool = False
) -> NDArray[np.void]:
    """Turn runs into contiguous copies.

    A run is one copy for a region whose blocks touch in device memory, else one a block.

    Parameters
    ----------
    runs
        From `coalesce`, with the layout's ``group_slots``.
    geometry, layout
        Of the device memory and of the arena; the same chunks in both.
    by_region
        All copies of region 0 first, then those of region 1, and so on, so that a consumer of the
        first layers need not wait for the last ones. By default run by run.

    Returns
    -------
    SEGMENT[s]
    """
    chunk = np.array(layout.chunk_bytes, dtype=np.int64)
    stride = np.array([region.block_stride_bytes for region in geometry.regions], dtype=np.int64)
    packed = np.array([region.is_packed for region in geometry.regions])
    region_offset = np.array(layout.region_offsets, dtype=np.int64)
    block, slot, count = (runs[field].astype(np.int64) for field in RUN.names or ())

    # A row of this table is a run and a region; it becomes copies[i] segments.
    run_count, region_count = len(runs), len(chunk)
    if by_region:
        region, run = (axis.ravel() for axis in np.indices((region_count, run_count)))
    else:
        run, region = (axis.ravel() for axis in np.indices((run_count, region_count)))
    copies = np.where(packed[region], 1, count[run])
    within = np.arange(copies.sum()) - np.repeat(np.cumsum(copies) - copies, copies)
    run, region = np.repeat(run, copies), np.repeat(region, copies)

    group, place = np.divmod(slot, layout.group_slots)
    group_count = np.minimum(layout.group_slots, layout.slots - group * layout.group_slots)
    group_start = layout.data_offset + group * layout.group_bytes
    segments = np.empty(len(run), dtype=SEGMENT)
    segments["region"] = region
    segments["device_offset"] = (block[run] + within) * stride[region]
    segments["arena_offset"] = (
        group_start[run]
        + group_count[run] * region_offset[region]
        + (place[run] + within) * chunk[region]
    )
    segments["bytes"] = chunk[region] * np.where(packed[region], count[run], 1)
    return segments


def plan_copy(
    device_blocks: ArrayLike,
    slots: ArrayLike,
    geometry: KvGeometry,
    layout: ArenaLayout,
    *,
    by_region: bool = False,
    run_rows_max: int = 2**31 - 1,
) -> NDArray[np.void]:
    """Return the copies for the rows: `coalesce`, then `segments_of`, after a check of all indices.

    Raises
    ------
    GeometryError
        If geometry and layout have different chunks.
    TransferError
        If a device block or a slot does not exist. Nothing is planned then.
    """
    if geometry.chunk_bytes != layout.chunk_bytes:
        raise GeometryError(
            f"chunks of the KV cache {geometry.chunk_bytes} differ from those of the arena "
            f"{layout.chunk_bytes}"
        )
    for what, values, limit in (
        ("device block", np.asarray(device_blocks), geometry.num_blocks),
        ("slot", np.asarray(slots), layout.slots),
    ):
        bad = np.flatnonzero((values < 0) | (values >= limit))
        if len(bad):
            raise TransferError(
                f"row {bad[0]}: {what} {values[bad[0]]} is not allowed: 0 to {limit - 1}"
            )
    runs = coalesce(device_blocks, slots, layout.group_slots, run_rows_max=run_rows_max)
    return segments_of(runs, geometry, layout, by_region=by_region)
