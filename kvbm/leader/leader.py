# SPDX-License-Identifier: Apache-2.0
"""Scheduler side: match prefixes, plan loads and stores, publish what has arrived.

The life of a sequence as the leader sees it, in the order in which an engine calls:

    track          the request is known, with the keys of its blocks
    match          how many blocks beyond the device's own prefix are in the cache (held meanwhile)
    load           the engine has allocated device blocks: copy the matched ones into them
    loads_ended    all workers have reported a load
    store          blocks are complete after this step: copy those that are not in the cache yet
    build_step     end of the scheduling step: what the workers must know
    preempt        the engine took the device blocks away; the request begins anew
    finish         the request is done: must its device blocks be kept for stores in flight?

The leader works on one thread, the scheduler's, and does not wait for workers (but for `reset`, and
there for a bounded time): operations that are still running are looked at again in the next step.
"""

import logging
import time
from collections.abc import Collection, Iterable, Sequence

from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable
from kvbm.leader.arrivals import Arrivals
from kvbm.leader.disk_tier import DiskTier
from kvbm.leader.late_stores import LateStores
from kvbm.leader.liveness import Liveness
from kvbm.leader.load_failures import LoadFailures
from kvbm.leader.rates import PrefillRate
from kvbm.leader.sequences import GroupBlocks, TrackedSequence
from kvbm.step import LoadOrder, StepMetadata

logger = logging.getLogger(__name__)

MATCH_STEPS = 64
"""Steps after which a match that was not loaded is let go; most engines ask again in each step."""

STORE_ATTEMPTS = 2
"""Stores of one request that may fail before it is not stored any more."""

RESET_SECS = 1.0
"""Longest wait of a reset for copies in progress."""


class Leader:
    """One engine's scheduler side.

    Parameters
    ----------
    table : OperationTable
        This leader's handle on the segment.
    block_tokens : int
        Tokens in a block.
    disk : DiskTier, optional
        What brings blocks to and from disk.

    Attributes
    ----------
    sequences : dict of str to TrackedSequence
        Requests that the engine has not finished.
    failures : LoadFailures
        Which blocks are avoided, and whether loading pauses.
    liveness : Liveness
        Whether the workers can copy.
    prefill : PrefillRate
        To be told about the engine's steps.
    arrivals : Arrivals
        Which requests wait for blocks that somebody is storing.
    """

    def __init__(
        self, table: OperationTable, block_tokens: int, disk: DiskTier | None = None
    ) -> None:
        self.table = table
        self.disk = disk
        self.block_tokens = block_tokens
        self.sequences: dict[str, TrackedSequence] = {}
        self.failures = LoadFailures()
        self.liveness = Liveness(table)
        self.prefill = PrefillRate() if disk is None else disk.prefill
        self.arrivals = Arrivals(table, block_tokens, self.prefill)
        self._next = StepMetadata(step=1)
        self._matching: dict[TrackedSequence, None] = {}
        self._loading: dict[str, TrackedSequence] = {}
        self._storing: dict[TrackedSequence, None] = {}
        self._held: dict[TrackedSequence, None] = {}
        self._late = LateStores(table)
        self._uncollected: list[int] = []
        self._not_loaded: set[int] = set()
        self._reported = False

    @property
    def holds_device_blocks(self) -> bool:
        """Whether device blocks of finished requests become free when transfers end."""
        return bool(self._held or self._late) or any(s.finished for s in self._loading.values())

    # ---- sequences -------------------------------------------------------------------------------
    def track(self, request_id: str, keys: Sequence[Keys]) -> TrackedSequence:
        """Begin a sequence with these keys, one a group; one of the same name is abandoned."""
        self.abandon(request_id)
        sequence = TrackedSequence(request_id, [GroupBlocks(k) for k in keys])
        self.sequences[request_id] = sequence
        return sequence

    def look_up(self, sequence: TrackedSequence, start: int, stop: int) -> int | None:
        """`match`; None: more is being stored, or comes from disk; ask again."""
        if self.disk is not None and self.disk.is_promoting(sequence):
            return None
        count = self.match(sequence, start, stop)
        if self._may_match(sequence) and self._more_is_coming(sequence, start + count, stop):
            self.drop_match(sequence)
            return None
        return count

    def _more_is_coming(self, sequence: TrackedSequence, first: int, stop: int) -> bool:
        if self.arrivals.worth_a_wait(sequence, first, self._loadable(sequence, first, stop)):
            return True
        return self.disk is not None and self.disk.promote(sequence, first, stop)

    def _may_match(self, sequence: TrackedSequence) -> bool:
        if sequence.finished or sequence.loading or sequence.load_failed:
            return False
        return self.liveness.workers_ready() and self.failures.loads_allowed()

    def _loadable(self, sequence: TrackedSequence, start: int, stop: int) -> int:
        """End of the part of blocks `start` to `stop` that is not avoided."""
        for number, group in enumerate(sequence.groups):
            stop = self.failures.limit(number, group.keys, start, stop)
        return stop

    def match(self, sequence: TrackedSequence, start: int, stop: int) -> int:
        """Longest run of cached blocks from block `start` on, held until it is loaded or dropped.

        May be asked again and again while a request waits; the last answer counts, for the next
        `MATCH_STEPS` steps.

        Returns
        -------
        int
            Blocks, at most `stop - start`; with several groups, what all of them have.
        """
        self.drop_match(sequence)
        if not self._may_match(sequence):
            return 0
        stop = self._loadable(sequence, start, stop)
        self._matching[sequence] = None
        count = self._match_groups(sequence, start, stop - start)
        if count <= 0:
            self.drop_match(sequence)
            return 0
        sequence.matched_from, sequence.matched_count = start, count
        sequence.matched_step = self._next.step
        return count

    def _match_groups(self, sequence: TrackedSequence, start: int, count: int) -> int:
        """Hold what all groups have, at most `count` blocks; 0 if some group has nothing."""
        while count > 0:
            shortest = count
            for group in sequence.groups:
                if group.matched is not None:
                    self.table.unpin(group.matched)
                found, group.matched = self.table.match(group.keys, start, start + count)
                shortest = min(shortest, found)
            if shortest == count:
                return count
            if len(sequence.groups) == 1:
                return shortest
            count = shortest  # the same depth in every group
        return 0

    def drop_match(self, sequence: TrackedSequence) -> None:
        """Let go of what `match` holds, unless it is being loaded."""
        if sequence.loading:
            return
        self._matching.pop(sequence, None)
        sequence.matched_count = 0
        for group in sequence.groups:
            if group.matched is not None:
                ref, group.matched = group.matched, None
                self.table.unpin(ref)

    # ---- loads -----------------------------------------------------------------------------------
    def load(self, sequence: TrackedSequence, count: int) -> None:
        """Copy `count` blocks, from the first matched one on, to the sequence's device blocks.

        If that cannot be done (the match is gone, no operation is free), the workers report these
        device blocks as not loaded and the engine recomputes them.
        """
        start = sequence.matched_from
        if sequence.matched_count < count:  # let go meanwhile: perhaps it is still there
            self.match(sequence, start, start + count)
        order = LoadOrder()
        for group in sequence.groups:
            order.device_blocks += group.device_blocks[start : start + count]
        self._next.loads[sequence.request_id] = order
        self._loading[sequence.request_id] = sequence
        self._matching.pop(sequence, None)
        sequence.loading = True
        try:
            order.failed = not self._submit_load(sequence, start, count, order.handles)
        except Exception:
            logger.exception("request %s: submitting its load failed", sequence.request_id)
            order.failed = True
        sequence.loads = order.handles
        if order.failed:
            sequence.load_failed = True
            self.table.count("errors", 1)
            logger.warning(
                "request %s: its load could not be submitted; it is recomputed", sequence.request_id
            )
        else:
            self.table.count("matched_tokens", count * self.block_tokens)

    def _submit_load(
        self, sequence: TrackedSequence, start: int, count: int, handles: list[int]
    ) -> bool:
        """Submit the operations of a load; False if not all could be. Handles are added at once."""
        skip = sequence.matched_count - count
        if skip < 0:
            return False
        for number, group in enumerate(sequence.groups):
            targets = group.device_blocks[start : start + count]
            if group.matched is None or len(targets) != count:
                return False
            submitted = self.table.load(
                group.matched, skip, targets, self._next.step, sequence.request_key, number
            )
            if submitted is None:
                return False
            handles += submitted
        for group in sequence.groups:
            if skip == 0:
                group.stored, group.parent = start + count, group.matched
        return True

    def loads_ended(
        self,
        request_ids: Iterable[str],
        not_loaded: Iterable[int] = (),
        failed: Collection[str] = (),
    ) -> None:
        """All workers have reported these requests' loads as ended.

        Parameters
        ----------
        request_ids : iterable of str
            The requests; others are ignored.
        not_loaded : iterable of int
            Device blocks that some worker could not fill, of these requests or of such whose other
            workers have not reported yet.
        failed : collection of str
            Those of the requests that the engine takes for not loaded at all.
        """
        self._not_loaded.update(not_loaded)
        for request_id in request_ids:
            sequence = self._loading.pop(request_id, None)
            if sequence is None:
                continue
            try:
                self._load_ended(sequence, request_id in failed)
            except Exception:  # the other requests' loads have ended all the same
                logger.exception("request %s: noting the end of its load failed", request_id)
                self.table.count("errors", 1)
                self._uncollected += sequence.loads
                sequence.loads, sequence.loading = [], False
                sequence.stale = True
                self.drop_match(sequence)
        if not self._loading:
            self._not_loaded.clear()

    def _load_ended(self, sequence: TrackedSequence, failed: bool = False) -> None:
        results = [self._collect(handle) for handle in sequence.loads]
        running = [h for h, r in zip(sequence.loads, results, strict=True) if r is None]
        self._uncollected += running
        sequence.loads = []
        sequence.loading = False
        submitted = not sequence.load_failed
        if failed or not submitted or not all(results):
            sequence.load_failed = True
            sequence.look_again()  # what was loaded is unknown
        if submitted and not sequence.cancelled:
            if sequence.load_failed:
                self.failures.failed()
                first, count = sequence.matched_from, sequence.matched_count
                self.failures.avoid_first(sequence.groups, first, first + count, self._not_loaded)
            else:
                self.failures.succeeded()
        self.drop_match(sequence)

    def fail_load(self, request_id: str, device_blocks: list[int]) -> None:
        """The engine waits for a load that was not planned: have it reported as failed."""
        order = self._next.loads.setdefault(request_id, LoadOrder())
        order.failed = True
        order.device_blocks = device_blocks
        sequence = self.sequences.get(request_id)
        if sequence is not None:
            sequence.load_failed = sequence.loading = True
            self._loading[request_id] = sequence

    # ---- stores ----------------------------------------------------------------------------------
    def storing(self) -> list[str]:
        """Requests with stores in flight that the engine has not finished."""
        return [s.request_id for s in self._storing if not s.finished]

    def store(self, sequence: TrackedSequence, upto: int, priority: int = 0) -> None:
        """Copy the blocks before block `upto` that are not cached; complete after this step.

        Blocks for which there is no slot or no operation now are tried again at the next call.
        """
        self._store(sequence, upto, self._next.step, priority)

    def _store(self, sequence: TrackedSequence, upto: int, step: int, priority: int = 0) -> None:
        if sequence.loading or sequence.stale or not self.liveness.workers_ready():
            return
        for group in sequence.groups:
            if group.stored > len(group.keys):  # the engine took tokens back
                group.look_again()
            end = min(upto, len(group.keys), len(group.device_blocks))
            if group.stored >= end:
                continue
            held = group.find_start(self.table, end)
            handles: list[int] = []
            if group.stored >= sequence.own_from:
                handles, group.stored, group.parent = self.table.store(
                    group.keys,
                    group.stored,
                    end,
                    group.device_blocks,
                    group.parent,
                    step,
                    sequence.request_key,
                    priority,
                )
            if held is not None:
                self.table.unpin(held)
            if handles:
                sequence.stores += handles
                self._storing[sequence] = None

    def collect(self) -> None:
        """Publish or give back the stores that have ended since the last call."""
        self._uncollected = [h for h in self._uncollected if self._collect(h) is None]
        for sequence in list(self._storing):
            self._collect_stores(sequence)
        if self.disk is not None:
            self.disk.step()

    def _collect_stores(self, sequence: TrackedSequence) -> None:
        results = [(handle, self._collect(handle)) for handle in sequence.stores]
        sequence.stores = [handle for handle, result in results if result is None]
        failed = sum(result is False for _, result in results)
        if self.disk is not None and any(result for _, result in results):
            self.disk.used(sequence)
        if failed:
            sequence.failed_stores += failed
            sequence.look_again()
            sequence.stale |= sequence.failed_stores >= STORE_ATTEMPTS
        if not sequence.stores:
            self._storing.pop(sequence, None)
            self._held.pop(sequence, None)

    def _collect(self, handle: int) -> bool | None:
        """Result of an operation, None while it runs; one that is gone has failed."""
        try:
            return self.table.collect(handle)
        except LookupError:
            logger.exception("an operation was collected twice")
            return False

    def _stop_stores(self, sequence: TrackedSequence) -> None:
        """Its device blocks are overwritten from this step on: no copy of them may go on."""
        for handle in sequence.stores:
            self.table.cancel(handle)
        self._next.stop += sequence.stores
        self._uncollected += sequence.stores
        sequence.stores = []
        self._storing.pop(sequence, None)
        self._held.pop(sequence, None)

    # ---- steps -----------------------------------------------------------------------------------
    def preempt(self, request_id: str) -> None:
        """The engine took this request's device blocks away; they may be reused in this step."""
        sequence = self.sequences.get(request_id)
        if sequence is not None:
            self._stop_stores(sequence)
            sequence.new_admission()

    def abandon(self, request_id: str) -> None:
        """Give up on a request about whose device blocks nothing is known any more."""
        sequence = self.sequences.pop(request_id, None)
        if sequence is not None:
            self._stop_stores(sequence)
            sequence.finished = sequence.stale = sequence.cancelled = True
            self.drop_match(sequence)

    def build_step(self) -> StepMetadata:
        """End the scheduling step: its metadata for the workers. Never fails."""
        built, self._next = self._next, StepMetadata(step=self._next.step + 1)
        try:
            self.collect()
            for late in self._late.retry(lambda s, upto: self._store(s, upto, built.step - 1)):
                self._hold(late, built)
            self._drop_old_matches(built.step)
            self.liveness.look()
        except Exception:
            if not self._reported:  # it may come again in each step
                self._reported = True
                logger.exception("the leader's work between two steps failed")
            self.table.count("errors", 1)
        return built

    def _drop_old_matches(self, step: int) -> None:
        for sequence in list(self._matching):
            if sequence.matched_step + MATCH_STEPS <= step:
                self.drop_match(sequence)

    def finish(self, request_id: str, computed_blocks: int, load_failed: bool = False) -> bool:
        """The request is done; blocks before `computed_blocks` are complete after the last step.

        A load that is running is cancelled; the engine keeps the device blocks until it has been
        reported. With `load_failed` the engine ends the request because its load failed.

        Returns
        -------
        bool
            True if its device blocks must be kept until the workers report the request as sent.
        """
        sequence = self.sequences.get(request_id)
        if sequence is None:
            return False
        for group in sequence.groups:
            if group.parent is not None and not self.table.is_current(group.parent):
                group.look_again()
        self._store(sequence, computed_blocks, self._next.step - 1)
        self.drop_match(sequence)
        self._collect_stores(sequence)
        del self.sequences[request_id]
        sequence.finished = True
        if sequence.loading:
            sequence.cancelled = not load_failed
            for handle in sequence.loads:
                self.table.cancel(handle)
            self._stop_stores(sequence)  # of an earlier admission
            return False
        late = self._late.waits(sequence, computed_blocks)
        if sequence.stores and not late:
            self._hold(sequence, self._next)
        return late or bool(sequence.stores)

    def _hold(self, sequence: TrackedSequence, metadata: StepMetadata) -> None:
        """Have the workers report a finished request once its stores have ended."""
        if sequence.stores:
            self._held[sequence] = None
        metadata.held[sequence.request_id] = list(sequence.stores)

    def reset(self) -> int:
        """Make all cached content unreachable; returns the number of blocks given back.

        Requests that have device blocks now are not stored any more: these hold what was computed
        before the reset. Copies in flight are stopped, and the reset waits for them.
        """
        for sequence in list(self.sequences.values()):
            self.drop_match(sequence)
            sequence.look_again()
            sequence.stale |= sequence.loading or any(g.device_blocks for g in sequence.groups)
        for sequence in list(self._storing):
            self._stop_stores(sequence)
        self._late.give_up()
        self.failures.forget()
        if self.disk is not None:
            self.disk.reset()
        deadline = time.monotonic() + RESET_SECS
        self.collect()
        while self._uncollected and time.monotonic() < deadline:
            time.sleep(0.001)
            self.collect()
        return self.table.reset()

    def close(self) -> None:
        """Return everything that this leader holds.

        Operations that are still running, and their blocks, are left to recovery.
        """
        sequences = [*self.sequences.values(), *self._loading.values(), *self._storing]
        for sequence in dict.fromkeys(sequences):
            for handle in sequence.stores + sequence.loads:
                self.table.cancel(handle)
                self._collect(handle)
            sequence.stores, sequence.loads, sequence.loading = [], [], False
            self.drop_match(sequence)
        for handle in self._uncollected:
            self._collect(handle)
        self._uncollected = []
        for group in (self.sequences, self._matching, self._loading, self._storing, self._held):
            group.clear()
        self._late.clear()
