# SPDX-License-Identifier: Apache-2.0
"""A segment full of blocks for benchmarks, and how large it is.

KVBM_BENCH_BLOCKS sets the number of blocks (default one million: about 120 MB of shared memory);
the tests run the benchmarks with a few thousand.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import posix_ipc

from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable
from kvbm._fast.participants import claim_leader
from kvbm._fast.segment import Segment, shape_for

BLOCKS = int(os.environ.get("KVBM_BENCH_BLOCKS", "1_000_000"))
CHAIN = min(2000, BLOCKS // 4)
HASH_BYTES = 32


def hashes(count: int) -> list[bytes]:
    """Return random block hashes, each an object of its own as an engine's are."""
    data = os.urandom(HASH_BYTES * count)
    return [data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES)]


def fill(table: OperationTable, keys: Keys) -> None:
    """Cache a chain as a leader does: the end is returned first."""
    refs = [ref for ref, _ in table.reserve(keys, 0, len(keys))]
    assert table.publish(refs) == len(keys)
    for ref in reversed(refs):
        table.unpin(ref)


def leader(name: str, engine_key: int) -> OperationTable:
    """Attach as a leader."""
    segment = Segment.attach(name)
    claim_leader(segment, engine_key)
    return OperationTable(segment)


@contextlib.contextmanager
def segment(blocks: int = BLOCKS) -> Iterator[str]:
    """Make a segment of that many blocks, all of whose slots can be used; its name."""
    name = f"/kvbm-bench-{os.getpid()}"
    made = Segment.create(name, shape_for(blocks, 0, 1, 16, True), bytes(32), b"{}")
    try:
        made.set_ready_slots(0, blocks)
        yield name
    finally:
        made.close()
        posix_ipc.unlink_shared_memory(name)
