# SPDX-License-Identifier: Apache-2.0
"""Valid segments, as bytes: what the cases are made from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvbm._fast import contract
from kvbm._fast.contract import Section
from kvbm._fast.disk_table import DiskTable
from kvbm._fast.keys import Keys
from kvbm._fast.participants import claim_leader
from kvbm._fast.segment import Shape
from tests.fast.instances import Instance, cache, digests, instance
from tests.fast.raw_segment import SHM
from tests.fast.test_disk_table import headers_of
from tests.inspect.samples import fill

SHARED = digests(6, "shared")
CHAINS = (
    SHARED + digests(4, "left"),
    SHARED + digests(2, "right"),
    digests(5, "held"),
    digests(9, "long"),
    digests(40, "more"),
)


@dataclass(frozen=True)
class Image:
    """Bytes of a segment, and where its sections are."""

    name: str
    data: bytes
    shape: Shape

    @functools.cached_property
    def used(self) -> dict[str, list[int]]:
        """Records of each section that are not all zero."""
        found = {}
        for name, section in self.sections.items():
            size = contract.RECORDS[section.record].size if section.record else 8
            end = section.offset + section.length * size
            rows = np.frombuffer(self.data[section.offset : end], np.uint8).reshape(-1, size)
            found[name] = [int(number) for number in np.flatnonzero(rows.any(axis=1))]
        return found

    @functools.cached_property
    def sections(self) -> dict[str, Section]:
        """All sections, without the mark of the end."""
        found = contract.sections(self.shape)
        found.pop("end")
        return {name: section for name, section in found.items() if section.length}


def _busy(one: Instance) -> None:
    """Two leaders at work: pins, reservations, stores and loads that nobody has begun."""
    fill(one)
    second = one.leader(engine_key=0xE2)
    one.worker(1, 0)
    second.reserve(Keys(digests(4, "reserved")), 0, 4)
    count, ref = second.match(Keys(CHAINS[0]), 0, 10)
    assert ref is not None
    assert second.load(ref, 0, list(range(count)), 1) is not None


def _full(one: Instance) -> None:
    """Nobody is attached, and every slot holds a block."""
    table = one.leader()
    for chain in CHAINS[:4]:
        cache(table, Keys(chain))
    cache(table, Keys(digests(64 - len(table_blocks(one)), "rest")))
    table.segment.close()


def table_blocks(one: Instance) -> list[int]:
    """Numbers of the blocks that are in use."""
    return [number for number, block in enumerate(one.raw.blocks()) if block.state != 0]


def _disk(one: Instance) -> None:
    """A disk tier's segment, registered from the headers of a slab."""
    segment = one.attach()
    claim_leader(segment, 1)
    table = DiskTable(segment)
    for number, chain in enumerate(CHAINS[:2]):
        keys = Keys(chain)
        slots = list(range(12 * number, 12 * number + len(keys)))
        table.restore(headers_of(keys, slots, 1 + 100 * number))
    table.reserve_run(Keys(CHAINS[2]), 0, 3, None)


def make(name: str) -> Image:
    """Make one image; its segment is gone afterwards."""
    build, options = IMAGES[name]
    one = instance(**options)
    try:
        build(one)
        data = (SHM / one.name.lstrip("/")).read_bytes()
        return Image(name, data, one.shape)
    finally:
        one.remove()


IMAGES: dict[str, tuple[Callable[[Instance], None], dict[str, int]]] = {
    "busy": (_busy, {"host_slots": 64, "ranks": 2}),
    "full": (_full, {"host_slots": 64, "ranks": 1, "disk_slots": 16}),
    "disk": (_disk, {"host_slots": 48, "ranks": 1}),
}
