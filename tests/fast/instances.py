# SPDX-License-Identifier: Apache-2.0
"""Small segments for tests, under names of their own; proven idle before they are removed."""

from __future__ import annotations

import hashlib
import itertools
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import posix_ipc

from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable
from kvbm._fast.participants import claim_leader, claim_worker
from kvbm._fast.segment import Segment, Shape, shape_for
from kvbm._fast.table import BlockTable
from tests.fast.raw_segment import RawSegment

FINGERPRINT = bytes(range(32))
DESCRIPTION = b'{"model": "tiny"}'
_numbers = itertools.count()


def unique_name() -> str:
    """Return a name that no other test and no other process uses."""
    return f"/kvbm-test-{os.getpid()}-{next(_numbers)}"


def digests(count: int, seed: object = 0) -> list[bytes]:
    """Return a chain of block hashes of 32 bytes, as the engine makes them, from a seed."""
    return [hashlib.blake2b(f"{seed}/{i}".encode(), digest_size=32).digest() for i in range(count)]


def block_of(ref: int) -> int:
    """Block of a reference."""
    return ref & 0xFFFFFFFF


def generation_of(ref: int) -> int:
    """Generation of a reference."""
    return ref >> 32


@dataclass
class Instance:
    """A segment of which all slots are usable, and those who are attached to it.

    Attributes
    ----------
    creator
        The attachment that made the segment; without a line.
    check
        What the removal proves: "nothing" (the test broke the segment on purpose), "invariants"
        (something may be held), "idle" (also nothing held, but operations may be in flight) or
        "all".
    exact
        Whether counts and pools must be exact, i.e. nobody died.
    description
        What the fingerprint says that it was made of.
    """

    shape: Shape
    name: str = field(default_factory=unique_name)
    check: str = "all"
    exact: bool = True
    description: bytes = DESCRIPTION
    attached: list[Segment] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.creator = Segment.create(self.name, self.shape, FINGERPRINT, self.description)
        self.attached.append(self.creator)
        for rank in range(self.shape.ranks):
            self.creator.set_ready_slots(rank, self.shape.host_slots)
        self.raw = RawSegment(self.name)
        self._tables: list[OperationTable] = []

    def attach(self, writable: bool = True) -> Segment:
        """Attach once more."""
        segment = Segment.attach(self.name, writable)
        self.attached.append(segment)
        return segment

    def leader(self, engine_key: int = 1) -> OperationTable:
        """Attach as a leader."""
        segment = self.attach()
        claim_leader(segment, engine_key)
        return OperationTable(segment)

    def worker(self, leader: int = 0, rank: int = 0) -> Segment:
        """Attach as a worker."""
        segment = self.attach()
        claim_worker(segment, leader, rank)
        return segment

    def writable(self) -> RawSegment:
        """Map the bytes once more to scribble on them; a context manager."""
        return RawSegment(self.name, writable=True)

    def prove(self) -> None:
        """Fail unless the segment is in the state that `check` names."""
        if self.check != "nothing":
            self.raw.check_invariants(self.exact)
        if self.check in ("idle", "all"):
            self.raw.check_idle(operations_too=self.check == "all")

    def remove(self) -> None:
        """Detach everything and unlink the name."""
        self.raw.close()
        for segment in self.attached:
            segment.close()
        posix_ipc.unlink_shared_memory(self.name)


def instance(
    host_slots: int = 64, ranks: int = 1, disk_slots: int = 0, index_buckets: int | None = None
) -> Instance:
    """Make a segment of these sizes with blocks of 16 tokens."""
    shape = shape_for(host_slots, disk_slots, ranks, 16, True)
    if index_buckets is not None:
        shape = shape._replace(index_buckets=index_buckets)
    return Instance(shape)


def run_in_fork(check: Callable[[], object]) -> None:
    """Run `check` in a forked child; fail if it fails there."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            check()
            status = 0
        except Exception:
            traceback.print_exc()
            raise
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def cache(table: BlockTable, keys: Keys, count: int | None = None) -> list[int]:
    """Reserve, publish and return the first blocks of a sequence; references to the new ones."""
    refs = [ref for ref, _ in table.reserve(keys, 0, len(keys) if count is None else count)]
    assert table.publish(refs) == len(refs)
    for ref in reversed(refs):
        table.unpin(ref)
    return refs


def matched(table: BlockTable, keys: Keys, start: int = 0, stop: int = 2**31) -> int:
    """Length of the match, held only for a moment."""
    count, ref = table.match(keys, start, stop)
    if ref is not None:
        table.unpin(ref)
    return count


def fill(table: BlockTable, seed: object, count: int, priority: int = 0) -> list[int]:
    """Cache a chain and return it, its end first, as a leader does; the blocks, root first."""
    keys = Keys(digests(count, seed))
    refs = [ref for ref, _ in table.reserve(keys, 0, count, priority=priority)]
    assert len(refs) == count
    assert table.publish(refs) == count
    for ref in reversed(refs):
        table.unpin(ref)
    return [block_of(ref) for ref in refs]
