# SPDX-License-Identifier: Apache-2.0
"""The leader's side of the disk tier: what is written to disk, and what is brought back.

Blocks reach the disk from the host tier (*spill*) and come back to it (*promotion*); between host
and device they move as all others do. So nothing but this file, and the workers' threads that move
the bytes, knows of the disk.

Which blocks are written. Each use of a block (it was computed and stored, or found on the device,
in the host tier or on disk by a request) is counted by the frequency filter, and a block that
passes is written while it is still in the host tier. A chain is written from its first block that
is not on disk, so that what is on disk is closed under prefixes.

What is brought back. A look-up that finds more of its chain on disk than in the host tier, and
where reading it is faster than computing it, submits fetches and answers "ask again". The request
waits in the engine's queue, without device blocks. Once the blocks are in the host tier it finds
them there. If they do not arrive, or not in time, it finds what there is, and the rest is computed.

All of it runs on the scheduler's thread, in steps of bounded work.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

from kvbm._fast.disk_table import DiskTable, FrequencyFilter, raise_epoch
from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable
from kvbm.leader.disk_transfers import Candidate, DiskFlow, Promotion, Transfer
from kvbm.leader.liveness import Recoverer
from kvbm.leader.load_failures import LoadFailures
from kvbm.leader.rates import DiskHealth, PrefillRate, ReadRate, WriteBudget
from kvbm.leader.sequences import TrackedSequence

__all__ = ["DiskTier"]

logger = logging.getLogger(__name__)

FILTER_LEAST = 2
FILTER_DECAY_SECS = 600.0
FILTER_ENTRIES = 1_000_000
"""Upstream's constants."""

BATCH_BLOCKS = 32
"""Blocks of one operation: enough to keep the disk busy, few enough to publish early."""

SPILLS_MAX = 32
"""Spills under way: what an engine that falls idle leaves to its workers."""

STARTS_MAX = 4
"""Spills started in one step."""

CANDIDATES_MAX = 1024
"""Chains that wait to be written; the oldest gives way."""

DEADLINE_SECS = 30.0
"""An operation that has not ended by then hangs."""

QUARANTINE_MAX = 16
"""Disk slots that are not used again because a read of them failed."""

DAMAGED_MAX = 64
"""Blocks that wait to be taken out of the table because a read of them failed."""


def _no_slabs(_: int) -> None:
    """Nothing outlives the process."""


class DiskTier:
    """One leader's disk tier.

    Parameters
    ----------
    table : OperationTable
        The host tier's blocks, and the operations.
    flow : DiskFlow
        Sizes and limits.
    clock : callable
        Monotonic time in seconds.

    Attributes
    ----------
    disk : DiskTable or None
        The disk tier's blocks; None until all ranks have opened their slabs.
    health : DiskHealth
        Whether the disk is used.
    prefill : PrefillRate
        To be told about the engine's steps.
    raise_slabs : callable
        Moves the key epoch of the slabs on to at least its argument.
    """

    def __init__(
        self,
        table: OperationTable,
        flow: DiskFlow,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.table = table
        self.flow = flow
        self.disk: DiskTable | None = None
        self.health = DiskHealth(clock)
        self.prefill = PrefillRate(clock)
        self.reads = ReadRate(clock)
        self.failures = LoadFailures(clock)
        self._clock = clock
        self._budget = WriteBudget(flow.gb_per_day, clock)
        self._filter = (
            FrequencyFilter(least=FILTER_LEAST, entries=FILTER_ENTRIES) if flow.filtered else None
        )
        self._decay_at = clock() + FILTER_DECAY_SECS
        self._candidates: deque[Candidate] = deque(maxlen=CANDIDATES_MAX)
        self._spills: list[Transfer] = []
        self._fetches: list[Transfer] = []
        self._damaged: deque[tuple[Keys, int]] = deque(maxlen=DAMAGED_MAX)
        self._quarantined: list[int] = []
        self._holds_max = table.segment.shape.host_slots // 2
        self._progress_at = clock()
        self._recoverer: Recoverer | None = None
        self.raise_slabs: Callable[[int], None] = _no_slabs

    # ---- uses ------------------------------------------------------------------------------------
    def used(self, sequence: TrackedSequence, upto: int | None = None) -> None:
        """Blocks before `upto`, or all that are stored, were used; what passes is written soon."""
        if self.disk is None:
            return
        for number, group in enumerate(sequence.groups):
            end = group.stored if upto is None else upto
            if end > 0:
                self._candidates.append(Candidate(group.keys, number, group.used, end))
                group.used = max(group.used, end)

    # ---- promotion -------------------------------------------------------------------------------
    def is_promoting(self, sequence: TrackedSequence) -> bool:
        """Return whether a sequence waits for blocks from disk."""
        promotion = sequence.promotion
        if promotion is None:
            return False
        self.collect()
        if any(fetch.handles and not fetch.late for fetch in promotion.fetches):
            return True
        sequence.promotion = None
        return False

    def promote(self, sequence: TrackedSequence, have: int, stop: int) -> bool:
        """Begin to bring blocks beyond the first `have` back, if that pays; True: ask again."""
        if self.disk is None:
            return False
        if any(group.used < have for group in sequence.groups):  # once, not with each question
            self.used(sequence, have)
        if sequence.promoted or not self.health.allows():
            return False
        refs: list[int] = []
        end = self._on_disk(sequence, have, stop, refs)
        if end > have and self._is_worth(end - have):
            sequence.promoted = True
            sequence.promotion = self._fetch_groups(sequence, have, end, refs)
            sequence.promoted_from = None if sequence.promotion is None else have
        else:
            self._let_go(refs)
        return sequence.promotion is not None

    def _on_disk(self, sequence: TrackedSequence, have: int, stop: int, refs: list[int]) -> int:
        """Hold what all groups have on disk; returns where it ends, 0 if that is of no use."""
        assert self.disk is not None
        self._same_epoch()
        for number, group in enumerate(sequence.groups):
            stop = self.failures.limit(number, group.keys, 0, stop)
        while stop > have:
            found = []
            for group in sequence.groups:
                count, ref = self.disk.match(group.keys, 0, stop)
                found.append(count)
                if ref is not None:
                    refs.append(ref)
            if min(found) == stop or (len(found) == 1 and found[0] > have):
                return min(found)
            self._let_go(refs)
            stop = min(found)
        return 0

    def _is_worth(self, blocks: int) -> bool:
        count, tokens = blocks * self.flow.block_bytes, blocks * self.flow.block_tokens
        if self.reads.is_worth(count, tokens, self.prefill.tokens_per_sec):
            return True
        self.reads.try_again()
        return False

    def _fetch_groups(
        self, sequence: TrackedSequence, have: int, end: int, refs: list[int]
    ) -> Promotion | None:
        """Submit the fetches of all groups; None if there is nothing to wait for."""
        assert self.disk is not None
        running = [fetch for fetch in self._fetches if not fetch.late]
        fetches: list[Transfer] = []
        met = False
        for number, (group, ref) in enumerate(zip(sequence.groups, refs, strict=True)):
            depth, host_ref = self._host_depth(group.keys, have)
            slots = self.disk.slots_of(ref, end - depth) if end > depth else []
            submitted, reached = self._fetch(number, group.keys, depth, slots, host_ref)
            met |= reached > depth and not submitted  # somebody else is filling them
            fetches += submitted
            if host_ref is not None:
                self.table.unpin(host_ref)
            for fetch in submitted:  # each holds the whole chain: they end in any order
                fetch.disk_ref = self.disk.hold_again(ref)
            self.disk.unpin(ref)
        self._fetches += fetches
        if fetches:
            self.reads.begin()
        elif met:
            fetches = running
        return Promotion(fetches) if fetches else None

    def _host_depth(self, keys: Keys, have: int) -> tuple[int, int | None]:
        """How many blocks of a chain are in the host tier, and the deepest of them, held.

        `have`, unless the device has more of them than the host tier.
        """
        if have == 0:
            return 0, None
        ref = self.table.hold(keys, have - 1)
        return (have, ref) if ref is not None else self.table.hold_longest(keys, have)

    def _fetch(
        self, group: int, keys: Keys, depth: int, slots: Sequence[int], parent: int | None
    ) -> tuple[list[Transfer], int]:
        """Submit fetches of blocks from `depth` on; returns them and how far they reach."""
        sources = [0] * depth + list(slots)
        fetches: list[Transfer] = []
        at, end = depth, len(sources)
        while at < end:
            stop = min(end, at + BATCH_BLOCKS)
            handles, upto, parent = self.table.fetch(keys, at, stop, sources, parent)
            if handles:
                fetch = Transfer(handles, upto - at, self._clock(), keys=keys, group=group)
                fetch.first, fetch.after = at, fetches[-1] if fetches else None
                fetches.append(fetch)
            at = upto
            if upto < stop:
                break
        return fetches, at

    # ---- spills ----------------------------------------------------------------------------------
    def _start_spills(self) -> None:
        if not self.health.allows():
            return
        for _ in range(min(STARTS_MAX, len(self._candidates))):
            if len(self._spills) >= SPILLS_MAX or self.table.free_operations() < SPILLS_MAX:
                return
            if self._spills and sum(spill.holds for spill in self._spills) >= self._holds_max:
                return  # a slow disk must leave room for what is computed now
            candidate = self._candidates.popleft()
            if self._start_spill(candidate):
                self._candidates.append(candidate)

    def _start_spill(self, candidate: Candidate) -> bool:
        """Submit one spill of a chain if one is due; True if there is to be another look at it."""
        assert self.disk is not None
        keys = candidate.keys
        upto = min(candidate.upto, len(keys))
        depth, disk_ref = self.disk.hold_longest(keys, upto)
        wanted = upto - depth
        if self._filter is not None:
            used_from = max(depth, candidate.used_from)
            wanted = self._filter.passing(keys, depth, used_from, upto)
        candidate.used_from = upto
        count = min(wanted, BATCH_BLOCKS)
        count = self._budget.blocks(self.flow.block_bytes, count)
        host_ref = self.table.hold(keys, depth + count - 1) if count > 0 else None
        reserved = (
            self.disk.reserve_run(keys, depth, depth + count, disk_ref)
            if host_ref is not None
            else []
        )
        refs, slots = [ref for ref, _ in reserved], [slot for _, slot in reserved]
        spill = Transfer([], len(refs), self._clock(), host_ref, disk_ref, refs)
        spill.holds = depth + count
        if refs and host_ref is not None:
            skip = count - len(refs)
            spill.handles = self.table.spill(host_ref, skip, slots, candidate.group) or []
        self._spills.append(spill)
        if not spill.handles:
            spill.blocks = 0
            self._end_spill(spill, False)
            return host_ref is not None and bool(self._spills)  # somebody is writing them
        self._budget.spend(len(refs) * self.flow.block_bytes)
        return wanted > len(refs)

    def _end_spill(self, spill: Transfer, arrived: bool) -> None:
        """Publish or give back a spill's disk slots; not while somebody recovers the segment."""
        assert self.disk is not None
        if arrived:
            self.disk.publish(spill.reserved)
        if spill.reserved and not self.disk.abandon_reserved(spill.reserved):
            spill.failed_at = None if arrived else 0
            return  # tried again with the next step
        self._spills.remove(spill)
        for ref in reversed(spill.reserved):
            self.disk.unpin(ref)
        self._release(spill)

    # ---- ends ------------------------------------------------------------------------------------
    def step(self) -> None:
        """End of a scheduling step."""
        if self.disk is None or self._recoverer is None:
            return
        self._recoverer.look()
        self.collect()
        now = self._clock()
        if self._filter is not None and now >= self._decay_at:
            self._filter.age()
            self._decay_at = now + FILTER_DECAY_SECS
        self._start_spills()

    def collect(self) -> None:
        """Look at what has ended."""
        for spill in list(self._spills):
            if self._has_ended(spill, "a write"):
                arrived = spill.failed_at is None
                if spill.blocks:
                    self._count(spill, arrived, "stores", "stored", "store_ns")
                    spill.blocks = 0  # counted
                self._end_spill(spill, arrived)
        for fetch in list(self._fetches):
            if self._has_ended(fetch, "a read"):
                self._fetches.remove(fetch)
                fetch.after = None
                self._end_fetch(fetch)
        self.reads.look(any(not fetch.late for fetch in self._fetches))
        if self._damaged:
            self._retire_damaged()

    def _has_ended(self, transfer: Transfer, what: str) -> bool:
        for handle in list(transfer.handles):
            if transfer.after is not None and transfer.after.handles:
                break  # its blocks would have no parent yet
            row = self.table.first_failed_row(handle)
            result = self.table.collect(handle)
            if result is None:
                break
            self._progress_at = self._clock()
            transfer.handles.remove(handle)
            if not result and transfer.failed_at is None:
                transfer.failed_at = transfer.first + row
        if transfer.handles and not transfer.late:
            self._look_at_the_time(transfer, what)
        return not transfer.handles

    def _look_at_the_time(self, transfer: Transfer, what: str) -> None:
        """Give up on what has not ended in time; a disk on which nothing ends any more is off.

        A write may have waited for the writes before it, but a request waits for a read.
        """
        now = self._clock()
        stands_still = now - max(transfer.began, self._progress_at) > DEADLINE_SECS
        if stands_still or (transfer.keys is not None and now - transfer.began > DEADLINE_SECS):
            transfer.late = True
            if stands_still:
                self.health.hangs(what, now - transfer.began)
            for handle in transfer.handles:
                self.table.cancel(handle)

    def _end_fetch(self, fetch: Transfer) -> None:
        assert self.disk is not None
        arrived = fetch.failed_at is None
        self._count(fetch, arrived, "loads", "loaded", "load_ns")
        if arrived:
            self.reads.arrived(fetch.blocks * self.flow.block_bytes)
        elif fetch.keys is not None and fetch.failed_at is not None:
            self.failures.avoid(fetch.group, fetch.keys, fetch.failed_at)
            if not fetch.late:  # else it was not the block's fault
                self._damaged.append((fetch.keys, fetch.failed_at))
                self.disk.count("check_failures", 1)
        self._release(fetch)

    def _retire_damaged(self) -> None:
        """Take blocks that could not be read out of the table, so that they can be written anew.

        Their slots are kept, so that they are not used again, but for those beyond a number.
        """
        assert self.disk is not None
        for _ in range(len(self._damaged)):
            keys, position = self._damaged.popleft()
            done, slot = self.disk.retire(keys, position)
            if not done:
                self._damaged.append((keys, position))  # held, perhaps by reads under way
            if slot is not None:
                self._quarantined.append(slot)
        while len(self._quarantined) > QUARANTINE_MAX:
            self.disk.abandon_reserved([self._quarantined.pop(0)])

    def _end_quarantine(self) -> None:
        assert self.disk is not None
        self.disk.abandon_reserved(self._quarantined)
        self._quarantined.clear()

    def _count(self, transfer: Transfer, arrived: bool, kind: str, moved: str, spent: str) -> None:
        assert self.disk is not None
        if not arrived:
            self.health.failed()
            self.disk.count(f"{kind}_failed", 1)
            return
        self.health.succeeded()
        self.disk.count(kind, 1)
        self.disk.count(f"blocks_{moved}", transfer.blocks)
        self.disk.count(f"bytes_{moved}", transfer.blocks * self.flow.block_bytes)
        self.disk.count(spent, int((self._clock() - transfer.began) * 1e9))

    def _release(self, transfer: Transfer) -> None:
        assert self.disk is not None
        if transfer.host_ref is not None:
            self.table.unpin(transfer.host_ref)
        if transfer.disk_ref is not None:
            self.disk.unpin(transfer.disk_ref)
        transfer.host_ref = transfer.disk_ref = None

    def _let_go(self, refs: list[int]) -> None:
        assert self.disk is not None
        for ref in refs:
            self.disk.unpin(ref)
        refs.clear()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way to disk or from it, or waits for that."""
        return not (self._candidates or self._spills or self._fetches)

    # ---- the whole -------------------------------------------------------------------------------
    def _same_epoch(self) -> None:
        """Both tables under the later key epoch: an engine may have died between two resets."""
        assert self.disk is not None
        mine, other = self.table.segment.key_epoch, self.disk.segment.key_epoch
        if mine != other:
            raise_epoch(self.table if mine < other else self.disk, max(mine, other))

    def open(self, disk: DiskTable) -> None:
        """All ranks can read and write: use the tier from now on."""
        self._recoverer = Recoverer(disk.segment)
        self.disk = disk
        self._same_epoch()

    def stop(self) -> None:
        """Cancel what is under way; it is collected as it ends."""
        self._candidates.clear()
        for transfer in self._spills + self._fetches:
            for handle in transfer.handles:
                self.table.cancel(handle)

    def reset(self) -> None:
        """Make all that is on disk unreachable, before the host tier's table does the same.

        What outlives a crash goes first: nothing of before the reset is found after it.
        """
        if self.disk is None:
            return
        self._same_epoch()
        self.stop()
        try:
            self.raise_slabs(self.disk.segment.key_epoch + 1)
        except OSError:
            logger.exception("a slab cannot be written: what is on disk may be found after a start")
            self.health.is_off = True
        self.failures.forget()
        self._damaged.clear()
        self._end_quarantine()
        self.disk.reset()

    def close(self) -> None:
        """Return what is held. What is still running is left to recovery, with its blocks."""
        if self.disk is None:
            return
        self.stop()
        self.collect()
        self._end_quarantine()
        self.disk = None
