# SPDX-License-Identifier: Apache-2.0
"""Run a trace through the real host table, disk table, and what moves blocks between them.

The leader's `DiskTier` decides, as in an engine: what passes the frequency filter and is written,
what a look-up brings back to the host tier, what both tiers evict. Only the copies are left out:
they take no time, so a request that waits for blocks from disk has them at once. Its clock is the
trace's.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from itertools import count

from kvbm._fast.disk_table import DiskTable
from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable
from kvbm._fast.segment import Segment
from kvbm.eviction.policy import PolicyMaker, evict_by
from kvbm.leader.disk_tier import DiskTier
from kvbm.leader.disk_transfers import DiskFlow
from kvbm.leader.sequences import GroupBlocks, TrackedSequence
from kvbm.replay.manager import (
    DiskOutcome,
    Outcome,
    Pace,
    Run,
    check_capacity,
    check_policy,
    drive,
    private_segment,
)
from kvbm.replay.trace import Request, Trace

__all__ = ["DiskRun", "InstantOperations", "replay_with_disk"]

STEPS_MAX = 64
"""Steps of the scheduler between two requests: enough to write what a long one has used."""


class InstantOperations(OperationTable):
    """Operations between host and disk that have ended when they are submitted.

    Parameters
    ----------
    segment : Segment
        The host tier's, led by this process.
    """

    def __init__(self, segment: Segment) -> None:
        self._handles = count(1)
        self._held: dict[int, list[int]] = {}

    def spill(self, ref: int, skip: int, disk_slots: list[int], group: int = 0) -> list[int] | None:
        """Nothing is copied: the bytes are on disk."""
        return [self._ended([])]

    def fetch(
        self,
        keys: Keys,
        start: int,
        stop: int,
        disk_slots: list[int],
        parent: int | None,
        request_key: int = 0,
    ) -> tuple[list[int], int, int | None]:
        """Reserve and publish the blocks: the bytes are in the host tier."""
        refs = [ref for ref, _ in self.reserve(keys, start, stop, parent)]
        self.publish(refs)
        if not refs:
            return [], start, parent
        return [self._ended(refs)], start + len(refs), refs[-1]

    def _ended(self, refs: list[int]) -> int:
        handle = next(self._handles)
        self._held[handle] = refs
        return handle

    def collect(self, handle: int) -> bool | None:
        """It arrived; its blocks are held by nobody from now on."""
        for ref in reversed(self._held.pop(handle)):
            self.unpin(ref)
        return True

    def first_failed_row(self, handle: int) -> int:
        """None fails."""
        return 0


class DiskRun(Run):
    """The state of one replay with a disk tier.

    Parameters
    ----------
    table : InstantOperations
        The host tier.
    disk : DiskTable
        The disk tier.
    trace : Trace
        The requests.
    filtered : bool
        Write a block only once it was used again.
    """

    def __init__(
        self, table: InstantOperations, disk: DiskTable, trace: Trace, filtered: bool
    ) -> None:
        super().__init__(table, trace)
        self.now_s = 0.0
        self.disk_hits = 0
        self.tier = DiskTier(table, DiskFlow(trace.block_tokens, 1, filtered), lambda: self.now_s)
        self.tier.open(disk)
        self._sequence: TrackedSequence | None = None
        self._there = 0

    def request(self, number: int, request: Request, ends_s: float) -> None:
        """Let a request arrive, and what it used reach the disk."""
        self.now_s = request.timestamp_ms / 1000
        skipped = self.skipped
        super().request(number, request, ends_s)
        assert self._sequence is not None
        (group,) = self._sequence.groups
        group.stored = len(group.keys) - (self.skipped - skipped)
        if group.stored > self._there:
            self.tier.used(self._sequence)
        self.write()

    def write(self) -> None:
        """Step until everything that is worth it is on disk."""
        for _ in range(STEPS_MAX):
            self.tier.step()
            if self.tier.is_idle:
                return

    def match(self, keys: Keys, blocks: int) -> tuple[int, int | None]:
        """Find what is cached of a prompt, and bring back what is on disk, as a look-up does."""
        self._sequence = sequence = TrackedSequence("", [GroupBlocks(keys)])
        self._there, deepest = self.table.match(keys, 0, len(keys))
        hits = min(self._there, blocks)
        if not self.tier.promote(sequence, hits, blocks):
            return self._there, deepest
        if deepest is not None:
            self.table.unpin(deepest)
        while self.tier.is_promoting(sequence):
            pass
        self._there, deepest = self.table.match(keys, 0, len(keys))
        found = min(self._there, blocks)
        self.disk_hits += max(0, found - hits)
        self.tier.promote(sequence, found, blocks)  # counts their use; nobody waits twice
        self.decisions.update(array("Q", [found]))
        return self._there, deepest

    def outcome(self) -> DiskOutcome:
        """What became of the disk tier."""
        assert self.tier.disk is not None
        segment = self.tier.disk.segment
        counters = segment.counters()
        return DiskOutcome(
            segment.shape.host_slots,
            self.disk_hits,
            counters["blocks_stored"],
            counters["blocks_loaded"],
            counters["evicted"],
        )


def replay_with_disk(
    trace: Trace,
    capacity: int,
    disk_blocks: int,
    *,
    filtered: bool = True,
    pace: Pace | None = None,
    progress: Callable[[int], None] | None = None,
    policy: PolicyMaker | None = None,
    make: Callable[[InstantOperations, DiskTable, Trace, bool], DiskRun] = DiskRun,
) -> Outcome:
    """Run a trace through a host tier of `capacity` blocks and a disk tier below it.

    Parameters
    ----------
    trace : Trace
        The requests.
    capacity, disk_blocks : int
        Blocks of the two tiers, 1 to 2**31.
    filtered : bool
        Write a block only once it was used again, as by default.
    pace, progress, policy
        As for `replay`; the policy is the host tier's.
    make : callable
        Makes the run.
    """
    check_capacity(capacity)
    check_capacity(disk_blocks)
    with (
        private_segment(capacity, trace.block_tokens) as segment,
        private_segment(disk_blocks, trace.block_tokens) as disk,
    ):
        table = InstantOperations(segment)
        evict_by(table, policy)
        run = make(table, DiskTable(disk), trace, filtered)
        outcome = drive(run, trace, capacity, pace, progress)
        check_policy(table, policy)
        found = outcome._replace(disk=run.outcome())
        run.tier.close()
        return found
