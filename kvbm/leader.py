# SPDX-License-Identifier: Apache-2.0
"""Scheduler side: match prefixes, plan loads and stores, publish what has arrived.

The life of a sequence as the leader sees it, in the order in which an engine calls:

    track          the request is known, with the keys of its blocks
    match          how many blocks beyond the device's own prefix are in the cache (held from here on)
    load           the engine has allocated device blocks: copy the matched ones into them
    store          blocks are complete after this step: copy those that are not in the cache yet
    build_step     end of the scheduling step: what the workers must know
    loads_ended    all workers have reported a load
    finish         the request is done: must its device blocks be kept for stores in flight?

The leader works on one thread, the scheduler's, and never waits: operations that are still running are looked at
again in the next step.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable
from kvbm._fast.participants import participants, workers_attached
from kvbm._fast.recovery import recover
from kvbm.instance import engine_key
from kvbm.step import StepMetadata

logger = logging.getLogger(__name__)

LIVENESS_INTERVAL_NS = 1_000_000_000
"""How often a leader looks for dead participants."""


@dataclass
class GroupBlocks:
    """One KV-cache group of a sequence: where its blocks are on the device, how far they are in the cache.

    Attributes
    ----------
    keys : Keys
        Digests of the sequence's complete blocks in this group.
    device_blocks : list of int
        Device block of each block, from block 0.
    stored : int
        Blocks from the start that were found in the cache or submitted to it.
    parent : int or None
        Reference to block `stored - 1`.
    matched : int or None
        Reference to the deepest matched block, held until the load has ended or the match is dropped.
    """

    keys: Keys
    device_blocks: list[int] = field(default_factory=list)
    stored: int = 0
    parent: int | None = None
    matched: int | None = None


@dataclass
class TrackedSequence:
    """A request between its arrival and the end of its last transfer."""

    request_id: str
    groups: list[GroupBlocks]
    matched_from: int = 0
    matched_count: int = 0
    loads: list[int] = field(default_factory=list)
    stores: list[int] = field(default_factory=list)
    finished: bool = False

    @property
    def request_key(self) -> int:
        """64-bit hash of the request id, as operations carry it."""
        return engine_key(self.request_id)


class Leader:
    """One engine's scheduler side.

    Parameters
    ----------
    table : OperationTable
        This leader's handle on the segment.
    block_tokens : int
        Tokens in a block.
    """

    def __init__(self, table: OperationTable, block_tokens: int) -> None:
        self.table = table
        self.block_tokens = block_tokens
        self.sequences: dict[str, TrackedSequence] = {}
        self._next = StepMetadata(step=1)
        self._looked_ns = time.monotonic_ns()
        self.workers_lost = False
        self._attached = False

    # ---- sequences --------------------------------------------------------------------------------------
    def track(self, request_id: str, keys: Sequence[Keys]) -> TrackedSequence:
        """Return the sequence of a request, made on first sight with these keys, one a group."""
        sequence = self.sequences.get(request_id)
        if sequence is None:
            sequence = TrackedSequence(request_id, [GroupBlocks(k) for k in keys])
            self.sequences[request_id] = sequence
        return sequence

    def match(self, sequence: TrackedSequence, start: int, stop: int) -> int:
        """Longest run of cached blocks from block `start` on, held until it is loaded or dropped.

        May be asked again and again while a request waits; the last answer counts.

        Returns
        -------
        int
            Blocks, at most `stop - start`; with several groups, what all of them have.
        """
        self.drop_match(sequence)
        if sequence.finished or not self._workers_ready():
            return 0
        count = stop - start
        for group in sequence.groups:
            found, group.matched = self.table.match(group.keys, start, start + count)
            count = min(count, found)
        if count <= 0:
            self.drop_match(sequence)
            return 0
        if len(sequence.groups) > 1:
            for group in sequence.groups:  # the same depth in every group
                if group.matched is not None:
                    self.table.unpin(group.matched)
                found, group.matched = self.table.match(group.keys, start, start + count)
                if found < count:
                    self.drop_match(sequence)
                    return 0
        sequence.matched_from = start
        sequence.matched_count = count
        return count

    def drop_match(self, sequence: TrackedSequence) -> None:
        """Let go of what `match` holds, unless it is being loaded."""
        if sequence.loads:
            return
        sequence.matched_count = 0
        for group in sequence.groups:
            if group.matched is not None:
                self.table.unpin(group.matched)
                group.matched = None

    def set_device_blocks(self, sequence: TrackedSequence, blocks: Sequence[Sequence[int]]) -> None:
        """All device blocks of a sequence, one list a group, replacing what was known."""
        for group, ids in zip(sequence.groups, blocks, strict=True):
            group.device_blocks = list(ids)

    def add_device_blocks(self, sequence: TrackedSequence, blocks: Sequence[Sequence[int]]) -> None:
        """Device blocks that a sequence got in addition, one list a group."""
        for group, ids in zip(sequence.groups, blocks, strict=True):
            group.device_blocks.extend(ids)

    # ---- loads ------------------------------------------------------------------------------------------
    def load(self, sequence: TrackedSequence, start: int, count: int) -> None:
        """Copy `count` matched blocks, from block `start` of the sequence, to its device blocks.

        If the copies cannot be submitted (the match is gone, no operation is free), the workers report these
        device blocks as not loaded and the engine recomputes them.
        """
        skip = sequence.matched_from + sequence.matched_count - (start + count)
        handles: list[int] = []
        complete = start >= sequence.matched_from and skip >= 0
        for number, group in enumerate(sequence.groups):
            targets = group.device_blocks[start : start + count]
            if not complete or group.matched is None or len(targets) != count:
                complete = False
                break
            submitted = self.table.load(
                group.matched, skip, targets, self._next.step, sequence.request_key, number
            )
            if submitted is None:
                complete = False
                break
            handles += submitted
        sequence.loads = handles
        if complete:
            self._next.loads[sequence.request_id] = handles
            self.table.count("matched_tokens", count * self.block_tokens)
            for group in sequence.groups:
                if skip == 0:
                    group.stored = max(group.stored, start + count)
                    group.parent = group.matched
            return
        self.table.count("errors", 1)
        logger.warning("request %s: its load could not be submitted; it is recomputed", sequence.request_id)
        self._next.failed_loads[sequence.request_id] = [
            block for group in sequence.groups for block in group.device_blocks[start : start + count]
        ]
        if handles:
            self._next.loads[sequence.request_id] = handles

    def loads_ended(self, request_ids: Iterable[str]) -> None:
        """All workers have reported these requests' loads as ended."""
        for request_id in request_ids:
            sequence = self.sequences.get(request_id)
            if sequence is None:
                continue
            loaded = [self.table.collect(handle) for handle in sequence.loads]
            sequence.loads = []
            if not all(loaded):
                for group in sequence.groups:  # what was loaded is unknown: look again before storing
                    group.stored, group.parent = 0, None
            self.drop_match(sequence)
            self._forget_if_done(sequence)

    # ---- stores -----------------------------------------------------------------------------------------
    def store(self, sequence: TrackedSequence, upto: int, priority: int = 0) -> None:
        """Copy the blocks before block `upto` that are not in the cache yet; they are complete after this step.

        Blocks for which there is no slot or no operation now are tried again at the next call.
        """
        self._store(sequence, upto, self._next.step, priority)

    def _store(self, sequence: TrackedSequence, upto: int, step: int, priority: int = 0) -> None:
        if sequence.loads or not self._workers_ready():
            return
        for group in sequence.groups:
            end = min(upto, len(group.keys), len(group.device_blocks))
            if group.stored >= end:
                continue
            held = None
            if group.parent is None or not self.table.is_current(group.parent):
                # Begin at the deepest ancestor that is present, so that gaps close.
                group.stored, held = self.table.match(group.keys, 0, end)
                group.parent = held
            handles, group.stored, group.parent = self.table.store(
                group.keys, group.stored, end, group.device_blocks, group.parent, step,
                sequence.request_key, priority,
            )
            if held is not None:
                self.table.unpin(held)
            sequence.stores += handles

    def collect(self) -> None:
        """Publish or give back the stores that have ended since the last call."""
        for sequence in list(self.sequences.values()):
            if sequence.stores:
                sequence.stores = [h for h in sequence.stores if self.table.collect(h) is None]
                self._forget_if_done(sequence)

    # ---- steps ------------------------------------------------------------------------------------------
    def preempt(self, request_ids: Iterable[str]) -> None:
        """The device blocks of these requests are reused in this step: their stores must stop."""
        for request_id in request_ids:
            sequence = self.sequences.get(request_id)
            if sequence is None:
                continue
            self._next.stop += sequence.stores
            for group in sequence.groups:
                group.device_blocks = []
                group.stored, group.parent = 0, None

    def build_step(self) -> StepMetadata:
        """End the scheduling step: its metadata for the workers."""
        self.collect()
        self._look_for_the_dead()
        built = self._next
        self._next = StepMetadata(step=built.step + 1)
        return built

    def finish(self, request_id: str, computed_blocks: int) -> bool:
        """The request is done; blocks before `computed_blocks` are complete on the device.

        Returns
        -------
        bool
            True if its device blocks must be kept until the workers report the request as sent.
        """
        sequence = self.sequences.get(request_id)
        if sequence is None or sequence.finished:
            return False
        self._store(sequence, computed_blocks, self._next.step - 1)
        self.drop_match(sequence)
        sequence.stores = [h for h in sequence.stores if self.table.collect(h) is None]
        sequence.finished = True
        hold = bool(sequence.stores)
        if hold:
            self._next.held[request_id] = list(sequence.stores)
        self._forget_if_done(sequence)
        return hold

    def _forget_if_done(self, sequence: TrackedSequence) -> None:
        if sequence.finished and not sequence.stores and not sequence.loads:
            self.sequences.pop(sequence.request_id, None)

    def reset(self) -> int:
        """Make all cached content unreachable; returns the number of blocks given back."""
        for sequence in self.sequences.values():
            self.drop_match(sequence)
            for group in sequence.groups:
                group.stored, group.parent = 0, None
        return self.table.reset()

    # ---- liveness ---------------------------------------------------------------------------------------
    def _workers_ready(self) -> bool:
        """Return whether all ranks can copy: none before their arenas are open, none after a death."""
        if not self._attached:
            self._attached = workers_attached(self.table.segment)
        return self._attached and not self.workers_lost

    def _look_for_the_dead(self) -> None:
        now = time.monotonic_ns()
        if now - self._looked_ns < LIVENESS_INTERVAL_NS:
            return
        self._looked_ns = now
        lines = participants(self.table.segment)
        if all(line.alive for line in lines):
            return
        mine = self.table.segment.leader
        lost = [line.rank for line in lines if line.leader == mine and not line.alive]
        if lost and not self.workers_lost:
            self.workers_lost = True
            logger.error("worker ranks %s died; the cache is switched off for this engine", lost)
        recover(self.table.segment)

    def close(self) -> None:
        """Return everything that this leader holds; operations still running are left to recovery."""
        for sequence in list(self.sequences.values()):
            for handle in sequence.stores + sequence.loads:
                self.table.cancel(handle)
                self.table.collect(handle)
            sequence.stores, sequence.loads = [], []
            self.drop_match(sequence)
        self.sequences.clear()
