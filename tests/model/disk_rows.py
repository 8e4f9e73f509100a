# SPDX-License-Identifier: Apache-2.0
"""One block between a host slot and a disk slot, access by access: kvbm/_fast/disk_rows.pyx.

The order of the writes of a disk slot is that of kvbm/_fast/slab.h; syncs are left out, since here
processes die, not the machine.
"""

from __future__ import annotations

from tests.model.blocks import Answer, Process
from tests.model.cells import SPILL, TORN, Header, Row
from tests.model.explore import load, store


def move_row(p: Process, kind: str, row: Row) -> Answer:
    """Copy one row of a spill or a fetch; True if what has arrived is what the row says."""
    if kind == SPILL:
        done = yield from spill_row(p, row)
    else:
        done = yield from fetch_row(p, row)
    return done


def spill_row(p: Process, row: Row) -> Answer:
    """From a host slot to a disk slot."""
    assert p.disk is not None
    host = p.segment.bytes[row.slot][p.rank]
    header = p.disk.segment.header[row.disk_slot][p.rank]
    data = p.disk.segment.bytes[row.disk_slot][p.rank]
    yield store(header, None, "[B0]")
    checksum = yield load(host, "source")
    if p.rules.spill_compares and checksum != row.digest:
        return False
    yield store(data, TORN, "[B2]")
    source = yield load(host, "[B2]")
    yield store(data, source, "[B2]")
    after = yield load(host, "source")
    if p.rules.spill_compares and after != row.digest:
        return False
    yield store(header, Header(row.digest, checksum), "[B4]")
    return True


def fetch_row(p: Process, row: Row) -> Answer:
    """From a disk slot to a host slot; a disk slot that does not pass is emptied."""
    assert p.disk is not None
    host = p.segment.bytes[row.slot][p.rank]
    cell = p.disk.segment.header[row.disk_slot][p.rank]
    header = yield load(cell, "header")
    if header is None or (p.rules.fetch_compares_digest and header.digest != row.digest):
        return False
    yield store(host, TORN, "copy")
    source = yield load(p.disk.segment.bytes[row.disk_slot][p.rank], "read")
    yield store(host, source, "copy")
    if p.rules.fetch_compares_checksum and source != header.checksum:
        yield store(cell, None, "empty")
        return False
    return True
