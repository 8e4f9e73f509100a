# SPDX-License-Identifier: Apache-2.0
"""Slabs without shared memory, as a segment: so that all commands show them in the same way.

Block *i* is what slot *i* holds, on all ranks whose slabs were read. It is what a start would find,
and may be more than there was: a block that left the disk tier stays in its slot until the slot is
written again.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm._fast import contract
from kvbm._fast.segment import Shape
from kvbm.inspect.capture import Capture
from kvbm.inspect.decode import DISK_TIERS, RECORD_OF, Segment
from kvbm.inspect.records import Array, record_dtype
from kvbm.inspect.slab import Headers, digests_of
from kvbm.leader.disk_opening import common_headers

__all__ = ["SlabSegment", "decoded"]


def decoded(capture: Capture) -> Segment:
    """A capture of whichever kind, decoded."""
    return SlabSegment(capture) if capture.kind == "slab" else Segment(capture)


class SlabSegment(Segment):
    """The slabs of one instance, decoded."""

    tiers = DISK_TIERS
    pools: Mapping[str, str] = {"disk": "host"}

    def __init__(self, capture: Capture) -> None:
        super().__init__(capture)
        self.damage = [text for facts in self.slabs.values() for text in facts.damage]
        count = max((len(facts.headers) for facts in self.slabs.values()), default=0)
        if count:
            self.shape = Shape(count, count, 0, max(self.slabs) + 1, 0, 1, False)

    def _find_sections(self) -> dict[str, contract.Section]:
        return {}

    @functools.cached_property
    def header(self) -> Any:
        """What a segment would have, from the first superblock that can be read."""
        found = np.zeros(1, record_dtype("kv_header"))[0]
        for facts in self.slabs.values():
            if facts.superblock is not None:
                found["magic"] = contract.MAGIC
                found["nonce"] = facts.superblock.nonce
                found["key_epoch"] = facts.superblock.epoch
                found["fingerprint"] = np.frombuffer(facts.superblock.fingerprint, np.uint8)
                break
        return found

    @functools.cached_property
    def held(self) -> Headers:
        """Headers of the slots that hold the same block on all ranks."""
        return common_headers([facts.valid for facts in self.slabs.values()])

    def array(self, name: str) -> Array:
        """Records of a section; only blocks are made of the headers."""
        if name == "blocks":
            return self._records
        if name == "cold":
            return self._cold
        return np.zeros(0, record_dtype(RECORD_OF[name]))

    @functools.cached_property
    def _cold(self) -> Array:
        found = np.zeros(self.capacity("disk"), record_dtype("kv_block_cold"))
        held = self.held
        for name in ("sequence_hash", "position", "group"):
            found[name][held["slot"]] = held[name]
        found["registered_ns"][held["slot"]] = held["written_ns"]
        return found

    @functools.cached_property
    def _records(self) -> Array:
        found = np.zeros(self.capacity("disk"), record_dtype("kv_block"))
        held, slot = self.held, self.held["slot"].astype(np.int64)
        parent = _parents(held)
        known = parent >= 0
        generation = _masked("block", "generation", held["generation"])
        children = np.bincount(parent[known], minlength=len(found)).astype(np.uint64)
        registered = next(n for n, name in contract.BLOCK_STATES.items() if name == "registered")
        word = _put("block", "state", np.full(len(held), registered, np.uint64))
        word |= _put("block", "generation", generation)
        found["word"][slot] = word | _put("block", "children", children[slot])
        found["digest_lo"][slot], found["digest_hi"][slot] = held["digest_lo"], held["digest_hi"]
        found["parent"][slot] = parent + 1
        of_slot = np.zeros(len(found), np.uint64)
        of_slot[slot] = generation
        named = np.where(known, of_slot[np.where(known, parent, 0)], 0)
        found["parent_generation"][slot] = named
        ready = next(n for n, name in contract.PLACEMENT_STATES.items() if name == "ready")
        place = _put("placement", "state", np.full(len(held), ready, np.uint64))
        place |= _put("placement", "generation", generation)
        found["placement"][slot, 0] = place | _put("placement", "slot", slot.astype(np.uint64))
        order = np.argsort(np.argsort(held["written_ns"], kind="stable"), kind="stable")
        found["recency"][slot] = _put("recency", "tick", order.astype(np.uint64))
        return found

    def capacity(self, pool: str) -> int:
        """Slots."""
        return 0 if self.shape is None else self.shape.block_capacity

    def free(self, pool: str) -> npt.NDArray[np.bool_]:
        """Whether each slot holds nothing on some rank."""
        free = np.ones(self.capacity(pool), np.bool_)
        free[self.held["slot"]] = False
        return free


def _parents(held: Headers) -> npt.NDArray[np.int64]:
    """Slot of each header's parent, -1 where there is none."""
    found = np.full(len(held), -1, np.int64)
    if len(held) == 0:
        return found
    own, wanted = digests_of(held, "digest"), digests_of(held, "parent")
    order = np.argsort(own, kind="stable")
    place = np.searchsorted(own[order], wanted)
    place = order[np.minimum(place, len(order) - 1)]
    there = (
        (own[place] == wanted) & (held["position"] > 0) & (held["group"] == held["group"][place])
    )
    found[there] = held["slot"][place[there]]
    return found


def _masked(word: str, name: str, values: Array) -> npt.NDArray[np.uint64]:
    mask = contract.BITS[word][name]
    width = (mask // (mask & -mask)).bit_length()
    return values.astype(np.uint64) & np.uint64((1 << width) - 1)


def _put(word: str, name: str, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Values as that part of a word."""
    mask = contract.BITS[word][name]
    return _masked(word, name, values) << np.uint64((mask & -mask).bit_length() - 1)
