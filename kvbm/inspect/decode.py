# SPDX-License-Identifier: Apache-2.0
"""Bytes of a segment -> arrays. Decodes what is there and says what is not; never fails on content.

The layout comes from the compiler (kvbm/_fast/contract.pyx), the sizes from the header. Where the
header's sizes are impossible, only the sections are decoded whose place does not depend on them;
where the bytes end early, the records that are there whole.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm._fast import contract
from kvbm._fast.contract import Section
from kvbm._fast.segment import COUNTER_NAMES, Shape
from kvbm.inspect.capture import Capture
from kvbm.inspect.records import Array, part, record_dtype, shape_of
from kvbm.inspect.slab import SlabFacts
from kvbm.instance import segment_name
from kvbm.tiers.host import ArenaHeader
from kvbm.transfer.arena_layout import SLOT_HEADER

RECORD_OF = {
    name: section.record
    for name, section in contract.sections(Shape(1, 1, 1, 1, 1, 1, True)).items()
}
# The disk tier's segment is a table of its own, in which a host slot is a disk slot.
HOST_TIERS, DISK_TIERS = {0: "host"}, {0: "disk"}
HOST_POOLS = {"blocks": "blocks", "host": "host"}
DISK_POOLS = {"blocks": "blocks", "disk": "host"}

Words = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]


class Blocks:
    """The block table, a column an attribute; cold fields are zero where they are missing."""

    def __init__(self, records: Array, cold: Array) -> None:
        self.records = records
        words = records["word"]
        self.words: Words = words
        self.state = part(words, "block", "state")
        self.holders = part(words, "block", "holders")
        self.children = part(words, "block", "children")
        self.generation = part(words, "block", "generation")
        self.parent = records["parent"].astype(np.int64) - 1
        self.parent_generation = records["parent_generation"].astype(np.int64)
        self.priority = part(records["recency"], "recency", "priority")
        self.tick = part(records["recency"], "recency", "tick")
        placement = records["placement"][:, : len(contract.TIERS)]
        self.placement_state = part(placement, "placement", "state")
        self.placement_generation = part(placement, "placement", "generation")
        self.slot = part(placement, "placement", "slot")
        padded = np.zeros(len(records), record_dtype("kv_block_cold"))
        count = min(len(records), len(cold))
        padded[:count] = cold[:count]
        self.position = padded["position"].astype(np.int64)
        self.group = padded["group"].astype(np.int64)
        self.sequence_hash: Words = padded["sequence_hash"]
        self.registered_ns = padded["registered_ns"].astype(np.int64)
        self.uses = padded["uses"].astype(np.int64)

    def __len__(self) -> int:
        return len(self.records)

    @functools.cached_property
    def digests(self) -> npt.NDArray[np.uint8]:
        """Bytes of the digests, 16 a block."""
        both = np.empty((len(self), 2), "<u8")
        both[:, 0], both[:, 1] = self.records["digest_lo"], self.records["digest_hi"]
        return both.view(np.uint8)

    @functools.cached_property
    def parent_in_table(self) -> npt.NDArray[np.bool_]:
        """Whether a block names a parent that is in the table."""
        return (self.parent >= 0) & (self.parent < len(self))

    @functools.cached_property
    def parent_found(self) -> npt.NDArray[np.bool_]:
        """Whether the parent that a block names is in the table, with the generation it names."""
        inside: Mask = self.parent_in_table.copy()
        if len(self) == 0:
            return inside
        named = self.generation[np.where(inside, self.parent, 0)]
        inside &= named == self.parent_generation
        return inside

    @functools.cached_property
    def registered_children(self) -> npt.NDArray[np.int64]:
        """How many registered blocks name each block as their parent."""
        child = self.of_state("registered") & self.parent_in_table
        return np.bincount(self.parent[child], minlength=len(self))

    def of_state(self, name: str) -> npt.NDArray[np.bool_]:
        """Mask of the blocks in a state."""
        number = next(n for n, known in contract.BLOCK_STATES.items() if known == name)
        found: Mask = self.state == number
        return found


class Segment:
    """A captured segment, decoded.

    Attributes
    ----------
    capture : Capture
        What was decoded.
    damage : list of str
        What could not be decoded, or is not as it must be.
    shape : Shape or None
        Sizes; None if the header is missing or impossible.
    tiers : dict of int to str
        Names of the tiers in which its blocks have placements.
    pools : dict of str to str
        Names of its pools, and as which they stand in layout.h.
    """

    tiers: Mapping[int, str] = HOST_TIERS
    pools: Mapping[str, str] = HOST_POOLS

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.damage: list[str] = []
        self.shape: Shape | None = None
        self._sections = self._find_sections()
        if self.is_of_disk:
            self.tiers, self.pools = DISK_TIERS, DISK_POOLS

    def _find_sections(self) -> dict[str, Section]:
        data = self.capture.data
        shape = shape_of(data)
        if shape is None:
            self.damage.append(f"it has {len(data)} bytes, too few for a header")
            return {}
        header = self.header
        if int(header["magic"]) != contract.MAGIC:
            self.damage.append(
                "it carries no magic: its creator had not finished, or it is no segment"
            )
        found = int(header["format_version"]), int(header["layout_check"])
        wanted = contract.FORMAT_VERSION, contract.LAYOUT_CHECK
        if found != wanted:
            self.damage.append(
                f"it has format {found[0]}/{found[1]:#x}, this version decodes "
                f"{wanted[0]}/{wanted[1]:#x}: what follows may be wrong"
            )
        sections = contract.sections(shape)
        end = sections["end"].offset if sections else 0
        if not sections:
            self.damage.append(f"its header has impossible sizes: {shape}")
            return contract.fixed_sections()
        self.shape = shape
        length = self.capture.objects.get(segment_name(self.capture.source), len(data))
        if self.capture.kind == "live" and length > len(data):
            self.damage.append(f"it has holes: {len(data)} of {length} bytes are there")
        if end != len(data) or end != int(header["total_bytes"]):
            self.damage.append(
                f"it has {len(data)} bytes; its header says {int(header['total_bytes'])}, "
                f"its sizes make {end}"
            )
        return sections

    @property
    def is_of_disk(self) -> bool:
        """Whether it is a disk tier's: its description names slabs in place of a model."""
        return self.capture.tier == "disk" or "slabs" in self.description

    @property
    def checked_tiers(self) -> Mapping[int, str]:
        """All tiers that its blocks have words for."""
        return self.tiers if self.is_of_disk else contract.TIERS

    @property
    def checked_pools(self) -> Mapping[str, str]:
        """All pools that it has, also those in which there is nothing."""
        return self.pools if self.is_of_disk else {name: name for name in contract.POOLS.values()}

    @functools.cached_property
    def disk(self) -> Segment | None:
        """The segment of the instance's disk tier; None if it was not captured."""
        return None if self.capture.disk is None else Segment(self.capture.disk)

    @functools.cached_property
    def slabs(self) -> dict[int, SlabFacts]:
        """What the slabs say of themselves, by rank."""
        return {rank: SlabFacts(head) for rank, head in sorted(self.capture.slabs.items())}

    def of_tier(self, tier: str | None) -> Segment:
        """The block table of a tier; this one if there is none of that name."""
        return self.disk if tier == "disk" and self.disk is not None else self

    def array(self, name: str) -> Array:
        """Records of a section that are there whole."""
        section = self._sections.get(name)
        dtype = record_dtype(RECORD_OF[name])
        if section is None or section.length == 0:
            return np.zeros(0, dtype)
        data = self.capture.data
        there = max(0, min(section.length, (len(data) - section.offset) // dtype.itemsize))
        if there < section.length:
            text = f"{name}: {there} of {section.length} records are there"
            if text not in self.damage:
                self.damage.append(text)
        if there == 0:
            return np.zeros(0, dtype)
        return np.frombuffer(data, dtype, there, section.offset)

    @functools.cached_property
    def header(self) -> Any:
        """The header record; zeros if there is none."""
        if len(self.capture.data) < contract.PAGE_BYTES:
            return np.zeros(1, record_dtype("kv_header"))[0]
        return np.frombuffer(self.capture.data, record_dtype("kv_header"), 1)[0]

    @functools.cached_property
    def blocks(self) -> Blocks:
        """The block table."""
        return Blocks(self.array("blocks"), self.array("cold"))

    @functools.cached_property
    def participants(self) -> Array:
        """Participant lines."""
        return self.array("participants")

    @functools.cached_property
    def operations(self) -> Array:
        """Operations of all leaders, one after the other."""
        return self.array("operations")

    @functools.cached_property
    def rings(self) -> Array:
        """Rings, the ranks of a leader beside each other."""
        return self.array("rings")

    @functools.cached_property
    def buckets(self) -> Array:
        """Entries of the index, [bucket, place]."""
        found: Array = self.array("buckets")["entry"]
        return found

    def capacity(self, pool: str) -> int:
        """Records or slots of a pool, as far as its words are there: a header may lie."""
        if self.shape is None:
            return 0
        pool = self.pools.get(pool, pool)
        sizes = {"blocks": self.shape.block_capacity, "host": self.shape.host_slots}
        return min(sizes.get(pool, self.shape.disk_slots), 64 * len(self.array(f"pool.{pool}")))

    def free(self, pool: str) -> npt.NDArray[np.bool_]:
        """Whether each record or slot of a pool is free."""
        words = self.array(f"pool.{self.pools.get(pool, pool)}")
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        return bits[: self.capacity(pool)].astype(np.bool_)

    def counters(self) -> dict[str, int]:
        """Counters, summed over all lines."""
        values = self.array("counters")["value"]
        with np.errstate(over="ignore"):
            total = values.sum(axis=0, dtype=np.uint64)
        return {name: int(total[i]) if len(values) else 0 for i, name in enumerate(COUNTER_NAMES)}

    def cpu_seconds(self) -> npt.NDArray[np.float64]:
        """CPU time that was counted on each line; empty where there are no counters to read."""
        values = self.array("counters")["value"]
        seconds: npt.NDArray[np.float64] = values[:, COUNTER_NAMES.index("cpu_ns")] / 1e9
        return seconds

    def is_alive(self, line: int) -> bool | None:
        """Whether a process holds the lock of a line; None: unknown."""
        return None if self.capture.locked is None else line in self.capture.locked

    @functools.cached_property
    def description(self) -> Mapping[str, Any]:
        """What the fingerprint was made of; empty if it cannot be read."""
        text = self.header["description"].tobytes().split(b"\0", 1)[0]
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    @functools.cached_property
    def arenas(self) -> dict[int, ArenaHeader | None]:
        """Announcement of each arena, by rank; None where it is damaged."""
        return {
            rank: ArenaHeader.unpack(head[: contract.PAGE_BYTES])
            for rank, head in sorted(self.capture.arenas.items())
        }

    def slot_headers(self, rank: int) -> Array:
        """Slot headers of an arena that were captured."""
        head = self.capture.arenas.get(rank, b"")[contract.PAGE_BYTES :]
        return np.frombuffer(head, SLOT_HEADER, len(head) // SLOT_HEADER.itemsize)

    def age_seconds(self, monotonic_ns: int) -> float | None:
        """Seconds since a moment of the monotonic clock; None if it cannot be said."""
        now = self.capture.monotonic_ns
        if now is None or monotonic_ns <= 0 or monotonic_ns > now:
            return None
        return (now - monotonic_ns) / 1e9

    def seconds_since(self, realtime_ns: int) -> float | None:
        """Seconds since a moment of the wall clock; None if it cannot be said."""
        now = self.capture.realtime_ns
        if now is None or realtime_ns <= 0 or realtime_ns > now:
            return None
        return (now - realtime_ns) / 1e9


def name_of(names: Mapping[int, str], value: int) -> str:
    """Name of a value, or its number if it has none."""
    return names.get(value, f"unknown ({value})")
