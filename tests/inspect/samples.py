# SPDX-License-Identifier: Apache-2.0
"""A small instance with something of everything, and snapshots of it that are always the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable
from kvbm.inspect.capture import Capture, capture, write_snapshot
from kvbm.inspect.records import record_dtype
from kvbm.tiers.disk_device import DiskDevice
from tests.fast.instances import Instance, cache, digests

NOW_NS = 1_000_000 * 10**9
"""Both clocks at the moment of a frozen capture."""

FILE = "sample.kvbm"


@dataclass
class Sample:
    """The instance, its leaders, and what they hold."""

    instance: Instance
    table: OperationTable
    held: int
    handles: list[int]

    @property
    def name(self) -> str:
        """Name of the instance."""
        return self.instance.name.removeprefix("/kvbm-")


def chain(table: OperationTable, hashes: list[bytes], group: int = 0) -> list[int]:
    """Cache a sequence; references to its blocks that are new."""
    return cache(table, Keys(hashes, 1, group))


def fill(instance: Instance) -> Sample:
    """A tree with two branches, a chain that is held, another group, an operation, two workers."""
    table = instance.leader(engine_key=0xE1)
    instance.worker(0, 0)
    instance.worker(0, 1)
    shared = digests(6, "shared")
    chain(table, shared + digests(4, "left"))
    chain(table, shared + digests(2, "right"))
    chain(table, digests(3, "other group"), group=1)
    held = Keys(digests(5, "held"))
    cache(table, held)
    _, ref = table.match(held, 0, 5)
    assert ref is not None
    handles, _, _ = table.store(Keys(digests(3, "new")), 0, 3, [7, 8, 9], None, 4, 0xABC)
    return Sample(instance, table, ref, handles)


def frozen(taken: Capture) -> Capture:
    """The capture with all that differs between two runs replaced by constants."""
    data = frozen_segment(taken.data)
    disk = taken.disk
    if disk is not None:
        slabs = {
            rank: replace(slab, path=f"kvbm-sample.disk.{rank}", in_use=True)
            for rank, slab in disk.slabs.items()
        }
        device = DiskDevice("nvme0n1", "A Drive", False, 7 << 40, 0.07, 0.98, 9 << 40, 0).row()
        disk = replace(frozen(disk), source="sample.disk", slabs=slabs, device=device)
    return replace(
        taken,
        source="sample",
        data=data,
        realtime_ns=NOW_NS,
        monotonic_ns=NOW_NS,
        objects={"/kvbm-sample": len(data)},
        owner="somebody",
        disk=disk,
    )


def frozen_segment(found: bytes) -> bytes:
    """The bytes of a segment with nonce, process ids and times replaced."""
    data = bytearray(found)

    def field(section_at: int, record: str, count: int, name: str) -> np.ndarray:
        return np.frombuffer(data, record_dtype(record), count, section_at)[name]

    from kvbm._fast.contract import LINES, sections
    from kvbm.inspect.records import shape_of

    shape = shape_of(found)
    assert shape is not None
    at = {name: section.offset for name, section in sections(shape).items()}
    header = np.frombuffer(data, record_dtype("kv_header"), 1)
    header["nonce"], header["created_ns"] = 0x1234, NOW_NS - 3600 * 10**9
    used = field(at["participants"], "kv_participant", LINES, "role") != 0
    field(at["participants"], "kv_participant", LINES, "pid")[used] = 4711
    started = field(at["participants"], "kv_participant", LINES, "started_ns")
    started[used] = NOW_NS - 600 * 10**9
    registered = field(at["cold"], "kv_block_cold", shape.block_capacity, "registered_ns")
    some = registered != 0
    registered[some] = NOW_NS - np.arange(some.sum(), dtype=np.uint64)[::-1] * 10**9 - 5 * 10**8
    submitted = field(at["operations"], "kv_operation", 2048, "submitted_ns")
    submitted[submitted != 0] = NOW_NS - 25 * 10**7
    store = field(at["counters"], "kv_counters", LINES, "value")
    assert not store[:, 16:18].any()  # no times that differ
    return bytes(data)


def frozen_snapshot(sample: Sample, folder: Path) -> Path:
    """Write a frozen capture of the sample into a folder."""
    path = folder / FILE
    write_snapshot(frozen(capture(sample.name, slabs=True)), path)
    return path
