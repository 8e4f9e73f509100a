# SPDX-License-Identifier: Apache-2.0
"""Where a slot's bytes lie in a host arena: arithmetic only, no memory is touched.

::

    offset 0        header page                 4096 bytes; the worker's announcement
    table_offset    slot headers                64 bytes a slot, padded to whole pages
    data_offset     group 0, group 1, ...       group_bytes each, padded to whole pages

A group holds `group_slots` slots, layer-major: all its slots' chunks of region 0, then those of
region 1, and so on. So a run of slots inside a group is one contiguous piece a region, which is
what makes copies long. The last group may have fewer slots; it is packed the same way with its own
count.

    offset(slot, region) = data_offset + group * group_bytes
                           + (slots in the group) * region_offset + (slot % group_slots) * chunk

A disk tier can rely on this: groups begin on a page and have whole pages; a slot is one piece a
region, ascending, so that it is read or written by one ``preadv`` / ``pwritev`` (of at most 1024
pieces a call); every piece begins and ends on a multiple of `direct_io_alignment`, so that direct
I/O of single slots works where the device's logical block is no larger than that. Chunks are not
padded, so it may be as small as 1; whole groups are aligned whatever the chunks are.

The slot header is ``kv_slot_header`` in ``kvbm/_fast/copy.h``, which has the same arithmetic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from kvbm.errors import GeometryError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Buffer

__all__ = ["PAGE_BYTES", "SLOT_HEADER", "ArenaLayout", "default_group_slots", "slot_headers"]

PAGE_BYTES = 4096
SLOTS_MAX = 2**31 - 1
GROUP_SLOTS_MIN = 8
GROUP_SLOTS_MAX = 64
# Bytes of a whole group in one region. The bus is busy with 1 MiB for 20 us, several times what it
# costs to start a copy; more would spread a slot further without making copies faster.
GROUP_REGION_BYTES = 1 << 20

SLOT_HEADER = np.dtype(
    [
        ("word", "<u8"),
        ("digest_lo", "<u8"),
        ("digest_hi", "<u8"),
        ("checksum", "<u8"),
        ("payload_bytes", "<u8"),
        ("block", "<u4"),
        ("group", "<u4"),
        ("rank", "<u4"),
        ("reserved0", "<u4"),
        ("reserved1", "<u8"),
    ]
)


def default_group_slots(chunk_bytes: Sequence[int]) -> int:
    """Return the slots of a group for these chunk sizes: a power of two, 8 to 64.

    The smallest for which a whole group's piece of an average region has 1 MiB: 16 for the 64 KiB
    of an 8B model, 64 for 16 KiB. A slot of 32 regions then lies within 32 MiB.
    """
    average = max(1, sum(chunk_bytes) // len(chunk_bytes))
    wanted = -(-GROUP_REGION_BYTES // average)
    return min(GROUP_SLOTS_MAX, max(GROUP_SLOTS_MIN, 1 << (wanted - 1).bit_length()))


@dataclass(frozen=True)
class ArenaLayout:
    """Layout of one rank's arena for blocks of one shape.

    Parameters
    ----------
    slots
        Number of slots, 1 to 2**31 - 1.
    chunk_bytes
        Chunk size of each region, in order.
    group_slots
        Slots of a group; `default_group_slots` by default.

    Raises
    ------
    GeometryError
        If a number is not allowed.
    """

    slots: int
    chunk_bytes: tuple[int, ...]
    group_slots: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "chunk_bytes", tuple(map(int, self.chunk_bytes)))
        if not self.chunk_bytes or min(self.chunk_bytes) < 1:
            raise GeometryError(
                f"chunk_bytes={self.chunk_bytes} is not allowed: one or more, each > 0"
            )
        if not 1 <= self.slots <= SLOTS_MAX:
            raise GeometryError(f"slots={self.slots} is not allowed: 1 to {SLOTS_MAX}")
        if self.group_slots == 0:
            object.__setattr__(self, "group_slots", default_group_slots(self.chunk_bytes))
        if not 1 <= self.group_slots <= SLOTS_MAX:
            raise GeometryError(f"group_slots={self.group_slots} is not allowed: 1 to {SLOTS_MAX}")

    @cached_property
    def bytes_per_slot(self) -> int:
        """Bytes of one slot: the sum of the chunks."""
        return sum(self.chunk_bytes)

    @cached_property
    def region_offsets(self) -> tuple[int, ...]:
        """Sum of the chunks before each region."""
        return tuple(itertools.accumulate(self.chunk_bytes[:-1], initial=0))

    @property
    def table_offset(self) -> int:
        """Offset of the first slot header, in bytes from the begin of the arena."""
        return PAGE_BYTES

    @cached_property
    def data_offset(self) -> int:
        """Offset of the first group."""
        return PAGE_BYTES + _whole_pages(self.slots * SLOT_HEADER.itemsize)

    @cached_property
    def group_bytes(self) -> int:
        """Bytes from one group to the next."""
        return _whole_pages(self.group_slots * self.bytes_per_slot)

    @cached_property
    def groups(self) -> int:
        """Number of groups, the last of which may have fewer slots."""
        return -(-self.slots // self.group_slots)

    @cached_property
    def total_bytes(self) -> int:
        """Size of the arena; whole pages."""
        last = self.slots - (self.groups - 1) * self.group_slots
        return (
            self.data_offset
            + (self.groups - 1) * self.group_bytes
            + _whole_pages(last * self.bytes_per_slot)
        )

    @cached_property
    def direct_io_alignment(self) -> int:
        """Largest power of two, at most a page, that divides offset and length of all pieces."""
        return math.gcd(PAGE_BYTES, *self.chunk_bytes)

    def slots_in_group(self, group: int) -> int:
        """Return the number of slots of a group."""
        return min(self.group_slots, self.slots - group * self.group_slots)

    def header_offset(self, slot: int) -> int:
        """Return where the header of a slot begins."""
        return self.table_offset + self._checked(slot) * SLOT_HEADER.itemsize

    def offset(self, slot: int, region: int) -> int:
        """Return where a slot's piece of a region begins."""
        group, place = divmod(self._checked(slot), self.group_slots)
        return (
            self.data_offset
            + group * self.group_bytes
            + self.slots_in_group(group) * self.region_offsets[region]
            + place * self.chunk_bytes[region]
        )

    def pieces(self, slot: int) -> list[tuple[int, int]]:
        """Return (offset, bytes) of a slot's pieces, ascending: the vector of its disk I/O."""
        return [(self.offset(slot, r), size) for r, size in enumerate(self.chunk_bytes)]

    def usable_slots(self, arena_bytes: int) -> int:
        """Return how many slots, from 0 on, lie within the first `arena_bytes` bytes.

        Whole groups, since each slot is spread over its group. For an arena whose memory is
        reserved chunk by chunk from the front.
        """
        if arena_bytes >= self.total_bytes:
            return self.slots
        groups = max(0, arena_bytes - self.data_offset) // self.group_bytes
        return min(groups, self.groups - 1) * self.group_slots

    def _checked(self, slot: int) -> int:
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} is not allowed: 0 to {self.slots - 1}")
        return slot


def slot_headers(arena: Buffer, layout: ArenaLayout) -> NDArray[np.void]:
    """Return the slot headers of an arena as an array of `SLOT_HEADER`, a view of the buffer.

    What other processes change meanwhile shows up in it: it is for tests and the viewer.
    """
    return np.ndarray((layout.slots,), SLOT_HEADER, memoryview(arena), layout.table_offset)


def _whole_pages(count: int) -> int:
    return -(-count // PAGE_BYTES) * PAGE_BYTES
