# SPDX-License-Identifier: Apache-2.0
"""How a CUDA backend moves the bytes of a KV-cache group: a pure choice, from shape and driver.

The sizes at which one way becomes better than another are measured on each device
(kvbm/transfer/calibration.py); here are those of the device that the rest was found on.

What it knows of the bus, measured on one H100 with PCIe 5 (512 random blocks, GB/s device to host /
host to device; one big copy reaches 55 / 54; us are CPU time a block):

=====================================  ===============  ===============  ==================
submission                             32 x 64 KiB      64 x 32 KiB      61 x 18 KiB
=====================================  ===============  ===============  ==================
one call a piece                       17 / 16, 120 us  11 / 10, 190 us  7 / 6, 170 us
batches, stream order, 64 blocks each  51 / 49, 22 us   33 / 33, 59 us   32 / 14, 60 us
batches, any order, 8 blocks each      54 / 48, 20 us   46 / 52, 40 us   37 / 32, 32 us
one 2D copy a block                    50 / 50, 2 us    50 / 50, 3 us    49 / 46, 2 us
=====================================  ===============  ===============  ==================

So: a 2D copy where the regions have one pitch inside one allocation and the pieces are short, else
batches. Only loads may be read in any order: the arena is complete before a load begins, the source
of a store is written by kernels before it in the stream. Runs of blocks make pieces long, which
helps all of them; the arena's layout exists for that.

Where the pieces of a chunk are short all the same (blocks that are no neighbours), it goes through
a staging buffer on the device: 2D copies between the buffer and runs of slots, and a kernel between
the buffer and the blocks (kvbm/_fast/cuda_staging.pyx). 512 random blocks, GB/s and CPU as above:

=====================================  ===============  ===============  ==================
                                       32 x 64 KiB      80 x 8 KiB       61 x 18 KiB
=====================================  ===============  ===============  ==================
batches, 256 pieces each               52 / 50, 32 us   18 / 16, 40 us   23 / 20, 52 us
staging buffer                         53 / 53, 2 us    50 / 52, 1 us    51 / 53, 1 us
=====================================  ===============  ===============  ==================

No kernel stores to host memory: one that does slows other kernels by 1.4 to 3.5 times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from kvbm.transfer.geometry import KvGeometry

__all__ = ["CopyMethod", "Crossover", "copy_method", "uniform_pitch"]

MAX_PITCH_BYTES = 2**31 - 1
"""What the driver takes (CU_DEVICE_ATTRIBUTE_MAX_PITCH of all devices so far)."""

PITCHED_BELOW_BYTES = 256 << 10
"""From this size of a piece on, batches are as fast, and copies overlap better."""

SEGMENTS = 256
"""Pieces in one submission: 8 blocks of 32 layers. More hold the driver's lock for longer (0.9 us a
piece), which a launching engine feels, and are no faster: 53 GB/s for random blocks of 32 x 64 KiB
with 256, 51 with 1,024, 49 with 4,096."""

CHUNK_BYTES = 16 << 20
"""Bytes between two events of a stream: 0.3 ms of the bus."""

CHUNKS_AHEAD = 2
"""Chunks on their way: one being copied and one behind it, so that the bus does not wait."""

STREAMS = 2
"""Streams that the chunks of one direction take in turn, so that others' copies come between."""

STAGED_BELOW_BYTES = 128 << 10
"""Chunks whose pieces are shorter than this on the average go through the staging buffer: pieces of
64 KiB keep the bus as busy, but take fifteen times the CPU, and two directions share the thread."""

STAGED_CTAS = 32
"""CTAs of the kernel between staging buffer and blocks: a chunk takes it less than 0.1 ms. Half as
many are slower for short pieces, twice as many are no faster; nor are CTAs with fewer threads for
shorter pieces."""

STAGED_STREAMS = STAGED_CHUNKS_AHEAD = 4
"""Streams, each with a staging buffer, and chunks on their way. Two are as fast on an idle device;
beside a prefill the kernels wait for other kernels to end, and four hide that (35 GB/s instead of
20)."""

Allocation = tuple[int, int]
"""Begin and size of an allocation, in bytes."""


class Crossover(NamedTuple):
    """Sizes of a piece from which on it goes straight: those of an H100, or of this device.

    Attributes
    ----------
    staged_below_bytes
        Shorter pieces, on the average of a chunk, go through the staging buffer.
    pitched_below_bytes
        Shorter pieces go as 2D copies where the regions have one pitch.
    """

    staged_below_bytes: int = STAGED_BELOW_BYTES
    pitched_below_bytes: int = PITCHED_BELOW_BYTES


class CopyMethod(NamedTuple):
    """How pieces are submitted for one KV-cache group.

    Attributes
    ----------
    pitch_bytes
        Bytes from one region to the next one where a 2D copy can take them all; 0 if it cannot.
    pitched_below_bytes
        A 2D copy is used for pieces shorter than this.
    segments
        Pieces in one submission.
    chunk_bytes
        Bytes that are submitted together, to whole blocks.
    chunks_ahead
        Chunks on their way at most.
    streams
        Streams of one direction, 1 to 4.
    staged_loads_below_bytes, staged_stores_below_bytes
        Chunks of shorter pieces go through a staging buffer on the device; 0 for none. Not where
        there is a pitch.
    ctas
        Of the kernel that works on the staging buffer.
    """

    pitch_bytes: int
    pitched_below_bytes: int
    segments: int
    chunk_bytes: int
    chunks_ahead: int
    streams: int
    staged_loads_below_bytes: int = 0
    staged_stores_below_bytes: int = 0
    ctas: int = STAGED_CTAS


def uniform_pitch(geometry: KvGeometry, allocation_of: Callable[[int], Allocation | None]) -> int:
    """Return the distance of all regions that one 2D copy can take, 0 if there is none.

    Parameters
    ----------
    geometry
        Regions of the group.
    allocation_of
        Allocation that an address lies in, None if unknown. The driver refuses a 2D copy that
        leaves its allocation, even if the memory behind it belongs to another one.
    """
    regions = geometry.regions
    first = regions[0]
    if len(regions) < 2 or any(
        (region.chunk_bytes, region.block_stride_bytes)
        != (first.chunk_bytes, first.block_stride_bytes)
        for region in regions
    ):
        return 0
    pitch = regions[1].base_address - first.base_address
    if not first.chunk_bytes <= pitch <= MAX_PITCH_BYTES or any(
        region.base_address != first.base_address + i * pitch for i, region in enumerate(regions)
    ):
        return 0
    found = allocation_of(first.base_address)
    last = regions[-1]
    end = last.base_address + (geometry.num_blocks - 1) * last.block_stride_bytes + last.chunk_bytes
    if found is None or not found[0] <= first.base_address < end <= sum(found):
        return 0
    return pitch


def copy_method(
    geometry: KvGeometry,
    allocation_of: Callable[[int], Allocation | None],
    *,
    has_batches: bool = True,
    staged: bool = True,
    crossover: Crossover | None = None,
) -> CopyMethod:
    """Choose how a group's pieces are submitted.

    Parameters
    ----------
    geometry, allocation_of
        As for `uniform_pitch`.
    has_batches
        Whether the driver takes many copies in one call; without, a 2D copy is always better.
    staged
        Whether chunks may go through a staging buffer.
    crossover
        What was measured of the device; by default what was of an H100.
    """
    pitch = uniform_pitch(geometry, allocation_of)
    limits = crossover or Crossover(STAGED_BELOW_BYTES, PITCHED_BELOW_BYTES)
    staged_below = limits.staged_below_bytes if staged and not pitch else 0
    return CopyMethod(
        pitch_bytes=pitch,
        pitched_below_bytes=limits.pitched_below_bytes if has_batches else 2**63,
        segments=SEGMENTS,
        chunk_bytes=CHUNK_BYTES,
        chunks_ahead=STAGED_CHUNKS_AHEAD if staged_below else CHUNKS_AHEAD,
        streams=STAGED_STREAMS if staged_below else STREAMS,
        staged_loads_below_bytes=staged_below,
        staged_stores_below_bytes=staged_below,
    )
