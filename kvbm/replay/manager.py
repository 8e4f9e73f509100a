# SPDX-License-Identifier: Apache-2.0
"""Run a trace through the real block table.

Each request does what the leader does for it (kvbm/leader/leader.py): it matches its prefix, which
pins it, reserves what is missing, which evicts, publishes, and lets go of it when it has finished,
the end of the chain first. The blocks of its answer, where the trace knows them, are stored like
the others; those that are there already become recent, as in a store. Only the copies are left out.
Time is the trace's own: a request ends `Pace.seconds` after it has arrived, so nothing depends on
how fast this runs, and the same trace gives the same decisions, bit for bit; `Outcome.decisions` is
a hash of them.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import NamedTuple

import numpy as np
import posix_ipc

from kvbm._fast.keys import Keys
from kvbm._fast.participants import claim_leader
from kvbm._fast.segment import Segment, shape_for
from kvbm._fast.table import BlockTable
from kvbm.errors import KvbmError
from kvbm.eviction.policy import PolicyMaker, evict_by
from kvbm.replay.trace import Request, Trace

CALLS = ("match", "reserve", "publish", "return")
CAPACITY_MAX = 2**31

_runs = count()


class Pace(NamedTuple):
    """How long a request holds its blocks, in virtual time.

    Attributes
    ----------
    prefill_tokens_s : float
        Prompt tokens an engine computes in a second; 0: at once.
    decode_ms : float
        Milliseconds for a token of the answer.
    """

    prefill_tokens_s: float = 0.0
    decode_ms: float = 0.0

    def seconds(self, request: Request) -> float:
        """Time from a request's arrival to its end."""
        prefill = request.input_tokens / self.prefill_tokens_s if self.prefill_tokens_s else 0.0
        return prefill + request.output_tokens * self.decode_ms / 1000


class DiskOutcome(NamedTuple):
    """What became of the disk tier.

    Attributes
    ----------
    capacity : int
        Its blocks.
    hits : int
        Blocks that a request did not find in the host tier and did find on disk.
    written, read, evicted : int
        Blocks that moved to it and from it, and those that made room for others.
    """

    capacity: int
    hits: int
    written: int
    read: int
    evicted: int


class Outcome(NamedTuple):
    """What became of a trace.

    Attributes
    ----------
    capacity : int
        Blocks of the host tier.
    references, hits : int
        Blocks asked for, and those of them found as part of a request's leading run, in any tier.
    stored, evicted, skipped : int
        Blocks stored, evicted to make room, and not stored because all others were in use.
    cpu_seconds : float
        Processor time of the whole run, on this machine.
    decisions : str
        Hash of every decision: what each request hit and which record each of its blocks got.
    latency_us : dict of str to ndarray
        For each of `CALLS`, the microseconds of every call, float64[calls].
    disk : DiskOutcome or None
        What became of the disk tier, whose hits are among `hits`.
    """

    capacity: int
    references: int
    hits: int
    stored: int
    evicted: int
    skipped: int
    cpu_seconds: float
    decisions: str
    latency_us: dict[str, np.ndarray]
    disk: DiskOutcome | None = None

    @property
    def hit_rate(self) -> float:
        """Share of the references that were hits, 0 to 1."""
        return self.hits / self.references if self.references else 0.0

    @property
    def host_hits(self) -> int:
        """Hits that were in the host tier."""
        return self.hits - (0 if self.disk is None else self.disk.hits)

    @property
    def references_s(self) -> float:
        """Block references a second of processor time."""
        return self.references / self.cpu_seconds if self.cpu_seconds else 0.0


@contextmanager
def private_segment(capacity: int, block_tokens: int) -> Iterator[Segment]:
    """Make a segment that has no name any more, so that nothing can be left, and lead it."""
    name = f"/kvbm-replay-{os.getpid()}-{next(_runs)}"
    shape = shape_for(capacity, 0, 1, block_tokens, True)
    segment = Segment.create(name, shape, bytes(32), b"{}")
    posix_ipc.unlink_shared_memory(name)
    try:
        segment.set_ready_slots(0, capacity)
        claim_leader(segment, 1)
        yield segment
    finally:
        segment.close()


class Run:
    """The state of one replay with a host tier alone."""

    def __init__(self, table: BlockTable, trace: Trace) -> None:
        self.table = table
        distinct = {block for r in trace.requests for block in r.chain}
        # Hashed once: an engine's block hashes exist, too, before the table is asked.
        self.digest = {b: hashlib.sha256(b"%d" % b).digest() for b in distinct}
        # When each running request ends, its number (ties in the order of arrival), its blocks.
        self.running: list[tuple[float, int, list[int]]] = []
        self.hits = 0
        self.skipped = 0
        self.decisions = hashlib.sha256()
        self.latency_ns = {call: array("q") for call in CALLS}

    def end_requests(self, until_s: float) -> None:
        """Return the blocks of the requests that have ended by then."""
        while self.running and self.running[0][0] <= until_s:
            self._return(heapq.heappop(self.running)[2])

    def _return(self, refs: list[int]) -> None:
        clock, unpin = time.perf_counter_ns, self.table.unpin
        began = clock()
        for ref in reversed(refs):
            unpin(ref)
        self.latency_ns["return"].append(clock() - began)

    def request(self, number: int, request: Request, ends_s: float) -> None:
        """Let a request arrive; it ends at `ends_s`."""
        table, clock = self.table, time.perf_counter_ns
        digest = self.digest
        keys = Keys([digest[block] for block in request.chain])
        blocks = len(request.blocks)
        t0 = clock()
        found, deepest = self.match(keys, blocks)
        t1 = clock()
        reserved = table.reserve(keys, found, len(keys), deepest)
        t2 = clock()
        refs = [ref for ref, _ in reserved]
        table.publish(refs)
        t3 = clock()
        self.latency_ns["match"].append(t1 - t0)
        self.latency_ns["reserve"].append(t2 - t1)
        self.latency_ns["publish"].append(t3 - t2)
        hits = min(found, blocks)
        self.hits += hits
        self.skipped += len(keys) - found - len(refs)
        self.decisions.update(array("Q", [hits, *refs]))
        held = refs if deepest is None else [deepest, *refs]
        heapq.heappush(self.running, (ends_s, number, held))

    def match(self, keys: Keys, blocks: int) -> tuple[int, int | None]:
        """Find what is cached of a prompt of so many blocks and its answer; the deepest is held."""
        return self.table.match(keys, 0, len(keys))


def replay(
    trace: Trace,
    capacity: int,
    pace: Pace | None = None,
    progress: Callable[[int], None] | None = None,
    policy: PolicyMaker | None = None,
) -> Outcome:
    """Run a trace through a table of `capacity` blocks.

    Parameters
    ----------
    trace : Trace
        The requests.
    capacity : int
        Blocks of the host tier, 1 to 2**31.
    pace : Pace, optional
        How long requests hold their blocks. By default each has ended when the next arrives.
    progress : callable, optional
        Called with the number of references done since the last call.
    policy : callable, optional
        Makes the policy of eviction; without one, the order is upstream's.
    """
    check_capacity(capacity)
    with private_segment(capacity, trace.block_tokens) as segment:
        table = BlockTable(segment)
        evict_by(table, policy)
        outcome = drive(Run(table, trace), trace, capacity, pace, progress)
        check_policy(table, policy)
        return outcome


def check_policy(table: BlockTable, policy: PolicyMaker | None) -> None:
    """Refuse to call the hits of upstream's order those of a policy that has failed."""
    if policy is not None and table.uses is None:
        raise KvbmError("the eviction policy failed; its error is above")


def check_capacity(blocks: int) -> None:
    """Refuse a size that no tier can have."""
    if not 1 <= blocks <= CAPACITY_MAX:
        raise ValueError(f"capacity {blocks}: 1 to {CAPACITY_MAX} blocks")


def drive(
    run: Run,
    trace: Trace,
    capacity: int,
    pace: Pace | None = None,
    progress: Callable[[int], None] | None = None,
) -> Outcome:
    """Let all requests of a trace arrive and end, in the order of their times."""
    pace = pace or Pace()
    began = time.thread_time()
    for number, request in enumerate(trace.requests):
        now_s = request.timestamp_ms / 1000
        run.end_requests(now_s)
        run.request(number, request, now_s + pace.seconds(request))
        if progress is not None:
            progress(len(request.blocks))
    run.end_requests(float("inf"))
    cpu_seconds = time.thread_time() - began
    counters = run.table.segment.counters()
    latency_us = {
        call: np.frombuffer(ns, dtype=np.int64) / 1000 for call, ns in run.latency_ns.items()
    }
    return Outcome(
        capacity=capacity,
        references=trace.references,
        hits=run.hits,
        stored=counters["published"],
        evicted=counters["evicted"],
        skipped=run.skipped,
        cpu_seconds=cpu_seconds,
        decisions=run.decisions.hexdigest(),
        latency_us=latency_us,
    )
